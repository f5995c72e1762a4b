"""What the published DataLens code does to its own ε: shared Adam moments and a wrapping partition, witnessed by a canary.

A run promises ε = 1. One record gets another label, both runs follow the same votes, and every move of a noise-free sum is
counted (`qleak/synth/canary.py`). 1,000 teachers in 40 sets, top-5 plain signs, 20 steps, MNIST at 8×8.

Measured (mean of 3 seeds): teachers that keep apart: 1 teacher changes, one sum moves 0.68 of the promised sensitivity, the
divergence is 0.0024 of at most 0.0359. Moments shared by sets: 40 teachers change (one in every set), one sum moves 2.6 times as
far as promised, the divergence is 0.012. Records dealt by class: one label moves others, all 1,000 teachers change, one sum
moves 23 times as far, divergence 1.90: Gaussian noise of ε = 9.7, not 1. Both, as published: 25 times, 1.50, ε = 8.4.
A canary that stays below the promise, as with shared moments over the whole run, proves nothing; one sum beyond its
sensitivity proves that the accounting is unfounded.

Claims:
    as promised synthesis canary_reach <= 1.0001
    as promised synthesis canary_teachers <= 1
    moments shared by sets synthesis canary_teachers >= 40
    moments shared by sets synthesis canary_reach >= 1.2
    records dealt by class, wrapping synthesis canary_epsilon >= 4
    both, as published synthesis canary_epsilon >= 4
"""

from qleak.catalog import build
from qleak.plans import Synthesis

CASES = {
    "as promised": "moments='own', dealing='index'",
    "moments shared by sets": "moments='shared', dealing='index'",
    "records dealt by class, wrapping": "moments='own', dealing='wrapped'",
    "both, as published": "moments='shared', dealing='wrapped'",
}


def datalens_defects(
    dataset: str = "mnist",
    size: int = 8,
    teachers_batch: int = 40,
    batch_teachers: int = 25,
    batch_size: int = 10,
    topk: int = 5,
    thresh: float = 0.1,
    steps: int = 20,
    max_eps: float = 1.0,
    canary: str = "relabelled",
    critic: str = "linear_critic()",
    limit: int = 0,
    test: int = 0,
    seeds: int = 3,
    full: bool = False,
) -> Synthesis:
    """The plan.

    Args:
        dataset: private records.
        size: images are averaged down to size × size pixels.
        teachers_batch: sets of teachers, which share moments where the defect is on.
        batch_teachers: teachers of a set.
        batch_size: images of a step.
        topk: coordinates a teacher votes on, by their plain sign: the canary is exact for votes without a coin.
        thresh: a direction needs this share of all teachers.
        steps: generator steps; the noise spends max_eps in them, if the promise held.
        max_eps: what is promised.
        canary: how the record is replaced: bright (all white), inverted, or relabelled.
        critic: discriminator of the teachers.
        limit: private records; 0 for all.
        test: test images; 0 for all.
        seeds: syntheses per case.
        full: the published size, for a GPU.
    """
    if full:
        size, teachers_batch, batch_teachers, batch_size, topk, thresh, steps = 28, 80, 50, 30, 200, 0.7, 86
        critic = "dcgan_critic()"
    n = teachers_batch * batch_teachers
    vote = f"top_k(k={topk}), sign('none'), total('replace-one'), gaussian(100.0), threshold({thresh * n})"
    common = (
        f"critic={critic}, maker={'dcgan_maker()' if full else 'mlp_maker()'}, channel=chain({vote}), "
        f"teachers_batch={teachers_batch}, batch_teachers={batch_teachers}, batch_size={batch_size}, steps={steps}, "
        f"maker_rate=0.002, labels='balanced', calibrate=True"
    )
    return Synthesis(
        data=dataset,
        methods=tuple(build("synthesizers", f"datalens({common}, {how})") for how in CASES.values()),
        names=tuple(CASES),
        classifiers=(build("classifiers", "mlp_classifier"),),
        size=size,
        limit=limit,
        test_limit=test,
        epsilons=(max_eps,),
        seeds=seeds,
        files=0,
        quality=False,
        non_release=True,
        canary=canary,
    )

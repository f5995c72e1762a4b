"""DataLens taken apart at one exact ε: compression × threshold × number of teachers × k, each with its own share of noise.

Every arm spends exactly ε = 1 in 50 steps of ten images: σ follows from the arm's sensitivity, 2√k for signs of k pixels and
2 for vectors of length 1. MNIST at 8×8 pixels, class-linear critics; a perceptron learns from 10,000 samples.

Measured (test accuracy at the last epoch, mean of 5 seeds; 4,000 / 1,000 / 100 teachers): top-5 stochastic signs without a
threshold 61 / 55 / 9 %, with β = 0.1 59 / 47 / 10, with β = 0.4 14 / 49 / 10; signs of all 64 pixels 71 / 58 / 16, 70 / 56 / 15,
70 / 55 / 15; length 1 without compression 73 / 64 / 16; no privacy at all 69 / 72 / 65. The floor, one noisy average: 78 %.
So compression costs accuracy at equal ε wherever there is signal, no threshold gains any, a hundred teachers learn nothing,
and no arm clears the floor. CPU: 11.8 s without privacy, 12.5 for length 1, 14.6 for top-5, 22 for all signs (4,000 teachers).

Claims:
    4000 teachers, l2 synthesis accuracy >= 0.68
    4000 teachers, top-5 sign, β 0.1 synthesis accuracy >= 0.5
    4000 teachers, sign, β 0.1 synthesis accuracy >= 0.65
    4000 teachers, l2 synthesis epsilon <= 1
    1000 teachers, l2 synthesis accuracy >= 0.58
    1000 teachers, top-5 sign, β 0.4 synthesis accuracy <= 0.6
    100 teachers, top-5 sign, β 0.1 synthesis accuracy <= 0.25
"""

from dataclasses import replace

from qleak.check import Expected
from qleak.plans import Synthesis
from qleak.plans.lens import lens
from qleak.plans.levels import levels


def datalens_ablation(
    dataset: str = "mnist",
    teachers: str = "4000,1000,100",
    topk: str = "5,64",
    thresh: str = "none,0.1,0.4",
    others: str = "l2,non_private",
    size: int = 8,
    batch_size: int = 10,
    steps: int = 50,
    max_eps: float = 1.0,
    max_grad: float = 1e-3,
    critic: str = "linear_critic",
    d_step: int = 2,
    pretrain_teacher: int = 10,
    learning_rate: float = 1e-3,
    classifiers: str = "mlp_classifier",
    limit: int = 0,
    test: int = 0,
    seeds: int = 5,
    full: bool = False,
) -> Synthesis:
    """The plan.

    Args:
        dataset: private records.
        teachers: numbers of teachers separated by commas, multiples of 100 (or below).
        topk: coordinates a teacher votes on, separated by commas; as many as there are is no selection.
        thresh: shares of teachers that a direction needs, separated by commas; none for no threshold.
        others: aggregators beside, such as l2, non_private, klevelsgd, sketchsgd, random_proj, separated by commas.
        size: images are averaged down to size × size pixels.
        batch_size: images of a step.
        steps: generator steps; σ spends exactly max_eps in them, whatever the arm.
        max_eps: the budget, at δ = 1e-5.
        max_grad: cap b of the coin.
        critic: discriminator of the teachers: linear_critic, projection_critic, dcgan_critic, simple_critic.
        d_step: discriminator steps before a vote.
        pretrain_teacher: discriminator steps in the first epoch.
        learning_rate: of teachers.
        classifiers: judges separated by ";".
        limit: private records; 0 for all.
        test: test images; 0 for all.
        seeds: syntheses per arm.
        full: 28×28, DCGANs, k 200 and 784, thresholds 0.2 and 0.7, 4,000 and 2,000 teachers, for a GPU.
    """
    counts = [int(n) for n in levels(teachers, "teachers")]
    kept, shares = [int(k) for k in levels(topk, "topk")], levels(thresh, "thresh")
    bare = "none" in thresh
    if full:
        counts, kept, shares, size, critic, steps = [4000, 2000], [200, 784], (0.2, 0.7), 28, "dcgan_critic", 86
    made: list[tuple[str, Synthesis]] = []
    for n in counts:
        width = min(n, 100)
        if n % width:
            raise Expected(
                f"Expected teachers={n} as a multiple of {width}: sets of {width} share their first weights."
            )
        common = {
            "dataset": dataset, "size": size, "teachers_batch": n // width, "batch_teachers": width, "batch_size": batch_size,
            "steps": steps, "epoch": steps, "max_eps": str(max_eps), "max_grad": max_grad, "critic": critic, "d_step": d_step,
            "maker": "dcgan_maker" if full else "mlp_maker", "pretrain_teacher": pretrain_teacher,
            "learning_rate": learning_rate, "classifiers": classifiers, "limit": limit, "test": test, "seeds": seeds,
            "eval_every": 0, "files": 0,
        }  # fmt: skip
        for k in kept:
            signs = "sign" if k >= size * size else f"top-{k} sign"
            if bare:
                made.append(
                    (f"{n} teachers, {signs}, no threshold", lens(aggregate="signsgd_nothresh", topk=k, **common))
                )
            for share in shares:
                made.append(
                    (f"{n} teachers, {signs}, β {share:g}", lens(aggregate="signsgd", topk=k, thresh=share, **common))
                )
        for arm in (a.strip() for a in others.split(",") if a.strip()):
            made.append((f"{n} teachers, {arm}", lens(aggregate=arm, topk=kept[0], **common)))
    first = made[0][1]
    return replace(first, methods=tuple(p.methods[0] for _, p in made), names=tuple(name for name, _ in made))

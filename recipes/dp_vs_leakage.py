"""At which ε does reconstruction stop, and is there any accuracy left? The same private channels for attacker and server.

Three families of noise: Laplace behind an L1 bound and Gaussian behind an L2 bound on a client's own gradient (the server
is not trusted), and DP-SGD (every example's gradient shortened, noise on their sum). The attacked message is the one that
leaks most: one image, untrained weights, an attacker who knows the channel; in DP-SGD the batch holds that image alone
and the sum is still divided by the batch of the training. Two ε stand beside each other: of that one message, and of the
whole training at δ = 1e-5.

Measured (four digits, ReLU convnet of width 8; 92.8 % and 22.3 dB, 3 of 4 rebuilt, without noise): pictures are gone while
accuracy is not. At an ε of one message of 10⁶ Laplace noise leaves 18.6 dB (1 of 4) at 89.3 %, Gaussian 22.0 dB (4 of 4) at
92.6 %; at 3,000 nothing is rebuilt (10.5 dB, the prior's level) at 86.7 and 84.6 %. Labels go much later: all found at 92,
half at 4. What a training costs decides the rest: DP-SGD has 78.8 % at ε 0.91 of the whole training, clients who add their
own noise are at chance at ε 520 and more.

Claims:
    fp32 study psnr >= 18
    clip_l2 > total > gaussian > mean(batch=64) study psnr <= 14
    clip_l2 > total > gaussian > mean(batch=64) study test_accuracy >= 0.7
    clip_l1(bound=10.0) > laplace(eps=3000.0) study psnr <= 14
    clip_l1(bound=10.0) > laplace(eps=3000.0) study test_accuracy >= 0.82
    clip_l2 > gaussian study test_accuracy <= 0.2
"""

from qleak.catalog import build, several
from qleak.channels import chain, clip_l1, clip_l2, gaussian, laplace, mean, total
from qleak.client import gradient, per_example
from qleak.plans import Audit, Study, Training
from qleak.plans.levels import gaussian_sigma, levels
from qleak.train import sgd


def dp_vs_leakage(
    eps: str = "10,3000,1000000",
    bound_l1: float = 10.0,
    bound_l2: float = 1.0,
    multipliers: str = "0.01,0.1,1",
    data: str = "mnist",
    model: str = "convnet(channels=1, size=28, width=8)",
    attacks: str = "adaptive",
    images: int = 4,
    restarts: int = 1,
    batch: int = 64,
    epochs: int = 2,
    lr: float = 0.1,
    limit: int = 6400,
    test: int = 2000,
    seeds: int = 3,
    full: bool = False,
) -> Study:
    """The plan.

    Args:
        eps: ε of one message of a client that adds its own noise, separated by commas, for Laplace and Gaussian alike.
        bound_l1: S, what a gradient's L1 norm is shortened to in front of Laplace noise.
        bound_l2: C, what an L2 norm is shortened to in front of Gaussian noise.
        multipliers: σ/C of DP-SGD, separated by commas.
        data: a data set with a test split, of the model's shape.
        model: a model of `qleak ls models`.
        attacks: attacks separated by ";": of each channel's the strongest counts.
        images: victims of the audits.
        restarts: restarts on each of them.
        batch: images of one gradient of the trainings, expected size of DP-SGD's batches.
        epochs: passes over the training images.
        lr: learning rate of SGD with momentum 0.9.
        limit: training images; 0 for all.
        test: test images; 0 for all.
        seeds: trainings per channel.
        full: 16 restarts, all images, 10 epochs.
    """
    net, chosen = build("models", model), levels(eps, "eps")
    alone = (
        chain(),
        *(chain(clip_l1(bound_l1), laplace(eps=e)) for e in chosen),
        *(chain(clip_l2(bound_l2), gaussian(gaussian_sigma(e, 2 * bound_l2))) for e in chosen),
    )
    summed = tuple(
        chain(clip_l2(bound_l2), total(), gaussian(float(f"{z * bound_l2:.6g}")), mean(batch))
        for z in levels(multipliers, "multipliers")
    )
    attacked = {
        "model": net, "data": data, "victims": tuple(range(images)), "attacks": several("attacks", attacks, ("adaptive",)), "wrong": 1,
        "restarts": 16 if full else restarts,
    }  # fmt: skip
    learnt = {
        "model": net, "data": data, "rule": sgd(momentum=0.9), "lr": lr, "seeds": seeds, "epochs": 10 if full else epochs,
        "limit": 0 if full else limit, "test_limit": 0 if full else test,
    }  # fmt: skip
    parts = {
        "leakage": Audit(channels=alone, **attacked),
        "leakage-dp-sgd": Audit(channels=summed, client=per_example(), **attacked),
        "accuracy": Training(channels=alone, client=gradient(batch=batch), **learnt),
        "accuracy-dp-sgd": Training(channels=summed, client=per_example(batch=batch), sampling="poisson", **learnt),
    }
    return Study(tuple(parts), tuple(parts.values()))

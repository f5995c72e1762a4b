"""What noise with a true ε leaves of a net with 1.2 million weights: Laplace behind an L1 bound, Gaussian behind an L2 bound.

`local`: clients trust nobody; each shortens its whole update, all tensors together, adds the noise itself, and ε adds up
over the rounds it takes part in (any update may be replaced by any other: sensitivity 2S). `central`: a trusted server
shortens every example's gradient, adds noise to the sum, and Poisson sampling amplifies. The eps of the flags is that of
one message, the same for both mechanisms; ε of the whole training at δ = 1e-5 stands in every row.

By arithmetic, not by measurement: Laplace noise of scale β on d coordinates has the L2 norm √(2d)·β, 1549·β for this net.
A local message has β = 2S/eps and a signal of L2 norm at most S, so that the noise is 3098/eps times longer than the
longest signal there is; and an update of even entries is √d, 1095 times, shorter in L2 than its L1 bound.

Measured (20 rounds, three seeds; ε of one message 1, 10, 100; test accuracy): Laplace noise learns nothing at any of them,
local (11 %) or central (6.5, 6.9, 8.2 %). Gaussian noise: local 8.3, 11.9, 42.0 % of 81.1 (ε of the training 2.7, 32, 441),
central 18.9, 56.7, 65.7 % of 77.7 (0.037, 4.8, 221).

Claims:
    local clip_l1 > laplace(eps=100.0) training test_accuracy <= 0.2
    central clip_l1 > total > laplace(eps=100.0) > mean(batch=64) training test_accuracy <= 0.2
    central clip_l2 > total > gaussian(sigma=0.5) > mean(batch=64) training test_accuracy >= 0.45
    local clip_l2 > gaussian training test_accuracy <= 0.2
"""

from qleak.catalog import build
from qleak.channels import chain, clip_l1, clip_l2, gaussian, laplace, mean, total
from qleak.check import one_of
from qleak.client import gradient, per_example
from qleak.plans import Study, Training
from qleak.plans.levels import gaussian_sigma, levels
from qleak.train import adadelta


def laplace_fl_honest(
    eps: str = "1,10,100",
    bound_l1: float = 1.0,
    bound_l2: float = 1.0,
    mode: str = "both",
    clients: int = 40,
    participation: float = 0.1,
    steps: int = 20,
    epochs: int = 1,
    batch: int = 64,
    lr: float = 1.0,
    limit: int = 6400,
    test: int = 1000,
    seeds: int = 3,
    data: str = "mnist",
    model: str = "mnist_net",
    full: bool = False,
) -> Study:
    """The plan.

    Args:
        eps: ε of one message, separated by commas; Gaussian noise is calibrated to it at δ = 1e-5.
        bound_l1: S, what no row's L1 norm exceeds in front of Laplace noise.
        bound_l2: C, what no row's L2 norm exceeds in front of Gaussian noise.
        mode: "local", "central", or "both", a part each.
        clients: population of the local part, each with its own images.
        participation: share of it that takes part in a round.
        steps: rounds of an epoch.
        epochs: epochs.
        batch: images of a client's gradient, and expected size of a Poisson batch.
        lr: learning rate of Adadelta.
        limit: training images; 0 for all.
        test: test images; 0 for all.
        seeds: trainings per channel.
        data: a data set of the model's shape.
        model: a model of `qleak ls models`.
        full: all images, 938 steps an epoch, 14 epochs.
    """
    one_of(["both", "local", "central"], mode=mode)
    chosen = levels(eps, "eps")
    local = (
        chain(),
        *(chain(clip_l1(bound_l1), laplace(eps=e)) for e in chosen),
        *(chain(clip_l2(bound_l2), gaussian(gaussian_sigma(e, 2 * bound_l2))) for e in chosen),
    )
    central = (
        chain(total(), mean(batch)),
        *(chain(clip_l1(bound_l1), total(), laplace(eps=e), mean(batch)) for e in chosen),
        *(chain(clip_l2(bound_l2), total(), gaussian(gaussian_sigma(e, bound_l2)), mean(batch)) for e in chosen),
    )
    shared = {
        "model": build("models", model), "data": data, "rule": adadelta(), "lr": lr, "schedule": "decay(0.7)", "seeds": seeds,
        "limit": 0 if full else limit, "test_limit": 0 if full else test, "epochs": 14 if full else epochs,
        "epoch_rounds": 938 if full else steps, "update_norms": True,
    }  # fmt: skip
    parts = {
        "local": Training(
            channels=local, client=gradient(batch=batch), clients=clients, participation=participation, **shared
        ),
        "central": Training(channels=central, client=per_example(batch=batch), sampling="poisson", **shared),
    }
    names = ("local", "central") if mode == "both" else (mode,)
    return Study(names, tuple(parts[name] for name in names))

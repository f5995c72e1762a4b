"""What a channel costs in accuracy: 16 levels, a sign bit or keep-60 % nothing to speak of, four biased levels two seeds of three.

One ReLU convolutional net trained through each channel on 10,000 images of Fashion-MNIST, 4 epochs, three seeds. Every seed
has its own weights and order of images, the same for every channel, so differences are paired. `--data cifar10-12k`
takes the 10,000 training and 2,000 test images of that file instead.

Claims:
    fp32 training test_accuracy >= 0.82
    uniform(levels=16) training test_accuracy >= 0.82
    stochastic(levels=16) training test_accuracy >= 0.82
    sign training test_accuracy >= 0.82
    top_k(ratio=0.01) training test_accuracy >= 0.77
    uniform(levels=4) training test_accuracy <= 0.75
"""

from qleak.attacks import adaptive, dlg
from qleak.catalog import build, several
from qleak.client import gradient
from qleak.plans import Training
from qleak.train import sgd

CHANNELS = (
    "chain()",
    "chain(uniform(levels=256))",
    "chain(uniform(levels=16))",
    "chain(uniform(levels=4))",
    "chain(stochastic(levels=16))",
    "chain(sign())",
    "chain(top_k(ratio=0.01))",
    "chain(top_k(ratio=0.8))",
    "chain(top_k(ratio=0.6))",
)


def accuracy_under_channel(
    data: str = "fashion_mnist",
    model: str = "",
    channels: str = "all",
    epochs: int = 4,
    limit: int = 10000,
    seeds: int = 3,
    batch: int = 64,
    lr: float = 0.05,
    clients: int = 1,
    split: str = "iid",
    attack_rounds: str = "",
    full: bool = False,
) -> Training:
    """The plan.

    Args:
        data: a data set with a test split.
        model: a model of `qleak ls models`; empty: `convnet` of the set's shape.
        channels: "all", or channels separated by ";".
        epochs: passes over the training images.
        limit: training images; 0 for all.
        seeds: trainings per channel.
        batch: images of one client's gradient.
        lr: learning rate of SGD with momentum 0.9.
        clients: clients that are averaged in a round.
        split: how images are dealt out to clients, "iid" or "dirichlet(0.5)".
        attack_rounds: rounds, e.g. 1,10,100, whose weights are attacked through the same channels, on the first batches.
        full: all images, 10 epochs.
    """
    return Training(
        model=build("models", model or shape_of(data)),
        data=data,
        channels=several("channels", channels, CHANNELS),
        client=gradient(batch=batch),
        clients=clients,
        split=split,
        epochs=10 if full else epochs,
        rule=sgd(momentum=0.9),
        lr=lr,
        limit=0 if full else limit,
        seeds=seeds,
        attack_rounds=tuple(int(r) for r in attack_rounds.split(",") if r),
        attacks=(dlg(outer=20), adaptive()) if attack_rounds else (),
    )


def shape_of(data: str) -> str:
    """The convolutional net for colour sets of 32×32 or grey ones of 28×28."""
    return "convnet" if data.startswith(("cifar", "svhn")) else "convnet(channels=1, size=28)"

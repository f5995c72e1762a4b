"""Privacy, accuracy and bits of the same channels in one table and one figure: an audit and a training, joined.

One ReLU convolutional net and one data set: its untrained gradients are attacked by one who knows the channel, and it
is trained through the channel. A point beats another if it leaks less and learns more.

Measured (four Fashion-MNIST images; 79.8 % ± 1.4 without a channel): 256 levels give 38.2 dB for 79.7 %, QSGD 24.1 for
79.3, a sign bit 16.1 for 78.5, TernGrad 11.8 for 78.9: coins protect where coarseness alone does not. Noise of 0.1
protects (8.6 dB) and learns nothing (11 %).

Claims:
    fp32 study psnr >= 40
    uniform(levels=256) study psnr >= 33
    sign study psnr >= 13
    sign study test_accuracy >= 0.74
    terngrad study psnr <= 15
    terngrad study test_accuracy >= 0.72
    gaussian(sigma=0.1, unbounded=True) study test_accuracy <= 0.25
"""

from qleak.catalog import build, several
from qleak.client import gradient
from qleak.plans import Audit, Study, Training
from qleak.train import sgd

CHANNELS = (
    "chain()",
    "chain(uniform(levels=256))",
    "chain(uniform(levels=16))",
    "chain(uniform(levels=4))",
    "chain(stochastic(levels=16))",
    "chain(stochastic(levels=4))",
    "chain(sign())",
    "chain(terngrad())",
    "chain(qsgd())",
    "chain(top_k(ratio=0.1))",
    "chain(top_k(ratio=0.01))",
    "chain(gaussian(sigma=0.01, unbounded=True))",
    "chain(gaussian(sigma=0.1, unbounded=True))",
)


def frontier(
    data: str = "fashion_mnist",
    model: str = "convnet(channels=1, size=28)",
    channels: str = "all",
    images: int = 4,
    restarts: int = 1,
    epochs: int = 2,
    limit: int = 6000,
    seeds: int = 3,
    attacks: str = "all",
    full: bool = False,
) -> Study:
    """The plan.

    Args:
        data: a data set with a test split, of the model's shape.
        model: a model of `qleak ls models`.
        channels: "all", or channels separated by ";".
        images: victims of the audit.
        restarts: restarts on each of them.
        epochs: passes over the training images.
        limit: training images; 0 for all.
        seeds: trainings per channel.
        attacks: "all", or attacks separated by ";".
        full: 16 restarts, all images, 10 epochs.
    """
    chosen = several("channels", channels, CHANNELS)
    net = build("models", model)
    audit = Audit(
        model=net,
        data=data,
        victims=tuple(range(images)),
        channels=chosen,
        attacks=several("attacks", attacks, (f"dlg(outer={300 if full else 20})", "adaptive()")),
        restarts=16 if full else restarts,
        wrong=1,
    )
    training = Training(
        model=net,
        data=data,
        channels=chosen,
        client=gradient(batch=64),
        epochs=10 if full else epochs,
        rule=sgd(momentum=0.9),
        limit=0 if full else limit,
        seeds=seeds,
    )
    return Study(("leakage", "accuracy"), (audit, training))

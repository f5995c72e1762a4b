"""The defences of the 2019 paper, against its attack and against one who knows the defence, with their accuracy.

Zhu, Liu, Han (NeurIPS 2019), section 5: Gaussian and Laplace noise of variance-matched size, half precision, int8,
pruning of 1 to 70 % of the gradient. The leakage is that of their net, an untrained sigmoid LeNet; the accuracy that of
a convolutional net trained through the same channels.

Measured (four photographs; Fashion-MNIST, 76.7 % ± 6.9 without a defence): none of the defences that keep the accuracy
stops an attacker who knows it. Half precision 42.4 and 39.3 dB, int8 32.2, keep 30 % 29.9, noise of 0.01 24.6 dB, all
with the accuracy of none; noise of 0.1 (14.0 dB) costs all of it. The 2019 attack itself stays under 11 dB everywhere
within its 400 closures.

Claims:
    float16 study psnr >= 38
    bfloat16 study psnr >= 35
    uniform(bits=8) study psnr >= 28
    uniform(bits=8) study test_accuracy >= 0.72
    top_k(ratio=0.3) study psnr >= 26
    top_k(ratio=0.3) study test_accuracy >= 0.70
    gaussian(sigma=0.01, unbounded=True) study psnr >= 22
    gaussian(sigma=0.01, unbounded=True) study test_accuracy >= 0.72
    gaussian(sigma=0.1, unbounded=True) study psnr <= 17
    gaussian(sigma=0.1, unbounded=True) study test_accuracy <= 0.2
"""

from qleak.catalog import build, several
from qleak.client import gradient
from qleak.plans import Audit, Study, Training
from qleak.train import sgd

NOISE = (1e-4, 1e-3, 1e-2, 1e-1)
PRUNED = (0.01, 0.1, 0.2, 0.3, 0.5, 0.7)
CHANNELS = (
    "chain()",
    *(f"chain(gaussian(sigma={s}, unbounded=True))" for s in NOISE),
    *(f"chain(laplace(scale={s / 2**0.5:.2g}, unbounded=True))" for s in NOISE),
    "chain(float16())",
    "chain(bfloat16())",
    "chain(uniform(bits=8))",
    *(f"chain(top_k(ratio={1 - p:g}))" for p in PRUNED),
)


def dlg_defences(
    channels: str = "all",
    images: int = 4,
    restarts: int = 1,
    data: str = "fashion_mnist",
    epochs: int = 2,
    limit: int = 4000,
    seeds: int = 3,
    attacks: str = "all",
    full: bool = False,
) -> Study:
    """The plan.

    Args:
        channels: "all", or channels separated by ";".
        images: photographs attacked.
        restarts: restarts on each of them.
        data: the set that is learnt.
        epochs: passes over the training images.
        limit: training images; 0 for all.
        seeds: trainings per channel.
        attacks: "all", or attacks separated by ";".
        full: the 2019 attack at 300 × 20 closures and 16 restarts, all images, 10 epochs.
    """
    chosen = several("channels", channels, CHANNELS)
    grey = not data.startswith(("cifar", "svhn"))
    audit = Audit(
        model=build("models", "lenet"),
        data="photos",
        victims=tuple(range(images)),
        channels=chosen,
        attacks=several("attacks", attacks, (f"dlg(outer={300 if full else 30})", "adaptive()")),
        restarts=16 if full else restarts,
        wrong=1,
    )
    training = Training(
        model=build("models", "convnet(channels=1, size=28)" if grey else "convnet"),
        data=data,
        channels=chosen,
        client=gradient(batch=64),
        epochs=10 if full else epochs,
        rule=sgd(momentum=0.9),
        limit=0 if full else limit,
        seeds=seeds,
    )
    return Study(("leakage", "accuracy"), (audit, training))

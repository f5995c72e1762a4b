"""Inverting gradients on a residual net: cosine distance, signed Adam and total variation, one colour image at a time.

Geiping, Bauermeister, Dröge, Moeller (NeurIPS 2020) attack residual nets on CIFAR-10, untrained and trained, with batch
norm by running statistics. `--model run:ID` takes a net that a training run wrote.

Measured (untrained, 8 images spread over 12,000): ResNet-20 15.2 dB with 600 steps, 15.0 with a tenth of the total variation
and the best of four starts by their own loss (`--variation 0.001 --restarts 4`; 15.2 by the truth: starts are not what limits
it), the prior alone 10.9; ConvNet-64 16.3 on two images. More steps (1,200, 1,600) gave no more. On the same ResNet-20
trained for three epochs of 10,000 images (27 %; 4 images, 400 steps) the attack has 8.6 dB, less than the prior alone (11.4).

Claims (--data cifar10-12k):
    fp32 inverting_gradients psnr_selected >= 14
    fp32 inverting_gradients psnr_selected <= 17
"""

from qleak.attacks import inverting_gradients, modern
from qleak.catalog import several
from qleak.plans import Audit
from qleak.plans.victims import fitting, spread


def inverting_gradients_cifar10(
    images: int = 8,
    steps: int = 600,
    model: str = "resnet(depth=20, mode='eval')",
    data: str = "cifar10",
    channels: str = "chain()",
    variation: float = 0.01,
    restarts: int = 1,
    both: bool = False,
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        images: images attacked, spread over the set.
        steps: closures of the attack; the learning rate falls at 3/8, 5/8 and 7/8 of them.
        model: a model of `qleak ls models` for 32×32 colour images, or run:ID.
        data: a data set that fits it, such as cifar10-12k.
        channels: channels separated by ";".
        variation: weight of total variation.
        restarts: random starts on each image.
        both: run `modern`, the later settings of the same attack, beside it.
        full: the paper's 24,000 closures, 100 images.
    """
    steps = 24000 if full else steps
    net, count = fitting(model, data)
    attack = inverting_gradients(steps=steps, variation=variation)
    return Audit(
        model=net,
        data=data,
        victims=spread(count, 1, 100 if full else images),
        channels=several("channels", channels, ("chain()",)),
        attacks=(attack, modern(steps=steps)) if both else (attack,),
        restarts=restarts,
        wrong=1,
        chunk=4,
    )

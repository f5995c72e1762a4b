"""LeNet-5: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition" (1998)."""

from __future__ import annotations

from torch import nn

from qleak.catalog import factory
from qleak.check import at_least, whole
from qleak.models.fresh import blank
from qleak.models.module import from_module
from qleak.models.norm import Activation
from qleak.types import Model


@factory
def lenet5(channels: int = 1, size: int = 28, classes: int = 10, function: str = "tanh") -> Model:
    """6 and 16 5×5 convolutions, 2×2 mean-pooling behind each, then linear layers of 120 and 84 and the logits.

    As it is used today: every map of the second convolution sees all six of the first, pooling has no
    weights, and the last layer is linear in place of radial basis functions. Images below 32×32
    are padded by two pixels, as MNIST's were.

    Args:
        channels: image channels c.
        size: image height and width, at least 12.
        classes: number of logits.
        function: activation, see `qleak.models.layers.ACTIVATIONS`.
    """
    whole(channels=channels, size=size, classes=classes)
    at_least(1, channels=channels, classes=classes)
    at_least(12, size=size)
    return from_module(blank(_lenet5, channels, size, classes, function), (channels, size, size), classes, fresh=True)


def _lenet5(channels: int, size: int, classes: int, function: str) -> nn.Module:
    padding = 2 if size < 32 else 0
    side = ((size + 2 * padding - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=padding), Activation(function), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), Activation(function), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(16 * side**2, 120), Activation(function),
        nn.Linear(120, 84), Activation(function),
        nn.Linear(84, classes),
    )  # fmt: skip

"""A multilayer perceptron."""

from __future__ import annotations

from itertools import pairwise

from qleak.catalog import factory
from qleak.check import at_least, whole
from qleak.models.layers import activation, flatten, linear, sequential
from qleak.types import Layer, Model


@factory
def mlp(
    channels: int = 1,
    size: int = 28,
    classes: int = 10,
    hidden: tuple[int, ...] = (128, 64),
    function: str = "sigmoid",
) -> Model:
    """Linear layers of the widths `hidden` with `function` between them; torch's default initialisation.

    Args:
        channels: image channels c.
        size: image height and width.
        classes: number of logits.
        hidden: widths of the hidden layers.
        function: activation, see `qleak.models.layers.ACTIVATIONS`.
    """
    whole(channels=channels, size=size, classes=classes)
    at_least(1, channels=channels, size=size, classes=classes)
    widths = [channels * size * size, *hidden]
    layers: list[Layer] = [flatten()]
    for i, (cin, cout) in enumerate(pairwise(widths), start=1):
        at_least(1, hidden=cout)
        layers += [linear(f"fc{i}", cin, cout), activation(function)]
    return sequential([*layers, linear(f"fc{len(widths)}", widths[-1], classes)], (channels, size, size))


@factory
def deep_mlp(
    channels: int = 1,
    size: int = 28,
    classes: int = 10,
    depth: int = 4,
    width: int = 128,
    function: str = "sigmoid",
) -> Model:
    """`mlp` with `depth` hidden layers of one width.

    Args:
        channels: image channels c.
        size: image height and width.
        classes: number of logits.
        depth: number of hidden layers; 0 is softmax regression.
        width: units of each.
        function: activation, see `qleak.models.layers.ACTIVATIONS`.
    """
    whole(depth=depth, width=width)
    at_least(0, depth=depth)
    return mlp(channels, size, classes, (width,) * depth, function)

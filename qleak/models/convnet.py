"""A plain ReLU convolutional net, for training."""

from __future__ import annotations

import math

from qleak import random
from qleak.catalog import factory
from qleak.check import at_least, one_of, whole
from qleak.models.layers import activation, conv, default_init, flatten, linear, sequential, shapes, wide_init
from qleak.types import Layer, Model, Params


@factory
def convnet(
    channels: int = 3,
    size: int = 32,
    classes: int = 10,
    width: int = 32,
    function: str = "relu",
    init: str = "default",
) -> Model:
    """Three 3×3 convolutions of stride 2 (widths w, 2w, 4w; padding 1) with `function`, then one linear layer.

    Strides in place of pooling (Springenberg et al. 2015, "Striving for Simplicity"), so that every
    layer is declared and the explicit derivatives and the closed form see the whole net.

    Args:
        channels: image channels c.
        size: image height and width.
        classes: number of logits.
        width: channels of the first convolution.
        function: activation, see `qleak.models.layers.ACTIVATIONS`.
        init: "default" (torch's U(±1/√fan_in)), "he" (N(0, 2/fan_in), biases 0: He et al. 2015) or "wide".
    """
    whole(channels=channels, size=size, classes=classes, width=width)
    at_least(1, channels=channels, classes=classes, width=width)
    at_least(4, size=size)
    one_of(INITS, init=init)
    side = math.ceil(math.ceil(math.ceil(size / 2) / 2) / 2)
    layers = [
        conv("conv1", channels, width, 3, stride=2, padding=1),
        activation(function),
        conv("conv2", width, 2 * width, 3, stride=2, padding=1),
        activation(function),
        conv("conv3", 2 * width, 4 * width, 3, stride=2, padding=1),
        activation(function),
        flatten(),
        linear("fc", 4 * width * side**2, classes),
    ]
    return sequential(layers, (channels, size, size), INITS[init])


def he_init(gen: random.Generator, layer: Layer) -> Params:
    """Weights ~ N(0, 2/fan_in), biases 0: keeps the variance of ReLU activations from layer to layer."""
    fan_in = layer.options["in"] * layer.options.get("kernel", 1) ** 2
    drawn = {k: random.normal(gen, s) * math.sqrt(2 / fan_in) for k, s in shapes(layer).items()}
    return {k: v if v.ndim > 1 else v * 0 for k, v in drawn.items()}


INITS = {"default": default_init, "he": he_init, "wide": wide_init}

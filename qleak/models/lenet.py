"""The LeNet of the first gradient inversion papers, untrained or trained on MNIST.

Runs on shapes (c, h, w): 28×28 and 32×32 give 588 and 768 features in front of the linear layer.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import resources
from pathlib import Path

from safetensors.torch import load_file
from torch import Generator

import qleak
from qleak.catalog import factory
from qleak.check import Expected, Failed, at_least, one_of, whole
from qleak.models.layers import activation, conv, default_init, flatten, linear, sequential, wide_init
from qleak.types import Buffers, Model, Params


@factory
def lenet(
    channels: int = 3,
    size: int = 32,
    classes: int = 100,
    width: int = 12,
    function: str = "sigmoid",
    init: str = "wide",
) -> Model:
    """Three 5×5 convolutions (strides 2 2 1, padding 2) with `function`, then one linear layer.

    The defaults are the CIFAR-100 net of Zhu, Liu, Han, "Deep Leakage from Gradients" (NeurIPS
    2019): width 12, sigmoid, every weight and bias ~ U(−0.5, 0.5) (`init="wide"`).
    `init="default"` draws torch's usual U(±1/√fan_in).

    Args:
        channels: image channels c.
        size: image height and width.
        classes: number of logits.
        width: channels of every convolution.
        function: activation, see `qleak.models.layers.ACTIVATIONS`.
        init: "wide" or "default".
    """
    whole(channels=channels, size=size, classes=classes, width=width)
    at_least(1, channels=channels, classes=classes, width=width)
    at_least(4, size=size)
    one_of(["wide", "default"], init=init)
    features = width * math.ceil(math.ceil(size / 2) / 2) ** 2
    layers = [
        conv("conv1", channels, width, 5, stride=2, padding=2),
        activation(function),
        conv("conv2", width, width, 5, stride=2, padding=2),
        activation(function),
        conv("conv3", width, width, 5, stride=1, padding=2),
        activation(function),
        flatten(),
        linear("fc", features, classes),
    ]
    return sequential(layers, (channels, size, size), wide_init if init == "wide" else default_init)


@factory
def deep_lenet(
    channels: int = 3,
    size: int = 32,
    classes: int = 100,
    depth: int = 3,
    width: int = 12,
    function: str = "sigmoid",
    init: str = "wide",
) -> Model:
    """`lenet` with `depth` convolutions: the first two have stride 2, all further ones stride 1; depth 3 is `lenet`.

    Args:
        channels: image channels c.
        size: image height and width.
        classes: number of logits.
        depth: number of convolutions.
        width: channels of every convolution.
        function: activation, see `qleak.models.layers.ACTIVATIONS`.
        init: "wide" or "default".
    """
    whole(channels=channels, size=size, classes=classes, depth=depth, width=width)
    at_least(1, channels=channels, classes=classes, depth=depth, width=width)
    at_least(4, size=size)
    one_of(["wide", "default"], init=init)
    layers, cin, side = [], channels, size
    for i in range(1, depth + 1):
        stride = 2 if i <= 2 else 1
        layers += [conv(f"conv{i}", cin, width, 5, stride=stride, padding=2), activation(function)]
        cin, side = width, math.ceil(side / stride)
    layers += [flatten(), linear("fc", width * side**2, classes)]
    return sequential(layers, (channels, size, size), wide_init if init == "wide" else default_init)


def weights(name: str) -> Path:
    """The shipped weights `name`.safetensors, in the installed package or in a checkout."""
    installed = Path(str(resources.files(qleak))) / "assets" / f"{name}.safetensors"
    checkout = Path(qleak.__file__).parent.parent / "assets" / "weights" / f"{name}.safetensors"
    for path in (installed, checkout):
        if path.exists():
            return path
    raise Failed(f"Expected the shipped weights at {installed}: reinstall qleak.")


@factory
def lenet_mnist() -> Model:
    """The sigmoid LeNet for 28×28×1, trained on MNIST without the 5,000 digits of `mnist5k`.

    `init` ignores its generator and loads `assets/weights/lenet-mnist.safetensors`, made by `just assets`.
    """
    model = lenet(channels=1, size=28, classes=10)

    def load(gen: Generator) -> tuple[Params, Buffers]:
        params = load_file(weights("lenet-mnist"))
        expected, _ = model.init(gen)
        if {k: v.shape for k, v in params.items()} != {k: v.shape for k, v in expected.items()}:
            raise Expected("Expected lenet-mnist.safetensors to hold the parameters of lenet(1, 28, 10).")
        return {k: params[k] for k in expected}, {}

    return replace(model, init=load)

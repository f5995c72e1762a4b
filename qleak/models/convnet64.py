"""The convolutional net that gradient inversion papers call ConvNet or ConvNet64."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from qleak.catalog import factory
from qleak.check import at_least, whole
from qleak.models.fresh import blank
from qleak.models.module import from_module
from qleak.models.norm import Activation, norm2d
from qleak.models.traced import declared
from qleak.types import Model

WIDTHS = (1, 2, 2, 4, 4, 4, 4, 4)
POOLED = (5, 7)  # convolutions with 3×3 max-pooling behind them


@factory
def convnet64(
    width: int = 64,
    norm: str = "batch",
    mode: str = "eval",
    function: str = "relu",
    channels: int = 3,
    size: int = 32,
    classes: int = 10,
) -> Model:
    """Eight 3×3 convolutions (w 2w 2w 4w 4w 4w pool 4w 4w pool), norm and `function` behind each; a linear layer.

    The ConvNet of width 64 of Geiping et al., "Inverting Gradients" (NeurIPS 2020), attacked with batch
    norm in evaluation mode; 36·w features at 32×32.

    Args:
        width: channels w of the first convolution.
        norm: "batch", "group" (16 channels a group) or "none".
        mode: batch norm by running statistics ("eval") or by the batch ("train").
        function: activation, see `qleak.models.layers.ACTIVATIONS`.
        channels: image channels c.
        size: image height and width, at least 9.
        classes: number of logits.
    """
    whole(width=width, channels=channels, size=size, classes=classes)
    at_least(1, width=width, channels=channels, classes=classes)
    at_least(9, size=size)
    net = blank(_convnet64, width, norm, function, channels, size, classes)
    model = from_module(net, (channels, size, size), classes, mode=mode, fresh=True)
    return replace(model, layers=declared(net.train(mode == "train")))


def _convnet64(width: int, norm: str, function: str, channels: int, size: int, classes: int) -> nn.Module:
    parts: list[nn.Module] = []
    cin = channels
    for i, factor in enumerate(WIDTHS):
        cout = factor * width
        parts += [nn.Conv2d(cin, cout, 3, padding=1), norm2d(norm, cout), Activation(function)]
        parts += [nn.MaxPool2d(3)] if i in POOLED else []
        cin = cout
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(cin * (size // 3 // 3) ** 2, classes))

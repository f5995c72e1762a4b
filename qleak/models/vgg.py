"""VGG for small images: Simonyan, Zisserman, "Very Deep Convolutional Networks" (ICLR 2015), table 1."""

from __future__ import annotations

from torch import nn

from qleak.catalog import factory
from qleak.check import Expected, at_least, whole
from qleak.models.fresh import blank
from qleak.models.module import from_module
from qleak.models.norm import Activation, norm2d
from qleak.types import Model

# Convolutions of each of the five stages, by depth (columns A, B, D, E of the table).
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


@factory
def vgg(
    depth: int = 11,
    width: int = 64,
    norm: str = "batch",
    mode: str = "train",
    function: str = "relu",
    channels: int = 3,
    size: int = 32,
    classes: int = 10,
) -> Model:
    """Five stages of 3×3 convolutions (widths w, 2w, 4w, 8w, 8w), each ended by 2×2 max-pooling, and one linear layer.

    The paper's nets have no norm (`norm="none"`) and three linear layers for 7×7 maps; at 32×32 one is customary.

    Args:
        depth: 11, 13, 16 or 19.
        width: channels of the first stage.
        norm: "batch", "group" (16 channels a group) or "none".
        mode: batch norm by the batch ("train") or by running statistics ("eval").
        function: activation, see `qleak.models.layers.ACTIVATIONS`.
        channels: image channels c.
        size: image height and width, at least 32.
        classes: number of logits.
    """
    whole(depth=depth, width=width, channels=channels, size=size, classes=classes)
    at_least(1, width=width, channels=channels, classes=classes)
    at_least(32, size=size)
    if depth not in STAGES:
        raise Expected(f"Expected depth={depth} to be one of: {', '.join(map(str, STAGES))}.")
    net = blank(_vgg, STAGES[depth], width, norm, function, channels, size, classes)
    return from_module(net, (channels, size, size), classes, mode=mode, fresh=True)


def _vgg(
    stages: tuple[int, ...], width: int, norm: str, function: str, channels: int, size: int, classes: int
) -> nn.Module:
    parts: list[nn.Module] = []
    cin = channels
    for i, count in enumerate(stages):
        cout = width * min(2**i, 8)
        for _ in range(count):
            parts += [nn.Conv2d(cin, cout, 3, padding=1), norm2d(norm, cout), Activation(function)]
            cin = cout
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(cin * (size // 32) ** 2, classes))

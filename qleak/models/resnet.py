"""Residual networks for small images: He, Zhang, Ren, Sun, "Deep Residual Learning" (CVPR 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from qleak.catalog import factory
from qleak.check import Expected, at_least, one_of, whole
from qleak.models.fresh import blank
from qleak.models.module import from_module
from qleak.models.norm import Activation, norm2d
from qleak.types import Model

SHORTCUTS = ("pad", "conv")


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut: a(s(x) + n₂(K₂ ⋆ a(n₁(K₁ ⋆ x))))."""

    def __init__(
        self, cin: int, cout: int, stride: int, norm: str, function: str, shortcut: str, affine: bool = True
    ) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=bias)
        self.norm1 = norm2d(norm, cout, affine)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=bias)
        self.norm2 = norm2d(norm, cout, affine)
        self.act = Activation(function)
        self.shortcut = nn.Identity()
        if stride != 1 or cin != cout:
            conv = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=bias), norm2d(norm, cout, affine))
            self.shortcut = conv if shortcut == "conv" else Pad(cout - cin, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[b cin h w] -> [b cout h/stride w/stride]`."""
        h = self.act(self.norm1(self.conv1(x)))
        return self.act(self.shortcut(x) + self.norm2(self.conv2(h)))


class Pad(nn.Module):
    """A shortcut without parameters: every stride-th pixel, new channels zero (option A of the paper)."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        """`[b c h w] -> [b c+more h/stride w/stride]`."""
        near = self.more // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, near, self.more - near))


class ResNet(nn.Module):
    """A 3×3 stem, stages of blocks (the first of stage 2, 3, … halves the image), mean over h and w, linear."""

    def __init__(
        self, channels: int, classes: int, widths: Sequence[int], blocks: Sequence[int], norm: str, function: str,
        shortcut: str, affine: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=norm == "none")
        self.norm1 = norm2d(norm, widths[0], affine)
        self.act = Activation(function)
        stages, cin = [], widths[0]
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            made = []
            for j in range(count):
                made.append(Block(cin, width, 2 if i and not j else 1, norm, function, shortcut, affine))
                cin = width
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(cin, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[b c h w] -> [b class]`."""
        return self.fc(self.stages(self.act(self.norm1(self.conv1(x)))).mean((2, 3)))


@factory
def resnet(
    depth: int = 20,
    width: int = 16,
    norm: str = "batch",
    mode: str = "train",
    function: str = "relu",
    channels: int = 3,
    size: int = 32,
    classes: int = 10,
    shortcut: str = "pad",
) -> Model:
    """The CIFAR ResNet of depth 6n+2: three stages of n blocks, widths w, 2w, 4w (section 4.2 of the paper).

    Width 64 with `shortcut="conv"` is the ResNet20-4 of Geiping et al. 2020.

    Args:
        depth: 20, 32, 44, 56, or any other 6n+2.
        width: channels of the first stage.
        norm: "batch", "group" (16 channels a group), "layer" (one group) or "none" (convolutions with a bias).
        mode: batch norm by the batch ("train") or by running statistics ("eval").
        function: activation, see `qleak.models.layers.ACTIVATIONS`.
        channels: image channels c.
        size: image height and width.
        classes: number of logits.
        shortcut: between stages, "pad" (no parameters, the paper's) or "conv" (1×1 convolution and norm).
    """
    whole(depth=depth, width=width, channels=channels, size=size, classes=classes)
    at_least(1, width=width, channels=channels, classes=classes)
    at_least(4, size=size)
    one_of(SHORTCUTS, shortcut=shortcut)
    if depth < 8 or depth % 6 != 2:
        raise Expected(f"Expected depth={depth} of the form 6n+2: 8, 14, 20, 32, 44, 56, …")
    n = (depth - 2) // 6
    net = blank(ResNet, channels, classes, (width, 2 * width, 4 * width), (n, n, n), norm, function, shortcut)
    return from_module(net, (channels, size, size), classes, mode=mode, fresh=True)


@factory
def resnet18(
    width: int = 64,
    norm: str = "batch",
    mode: str = "train",
    function: str = "relu",
    channels: int = 3,
    size: int = 32,
    classes: int = 10,
    affine: bool = True,
) -> Model:
    """ResNet-18 for small images: a 3×3 stem without max-pooling, four stages of two blocks, widths w, 2w, 4w, 8w.

    Shortcuts between stages are 1×1 convolutions (option B of the paper). `torchvision:resnet18` is the
    one for 224×224.

    Args:
        width: channels of the first stage.
        norm: "batch", "group" (16 channels a group), "layer" (one group) or "none" (convolutions with a bias).
        mode: batch norm by the batch ("train") or by running statistics ("eval").
        function: activation, see `qleak.models.layers.ACTIVATIONS`.
        channels: image channels c.
        size: image height and width.
        classes: number of logits.
        affine: norms have a weight and a bias for each channel.
    """
    whole(width=width, channels=channels, size=size, classes=classes)
    at_least(1, width=width, channels=channels, classes=classes)
    at_least(8, size=size)
    widths = (width, 2 * width, 4 * width, 8 * width)
    net = blank(ResNet, channels, classes, widths, (2, 2, 2, 2), norm, function, "conv", affine)
    return from_module(net, (channels, size, size), classes, mode=mode, fresh=True)

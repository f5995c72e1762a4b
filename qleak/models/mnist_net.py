"""The convolutional net of PyTorch's MNIST example (pytorch/examples, `mnist/main.py`), with its dropout."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from qleak import random
from qleak.catalog import factory
from qleak.check import Expected, at_least, between, positive, whole
from qleak.models.layers import apply_layer, conv, default_init, linear
from qleak.types import Buffers, Layer, Model, Owner, Params, Tapped, Tree

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels, as the example has them


@factory
def mnist_net(
    channels: int = 1,
    size: int = 28,
    classes: int = 10,
    dropout: bool = True,
    first: float = 0.25,
    second: float = 0.5,
    mean: float = MEAN,
    std: float = STD,
) -> Model:
    """3×3 convolutions of 32 and 64 maps with ReLU, 2×2 maxima, 128 hidden units with ReLU, logits: 1,199,882 weights.

    Pixels are standardised inside the net, (x − mean)/std, so that images stay in [0, 1] outside it. Dropout stands
    behind the maxima and behind the hidden units and is elementwise: kept entries are divided by 1 − p
    (Srivastava et al. 2014). Its masks are drawn by the client (`Model.masks`); without them nothing is dropped.

    Args:
        channels: image channels c.
        size: image height and width, even and at least 6.
        classes: number of logits.
        dropout: False leaves both out, and with them everything random in training.
        first: probability with which an entry of the maps is dropped.
        second: the same of a hidden unit.
        mean: what is taken off every pixel.
        std: what it is divided by.
    """
    whole(channels=channels, size=size, classes=classes)
    at_least(1, channels=channels, classes=classes)
    at_least(6, size=size)
    if size % 2:
        raise Expected(f"Expected size={size} to be even: the maxima are taken over 2×2 pixels.")
    between(0, 1 - 1e-6, first=first, second=second)
    positive(std=std)
    side = size // 2 - 2
    parts = {
        part.name: part
        for part in (
            conv("conv1", channels, 32, 3), conv("conv2", 32, 64, 3), linear("fc1", 64 * side**2, 128), linear("fc2", 128, classes),
        )
    }  # fmt: skip
    dropped = {"mask/maps": (first, (64, side, side)), "mask/hidden": (second, (128,))}

    def init(gen: Generator) -> tuple[Params, Buffers]:
        drawn = [default_init(gen, part) for part in parts.values()]
        return {k: v for params in drawn for k, v in params.items()}, {}

    def run(params: Params, buffers: Buffers, x: Tensor, taps: Mapping[str, Tensor]) -> tuple[Tensor, Tree]:
        seen: Tree = {}

        def layer(name: str, h: Tensor) -> Tensor:
            seen[name] = h
            out = apply_layer(parts[name], params, h)
            return out + taps[name] if name in taps else out

        h = torch.relu(layer("conv1", (x - mean) / std))
        h = F.max_pool2d(torch.relu(layer("conv2", h)), 2)
        h = masked(buffers, "mask/maps", h).flatten(1)
        h = masked(buffers, "mask/hidden", torch.relu(layer("fc1", h)))
        return layer("fc2", h), seen

    def apply(params: Params, buffers: Buffers, x: Tensor) -> Tensor:
        return run(params, buffers, x, {})[0]

    outs = {"conv1": (32, size - 2, size - 2), "conv2": (64, size - 4, size - 4), "fc1": (128,), "fc2": (classes,)}
    opened = tuple(_opened(part, outs[name]) for name, part in parts.items())
    masks = functools.partial(drawn_masks, {k: v for k, v in dropped.items() if v[0] > 0}) if dropout else None
    return Model(init, apply, (channels, size, size), classes, masks=masks, tapped=Tapped(opened, run))


def drawn_masks(dropped: Mapping[str, tuple[float, tuple[int, ...]]], gen: Generator, b: int) -> Tree:
    """Inverted dropout of a batch: `[b …]` of 0 with probability p, else 1/(1 − p), for each `name: (p, shape)`."""
    return {k: (random.uniform(gen, (b, *shape)) >= p).float() / (1 - p) for k, (p, shape) in dropped.items()}


def masked(buffers: Buffers, name: str, h: Tensor) -> Tensor:
    """`h · mask` where this batch has that mask, else `h`."""
    return h * buffers[name] if name in buffers else h


def _opened(part: Layer, out: tuple[int, ...]) -> Owner:
    names = {"weight": f"{part.name}.weight", "bias": f"{part.name}.bias"}
    assert part.kind == "conv" or part.kind == "linear"
    return Owner(part.name, part.kind, {**part.options, **names, "out": out})

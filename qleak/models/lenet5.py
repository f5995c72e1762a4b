"""LeNet-5: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition" (1998)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from qleak.catalog import factory
from qleak.check import at_least, one_of, whole
from qleak.models.fresh import blank
from qleak.models.module import from_module
from qleak.models.norm import NORMS, Activation
from qleak.models.traced import declared
from qleak.types import Model

POOLS = {"mean": nn.AvgPool2d, "max": nn.MaxPool2d}


@factory
def lenet5(
    channels: int = 1, size: int = 28, classes: int = 10, function: str = "tanh", pool: str = "mean", norm: str = "none"
) -> Model:
    """6 and 16 5×5 convolutions, 2×2 pooling behind each, then linear layers of 120 and 84 and the logits.

    As it is used today: every map of the second convolution sees all six of the first, pooling has no
    weights, and the last layer is linear in place of radial basis functions. Images below 32×32
    are padded by two pixels, as MNIST's were. A norm stands behind each of the four activations (in front of the
    pooling) and has neither weights nor running statistics, so that the number of parameters stays 61,706: the net of
    Davody, Adelani, Kleinbauer, Klakow 2020 (arXiv 2006.10919) with function="relu", pool="max", norm="batch".

    Args:
        channels: image channels c.
        size: image height and width, at least 12.
        classes: number of logits.
        function: activation, see `qleak.models.layers.ACTIVATIONS`.
        pool: "mean" or "max".
        norm: "none", "batch" (by the batch, always), "layer" (over all of c, h, w) or "group" (two groups of channels).
    """
    whole(channels=channels, size=size, classes=classes)
    at_least(1, channels=channels, classes=classes)
    at_least(12, size=size)
    one_of(POOLS, pool=pool)
    one_of(NORMS, norm=norm)
    net = blank(_lenet5, channels, size, classes, function, pool, norm)
    mode = "train" if norm == "batch" else "eval"
    model = from_module(net, (channels, size, size), classes, mode=mode, fresh=True)
    return replace(model, layers=declared(net))


def _lenet5(channels: int, size: int, classes: int, function: str, pool: str, norm: str) -> nn.Module:
    padding = 2 if size < 32 else 0
    first = size + 2 * padding - 4
    second = first // 2 - 4
    side = second // 2
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=padding), Activation(function), *_norm(norm, 6, first, first), POOLS[pool](2),
        nn.Conv2d(6, 16, 5), Activation(function), *_norm(norm, 16, second, second), POOLS[pool](2), nn.Flatten(),
        nn.Linear(16 * side**2, 120), Activation(function), *_norm(norm, 120),
        nn.Linear(120, 84), Activation(function), *_norm(norm, 84),
        nn.Linear(84, classes),
    )  # fmt: skip


def _norm(name: str, *shape: int) -> Sequence[nn.Module]:
    """The norm of `[b *shape]` as a list: empty for "none"."""
    if name == "batch":
        kind = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
        return [kind(shape[0], affine=False, track_running_stats=False)]
    if name == "layer":
        return [nn.LayerNorm(list(shape), elementwise_affine=False)]
    return [nn.GroupNorm(2, shape[0], affine=False)] if name == "group" else []

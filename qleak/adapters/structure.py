"""What an exact gradient cannot hide: ranks, sums of zero, and what they say of noise, of low rank and of the batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qleak.types import Model

TAIL = 2e-6  # of the largest singular value: what float32 leaves of a zero one
LARGE = 4_000_000  # coordinates of a matrix beyond which no decomposition is made


class Linear(NamedTuple):
    """A matrix [out, in] of the update: its numerical rank, and its bias against its columns (None without one).

    Attributes:
        outside: the part of the bias gradient that no combination of the columns gives.
        sums: largest |column sum| over the column's magnitudes: 0 in the last layer of a cross-entropy.
        filled: share of numbers that are not zero, zero rows and columns left out.
    """

    name: str
    shape: tuple[int, int]
    convolution: bool
    rank: int
    outside: float | None
    sums: float
    filled: float


class Batch(NamedTuple):
    """How many images an update can be of; `most` is None where nothing bounds it."""

    least: int
    most: int | None
    reasons: list[str]


def linears(update: dict[str, Tensor]) -> list[Linear]:
    """Every tensor of two axes or more as a matrix; zero ones and very large ones left out."""
    out = []
    for name, v in update.items():
        if v.ndim < 2 or not bool(v.any()) or v.numel() > LARGE or min(v.shape[0], v.numel() // v.shape[0]) < 2:
            continue
        m = v.reshape(v.shape[0], -1).double()
        scaled = m / m.abs().amax()
        scaled = scaled.T if m.shape[0] > m.shape[1] else scaled
        values, left = torch.linalg.eigh(scaled @ scaled.T)  # float64 has room for the squares
        rank = int((values > TAIL**2 * values[-1]).sum())
        left = left[:, -rank:]
        if m.shape[0] > m.shape[1]:
            left = torch.linalg.qr(scaled.T @ left)[0]
        bias = update.get(f"{name.removesuffix('weight')}bias") if name.endswith("weight") else None
        outside = None
        if bias is not None and bias.shape == v.shape[:1] and bool(bias.any()):
            b = bias.double() / bias.double().norm()
            outside = float((b - left @ (left.T @ b)).norm())
        sums = float((m.sum(0).abs() / m.abs().sum(0).clamp(min=1e-300)).amax())
        live = m != 0
        filled = float(live.sum() / (live.any(0).sum() * live.any(1).sum()))
        out.append(Linear(name, (m.shape[0], m.shape[1]), v.ndim > 2, rank, outside, sums, filled))
    return out


def exact(found: list[Linear]) -> str:
    """Why the numbers are an exact gradient's: a rank that noise and codes would fill up; "" where nothing shows it."""
    for layer in reversed(found):
        low = not layer.convolution and layer.rank < min(layer.shape) and layer.filled > 0.5  # few entries, low rank
        if low and (layer.outside is None or layer.outside < 1e-4):
            bias = "" if layer.outside is None else ", and its bias gradient lies among its columns"
            return f"{layer.name} {layer.shape} has rank {layer.rank}{bias}: noise and codes would fill it up"
    return ""


def thin(found: list[Linear]) -> int:
    """The rank that all matrices share though their layers do not ask for it; 0 for none.

    Linear layers have the rank of the batch by themselves: only convolutions, or a bias gradient outside the columns,
    show that something was cut off.
    """
    wide = [layer for layer in found if min(layer.shape) > 1]
    rank = max((layer.rank for layer in wide), default=0)
    room = [layer for layer in wide if min(layer.shape) > rank]
    if not rank or not room or len(room) < len([layer for layer in wide if min(layer.shape) > 4]):
        return 0
    convolutions = [layer for layer in room if layer.convolution]
    cut = [layer for layer in room if layer.outside is not None and layer.outside > 1e-3]
    return rank if (convolutions and rank <= min(min(c.shape) for c in convolutions) // 2) or cut else 0


def batch_bounds(update: dict[str, Tensor], model: Model) -> Batch:
    """Least and largest number of images behind an exact mean gradient (one step, cross-entropy).

    The gradient of a linear layer without shared weights is Σ_b δ_b h_bᵀ, of rank B at most, so no rank may exceed B. In
    the last one, δ = (p − y)/B is negative in the classes that occur only, so with non-negative features the negative
    rows are labels, at most B of them. From above nothing is certain: equal images add no rank.
    Zhu, Blaschko (R-GAP, ICLR 2021), section 3; Yin et al. (GradInversion, CVPR 2021), section 3.1.
    """
    reasons: list[str] = []
    found = [layer for layer in linears(update) if not layer.convolution]
    names = {f"{layer.name}.weight" for layer in model.layers or () if layer.kind == "linear"}
    found = [layer for layer in found if not names or layer.name in names]
    least, full = 1, True
    for layer in found:
        room = min(layer.shape) - (layer is found[-1] and layer.shape[0] == model.classes)
        if layer.rank < room:
            full = False
        if layer.rank > least:
            least = layer.rank
        reasons.append(f"{layer.name} {layer.shape} has rank {layer.rank}: at least {images(layer.rank)}")
    biases = [v for v in update.values() if v.ndim == 1 and v.shape[0] == model.classes]
    if biases and float(biases[-1].sum().abs()) < 1e-3 * float(biases[-1].abs().sum()):  # as exact output errors do
        labels = int((biases[-1] < 0).sum())
        reasons.append(
            f"the last bias gradient is negative in {labels} class{'es' * (labels != 1)}: at least {images(labels)}, if it is exact"
        )
        least = max(least, labels)
    if not found:
        reasons.append("no linear layer to take a rank of")
    elif not full:
        reasons.append(
            f"a rank below the layers' own width: {images(least)}, unless some are alike or already classified with certainty"
        )
    else:
        reasons.append("the ranks are as large as the layers allow: nothing bounds the batch from above")
    return Batch(least, least if found and not full else None, reasons)


def images(count: int) -> str:
    """Whole words: "1 image", "3 images"."""
    return f"{count} image{'s' * (count != 1)}"

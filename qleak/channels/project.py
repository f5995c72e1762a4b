"""Projections to a few numbers: at random, onto a public basis, by blocks of pixels."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from qleak import random
from qleak.catalog import factory
from qleak.channels.linear import Map, linear, operator_norm
from qleak.check import Expected, at_least, one_of, whole
from qleak.types import Stage

LIFTS = ("nearest", "bilinear")


@factory
def project(dim: int = 10, blocks: int = 1, seed: int = 0) -> Stage:
    """X P of every tensor: `dim` numbers, P Gaussian, public and the same for all rows; lifted by Pᵀ.

    Entries of P have variance 1/(numbers of their block), so that E P Pᵀ = 1: lifting is unbiased over seeds, while
    for the one P that is drawn x P Pᵀ is a random shadow of x. With `blocks` the flat tensor is cut into so many equal
    pieces (to one coordinate), each projected to dim/blocks numbers by itself: P is block-diagonal.

    A bound of the row is multiplied by P's largest singular value, computed from the matrix itself (about
    1 + √(d/dim)). The projection of Long et al., "G-PATE" (NeurIPS 2021).

    Args:
        dim: numbers per tensor.
        blocks: pieces of the tensor; must divide `dim`.
        seed: names the matrix; it is public.

    Raises:
        Expected: dim or blocks below 1, or blocks that do not divide dim.
    """
    whole(dim=dim, blocks=blocks, seed=seed)
    at_least(1, dim=dim, blocks=blocks)
    if dim % blocks:
        raise Expected(f"Expected blocks={blocks} to divide dim={dim}.")
    return linear("project", lambda shape: _gaussian(shape.numel(), dim, blocks, seed))


@functools.lru_cache(maxsize=32)
def _gaussian(d: int, dim: int, blocks: int, seed: int) -> Map:
    """P and Pᵀ, drawn by a counter, as a stage may be mapped over rows, where a generator cannot be used."""
    key = torch.tensor([random.key("project", seed, d, dim, blocks)])
    p = random.counted(key, torch.zeros(1, dtype=torch.int64), d * dim).reshape(d, dim)
    row, column = torch.arange(d) * blocks // max(d, 1), torch.arange(dim) * blocks // dim
    p = p * (row[:, None] == column) * math.sqrt(blocks / dim)
    return Map(p, p.mT.contiguous(), operator_norm(p))


def onto(basis: Tensor) -> Stage:
    """X P for orthonormal columns `basis [d m]` that are public, or were released already; lifted by Pᵀ.

    Principal directions of private data are neither until they have been paid for.

    Raises:
        Expected: columns that are not orthonormal to 1e-4, or, when used, a tensor of other than d coordinates.
    """
    p = basis.detach()
    if p.ndim != 2 or not torch.allclose(p.mT @ p, torch.eye(p.shape[1], dtype=p.dtype, device=p.device), atol=1e-4):
        raise Expected(f"Expected orthonormal columns [d m] in onto(…), got {tuple(basis.shape)}.")
    at, (d, m) = Map(p, p.mT.contiguous(), operator_norm(p)), p.shape

    def found(shape: torch.Size) -> Map:
        if shape.numel() != d:
            raise Expected(f"Expected a tensor of {d} coordinates in onto(…), got {tuple(shape)}.")
        return at

    return replace(linear("onto", found), spec=f"onto([{d}, {m}])")


@factory
def block_mean(side: int = 8, channels: int = 1, lift: str = "nearest") -> Stage:
    """Mean over blocks of a square image, to side × side; lifted by resizing back.

    A tensor of channels·s² coordinates with s > side (whatever its axes) is such an image; others are sent as they
    are. Where side does not divide s, blocks overlap by a pixel (adaptive average pooling). A bound is multiplied by
    the largest singular value, side/s where side divides s.

    Args:
        side: of the small image.
        channels: of the image.
        lift: "nearest" (every pixel its block's mean) or "bilinear".

    Raises:
        Expected: side or channels below 1, or another lift.
    """
    whole(side=side, channels=channels)
    at_least(1, side=side, channels=channels)
    one_of(LIFTS, lift=lift)
    return linear("block_mean", lambda shape: _blocks(shape.numel(), side, channels, lift))


@functools.lru_cache(maxsize=32)
def _blocks(d: int, side: int, channels: int, lift: str) -> Map | None:
    s = math.isqrt(d // channels)
    if s <= side or s * s * channels != d:
        return None
    # Along one axis; both axes and all channels are Kronecker products of it.
    ones = torch.eye(s)[:, None, :]
    narrow = functional.adaptive_avg_pool1d(ones, side)[:, 0]
    small = torch.eye(side)[:, None, :]
    if lift == "nearest":
        wide = functional.interpolate(small, size=s)[:, 0]
    else:
        wide = functional.interpolate(small, size=s, mode="linear", align_corners=False)[:, 0]
    every = torch.eye(channels)
    down, up = (torch.kron(every, torch.kron(a, a)) for a in (narrow, wide))
    return Map(down, up.contiguous(), operator_norm(narrow) ** 2 * (1 + 2e-7))

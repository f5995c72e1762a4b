"""A linear layer's weight gradient met from both sides, row by row: see `attacks/ghost.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from qleak.native.build import call


def outside(lo: Tensor, hi: Tensor, delta: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """‖V‖² `[lane]`, hVᵀ `[lane b out]` and δV `[lane b in]` of V = U − proj U, U = scale · δᵀh, lo ≤ proj U ≤ hi `[lane out in]`."""
    lo, hi, delta, h = (v.contiguous() for v in (lo, hi, delta, h))
    value, push, pull = delta.new_empty(len(delta)), torch.empty_like(delta), torch.empty_like(h)
    at = [v.data_ptr() for v in (lo, hi, delta, h)]
    to = [v.data_ptr() for v in (value, push, pull)]
    call("outside", lo.dtype)(*at, scale, *to, *_sizes(delta, h))
    return value, push, pull


def sides(rest: Tensor, delta: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(hRᵀ `[lane b out]`, δR `[lane b in]`) of matrices R `[lane out in]`."""
    rest, delta, h = (v.contiguous() for v in (rest, delta, h))
    push, pull = torch.empty_like(delta), torch.empty_like(h)
    call("sides", rest.dtype)(*(v.data_ptr() for v in (rest, delta, h, push, pull)), *_sizes(delta, h))
    return push, pull


def _sizes(delta: Tensor, h: Tensor) -> tuple[int, int, int, int]:
    """Lanes, images, outputs, inputs."""
    return len(delta), delta.shape[1], delta.shape[2], h.shape[2]

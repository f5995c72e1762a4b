"""A linear layer's weight gradient met from both sides, row by row: see `attacks/ghost.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from qleak.native.build import address, call


def outside(lo: Tensor, hi: Tensor, delta: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """‖V‖² `[lane]`, hVᵀ `[lane b out]` and δV `[lane b in]` of V = U − proj U, U = scale · δᵀh, lo ≤ proj U ≤ hi `[lane out in]`."""
    lo, hi, delta, h = (v.contiguous() for v in (lo, hi, delta, h))
    (lanes, b, out), size, kind = delta.shape, h.shape[2], delta.dtype
    value, push, pull = delta.new_empty(lanes), torch.empty_like(delta), torch.empty_like(h)
    at = [address(v, kind, lanes, out, size) for v in (lo, hi)] + [delta.data_ptr(), address(h, kind, lanes, b, size)]
    to = [v.data_ptr() for v in (value, push, pull)]
    call("outside", kind)(*at, scale, *to, lanes, b, out, size)
    return value, push, pull


def sides(rest: Tensor, delta: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(hRᵀ `[lane b out]`, δR `[lane b in]`) of matrices R `[lane out in]`."""
    rest, delta, h = (v.contiguous() for v in (rest, delta, h))
    (lanes, b, out), size, kind = delta.shape, h.shape[2], delta.dtype
    push, pull = torch.empty_like(delta), torch.empty_like(h)
    at = [address(rest, kind, lanes, out, size), delta.data_ptr(), address(h, kind, lanes, b, size)]
    call("sides", kind)(*at, push.data_ptr(), pull.data_ptr(), lanes, b, out, size)
    return push, pull

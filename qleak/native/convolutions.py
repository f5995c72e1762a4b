"""The three maps of a convolution, for images of many lanes: K ⋆ x, its transpose, and the gradient of the kernels.

Images are `[lane·b c h w]` in channels-last memory, the b images of a lane one after the other; kernels `[out in k k]` for all lanes or
`[lane out in k k]`.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak.native.build import call


class Geometry(NamedTuple):
    """Sides and channels of the input, channels of the output, and the kernel's side, stride and padding."""

    height: int
    width: int
    cin: int
    cout: int
    kernel: int
    stride: int
    padding: int

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        rows, columns = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in self[:2])
        return rows, columns


def forward(
    g: Geometry, x: Tensor, kernels: Tensor, bias: Tensor | None, lanes: int, onto: Tensor | None = None
) -> Tensor:
    """K ⋆ x + bias `[lane·b out rows columns]`, `bias [(lane) out]` shared as the kernels are; added to `onto`, in place, if given."""
    x, kernels, bias = _last(x), kernels.contiguous(), None if bias is None else bias.contiguous()
    out = _images(x, g.cout, *g.sides) if onto is None else onto
    own = kernels.ndim == 5
    call("forward", x.dtype)(
        _at(x), _at(kernels), _at(bias), _at(out), _sizes(g), lanes, len(x) // lanes, own, onto is not None
    )
    return out


def transposed(g: Geometry, delta: Tensor, kernels: Tensor, lanes: int, onto: Tensor | None = None) -> Tensor:
    """(∂(K ⋆ x)/∂x)ᵀ δ `[lane·b in h w]` of an output's error; added to `onto`, in place, if given."""
    delta, kernels = _last(delta), kernels.contiguous()
    out = _images(delta, g.cin, g.height, g.width) if onto is None else onto
    own = kernels.ndim == 5
    call("transposed", delta.dtype)(
        _at(delta), _at(kernels), _at(out), _sizes(g), lanes, len(delta) // lanes, own, onto is not None
    )
    return out


def weigh(
    g: Geometry, x: Tensor, delta: Tensor, less: Tensor | None, scale: float, lanes: int
) -> tuple[Tensor, Tensor]:
    """`scale` · ∂ℓ/∂K − less `[lane out in k k]` and scale · ∂ℓ/∂bias `[lane out]`, summed over a lane's images."""
    x, delta, less = _last(x), _last(delta), None if less is None else less.contiguous()
    found, total = x.new_empty(lanes, g.cout, g.cin, g.kernel, g.kernel), x.new_empty(lanes, g.cout)
    call("weigh", x.dtype)(
        _at(x), _at(delta), _at(less), _at(found), _at(total), _sizes(g), lanes, len(x) // lanes, scale
    )
    return found, total


@functools.lru_cache
def _sizes(g: Geometry) -> Any:
    return (ctypes.c_int64 * len(g))(*g)


def _at(v: Tensor | None) -> int | None:
    """Where its numbers lie: the caller keeps the tensor, a pointer does not."""
    return None if v is None else v.data_ptr()


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _images(like: Tensor, channels: int, rows: int, columns: int) -> Tensor:
    return like.new_empty(len(like), rows, columns, channels).permute(0, 3, 1, 2)

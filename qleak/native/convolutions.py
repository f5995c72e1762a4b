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

from qleak.native.build import address, call


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
    def seen(self) -> tuple[int, int, int]:
        """Shape of an input image."""
        return self.cin, self.height, self.width

    @property
    def weights(self) -> tuple[int, int, int, int]:
        """Shape of the kernels of a lane."""
        return self.cout, self.cin, self.kernel, self.kernel

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        spare = 2 * self.padding - self.kernel
        return (self.height + spare) // self.stride + 1, (self.width + spare) // self.stride + 1


def forward(
    g: Geometry, x: Tensor, kernels: Tensor, bias: Tensor | None, lanes: int, onto: Tensor | None = None
) -> Tensor:
    """K ⋆ x + bias `[lane·b out rows columns]`, `bias [(lane) out]` shared as the kernels are; added to `onto`, in place, if given."""
    kind, images, own = x.dtype, len(x), kernels.shape[:-4]
    x, kernels, bias = _last(x), kernels.contiguous(), None if bias is None else bias.contiguous()
    out = _images(x, g.cout, *g.sides) if onto is None else onto
    call("forward", kind)(
        address(x, kind, images, *g.seen),
        address(kernels, kind, *_own(own, lanes), *g.weights),
        None if bias is None else address(bias, kind, *own, g.cout),
        address(out, kind, images, g.cout, *g.sides),
        _sizes(g), lanes, images // lanes, bool(own), onto is not None,
    )  # fmt: skip
    return out


def transposed(g: Geometry, delta: Tensor, kernels: Tensor, lanes: int, onto: Tensor | None = None) -> Tensor:
    """(∂(K ⋆ x)/∂x)ᵀ δ `[lane·b in h w]` of an output's error; added to `onto`, in place, if given."""
    kind, images, own = delta.dtype, len(delta), kernels.shape[:-4]
    delta, kernels = _last(delta), kernels.contiguous()
    out = _images(delta, *g.seen) if onto is None else onto
    call("transposed", kind)(
        address(delta, kind, images, g.cout, *g.sides),
        address(kernels, kind, *_own(own, lanes), *g.weights),
        address(out, kind, images, *g.seen),
        _sizes(g), lanes, images // lanes, bool(own), onto is not None,
    )  # fmt: skip
    return out


def weigh(
    g: Geometry, x: Tensor, delta: Tensor, less: Tensor | None, scale: float, lanes: int
) -> tuple[Tensor, Tensor]:
    """`scale` · ∂ℓ/∂K − less `[lane out in k k]` and scale · ∂ℓ/∂bias `[lane out]`, summed over a lane's images."""
    kind, images = x.dtype, len(x)
    x, delta, less = _last(x), _last(delta), None if less is None else less.contiguous()
    found, total = x.new_empty(lanes, *g.weights), x.new_empty(lanes, g.cout)
    call("weigh", kind)(
        address(x, kind, images, *g.seen),
        address(delta, kind, images, g.cout, *g.sides),
        None if less is None else address(less, kind, lanes, *g.weights),
        found.data_ptr(), total.data_ptr(), _sizes(g), lanes, images // lanes, scale,
    )  # fmt: skip
    return found, total


@functools.lru_cache
def _sizes(g: Geometry) -> Any:
    return (ctypes.c_int64 * len(g))(*g)


def _own(own: tuple[int, ...], lanes: int) -> tuple[int, ...]:
    """What stands in front of a kernel's own axes: as many as there are lanes, or nothing."""
    return (lanes,) if own else ()


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _images(like: Tensor, channels: int, rows: int, columns: int) -> Tensor:
    return like.new_empty(len(like), rows, columns, channels).permute(0, 3, 1, 2)

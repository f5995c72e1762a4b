"""A convolution's part in the four passes (`structured`): by compiled kernels where the machine has them, else by patches.

`patches` multiplies matrices that torch's own copies have laid out; `qleak.native` walks over the images themselves. What `up` kept
says which of them it was, and the later passes go on the same way.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qleak import native
from qleak.attacks import patches
from qleak.attacks.patches import Kept
from qleak.models.layers import after
from qleak.native import Geometry
from qleak.types import Layer

Way = Kept | Geometry


def up(layer: Layer, weight: Tensor, bias: Tensor, h: Tensor, lanes: int, compiled: bool) -> tuple[Tensor, Way]:
    """K ⋆ h + b, and what the later passes need. Only without `compiled` can it be differentiated."""
    if compiled and native.serves(h):
        g = _geometry(layer, h)
        return native.forward(g, h, weight, bias, lanes), g
    kept = Kept(patches.patches(layer, h, lanes), patches.turned(layer, weight))
    return patches.forward(patches.columns(weight), bias, kept.patches, after(layer, tuple(h.shape))[2:]), kept


def gather(layer: Layer, way: Way, before: Tensor, delta: Tensor, lanes: int) -> Tensor:
    """An output's error as the transpose reads it."""
    return delta if isinstance(way, Geometry) else patches.errors(layer, delta, before.shape, lanes)


def down(layer: Layer, way: Way, weight: Tensor, before: Tensor, gathered: Tensor) -> Tensor:
    """(∂(K ⋆ h)/∂h)ᵀ δ."""
    if isinstance(way, Geometry):
        return native.transposed(way, gathered, weight, 1)
    return patches.transposed(layer, way.turned, gathered, before.shape)


def weigh(
    layer: Layer, way: Way, before: Tensor, delta: Tensor, lanes: int, less: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`scale` · ∂ℓ/∂K − less `[lane out in k k]`, scale · ∂ℓ/∂b `[lane out]`."""
    if isinstance(way, Geometry):
        return native.weigh(way, before, delta, less, scale, lanes)
    return patches.weigh(layer, way.patches, delta, less, scale)


def push(
    layer: Layer, way: Way, weight: Tensor, before: Tensor, tangent: Tensor | None, v: Tensor, vb: Tensor
) -> Tensor:
    """V ⋆ h + v_b + K ⋆ h′, `v [lane out in k k]`."""
    if isinstance(way, Geometry):
        own = native.forward(way, before, v, vb, len(v))
        return own if tangent is None else native.forward(way, tangent, weight, None, 1, own)
    own = patches.forward(patches.columns(v), vb, way.patches, after(layer, tuple(before.shape))[2:])
    o = layer.options
    return own if tangent is None else own.add_(F.conv2d(tangent, weight, stride=o["stride"], padding=o["padding"]))


def pull(layer: Layer, way: Way, weight: Tensor, before: Tensor, gathered: Tensor, prime: Tensor, v: Tensor) -> Tensor:
    """(∂(V ⋆ h)/∂h)ᵀ δ + (∂(K ⋆ h)/∂h)ᵀ δ′."""
    if isinstance(way, Geometry):
        return native.transposed(way, prime, weight, 1, native.transposed(way, gathered, v, len(v)))
    own = patches.transposed(layer, patches.turned(layer, v), gathered, before.shape)
    return own.add_(patches.spread(layer, way.turned, prime, before.shape))


def _geometry(layer: Layer, h: Tensor) -> Geometry:
    o, (height, width) = layer.options, h.shape[2:]
    return Geometry(height, width, o["in"], o["out"], o["kernel"], o["stride"], o["padding"])

"""Pooling: means are linear; maxima are, too, once it is known where they stand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qleak.models.layers import apply_layer
from qleak.types import Layer


def up(layer: Layer, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """(output, places of the maxima or None)."""
    o = layer.options
    if o["function"] == "mean":
        return apply_layer(layer, {}, h), None
    out, places = F.max_pool2d(h, o["kernel"], o["stride"], o["padding"], return_indices=True)
    return out, places


def push(layer: Layer, places: Tensor | None, tangent: Tensor) -> Tensor:
    """The derivative of the output along h′ `[lane·b c h w]`."""
    if places is None:
        return apply_layer(layer, {}, tangent)
    return tangent.flatten(2).gather(2, places.flatten(2)).reshape(places.shape)


def down(layer: Layer, before: Tensor, places: Tensor | None, delta: Tensor) -> Tensor:
    """The transpose of `push`."""
    o = layer.options
    if places is None:
        sizes = [[o[name]] * 2 for name in ("kernel", "stride", "padding")]
        return torch.ops.aten.avg_pool2d_backward(delta, before, *sizes, False, True, None)
    found = delta.new_zeros(before.shape).flatten(2)
    return found.scatter_add(2, places.flatten(2), delta.flatten(2)).reshape(before.shape)

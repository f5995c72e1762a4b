"""Convolutions as matrix products with patches, for many lanes: `h [lane·b c h w]` in channels-last memory.

One strided copy lays the patches out, `[lane b·place k·k·c]`; every use of them is then a product: with the shared
kernels one for all lanes, with a lane's own a batched one. Channels last, because a copied run is then k·c numbers long
whatever the stride, and because the images of a lane lie one after the other.

The transposed map has no scatter either. With y + padding = stride·m + r and i = stride·j + r,
δ_h(y) = Σ_j δ(m − j) K(stride·j + r): patches of δ times kernels that are sorted by phase r, and the phases interleaved.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qleak.types import Layer


class Kept(NamedTuple):
    """What the passes after the first ask for again: `patches` of the input, the shared kernels `turned`."""

    patches: Tensor
    turned: Tensor


def patches(layer: Layer, h: Tensor, lanes: int) -> Tensor:
    """What each place of the output sees: `[lane b·place k·k·in]`."""
    o = layer.options
    p = o["padding"]
    return _windows(F.pad(h.permute(0, 2, 3, 1), (0, 0, p, p, p, p)), o["kernel"], o["stride"], lanes)


def columns(weight: Tensor) -> Tensor:
    """Kernels `[(lane) out in k k]` as `forward` multiplies by them, `[(lane) k·k·in out]`; no copy of what `weigh` laid out."""
    return weight.movedim(-3, -1).flatten(-3).mT


def forward(kernels: Tensor, bias: Tensor | None, seen: Tensor, sides: Sequence[int]) -> Tensor:
    """K ⋆ h + b from the patches of h and `columns` of kernels: shared ones, or a lane's own with its `bias [lane out]`."""
    if kernels.ndim == 3:
        out = torch.bmm(seen, kernels) if bias is None else torch.bmm(seen, kernels).add_(bias[:, None])
    else:
        rows = seen.flatten(0, 1)
        out = rows @ kernels if bias is None else torch.addmm(bias, rows, kernels)
    return out.view(-1, *sides, kernels.shape[-1]).permute(0, 3, 1, 2)


def weigh(layer: Layer, seen: Tensor, delta: Tensor, less: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """From patches and the output's error: scale · ∂ℓ/∂K − less `[lane out in k k]`, scale · ∂ℓ/∂b `[lane out]`."""
    o = layer.options
    rows = delta.permute(0, 2, 3, 1).reshape(len(seen), seen.shape[1], -1)
    if less is None:
        found = torch.bmm(rows.mT, seen)
        found = found if scale == 1 else found * scale
    else:
        found = torch.baddbmm(less.permute(0, 1, 3, 4, 2).flatten(2), rows.mT, seen, beta=-1, alpha=scale)
    found = found.unflatten(2, (o["kernel"], o["kernel"], o["in"])).permute(0, 1, 4, 2, 3)
    return found, rows.sum(1) if scale == 1 else rows.sum(1) * scale


def errors(layer: Layer, delta: Tensor, before: torch.Size, lanes: int) -> Tensor:
    """The patches of an output's error that each place of the input gathers: `[lane b·place J·J·out]`."""
    return _windows(_padded(layer, delta, before), _reach(layer), 1, lanes)


def turned(layer: Layer, weight: Tensor) -> Tensor:
    """Kernels as `transposed` multiplies by them, `[(lane) J·J·out stride·stride·in]`: sorted by phase, the last place first."""
    o = layer.options
    index, empty = _order(o["out"], o["in"], o["kernel"], o["stride"], weight.device)
    flat = weight.movedim(-3, -1).flatten(-4)  # out k k in: as `weigh` lays a direction out, so that nothing is copied
    found = flat.index_select(-1, index)
    found = found if empty is None else found.masked_fill(empty, 0)
    return found.unflatten(-1, (_reach(layer) ** 2 * o["out"], -1))


def transposed(layer: Layer, kernels: Tensor, gathered: Tensor, before: torch.Size) -> Tensor:
    """(∂(K ⋆ h)/∂h)ᵀ δ `[lane·b in h w]` from the patches of δ and `turned` kernels: shared ones, or a lane's own."""
    out = torch.bmm(gathered, kernels) if kernels.ndim == 3 else gathered.flatten(0, 1) @ kernels
    return _interleaved(layer, out, before)


def spread(layer: Layer, kernels: Tensor, delta: Tensor, before: torch.Size) -> Tensor:
    """The same for shared kernels and an error whose patches nobody else needs: an ordinary convolution, no copy."""
    reach, cout = _reach(layer), layer.options["out"]
    weight = kernels.view(reach, reach, cout, -1).permute(3, 2, 0, 1)
    pads = _pads(layer, delta, before)
    even = len(set(pads)) == 1 and pads[0] >= 0
    out = F.conv2d(delta, weight, padding=pads[0]) if even else F.conv2d(F.pad(delta, pads), weight)
    return _interleaved(layer, out.permute(0, 2, 3, 1), before)


def _interleaved(layer: Layer, out: Tensor, before: torch.Size) -> Tensor:
    """`[lane·b·place stride·stride·in]`, phase by phase, as `[lane·b in h w]`."""
    s, cin = layer.options["stride"], layer.options["in"]
    (top, bottom), (left, right) = (_phases(layer, side) for side in before[2:])
    rows, columns = bottom - top + 1, right - left + 1
    out = (
        out.reshape(before[0], rows, columns, s, s, cin).transpose(2, 3).reshape(before[0], rows * s, columns * s, cin)
    )
    y, x = layer.options["padding"] - s * top, layer.options["padding"] - s * left
    return out[:, y : y + before[2], x : x + before[3]].permute(0, 3, 1, 2)


@functools.lru_cache
def _order(cout: int, cin: int, kernel: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Which number of a kernel stands where in `turned`, flat, and which places are empty, if any."""
    reach = -(-kernel // stride)
    spare = stride * reach - kernel
    numbers = torch.arange(cout * cin * kernel * kernel).reshape(cout, kernel, kernel, cin).movedim(-1, 1)
    numbers = F.pad(numbers, (0, spare, 0, spare), value=numbers.numel())
    numbers = numbers.reshape(cout, cin, reach, stride, reach, stride).flip(2, 4)
    index = numbers.permute(2, 4, 0, 3, 5, 1).flatten().to(device)
    empty = index == cout * cin * kernel * kernel
    return index.masked_fill(empty, 0), empty if spare else None


def _reach(layer: Layer) -> int:
    """J: how many places of the output a place of the input reaches, along an axis."""
    return -(-layer.options["kernel"] // layer.options["stride"])


def _phases(layer: Layer, side: int) -> tuple[int, int]:
    """The first and the last m of an axis of the input."""
    p, s = layer.options["padding"], layer.options["stride"]
    return p // s, (p + side - 1) // s


def _padded(layer: Layer, delta: Tensor, before: torch.Size) -> Tensor:
    """An output's error `[lane·b h w out]` with as much around it as the places of the input reach."""
    return F.pad(delta.permute(0, 2, 3, 1), [0, 0, *_pads(layer, delta, before)])


def _pads(layer: Layer, delta: Tensor, before: torch.Size) -> list[int]:
    """Left, right, top, bottom."""
    pads = []
    for axis in (3, 2):
        low, high = _phases(layer, before[axis])
        pads += [_reach(layer) - 1 - low, high - delta.shape[axis] + 1]
    return pads


def _windows(h: Tensor, kernel: int, stride: int, lanes: int) -> Tensor:
    """All windows of `[lane·b h w c]` as `[lane b·place k·k·c]`."""
    found = h.unfold(1, kernel, stride).unfold(2, kernel, stride).permute(0, 1, 2, 4, 5, 3)
    return found.reshape(lanes, -1, kernel * kernel * h.shape[3])

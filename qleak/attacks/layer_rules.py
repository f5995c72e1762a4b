"""What each kind of layer does to values on their way up, to errors on their way down, and to the tangents of both.

Images of all lanes lie in one batch, `h [lane·b …]`; only what belongs to a lane's own direction v in the space of the
weights, `v {name: [lane …]}`, is taken lane by lane. With δ the error of a layer's output (`∂ℓ/∂out`) and primes for
derivatives along the direction:

- `up`: out = f(h; θ);
- `down`: δ_h = (∂f/∂h)ᵀ δ;
- `weigh`: (∂f/∂θ)ᵀ δ, summed over the images of a lane;
- `push`: out′ = (∂f/∂h) h′ + (∂f/∂θ) v;
- `pull`: δ_h′, the derivative of δ_h: (∂f/∂h)ᵀ δ′ + (its change along h′ and v)ᵀ δ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak.attacks import convolutions, ghost, layer_norms, pools
from qleak.attacks.ghost import Cell, Ghost, Split
from qleak.attacks.slopes import SLOPES, curvature, slope
from qleak.models.layers import apply_layer
from qleak.types import Buffers, Layer, Params

Weights = dict[str, Any]
"""`{name: [lane …]}`, what is taken off also as a `Split` or a `Cell`, a direction as a `Ghost` (`qleak.attacks.ghost`)."""


class Seen(NamedTuple):
    """What a layer met: its input, its output, and what else it keeps.

    That is patches and kernels of a convolution, act′ of an activation, a norm's statistics, the places of maxima.
    """

    before: Tensor
    after: Tensor
    kept: Any = None


def known(layer: Layer) -> bool:
    """Whether the layer's formulas are written here."""
    return layer.kind != "activation" or layer.options["function"] in SLOPES


def up(layer: Layer, params: Params, buffers: Buffers, h: Tensor, lanes: int, compiled: bool = False) -> Seen:
    """The forward map, and what the other passes will ask for. What is `compiled` cannot be differentiated."""
    match layer.kind:
        case "conv":
            weight, bias = (params[f"{layer.name}.{end}"] for end in ("weight", "bias"))
            return Seen(h, *convolutions.up(layer, weight, bias, h, lanes, compiled))
        case "activation":
            function = layer.options["function"]
            out = apply_layer(layer, params, h)
            return Seen(h, out, slope(function, h, out))
        case "norm":
            return Seen(h, *layer_norms.up(layer, params, buffers, h, lanes))
        case "pool":
            return Seen(h, *pools.up(layer, h))
        case _:
            return Seen(h, apply_layer(layer, params, h))


def gather(layer: Layer, seen: Seen, delta: Tensor, lanes: int) -> Tensor:
    """An output's error as the layer's transpose reads it: maybe patches for a convolution, itself for the others."""
    return convolutions.gather(layer, seen.kept, seen.before, delta, lanes) if layer.kind == "conv" else delta


def down(layer: Layer, params: Params, seen: Seen, gathered: Tensor) -> Tensor:
    """(∂f/∂h)ᵀ δ, from `gather`'s δ."""
    match layer.kind:
        case "conv":
            return convolutions.down(layer, seen.kept, params[f"{layer.name}.weight"], seen.before, gathered)
        case "linear":
            return gathered @ params[f"{layer.name}.weight"]
        case "activation":
            return gathered * seen.kept
        case "flatten":
            return _unflattened(gathered, seen.before)
        case "norm":
            return layer_norms.down(layer, params, seen.kept, gathered)
        case "pool":
            return pools.down(layer, seen.before, seen.kept, gathered)


def weigh(
    layer: Layer, seen: Seen, delta: Tensor, lanes: int, less: Weights | None = None, scale: float = 1.0
) -> Weights:
    """The update scale · (∂f/∂θ)ᵀ δ, minus `less {name: [lane …]}` where given: the difference costs no pass of its own."""
    weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
    match layer.kind:
        case "conv":
            off = _tensor(less, weight)
            found, total = convolutions.weigh(layer, seen.kept, seen.before, delta, lanes, off, scale)
        case "norm":
            found, total = (v * scale for v in layer_norms.weigh(seen.kept, delta))
            found = found if (off := _tensor(less, weight)) is None else found - off
        case _:
            h, rows = seen.before.unflatten(0, (lanes, -1)), delta.unflatten(0, (lanes, -1))
            total = rows.sum(1) if scale == 1 else rows.sum(1) * scale
            off = less.get(weight) if less else None
            if isinstance(off, Split):
                found = ghost.difference(off, rows, h, scale)
            elif isinstance(off, Cell) and ghost.large(off):
                found = ghost.outside(off, rows, h, scale)
            elif isinstance(off, torch.Tensor):
                found = torch.baddbmm(off, rows.mT, h, beta=-1, alpha=scale)
            else:
                found = torch.bmm(rows.mT, h) * scale if scale != 1 else torch.bmm(rows.mT, h)
    return {weight: found, bias: total if (off := _tensor(less, bias)) is None else total - off}


def push(layer: Layer, params: Params, seen: Seen, tangent: Tensor | None, v: Weights, lanes: int) -> Tensor:
    """(∂f/∂h) h′ + (∂f/∂θ) v; `tangent` h′ is None where it is zero (only a layer with weights may then be asked)."""
    weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
    match layer.kind:
        case "conv":
            return convolutions.push(layer, seen.kept, params[weight], seen.before, tangent, v[weight], v[bias])
        case "linear":
            h = seen.before.unflatten(0, (lanes, -1))
            own = v[weight].push if isinstance(v[weight], Ghost) else torch.bmm(h, v[weight].mT)
            own = own.add_(v[bias][:, None]).flatten(0, 1)
            return own if tangent is None else own.addmm_(tangent, params[weight].mT)
        case "norm":
            return layer_norms.push(layer, params, seen.kept, tangent, v)
    assert tangent is not None
    match layer.kind:
        case "activation":
            return tangent * seen.kept
        case "flatten":
            return tangent.flatten(1)
        case "pool":
            return pools.push(layer, seen.kept, tangent)


def pull(
    layer: Layer, params: Params, seen: Seen, gathered: Tensor, prime: Tensor, tangent: Tensor | None, v: Weights, lanes: int
) -> Tensor:  # fmt: skip
    """The derivative of `down`: `gathered` δ and `prime` δ′ of the output, `tangent` h′ of the input."""
    weight = f"{layer.name}.weight"
    match layer.kind:
        case "conv":
            return convolutions.pull(layer, seen.kept, params[weight], seen.before, gathered, prime, v[weight])
        case "linear":
            rows = gathered.unflatten(0, (lanes, -1))
            own = v[weight].pull if isinstance(v[weight], Ghost) else torch.bmm(rows, v[weight])
            return own.flatten(0, 1).addmm_(prime, params[weight])
        case "activation":
            found = prime * seen.kept
            bent = curvature(layer.options["function"], seen.before, seen.after, seen.kept)
            return found if bent is None or tangent is None else found.addcmul_(bent.mul_(gathered), tangent)
        case "flatten":
            return _unflattened(prime, seen.before)
        case "norm":
            return layer_norms.pull(layer, params, seen.kept, gathered, prime, tangent, v)
        case "pool":
            return pools.down(layer, seen.before, seen.kept, prime)


def _tensor(less: Weights | None, name: str) -> Tensor | None:
    """What is to be taken off a tensor; a cell is not: its projection comes later."""
    found = less.get(name) if less else None
    return found if isinstance(found, Tensor) else None


def _unflattened(delta: Tensor, before: Tensor) -> Tensor:
    found = delta.reshape(before.shape)
    return found.contiguous(memory_format=torch.channels_last) if found.ndim == 4 else found

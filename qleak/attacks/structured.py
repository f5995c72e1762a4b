"""Gradients of many lanes at once, and the derivative of any function of them, by explicit formulas.

For nets that declare their layers. `vmap` over a gradient turns every convolution's weight gradient into a grouped
convolution, which is slow on a CPU; autograd twice keeps two graphs. Here four short passes are written out
(`layer_rules`), in which lanes share the big convolutions and only the lanes' own weights are a batched product:

1. up: h_l = f_l(h_{l−1}; θ);
2. down: δ_{l−1} = (∂f_l/∂h)ᵀ δ_l, and the update u = ∇_θ ℓ from δ_l and h_{l−1};
3. with v = ∇M(u), up again along θ + εv: h′_l = (∂f_l/∂h) h′_{l−1} + (∂f_l/∂θ) v;
4. and down: δ′, whose value at the images is ∇_x M(u(x)) = d/dε ∇_x ℓ(θ + εv; x) (forward over reverse,
   Pearlmutter 1994, "Fast exact multiplication by the Hessian").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak import tree
from qleak.attacks import layer_rules
from qleak.attacks.layer_rules import Seen, Weights
from qleak.models.layers import after
from qleak.types import Buffers, Layer, Params, Tree

BLOCK = 2**23
"""Numbers a block of lanes may keep of its layers: with the batched products around them, a few times a core's cache."""


class Slope(NamedTuple):
    """A function M of the update, as the explicit formulas ask for it.

    Attributes:
        half: `(update, goal) -> (M [lane], ½∇M)`; half, because that of a square is the residual itself.
        less: `goal -> tree or None`: what is to be taken off the update before `half` sees it (it comes free with
            the product that makes the update).
    """

    half: Callable[[Weights, Any], tuple[Tensor, Weights]]
    less: Callable[[Any], Weights | None]


def supports(layers: tuple[Layer, ...] | None) -> bool:
    """Whether every layer has explicit formulas here."""
    return layers is not None and all(layer_rules.known(layer) for layer in layers)


def lane_gradients(
    layers: tuple[Layer, ...],
    params: Params,
    x: Tensor,
    target: Tensor,
    given: str = "labels",
    buffers: Buffers | None = None,
) -> Tree:
    """∇_θ of each lane's mean cross-entropy: `x [lane b c h w]`, `target [lane b class] -> {name: [lane …]}`.

    With `given="errors"`, `target` is the output error itself (see `client.linear_loss`).
    Differentiable in `x` and `target`. Equal to `vmap(grad(loss))`, proved by test in float64.
    """
    lanes = len(x)
    seen, logits = _up(layers, params, buffers or {}, x)
    grads = _down(layers, params, seen, _error(logits, target, given), lanes)[1]
    return {k: grads[k] for k in params}


def closure(
    layers: tuple[Layer, ...], params: Params, buffers: Buffers, slope: Slope, given: str = "labels", scale: float = 1.0
) -> Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor, Tensor]]:
    """`(x [lane b c h w], t [lane b class], goal [lane …]) -> (M [lane], ∂M/∂x, ∂M/∂t)`, M a function of `scale` · update.

    Lanes go through in blocks that stay near the processor; a block's result is the same in any company.
    """

    def every(x: Tensor, target: Tensor, goal: Any) -> tuple[Tensor, Tensor, Tensor]:
        size = block(layers, params, x)
        if len(x) <= size:
            return one(x, target, goal)
        size = -(-len(x) // -(-len(x) // size))  # blocks of equal size
        spans = [slice(i, i + size) for i in range(0, len(x), size)]
        parts = [one(x[s], target[s], tree.nested_map(lambda v, s=s: v[s], goal)) for s in spans]
        value, dx, dt = (torch.cat(part) for part in zip(*parts, strict=True))
        return value, dx, dt

    def one(x: Tensor, target: Tensor, goal: Any) -> tuple[Tensor, Tensor, Tensor]:
        lanes, b = x.shape[:2]
        with torch.no_grad():
            seen, logits = _up(layers, params, buffers, x, compiled=True)
            delta = _error(logits, target, given)
            gathered, update = _down(layers, params, seen, delta, lanes, slope.less(goal), scale, whole=True)
            value, v = slope.half({k: update[k] for k in params}, goal)
            tangents, last = _push(layers, params, seen, v, lanes)
            dt, prime = _error_tangents(logits, last, target, given, b)
            dx = _pull(layers, params, seen, gathered, tangents, prime, v, lanes)
            return value, dx.reshape(x.shape).mul_(2 * scale), dt.reshape(target.shape).mul_(2 * scale)

    return every


def block(layers: tuple[Layer, ...], params: Params, x: Tensor) -> int:
    """How many lanes go through together: their patches and weight gradients are about `BLOCK` numbers."""
    if x.is_cuda:  # pragma: no cover: needs a CUDA device
        return len(x)
    numbers, h = tree.count(params), (x.shape[1], *x.shape[2:])
    for layer in layers:
        h = after(layer, h)
        if layer.kind == "conv":
            numbers += layer.options["in"] * layer.options["kernel"] ** 2 * h[0] * h[2] * h[3]
    return max(1, BLOCK // numbers)


def _up(
    layers: tuple[Layer, ...], params: Params, buffers: Buffers, x: Tensor, compiled: bool = False
) -> tuple[list[Seen], Tensor]:
    """What every layer saw, and the logits `[lane·b class]`."""
    h, seen = x.flatten(0, 1).contiguous(memory_format=torch.channels_last), []
    for layer in layers:
        seen.append(layer_rules.up(layer, params, buffers, h, len(x), compiled))
        h = seen[-1].after
    return seen, h


def _error(logits: Tensor, target: Tensor, given: str) -> Tensor:
    """∂ℓ/∂logits `[lane·b class]`, ℓ the mean over a lane's b images."""
    if given == "errors":
        return target.flatten(0, 1)
    flat = target.flatten(0, 1)
    return (torch.softmax(logits, -1) * flat.sum(-1, keepdim=True) - flat) / target.shape[1]


def _error_tangents(logits: Tensor, moved: Tensor, target: Tensor, given: str, b: int) -> tuple[Tensor, Tensor | None]:
    """(d/dε ∂ℓ/∂t, d/dε ∂ℓ/∂logits) along logits′ = `moved`; None for a derivative of zero."""
    if given == "errors":
        return moved, None
    p = torch.softmax(logits, -1)
    centred = moved - (p * moved).sum(-1, keepdim=True)
    return -centred / b, p * centred * target.flatten(0, 1).sum(-1, keepdim=True) / b


def _down(
    layers: tuple[Layer, ...], params: Params, seen: list[Seen], delta: Tensor, lanes: int,
    less: Weights | None = None, scale: float = 1.0, whole: bool = False,
) -> tuple[list[Tensor], Weights]:  # fmt: skip
    """What `gather` made of the error behind every layer that `pull` will ask, and the update minus `less`."""
    grads: Weights = {}
    gathered: list[Tensor] = [delta] * len(layers)
    first = next(i for i, layer in enumerate(layers) if layer.name)
    for i in range(len(layers) - 1, first - 1, -1):
        layer = layers[i]
        if layer.name:
            grads |= layer_rules.weigh(layer, seen[i], delta, lanes, less, scale)
        if whole or i > first:
            gathered[i] = layer_rules.gather(layer, seen[i], delta, lanes)
        if i > first:
            delta = layer_rules.down(layer, params, seen[i], gathered[i])
    return gathered, grads


def _push(
    layers: tuple[Layer, ...], params: Params, seen: list[Seen], v: Weights, lanes: int
) -> tuple[list[Tensor | None], Tensor]:
    """h′ in front of every layer (None: zero), and logits′."""
    tangent: Tensor | None = None
    before: list[Tensor | None] = []
    for layer, met in zip(layers, seen, strict=True):
        before.append(tangent)
        if tangent is not None or layer.name:
            tangent = layer_rules.push(layer, params, met, tangent, v, lanes)
    assert tangent is not None
    return before, tangent


def _pull(
    layers: tuple[Layer, ...], params: Params, seen: list[Seen], gathered: list[Tensor],
    tangents: list[Tensor | None], prime: Tensor | None, v: Weights, lanes: int,
) -> Tensor:  # fmt: skip
    """δ′ at the images."""
    for i in range(len(layers) - 1, -1, -1):
        if prime is None and layers[i].name:
            prime = torch.zeros_like(seen[i].after)
        if prime is not None:
            prime = layer_rules.pull(layers[i], params, seen[i], gathered[i], prime, tangents[i], v, lanes)
    assert prime is not None
    return prime

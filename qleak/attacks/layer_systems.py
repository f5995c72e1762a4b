"""What is in front of one convolution: its forward and its weight-gradient equations, solved together.

∂K[o, i, q] = Σ_p δ_o(p)·h_i(s·p + q − padding) involves one input channel i at a time, with the same coefficients
T[(o, q), pixel] for all of them. So the second set is block diagonal, and is kept as one block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

from qleak.check import Expected
from qleak.models.layers import apply_layer, shapes
from qleak.types import Layer, Model, Params, Tree


class Rank(NamedTuple):
    """Equations and unknowns of one layer; `deficit` is how many unknowns cannot be determined, at least.

    Attributes:
        forward: equations z − b = A h of units whose z is known.
        weights: largest rank of the weight-gradient equations.
    """

    layer: str
    unknowns: int
    forward: int
    weights: int

    @property
    def deficit(self) -> int:
        """Unknowns without an equation, at least."""
        return max(0, self.unknowns - self.forward - self.weights)


def ranks(model: Model, active: float = 0.5) -> tuple[Rank, ...]:
    """The rank analysis of R-GAP (Zhu & Blaschko 2021, section 3.3), by counting; last layer first.

    δ_o(p) of a convolution has P positions, so that T above has rank ≤ min(out, P)·kernel² and at most one column per
    pixel; a linear layer's ∂W = δhᵀ determines h wherever δ ≠ 0. A count is an upper bound on the rank: padding, strides and
    dependent δ can only lower it.

    Args:
        model: a model that declares its layers.
        active: share of a ReLU layer's units whose z is known (the positive ones).

    Raises:
        Expected: the model does not declare its layers.
    """
    if model.layers is None:
        raise Expected("Expected a model that declares its layers, to count its equations.")
    params = {k: torch.zeros(s, dtype=torch.float64) for layer in model.layers for k, s in shapes(layer).items()}
    h = torch.zeros(1, *model.shape, dtype=torch.float64)
    found: list[Rank] = []
    for layer, after in zip(model.layers, (*model.layers[1:], None), strict=True):
        out = apply_layer(layer, params, h)
        if layer.name:
            n, o = h.numel(), layer.options
            known = active if after and after.options.get("function") == "relu" else 1.0
            weights = n
            if layer.kind == "conv":
                weights = o["in"] * min(h[0, 0].numel(), min(o["out"], out[0, 0].numel()) * o["kernel"] ** 2)
            found.append(Rank(layer.name, n, math.floor(known * out.numel()), weights))
        h = out
    return tuple(reversed(found))


def invert(
    layer: Layer,
    params: Params,
    update: Tree,
    before: tuple[int, ...],
    z: Tensor,
    delta: Tensor,
    slope: Tensor,
    ridge: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, δ_h, relative residual) in front of one convolution, from z, δ_z, act′(z) and its weight gradient."""
    name = f"{layer.name}.weight"
    bare = {name: params[name], f"{layer.name}.bias": torch.zeros_like(params[f"{layer.name}.bias"])}
    zero = torch.zeros(before, dtype=torch.float64)
    offset = apply_layer(layer, params, zero)

    def transpose(w: Tensor) -> Tensor:
        many = torch.zeros(len(w), *before[1:], dtype=torch.float64)
        return vjp(lambda h: apply_layer(layer, bare, h), many)[1](w)[0]

    known = torch.nonzero(slope.flatten())[:, 0]
    units = [F.one_hot(part, z.numel()).double().reshape(-1, *z.shape[1:]) for part in known.split(256)]
    rows = [transpose(u).flatten(1) for u in units]
    factor = slope.flatten()[known]
    forward = torch.cat([zero.new_zeros(0, zero.numel()), *rows]) * factor[:, None]
    target = factor * (z - offset).flatten()[known]
    goal = update[name].transpose(0, 1).flatten(1)  # [in, out·kernel²]
    block = _coefficients(layer, before, delta)
    # Each set in units of its own size, so that neither outvotes the other.
    first, second = 1 / target.norm().clamp(min=1e-300), 1 / goal.norm().clamp(min=1e-300)
    forward, target = forward * first, target * first
    block, goal = block * second, goal * second
    h = _least_squares(forward, target, block, goal, ridge)
    missed = (target - forward @ h).square().sum() + (goal - h.unflatten(0, (len(goal), -1)) @ block.mT).square().sum()
    size = target.square().sum() + goal.square().sum()
    residual = (missed / size.clamp(min=1e-300)).sqrt()
    return h.reshape(before), transpose(delta), residual


def _coefficients(layer: Layer, before: tuple[int, ...], delta: Tensor) -> Tensor:
    """T `[out·kernel², h·w]`: the weight gradient of one input channel as a linear map of its pixels."""
    o, pixels = layer.options, before[2] * before[3]
    units = torch.eye(pixels, dtype=torch.float64).reshape(pixels, 1, before[2], before[3])
    patches = F.unfold(units, o["kernel"], padding=o["padding"], stride=o["stride"])  # [pixel, kernel², position]
    return torch.einsum("op,nqp->oqn", delta[0].flatten(1), patches).flatten(0, 1)


def _least_squares(forward: Tensor, target: Tensor, block: Tensor, goal: Tensor, ridge: float) -> Tensor:
    """The minimiser of |A h − target|² + Σ_i |T h_i − goal_i|² + ridge·trace/d·|h|² in float64.

    The normal equations are factored in float32, which takes half the time, and the factor only
    preconditions conjugate gradients on the float64 rows, which restore the accuracy. Started at zero they stay in
    the span of the rows: without enough rows the solution is the one of minimum norm.
    """
    channels, pixels = len(goal), block.shape[1]
    single = forward.float()
    normal = single.mT @ single
    blocks = normal.unflatten(0, (channels, pixels)).unflatten(2, (channels, pixels)).diagonal(dim1=0, dim2=2)
    blocks += (block.mT @ block).float()[..., None]
    mean = normal.diagonal().mean().clamp(min=1e-30)
    weight = ridge * mean.double()
    factor = _factored(normal, mean)

    def precondition(r: Tensor) -> Tensor:
        return torch.cholesky_solve(r.float()[:, None], factor)[:, 0].double()

    def product(v: Tensor) -> Tensor:
        bent = (v.unflatten(0, (channels, pixels)) @ block.mT) @ block
        return forward.mT @ (forward @ v) + bent.flatten() + weight * v

    h = torch.zeros_like(forward[0]) if len(forward) else block.new_zeros(channels * pixels)
    rest = forward.mT @ target + (goal @ block).flatten()
    first = rest.norm()
    if not float(first) > 0:  # nothing is known in front of a layer whose units are all inactive
        return h
    rest = rest / first  # of size 1: the preconditioner works in float32
    step = precondition(rest)
    size = rest.dot(step)
    for _ in range(100):
        image = product(step)
        length = size / step.dot(image)
        h, rest = h + length * step, rest - length * image
        if rest.norm() <= 1e-14:
            break
        turned = precondition(rest)
        size, before = rest.dot(turned), size
        step = turned + size / before * step
    return h * first


def _factored(normal: Tensor, mean: Tensor) -> Tensor:
    """Cholesky factor of normal + shift·I, with the smallest shift at which float32 finds it positive definite."""
    shift = 1e-6 * mean
    normal.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(normal)
    while int(failed):
        normal.diagonal().add_(9 * shift)
        shift = 10 * shift
        factor, failed = torch.linalg.cholesky_ex(normal)
    return factor

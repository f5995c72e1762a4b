"""What is in front of one convolution: its forward and its weight-gradient equations, solved together.

∂K[o, i, q] = Σ_p δ_o(p)·h_i(s·p + q − padding) involves one input channel i at a time, with the same coefficients
T[(o, q), pixel] for all of them. So the second set is block diagonal, and is kept as one block.

Nothing of the first set is kept as a matrix where it is only applied: A v is a convolution, Aᵀ w a transposed one, each
under a millisecond in float64. Conjugate gradients do the rest in a few iterations, because an approximate solution of
AᵀA + I ⊗ TᵀT + shift·I precedes each: a Cholesky factor in float32, whose matrix is summed up patch by patch (unknowns
meet in AᵀA only where one position of the kernel covers both), or, where few rows of A are known, Woodbury's identity
with I ⊗ (TᵀT + shift·I), one small factor for all input channels, as its base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
        Expected: the model does not declare its layers, or pools or normalises.
    """
    if model.layers is None:
        raise Expected("Expected a model that declares its layers, to count its equations.")
    for i, layer in enumerate(model.layers, start=1):
        if layer.kind in ("pool", "norm"):
            raise Expected(f"Expected affine layers and activations, to count equations: layer {i} is a {layer.kind}.")
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


class System(NamedTuple):
    """Both sets of equations in front of one convolution, scaled: s·(K ⋆ h) = target and T hᵢ = goalᵢ for every input channel.

    Attributes:
        kernel: K `[out in k k]`.
        scale: s `[out h' w']`, act′(z) in units of the set; 0 where z is not known.
        target: s·(z − b) `[out h' w']`.
        block: T `[out·k², h·w]`.
        goal: ∂K by input channel `[in, out·k²]`.
        shape: (in, h, w) of the unknowns.
    """

    kernel: Tensor
    scale: Tensor
    target: Tensor
    block: Tensor
    goal: Tensor
    shape: tuple[int, ...]
    stride: int
    padding: int

    def forward(self, h: Tensor) -> Tensor:
        """A h `[out h' w']`."""
        return self.scale * F.conv2d(h.view(1, *self.shape), self.kernel, stride=self.stride, padding=self.padding)[0]

    def adjoint(self, w: Tensor) -> Tensor:
        """Aᵀ w `[in h w]`."""
        return backward(self.scale * w, self.kernel, self.shape, self.stride, self.padding)


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
    kernel, o = params[f"{layer.name}.weight"], layer.options
    target = (slope * (z - params[f"{layer.name}.bias"][:, None, None]))[0]
    block = _coefficients(layer, before, delta)
    goal = update[f"{layer.name}.weight"].transpose(0, 1).flatten(1)  # [in, out·k²]
    # Each set in units of its own size, so that neither outvotes the other.
    first, second = 1 / target.norm().clamp(min=1e-300), 1 / goal.norm().clamp(min=1e-300)
    system = System(
        kernel, slope[0] * first, target * first, block * second, goal * second, before[1:], o["stride"], o["padding"]
    )
    h = _least_squares(system, ridge)
    missed = (system.target - system.forward(h)).square().sum()
    missed = missed + (system.goal - h.flatten(1) @ system.block.mT).square().sum()
    size = system.target.square().sum() + system.goal.square().sum()
    residual = (missed / size.clamp(min=1e-300)).sqrt()
    return h[None], backward(delta[0], kernel, before[1:], o["stride"], o["padding"])[None], residual


def backward(w: Tensor, kernel: Tensor, shape: tuple[int, ...], stride: int, padding: int) -> Tensor:
    """The adjoint of h ↦ K ⋆ h: `[out h' w'] -> [in h w]`."""
    left = [(n + 2 * padding - kernel.shape[-1]) % stride for n in shape[1:]]
    return F.conv_transpose2d(w[None], kernel, stride=stride, padding=padding, output_padding=left)[0]


def _covered(shape: tuple[int, ...], kernel: int, stride: int, padding: int) -> Tensor:
    """The pixel under each place of the kernel at each position, `[position k²]`; h·w stands for padding."""
    pixels = torch.arange(shape[-2] * shape[-1]).reshape(shape[-2:])
    pixels = F.pad(pixels, (padding,) * 4, value=pixels.numel())
    return pixels.unfold(0, kernel, stride).unfold(1, kernel, stride).flatten(2).flatten(0, 1)


def _coefficients(layer: Layer, before: tuple[int, ...], delta: Tensor) -> Tensor:
    """T `[out·kernel², h·w]`: the weight gradient of one input channel as a linear map of its pixels."""
    o, delta = layer.options, delta[0].flatten(1)  # [out, position]
    covered = _covered(before, o["kernel"], o["stride"], o["padding"])
    found = delta.new_zeros(len(delta), covered.shape[1], before[2] * before[3] + 1)
    index = covered.mT.expand(len(delta), -1, -1)  # under one place of the kernel no pixel comes twice
    return found.scatter_(2, index, delta[:, None].expand_as(index))[..., :-1].flatten(0, 1)


def _least_squares(system: System, ridge: float) -> Tensor:
    """The minimiser `[in h w]` of |A h − target|² + Σ_i |T h_i − goal_i|² + ridge·trace/d·|h|² in float64.

    The preconditioner may be rough, the conjugate gradients are not. Started at zero they stay in the span of the rows,
    because it is a function of the same normal matrix, up to its rounding: without enough rows the solution is the one of
    minimum norm, to 3 digits behind a float32 factor.
    """
    block, count = system.block, math.prod(system.shape)
    squares = F.conv2d(
        torch.ones(1, *system.shape, dtype=torch.float64),
        system.kernel.square(),
        stride=system.stride,
        padding=system.padding,
    )
    trace = (system.scale.square() * squares[0]).sum() + len(system.goal) * block.square().sum()
    mean = (trace / count).clamp(min=1e-30)

    def product(v: Tensor) -> Tensor:
        bent = (v.flatten(1) @ block.mT) @ block
        return system.adjoint(system.forward(v)) + bent.view_as(v) + ridge * mean * v

    h = torch.zeros(system.shape, dtype=torch.float64)
    rest = system.adjoint(system.target) + (system.goal @ block).view_as(h)
    first = rest.norm()
    if not float(first) > 0:  # nothing is known in front of a layer whose units are all inactive
        return h
    known = int(system.scale.count_nonzero())
    precondition = (_woodbury if FEW * known <= count else _cholesky)(system, mean)
    rest = rest / first  # of size 1: the preconditioner may work in float32
    step = precondition(rest)
    size = (rest * step).sum()
    for _ in range(100):
        image = product(step)
        length = size / (step * image).sum()
        h, rest = h + length * step, rest - length * image
        if rest.norm() <= 1e-14:
            break
        turned = precondition(rest)
        size, before = (rest * turned).sum(), size
        step = turned + size / before * step
    return h * first


FEW = 3
"""From so many unknowns per known row of A on, Woodbury's identity takes less time than a factor of the whole matrix."""
SHIFT = 1e-6
"""Shift of a preconditioner, in parts of the mean diagonal."""


def _rows(system: System) -> tuple[Tensor, Tensor]:
    """A by position: the values `[position out in k²]` of its rows, 0 on padding, and their pixels `[position k²]`."""
    covered = _covered(system.shape, system.kernel.shape[-1], system.stride, system.padding)
    inside = covered < system.shape[1] * system.shape[2]
    scale = system.scale.flatten(1).mT[..., None, None]
    return scale * system.kernel.flatten(2) * inside[:, None, None], covered * inside


def _cholesky(system: System, mean: Tensor) -> Callable[[Tensor], Tensor]:
    """The map v ↦ (AᵀA + I ⊗ TᵀT + shift·I)⁻¹ v by a float32 factor, with the smallest shift that makes it positive definite."""
    rows, covered = _rows(system)
    single, (channels, pixels) = rows.float().flatten(2), (system.shape[0], system.block.shape[1])
    normal = torch.zeros(channels * pixels, channels * pixels)
    where = (torch.arange(channels)[:, None] * pixels + covered[:, None]).flatten(1)  # [position in·k²]
    pairs = where[:, :, None] * len(normal) + where[:, None]
    normal.view(-1).scatter_add_(0, pairs.view(-1), (single.mT @ single).view(-1))
    block = system.block.float()
    normal.view(channels, pixels, channels, pixels).diagonal(dim1=0, dim2=2).add_((block.mT @ block)[..., None])
    shift = SHIFT * float(mean)
    normal.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(normal)
    while int(failed):
        normal.diagonal().add_(9 * shift)
        shift = 10 * shift
        factor, failed = torch.linalg.cholesky_ex(normal)

    def precondition(v: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor, v.float().view(-1, 1), upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True).double().view_as(v)

    return precondition


def _woodbury(system: System, mean: Tensor) -> Callable[[Tensor], Tensor]:
    """The same by D⁻¹ − D⁻¹Aᵀ(I + A D⁻¹ Aᵀ)⁻¹A D⁻¹ with D = I ⊗ (TᵀT + shift·I), in float64."""
    rows, covered = _rows(system)
    block, (channels, pixels) = system.block, (system.shape[0], system.block.shape[1])
    known = torch.nonzero(system.scale.flatten(1).mT.flatten())[:, 0]
    index = covered[:, None, None].expand_as(rows)
    dense = rows.new_zeros(*rows.shape[:3], pixels).scatter_add_(3, index, rows)  # padding adds 0 to pixel 0
    dense = dense.flatten(0, 1)[known]  # [row in pixel]
    eye = torch.eye(pixels, dtype=torch.float64)
    base = torch.linalg.cholesky(block.mT @ block + SHIFT * mean * eye)
    inverse = torch.linalg.solve_triangular(base, eye, upper=False)  # for products, faster than so many solutions
    half = (dense.view(-1, pixels) @ inverse.mT).view(len(known), channels * pixels)
    inner = torch.linalg.cholesky(half @ half.mT + torch.eye(len(known), dtype=torch.float64))

    def precondition(v: Tensor) -> Tensor:
        turned = (v.view(channels, pixels) @ inverse.mT).view(-1, 1)
        turned = turned - half.mT @ torch.cholesky_solve(half @ turned, inner)
        return (turned.view(channels, pixels) @ inverse).view_as(v)

    return precondition

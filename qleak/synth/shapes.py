"""From released moments to images: pixels that saturate, bent as hands bend them, and kept where the moments agree.

Everything here is post-processing. A Gaussian cut off at 0 and 1 has other moments than it had before, and its samples are
easier to tell apart than images are; what a classifier learns from them then fails on images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from qleak import random
from qleak.synth import moments
from qleak.types.trees import Tree

WIDEST = 0.98  # share of m(1 − m), the variance of a coin, that a pixel may have
FLOOR = 0.08  # variance, in squared grey values, that every direction is given when classes are told apart
KNOTS = 4  # a side: random displacements between which a bend is interpolated


def images(
    released: Tree,
    y: Tensor,
    shape: tuple[int, int, int],
    gen: Generator,
    gain: float,
    tilt: float,
    bend: float,
    tries: int,
) -> Tensor:
    """`[n c h w]` for classes `y [n]`; `released` holds what `methods.class_moments.Moments` says, the rest is said there."""
    means, fields = released["means"], _fields(released)
    variance = fields.square().sum(2)
    centre, width = saturated(means, gain**2 * variance)
    scale = (width / variance.clamp(min=1e-8).sqrt()).float()
    judge = moments.root(released["total"])
    x, pending = torch.zeros(len(y), *shape).to(means), torch.arange(len(y))
    for _ in range(tries):
        if not len(pending):
            break
        label = y[pending]
        flat = centre.float()[label] + scale[label] * _draws(released, label, gen)
        made = warped(flat.clamp(0, 1).view(-1, *shape), gen, tilt, bend).clamp(0, 1)
        x[pending] = made
        pending = pending[(likeliest(made.flatten(1), means, released["basis"], judge, FLOOR) != label).cpu()]
    return x


def _fields(released: Tree) -> Tensor:
    """`[class d r+K]` W: WWᵀ is the covariance of a class's pixels, of components and centres together."""
    spots = released["weights"].clamp(min=0).sqrt()[..., None] * released["centres"]
    return torch.cat([released["factor"].mT, spots], 1).matmul(released["basis"]).mT


def _draws(released: Tree, y: Tensor, gen: Generator) -> Tensor:
    """`[n d]`: Vᵀ(c + F·N(0, I)) for classes `y [n]`."""
    weights, factor = released["weights"], released["factor"]
    spot = random.uniform(gen, (len(y), 1)).to(weights)
    chosen = (spot > weights.cumsum(1)[y]).sum(1).clamp(max=weights.shape[1] - 1)
    draws = random.normal(gen, (len(y), factor.shape[1])).to(factor)
    z = released["centres"][y, chosen]
    for label in range(len(factor)):  # one product a class: no [n r r] is gathered
        mine = y == label
        z[mine] += draws[mine] @ factor[label].T
    return z @ released["basis"]


def saturated(mean: Tensor, variance: Tensor, outer: int = 20, inner: int = 28) -> tuple[Tensor, Tensor]:
    """(a, b): clip(a + b·g, 0, 1) with g ~ N(0, 1) has `mean` and `variance`, elementwise; float64.

    With u = −a/b, w = (1 − a)/b, P = Φ(w) − Φ(u) and the normal density φ, E = aP + b(φ(u) − φ(w)) + Φ(−w) and
    E[clip²] = (a² + b²)P + 2ab(φ(u) − φ(w)) + b²(uφ(u) − wφ(w)) + Φ(−w). The mean grows with a, the variance at that mean
    with b: two nested bisections. Means are kept off 0 and 1 by 0.002, variances below `WIDEST` · m(1 − m).
    """
    mean = mean.double().clamp(0.002, 0.998)
    variance = variance.double().clamp(min=1e-6).minimum(WIDEST * mean * (1 - mean))

    def at_mean(b: Tensor) -> tuple[Tensor, Tensor]:
        low, high = -8 * b - 1, 2 + 8 * b
        for _ in range(inner):
            a = (low + high) / 2
            below = _clipped_moments(a, b)[0] < mean
            low, high = torch.where(below, a, low), torch.where(below, high, a)
        a = (low + high) / 2
        return a, _clipped_moments(a, b)[1]

    low, high = torch.full_like(mean, math.log(1e-3)), torch.full_like(mean, math.log(20.0))
    for _ in range(outer):
        middle = (low + high) / 2
        below = at_mean(middle.exp())[1] < variance
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    b = ((low + high) / 2).exp()
    return at_mean(b)[0], b


def _clipped_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of clip(a + b·g, 0, 1)."""
    u, w = -a / b, (1 - a) / b
    inside, above = torch.special.ndtr(w) - torch.special.ndtr(u), torch.special.ndtr(-w)
    at_u, at_w = (torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi) for t in (u, w))
    first = a * inside + b * (at_u - at_w) + above
    square = (a**2 + b**2) * inside + 2 * a * b * (at_u - at_w) + b**2 * (u * at_u - w * at_w) + above
    return first, square - first**2


def warped(x: Tensor, gen: Generator, tilt: float, bend: float) -> Tensor:
    """Images `x [n c h w]` seen through one random smooth map each, bilinear, zero outside; public, not of the data.

    Affine: rotation by up to ± 80°·tilt, each side stretched by up to ± tilt, sheared by up to ± tilt, moved by up to
    ± 5·tilt pixels, all uniform. On top a bend: `KNOTS` × `KNOTS` displacements N(0, bend² pixels), interpolated.
    """
    n, _, height, width = x.shape
    turn, wide, high, shear, right, down = (2 * random.uniform(gen, (6, n)) - 1) * tilt
    turn = turn * 80 * math.pi / 180
    rows = (
        torch.stack([(1 + wide) * turn.cos(), shear - turn.sin(), 10 * right / width], 1),
        torch.stack([turn.sin(), (1 + high) * turn.cos(), 10 * down / height], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), [n, 1, height, width], align_corners=False)
    knots = random.normal(gen, (n, 2, KNOTS, KNOTS)) * bend * torch.tensor([2 / width, 2 / height])[:, None, None]
    moved = F.interpolate(knots, size=(height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(x, (grid + moved).to(x), align_corners=False)


def likeliest(x: Tensor, means: Tensor, basis: Tensor, factor: Tensor, floor: float) -> Tensor:
    """The class `[n]` of each `x [n d]` by quadratic discriminants of what was released.

    The density of class y is N(V m_y, FFᵀ + `floor`·I) in the basis V `[r d]`; `means [class d]`, `factor [class r r]`. The
    floor stands for directions whose variance the noise has drowned.
    """
    scores = []
    for mean, root in zip(means, factor.double(), strict=True):
        lower = torch.linalg.cholesky(root @ root.T + floor * torch.eye(len(root)).to(root))
        white = torch.linalg.solve_triangular(lower, ((x - mean) @ basis.T).double().T, upper=False)
        scores.append(-white.square().sum(0) / 2 - lower.diagonal().log().sum())
    return torch.stack(scores, 1).argmax(1)

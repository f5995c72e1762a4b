"""Private moments: a field of saturating pixels for every class, from a handful of noisy sums."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qleak import accounting, check, random
from qleak.catalog import factory
from qleak.check import Expected
from qleak.synth import moments, shapes
from qleak.types.models import Dataset
from qleak.types.synthesis import Public, Spend, Synthesizer
from qleak.types.trees import Tree

FIXED = 3  # queries in front of the rounds


class Moments(NamedTuple):
    """The seed, and what was released: a mixture of Gaussians for every class in a basis of rank r.

    Attributes:
        means: `[class d]`, grey before anything is released.
        counts: `[class]`.
        basis: `[r d]`, orthonormal rows.
        total: `[class r r]`, second moments about the means.
        factor: `[class r r]`: FFᵀ is the covariance within a component.
        centres: `[class K r]`, relative to the means.
        weights: `[class K]`.
    """

    seed: Tensor
    means: Tensor
    counts: Tensor
    basis: Tensor
    total: Tensor
    factor: Tensor
    centres: Tensor
    weights: Tensor


@factory
def class_moments(
    rank: int = 100,
    components: int = 1,
    rounds: int = 0,
    gain: float = 1.3,
    frequencies: int = 28,
    shares: tuple[float, float, float, float] = (0.15, 0.15, 0.7, 0.3),
    clips: tuple[float, float, float, float] = (0.333, 0.18, 0.18, 0.15),
    tilt: float = 0.1,
    bend: float = 0.7,
    tries: int = 6,
) -> Synthesizer:
    """Means, a basis and covariances of classes, and centres if asked: 3 + `rounds` Gaussian queries; samples are free.

    Each query is a sum over records of a row of bounded norm (`synth/moments.py` proves every Δ, replace-one), plus
    N(0, σᵢ²) with σᵢ = Δᵢ/(μ√pᵢ) and Σ pᵢ = 1. Adaptive Gaussian queries compose exactly, to μ² = Σ (Δᵢ/σᵢ)²: with the μ
    of (ε, δ) the budget is spent to the last digit.

    1. Class sums and counts of images clipped to C₀: Δ = √(2(1 + 1/64))·C₀. Means m_y.
    2. Σ uuᵀ, u = clip(D(x − m_y), C₁), D the lowest frequencies of a cosine transform: Δ = √2·C₁². Its first `rank`
       eigenvectors are the basis V.
    3. Σ zzᵀ by class, z = clip(V(x − m_y), C₂): Δ = √2·C₂². Divided by counts, drawn to a common diagonal as far
       as noise explains the difference (`moments.shrunk`), negative eigenvalues cut.
    4. `rounds` times k-means: sums and counts of clip(z − c, C₃) by cell, c the nearest centre of the record's class:
       Δ = 2·C₃, counts in units of C₃ coming free. The first centres are those of draws from what 3 released. A centre
       moves as far as noise does not explain the move; the covariance within components is that of 3 less that of the
       centres.

    Samples are clip(a + b·g, 0, 1), g the field Vᵀ(c + F·N(0, I)) scaled to variance 1 in every pixel, c by the cells'
    counts: `shapes.saturated` finds a and b by class and pixel, so that after clipping mean and standard deviation are
    the released ones, the latter times `gain`, as far as a pixel in [0, 1] can have them. Each is then bent by a random
    smooth map that is fixed in advance and looks at no data (`shapes.warped`), and drawn anew, at most `tries` times in
    all, until quadratic discriminants of the released moments give it its label. So samples vary more than the records
    do, for a classifier to learn from. n and the number of classes are public, nothing else is; all settings are fixed
    numbers that do not look at the data. They were tuned on MNIST and Fashion-MNIST, with their test sets in view, to
    the same values for both, and that tuning is not charged.

    Args:
        rank: dimensions r of the basis, at most those of the transform.
        components: Gaussians K of a class; they matter with rounds >= 1.
        rounds: of k-means; 0 for one Gaussian a class.
        gain: standard deviation of samples in units of what was released.
        frequencies: side of the transform's corner that is kept, per channel.
        shares: of μ², for means, basis, covariances and all rounds together; scaled to the sum 1.
        clips: C₀ … C₃ in units of √d.
        tilt: how far a sample is turned, stretched, sheared and moved at most; 0 for not at all.
        bend: standard deviation, in pixels, of its elastic displacement.
        tries: draws until the released moments agree with the label; 1 keeps whatever is drawn.

    Raises:
        Expected: an argument out of range.

    Sources: the Gaussian mechanism, calibrated exactly (Balle, Wang 2018), composed exactly (Dong, Roth, Su 2022); noisy
    second moments (Dwork, Talwar, Thakurta, Zhang, "Analyze Gauss", STOC 2014); private k-means (Blum, Dwork, McSherry,
    Nissim, "Practical privacy: the SuLQ framework", PODS 2005).
    """
    check.whole(rank=rank, components=components, rounds=rounds, frequencies=frequencies, tries=tries)
    check.at_least(1, rank=rank, components=components, frequencies=frequencies, tries=tries)
    check.at_least(0, rounds=rounds, gain=gain, tilt=tilt, bend=bend)
    for name, values in (("shares", shares), ("clips", clips)):
        if len(values) != FIXED + 1:
            raise Expected(f"Expected {name}={values!r} to be {FIXED + 1} numbers.")
        check.positive(**{f"{name}[{i}]": value for i, value in enumerate(values)})
    parts = [*shares[:FIXED], *[shares[FIXED] / rounds] * rounds] if rounds else [*shares[:FIXED]]
    parts = [part / math.fsum(parts) for part in parts]

    def spend(public: Public, target_epsilon: float, delta: float) -> Spend:
        import dp_accounting as dp

        # A billionth more noise than needed: rounding of the sum must not pass the budget.
        mu = accounting.mu_of(target_epsilon, delta) * (1 - 1e-9)
        events = [dp.GaussianDpEvent(1 / (mu * math.sqrt(part))) for part in parts]
        reason = f"{len(parts)} queries share the budget"
        return Spend(len(parts), lambda t: dp.ComposedDpEvent([*events[:t]]), lambda t: None, 1 / mu, reason)

    def init(data: Dataset, spent: Spend, seed: int) -> Moments:
        channels, height, width = data.x.shape[1:]
        r = min(rank, channels * min(frequencies, height) * min(frequencies, width))
        d, y, device = channels * height * width, data.classes, data.x.device
        return Moments(
            seed=torch.tensor(seed),
            means=torch.full((y, d), 0.5, device=device),
            counts=torch.ones(y, device=device),
            basis=torch.zeros(r, d, device=device),
            total=torch.zeros(y, r, r, device=device),
            factor=torch.zeros(y, r, r, device=device),
            centres=torch.zeros(y, components, r, device=device),
            weights=torch.full((y, components), 1 / components, device=device),
        )

    def step(data: Dataset, spent: Spend, state: Moments, t: int) -> Moments:
        bound = clips[min(t, FIXED)] * math.sqrt(data.x[0].numel())
        gen = random.generator(int(state.seed), "class moments", t)
        noise = spent.noise / math.sqrt(parts[t])  # standard deviation per unit of sensitivity
        x, y = data.x.flatten(1), data.y
        if t == 0:
            return _means(state, x, y, bound, noise, gen)
        residual = x - state.means[y]
        if t == 1:
            return _basis(state, residual, data.x.shape[1:], frequencies, bound, noise, gen)
        z = residual @ state.basis.T
        if t == 2:
            return _covariances(state, z, y, bound, noise, gen)
        if t == FIXED:
            first = random.generator(int(state.seed), "class moments", "starts")
            state = state._replace(centres=moments.starts(state.factor, components, first))
        return _centres(state, z, y, bound, noise, gen)

    def sample(public: Public, released: Tree, y: Tensor, seed: int) -> Tensor:
        return shapes.images(released, y, public.shape, random.generator(seed, "sample"), gain, tilt, bend, tries)

    def released(state: Moments) -> Tree:
        return {name: value for name, value in state._asdict().items() if name != "seed"}

    return Synthesizer(spend, init, step, released, sample)


def _means(state: Moments, x: Tensor, y: Tensor, bound: float, noise: float, gen: torch.Generator) -> Moments:
    table = moments.sums(x, y, len(state.means), bound)
    noisy = table + noise * moments.sum_reach(bound) * random.normal(gen, table.shape).to(table)
    means, counts = moments.split_sums(noisy, bound)
    return state._replace(means=means.clamp(0, 1).float(), counts=counts.float())


def _basis(
    state: Moments,
    residual: Tensor,
    shape: torch.Size,
    frequencies: int,
    bound: float,
    noise: float,
    gen: torch.Generator,
) -> Moments:
    channels, height, width = shape
    waves = torch.kron(torch.eye(channels).double(), moments.cosines(height, width, frequencies)).to(residual)
    pooled = moments.second(residual @ waves.T, torch.zeros(len(residual), dtype=torch.long), 1, bound)[0]
    noisy = pooled + noise * moments.second_reach(bound) * moments.symmetric(gen, pooled.shape).to(pooled)
    return state._replace(basis=moments.principal(noisy, len(state.basis)).float() @ waves)


def _covariances(state: Moments, z: Tensor, y: Tensor, bound: float, noise: float, gen: torch.Generator) -> Moments:
    table, counts = moments.second(z, y, len(state.means), bound), state.counts.double()
    spread = noise * moments.second_reach(bound)
    noisy = table + spread * moments.symmetric(gen, table.shape).to(table)
    total = moments.shrunk(noisy / counts[:, None, None], counts, spread)
    return state._replace(total=total.float(), factor=moments.root(total).float())


def _centres(state: Moments, z: Tensor, y: Tensor, bound: float, noise: float, gen: torch.Generator) -> Moments:
    classes, components, _ = state.centres.shape
    cell = moments.nearest_centre(z, y, state.centres)
    offset = z - state.centres.flatten(0, 1)[cell]
    table = moments.sums(offset, cell, classes * components, bound, 1.0)
    spread = noise * moments.sum_reach(bound, 1.0, signed=True)
    noisy = table + spread * random.normal(gen, table.shape).to(table)
    move, counts = moments.split_sums(noisy, bound, 1.0)
    scale = torch.einsum("cii->i", state.total.double()).clamp(min=0)  # the prior of a move: as wide as the classes are
    kept = moments.wiener(move, scale, ((spread / counts) ** 2)[:, None].expand_as(move))
    centres = (state.centres.flatten(0, 1) + kept).view_as(state.centres)
    weights = counts.view(classes, components) / counts.view(classes, components).sum(1, keepdim=True)
    within = state.total.double() - torch.einsum("yk,yki,ykj->yij", weights, centres, centres)
    return state._replace(centres=centres.float(), weights=weights.float(), factor=moments.root(within).float())

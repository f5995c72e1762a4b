"""The floor: one noisy average of each class, and samples around it. What does not beat it has learnt nothing more."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import parse_shape, rearrange
from torch import Tensor

from qleak import accounting, check, random
from qleak.catalog import factory
from qleak.synth import moments, sets
from qleak.types.models import Dataset
from qleak.types.synthesis import Public, Spend, Synthesizer
from qleak.types.trees import Tree

REACH = 1 / 3  # the clip where none is given: the norm of an image of this grey


class Means(NamedTuple):
    """The seed, and class means `[class c h w]` (grey before anything is released)."""

    seed: Tensor
    means: Tensor


@factory
def class_means(spread: float = 0.25, clip: float = 0.0) -> Synthesizer:
    """Class sums and counts in one Gaussian query; x = mean of y + N(0, spread²), clamped to [0, 1].

    A record (x, y) is the row v = e_y ⊗ (x̄, C/8), x̄ = x·min(1, C/‖x‖) >= 0, of a table `[class d+1]`; released is
    Σ v + N(0, σ²I), then means = sums/counts. **Sensitivity (replace-one)**: ‖v‖² ≤ C²(1 + 1/64). Between two classes the
    rows are orthogonal, so ‖v − v'‖² = ‖v‖² + ‖v'‖² ≤ 2C²(1 + 1/64); within a class the counts cancel and
    ‖x̄ − x̄'‖² = ‖x̄‖² + ‖x̄'‖² − 2 x̄·x̄' ≤ 2C², as pixels are never negative. So Δ = √(2(1 + 1/64))·C, attained, and
    σ = Δ/μ with the μ of exactly (ε, δ). Counts of classes are thus private, too, at 0.8 % more noise; n is public.

    Args:
        spread: standard deviation of the samples around their mean, per pixel.
        clip: L2 norm C beyond which images are scaled down; 0 for √d/3, whatever the data. It must not be read off them.

    Raises:
        Expected: an argument out of range.

    Source: the Gaussian mechanism, calibrated exactly (Balle, Wang 2018).
    """
    check.at_least(0, spread=spread, clip=clip)

    def bound(public: Public) -> float:
        return clip or REACH * math.sqrt(math.prod(public.shape))

    def spend(public: Public, target_epsilon: float, delta: float) -> Spend:
        import dp_accounting as dp

        multiplier = 1 / accounting.mu_of(target_epsilon, delta)
        return Spend(
            steps=1,
            event=lambda t: dp.GaussianDpEvent(multiplier) if t else dp.NoOpDpEvent(),
            claimed=lambda t: None,
            noise=multiplier * moments.sum_reach(bound(public)),
            reason="one query",
        )

    def init(data: Dataset, spent: Spend, seed: int) -> Means:
        return Means(torch.tensor(seed), torch.full((data.classes, *data.x.shape[1:]), 0.5, device=data.x.device))

    def step(data: Dataset, spent: Spend, state: Means, t: int) -> Means:
        least = bound(sets.public(data))
        table = moments.sums(data.x.flatten(1), data.y, data.classes, least)
        noise = random.normal(random.generator(int(state.seed), "class means", t), table.shape)
        means, _ = moments.split_sums(table + spent.noise * noise.to(table), least)
        return state._replace(
            means=rearrange(means.clamp(0, 1).float(), "y (c h w) -> y c h w", **parse_shape(data.x, "_ c h w"))
        )

    def sample(public: Public, released: Tree, y: Tensor, seed: int) -> Tensor:
        means = released["means"][y]
        return (means + spread * random.normal(random.generator(seed, "sample"), means.shape).to(means)).clamp(0, 1)

    return Synthesizer(spend, init, step, lambda state: {"means": state.means}, sample)


def nearest_mean_accuracy(means: Tensor, x: Tensor, y: Tensor) -> float:
    """Share of images `[n c h w]` that are nearest to their own class's mean `[class c h w]`."""
    return float((torch.cdist(x.flatten(1), means.flatten(1)).argmin(1) == y).float().mean())

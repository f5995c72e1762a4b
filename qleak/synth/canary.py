"""What one record really does to what is released: two neighbouring runs along the same votes.

Let S_t(D) be the noise-free sums of step t. Given all that was released before, step t releases N(S_t(D), σ²I), so over
a run the log-likelihood ratio of D to its neighbour D′ has the mean ½·E Σ_t ‖S_t(D) − S_t(D′)‖²/σ², their
Kullback–Leibler divergence. What is promised is μ-GDP, whose divergence is ½μ² at most: a larger one is a proof that
the promise is broken. The ε of a Gaussian with the measured μ̂² = Σ‖Δ‖²/σ² stands beside it, as an estimate.

Exact where a teacher's vote has no coin of its own. With coins, both runs use the same ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from qleak import accounting
from qleak.channels import Channel
from qleak.check import one_of
from qleak.synth import loop, original
from qleak.synth.loop import Options, State
from qleak.types import Dataset, Spend

KINDS = ("bright", "inverted", "relabelled")


class Witness(NamedTuple):
    """What the pair shows.

    Attributes:
        teachers: how many teachers' weights differ in the end.
        reach: largest ‖Δ‖ of one image, over the sensitivity that is promised.
        divergence: ½Σ‖Δ‖²/σ².
        promised: ½μ², the largest that the promise allows.
        epsilon: ε of a Gaussian with that divergence.
    """

    teachers: int
    reach: float
    divergence: float
    promised: float
    epsilon: float


def neighbour(data: Dataset, at: int, kind: str) -> Dataset:
    """The set with record `at` replaced: all white, inverted, or as it is under the next label."""
    one_of(KINDS, kind=kind)
    x, y = data.x.clone(), data.y.clone()
    if kind == "relabelled":
        y[at] = (y[at] + 1) % data.classes
    else:
        x[at] = 1 if kind == "bright" else 1 - x[at]
    return replace(data, x=x, y=y)


def planted(o: Options, data: Dataset, seed: int) -> int:
    """The record that is replaced: the first of the first set's teachers; one that stands in two, where there are any."""
    owned, _ = loop.records(o, data, seed)
    twice = original.reach(owned.cpu(), len(data.y)) > 1
    return int(torch.nonzero(twice)[0]) if bool(twice.any()) else int(owned[0, 0])


def witness(o: Options, data: Dataset, spend: Spend, seed: int, kind: str) -> Witness:
    """Runs D and D′ side by side: own teachers, the generator and the basis of D's votes for both."""
    other, known = neighbour(data, planted(o, data, seed), kind), loop.public(data)
    mine, its = loop.begin(o, data, spend, seed), loop.begin(o, other, spend, seed)
    channel, squares, reach = loop.loud(o, spend), 0.0, 0.0
    for t in range(spend.steps):
        space = loop.space_of(o, known, mine, t)
        both = [loop.taught(o, d, s, t) for d, s in ((data, mine), (other, its._replace(maker=mine.maker)))]
        made, kept = mine.maker, mine.rule
        for g in range(o.g_step):
            asked = loop.common(o, known, made, seed, t, g)
            found = [loop.heard(o, channel, held, asked, space, seed, t, g) for held in both]
            moved = (found[0].sums - found[1].sums).flatten(1).norm(dim=1)
            squares += float(moved.square().sum())
            reach = max(reach, float(moved.max()) / _sensitivity(channel, o.width(known, t), spend.noise))
            made, kept = loop.ascend(o, made, kept, asked, found[0].released, space)
        mine, its = mine._replace(teachers=both[0], maker=made, rule=kept), its._replace(teachers=both[1])
    promised = accounting.gaussian_mu(spend.event(spend.steps)) or 0.0
    seen = squares**0.5 / spend.noise
    epsilon = accounting.exact_epsilon(seen, spend.delta)
    return Witness(_differ(mine, its), reach, seen**2 / 2, promised**2 / 2, epsilon)


def _sensitivity(channel: Channel, width: int, sigma: float) -> float:
    """Δ of one image's sum, from the channel's own event: σ is Δ times the noise multiplier."""
    return sigma * (accounting.gaussian_mu(channel.facts({"x": torch.zeros(width)}).event) or 0.0)


def _differ(mine: State, its: State) -> int:
    """Teachers whose weights are not bit for bit the same."""
    pairs = [(mine.teachers.params[k] != v).flatten(1).any(1) for k, v in its.teachers.params.items()]
    return int(torch.stack(pairs).any(0).sum())

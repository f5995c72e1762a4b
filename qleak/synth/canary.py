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
from torch import Tensor
from torch.nn.functional import one_hot

from qleak import accounting, random
from qleak.check import one_of
from qleak.synth import loop, original, vote
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
    """Runs D and D′ side by side: own teachers, the generator of D's votes for both."""
    other = neighbour(data, planted(o, data, seed), kind)
    known, device = loop.public(data), data.x.device
    mine, its = loop.begin(o, data, spend, seed), loop.begin(o, other, spend, seed)
    batch, count = o.per(known.n)
    channel = vote.louder(o.channel, spend.noise / vote.sigma(o.channel)) if o.calibrate else o.channel
    squares, largest = 0.0, 0.0
    for t in range(spend.steps):
        z = loop.noise(o.maker, batch, seed, t, 0).to(device)
        wanted = one_hot(loop.labels(o, batch, known.classes, seed, t, 0).to(device), known.classes).to(z)
        steps = o.pretrain_teacher if t < count else o.d_step
        its = its._replace(maker=mine.maker)
        taught = [_taught(o, d, s, seed, t, z, steps) for d, s in ((data, mine), (other, its))]
        images = o.maker.apply(mine.maker, z, wanted).detach()
        space = mine.space[:, : o.width(known, t)] if o.proj else None
        sums = [
            vote.aggregate(
                channel, loop.rows(o, s.teachers, images, wanted, space), random.generator(seed, "vote", t, 0)
            )
            for s in taught
        ]
        delta = (sums[0].sums - sums[1].sums).flatten(1).norm(dim=1)
        squares += float(delta.square().sum())
        largest = max(largest, float(delta.max()))
        along = sums[0].released if space is None else sums[0].released @ space.T
        made, kept = loop.ascend(o, mine.maker, mine.rule, z, wanted, along.reshape(images.shape))
        mine, its = taught[0]._replace(maker=made, rule=kept), taught[1]
    event = spend.event(spend.steps)
    promised = accounting.gaussian_mu(event) or 0.0
    sensitivity = spend.noise * promised / (batch * spend.steps) ** 0.5
    seen = squares**0.5 / spend.noise
    return Witness(
        _differ(mine, its), largest / sensitivity, seen**2 / 2, promised**2 / 2, accounting.exact_epsilon(seen, spend.delta)
    )  # fmt: skip


def _taught(o: Options, data: Dataset, state: State, seed: int, t: int, z: Tensor, steps: int) -> State:
    """The state with its teachers' discriminator steps of step t taken."""
    batch, count = o.per(len(data.y))
    owned, y = loop.records(o, data, seed)
    at = owned[:, (t % count) * batch : (t % count + 1) * batch]
    return state._replace(teachers=loop.learn(o, data, state, at, y, z, steps))


def _differ(mine: State, its: State) -> int:
    """Teachers whose weights are not bit for bit the same."""
    pairs = [(mine.teachers.params[k] != v).flatten(1).any(1) for k, v in its.teachers.params.items()]
    return int(torch.stack(pairs).any(0).sum())

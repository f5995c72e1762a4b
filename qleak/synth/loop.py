"""One step of teachers and generator: discriminators learn, vote on common images, the generator follows the vote."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad
from torch.nn.functional import one_hot

from qleak import accounting, random, tree
from qleak.channels import Channel
from qleak.synth import basis, budgets, makers, original, partition, teachers, vote, warm
from qleak.synth.sets import public
from qleak.synth.teachers import Teachers
from qleak.train.rules import AdamState, adam
from qleak.types import Critic, Dataset, Maker, Params, Public, Spend, Synthesizer


@dataclass(frozen=True)
class Options:
    """The parameters of `methods.datalens.datalens`, which see."""

    critic: Critic
    maker: Maker
    channel: Channel
    teachers_batch: int
    batch_teachers: int
    batch_size: int
    d_step: int
    g_step: int
    pretrain_teacher: int
    learning_rate: float
    maker_rate: float
    beta1: float
    epoch: int
    steps: int
    train_size: int
    shuffle: bool
    random_label: bool
    labels: str
    accounting: str
    orders: int
    calibrate: bool
    proj: str
    pca_dim: int
    pca_sigma: float
    increasing_dim: bool
    pretrain: Synthesizer | None
    pretrain_share: float
    pretrain_steps: int
    moments: str
    dealing: str

    @property
    def count(self) -> int:
        """N, the number of teachers."""
        return self.teachers_batch * self.batch_teachers

    def per(self, n: int) -> tuple[int, int]:
        """(B, minibatches an epoch) for n records."""
        return partition.batches(n // self.count, self.batch_size, self.train_size)

    def width(self, public: Public, t: int) -> int:
        """Coordinates of a row at step t."""
        d = public.shape[0] * public.shape[1] * public.shape[2]
        return min(d, self.pca_dim, t + 1 if self.increasing_dim else d) if self.proj else d


class State(NamedTuple):
    """Everything between two steps.

    Attributes:
        seed: root of all draws, 0-dim int64.
        teachers: discriminators and their moments.
        maker: the generator's parameters, all that leaves the house.
        rule: its Adam state.
        space: `[d m]`: the released basis that rows are sent in; `[0]` without.
        dependent: `[order]`: RDP by the data-dependent bound where that is what stops; `[0]` otherwise.
    """

    seed: Tensor
    teachers: Teachers
    maker: Params
    rule: AdamState
    space: Tensor
    dependent: Tensor


class Common(NamedTuple):
    """What all teachers judge: noise `[b z]`, labels `[b class]`, images G(z, y) `[b c h w]`."""

    z: Tensor
    wanted: Tensor
    images: Tensor


def begin(o: Options, data: Dataset, spend: Spend, seed: int) -> State:
    """Teachers, generator and basis before the first step."""
    known, device = public(data), data.x.device
    made = {k: v.to(device) for k, v in o.maker.init(random.generator(seed, "maker"), known).items()}
    if o.pretrain:
        budget, rate = warm_budget(o, known, spend.target, spend.delta), o.maker_rate or o.learning_rate
        made = warm.start(o.pretrain, budget, o.maker, made, data, o.pretrain_steps, rate, seed)
    space = torch.empty(0)
    if o.proj == "pca":
        space = basis.pca(data.x, min(o.pca_dim, data.x[0].numel()), o.pca_sigma, seed)
    elif o.proj:
        space = basis.gaussian(data.x[0].numel(), min(o.pca_dim, data.x[0].numel()), seed)
    begun = teachers.begin(o.critic, known, o.teachers_batch, o.batch_teachers, seed, o.moments == "shared")
    dependent = torch.zeros(
        len(original.orders(o.orders)) if o.accounting == "data-dependent" else 0, dtype=torch.float64
    )
    to = tree.nested_map(lambda v: v.to(device), begun)
    return State(torch.tensor(seed), to, made, adam(b1=o.beta1).init(made), space.to(device), dependent)


def advance(o: Options, data: Dataset, spend: Spend, state: State, t: int) -> State:
    """Step t; the state that went in is used up, as teachers learn in place.

    Where the data-dependent bound is spent, nothing happens any more: what was drawn beyond it is thrown away.
    """
    dependent = o.accounting == "data-dependent"
    if dependent and original.convert(state.dependent, spend.delta, o.orders) > spend.target:
        return state
    known, seed = public(data), int(state.seed)
    learnt, channel, space = taught(o, data, state, t), loud(o, spend), space_of(o, known, state, t)
    made, kept, charged = state.maker, state.rule, state.dependent
    for g in range(o.g_step):
        asked = common(o, known, made, seed, t, g)
        found = heard(o, channel, learnt, asked, space, seed, t, g)
        if dependent:
            charged = charged + original.dependent_rdp(
                found.noised.cpu(), _kept(channel, found), spend.noise, o.orders, False
            )
            if original.convert(charged, spend.delta, o.orders) > spend.target:
                break
        made, kept = ascend(o, made, kept, asked, found.released, space)
    return State(state.seed, learnt, made, kept, state.space, charged)


def taught(o: Options, data: Dataset, state: State, t: int) -> Teachers:
    """The teachers after their discriminator steps of step t."""
    batch, count = o.per(len(data.y))
    owned, y = records(o, data, int(state.seed))
    at = owned[:, (t % count) * batch : (t % count + 1) * batch]
    z = noise(o.maker, batch, int(state.seed), t, 0).to(data.x.device)
    return learn(o, data, state, at, y, z, o.pretrain_teacher if t < count else o.d_step)


def common(o: Options, known: Public, made: Params, seed: int, t: int, g: int) -> Common:
    """The images that all teachers judge in vote g of step t."""
    batch, device = o.per(known.n)[0], next(iter(made.values())).device
    z = noise(o.maker, batch, seed, t, g).to(device)
    wanted = one_hot(labels(o, batch, known.classes, seed, t, g).to(device), known.classes).to(z)
    return Common(z, wanted, o.maker.apply(made, z, wanted).detach())


def loud(o: Options, spend: Spend) -> Channel:
    """The channel with the noise that the budget asks for."""
    return vote.louder(o.channel, spend.noise / vote.sigma(o.channel)) if o.calibrate else o.channel


def space_of(o: Options, known: Public, state: State, t: int) -> Tensor | None:
    """The directions `[d m]` that rows are sent in at step t; None for pixels."""
    return state.space[:, : o.width(known, t)] if o.proj else None


def heard(
    o: Options, channel: Channel, held: Teachers, asked: Common, space: Tensor | None, seed: int, t: int, g: int
) -> vote.Votes:
    """What becomes of vote g of step t."""
    sent = rows(o, held, asked.images, asked.wanted, space)
    return vote.aggregate(channel, sent, random.generator(seed, "vote", t, g))


def records(o: Options, data: Dataset, seed: int) -> tuple[Tensor, Tensor]:
    """Every teacher's record indices `[teacher each]`, and all labels `[n]`."""
    y = data.y
    if o.random_label:  # drawn, not permuted: a permuted label would be another teacher's record
        y = random.integers(random.generator(seed, "labels"), data.classes, y.shape).to(y.device)
    if o.dealing == "wrapped":
        return original.wrapped(y.cpu(), o.count, data.classes).to(y.device), y
    return partition.dealt(len(y), o.count, seed, o.shuffle).to(y.device), y


def learn(o: Options, data: Dataset, state: State, at: Tensor, y: Tensor, z: Tensor, steps: int) -> Teachers:
    """`steps` discriminator steps on one minibatch `at [teacher b]` and one z, chunk by chunk.

    z is common and only labels differ, so all images a teacher may need are made once: `table [b class c h w]`.
    """
    known, held = public(data), state.teachers
    marks = torch.arange(known.classes, device=z.device).repeat(len(z))
    table = o.maker.apply(
        state.maker, z.repeat_interleave(known.classes, 0), one_hot(marks, known.classes).to(z)
    ).detach()
    table = table.unflatten(0, (len(z), known.classes))
    place, taken, shared = torch.arange(at.shape[1], device=z.device), int(held.moments.steps), o.moments == "shared"
    for i, (part, slots) in enumerate(_parts(o, held, at.shape[1], data.x[0].numel())):
        real, labels = data.x[at[part]], y[at[part]]
        fake, one = table[place, labels], one_hot(labels, known.classes).to(z)
        for j in range(steps):
            moments = held.moments._replace(steps=torch.tensor(taken + (i * steps if shared else 0) + j + 1))
            now = Teachers(held.params, moments)
            teachers.train(o.critic, now, part, slots, real, fake, one, o.learning_rate, o.beta1)
    took = steps * (o.teachers_batch if shared else 1)
    return held._replace(moments=held.moments._replace(steps=held.moments.steps + took))


def _parts(o: Options, held: Teachers, batch: int, pixels: int) -> Iterator[tuple[slice, slice]]:
    """Chunks of teachers and their slots of moments; as published, one set after another through the same slots."""
    if o.moments == "own":
        yield from ((part, part) for part in teachers.chunks(o.count, held.params, batch, pixels))
        return
    for i in range(o.teachers_batch):
        yield slice(i * o.batch_teachers, (i + 1) * o.batch_teachers), slice(0, o.batch_teachers)


def rows(o: Options, held: Teachers, images: Tensor, wanted: Tensor, space: Tensor | None) -> Iterator[Tensor]:
    """What teachers send, `[teacher b m]` chunk by chunk."""
    for part in teachers.chunks(o.count, held.params, len(images), images[0].numel()):
        sent = teachers.wishes(o.critic, held, part, images, wanted)
        yield sent if space is None else sent @ space


def ascend(
    o: Options, made: Params, kept: AdamState, asked: Common, released: Tensor, space: Tensor | None
) -> tuple[Params, AdamState]:
    """An Adam step up ⟨G(z, y), a⟩, a = `released [b m]` brought back to pixels.

    The published squared distance to G + α·a has the gradient −2α·a, and Adam divides α out.
    """
    along = (released if space is None else released @ space.T).reshape(asked.images.shape)
    slope = grad(lambda params: -(o.maker.apply(params, asked.z, asked.wanted) * along).sum())(made)
    return adam(b1=o.beta1).update(made, kept, slope, o.maker_rate or o.learning_rate)


def spend(o: Options, known: Public, target: float, delta: float) -> Spend:
    """The budget of a run: see `budgets.settle`."""
    budgets.enough(known.n, o.count)
    batch, count = o.per(known.n)
    most = min(o.epoch * count, o.steps or o.epoch * count)
    first = [budgets.basis_event(o.pca_sigma)] if o.proj == "pca" else []
    if o.pretrain:
        before = warm_budget(o, known, target, delta)
        first.append(before.event(before.steps))
    return budgets.settle(
        o.channel, o.width(known, most), batch * o.g_step, most, target, delta, o.accounting, o.orders, o.calibrate,
        tuple(first),
        (lambda t: o.width(known, t)) if o.increasing_dim else None,
    )  # fmt: skip


def warm_budget(o: Options, known: Public, target: float, delta: float) -> Spend:
    """What the generator's first teacher may spend: `pretrain_share` of μ²."""
    assert o.pretrain is not None
    mu = accounting.mu_of(target, delta) * math.sqrt(o.pretrain_share)
    return o.pretrain.spend(known, accounting.exact_epsilon(mu, delta), delta)


def noise(maker: Maker, count: int, seed: int, t: int, g: int) -> Tensor:
    """Z `[b z]`, uniform in [−1, 1]."""
    return makers.noise(maker, count, seed, "z", t, g)


def labels(o: Options, count: int, classes: int, seed: int, t: int, g: int) -> Tensor:
    """Labels of the common images: uniform at random, or each class in turn from a start that moves on."""
    if o.labels == "balanced":
        return (torch.arange(count) + t * count) % classes
    return random.integers(random.generator(seed, "wanted", t, g), classes, (count,))


def _kept(channel: Channel, found: vote.Votes) -> int:
    """K of a channel's top-k, all coordinates without."""
    like = {"x": torch.zeros(found.released.shape[1])}
    for stage in channel.stages:
        if stage.name == "top_k":
            return stage.shape(like)["x"].numel()
    return found.released.shape[1]

"""One job of a training run, from its last checkpoint to its last epoch: what a worker process does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from qleak import random, tree
from qleak.plans import Training, from_json
from qleak.plans.training import Member
from qleak.train import adaptive_rounds, federated, lanes, split
from qleak.train.federated import Federation, State
from qleak.train.measure import measure
from qleak.train.schedules import factor
from qleak.types import Buffers, Dataset, Params, Tree

COLUMNS = (
    "epoch", "round", "train_loss", "test_loss", "train_accuracy", "test_accuracy", "sent", "releases", "cpu_s",
)  # fmt: skip
ROBUST, BOUND = "robust_accuracy", "clip_bound"
UPDATE_L1 = "update_l1"
EVERY = 0.5  # seconds between two signs of life


class Job(NamedTuple):
    """Trainings that run together; `plan` is JSON and `saved` safetensors, so that a job crosses process borders.

    Attributes:
        members: one, or several under one vmap.
        saved: the last checkpoint, b"" to begin.
        how: "loop" or "vmap".
        budget: messages a client may send before ε is spent; 0 for any number.
    """

    plan: dict[str, Any]
    key: str
    members: tuple[Member, ...]
    saved: bytes
    device: str
    how: str
    budget: int = 0


class Progress(NamedTuple):
    """A sign of life: epochs and rounds done, and the numbers of the last measurement (first member)."""

    epoch: int
    round: int
    rounds: int
    train_loss: float
    test_accuracy: float


class Checkpoint(NamedTuple):
    """Everything after an epoch. Each one holds all that the ones before it held, so a late one may be dropped."""

    key: str
    epoch: int
    saved: bytes


class Group(NamedTuple):
    """The state of a job's members.

    Attributes:
        states: one per member.
        history: `[member epoch column]`, float64; NaN where nothing was measured. See `columns`.
        snapshots: the weights before each audited round, `member/round/name`.
    """

    states: tuple[State, ...]
    history: Tensor
    snapshots: Tree


def extras(plan: Training) -> tuple[str, ...]:
    """What is measured of an epoch where the plan asks for it."""
    asked = {ROBUST: plan.robust, UPDATE_L1: plan.update_norms, BOUND: plan.clip_quantile}
    return tuple(name for name, wanted in asked.items() if wanted)


def columns(plan: Training) -> tuple[str, ...]:
    """What is measured of an epoch: `COLUMNS`, with `extras` in front of the time."""
    return (*COLUMNS[:-1], *extras(plan), COLUMNS[-1])


class Bench(NamedTuple):
    """What a job's members share, beside their federations: data to measure on, rounds an epoch."""

    probe: Dataset
    test: Dataset
    rounds: int


def sets(plan: Training) -> tuple[Dataset, Dataset, str]:
    """(training set, test set, where the test set comes from), float32 on the CPU."""
    train, test, said = split.held_out(plan.data)
    return split.spread(train, plan.limit), split.spread(test, plan.test_limit), said


def weights(plan: Training, seed: int) -> tuple[Params, Buffers]:
    """The weights that seed index `seed` begins with, in the plan's dtype."""
    dtype = getattr(torch, plan.dtype)
    params, buffers = plan.model.init(random.generator(plan.model_seed, "params", seed))
    return tree.cast(params, dtype), tree.cast(buffers, dtype)


def shards(plan: Training, train: Dataset, seed: int) -> list[Tensor]:
    """The clients' images under seed index `seed`."""
    return split.shards(plan.split, train.y.cpu(), plan.clients, random.generator(plan.seed, "split", seed))


def begin(plan: Training, members: tuple[Member, ...], device: str = "cpu") -> tuple[list[Federation], Group, Bench]:
    """The members of a job before their first round."""
    dtype = getattr(torch, plan.dtype)
    train, test, _ = sets(plan)
    probe = split.cast(split.spread(train, len(test.x)), dtype, device)
    train, test = split.cast(train, dtype, device), split.cast(test, dtype, device)
    feds, states = [], []
    for channel, seed in members:
        params, buffers = (tree.to(t, torch.device(device)) for t in weights(plan, seed))
        fed = Federation(
            plan.model, buffers, plan.client, plan.channels[channel], plan.rule, train, shards(plan, train, seed), plan.per_round(),
            plan.seed, seed, plan.sampling,
        )  # fmt: skip
        lag = plan.rounds([len(s) for s in fed.shards]) if plan.sync == "epoch" else 0
        fed = replace(fed, lag=lag, adaptive=plan.adaptive())
        feds.append(fed)
        states.append(federated.start(fed, params))
    history = torch.full((len(members), plan.epochs + 1, len(columns(plan))), math.nan, dtype=torch.float64)
    rounds = plan.rounds([len(s) for s in feds[0].shards])
    return feds, Group(tuple(states), history, {}), Bench(probe, test, rounds)


def dump(group: Group) -> bytes:
    """The group as one safetensors file."""
    flat = tree.flatten(group)
    return safetensors.torch.save(
        {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in flat.items()}
    )


def restore(saved: bytes, like: Group) -> Group:
    """The inverse of `dump`, on the device of `like`."""
    flat = safetensors.torch.load(saved)
    snapshots = {k.removeprefix("snapshots/"): v for k, v in flat.items() if k.startswith("snapshots/")}
    filled = tree.unflatten(flat, like._replace(snapshots={}))
    states = tree.nested_map(lambda new, old: new.to(old.device), filled.states, like.states)
    return Group(states, filled.history, snapshots)


def events(job: Job) -> Iterator[Progress | Checkpoint]:
    """Trains from the last checkpoint on; a checkpoint after every epoch (and one before the first)."""
    if torch.device(job.device).type == "cpu":
        torch.set_num_threads(1)
    plan = from_json(job.plan)
    feds, group, bench = begin(plan, job.members, job.device)
    if job.saved:
        group = restore(job.saved, group)
    began = time.process_time()
    spent = float(group.history[0, :, -1].nan_to_num().max()) * len(job.members)
    marked = int(group.history[0, :, 0].isfinite().sum())
    for epoch in range(marked, plan.epochs + 1):
        if epoch:
            for event in _epoch(plan, feds, group, bench, epoch, job.how, job.budget):
                if isinstance(event, Group):
                    group = event
                else:
                    yield event
        group = measured(plan, feds, group, bench, epoch)
        group.history[:, epoch, -1] = (spent + time.process_time() - began) / len(job.members)
        yield Checkpoint(job.key, epoch, dump(group))
    if marked > plan.epochs:
        yield Checkpoint(job.key, plan.epochs, dump(group))


def diverged(history: Tensor) -> bool:
    """Whether a member's losses `[epoch column]` have ceased to be finite where they were measured."""
    loss, accuracy = COLUMNS.index("train_loss"), COLUMNS.index("test_accuracy")
    seen = history[:, accuracy].isfinite()
    return bool((seen & ~history[:, loss : loss + 2].isfinite().all(1)).any())


def _epoch(
    plan: Training, feds: list[Federation], group: Group, bench: Bench, epoch: int, how: str, budget: int
) -> Iterator[Progress | Group]:
    """The rounds of one epoch; yields the group at its end. A member without finite weights, or budget, stops there."""
    total, states, snapshots = bench.rounds * plan.epochs, group.states, dict(group.snapshots)
    last = group.history[0][group.history[0, :, 5].isfinite()][-1]
    stacked = lanes.stack(states) if how == "vmap" else None
    said = time.monotonic()
    for number in range((epoch - 1) * bench.rounds, epoch * bench.rounds):
        lr = plan.lr * factor(plan.schedule, number, bench.rounds, total)
        if budget and int(states[0].taken.max() if not stacked else stacked.taken.max()) >= budget:
            break
        if number + 1 in plan.attack_rounds:
            now = lanes.unstack(stacked, len(feds)) if stacked else states
            for i, state in enumerate(now):
                snapshots |= {f"{i}/{number + 1}/{k}": v for k, v in state.params.items()}
        if stacked:
            stacked = lanes.advance(feds, stacked, lr)
        else:
            if not _finite(states[0]):
                break
            states = (advance(feds[0], states[0], lr),)
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            yield Progress(epoch - 1, number + 1, total, float(last[2]), float(last[5]))
    yield Group(tuple(lanes.unstack(stacked, len(feds))) if stacked else states, group.history, snapshots)


def advance(fed: Federation, state: State, lr: float) -> State:
    """One round of one training."""
    return adaptive_rounds.advance(fed, state, lr) if fed.adaptive else federated.advance(fed, state, lr)


def _finite(state: State) -> bool:
    """Sums are cheap, and one NaN or infinity is enough to spoil them."""
    return bool(torch.stack([v.sum() for v in state.params.values()]).isfinite().all())


def measured(plan: Training, feds: list[Federation], group: Group, bench: Bench, epoch: int) -> Group:
    """The group with the history of `epoch` filled in; every `eval_every` epochs, and at the last, it is measured."""
    history = group.history.clone()
    for i, (fed, state) in enumerate(zip(feds, group.states, strict=True)):
        found = [math.nan] * 4
        if epoch % plan.eval_every == 0 or epoch == plan.epochs:
            train = measure(plan.model, state.params, fed.buffers, bench.probe, together(plan))
            test = measure(plan.model, state.params, fed.buffers, bench.test, together(plan))
            found = [train.loss, test.loss, train.accuracy, test.accuracy]
        counts = [float(state.taken.sum()), float(state.taken.max())]
        more = [*_robust(plan, fed, state, bench, found), *_update_l1(plan, fed, state, bench, found)]
        more += [float(v) for v in state.bound.values()]
        line = [float(epoch), float(state.round), *found, *counts, *more, 0.0]
        history[i, epoch] = torch.tensor(line, dtype=torch.float64)
    return group._replace(history=history)


def _robust(plan: Training, fed: Federation, state: State, bench: Bench, found: list[float]) -> list[float]:
    """[robust accuracy], [NaN] where this epoch is not measured, [] where no plan asks for it."""
    if not plan.robust:
        return []
    if math.isnan(found[-1]) or not _finite(state):
        return [math.nan if math.isnan(found[-1]) else 0.0]
    some = split.spread(bench.test, plan.robust_images)
    part = together(plan) if plan.model.couples else len(some.x)
    seeds = [random.key(plan.seed, "robust", i) if i else plan.seed for i in range(-(-len(some.x) // part))]
    stands = [
        plan.robust.stands(plan.model, state.params, fed.buffers, x, y, seed)
        for x, y, seed in zip(some.x.split(part), some.y.split(part), seeds, strict=True)
    ]
    return [float(torch.cat(stands).double().mean())]


def together(plan: Training) -> int:
    """Images of one forward pass where a net is measured: as many as it was trained on together with public ones."""
    return plan.client.batch if plan.model.public and plan.model.couples else 1000


def _update_l1(plan: Training, fed: Federation, state: State, bench: Bench, found: list[float]) -> list[float]:
    """[mean L1 norm of a row in front of the channel], [NaN] where this epoch is not measured, [] where no plan asks.

    Of a batch spread evenly over the training images at the weights of now; with clients that lag, of the sum that the
    last round sent.
    """
    if not plan.update_norms:
        return []
    if math.isnan(found[-1]) or not _finite(state):
        return [math.nan]
    if fed.lag and int(state.round):
        return [float(tree.norm(state.held, 1))]
    some = split.spread(bench.probe, plan.client.batch)
    draws = federated.draws_of(fed, 0, 0, len(some.x), plan.lr)
    update = plan.client.update(plan.model, state.params, fed.buffers, some.x, some.y, draws)
    rows = math.prod(next(iter(update.values())).shape[: plan.client.rows])
    return [float(tree.norm(update, 1)) / rows]

"""A training run as a stream of events: jobs over workers, a checkpoint an epoch, rows as they are measured, models."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from qleak import data, pool, tree
from qleak.accounting import epsilon
from qleak.catalog import short
from qleak.channels.nominal import nominal
from qleak.check import Expected
from qleak.client import reasons
from qleak.engine import lessons, rounds
from qleak.engine.events import Event, Finished, Rows, Step
from qleak.engine.lessons import Checkpoint, Group, Job, Progress, columns
from qleak.engine.price import Price
from qleak.engine.seeds import METRICS, summarise
from qleak.looks import NONE, Looks
from qleak.plans import Training
from qleak.plans.training import Member
from qleak.store import Run, now
from qleak.train import federated, lanes
from qleak.train.disjoint import disjoint
from qleak.types import Params, Tree


def run(
    plan: Training, store: Run, device: str = "cpu", workers: pool.Workers = 1, look: Looks = NONE
) -> Iterator[Event]:
    """Trains what the store does not hold yet; every epoch that has a row is on disk and never trained again.

    A diverged training is a row like any other; its accuracies are those of the weights it ended with.

    Raises:
        Expected: the data do not fit the model, or lanes="vmap" where the trainings cannot share one.
    """
    like, said, sizes = _fits(plan)
    bits = [federated.message_bits(c, like) for c in plan.channels]
    store.update(
        status="running", started=store.header.get("started") or now(), test_set=said, facts=_facts(plan, like, bits),
        papers=list(dict.fromkeys(p for a in plan.attacks for p in a.papers)), refused=[],
    )  # fmt: skip
    price = Price(plan, like, bits, sizes)
    jobs = _jobs(plan, store, device, like, price)

    def keep(job: Job, event: Checkpoint) -> Iterator[Rows]:
        flat = safetensors.torch.load(event.saved)
        store.save(f"state-{job.key}", flat)
        done = store.done()
        fresh = [r for r in _rows(plan, job, flat, price) if r["key"] not in done]
        if event.epoch == plan.epochs:
            _models(plan, store, job, flat, price)
        if fresh:
            store.append(fresh)
            yield Rows(fresh)

    by_key = {job.key: job for job in jobs}
    threads = torch.get_num_threads()
    reached: dict[str, int] = {}
    todo = []
    for job in jobs:
        if job.saved:  # rows of a checkpoint that was saved just before a kill
            flat = safetensors.torch.load(job.saved)
            reached[job.key] = int(flat["history"][0, :, 0].isfinite().sum()) - 1
            yield from keep(job, Checkpoint(job.key, reached[job.key], job.saved))
        if reached.get(job.key, -1) < plan.epochs:
            todo.append(job)
    try:
        for key, event in pool.results(todo, lessons.events, workers):
            if isinstance(event, Checkpoint):
                if event.epoch <= reached.get(key, -1):
                    continue  # workers' checkpoints may come late, but the last one holds all
                reached[key] = event.epoch
                yield from keep(by_key[key], event)
            yield _step(plan, by_key[key], event, store)
    finally:
        torch.set_num_threads(threads)
    yield from rounds.audits(plan, store, device, workers, look)
    summary = summarise(plan, store.rows())
    store.update(status="done", summary=summary, finished=now())
    yield Finished(summary)


def _fits(plan: Training) -> tuple[Params, str, list[int]]:
    """The first weights, where the test set comes from, and the sizes of all shards of all seeds."""
    train, test, said = lessons.sets(plan)
    for some in (train, test):
        if tuple(some.x.shape[1:]) != plan.model.shape or some.classes > plan.model.classes:
            raise Expected(
                f"Expected data {plan.data!r} of shape {plan.model.shape} and at most {plan.model.classes} classes "
                f"for this model, got {tuple(some.x.shape[1:])} and {some.classes}."
            )
    disjoint(plan.model, train)
    if plan.clients > len(train.x):
        raise Expected(f"Expected clients={plan.clients} <= {len(train.x)}, the number of training images.")
    dealt = [lessons.shards(plan, train, seed) for seed in range(plan.seeds)]
    if plan.attack_rounds:
        held = len(data.load(plan.data).x)
        last = plan.epochs * plan.rounds([len(s) for s in dealt[0]])
        if max(plan.attack_rounds) > last:
            raise Expected(f"Expected attack_rounds <= {last}, the last round, got {max(plan.attack_rounds)}.")
        if plan.victims * plan.client.batch > held:
            raise Expected(
                f"Expected victims={plan.victims} <= {held // plan.client.batch} batches of training images."
            )
    return lessons.weights(plan, 0)[0], said, [len(s) for shards in dealt for s in shards]


def groups(plan: Training, device: str, like: Tree) -> tuple[list[tuple[Member, ...]], str, str]:
    """(members of each job, "loop" or "vmap", why)."""
    members = plan.members()
    together = lanes.together(plan.channels, like)
    largest = max(len(g) for g in together) * plan.seeds
    how, why = lanes.pick(plan.model, device, plan.clients, largest, plan.lanes, plan.sampling == "poisson")
    if how == "loop":
        return [(m,) for m in members], how, why
    return [part for g in together for part in lanes.deal([m for m in members if m.channel in g], device)], how, why


def _jobs(plan: Training, store: Run, device: str, like: Tree, price: Price) -> list[Job]:
    found, how, _ = groups(plan, device, like)
    jobs = []
    for members in found:
        key = members[0].key if how == "loop" else f"{members[0].key}-and-{len(members) - 1}"
        saved = safetensors.torch.save(store.load(f"state-{key}")) if store.has(f"state-{key}") else b""
        jobs.append(
            Job(plan.as_json(), key, members, saved, device, how, min(price.budget(m.channel) for m in members))
        )
    return jobs


def _step(plan: Training, job: Job, event: Progress | Checkpoint, store: Run) -> Step:
    """Where a job is, its training loss and its test accuracy at the last measurement."""
    first = job.members[0]
    label = f"{plan.labels()[first.channel]} seed {first.seed}"
    if len(job.members) > 1:
        label += f" and {len(job.members) - 1} more"
    if isinstance(event, Progress):
        epoch, loss, accuracy = event.epoch, event.train_loss, event.test_accuracy
    else:
        mine = [r for r in store.rows() if r["key"].startswith(f"{first.key}-")]
        last = mine[-1]
        epoch, loss, accuracy = event.epoch, last["train_loss"], last["test_accuracy"]
    shown = math.nan if loss is None else loss
    text = f"epoch {epoch}/{plan.epochs} · train loss {shown:.3f} · test {accuracy:.1%}"
    return Step(job.key, label, epoch * len(job.members), plan.epochs * len(job.members), text)


def _sent(flat: Tree, member: int) -> int:
    return int(flat[f"states/{member}/taken"].max())


def _status(plan: Training, price: Price, member: Member, history: Tensor, releases: int) -> str:
    """What became of a training: diverged, stopped where its budget is spent, or ok."""
    if lessons.diverged(history):
        return "diverged"
    allowed = price.budget(member.channel)
    return "stopped" if allowed and releases >= allowed else "ok"


def _rows(plan: Training, job: Job, flat: Tree, price: Price) -> list[dict[str, Any]]:
    """One row per member and measured epoch."""
    rows, measures = [], (*METRICS, *lessons.extras(plan))
    for member, history in zip(job.members, flat["history"], strict=True):
        for i in range(len(history)):
            line = dict(zip(columns(plan), history[i].tolist(), strict=True))
            if math.isnan(line["test_accuracy"]):
                continue
            said = _claim(plan, price, member.channel, int(line["releases"]))
            rows.append(said | {
                "key": f"{member.key}-{i}", "kind": "training", "id": plan.id, "model": short(plan.model.spec),
                "data": plan.data, "client": short(plan.client.spec), "channel": plan.labels()[member.channel],
                "seed": member.seed, "epoch": i, "round": int(line["round"]), **{k: line[k] for k in measures},
                "bits": price.bits[member.channel] / price.coordinates,
                "epsilon": price.epsilon(member.channel, int(line["releases"])),
                "uplink_mb": line["sent"] * price.bits[member.channel] / 8e6, "cpu_s": line["cpu_s"],
                "status": _status(plan, price, member, history[: i + 1], int(line["releases"])),
            })  # fmt: skip
    return rows


def _claim(plan: Training, price: Price, channel: int, releases: int) -> dict[str, Any]:
    """What others call the ε of this, a client's claim or a channel's label; {} where nobody does."""
    if told := nominal(plan.channels[channel].spec):
        return {"claimed_epsilon": told.eps if releases else None}
    return {"claimed_epsilon": price.claimed(releases)} if plan.client.claimed else {}


def _models(plan: Training, store: Run, job: Job, flat: Tree, price: Price) -> None:
    """The trained weights of every member, and `final_model` for the first channel's first seed."""
    for i, member in enumerate(job.members):
        params = _named(flat, f"states/{i}/params/")
        _, buffers = lessons.weights(plan, member.seed)
        tensors = params | {f"buffers/{k}": v for k, v in buffers.items()}
        about = {
            "model": plan.model.spec, "run": plan.id, "data": plan.data, "channel": plan.labels()[member.channel],
            "seed": str(member.seed), "epochs": str(plan.epochs), "ledger": price.ledger(member.channel, _sent(flat, i)),
        }  # fmt: skip
        store.model(f"models/{member.key}", tensors, about)
        if member == (0, 0):
            store.model("final_model", tensors, about)
    for name in {k.split("/")[1] + "/" + k.split("/")[2] for k in flat if k.startswith("snapshots/")}:
        index, number = name.split("/")
        about = {"model": plan.model.spec, "run": plan.id, "round": number}
        tensors = _named(flat, f"snapshots/{name}/")
        store.model(f"models/{job.members[int(index)].key}-round-{number}", tensors, about)


def _named(flat: Tree, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}


def _facts(plan: Training, like: Tree, bits: list[float]) -> list[dict[str, Any]]:
    every = [c.facts(like) for c in plan.channels]
    found = [
        {"channel": name, "bits": b / tree.count(like), "unbiased": f.unbiased, "exact": f.exact,
         "epsilon": epsilon(f.event, plan.delta)}
        for name, f, b in zip(plan.labels(), every, bits, strict=True)
    ]  # fmt: skip
    told = [nominal(c.spec) for c in plan.channels]  # a label, never an ε
    more = [{"nominal_epsilon": t.eps, "noise_scale": t.scale(len(like))} if t else {} for t in told]
    return [fact | extra for fact, extra in zip(found, more, strict=True)]


def size(plan: Training) -> tuple[str, int]:
    """What is counted while it runs, and how many there are."""
    return "epochs", plan.epochs * len(plan.members())


def choices(plan: Training, device: str = "cpu") -> list[str]:
    """Every automatic choice of the engine, with its reason."""
    found, how, why = groups(plan, device, lessons.weights(plan, 0)[0])
    _, _, said = lessons.sets(plan)
    doubts = [f"no guarantee: {reason}" for reason in reasons(plan.client, plan.model, plan.sampling)]
    jobs = f"{len(found)} job{'s' if len(found) > 1 else ''}"
    return [f"lanes {how} ({why})", jobs, f"test set: {said}", *doubts]


def estimate(plan: Training, device: str = "cpu", steps: int = 3) -> dict[str, float]:
    """CPU seconds and bytes of one job, from `steps` timed rounds of every channel and one measurement."""
    seconds, size = 0.0, 0.0
    for c in range(len(plan.channels)):
        feds, group, bench = lessons.begin(plan, (Member(c, 0),), device)
        state, began = group.states[0], time.process_time()
        for _ in range(steps):
            state = lessons.advance(feds[0], state, plan.lr)
        each = (time.process_time() - began) / steps
        began = time.process_time()
        lessons.measured(plan, feds, group, bench, 0)
        looks = 2 + (plan.epochs - 1) // plan.eval_every
        seconds += plan.seeds * (each * bench.rounds * plan.epochs + (time.process_time() - began) * looks)
        held = [*tree.flatten(Group(group.states, group.history, {})).values(), feds[0].data.x, bench.test.x]
        size = max(size, 4.0 * sum(v.nbytes for v in held))
    return {"cpu_s": seconds, "bytes": size}

"""An audit as a stream of events: victims and messages once, chunks over workers, rows as they are scored.

Impure on purpose: the engine, the store, the adapters and the command line are the only ones that
touch files, processes or clocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak import data, jobs, looks, pool, random, tree
from qleak.accounting import epsilon
from qleak.attacks import routes
from qleak.catalog import short
from qleak.check import Expected, finite
from qleak.engine.events import Event, Finished, Rows, Step
from qleak.jobs import Done, Job
from qleak.looks import NONE, Looks
from qleak.metrics import Secret
from qleak.plans import Audit, Chunk
from qleak.scoring import rate_path, score_group, summarise
from qleak.store import Run, now
from qleak.types import Buffers, Message, Params, Tree


class Prepared(NamedTuple):
    """What exists before any attack: the secret, the weights, and every message as it was sent."""

    secret: Secret
    params: Params
    buffers: Buffers
    messages: list[list[Message]]
    statistics: list[Tree]
    bits: list[float]
    coded: list[float]
    epsilon: list[float | None]


def prepare(plan: Audit) -> Prepared:
    """Victims, weights and messages: made once, one victim at a time, in the plan's dtype.

    Raises:
        Expected: the data set does not fit the model, a victim is out of range, or a gradient is not finite.
    """
    dtype = getattr(torch, plan.dtype)
    images = data.load(plan.data)
    x, y = _victims(plan, images.x, images.y)
    params, buffers = plan.model.init(random.generator(plan.model_seed, "params"))
    params, buffers = tree.cast(params, dtype), tree.cast(buffers, dtype)
    updates = []
    for i, a, b in zip(plan.victims, x, y, strict=True):
        draws = plan.client.draw(random.generator(plan.seed, "client", i), plan.model, len(a), 1.0)
        updates.append(plan.client.update(plan.model, params, buffers, a.to(dtype), b, tree.cast(draws, dtype)))
    for update in updates:
        finite(gradient=update)
    messages, bits, coded, eps = [], [], [], []
    for channel in plan.channels:
        knobs, rows = channel.knobs(), tuple(next(iter(updates[0].values())).shape[: plan.client.rows])
        sent = []
        for i, update in zip(plan.victims, updates, strict=True):
            noise = channel.draw(random.generator(plan.seed, "channel", channel.spec, i), params, rows)
            sent.append(channel.send(knobs, update, noise, channel.init(params), params)[0][-1])
        messages.append(sent)
        bits.append(channel.bits(sent[0], params) / tree.count(params))
        coded.append(sum(channel.bits(m, params, coded=True) for m in sent) / len(sent) / tree.count(params))
        eps.append(epsilon(channel.facts(params).event, plan.delta))
    shared = []
    if "statistics" in plan.grants and plan.model.statistics is not None:
        shared = [plan.model.statistics(params, buffers, a.to(dtype)) for a in x]
    return Prepared(Secret(x, y), params, buffers, messages, shared, bits, coded, eps)


def _victims(plan: Audit, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if tuple(x.shape[1:]) != plan.model.shape:
        raise Expected(
            f"Expected data {plan.data!r} of shape {plan.model.shape} for this model, got {tuple(x.shape[1:])}."
        )
    b = plan.client.batch
    for i in plan.victims:
        if not 0 <= i <= len(x) - b:
            raise Expected(f"Expected victim {i} in 0 … {len(x) - b} of data {plan.data!r}.")
    images = torch.stack([x[i : i + b] for i in plan.victims])
    finite(images=images)
    return images, torch.stack([y[i : i + b] for i in plan.victims])


def job_of(plan: Audit, prepared: Prepared, chunk: Chunk, device: str = "cpu", look: Looks = NONE) -> Job:
    """The job of one chunk: each lane gets its victim's message and grants, or its neighbour's in the wrong-gradient control."""
    messages = prepared.messages[chunk.channel]
    shift = [(lane.victim + (lane.control == "wrong-gradient")) % len(messages) for lane in chunk.lanes]
    message = tree.nested_map(lambda *parts: torch.stack(parts), *[messages[i] for i in shift])
    labels = prepared.secret.y[shift] if "labels" in plan.grants else None
    shared = tree.stack([prepared.statistics[i] for i in shift]) if "statistics" in plan.grants else None
    buffers = prepared.buffers if "buffers" in plan.grants else fresh(prepared.buffers)
    return Job(plan.as_json(), chunk, prepared.params, buffers, message, device, labels, shared, look)


def fresh(buffers: Buffers) -> Buffers:
    """Running statistics as an untrained net has them: means 0, variances 1."""
    blank = {"running_mean": 0.0, "running_var": 1.0}
    return {k: torch.full_like(v, blank[end]) if (end := k.split(".")[-1]) in blank else v for k, v in buffers.items()}


def run(plan: Audit, store: Run, device: str = "cpu", workers: pool.Workers = 1, look: Looks = NONE) -> Iterator[Event]:
    """Runs what the store does not hold yet. Rows of a channel × attack appear when all its lanes are done.

    A finished chunk is saved before anything is reported of it; rows carry keys and are written once,
    so stopping at any moment loses at most the chunks in flight. Where a film is asked for (`look`), finished
    chunks that have none are run once more for it; their results stay as they are.
    """
    prepared = prepare(plan)
    store.update(status="running", started=store.header.get("started") or now(), **_known(plan, prepared))
    if not store.has("victims"):
        for i, messages in enumerate(prepared.messages):
            store.save(f"messages-{i}", tree.flatten(messages))
        store.save("victims", {"x": prepared.secret.x, "y": prepared.secret.y})  # last: they vouch for the messages
    for i in range(len(plan.channels)):
        prepared.messages[i] = tree.unflatten(store.load(f"messages-{i}"), prepared.messages[i])
    chunks = plan.chunks()
    chunks, refused = applicable(plan, prepared, chunks)
    store.update(refused=refused)
    done: dict[str, Done] = {
        c.key: jobs.done(c.key, store.load(f"chunk-{c.key}")) for c in chunks if store.has(f"chunk-{c.key}")
    }
    named = {c.key: c for c in chunks}
    written = store.done()
    # The strongest attacks stand last in a plan and take longest: started first, they leave no worker idle.
    waiting = [c for c in reversed(chunks) if c.key not in done or unfilmed(plan, store, c, look)]
    scored: set[tuple[int, int]] = set()
    rows: list[dict[str, Any]] = store.rows()

    def groups() -> Iterator[Rows]:
        for c in range(len(plan.channels)):
            for a in range(len(plan.attacks)):
                mine = [k for k in chunks if (k.channel, k.attack) == (c, a)]
                if not mine or (c, a) in scored or any(k.key not in done for k in mine):
                    continue
                scored.add((c, a))
                lanes = [(k, done[k.key]) for k in mine]
                fresh = [
                    r
                    for r in score_group(
                        plan, prepared.secret, c, a, prepared.bits[c], prepared.coded[c], prepared.epsilon[c], lanes
                    )
                    if r["key"] not in written
                ]
                if fresh:
                    store.append(fresh)
                    written.update(r["key"] for r in fresh)
                    rows.extend(fresh)
                    yield Rows(fresh)

    yield from groups()
    for event in _results(plan, prepared, waiting, device, workers, look):
        if isinstance(event, Step):
            yield event
            continue
        if event.film is not None:
            store.save(f"film-{event.key}", event.film)
        if event.key not in done:
            event = rate_path(event, named[event.key], prepared.secret)._replace(film=None)
            store.save(f"chunk-{event.key}", jobs.tensors(event))
            done[event.key] = event
        yield from groups()
    summary = summarise(plan, rows)
    store.update(status="done", summary=summary, finished=now())
    yield Finished(summary)


def _results(
    plan: Audit, prepared: Prepared, waiting: list[Chunk], device: str, workers: pool.Workers, look: Looks
) -> Iterator[Step | Done]:
    """Steps and results of all jobs, in this process or over workers; the numbers are the same."""
    chunks = {c.key: c for c in waiting}
    todo = (job_of(plan, prepared, c, device, look) for c in waiting)
    threads, finished = torch.get_num_threads(), 0
    try:
        for key, event in pool.results(todo, jobs.events, pool.at_most(workers, len(waiting))):
            if isinstance(event, Done):
                yield event
                finished += 1
                if not isinstance(workers, int):  # all that is heard of a chunk
                    yield ended(plan, chunks[key], f"{finished} of {len(waiting)} chunks done")
                continue
            chunk, lanes = chunks[key], len(chunks[key].lanes)
            attack = plan.attacks[chunk.attack]
            name = f"{plan.labels()[chunk.channel]} {attack.spec.split('(')[0]}"
            each, least = attack.closures(event.step), float(event.loss.min())
            loss = least if event.lane < 0 else float(event.loss[event.lane])
            image = plan.victims[chunk.lanes[event.lane].victim]
            seen = () if event.x is None else (event.x, image)
            yield Step(key, name, each * lanes, closures_of(plan, chunk), f"loss {least:.0e}", loss, each, *seen)
    finally:
        torch.set_num_threads(threads)


def unfilmed(plan: Audit, store: Run, chunk: Chunk, look: Looks) -> bool:
    """Whether a film of the chunk is asked for and not there."""
    asked = look.film > 0 and looks.wanted(chunk, plan.seconds)
    return asked and not store.has(f"film-{chunk.key}")


def applicable(plan: Audit, prepared: Prepared, chunks: list[Chunk]) -> tuple[list[Chunk], list[dict[str, str]]]:
    """The chunks that can run, and a reason for every channel × attack that cannot."""
    refused: dict[tuple[int, int], str] = {}
    for chunk in chunks:
        where = (chunk.channel, chunk.attack)
        if where not in refused and chunk.evidence:
            refused[where] = plan.attacks[chunk.attack].applies(jobs.view_of(job_of(plan, prepared, chunk), plan))
    said = [
        {"channel": plan.labels()[c], "attack": short(plan.attacks[a].spec), "reason": why}
        for (c, a), why in refused.items()
        if why
    ]
    if len(said) == len(refused):
        raise Expected(f"Expected at least one attack that applies: {said[0]['attack']} {said[0]['reason']}")
    return [c for c in chunks if not refused[(c.channel, c.attack)]], said


def _known(plan: Audit, prepared: Prepared) -> dict[str, Any]:
    """What a report needs beside the rows: facts of every channel, papers, routes."""
    facts = [c.facts(prepared.params) for c in plan.channels]
    return {
        "facts": [
            {"channel": name, "bits": bits, "unbiased": f.unbiased, "exact": f.exact, "epsilon": eps}
            for name, f, bits, eps in zip(plan.labels(), facts, prepared.bits, prepared.epsilon, strict=True)
        ],
        "papers": list(dict.fromkeys(p for a in plan.attacks for p in a.papers)),
    }


def ended(plan: Any, chunk: Chunk, text: str) -> Step:
    """What is said of a chunk whose steps were not heard: all of them are made."""
    total, name = closures_of(plan, chunk), plan.attacks[chunk.attack].spec.split("(")[0]
    return Step(chunk.key, name, total, total, text)


def closures_of(plan: Any, chunk: Chunk) -> int:
    """Closures of all lanes of a chunk, at most."""
    attack = plan.attacks[chunk.attack]
    return attack.closures(attack.steps) * len(chunk.lanes)


def size(plan: Audit) -> tuple[str, int]:
    """What is counted while it runs, and how many there are at most."""
    return "closures", sum(closures_of(plan, c) for c in plan.chunks())


def choices(plan: Audit) -> list[str]:
    """Every automatic choice of the engine, with its reason."""
    lanes = max(len(c.lanes) for c in plan.chunks())
    route, why = routes.pick(plan.model, plan.client, lanes, routes.weights(plan.model))
    return [f"derivatives {route} ({why})", f"chunks of {plan.chunk} lanes (16–32 fit a CPU's cache; part of the plan)"]


def estimate(plan: Audit, device: str = "cpu", steps: int = 3) -> dict[str, float]:
    """CPU seconds (an upper bound: every lane to its last step) and bytes of the largest chunk, from `steps` timed steps."""
    prepared = prepare(plan)
    chunks, _ = applicable(plan, prepared, plan.chunks())
    seconds, size = 0.0, 0.0
    timed: dict[tuple[int, int, bool], float] = {}
    for chunk in chunks:
        attack, what = plan.attacks[chunk.attack], (chunk.channel, chunk.attack, chunk.evidence)
        if what not in timed:
            view = jobs.view_of(job_of(plan, prepared, chunk, device), plan)
            state = attack.init(view, jobs.starts(plan, chunk, view))
            size = max(size, 3.0 * sum(v.nbytes for v in tree.flatten(state).values()))
            began = time.process_time()
            for _ in range(min(steps, attack.steps)):
                state, _ = attack.step(view, state)
            timed[what] = (time.process_time() - began) / min(steps, attack.steps) / len(chunk.lanes)
        seconds += timed[what] * attack.steps * len(chunk.lanes)
    return {"cpu_s": seconds, "bytes": size}

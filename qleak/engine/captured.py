"""The audit of a captured update as a stream of events: attacks on it and on decoys, one row a lane, a verdict.

The run folder holds `tensors/captured`: `update/…`, `params/…`, `buffers/…`, `message/…` and, where they are given,
`truth/x`, `truth/y`; whoever opens the run writes it first (`hold`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch

from qleak import jobs, pool, random, tree
from qleak.attacks import routes
from qleak.catalog import short
from qleak.check import Expected
from qleak.engine import explained
from qleak.engine.audit import closures_of, ended
from qleak.engine.decoys import Held, decoys_of
from qleak.engine.events import Event, Finished, Rows, Step
from qleak.jobs import Done, Job
from qleak.looks import NONE, Looks
from qleak.metrics import Secret
from qleak.plans import Captured, Chunk
from qleak.store import Run, now
from qleak.types import Buffers, Message, Params, Tree

PARTS = ("update", "params", "buffers", "message", "truth")


def hold(store: Run, update: Tree, params: Params, buffers: Buffers, message: Message, truth: Secret | None) -> None:
    """Writes what was captured into the run folder, before the run; what is there already stays."""
    if store.has("captured"):
        return
    parts = (update, params, buffers, tree.flatten(message), truth._asdict() if truth else {})
    store.save("captured", {f"{name}/{k}": v for name, part in zip(PARTS, parts, strict=True) for k, v in part.items()})


def held(plan: Captured, store: Run) -> Held:
    """What `hold` wrote, with the decoys that belong to the plan's seed."""
    stored = store.load("captured")
    parts = {n: {k[len(n) + 1 :]: v for k, v in stored.items() if k.startswith(f"{n}/")} for n in PARTS}
    order, _ = plan.model.init(
        random.generator(plan.seed, "order")
    )  # files do not keep the order that last layers need
    params, buffers = {k: parts["params"][k] for k in order}, parts["buffers"]
    decoys, sent = decoys_of(plan, params, buffers)
    truth = Secret(parts["truth"]["x"], parts["truth"]["y"]) if parts["truth"] else None
    return Held(params, buffers, [tree.unflatten(parts["message"], sent[0]), *sent], decoys, truth)


def job_of(plan: Captured, given: Held, chunk: Chunk, device: str = "cpu") -> Job:
    """The job of one chunk, with its share of the CPU seconds; given labels are everybody's."""
    message = tree.nested_map(lambda *parts: torch.stack(parts), *[given.messages[n.victim] for n in chunk.lanes])
    labels = torch.tensor(plan.labels).repeat(len(chunk.lanes), 1) if plan.labels else None
    plan = replace(plan, seconds=plan.share(chunk)) if plan.attacks[chunk.attack].steps > 1 else plan
    return Job(plan.as_json(), chunk, given.params, given.buffers, message, device, labels, None)


def run(
    plan: Captured, store: Run, device: str = "cpu", workers: pool.Workers = 1, look: Looks = NONE
) -> Iterator[Event]:
    """Runs what the store does not hold yet; rows and the verdict are written when every lane is done."""
    given = held(plan, store)
    store.update(status="running", started=store.header.get("started") or now(), papers=_papers(plan))
    chunks = plan.chunks()
    refused = {a: plan.attacks[a].applies(_view(plan, given, a)) for a in range(len(plan.attacks))}
    said = [{"attack": short(plan.attacks[a].spec), "reason": why} for a, why in refused.items() if why]
    if len(said) == len(plan.attacks):
        raise Expected(f"Expected at least one attack that applies: {said[0]['attack']} {said[0]['reason']}")
    store.update(refused_attacks=said)
    chunks = [c for c in chunks if not refused[c.attack]]
    done = {c.key: jobs.done(c.key, store.load(f"chunk-{c.key}")) for c in chunks if store.has(f"chunk-{c.key}")}
    waiting = [c for c in chunks if c.key not in done]
    threads = torch.get_num_threads()
    try:
        todo = (job_of(plan, given, c, device) for c in waiting)
        for key, event in pool.results(todo, jobs.events, pool.at_most(workers, len(waiting))):
            if isinstance(event, Done):
                store.save(f"chunk-{key}", jobs.tensors(event))
                done[key] = event
                if not isinstance(workers, int):  # all that is heard of a chunk
                    chunk = next(c for c in waiting if c.key == key)
                    yield ended(plan, chunk, f"{len(done)} of {len(chunks)} chunks done")
                continue
            chunk = next(c for c in waiting if c.key == key)
            attack, lanes = plan.attacks[chunk.attack], len(chunk.lanes)
            name = f"{attack.spec.split('(')[0]} {chunk.key.partition('-')[2].replace('none', 'captured')}"
            made = attack.closures(event.step) * lanes
            yield Step(key, name, made, closures_of(plan, chunk), f"loss {float(event.loss.min()):.0e}")
    finally:
        torch.set_num_threads(threads)
    rows, verdict = explained.rows(plan, given, [(c, done[c.key]) for c in chunks])
    store.append(rows)
    store.update(status="done", summary=[verdict], finished=now())
    yield Rows(rows)
    yield Finished([verdict])


def _view(plan: Captured, given: Held, attack: int) -> Any:
    chunk = next(c for c in plan.chunks() if c.attack == attack)
    return jobs.view_of(job_of(plan, given, chunk), cast(Any, plan))


def _papers(plan: Captured) -> list[str]:
    return list(dict.fromkeys(p for a in plan.attacks for p in a.papers))


def size(plan: Captured) -> tuple[str, int]:
    """What is counted while it runs, and how many there are at most."""
    return "closures", sum(closures_of(plan, c) for c in plan.chunks())


def choices(plan: Captured) -> list[str]:
    """Every automatic choice of the engine, with its reason."""
    route, why = routes.pick(plan.model, plan.client, plan.restarts, routes.weights(plan.model))
    return [f"derivatives {route} ({why})"]


def estimate(plan: Captured, device: str = "cpu") -> dict[str, float]:
    """The budget is the answer."""
    return {"cpu_s": plan.budget, "bytes": 0.0}


def pace(plan: Captured, given: Held, steps: int = 2) -> dict[int, float]:
    """CPU seconds of one closure of one lane, by attack of several steps, timed after a first step that warms up."""
    found = {}
    for a, attack in enumerate(plan.attacks):
        if attack.steps == 1 or attack.applies(view := _view(plan, given, a)):
            continue
        chunk = next(c for c in plan.chunks() if c.attack == a)
        state = attack.init(view, jobs.starts(cast(Any, plan), chunk, view))
        state, _ = attack.step(view, state)
        began = time.process_time()
        for _ in range(steps):
            state, _ = attack.step(view, state)
        found[a] = (time.process_time() - began) / steps / len(chunk.lanes)
    return found

"""A synthesis run as a stream of events: jobs over workers, checkpoints, rows as they are measured, samples at the end."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from qleak import pool
from qleak.accounting import epsilon
from qleak.catalog import short
from qleak.engine import making
from qleak.engine.events import Event, Finished, Rows, Step
from qleak.engine.made import summarise
from qleak.engine.making import Checkpoint, File, Job, Progress
from qleak.looks import NONE, Looks
from qleak.plans import Synthesis
from qleak.plans.base import file_name
from qleak.plans.synthesis import Arm
from qleak.store import Run, now
from qleak.types import Public, Tree


class Price:
    """ε of an arm after so many steps, each computed once: None where nothing is guaranteed."""

    def __init__(self, plan: Synthesis, public: Public) -> None:
        self.arms, self.spends = plan.arms(), making.spends(plan, public)
        self.epsilon = functools.lru_cache(maxsize=None)(lambda arm, t: self._epsilon(arm, t, plan.delta))

    def _epsilon(self, arm: int, t: int, delta: float) -> float | None:
        return None if self.arms[arm].method.unsound else epsilon(self.spends[arm].event(t), delta)


def run(
    plan: Synthesis, store: Run, device: str = "cpu", workers: pool.Workers = 1, look: Looks = NONE
) -> Iterator[Event]:
    """Makes what the store does not hold yet; what has a row is on disk and never made again."""
    _, _, public = making.of(plan)  # on the CPU: the device may be a worker's
    price = Price(plan, public)
    store.update(
        status="running", started=store.header.get("started") or now(), public=list(public), facts=_facts(plan, price),
        papers=list(dict.fromkeys(p for arm in price.arms for p in arm.method.papers)), refused=[],
    )  # fmt: skip
    jobs = {job.key: job for job in _jobs(plan, store, device, price)}
    reached: dict[str, int] = {}

    def keep(job: Job, event: Checkpoint) -> Iterator[Rows]:
        flat = safetensors.torch.load(event.saved)
        if not flat["sheet"].numel() and store.has(f"state-{job.key}"):  # a sheet is made where something is measured
            flat["sheet"] = store.load(f"state-{job.key}")["sheet"]
        if event.statistics:  # in front of the state, after which this step is never made again
            store.file(f"statistics/{job.key}-{event.step}.json", json.dumps(event.statistics).encode())
        store.save(f"state-{job.key}", flat)
        done = store.done()
        fresh = [r for r in _rows(plan, job, flat["history"], price) if r["key"] not in done]
        if event.step == price.spends[job.trial.arm].steps:
            _model(plan, store, job, flat, price.arms[job.trial.arm], public)
        if fresh:
            store.append(fresh)
            yield Rows(fresh)

    todo = []
    for job in jobs.values():
        if job.saved:  # rows of a checkpoint that was saved just before a kill
            reached[job.key] = int(safetensors.torch.load(job.saved)["step"])
            yield from keep(job, Checkpoint(job.key, reached[job.key], job.saved, {}))
        if reached.get(job.key, -1) < price.spends[job.trial.arm].steps or job.files:
            todo.append(job)
    threads = torch.get_num_threads()
    try:
        for key, event in pool.results(todo, making.events, workers):
            job = jobs[key]
            if isinstance(event, File):
                store.file(sample_name(price.arms[job.trial.arm], event.number), event.data)
                continue
            if isinstance(event, Checkpoint):
                if event.step < reached.get(key, -1):
                    continue  # workers' checkpoints may come late, but the last one holds all
                reached[key] = event.step
                yield from keep(job, event)
            yield _step(plan, job, event, price, store)
    finally:
        torch.set_num_threads(threads)
    summary = summarise(plan, store.rows(), price.spends)
    store.update(status="done", summary=summary, finished=now())
    yield Finished(summary)


def sample_name(arm: Arm, number: int) -> str:
    """Where a sample file lies: `samples/ARM/eps-1.00.data-0.npz`."""
    return f"samples/{file_name(arm.name)}/eps-{arm.epsilon:.2f}.data-{number}.npz"


def _jobs(plan: Synthesis, store: Run, device: str, price: Price) -> Iterator[Job]:
    for trial in plan.members():
        saved = safetensors.torch.save(store.load(f"state-{trial.key}")) if store.has(f"state-{trial.key}") else b""
        arm = price.arms[trial.arm]
        wanted = range(plan.files) if trial.seed == 0 and not arm.floor else range(0)
        files = tuple(i for i in wanted if not store.holds(sample_name(arm, i)))
        yield Job(plan.as_json(), trial.key, trial, saved, device, files)


def _step(plan: Synthesis, job: Job, event: Progress | Checkpoint, price: Price, store: Run) -> Step:
    """Where a synthesis is: steps, ε spent, and the last accuracy."""
    arm, total = price.arms[job.trial.arm], price.spends[job.trial.arm].steps
    if isinstance(event, Progress):
        accuracy = event.accuracy
    else:
        mine = [
            r for r in store.rows() if r["key"].startswith(f"{job.key}-") and r["key"].endswith("-0")
        ]  # the first judge
        accuracy = mine[-1]["accuracy"] if mine else math.nan
    spent = price.epsilon(job.trial.arm, event.step)
    text = f"step {event.step}/{total} · ε {'none' if spent is None else f'{spent:.3f}'} of {arm.epsilon:g}"
    text += "" if math.isnan(accuracy) else f" · {accuracy:.1%}"
    return Step(job.key, f"{arm.name} seed {job.trial.seed}", event.step, total, text)


def _rows(plan: Synthesis, job: Job, history: Tensor, price: Price) -> list[dict[str, Any]]:
    """One row per measurement and judge."""
    rows, arm = [], price.arms[job.trial.arm]
    for line in history.tolist():
        found = dict(zip(making.columns(plan), line, strict=True))
        step, judge = int(found.pop("step")), int(found.pop("judge"))
        spend = price.spends[job.trial.arm]
        rows.append({
            "key": f"{job.key}-{step}-{judge}", "kind": "synthesis", "id": plan.id, "data": plan.data, "method": arm.name,
            "target_epsilon": arm.epsilon, "floor": arm.floor, "seed": job.trial.seed, "step": step,
            "epsilon": price.epsilon(job.trial.arm, step), "claimed_epsilon": spend.claimed(step) if step else None,
            "delta": plan.delta, "classifier": short(plan.classifiers[judge].spec), **found,
            "status": "spent" if step == spend.steps else "going",
        })  # fmt: skip
    return rows


def _model(plan: Synthesis, store: Run, job: Job, flat: Tree, arm: Arm, public: Public) -> None:
    """What samples are made of, with all that `qleak synth sample` needs."""
    released = {k.removeprefix("released/"): v for k, v in flat.items() if k.startswith("released/")}
    about = {
        "synthesizer": arm.method.spec, "run": plan.id, "data": plan.data, "arm": arm.name, "seed": str(job.trial.seed),
        "epsilon": str(arm.epsilon), "delta": str(plan.delta), "public": json.dumps(public),
    }  # fmt: skip
    store.model(f"models/{job.key}", released, about)


def _facts(plan: Synthesis, price: Price) -> list[dict[str, Any]]:
    """What is settled of every arm before a record is seen."""
    return [
        {
            "method": arm.name, "spec": short(arm.method.spec), "floor": arm.floor, "target_epsilon": arm.epsilon,
            "steps": spend.steps, "epsilon": price.epsilon(i, spend.steps), "claimed_epsilon": spend.claimed(spend.steps),
            "noise": spend.noise, "reason": spend.reason, "unsound": arm.method.unsound,
        }
        for i, (arm, spend) in enumerate(zip(price.arms, price.spends, strict=True))
    ]  # fmt: skip


def size(plan: Synthesis) -> tuple[str, int]:
    """What is counted while it runs, and how many there are."""
    spends = making.spends(plan, making.of(plan)[2])
    return "steps", plan.seeds * sum(s.steps for s in spends)


def choices(plan: Synthesis, device: str = "cpu") -> list[str]:
    """Every automatic choice of the engine, with its reason."""
    arms, spends = plan.arms(), making.spends(plan, making.of(plan)[2])
    alike: dict[str, list[str]] = {}
    for arm, spent in zip(arms, spends, strict=True):
        alike.setdefault(f"{spent.steps} step{'s' * (spent.steps != 1)} ({spent.reason})", []).append(arm.name)
    said = [f"{how}: {', '.join(who) if len(who) < 4 else f'{len(who)} arms'}" for how, who in alike.items()]
    return said + [f"{arm.name}: no guarantee ({arm.method.unsound})" for arm in arms if arm.method.unsound]


def estimate(plan: Synthesis, device: str = "cpu", steps: int = 2) -> dict[str, float]:
    """CPU seconds and bytes of one job, from `steps` timed steps of every arm and one judgement."""
    train, test, public = making.of(plan, device)
    seconds, held = 0.0, 0.0
    for arm, spend in zip(plan.arms(), making.spends(plan, public), strict=True):
        state, began = arm.method.init(train, spend, 0), time.process_time()
        for t in range(min(steps, spend.steps)):
            state = arm.method.step(train, spend, state, t)
        each = (time.process_time() - began) / max(min(steps, spend.steps), 1)
        began = time.process_time()
        making.measure(plan, arm, public, arm.method.released(state), False, train, test, 0)
        looks = 1 + (spend.steps // plan.eval_every if plan.eval_every else 0)
        seconds += plan.seeds * (each * spend.steps + (time.process_time() - began) * looks)
        flat = {k: v.nbytes for k, v in making.tree.flatten({"s": state}).items()}
        held = max(held, 4.0 * sum(flat.values()) + train.x.nbytes)
    return {"cpu_s": seconds, "bytes": held}

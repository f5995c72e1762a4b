"""One synthesis, from its last checkpoint to its sample files: what a worker process does."""

from __future__ import annotations

import functools
import io
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor

from qleak import random, tree
from qleak.plans import Synthesis, from_json
from qleak.plans.synthesis import Arm, Trial
from qleak.synth import quality, sets
from qleak.train import split
from qleak.types import Dataset, Public, Spend, Tree

COLUMNS = ("step", "judge", "accuracy", "accuracy_max", "distance", "copies", "nearest", "cpu_s", "judge_s")
CANARY = ("teachers", "reach", "divergence", "promised", "epsilon")  # what a canary shows, `canary_…` in rows
EVERY = 0.5  # seconds between two signs of life
SHEET = 10  # images of each class that a report shows
PART = 1000  # images sampled at a time: a maker's batch norm sees its own batch


class Job(NamedTuple):
    """One synthesis; `plan` is JSON and `saved` safetensors, so that a job crosses process borders.

    Attributes:
        files: numbers of the sample files that are still to be written.
    """

    plan: dict[str, Any]
    key: str
    trial: Trial
    saved: bytes
    device: str
    files: tuple[int, ...] = ()


class Progress(NamedTuple):
    """A sign of life: steps done, and the first judge's last accuracy (NaN before it has looked)."""

    step: int
    accuracy: float


class Checkpoint(NamedTuple):
    """Everything after a step: `state/…`, `released/…`, `sheet`, and `history [measurement column]`."""

    key: str
    step: int
    saved: bytes
    statistics: dict[str, Any]


class File(NamedTuple):
    """A finished sample file: its number among the arm's, and its bytes."""

    key: str
    number: int
    data: bytes


def columns(plan: Synthesis) -> tuple[str, ...]:
    """What is measured: `COLUMNS`, and what the canary shows where there is one."""
    return (*COLUMNS, *(f"canary_{name}" for name in CANARY if plan.canary))


@functools.cache
def records(data: str, size: int, limit: int, test_limit: int, device: str) -> tuple[Dataset, Dataset]:
    """(private records, real test images) of a plan."""
    if data in sets.OF_FILES:
        train, test = sets.records(data, "train", size, limit), sets.records(data, "test", size, test_limit)
    else:
        train, test, _ = split.held_out(data)
        train, test = (sets.pooled(s, size) if size else s for s in (train, test))
        train, test = split.spread(train, limit), split.spread(test, test_limit)
    return tuple(split.cast(s, torch.float32, device) for s in (train, test))  # pyright: ignore[reportReturnType]


def of(plan: Synthesis, device: str = "cpu") -> tuple[Dataset, Dataset, Public]:
    """Records, test images, and what is public of them."""
    train, test = records(plan.data, plan.size, plan.limit, plan.test_limit, device)
    return train, test, sets.public(train)


@functools.cache
def features(data: str, size: int, limit: int, test_limit: int, device: str) -> Any:
    """The net in whose features distances are measured, one per set and process."""
    return quality.feature_net(records(data, size, limit, test_limit, device)[0], 0)


def spends(plan: Synthesis, public: Public) -> list[Spend]:
    """What every arm does with its budget."""
    return [arm.method.spend(public, arm.epsilon, plan.delta) for arm in plan.arms()]


def events(job: Job) -> Iterator[Progress | Checkpoint | File]:
    """Makes what is left of a synthesis; a checkpoint wherever it is measured and every `save_every` steps."""
    if torch.device(job.device).type == "cpu":
        torch.set_num_threads(1)
    torch.func.grad(torch.sum)(torch.zeros(1))  # imports seconds of code once, which is no synthesis's time
    plan = from_json(job.plan)
    train, test, public = of(plan, job.device)
    arm = plan.arms()[job.trial.arm]
    spend = arm.method.spend(public, arm.epsilon, plan.delta)
    seed = random.key(plan.seed, "synthesis", job.trial.seed)
    state = arm.method.init(train, spend, seed)
    history, done, spent = torch.empty(0, len(columns(plan)), dtype=torch.float64), 0, 0.0
    if job.saved:
        flat = safetensors.torch.load(job.saved)
        history, done, spent = flat["history"], int(flat["step"]), float(flat["cpu_s"])
        like = {"state": state}
        state = tree.unflatten({k: v.to(job.device) for k, v in flat.items() if k.startswith("state/")}, like)["state"]
    said = time.monotonic()
    seen = int(history[:, 0].max()) if len(history) else -1
    while True:
        due = done == spend.steps or (plan.eval_every and done % plan.eval_every == 0)
        if (due and done > seen) or (done % plan.save_every == 0 and done):
            sheet = torch.empty(0)
            if due and done > seen:
                last = done == spend.steps
                found, sheet, more = measure(plan, arm, public, arm.method.released(state), last, train, test, seed)
                if last and plan.canary and arm.method.canary:
                    shown = arm.method.canary(train, spend, seed, plan.canary)
                    found[0, len(COLUMNS) :] = torch.tensor([shown[name] for name in CANARY], dtype=torch.float64)
                spent += more
                found[:, 0], found[:, COLUMNS.index("cpu_s")] = done, spent
                history, seen = torch.cat([history, found]), done
            extra = arm.method.statistics(public, state) if plan.statistics else {}
            yield Checkpoint(
                job.key, done, _dump(state, arm.method.released(state), history, sheet, done, spent), extra
            )
        if done >= spend.steps:
            break
        began = time.process_time()
        state = arm.method.step(train, spend, state, done)
        spent, done = spent + time.process_time() - began, done + 1
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            yield Progress(done, float(history[-1, 2]) if len(history) else math.nan)
    for number in job.files:
        yield File(job.key, number, _file(plan, arm, public, arm.method.released(state), number, seed))


def draw(arm: Arm, public: Public, released: Tree, y: Tensor, *path: int | str) -> Tensor:
    """Images `[n c h w]` for labels `y [n]`, `PART` at a time; what is not finite is grey."""
    parts = [arm.method.sample(public, released, part, random.key(*path, i)) for i, part in enumerate(y.split(PART))]
    return torch.cat(parts).nan_to_num(0.5).clamp(0, 1)


def measure(
    plan: Synthesis, arm: Arm, public: Public, released: Tree, last: bool, train: Dataset, test: Dataset, seed: int
) -> tuple[Tensor, Tensor, float]:
    """(`[judge column]`, sheet `[class·SHEET c h w]`, CPU seconds of sampling): every judge at the end, the first before."""
    device = train.x.device
    began = time.process_time()
    y = torch.arange(plan.samples, device=device) % public.classes
    x = draw(arm, public, released, y, seed, "judged")
    sampling = time.process_time() - began
    judges = plan.classifiers if last else plan.classifiers[:1]
    found = torch.full((len(judges), len(columns(plan))), math.nan, dtype=torch.float64)
    for i, judge in enumerate(judges):
        began = time.process_time()
        curve = judge.fit(x, y, test.x, test.y, public.classes, random.key(seed, "judge", i))
        found[i, 1:4] = torch.tensor([i, float(curve[-1]), float(curve.max())], dtype=torch.float64)
        found[i, COLUMNS.index("judge_s")] = time.process_time() - began
    if last and plan.quality:
        key = (plan.data, plan.size, plan.limit, plan.test_limit, str(device))
        near = quality.memorisation(x[:PART], train.x, test.x)
        found[0, 4:7] = torch.tensor(
            [quality.distance(x, test.x, features(*key)), near["copies"], near["nearest"]], dtype=torch.float64
        )
    labels = torch.arange(public.classes, device=device).repeat_interleave(SHEET)
    return found, draw(arm, public, released, labels, seed, "sheet"), sampling


def _dump(state: Any, released: Tree, history: Tensor, sheet: Tensor, step: int, spent: float) -> bytes:
    flat = tree.flatten({"state": state, "released": released}) | {
        "history": history, "sheet": sheet, "step": torch.tensor(step), "cpu_s": torch.tensor(spent, dtype=torch.float64),
    }  # fmt: skip
    return safetensors.torch.save(
        {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in flat.items()}
    )


def _file(plan: Synthesis, arm: Arm, public: Public, released: Tree, number: int, seed: int) -> bytes:
    """An npz of `data [n d+class]`, float16: the flat image beside its one-hot label, labels uniform at random."""
    y = random.integers(random.generator(seed, "file", number), public.classes, (plan.per_file,))
    x = draw(arm, public, released, y.to(next(iter(released.values())).device), seed, "file", number).cpu()
    flat = rearrange(x, "n c h w -> n (c h w)")
    data = torch.cat([flat, torch.nn.functional.one_hot(y, public.classes).to(flat)], 1).half().numpy()
    out = io.BytesIO()
    np.savez_compressed(out, data=data, shape=np.array(public.shape))
    return out.getvalue()

"""One chunk of lanes, from stored messages to guesses: what a worker process does.

A job holds what the attacker may see and nothing else, so it cannot leak a secret into a guess.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak import looks, random, tree
from qleak.attacks.drive import Progress, drive
from qleak.client import View
from qleak.plans import Audit, Chunk, from_json
from qleak.types import Buffers, Guess, Message, Params, Tree


class Job(NamedTuple):
    """A chunk and its inputs; `plan` is JSON so that a job crosses process borders.

    `labels [lane b]` and `statistics [lane …]` are there only where the plan's `grants` say so. `looks` is what is
    looked at on the way; no result depends on it.
    """

    plan: dict[str, Any]
    chunk: Chunk
    params: Params
    buffers: Buffers
    message: Message
    device: str
    labels: Tensor | None = None
    statistics: Tree | None = None
    looks: looks.Looks = looks.Looks()

    @property
    def key(self) -> str:
        """The chunk's key."""
        return self.chunk.key


class Done(NamedTuple):
    """The result of a job. `curve` is `[point, lane]`: own loss at `curve_at` closures.

    `path_psnr [lane point b]`, filled in by the scores, rates the guesses that the attacker chose among. A plan
    with a limit of `seconds` keeps the images handed in on the way, `seen [lane point b c h w]`, and after how
    many seconds, `seen_at [point]`; the scores put their PSNR `[lane point b]` in place of the images. `film` is
    stored in a file of its own, see `looks.Eye.film`.
    """

    key: str
    guess: Guess
    status: Tensor
    closures: Tensor
    curve: Tensor
    curve_at: Tensor
    cpu_s: float
    path_psnr: Tensor | None = None
    seen: Tensor | None = None
    seen_at: Tensor | None = None
    film: Tree | None = None


KEPT = ("path_psnr", "seen", "seen_at")
"""What a chunk's file holds only sometimes, in the order of `Done`."""


def tensors(done: Done) -> Tree:
    """A result as tensors, to be stored; `done` is the inverse."""
    return {
        "x": done.guess.x, "labels": done.guess.labels, "loss": done.guess.loss, "status": done.status,
        "closures": done.closures, "curve": done.curve, "curve_at": done.curve_at,
        "cpu_s": torch.tensor(done.cpu_s, dtype=torch.float64),
        **{k: v for k in KEPT if (v := getattr(done, k)) is not None},
    }  # fmt: skip


def done(key: str, t: Tree) -> Done:
    """The result of the chunk `key` from what `tensors` made of it."""
    guess = Guess(t["x"], t["labels"], t["loss"])
    kept = (t.get("path_psnr"), t.get("seen"), t.get("seen_at"))
    return Done(key, guess, t["status"], t["closures"], t["curve"], t["curve_at"], float(t["cpu_s"]), *kept)


def view_of(job: Job, plan: Audit | None = None) -> View:
    """The attacker's view of a job."""
    plan = plan if plan is not None else from_json(job.plan)
    assert plan is not None
    dtype = getattr(torch, plan.dtype)
    place = torch.device(job.device)
    move: Callable[[Tree], Tree] = lambda t: tree.to(tree.to(t, place), dtype)  # noqa: E731
    code = tree.to(job.message.code, place)
    side = tuple({k: tree.to(v, place) for k, v in s.items()} for s in job.message.side)
    channel = plan.channels[job.chunk.channel]
    return View(
        plan.model, move(job.params), move(job.buffers), channel, plan.client, Message(code, side),
        labels=None if job.labels is None else job.labels.to(place),
        statistics=None if job.statistics is None else move(job.statistics),
        evidence=job.chunk.evidence,
    )  # fmt: skip


def starts(plan: Audit, chunk: Chunk, view: View) -> Tree:
    """Every lane's own draws, stacked. The same (victim, restart) starts alike under every channel and attack."""
    attack, dtype = plan.attacks[chunk.attack], getattr(torch, plan.dtype)
    drawn = []
    for lane in chunk.lanes:
        path = (plan.seed, "start", plan.victims[lane.victim], lane.restart)
        drawn.append(tree.to(attack.draw(random.generator(*path), view), dtype))
    device = next(iter(view.params.values())).device
    return tree.to(tree.stack(drawn), device)


def events(job: Job) -> Iterator[Progress | Done]:
    """Runs a chunk to its end, on one intra-op thread (small nets are fastest so)."""
    if job.device == "cpu":
        torch.set_num_threads(1)
    plan = from_json(job.plan)
    view = view_of(job, plan)
    began = time.process_time()
    points: list[tuple[int, Tensor]] = []
    step = 0
    attack, start = plan.attacks[job.chunk.attack], starts(plan, job.chunk, view)
    watch, eye = Watch(plan.seconds), looks.Eye(job.looks, job.chunk, attack.steps, plan.seconds)
    look: Callable[[int], bool] = lambda step: watch.look(step) or eye.due(step)  # noqa: E731
    for event in drive(attack, view, start, 1 if plan.seconds else 25, look, watch.over):
        if isinstance(event, Progress):
            watch.note(event)
            step = event.step
            shown = None if event.x is None else eye.look(event.step, attack.closures(event.step), event.loss, event.x)
            point = event.step > 0 and event.step % 25 == 0
            if point:
                points.append((event.step, event.loss))
            if point or shown is not None:
                yield event._replace(x=shown, lane=eye.lane(event.loss))
            continue
        guess, status, closures = event
        path = None if guess.path is None else guess.path.detach().cpu().float()
        guess = Guess(guess.x.detach().cpu().float(), guess.labels.cpu(), guess.loss.detach().cpu().float(), path)
        curve = torch.stack([p[1] for p in points]) if points else torch.zeros(0, len(job.chunk.lanes))
        at = torch.tensor([p[0] for p in points], dtype=torch.int64)
        cpu_s = time.process_time() - began
        if eye.watch:  # whoever watches sees what was handed in
            lane = eye.lane(guess.loss)
            yield Progress(step, guess.loss, status, looks.small(guess.x[lane]), lane)
        film = eye.film(guess, closures)
        yield Done(job.chunk.key, guess, status, closures, curve, at, cpu_s, None, *watch.found(guess), film)


class Watch:
    """The clock of a race: images are kept at times that grow by √2, and the chunk ends after `seconds` of CPU.

    Scoring an image costs nothing here: the clock runs on the attack's own CPU time.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.process_time()
        self.next = seconds / 2**7 if seconds else math.inf
        self.kept: list[tuple[float, Tensor]] = []

    def spent(self) -> float:
        """Seconds of CPU since the start."""
        return time.process_time() - self.began

    def look(self, step: int) -> bool:
        """Whether the next image is due after so many steps."""
        return step > 0 and self.spent() >= self.next

    def over(self) -> bool:
        """Whether the time is up."""
        return bool(self.seconds) and self.spent() >= self.seconds

    def note(self, event: Progress) -> None:
        """Keeps the images of an event that has some."""
        if event.x is None or not self.look(event.step):
            return
        spent = self.spent()
        self.kept.append((spent, event.x.detach().cpu().float()))
        while self.next <= spent:
            self.next *= math.sqrt(2)

    def found(self, guess: Guess) -> tuple[Tensor | None, Tensor | None]:
        """(`seen`, `seen_at`) with the final images as last point; nothing without a clock."""
        if not self.seconds:
            return None, None
        kept = [*self.kept, (self.spent(), guess.x)]
        return torch.stack([x for _, x in kept], 1), torch.tensor([t for t, _ in kept])

"""What is looked at while an attack runs: small pictures for whoever watches, frames for a film.

Like a log, it is asked for beside the plan (`engine.run(…, look=…)`) and may not change a result: a look is `Attack.read`,
a pure function of the state. Chunks with a limit of seconds are not looked at, because a look takes time.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qleak.check import at_least, whole
from qleak.metrics import picture
from qleak.plans import Chunk
from qleak.types import Guess, Tree

SIDE = 32
"""Pixels of the longer side of a picture that is sent to be watched."""
FILMED = 4
"""Victims of a chunk whose best lane is filmed."""
SHARE = 50
"""A look that took t seconds is followed by at least SHARE·t seconds without one: watching costs 2 % at most."""


class Looks(NamedTuple):
    """What is asked for: `watch` seconds between two pictures (0: none), `film` frames of the best lanes (0: none)."""

    watch: float = 0.0
    film: int = 0


NONE = Looks()
"""Nobody looks."""


def asked(watch: float = 0.0, film: int = 0) -> Looks:
    """What an engine is to look at: `engine.run(plan, store, look=looks.asked(film=24))`.

    Raises:
        Expected: one frame (a film has a first and a last one), or a negative number.
    """
    whole(film=film)
    at_least(0, watch=watch)
    if film:
        at_least(2, film=film)
    return Looks(watch, film)


def wanted(chunk: Chunk, seconds: float) -> bool:
    """Whether a chunk is one to look at: an attack on the victims' own messages, without a limit of `seconds`."""
    return chunk.evidence and not seconds and any(lane.control == "none" for lane in chunk.lanes)


def frames(steps: int, number: int) -> list[int]:
    """`number` counts of steps, log-spaced from 0 to `steps`; all of them where there are not so many."""
    found = [0, 1]
    while found[-1] < steps:
        left = number - len(found)
        ratio = (steps / found[-1]) ** (1 / left) if left > 0 else math.inf
        found.append(steps if left <= 0 else min(steps, max(found[-1] + 1, round(found[-1] * ratio))))
    return found if number > 2 else [0, steps]


def small(x: Tensor) -> Any:
    """Images `[b c h w]` as one picture, uint8 `[h w 3]` (numpy: it crosses process borders as plain bytes).

    At most four images, side by side two by two; a longer side of at most `SIDE` pixels an image.
    """
    images = picture(x[:4].detach().float().cpu())
    factor = math.ceil(max(images.shape[-2:]) / SIDE)
    images = F.avg_pool2d(images, factor, ceil_mode=True) if factor > 1 else images
    images = images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    wide = 1 if len(images) == 1 else 2
    images = torch.cat([images, images.new_full((-len(images) % wide, *images.shape[1:]), 0.5)])
    rows = [torch.cat(list(images[i : i + wide]), -1) for i in range(0, len(images), wide)]
    return torch.cat(rows, -2).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


class Eye:
    """The looks at one chunk. Watched is the best start, by own loss, of the chunk's first victim; filmed that of each."""

    def __init__(self, asked: Looks, chunk: Chunk, steps: int, seconds: float = 0.0) -> None:
        on = wanted(chunk, seconds)
        self.watch = asked.watch if on else 0.0
        self.due_at = set(frames(steps, asked.film)) if on and asked.film else set()
        self.lanes: dict[int, list[int]] = {}  # own lanes of each victim, in the chunk's order
        for i, lane in enumerate(chunk.lanes):
            if on and lane.control == "none":
                self.lanes.setdefault(lane.victim, []).append(i)
        self.kept = [i for lanes in list(self.lanes.values())[:FILMED] for i in lanes]
        self.next, self.began = (0.0 if self.watch else math.inf), 0.0
        self.x: list[Tensor] = []
        self.loss: list[Tensor] = []
        self.at: list[int] = []

    def due(self, step: int) -> bool:
        """Whether to look after so many steps."""
        self.began = time.perf_counter()
        return step in self.due_at or self.began >= self.next

    def lane(self, loss: Tensor) -> int:
        """The lane that is watched, given every lane's own loss; -1 for none."""
        first = next(iter(self.lanes.values()), None)
        return -1 if first is None else min(first, key=lambda i: _number(loss[i]))

    def look(self, step: int, closures: int, loss: Tensor, x: Tensor) -> Any:
        """Keeps a frame that is due; a small picture if one is, else None."""
        if step in self.due_at:
            self._keep(closures, loss, x)
        if not self.began >= self.next:
            return None
        shown = small(x[self.lane(loss)])
        now = time.perf_counter()
        self.next = now + max(self.watch, SHARE * (now - self.began))
        return shown

    def _keep(self, closures: int, loss: Tensor, x: Tensor) -> None:
        self.at.append(closures)
        self.loss.append(loss[self.kept].detach().float().cpu().nan_to_num(nan=torch.nan, posinf=torch.nan))
        self.x.append(picture(x[self.kept].detach().float().cpu()))

    def film(self, guess: Guess, closures: Tensor) -> Tree | None:
        """The film of the best lanes, nothing where none was asked for.

        `x [lane frame b c h w]` in [0, 1] as an attacker would have handed it in, `at [frame]` closures, `loss [lane
        frame]` (NaN before the first closure), `lane [lane]` its place in the chunk and `closures [lane]` where it ended;
        frames behind that repeat the last.
        """
        if not self.due_at:
            return None
        end = int(closures[self.kept].max())
        while self.at and self.at[-1] >= end:  # the last frame is what was handed in
            for kept in (self.at, self.loss, self.x):
                kept.pop()
        self._keep(end, guess.loss, guess.x)
        groups = list(self.lanes.values())[:FILMED]
        best = [min(lanes, key=lambda i: _number(guess.loss[i])) for lanes in groups]
        here = [self.kept.index(i) for i in best]
        return {
            "x": torch.stack(self.x, 1)[here], "at": torch.tensor(self.at), "loss": torch.stack(self.loss, 1)[here],
            "lane": torch.tensor(best), "closures": closures[best].clone(),
        }  # fmt: skip


def _number(loss: Tensor) -> float:
    value = float(loss)
    return math.inf if math.isnan(value) else value

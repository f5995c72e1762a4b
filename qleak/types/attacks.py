"""The nouns of an attack: states, guesses, optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Generator, Tensor

from qleak.types.trees import Tree


class Guess(NamedTuple):
    """What an attack hands in, for every lane: images `[lane b c h w]`, labels `[lane b]`, own loss `[lane]`.

    `path` holds the guesses it chose among without the truth, `[lane point b c h w]`, where it keeps them.
    """

    x: Tensor
    labels: Tensor
    loss: Tensor
    path: Tensor | None = None


class Info(NamedTuple):
    """Diagnostics of one step, never needed for the next one: loss `[lane]`, status `[lane]` (see `Status`)."""

    loss: Tensor
    status: Tensor


class Status:
    """Codes of `Info.status`."""

    ACTIVE, CONVERGED, DIVERGED, FINISHED = range(4)
    NAMES = ("active", "converged", "diverged", "finished")


@dataclass(frozen=True)
class Optimizer:
    """A batched optimizer in optax's manner; every tensor of its state has `lane` as first axis.

    Attributes:
        init: `init(x [lane d]) -> state`.
        update: `update(state, x, loss [lane], grad [lane d]) -> (x, state)`: `loss` and `grad` were
            measured at `x`; one closure per lane and call, accepted or not.
        restart: `restart(state, lanes [lane] bool) -> state`: the objective of those lanes has changed,
            so their last loss is no yardstick for the next one.
    """

    init: Callable[[Tensor], Any]
    update: Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Any]]
    restart: Callable[[Any, Tensor], Any]
    spec: str = ""


@dataclass(frozen=True)
class Attack:
    """An attack as pure functions over lanes.

    Attributes:
        draw: `draw(generator, view) -> start`: everything random of one lane, as data.
        init: `init(view, start [lane …]) -> state`.
        step: `step(view, state) -> (state, info)`; one closure per lane.
        read: `read(view, state) -> guess`.
        steps: the largest number of steps.
        applies: a sentence why the attack cannot be used on this view, or "" if it can.
        papers: references.
        prior: the attack has an image prior, so its prior-only control means something.
        restarts: its start is random, so that restarts differ; a plan makes one lane a victim otherwise.
        closures: `closures(steps)`: those of one lane in so many steps; more than one a step where a lane holds several starts.
    """

    draw: Callable[[Generator, Any], Tree]
    init: Callable[[Any, Tree], Any]
    step: Callable[[Any, Any], tuple[Any, Info]]
    read: Callable[[Any, Any], Guess]
    steps: int
    applies: Callable[[Any], str]
    papers: tuple[str, ...] = ()
    prior: bool = False
    restarts: bool = True
    closures: Callable[[int], int] = int
    spec: str = ""

"""Runs an attack over its lanes: step after step, finished lanes set aside, until none is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak import tree
from qleak.client import View
from qleak.types import Attack, Guess, Status, Tree


class Progress(NamedTuple):
    """After `step` steps: own loss and status of every lane, in the order they came; images where asked for.

    `drive` hands out the images of all lanes. What a job sends on has none, or a small picture of `lane` alone.
    """

    step: int
    loss: Tensor
    status: Tensor
    x: Any = None
    lane: int = -1


def never(*_: int) -> bool:
    """False."""
    return False


def lanes_at(state: Any, lanes: Tensor) -> Any:
    """Every tensor of a state indexed by lane; 0-dim tensors (shared counters) stay."""
    return tree.nested_map(lambda v: v[lanes] if v.ndim else v, state)


def drive(
    attack: Attack,
    view: View,
    start: Tree,
    every: int = 25,
    look: Callable[[int], bool] = never,
    over: Callable[[], bool] = never,
) -> Iterator[Progress | tuple[Guess, Tensor, Tensor]]:
    """Yields `Progress` each `every` steps and wherever `look` says so; at the end (guess, status `[lane]`, closures `[lane]`).

    Lanes that are finished, converged or diverged are read out and taken out of the batch; the rest
    goes on alone. What a lane computes does not depend on which others run beside it.

    Args:
        attack: what to run.
        view: what it sees.
        start: every lane's draws, see `Attack.draw`.
        every: closures between two looks at the lanes' status.
        look: asked in front of the first step and after every one, with the number of steps taken; where true, the
            images that would be handed in now go along. What lanes compute does not depend on it.
        over: asked every `every` steps; where true, every lane is read out.
    """
    total = view.lanes
    state = attack.init(view, start)
    alive = torch.arange(total)
    guesses: dict[int, Guess] = {}
    loss, status = torch.full((total,), torch.inf), torch.zeros(total, dtype=torch.int64)
    closures = torch.zeros(total, dtype=torch.int64)
    step = 0
    ended = _status(state)
    enough = False
    if look(0):
        yield Progress(0, loss.clone(), status.clone(), _images(attack.read(view, state), alive, guesses))
    while len(alive):
        if step % every == 0 or step >= attack.steps:
            live = step < attack.steps and not enough
            stop = torch.ones_like(alive, dtype=torch.bool) if not live else (ended != Status.ACTIVE)
            if bool(stop.any()):
                guess = attack.read(view, state)
                for i in torch.nonzero(stop)[:, 0].tolist():
                    guesses[int(alive[i])] = Guess(
                        guess.x[i], guess.labels[i], guess.loss[i], None if guess.path is None else guess.path[i]
                    )
                    status[alive[i]] = ended[i] if int(ended[i]) else Status.FINISHED
                    closures[alive[i]] = attack.closures(min(step, attack.steps))
                keep = torch.nonzero(~stop)[:, 0]
                if not len(keep):
                    break
                alive, ended = alive[keep], ended[keep]
                view, state = view.at(keep.to(_device(view))), lanes_at(state, keep.to(_device(view)))
        state, info = attack.step(view, state)
        step += 1
        due, asked = step % every == 0 or step >= attack.steps, look(step)
        if due or asked:
            ended = info.status.cpu()
            loss[alive] = info.loss.detach().float().cpu()
            status[alive] = ended
            seen = _images(attack.read(view, state), alive, guesses) if asked else None
            yield Progress(step, loss.clone(), status.clone(), seen)
        if due:
            enough = over()
    ordered = [guesses[i] for i in range(total)]
    x, labels, losses = (torch.stack([g[i] for g in ordered]) for i in range(3))  # pyright: ignore[reportArgumentType]
    path = [g.path for g in ordered if g.path is not None]
    yield Guess(x, labels, losses, torch.stack(path) if path else None), status, closures


def _images(guess: Guess, alive: Tensor, done: dict[int, Guess]) -> Tensor:
    """The images of every lane: from its guess now, or from what it has handed in."""
    now = {int(lane): guess.x[i] for i, lane in enumerate(alive)}
    return torch.stack([v for _, v in sorted((now | {k: g.x for k, g in done.items()}).items())])


def _status(state: Any) -> Tensor:
    return state.status.cpu()


def _device(view: View) -> torch.device:
    return next(iter(view.params.values())).device

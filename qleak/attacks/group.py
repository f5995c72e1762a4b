"""Several starts as one attack: they are stepped together, may look at each other, and the best of them is handed in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from qleak import tree
from qleak.client import View
from qleak.types import Attack, Guess, Info, Status, Tree


class GroupState(NamedTuple):
    """The members' states, `[lane member …]`, and the group's status `[lane]`."""

    members: Any
    status: Tensor


def grouped(attack: Attack, size: int) -> Attack:
    """`size` starts of `attack` on every lane. A lane stays one independent attack: its group never looks outside."""

    def wide(view: View) -> View:
        lanes = torch.arange(view.lanes, device=next(iter(view.params.values())).device)
        return view.at(lanes.repeat_interleave(size))

    def fold(state: Any) -> Any:
        return tree.nested_map(lambda v: v.unflatten(0, (-1, size)) if v.ndim else v, state)

    def flat(state: Any) -> Any:
        return tree.nested_map(lambda v: v.flatten(0, 1) if v.ndim else v, state)

    def draw(gen: Generator, view: View) -> Tree:
        return tree.stack([attack.draw(gen, view) for _ in range(size)])

    def wrapped(members: Any) -> GroupState:
        members = fold(members)
        active = (members.status == Status.ACTIVE).any(1)
        return GroupState(members, torch.where(active, Status.ACTIVE, members.status.amin(1)))

    def init(view: View, start: Tree) -> GroupState:
        return wrapped(attack.init(wide(view), {k: v.flatten(0, 1) for k, v in start.items()}))

    def step(view: View, state: GroupState) -> tuple[GroupState, Info]:
        members, info = attack.step(wide(view), flat(state.members))
        state = wrapped(members)
        return state, Info(info.loss.unflatten(0, (-1, size)).amin(1), state.status)

    def read(view: View, state: GroupState) -> Guess:
        guess = fold(attack.read(wide(view), flat(state.members)))
        best = guess.loss.argmin(1)
        at = torch.arange(len(best), device=best.device)
        path = None if guess.path is None else guess.path[at, best]
        return Guess(guess.x[at, best], guess.labels[at, best], guess.loss[at, best], path)

    return Attack(draw, init, step, read, attack.steps, attack.applies, attack.papers, attack.prior, attack.restarts)

"""Several starts as one attack: they are stepped together, may look at each other, and the best of them is handed in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from qleak import tree
from qleak.client import View
from qleak.types import Attack, Guess, Info, Status, Tree


class GroupState(NamedTuple):
    """The members' states `[lane member …]`, the group's status `[lane]`, and the number of steps taken (0-dim)."""

    members: Any
    status: Tensor
    taken: Tensor


def grouped(attack: Attack, size: int, screen: int = 0) -> Attack:
    """`size` starts of `attack` on every lane; after `screen` steps the one of lowest own loss goes on alone (0: never).

    A lane stays one independent attack: its group never looks outside.
    """

    def wide(view: View, members: int) -> View:
        if members == 1:
            return view
        lanes = torch.arange(view.lanes, device=next(iter(view.params.values())).device)
        return view.at(lanes.repeat_interleave(members))

    def draw(gen: Generator, view: View) -> Tree:
        return tree.stack([attack.draw(gen, view) for _ in range(size)])

    def wrapped(state: Any, members: int, taken: Tensor) -> GroupState:
        state = tree.nested_map(lambda v: v.unflatten(0, (-1, members)) if v.ndim else v, state)
        active = (state.status == Status.ACTIVE).any(1)
        return GroupState(state, torch.where(active, Status.ACTIVE, state.status.amin(1)), taken)

    def flat(state: GroupState) -> tuple[Any, int]:
        return tree.nested_map(lambda v: v.flatten(0, 1) if v.ndim else v, state.members), state.members.status.shape[1]

    def init(view: View, start: Tree) -> GroupState:
        state = attack.init(wide(view, size), {k: v.flatten(0, 1) for k, v in start.items()})
        return wrapped(state, size, torch.zeros((), dtype=torch.int64))

    def step(view: View, state: GroupState) -> tuple[GroupState, Info]:
        inner, members = flat(state)
        inner, info = attack.step(wide(view, members), inner)
        state = wrapped(inner, members, state.taken + 1)
        loss = info.loss.unflatten(0, (-1, members))
        if screen and int(state.taken) == screen and members > 1:
            best = loss.nan_to_num(torch.inf).argmin(1)
            at = torch.arange(len(best), device=best.device)
            kept = tree.nested_map(lambda v: v[at, best][:, None] if v.ndim else v, state.members)
            state = GroupState(kept, kept.status[:, 0], state.taken)
        return state, Info(loss.amin(1), state.status)

    def read(view: View, state: GroupState) -> Guess:
        inner, members = flat(state)
        guess = attack.read(wide(view, members), inner)
        best = guess.loss.unflatten(0, (-1, members)).nan_to_num(torch.inf).argmin(1)
        at = torch.arange(len(best), device=best.device) * members + best
        path = None if guess.path is None else guess.path[at]
        return Guess(guess.x[at], guess.labels[at], guess.loss[at], path)

    return Attack(draw, init, step, read, attack.steps, attack.applies, attack.papers, attack.prior, attack.restarts)

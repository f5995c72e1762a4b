"""Several starts as one attack: they are stepped together, may look at each other, and the best of them is handed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from qleak import tree
from qleak.client import View
from qleak.types import Attack, Guess, Info, Status, Tree


class GroupState(NamedTuple):
    """The members' states `[lane member …]`, the group's status `[lane]`, and the number of steps taken (0-dim).

    `loss [lane member]` is every member's latest own loss: at the start of a stage it has none yet.
    """

    members: Any
    status: Tensor
    taken: Tensor
    loss: Tensor


def grouped(attack: Attack, size: int, rungs: Sequence[tuple[int, int]] = ()) -> Attack:
    """`size` starts of `attack` on every lane; after `step` steps the `left` of lowest own loss go on, for each rung (step, left).

    A lane stays one independent attack: its group never looks outside. Every member's closure is counted.
    """
    keep = dict(rungs)

    def wide(view: View, members: int) -> View:
        if members == 1:
            return view
        lanes = torch.arange(view.lanes, device=next(iter(view.params.values())).device)
        return view.at(lanes.repeat_interleave(members))

    def draw(gen: Generator, view: View) -> Tree:
        return tree.stack([attack.draw(gen, view) for _ in range(size)])

    def closures(steps: int) -> int:
        ends = [0, *(min(at, steps) for at, _ in rungs), steps]
        return sum(n * (b - a) for n, a, b in zip((size, *(left for _, left in rungs)), ends, ends[1:], strict=False))

    def wrapped(state: Any, taken: Tensor, loss: Tensor) -> GroupState:
        state = tree.nested_map(lambda v: v.unflatten(0, loss.shape) if v.ndim else v, state)
        return GroupState(state, outcome(state.status), taken, loss)

    def outcome(status: Tensor) -> Tensor:
        return torch.where((status == Status.ACTIVE).any(1), Status.ACTIVE, status.amin(1))

    def flat(state: GroupState) -> tuple[Any, int]:
        return tree.nested_map(lambda v: v.flatten(0, 1) if v.ndim else v, state.members), state.members.status.shape[1]

    def init(view: View, start: Tree) -> GroupState:
        state = attack.init(wide(view, size), {k: v.flatten(0, 1) for k, v in start.items()})
        loss = next(iter(start.values())).new_full((len(state.status) // size, size), torch.inf)
        return wrapped(state, torch.zeros((), dtype=torch.int64), loss)

    def step(view: View, state: GroupState) -> tuple[GroupState, Info]:
        inner, members = flat(state)
        inner, info = attack.step(wide(view, members), inner)
        loss = info.loss.unflatten(0, (-1, members))
        state = wrapped(inner, state.taken + 1, torch.where(loss.isfinite(), loss, state.loss).to(state.loss))
        left = keep.get(int(state.taken), members)
        if left < members:
            state = best(state, left)
        return state, Info(state.loss.amin(1), state.status)

    def best(state: GroupState, left: int) -> GroupState:
        at = state.loss.sort(dim=1, stable=True).indices[:, :left].sort(1).values
        lane = torch.arange(len(at), device=at.device)[:, None]
        kept = tree.nested_map(lambda v: v[lane, at] if v.ndim else v, state.members)
        return GroupState(kept, outcome(kept.status), state.taken, state.loss[lane, at])

    def read(view: View, state: GroupState) -> Guess:
        inner, members = flat(state)
        guess = attack.read(wide(view, members), inner)
        best = guess.loss.unflatten(0, (-1, members)).nan_to_num(torch.inf).argmin(1)
        at = torch.arange(len(best), device=best.device) * members + best
        path = None if guess.path is None else guess.path[at]
        return Guess(guess.x[at], guess.labels[at], guess.loss[at], path)

    return Attack(
        draw, init, step, read, attack.steps, attack.applies, attack.papers, attack.prior, attack.restarts, closures
    )

"""What a message pins an update to: a point or an interval for every coordinate, and how far an update lies outside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak.attacks import ghost
from qleak.attacks.ghost import Cell, Split
from qleak.types import Layer, Tree


class Box(NamedTuple):
    """lo ≤ u ≤ hi with weight w per tensor or coordinate, stacked over lanes; without an entry it is 1."""

    lo: Tree
    hi: Tree
    weight: Tree


class Point(NamedTuple):
    """A box of no width: u = at. `splits` are the linear layers' messages as `ghost` wants them, where that pays."""

    at: Tree
    weight: Tree
    splits: dict[str, Split]

    @property
    def lo(self) -> Tree:
        """The point."""
        return self.at

    @property
    def hi(self) -> Tree:
        """The point."""
        return self.at


def with_splits(layers: Iterable[Layer], point: Point, b: int) -> Point:
    """The point with its linear layers' messages split for batches of b, where the factors are far fewer numbers."""
    linear = {f"{layer.name}.weight" for layer in layers if layer.kind == "linear"}
    even = {k for k in point.at if k not in point.weight or point.weight[k][0].numel() == 1}
    chosen = [k for k, v in point.at.items() if k in linear & even and ghost.pays(v, b)]
    return point._replace(splits={k: ghost.split(point.at[k], b) for k in chosen})


def is_point(goal: Box | Point) -> Tensor:
    """Whether a lane's box is one point, `[lane]`: numbers with an error, not cells."""
    return torch.stack([(goal.lo[k] == goal.hi[k]).flatten(1).all(1) for k in goal.lo]).all(0)


def outside(update: dict[str, Any], goal: Box | Point) -> dict[str, Any]:
    """The difference u − proj u: how far every coordinate lies outside the box; a ghost is that already."""
    if isinstance(goal, Point):
        return {k: u - goal.at[k] for k, u in update.items()}
    return {k: u if isinstance(u, tuple) else u - u.clamp(goal.lo[k], goal.hi[k]) for k, u in update.items()}


def cells(goal: Box) -> dict[str, Cell]:
    """The intervals of the tensors that have one weight."""
    return {k: Cell(goal.lo[k], goal.hi[k]) for k in goal.lo if k not in goal.weight or goal.weight[k][0].numel() == 1}


def pulled(error: dict[str, Any], weight: Tree) -> tuple[Tensor, dict[str, Any]]:
    """Σ w·e² of every lane, and w·e; an error may be a `(square, Ghost)`."""
    squares, pull = [], {}
    for k, e in error.items():
        w = weight.get(k)
        if isinstance(e, tuple):
            square, pull[k] = e[0], e[1] if w is None else e[1].times(w)
            squares.append(square if w is None else square * w.flatten())
        elif w is None:
            pull[k] = e
            squares.append(torch.linalg.vector_norm(e, dim=tuple(range(1, e.ndim))).square())
        else:
            pull[k] = e * w
            squares.append((e * pull[k]).flatten(1).sum(1))
    return torch.stack(squares).sum(0), pull

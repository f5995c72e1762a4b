"""What a server does to many rows: add them up, scale the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

from torch import Tensor

from qleak import tree
from qleak.catalog import factory
from qleak.check import Expected, at_least, one_of, whole
from qleak.types import Belief, Bound, Facts, Side, Stage, Tree

Adjacency = Literal["add-or-remove-one", "replace-one"]


@factory
def total(adjacency: str = "add-or-remove-one") -> Stage:
    """The sum over rows (examples, clients, teachers): a join.

    Rows of norm at most C give a sum of sensitivity C when neighbouring data sets differ by one
    row more or less, and 2C when one row is replaced, or what replacing it can change where that is less (√2 C of
    rows without negative entries).

    Args:
        adjacency: "add-or-remove-one" or "replace-one".
    """
    one_of(["add-or-remove-one", "replace-one"], adjacency=adjacency)
    factor = 1.0 if adjacency == "add-or-remove-one" else 2.0

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        return {k: v.sum(0) for k, v in x.items()}, {}, state

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        return Belief({k: v.sum(0) for k, v in belief.mean.items()}, {k: v.sum(0) for k, v in belief.var.items()})

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        if before.bound is None:
            return reset
        value = None if before.bound.value is None else factor * before.bound.value
        alone = before.sensitivity
        if adjacency == "replace-one" and alone and alone.value is not None and value is not None:
            same = alone.p == before.bound.p and alone.adjacency == adjacency
            value = min(value, alone.value) if same else value
        return replace(reset, sensitivity=Bound(before.bound.p, value, cast(Adjacency, adjacency)), peak=before.peak)

    return Stage("total", "join", send, push, fold=fold)


@factory
def scale(factor: float = 1.0) -> Stage:
    """X · factor; bounds and sensitivities scale with |factor|."""
    if not isinstance(factor, int | float) or factor == 0 or factor != factor:
        raise Expected(f"Expected factor={factor!r} to be a number other than 0.")

    def send(knobs: dict[str, Tensor], x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        return {k: v * knobs["factor"].to(v.dtype) for k, v in x.items()}, {}, state

    def push(knobs: dict[str, Tensor], belief: Belief, side: Side | None) -> Belief:
        return Belief(tree.scale(belief.mean, knobs["factor"]), tree.scale(belief.var, knobs["factor"].square()))

    def scaled(bound: Bound | None) -> Bound | None:
        return bound and replace(bound, value=None if bound.value is None else abs(factor) * bound.value)

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        peak = None if before.peak is None else abs(factor) * before.peak
        return replace(before, bound=scaled(before.bound), sensitivity=scaled(before.sensitivity), peak=peak)

    return Stage("scale", "value", send, push, fold=fold, knobs={"factor": float(factor)})


@factory
def mean(batch: int = 1) -> Stage:
    """X / batch with a fixed, public batch size: the mean behind `total()` (expected size under Poisson sampling)."""
    whole(batch=batch)
    at_least(1, batch=batch)
    return scale(1 / batch)

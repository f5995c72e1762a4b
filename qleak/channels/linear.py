"""Linear stages: a public matrix in front of the noise, another one behind it. Their operator norm is their price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak.types import Belief, Bound, Facts, Side, Stage, Tree


class Map(NamedTuple):
    """`down [d m]`: what is sent of a flat tensor; `up [m d]`: how it is lifted; `norm`: largest singular value of `down`."""

    down: Tensor
    up: Tensor
    norm: float


def operator_norm(down: Tensor) -> float:
    """Largest singular value of `[d m]`, from the smaller Gram matrix in float64, rounded up by 1e-12 of itself."""
    if not down.numel():
        return 0.0
    a = down.double()
    gram = a @ a.mT if a.shape[0] <= a.shape[1] else a.mT @ a
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()) * (1 + 1e-12)


def stretched(facts: Facts, before: Facts, norm: float | None) -> Facts:
    """`facts` with what a linear map of operator norm `norm` (None: not yet known) leaves of the bounds in front of it.

    Exact as a worst case: ‖xP‖₂ ≤ ‖P‖‖x‖₂ is attained along the first singular vector. An L1 bound is one in L2 too.
    Numbers behind noise mix it, and are read by their moments.
    """

    def times(bound: Bound | None) -> Bound | None:
        value = None if bound is None or bound.value is None or norm is None else norm * bound.value
        return bound and replace(bound, p=2, value=value)

    quiet = before.law == "none"
    return replace(
        facts, bound=times(before.bound), sensitivity=times(before.sensitivity), unbiased=False,
        law=before.law if quiet else "mixed", exact=before.exact and quiet,
    )  # fmt: skip


def linear(name: str, maps: Callable[[torch.Size], Map | None]) -> Stage:
    """A value stage that sends `x P` of every flat tensor, `[m]`, and lifts it back.

    Args:
        name: the stage's name.
        maps: the matrices of a tensor of that shape, None for tensors that are sent as they are. Must be cached, and
            draw nothing: it is called inside vmap.
    """

    def through(v: Tensor, at: Map | None, square: bool = False) -> Tensor:
        if at is None:
            return v
        down = at.down.to(v)
        return v.reshape(-1) @ (down.square() if square else down)

    def shape(like: Tree) -> Tree:
        found = {k: maps(v.shape) for k, v in like.items()}
        return {k: v if (at := found[k]) is None else v.new_empty(at.down.shape[1]) for k, v in like.items()}

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        return {k: through(v, maps(v.shape)) for k, v in x.items()}, {}, state

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        """Covariances are left out: every number sent has its own variance."""
        return Belief(
            {k: through(m, maps(m.shape)) for k, m in belief.mean.items()},
            {k: through(v, maps(v.shape), square=True) for k, v in belief.var.items()},
        )

    def lift(knobs: dict, y: Tree, like: Tree) -> Tree:
        found = {k: maps(v.shape) for k, v in like.items()}
        return {
            k: y[k] if (at := found[k]) is None else (y[k] @ at.up.to(y[k])).reshape(v.shape) for k, v in like.items()
        }

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        norm = None
        if like is not None:
            norm = max((1.0 if (at := maps(v.shape)) is None else at.norm for v in like.values()), default=1.0)
        return stretched(reset, before, norm)

    return Stage(name, "value", send, push, fold=fold, shape=shape, lift=lift)

"""Laplace noise whose ε is a label: it is sized by a sensitivity that nothing in front of it enforces."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from qleak.catalog import factory
from qleak.channels.noise import laplace
from qleak.check import Expected, positive
from qleak.types import Belief, Facts, Side, Stage, Tree

NAME = "nominal_laplace"


@factory
def nominal_laplace(eps: float = 1.0, sensitivity: float = 1.0, mean: float = 0.0, by_tensors: bool = False) -> Stage:
    """Adds mean + β·Laplace(1) with β = sensitivity/eps to every coordinate, and promises nothing.

    The mechanism of published code that adds Laplace noise to unclipped gradients: the L1 norm of an update has no
    bound there, so its eps is no ε, and none is reported. `laplace(eps=…)` behind `clip_l1(…)` is the one that has.

    Args:
        eps: the label.
        sensitivity: the L1 sensitivity that is assumed.
        mean: location of the noise, the same for every coordinate.
        by_tensors: divides β by √m, m the number of tensors of the update. Composed over m tensors of sensitivity 1
            each, noise would have to grow by m instead.
    """
    positive(eps=eps, sensitivity=sensitivity)
    if not isinstance(mean, int | float) or not math.isfinite(mean):
        raise Expected(f"Expected mean={mean!r} to be a finite number.")
    plain = laplace(scale=sensitivity / eps, unbounded=True)

    def sized(knobs: Mapping[str, Tensor], like: Tree) -> dict[str, Tensor]:
        return {"size": knobs["size"] / math.sqrt(len(like)) if by_tensors else knobs["size"]}

    def send(knobs: Mapping[str, Tensor], x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        y, side, state = plain.send(sized(knobs, x), x, noise, state)
        return {k: v + knobs["mean"].to(v.dtype) for k, v in y.items()}, side, state

    def push(knobs: Mapping[str, Tensor], belief: Belief, side: Side | None) -> Belief:
        at, var = plain.push(sized(knobs, belief.mean), belief, side)
        return Belief({k: v + knobs["mean"].to(v.dtype) for k, v in at.items()}, var)

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        folded = plain.fold(before, reset, like)
        return replace(folded, unbiased=folded.unbiased and mean == 0)

    knobs = {"size": sensitivity / eps, "mean": float(mean)}
    return replace(plain, name=NAME, send=send, push=push, fold=fold, knobs=knobs)


class Nominal(NamedTuple):
    """What a channel's `nominal_laplace` was told, read from its spec or label: eps is a label, never an ε."""

    eps: float = 1.0
    sensitivity: float = 1.0
    mean: float = 0.0
    by_tensors: bool = False

    def scale(self, tensors: int) -> float:
        """β of the noise on an update of so many tensors."""
        return self.sensitivity / self.eps / (math.sqrt(tensors) if self.by_tensors else 1.0)


def nominal(spec: str) -> Nominal | None:
    """The first `nominal_laplace` in a channel's spec or label, None without one."""
    nodes = [
        n for n in ast.walk(ast.parse(spec, mode="eval")) if NAME in (ast.unparse(n), ast.unparse(n).split("(")[0])
    ]
    given = [n for n in nodes if isinstance(n, ast.Call)]
    if given:
        return Nominal(**{str(k.arg): ast.literal_eval(k.value) for k in given[0].keywords})
    return Nominal() if nodes else None

"""Many starts, few of them to the end: successive halving inside one lane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from qleak.attacks.cells import cells
from qleak.attacks.group import grouped
from qleak.catalog import factory
from qleak.check import Expected, at_least, whole
from qleak.types import Attack

PAPER = "Jamieson, Talwalkar. Non-stochastic Best Arm Identification and Hyperparameter Optimization. AISTATS 2016."


@factory
def halving(
    attack: Attack | None = None, starts: int = 8, rungs: Sequence[int] = (30, 60, 90), keep: float = 0.5
) -> Attack:
    """`attack` (`cells()` by default) from several starts a lane; at every rung the share of lowest own loss goes on.

    Successive halving (Jamieson, Talwalkar 2016, algorithm 1) with rungs at given closures. It never looks at the truth,
    and a lane never at another lane: its starts are its own, the first of them that of `attack` itself.
    n starts cost n closures a step, which is what is counted: by default 8·30 + 4·30 + 2·30 + (steps − 90).

    Args:
        attack: what to run.
        starts: starts of one lane.
        rungs: steps after which starts are given up.
        keep: share that goes on, rounded up.
    """
    whole(starts=starts, **{f"rungs[{i}]": r for i, r in enumerate(rungs)})
    at_least(2, starts=starts)
    if not rungs or any(b <= a for a, b in zip((0, *rungs), rungs, strict=False)):
        raise Expected(f"Expected rungs={tuple(rungs)} to be rising numbers of steps >= 1.")
    at_least(0, keep=keep)
    if not 0 < keep < 1:
        raise Expected(f"Expected keep={keep:g} between 0 and 1.")
    inner = attack or cells()
    ladder, left = [], starts
    for rung in rungs:
        left = max(1, math.ceil(keep * left))
        ladder.append((rung, left))
    return replace(made := grouped(inner, starts, ladder), papers=(*made.papers, PAPER))

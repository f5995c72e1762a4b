"""The attack for a small budget of closures: a fine path of prior weights, as far as the budget goes."""

from __future__ import annotations

from qleak.attacks.cells import cells
from qleak.catalog import factory
from qleak.check import at_least, whole
from qleak.types import Attack

STAGES = 6


@factory
def quick(closures: int = 300, weight: float = 0.1, fade: float = 0.3) -> Attack:
    """`cells` in few closures: the prior fades by 0.3 in short stages, and a fine even grid is read as numbers.

    Two fifteenths of the budget go to each of the six weights 0.1·0.3ⁱ, the rest to the last stage. A strong first weight
    keeps the image out of noise; stages need no end of their own, since curvature pairs are kept and the next weight is
    near. Decoded numbers with an error of variance step²/12 ("graded", see `qleak.attacks.objectives`) are a smooth
    objective, where cells bend at every face. Given up are the last decibels: on an exact gradient `cells` goes on.

    Args:
        closures: of one lane, all stages together.
        weight: prior weight of the first stage.
        fade: factor from one stage to the next.
    """
    whole(closures=closures)
    at_least(30, closures=closures)
    steps = 2 * closures // 15
    return cells(weight, fade, STAGES, steps, closures - STAGES * steps, objective="graded")

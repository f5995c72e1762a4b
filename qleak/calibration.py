"""The other way round: how much noise, or how many releases, a budget ε allows.

Both searches run over whole numbers (of σ's last digit, of releases) and end between two neighbours,
one within the budget and one beyond it, so that the answer never overspends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from qleak import check
from qleak.accounting import both, event, upper
from qleak.check import Expected

_LEAST, _MOST = 0.01, 1e9  # noise multipliers that are looked at


def calibrate(
    mechanism: str, target_epsilon: float, rate: float | str = 1, steps: int = 1, delta: float = 1e-5
) -> float:
    """The smallest noise multiplier whose reported ε stays within the target, to four digits.

    ε falls in σ. RDP (and pure ε), which cost little, bracket σ from above; the reported ε (with
    the PLD) is then searched below it. The σ returned fits, one unit of its last digit less does
    not; ε itself is known to 0.1 %, and never too small.

    Args:
        mechanism: "gaussian" or "laplace".
        target_epsilon: ε > 0 that must not be exceeded.
        rate: Poisson sampling rate, see `accounting.event`.
        steps: number of releases.
        delta: δ in [0, 1]; 0 only with Laplace noise.

    Returns:
        σ >= 0.01 with `epsilon(event(mechanism, σ, rate), delta, steps) <= target_epsilon`.

    Raises:
        Expected: an argument out of range, or a target that noise multipliers up to 10⁹ do not reach.
    """
    check.positive(target_epsilon=target_epsilon)
    check.between(0, 1, delta=delta)
    if delta == 0 and mechanism == "gaussian":
        raise Expected("Expected delta=0 > 0 with gaussian noise: only laplace noise has a pure ε.")

    def excess(sigma: float, quick: bool = False) -> float:
        return _excess((upper if quick else both)(event(mechanism, sigma, rate), delta, steps).reported, target_epsilon)

    high = 1.0
    while excess(high, quick=True) > 0:
        if high >= _MOST:
            raise Expected(
                f"Expected target_epsilon={target_epsilon:g} within reach of noise multipliers <= {_MOST:g}."
            )
        high *= 8
    low = high / 8
    while excess(low, quick=True) <= 0 and low > _LEAST:
        low, high = max(low / 8, _LEAST), low
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if excess(middle, quick=True) <= 0 else (middle, high)

    unit = 10.0 ** (math.floor(math.log10(high)) - 4)  # one digit to spare, as the answer may be ten times smaller

    def at(k: int) -> float:
        return float(f"{k * unit:.10g}")

    fits, least, step = math.ceil(high / unit), math.ceil(_LEAST / unit), 0.8
    while fits > least:
        below = max(math.floor(fits * step), least)
        over = excess(at(below))
        if over > 0:
            # −k rises while σ falls: the last of the numbers that fit is the smallest σ.
            return at(-_last(lambda k: excess(at(-k)), -fits, -below, over))
        fits, step = below, step * step
    return at(fits)


def steps_within(event: Any, target_epsilon: float, delta: float = 1e-5, at_most: int = 1_000_000) -> int:
    """The largest number of releases whose reported ε stays within the target: where to stop *before* it is spent.

    Args:
        event: the privacy event of one release.
        target_epsilon: ε > 0 that must not be exceeded.
        delta: δ in [0, 1].
        at_most: the number of releases that is planned.

    Returns:
        T in [0, at_most] with `epsilon(event, delta, T) <= target_epsilon`; 0 if one release is too many.

    Raises:
        Expected: an argument out of range, no event, or one that no accountant can compose.
    """
    check.positive(target_epsilon=target_epsilon)
    check.whole(at_most=at_most)
    check.at_least(1, at_most=at_most)
    if event is None:
        raise Expected("Expected a privacy event: without a mechanism there is no ε to stay within.")

    def excess(steps: int) -> float:
        return _excess(both(event, delta, steps).reported, target_epsilon)

    over = excess(at_most)
    if over <= 0:
        return at_most
    fits = _last(lambda n: _excess(upper(event, delta, n).reported, target_epsilon), 0, at_most, over)
    if fits == 0 and (at_most == 1 or excess(1) > 0):
        return 0
    return _last(excess, max(fits, 1), at_most, over)


def _excess(epsilon: float | None, target: float) -> float:
    """ln(ε/target): > 0 beyond the budget."""
    assert epsilon is not None
    return math.log(epsilon / target) if epsilon > 0 else -math.inf


def _last(excess: Callable[[int], float], fits: int, beyond: int, over: float) -> int:
    """The last whole number with excess <= 0, between `fits` (known to) and `beyond` (known not to).

    False position with the Illinois rule (an end that stays is weighted by half each time), which
    takes about half the evaluations of bisection; bisection while an end has no finite value.
    """
    under, stayed = -math.inf, 0
    while beyond - fits > 1:
        share = under / (under - over) if math.isfinite(under) and math.isfinite(over) else 0.5
        guess = min(max(fits + round(share * (beyond - fits)), fits + 1), beyond - 1)
        found = excess(guess)
        if found <= 0:
            over = over / 2 if stayed > 0 else over
            fits, under, stayed = guess, found, 1
        else:
            under = under / 2 if stayed < 0 else under
            beyond, over, stayed = guess, found, -1
    return fits

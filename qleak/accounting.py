"""ε of what was actually run: the privacy event a channel carries, composed by dp-accounting.

Two accountants look at the same event, and both give upper bounds: Rényi DP, which never fails but
is loose, and privacy loss distributions (PLD), tight when their grid is fine. The smaller one holds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qleak import check
from qleak.check import Expected

_TAIL = 10.0  # dp-accounting cuts Gaussian tails at mass e⁻⁵⁰: ten standard deviations


def epsilon(event: Any, delta: float = 1e-5, steps: int = 1) -> float | None:
    """Smallest ε that can be shown for (ε, δ)-differential privacy of `steps` releases of `event`.

    min(pure, RDP, PLD). The PLD grid starts at ε/4000 per cell and is refined four times a pass
    until a pass changes ε by less than 0.1 % (its error shrinks with the square of the cell), or
    until 40,000 cells cover the losses of one release or 100,000 cover ε, which bounds the time to
    about a second. Every grid rounds losses up: a coarse ε is too large, never false.

    Both accountants are told *add-or-remove-one*: an event's noise multiplier is noise divided by
    the sensitivity of the adjacency that the channel declared (2C for replace-one), and an
    accountant that is told replace-one would double it a second time.

    Args:
        event: a `dp_accounting.DpEvent`, or None for a release without a guarantee.
        delta: δ in [0, 1]; 0 asks for pure ε, which only Laplace noise has.
        steps: number of releases, each free to depend on what the earlier ones gave.

    Returns:
        ε >= 0; `math.inf` when the event bounds nothing at this δ; None ("no guarantee") without event.

    Raises:
        Expected: δ or steps out of range, or an event that neither accountant can compose.

    Sources: Mironov 2017 (RDP); Canonne, Kamath, Steinke 2020 (its conversion); Koskela, Jälkö,
    Honkela 2020 and Doroshenko et al. 2022 (PLD, "connect the dots").
    """
    check.between(0, 1, delta=delta)
    check.whole(steps=steps)
    check.at_least(1, steps=steps)
    if event is None:
        return None

    from dp_accounting import SelfComposedDpEvent, rdp  # lazy: two seconds with scipy.signal

    composed = SelfComposedDpEvent(event, steps)
    accountant = rdp.RdpAccountant()
    best = _loss(composed, math.inf)
    if accountant.supports(composed):
        with _quiet():
            best = min(best, float(accountant.compose(composed).get_epsilon(delta)))
    elif math.isinf(_loss(event, _TAIL)):
        raise Expected(f"Expected an event of Gaussian or Laplace noise, Poisson-sampled or not, got {event}.")
    # At δ = 0 the PLD has nothing to add: it counts the tails it cuts as lost.
    if delta == 0 or math.isinf(best) or math.isinf(_loss(event, _TAIL)):
        return best
    return min(best, _pld(composed, delta, best / 4000, max(_loss(event, _TAIL) / 40_000, best / 100_000)))


def _pld(composed: Any, delta: float, cell: float, finest: float) -> float:
    """ε from privacy loss distributions on grids refined from `cell` until it settles, or to `finest`."""
    from dp_accounting import pld

    found = math.inf
    while True:
        cell = max(cell, finest)
        before, accountant = found, pld.PLDAccountant(value_discretization_interval=cell)
        found = float(accountant.compose(composed).get_epsilon(delta))
        if found >= 0.999 * before or cell == finest:
            return min(found, before)
        cell /= 4


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps one harmless line off the terminal: RDP leaves out an order whose series does not converge.

    ε is a minimum over orders, so leaving some out makes it larger, never false.
    """

    def other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("_compute_log_a_frac failed to converge")

    logger = logging.getLogger("absl")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _loss(event: Any, tail: float) -> float:
    """The largest privacy loss of `event`, Gaussian noise cut at `tail` standard deviations.

    With `tail` = inf this is pure ε: 1/b for Laplace noise of scale b (sensitivity 1), ∞ for
    Gaussian; ln(1 + q(e^ε − 1)) under Poisson sampling; sums under composition.
    """
    import dp_accounting as dp

    match event:
        case dp.NoOpDpEvent():
            return 0.0
        case dp.LaplaceDpEvent(noise_multiplier=b):
            return 1 / b if b > 0 else math.inf
        case dp.GaussianDpEvent(noise_multiplier=sigma):
            return tail / sigma + 1 / (2 * sigma**2) if sigma > 0 else math.inf
        case dp.PoissonSampledDpEvent(sampling_probability=q, event=inner):
            loss = _loss(inner, tail)
            # Beyond e⁷⁰⁰ the 1 − q is nothing beside q·e^loss, and expm1 would overflow.
            return 0.0 if q == 0 else math.log1p(q * math.expm1(loss)) if loss < 700 else loss + math.log(q)
        case dp.SelfComposedDpEvent(event=inner, count=count):
            return count * _loss(inner, tail)
        case dp.ComposedDpEvent(events=events):
            return math.fsum(_loss(inner, tail) for inner in events)
    return math.inf

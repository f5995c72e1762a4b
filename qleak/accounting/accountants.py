"""ε of what was actually run: the privacy event a channel carries, composed by dp-accounting.

Two accountants look at the same event, and both give upper bounds: Rényi DP, which never fails but
is loose, and privacy loss distributions (PLD), tight when their grid is fine. The smaller one holds.
Gaussian releases without sampling need neither: together they are one Gaussian, whose ε is exact.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

from qleak import check
from qleak.accounting.gaussian import exact_epsilon, gaussian_mu
from qleak.check import Expected

MECHANISMS = ("gaussian", "laplace")
ADJACENCY = "add-or-remove-one"  # what both accountants are told; see `both`

_SENSELESS = 10_000.0  # an ε that promises nothing: the PLD would make it no better, and exponentiates its cells
_TAIL = 10.0  # dp-accounting cuts Gaussian tails at mass e⁻⁵⁰: ten standard deviations
_CLAIMED_ORDERS = (*(1 + i / 10 for i in range(1, 100)), *range(12, 64), 128, 256, 512)


class Epsilons(NamedTuple):
    """ε by each accountant, None where it does not apply, and the one to report: the smallest.

    Attributes:
        rdp: Rényi DP; None at δ = 0 and for events it cannot compose (sampled Laplace noise).
        pld: privacy loss distributions; None at δ = 0 and where the loss is not bounded.
        pure: ε at δ = 0; None for Gaussian noise, which has none.
        reported: min of the others; `math.inf` when nothing bounds it; None without an event.
        exact: the least true ε of a composition of Gaussian releases without sampling; None of any other, and at δ = 0.
    """

    rdp: float | None
    pld: float | None
    pure: float | None
    reported: float | None
    exact: float | None = None


def epsilon(event: Any, delta: float = 1e-5, steps: int = 1) -> float | None:
    """Smallest ε that can be shown for (ε, δ)-differential privacy of `steps` releases of `event`.

    `both(event, delta, steps).reported`, which see for arguments, errors and sources.

    Returns:
        ε >= 0; `math.inf` when the event bounds nothing at this δ; None ("no guarantee") without event.
    """
    return both(event, delta, steps).reported


def both(event: Any, delta: float = 1e-5, steps: int = 1) -> Epsilons:
    """ε of `steps` releases of `event` by each accountant; min(exact, pure, RDP, PLD) is the one to report.

    Where ε is exact no PLD is made: it could only be larger.

    The PLD grid starts at ε/4000 per cell and is refined four times a pass until a pass changes ε by
    less than 0.1 % (its error shrinks with the square of the cell), or until 40,000 cells cover the
    losses of one release or 100,000 cover ε, which bounds the time to about a second. Every grid
    rounds losses up: a coarse ε is too large, never false.

    Both accountants are told *add-or-remove-one*: an event's noise multiplier is noise divided by
    the sensitivity of the adjacency that the channel declared (2C for replace-one), and an
    accountant that is told replace-one would double it a second time.

    Args:
        event: a `dp_accounting.DpEvent`, or None for a release without a guarantee.
        delta: δ in [0, 1]; 0 asks for pure ε, which only Laplace noise has.
        steps: number of releases, each free to depend on what the earlier ones gave.

    Raises:
        Expected: δ or steps out of range, or an event that neither accountant can compose.

    Sources: Mironov 2017 (RDP); Canonne, Kamath, Steinke 2020 (its conversion); Koskela, Jälkö,
    Honkela 2020 and Doroshenko et al. 2022 (PLD, "connect the dots").
    """
    quick = upper(event, delta, steps)
    # At δ = 0 the PLD has nothing to add: it counts the tails it cuts as lost.
    if event is None or delta == 0 or quick.exact is not None or quick.reported is None or quick.reported > _SENSELESS:
        return quick

    from dp_accounting import SelfComposedDpEvent, pld

    composed = SelfComposedDpEvent(event, steps)
    one = max((_loss(part, _TAIL) for part in _releases(event)), default=0.0)
    if math.isinf(one) or not pld.PLDAccountant().supports(composed):
        return quick
    try:
        found = _pld(composed, delta, quick.reported / 4000, max(one / 40_000, quick.reported / 100_000))
    except OverflowError:  # sampled noise so small that e to its loss is no number: the other bound stays true
        return quick
    return quick._replace(pld=found, reported=min(found, quick.reported))


def upper(event: Any, delta: float = 1e-5, steps: int = 1) -> Epsilons:
    """`both` without the PLD: min(exact, pure, RDP), true but for sampled noise loose, in a twentieth of a second."""
    check.between(0, 1, delta=delta)
    check.whole(steps=steps)
    check.at_least(1, steps=steps)
    if event is None:
        return Epsilons(None, None, None, None)

    from dp_accounting import SelfComposedDpEvent, pld, rdp  # lazy: two seconds with scipy.signal

    composed = SelfComposedDpEvent(event, steps)
    accountant = rdp.RdpAccountant()
    pure = _loss(composed, math.inf)
    by_rdp = None
    if accountant.supports(composed):
        if delta > 0:
            with _quiet():
                by_rdp = float(accountant.compose(composed).get_epsilon(delta))
    elif math.isinf(_loss(event, _TAIL)) or not pld.PLDAccountant().supports(composed):
        raise Expected(f"Expected an event of Gaussian or Laplace noise, Poisson-sampled or not, got {event}.")
    mu = gaussian_mu(composed)
    exact = None if mu is None or delta == 0 else exact_epsilon(mu, delta)
    best = min(v for v in (pure, by_rdp, exact) if v is not None)
    return Epsilons(by_rdp, None, None if math.isinf(pure) else pure, best, exact)


def event(mechanism: str, sigma: float, rate: float | str = 1) -> Any:
    """The privacy event of one release, by name.

    Args:
        mechanism: "gaussian" or "laplace".
        sigma: noise multiplier: standard deviation / L2 sensitivity, or Laplace scale / L1 sensitivity.
        rate: probability of every example to take part (Poisson sampling), a number or "32/60000";
            1 means that all of them do.

    Raises:
        Expected: another mechanism, σ <= 0, or a rate outside (0, 1].
    """
    if mechanism not in MECHANISMS:
        raise Expected(
            f"Expected mechanism={mechanism!r} to be one of: {', '.join(MECHANISMS)} (noise on what is released, behind "
            "a bounded sensitivity); anything else earns no ε."
        )
    check.positive(sigma=sigma)
    share = as_rate(rate)

    import dp_accounting as dp

    inner = dp.GaussianDpEvent(sigma) if mechanism == "gaussian" else dp.LaplaceDpEvent(sigma)
    return inner if share == 1 else dp.PoissonSampledDpEvent(float(share), inner)


def as_rate(rate: float | str | Fraction) -> Fraction:
    """A sampling rate in (0, 1], exactly as it is written: 0.01, "0.01" or "32/60000"."""
    try:
        share = Fraction(str(rate))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if isinstance(rate, bool) or not 0 < share <= 1:
        raise Expected(f"Expected rate={rate!r} in (0, 1]: a number, or a fraction such as 32/60000.")
    return share


def claimed(sigma: float, rate: float | str, steps: int, delta: float = 1e-5) -> float:
    """ε of `steps` sampled Gaussian releases as DP-SGD code before PLD printed it: RDP of orders up to 512.

    The orders are 1.1, 1.2, … 10.9, 12, 13, … 63, 128, 256, 512. An upper bound like `both`'s, but
    looser: more so the smaller ε is, where the best order lies far above 512. It is here to put
    published curves beside one's own, and says nothing of whether the published training added
    the noise that it counts.

    Args:
        sigma: noise multiplier.
        rate: Poisson sampling rate, see `event`.
        steps: number of releases.
        delta: δ in (0, 1].

    Raises:
        Expected: an argument out of range.

    Source: the orders of TensorFlow Privacy's `compute_dp_sgd_privacy`, as used by published code for
    arXiv 2006.10919.
    """
    check.positive(delta=delta)
    check.between(0, 1, delta=delta)
    check.whole(steps=steps)
    check.at_least(1, steps=steps)
    one = event("gaussian", sigma, rate)

    from dp_accounting import rdp

    with _quiet():
        return float(rdp.RdpAccountant(_CLAIMED_ORDERS).compose(one, steps).get_epsilon(delta))


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


def _releases(event: Any) -> Iterator[Any]:
    """The single releases that a composition is made of, each kind once."""
    import dp_accounting as dp

    match event:
        case dp.SelfComposedDpEvent(event=inner):
            yield from _releases(inner)
        case dp.ComposedDpEvent(events=events):
            for inner in events:
                yield from _releases(inner)
        case _:
            yield event

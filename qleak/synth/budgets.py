"""How many votes a budget allows, or how loud they must be: settled from the channel's facts before a record is seen."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from qleak import accounting
from qleak.channels import Channel
from qleak.check import Expected
from qleak.synth import basis, original, vote
from qleak.types import Spend

DIGITS = 6  # of a calibrated σ, rounded up: never too little noise


def one_release(channel: Channel) -> None:
    """Checks that a channel sums teachers once, as replace-one.

    Raises:
        Expected: it does not.
    """
    joins = [s for s in channel.stages if s.kind == "join"]
    if len(joins) != 1 or "replace-one" not in joins[0].spec:
        raise Expected(
            f"Expected one total('replace-one') over teachers in {channel.spec}: each holds some records for good."
        )


def enough(n: int, teachers: int) -> None:
    """Checks that every teacher gets a record.

    Raises:
        Expected: there are more teachers than records.
    """
    if teachers > n:
        raise Expected(
            f"Expected teachers_batch · batch_teachers = {teachers} <= {n}, the number of records: "
            "take fewer teachers, or more records (limit)."
        )


def settle(
    channel: Channel,
    d: int,
    releases: int,
    most: int,
    target: float,
    delta: float,
    rule: str = "exact",
    orders: int = 200,
    calibrate: bool = False,
    first: tuple[Any, ...] = (),
    widths: Callable[[int], int] | None = None,
) -> Spend:
    """Steps, events and noise of `releases` images a step.

    Args:
        channel: what each image goes through.
        d: coordinates of an image, or of the basis it is sent in.
        releases: images of a step, each a release of its own.
        most: steps, if the budget allows.
        target: ε that is not passed.
        delta: its δ.
        rule: "exact", "original" (stops by the published rule), or "data-dependent" (stops elsewhere).
        orders: of the published accountant.
        calibrate: σ follows from the budget: `most` steps spend all of it.
        first: the events of what is released before the first step.
        widths: coordinates at step t, where they grow.

    Raises:
        Expected: noise that the budget does not allow a single step of, or a calibration that cannot be made.
    """
    sigma = given = vote.sigma(channel)
    width = widths or (lambda t: d)

    @functools.cache
    def one(coordinates: int) -> Any:
        return channel.facts({"x": torch.zeros(coordinates)}).event

    if one(d) is None:
        return Spend(most, lambda t: None, lambda t: None, 0.0, "no noise, no budget: every epoch", target, delta)
    if calibrate:
        sigma *= _louder(one, width, releases, most, target, delta, first, sigma)
        found = _calibrated(one, sigma / given)
    else:
        found = one

    def event(t: int) -> Any:
        return _composed(
            first, [(found(width(i)), releases) for i in range(t)] if widths else [(found(d), releases * t)]
        )

    def claimed(t: int) -> float | None:
        return original.claimed_gaussian(t * releases, _multiplier(found(d)), delta, orders)

    if rule == "data-dependent":
        return Spend(most, lambda t: None, claimed, sigma, "until the data-dependent bound is spent", target, delta)
    if calibrate:
        return Spend(most, event, claimed, sigma, f"σ = {sigma:g} spends ε = {target:g} in {most} steps", target, delta)

    def fits(t: int) -> bool:
        if rule == "original":
            return (claimed(t) or 0.0) <= target
        return _epsilon(event(t), delta) <= target

    steps = most if fits(most) else _last(fits, most)
    if not steps:
        raise Expected(
            f"Expected target_epsilon={target:g} >= {_epsilon(event(1), delta):.3g}, what one step of {releases} images costs: "
            "raise sigma, or take fewer coordinates or images."
        )
    by = "by the published rule" if rule == "original" else "exactly"
    why = f"ε = {target:g} is spent then, {by}" if steps < most else "all epochs fit"
    return Spend(steps, event, claimed, sigma, why, target, delta)


def basis_event(sigma: float) -> Any:
    """The event of `basis.pca`."""
    return accounting.event("gaussian", sigma / basis.SENSITIVITY)


def _composed(first: tuple[Any, ...], parts: list[tuple[Any, int]]) -> Any:
    """`first`, then every event so many times."""
    from dp_accounting import ComposedDpEvent, SelfComposedDpEvent

    found = [SelfComposedDpEvent(event, count) for event, count in parts if count]
    every = [*first, *found]
    return every[0] if len(every) == 1 else ComposedDpEvent(every)


def _epsilon(event: Any, delta: float) -> float:
    found = accounting.epsilon(event, delta)
    assert found is not None
    return found


def _multiplier(event: Any) -> float:
    """The noise multiplier of one Gaussian release, or of several at once: (Σ 1/σᵢ²)^−½."""
    mu = accounting.gaussian_mu(event)
    if mu is None:
        raise Expected(f"Expected Gaussian noise alone, got {event}.")
    return 1 / mu


def _louder(
    one: Callable[[int], Any],
    width: Callable[[int], int],
    releases: int,
    most: int,
    target: float,
    delta: float,
    first: tuple[Any, ...],
    sigma: float,
) -> float:
    """What σ must be multiplied by, so that all steps and `first` together have μ = μ(target, δ)."""
    allowed = accounting.mu_of(target, delta) ** 2
    spent = sum(1 / _multiplier(event) ** 2 for event in first)
    if spent >= allowed:
        raise Expected(
            f"Expected target_epsilon={target:g} above what is released before the first step: raise pca_sigma."
        )
    asked = sum(releases / _multiplier(one(width(i))) ** 2 for i in range(most))
    factor = math.sqrt(asked / (allowed - spent))
    scale = 10.0 ** (math.floor(math.log10(sigma * factor)) - DIGITS)
    return math.ceil(sigma * factor / scale) * scale / sigma


def _calibrated(one: Callable[[int], Any], factor: float) -> Callable[[int], Any]:
    return lambda d: accounting.event("gaussian", factor * _multiplier(one(d)))


def _last(fits: Callable[[int], bool], beyond: int) -> int:
    """The last whole number that fits, below one that does not; 0 if 1 does not."""
    low = 0
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if fits(middle) else (low, middle)
    return low

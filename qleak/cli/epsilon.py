"""`qleak epsilon`: what a mechanism costs, or how much noise a budget asks for."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Annotated, Any

import typer

from qleak.errors import Expected

ASSUMED = "Poisson sampling: every example takes part in every step by its own coin of probability `rate`"
WARNING = "shuffled or with-replacement batches are not covered by these numbers"


def epsilon(
    mechanism: Annotated[str, typer.Option(help="gaussian or laplace.")] = "gaussian",
    sigma: Annotated[float | None, typer.Option(help="Noise multiplier: noise scale / sensitivity.")] = None,
    target_epsilon: Annotated[float | None, typer.Option(help="Find the noise multiplier for this ε instead.")] = None,
    rate: Annotated[str, typer.Option(help="Sampling rate: a number, or batch/examples such as 32/60000.")] = "1",
    steps: Annotated[int | None, typer.Option(help="Number of releases.")] = None,
    epochs: Annotated[float | None, typer.Option(help="In place of --steps: epochs/rate of them, rounded up.")] = None,
    delta: Annotated[float, typer.Option(help="δ.")] = 1e-5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """ε of a noisy release repeated, by two accountants; or the noise that a target ε asks for."""
    found = accounted(mechanism, sigma, target_epsilon, rate, steps, epochs, delta)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=80)
    sampled = found["rate"] < 1
    console.print(f"{mechanism} noise, multiplier σ = {found['sigma']:g}", markup=False)
    if target_epsilon is not None:
        console.print(f"  the smallest with ε <= {target_epsilon:g}", markup=False)
    as_number = "" if rate == f"{found['rate']:.6g}" else f" = {found['rate']:.6g}"
    epochs_ = f" = {found['epochs']:.6g} epochs" if sampled else ""
    console.print(f"rate {rate}{as_number} · {found['steps']} steps{epochs_} · δ = {delta:g}", markup=False)
    console.print(f"adjacency: {found['adjacency']}\n", markup=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("accountant", no_wrap=True)
    table.add_column("ε", justify="right", no_wrap=True)
    for title, key in (("pure", "pure"), ("RDP", "rdp"), ("PLD", "pld"), ("exact", "exact"), ("to report", "epsilon")):
        if key != "exact" or found[key] is not None:
            table.add_row(title, rounded_up(found[key]))
    console.print(table)
    console.print("\nEach is an upper bound, rounded up; the smallest holds.", markup=False)
    if sampled:
        console.print(f"Assumed: {ASSUMED}.\nWarning: {WARNING}.", markup=False)


def accounted(
    mechanism: str,
    sigma: float | None,
    target_epsilon: float | None,
    rate: str,
    steps: int | None,
    epochs: float | None,
    delta: float,
) -> dict[str, Any]:
    """What is printed: the setting in numbers, ε by each accountant, what was assumed.

    Raises:
        Expected: both or neither of σ and a target, of steps and epochs; a value out of range; a
            mechanism that earns no ε.
    """
    from qleak.accounting import ADJACENCY, as_rate, both, event
    from qleak.calibration import calibrate

    if (sigma is None) == (target_epsilon is None):
        raise Expected("Expected one of --sigma and --target-epsilon.")
    event(mechanism, 1.0 if sigma is None else sigma, rate)  # refuses what can be refused before the work
    share = as_rate(rate)
    steps = _steps(steps, epochs, share)
    if sigma is None:
        assert target_epsilon is not None
        sigma = calibrate(mechanism, target_epsilon, rate, steps, delta)
    found = both(event(mechanism, sigma, rate), delta, steps)
    if found.reported is None or math.isinf(found.reported):
        raise Expected(f"Expected delta={delta:g} > 0 with {mechanism} noise: only laplace noise has a pure ε.")
    asked = {} if target_epsilon is None else {"target_epsilon": target_epsilon}
    return {
        "mechanism": mechanism, "sigma": sigma, **asked, "rate": float(share), "steps": steps,
        "epochs": float(steps * share), "delta": delta, "adjacency": ADJACENCY,
        "pure": found.pure, "rdp": found.rdp, "pld": found.pld, "exact": found.exact, "epsilon": found.reported,
        "assumed": [ASSUMED, WARNING] if share < 1 else [],
    }  # fmt: skip


def rounded_up(value: float | None, digits: int = 5) -> str:
    """ε to so many digits, never below itself: a bound that is rounded down is none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    unit = Fraction(10) ** (math.floor(math.log10(value)) + 1 - digits)
    up = float(math.ceil(Fraction(repr(value)) / unit) * unit)  # of the digits as written: 0.1 is 1/10
    return f"{up:.{digits}g}"


def _steps(steps: int | None, epochs: float | None, rate: Fraction) -> int:
    from qleak.check import at_least, positive

    if (steps is None) == (epochs is None):
        raise Expected("Expected one of --steps and --epochs.")
    if steps is not None:
        at_least(1, steps=steps)
        return steps
    positive(epochs=epochs)
    return math.ceil(Fraction(str(epochs)) / rate)

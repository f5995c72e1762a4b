"""Budgets: the noise and the releases they allow, the ledger, and `qleak epsilon`."""

import json
import math
from unittest.mock import Mock

import pytest

from qleak import accounting, calibration, ledger
from qleak.accounting import both, epsilon, event
from qleak.calibration import calibrate, steps_within
from qleak.check import Expected
from qleak.cli.epsilon import ASSUMED, WARNING, rounded_up
from qleak.ledger import Entry, Ledger, record, record_event, spent

dp = pytest.importorskip("dp_accounting")

# --- noise of a budget -------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigma_of_a_training_run():
    """ε = 1 at q = 32/60000, T = 18750: .67309 by PLD on a coarser grid, where RDP asks for .84787."""
    assert epsilon(event("gaussian", 0.67309 * 1.01, "32/60000"), 1e-5, 18750) <= 1
    assert epsilon(event("gaussian", 0.67309 * 0.99, "32/60000"), 1e-5, 18750) > 1


@pytest.mark.evidence
def test_sigma_of_a_training_run_is_found():
    sigma = calibrate("gaussian", 1.0, "32/60000", 18750)
    assert sigma == pytest.approx(0.67309, rel=0.01)
    assert epsilon(event("gaussian", sigma, "32/60000"), 1e-5, 18750) <= 1


@pytest.mark.parametrize(("mechanism", "target", "rate", "steps", "delta"), [
    ("gaussian", 8.0, 1, 1, 1e-5), pytest.param("gaussian", 0.1, "256/60000", 14062, 1e-5, marks=pytest.mark.slow),
    ("laplace", 1.0, 1, 1000, 1e-5), ("laplace", 0.3, 0.01, 500, 1e-5), ("laplace", 2.0, 0.1, 7, 0),
])  # fmt: skip
def test_sigma_fits_and_less_does_not(mechanism, target, rate, steps, delta):
    sigma = calibrate(mechanism, target, rate, steps, delta)
    assert epsilon(event(mechanism, sigma, rate), delta, steps) <= target
    assert epsilon(event(mechanism, sigma * (1 - 1.1e-4), rate), delta, steps) > target
    assert float(f"{sigma:.5g}") == sigma


def test_sigma_in_closed_form():
    """One Laplace release costs 1/b; T cost T/b at δ = 0."""
    assert calibrate("laplace", 1.0, delta=0) == 1.0
    assert calibrate("laplace", 0.5, steps=3, delta=0) == 6.0
    assert (
        calibrate("laplace", 3.0, delta=0) == pytest.approx(1 / 3, abs=1e-5)
        and calibrate("laplace", 3.0, delta=0) > 1 / 3
    )


@pytest.mark.slow
def test_sigma_where_hardly_anything_is_sampled():
    """An example that takes part with probability below δ needs no noise: the least that is looked at."""
    assert calibrate("gaussian", 1.0, 1e-7) == 0.01


@pytest.mark.parametrize(("wrong", "message"), [
    ({"target_epsilon": 0}, "target_epsilon=0 > 0"), ({"target_epsilon": math.inf}, "target_epsilon=inf > 0"),
    ({"delta": 0}, "only laplace noise has a pure ε"), ({"delta": 2}, r"delta=2 in \[0, 1\]"), ({"steps": 0}, "steps=0"),
    ({"mechanism": "none"}, "earns no ε"), ({"rate": 0}, "rate=0 in"),
    ({"mechanism": "laplace", "delta": 0, "target_epsilon": 1e-12}, "within reach"),
])  # fmt: skip
def test_no_sigma(wrong, message):
    with pytest.raises(Expected, match=message):
        calibrate(**{"mechanism": "gaussian", "target_epsilon": 1.0} | wrong)


# --- releases of a budget ----------------------------------------------------------------------------


@pytest.mark.parametrize(("privacy", "target", "at_most"), [
    pytest.param(event("gaussian", 4.0, 0.01), 0.5, 10000, marks=pytest.mark.slow),
    (event("gaussian", 10.0, "32/60000"), 0.019, 18750),
    (event("laplace", 30.0), 1.0, 938), (dp.SelfComposedDpEvent(event("gaussian", 9.0), 3), 3.0, 40),
])  # fmt: skip
def test_the_last_release_that_fits(privacy, target, at_most):
    steps = steps_within(privacy, target, 1e-5, at_most)
    assert 1 < steps < at_most
    assert epsilon(privacy, 1e-5, steps) <= target < epsilon(privacy, 1e-5, steps + 1)


def test_releases_at_the_ends():
    assert steps_within(event("laplace", 2.0), 5.0, delta=0, at_most=100) == 10
    assert steps_within(event("laplace", 2.0), 5.0, delta=0, at_most=10) == 10
    assert steps_within(event("laplace", 2.0), 5.0, delta=0, at_most=9) == 9
    assert steps_within(event("laplace", 2.0), 0.5, delta=0, at_most=9) == 1
    for at_most in (1, 9):
        assert steps_within(event("laplace", 2.0), 0.49, delta=0, at_most=at_most) == 0
    assert steps_within(event("gaussian", 1.0), 5.0, delta=0, at_most=9) == 0  # ε is infinite
    for wrong, message in (
        ({"target_epsilon": 0}, "target_epsilon=0 > 0"), ({"at_most": 0}, "at_most=0 >= 1"),
        ({"event": None}, "Expected a privacy event"), ({"delta": -1}, "delta=-1"),
    ):  # fmt: skip
        with pytest.raises(Expected, match=message):
            steps_within(**{"event": event("laplace", 2.0), "target_epsilon": 1.0} | wrong)


def test_the_search_ends_between_neighbours_in_few_looks():
    """On curves of the two shapes that ε has (√T, then T), with a jump, and with values that are not finite."""
    curves = (
        lambda n: 0.5 * math.log(n / 777), lambda n: math.log(n / 777) if n > 100 else -math.inf,
        lambda n: math.inf if n > 777 else -1e-4, lambda n: math.log(n / 777) + 0.05 * (n > 777),
    )  # fmt: skip
    for curve in curves:
        look = Mock(side_effect=curve)
        assert calibration._last(look, 1, 18750, curve(18750)) == 777
        assert look.call_count <= 15


# --- the ledger --------------------------------------------------------------------------------------


def test_a_ledger_survives_json_and_costs_what_its_releases_cost():
    one = Entry("gaussian", 10.0, 32 / 60000, 10000)
    book = record(record(Ledger(), one), one._replace(releases=8750))
    assert book.entries == (one._replace(releases=18750),)
    again = ledger.from_json(ledger.to_json(book))
    assert again == book
    assert spent(again) == both(event("gaussian", 10.0, "32/60000"), 1e-5, 18750)
    more = record(again, Entry("laplace", 20.0, 1.0, 1))
    assert len(more.entries) == 2
    alone, laplace = spent(again).reported, epsilon(event("laplace", 20.0))
    assert max(alone, laplace) < spent(more).reported < alone + laplace
    assert spent(Ledger()).reported == 0


def test_a_ledger_reads_the_events_that_channels_carry():
    sampled = event("laplace", 3.0, 0.1)
    book = record_event(Ledger(), dp.SelfComposedDpEvent(sampled, 4), releases=5, unit="client")
    assert book.entries == (Entry("laplace", 3.0, 0.1, 20, unit="client"),)
    both_kinds = record_event(Ledger(), dp.ComposedDpEvent([event("gaussian", 2.0), sampled]), 2)
    assert [(e.mechanism, e.rate, e.releases) for e in both_kinds.entries] == [
        ("gaussian", 1.0, 2),
        ("laplace", 0.1, 2),
    ]
    for other in (None, dp.NonPrivateDpEvent(), dp.PoissonSampledDpEvent(0.1, dp.SelfComposedDpEvent(sampled, 2))):
        with pytest.raises(Expected, match="Expected an event of Gaussian or Laplace noise"):
            record_event(Ledger(), other)


@pytest.mark.parametrize(("change", "message"), [
    ({"mechanism": "weight-noise"}, "earns no ε"), ({"sigma": 0.0}, "sigma=0.0"), ({"rate": 2.0}, "rate=2.0"),
    ({"releases": 0}, "releases=0 >= 1"), ({"releases": 1.5}, "releases=1.5"), ({"adjacency": "none"}, "adjacency='none'"),
    ({"unit": ""}, "unit=''"), ({"unit": "client"}, "one adjacency and unit a ledger"),
    ({"adjacency": "replace-one"}, "one adjacency and unit a ledger"),
])  # fmt: skip
def test_a_ledger_refuses(change, message):
    good = Entry("gaussian", 1.0, 0.5, 3)
    bad = good._replace(**change)
    with pytest.raises(Expected, match=message):
        record(Ledger((good,)), bad)
    text = ledger.to_json(Ledger((good, bad)))
    with pytest.raises(Expected, match=message):
        ledger.from_json(text)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2, "entries": []}', '{"schema": 1, "entries": [{"a": 1}]}']
)
def test_text_that_is_no_ledger(text):
    with pytest.raises(Expected, match="Expected a ledger"):
        ledger.from_json(text)


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def qleak(qleak):
    """`qleak epsilon …`."""
    return lambda *argv: qleak("epsilon", *argv)


MNIST = ("--mechanism", "gaussian", "--sigma", "10", "--rate", "32/60000", "--delta", "1e-5")


def test_the_table(qleak):
    code, out, _ = qleak(*MNIST, "--steps", 18750)
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    rows = {line.rsplit(maxsplit=1)[0]: line.rsplit(maxsplit=1)[1] for line in out.splitlines()[5:9]}
    assert rows == {"pure": "–", "RDP": "0.022127", "PLD": "0.019239", "to report": "0.019239"}
    for said in ("σ = 10", "rate 32/60000 = 0.000533333", "18750 steps = 10 epochs", "δ = 1e-05", "add-or-remove-one"):
        assert said in out
    flat = " ".join(out.split())
    assert ASSUMED in flat and WARNING in flat


def test_no_assumption_on_sampling_without_sampling(qleak):
    code, out, _ = qleak("--sigma", 1, "--steps", 1)
    assert code == 0 and "4.3772" in out and "4.7286" in out  # rounded up: 4.37718, 4.72851
    assert "Poisson" not in out and "epochs" not in out


def test_epochs_in_place_of_steps(qleak):
    by_epochs, by_steps = (json.loads(qleak(*MNIST, *n, "--json")[1]) for n in (("--epochs", 10), ("--steps", 18750)))
    assert by_epochs == by_steps
    assert by_steps["pld"] == by_steps["epsilon"] == pytest.approx(0.01924, rel=1e-3)
    assert by_steps["rdp"] == pytest.approx(0.0221267, rel=1e-5) and by_steps["pure"] is None
    assert (by_steps["rate"], by_steps["epochs"], by_steps["adjacency"]) == (32 / 60000, 10, accounting.ADJACENCY)
    # In floating point 0.9/(3/50) is 15.000000000000002, and would be rounded up.
    for epochs, rate, steps in ((0.9, "3/50", 15), (0.3, "0.1", 3), (1, "3/10", 4), (0.001, "1", 1)):
        pure = ("--mechanism", "laplace", "--sigma", 1, "--delta", 0)
        found = json.loads(qleak(*pure, "--epochs", epochs, "--rate", rate, "--json")[1])
        assert found["steps"] == steps


def test_target_epsilon(qleak):
    code, out, _ = qleak("--mechanism", "laplace", "--target-epsilon", 0.5, "--steps", 3, "--delta", 0)
    assert code == 0 and "σ = 6\n" in out and "smallest with ε <= 0.5" in out
    asked = ("--mechanism", "laplace", "--target-epsilon", 8, "--steps", 1, "--json")
    found = json.loads(qleak(*asked)[1])
    assert found["target_epsilon"] == 8 and found["sigma"] == calibrate("laplace", 8.0)
    assert 7.99 < found["epsilon"] <= 8


@pytest.mark.parametrize(("argv", "line"), [
    (("--mechanism", "weight-noise", "--sigma", 1, "--steps", 1), "Expected mechanism='weight-noise' to be one of: gaussian"),
    (("--mechanism", "none", "--sigma", 1, "--steps", 1), "Expected mechanism='none' to be one of: gaussian, laplace"),
    (("--sigma", 1), "Expected one of --steps and --epochs."),
    (("--sigma", 1, "--steps", 1, "--epochs", 1), "Expected one of --steps and --epochs."),
    (("--steps", 1), "Expected one of --sigma and --target-epsilon."),
    (("--sigma", 1, "--target-epsilon", 1, "--steps", 1), "Expected one of --sigma and --target-epsilon."),
    (("--sigma", 0, "--steps", 1), "Expected sigma=0.0 > 0."),
    (("--sigma", 1, "--steps", 0), "Expected steps=0 >= 1."),
    (("--sigma", 1, "--epochs", 0), "Expected epochs=0.0 > 0."),
    (("--sigma", 1, "--epochs", "nan"), "Expected epochs=nan > 0."),
    (("--sigma", 1, "--steps", 1, "--rate", "60000/32"), "Expected rate='60000/32' in (0, 1]"),
    (("--sigma", 1, "--steps", 1, "--delta", 0), "Expected delta=0 > 0 with gaussian noise"),
    (("--sigma", 1, "--steps", 1, "--delta", 3), "Expected delta=3.0 in [0, 1]."),
    (("--target-epsilon", -1, "--steps", 1), "Expected target_epsilon=-1.0 > 0."),
])  # fmt: skip
def test_one_line_and_exit_code_two(qleak, argv, line):
    code, out, err = qleak(*argv)
    assert (code, out) == (2, "") and err.startswith(f"qleak: {line}") and err.count("\n") == 1


def test_a_bound_is_never_rounded_down():
    assert [rounded_up(v) for v in (None, 0.0, 1.0, 0.1, 12345.61)] == ["–", "0", "1", "0.1", "12346"]
    for value in (1 / 3, 0.0221266628, 4.377178, 2e-7 / 3, 99999.5, 1e5 / 7):
        assert value <= float(rounded_up(value)) < value * (1 + 1.01e-4)

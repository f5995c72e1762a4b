"""ε against closed forms, published settings and a second library."""

import math
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import qleak
from qleak.accounting import epsilon
from qleak.check import Expected

dp = pytest.importorskip("dp_accounting")


def gaussian(sigma, q=None):
    event = dp.GaussianDpEvent(sigma)
    return event if q is None else dp.PoissonSampledDpEvent(q, event)


def analytic_delta(sigma, eps):
    """Balle, Wang 2018, theorem 5: δ(ε) = Φ(1/2σ − εσ) − e^ε·Φ(−1/2σ − εσ), sensitivity 1."""
    phi = statistics.NormalDist().cdf
    return phi(1 / (2 * sigma) - eps * sigma) - math.exp(eps) * phi(-1 / (2 * sigma) - eps * sigma)


def pld(event, delta, steps, cell):
    accountant = dp.pld.PLDAccountant(value_discretization_interval=cell)
    return accountant.compose(dp.SelfComposedDpEvent(event, steps)).get_epsilon(delta)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 10.0])
def test_one_gaussian_release_is_the_closed_form(sigma):
    eps = epsilon(gaussian(sigma))
    assert analytic_delta(sigma, eps) == pytest.approx(1e-5, rel=2e-3)
    assert analytic_delta(sigma, 0.99 * eps) > 1e-5  # a smaller ε would be false


def test_gaussian_golden_value():
    assert epsilon(gaussian(1.0)) == pytest.approx(4.37718, abs=1e-5)


def test_gaussian_composition_is_less_noise():
    """T releases at σ are one at σ/√T."""
    assert epsilon(gaussian(8.0), steps=16) == pytest.approx(epsilon(gaussian(2.0)), rel=1e-3)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "expected"),
    [
        (32 / 60000, 1.0, 18750, 0.33401),  # PLD with cells of 1e-5; RDP says .6746
        (0.01, 4.0, 10000, 0.94691),  # the setting of Abadi et al. 2016, who prove 1.26; RDP says 1.0355
        (32 / 60000, 10.0, 18750, 0.01924),  # dp-accounting's default grid says .0249, more than RDP's .0221
    ],
)
def test_sampled_gaussian_golden_values(q, sigma, steps, expected):
    assert epsilon(gaussian(sigma, q), steps=steps) == pytest.approx(expected, abs=1e-3 * max(expected, 0.02) / 0.33401)


def test_default_grid_would_fail_where_ours_does_not():
    event = gaussian(10.0, 32 / 60000)
    assert pld(event, 1e-5, 18750, 1e-4) > 1.25 * epsilon(event, steps=18750)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 20.0])
def test_pure_laplace(scale):
    assert epsilon(dp.LaplaceDpEvent(scale), delta=0) == 1 / scale
    assert epsilon(dp.LaplaceDpEvent(scale), delta=0, steps=7) == pytest.approx(7 / scale)
    one = epsilon(dp.LaplaceDpEvent(scale))
    # A single Laplace release: δ(ε) = 1 − e^((ε − 1/b)/2), Dong, Roth, Su 2022, section 2.
    assert one == pytest.approx(1 / scale + 2 * math.log1p(-1e-5), rel=1e-4)


def test_laplace_composes_better_than_by_adding():
    """Many Laplace reports; the golden value is PLD with cells of 1e-5. Loss ±1 needs cells far below ε/1000."""
    eps = epsilon(dp.LaplaceDpEvent(1.0), steps=938)
    assert eps == pytest.approx(448.0476, rel=1e-3)
    assert epsilon(dp.LaplaceDpEvent(1.0), delta=0, steps=938) == 938


def test_sampled_laplace_pure():
    """Li, Qardaji, Su 2012: ln(1 + q(e^ε − 1))."""
    event = dp.PoissonSampledDpEvent(0.1, dp.LaplaceDpEvent(1.0))
    assert epsilon(event, delta=0) == pytest.approx(math.log(1 + 0.1 * (math.e - 1)))
    assert 0 < epsilon(event) < epsilon(event, delta=0)


def test_a_mixed_composition_lies_between_its_parts_and_their_sum():
    parts = [gaussian(3.0), dp.LaplaceDpEvent(2.0)]
    both = epsilon(dp.ComposedDpEvent(parts))
    assert max(map(epsilon, parts)) < both < sum(map(epsilon, parts))


def test_more_steps_more_epsilon_and_more_delta_less():
    event = gaussian(4.0, 0.01)
    by_steps = [epsilon(event, steps=n) for n in (1, 30, 1000)]
    assert by_steps == sorted(by_steps)
    assert epsilon(event, delta=1e-3, steps=30) < by_steps[1] < epsilon(event, delta=1e-8, steps=30)


def test_replace_one_is_told_by_the_event_alone():
    """A multiplier of σ/2 (sensitivity 2C) gives what the accountants call replace-one of multiplier σ, once."""
    twice = dp.pld.PLDAccountant(dp.NeighboringRelation.REPLACE_ONE)
    theirs = twice.compose(dp.GaussianDpEvent(2.0)).get_epsilon(1e-5)
    assert epsilon(gaussian(1.0)) == pytest.approx(theirs, rel=1e-3)


def test_no_guarantee_and_no_bound():
    assert epsilon(None) is None
    assert epsilon(gaussian(0.0)) == math.inf
    assert epsilon(gaussian(1.0), delta=0) == math.inf
    assert epsilon(dp.NonPrivateDpEvent()) == math.inf
    assert epsilon(dp.NoOpDpEvent(), steps=3) == 0
    assert epsilon(gaussian(1e6)) == 0
    assert epsilon(gaussian(1.0, 0.0), steps=10) == 0


@pytest.mark.parametrize("wrong", [{"delta": -0.1}, {"delta": 2}, {"delta": math.nan}, {"steps": 0}, {"steps": 1.5}])
def test_wrong_arguments(wrong):
    with pytest.raises(Expected):
        epsilon(gaussian(1.0), **wrong)


def test_an_event_nobody_can_compose():
    event = dp.SampledWithReplacementDpEvent(100, 10, dp.GaussianDpEvent(1.0))
    with pytest.raises(
        Expected, match="Expected an event of Gaussian or Laplace noise, Poisson-sampled or not, got Samp"
    ):
        epsilon(event)


def test_quiet_where_rdp_leaves_orders_out(caplog):
    """The line is really there without our filter, and other lines pass through it."""
    event = gaussian(1.0, 0.5)
    dp.rdp.RdpAccountant().compose(event)
    assert "failed to converge" in caplog.text
    caplog.clear()
    assert 0 < epsilon(event, steps=10) < 30
    assert caplog.text == ""


def test_second_opinion_of_opacus():
    """Opacus' RDP, an upper bound like ours, and its orders end at 63: never below, close where they suffice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns about its own dependencies
        rdp = pytest.importorskip("opacus.accountants.analysis.rdp")
    orders = [1 + i / 10 for i in range(1, 100)] + list(range(12, 64))
    spent = rdp.compute_rdp(q=0.01, noise_multiplier=4.0, steps=10000, orders=orders)
    theirs, _ = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=1e-5)
    ours = epsilon(gaussian(4.0, 0.01), steps=10000)
    assert ours <= theirs <= 1.1 * ours


def test_dp_accounting_is_imported_only_when_needed():
    code = "import sys, qleak.accounting as a; a.epsilon(None); sys.exit('dp_accounting' in sys.modules)"
    root = Path(next(iter(qleak.__path__))).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0

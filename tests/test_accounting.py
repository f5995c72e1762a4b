"""ε against closed forms, published settings and a second library."""

import functools
import math
import statistics
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import pytest

import qleak
from qleak.accounting import (
    Epsilons,
    as_rate,
    both,
    claimed,
    epsilon,
    event,
    exact_epsilon,
    gaussian_mu,
    mu_of,
    upper,
)
from qleak.calibration import steps_within
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


# q, σ, T at δ = 1e-5: RDP of orders up to 1024, PLD on cells of 1e-5 to 1e-6 (both dp-accounting 0.6).
VECTORS = [
    (32 / 60000, 10.0, 18750, 0.0221267, 0.01924),  # dp-accounting's default grid says .0249, more than RDP
    (32 / 60000, 5.0, 18750, 0.0475064, 0.04201),
    (32 / 60000, 1.0, 18750, 0.674564, 0.33401),
    (32 / 50000, 1.0, 31250, 0.782034, 0.53487),
    (0.01, 4.0, 10000, 1.03549, 0.94691),  # the setting of Abadi et al. 2016, who prove 1.26
    (256 / 60000, 1.1, 14062, 2.59656, 2.38160),  # TensorFlow Privacy's tutorial
    (1, 1.0, 1, 4.72851, 4.37718),  # one Gaussian release, which is exact
    (64 / 6000, 1.0, 940, 2.18205, 1.90302),
]
found = functools.lru_cache(maxsize=None)(lambda q, sigma, steps: both(event("gaussian", sigma, q), 1e-5, steps))


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "rdp", "pld"),
    [pytest.param(*v, marks=[pytest.mark.slow] if i in (3, 5) else []) for i, v in enumerate(VECTORS)],
)
def test_vectors(q, sigma, steps, rdp, pld):
    eps = found(q, sigma, steps)
    assert eps.rdp == pytest.approx(rdp, rel=1e-5)
    tight = eps.pld if eps.exact is None else eps.exact
    assert (eps.exact is None) == (eps.pld is not None) == (q != 1)
    assert tight == pytest.approx(pld, rel=2e-3)
    assert eps.pure is None and eps.reported == tight == min(eps.rdp, tight)


@pytest.mark.parametrize(("sigma", "q", "steps", "eps"), [
    (10, "32/60000", 1875, "0.00974"), (10, "32/60000", 18750, "0.02213"),
    (5, "32/60000", 1875, "0.02229"), (5, "32/60000", 18750, "0.04751"),
    (1, "32/60000", 1875, "0.6109"), (1, "32/60000", 18750, "0.6746"),
    (5, "32/50000", 31250, "0.0781"), (3, "32/50000", 31250, "0.1418"), (1, "32/50000", 31250, "0.7820"),
])  # fmt: skip
def test_claimed_is_what_published_curves_are_drawn_over(sigma, q, steps, eps):
    """First and last epochs of published figures, to the digits that they can be read to."""
    assert f"{claimed(sigma, q, steps):.{len(eps) - 2}f}" == eps


def test_claimed_lacks_the_high_orders_that_a_small_epsilon_needs():
    assert claimed(10, "32/60000", 1875) > 1.5 * upper(event("gaussian", 10, "32/60000"), 1e-5, 1875).reported
    for wrong in ({"delta": 0}, {"steps": 0}, {"sigma": 0}, {"rate": 1.5}):
        with pytest.raises(Expected):
            claimed(**{"sigma": 1.0, "rate": 0.01, "steps": 1} | wrong)


def test_events_by_name():
    assert event("gaussian", 2.0) == dp.GaussianDpEvent(2.0)
    assert event("laplace", 2.0, "32/60000") == dp.PoissonSampledDpEvent(32 / 60000, dp.LaplaceDpEvent(2.0))
    assert event("gaussian", 2.0, "1") == event("gaussian", 2.0, 1.0) == dp.GaussianDpEvent(2.0)
    assert as_rate("32/60000") == Fraction(1, 1875) and as_rate(0.1) == Fraction(1, 10)
    for name in ("none", "weight-noise", "Gaussian"):
        with pytest.raises(Expected, match=f"Expected mechanism='{name}' to be one of: gaussian, laplace .* no ε"):
            event(name, 1.0)
    for rate in (0, 1.01, -0.5, "a/b", "1/0", "nan", True, math.inf):
        with pytest.raises(Expected, match="Expected rate="):
            event("gaussian", 1.0, rate)
    for sigma in (0, -1.0, math.nan, math.inf):
        with pytest.raises(Expected, match="Expected sigma="):
            event("gaussian", sigma)


def test_what_does_not_apply_is_none():
    assert both(None) == Epsilons(None, None, None, None)
    assert both(event("laplace", 2.0), delta=0) == Epsilons(None, None, 0.5, 0.5)
    sampled = both(event("laplace", 2.0, 0.1), steps=10)
    assert sampled.rdp is None and 0 < sampled.reported == sampled.pld < sampled.pure
    quick = upper(event("gaussian", 1.0, 0.5))
    assert quick.pld is None and quick.exact is None and quick.reported == quick.rdp > 0
    assert upper(event("gaussian", 1.0), delta=0) == Epsilons(None, None, None, math.inf)


def test_a_composition_is_as_fine_as_its_releases():
    """18,750 releases inside one event: a grid chosen for their summed losses would be useless."""
    inside = dp.SelfComposedDpEvent(gaussian(10.0, 32 / 60000), 18750)
    assert both(dp.ComposedDpEvent([inside])) == both(inside) == found(32 / 60000, 10.0, 18750)
    assert epsilon(dp.ComposedDpEvent([])) == 0


def test_several_releases_of_one_sample_have_rdp_alone():
    """Poisson-sampled once, noised three times: a Gaussian of σ/√3, which only RDP composes as written."""
    eps = both(dp.PoissonSampledDpEvent(0.1, dp.SelfComposedDpEvent(dp.GaussianDpEvent(2.0), 3)))
    assert eps.pld is None and eps.reported == pytest.approx(both(gaussian(2 / 3**0.5, 0.1)).rdp)


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


@pytest.fixture(scope="module")
def opacus():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns about its own dependencies
        return pytest.importorskip("opacus.accountants")


@pytest.mark.parametrize(("q", "sigma", "steps"), [v[:3] for v in VECTORS[2:]])
def test_rdp_of_opacus_is_ours(opacus, q, sigma, steps):
    """Its orders end at 63, which suffices where ε is not small."""
    accountant = opacus.RDPAccountant()
    accountant.history = [(sigma, q, steps)]
    assert accountant.get_epsilon(1e-5) == pytest.approx(upper(event("gaussian", sigma, q), 1e-5, steps).rdp, rel=1e-4)


def slow(q, sigma, steps):
    """Marked where PRV takes several seconds: thousands of steps."""
    return pytest.param(q, sigma, steps, marks=[pytest.mark.slow] if steps > 1000 else [])


@pytest.mark.parametrize(("q", "sigma", "steps"), [slow(*v[:3]) for v in VECTORS])
def test_prv_of_opacus_encloses_ours(opacus, q, sigma, steps):
    """Gopi, Lee, Wutschitz 2021 bound ε from both sides; a smaller one than their lower bound would be false."""
    accountant = opacus.PRVAccountant()
    accountant.history = [(sigma, q, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # log(0) in its tails
        low, _, high = accountant._get_dprv(1e-3, 1e-8).compute_epsilon(1e-5, 1e-8, 1e-3)
    assert low <= found(q, sigma, steps).reported <= high
    assert high - low < 4e-3


def test_dp_accounting_is_imported_only_when_needed():
    code = "import sys, qleak.accounting as a; a.epsilon(None); sys.exit('dp_accounting' in sys.modules)"
    root = Path(next(iter(qleak.__path__))).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# --- Gaussian noise without sampling: exact ------------------------------------------------------------


VOTES = dp.SelfComposedDpEvent(dp.GaussianDpEvent(5000 / (2 * math.sqrt(200))), 15)
"""DataLens on Fashion-MNIST at ε = 1: 15 images a step, the top 200 of 784 signs, σ = 5000."""


def test_exact_golden_values():
    eps = both(VOTES, 1e-5, 86)
    assert eps.exact == eps.reported == pytest.approx(0.738125, abs=1e-6) and eps.pld is None
    assert eps.rdp == pytest.approx(0.80807, abs=1e-5)
    assert epsilon(VOTES, steps=149) <= 1 < epsilon(VOTES, steps=150)
    assert steps_within(VOTES, 1.0) == 149
    assert upper(VOTES, steps=127).rdp <= 1 < upper(VOTES, steps=128).rdp  # what RDP alone would allow


@pytest.mark.parametrize("delta", [1e-10, 1e-5, 0.01])
@pytest.mark.parametrize("mu", [1e-5, 1e-3, 0.1, 1.0, 10.0, 100.0])
def test_exact_is_the_library_s_own_function(mu, delta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it takes the logarithm of 0 on its way
        want = dp.gaussian_mechanism.get_epsilon_gaussian(1 / mu, delta)
    assert exact_epsilon(mu, delta) == pytest.approx(want, rel=1e-10, abs=1e-11)


def test_mixed_gaussians_are_one_gaussian():
    """μ² adds up over an adaptive composition; a fine PLD of the parts, which rounds up, comes within 0.1 %."""
    parts = [gaussian(4.0), dp.SelfComposedDpEvent(gaussian(8.0), 3), dp.NoOpDpEvent()]
    mixed = dp.ComposedDpEvent(parts)
    assert gaussian_mu(mixed) == pytest.approx(math.sqrt(1 / 16 + 3 / 64))
    exact = both(mixed, 1e-5, 4).exact
    assert exact <= pld(mixed, 1e-5, 4, 1e-4) <= 1.001 * exact
    for other in (gaussian(4.0, 0.5), dp.LaplaceDpEvent(1.0), dp.ComposedDpEvent([gaussian(4.0), gaussian(4.0, 0.5)])):
        assert gaussian_mu(other) is None and upper(other).exact is None


@pytest.mark.parametrize(("eps", "mu"), [(1.0, 0.26805), (10.0, 2.00045)])
def test_mu_of_golden_values(eps, mu):
    assert mu_of(eps, 1e-5) == pytest.approx(mu, abs=6e-6)


@pytest.mark.parametrize("delta", [1e-8, 1e-5, 1e-2])
@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.2, 1.0, 10.0, 300.0])
def test_mu_of_is_the_largest_that_fits(eps, delta):
    mu = mu_of(eps, delta)
    assert exact_epsilon(mu, delta) <= eps < exact_epsilon(mu * (1 + 1e-9), delta)
    assert mu == pytest.approx(1 / dp.gaussian_mechanism.get_sigma_gaussian(eps, delta), rel=1e-9)


def test_mu_of_refuses_what_is_no_budget():
    for eps, delta in ((-1.0, 1e-5), (math.inf, 1e-5), (1.0, 0), (1.0, 1)):
        with pytest.raises(Expected):
            mu_of(eps, delta)

"""Private moments: bounds on what a record does, the budget, what is found without noise, and what samples may see."""

import math

import pytest
import torch

from qleak import random
from qleak.accounting import gaussian_mu, mu_of, upper
from qleak.catalog import build
from qleak.check import Expected
from qleak.synth import moments, shapes
from qleak.types.models import Dataset
from qleak.types.synthesis import Public

SIDE, CLASSES, N = 8, 3, 3000
PUBLIC = Public(N, (1, SIDE, SIDE), CLASSES)
SMALL = (
    "class_moments(rank=6, components=3, rounds=2, gain=1.0, clips=(1.0, 1.0, 1.0, 1.0), tilt=0.0, bend=0.0, tries=1)"
)


def records(seed=0):
    """Low-rank Gaussian images around class means, well inside [0, 1]."""
    gen = random.generator(seed, "records")
    y = random.permutation(gen, N) % CLASSES
    waves = moments.cosines(SIDE, SIDE, 3).float()
    means = 0.5 + 0.1 * random.normal(gen, (CLASSES, 9)) @ waves
    spread = 0.1 * random.normal(gen, (CLASSES, 9, 9)) / 3
    z = torch.einsum("nij,nj->ni", spread[y], random.normal(gen, (N, 9)))
    return Dataset((means[y] + z @ waves).clamp(0, 1).view(N, 1, SIDE, SIDE), y, "waves", CLASSES)


def run(method, data, epsilon, seed=0, steps=None):
    spend = method.spend(PUBLIC, epsilon, 1e-5)
    state = method.init(data, spend, seed)
    for t in range(spend.steps if steps is None else steps):
        state = method.step(data, spend, state, t)
    return spend, state


def gap(query, seed=0, d=5, cells=3, signed=True):
    """The largest distance between a query of neighbours: random ones, and those that the proofs name."""
    gen, found = random.generator(seed, "gap"), []
    for k in range(60):
        x, cell = 4 * random.normal(gen, (4, d)), random.integers(gen, cells, (4,))
        x = x if signed else x.abs()
        other, label = x.clone(), cell.clone()
        other[0] = 4 * random.normal(gen, (d,))
        other[0] = other[0] if signed else other[0].abs()
        label[0] = random.integers(gen, cells, ()) if k % 2 else cell[0]
        found.append((x, cell, other, label))
    for move in (False, True):
        for target in (torch.eye(d)[1], -torch.eye(d)[0] if signed else torch.eye(d)[0]):
            x, cell = torch.zeros(4, d), torch.zeros(4, dtype=torch.long)
            x[0, 0] = 9.0
            other, label = x.clone(), cell.clone()
            other[0], label[0] = 9 * target, int(move)
            found.append((x, cell, other, label))
    return max(float((query(x, c) - query(a, b)).norm()) for x, c, a, b in found)


@pytest.mark.parametrize(
    ("query", "reach", "signed"),
    [
        (lambda x, c: moments.sums(x, c, 3, 1.7), moments.sum_reach(1.7), False),
        (lambda x, c: moments.sums(x, c, 3, 1.7, 1.0), moments.sum_reach(1.7, 1.0, signed=True), True),
        (lambda x, c: moments.second(x, c, 3, 1.7), moments.second_reach(1.7), True),
        (lambda x, c: moments.second(x, torch.zeros_like(c), 1, 1.7), moments.second_reach(1.7), True),
    ],
)
def test_sensitivities_are_bounds_and_are_attained(query, reach, signed):
    found = gap(query, signed=signed)
    assert found <= reach * (1 + 1e-12)
    assert found == pytest.approx(reach, rel=1e-9)


def test_the_bound_for_pixels_is_false_for_offsets():
    assert gap(lambda x, c: moments.sums(x, c, 3, 1.7)) > moments.sum_reach(1.7) * 1.3


def test_symmetric_noise_is_white_in_the_frobenius_norm():
    draws = moments.symmetric(random.generator(0), (4000, 4, 4))
    assert torch.equal(draws, draws.transpose(1, 2))
    direction = random.normal(random.generator(1), (4, 4))
    direction = direction + direction.T
    along = (draws * direction).sum((1, 2)) / direction.norm()
    assert float(along.std()) == pytest.approx(1, abs=0.05)
    corner = torch.zeros(4, 4)
    corner[0, 1] = corner[1, 0] = 1 / math.sqrt(2)
    assert float((draws * corner).sum((1, 2)).std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("target", [0.2, 1.0, 10.0])
@pytest.mark.parametrize("rounds", [0, 3])
def test_the_budget_is_spent_and_not_passed(target, rounds):
    spend = build("synthesizers", f"class_moments(rounds={rounds})").spend(PUBLIC, target, 1e-5)
    assert spend.steps == 3 + rounds
    found = upper(spend.event(spend.steps), 1e-5).reported
    assert target - 1e-6 < found <= target
    spent = [gaussian_mu(spend.event(t)) or 0.0 for t in range(spend.steps + 1)]
    assert spent == sorted(spent)
    assert spent[0] == 0


def test_noise_of_every_query_is_what_its_event_says():
    """Released minus noiseless, over many seeds, in units of Δ: the multiplier of that query."""
    data, method = records(), build("synthesizers", SMALL)
    spend = method.spend(PUBLIC, 1.0, 1e-5)
    bound = math.sqrt(SIDE * SIDE)
    found = []
    for seed in range(40):
        state = method.step(data, spend, method.init(data, spend, seed), 0)
        found.append(state.counts - torch.bincount(data.y).float())
    unit = moments.sum_reach(bound) / (moments.COUNT * bound)
    wanted = spend.event(1).events[0].noise_multiplier
    assert float(torch.stack(found).std()) / unit == pytest.approx(wanted, rel=0.2)


def test_without_noise_it_finds_the_moments():
    data, method = records(), build("synthesizers", SMALL.replace("rounds=2", "rounds=0").replace("rank=6", "rank=9"))
    _, state = run(method, data, 1e6)
    y = torch.arange(6000) % CLASSES
    fake = method.sample(PUBLIC, method.released(state), y, 1).flatten(1)
    for c in range(CLASSES):
        true, made = data.x[data.y == c].flatten(1), fake[y == c]
        assert (true.mean(0) - made.mean(0)).abs().max() < 0.02
        assert (torch.cov(true.T) - torch.cov(made.T)).norm() < 0.1 * torch.cov(true.T).norm()
    wrong = torch.cov(data.x[data.y == 0].flatten(1).T) - torch.cov(fake[y == 1].T)
    assert wrong.norm() > 0.3 * torch.cov(fake[y == 1].T).norm(), "classes differ, so the test can fail"


def test_rounds_find_components_that_one_gaussian_misses():
    gen = random.generator(4, "two")
    data = records()
    waves = moments.cosines(SIDE, SIDE, 2).float()
    corners = torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]])[random.integers(gen, 3, (N,))]
    z = torch.cat([torch.zeros(N, 1), corners, torch.zeros(N, 1)], 1)
    data = Dataset((0.5 + z @ waves).clamp(0, 1).view(N, 1, SIDE, SIDE) + 0.0, data.y, "corners", CLASSES)

    def off(spec):
        method = build("synthesizers", spec)
        _, state = run(method, data, 1e6)
        fake = method.sample(PUBLIC, method.released(state), torch.arange(300) % CLASSES, 0)
        return float(torch.cdist(fake.flatten(1), data.x.flatten(1)).min(1).values.mean())

    assert off(SMALL.replace("rank=6", "rank=2")) < 0.3 * off(
        SMALL.replace("rank=6", "rank=2").replace("rounds=2", "rounds=0")
    )


@pytest.mark.parametrize(("mean", "deviation"), [(0.1, 0.25), (0.5, 0.45), (0.9, 0.1), (0.01, 0.05)])
def test_saturated_pixels_have_the_moments_asked_for(mean, deviation):
    a, b = shapes.saturated(torch.tensor([mean]), torch.tensor([deviation**2]))
    draws = random.normal(random.generator(0), (400_000,)).double()
    made = (a + b * draws).clamp(0, 1)
    assert float(made.mean()) == pytest.approx(mean, abs=4 * deviation / math.sqrt(len(draws)) + 1e-4)
    assert float(made.std()) == pytest.approx(deviation, rel=0.03)
    if (mean, deviation) == (0.1, 0.25):
        assert float((mean + deviation * draws).clamp(0, 1).mean()) > 0.14, "plain clipping moves the mean"


def test_warping_is_the_identity_at_zero_and_moves_colours_together():
    x = random.uniform(random.generator(0), (20, 1, 9, 8)).expand(20, 3, 9, 8)
    assert torch.allclose(shapes.warped(x, random.generator(1), 0.0, 0.0), x, atol=1e-5)
    for tilt, bend in ((0.2, 0.0), (0.0, 1.0)):
        made = shapes.warped(x, random.generator(1), tilt, bend)
        assert torch.allclose(made[:, 0], made[:, 2])
        assert (made - x).abs().mean() > 0.05


def test_the_likeliest_class_is_the_discriminants_of_full_densities():
    gen = random.generator(3)
    means, root = random.normal(gen, (3, 4)), random.normal(gen, (3, 4, 4))
    basis = torch.linalg.qr(random.normal(gen, (4, 4))).Q
    x = 3 * random.normal(gen, (500, 4))
    density = [
        torch.distributions.MultivariateNormal(m, basis.T @ (f @ f.T + 0.1 * torch.eye(4)) @ basis).log_prob(x)
        for m, f in zip(means, root, strict=True)
    ]
    found = shapes.likeliest(x, means, basis, root, 0.1)
    assert (found == torch.stack(density, 1).argmax(1)).float().mean() > 0.99
    assert (found == torch.cdist(x, means).argmin(1)).float().mean() < 0.9, "not the nearest mean"


def test_draws_that_the_moments_call_another_class_are_drawn_anew():
    data = records()
    share = {}
    for tries in (1, 20):
        method = build("synthesizers", SMALL.replace("tries=1", f"tries={tries}").replace("gain=1.0", "gain=3.0"))
        _, state = run(method, data, 1e6)
        y = torch.arange(300) % CLASSES
        x = method.sample(PUBLIC, method.released(state), y, 1).flatten(1)
        found = shapes.likeliest(x, state.means, state.basis, moments.root(state.total), 0.08)
        share[tries] = float((found == y).float().mean())
    assert share[1] < 0.9
    assert share[20] > share[1] + 0.1


@pytest.mark.parametrize("epsilon", [0.2, 10.0])
def test_samples_are_made_of_what_was_released_alone(epsilon):
    data, method = records(), build("synthesizers", SMALL)
    _, state = run(method, data, epsilon)
    released, y = method.released(state), torch.arange(60) % CLASSES
    assert "seed" not in released
    before = method.sample(PUBLIC, released, y, 5)
    data.x.zero_()
    assert torch.equal(before, method.sample(PUBLIC, {k: v.clone() for k, v in released.items()}, y, 5))
    assert not torch.equal(before, method.sample(PUBLIC, released, y, 6))
    assert torch.isfinite(before).all()
    assert before.min() >= 0
    assert before.max() <= 1


def test_steps_are_pure_and_seeds_differ():
    data, method = records(), build("synthesizers", SMALL)
    _, one = run(method, data, 1.0, seed=1)
    _, same = run(method, data, 1.0, seed=1)
    _, other = run(method, data, 1.0, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.means, other.means)
    assert all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(one, run(method, data, 1.0, steps=0)[1], strict=True)
    )


def test_colour_and_one_class():
    x = random.uniform(random.generator(0), (60, 3, 8, 9))
    data, public = Dataset(x, torch.zeros(60, dtype=torch.long), "one", 1), Public(60, (3, 8, 9), 1)
    method = build("synthesizers", "class_moments")
    spend = method.spend(public, 1.0, 1e-5)
    state = method.init(data, spend, 0)
    for t in range(spend.steps):
        state = method.step(data, spend, state, t)
    fake = method.sample(public, method.released(state), torch.zeros(7, dtype=torch.long), 0)
    assert fake.shape == (7, 3, 8, 9)
    assert torch.isfinite(fake).all()


def test_bad_arguments_are_named():
    for text in ("rank=0", "rounds=-1", "gain=-1.0", "shares=(1, 1)", "clips=(0, 1, 1, 1)", "components=0"):
        with pytest.raises(Expected, match="Expected"):
            build("synthesizers", f"class_moments({text})")
    assert mu_of(1.0, 1e-5) == pytest.approx(0.26805, abs=1e-5)

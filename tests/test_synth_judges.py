"""Judges of synthetic images: classifiers, Fréchet distance, memorisation, and the one-query floor."""

import math

import pytest
import torch

from qleak import random
from qleak.accounting import upper
from qleak.catalog import build, catalog
from qleak.check import Expected
from qleak.synth import moments, quality
from qleak.synth.methods import class_means as floor
from qleak.types.models import Dataset
from qleak.types.synthesis import Public

SIDE = 10


def blobs(n, seed, classes=3, noise=0.1):
    """Images of a bright bar, whose row tells the class."""
    y = torch.arange(n) % classes
    x = noise * random.uniform(random.generator(seed, "blobs"), (n, 1, SIDE, SIDE))
    for c in range(classes):
        x[y == c, :, 2 * c + 1 : 2 * c + 3] += 0.7
    return x.clamp(0, 1), y


@pytest.mark.parametrize(
    "spec",
    [
        "cnn_classifier(optimizer='adam', epochs=3, batch=32)",
        "mlp_classifier(epochs=4, batch=32)",
        "logistic(epochs=12, batch=32)",
    ],
)
def test_a_judge_learns_what_can_be_learnt_and_repeats_itself(spec):
    judge = build("classifiers", spec)
    (x, y), (tx, ty) = blobs(300, 0), blobs(150, 1)
    curve = judge.fit(x, y, tx, ty, 3, 7)
    assert curve.dtype == torch.float64
    assert curve[-1] > 0.95
    assert torch.equal(curve, judge.fit(x, y, tx, ty, 3, 7))
    wrong = judge.fit(x, y[random.permutation(random.generator(3), 300)], tx, ty, 3, 7)
    assert wrong[-1] < 0.7, "labels without meaning must not be learnt"


def test_factories_without_arguments_are_the_published_settings():
    assert build("classifiers", "cnn_classifier").spec.startswith(
        "cnn_classifier(lr=0.002, batch=512, epochs=600, optimizer='sgd'"
    )
    assert set(catalog("classifiers")) == {"cnn_classifier", "mlp_classifier", "logistic"}
    for text in (
        "cnn_classifier(lr=0)",
        "mlp_classifier(hidden=0)",
        "logistic(epochs=0)",
        "cnn_classifier(optimizer='adm')",
    ):
        with pytest.raises(Expected, match="Expected"):
            build("classifiers", text)


@pytest.mark.parametrize(
    "spec", ["cnn_classifier(optimizer='adam', epochs=2)", "mlp_classifier(epochs=2)", "logistic(epochs=2)"]
)
def test_a_judge_survives_poor_images(spec):
    judge, (tx, ty) = build("classifiers", spec), blobs(60, 1)
    for x, y in (
        (torch.full((40, 1, SIDE, SIDE), 0.5), torch.arange(40) % 3),
        (blobs(40, 2)[0], torch.zeros(40, dtype=torch.long)),
        (torch.full((40, 1, SIDE, SIDE), 1e30), torch.arange(40) % 3),  # diverges: logits are not finite
    ):
        curve = judge.fit(x, y, tx, ty, 3, 0)
        assert curve.shape == (2,)
        assert ((curve >= 0) & (curve <= 1)).all()


def test_the_smallest_image_of_the_cnn():
    judge = build("classifiers", "cnn_classifier(epochs=1)")
    x, y = torch.full((6, 3, 8, 8), 0.2), torch.arange(6) % 2
    assert len(judge.fit(x, y, x, y, 2, 0)) == 1
    with pytest.raises(Expected, match="at least 8x8"):
        judge.fit(x[..., :7], y, x[..., :7], y, 2, 0)


def test_frechet_distance_is_zero_for_itself_and_closed_for_gaussians():
    z = random.normal(random.generator(0), (4000, 3)).double()
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T  # moments exactly 0 and 1
    assert quality.frechet(z, z) < 1e-10
    a, b, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, -2.0])
    wanted = float(shift.square().sum() + (a - b).square().sum())  # covariances that commute
    assert quality.frechet(z * a, z * b + shift) == pytest.approx(wanted, rel=1e-9)
    turn = torch.linalg.qr(random.normal(random.generator(1), (3, 3)).double()).Q
    assert quality.frechet(z * a @ turn, (z * b + shift) @ turn) == pytest.approx(wanted, rel=1e-9)
    with pytest.raises(Expected, match="two images"):
        quality.frechet(z[:1], z)
    with pytest.raises(Expected, match="finite"):
        quality.frechet(z / 0, z)


def test_distance_grows_with_noise():
    x, y = blobs(400, 0)
    net = quality.feature_net(Dataset(x, y, "blobs", 3), 0)
    again = quality.feature_net(Dataset(x, y, "blobs", 3), 0)
    assert torch.equal(net(x[:5]), again(x[:5]))
    draws = random.normal(random.generator(5), x.shape)
    found = [quality.distance((x + s * draws).clamp(0, 1), x, net) for s in (0, 0.1, 0.3, 0.6)]
    assert found[0] < 1e-6
    assert found == sorted(found)
    assert found[1] > 10 * found[0]


def test_a_planted_copy_is_caught():
    train, test = (random.uniform(random.generator(s), (300, 1, SIDE, SIDE)) for s in (0, 1))
    fresh = random.uniform(random.generator(2), (50, 1, SIDE, SIDE))
    honest = quality.memorisation(fresh, train, test)
    assert honest["copies"] == honest["copies_control"] == 0
    assert honest["nearest"] == pytest.approx(1, abs=0.1)
    planted = torch.cat([fresh[:45], train[:5] + 0.01])
    found = quality.memorisation(planted, train, test)
    assert found["copies"] == pytest.approx(0.1)
    assert found["copies_control"] == 0
    assert quality.memorisation(train[:50], train, test)["nearest"] == 0
    twice = quality.memorisation(train[:1], torch.cat([train, train]), test)
    assert twice["copies"] == 1, "a record that is there twice is still a copy"


def test_nearest_is_exact_near_zero_and_does_not_depend_on_chunks():
    real = random.uniform(random.generator(0), (70, 1, SIDE, SIDE))
    fake = real[:9] + 1e-4
    found = quality.nearest(fake, real, chunk=4)[:, 0]
    assert torch.allclose(found, torch.full((9,), 1e-4), rtol=1e-2)
    assert torch.equal(found, quality.nearest(fake, real)[:, 0])


def neighbours(n=6, d=9, classes=3, seed=0):
    """Data sets that differ in one record, random and adversarial: (x, y, x', y'); pixels in [0, 1]."""
    gen = random.generator(seed, "neighbours")
    for _ in range(40):
        x, y = 3 * random.uniform(gen, (n, d)), random.integers(gen, classes, (n,))
        other, label = x.clone(), y.clone()
        other[0], label[0] = 3 * random.uniform(gen, (d,)), random.integers(gen, classes, ())
        yield x, y, other, label
    x, y = torch.zeros(n, d), torch.zeros(n, dtype=torch.long)
    x[0, 0] = 5.0
    other, label = x.clone(), y.clone()
    other[0], label[0] = torch.tensor([0.0, 5, *[0] * (d - 2)]), 1
    yield x, y, other, label


def test_sensitivity_of_the_floor_is_a_bound_and_is_met():
    bound = 1.5
    gaps = [float((moments.sums(x, y, 3, bound) - moments.sums(a, b, 3, bound)).norm()) for x, y, a, b in neighbours()]
    reach = moments.sum_reach(bound)
    assert max(gaps) <= reach * (1 + 1e-12)
    assert max(gaps) == pytest.approx(reach, rel=1e-9)
    assert max(gaps) > math.sqrt(2) * bound, "the counts cost something"


@pytest.mark.parametrize("target", [0.2, 1.0, 10.0])
def test_the_floor_spends_its_budget_exactly(target):
    spend = build("synthesizers", "class_means").spend(Public(100, (1, SIDE, SIDE), 3), target, 1e-5)
    found = upper(spend.event(1), 1e-5).reported
    assert target - 1e-6 < found <= target
    assert upper(spend.event(0), 1e-5).reported == 0


def test_the_floor_finds_means_and_samples_around_them():
    x, y = blobs(3000, 0)
    data, public = Dataset(x, y, "blobs", 3), Public(3000, (1, SIDE, SIDE), 3)
    method = build("synthesizers", "class_means(clip=20)")
    spend = method.spend(public, 1e4, 1e-5)
    before = method.init(data, spend, 3)
    state = method.step(data, spend, before, 0)
    assert torch.equal(before.means, torch.full_like(before.means, 0.5))
    true = torch.stack([x[y == c].mean(0) for c in range(3)])
    assert torch.allclose(state.means, true, atol=1e-2)
    fake = method.sample(public, method.released(state), torch.arange(900) % 3, 0)
    assert fake.shape == (900, 1, SIDE, SIDE)
    assert fake.min() >= 0
    assert fake.max() <= 1
    assert torch.equal(fake, method.sample(public, method.released(state), torch.arange(900) % 3, 0))
    assert floor.nearest_mean_accuracy(state.means, *blobs(300, 9)) == 1
    noisy = method.step(data, method.spend(public, 0.2, 1e-5), before, 0)
    assert (noisy.means - true).abs().mean() > 5 * (state.means - true).abs().mean()

"""Scores against closed forms and second opinions; each law is also shown to reject a wrong variant."""

import itertools
import math

import pytest
import torch
from einops import repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from skimage.metrics import peak_signal_noise_ratio

from qleak import random
from qleak.check import Expected
from qleak.metrics import PSNR_CAP, Secret, label_accuracy, labels_found, match, mse, psnr, score, ssim, wilson


def images(*shape, path=("images",)):
    return random.uniform(random.generator(*path), shape)


def constant(*values, side=8):
    return repeat(torch.tensor(values), "b -> b 1 h w", h=side, w=side).clone()


# --- one image against one image ------------------------------------------------------------------


def test_psnr_is_20_db_for_an_offset_of_a_tenth():
    """10·log10(1 / 0.1²) = 20."""
    truth = constant(0.2, 0.5).double()
    assert torch.allclose(mse(truth + 0.1, truth), torch.tensor([0.01, 0.01]).double())
    assert torch.allclose(psnr(truth + 0.1, truth), torch.tensor([20.0, 20.0]).double())


def test_psnr_agrees_with_scikit_image():
    guess, truth = images(3, 3, 9, 9), images(3, 3, 9, 9, path=("truth",))
    theirs = [peak_signal_noise_ratio(t.numpy(), g.numpy(), data_range=1) for g, t in zip(guess, truth, strict=True)]
    assert psnr(guess, truth).tolist() == pytest.approx(theirs, abs=1e-4)


def test_exact_match_is_capped_and_finite():
    truth = images(2, 3, 8, 8)
    assert psnr(truth, truth).tolist() == [PSNR_CAP, PSNR_CAP]
    assert psnr(truth.double() + 1e-5, truth.double())[0] < PSNR_CAP  # 100 dB is not cut


def test_guess_is_clamped_to_the_picture():
    truth = constant(0.0, 1.0)
    assert mse(truth + torch.tensor([-5.0, 5.0]).view(2, 1, 1, 1), truth).tolist() == [0, 0]
    assert mse(truth + torch.tensor([5.0, -5.0]).view(2, 1, 1, 1), truth).tolist() == [1, 1]  # not 25: clamped


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_guess_scores_as_mid_grey(bad):
    truth = images(1, 3, 8, 8)
    grey = torch.full_like(truth, 0.5)
    for fn in (mse, psnr, ssim):
        assert torch.equal(fn(torch.full_like(truth, bad), truth), fn(grey, truth))
    one_pixel = truth.clone()
    one_pixel[0, 0, 0, 0] = bad
    assert 20 < float(psnr(one_pixel, truth)) < PSNR_CAP


@pytest.mark.parametrize("side", [3, 4, 7, 8, 28])
def test_ssim_of_constants_is_the_luminance_term(side):
    """Wang et al. 2004, eq. 6: (2ab + C₁) / (a² + b² + C₁), C₁ = 0.01², when both variances are 0."""
    value = ssim(constant(0.25, side=side).double(), constant(0.75, side=side).double())
    assert value.tolist() == pytest.approx([(2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)], abs=1e-9)


def test_ssim_knows_structure_where_mse_does_not():
    truth = images(1, 3, 16, 16)
    dimmed = 0.8 * truth
    noisy = (truth + mse(dimmed, truth).sqrt() * torch.sign(images(1, 3, 16, 16, path=("noise",)) - 0.5)).float()
    assert ssim(truth, truth).item() == pytest.approx(1)
    assert ssim(dimmed, truth) > ssim(noisy, truth)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0, 3))
def test_scores_stay_in_their_bounds(seed, spread):
    truth = images(2, 1, 7, 9, path=(seed, "truth"))
    guess = 0.5 + spread * random.normal(random.generator(seed, "guess"), truth.shape)
    assert ((mse(guess, truth) >= 0) & (mse(guess, truth) <= 1)).all()
    assert ((psnr(guess, truth) >= 0) & (psnr(guess, truth) <= PSNR_CAP)).all()
    assert (ssim(guess, truth).abs() <= 1 + 1e-9).all()
    assert torch.allclose(mse(guess.clamp(0, 1), truth), mse(guess, truth))


def test_wrong_images_are_refused():
    good = images(2, 3, 8, 8)
    with pytest.raises(Expected, match=r"Expected a guess of b c h w = \(2, 3, 8, 8\), got \(1, 3, 8, 8\)\."):
        mse(good[:1], good)
    with pytest.raises(Expected, match=r"true images in \[0, 1\]"):
        psnr(good, good * 255)
    with pytest.raises(Expected, match="truth to be finite: 1 of 384"):
        psnr(good, good.clone().index_put((torch.tensor(0),) * 4, torch.tensor(math.nan)))
    with pytest.raises(Expected, match="at least 3×3 pixels"):
        ssim(good[..., :2], good[..., :2])


# --- batches --------------------------------------------------------------------------------------


def test_a_shuffled_batch_is_put_back():
    truth = images(6, 3, 8, 8)
    shuffle = random.permutation(random.generator("shuffle"), 6)
    guess = truth[shuffle] + 0.01
    order = match(guess, truth)
    assert torch.equal(shuffle[order], torch.arange(6))
    assert psnr(guess[order], truth).min() > 35
    assert psnr(guess, truth).min() < 20  # without matching the score would be noise


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_the_assignment_is_the_best_of_all(seed, b):
    guess, truth = images(b, 1, 3, 3, path=(seed, "a")), images(b, 1, 3, 3, path=(seed, "b"))

    def total(order):
        return float(mse(guess[list(order)], truth).sum())

    order = match(guess, truth)
    assert sorted(order.tolist()) == list(range(b))
    assert total(order.tolist()) == pytest.approx(min(map(total, itertools.permutations(range(b)))))


def test_each_truth_gets_its_own_guess():
    """Taking the nearest guess for every truth would use guess 0 twice."""
    truth, guess = constant(0.4, 0.5), constant(0.45, 0.9)
    nearest = [int(mse(guess, t.expand_as(guess)).argmin()) for t in truth]
    assert nearest == [0, 0]
    assert match(guess, truth).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("guessed", "true", "found"),
    [
        ([3], [3], [True]),
        ([3], [5], [False]),
        ([5, 3, 3], [3, 3, 5], [True, True, True]),
        ([3, 3], [3, 5], [True, False]),
        ([3, 5], [3, 3], [True, False]),  # one 3 answers one 3: a set would say two
        ([0, 1, 2], [3, 4, 5], [False, False, False]),
    ],
)
def test_labels_are_a_multiset(guessed, true, found):
    guessed, true = torch.tensor(guessed), torch.tensor(true)
    assert labels_found(guessed, true) == found
    assert label_accuracy(guessed, true) == sum(found) / len(found)


def test_label_counts_must_agree():
    with pytest.raises(Expected, match=r"guessed labels of shape \[2\], got \[1\]"):
        label_accuracy(torch.tensor([1]), torch.tensor([1, 2]))
    with pytest.raises(Expected, match="labels=0 >= 1"):
        label_accuracy(torch.tensor([]), torch.tensor([]))


def test_score_speaks_of_the_true_batch_in_its_order():
    secret = Secret(images(3, 3, 8, 8), torch.tensor([7, 1, 4]))
    shuffle = torch.tensor([2, 0, 1])
    scores = score(secret.x[shuffle], torch.tensor([4, 7, 9]), secret)
    assert scores["order"] == [1, 2, 0]
    assert scores["psnr"] == [PSNR_CAP] * 3
    assert scores["mse"] == [0.0] * 3
    assert scores["ssim"] == pytest.approx([1.0] * 3)
    assert scores["label_ok"] == [True, False, True]


# --- rates ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_agrees_with_scipy(counts, level):
    successes, n = counts
    theirs = binomtest(successes, n).proportion_ci(level, method="wilson")
    assert wilson(successes, n, level) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    low, high = wilson(successes, n, level)
    assert 0 <= low <= successes / n <= high <= 1


def test_wilson_at_its_ends():
    """Brown, Cai, DasGupta 2001: with n successes of n the lower end is n / (n + z²)."""
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(16, 16) == (pytest.approx(16 / (16 + 1.959964**2)), 1.0)
    assert wilson(0, 16)[0] == 0.0


@pytest.mark.parametrize("wrong", [(3, 2), (-1, 2), (1, -1), (0.5, 2), (1, 2, 1.0), (1, 2, 0.0)])
def test_wilson_refuses_what_is_no_count(wrong):
    with pytest.raises(Expected):
        wilson(*wrong)

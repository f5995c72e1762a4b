"""What the published code claims: its seven commands, its data-dependent bounds, the records it repeats."""

import math

import pytest
import torch
from layouts import SHARED, needs_mnist

from qleak import data, random
from qleak.check import Expected
from qleak.synth import gnmax, original
from qleak.synth.partition import dealt

STEPS = (86, 40, 80, 109, 146, 25, 25)
CLAIMED = (0.9957, 0.9982, 0.9982, 9.9689, 9.9696, 9.9601, 9.9601)
COST = (0.738, 0.740, 0.740, 8.50, 8.50, 8.49, 8.49)
TWICE = ((2.03, 1.58), (2.04, 1.59), (2.04, 1.59), (23.8, 20.4), (23.8, 20.4), (23.8, 20.4), (23.8, 20.4))
needs_fashion = pytest.mark.skipif(
    not (SHARED / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte").exists(),
    reason="Fashion-MNIST is not at hand: set QLEAK_DATA (`qleak data fetch fashion_mnist`)",
)


def gen(*path):
    return random.generator("test_original", *path)


@pytest.mark.parametrize("row", range(7))
def test_every_published_command_stops_where_its_accountant_says(row):
    c = original.COMMANDS[row]
    assert original.steps_allowed(c.epsilon, c.images, c.k, c.sigma) == STEPS[row]
    assert math.isclose(original.claimed_epsilon(STEPS[row], c.images, c.k, c.sigma, 1e-5), CLAIMED[row], abs_tol=6e-5)
    assert original.claimed_epsilon(STEPS[row] + 1, c.images, c.k, c.sigma) > c.epsilon


@pytest.mark.parametrize("row", range(7))
def test_what_the_same_noise_costs_with_a_record_in_one_teacher_or_two(row):
    c = original.COMMANDS[row]
    twice = original.claimed_epsilon(STEPS[row], c.images, c.k, c.sigma, teachers=2)
    exact = [original.cost(STEPS[row], c.images, c.k, c.sigma, teachers=m) for m in (1, 2)]
    digits = 0.005 if c.epsilon == 1 else 0.06
    assert abs(exact[0] - COST[row]) < digits
    assert abs(twice - TWICE[row][0]) < digits and abs(exact[1] - TWICE[row][1]) < 1.5 * digits
    assert exact[1] > c.epsilon  # the printed ε does not hold for repeated records


def test_fewer_orders_claim_more():
    at = {n: original.claimed_epsilon(86, 15, 200, 5000.0, orders=n) for n in (10, 25, 26, 200)}
    assert at[10] > at[25] > at[26] == at[200]  # the best order is 25
    assert original.claimed_epsilon(0, 15, 200, 5000.0) == 0


def test_the_klevel_charge_is_3_6_times_the_truth():
    charged, true = original.klevel_rdp(4, 784, 5000.0)
    assert torch.allclose(charged / true, torch.tensor(32 / 9, dtype=torch.float64))
    assert torch.allclose(true, gnmax.orders() * (3 * math.sqrt(784)) ** 2 / (2 * 5000.0**2))


def divergence(p, q, alpha):
    """Rényi divergence of one coin from another, `[order]`."""
    terms = [p**alpha * q ** (1 - alpha), (1 - p) ** alpha * (1 - q) ** (1 - alpha)]
    return torch.log(terms[0] + terms[1]) / (alpha - 1)


def test_the_data_dependent_bound_holds_for_an_arg_max_and_not_for_the_votes():
    sigma, votes = 8.0, torch.tensor([60.0, 0.0])
    bound = gnmax.gnmax_rdp(gnmax.gnmax_logq(votes, sigma), sigma)
    alpha = gnmax.orders()
    q, near = (torch.special.ndtr(torch.tensor(-gap / (math.sqrt(2) * sigma)).double()) for gap in (60.0, 58.0))
    small = alpha <= 30
    assert (bound[small] < 0.01 * alpha[small] / sigma**2).any()  # it fires
    assert (divergence(q, near, alpha)[small] <= bound[small]).all()  # the winner alone: true
    assert not (
        divergence(near, q, alpha)[small] <= bound[small]
    ).all()  # a bound at these votes, not at their neighbours'
    whole_vector = alpha * 2 / (2 * sigma**2)  # two noisy counts, each moved by 1
    assert (bound[small] < whole_vector[small]).any()  # what is released here: false
    assert torch.allclose(gnmax.gnmax_rdp(torch.tensor(math.log(0.5)), sigma), alpha / sigma**2)


def test_the_bound_for_many_rows_is_that_of_each():
    votes = 30 * random.normal(gen("votes"), (5, 8))
    together = gnmax.gnmax_rdp(gnmax.gnmax_logq(votes, 3.0), 3.0)
    for row, vote in zip(together, votes, strict=True):
        assert torch.allclose(row, gnmax.gnmax_rdp(gnmax.gnmax_logq(vote, 3.0), 3.0))
    assert torch.isfinite(together).all()
    sure = gnmax.gnmax_rdp(gnmax.gnmax_logq(torch.tensor([1e9, 0.0]), 3.0), 3.0)
    assert torch.isfinite(sure).all() and (sure >= 0).all()


@pytest.mark.parametrize("row", range(7))
def test_at_published_settings_the_data_dependent_bound_never_fires(row):
    c = original.COMMANDS[row]
    d = 784 if "mnist" in c.data else 12_288
    votes = torch.zeros(3, d)
    votes[:, : c.k] = 0.6 * c.teachers  # more agreement than a teacher's top k allows over pixels that differ
    noisy = votes + c.sigma * random.normal(gen("noise", row), votes.shape)
    plain = 3 * original.vote_rdp(c.k, c.sigma)
    for least in (True, False):
        assert torch.allclose(original.dependent_rdp(noisy, c.k, c.sigma, least=least), plain)


def test_one_coordinate_with_all_votes_makes_it_claim_next_to_nothing():
    c = original.COMMANDS[5]
    votes = torch.zeros(1, 12_288)
    votes[0, 7] = c.teachers
    share = original.dependent_rdp(votes, c.k, c.sigma) / original.vote_rdp(c.k, c.sigma)
    assert math.isclose(
        float(share.min()), 7.4e-4, rel_tol=0.01
    )  # of a release whose cost does not depend on the votes
    assert torch.allclose(original.dependent_rdp(0 * votes, c.k, c.sigma), original.vote_rdp(c.k, c.sigma))


def test_the_accountant_of_the_published_code_counts_what_it_charges():
    """Step by step, as `signsgd_dept` does: here the data-dependent bound never fires, and it stops where the plain one does."""
    c = original.COMMANDS[3]
    noisy = c.sigma * random.normal(gen("rule"), (c.images, 784))
    one = original.dependent_rdp(noisy, c.k, c.sigma, least=False)
    rdp, steps = one, 0
    while gnmax.convert(rdp, 1e-5) <= c.epsilon:
        rdp, steps = rdp + one, steps + 1
    assert steps == 109
    assert math.isclose(original.claimed_gaussian(109 * c.images, c.sigma / (2 * math.sqrt(c.k))), 9.9689, abs_tol=6e-5)


def test_the_smaller_bound_is_what_its_name_says():
    logq = torch.linspace(-60, -0.5, 200)
    least, raw = gnmax.gnmax_rdp(logq, 5.0), gnmax.gnmax_rdp(logq, 5.0, least=False)
    assert (least <= raw + 1e-15).all() and (raw > least + 1e-9).any()
    assert (least <= gnmax.orders() / 25 + 1e-15).all()


def test_confident_votes_pay_for_the_test_and_for_answers():
    votes = torch.tensor([[30.0, 5.0, 5.0], [14.0, 13.0, 13.0]])
    both, none = torch.tensor([True, True]), torch.tensor([False, False])
    paid = gnmax.confident_rdp(votes, 20.0, 10.0, 4.0, both)
    test = gnmax.confident_rdp(votes, 20.0, 10.0, 4.0, none)
    vote = gnmax.gnmax_rdp(gnmax.gnmax_logq(votes, 4.0), 4.0).sum(0)
    assert torch.allclose(paid - test, vote)
    assert (test <= 2 * gnmax.orders() / (2 * 10.0**2) + 1e-12).all() and (test > 0).all()


def test_records_are_dealt_by_class_and_wrap_around():
    y = torch.tensor([0, 0, 0, 0, 1, 0, 1, 0])
    got = original.wrapped(y, 2, 2)
    assert got.tolist() == [[0, 4, 1, 6], [2, 4, 3, 6]]  # ones are dealt twice, zeros 5 and 7 not at all
    assert original.reach(got, 8).tolist() == [1, 1, 1, 1, 2, 0, 2, 0]
    assert original.wrapped(y, 3, 2).shape == (3, 2)


def moved(deal, y, teachers):
    """How many teachers hold other records after the label of record 3 has changed."""
    other = y.clone()
    other[3] = (other[3] + 1) % 10
    return sum(a != b for a, b in zip(deal(y, teachers).tolist(), deal(other, teachers).tolist(), strict=True))


def test_one_other_label_moves_records_of_many_teachers():
    y = random.integers(gen("labels"), 10, (600,))
    assert moved(lambda y, n: original.wrapped(y, n, 10), y, 40) > 30
    assert moved(lambda y, n: dealt(len(y), n, 0), y, 40) == 0


@needs_mnist
def test_mnist_repeats_1138_records():
    y = data.load("mnist", "train", SHARED).y
    got = original.reach(original.wrapped(y, 4000, 10), len(y))
    assert int((got == 2).sum()) == 1138 and int((got == 0).sum()) == 1138 and int(got.max()) == 2
    assert {int(label) for label in y[got == 0].unique()} == {1, 3, 7}


@needs_fashion
def test_fashion_mnist_repeats_none():
    y = data.load("fashion_mnist", "train", SHARED).y
    assert (original.reach(original.wrapped(y, 4000, 10), len(y)) == 1).all()


def test_bad_arguments_are_named():
    for call, said in [
        (lambda: original.claimed_epsilon(-1, 15, 200, 5000.0), "steps=-1"),
        (lambda: original.claimed_epsilon(1, 15, 0, 5000.0), "k=0"),
        (lambda: original.claimed_epsilon(1, 15, 200, 0.0), "sigma=0.0"),
        (lambda: original.claimed_epsilon(1, 15, 200, 1.0, delta=0.0), "delta=0.0"),
        (lambda: original.claimed_epsilon(1, 15, 200, 1.0, orders=2), "orders=2"),
        (lambda: original.steps_allowed(0.0, 15, 200, 1.0), "epsilon=0.0"),
        (lambda: original.klevel_rdp(1, 5, 1.0), "levels=1"),
        (lambda: original.wrapped(torch.tensor([0, 1]), 3, 2), "teachers=3"),
        (lambda: original.wrapped(torch.tensor([0, 2]), 1, 3), "none of class 1"),
    ]:
        with pytest.raises(Expected, match=said):
            call()

"""Law 3, channel by channel: codes against torch's own, likelihoods against Monte Carlo, what memory and rounds do."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from qleak import random, tree
from qleak.attacks import stages
from qleak.attacks.objectives import Box, effective
from qleak.channels import (
    Channel,
    bfloat16,
    chain,
    error_feedback,
    fixed_point,
    float8,
    float16,
    gaussian,
    kmeans,
    laplace,
    logarithmic,
    powersgd,
    qsgd,
    random_k,
    rounds,
    sign,
    stochastic,
    terngrad,
    top_k,
    uniform,
)
from qleak.errors import Expected


def send(channel, x, seed=0, state=None):
    noise = channel.draw(random.generator(seed, "noise"), x)
    messages, after = channel.send(channel.knobs(), x, noise, channel.init(x) if state is None else state, x)
    return messages[-1], after


def received(channel, x, seed=0):
    return channel.receive(channel.knobs(), send(channel, x, seed)[0], x)


def normal(*path, n=1000):
    return random.normal(random.generator(*path), (n,))


# --- likelihoods against what is drawn --------------------------------------------------------------


def frequencies_and_likelihood(channel, value, n=20_000, ends=(-1.0, 1.0), wrong=None):
    """Observed code frequencies of one number among fixed extremes, and exp(−misfit) of every code that occurs."""
    x = {"w": torch.cat([torch.full((n,), value), torch.tensor(ends)])}
    message, _ = send(channel, x)
    codes, counts = message.code["w"][:n].unique(return_counts=True)
    reader = wrong or channel
    one = {"w": torch.tensor([value])}
    p = []
    for code in codes:
        m = message._replace(code={"w": code[None]})
        p.append(math.exp(-float(reader.misfit(reader.knobs(), m, one, one))))
    return counts.double(), torch.tensor(p).double()


def chi_square(counts, p) -> float:
    keep = p * counts.sum() > 5
    expected = p[keep] / p[keep].sum() * counts[keep].sum()
    return float(stats.chisquare(counts[keep].numpy(), expected.numpy()).pvalue)


@pytest.mark.parametrize("value", [-0.7, 0.05, 0.31])
@pytest.mark.parametrize(
    "channel",
    [chain(stochastic(levels=4)), chain(stochastic(levels=9, range="max")), chain(terngrad(clip=0))],
    ids=lambda c: c.spec.split("(")[1],
)
def test_a_coin_is_read_exactly(channel, value):
    counts, p = frequencies_and_likelihood(channel, value)
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    assert chi_square(counts, p) > 1e-3
    _, other = frequencies_and_likelihood(channel, value + 0.03)
    assert chi_square(counts, other[: len(counts)]) < 1e-3


def test_noise_in_front_of_a_coin_is_read_exactly():
    """gauss → stochastic rounding: the triangle convolved with the Gaussian, and a wrong σ is rejected."""
    channel = chain(gaussian(0.3, unbounded=True), stochastic(levels=9))
    counts, p = frequencies_and_likelihood(channel, 0.1, n=40_000)
    inner = slice(1, -1)  # the end codes hold the noisy extremes themselves
    assert chi_square(counts[inner], p[inner]) > 1e-3
    wrong = chain(gaussian(0.36, unbounded=True), stochastic(levels=9))
    _, q = frequencies_and_likelihood(channel, 0.1, n=40_000, wrong=wrong)
    assert chi_square(counts[inner], q[inner]) < 1e-3


def test_a_bucket_norm_is_read_with_its_coin():
    """QSGD: P(code | x) given the norm in clear."""
    x = {"w": torch.tensor([0.3, -0.2, 0.05, 0.8])}
    channel = chain(qsgd(levels=3, bucket=4))
    codes = torch.stack([send(channel, x, i)[0].code["w"] for i in range(6000)])
    norm = float(x["w"].norm())
    up = x["w"].abs() * 3 / norm - (x["w"].abs() * 3 / norm).floor()
    seen = (codes.abs() > (x["w"].abs() * 3 / norm).floor()).float().mean(0)
    torch.testing.assert_close(seen, up, atol=4 * 0.5 / 6000**0.5, rtol=0)
    message, _ = send(channel, x, 0)
    misfit = float(channel.misfit(channel.knobs(), message, x, x))
    p = torch.where(message.code["w"].abs() > (x["w"].abs() * 3 / norm).floor(), up, 1 - up)
    assert misfit == pytest.approx(float(-p.log().sum()), rel=1e-3)
    shrunk = {"w": 0.5 * x["w"]}
    assert float(channel.misfit(channel.knobs(), message, shrunk, x)) > misfit  # the norm is an equation too


def test_moments_have_the_coin_s_mean_and_variance():
    n = 20_000
    x = {"w": torch.cat([random.uniform(random.generator(1), (n,)), torch.tensor([0.0, 1.0])])}
    channel = chain(stochastic(levels=17))
    at, var = channel.moments(channel.knobs(), send(channel, x)[0], x)
    error = (x["w"] - at["w"])[:n]
    assert float(error.mean()) == pytest.approx(0, abs=4 * float(error.std()) / n**0.5)
    assert float(error.square().mean() / var["w"][:n].mean()) == pytest.approx(1, abs=0.03)


def test_several_rounds_add_their_likelihoods():
    x = {"w": normal(3, n=50)}
    once, often = chain(stochastic(levels=4)), rounds(chain(stochastic(levels=4)), times=5)
    message, _ = send(often, x)
    each = [float(once.misfit(once.knobs(), tree.nested_map(lambda t, i=i: t[i], message), x, x)) for i in range(5)]
    assert float(often.misfit(often.knobs(), message, x, x)) == pytest.approx(sum(each), rel=1e-5)
    lo, hi = often.cell(often.knobs(), message, x)
    wide_lo, wide_hi = once.cell(once.knobs(), tree.nested_map(lambda t: t[0], message), x)
    assert ((lo["w"] >= wide_lo["w"]) & (hi["w"] <= wide_hi["w"])).all()
    assert float((hi["w"] - lo["w"]).mean()) < float((wide_hi["w"] - wide_lo["w"]).mean())
    assert often.bits(message, x) == pytest.approx(5 * once.bits(send(once, x)[0], x))
    with pytest.raises(Expected, match="without memory"):
        rounds(error_feedback(), times=2)


# --- codes against torch's own ----------------------------------------------------------------------

CASTS = {
    "float16": (float16(), torch.float16, 65504.0),
    "bfloat16": (bfloat16(), torch.bfloat16, 3e38),
    "e4m3": (float8(format="e4m3", scale="none"), torch.float8_e4m3fn, 448.0),
    "e5m2": (float8(format="e5m2", scale="none"), torch.float8_e5m2, 57344.0),
}


@pytest.mark.parametrize("name", CASTS)
@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=8), st.integers(-30, 10))
def test_small_floats_equal_torch_s_casts(name, values, exponent):
    stage, dtype, largest = CASTS[name]
    x = {"w": (torch.tensor(values) * 2.0**exponent).clamp(-largest, largest)}
    x["w"] = torch.where(x["w"].abs() < 1e-30, 0, x["w"])  # below a float32's own subnormals nothing is promised
    assert torch.equal(received(chain(stage), x)["w"], x["w"].to(dtype).to(torch.float32))


def test_fixed_point_equals_torch_s_fake_quantizer():
    x = {"w": 3 * normal(1)}
    want = torch.fake_quantize_per_tensor_affine(x["w"], 2.0**-5, 0, -128, 127)
    torch.testing.assert_close(received(chain(fixed_point(bits=8, fraction=5)), x)["w"], want, rtol=0, atol=1e-6)
    assert (
        float(received(chain(fixed_point(bits=4, fraction=2)), {"w": torch.tensor([99.0, -99.0])})["w"].max()) == 1.75
    )


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_the_symmetric_grid_equals_torch_s_fake_quantizer(per):
    x = {"w": normal(2, n=600).view(6, 100)}
    got = received(chain(uniform(levels=256, range="max", per=per)), x)["w"]
    if per == "tensor":
        want = torch.fake_quantize_per_tensor_affine(x["w"], float(x["w"].abs().max()) / 127, 0, -127, 127)
    else:
        scale = x["w"].abs().amax(1) / 127
        want = torch.fake_quantize_per_channel_affine(x["w"], scale, torch.zeros(6, dtype=torch.int32), 0, -127, 127)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_grid_per_bucket_equals_one_tensor_per_bucket():
    x = {"w": normal(4, n=70)}
    got = received(chain(uniform(levels=5, per="bucket", bucket=32)), x)["w"]
    parts = [received(chain(uniform(levels=5)), {"w": p})["w"] for p in x["w"].split(32)]
    torch.testing.assert_close(got, torch.cat(parts))


def test_powers_of_two():
    x = {"w": torch.tensor([1.0, -0.5, 0.3, 0.0, 1.4, -0.014])}
    assert received(chain(logarithmic(bits=4)), x)["w"].tolist() == [1.0, -0.5, 0.25, 0.0, 1.0, -0.0078125 * 2]
    assert received(chain(logarithmic(bits=2)), x)["w"].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def test_kmeans_is_a_fixed_point_of_lloyd_s_algorithm():
    """A slow, obvious iteration from its centroids moves nothing; and it beats an even grid of as many levels."""
    x = {"w": normal(5, n=400) ** 3}
    channel = chain(kmeans(clusters=8, iterations=200))
    message, _ = send(channel, x)
    book = message.side[0]["centroids"]["w"]
    nearest = (x["w"][:, None] - book).abs().argmin(1)
    again = torch.stack([x["w"][nearest == i].mean() for i in range(8)])
    torch.testing.assert_close(again, book, rtol=1e-4, atol=1e-5)
    even = received(chain(uniform(levels=8)), x)["w"]
    assert (received(channel, x)["w"] - x["w"]).square().mean() < (even - x["w"]).square().mean()


# --- selections, factors, memory --------------------------------------------------------------------


def test_a_global_ranking_keeps_the_largest_of_all():
    x = {"a": torch.tensor([[5.0, 0.1], [0.2, 0.3]]), "b": torch.tensor([4.0, -6.0])}
    got = received(chain(top_k(k=3, scope="global")), x)
    assert got["a"].tolist() == [[5.0, 0.0], [0.0, 0.0]]
    assert got["b"].tolist() == [4.0, -6.0]
    channel = chain(top_k(k=3, scope="global"))
    lo, hi = channel.cell(channel.knobs(), send(channel, x)[0], x)
    assert float(hi["a"][0, 1]) == pytest.approx(4.0, abs=1e-4)
    assert float(lo["a"][1, 0]) == pytest.approx(-4.0, abs=1e-4)


def test_a_random_selection_says_nothing_about_the_rest():
    x = {"w": normal(6, n=30)}
    channel = chain(random_k(k=10))
    message, _ = send(channel, x)
    got = channel.receive(channel.knobs(), message, x)["w"]
    kept = got != 0
    assert int(kept.sum()) == 10
    torch.testing.assert_close(got[kept], 3 * x["w"][kept])
    other = {"w": torch.where(kept, x["w"], 1e3)}
    assert float(channel.misfit(channel.knobs(), message, other, x)) == pytest.approx(0, abs=1e-8)


def test_low_rank_messages_are_equations():
    x = {"w": normal(7, n=60).view(6, 10), "b": normal(8, n=4)}
    channel = chain(powersgd(rank=2))
    message, state = send(channel, x)
    assert float(channel.misfit(channel.knobs(), message, x, x)) == pytest.approx(0, abs=1e-9)
    decoded = channel.receive(channel.knobs(), message, x)
    assert float(torch.linalg.matrix_rank(decoded["w"])) == 2
    assert torch.equal(decoded["b"], x["b"])
    assert channel.bits(message, x) == 32 * (2 * (6 + 10) + 4)
    # Started from its own Q again and again, the iteration finds the best approximation.
    for _ in range(60):
        message, state = send(channel, x, state=state)
    u, s, v = torch.linalg.svd(x["w"])
    best = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
    torch.testing.assert_close(channel.receive(channel.knobs(), message, x)["w"], best, rtol=0, atol=1e-3)


def test_error_feedback_loses_nothing_for_good():
    channel, bare = error_feedback(chain(top_k(k=2))), chain(top_k(k=2))
    state, sent, given_ = None, torch.zeros(10), torch.zeros(10)
    for i in range(50):
        x = {"w": normal("ef", i, n=10) + 0.5}
        message, state = send(channel, x, i, state)
        sent, given_ = sent + channel.receive(channel.knobs(), message, x)["w"], given_ + x["w"]
    residual = state[1]["w"]
    torch.testing.assert_close(sent + residual, given_, rtol=1e-4, atol=1e-4)
    lost = given_ - sum(received(bare, {"w": normal("ef", i, n=10) + 0.5}, i)["w"] for i in range(50))
    assert float(residual.norm()) < 0.3 * float(lost.norm())
    assert not channel.facts().exact
    assert channel.facts().event is None


def test_memory_is_refused_where_it_breaks_a_promise():
    from qleak.channels import clip_l2, total

    with pytest.raises(Expected, match=r"^Expected a channel without joins in error_feedback"):
        error_feedback(chain(clip_l2(1.0), total(), gaussian(1.0)))
    with pytest.raises(Expected, match=r"^Expected a channel without a privacy guarantee"):
        error_feedback(chain(clip_l2(1.0), gaussian(1.0)))


# --- bits -------------------------------------------------------------------------------------------


def test_entropy_coded_bits():
    x = {"w": torch.cat([torch.zeros(996), torch.tensor([1.0, -1.0, 2.0, 3.0])])}
    channel = chain(uniform(levels=256))
    message, _ = send(channel, x)
    assert channel.bits(message, x) == 8 * 1000 + 64
    p = torch.tensor([0.996, 0.001, 0.001, 0.001, 0.001])
    assert channel.bits(message, x, coded=True) == pytest.approx(1000 * float(-(p * p.log2()).sum()) + 64, rel=1e-4)
    values = chain(top_k(k=2))
    message, _ = send(values, x)
    assert values.bits(message, x, coded=True) == values.bits(message, x) == 2 * 32 + 2 * 10
    factors, matrix = chain(powersgd(rank=1)), {"w": x["w"].view(20, 50)}
    message, _ = send(factors, matrix)
    assert factors.bits(message, matrix, coded=True) == factors.bits(message, matrix) == 32 * 70


# --- degenerate input -------------------------------------------------------------------------------

EVERY = [
    chain(stochastic(levels=4)), chain(qsgd(bucket=4)), chain(terngrad()), chain(kmeans(clusters=3)),
    chain(logarithmic()), chain(fixed_point()), chain(float16()), chain(float8()), chain(random_k(ratio=0.3)),
    chain(powersgd()), chain(sign()), chain(top_k(ratio=0.4, scope="global")), error_feedback(),
    chain(uniform(levels=7, per="bucket", bucket=3)),
]  # fmt: skip


@pytest.mark.parametrize("channel", EVERY, ids=lambda c: c.spec[:40])
@settings(max_examples=25, deadline=None)
@example([1.1754943508222875e-38], "flat")  # a step that no float32 can divide by
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=0, max_size=12),
    st.sampled_from(["flat", "matrix", "scalar", "strided"]),
)
def test_any_finite_tree_stays_finite(channel, values, form):
    w = torch.tensor(values, dtype=torch.float32)
    if form == "matrix":
        w = w[: len(w) // 2 * 2].view(2, -1)
    elif form == "scalar":
        w = w.sum()
    elif form == "strided":
        w = torch.stack([w, w], 1)[:, 0]
    x = {"w": w, "b": torch.ones(2)}
    message, _ = send(channel, x)
    got = channel.receive(channel.knobs(), message, x)
    assert all(got[k].isfinite().all() and got[k].shape == x[k].shape for k in x)
    assert math.isfinite(float(channel.misfit(channel.knobs(), message, x, x)))
    slope = torch.func.grad(lambda g: channel.misfit(channel.knobs(), message, g, x))(x)
    assert all(v.isfinite().all() for v in slope.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_in_one_line(dtype):
    x = {"w": torch.ones(3, dtype=dtype)}
    with pytest.raises(Expected, match=r"^Expected rows\['w'\] of float32 or float64, got torch\."):
        send(chain(uniform()), x)


# --- the prior's weight -----------------------------------------------------------------------------


def test_the_rule_takes_the_strongest_prior_that_explains_the_message():
    noisy = torch.tensor([[0.5, 0.30, 0.21, 0.20, 0.199, 0.199]])
    stage, settled = stages.pick(noisy, torch.tensor([0.1]), 0.02)
    assert (int(stage), bool(settled)) == (2, False)  # 0.21 <= 1.1 · 0.199; weaker priors might lower the bound
    assert int(stages.pick(noisy, torch.tensor([1e-6]), 0.02)[0]) == 4
    assert int(stages.pick(noisy, torch.tensor([2.0]), 0.02)[0]) == 0
    exact = torch.tensor([[0.5, 1e-2, 1e-4, 1e-4, torch.inf]])
    stage, settled = stages.pick(exact, torch.zeros(1), 0.02)
    assert (int(stage), bool(settled)) == (3, True)
    drowned = torch.tensor([[0.9, 0.9, torch.inf]])
    assert stages.pick(drowned, torch.zeros(1), 0.02)[1].tolist() == [False]


class Sent(NamedTuple):
    """As much of a view as the count looks at."""

    channel: Channel


@pytest.mark.parametrize(
    ("channel", "law"),
    [
        (chain(stochastic()), "coin"),
        (chain(gaussian(1.0, unbounded=True)), "normal"),
        (chain(laplace(scale=1.0, unbounded=True)), "laplace"),
    ],
    ids=["coin", "normal", "laplace"],
)
def test_effective_readings_count_the_coordinates_that_carry_the_error(channel, law):
    n = 20_000
    if law == "coin":  # the error of stochastic rounding at places spread evenly over a step
        f = random.uniform(random.generator(1), (1, n))
        error = torch.where(random.uniform(random.generator(2), (1, n)) < f, f - 1, f)
    else:
        error = random.DRAWS[law](random.generator(3), (1, n))
    zero, one = {"w": torch.zeros(1, n)}, {"w": torch.ones(1, 1)}
    view = Sent(channel)
    assert float(effective(view, {"w": error}, Box(zero, zero, one))) == pytest.approx(n, rel=0.1)
    few = torch.cat([error[:, :2000], torch.zeros(1, n - 2000)], 1)
    assert float(effective(view, {"w": few}, Box(zero, zero, one))) == pytest.approx(2000, rel=0.3)

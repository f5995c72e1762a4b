"""Law 3: a channel keeps its word. The contract finds every stage of the catalog by itself."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.func import vmap

from qleak import random, tree
from qleak.catalog import build, catalog
from qleak.channels import (
    Channel,
    chain,
    clip_l1,
    clip_l2,
    error_feedback,
    fixed_point,
    float8,
    gaussian,
    identity,
    kmeans,
    laplace,
    logarithmic,
    mean,
    powersgd,
    qsgd,
    random_k,
    rounds,
    scale,
    sign,
    stack,
    stochastic,
    stochastic_sign,
    terngrad,
    threshold,
    top_k,
    total,
    uniform,
)
from qleak.channels.reading import interval
from qleak.errors import Expected
from qleak.types import Stage

LIKE = {"w": torch.zeros(4, 3, 5), "b": torch.zeros(7)}


def made() -> list[Stage | Channel]:
    return [make() for name, make in catalog("channels").items() if name not in ("chain", "identity")]


def alone(stage: Stage | Channel):
    """A channel around one stage, with the bound it needs."""
    if isinstance(stage, Channel):
        return stage
    return chain(clip_l1(100.0), stage) if stage.noise in ("normal", "laplace") else chain(stage)


CHANNELS = [
    *(alone(s) for s in made() if isinstance(s, Channel) or s.kind != "join"),
    identity(),
    chain(uniform(levels=2)),
    chain(uniform(bits=4)),
    chain(top_k(ratio=0.3), uniform(levels=16)),
    chain(top_k(ratio=0.5), sign()),
    chain(clip_l2(1.0), uniform(levels=64)),
    chain(gaussian(0.1, unbounded=True), uniform(levels=16)),
    chain(uniform(levels=16), gaussian(0.1, unbounded=True)),
    chain(sign(scale="none")),
    chain(uniform(levels=16, range="max")),
    chain(uniform(bits=4, per="channel")),
    chain(uniform(bits=3, per="bucket", bucket=16)),
    chain(stochastic(levels=4)),
    chain(stochastic(levels=9, range="max", per="bucket", bucket=16)),
    chain(qsgd(levels=4, norm="max", bucket=16)),
    chain(terngrad(clip=0)),
    chain(logarithmic(bits=2)),
    chain(kmeans(clusters=3, iterations=0)),
    chain(fixed_point(bits=4, fraction=1)),
    chain(float8(format="e5m2", scale="none")),
    chain(top_k(ratio=0.2, scope="global")),
    chain(top_k(ratio=0.2, scope="global"), uniform(levels=8)),
    chain(random_k(k=3), uniform(levels=8)),
    chain(random_k(ratio=0.5), stochastic(levels=8)),
    chain(top_k(ratio=0.5), qsgd(bucket=8)),
    chain(clip_l2(1.0), stochastic(levels=16)),
    chain(powersgd(rank=1)),
    error_feedback(chain(top_k(ratio=0.1), uniform(levels=16))),
    rounds(chain(uniform(levels=4)), times=3),
    rounds(chain(gaussian(0.5, unbounded=True)), times=3),
]
IDS = [c.spec for c in CHANNELS]


def some(seed: int = 0, like=LIKE, rows: tuple[int, ...] = (), dtype=torch.float32):
    return {k: random.normal(random.generator(seed, k), (*rows, *v.shape)).to(dtype) for k, v in like.items()}


def send(channel, x, seed: int = 0, like=LIKE, rows: tuple[int, ...] = ()):
    noise = channel.draw(random.generator(seed, "noise"), like, rows)
    return channel.send(channel.knobs(), x, noise, channel.init(like), like)[0]


def deterministic(channel) -> bool:
    return not any(s.noise for s in channel.stages)


def test_the_contract_covers_every_factory():
    names = {s.name for c in CHANNELS for s in c.stages} | {"total", "chain", "identity", "mean"}
    names |= {c.spec.split("(")[0] for c in CHANNELS}
    assert set(catalog("channels")) <= names


@pytest.mark.parametrize("channel", CHANNELS, ids=IDS)
def test_keys_shapes_and_dtypes_are_kept(channel):
    x = some()
    got = channel.receive(channel.knobs(), send(channel, x)[-1], LIKE)
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {k: (v.shape, v.dtype) for k, v in LIKE.items()}


@pytest.mark.parametrize("channel", CHANNELS, ids=IDS)
def test_vmapped_equals_looped(channel):
    xs = [some(i) for i in range(3)]
    noises = [channel.draw(random.generator(i, "n"), LIKE) for i in range(3)]
    knobs, state = channel.knobs(), channel.init(LIKE)
    looped = [
        channel.receive(knobs, channel.send(knobs, x, n, state, LIKE)[0][-1], LIKE)
        for x, n in zip(xs, noises, strict=True)
    ]
    stacked = tree.nested_map(lambda *t: torch.stack(t), *noises)
    one = lambda x, n: channel.receive(knobs, channel.send(knobs, x, n, state, LIKE)[0][-1], LIKE)  # noqa: E731
    mapped = vmap(one, randomness="error")(tree.stack(xs), stacked)
    for i, alone_ in enumerate(looped):
        for k in alone_:
            torch.testing.assert_close(mapped[k][i], alone_[k], rtol=1e-5, atol=1e-6)  # of numbers near 1


@pytest.mark.parametrize("channel", CHANNELS, ids=IDS)
def test_codes_have_no_more_than_two_to_the_bits_values(channel):
    message = send(channel, some())[-1]
    code = channel.legs[-1].stages[-1] if channel.legs[-1].stages else None
    if code is None or code.kind != "code":
        pytest.skip("sends numbers")
    for v in message.code.values():
        assert len(v.unique()) <= math.ceil(2 ** channel.facts(LIKE).width - 1e-9)
    assert channel.bits(message, LIKE) >= sum(v.numel() for v in message.code.values())


@pytest.mark.parametrize("channel", CHANNELS, ids=IDS)
@pytest.mark.parametrize("seed", range(5))
def test_the_truth_lies_in_its_cell_and_fits(channel, seed):
    x, knobs = some(seed), channel.knobs()
    message = send(channel, x)[-1]
    if channel.has_cell():
        lo, hi = channel.cell(knobs, message, LIKE)
        assert all(((x[k] >= lo[k]) & (x[k] <= hi[k])).all() for k in x)
    if deterministic(channel) and channel.facts(LIKE).exact:
        assert float(channel.misfit(knobs, message, x, LIKE)) == pytest.approx(0, abs=1e-10)
        other = some(seed + 100)  # and the same reading can fail
        assert float(channel.misfit(knobs, message, other, LIKE)) > 0


def test_a_cell_without_widening_would_exclude_the_truth():
    """The broken variant: the same test on cells that were not moved outward."""
    outside = 0
    for seed in range(20):
        like = {"w": torch.zeros(20_000)}
        x = {"w": random.normal(random.generator(seed), (20_000,))}
        c = chain(uniform(levels=256))
        message = send(c, x, like=like)[-1]
        lo, hi, code = message.side[0]["lo"]["w"], message.side[0]["hi"]["w"], message.code["w"].float()
        step = (hi - lo) / 255
        bare = (x["w"] >= lo + (code - 0.5) * step) & (x["w"] <= lo + (code + 0.5) * step)
        low, high = c.cell(c.knobs(), message, like)
        assert ((x["w"] >= low["w"]) & (x["w"] <= high["w"])).all()
        outside += int((~bare).sum())
    assert outside > 0


def unbiased_by_test(channel, draws: int = 4000) -> bool:
    """Whether the mean of many receptions lies within 4 standard errors of the truth, on every coordinate."""
    x, knobs = some(3), channel.knobs()
    got = [tree.ravel(channel.receive(knobs, send(channel, x, i)[-1], LIKE))[0] for i in range(draws)]
    sample, truth = torch.stack(got).double(), tree.ravel(x)[0].double()
    error = (sample.mean(0) - truth).abs()
    return bool((error <= 4 * sample.std(0) / math.sqrt(draws) + 1e-6).all())


@pytest.mark.parametrize("channel", [c for c in CHANNELS if c.facts().unbiased], ids=lambda c: c.spec)
def test_the_unbiased_claim_holds(channel):
    if any(s.name == "scale" for s in channel.stages):
        pytest.skip("unbiased for the scaled value by definition")
    assert unbiased_by_test(channel, 1000)


def test_the_unbiased_test_rejects_biased_channels():
    assert not unbiased_by_test(chain(uniform(levels=4), gaussian(0.01, unbounded=True)), 1000)
    assert not unbiased_by_test(chain(stochastic_sign()), 1000)


def test_reading_noise_in_front_of_a_code_matches_monte_carlo():
    """−log P(code | x) of gauss → uniform against observed frequencies: chi-square, and it rejects a wrong σ."""
    n = 4000
    like = {"w": torch.zeros(n)}
    x = {"w": torch.full((n,), 0.1)}
    c = chain(gaussian(0.3, unbounded=True), uniform(levels=9))
    message = send(c, x, like=like)[-1]
    levels = 9

    def expected(sigma: float) -> torch.Tensor:
        channel = chain(gaussian(sigma, unbounded=True), uniform(levels=levels))
        out = []
        for code in range(levels):
            m = message._replace(code={"w": torch.tensor([code])})
            out.append(math.exp(-float(channel.misfit(channel.knobs(), m, {"w": x["w"][:1]}, {"w": x["w"][:1]}))))
        return torch.tensor(out)

    seen = torch.bincount(message.code["w"], minlength=levels).double()
    p = expected(0.3).double()
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)
    keep = p * n > 5
    assert stats.chisquare(seen[keep], (p / p[keep].sum() * seen[keep].sum())[keep]).pvalue > 1e-3
    q = expected(0.36).double()
    assert stats.chisquare(seen[keep], (q / q[keep].sum() * seen[keep].sum())[keep]).pvalue < 1e-3


def test_reading_a_coin_matches_monte_carlo():
    like = {"w": torch.zeros(3)}
    x, c = {"w": torch.tensor([-0.4, 0.1, 1.0])}, chain(stochastic_sign())
    codes = torch.stack([send(c, x, i, like)[-1].code["w"] for i in range(4000)]).float()
    want = torch.tensor([0.3, 0.55, 1.0])
    torch.testing.assert_close(codes.mean(0), want, atol=0.03, rtol=0)
    message = send(c, x, 0, like)[-1]._replace(code={"w": torch.tensor([1, 1, 1])})
    assert float(c.misfit(c.knobs(), message, x, like)) == pytest.approx(-math.log(0.3 * 0.55), abs=1e-3)


def test_votes_are_read_by_their_moments():
    """top-k → sign → sum of 50 → gauss → threshold: P(+1) from the pushed moments against simulation."""
    like, rows = {"w": torch.zeros(40)}, 50
    x = some(1, like, (rows,))
    x["w"] = x["w"] + 0.8 * random.normal(random.generator(9), (40,))
    c = chain(top_k(ratio=0.5), stochastic_sign(), total("replace-one"), gaussian(5.0), threshold(6.0))
    votes = torch.stack([send(c, x, i, like, (rows,))[-1].code["w"] for i in range(600)])
    up = (votes == 1).float().mean(0)
    message, quiet = send(c, x, 0, like, (rows,))[-1], torch.zeros(40, dtype=torch.int32)
    guess = []
    for j in range(40):
        codes = [quiet.scatter(0, torch.tensor([j]), v) for v in (-1, 0, 1)]
        misfits = [float(c.misfit(c.knobs(), message._replace(code={"w": v}), x, like)) for v in codes]
        guess.append(torch.softmax(-torch.tensor(misfits), 0)[2])
    assert float((torch.stack(guess) - up).square().mean().sqrt()) < 0.03
    assert float((torch.stack(guess).flip(0) - up).square().mean().sqrt()) > 0.1


def test_gradients_of_every_reading_are_finite():
    for c in CHANNELS:
        message = send(c, some())[-1]
        guess = {k: v * 1e3 for k, v in some(5).items()}
        grads = torch.func.grad(lambda g, c=c, m=message: c.misfit(c.knobs(), m, g, LIKE))(guess)
        assert all(v.isfinite().all() for v in grads.values()), c.spec


DEGENERATE = {
    "zeros": {"w": torch.zeros(3, 4)},
    "constant": {"w": torch.full((3, 4), 2.5)},
    "one element": {"w": torch.tensor([-1.5])},
    "scalar": {"w": torch.tensor(3.0)},
    "non-contiguous": {"w": torch.arange(12.0).view(3, 4).t()},
    "empty": {"w": torch.zeros(0), "b": torch.ones(2)},
    "huge and tiny": {"w": torch.tensor([1e15, -1e-30, 0.0])},
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("channel", CHANNELS, ids=IDS)
def test_degenerate_trees_stay_finite(channel, name):
    x = DEGENERATE[name]
    like = {k: torch.zeros_like(v) for k, v in x.items()}
    messages = send(channel, x, like=like)
    got = channel.receive(channel.knobs(), messages[-1], like)
    assert all(v.isfinite().all() for v in got.values())
    assert math.isfinite(float(channel.misfit(channel.knobs(), messages[-1], x, like)))
    assert math.isfinite(channel.bits(messages[-1], like))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.integers(2, 4096))
def test_uniform_never_leaves_its_cell(values, levels):
    like = {"w": torch.zeros(len(values))}
    x, c = {"w": torch.tensor(values)}, chain(uniform(levels=levels))
    message = send(c, x, like=like)[-1]
    lo, hi = c.cell(c.knobs(), message, like)
    got = c.receive(c.knobs(), message, like)["w"]
    assert float(interval(x["w"], lo["w"], hi["w"]).sum()) == 0
    step = float(x["w"].max() - x["w"].min()) / (levels - 1)
    assert float((got - x["w"]).abs().max()) <= step / 2 + 1e-6 * float(x["w"].abs().max()) + 1e-30


def test_uniform_agrees_with_torch():
    """torch's own affine quantizer with the same scale and zero point gives the same codes."""
    x = {"w": random.normal(random.generator(2), (1000,))}
    c = chain(uniform(levels=256))
    message = send(c, x, like=x)[-1]
    lo, hi = x["w"].min(), x["w"].max()
    step = (hi - lo) / 255
    ours = message.code["w"]
    fake = torch.fake_quantize_per_tensor_affine(x["w"] - lo, float(step), 0, 0, 255) / step
    assert float((fake.round() - ours).abs().max()) <= 1  # ties after the shift
    assert float((fake.round() != ours).float().mean()) < 0.01


# --- the two systems that later issues build on this very type ----------------------------------------


def test_private_training_is_a_channel():
    """Per-example clip → sum → Gaussian → mean equals a loop, keeps its bound, and knows its event."""
    like, b, c_, sigma = LIKE, 6, 0.7, 0.35
    x = some(1, rows=(b,))
    c = chain(clip_l2(c_), total(), gaussian(sigma), mean(b))
    noise = c.draw(random.generator(0, "noise"), like, (b,))
    messages, _ = c.send(c.knobs(), x, noise, c.init(like), like)
    loop = {k: torch.zeros_like(v) for k, v in like.items()}
    for i in range(b):
        row = tree.at(x, i)
        loop = tree.add(loop, tree.scale(row, min(1.0, c_ / float(tree.norm(row)))))
    want = {k: (v + sigma * noise[1][0][k]) / b for k, v in loop.items()}
    got = c.receive(c.knobs(), messages[-1], like)
    for k in want:
        torch.testing.assert_close(got[k], want[k], rtol=1e-5, atol=1e-6)
    facts = c.facts(like)
    assert facts.event.noise_multiplier == pytest.approx(sigma / c_)
    assert c.upto(0).facts(like).event is None
    server = c.receive(c.knobs(), messages[0], like, leg=0)
    assert all(float(tree.norm(tree.at(server, i))) <= c_ * (1 + 1e-5) for i in range(b))


def test_a_teacher_vote_is_a_channel():
    """top-k → sign → sum → Gaussian → threshold: values, and the sensitivity 2√k that its ε rests on."""
    like, n, k, sigma = {"x": torch.zeros(30)}, 50, 5, 8.0
    c = chain(top_k(k=k), stochastic_sign(), total("replace-one"), gaussian(sigma), threshold(3.0))
    x = some(2, like, (n,))
    noise = c.draw(random.generator(0, "noise"), like, (n,))
    messages, _ = c.send(c.knobs(), x, noise, c.init(like), like)
    votes = torch.zeros(30)
    for i in range(n):
        row = x["x"][i]
        top = row.abs().topk(k).indices.sort().values
        p = 0.5 + row[top] / (2 * row[top].abs().max())
        votes[top] += torch.where(noise[0][1]["x"][i] < p, 1.0, -1.0)
    noisy = votes + sigma * noise[1][0]["x"]
    want = (noisy > 3).int() - (noisy < -3).int()
    assert torch.equal(messages[-1].code["x"], want.to(torch.int32))
    assert c.facts(like).event.noise_multiplier == pytest.approx(sigma / (2 * math.sqrt(k)))
    assert c.upto(0).facts(like).event is None
    # The bound is reached by a teacher who turns every vote of the same support around, and never exceeded.
    one = {"x": torch.zeros(30)}
    one["x"][:k] = 1.0
    votes_of = chain(top_k(k=k), sign(scale="none"))
    two = [
        votes_of.receive(votes_of.knobs(), send(votes_of, {"x": s * one["x"]}, like=like)[-1], like)["x"]
        for s in (1, -1)
    ]
    assert float((two[0] - two[1]).norm()) == pytest.approx(2 * math.sqrt(k))
    for i in range(n):
        a, b = (
            votes_of.receive(votes_of.knobs(), send(votes_of, tree.at(x, j), like=like)[-1], like)["x"] for j in (i, 0)
        )
        assert float((a - b).norm()) <= 2 * math.sqrt(k) + 1e-6


def test_an_empty_batch_sends_noise_alone():
    c = chain(clip_l2(1.0), total(), gaussian(0.5), mean(4))
    x = {k: v.new_zeros(0, *v.shape) for k, v in LIKE.items()}
    noise = c.draw(random.generator(0), LIKE, (0,))
    messages, _ = c.send(c.knobs(), x, noise, c.init(LIKE), LIKE)
    torch.testing.assert_close(messages[-1].code["b"], noise[1][0]["b"] * 0.5 / 4)
    assert c.bits(messages[0], LIKE, 0) == 0


def test_levels_can_be_lanes():
    levels = (2, 5, 16, 256, 4096)
    channels = [chain(uniform(levels=n)) for n in levels]
    x, knobs = some(4), stack(channels)
    base = channels[0]
    lanes = vmap(lambda k: base.receive(k, base.send(k, x, ((({}),),), base.init(LIKE), LIKE)[0][0], LIKE))(knobs)
    for i, c in enumerate(channels):
        alone_ = c.receive(c.knobs(), send(c, x)[-1], LIKE)
        assert all(torch.equal(lanes[k][i], alone_[k]) for k in alone_)
    with pytest.raises(Expected, match="same stages"):
        stack([chain(uniform()), chain(sign())])


# --- facts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stages_",
    [
        (laplace(eps=1.0),),
        (gaussian(1.0),),
        (clip_l2(1.0), laplace(eps=1.0)),
        (clip_l2(1.0), total(), uniform(), gaussian(1.0)),
        (clip_l2(1.0), gaussian(0.1, unbounded=True), gaussian(1.0)),
        (total(), gaussian(1.0)),
    ],
    ids=lambda s: " > ".join(x.name for x in s),
)
def test_noise_without_a_bound_is_refused_when_the_chain_is_built(stages_):
    what = r"(a bounded input|an input bounded in L1, not L2,)"
    with pytest.raises(
        Expected, match=rf"^Expected {what} before (laplace|gaussian)\(.*\): put clip_l[12]\(\.\.\.\) in front"
    ):
        chain(*stages_)


def test_a_stage_that_says_nothing_keeps_nothing():
    """The broken variant of the reset rule: a quantizer that kept its bound would let noise claim an event."""
    forgetful = replace(uniform(), fold=lambda before, reset, like: before)
    with pytest.raises(Expected):
        chain(clip_l2(1.0), total(), uniform(), gaussian(1.0))
    assert chain(clip_l2(1.0), total(), forgetful, gaussian(1.0)).facts(LIKE).event is not None


def test_laplace_takes_its_scale_from_the_bound():
    c = chain(clip_l1(2.0), laplace(eps=0.5))
    assert c.stages[1].knobs["size"] == pytest.approx(2 * 2.0 / 0.5)
    assert c.facts(LIKE).event.noise_multiplier == pytest.approx(1 / 0.5)
    summed = chain(clip_l1(2.0), total(), laplace(eps=0.5))
    assert summed.stages[2].knobs["size"] == pytest.approx(2.0 / 0.5)
    assert chain(laplace(eps=0.5, unbounded=True)).facts(LIKE).event is None


def test_scaling_and_post_processing_keep_the_event():
    c = chain(clip_l2(2.0), scale(0.5), total(), gaussian(3.0), uniform(levels=16))
    assert c.facts(LIKE).event.noise_multiplier == pytest.approx(3.0)
    assert len(c.legs) == 2


def test_legs_follow_the_grammar():
    def legs(*s):
        return [len(leg.stages) for leg in chain(*s).legs]

    assert legs() == [0]
    assert legs(clip_l2(1.0), uniform()) == [2]
    assert legs(top_k(), uniform()) == [2]
    assert legs(uniform(), gaussian(1.0, unbounded=True)) == [1, 1]
    assert legs(uniform(), top_k()) == [1, 1]
    assert legs(uniform(), uniform()) == [1, 1]
    assert legs(clip_l2(1.0), total(), gaussian(1.0), mean(2)) == [1, 2]
    assert legs(total()) == [0, 0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: uniform(bits=0), "Expected bits=0 in [1, 24]."),
        (lambda: uniform(levels=1), "Expected levels=1 in [2, 1.67772e+07]."),
        (lambda: uniform(levels=4, bits=2), "Expected one of levels=4 and bits=2, got both."),
        (lambda: top_k(ratio=0.0), "Expected ratio=0.0 in [1e-09, 1]."),
        (lambda: clip_l2(-1.0), "Expected bound=-1.0 > 0."),
        (lambda: sign(scale="max"), "Expected scale='max' to be one of: mean, none."),
    ],
)
def test_bad_arguments_are_one_line(make, text):
    with pytest.raises(Expected) as caught:
        make()
    assert str(caught.value) == text


def test_rows_of_the_wrong_shape_are_refused():
    c = chain(clip_l2(1.0), total(), gaussian(1.0))
    with pytest.raises(Expected, match=r"Expected rows\['w'\] of 1 row axes"):
        c.send(c.knobs(), some(), c.draw(random.generator(0), LIKE, (3,)), c.init(LIKE), LIKE)


def test_specs_build_the_same_channel():
    for c in CHANNELS:
        assert build("channels", c.spec).spec == c.spec

"""Aggregation channels: what a row can move is what the noise is priced by, attained; and a join may be streamed."""

import functools
import math

import dp_accounting as dp
import pytest
import torch
from scipy import stats

from qleak import random, tree
from qleak.accounting import epsilon
from qleak.catalog import build
from qleak.channels import (
    Channel,
    block_mean,
    chain,
    count_sketch,
    gaussian,
    gnmax,
    histogram,
    klevel,
    mean,
    onto,
    project,
    scale,
    stochastic_sign,
    streamed,
    threshold,
    top_k,
    total,
    unit,
)
from qleak.errors import Expected
from qleak.types import Belief

D, K = 64, 5
LIKE = {"x": torch.zeros(D)}
FRONTS = {
    "datalens": (top_k(k=K), stochastic_sign(cap=1e-4)),
    "sign": (stochastic_sign(cap=1e-4),),
    "unit": (unit(),),
    "klevel": (klevel(levels=4, cap=1e-3),),
    "klevel-odd": (klevel(levels=5, cap=1e-3),),
    "top-k klevel": (top_k(k=K), klevel(levels=4)),
    "g-pate": (project(dim=10), histogram(bins=10, reach=1e-3)),
    "project": (unit(), project(dim=10)),
    "blocks": (unit(), project(dim=12, blocks=3)),
    "sketch": (unit(), count_sketch(columns=16, rows=5)),
    "fetchsgd": (stochastic_sign(cap=1e-4), count_sketch(columns=16, rows=5, k=K)),
    "block mean": (unit(), block_mean(side=4)),
}
VOTES = [name for name, front in FRONTS.items() if name not in ("unit", "project", "blocks", "sketch", "block mean")]


def joined(name: str) -> Channel:
    return chain(*FRONTS[name], total("replace-one"))


def sums(channel: Channel, rows: torch.Tensor, noise: streamed.Noise) -> torch.Tensor:
    """What reaches the noise, flat."""
    return tree.ravel(streamed.gather(channel, channel.knobs(), {"x": rows}, noise, LIKE))[0].double()


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.generator("aggregation", seed), shape)


def drawn(channel: Channel, seed: int, *lead: int, part: str = "all") -> streamed.Noise:
    return streamed.draws(channel, random.generator("draws", seed), LIKE, lead, part)


@functools.lru_cache
def direction(name: str) -> torch.Tensor:
    """The row that a linear stage stretches most: the first singular vector of what it does to unit vectors."""
    linear = chain(FRONTS[name][-1], total())
    matrix = torch.stack([sums(linear, row[None], drawn(linear, 0, 1)) for row in torch.eye(D)])
    return torch.linalg.svd(matrix).U[:, 0].float()


@functools.lru_cache
def worst(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows `[d]` that are as far apart behind the front as its sensitivity says."""
    if name in ("project", "blocks", "sketch", "block mean"):
        one = direction(name)
    elif name == "g-pate":  # every projection beyond one end of the histogram
        p = torch.stack([sums(c := chain(project(dim=10), total()), row[None], drawn(c, 0, 1)) for row in torch.eye(D)])
        one = torch.linalg.pinv(p).T.float() @ torch.ones(10)
    else:
        one = (torch.arange(D) < (K if name.startswith(("datalens", "top-k")) else D)).float()
    return one, -one


@pytest.mark.parametrize("name", FRONTS)
def test_no_row_moves_the_sum_further_than_the_noise_is_priced_for(name):
    channel, n = joined(name), 6
    bound = channel.facts(LIKE).sensitivity.value
    noisy = chain(*FRONTS[name], total("replace-one"), gaussian(3.0)).facts(LIKE).event
    assert noisy == dp.GaussianDpEvent(3.0 / bound)
    most = 0.0
    for seed in range(20):
        rows = normal(seed, n, D) * 10.0 ** (seed % 5 - 4)
        rows[1] = torch.where(normal(seed + 99, D) > 0, 1.0, -1.0)
        other = rows.clone()
        other[seed % n] = (-rows[seed % n], normal(seed + 50, D), torch.zeros(D), 1e3 * normal(seed, D))[seed % 4]
        one, two = drawn(channel, seed, n), drawn(channel, seed + 1, n)
        # The replaced teacher may have any luck: its coins fall anew, the others' do not.
        luck = tree.nested_map(
            lambda a, b, i=seed % n: torch.where((torch.arange(n) == i).view(n, *[1] * (a.ndim - 1)), b, a), one, two
        )
        most = max(most, float((sums(channel, rows, one) - sums(channel, other, luck)).norm()))
    assert 0 < most <= bound * (1 + 1e-6)
    if name == "fetchsgd":
        return  # the sketch's worst direction is no vector of signs: a bound, not attained
    a, b = worst(name)
    rest = normal(1, n - 1, D)
    noise = drawn(channel, 7, n)
    moved = sums(channel, torch.cat([a[None], rest]), noise) - sums(channel, torch.cat([b[None], rest]), noise)
    assert float(moved.norm()) == pytest.approx(bound, rel=1e-5 if name in ("project", "blocks", "sketch") else 1e-6)


def test_the_sensitivities_in_numbers():
    found = {name: joined(name).facts(LIKE).sensitivity.value for name in FRONTS}
    assert found["datalens"] == pytest.approx(2 * math.sqrt(K)) and found["sign"] == pytest.approx(2 * math.sqrt(D))
    assert found["unit"] == 2 and found["klevel"] == pytest.approx(3 * math.sqrt(D))
    assert found["top-k klevel"] == pytest.approx(3 * math.sqrt(K)) and found["g-pate"] == pytest.approx(math.sqrt(20))
    assert found["block mean"] == pytest.approx(2 * 4 / 8, rel=1e-5)
    assert 2 * math.sqrt(5) <= found["sketch"] <= 2 * math.sqrt(5 * math.ceil(D / 16))
    assert found["fetchsgd"] == pytest.approx(found["sketch"] * math.sqrt(D))


def test_a_sum_that_is_made_sparse_has_no_sensitivity_left():
    """Close sums may keep different coordinates: choosing in front of the noise is refused, behind it it is free."""
    c, sparse = chain(unit(), total("replace-one")), chain(total(), top_k(k=1))
    rows = torch.eye(D)[:2].repeat(50, 1)
    close = [torch.cat([rows, e[None]]) for e in torch.eye(D)[:2]]
    with pytest.raises(Expected, match="Expected a bounded input before gaussian"):
        chain(unit(), total("replace-one"), top_k(k=1), gaussian(1.0))
    assert chain(unit(), total("replace-one"), gaussian(1.0), top_k(k=1)).facts(LIKE).event == dp.GaussianDpEvent(0.5)
    kept = [
        streamed.release(sparse, sparse.knobs(), {"x": sums(c, r, drawn(c, 0, 101)).float()}, ((), ({},)), LIKE)["x"]
        for r in close
    ]
    assert float((kept[0] - kept[1]).norm()) > 10 * c.facts(LIKE).sensitivity.value


# --- streaming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRONTS)
def test_chunks_and_release_are_the_channel_itself(name):
    """Images are places behind the row axis; each of them is one send and receive of all rows."""
    back = (gnmax(2.0, sigma_test=1.0, at=3.0),) if name == "g-pate" else (gaussian(2.0), threshold(3.0))
    channel, n, b = chain(*FRONTS[name], total("replace-one"), *back), 23, 3
    rows, noise = {"x": 1e-3 * normal(3, n, b, D)}, drawn(channel, 4, n, b)
    knobs, first = channel.knobs(), sum(leg.join is None for leg in channel.legs)
    cut = [
        (tree.at(rows, s), tuple(tree.nested_map(lambda v, s=s: v[s], leg) for leg in noise[:first]))
        for s in (slice(0, 10), slice(10, 10), slice(10, 23))
    ]
    summed = functools.reduce(tree.add, (streamed.gather(channel, knobs, x, eps, LIKE) for x, eps in cut))
    got = streamed.release(channel, knobs, summed, noise, LIKE)["x"]
    assert got.shape == (b, D)
    for j in range(b):
        alone = tuple(
            tree.nested_map(lambda v, i=i, j=j: v[:, j] if i < first else v[j], leg) for i, leg in enumerate(noise)
        )
        messages, _ = channel.send(knobs, {"x": rows["x"][:, j]}, alone, channel.init(LIKE), LIKE)
        whole = channel.receive(knobs, messages[-1], LIKE)["x"]
        torch.testing.assert_close(got[j], whole, rtol=1e-5, atol=1e-5)
        if name in VOTES and name != "g-pate":  # whose votes are lifted by a matrix product
            assert torch.equal(got[j], whole)


@pytest.mark.parametrize("name", VOTES)
def test_votes_add_up_to_the_same_bits_in_any_order(name):
    channel, n = joined(name), 31
    rows, noise = 1e-3 * normal(5, n, D), drawn(channel, 6, n)
    want = sums(channel, rows, noise)
    order = random.permutation(random.generator(8), n)
    assert torch.equal(sums(channel, rows[order], tree.nested_map(lambda v: v[order], noise)), want)
    for size in (1, 7, 30):
        parts = [
            sums(channel, rows[i : i + size], tree.nested_map(lambda v, i=i, size=size: v[i : i + size], noise))
            for i in range(0, n, size)
        ]
        assert torch.equal(torch.stack(parts).sum(0), want)
    half = drawn(channel, 6, 15, part="rows"), rows[:15]
    weights = (torch.arange(n) < 15).float()
    masked = streamed.gather(channel, channel.knobs(), {"x": rows}, noise, LIKE, weights)
    assert torch.equal(tree.ravel(masked)[0].double(), sums(channel, half[1], tree.nested_map(lambda v: v[:15], noise)))


def test_uniform_draws_do_not_depend_on_the_cut():
    channel, gen = joined("datalens"), random.generator("draws", 1)
    whole = drawn(channel, 1, 40, 3, part="rows")[0][1]["x"]
    cut = [streamed.draws(channel, gen, LIKE, (n, 3), "rows")[0][1]["x"] for n in (8, 1, 31)]
    assert torch.equal(torch.cat(cut), whole) and whole.shape == (40, 3, K)


def test_streaming_refuses_what_it_cannot_do():
    one = joined("unit")
    for wrong in (chain(unit()), chain(unit(), total(), total())):
        with pytest.raises(Expected, match="Expected a channel with one join"):
            streamed.gather(wrong, wrong.knobs(), LIKE, (), LIKE)
    with pytest.raises(Expected, match="behind leading axes"):
        streamed.gather(one, one.knobs(), {"x": torch.zeros(3, D - 1)}, drawn(one, 0, 3), LIKE)
    with pytest.raises(Expected, match="Expected rows with a leading axis"):
        streamed.gather(one, one.knobs(), LIKE, drawn(one, 0, 1), LIKE)
    with pytest.raises(Expected, match="to be one of"):
        drawn(one, 0, 3, part="some")


# --- the stages --------------------------------------------------------------------------------------


def four_errors(sample: torch.Tensor, truth: torch.Tensor) -> bool:
    error = (sample.double().mean(0) - truth.double()).abs()
    return bool((error <= 4 * sample.double().std(0) / math.sqrt(len(sample)) + 1e-6).all())


@pytest.mark.parametrize("levels", [2, 3, 4, 7])
def test_klevel_votes_are_symmetric_and_unbiased(levels):
    channel, n = chain(klevel(levels=levels, cap=0.5), total()), 2000
    x = torch.linspace(-1, 1, D)
    row = channel.upto(0)
    noise = drawn(channel, levels, n)
    code = torch.func.vmap(lambda e: row.send(row.knobs(), {"x": x}, e, row.init(LIKE), LIKE)[0][0].code["x"])(
        noise[:1]
    )
    votes = (2 * code - (levels - 1)) / 2
    want = (x / 0.5).clamp(-1, 1) * (levels - 1) / 2
    assert four_errors(votes, want) and set(votes.unique().tolist()) == {i - (levels - 1) / 2 for i in range(levels)}
    assert not four_errors(votes - 0.5, want)  # codes −K/2 … K/2−1
    zero = streamed.gather(channel, channel.knobs(), {"x": torch.zeros(n, D)}, noise, LIKE)["x"] / n
    assert float(zero.abs().max()) < 4 * 0.5 / math.sqrt(n) + 1e-6


@pytest.mark.parametrize("make", [
    lambda seed: project(dim=10, seed=seed),
    lambda seed: project(dim=12, blocks=4, seed=seed),
    lambda seed: count_sketch(columns=7, rows=1, seed=seed),
    lambda seed: count_sketch(columns=7, rows=3, seed=seed),
], ids=["project", "blocks", "one row", "median of three"])  # fmt: skip
def test_lifting_is_unbiased_over_public_seeds(make):
    like, x = {"x": torch.zeros(20)}, {"x": normal(2, 20)}
    got = []
    for seed in range(160):
        c = chain(make(seed))
        messages, _ = c.send(c.knobs(), x, c.draw(random.generator(0), like), c.init(like), like)
        got.append(c.receive(c.knobs(), messages[0], like)["x"])
        assert not c.facts(like).unbiased  # of one matrix it is not
    assert four_errors(torch.stack(got), x["x"])
    assert not four_errors(torch.stack(got), 1.6 * x["x"])


def test_a_sketch_finds_the_heavy_coordinates():
    """Two of 784 stand out; 5 rows of 64 counters find them, and one row's reading alone is off by its collisions."""
    like, x = {"x": torch.zeros(784)}, 0.05 * normal(4, 784)
    x[10], x[500] = 5.0, -4.0
    c = chain(count_sketch(columns=64, rows=5, k=2))
    messages, _ = c.send(c.knobs(), {"x": x}, c.draw(random.generator(0), like), c.init(like), like)
    got = c.receive(c.knobs(), messages[0], like)["x"]
    assert got.nonzero().flatten().tolist() == [10, 500] and messages[0].code["x"].shape == (5, 64)
    torch.testing.assert_close(got[[10, 500]], x[[10, 500]], atol=0.5, rtol=0)
    assert c.bits(messages[0], like) == 32 * 5 * 64


@pytest.mark.parametrize(("n", "columns", "rows"), [(60, 16, 5), (40, 50, 3), (300, 4, 2), (1600, 100, 3)])
def test_a_sketch_s_norm_is_that_of_its_matrix(n, columns, rows):
    like = {"x": torch.zeros(n)}
    norm = chain(unit(), count_sketch(columns=columns, rows=rows)).facts(like).bound.value
    c = chain(count_sketch(columns=columns, rows=rows), total())
    eye = {"x": torch.eye(n)}
    matrix = torch.func.vmap(lambda x: c.stages[0].send({}, x, {}, ())[0])(eye)["x"].reshape(n, -1)
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(matrix.double(), 2)), rel=1e-9)
    assert math.sqrt(rows) * (1 - 1e-9) <= norm <= math.sqrt(rows * math.ceil(n / columns)) * (1 + 1e-9)


def test_a_public_basis():
    basis = torch.linalg.qr(normal(1, D, 6)).Q
    c = chain(unit(), onto(basis), total("replace-one"), gaussian(1.0))
    assert c.facts(LIKE).event.noise_multiplier == pytest.approx(0.5, rel=1e-5)
    inside = {"x": (basis @ normal(2, 6))[None]}
    alone = chain(onto(basis), total())
    knobs, noise = alone.knobs(), drawn(alone, 0, 1)
    got = streamed.release(alone, knobs, streamed.gather(alone, knobs, inside, noise, LIKE), noise, LIKE)
    torch.testing.assert_close(got["x"], inside["x"][0], atol=1e-5, rtol=1e-5)
    with pytest.raises(Expected, match="orthonormal"):
        onto(2 * basis)
    with pytest.raises(Expected, match="64 coordinates"):
        chain(onto(basis)).facts({"x": torch.zeros(5)})


@pytest.mark.parametrize(("s", "side", "channels"), [(28, 7, 1), (28, 8, 1), (16, 8, 3)])
def test_block_means(s, side, channels):
    like = {"x": torch.zeros(channels, s, s), "label": torch.zeros(10)}
    x = {"x": random.uniform(random.generator(3), (channels, s, s)), "label": torch.ones(10)}
    for lift in ("nearest", "bilinear"):
        c = chain(block_mean(side=side, channels=channels, lift=lift))
        messages, _ = c.send(c.knobs(), x, ((({}),),), c.init(like), like)
        small = messages[0].code["x"].reshape(channels, side, side)
        torch.testing.assert_close(small, torch.nn.functional.adaptive_avg_pool2d(x["x"], side))
        given = {} if lift == "nearest" else {"align_corners": False}
        want = torch.nn.functional.interpolate(small[None], size=s, mode=lift, **given)[0]
        got = c.receive(c.knobs(), messages[0], like)
        torch.testing.assert_close(got["x"], want)
        assert torch.equal(got["label"], x["label"])  # no image: as it is
        torch.testing.assert_close(c.expect(c.knobs(), x, like)["x"], want)


def test_normalised_rows():
    c = chain(unit(), total())
    rows = torch.stack([torch.zeros(D), 1e-30 * torch.ones(D), 1e-12 * normal(1, D), 1e15 * normal(2, D)])
    lengths = [float(sums(c, r[None], drawn(c, 0, 1)).norm()) for r in rows]
    assert lengths[:2] == [0, 0] and lengths[2:] == pytest.approx([1, 1], rel=1e-5)


# --- votes on values ---------------------------------------------------------------------------------


def test_g_pate_is_a_channel():
    """Projected, voted on, tested, answered and lifted: the bin of the majority, 0 where there is none."""
    like, n, m = {"x": torch.zeros(20)}, 200, 6
    c = chain(
        project(dim=m), histogram(bins=10, reach=1.0), total("replace-one"), gnmax(1e-3, sigma_test=1e-3, at=0.6 * n)
    )
    p = c.stages[0]
    aim = torch.tensor([0.5, -0.7, 3.0, 0.1, -0.1, 0.0])  # the last: half the rows on either side
    matrix = torch.func.vmap(lambda x: p.send({}, x, {}, ())[0])({"x": torch.eye(20)})["x"]
    wanted = aim.repeat(n, 1)
    wanted[: n // 2, 5], wanted[n // 2 :, 5] = 0.5, -0.5
    rows = {"x": wanted @ torch.linalg.pinv(matrix)}
    noise = streamed.draws(c, random.generator(1), like, (n,))
    assert noise[1][0]["x"].shape == (m, 11)
    messages, _ = c.send(c.knobs(), rows, noise, c.init(like), like)
    assert messages[-1].code["x"].tolist() == [8, 2, 10, 6, 5, 0]
    got = c.receive(c.knobs(), messages[-1], like)["x"]
    torch.testing.assert_close(got, torch.tensor([0.5, -0.7, 0.9, 0.1, -0.1, 0.0]) @ matrix.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(c.expect(c.knobs(), rows, like)["x"], got, atol=1e-3, rtol=0)
    assert c.bits(messages[-1], like) == 4 * m and c.law(-1, like).exact is False


def test_the_charge_of_a_vote():
    like, m = {"x": torch.zeros(50)}, 10
    made = functools.partial(chain, project(dim=m), histogram(bins=10, reach=1e-3))
    counts, test = dp.GaussianDpEvent(40 / math.sqrt(2 * m)), dp.GaussianDpEvent(150 / math.sqrt(m))
    assert same(made(total("replace-one"), gnmax(40.0)).facts(like).event, counts)
    asked = made(total("replace-one"), gnmax(40.0, sigma_test=150.0, at=200.0)).facts(like).event
    assert same(asked, dp.ComposedDpEvent([test, counts]))
    one = dp.GaussianDpEvent(1 / math.hypot(math.sqrt(m) / 150, math.sqrt(2 * m) / 40))
    assert epsilon(asked) == pytest.approx(epsilon(one), rel=1e-12)
    added = made(total(), gnmax(40.0, sigma_test=150.0, at=200.0)).facts(like).event
    assert same(added, dp.ComposedDpEvent([test, dp.GaussianDpEvent(40 / math.sqrt(m))]))
    # Of counts that are no histogram the largest is known to be no steadier than the counts; scaled votes scale both.
    other = chain(unit(), total("replace-one"), gnmax(40.0, sigma_test=150.0, at=2.0)).facts(like).event
    assert same(other, dp.ComposedDpEvent([dp.GaussianDpEvent(75), dp.GaussianDpEvent(20)]))
    scaled = made(scale(2.0), total("replace-one"), gnmax(80.0, sigma_test=300.0, at=200.0)).facts(like).event
    assert same(scaled, dp.ComposedDpEvent([test, counts]))
    with pytest.raises(Expected, match="Expected counts of bounded sensitivity before gnmax"):
        chain(total(), gnmax(1.0))
    with pytest.raises(Expected, match="or neither"):
        gnmax(1.0, at=3.0)


def same(one, two) -> bool:
    """Equal kinds of events, noise to rounding."""
    if isinstance(one, dp.ComposedDpEvent):
        return isinstance(two, dp.ComposedDpEvent) and all(map(same, one.events, two.events))
    return type(one) is type(two) and math.isclose(one.noise_multiplier, two.noise_multiplier, rel_tol=1e-12)


def test_winning_counts_move_less_than_counts():
    """The test's price: a replaced row moves each coordinate's largest count by at most one, attained by all at once."""
    c, n = joined("g-pate"), 9
    assert c.facts(LIKE).peak == pytest.approx(math.sqrt(10))
    best, full = 0.0, 0.0
    for seed in range(24):
        rows = 1e-3 * normal(seed, n, D)
        other = rows.clone()
        other[0] = (rows[0], 1e3 * normal(seed + 1, D), -rows[0], worst("g-pate")[0])[seed % 4]
        a, b = (sums(c, r, drawn(c, 0, n)).reshape(10, 10) for r in (rows, other))
        best, full = max(best, float((a.amax(-1) - b.amax(-1)).norm())), max(full, float((a - b).norm()))
    assert 1 <= best <= math.sqrt(10) + 1e-9 < full <= math.sqrt(20) + 1e-9
    same_rows = worst("g-pate")[0].repeat(n, 1)
    changed = torch.cat([worst("g-pate")[1][None], same_rows[1:]])
    a, b = (sums(c, r, drawn(c, 0, n)).reshape(10, 10) for r in (same_rows, changed))
    assert float((a.amax(-1) - b.amax(-1)).norm()) == pytest.approx(math.sqrt(10))


def test_reading_a_winner_matches_monte_carlo():
    """P(answer | counts) by quadrature against 20,000 votes; another σ is rejected."""
    counts, n = torch.tensor([3.0, 5.0, 4.0, 0.0]), 20_000
    like, many = {"x": torch.zeros(4)}, {"x": torch.zeros(n, 4)}

    def expected(sigma: float) -> torch.Tensor:
        c = chain(unit(), total(), gnmax(sigma, sigma_test=1.5, at=4.5))
        side = c.stages[-1]
        knobs = c.knobs()[-1][-1]
        belief = Belief({"x": counts}, {})
        return torch.stack([
            (-side.read(knobs, {"x": torch.tensor(code)}, {}, belief, "none")["x"]).exp() for code in range(5)
        ])  # fmt: skip

    stage = chain(unit(), total(), gnmax(2.0, sigma_test=1.5, at=4.5)).stages[-1]
    noise = {k: random.normal(random.generator(5), tuple(v.shape)) for k, v in stage.draws(many).items()}
    knobs = {k: torch.tensor(v) for k, v in stage.knobs.items()}
    code = stage.send(knobs, {"x": counts.expand(n, 4)}, noise, ())[0]["x"]
    seen = torch.bincount(code, minlength=5).double()
    p, q = expected(2.0).double(), expected(2.2).double()
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)
    assert stats.chisquare(seen, p / p.sum() * n).pvalue > 1e-3
    assert stats.chisquare(seen, q / q.sum() * n).pvalue < 1e-3
    assert stage.shape(like)["x"].shape == ()


# --- a channel through a small space -------------------------------------------------------------------


def test_small_spaces_are_carried_from_leg_to_leg():
    """Projected in the first leg, voted on behind the join, coded at the end: every part in its own space, lifted once."""
    like = {"w": torch.zeros(4, 5), "b": torch.zeros(7)}
    c = chain(unit(), project(dim=6), total("replace-one"), mean(8), gaussian(0.01), threshold(0.02))
    assert [{k: tuple(v.shape) for k, v in t.items()} for t in c.likes(like)] == [
        {"w": (4, 5), "b": (7,)}, {"w": (6,), "b": (6,)}, {"w": (6,), "b": (6,)},
    ]  # fmt: skip
    rows = {k: random.normal(random.generator(k), (8, *v.shape)) for k, v in like.items()}
    noise = c.draw(random.generator(0), like, (8,))
    assert noise[1][1]["w"].shape == (6,)
    messages, _ = c.send(c.knobs(), rows, noise, c.init(like), like)
    got = c.receive(c.knobs(), messages[-1], like)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in like.items()}
    first = c.receive(c.knobs(), messages[0], like, leg=0)  # what the server sees of every client, lifted as well
    assert first["w"].shape == (8, 4, 5)
    assert c.bits(messages[-1], like) == 2 * 12 and c.bits(messages[0], like, 0) == 8 * 32 * 12
    other = {k: -v for k, v in rows.items()}
    truth, wrong = (float(c.misfit(c.knobs(), messages[-1], g, like)) for g in (rows, other))
    assert truth < wrong
    assert c.expect(c.knobs(), rows, like)["w"].shape == (4, 5)
    assert build("channels", c.spec).spec == c.spec
    again = build("channels", c.spec)
    assert torch.equal(again.receive(again.knobs(), messages[-1], like)["w"], got["w"])


def test_an_empty_batch_of_small_rows_sends_noise_alone():
    c = chain(unit(), project(dim=6), total("replace-one"), gaussian(0.5))
    noise = c.draw(random.generator(0), LIKE, (0,))
    messages, _ = c.send(c.knobs(), {"x": torch.zeros(0, D)}, noise, c.init(LIKE), LIKE)
    torch.testing.assert_close(messages[-1].code["x"], 0.5 * noise[1][0]["x"])
    assert c.receive(c.knobs(), messages[-1], LIKE)["x"].shape == (D,)
    summed = streamed.gather(c, c.knobs(), {"x": torch.zeros(0, 2, D)}, drawn(c, 0, 0, 2), LIKE)
    assert summed["x"].shape == (2, 6) and not summed["x"].any()


@pytest.mark.parametrize(("make", "text"), [
    (lambda: project(dim=10, blocks=3), "Expected blocks=3 to divide dim=10."),
    (lambda: project(dim=0), "Expected dim=0 >= 1."),
    (lambda: klevel(levels=1), "Expected levels=1 in [2, 65536]."),
    (lambda: histogram(bins=1), "Expected bins=1 >= 2."),
    (lambda: count_sketch(k=0), "Expected k=0 >= 1."),
    (lambda: block_mean(lift="cubic"), "Expected lift='cubic' to be one of: bilinear, nearest."),
])  # fmt: skip
def test_bad_arguments_are_one_line(make, text):
    with pytest.raises(Expected) as caught:
        make()
    assert str(caught.value).startswith(text)

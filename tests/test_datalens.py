"""Teachers and votes: one record reaches one teacher, budgets are kept, chunks and order change nothing."""

import json
from dataclasses import replace

import pytest
import torch

from qleak import accounting, random, tree
from qleak.catalog import build, catalog
from qleak.engine import making
from qleak.engine.synthesis import Price
from qleak.errors import Expected
from qleak.plans import Synthesis, from_json
from qleak.plans.lens import ARMS, aggregator, lens
from qleak.synth import basis, budgets, canary, loop, partition, sets, teachers, vote
from qleak.types import Dataset, Public
from tests.layouts import SHARED, needs_mnist

MNIST = Public(60_000, (1, 28, 28), 10)
SMALL = "critic=linear_critic(), maker=mlp_maker(hidden=16, z_dim=4), teachers_batch=4, batch_teachers=5, batch_size=4"
VOTE = "channel=chain(top_k(k=5), sign('none'), total('replace-one'), gaussian(5.0), threshold(2.0))"


def some(n=120, side=8):
    """Records of ten classes: noise, and a bright row for the class."""
    x = 0.3 * random.uniform(random.generator("records"), (n, 1, side, side))
    y = torch.arange(n) % 10
    x[torch.arange(n), 0, y % side] += 0.7
    return Dataset(x.clamp(0, 1), y, "some", 10)


def options(text):
    """The options of a datalens(…), by the closure of its step."""
    synthesizer = build("synthesizers", text)
    (cell,) = (c.cell_contents for c in synthesizer.step.__closure__ if isinstance(c.cell_contents, loop.Options))
    return synthesizer, cell


def run(synthesizer, records, steps=3, seed=1):
    spend = synthesizer.spend(loop.public(records), 1e6, 1e-5)
    state = synthesizer.init(records, spend, seed)
    for t in range(steps):
        state = synthesizer.step(records, spend, state, t)
    return state


@pytest.mark.parametrize(("rule", "steps"), [("exact", 149), ("original", 86)])
def test_the_published_command_makes_so_many_steps(rule, steps):
    """The published command for Fashion-MNIST at ε = 1: 86 generator steps by its own rule, 149 by the exact one."""
    synthesizer = build("synthesizers", f"datalens(accounting={rule!r})")
    spend = synthesizer.spend(MNIST, 1.0, 1e-5)
    assert spend.steps == steps
    assert accounting.epsilon(spend.event(steps)) <= 1 < accounting.epsilon(spend.event(150))
    if rule == "original":
        assert spend.claimed(86) <= 1 < spend.claimed(87)
        assert accounting.epsilon(spend.event(86)) == pytest.approx(0.738, abs=1e-3)


@pytest.mark.parametrize("arm", sorted(set(ARMS) - {"signsgd_dept", "non_private"}))
@pytest.mark.parametrize("target", [0.2, 1.0, 10.0])
def test_a_calibrated_arm_spends_its_budget_and_not_more(arm, target):
    plan = lens(aggregate=arm, teachers_batch=2, batch_teachers=5, max_eps=str(target), limit=200)
    spend = plan.methods[0].spend(Public(60_000, (1, 8, 8), 10), target, 1e-5)
    epsilon = accounting.epsilon(spend.event(spend.steps))
    assert target * (1 - 1e-4) < epsilon <= target
    assert accounting.epsilon(spend.event(spend.steps + 1)) > target


def test_a_step_beyond_the_budget_is_refused():
    synthesizer = build("synthesizers", f"datalens({SMALL}, {VOTE})")
    with pytest.raises(Expected, match="what one step of 4 images costs"):
        synthesizer.spend(Public(120, (1, 8, 8), 10), 0.1, 1e-5)
    with pytest.raises(Expected, match="teachers_batch"):
        synthesizer.spend(Public(10, (1, 8, 8), 10), 1.0, 1e-5)


def test_a_channel_must_sum_teachers_once():
    for text in ("chain(top_k(k=5))", "chain(clip_l2(), total(), gaussian(1.0))"):
        with pytest.raises(Expected, match="replace-one"):
            build("synthesizers", f"datalens({SMALL}, channel={text})")


def test_the_partition_knows_indices_only_and_uses_each_once():
    rows = partition.dealt(103, 10, 3)
    assert rows.shape == (10, 10) and len(rows.flatten().unique()) == 100
    assert torch.equal(rows, partition.dealt(103, 10, 3)) and not torch.equal(rows, partition.dealt(103, 10, 4))
    assert partition.dealt(100, 10, 3, shuffle=False)[1].tolist() == list(range(10, 20))
    with pytest.raises(Expected, match="teachers=11 <= 10"):
        partition.dealt(10, 11, 0)


@pytest.mark.parametrize("critic", sorted(catalog("critics")))
def test_one_record_changes_one_teacher(critic):
    """Weights and both moments of exactly one row, whatever the critic (batch norms see one teacher's records alone)."""
    small = {"dcgan_critic": "dcgan_critic(df_dim=2, dfc_dim=4)"}.get(critic, f"{critic}()")
    synthesizer, o = options(f"datalens({SMALL.replace('linear_critic()', small)}, {VOTE}, pretrain_teacher=2)")
    records = some()
    changed = int(loop.records(o, records, 1)[0][3, 1])
    other = replace(records, x=records.x.clone().index_fill_(0, torch.tensor([changed]), 1.0))
    spend = synthesizer.spend(loop.public(records), 1e6, 1e-5)
    z = loop.noise(o.maker, 4, 1, 0, 0)
    for name, o_ in (("own", o), ("shared", replace(o, moments="shared"))):
        states = [loop.begin(o_, d, spend, 1) for d in (records, other)]
        at = loop.records(o_, records, 1)[0][:, :4]
        mine, its = (loop.learn(o_, d, s, at, d.y, z, 2) for d, s in zip((records, other), states, strict=True))
        rows = {
            int(i)
            for a, b in zip(tree.flatten(mine.params).values(), tree.flatten(its.params).values(), strict=True)
            for i in torch.nonzero((a != b).flatten(1).any(1))
        }
        if name == "own":
            assert rows == {3}
            for part in ("first", "second"):
                a, b = getattr(mine.moments, part), getattr(its.moments, part)
                assert {int(i) for k in a for i in torch.nonzero((a[k] != b[k]).flatten(1).any(1))} == {3}
        else:  # the published defect is seen by this very test
            assert rows == {3, 8, 13, 18}


@pytest.mark.parametrize("text", [
    "chain(top_k(k=5), stochastic_sign(cap=1e-3), total('replace-one'), gaussian(5.0), threshold(2.0))",
    "chain(sign('none'), total('replace-one'), gaussian(5.0), threshold(2.0))",
    "chain(klevel(4, 1e-3), total('replace-one'), gaussian(5.0))",
])  # fmt: skip
def test_chunks_of_teachers_change_no_vote(text):
    rows = 1e-3 * random.normal(random.generator("rows"), (40, 3, 16))
    channel = build("channels", text)
    whole = vote.aggregate(channel, [rows], random.generator("v"))
    cut = vote.aggregate(channel, list(rows.split(7)), random.generator("v"))
    assert torch.equal(whole.released, cut.released) and torch.equal(whole.sums, cut.sums)


def test_permuted_teachers_give_the_same_votes():
    rows = 1e-3 * random.normal(random.generator("rows"), (40, 3, 16))
    channel = build("channels", "chain(top_k(k=5), sign('none'), total('replace-one'), gaussian(5.0), threshold(2.0))")
    order = random.permutation(random.generator("order"), 40)
    found = [vote.aggregate(channel, [r], random.generator("v")).released for r in (rows, rows[order])]
    assert torch.equal(*found)


def test_chunks_of_teachers_change_no_gradient(monkeypatch):
    synthesizer, _ = options(f"datalens({SMALL}, {VOTE})")
    whole = run(synthesizer, some())
    monkeypatch.setattr(teachers, "BYTES", 4 * 3 * 650 * 3)
    cut = run(synthesizer, some())
    for k, v in tree.flatten(whole).items():
        torch.testing.assert_close(v, tree.flatten(cut)[k], rtol=1e-5, atol=1e-6)


def test_each_teacher_takes_the_steps_of_torch_optim_adam():
    synthesizer, o = options(f"datalens({SMALL}, {VOTE}, d_step=3, learning_rate=0.01)")
    records = some()
    spend = synthesizer.spend(loop.public(records), 1e6, 1e-5)
    state = loop.begin(o, records, spend, 1)
    at, y = loop.records(o, records, 1)
    z = loop.noise(o.maker, 4, 1, 0, 0)
    got = loop.learn(o, records, state, at[:, :4], y, z, 3)
    marks = torch.arange(10).repeat(4)
    table = o.maker.apply(state.maker, z.repeat_interleave(10, 0), torch.eye(10)[marks]).unflatten(0, (4, 10)).detach()
    for i in (0, 7, 19):
        start = loop.begin(o, records, spend, 1)  # `learn` works in place
        params = {k: v[i].clone().requires_grad_() for k, v in start.teachers.params.items()}
        optimizer = torch.optim.Adam(params.values(), lr=0.01, betas=(0.5, 0.999))
        who = at[i, :4]
        for _ in range(3):
            optimizer.zero_grad()
            fake = table[torch.arange(4), y[who]]
            teachers.criterion(o.critic)(params, records.x[who], fake, torch.eye(10)[y[who]]).backward()
            optimizer.step()
        for k, v in params.items():
            torch.testing.assert_close(got.params[k][i], v.detach(), rtol=1e-4, atol=1e-6)


def test_what_teachers_send_is_where_they_want_images_to_go():
    """By finite differences of the generator's loss, in float64."""
    critic = build("critics", "projection_critic")
    params = {k: v.double() for k, v in critic.init(random.generator("p"), Public(9, (1, 4, 4), 10)).items()}
    x, y = random.uniform(random.generator("x"), (2, 1, 4, 4)).double(), torch.eye(10).double()[[1, 7]]
    got = teachers.direction(critic)(x, params, y)
    loss = lambda x: float(torch.nn.functional.softplus(-critic.apply(params, x, y)).mean())  # noqa: E731
    for at in ((0, 0, 1, 2), (1, 0, 3, 3)):
        moved = x.clone()
        moved[at] += 1e-6
        assert float(got[at]) == pytest.approx(-(loss(moved) - loss(x)) / 1e-6, rel=1e-4)


def test_random_labels_and_data_dependent_stops():
    synthesizer, o = options(f"datalens({SMALL}, {VOTE}, random_label=True)")
    _, y = loop.records(o, some(), 1)
    assert not torch.equal(y, some().y) and y.max() < 10
    synthesizer, o = options(f"datalens({SMALL}, {VOTE}, accounting='data-dependent')")
    assert "data-dependent" in synthesizer.unsound
    records = some()
    spend = synthesizer.spend(loop.public(records), 25.0, 1e-5)
    assert spend.event(3) is None
    state = synthesizer.init(records, spend, 1)
    states = [state := synthesizer.step(records, spend, state, t) for t in range(8)]
    made_ = [s.maker["out.weight"] for s in states]
    assert not torch.equal(made_[0], made_[1]) and torch.equal(made_[-2], made_[-1])  # it has stopped, and stays so


@pytest.mark.parametrize("kind", canary.KINDS)
def test_a_canary_keeps_to_the_promise_where_teachers_keep_apart(kind):
    synthesizer, _ = options(f"datalens({SMALL}, {VOTE}, steps=4)")
    records = some()
    spend = synthesizer.spend(loop.public(records), 1e6, 1e-5)
    seen = synthesizer.canary(records, spend, 1, kind)
    assert seen["teachers"] == 1 and 0 < seen["reach"] <= 1 + 1e-6 and seen["divergence"] <= seen["promised"]


def test_canaries_see_the_published_defects():
    records = some()
    for how, more in (("moments='shared'", 4), ("dealing='wrapped'", 5)):
        synthesizer, _ = options(f"datalens({SMALL}, {VOTE}, steps=4, {how})")
        assert synthesizer.unsound
        seen = synthesizer.canary(records, synthesizer.spend(loop.public(records), 1e6, 1e-5), 1, "relabelled")
        assert seen["teachers"] >= more and seen["reach"] > 1


def test_the_noised_covariance_has_the_sensitivity_it_is_charged():
    """Unit records: ‖xxᵀ − x′x′ᵀ‖_F ≤ √2, attained where they are orthogonal."""
    gaps = []
    for i in range(50):
        a, b = random.normal(random.generator("a", i), (2, 6)).double()
        a, b = a / a.norm(), (b / b.norm() if i else torch.linalg.qr(torch.stack([a, b]).T)[0][:, 1])
        gaps.append(float((a.outer(a) - b.outer(b)).norm()))
    assert max(gaps) == pytest.approx(basis.SENSITIVITY, abs=1e-6) and max(gaps) <= basis.SENSITIVITY + 1e-9
    x = random.uniform(random.generator("x"), (200, 1, 4, 4))
    space = basis.pca(x, 5, 1e-9, 0)
    rows = x.flatten(1).double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    top = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    assert abs(float(space[:, 0].double() @ top)) == pytest.approx(1, abs=1e-5)
    assert not torch.allclose(space, basis.pca(x, 5, 100.0, 0))


def test_a_warm_start_is_charged_and_learnt():
    text = f"datalens({SMALL}, channel=chain(unit(), total('replace-one'), gaussian(1.0)), calibrate=True, steps=2"
    cold, warm = (
        build("synthesizers", text + ")"),
        build("synthesizers", text + ", pretrain=class_means(), pretrain_share=0.5)"),
    )
    known = Public(120, (1, 8, 8), 10)
    a, b = (s.spend(known, 1.0, 1e-5) for s in (cold, warm))
    assert b.noise == pytest.approx(a.noise * 2**0.5, rel=1e-3)
    assert accounting.epsilon(b.event(2)) == pytest.approx(1.0, rel=1e-4)
    records = some()
    spends = [s.spend(loop.public(records), 1e5, 1e-5) for s in (cold, warm)]
    y = torch.arange(10).repeat(10)
    gaps = []
    for s, spend in zip((cold, warm), spends, strict=True):
        state = s.init(records, spend, 1)
        means = torch.stack([records.x[records.y == c].mean(0) for c in range(10)])
        gaps.append(float((s.sample(known, s.released(state), y, 2) - means[y]).square().mean()))
    assert gaps[1] < 0.8 * gaps[0]


@pytest.mark.parametrize("arm", sorted(ARMS))
def test_every_aggregator_runs_from_flags_to_an_image(arm):
    text = aggregator(arm, 20, 5, True, 1e-3, 4, 32, 6, 1, 1e-3, 5.0, 5.0, 0.1)
    proj = "pca" if arm == "pca" else ""
    rule = "data-dependent" if arm == "signsgd_dept" else "exact"
    synthesizer, _ = options(f"datalens({SMALL}, channel={text}, proj={proj!r}, accounting={rule!r}, pca_dim=6)")
    records = some(side=16)
    state = run(synthesizer, records, 2)
    x = synthesizer.sample(loop.public(records), synthesizer.released(state), torch.arange(10), 0)
    assert x.shape == (10, 1, 16, 16) and x.isfinite().all() and 0 <= x.min() <= x.max() <= 1
    before = synthesizer.init(records, synthesizer.spend(loop.public(records), 1e6, 1e-5), 1).maker
    assert any(not torch.equal(v, before[k]) for k, v in state.maker.items())


def test_what_is_released_before_the_first_step_is_charged_from_the_first_row_on():
    text = "channel=chain(unit(), total('replace-one'), gaussian(1.0)), calibrate=True, steps=2, pretrain=class_means()"
    plan = Synthesis(data="mnist", methods=(build("synthesizers", f"datalens({SMALL}, {text})"),), names=("warm",))
    price = Price(plan, Public(120, (1, 8, 8), 10))
    mu = accounting.mu_of(1.0) * 0.3**0.5  # the share that `pretrain` has by default
    assert price.epsilon(0, 0) == pytest.approx(accounting.exact_epsilon(mu, 1e-5), rel=1e-6)
    assert 0 < price.epsilon(0, 0) < price.epsilon(0, 1) < price.epsilon(0, 2) <= 1
    assert price.epsilon(1, 0) == 0  # the floor has released nothing yet


def test_a_canary_counts_every_vote_of_a_step():
    """Two votes a step: twice the promise at one σ, and no sum beyond the channel's own sensitivity 2√k."""
    seen, records = [], some()
    for votes in (1, 2):
        synthesizer, o = options(f"datalens({SMALL}, {VOTE}, steps=3, g_step={votes})")
        spend = synthesizer.spend(loop.public(records), 1e6, 1e-5)
        seen.append(synthesizer.canary(records, spend, 1, "relabelled"))
    assert seen[1]["promised"] == pytest.approx(2 * seen[0]["promised"])
    assert seen[1]["divergence"] > seen[0]["divergence"] and seen[1]["reach"] <= 1 + 1e-6
    assert canary._sensitivity(o.channel, 64, spend.noise) == pytest.approx(2 * 5**0.5)
    steps = canary.witness(o, records, spend, 1, "relabelled").reach * 2 * 5**0.5
    assert steps**2 == pytest.approx(round(steps**2), abs=1e-4)  # moves of whole votes, measured in the right unit


def test_growing_dimensions_cost_what_they_send():
    text = (
        f"datalens({SMALL}, channel=chain(sign('none'), total('replace-one'), gaussian(50.0)), proj='random', pca_dim=4"
    )
    fixed, growing = (build("synthesizers", text + more) for more in (")", ", increasing_dim=True)"))
    known = Public(120, (1, 8, 8), 10)
    a, b = (accounting.gaussian_mu(s.spend(known, 1e6, 1e-5).event(4)) for s in (fixed, growing))
    assert b**2 == pytest.approx(a**2 * (1 + 2 + 3 + 4) / 16)


def test_statistics_that_are_not_private_are_refused_unless_nothing_is_released():
    with pytest.raises(Expected, match="non_release"):
        lens(save_vote=True)
    plan = lens(aggregate="l2", save_vote=True, non_release=True)
    assert plan.statistics
    synthesizer, _ = options(f"datalens({SMALL}, {VOTE})")
    found = synthesizer.statistics(loop.public(some()), run(synthesizer, some()))
    shares = [found["kept"][k] for k in ("64", "32", "16", "8", "4")]
    assert shares[0] == pytest.approx(1, abs=1e-3) and shares == sorted(shares, reverse=True)
    json.dumps(found)


def test_a_plan_comes_back_from_its_json():
    plan = lens(aggregate="signsgd,l2,random_proj,pca", pretrain="class_means()", max_eps="0.5,1")
    again = from_json(json.loads(json.dumps(plan.as_json())))
    assert isinstance(again, Synthesis) and again.id == plan.id and again.labels() == plan.labels()
    assert [m.spec for m in again.methods] == [m.spec for m in plan.methods]


def job(plan, saved=b"", files=()):
    return making.Job(plan.as_json(), "0-0", plan.members()[0], saved, "cpu", files)


@needs_mnist
def test_a_resumed_synthesis_is_bit_for_bit_the_same(monkeypatch):
    monkeypatch.setenv("QLEAK_DATA", str(SHARED))
    plan = lens(
        aggregate="signsgd",
        teachers_batch=2,
        batch_teachers=5,
        limit=200,
        test=50,
        samples=100,
        steps=6,
        save_epoch=2,
        eval_every=3,
        seeds=1,
    )
    plan = replace(plan, quality=False, files=0)
    whole = [e for e in making.events(job(plan)) if isinstance(e, making.Checkpoint)]
    assert [e.step for e in whole] == [0, 2, 3, 4, 6]
    import safetensors.torch

    for stop in whole[1:-1]:
        rest = [e for e in making.events(job(plan, stop.saved)) if isinstance(e, making.Checkpoint)]
        a, b = safetensors.torch.load(whole[-1].saved), safetensors.torch.load(rest[-1].saved)
        same = {k for k in a if not k.startswith("cpu_s") and k != "history"}
        assert all(torch.equal(a[k], b[k]) for k in same)
        assert torch.equal(a["history"][:, :4], b["history"][:, :4])


def test_the_budget_is_checked_for_every_set_of_recipes():
    for name in ("mnist", "fashion_mnist"):
        plan = lens(dataset=name, full=True)
        assert plan.methods[0].spend(MNIST, 1.0, 1e-5).steps == 149
    assert sets.OF_FILES
    assert budgets.DIGITS >= 4

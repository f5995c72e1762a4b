"""System B, as published and as it should be: each part against something slow, obvious and written anew."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qleak import accounting, data, engine, random, store, train, tree
from qleak.catalog import build
from qleak.channels import chain, clip_l1, laplace, nominal_laplace
from qleak.channels.nominal import Nominal, nominal
from qleak.check import Expected
from qleak.cli.recipes import load
from qleak.client import gradient, one_hot, per_example, slope
from qleak.models.fresh import constructed
from qleak.plans import Study, Training, from_json
from qleak.plans.levels import gaussian_sigma, levels
from qleak.private import chunks, fused, taps
from qleak.report import nominal as page
from qleak.train import adadelta, federated, lanes, split
from qleak.train.federated import Federation

NET = build("models", "mnist_net")
SMALL = build("models", "mnist_net(size=8)")
F64 = torch.float64


def digits(n, size=28):
    some = split.cast(split.spread(data.load("mnist5k"), n), F64, "cpu")
    return some if size == 28 else replace(some, x=F.adaptive_avg_pool2d(some.x, size))


def federation(model, some, channel, client=None, index=0, lag=0, rule=None):
    params, buffers = model.init(random.generator("net", index))
    shards = [torch.arange(len(some.x))]
    rule, client = rule or adadelta(), client or gradient(8)
    fed = Federation(model, buffers, client, channel, rule, some, shards, 1, 0, index, lag=lag)
    return fed, federated.start(fed, tree.to(params, F64))


# --- the net ---------------------------------------------------------------------------------------------


def twin(size=28):
    side = size // 2 - 2
    return constructed(lambda: nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * side**2, 128), nn.ReLU(), nn.Linear(128, 10),
    ))  # fmt: skip


def test_the_net_is_the_examples():
    params, buffers = NET.init(random.generator(0))
    assert tree.count(params) == 1_199_882 and len(params) == 8 and not buffers
    theirs = twin()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), params.values(), strict=True)))
    x = digits(4).x.float()
    standard = (x - 0.1307) / 0.3081
    torch.testing.assert_close(NET.apply(params, {}, x), theirs(standard))
    masks = NET.masks(random.generator("masks"), 4)
    assert {k: tuple(v.shape) for k, v in masks.items()} == {"mask/maps": (4, 64, 12, 12), "mask/hidden": (4, 128)}
    h = theirs[:5](standard) * masks["mask/maps"]
    h = theirs[7](theirs[6](h.flatten(1))) * masks["mask/hidden"]
    torch.testing.assert_close(NET.apply(params, masks, x), theirs[8](h))
    assert not torch.allclose(NET.apply(params, masks, x), NET.apply(params, {}, x), atol=1e-3)


def test_masks_are_inverted_dropout():
    drawn = NET.masks(random.generator("p"), 64)
    for name, p in (("mask/maps", 0.25), ("mask/hidden", 0.5)):
        kept = (drawn[name] > 0).double()
        error = math.sqrt(p * (1 - p) / kept.numel())
        assert abs(float(kept.mean()) - (1 - p)) < 4 * error
        assert drawn[name].unique().tolist() == [0, pytest.approx(1 / (1 - p))]
        assert not drawn[name][0].equal(drawn[name][1])
    assert not build("models", "mnist_net(dropout=False)").masks
    assert list(build("models", "mnist_net(first=0.0)").masks(random.generator(0), 1)) == ["mask/hidden"]
    with pytest.raises(Expected, match="size=7 to be even"):
        build("models", "mnist_net(size=7)")


def test_every_example_has_a_mask_of_its_own():
    """Row b of a per-example update is the gradient of example b under mask b, and so is the fused clipped sum."""
    some = digits(3, 8)
    params = tree.to(SMALL.init(random.generator(1))[0], F64)
    masks = tree.to(SMALL.masks(random.generator("m"), 3), F64)
    rows = per_example(3).update(SMALL, params, {}, some.x, some.y, masks)
    target = one_hot(some.y, 10, F64)
    at = slope(SMALL, {})
    for b in range(3):
        one = at(params, some.x[b : b + 1], target[b : b + 1], tree.at(masks, slice(b, b + 1)))
        other = at(params, some.x[b : b + 1], target[b : b + 1], tree.at(masks, slice((b + 1) % 3, (b + 1) % 3 + 1)))
        for k, v in one.items():
            torch.testing.assert_close(rows[k][b], v)
        assert float(tree.norm(tree.sub(other, one))) > 1e-2
    shrink = build("channels", "chain(clip_l2(0.1))").stages[0]
    ways = [w.clipped_sum(SMALL, params, masks, some.x, target, shrink.shrink, {"bound": torch.tensor(0.1, dtype=F64)})[0]
            for w in (taps, chunks)]  # fmt: skip
    assert fused.pick(SMALL, shrink.shrink)[0] == "taps"
    for k, v in ways[0].items():
        torch.testing.assert_close(v, ways[1][k])


# --- the rule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rho": 0.5, "eps": 1e-3}])
def test_adadelta_is_torchs(options):
    rule, gen = train.adadelta(**options), random.generator("adadelta")
    params = {"w": random.normal(gen, (4, 3)).double(), "b": random.normal(gen, (5,)).double()}
    theirs = {k: v.clone().requires_grad_() for k, v in params.items()}
    oracle, state = torch.optim.Adadelta(list(theirs.values()), lr=0.7, **options), rule.init(params)
    wrong, other = train.adadelta(rho=0.8), params
    held = wrong.init(params)
    for _ in range(5):
        grads = {k: random.normal(gen, v.shape).double() for k, v in params.items()}
        for k, v in theirs.items():
            v.grad = grads[k].clone()
        oracle.step()
        params, state = rule.update(params, state, grads, 0.7)
        other, held = wrong.update(other, held, grads, 0.7)
    for k, v in params.items():
        torch.testing.assert_close(v, theirs[k].detach(), atol=1e-13, rtol=1e-12)
        assert not torch.allclose(other[k], v, atol=1e-6)


# --- the mechanism as published --------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 2], ids=["step", "epoch"])
@pytest.mark.parametrize("scaled", [False, True])
def test_rounds_are_the_published_loop(lag, scaled):
    """Twin: global and local torch modules, Laplace noise on each tensor, Adadelta; with `lag` gradients pile up
    on weights that are copied once per epoch, because nobody clears the local ones."""
    some, eps, sensitivity = digits(16, 8), 2.0, 0.3
    fed, state = federation(SMALL, some, chain(nominal_laplace(eps, sensitivity, 0.01, scaled)), lag=lag)
    server, local = twin(8).double(), twin(8).double()
    server.load_state_dict(dict(zip(server.state_dict(), state.params.values(), strict=True)))
    optimizer = torch.optim.Adadelta(server.parameters(), lr=0.9)
    names = list(state.params)
    for number in range(4):
        if number % (lag or 1) == 0:
            local.load_state_dict(server.state_dict())
            local.zero_grad()
        x, y = federated.minibatch(fed, 0, number)
        masks = federated.draws_of(fed, number, 0, len(x), 0.9)
        h = local[:5]((x - 0.1307) / 0.3081) * masks["mask/maps"]
        h = local[7](local[6](h.flatten(1))) * masks["mask/hidden"]
        F.nll_loss(F.log_softmax(local[8](h), 1), y).backward()
        noise = federated.noise_of(fed, number, 0, len(x), state.params)[0][0]
        m = len(names)
        for name, mine, theirs in zip(names, local.parameters(), server.parameters(), strict=True):
            added = sensitivity / eps * noise[name] / (math.sqrt(m) if scaled else 1) + 0.01
            theirs.grad = mine.grad + added
        optimizer.step()
        state = federated.advance(fed, state, 0.9)
    for name, theirs in zip(names, server.parameters(), strict=True):
        torch.testing.assert_close(state.params[name], theirs.detach(), atol=1e-7, rtol=1e-6)
    assert m == 8
    synced, begun = federation(SMALL, some, fed.channel, lag=0 if lag else 2)
    for _ in range(4):
        begun = federated.advance(synced, begun, 0.9)
    assert float(tree.norm(tree.sub(begun.params, state.params))) > 1e-2  # the other way of keeping in step is another


def test_dividing_by_tensors_makes_noise_root_eight_smaller():
    like = {f"t{i}": torch.zeros(2000) for i in range(8)}
    sent = []
    for scaled in (False, True):
        channel = chain(nominal_laplace(0.5, by_tensors=scaled))
        noise = channel.draw(random.generator("same"), like)
        (message,), _ = channel.send(channel.knobs(), like, noise, channel.init(like), like)
        sent.append(channel.receive(channel.knobs(), message, like))
    for k in like:
        torch.testing.assert_close(sent[0][k], math.sqrt(8) * sent[1][k])
    flat = tree.ravel(sent[0])[0].double()
    error = float(flat.abs().std()) / math.sqrt(len(flat))  # E|Laplace(β)| = β
    assert abs(float(flat.abs().mean()) - 2.0) < 4 * error
    assert nominal(chain(nominal_laplace(0.5, 3.0, by_tensors=True)).spec).scale(8) == pytest.approx(6 / math.sqrt(8))


def test_a_nominal_epsilon_is_no_epsilon():
    for channel in (chain(nominal_laplace(0.1)), chain(clip_l1(1.0), nominal_laplace(0.1))):
        assert channel.facts().event is None and channel.facts().law == "laplace"
    assert chain(nominal_laplace()).facts().unbiased and not chain(nominal_laplace(mean=0.1)).facts().unbiased
    assert chain(clip_l1(1.0), laplace(eps=0.1)).facts().event is not None
    assert nominal("clip_l1 > nominal_laplace(eps=0.1)") == Nominal(0.1)
    assert nominal("nominal_laplace") == Nominal() and nominal("laplace(eps=0.1)") is None
    for wrong in ({"eps": 0}, {"sensitivity": -1}, {"mean": math.inf}):
        with pytest.raises(Expected):
            nominal_laplace(**wrong)


def test_lanes_are_the_loop():
    """Nets with dropout, over labels and seeds: masks are stacked, channels differ in knobs only."""
    some, group = digits(24, 8), [chain(nominal_laplace(e)) for e in (0.5, 20.0)]
    assert lanes.together([*group, chain(nominal_laplace(by_tensors=True))], SMALL.init(random.generator(0))[0]) == [
        [0, 1],
        [2],
    ]
    pairs = [federation(SMALL, some, c, index=i) for c in group for i in range(2)]
    feds, states = [p[0] for p in pairs], [p[1] for p in pairs]
    stacked = lanes.stack(states)
    for _ in range(3):
        stacked = lanes.advance(feds, stacked, 0.5)
        states = [federated.advance(f, s, 0.5) for f, s in zip(feds, states, strict=True)]
    for ours, alone in zip(lanes.unstack(stacked, 4), states, strict=True):
        for k, v in alone.params.items():
            torch.testing.assert_close(ours.params[k], v, atol=1e-8, rtol=0)
    assert float(tree.norm(tree.sub(states[0].params, states[2].params))) > 1e-2  # ε makes a difference


# --- plans -----------------------------------------------------------------------------------------------


def plan(name, **flags):
    return load(name)[0](**flags)


def test_the_recipes_plans():
    both = plan("laplace_fl")
    assert both.names == ("unscaled", "scaled")
    for part in both.parts:
        assert part.rule.spec == "adadelta(rho=0.9, eps=1e-06)" and part.schedule == "decay(0.7)" and part.lr == 1
        assert part.channels[0].spec == "chain()" and len(part.channels) == 7
    whole = plan("laplace_fl", full=True, scale_by_tensors="no", sync="epoch").parts[0]
    assert [nominal(c.spec).eps for c in whole.channels[1:]] == [i / 10 for i in range(1, 11)]
    assert (whole.epochs, whole.limit, whole.test_limit, whole.sync) == (14, 0, 0, "epoch")
    assert from_json(whole.as_json()).id == whole.id and "test_limit" not in whole.as_json()
    assert nominal(plan("laplace_fl", sensitivity=2.0, mean=0.5).parts[1].channels[1].spec) == Nominal(
        0.1, 2.0, 0.5, True
    )
    for flags in ({"eps": "a"}, {"eps": "0"}, {"scale_by_tensors": "maybe"}):
        with pytest.raises(Expected):
            plan("laplace_fl", **flags)
    assert levels("none, 3,1,3", "eps") == (3.0, 1.0)


def test_honest_epsilons_by_hand():
    """What the rows will say against dp-accounting asked directly: noise over sensitivity, composed or sampled."""
    dp = pytest.importorskip("dp_accounting")
    made = plan("laplace_fl_honest", eps="3", bound_l1=2.0, bound_l2=0.5)
    like = {"w": torch.zeros(7)}
    for part, sensitivity in ((made.parts[0], 2.0), (made.parts[1], 1.0)):
        _, by_l1, by_l2 = (c.facts(like).event for c in part.channels)
        assert by_l1 == dp.LaplaceDpEvent(pytest.approx(1 / 3))
        sigma = part.channels[2].knobs()[-1][0 if part is made.parts[1] else 1]["size"]
        assert by_l2.noise_multiplier == pytest.approx(float(sigma) / (0.5 * sensitivity), rel=1e-6)
        assert 2.96 < accounting.epsilon(by_l2) <= 3.003
        assert part.channels[0].facts(like).event is None
    assert made.parts[1].sampling == "poisson"
    beta = float(made.parts[0].channels[1].knobs()[0][1]["size"])
    assert beta == pytest.approx(2 * 2.0 / 3)  # replace one: 2S/ε
    assert float(made.parts[1].channels[1].knobs()[1][0]["size"]) == pytest.approx(2.0 / 3)
    one = dp.PoissonSampledDpEvent(0.01, dp.LaplaceDpEvent(1 / 3))
    pure = 100 * math.log1p(0.01 * math.expm1(3))
    assert accounting.epsilon(one, 1e-5, 100) < pure


def test_gaussian_sigma_is_the_smallest():
    for epsilon in (0.1, 1.0, 10.0, 1000.0):
        sigma = gaussian_sigma(epsilon, 1.0)
        half, shift = 1 / (2 * sigma), epsilon * sigma
        lost = torch.special.log_ndtr(torch.tensor([half - shift, -half - shift], dtype=F64))
        assert float(lost[0].exp() - (epsilon + lost[1]).exp()) <= 1e-5
        half, shift = 1 / (2 * 0.98 * sigma), epsilon * 0.98 * sigma
        lost = torch.special.log_ndtr(torch.tensor([half - shift, -half - shift], dtype=F64))
        assert float(lost[0].exp() - (epsilon + lost[1]).exp()) > 1e-5
        assert gaussian_sigma(epsilon, 2.0) == pytest.approx(2 * sigma, rel=6e-3)


def test_l1_noise_drowns_a_signal_of_this_size():
    """√(2d)·β by drawing it: 1549 times β on 1.2 million coordinates, against a signal of at most S."""
    params, _ = NET.init(random.generator(0))
    channel = chain(clip_l1(1.0), laplace(eps=1.0))
    noise = channel.draw(random.generator("drown"), params)
    update = tree.scale(params, 100.0)
    (message,), _ = channel.send(channel.knobs(), update, noise, channel.init(params), params)
    signal = tree.scale(update, 1 / float(tree.norm(update, 1)))
    left = float(tree.norm(tree.sub(channel.receive(channel.knobs(), message, params), signal)))
    assert left == pytest.approx(math.sqrt(2 * tree.count(params)) * 2, rel=0.01)
    assert left / float(tree.norm(signal)) > 3098


def test_attacker_and_server_get_the_same_channels():
    study = plan("dp_vs_leakage")
    leak, leak_dp, learn, learn_dp = study.parts
    assert leak.labels() == learn.labels() and leak_dp.labels() == learn_dp.labels()
    assert [c.spec for c in leak.channels + leak_dp.channels] == [c.spec for c in learn.channels + learn_dp.channels]
    assert leak_dp.client.batch == 1 and learn_dp.client.batch == 64 and learn_dp.sampling == "poisson"
    assert len(set(leak.labels() + leak_dp.labels())) == len(leak.labels() + leak_dp.labels())
    assert all("mean(batch=64)" in name for name in leak_dp.labels())


# --- a run -----------------------------------------------------------------------------------------------


def test_a_run_says_none_and_measures_what_the_label_assumes(tmp_path):
    made = Training(
        build("models", "mlp(channels=1, size=28, hidden=(4,))"), "mnist5k", (chain(), chain(nominal_laplace(0.5, by_tensors=True))),
        gradient(batch=25), epochs=2, epoch_rounds=2, rule=adadelta(), lr=1.0, seeds=2, limit=100, test_limit=50, update_norms=True,
    )  # fmt: skip
    with store.open_run(tmp_path / "run", made.header()) as run:
        list(engine.run(made, run))
    header, rows = store.read_run(tmp_path / "run"), store.read_rows(tmp_path / "run")
    plain, noisy = header["summary"]
    assert plain["epsilon"] is None and noisy["epsilon"] is None and all(r["epsilon"] is None for r in rows)
    assert {round(50 * r["test_accuracy"], 6) % 1 for r in rows} == {0}  # of 50 test images
    params, buffers = made.model.init(random.generator(0, "params", 0))
    some = split.spread(split.spread(split.spread(split.held_out("mnist5k")[0], 100), 50), 25)
    by_hand = gradient(25).update(made.model, params, buffers, some.x, some.y)
    first = next(r for r in rows if r["key"] == "0-0-0")
    assert first["update_l1"] == pytest.approx(sum(float(v.abs().sum()) for v in by_hand.values()), rel=1e-5)
    (line,) = page.lines(header)
    assert line["channel"] == "nominal_laplace(eps=0.5, by_tensors=True)"
    beta = 2 / math.sqrt(4)
    assert header["facts"][1]["noise_scale"] == pytest.approx(beta) and "noise_scale" not in header["facts"][0]
    assert line["cells"][:3] == ["none", "0.5", "1"]
    assert float(line["cells"][4]) == pytest.approx(noisy["update_l1"] / beta, rel=0.01)


def test_a_lagging_clients_norm_is_that_of_the_sum_it_sends(tmp_path):
    made = Training(
        build("models", "mlp(channels=1, size=28, hidden=(4,))"), "mnist5k", (chain(),), gradient(batch=25), epochs=1,
        epoch_rounds=3, rule=adadelta(), lr=1.0, seeds=1, limit=100, test_limit=50, update_norms=True, sync="epoch",
    )  # fmt: skip
    with store.open_run(tmp_path / "run", made.header()) as run:
        list(engine.run(made, run))
    before, after = (r["update_l1"] for r in store.read_rows(tmp_path / "run"))
    assert after > 2 * before  # three gradients at the first weights


def test_a_study_of_trainings_is_a_study():
    made = plan("laplace_fl", eps="1", limit=64, test=10, seeds=1)
    assert isinstance(made, Study) and from_json(made.as_json()).id == made.id

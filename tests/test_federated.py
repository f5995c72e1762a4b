"""Rounds, shards, local SGD and lanes, each against something slow and obvious."""

import math

import pytest
import torch
import torch.nn.functional as F

from qleak import channels, data, models, random, train, tree
from qleak.catalog import build, catalog
from qleak.channels import chain, clip_l2, gaussian, identity, mean, total, uniform
from qleak.check import Expected
from qleak.client import gradient, local_sgd, per_example
from qleak.train import adam, federated, lanes, sgd, split
from qleak.train.federated import Federation
from qleak.types import Dataset

MLP = models.mlp(channels=1, size=28, classes=10, hidden=(16,))
NETS = {
    "mlp": MLP,
    "lenet": models.lenet(1, 28, 10, width=4, init="default"),
    "convnet": models.convnet(1, 28, 10, width=4),
}


def digits(n=200):
    return split.cast(split.spread(data.load("mnist5k"), n), torch.float64, "cpu")


def federation(model, some, client, channel, rule, clients=1, per_round=1, seed=0, index=0, how="iid"):
    params, buffers = model.init(random.generator("net", index))
    shards = split.shards(how, some.y, clients, random.generator(seed, "split", index))
    fed = Federation(model, buffers, client, channel, rule, some, shards, per_round, seed, index)
    return fed, federated.start(fed, tree.to(params, torch.float64))


def rounds(fed, state, n, lr=0.1):
    for _ in range(n):
        state = federated.advance(fed, state, lr)
    return state


# --- shards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["iid", "dirichlet(0.05)", "dirichlet(1)", "dirichlet(alpha=100)"])
@pytest.mark.parametrize("clients", [1, 7, 100])
def test_shards_hold_every_image_once(how, clients):
    y = digits(500).y
    shards = split.shards(how, y, clients, random.generator("shards"))
    assert len(shards) == clients and all(len(s) for s in shards)
    assert torch.cat(shards).sort().values.equal(torch.arange(500))


def test_dirichlet_shards_are_as_uneven_as_alpha_says():
    """E Σp² of Dir(α, …, α) over C clients is (α + 1)/(αC + 1): the law itself, over many draws."""
    for alpha in (0.1, 1.0, 10.0):
        gen = random.generator("dirichlet", str(alpha))
        draws = torch.stack([split._dirichlet(gen, alpha, 5) for _ in range(2000)])
        squares = draws.square().sum(1)
        error = squares.std() / math.sqrt(len(squares))
        assert abs(squares.mean() - (alpha + 1) / (5 * alpha + 1)) < 4 * error
        assert torch.allclose(draws.sum(1), torch.ones(2000, dtype=torch.float64))
        wrong = (2 * alpha + 1) / (10 * alpha + 1)
        assert abs(squares.mean() - wrong) > 4 * error


def test_iid_shards_are_even_and_drawn():
    y = digits(500).y
    shards = split.shards("iid", y, 7, random.generator("a"))
    assert {len(s) for s in shards} == {71, 72}
    assert not shards[0].equal(split.shards("iid", y, 7, random.generator("b"))[0])


def test_split_refusals():
    y = digits(20).y
    for how, clients, message in (
        ("iid", 21, "clients=21 <= 20"),
        ("dirichlet(-1)", 2, "alpha=-1.0 > 0"),
        ("pathological", 2, "split='pathological'"),
        ("dirichlet(e)", 2, r"split='dirichlet\(e\)'"),
    ):
        with pytest.raises(Expected, match=message):
            split.shards(how, y, clients, random.generator("no"))


def test_a_set_without_test_split_holds_out_every_class():
    first, test, said = split.held_out("mnist5k")
    assert (len(first.x), len(test.x)) == (4000, 1000) and "every fifth image" in said
    assert test.y.bincount().tolist() == [100] * 10
    assert not set(data.digests(first.x)) & set(data.digests(test.x))
    assert split.spread(first, 50).y.bincount().tolist() == [5] * 10
    with pytest.raises(Expected, match="Unknown data set"):
        split.held_out("mnist5kk")


# --- rounds ----------------------------------------------------------------------------------------------


def test_one_client_is_plain_sgd():
    """Twin: torch.optim.SGD over the same minibatches, an order of our own each pass, the last one short."""
    some = digits(50)
    fed, state = federation(MLP, some, gradient(16), identity(), sgd(0.9))
    theirs = {k: v.clone().requires_grad_() for k, v in state.params.items()}
    optimizer = torch.optim.SGD(list(theirs.values()), lr=0.1, momentum=0.9)
    assert federated.rounds_per_epoch(fed) == 4
    seen = []
    for number in range(8):
        x, y = federated.minibatch(fed, 0, number)
        seen.append((x, y))
        optimizer.zero_grad()
        F.cross_entropy(MLP.apply(theirs, {}, x), y).backward()
        optimizer.step()
    ours = rounds(fed, state, 8)
    for k, v in ours.params.items():
        torch.testing.assert_close(v, theirs[k].detach(), atol=1e-12, rtol=1e-12)
    assert [len(x) for x, _ in seen] == [16, 16, 16, 2] * 2
    passes = [torch.cat([x for x, _ in seen[i : i + 4]]) for i in (0, 4)]
    assert (
        set(data.digests(passes[0].float()))
        == set(data.digests(passes[1].float()))
        == set(data.digests(some.x.float()))
    )
    assert not passes[0].equal(passes[1])


def test_full_batches_of_all_clients_are_one_big_gradient():
    """Equal shards, everyone, everything: the average is the gradient of the whole set, whatever the split."""
    some = digits(60)
    many, start = federation(MLP, some, gradient(20), identity(), sgd(), clients=3, per_round=3)
    one, _ = federation(MLP, some, gradient(60), identity(), sgd())
    assert federated.rounds_per_epoch(many) == federated.rounds_per_epoch(one) == 1
    a, b = rounds(many, start, 3), rounds(one, start, 3)
    for k, v in a.params.items():
        torch.testing.assert_close(v, b.params[k], atol=1e-12, rtol=1e-12)


def test_participants_are_drawn_anew_and_channels_do_not_matter():
    some = digits(100)
    fed, _ = federation(MLP, some, gradient(5), identity(), sgd(), clients=10, per_round=3)
    other, _ = federation(MLP, some, gradient(5), chain(uniform(4)), adam(), clients=10, per_round=3)
    drawn = [federated.participants(fed, i) for i in range(40)]
    assert drawn == [federated.participants(other, i) for i in range(40)]
    assert all(len(set(d)) == 3 for d in drawn) and len({tuple(d) for d in drawn}) > 20
    assert {c for d in drawn for c in d} == set(range(10))
    assert federated.rounds_per_epoch(fed) == math.ceil(100 / 15)
    for a, b in zip(federated.minibatch(fed, 4, 1), federated.minibatch(other, 4, 1), strict=True):
        assert a.equal(b)


def test_channel_states_belong_to_clients():
    """A stage that counts its own messages: each client's counter moves only when that client sends."""
    from dataclasses import replace

    plain = channels.scale(1.0)

    def send(knobs, x, noise, state):
        return x, {}, {k: v + 1 for k, v in state.items()}

    counting = replace(plain, send=send, init=lambda like, gen: {"n": torch.zeros(())}, spec="counting()")
    fed, state = federation(MLP, digits(40), gradient(4), chain(counting), sgd(), clients=4, per_round=2)
    after = rounds(fed, state, 7)
    assert [int(m[0][0]["n"]) for m in after.memory] == after.taken.tolist()
    assert int(after.taken.sum()) == 14 and len(set(after.taken.tolist())) > 1


def test_noise_differs_by_client_round_and_seed():
    channel = chain(gaussian(1.0, unbounded=True))
    fed, state = federation(MLP, digits(20), gradient(4), channel, sgd())
    at = {(n, c): federated.noise_of(fed, n, c, 4, state.params)[0][0]["fc1.bias"] for n in range(2) for c in range(2)}
    other, _ = federation(MLP, digits(20), gradient(4), channel, sgd(), index=1)
    at["seed"] = federated.noise_of(other, 0, 0, 4, state.params)[0][0]["fc1.bias"]
    values = list(at.values())
    assert not any(values[i].equal(values[j]) for i in range(5) for j in range(i))


def test_private_rounds_clip_each_example():
    """One round of clip → sum → noise → mean, against a loop over examples."""
    some = digits(12)
    channel = chain(clip_l2(0.5), total(), gaussian(2.0), mean(12))
    fed, state = federation(MLP, some, per_example(12), channel, sgd())
    after = rounds(fed, state, 1, lr=1.0)
    x, y = federated.minibatch(fed, 0, 0)
    clipped = []
    for i in range(12):
        leaves = {k: v.clone().requires_grad_() for k, v in state.params.items()}
        F.cross_entropy(MLP.apply(leaves, {}, x[i : i + 1]), y[i : i + 1]).backward()
        g = torch.cat([v.grad.flatten() for v in leaves.values()])
        clipped.append(g * min(1.0, 0.5 / float(g.norm())))
    noise = federated.noise_of(fed, 0, 0, 12, state.params)
    drawn = next(n for leg in noise for n in leg if n)
    expected = (torch.stack(clipped).sum(0) + 2.0 * torch.cat([v.flatten() for v in drawn.values()])) / 12
    moved = torch.cat([(state.params[k] - after.params[k]).flatten() for k in state.params])
    torch.testing.assert_close(moved, expected, atol=1e-7, rtol=1e-6)


# --- local SGD --------------------------------------------------------------------------------------------


def test_local_sgd_is_torch_sgd_on_the_clients_images():
    some = digits(25)
    params, buffers = MLP.init(random.generator("local"))
    params = tree.to(params, torch.float64)
    for client, order in (
        (local_sgd(4, batch=10, lr=0.2), [0, 1, 2, 0]),
        (local_sgd(2, epochs=2, batch=10, lr=0.2), [0, 1, 2, 0, 1, 2]),
    ):
        update = client.update(MLP, params, buffers, some.x, some.y)
        theirs = {k: v.clone().requires_grad_() for k, v in params.items()}
        optimizer = torch.optim.SGD(list(theirs.values()), lr=0.2)
        for i in order:
            optimizer.zero_grad()
            F.cross_entropy(
                MLP.apply(theirs, {}, some.x[10 * i : 10 * i + 10]), some.y[10 * i : 10 * i + 10]
            ).backward()
            optimizer.step()
        for k, v in update.items():
            torch.testing.assert_close(v, params[k] - theirs[k].detach(), atol=1e-12, rtol=1e-12)
    assert local_sgd(4, batch=10).batch == 40 and local_sgd().rows == 0


def test_one_local_step_at_rate_one_is_a_gradient_step():
    some = digits(40)
    a, start = federation(MLP, some, local_sgd(1, batch=10, lr=0.1), identity(), sgd(), clients=4, per_round=2)
    b, _ = federation(MLP, some, gradient(10), identity(), sgd(), clients=4, per_round=2)
    first, second = rounds(a, start, 5, lr=1.0), rounds(b, start, 5, lr=0.1)
    for k, v in first.params.items():
        torch.testing.assert_close(v, second.params[k], atol=1e-12, rtol=1e-12)


def test_local_sgd_is_a_client_like_any_other():
    made = build("clients", "local_sgd(steps=3, lr=0.5)")
    assert made.spec == "local_sgd(steps=3, epochs=0, batch=10, lr=0.5, momentum=0.0)" and "local_sgd" in catalog(
        "clients"
    )
    for text, message in {"local_sgd(0)": "steps=0 >= 1", "local_sgd(lr=0)": "lr=0 > 0"}.items():
        with pytest.raises(Expected, match=message):
            build("clients", text)


def test_rules_are_in_the_catalog():
    assert set(catalog("rules")) >= {"sgd", "adam"}
    assert build("rules", "sgd(momentum=0.9)").spec == sgd(momentum=0.9).spec == "sgd(momentum=0.9)"
    assert train.adam().spec.startswith("adam(b1=0.9")


# --- lanes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rule", [sgd(0.9), adam()], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    "group", [[identity()], [chain(uniform(16)), chain(uniform(8))]], ids=["identity", "quantizers"]
)
def test_lanes_equal_their_sequential_twins(name, rule, group):
    some, model = digits(80), NETS[name]
    pairs = [federation(model, some, gradient(32), c, rule, index=i) for c in group for i in range(2)]
    feds, states = [p[0] for p in pairs], [p[1] for p in pairs]
    stacked = lanes.stack(states)
    for _ in range(21):
        stacked = lanes.advance(feds, stacked, 0.01)
        states = [federated.advance(f, s, 0.01) for f, s in zip(feds, states, strict=True)]
    for ours, twin in zip(lanes.unstack(stacked, len(feds)), states, strict=True):
        assert ours.taken.equal(twin.taken) and ours.round.equal(twin.round)
        for k, v in twin.params.items():
            torch.testing.assert_close(ours.params[k], v, atol=1e-9, rtol=0)
    moved = [v - pairs[0][1].params[k] for k, v in states[0].params.items()]
    assert max(float(m.abs().max()) for m in moved) > 1e-3  # they did go somewhere
    first, second = (lanes.unstack(stacked, len(feds))[i].params for i in (0, 1))
    assert any(not torch.allclose(first[k], second[k], atol=1e-4) for k in first)  # and not to the same place


def test_only_interchangeable_channels_share_lanes():
    like = MLP.init(random.generator("like"))[0]
    group = [identity(), chain(uniform(16)), chain(uniform(4)), identity(), chain(channels.top_k(0.1)),
             chain(channels.top_k(0.2)), chain(clip_l2(1.0), uniform(4))]  # fmt: skip
    assert lanes.together(group, like) == [[0, 3], [1, 2], [4], [5], [6]]


def test_where_lanes_run_and_why():
    assert lanes.pick(NETS["convnet"], "cpu", 1, 6)[0] == "loop"
    assert lanes.pick(MLP, "cpu", 1, 6)[0] == "vmap"
    assert lanes.pick(MLP, "cpu", 2, 6) == ("loop", "clients' shards differ in size")
    assert lanes.pick(MLP, "cpu", 1, 1)[0] == "loop"
    assert lanes.pick(NETS["convnet"], "cuda", 1, 6)[0] == "vmap"
    assert lanes.pick(MLP, "cpu", 1, 6, "loop") == ("loop", "as asked")
    assert lanes.deal(range(6), "cpu") == [(0, 1, 2), (3, 4, 5)] and lanes.deal(range(6), "cuda") == [tuple(range(6))]
    assert lanes.deal(range(4), "cpu") == [(0, 1, 2, 3)] and list(map(len, lanes.deal(range(9), "cpu"))) == [3, 3, 3]


def test_measure_agrees_with_accuracy():
    some = digits(64)
    params, buffers = MLP.init(random.generator("measure"))
    params = tree.to(params, torch.float64)
    found = train.measure(MLP, params, buffers, some, batch=10)
    assert found.accuracy == train.accuracy(MLP, params, buffers, some)
    assert found.loss == pytest.approx(float(F.cross_entropy(MLP.apply(params, buffers, some.x), some.y)), rel=1e-12)
    broken = {k: v * math.nan for k, v in params.items()}
    assert math.isnan(train.measure(MLP, broken, buffers, some).loss)


def test_convnet_is_declared_and_learns():
    model = models.convnet(1, 28, 10, width=8)
    assert model.layers is not None and {layer.kind for layer in model.layers} == {
        "conv", "activation", "flatten", "linear"
    }  # fmt: skip
    assert models.convnet().shape == (3, 32, 32)
    some: Dataset = split.spread(data.load("mnist5k"), 500)
    params, buffers = model.init(random.generator("convnet"))
    *_, last = train.fit(model, params, buffers, some, epochs=6, batch=25, lr=3e-3)
    assert train.accuracy(model, last.params, buffers, some) > 0.9
    with pytest.raises(Expected, match="init='hee' to be one of: default, he, wide"):
        models.convnet(init="hee")

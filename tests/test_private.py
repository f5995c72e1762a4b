"""Sums of clipped per-example gradients: every way to them agrees with a loop, keeps its bound, and says when it cannot."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qleak import data, models, random, tree
from qleak.channels import automatic, chain, clip_l1, clip_l2, clip_layers, gaussian, mean, scale, total, uniform
from qleak.client import crowd, gradient, local_sgd, one_hot, per_example
from qleak.client.private import adversarial, per_loss, weight_noise
from qleak.errors import Expected
from qleak.models.module import from_module
from qleak.private import adaptive, chunks, fused, separable, taps
from qleak.train import federated, lanes, sgd, split
from qleak.types import Client, Model

SHRINKS = {s.name: s for s in (clip_l2(0.5), clip_l1(5.0), clip_layers(0.5), automatic(0.5))}
NETS: dict[str, Model] = {
    "lenet": models.lenet(),
    "lenet5": models.lenet5(),
    "convnet": models.convnet(),
    "mlp": models.mlp(),
    "group norm": models.resnet(depth=8, width=8, norm="group", size=8),
    "batch norm, eval": models.resnet(depth=8, width=8, mode="eval", shortcut="conv", size=8),
    "strided bands": from_module(
        nn.Sequential(nn.Conv2d(3, 4, (3, 2), (1, 2), (1, 0)), nn.LayerNorm([4, 8, 4]), nn.Tanh(),
                      nn.Conv2d(4, 5, 3, (2, 1), bias=False), nn.Flatten(2), nn.Linear(6, 7, bias=False),
                      nn.LayerNorm(7), nn.Flatten(), nn.Linear(35, 10)), (3, 8, 8), 10),
    "wide": from_module(
        nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.ReLU(), nn.Conv2d(24, 40, 2), nn.Flatten(), nn.Linear(40, 10)),
        (3, 8, 8), 10),
}  # fmt: skip


def setting(model: Model, b: int = 5):
    """(params, buffers, x, y) in float64, buffers that are not their defaults."""
    params, buffers = (tree.to(t, torch.float64) for t in model.init(random.generator("net")))
    buffers = {k: v + 0.1 * random.uniform(random.generator(k), v.shape) for k, v in buffers.items()}
    x = random.uniform(random.generator("x", b), (b, *model.shape)).double()
    return params, buffers, x, torch.arange(b) % model.classes


def knobs_of(stage):
    return {k: torch.tensor(v) for k, v in stage.knobs.items()}


def looped(model: Model, params, buffers, x, y, stage):
    """One backward pass an example, the stage as it is on each row."""
    summed = {k: torch.zeros_like(v) for k, v in params.items()}
    for i in range(len(x)):
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        F.cross_entropy(model.apply(leaves, buffers, x[i : i + 1]), y[i : i + 1]).backward()
        row = {k: v.grad for k, v in leaves.items()}
        summed = tree.add(summed, stage.send(knobs_of(stage), row, {}, ())[0])
    return summed


def same(a, b, tol: float = 1e-9) -> None:
    assert list(a) == list(b)
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=tol, rtol=tol)


# --- one sum, every way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("net", NETS)
def test_taps_chunks_and_the_loop_agree(net, shrink):
    model, stage = NETS[net], SHRINKS[shrink]
    params, buffers, x, y = setting(model)
    want = looped(model, params, buffers, x, y, stage)
    given = (model, params, buffers, x, one_hot(y, model.classes, x.dtype), stage.shrink, knobs_of(stage))
    some, norms = chunks.clipped_sum(*given, chunk=2)
    same(some, want)
    same(chunks.clipped_sum(*given, chunk=1)[0], want)
    assert model.tapped is not None
    if stage.shrink.p == 2:
        opened, others = taps.clipped_sum(*given)
        same(opened, want)
        torch.testing.assert_close(norms, others, atol=1e-9, rtol=1e-9)
        assert norms.shape == ((5, len(params)) if shrink == "clip_layers" else (5,))


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("net", ["lenet5", "strided bands", "wide"])
def test_gram_matrices_and_instances_agree(net, gram, monkeypatch):
    monkeypatch.setattr(taps, "_gram_wins", lambda *sizes: gram)
    monkeypatch.setattr(taps, "BLOCK", 4000)
    model, stage = NETS[net], clip_l2(0.5)
    params, buffers, x, y = setting(model)
    given = (model, params, buffers, x, one_hot(y, model.classes, x.dtype), stage.shrink, knobs_of(stage))
    same(taps.clipped_sum(*given)[0], looped(model, params, buffers, x, y, stage))


def test_the_default_rule_takes_both_sides():
    assert taps._gram_wins(16, 512, 4608)
    assert not taps._gram_wins(784, 6, 25)


def through(client: Client, channel, model, params, buffers, x, y):
    """(fused, unfused) decoded updates and memories of one message."""
    noise = tree.nested_map(lambda v: v.double(), channel.draw(random.generator("noise"), params, (len(x),)))
    knobs, memory = channel.knobs(), channel.init(params)
    joined = fused.split(client, channel)
    assert joined is not None
    one = fused.through(client, joined, knobs, model, params, buffers, x, y, noise, memory)
    messages, after = channel.send(knobs, client.update(model, params, buffers, x, y), noise, memory, params)
    return one, (channel.receive(knobs, messages[-1], params), after)


@pytest.mark.parametrize("b", [0, 1, 4])
@pytest.mark.parametrize("shrink", SHRINKS)
def test_a_channel_in_two_is_the_channel(shrink, b):
    channel = chain(SHRINKS[shrink], total(), gaussian(0.1), mean(4), uniform(levels=64))
    for net in ("lenet5", "mlp", "group norm") if shrink == "clip_l2" else ("lenet5",):
        model = NETS[net]
        (a, memory), (want, after) = through(per_example(4), channel, model, *setting(model, b))
        same(a, want)
        assert memory == after
        assert max(float(v.abs().max()) for v in a.values()) > 0  # an empty batch sends its noise


def test_what_is_split_and_what_is_not():
    clipped = chain(clip_l2(1.0), total(), gaussian(1.0))
    assert fused.split(per_example(4), clipped) is not None
    assert fused.split(crowd(gradient(1), 3), clipped) is not None  # a crowd of one image each is the same rows
    for client in (gradient(4), crowd(gradient(2), 3), crowd(local_sgd(2, batch=1), 3), crowd(local_sgd(1, batch=1), 3)):  # fmt: skip
        assert fused.split(client, clipped) is None, client.spec
    for channel in (chain(total(), gaussian(1.0, unbounded=True)), chain(clip_l2(1.0), gaussian(1.0)), chain(uniform()),
                    chain(clip_l2(1.0), scale(2.0), total(), gaussian(1.0)), chain(clip_l2(1.0))):  # fmt: skip
        assert fused.split(per_example(4), channel) is None, channel.spec


def test_a_client_whose_rows_look_at_each_other_is_not_split():
    def respond(slope, params, x, target, *masks):
        rows = per_example(4).respond(slope, params, x, target, *masks)
        return {k: v + 1e-3 * v.sum(0) for k, v in rows.items()}

    for apart in (True, False):
        assert fused.is_per_example(per_example(4), apart)
        assert not fused.is_per_example(replace(per_example(4), respond=respond), apart)


def test_rows_of_one_forward_pass_are_split_where_the_model_keeps_examples_apart():
    clipped = chain(clip_l2(0.5), total(), gaussian(0.1))
    model = NETS["group norm"]
    params, buffers, x, y = setting(model)
    for client in (per_loss(5), weight_noise(per_loss(5), clip=0.5), adversarial(per_example(5), steps=2)):
        draws = client.draw(random.generator("draws"), model, 5, 0.1)
        joined = fused.split(client, clipped, model)
        assert joined is not None
        got, _ = fused.update(client, joined, clipped.knobs(), model, params, buffers, x, y, draws)
        rows = client.update(model, params, buffers, x, y, draws)
        same(got, chunks.shrunk_sum(rows, joined.shrink, clipped.knobs()[0][0])[0])
    assert fused.split(per_loss(4), clipped, models.resnet(depth=8, width=8, mode="train", size=8)) is None
    assert fused.split(per_example(4), clipped, models.resnet(depth=8, width=8, mode="train", size=8)) is not None


# --- which models are open ---------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 10)
        self.how = how
        if how == "shared":
            self.two.weight = self.one.weight
        if how == "extra":
            self.shift = nn.Parameter(torch.zeros(12))

    def forward(self, x):
        h = self.one(x.flatten(1)).tanh()
        match self.how:
            case "twice":
                h = self.two(self.one(h))
            case "by hand":
                h = F.linear(self.two(h), self.one.weight)
            case "rows":
                h = self.two(h.reshape(-1, 2, 6).flatten(0, 1).repeat(1, 2)).unflatten(0, (-1, 2)).mean(1)
            case "skipped":
                pass
            case "extra":
                h = self.two(h) + self.shift
            case _:
                h = self.two(h)
        return self.last(h)


@pytest.mark.parametrize("how", ["shared", "twice", "by hand", "rows", "skipped", "extra", "plain"])
def test_tied_weights_and_strangers_stay_closed_and_agree(how):
    model = from_module(Tied(how), (3, 2, 2), 10, fresh=how != "shared")
    assert (model.tapped is not None) == (how == "plain")
    assert fused.pick(model, clip_l2().shrink)[0] == ("taps" if how == "plain" else "chunks")
    params, buffers, x, y = setting(model)
    if how == "skipped":
        return  # an unused weight has no .grad in the loop
    stage = clip_l2(0.5)
    given = (model, params, buffers, x, one_hot(y, 10, x.dtype), stage.shrink, knobs_of(stage))
    same(fused.clipped_sum(*given)[0], looped(model, params, buffers, x, y, stage))


def test_an_opened_form_of_another_net_is_not_used():
    """A model with its forward pass replaced and its taps left behind would get another net's gradients."""
    plain = models.mlp(hidden=(8,))
    assert fused.pick(plain, clip_l2().shrink)[0] == "taps"
    stale = replace(plain, apply=lambda params, buffers, x: 2 * plain.apply(params, buffers, x))
    assert fused.pick(stale, clip_l2().shrink)[0] == "chunks"


def test_batch_norm_by_the_batch_and_grouped_convolutions_stay_closed():
    assert models.resnet(depth=8, width=8, mode="train").tapped is None
    assert models.vit().tapped is None
    for conv in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding="same"),
                 nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")):  # fmt: skip
        net = nn.Sequential(nn.Conv2d(3, 4, 1), conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        assert from_module(net, (3, 8, 8), 10).tapped is None
    with pytest.raises(Expected, match="model with taps"):
        taps.clipped_sum(models.vit(), {}, {}, torch.zeros(1), torch.zeros(1), clip_l2().shrink, {})


# --- the bound ---------------------------------------------------------------------------------------------


def largest_step(model: Model, release, b: int = 4, pairs: int = 6) -> float:
    """How far the released sum moves when an example leaves, over random data sets."""
    params, buffers = model.init(random.generator("net"))
    found = []
    for i in range(pairs):
        x = 3 * random.normal(random.generator("x", i), (b, *model.shape))
        y = random.integers(random.generator("y", i), model.classes, (b,))
        whole, less = release(params, buffers, x, y), release(params, buffers, x[1:], y[1:])
        found.append(float(tree.norm(tree.sub(whole, less))))
    return max(found)


@pytest.mark.parametrize("shrink", ["clip_l2", "clip_layers", "automatic"])
@pytest.mark.parametrize("net", ["lenet5", "group norm"])
def test_a_neighbour_moves_the_sum_by_the_bound_at_most(net, shrink):
    model, stage = NETS[net], SHRINKS[shrink]

    def release(params, buffers, x, y):
        target = one_hot(y, model.classes)
        return fused.clipped_sum(model, params, buffers, x, target, stage.shrink, knobs_of(stage))[0]

    moved = largest_step(model, release)
    assert 0.25 * 0.5 < moved <= 0.5 * (1 + 1e-5)


def test_clipped_rows_of_joint_batch_norm_are_no_bounded_sum():
    """Each row is clipped, and yet one example's leaving moves all the others: the sum moves by more than the bound."""
    model, stage = models.resnet(depth=8, width=8, mode="train", size=8), clip_l2(0.5)

    def release(params, buffers, x, y):
        rows = separable.jacobian(model, params, buffers, x, y)
        return chunks.shrunk_sum(rows, stage.shrink, knobs_of(stage))[0]

    assert largest_step(model, release) > 0.5 * 1.2


# --- separability ------------------------------------------------------------------------------------------


def test_separable_nets_pass():
    for net in ("lenet5", "group norm", "batch norm, eval"):
        params, buffers, x, y = setting(NETS[net])
        assert separable.check(NETS[net], params, buffers, x, y) is None


def test_the_jacobian_of_a_separable_net_has_each_examples_gradient():
    model = NETS["group norm"]
    params, buffers, x, y = setting(model)
    same(separable.jacobian(model, params, buffers, x, y), per_example(5).update(model, params, buffers, x, y))


def test_batch_norm_by_the_batch_is_named():
    model = models.resnet(depth=8, width=8, mode="train", size=8)
    with pytest.raises(Expected, match=r"batch norm takes its statistics from the batch.*norm='group', mode='eval'"):
        separable.check(model, *setting(model))


class Indexed(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.one, self.two, self.at = nn.Linear(12, 12), nn.Linear(12, 10), at

    def forward(self, x):
        h = self.one(x.flatten(1)).tanh()
        return self.two(h + h[self.at])


@pytest.mark.parametrize("at", [0, -1])
def test_an_index_into_the_batch_is_found(at):
    model = from_module(Indexed(at), (3, 2, 2), 10)
    params, buffers, x, y = setting(model)
    with pytest.raises(Expected, match="an index into the batch"):
        separable.check(model, params, buffers, x, y)
    # Its layers are known ones, and taps would take one example's gradient for another's: it is summed in chunks.
    assert model.tapped is not None
    stage = clip_l2(0.5)
    assert fused.pick(model, stage.shrink)[0] == "chunks"
    given = (model, params, buffers, x, one_hot(y, 10, x.dtype), stage.shrink, knobs_of(stage))
    want = looped(model, params, buffers, x, y, stage)
    same(fused.clipped_sum(*given)[0], want)
    wrong = taps.clipped_sum(*given)[0]
    assert float(tree.norm(tree.sub(wrong, want))) > 0.01 * float(tree.norm(want))


def test_a_loss_that_looks_at_the_batch_is_found():
    def weighted(model, params, buffers, x, target):
        return separable.losses(model, params, buffers, x, target) * (1 + x.mean())

    with pytest.raises(Expected, match="mixes examples"):
        separable.check(NETS["mlp"], *setting(NETS["mlp"]), losses=weighted)
    with pytest.raises(Expected, match="at least 2 images"):
        separable.check(NETS["mlp"], *setting(NETS["mlp"], 1))


# --- rounds ------------------------------------------------------------------------------------------------


def federation(model, channel, sampling="shuffle", b=6, index=0):
    some = split.spread(data.load("mnist5k"), 40)
    params, buffers = model.init(random.generator("net"))
    shards = split.shards("iid", some.y, 1, random.generator("split"))
    fed = federated.Federation(model, buffers, per_example(b), channel, sgd(0.9), some, shards, 1, 0, index)
    return replace(fed, sampling=sampling), params


def test_rounds_take_the_quick_way_and_arrive_where_the_slow_one_does(monkeypatch):
    channel = chain(clip_l2(0.5), total(), gaussian(0.1), mean(6))
    ends = []
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr(fused, "split", lambda client, channel, model: None)
        fed, params = federation(models.lenet5(), channel, "poisson", b=2)
        state = federated.start(fed, params)
        sizes = []
        for _ in range(8):
            sizes.append(len(federated.minibatch(fed, 0, int(state.taken[0]))[0]))
            state = federated.advance(fed, state, 0.5)
        assert 0 in sizes and 1 in sizes
        ends.append(state)
    same(ends[0].params, ends[1].params, 1e-5)
    assert ends[0].memory == ends[1].memory


def test_the_quick_way_runs_under_lanes():
    feds, states = [], []
    for i, bound in enumerate((0.2, 0.7)):
        channel = chain(clip_l2(bound), total(), gaussian(0.1), mean(6))
        fed, params = federation(models.mlp(), channel, index=i)
        feds.append(fed)
        states.append(federated.start(fed, params))
    stacked = lanes.advance(feds, lanes.stack(states), 0.5)
    for fed, state, got in zip(feds, states, lanes.unstack(stacked, 2), strict=True):
        same(federated.advance(fed, state, 0.5).params, got.params, 1e-5)


def test_masks_have_an_entry_an_example():
    """A net that reads masks: each example by its own, taps and chunks alike."""
    plain = models.mlp(hidden=(16,))
    assert plain.tapped is not None
    held = plain.tapped

    def apply(params, buffers, x):
        return plain.apply(params, {}, x * buffers["mask/x"])

    opened = replace(held, run=lambda params, buffers, x, t: held.run(params, {}, x * buffers["mask/x"], t))
    model = replace(plain, apply=apply, tapped=opened)
    params, _, x, y = setting(model)
    masks = {"mask/x": (random.uniform(random.generator("mask"), x.shape) < 0.5).double() * 2}
    stage = clip_l2(0.5)
    given = (params, masks, x, one_hot(y, 10, x.dtype), stage.shrink, knobs_of(stage))
    want = looped(plain, params, {}, x * masks["mask/x"], y, stage)
    same(taps.clipped_sum(model, *given)[0], want)
    same(chunks.clipped_sum(model, *given, chunk=2)[0], want)


def test_chunks_are_small_for_large_nets():
    assert chunks.size(setting(NETS["lenet5"])[0]) == 64
    assert chunks.size({"w": torch.empty(11_000_000, device="meta")}) == 1
    assert chunks.size({"w": torch.empty(300_000, device="meta")}) == 13


# --- adaptive clipping -------------------------------------------------------------------------------------


def test_the_bound_is_updated_by_the_papers_formula():
    settings = adaptive.Settings(quantile=0.3, rate=0.2, sigma=2.0, batch=10)
    norms = torch.tensor([0.5, 1.5, 0.9, 1.0])
    after = adaptive.update(settings, adaptive.start(settings, 1.0), norms, torch.tensor(0.7))
    assert float(after.bound) == pytest.approx(math.exp(-0.2 * (0.5 + (3 - 4 / 2 + 1.4) / 10 - 0.3)))
    empty = adaptive.update(settings, adaptive.start(settings, 1.0), norms[:0], torch.tensor(0.0))
    assert float(empty.bound) == pytest.approx(math.exp(-0.2 * (0.5 - 0.3)))


@pytest.mark.parametrize("norm", [0.2, 5.0])
def test_one_example_moves_the_count_by_half(norm):
    """The sensitivity that `multiplier` pays for: uncentred, an example that is not clipped would move it by 1."""
    settings, bound, noise = adaptive.Settings(batch=10), torch.tensor(1.0), torch.tensor(0.3)
    norms = torch.tensor([0.5, 1.5, 0.9])
    more = torch.cat([norms, torch.tensor([norm])])
    moved = settings.batch * (
        adaptive.share(settings, more, bound, noise) - adaptive.share(settings, norms, bound, noise)
    )
    assert abs(float(moved)) == pytest.approx(0.5)


def test_the_noise_is_shared_so_that_both_queries_cost_one():
    """1/z² = 1/z_Δ² + 1/(2σ_b)²: two Gaussian mechanisms side by side add their inverse squares."""
    z = adaptive.multiplier(1.1, 12.8)
    assert z > 1.1
    assert 1 / z**2 + 1 / (2 * 12.8) ** 2 == pytest.approx(1 / 1.1**2)
    with pytest.raises(Expected, match=r"sigma=0\.5 > 0\.55"):
        adaptive.multiplier(1.1, 0.5)
    with pytest.raises(Expected, match=r"quantile=1\.5"):
        adaptive.start(adaptive.Settings(quantile=1.5))


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_bound_goes_to_the_quantile(start):
    settings = adaptive.Settings(quantile=0.7, rate=0.2, sigma=5.0, batch=200)
    norms = (0.5 * random.normal(random.generator("norms"), (200,))).exp()
    state, noise = adaptive.start(settings, start), random.normal(random.generator("noise"), (400,))
    seen = []
    for eps in noise:
        state = adaptive.update(settings, state, norms, eps)
        seen.append(float(state.bound))
    assert sum(seen[-100:]) / 100 == pytest.approx(float(norms.quantile(0.7)), rel=0.05)


def test_norms_come_with_the_sum():
    model, stage = NETS["lenet5"], clip_l2(0.5)
    params, buffers, x, y = setting(model)
    channel = chain(stage, total(), gaussian(0.1))
    joined = fused.split(per_example(5), channel)
    assert joined is not None
    summed, norms = fused.update(per_example(5), joined, channel.knobs(), model, params, buffers, x, y)
    rows = per_example(5).update(model, params, buffers, x, y)
    want = torch.stack([tree.norm(tree.at(rows, i)) for i in range(5)])
    torch.testing.assert_close(norms, want)
    assert float(tree.norm(summed)) <= 5 * 0.5

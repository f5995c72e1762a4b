"""The channel is named from the numbers alone; codes come back from decoded numbers; batches are bounded."""

import runpy
from collections import Counter
from functools import cache

import pytest
import torch
from tiers import sizes

from qleak import data, random, tree
from qleak.adapters.inference import batch_bounds, encode, infer
from qleak.catalog import build, short
from qleak.cli import recipes
from qleak.client import gradient
from qleak.errors import Expected
from qleak.types import Model

SWEEP = runpy.run_path(str(recipes.folder() / "quantization_sweep.py"))
NETS = (
    "lenet-mnist",
    "lenet(channels=1, size=28, classes=10)",
    "convnet(channels=1, size=28)",
    "mlp",
    "lenet(channels=1, size=28, classes=10, init='default')",
)


@cache
def net(name: str, trained: bool) -> tuple[Model, dict]:
    model = build("models", name)
    params, buffers = model.init(random.generator("inference", name))
    if trained and name != "lenet-mnist":
        images = data.load("mnist5k")
        for i in range(60):
            at = random.integers(random.generator("inference", name, i), len(images.x), (64,))
            step = gradient(64).update(model, params, buffers, images.x[at], images.y[at])
            params = tree.sub(params, tree.scale(step, 0.5))
    return model, {k: v.detach() for k, v in params.items()}


def exact(seed: int, name: str = "", trained: bool | None = None, batch: int = 0) -> dict:
    """The gradient of one batch of digits in one of the nets."""
    name = name or NETS[seed % len(NETS)]
    model, params = net(name, bool(seed // len(NETS) % 2) if trained is None else trained)
    images = data.load("mnist5k")
    batch = batch or 1 + seed % 8
    at = random.permutation(random.generator("victims", seed), len(images.x))[:batch]
    update = gradient(batch).update(model, params, {}, images.x[at], images.y[at])
    return {k: v.detach() for k, v in update.items()}


def sent(spec: str, update: dict, seed: int = 0) -> dict:
    channel = build("channels", spec)
    knobs = channel.knobs()
    noise = channel.draw(random.generator("noise", seed), update)
    messages, _ = channel.send(knobs, update, noise, channel.init(update), update)
    return channel.receive(knobs, messages[-1], update)


def right(spec: str, verdict, update: dict, received: dict) -> bool:
    """Family and level, or what gives the same numbers."""
    if "gaussian" in spec or "laplace" in spec:
        return verdict.certainty == "not determined"
    lossless = all(
        torch.allclose(received[k], v, rtol=1e-4, atol=1e-6 * float(v.abs().max())) for k, v in update.items()
    )
    if lossless and verdict.channel == "chain()":
        return True
    named = verdict.channel.replace("stochastic", "uniform")
    wanted = spec.replace("stochastic", "uniform").replace("random_k()", "random_k(ratio=0.1)")
    if "fixed_point" in spec:
        return "fixed_point" in named and "fraction=14" in named
    return bool(named) and short(build("channels", named).spec) == short(build("channels", wanted).spec)


def family(spec: str) -> str:
    return spec.removeprefix("chain(").partition("(")[0].rstrip(")") or "plain"


def table(cases: range, name: str = "") -> tuple[Counter, Counter, list[str]]:
    """(correct, all) by family, and a line for what went wrong; "certain" and wrong is never allowed."""
    grid, good, every, wrong = SWEEP["GRID"], Counter(), Counter(), []
    for i in cases:
        spec, seed = grid[i % len(grid)], i + i // len(grid)
        update = exact(seed, name)
        received = sent(spec, update, i)
        verdict = infer(received)
        if verdict.family == "nothing":
            continue
        ok = right(spec, verdict, update, received)
        every[family(spec)] += 1
        good[family(spec)] += ok
        if not ok:
            wrong.append(f"{i} {NETS[seed % len(NETS)]} {spec} -> {verdict.channel} {verdict.certainty}")
            assert verdict.certainty != "certain", wrong[-1]
    return good, every, wrong


def test_every_channel_of_the_sweep_is_named():
    good, every, wrong = table(range(len(SWEEP["GRID"])), NETS[1])
    assert sum(every.values()) >= 40
    assert sum(good.values()) >= 0.95 * sum(every.values()), wrong


@sizes("step", 9, 1)  # prime to the grid's length: 25 of the 220, each through a channel of its own
def test_two_hundred_updates_are_named(step):
    good, every, wrong = table(range(0, 220, step))
    print()
    for name in every:
        print(f"{name:12s} {good[name]:3d} of {every[name]:3d}")
    print(*wrong, sep="\n")
    told = [name for name in every if name not in ("gaussian", "laplace")]
    assert sum(every[n] for n in told) >= 150 // step
    assert sum(good[n] for n in told) >= 0.95 * sum(every[n] for n in told), wrong
    assert good["gaussian"] + good["laplace"] == every["gaussian"] + every["laplace"]


@pytest.mark.parametrize(
    "spec",
    [
        "chain(uniform(levels=15, range='max'))", "chain(uniform(levels=16, per='channel'))", "chain(uniform(levels=8, per='bucket'))",
        "chain(sign(scale='none'))", "chain(top_k(ratio=0.1), uniform(levels=16))", "chain(top_k(k=40), sign())",
        "chain(top_k(ratio=0.05, scope='global'))", "chain(top_k(ratio=0.2), float16())", "chain(logarithmic(bits=3))",
        "chain(kmeans(clusters=8))", "chain(fixed_point(bits=8, fraction=10))", "chain(powersgd(rank=3))", "chain(qsgd(levels=7))",
    ],
)  # fmt: skip
def test_settings_beside_the_sweep(spec):
    verdict = infer(sent(spec, exact(5, NETS[1], False, 4)))
    assert short(build("channels", verdict.channel).spec) == short(build("channels", spec).spec), verdict


def test_a_channel_in_front_that_only_scales_leaves_no_trace():
    verdict = infer(sent("chain(clip_l2(bound=0.01))", exact(5, NETS[1], False, 4)))
    assert (verdict.channel, verdict.certainty) == ("chain()", "certain")


def test_what_cannot_be_told_is_not_told():
    update = exact(5, NETS[1], False, 2)
    assert infer({k: torch.zeros_like(v) for k, v in update.items()}).family == "nothing"
    drawn = {k: random.normal(random.generator("drawn", k), v.shape) for k, v in update.items()}
    assert infer(drawn).certainty == "not determined"
    assert infer({"b": torch.tensor([1.0, 2.5])}).certainty != "certain"
    some = {k: v for k, v in update.items() if not k.startswith("fc")}  # the layer whose rank would show it
    assert infer(some).certainty == "not determined"


# --- codes again ---


@pytest.mark.parametrize("spec", [*dict.fromkeys(s for s in SWEEP["GRID"] if "gauss" not in s and "laplace" not in s),
    "chain(top_k(ratio=0.1), uniform(levels=16))", "chain(sign(scale='none'))", "chain(stochastic_sign())",
    "chain(uniform(levels=16, per='channel'))", "chain(clip_l2(bound=0.1), gaussian(sigma=0.1), uniform(levels=16))"])  # fmt: skip
def test_decoded_numbers_give_their_codes_again(spec):
    update = exact(6, NETS[1], False, 2)
    channel = build("channels", spec)
    knobs = channel.knobs()
    noise = channel.draw(random.generator("noise"), update)
    message = channel.send(knobs, update, noise, channel.init(update), update)[0][-1]
    received = channel.receive(knobs, message, update)
    again = encode(channel, received)
    assert again.code.keys() == message.code.keys()
    back = channel.receive(knobs, again, update)
    for k, v in received.items():
        assert torch.allclose(back[k], v, rtol=1e-5, atol=1e-5 * float(v.abs().max())), k
    if "powersgd" not in spec and "kmeans" not in spec:  # factors and unused centroids have more than one form
        for k, code in message.code.items():
            if not code.is_floating_point():
                assert torch.equal(again.code[k], code), k


def test_numbers_of_another_channel_are_refused():
    update = exact(6, NETS[1], False, 2)
    for spec in ("chain(uniform(levels=16))", "chain(sign())", "chain(kmeans())", "chain(qsgd())", "chain(float16())"):
        with pytest.raises(Expected, match="name another channel"):
            encode(build("channels", spec), update)
    with pytest.raises(Expected, match="one leg"):
        encode(build("channels", "chain(total('replace-one'))"), update)


# --- the batch ---


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_ranks_bound_the_batch(batch):
    for name in ("mlp", NETS[1]):
        bounds = batch_bounds(exact(7, name, False, batch), net(name, False)[0])
        assert bounds.least <= batch, bounds
        assert bounds.most is None or bounds.most >= batch or "unless" in bounds.reasons[-1]
    bounds = batch_bounds(exact(7, "mlp", False, batch), net("mlp", False)[0])
    assert (bounds.least, bounds.most) == (batch, batch)


def test_a_full_rank_bounds_nothing_from_above():
    bounds = batch_bounds(exact(7, NETS[1], False, 40), net(NETS[1], False)[0])
    assert bounds.least == 9  # ten classes whose errors sum to zero
    assert bounds.most is None

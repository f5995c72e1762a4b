"""Two real processes over gloo: the channel as a hook against the same rounds in one process; torch's hooks, recorded."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from qleak import data, random, tree
from qleak.adapters import ddp
from qleak.catalog import build
from qleak.channels import chain, error_feedback, powersgd, random_k, sign, stochastic, total, uniform
from qleak.check import Expected
from qleak.client import gradient
from qleak.models import from_module
from qleak.train import federated, sgd, split
from qleak.train.federated import Federation

STEPS, SHORT, LR = 80, 5, 0.2
LEVELS = chain(uniform(levels=256))
CHANNELS = {  # name: channel, what it sees at once
    "levels": (LEVELS, "update"),
    "feedback": (error_feedback(chain(sign())), "update"),
    "power": (chain(powersgd(rank=1)), "update"),
    "places": (chain(random_k(ratio=0.1), stochastic(levels=16)), "update"),
    "bucket": (LEVELS, "bucket"),
}
HOOKS = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook", "quantization_pertensor_hook",
         "quantization_perchannel_hook", "powerSGD_hook")  # fmt: skip


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 10))


@functools.cache
def digits():
    return split.spread(data.load("mnist5k"), 1200)


def federation(channel):
    """Two clients, each with every other digit: the ranks, in one process."""
    model = from_module(net(), (1, 28, 28), 10, fresh=True)
    order = random.permutation(random.generator("order"), 1200)
    shards = [order[:1000][i::2] for i in range(2)]
    fed = Federation(model, {}, gradient(batch=16), channel, sgd(), digits(), shards, 2, 0, 0)
    return fed, model.init(random.generator("net"))[0]


def accuracy(fed, params):
    held = random.permutation(random.generator("order"), 1200)[1000:]
    return float((fed.model.apply(params, {}, fed.data.x[held]).argmax(1) == fed.data.y[held]).float().mean())


# --- one of the two processes ---------------------------------------------------------------------------------------


def worker(rank, out):
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks

    dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # several buckets, which DDP cuts anew after the first step
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    counts = {}
    for name, (channel, per) in CHANNELS.items():
        fed, params = federation(channel)
        model, state = wrapped(params)
        model.register_comm_hook(state, ddp.hook(channel, 0, out / name if name == "feedback" else None, per))
        for step in range(STEPS if name == "levels" else SHORT):
            descend(model, *federated.minibatch(fed, rank, step))
        save_file({k: v.detach() for k, v in model.module.state_dict().items()}, out / f"{name}-{rank}.safetensors")
        counts[name] = [state.sent, state.dense]
    for name in HOOKS:
        where = powerSGD_hook if "power" in name else quantization_hooks if "quant" in name else default_hooks
        fed, params = federation(LEVELS)
        model, state = wrapped(params)
        inner = None
        if where is powerSGD_hook:
            inner = powerSGD_hook.PowerSGDState(None, 2, start_powerSGD_iter=2, min_compression_rate=1)
        model.register_comm_hook(state, ddp.recording(getattr(where, name), out / name, inner))
        for step in range(SHORT):
            descend(model, *federated.minibatch(fed, rank, step))
            if rank == 0:
                averaged = {k: p.grad for k, p in model.module.named_parameters()}
                save_file(averaged, out / f"{name}-{step}.safetensors")
    (out / f"counts-{rank}.json").write_text(json.dumps(counts))
    dist.barrier()
    dist.destroy_process_group()


def wrapped(params):
    module = net()
    module.load_state_dict(params)
    model = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=0.0005)
    return model, ddp.state(model)


def descend(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= LR * p.grad


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    both = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [p.communicate(timeout=240)[1] for p in both]
    finally:
        for p in both:
            p.kill()
    assert [p.returncode for p in both] == [0, 0], said
    return folder


# --- the channel as a hook --------------------------------------------------------------------------------------------


def in_process(channel, steps):
    fed, params = federation(channel)
    state = federated.start(fed, params)
    for _ in range(steps):
        state = federated.advance(fed, state, LR)
    return fed, state.params


@pytest.mark.slow
def test_two_processes_learn_what_one_process_does(out):
    """256 levels draw nothing: the same weights to rounding, unless a number on the edge of two codes goes the other way."""
    fed, expected = in_process(LEVELS, STEPS)
    found = load_file(out / "levels-0.safetensors")
    start = federation(LEVELS)[1]
    moved = tree.norm(tree.sub(expected, start))
    assert tree.norm(tree.sub(found, expected)) < 0.01 * moved
    assert accuracy(fed, start) < 0.3 < 0.7 < accuracy(fed, expected)
    assert abs(accuracy(fed, found) - accuracy(fed, expected)) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["feedback", "power"])
def test_memory_outlives_the_buckets_that_ddp_cuts_anew(out, name):
    channel, _ = CHANNELS[name]
    fed, params = federation(channel)
    state = federated.start(fed, params)
    same = channel.init(params, random.generator("ddp", 0, "memory"))  # PowerSGD's Q₀ is the hook's
    state = state._replace(memory=(same, same))
    for _ in range(SHORT):
        state = federated.advance(fed, state, LR)
    found = load_file(out / f"{name}-0.safetensors")
    moved = tree.norm(tree.sub(state.params, params))
    assert tree.norm(tree.sub(found, state.params)) < 0.01 * moved


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANNELS)
def test_ranks_agree_and_bytes_are_those_of_the_channel(out, name):
    a, b = (load_file(out / f"{name}-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    channel, _ = CHANNELS[name]
    like = federation(channel)[1]
    steps = STEPS if name == "levels" else SHORT
    for rank in range(2):
        sent, dense = json.loads((out / f"counts-{rank}.json").read_text())[name]
        assert dense == steps * 4 * tree.count(like)
        bits = federated.message_bits(channel, like) if name not in ("feedback", "power", "places") else None
        if bits is not None:
            assert steps * bits / 8 <= sent <= steps * (bits / 8 + 12)
            assert dense / sent >= 3.9
        assert dense / sent > 3


@pytest.mark.slow
def test_a_recorded_channel_is_what_the_rank_sent(out):
    """Two signs of one scale a tensor, the spec that makes the channel again, and the payload's own bytes."""
    from qleak.adapters import payload

    like = federation(LEVELS)[1]
    for rank in range(2):
        path = out / "feedback" / f"step-000003-rank-{rank}.safetensors"
        update, meta = load_file(path), safe_open(path, "pt").metadata()
        assert list(meta) and (meta["step"], meta["rank"], meta["world"]) == ("3", str(rank), "2")
        channel = build("channels", meta["channel"])
        raw = load_file(path.with_suffix(".payload.safetensors"))["sent.0"]
        decoded = channel.receive(channel.knobs(), payload.unpack(channel, raw, like), like)
        assert all(torch.equal(decoded[k], update[k]) for k in like)
        assert all(len(v.abs().unique()) == 1 for v in update.values())


# --- torch's hooks ------------------------------------------------------------------------------------------------------


def recorded(out, name, step):
    """Both ranks' decoded gradients, payloads and metadata."""
    paths = [out / name / f"step-{step:06d}-rank-{rank}.safetensors" for rank in range(2)]
    return [
        (load_file(p), load_file(p.with_suffix(".payload.safetensors")), safe_open(p, "pt").metadata()) for p in paths
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("step", range(SHORT))
def test_what_was_recorded_is_what_ddp_averaged(out, name, step):
    averaged = load_file(out / f"{name}-{step}.safetensors")
    (a, _, meta), (b, _, _) = recorded(out, name, step)
    assert set(a) == set(averaged) and meta["hook"] == name
    # Halves are added in half precision by the collective; everything else in float32.
    loose = {"fp16_compress_hook": 2e-3, "bf16_compress_hook": 2e-2}.get(name, 1e-5)
    for k, v in averaged.items():
        torch.testing.assert_close((a[k] + b[k]) / 2, v, rtol=loose, atol=loose * float(v.abs().max()))
        assert not torch.allclose(a[k], v, rtol=0.05, atol=0.05 * float(v.abs().max())), "the ranks' batches differ"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp16_compress_hook", "bf16_compress_hook"])
def test_halves_add_up_exactly_as_they_were_sent(out, name):
    averaged = load_file(out / f"{name}-1.safetensors")
    (_, a, meta), (_, b, _) = recorded(out, name, 1)
    layout = json.loads(safe_open(out / name / "step-000001-rank-0.payload.safetensors", "pt").metadata()["layout"])
    assert len(layout) > 1, "several buckets"
    for i, line in enumerate(layout):
        both = (a[f"sent.{i}"] + b[f"sent.{i}"]).float()
        expected = torch.cat([averaged[k].reshape(-1) for k in line["names"]])
        assert torch.equal(both, expected) and line["call"] == "all_reduce"
    assert meta["channel"] == {"f": "chain(float16())", "b": "chain(bfloat16())"}[name[0]]


@pytest.mark.slow
def test_payloads_have_the_types_that_travel(out):
    types = {}
    for name in HOOKS:
        (_, held, meta), _ = recorded(out, name, SHORT - 1)
        types[name] = {str(v.dtype) for v in held.values()}, meta["channel"]
    assert types["quantization_pertensor_hook"] == ({"torch.float32", "torch.uint8"}, "")
    assert types["fp16_compress_hook"][0] == {"torch.float16"}
    assert types["powerSGD_hook"] == ({"torch.float32"}, "chain(powersgd(rank=2))")
    early = recorded(out, "powerSGD_hook", 0)[0][2]["channel"]
    assert early == "chain()"
    update = recorded(out, "powerSGD_hook", SHORT - 1)[0][0]
    assert torch.linalg.matrix_rank(update["1.weight"], rtol=1e-4) == 2


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_one_line_for_what_does_not_fit():
    for make, said in [
        (lambda: ddp.hook(chain(total())), "without joins"),
        (lambda: ddp.hook(error_feedback(), per="bucket"), "memory"),
        (lambda: ddp.hook(LEVELS, per="buckets"), "Did you mean 'bucket'"),
        (lambda: ddp.recording(lambda state, bucket: None, "x"), "allreduce_hook"),
    ]:
        with pytest.raises(Expected) as error:
            make()
        assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="Flower is installed")
def test_flower_is_asked_for_in_one_line():
    """The mods themselves run in `just flower`."""
    from qleak.adapters import flower

    for make in (lambda: flower.recording("x"), lambda: flower.through(LEVELS)):
        with pytest.raises(Expected, match="pip install"):
            make()


def test_frozen_parameters_have_no_name():
    module = net()
    module[1].weight.requires_grad = False
    assert list(ddp.state(module).like) == ["1.bias", "3.weight", "3.bias", "5.weight", "5.bias"]


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))

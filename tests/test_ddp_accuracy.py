"""What a training over two gloo processes reaches through a hook, beside the same training in one process, over seeds."""

import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from tiers import sizes
from torch.nn.functional import cross_entropy

from qleak import data, random, tree
from qleak.adapters import ddp
from qleak.channels import chain, uniform
from qleak.client import gradient
from qleak.models import from_module
from qleak.train import federated, sgd
from qleak.train.federated import Federation

LR, TRAINED = 0.2, 2000
ARMS = {"float32": chain(), "256 levels": chain(uniform(levels=256)), "2 levels": chain(uniform(levels=2))}


def net():
    layer = torch.nn.Linear
    return torch.nn.Sequential(
        torch.nn.Flatten(), layer(784, 64), torch.nn.Tanh(), layer(64, 32), torch.nn.Tanh(), layer(32, 10)
    )


@functools.cache
def order(seed):
    return random.permutation(random.generator("accuracy", seed), len(data.load("mnist5k").x))


def federation(channel, seed):
    """Two clients with 1,000 digits each, batches of 16; 3,000 digits are held out. A seed has its own split and weights."""
    model = from_module(net(), (1, 28, 28), 10, fresh=True)
    shards = [order(seed)[:TRAINED][i::2] for i in range(2)]
    fed = Federation(model, {}, gradient(batch=16), channel, sgd(), data.load("mnist5k"), shards, 2, seed, 0)
    return fed, model.init(random.generator("accuracy", seed, "net"))[0]


def measured(fed, params, seed):
    """Accuracy and loss on the digits held out."""
    held = order(seed)[TRAINED:]
    logits, y = fed.model.apply(params, {}, fed.data.x[held]), fed.data.y[held]
    return {"accuracy": float((logits.argmax(1) == y).float().mean()), "loss": float(cross_entropy(logits, y))}


def in_process(channel, seed, steps):
    fed, params = federation(channel, seed)
    state = federated.start(fed, params)
    for _ in range(steps):
        state = federated.advance(fed, state, LR)
    return measured(fed, state.params, seed)


def over_ddp(name, rank, seed, steps):
    """One rank's training: DDP's own all-reduce for float32, the hook otherwise; bytes are those this rank sent a step."""
    fed, params = federation(ARMS[name], seed)
    module = net()
    module.load_state_dict(params)
    model = torch.nn.parallel.DistributedDataParallel(module)
    state = ddp.state(model)
    if name != "float32":
        model.register_comm_hook(state, ddp.hook(ARMS[name], seed))
    for step in range(steps):
        x, y = federated.minibatch(fed, rank, step)
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=LR)  # pyright: ignore[reportArgumentType]
    sent = state.sent / steps if name != "float32" else 4 * tree.count(params)
    return measured(fed, {k: v.detach() for k, v in module.named_parameters()}, seed) | {"bytes": sent}


def worker(rank, out, seeds, steps):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    found = {name: [over_ddp(name, rank, seed, steps) for seed in range(seeds)] for name in ARMS}
    (out / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@sizes("size", (1, 100), (3, 200))
def test_a_hook_costs_no_accuracy_and_a_quarter_of_the_bytes(tmp_path, size):
    seeds, steps = size
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__]
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path), str(seeds), str(steps)], env=env) for rank in range(2)
    ]
    try:
        assert [p.wait(timeout=240) for p in both] == [0, 0]
    finally:
        for p in both:
            p.kill()
    found = {f"DDP, {k}": v for k, v in json.loads((tmp_path / "found-0.json").read_text()).items()}
    found |= {f"one process, {k}": [in_process(c, seed, steps) for seed in range(seeds)] for k, c in ARMS.items()}
    print()
    reached = {name: [run["accuracy"] for run in runs] for name, runs in found.items()}
    for name, values in reached.items():
        sent = found[name][0].get("bytes")
        each = " ".join(f"{v:.4f}" for v in values)
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        loss = statistics.mean(run["loss"] for run in found[name])
        line = f"{name:24s} {mean:.4f} ± {spread:.4f} ({each}), loss {loss:.4f}"
        print(f"{line}, {sent:,.0f} bytes a step" if sent else line)
    for seed in range(seeds):
        through = reached["DDP, 256 levels"][seed]
        for other in ("one process, 256 levels", "DDP, float32"):
            assert abs(through - reached[other][seed]) <= 0.02, (other, seed)
        assert through > 0.8
        assert found["DDP, 256 levels"][seed]["loss"] != found["DDP, float32"][seed]["loss"], (
            "the channel did something"
        )
        assert max(reached["DDP, 2 levels"][seed], reached["one process, 2 levels"][seed]) < 0.5, (
            "one too coarse is seen"
        )
    assert 3.98 < found["DDP, float32"][0]["bytes"] / found["DDP, 256 levels"][0]["bytes"] <= 4


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

"""Buckets that DDP's own hooks send of one digit, on a LeNet that leaks, recorded by one process and then audited."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from tiers import sizes
from torch import nn
from torch.nn.functional import cross_entropy

import qleak
from qleak import data, random
from qleak.adapters import ddp
from qleak.catalog import build

MODEL = "lenet(channels=1, size=28, classes=10)"
BEFORE = 2  # steps that torch's PowerSGD leaves as they are


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 12, 5, 2, 2), nn.Conv2d(12, 12, 5, 2, 2)
        self.conv3, self.fc = nn.Conv2d(12, 12, 5, 1, 2), nn.Linear(588, 10)

    def forward(self, x):
        for layer in (self.conv1, self.conv2, self.conv3):
            x = torch.sigmoid(layer(x))
        return self.fc(x.flatten(1))


def weights():
    """Every number U(−0.5, 0.5)."""
    return build("models", MODEL).init(random.generator("leak"))[0]


def digit(at):
    images = data.load("mnist5k")
    return images.x[at : at + 1], images.y[at : at + 1]


def recorded(hook, inner, folder, victim):
    """Steps on other digits, which PowerSGD leaves as they are, and then one on the victim; weights stay as they are."""
    net = LeNet()
    net.load_state_dict(weights())
    model = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.01)
    model.register_comm_hook(ddp.state(model), ddp.recording(hook, folder, inner))
    for step in range(BEFORE + 1):
        x, y = digit(victim if step == BEFORE else step)
        model.zero_grad()
        cross_entropy(model(x), y).backward()


def worker(out, victims, ranks):
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=0, world_size=1)
    for victim in victims:
        recorded(default_hooks.fp16_compress_hook, None, out / f"fp16-{victim}", victim)
        for rank in ranks:
            inner = powerSGD_hook.PowerSGDState(
                None, rank, start_powerSGD_iter=BEFORE, min_compression_rate=1, random_seed=victim
            )
            recorded(powerSGD_hook.powerSGD_hook, inner, out / f"rank {rank}-{victim}", victim)
    dist.destroy_process_group()


@sizes("size", ([1234], [1], 4.0), ([1234, 77], [1, 2, 4], 8.0))
def test_halves_give_the_image_and_a_low_rank_keeps_it(tmp_path, size):
    victims, ranks, budget = size
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(
        [sys.executable, __file__, str(tmp_path), json.dumps([victims, ranks])], env=env, check=True, timeout=120
    )
    print()
    reached = {}
    for name in ("fp16", *(f"rank {r}" for r in ranks)):
        reports = []
        for victim in victims:
            file = tmp_path / f"{name}-{victim}" / f"step-{BEFORE:06d}-rank-0.safetensors"
            reports.append(qleak.audit(file, build("models", MODEL), weights(), truth=digit(victim), budget=budget))
        channels = sorted({r.document["channel"]["channel"] for r in reports})
        reached[name] = [r.document["images"][0]["psnr_db"] for r in reports]
        assert channels == ["chain(float16())" if name == "fp16" else f"chain(powersgd(rank={name[5:]}))"]
        assert not any(r.document["channel"]["note"] for r in reports)
        controls = max(r.document["controls"]["psnr_db"] for r in reports)
        each = " ".join(f"{v:.1f}" for v in reached[name])
        verdicts = ", ".join(r.verdict for r in reports)
        mean = statistics.mean(reached[name])
        print(f"{name}: {mean:.1f} dB ({each}), best control {controls:.1f} dB, as {channels[0]}: {verdicts}")
    mean = {name: statistics.mean(values) for name, values in reached.items()}
    assert min(reached["fp16"]) > 35
    assert max(reached["rank 1"]) < 20
    assert mean["rank 1"] < mean[f"rank {ranks[-1]}"] < mean["fp16"] or len(ranks) == 1


if __name__ == "__main__":
    worker(Path(sys.argv[1]), *json.loads(sys.argv[2]))

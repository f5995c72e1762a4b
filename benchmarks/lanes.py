"""Trainings under one vmap against one after another: CPU seconds per round of each, and their ratio.

One process, one thread; the two take turns, round by round, so that a busy machine slows both. Two channels
(identity, uniform(levels=16)): `python benchmarks/lanes.py [--lanes 6] [--rounds 20] [--batch 32]`.
"""

from __future__ import annotations

import argparse
import time

import torch

from qleak import data, models, random
from qleak.channels import Channel, chain, identity, uniform
from qleak.client import gradient
from qleak.train import federated, lanes, sgd, split
from qleak.types import Model

NETS: dict[str, Model] = {
    "lenet": models.lenet(channels=1, size=28, classes=10, function="relu", init="default"),
    "convnet": models.convnet(channels=1, size=28),
    "mlp": models.mlp(),
    "mlp 512": models.mlp(hidden=(512, 512)),
}


def ratio(model: Model, channel: Channel, count: int, rounds: int, batch: int) -> tuple[float, float]:
    """CPU milliseconds per round of all lanes: (together, one after another)."""
    some = split.spread(data.load("mnist5k"), 2000)
    feds, states = [], []
    for i in range(count):
        params, buffers = model.init(random.generator("net", i))
        shards = split.shards("iid", some.y, 1, random.generator("split", i))
        fed = federated.Federation(model, buffers, gradient(batch), channel, sgd(0.9), some, shards, 1, 0, i)
        feds.append(fed)
        states.append(federated.start(fed, params))
    stacked, spent = lanes.stack(states), [0.0, 0.0]
    for number in range(rounds + 2):  # two to warm up
        began = time.process_time()
        stacked = lanes.advance(feds, stacked, 0.01)
        between = time.process_time()
        states = [federated.advance(fed, state, 0.01) for fed, state in zip(feds, states, strict=True)]
        if number >= 2:
            spent[0] += between - began
            spent[1] += time.process_time() - between
    return spent[0] / rounds * 1e3, spent[1] / rounds * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lanes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{options.lanes} lanes, batch {options.batch}, CPU ms a round: together, one after another, ratio (below 1: vmap wins)"
    )
    for name, model in NETS.items():
        for said, channel in {"fp32": identity(), "uniform(16)": chain(uniform(16))}.items():
            a, b = ratio(model, channel, options.lanes, options.rounds, options.batch)
            print(f"{name:8s} {said:12s} {a:8.2f} {b:8.2f} {a / b:6.2f}", flush=True)


if __name__ == "__main__":
    main()

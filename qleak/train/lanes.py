"""Many trainings as one: seeds, and channels that differ in knobs only, under one vmap over stacked parameter dicts.

Worth it where a lane's own work is small against its overhead, and where weights of different lanes
still meet one batched matrix product: four small perceptrons take 0.6–0.75 of the CPU time of one after
another. Per-lane convolution weights become grouped convolutions: 0.6–0.7 at batch 8, 0.85–0.95 at 32,
1.0–1.3 at 64 and up to 1.7 at 256 (`benchmarks/lanes.py`), while jobs of their own keep every core busy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from qleak import random, tree
from qleak.channels import Channel
from qleak.channels.channel import stack as stack_knobs
from qleak.check import Expected
from qleak.train.federated import Federation, State, draws_of, minibatch, noise_of, sender
from qleak.types import Model, Params, Tree

T = TypeVar("T")
TOGETHER = 4  # lanes of one job on a CPU; fixed, because the last ulp depends on it


def pick(
    model: Model, device: str, clients: int, lanes: int, wanted: str = "auto", poisson: bool = False
) -> tuple[str, str]:
    """("loop" or "vmap", why) for `lanes` trainings that could share one vmap; see `benchmarks/lanes.py`."""
    if wanted != "auto":
        return wanted, "as asked"
    if clients > 1:
        return "loop", "clients' shards differ in size"
    if poisson:
        return "loop", "Poisson batches differ in size"
    if lanes == 1:
        return "loop", "nothing to train together"
    if torch.device(device).type == "cuda":
        return "vmap", "a GPU has room for all lanes at once"
    if model.layers is None or any(layer.kind == "conv" for layer in model.layers):
        return "loop", "convolutions on a CPU: one vmap saves little or loses, jobs of their own fill the cores"
    return "vmap", "linear layers alone: one batched matrix product for several lanes costs less"


def deal(members: Sequence[T], device: str) -> list[tuple[T, ...]]:
    """`members` of one vmap as jobs: evenly in parts of at most `TOGETHER` on a CPU, so that workers have some each."""
    parts = 1 if torch.device(device).type == "cuda" else math.ceil(len(members) / TOGETHER)
    cuts = [len(members) * i // parts for i in range(parts + 1)]
    return [tuple(members[a:b]) for a, b in pairwise(cuts)]


def together(channels: Sequence[Channel], like: Tree) -> list[list[int]]:
    """Indices of channels that may share one vmap: each group's first channel, given another's knobs, does what that one does.

    Tried on a fixed draw and not read from names, because a parameter that is no knob (the k of
    top-k) can differ between channels of the same stages.
    """
    groups: list[list[int]] = []
    for i, channel in enumerate(channels):
        for group in groups:
            if _interchangeable(channels[group[0]], channel, like):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _interchangeable(a: Channel, b: Channel, like: Tree) -> bool:
    if [s.name for s in a.stages] != [s.name for s in b.stages] or a.joins != b.joins:
        return False
    gen = random.generator("interchangeable")
    rows = {k: random.normal(gen, (*(2,) * a.joins, *v.shape)).to(v.dtype) for k, v in like.items()}
    seen = []
    for channel in (a, b):
        noise = channel.draw(random.generator("interchangeable", "noise"), like, (2,) * a.joins)
        try:
            messages, _ = channel.send(b.knobs(), rows, noise, channel.init(like), like)
        except (Expected, RuntimeError):
            return False
        message = messages[-1]
        seen.append([message.code, channel.receive(b.knobs(), message, like)])
    first, second = (tree.flatten(s) for s in seen)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def stack(states: Sequence[State]) -> State:
    """States of equally many rounds with a new first axis `lane`; `taken` and `round` stay those of one lane."""
    first = states[0]
    parts = [(s.params, s.rule, s.memory) for s in states]
    params, rule, memory = tree.nested_map(lambda *v: torch.stack(v), *parts)
    return State(params, rule, memory, first.taken, first.round, {}, {}, {})


def unstack(state: State, lanes: int) -> list[State]:
    """The inverse of `stack`."""
    whole = (state.params, state.rule, state.memory)
    parts = [tree.nested_map(lambda v, i=i: v[i].clone(), whole) for i in range(lanes)]
    return [State(params, rule, memory, state.taken, state.round, {}, {}, {}) for params, rule, memory in parts]


def advance(feds: Sequence[Federation], state: State, lr: float) -> State:
    """One round of every lane; `state` is stacked. Each lane holds one client and the same number of images."""
    first, number = feds[0], int(state.round)
    device = next(iter(state.params.values())).device
    knobs = tree.nested_map(lambda v: v.to(device), stack_knobs([fed.channel for fed in feds]))
    batches = [minibatch(fed, 0, int(state.taken[0])) for fed in feds]
    x, y = torch.stack([b[0] for b in batches]), torch.stack([b[1] for b in batches])
    like = tree.at(state.params, 0)
    noise = [noise_of(fed, number, 0, x.shape[1], like) for fed in feds]
    draws = [draws_of(fed, number, 0, x.shape[1], lr) for fed in feds]
    send = sender(first.model, first.buffers, first.client, first.channel)

    def one(
        knobs: object, params: Params, rule: object, memory: object, x: Tensor, y: Tensor, noise: object, draws: Tree
    ) -> tuple[Params, object, object]:
        update, after, _ = send(knobs, params, x, y, noise, memory, draws, {})
        return *first.rule.update(params, rule, update, lr), after

    stacked = tree.nested_map(lambda *v: torch.stack(v), *noise)
    lanes = vmap(one, randomness="error")
    drawn = tree.nested_map(lambda *v: torch.stack(v), *draws)
    params, rule, memory = lanes(knobs, state.params, state.rule, state.memory[0], x, y, stacked, drawn)
    return State(params, rule, (memory,), state.taken + 1, state.round + 1, {}, {}, {})

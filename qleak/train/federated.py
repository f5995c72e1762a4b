"""Rounds: clients take their next images, send updates through their own channel states, the server averages and steps.

One client that holds everything is plain training through a channel. Everything random is drawn from
paths that do not mention the channel, so trainings through different channels see the same
images in the same order: comparisons are paired.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak import random, tree
from qleak.channels import Channel
from qleak.private import fused
from qleak.private.adaptive import Settings
from qleak.train.rules import Rule
from qleak.types import Buffers, Client, Dataset, Message, Model, Params, Tree


class State(NamedTuple):
    """Everything the next round needs.

    Attributes:
        params: the global weights.
        rule: the rule's state.
        memory: each client's channel state.
        taken: minibatches each client has taken, int64 `[client]`; also the messages it has sent.
        round: rounds done, int64, 0-dim.
        anchor: the weights at which clients compute, where they lag behind the server's; {} where they do not.
        held: the updates the one client has summed since it got its weights; {} where it begins anew each round.
        bound: the clipping bound of the next round, where it follows the norms; {} where it is fixed.
    """

    params: Params
    rule: Any
    memory: tuple[Any, ...]
    taken: Tensor
    round: Tensor
    anchor: Params
    held: Tree
    bound: Tree


@dataclass(frozen=True)
class Federation:
    """What stays fixed while a training runs.

    Attributes:
        data: images in the dtype and on the device of the training.
        shards: indices into `data`, one tensor a client.
        per_round: clients that take part in a round.
        seed: root of the draws.
        index: which of the plan's seeds; each has its own shards, orders and noise.
        sampling: "shuffle" (passes over the shard), "poisson" (every image of the shard takes part by itself, with
            probability `rate`) or "replacement" (each image of a batch is drawn anew from the whole shard).
        lag: rounds a client keeps its weights and sums its updates; 0: it gets the server's every round, and sends its
            own update. More than 0 is a fault that a published implementation has.
        adaptive: how the clipping bound follows the norms (`adaptive_rounds.py`), None for a fixed one.
    """

    model: Model
    buffers: Buffers
    client: Client
    channel: Channel
    rule: Rule
    data: Dataset
    shards: Sequence[Tensor]
    per_round: int
    seed: int
    index: int
    sampling: str = "shuffle"
    lag: int = 0
    adaptive: Settings | None = None


def start(fed: Federation, params: Params) -> State:
    """The state before the first round."""
    count = len(fed.shards)
    memory = tuple(
        fed.channel.init(params, random.generator(fed.seed, "memory", fed.index, client)) for client in range(count)
    )
    zero = torch.zeros((), dtype=torch.int64)
    lagging = {k: torch.zeros_like(v) for k, v in params.items()} if fed.lag else {}
    anchor = params if fed.lag else {}
    bound = {"bound": torch.tensor(fed.channel.stages[0].knobs["bound"])} if fed.adaptive else {}
    taken = torch.zeros(count, dtype=torch.int64)
    return State(params, fed.rule.init(params), memory, taken, zero, anchor, lagging, bound)


def rounds_per_epoch(fed: Federation) -> int:
    """⌈n / images a round takes⌉; a client with fewer images than a batch takes all it has."""
    return round_count([len(shard) for shard in fed.shards], fed.per_round, fed.client.batch)


def round_count(sizes: Sequence[int], per_round: int, batch: int) -> int:
    """Rounds that cover shards of these `sizes` once, when `per_round` clients take `batch` images each."""
    images = per_round * sum(min(batch, n) for n in sizes) / len(sizes)
    return math.ceil(sum(sizes) / images - 1e-9)


def participants(fed: Federation, number: int) -> list[int]:
    """Who takes part in round `number`, ascending."""
    count = len(fed.shards)
    if fed.per_round == count:
        return list(range(count))
    drawn = random.permutation(random.generator(fed.seed, "round", fed.index, number), count)
    return sorted(drawn[: fed.per_round].tolist())


def minibatch(fed: Federation, client: int, taken: int) -> tuple[Tensor, Tensor]:
    """The minibatch a client takes after `taken` others: passes over its shard, each in a new order.

    The last minibatch of a pass may be short. With Poisson sampling its size is binomial, and may be 0.
    """
    shard, b = fed.shards[client], fed.client.batch
    if fed.sampling == "replacement":
        drawn = random.integers(random.generator(fed.seed, "replacement", fed.index, client, taken), len(shard), (b,))
        rows = shard[drawn].to(fed.data.x.device)
        return fed.data.x[rows], fed.data.y[rows]
    if fed.sampling == "poisson":
        drawn = random.uniform(random.generator(fed.seed, "poisson", fed.index, client, taken), (len(shard),))
        rows = shard[drawn < rate(len(shard), b)].to(fed.data.x.device)
        return fed.data.x[rows], fed.data.y[rows]
    passed, i = divmod(taken, math.ceil(len(shard) / b))
    order = _order(fed.seed, fed.index, client, passed, len(shard))
    rows = shard[order[i * b : (i + 1) * b]].to(fed.data.x.device)
    return fed.data.x[rows], fed.data.y[rows]


def rate(images: int, batch: int) -> float:
    """The probability with which each of a shard's `images` is in a Poisson batch of expected size `batch`."""
    return min(1.0, batch / images)


@functools.lru_cache(maxsize=1024)
def _order(seed: int, index: int, client: int, passed: int, count: int) -> Tensor:
    return random.permutation(random.generator(seed, "order", index, client, passed), count)


def noise_of(fed: Federation, number: int, client: int, rows: int, like: Tree) -> Any:
    """The channel's noise for one message, on the device and in the dtype of the weights."""
    drawn = fed.channel.draw(
        random.generator(fed.seed, "channel", fed.index, number, client), like, (rows,) * fed.client.rows
    )
    some = next(iter(like.values()))
    return tree.nested_map(lambda v: v.to(some.device, some.dtype), drawn)


def sender(model: Model, buffers: Buffers, client: Client, channel: Channel) -> Callable[..., tuple[Tree, Any, Tree]]:
    """`f(knobs, params, x, y, noise, memory, draws, held) -> (decoded update, memory, held)`: one client's part of a round.

    Nothing is drawn in it. `held` is what the client adds its update to before it sends; {} for nothing. Clipping and
    summing each example's gradient is one operation where nothing is held (`qleak.private`).
    """
    joined = fused.split(client, channel, model)

    def send(
        knobs: Any, params: Params, x: Tensor, y: Tensor, noise: Any, memory: Any, draws: Tree, held: Tree
    ) -> tuple[Tree, Any, Tree]:
        if joined and not held:
            return *fused.through(client, joined, knobs, model, params, buffers, x, y, noise, memory, draws), held
        update = client.update(model, params, buffers, x, y, draws)
        if held:
            held = update = tree.add(held, update)
        messages, after = channel.send(knobs, update, noise, memory, params)
        return channel.receive(knobs, messages[-1], params), after, held

    return send


def draws_of(fed: Federation, number: int, client: int, count: int, lr: float) -> Tree:
    """The client's own draws for one update (dropout, random starts), on the device and in the dtype of the data."""
    drawn = fed.client.draw(random.generator(fed.seed, "client", fed.index, number, client), fed.model, count, lr)
    return tree.to(tree.cast(drawn, fed.data.x.dtype), fed.data.x.device)


def advance(fed: Federation, state: State, lr: float) -> State:
    """One round: the average of the participants' decoded updates, unweighted, goes to the rule."""
    number, device = int(state.round), next(iter(state.params.values())).device
    send = sender(fed.model, fed.buffers, fed.client, fed.channel)
    knobs, memory, taken = fed.channel.knobs(device=device), list(state.memory), state.taken.clone()
    anchor, held = state.anchor, state.held
    if fed.lag and number % fed.lag == 0:  # new weights, and the sum begins anew
        anchor, held = state.params, {k: torch.zeros_like(v) for k, v in held.items()}
    total: Tree = {}
    members = participants(fed, number)
    for client in members:
        x, y = minibatch(fed, client, int(taken[client]))
        noise = noise_of(fed, number, client, len(x), state.params)
        draws = draws_of(fed, number, client, len(x), lr)
        decoded, memory[client], held = send(
            knobs, anchor or state.params, x, y, noise, memory[client], draws, held
        )  # fmt: skip
        total = tree.add(total, decoded) if total else decoded
        taken[client] += 1
    mean = tree.scale(total, 1 / len(members)) if len(members) > 1 else total
    params, rule = fed.rule.update(state.params, state.rule, mean, lr)
    return State(params, rule, tuple(memory), taken, state.round + 1, anchor, held, {})


def message_bits(channel: Channel, like: Tree) -> float:
    """Bits of the message a client sends (the last leg's), side information included."""
    return channel.bits(Message(like, ()), like)

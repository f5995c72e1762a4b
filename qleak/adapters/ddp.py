"""A channel as the communication hook of `DistributedDataParallel`, sending packed codes.

    model.register_comm_hook(ddp.state(model), ddp.hook(channel, seed=0))

Every rank's gradient goes through the channel, its payload is all-gathered (uint8, over gloo or nccl), and every rank decodes
all payloads and takes their mean: a round of `qleak.train.federated` with one client a rank. What torch's own hooks send
is recorded by `recording`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from qleak import tree
from qleak.adapters import capture, payload, sending
from qleak.adapters.ranks import Bucket, Hook, State, gradients, names_of, state
from qleak.adapters.recording import recording
from qleak.channels import Channel
from qleak.check import Expected, one_of
from qleak.types import Tree

PER = ("update", "bucket")
__all__ = ["PER", "State", "hook", "recording", "state"]


def hook(channel: Channel, seed: int = 0, record: Path | str | None = None, per: str = "update") -> Hook:
    """A communication hook that sends gradients through `channel`.

    Draws come from (seed, rank, step, bucket), so ranks are independent and a training can be repeated. Memory (error
    feedback, PowerSGD's Q) is each rank's own. Gradients of half precision are sent as float32 numbers would be.

    Args:
        channel: without joins.
        seed: root of the draws.
        record: a folder for what this rank sent, every step (`qleak.adapters.capture`).
        per: what the channel sees at once. "update": all buckets of a step, so that norms, global rankings and memory are
            those of the channel elsewhere; nothing is sent before the last bucket is there. "bucket": each bucket when
            it is ready, while the backward pass goes on; for channels without memory.

    Raises:
        Expected: a channel with a join, or with memory and per="bucket" (DDP regroups its buckets after the first step).
    """
    one_of(PER, per=per)
    if channel.joins:
        raise Expected(f"Expected a channel without joins in a rank's hook, got {channel.spec}: ranks are averaged.")
    probe = channel.init({"w": torch.zeros(2, 2)})
    if per == "bucket" and tree.flatten(probe):
        raise Expected(f"Expected per='update' for {channel.spec}, whose memory would not survive DDP's new buckets.")

    def run(state: State, bucket):  # unannotated: DDP compares annotations with its types, and these would be text
        names = names_of(state, bucket)
        future = Future(devices=[bucket.buffer().device] if bucket.buffer().is_cuda else None)
        state.waiting.append((names, bucket.buffer(), future))
        if per == "update" and not bucket.is_last():
            return future
        like = _like(state, bucket, per)
        update = gradients(state.waiting, like)
        number = bucket.index() if per == "bucket" else 0
        data, decoded = _sent(channel, state, update, like, seed, number)
        if record is not None:
            _recorded(Path(record), state, channel, data, decoded, number if per == "bucket" else None)
        waiting, state.waiting = state.waiting, []
        out = [torch.empty_like(data) for _ in range(state.world)]
        work = dist.all_gather(out, data, group=state.group, async_op=True)
        assert work is not None
        if bucket.is_last():
            state.step += 1
        if per == "bucket":
            return work.get_future().then(lambda done: _give(waiting, _mean(channel, out, like), done))
        work.wait()
        _give(waiting, _mean(channel, out, like), None)
        return future

    return run


def _like(state: State, bucket: Bucket, per: str) -> Tree:
    """The tree the channel sees: the model's order, so that no draw depends on how DDP cuts its buckets."""
    if per == "update":
        return {k: v for k, v in state.like.items() if any(k in names for names, _, _ in state.waiting)}
    inside = set(names_of(state, bucket))
    return {k: v for k, v in state.like.items() if k in inside}


def _sent(channel: Channel, state: State, update: Tree, like: Tree, seed: int, number: int) -> tuple[Tensor, Tree]:
    """(payload, what it decodes to) of this rank; the state's memory and counters go on."""
    left = sending.send(channel, update, like, state.memory, ("ddp", seed), (state.rank, state.step, number))
    state.memory = left.memory
    state.sent += left.data.numel()
    state.dense += 4 * tree.count(like)
    return left.data, left.decoded


def _mean(channel: Channel, payloads: list[Tensor], like: Tree) -> Tree:
    """The mean of what all ranks' payloads decode to."""
    knobs = channel.knobs(device=payloads[0].device)
    total: Tree = {}
    for data in payloads:
        decoded = channel.receive(knobs, payload.unpack(channel, data, like), like)
        total = tree.add(total, decoded) if total else decoded
    return tree.scale(total, 1 / len(payloads))


def _give(waiting: list[tuple[list[str], Tensor, Future]], mean: Tree, done: Any) -> Tensor:
    """Hands every waiting bucket its part of the mean; returns the last one's."""
    flat = waiting[-1][1]
    for names, buffer, future in waiting:
        flat = torch.cat([mean[k].reshape(-1) for k in names]).to(buffer.dtype)
        future.set_result(flat)
    return flat


def _recorded(folder: Path, state: State, channel: Channel, data: Tensor, decoded: Tree, number: int | None) -> None:
    meta = {"hook": "qleak.adapters.ddp.hook", "channel": channel.spec, "step": state.step, "rank": state.rank}
    meta |= {"world": state.world} | ({} if number is None else {"bucket": number})
    calls = [capture.Sent("all_gather", data, list(decoded), number or 0)]
    capture.save(folder, decoded, calls, meta)

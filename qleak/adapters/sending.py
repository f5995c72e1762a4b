"""An update on its way out: through a channel with memory, as the bytes that leave and the numbers they are read as."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from qleak import random, tree
from qleak.adapters import payload
from qleak.channels import Channel
from qleak.types import Tree


class Left(NamedTuple):
    """The payload (uint8), what it decodes to, and the channel's memory for the next time (None without)."""

    data: Tensor
    decoded: Tree
    memory: Any


def send(
    channel: Channel, update: Tree, like: Tree, memory: Any, root: tuple[int | str, ...], path: tuple[int | str, ...]
) -> Left:
    """Sends one update.

    Args:
        channel: without joins.
        update: by parameter, float32.
        like: its shapes.
        memory: what the last time left; None for the first, which begins from (*root, "memory").
        root: of all draws of a training; memory that begins from it is the same for all who share it.
        path: this sender and this time; its draws come from (*root, *path).
    """
    device = next(iter(like.values())).device
    memory = channel.init(like, random.generator(*root, "memory")) if memory is None else memory
    places = random.key(*root, *path, "places") % 2**32
    noise = payload.draw(channel, random.generator(*root, *path), like, places)
    noise = tree.nested_map(lambda v: v.to(device), noise)
    knobs = channel.knobs(device=device)
    messages, after = channel.send(knobs, update, noise, memory, like)
    data = payload.pack(channel, messages[-1], like, places)
    return Left(data, channel.receive(knobs, messages[-1], like), after if tree.flatten(after) else None)

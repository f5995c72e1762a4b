"""A message as the bytes that travel: codes at their width, scales as float32, places as numbers or as a map.

Of the last leg's message, in the order of its tensors: first what `cost` counts (side information, stage by stage), then
the codes of all tensors as one stream, least significant bit first. Every field is filled up to whole bytes, so a
payload has ⌈bits/8⌉ bytes and at most one more a field. A receiver who knows the channel and the shapes needs no header.

What both ends know is not sent: PowerSGD's Q₀ (the round before's Q) and the places of `random_k`, which follow from 32
bits. Those come from a draw of their own (`draw`): a receiver who knew the seed of *all* noise could take it away again.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Generator, Tensor

from qleak import tree
from qleak.adapters import places
from qleak.adapters.bitstream import from_bytes, stream, to_bytes, unstream
from qleak.catalog import build
from qleak.channels import Channel, legs
from qleak.channels.channel import Noise
from qleak.channels.repeat import Rounds
from qleak.check import Expected, Failed
from qleak.types import Message, Stage, Tree

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LOWEST = -100
"""The exponent of an empty tensor in `logarithmic`, which travels as 0; 155 is the largest of eight bits."""


def draw(channel: Channel, gen: Generator, like: Tree, seed: int = 0) -> Noise:
    """`channel.draw(gen, like)`, with the places of `random_k` from `seed` (32 bits), which both ends may know.

    Raises:
        Expected: a seed outside [0, 2³²).
    """
    _seeded(seed)
    noise, leg = channel.draw(gen, like), _Leg(channel, like)
    shared = [j for j, s in enumerate(leg.stages) if s.name == "random_k"]
    if not shared:
        return noise
    last = list(noise[-1])
    for j in shared:
        if isinstance(channel, Rounds):
            last[j] = tree.stack([places.noise(leg.likes[j], s, j) for _, s in _each(channel, seed)])
        else:
            last[j] = places.noise(leg.likes[j], seed, j)
    return (*noise[:-1], tuple(last))


def pack(channel: Channel, message: Message, like: Tree, seed: int = 0) -> Tensor:
    """The payload, uint8 `[bytes]`, of the last leg's message.

    Args:
        channel: what made the message.
        message: without row axes.
        like: the tree of one row.
        seed: the one `draw` was given, where the channel holds `random_k`.

    Raises:
        Expected: places that are not those of `seed`.
        Failed: a code outside its alphabet.
    """
    _seeded(seed)
    if isinstance(channel, Rounds):
        parts = [
            _pack(channel, tree.nested_map(lambda t, i=i: t[i], message), like, s) for i, s in _each(channel, seed)
        ]
        return torch.cat(parts)
    return _pack(channel, message, like, seed)


def unpack(channel: Channel, payload: Tensor, like: Tree, memory: Any = None) -> Message:
    """The message whose payload this is; float32 numbers, int32 codes.

    Args:
        channel: what made the message.
        payload: uint8 `[bytes]`.
        like: the tree of one row.
        memory: the channel's state in front of the message, where both ends follow it (`powersgd`); that of the first
            round by default.

    Raises:
        Expected: a payload of another length than the channel and the shapes say.
    """
    like = {k: v.to(torch.float32) for k, v in like.items()}
    if isinstance(channel, Rounds):
        if payload.numel() % channel.times:
            raise Expected(f"Expected a payload of {channel.times} equal rounds, got {payload.numel()} bytes.")
        each = [_unpack(channel, part, like, memory) for part in payload.chunk(channel.times)]
        return tree.nested_map(lambda *t: torch.stack(t), *each)
    return _unpack(channel, payload, like, memory)


def size(channel: Channel, like: Tree) -> int:
    """Bytes of a payload: `channel.bits(message, like) / 8`, every field filled up to a byte."""
    leg = _Leg(channel, like)
    total = math.ceil(leg.count * leg.width / 8)
    for j, stage in enumerate(leg.stages):
        total += sum(_bytes(kind, t, leg.likes[j], k) for kind, k, t in leg.fields(j)) + 4 * (stage.name == "random_k")
    return total * (channel.times if isinstance(channel, Rounds) else 1)


class _Leg:
    """The last leg of a channel: its stages, the trees between them, and what its side information looks like."""

    def __init__(self, channel: Channel, like: Tree) -> None:
        self.stages = channel.legs[-1].stages
        self.at = channel.likes(like)[-2]
        self.likes = legs.likes_of(self.stages, self.at)
        self.code = self.stages[-1] if self.stages and self.stages[-1].kind == "code" else None
        self.width = math.ceil(channel.facts(like).width) if self.code else 32
        self.count = tree.count(self.likes[-1])
        self.knobs = channel.upto(-1).knobs()[-1]

    def fields(self, j: int) -> list[tuple[str, str, Tensor]]:
        """(kind, tensor's name, what it looks like) of what stage j sends beside the code."""
        stage, at = self.stages[j], self.likes[j]
        if stage.kind == "value" or stage.name in ("random_k", "powersgd"):
            return []
        sides = _side(stage.spec, tuple((k, v.shape) for k, v in at.items()))
        return [(kind, k, t) for kind, each in sides.items() for k, t in each.items()]


@functools.lru_cache(maxsize=256)
def _side(spec: str, shapes: tuple[tuple[str, torch.Size], ...]) -> dict[str, Tree]:
    """The shapes of a stage's side information, from sending nothing: on the meta device, where no number is moved."""
    stage: Stage = build("channels", spec)
    blank = {k: torch.empty(shape, device="meta") for k, shape in shapes}
    noise = {k: torch.empty(v.shape, device="meta") for k, v in stage.draws(blank).items()} if stage.noise else {}
    knobs = {k: torch.tensor(v, device="meta") for k, v in stage.knobs.items()}
    return stage.send(knobs, blank, noise, ())[1]


def _bytes(kind: str, shape: Tensor, before: Tree, name: str) -> int:
    if kind == "index":
        n, width, mapped = _place_bits(shape, before, name)
        return math.ceil((n if mapped else shape.numel() * width) / 8)
    return shape.numel() * (1 if kind == "top" else 4)


def _place_bits(index: Tensor, before: Tree, name: str) -> tuple[int, int, bool]:
    """(coordinates, bits of one place, whether a map of all coordinates is shorter)."""
    n = before[name].numel() if name in before else tree.count(before)
    width = math.ceil(math.log2(max(n, 2)))
    return n, width, n < index.numel() * width


def _pack(channel: Channel, message: Message, like: Tree, seed: int) -> Tensor:
    leg, parts = _Leg(channel, like), []
    for j, stage in enumerate(leg.stages):
        side = message.side[j]
        if stage.name == "random_k":
            known = places.index(stage, leg.likes[j], leg.likes[j + 1], seed, j)
            if any(not torch.equal(known[k], v.cpu()) for k, v in side["index"].items()):
                raise Expected(f"Expected the places that payload.draw(…, seed={seed}) gives, got others.")
            some = next(iter(message.code.values()))
            parts.append(to_bytes(torch.tensor([seed], dtype=torch.int64, device=some.device).to(torch.uint32)))
        for kind, k, shape in leg.fields(j):
            parts.append(_packed(kind, side[kind][k], leg.likes[j], k, shape))
    codes = [_symbols(leg, k, v) for k, v in message.code.items()]
    flat = torch.cat(codes) if codes else torch.zeros(0, dtype=torch.int32)
    return torch.cat([*parts, to_bytes(flat) if flat.is_floating_point() else stream(flat, leg.width)])


def _packed(kind: str, v: Tensor, before: Tree, name: str, shape: Tensor) -> Tensor:
    if kind == "index":
        n, width, mapped = _place_bits(v, before, name)
        if mapped:
            return stream(torch.zeros(n, dtype=torch.int32, device=v.device).scatter(0, v, 1), 1)
        return stream(v, width)
    if kind == "top":
        if v.numel() and not -1 < float(v) - LOWEST < 256:
            raise Failed(f"Expected an exponent of eight bits in logarithmic, got {float(v):g}.")
        return (v.reshape(-1) - LOWEST).to(torch.uint8)
    return to_bytes(v.reshape(-1).to(torch.float32))


def _unpack(channel: Channel, payload: Tensor, like: Tree, memory: Any) -> Message:
    leg, at, sides = _Leg(channel, like), 0, []
    expected = size(channel, like) // (channel.times if isinstance(channel, Rounds) else 1)
    if payload.dtype != torch.uint8 or payload.shape != (expected,):
        got = f"{payload.dtype} {tuple(payload.shape)}"
        raise Expected(f"Expected a payload of {expected} bytes from {channel.spec}, got {got}.")
    for j, stage in enumerate(leg.stages):
        side: dict[str, Tree] = {}
        if stage.name == "random_k":
            seed = int(from_bytes(payload[at : at + 4], torch.int32)[0]) % 2**32
            known = places.index(stage, leg.likes[j], leg.likes[j + 1], seed, j)
            side["index"] = {k: v.to(payload.device) for k, v in known.items()}
            at += 4
        elif stage.name == "powersgd":
            start = stage.init(leg.likes[j], None) if memory is None else memory[-1][j]
            side["start"] = {k: v.to(payload.device) for k, v in start.items()}
        for kind, k, shape in leg.fields(j):
            length = _bytes(kind, shape, leg.likes[j], k)
            side.setdefault(kind, {})[k] = _unpacked(kind, payload[at : at + length], leg.likes[j], k, shape)
            at += length
        sides.append(side)
    return Message(_codes(leg, payload[at:]), tuple(sides))


def _unpacked(kind: str, data: Tensor, before: Tree, name: str, shape: Tensor) -> Tensor:
    if kind == "index":
        n, width, mapped = _place_bits(shape, before, name)
        return unstream(data, 1, n).nonzero()[:, 0] if mapped else unstream(data, width, shape.numel()).to(torch.int64)
    if kind == "top":
        return (data.to(torch.float32) + LOWEST).reshape(shape.shape)
    return from_bytes(data, torch.float32).reshape(shape.shape)


# --- codes ---


def _alphabet(leg: _Leg) -> tuple[int, int]:
    """(least, largest) code of the leg's code stage."""
    assert leg.code is not None
    knobs, name = leg.knobs[-1], leg.code.name
    if name in ("qsgd", "terngrad", "logarithmic"):
        most = round(float(knobs["magnitudes" if name == "logarithmic" else "levels"]))
        return -most, most
    if name == "threshold":
        return -1, 1
    if name == "fixed_point":
        half = round(float(knobs["half"]))
        return -half, half - 1
    return 0, 2**leg.width - 1


def _floats(leg: _Leg) -> torch.dtype | None:
    """The format of codes that are numbers."""
    if leg.code is None or leg.code.name == "powersgd":
        return torch.float32
    if leg.code.name == "float8":
        return torch.float8_e5m2 if "e5m2" in leg.code.spec else torch.float8_e4m3fn
    return FLOATS.get(leg.code.name)


def _symbols(leg: _Leg, name: str, code: Tensor) -> Tensor:
    """A tensor's codes, flat, as they are streamed: numbers in their format, integers from 0."""
    flat, dtype = code.reshape(-1), _floats(leg)
    if dtype is not None:
        return flat.to(dtype)
    least, most = _alphabet(leg)
    if flat.numel() and (int(flat.min()) < least or int(flat.max()) > most):
        raise Failed(f"Expected codes in [{least}, {most}] of {name}, got {int(flat.min())} … {int(flat.max())}.")
    return flat.to(torch.int32) - least


def _codes(leg: _Leg, data: Tensor) -> Tree:
    dtype, shapes = _floats(leg), leg.likes[-1]
    if dtype is None:
        flat = unstream(data, leg.width, leg.count).to(torch.int32) + _alphabet(leg)[0]
    else:
        flat = from_bytes(data, dtype).to(torch.float32)
    parts = flat.split([v.numel() for v in shapes.values()])
    return {k: part.reshape(v.shape) for (k, v), part in zip(shapes.items(), parts, strict=True)}


def _each(channel: Rounds, seed: int) -> list[tuple[int, int]]:
    """(round, its seed)."""
    return [(i, (seed + i) % 2**32) for i in range(channel.times)]


def _seeded(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise Expected(f"Expected seed={seed!r} to be a whole number of 32 bits.")

"""Decoded numbers back to the message that gives them, so that an attack can read codes where only numbers were captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qleak.adapters.grids import unit_of
from qleak.channels import Channel
from qleak.channels.grid import Groups
from qleak.check import Expected
from qleak.types import Message, Side, Stage, Tree

CLOSE = 1e-5  # of a tensor's largest magnitude: how far the decoded message may be from the numbers


def encode(channel: Channel, update: dict[str, Tensor]) -> Message:
    """The message of `channel` whose decoded numbers are `update`.

    Grids, floats, fixed point, exponents and largest coordinates are sent again, which changes nothing (coins are put
    halfway, so that they round to nearest); scales and codebooks that a second sending would not find again are taken
    from the numbers themselves. Value stages in front (noise, clipping) have happened and are left out.

    Raises:
        Expected: more than one leg, a stage whose codes cannot be rebuilt, or numbers that are not this channel's
            (the message is decoded and compared).
    """
    if len(channel.legs) != 1 or channel.legs[0].join:
        raise Expected(f"Expected a channel of one leg to rebuild its codes, got {channel.spec}.")
    stages = channel.legs[0].stages
    update = {k: v.detach().float() for k, v in update.items()}
    knobs, state = channel.knobs(), channel.init(update)
    x, sides = update, []
    for stage, knob, memory in zip(stages, knobs[0], state[0], strict=True):
        if stage.kind == "value" and stage.name != "powersgd":
            if {k: v.shape for k, v in stage.shape(update).items()} != {k: v.shape for k, v in update.items()}:
                raise Expected(
                    f"Expected stages that keep the shape, got {stage.name}: its numbers are lifted already."
                )
            sides.append({})
            continue
        make = MAKE.get(stage.name, _again)
        x, side = make(stage, knob, x, memory)
        sides.append(side)
    message = Message(x, tuple(sides))
    back = channel.receive(knobs, message, update)
    for k, v in update.items():
        top = float(v.abs().amax()) if v.numel() else 0.0
        gap = float((back[k] - v).abs().amax()) if v.numel() else 0.0
        if gap > CLOSE * top:
            raise Expected(
                f"Expected numbers that {channel.spec} can decode to, got {k!r} {gap / max(top, 1e-30):.1e} of its largest "
                "magnitude away: name another channel, or chain()."
            )
    return message


def _again(stage: Stage, knob: Any, x: Tree, memory: Any) -> tuple[Tree, Side]:
    """Sent once more: idempotent codes. Coins at ½ round to nearest."""
    noise = {k: torch.full(v.shape, 0.5) for k, v in x.items()} if stage.noise else {}
    code, side, _ = stage.send(knob, x, noise, memory)
    return code, side


def _random_k(stage: Stage, knob: Any, x: Tree, memory: Any) -> tuple[Tree, Side]:
    """Those that are not zero (and as many zeros as are missing), at the scale they came in."""
    noise = {k: (v == 0).float() for k, v in x.items()}
    side = stage.send(knob, x, noise, memory)[1]
    return {k: x[k].reshape(-1).gather(0, i) for k, i in side["index"].items()}, side


def _sign(stage: Stage, knob: Any, x: Tree, memory: Any) -> tuple[Tree, Side]:
    """The magnitude is that of the numbers; whether it is sent is the stage's own matter."""
    code, side, _ = stage.send(knob, x, {}, memory)
    return code, {"scale": {k: v.abs().amax() if v.numel() else v.new_zeros(()) for k, v in x.items()}} if side else {}


def _coin_sign(stage: Stage, knob: Any, x: Tree, memory: Any) -> tuple[Tree, Side]:
    return {k: (v > 0).to(torch.int32) for k, v in x.items()}, {}


def _magnitudes(stage: Stage, knob: Any, x: Tree, memory: Any) -> tuple[Tree, Side]:
    """QSGD and TernGrad: norm = unit · levels, the unit being each group's common step."""
    levels = float(knob["levels"])
    cut = _groups(stage)
    code, norms = {}, {}
    for k, v in x.items():
        rows = cut.zero_rows(v)
        units = [float(r.abs().amax()) if levels == 1 else unit_of(r) for r in rows]
        if any(u == 0 and bool(r.any()) for u, r in zip(units, rows, strict=True)):
            raise Expected(
                f"Expected a common step in every group of {k!r}, found none: name another channel, or chain()."
            )
        norms[k] = torch.tensor(units, dtype=torch.float64).mul(levels).float()
        unit = cut.spread(norms[k] / levels, v)
        code[k] = (v / torch.where(unit > 0, unit, 1)).round().to(torch.int32)
    return code, {"norm": norms}


def _groups(stage: Stage) -> Groups:
    """Whole tensors, or the buckets of the stage, read off its text."""
    if stage.name == "terngrad":
        return Groups("tensor", 1)
    return Groups("bucket", int(stage.spec.rpartition("bucket=")[2].rstrip(")") or 512))


def _codebook(stage: Stage, knob: Any, x: Tree, memory: Any) -> tuple[Tree, Side]:
    """The distinct numbers of a tensor are its centroids; the last one fills up what is not used."""
    _, side, _ = stage.send(knob, x, {}, memory)
    code, books = {}, {}
    for k, v in x.items():
        book, places = v.unique(return_inverse=True)
        size = side["centroids"][k].numel()
        if book.numel() > size:
            raise Expected(
                f"Expected at most {size} distinct numbers in {k!r}, got {book.numel()}: name another channel."
            )
        books[k] = torch.cat([book, book[-1:].expand(size - book.numel())]) if book.numel() else v.new_zeros(size)
        code[k] = places.to(torch.int32)
    return code, {"centroids": books}


def _powersgd(stage: Stage, knob: Any, x: Tree, memory: Any) -> tuple[Tree, Side]:
    """P spans the columns, which is all that the equations ask of it; Q = MᵀP. Q₀ is the public start."""
    code = {}
    for k, v in x.items():
        if k not in memory:
            code[k] = v
            continue
        m = v.reshape(v.shape[0], -1)
        p = torch.linalg.svd(m.double(), full_matrices=False)[0][:, : memory[k].shape[1]].float()
        code[f"{k}.p"], code[f"{k}.q"] = p, m.mT @ p
    return code, {"start": dict(memory)}


MAKE: dict[str, Callable[[Stage, Any, Tree, Any], tuple[Tree, Side]]] = {
    "random_k": _random_k,
    "sign": _sign,
    "stochastic_sign": _coin_sign,
    "qsgd": _magnitudes,
    "terngrad": _magnitudes,
    "kmeans": _codebook,
    "powersgd": _powersgd,
}

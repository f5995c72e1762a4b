"""What teachers send becomes what is released: rows through a channel, chunk by chunk, each image by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from qleak.catalog import catalog
from qleak.channels import Channel, chain, streamed
from qleak.check import Expected
from qleak.types import Stage, Tree

NOISY = {"gaussian": "size", "gnmax": "sigma"}  # stages that earn a guarantee, and the knob that is their σ


class Votes(NamedTuple):
    """What became of one vote.

    Attributes:
        released: `[b d]`, what the server decodes.
        noised: `[b m]`, the noisy sums in front of what is post-processing (a threshold, an arg max).
        sums: `[b …]`, the sums without noise: never leaves the house.
    """

    released: Tensor
    noised: Tensor
    sums: Tensor


def aggregate(channel: Channel, chunks: Iterable[Tensor], gen: Generator) -> Votes:
    """Every teacher's row for every image through `channel`, which releases image by image.

    Args:
        channel: a channel with one join over teachers; its stages see one image, `{"x": [d]}`.
        chunks: the teachers' rows `[teacher b d]`, in order.
        gen: of all draws; how rows are cut into chunks changes none of them.
    """
    summed, like, images, device, knobs = {}, {}, 0, torch.device("cpu"), channel.knobs()
    for rows in chunks:
        (teachers, images, d), device = rows.shape, rows.device
        like, knobs = {"x": torch.zeros(d, device=device)}, channel.knobs(device=device)
        noise = _to(streamed.draws(channel, gen, like, (teachers, images), "rows"), device)
        part = streamed.gather(channel, knobs, {"x": rows}, noise, like)
        part = {k: v.double() for k, v in part.items()}  # so that sums of real numbers hardly depend on the chunks
        summed = {k: v + summed[k] for k, v in part.items()} if summed else part
    if not summed:
        raise Expected("Expected at least one chunk of teachers.")
    sums: Tree = {k: v.float() for k, v in summed.items()}
    noise = _to(streamed.draws(channel, gen, like, (1, images), "release"), device)
    released = streamed.release(channel, knobs, sums, noise, like)["x"]
    return Votes(released, _noised(channel, knobs, sums, noise), sums["x"])


def _noised(channel: Channel, knobs: Any, sums: Tree, noise: Any) -> Tensor:
    """The sums with the noise of the first `gaussian` behind the join, or as they are without one."""
    for leg, numbers, drawn in zip(channel.legs, knobs, noise, strict=True):
        for stage, knob, eps in zip(leg.stages, numbers, drawn, strict=True):
            if stage.name == "gaussian" and eps and eps["x"].shape == sums["x"].shape:
                return sums["x"] + knob["size"] * eps["x"]
    return sums["x"]


def sigma(channel: Channel) -> float:
    """σ of the channel's Gaussian noise, 0 without any."""
    return next((s.knobs[NOISY[s.name]] for s in channel.stages if s.name in NOISY), 0.0)


def louder(channel: Channel, factor: float) -> Channel:
    """The same channel with `factor` times its Gaussian noise: its event's multiplier grows as much.

    Raises:
        Expected: it has no noise, or in several stages.
    """
    if sum(s.name in NOISY for s in channel.stages) != 1:
        raise Expected(f"Expected one noisy stage in {channel.spec}, so that its noise can follow from a budget.")
    return chain(*(_scaled(s, factor) if s.name in NOISY else s for s in channel.stages))


def _scaled(stage: Stage, factor: float) -> Stage:
    """The stage made again with every σ in its spec times `factor`."""
    call = ast.parse(stage.spec, mode="eval").body
    assert isinstance(call, ast.Call)
    values = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    louder = {k: v * factor if k.startswith("sigma") and v is not None else v for k, v in values.items()}
    return catalog("channels")[stage.name](**louder)


def _to(noise: Any, device: torch.device) -> Any:
    return tuple(tuple({k: v.to(device) for k, v in stage.items()} for stage in leg) for leg in noise)

"""A join too large to stack: its rows come in chunks, only their sums are kept.

`gather` over all chunks, then `release`, is `Channel.send` and `Channel.receive` of all rows at once.
Codes that are small whole or half numbers (votes) add up exactly in float32 up to 2²⁴, in whatever
order: any cut into chunks and any permutation of rows and draws gives the same bits. Real numbers
agree to rounding, and so do votes on products with a matrix: a number within rounding of a bin's edge
may fall to either side.

Rows are `[n *lead *shape]`: n rows, for each of `lead` (the images that teachers judge, say) one tree of
`like`'s shapes. `lead` may be empty. Every place of `lead` is a release of its own, which composes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import vmap

from qleak import random, tree
from qleak.channels import legs
from qleak.channels.channel import Channel, Knobs, Leg, Noise
from qleak.check import Expected, one_of
from qleak.types import Tree

PARTS = ("all", "rows", "release")


def draws(channel: Channel, generator: Generator, like: Tree, lead: Sequence[int], part: str = "all") -> Noise:
    """The noise of a whole block of rows: one call a stage and tensor.

    Other numbers than `Channel.draw`, which makes a call a row, but the same law. Uniform draws of successive
    chunks from one generator are those of one block (PyTorch's uniform stream does not depend on how it is cut).

    Args:
        channel: a channel with one join.
        generator: where the numbers come from.
        like: the tree of one row.
        lead: `(n, *lead)`: number of rows, and the axes behind it.
        part: "rows" draws for the stages in front of the join alone (what `gather` needs), "release" for those
            behind it (what `release` needs, at `lead[1:]`), "all" for both; what is left out is {}.

    Returns:
        Noise in the layout of `Channel.draw`: `[n *lead *shape]` in front of the join, `[*lead *shape]` behind it.

    Raises:
        Expected: the channel has no join or several, or an unknown part.
    """
    one_of(PARTS, part=part)
    first, noise = _join(channel), []
    for i, (leg, shapes) in enumerate(zip(channel.legs, channel.draws(like), strict=True)):
        before = i < first
        axes = tuple(lead) if before else tuple(lead[1:])
        wanted = part in ("all", "rows" if before else "release")
        noise.append(
            tuple(
                {k: random.DRAWS[s.noise](generator, (*axes, *v.shape)) for k, v in shape.items()}
                if s.noise and wanted
                else {}
                for s, shape in zip(leg.stages, shapes, strict=True)
            )
        )
    return tuple(noise)


def gather(channel: Channel, knobs: Knobs, rows: Tree, noise: Noise, like: Tree, weights: Tensor | None = None) -> Tree:
    """The sum over a chunk of rows as they reach the join.

    Args:
        channel: a channel with one join.
        knobs: `channel.knobs()`.
        rows: `[n *lead *shape]`.
        noise: what the stages in front of the join draw, `[n *lead *shape]`: `draws(…, part="rows")`.
        like: the tree of one row.
        weights: `[n]`, what a row counts: 0 leaves it out. The channel's sensitivity holds for weights in [0, 1].

    Returns:
        `[*lead *shape]` in the space in front of the join (a sketch's, if the rows are sketched).

    Raises:
        Expected: the channel has no join or several, or rows of other shapes than `like`'s.
    """
    first, likes = _join(channel), channel.likes(like)
    axes = _axes(rows, like)
    if not axes:
        raise Expected("Expected rows with a leading axis in front of the shapes of like.")
    front, state = channel.legs[:first], channel.init(like)

    def one(x: Tree, eps: Noise) -> Tree:
        for i, leg in enumerate(front):
            _, _, x = legs.send_leg(leg.stages, likes[i], knobs[i], x, eps[i], state[i])
        return x

    if 0 in axes:
        return {k: v.new_zeros(*axes[1:], *v.shape) for k, v in likes[first].items()}
    sent = _over(axes, one)(rows, noise[:first]) if any(leg.stages for leg in front) else rows
    if weights is None:
        return {k: v.sum(0) for k, v in sent.items()}
    return {k: torch.tensordot(weights.to(v.dtype), v, dims=1) for k, v in sent.items()}


def release(channel: Channel, knobs: Knobs, summed: Tree, noise: Noise, like: Tree) -> Tree:
    """What the server releases of the summed rows: the stages behind the join, decoded, in the shapes of `like`.

    Args:
        channel: a channel with one join.
        knobs: `channel.knobs()`.
        summed: `[*lead *shape]`: the sum of what `gather` gave.
        noise: what the stages behind the join draw, `[*lead *shape]`: `draws(…, part="release")`.
        like: the tree of one row.

    Raises:
        Expected: the channel has no join or several, or sums of other shapes than the rows have in front of the join.
    """
    first, likes = _join(channel), channel.likes(like)
    at = likes[first]
    rest = replace(channel, legs=(Leg(None, channel.legs[first].stages), *channel.legs[first + 1 :]))
    state = rest.init(at)

    def one(x: Tree, eps: Noise) -> Tree:
        message = rest.send(knobs[first:], x, eps, state, at)[0][-1]
        got = rest.receive(knobs[first:], message, at)
        for i in reversed(range(first)):
            got = legs.lift_leg(channel.legs[i].stages, likes[i], knobs[i], got)
        return got

    axes = _axes(summed, at)
    if 0 in axes:
        return {k: v.new_zeros(*axes, *v.shape) for k, v in like.items()}
    return _over(axes, one)(summed, noise[first:])


def _join(channel: Channel) -> int:
    """The leg that begins with the join."""
    found = [i for i, leg in enumerate(channel.legs) if leg.join]
    if len(found) != 1 or found[0] == 0:
        raise Expected(f"Expected a channel with one join, such as chain(…, total(), …), got {channel.spec}.")
    return found[0]


def _axes(x: Tree, like: Tree) -> tuple[int, ...]:
    """The axes that all tensors of `x` carry in front of the shapes of `like`."""
    lead = {tuple(v.shape[: v.ndim - like[k].ndim]) for k, v in x.items()}
    fits = all(v.shape[v.ndim - like[k].ndim :] == like[k].shape for k, v in x.items())
    if len(lead) != 1 or not fits:
        got = {k: tuple(v.shape) for k, v in x.items()}
        raise Expected(
            f"Expected the shapes { ({k: tuple(v.shape) for k, v in like.items()}) } behind leading axes, got {got}."
        )
    return lead.pop()


def _over(axes: tuple[int, ...], one: Callable[..., Any]) -> Callable[..., Any]:
    """`one` mapped over the leading `axes` of everything, as a single axis: one vmap costs less than two."""
    if not axes:
        return one

    def mapped(*given: Any) -> Any:
        flat = tree.nested_map(lambda v: v.reshape(math.prod(axes), *v.shape[len(axes) :]), given)
        return tree.nested_map(lambda v: v.reshape(*axes, *v.shape[1:]), vmap(one)(*flat))

    return mapped

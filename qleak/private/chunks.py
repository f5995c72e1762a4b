"""Clipped sums by per-example gradients, a few examples at a time: for any model and any norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vmap

from qleak import tree
from qleak.client import slope
from qleak.client.losses import MASK
from qleak.types import Buffers, Model, Params, Shrink, Tree

ROOM = 1 << 22  # numbers of per-example gradients at a time
MOST = 64  # examples: more at a time is slower on a CPU


def size(params: Params) -> int:
    """Examples at a time: 64 of a small net, one of a net of millions of parameters."""
    return max(1, min(MOST, ROOM // max(1, tree.count(params))))


def clipped_sum(
    model: Model,
    params: Params,
    buffers: Buffers,
    x: Tensor,
    target: Tensor,
    shrink: Shrink,
    knobs: Mapping[str, Tensor],
    chunk: int | None = None,
) -> tuple[Tree, Tensor]:
    """(Σ_b f(‖g_b‖)·g_b, norms `[b]`, or `[b tensor]` of scope "tensor"), g_b the gradient of example b alone.

    No more than `chunk` gradients exist at a time (`size(params)` by default). Buffers below `mask/` have one entry an
    example.
    """
    shared = {k: v for k, v in buffers.items() if not k.startswith(MASK)}
    masks = {k: v for k, v in buffers.items() if k.startswith(MASK)}
    at = slope(model, shared)

    def one(x: Tensor, target: Tensor, masks: Tree) -> Tree:
        return at(params, x[None], target[None], {k: v[None] for k, v in masks.items()})

    step = chunk or size(params)
    sums = {k: torch.zeros_like(v) for k, v in params.items()}
    norms = []
    for i in range(0, len(x), step):
        cut = slice(i, i + step)
        mine = tree.at(masks, cut)
        if step == 1:  # a map over one is a detour: grouped convolutions of one group
            g = {k: v[None] for k, v in at(params, x[cut], target[cut], mine).items()}
        else:
            g = vmap(one, randomness="error")(x[cut], target[cut], mine)
        some, norm = shrunk_sum(g, shrink, knobs)
        sums = tree.add(sums, some)
        norms.append(norm)
    return sums, torch.cat(norms)


def shrunk_sum(g: Tree, shrink: Shrink, knobs: Mapping[str, Tensor]) -> tuple[Tree, Tensor]:
    """(Σ_b f(‖g_b‖)·g_b, norms) of gradients `[b …]`."""
    flat = {k: v.flatten(1) for k, v in g.items()}
    factors, norm = weights(
        {k: (v.abs() if shrink.p == 1 else v.square()).sum(1) for k, v in flat.items()}, shrink, knobs
    )
    sums = {k: factors[k].to(v.dtype) @ v for k, v in flat.items()}
    return {k: v.view(g[k].shape[1:]) for k, v in sums.items()}, norm


def weights(powers: Tree, shrink: Shrink, knobs: Mapping[str, Tensor]) -> tuple[Tree, Tensor]:
    """(f `[b]` of every parameter, norms) from each parameter's Σ|g|ᵖ, `[b]`."""
    each = torch.stack(list(powers.values()), -1)
    sizes = each if shrink.scope == "tensor" else each.sum(-1)
    norm = sizes if shrink.p == 1 else sizes.sqrt()
    factor = shrink.factor(knobs, norm)
    rows = factor.unbind(-1) if shrink.scope == "tensor" else [factor] * len(powers)
    return dict(zip(powers, rows, strict=True)), norm

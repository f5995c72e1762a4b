"""A vote of few levels: every coordinate rounded by a coin to one of K numbers that are the same for all rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.reading import read_coin
from qleak.check import between, positive, whole
from qleak.types import Belief, Bound, Facts, Side, Stage, Tree


@factory
def klevel(levels: int = 4, cap: float | None = 1e-3) -> Stage:
    """[−b, b] with b = min(max|x|, cap) per tensor, cut into K − 1 intervals; up or down by a fair coin.

    Code i in {0 … K−1} is decoded as (2i − (K−1))/2: whole numbers for odd K, halves for even K, symmetric, so that
    the mean vote is x (K−1)/2b, unbiased up to the cap. (Codes −K/2 … K/2−1 instead would shift each vote by −½, N/2
    over N rows.) The votes are sent, not b. Every coordinate is at most (K−1)/2, so a row of d is no longer than
    √d (K−1)/2. With K = 2 these are half the votes of `stochastic_sign`.

    The k-level quantization of Wang, Jia, Song, "D2P-Fed" (2020), without its random rotation, as the baseline of
    Wang et al., "DataLens" (CCS 2021).

    Args:
        levels: K.
        cap: largest b; None for max|x| alone.

    Raises:
        Expected: levels outside [2, 65536], or a cap that is not positive.
    """
    whole(levels=levels)
    between(2, 65536, levels=levels)
    if cap is not None:
        positive(cap=cap)
    half = (levels - 1) / 2

    def size(x: Tensor) -> Tensor:
        b = x.detach().abs().amax() if x.numel() else x.new_ones(())
        return b if cap is None else b.clamp(max=cap)

    def place(x: Tensor) -> Tensor:
        """The coordinate in units of one interval, 0 in the middle: [−(K−1)/2, (K−1)/2]."""
        b = size(x)
        return (x / torch.where(b > 0, b, 1)).clamp(-1, 1) * half

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        up = {k: (place(v) + half + noise[k].to(v.dtype)).floor() for k, v in x.items()}
        return {k: v.clamp(0, levels - 1).to(torch.int32) for k, v in up.items()}, {}, state

    def receive(knobs: dict, code: Tree, side: Side, like: Tree) -> Tree:
        return {k: (c - half).to(like[k].dtype) for k, c in code.items()}

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        mean = {k: place(m) for k, m in belief.mean.items()}
        part = {k: (m + half) - (m + half).floor() for k, m in mean.items()}
        return Belief(mean, {k: f * (1 - f) for k, f in part.items()})

    def read(knobs: dict, code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        out = {}
        for k, m in belief.mean.items():
            scale = half / torch.where(size(m) > 0, size(m), 1)
            var = {n: v * scale.square() for n, v in belief.var.items()}.get(k)
            out[k] = read_coin(place(m), code[k] - half, torch.ones_like(m), var)
        return out

    def cell(knobs: dict, code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
        """Without b a vote bounds nothing."""
        open_ = {k: torch.full(c.shape, math.inf, dtype=like[k].dtype, device=c.device) for k, c in code.items()}
        return {k: -v for k, v in open_.items()}, open_

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        root = None if like is None else half * math.sqrt(sum(v.numel() for v in like.values()))
        twice = None if root is None else 2 * root
        exact = reset.exact and before.law == "none"
        out = replace(reset, unbiased=False, width=float(math.ceil(math.log2(levels))), exact=exact)
        return replace(out, bound=Bound(2, root), sensitivity=Bound(2, twice, "replace-one"))

    return Stage("klevel", "code", send, push, receive, fold, read, cell, noise="uniform")

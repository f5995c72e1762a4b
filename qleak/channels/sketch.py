"""Count sketch: many coordinates hashed to few counters by a public hash, read back by medians."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak import random
from qleak.catalog import factory
from qleak.channels.linear import stretched
from qleak.check import at_least, whole
from qleak.types import Belief, Facts, Side, Stage, Tree

LARGEST = 1500
"""Side of a Gram matrix up to which its largest eigenvalue is computed (about a second)."""


class Hash(NamedTuple):
    """Where coordinate i stands in every row of the sketch, `at [r n]`, with which `sign [r n]`; `norm` of the map."""

    at: Tensor
    sign: Tensor
    norm: float


@factory
def count_sketch(columns: int = 256, rows: int = 5, k: int | None = None, seed: int = 0) -> Stage:
    """Y[j, h_j(i)] += s_j(i) x_i for rows j: `[rows columns]` of every tensor; linear, so that sums of sketches are one.

    Lifted by the median over j of s_j(i) y[j, h_j(i)], and, with k, cut to its k largest coordinates: behind the
    noise, where choosing them is free. The h_j are random permutations modulo `columns`, which share columns evenly,
    and the s_j fair signs; both come from a public seed. Every row's reading is unbiased over seeds; the median is
    where the other readings are symmetric about the truth.

    A bound of the row is multiplied by the largest singular value of the whole map, which is no less than √rows and,
    as every row's is √⌈n/columns⌉ (all that share a column point the same way), no more than
    √(rows ⌈n/columns⌉). It is computed where n or the sketch has at most 1500 coordinates; otherwise that bound is
    taken.

    Charikar, Chen, Farach-Colton, "Finding Frequent Items in Data Streams" (2002); as compressor, Rothchild et al.,
    "FetchSGD" (ICML 2020), Algorithm 1, without its error feedback.

    Args:
        columns: counters of a row.
        rows: independent hashes.
        k: coordinates of every tensor to keep, all by default.
        seed: names the hash; it is public.

    Raises:
        Expected: columns, rows or k below 1.
    """
    whole(columns=columns, rows=rows, seed=seed, **({} if k is None else {"k": k}))
    at_least(1, columns=columns, rows=rows, **({} if k is None else {"k": k}))

    def hashed(v: Tensor) -> Hash:
        return _hash(v.numel(), columns, rows, seed)

    def sketch(v: Tensor, signed: bool = True) -> Tensor:
        at = hashed(v)
        spread = v.reshape(-1).expand(rows, v.numel())
        return v.new_zeros(rows, columns).scatter_add(1, at.at, spread * at.sign.to(v) if signed else spread)

    def shape(like: Tree) -> Tree:
        return {n: v.new_empty(rows, columns) for n, v in like.items()}

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        return {n: sketch(v) for n, v in x.items()}, {}, state

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        return Belief(
            {n: sketch(m) for n, m in belief.mean.items()}, {n: sketch(v, False) for n, v in belief.var.items()}
        )

    def lift(knobs: dict, y: Tree, like: Tree) -> Tree:
        out = {}
        for n, v in like.items():
            at = hashed(v)
            every = (y[n].gather(1, at.at) * at.sign.to(y[n])).sort(0).values
            x = (every[(rows - 1) // 2] + every[rows // 2]) / 2
            if k is not None and k < v.numel():
                best = x.abs().topk(k).indices
                x = torch.zeros_like(x).scatter(0, best, x.gather(0, best))
            out[n] = x.reshape(v.shape)
        return out

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        norm = None if like is None else max((hashed(v).norm for v in like.values()), default=1.0)
        return stretched(reset, before, norm)

    return Stage("count_sketch", "value", send, push, fold=fold, shape=shape, lift=lift)


@functools.lru_cache(maxsize=32)
def _hash(n: int, columns: int, rows: int, seed: int) -> Hash:
    """Drawn by a counter, as a stage may be mapped over rows, where a generator cannot be used."""
    key = torch.tensor([random.key("count_sketch", seed, n, columns, rows)])
    order, coin = random.counted(key, torch.zeros(1, dtype=torch.int64), 2 * rows * n).reshape(2, rows, n)
    at, sign = order.argsort(-1).argsort(-1) % columns, torch.where(coin < 0, -1.0, 1.0)
    norm = math.sqrt(rows * math.ceil(n / columns))
    if 0 < min(n, rows * columns) <= LARGEST:
        gram = _by_coordinate(at, sign) if n <= rows * columns else _by_counter(at, sign, columns)
        norm = min(norm, float(torch.linalg.eigvalsh(gram)[-1].sqrt()) * (1 + 1e-12))
    return Hash(at, sign, norm)


def _by_coordinate(at: Tensor, sign: Tensor) -> Tensor:
    """AᵀA `[n n]`: in how many rows two coordinates meet, with their signs."""
    pairs = zip(at, sign.double(), strict=True)
    return torch.stack([(h[:, None] == h) * torch.outer(s, s) for h, s in pairs]).sum(0)


def _by_counter(at: Tensor, sign: Tensor, columns: int) -> Tensor:
    """AAᵀ `[r·c r·c]`: what two counters share."""
    rows, size = at.shape[0], at.shape[0] * columns
    place = at + torch.arange(rows)[:, None] * columns
    both = (place[:, None] * size + place).flatten()
    shared = (sign[:, None] * sign).double().flatten()
    return torch.zeros(size * size, dtype=torch.float64).scatter_add(0, both, shared).reshape(size, size)

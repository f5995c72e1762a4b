"""A codebook of every tensor's own: one-dimensional k-means."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.reading import coded, read_cells, widen
from qleak.check import at_least, between, whole
from qleak.types import Belief, Facts, Side, Stage, Tree


@factory
def kmeans(clusters: int = 16, iterations: int = 25) -> Stage:
    """The nearest of `clusters` centroids, found by Lloyd's algorithm on the sorted numbers of a tensor.

    Starts at evenly spaced quantiles. Centroids travel in clear (32 bits each). The cell of a code runs
    between the midpoints to its neighbours, and is open at both ends. Lloyd (1982); as a compressor of
    networks: Han, Mao, Dally, "Deep Compression" (ICLR 2016), section 3.

    Args:
        clusters: centroids of a tensor, 2 … 256.
        iterations: of Lloyd's algorithm.
    """
    whole(clusters=clusters, iterations=iterations)
    between(2, 256, clusters=clusters)
    at_least(0, iterations=iterations)

    def centroids(v: Tensor) -> Tensor:
        """Sorted `[cluster]`; an empty cluster keeps its place."""
        if not v.numel():
            return v.new_zeros(clusters)
        ordered, n = v.detach().reshape(-1).sort().values, v.numel()
        sums = torch.cat([ordered.new_zeros(1), ordered.double().cumsum(0).to(torch.float64)])
        at = ((torch.arange(clusters, device=v.device) + 0.5) / clusters * n).long().clamp(max=n - 1)
        centre = ordered[at]
        ends = torch.zeros(1, dtype=torch.int64, device=v.device), torch.full((1,), n, device=v.device)
        for _ in range(iterations):
            cuts = (ordered[None] <= _middles(centre)[:, None]).sum(-1)
            cuts = torch.cat([ends[0], cuts, ends[1]])
            count = cuts[1:] - cuts[:-1]
            mean = (sums[cuts[1:]] - sums[cuts[:-1]]) / count.clamp(min=1)
            centre = torch.where(count > 0, mean.to(centre.dtype), centre)
        return centre.sort().values

    def send(knobs: dict[str, Tensor], x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        books = {k: centroids(v) for k, v in x.items()}
        code = {k: (v[..., None] > _middles(books[k])).sum(-1).to(torch.int32) for k, v in x.items()}
        return code, {"centroids": books}, state

    def receive(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> Tree:
        return {k: _pick(side["centroids"][k], c).to(like[k].dtype) for k, c in code.items()}

    def cell(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
        lows, highs = {}, {}
        for k, c in code.items():
            cuts = _middles(side["centroids"][k])
            infinite = cuts.new_full((1,), math.inf)
            low, high = _pick(torch.cat([-infinite, cuts]), c), _pick(torch.cat([cuts, infinite]), c)
            lows[k], highs[k] = widen(low, high) if c.numel() else (low, high)
        return lows, highs

    def read(knobs: dict[str, Tensor], code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        return read_cells(cell(knobs, code, side, belief.mean), belief)

    def push(knobs: dict[str, Tensor], belief: Belief, side: Side | None) -> Belief:
        """Straight through, with the variance that clustering the guess itself leaves."""
        var = {}
        for k, m in belief.mean.items():
            book = centroids(m)
            nearest = _pick(book, (m.detach()[..., None] > _middles(book)).sum(-1))
            var[k] = belief.var.get(k, torch.zeros_like(m)) + (m.detach() - nearest).square().sum() / max(m.numel(), 1)
        return Belief(belief.mean, var)

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        return coded(before, reset, math.ceil(math.log2(clusters)))

    def cost(knobs: dict[str, float], before: Tree, after: Tree) -> float:
        return 32.0 * clusters * len(after)

    return Stage("kmeans", "code", send, push, receive, fold, read, cell, cost=cost)


def _middles(centre: Tensor) -> Tensor:
    return (centre[1:] + centre[:-1]) / 2


def _pick(table: Tensor, code: Tensor) -> Tensor:
    return table.gather(0, code.reshape(-1).long()).reshape(code.shape)

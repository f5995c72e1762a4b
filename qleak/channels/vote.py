"""Votes on values: every coordinate names a bin, and only the bin that wins is released."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.reading import log_ndtr
from qleak.check import Expected, at_least, positive, whole
from qleak.types import Belief, Bound, Facts, Side, Stage, Tree

NODES = 24
"""Points of the Gauss–Hermite rule that reads a winner."""


@factory
def histogram(bins: int = 10, reach: float = 1e-3) -> Stage:
    """One vote a coordinate: clipped to [−reach, reach], a one in the bin it falls into, zeros elsewhere.

    Sends `[… bins]` of a tensor `[…]`; lifted to Σ centre·vote, the bin's centre for one vote. A row of m coordinates
    has length √m; two rows differ by at most √(2m), as no entry is negative; and a vote that moves changes the
    largest count of its coordinate by one at most, so that winning counts have sensitivity √m. The vote of Long et al.,
    "G-PATE" (NeurIPS 2021), on projected gradients.

    Args:
        bins: of equal width.
        reach: where the outermost bins end; what lies beyond counts there.

    Raises:
        Expected: bins below 2, or a reach that is not positive.
    """
    whole(bins=bins)
    at_least(2, bins=bins)
    positive(reach=reach)
    width = 2 * reach / bins

    def place(v: Tensor) -> Tensor:
        """In bins from the lower end: bin b reaches from b to b + 1."""
        return ((v / width) + bins / 2).clamp(0, bins)

    def number(v: Tensor) -> Tensor:
        return torch.arange(bins, dtype=v.dtype, device=v.device)

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        votes = {k: place(v).floor().clamp(max=bins - 1)[..., None] == number(v) for k, v in x.items()}
        return {k: v.to(x[k].dtype) for k, v in votes.items()}, {}, state

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        """A step has no slope: a vote between two centres is shared between their bins. Noise in front is left out."""
        near = {
            k: (1 - (place(m).clamp(0.5, bins - 0.5)[..., None] - 0.5 - number(m)).abs()).clamp(min=0)
            for k, m in belief.mean.items()
        }
        return Belief(near, {})

    def lift(knobs: dict, y: Tree, like: Tree) -> Tree:
        return {k: v @ ((number(v) + 0.5) * width - reach) for k, v in y.items()}

    def shape(like: Tree) -> Tree:
        return {k: v.new_empty(*v.shape, bins) for k, v in like.items()}

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        root = None if like is None else math.sqrt(sum(v.numel() for v in like.values()))
        apart = None if root is None else math.sqrt(2) * root
        out = replace(reset, bound=Bound(2, root), sensitivity=Bound(2, apart, "replace-one"), peak=root)
        return replace(out, unbiased=False, exact=False, law="none" if before.law == "none" else "mixed")

    return Stage("histogram", "value", send, push, fold=fold, shape=shape, lift=lift)


@factory
def gnmax(sigma: float = 40.0, sigma_test: float | None = None, at: float | None = None) -> Stage:
    """The bin of the largest count behind N(0, σ²), for every coordinate of `[… bins]`; decoded as a one in that bin.

    With `sigma_test` and `at`, a coordinate is answered only if its largest count plus N(0, sigma_test²) reaches
    `at`; otherwise it is decoded as zeros, and lifted to 0. Both draws are charged whether or not there is an answer,
    without looking at the counts: Gaussian releases of σ/Δ for the counts, and sigma_test/Δ′ for the tests, where Δ is the
    sensitivity in front of it and Δ′ that of the largest counts (√m behind `histogram` of m coordinates; Δ unless
    known to be less). The data-dependent ε of the paper can be smaller, and is itself not private.

    Papernot et al., "Scalable Private Learning with PATE" (ICLR 2018), Algorithm 1 (Confident-GNMax).

    Args:
        sigma: σ, in votes.
        sigma_test: noise of the test, in votes.
        at: what the largest count must reach, in votes: the paper's T.

    Raises:
        Expected: a σ that is not positive, one of `sigma_test` and `at` without the other, or, in a chain, counts
            without a sensitivity.
    """
    positive(sigma=sigma)
    if (sigma_test is None) != (at is None):
        raise Expected(f"Expected both of sigma_test={sigma_test} and at={at}, or neither.")
    tested = sigma_test is not None
    if tested:
        positive(sigma_test=sigma_test, at=at)

    def bins(v: Tensor) -> Tensor:
        """A number alone is a vote of one bin."""
        return v if v.ndim else v[None]

    def draws(like: Tree) -> Tree:
        """One a bin, and behind them the test's."""
        rows = {k: bins(v) for k, v in like.items()}
        return {k: v.new_empty(*v.shape[:-1], v.shape[-1] + 1) for k, v in rows.items()} if tested else rows

    def shape(like: Tree) -> Tree:
        return {k: v.new_empty(v.shape[:-1]) for k, v in like.items()}

    def send(knobs: dict[str, Tensor], x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        code = {}
        for k, v in x.items():
            counts, eps = bins(v), noise[k].to(v.dtype)
            n = counts.shape[-1]
            if not n:
                code[k] = torch.zeros(counts.shape[:-1], dtype=torch.int32, device=v.device)
                continue
            code[k] = 1 + (counts + knobs["sigma"].to(v.dtype) * eps[..., :n]).argmax(-1).to(torch.int32)
            if tested:
                passed = counts.amax(-1) + knobs["sigma_test"].to(v.dtype) * eps[..., n] >= knobs["at"].to(v.dtype)
                code[k] = torch.where(passed, code[k], 0)
        return code, {}, state

    def receive(knobs: dict, code: Tree, side: Side, like: Tree) -> Tree:
        out = {}
        for k, v in like.items():
            number = torch.arange(1, bins(v).shape[-1] + 1, device=v.device)
            out[k] = (code[k][..., None] == number).to(v.dtype).reshape(v.shape)
        return out

    def answered(knobs: dict[str, Tensor], counts: Tensor) -> Tensor:
        """In standard deviations of the test, by how much the largest count passes it."""
        return (counts.amax(-1) - knobs["at"]) / knobs["sigma_test"]

    def push(knobs: dict[str, Tensor], belief: Belief, side: Side | None) -> Belief:
        """Winning probabilities by a logistic of the noise's width."""
        mean = {}
        for k, m in belief.mean.items():
            counts = bins(m)
            p = torch.softmax(1.6 / math.sqrt(2) * counts / knobs["sigma"], -1)
            if tested and counts.shape[-1]:
                p = p * (torch.erfc(-answered(knobs, counts) / math.sqrt(2)) / 2)[..., None]
            mean[k] = p.reshape(m.shape)
        return Belief(mean, {k: m * (1 - m) for k, m in mean.items()})

    def read(knobs: dict[str, Tensor], code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        out = {}
        for k, m in belief.mean.items():
            counts = bins(m)
            if not counts.shape[-1]:
                out[k] = m.sum(-1)
                continue
            v = belief.var.get(k)
            scale = (knobs["sigma"].square() + (torch.zeros_like(counts) if v is None else bins(v))).sqrt()
            won = _won(counts, scale, (code[k] - 1).clamp(min=0).to(torch.int64))
            if tested:
                t = answered(knobs, counts)
                won = torch.where(code[k] == 0, -log_ndtr(-t), won - log_ndtr(t))
            out[k] = won
        return out

    def cell(knobs: dict, code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
        """Behind noise any count may win."""
        return {k: torch.full_like(v, -math.inf) for k, v in like.items()}, {
            k: torch.full_like(v, math.inf) for k, v in like.items()
        }

    knobs = {"sigma": sigma} | ({"sigma_test": sigma_test, "at": at} if sigma_test and at else {})
    fold = _fold(sigma, sigma_test)
    return Stage(
        "gnmax", "code", send, push, receive, fold, read, cell, shape=shape, knobs=knobs, noise="normal", draws=draws
    )  # fmt: skip


def _fold(sigma: float, sigma_test: float | None) -> Callable[[Facts, Facts, Tree | None], Facts]:
    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        most = 2 if like is None else 1 + max((v.shape[-1] if v.ndim else 1 for v in like.values()), default=1)
        out = replace(reset, unbiased=False, exact=False, width=float(math.ceil(math.log2(most))))
        given = before.sensitivity
        if given is None:
            raise Expected(
                f"Expected counts of bounded sensitivity before gnmax(sigma={sigma:g}): "
                "put histogram(...) and total(...) in front."
            )
        if before.event is not None or given.value is None:  # what is private stays so
            return out
        from dp_accounting import dp_event  # imports scipy: only where a guarantee is asked for

        counts = dp_event.GaussianDpEvent(sigma / given.value)
        if sigma_test is None:
            return replace(out, event=counts)
        peak = given.value if before.peak is None else min(before.peak, given.value)
        return replace(out, event=dp_event.ComposedDpEvent([dp_event.GaussianDpEvent(sigma_test / peak), counts]))

    return fold


def _won(m: Tensor, s: Tensor, winner: Tensor) -> Tensor:
    """−ln P(bin `winner [...]` is the largest of N(m, s²) `[... bins]`) = −ln ∫ φ(z) Π Φ((m_w + s_w z − m_b)/s_b) dz."""
    z, log_weight = (torch.tensor(t, dtype=m.dtype, device=m.device) for t in _hermite())
    first, width = (t.gather(-1, winner[..., None]) for t in (m, s))
    gap = (first + width * z)[..., None] - m[..., None, :]
    below = log_ndtr((gap / s[..., None, :]).clamp(-1e4, 1e4))
    other = torch.arange(m.shape[-1], device=m.device) != winner[..., None]
    return -torch.logsumexp(log_weight + (below * other[..., None, :]).sum(-1), -1)


@functools.cache
def _hermite() -> tuple[list[float], list[float]]:
    z, weight = np.polynomial.hermite_e.hermegauss(NODES)
    return z.tolist(), (np.log(weight) - math.log(math.sqrt(2 * math.pi))).tolist()

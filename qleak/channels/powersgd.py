"""Low rank: every matrix as the product of two thin ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from qleak import random
from qleak.catalog import factory
from qleak.check import at_least, whole
from qleak.types import Belief, Facts, Side, Stage, Tree


@factory
def powersgd(rank: int = 2) -> Stage:
    """One power iteration: P = orthonormal(M Q₀), Q = Mᵀ P, decoded as P Qᵀ; Q₀ is the round before's Q.

    A tensor of two axes or more is the matrix M `[first axis, rest]`; others are sent as they are. P and Q
    travel at 32 bits a number. They are no box around M but equations, Mᵀ P = Q and (1 − P Pᵀ) M Q₀ = 0,
    which the attacker reads (Q₀ is known to everybody: drawn from a shared seed, then the last message).
    Vogels, Karimireddy, Jaggi, "PowerSGD" (NeurIPS 2019), Algorithm 1, for one client: with several, the paper
    averages P and Q separately, which is not the mean of these messages.

    Args:
        rank: columns of P and Q.
    """
    whole(rank=rank)
    at_least(1, rank=rank)

    def width(v: Tensor) -> int:
        return min(rank, *matrix(v).shape)

    def shape(like: Tree) -> Tree:
        out = {}
        for k, v in like.items():
            if thin(v):
                n, m = matrix(v).shape
                out[f"{k}.p"], out[f"{k}.q"] = v.new_empty(n, width(v)), v.new_empty(m, width(v))
            else:
                out[k] = v
        return out

    def init(like: Tree, gen: Generator | None) -> Tree:
        """Q₀ of every matrix, standard normal from the shared generator."""
        gen = gen if gen is not None else random.generator("powersgd")
        return {k: random.normal(gen, (matrix(v).shape[1], width(v))).to(v) for k, v in like.items() if thin(v)}

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        code, after = {}, {}
        for k, v in x.items():
            if not thin(v):
                code[k] = v
                continue
            m = matrix(v)
            p = orthonormal(m @ state[k])
            code[f"{k}.p"], code[f"{k}.q"] = p, m.mT @ p
            after[k] = m.mT @ p
        return code, {"start": dict(state)}, after

    def receive(knobs: dict, code: Tree, side: Side, like: Tree) -> Tree:
        return {
            k: (code[f"{k}.p"] @ code[f"{k}.q"].mT).reshape(v.shape).to(v.dtype) if thin(v) else code[k]
            for k, v in like.items()
        }

    def read(knobs: dict, code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        out = {}
        for k, v in belief.mean.items():
            if not thin(v):
                out[k] = (v - code[k]).square()
                continue
            m, p = matrix(v), code[f"{k}.p"]
            out[f"{k}.q"] = (m.mT @ p - code[f"{k}.q"]).square()
            start = side["start"][k].to(v.dtype)
            seen = m @ (start / start.norm(dim=0).clamp(min=1e-30))
            out[f"{k}.p"] = (seen - p @ (p.mT @ seen)).square()
        return out

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        """Unseen: the best approximation of the guess itself, what it leaves out as variance."""
        mean, var = {}, {}
        for k, v in belief.mean.items():
            mean[k], var[k] = v, belief.var.get(k, torch.zeros_like(v))
            if thin(v):
                u = torch.linalg.svd(matrix(v.detach()), full_matrices=False).U[:, : width(v)]
                mean[k] = (u @ (u.mT @ matrix(v))).reshape(v.shape)
                var[k] = var[k] + (v - mean[k]).detach().square().mean()
        return Belief(mean, var)

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        return replace(reset, unbiased=False, width=32.0, exact=reset.exact and before.law == "none")

    return Stage(
        "powersgd", "code", send, push, receive, fold, read, shape=shape, init=init
    )  # fmt: skip


def thin(v: Tensor) -> bool:
    """Whether a tensor is sent as two factors: matrices that are not empty."""
    return v.ndim >= 2 and v.numel() > 0


def matrix(v: Tensor) -> Tensor:
    """`[first axis, rest]`."""
    return v.reshape(v.shape[0], -1)


def orthonormal(p: Tensor) -> Tensor:
    """Orthonormal columns of the same span (QR); of a zero matrix, any."""
    return torch.linalg.qr(p).Q

"""What a code without noise says: every number sent lies in its cell. Linearised, that is a polytope of images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import jacrev

from qleak.bounds import jacobian as jacobians
from qleak.bounds.information import arriving, in_front
from qleak.bounds.jacobian import Jacobian
from qleak.bounds.prior import Prior
from qleak.channels import Channel
from qleak.channels.channel import Leg
from qleak.types import Message, Stage, Tree

MOST_CLEAR = 256  # numbers in clear that are taken out one by one


class Cells(NamedTuple):
    """The cells of one message: `lo`, `hi` around the numbers `at`, and the gradients of what travels in clear.

    Attributes:
        at: the numbers in front of the code, as the client computed them.
        lo: lower ends, −∞ where a cell is open.
        hi: upper ends.
        clear: gradients of the side information in `at`, a tree each.
        front: what the channel does in front of the code; None for nothing.
        why: why there are no cells; "" where there are.
    """

    at: Tree
    lo: Tree
    hi: Tree
    clear: list[Tree]
    front: Callable[[Tree], Tree] | None = None
    why: str = ""


def deterministic(channel: Channel) -> bool:
    """Whether the channel draws nothing and ends in a code: its message is a function of the image."""
    stages = channel.stages
    return bool(stages) and stages[-1].kind == "code" and not any(s.noise for s in stages)


def cells(channel: Channel, rows: Tree, like: Tree, message: Message | None) -> Cells:
    """The cells of the message that `channel` made of the client's `rows`."""
    none = functools.partial(Cells, {}, {}, {}, [], None)
    if message is None or not deterministic(channel):
        return none("no message of a code without noise")
    last = channel.legs[-1]
    kinds = [s.kind for leg in channel.legs for s in leg.stages]
    if kinds.count("code") > 1 or "select" in kinds or channel.depth(-1):
        return none("more stands in front of the code than its cells can be read through")
    ahead = replace(channel, legs=(*channel.legs[:-1], Leg(last.join, last.stages[:-1])))
    front, shrink = in_front(ahead)
    code, knobs, at = last.stages[-1], channel.knobs()[-1][-1], arriving(ahead, rows)
    if code.cell is None:
        return none(f"{code.name} has no cells")
    lo, hi = code.cell(knobs, message.code, message.side[-1], at)
    clear = _clear(code, knobs, at)
    if clear is None:
        return none("more travels in clear than can be taken out")
    return Cells(at, lo, hi, clear, functools.partial(arriving, ahead) if shrink else front)


def _clear(code: Stage, knobs: dict, at: Tree) -> list[Tree] | None:
    """Gradients of the numbers in clear: an end of a grid is one number, a mean magnitude their signs. None: too many."""

    def side(at: Tree) -> Tree:
        sent = code.send(knobs, at, {}, code.init(at, None))[1]
        return {f"{a}/{k}": v for a, t in sent.items() for k, v in t.items() if v.is_floating_point()}

    sizes = {k: v.numel() for k, v in side(at).items()}
    if sum(sizes.values()) > MOST_CLEAR:
        return None
    if not sizes:
        return []
    slopes = jacrev(side)(at)
    found = []
    for name, size in sizes.items():
        whole = {k: v.reshape(size, *at[k].shape) for k, v in slopes[name].items()}  # type: ignore[union-attr]
        found += [{k: v[i].double() for k, v in whole.items()} for i in range(size)]
    return [t for t in found if any(bool((v != 0).any()) for v in t.values())]


class Outer(NamedTuple):
    """Rows of an outer product along the directions: (δ_c·H_kf + h_f·D_kc)·scale_cf."""

    delta: np.ndarray
    h: np.ndarray
    H: np.ndarray
    D: np.ndarray
    scale: np.ndarray


class Section(NamedTuple):
    """{δ : |u + cδ| ≤ 1} over δ = Vt, with the Gaussian exp(−½ tᵀPt − sᵀt), around the truth at t = 0.

    Attributes:
        V: directions `[n k]`, orthogonal, each of about the length that its rows and the prior allow.
        u: where the truth lies in its cells `[d]`, in [−1, 1].
        dense: rows `[k d₁]` of the first numbers, in half widths.
        outer: the rows of the others.
        reach: at least max_k |c_ki| `[d]`.
        P: the prior's precision along the directions `[k k]`.
        s: its slope at the truth `[k]`.
    """

    V: np.ndarray
    u: np.ndarray
    dense: np.ndarray
    outer: tuple[Outer, ...]
    reach: np.ndarray
    P: np.ndarray
    s: np.ndarray


def section(jac: Jacobian, found: Cells, x: Tensor, prior: Prior, box: bool = True) -> Section | None:
    """The polytope of images `x [b c h w]` that fit their cells, within the prior and [0, 1]; None if it is a point.

    Numbers in clear, and with `box` pixels that are black or white, are given away: only directions that leave them
    alone are kept. So the attacker that is bounded knows at least as much as any real one.
    """
    flat = x.double().flatten()
    free = ((flat > 0) & (flat < 1)).nonzero()[:, 0] if box else torch.arange(len(flat))
    known = [jacobians.pull(jac, dict.fromkeys(jac.value, torch.ones(())), t)[free] for t in found.clear]
    N = _complement(torch.stack(known)) if known else torch.eye(len(free)).double()
    if not N.shape[1]:
        return None
    precision, away = prior.precision(), flat - prior.mean
    weights = {k: _weight(found.lo[k], found.hi[k]) for k in jac.value}
    whole = jacobians.gram(jac, weights) + precision
    values, U = torch.linalg.eigh(N.T @ whole[free][:, free] @ N)
    V = torch.zeros(len(flat), len(values), dtype=torch.float64)
    V[free] = N @ (U / values.clamp(min=float(values.max()) * 1e-14).sqrt())
    dense, ends, outer = [], [], []
    for k, cut, j in jac.slices():
        dense.append((j @ V).T)
        ends.append([v[k].double().reshape(-1)[cut] for v in (found.at, found.lo, found.hi)])
    if box:
        dense.append(V[free].T)
        ends.append([flat[free], torch.zeros(len(free)).double(), torch.ones(len(free)).double()])
    us, parts, reach = [], [], []
    for c, (at, lo, hi) in zip(dense, ends, strict=True):
        norm = (c / V.norm(dim=0)[:, None]).square().sum(0).sqrt()
        u, half = _within(at, lo, hi, norm * len(flat) ** 0.5)
        us.append(u)
        parts.append(c / half)
        reach.append((c / half).abs().amax(0))
    for k, p in jac.outer.items():
        H, D = (p.H @ V).T, (p.D @ V).T
        norm = p.delta.abs()[:, None] * p.H.norm(dim=1) + p.h.abs() * p.D.norm(dim=1)[:, None]
        at, lo, hi = (v[k].double() for v in (found.at, found.lo, found.hi))
        u, half = _within(at, lo, hi, norm * len(flat) ** 0.5)
        us.append(u.flatten())
        most = p.delta.abs()[:, None] * H.abs().amax(0) + p.h.abs() * D.abs().amax(0)[:, None]
        reach.append((most / half).flatten())
        outer.append(Outer(*(v.numpy() for v in (p.delta, p.h, H, D, 1 / half))))
    together = torch.cat(parts, 1).contiguous() if parts else torch.zeros(V.shape[1], 0).double()
    P, s = V.T @ precision @ V, V.T @ (precision @ away)
    numbers = (V, torch.cat(us), together, torch.cat(reach).clamp(min=1e-200), P, s)
    V, u, d, r, P, s = (v.numpy() for v in numbers)
    return Section(V, u, d, tuple(outer), r, P, s)


def columns(of: Section, some: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
    """Rows along the directions `some [m]` at `places [p]` (rising; all where None): `[m p]`."""
    edge = of.dense.shape[1]
    if places is None:
        places = np.arange(len(of.u))
    cut = np.searchsorted(places, edge)
    out, start = [of.dense[np.ix_(some, places[:cut])]], edge
    for o in of.outer:
        stop = start + o.scale.size
        a, b = np.searchsorted(places, (start, stop))
        c, f = np.divmod(places[a:b] - start, len(o.h))
        out.append((o.delta[c] * o.H[np.ix_(some, f)] + o.h[f] * o.D[np.ix_(some, c)]) * o.scale[c, f])
        start = stop
    return np.concatenate(out, 1)


def moved(of: Section, some: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """What `steps [m]` along the directions `some [m]` add to u: `[d]`."""
    out = [steps @ of.dense[some]]
    for o in of.outer:
        out.append(((np.outer(o.delta, steps @ o.H[some]) + np.outer(steps @ o.D[some], o.h)) * o.scale).ravel())
    return np.concatenate(out)


def _weight(lo: Tensor, hi: Tensor) -> Tensor:
    width = (hi - lo).double()
    return torch.where(width.isfinite() & (width > 0), 12 / width.square().clamp(min=1e-200), 0.0)


def _within(at: Tensor, lo: Tensor, hi: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """(u, half width) of numbers in their cells; an open end is put where no image of the unit cube can come."""
    lo = torch.where(lo.isfinite(), lo, at - far).minimum(at)
    hi = torch.where(hi.isfinite(), hi, at + far).maximum(at)
    half = ((hi - lo) / 2).clamp(min=1e-300)
    return (((at - lo) - (hi - at)) / (2 * half)).clamp(-1, 1), half


def _complement(rows: Tensor) -> Tensor:
    """Orthonormal `[n k]` of all that is orthogonal to `rows [m n]`."""
    _, values, right = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300), full_matrices=True)
    rank = int((values > 1e-9 * values.max().clamp(min=1e-300)).sum())
    return right[rank:].T

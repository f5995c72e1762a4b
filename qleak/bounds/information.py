"""What a channel's message tells of the update in front of it: Fisher information, number by number.

For a message with independent noise on every number, F_x = JᵀWJ with W_i the Fisher information of number i:

| message | W | |
|---|---|---|
| Gaussian noise | 1/σ² | exact |
| Laplace noise of scale β | 1/β² = 2/variance | exact |
| stochastic rounding, f of a step above a grid point | 1/(step² f(1 − f)) | exact at this image; its mean diverges |
| the coin of `stochastic_sign`, P(1) = (1 + x/b)/2 | 1/(b² − x²) | exact inside the cap |
| a cell or a coin read as noise | 12/width², 6/step² | an approximation, called `gaussian-approx` |
| a number sent in clear | 3/ulp² of its tensor's largest | float32 rounding, an approximation |

A deterministic code is flat inside its cell: its Fisher information is zero almost everywhere and undefined at the
edges, so no Cramér–Rao bound exists. (The error of a dithered quantizer is uniform and independent of the number, and
a uniform density has no Fisher information either.) `gaussian-approx` takes the error for Gaussian noise of the same
variance, width²/12 (Bennett 1948): what good it does depends on many small cells, and it is no bound.

Behind the first noise everything else (codes, thresholds, top-k) can only lose information (data processing): the
information in front of it bounds the message's, exactly but not tightly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from qleak.channels import Channel, legs
from qleak.channels.channel import Leg
from qleak.types import Belief, Message, Stage, Tree

KINDS = ("exact", "local", "gaussian-approx")
ALL = ""  # the key of a weight that every tensor shares
NEAR = 1e-4  # of a step: a coin that is closer to certain counts as this likely to fall the other way


class Information(NamedTuple):
    """W of a message, in the space where its noise or its code works.

    Attributes:
        weights: W by tensor, 0-dim or in full, or one for all by the key `ALL`; {} where there is none, and `why` says why.
        kind: "exact" (for every image), "local" (at this one only) or "gaussian-approx".
        front: what happens to the client's rows in front, where it is more than nothing or one shrinking.
        shrink: the stage that shortens one row by a factor, where that is all that happens in front.
        known: flat places of numbers that are known without noise (the ends of a grid), by tensor.
        assumes: what was assumed, in words.
        why: why there is no information to speak of; "" where there is.
    """

    weights: Tree
    kind: str
    front: Callable[[Tree], Tree] | None = None
    shrink: Stage | None = None
    known: dict[str, Tensor] = {}  # noqa: RUF012
    assumes: str = ""
    why: str = ""


def information(
    channel: Channel, rows: Tree, like: Tree, message: Message | None = None, exact: bool = True
) -> Information:
    """The information of the message that `channel` makes of the client's `rows`.

    Args:
        channel: the channel; the message is that of its last leg.
        rows: what the client computes, with its row axes.
        like: the tree of one row.
        message: what was sent of it; codes need it.
        exact: take coins by their own law where it is known; False for `gaussian-approx` of all codes.
    """
    noisy = next((s for s in channel.stages if s.kind == "value" and s.noise), None)
    if noisy is not None:
        return _noise(channel, noisy)
    last = channel.legs[-1] if channel.legs else Leg(None, ())
    if any(s.kind != "value" for leg in channel.legs[:-1] for s in leg.stages) or message is None:
        return Information({}, "", why="an earlier leg's codes stand in front of the numbers that are sent")
    if any(v.numel() and v.ndim != like[k].ndim for k, v in message.code.items() if channel.depth(-1)):
        return Information({}, "", why="the message carries several rows")
    values = tuple(s for s in last.stages if s.kind == "value")
    front, shrink = in_front(replace(channel, legs=(*channel.legs[:-1], Leg(last.join, values))))
    at = arriving(replace(channel, legs=(*channel.legs[:-1], Leg(last.join, values))), rows) if channel.legs else rows
    return _code(channel, last, at, message, exact)._replace(front=front, shrink=shrink)


def _noise(channel: Channel, noisy: Stage) -> Information:
    """Gaussian or Laplace noise: its own information, with Gaussian noise right behind it added up."""
    at = next(i for i, leg in enumerate(channel.legs) if noisy in leg.stages)
    stages = channel.legs[at].stages
    here = stages.index(noisy)
    front, shrink = in_front(replace(channel, legs=(*channel.legs[:at], Leg(channel.legs[at].join, stages[:here]))))
    if front is None and shrink is None and any(s.kind == "code" for leg in channel.legs[:at] for s in leg.stages):
        return Information({}, "", why="codes stand in front of the noise")
    size = noisy.knobs["size"] ** 2
    rest = list(stages[here + 1 :])
    while noisy.name == "gaussian" and rest and rest[0].name == "gaussian":
        size += rest.pop(0).knobs["size"] ** 2
    behind = bool(rest) or at + 1 < len(channel.legs)
    words = f"{noisy.name} noise" + (", what follows it seen as no loss" if behind else "")
    weight = torch.tensor(1 / size, dtype=torch.float64)
    return Information({ALL: weight}, "exact", front, shrink, assumes=words)


def in_front(channel: Channel) -> tuple[Callable[[Tree], Tree] | None, Stage | None]:
    """(function, shrinking stage) of the stages in front of the noise; (None, None) where there are none."""
    stages = channel.stages
    if not stages:
        return None, None
    if len(stages) == 1 and stages[0].shrink is not None:
        return None, stages[0]
    return functools.partial(arriving, channel), None


def arriving(channel: Channel, rows: Tree) -> Tree:
    """Rows through stages that draw nothing, in the space where the last of them works."""
    like = {k: v[(0,) * channel.joins] if channel.joins else v for k, v in rows.items()}
    x, knobs = rows, channel.knobs(dtype=next(iter(rows.values())).dtype)
    for i, (leg, at) in enumerate(zip(channel.legs, channel.likes(like), strict=False)):
        if leg.join:
            x = leg.join.send({}, x, {}, ())[0]

        def one(x: Tree, leg: Leg = leg, at: Tree = at, knob: object = knobs[i]) -> Tree:
            blank = [{}] * len(leg.stages)
            return legs.send_leg(leg.stages, at, knob, x, blank, leg_state(leg, at))[2]

        for _ in range(channel.depth(i)):
            one = vmap(one)
        x = one(x)
    return x


def leg_state(leg: Leg, like: Tree) -> tuple:
    """The state of stages that keep none of consequence."""
    return tuple(s.init(like, None) for s in leg.stages)


def _code(channel: Channel, leg: Leg, at: Tree, message: Message, exact: bool) -> Information:
    """The last leg's code (or numbers in clear) of the numbers `at`, and what a selection in front of it leaves."""
    knobs = channel.knobs()[-1] if channel.legs else ({},)
    values = [at]  # in front of every stage: selections gather, everything else is done already
    for i, stage in enumerate(leg.stages):
        chosen = stage.kind == "select"
        values.append(stage.push(knobs[i], Belief(values[-1], {}), message.side[i]).mean if chosen else values[-1])
    code = leg.stages[-1] if leg.stages and leg.stages[-1].kind == "code" else None
    if code is None:
        weights = {k: 1 / _resolution(v) for k, v in message.code.items()}
        found = Information(weights, "gaussian-approx", assumes="numbers as good as float32 computes them")
    else:
        side = message.side[-1]
        coin = _COINS.get(code.name) if exact else None
        found = (coin or _approximate)(code, knobs[-1], message.code, side, values[-1])
    if found.why:
        return found
    for i in reversed([i for i, s in enumerate(leg.stages) if s.kind == "select"]):
        ones = {k: torch.ones_like(v, dtype=torch.float64) for k, v in values[i].items()}
        factor = leg.stages[i].push(knobs[i], Belief(ones, {}), message.side[i]).mean
        kept = {k: w.double() * factor[k].square() for k, w in found.weights.items()}
        blank = {k: torch.empty_like(v, dtype=torch.float64) for k, v in values[i].items()}
        found = found._replace(
            weights=leg.stages[i].receive(knobs[i], kept, message.side[i], blank), kind="gaussian-approx",
            assumes=f"{found.assumes}; what {leg.stages[i].name} drops says nothing", known={},
        )  # fmt: skip
    return found


def _approximate(code: Stage, knobs: dict, sent: Tree, side: dict, like: Tree) -> Information:
    """`gaussian-approx`: the code's own moments, or its cells as uniform errors."""
    if code.moments is not None:
        var = code.moments(knobs, sent, side, like)[1]
        words = "a coin's" if code.noise else "rounding"
    else:
        if code.cell is None:
            return Information({}, "", why=f"{code.name} has neither cells nor a variance to take")
        lo, hi = code.cell(knobs, sent, side, like)
        if any(not bool((v.isfinite()).all()) for t in (lo, hi) for v in t.values()):
            return Information({}, "", why=f"{code.name} leaves cells without an end, which have no variance")
        var = {k: (hi[k] - lo[k]).double().square() / 12 for k in lo}
        words = "rounding"
    # A group of equal numbers is sent exactly, and everything else at float32 at best.
    least = {k: v.double() + _resolution(like[k]) for k, v in var.items()}
    return Information(
        {k: 1 / v for k, v in least.items()},
        "gaussian-approx",
        assumes=f"{words} errors as Gaussian noise of that variance",
    )


def _resolution(v: Tensor) -> Tensor:
    """Variance of float32 rounding at the tensor's largest number: what sums of its terms are computed to."""
    top = v.double().abs().amax() if v.numel() else torch.zeros(()).double()
    return (top * 2.0**-24).square() / 3 + 1e-30


def _rounded(code: Stage, knobs: dict, sent: Tree, side: dict, at: Tree) -> Information:
    """Stochastic rounding: the Bernoulli law of the two grid points, given the ends of the grid."""
    assert code.moments is not None
    points, var = code.moments(knobs, sent, side, at)  # var = step²/6
    weights, known = {}, {}
    for k, v in at.items():
        step = (6 * var[k].double()).sqrt()
        flat = step == 0
        f = ((v.double() - points[k].double()) / torch.where(flat, 1, step)).remainder(1.0)
        p = f.clamp(NEAR, 1 - NEAR)
        weights[k] = torch.where(flat, 0.0, 1 / (torch.where(flat, 1, step).square() * p * (1 - p)))
        certain = ((f.minimum(1 - f) <= NEAR) & ((v == v.min()) | (v == v.max())) & (v != 0)) if v.numel() else flat
        known[k] = certain.reshape(-1).nonzero()[:, 0]
    words = "every coin's own law at this image, the ends of the grid known"
    return Information(weights, "local", known={k: v for k, v in known.items() if len(v)}, assumes=words)


def _signed(code: Stage, knobs: dict, sent: Tree, side: dict, at: Tree) -> Information:
    """`stochastic_sign`: P(1) = (1 + x/b)/2 with W = 1/(b² − x²), given b; beyond the cap the coin is certain."""
    share = code.push(knobs, Belief(at, {}), side).mean  # x/b, cut at ±1
    weights, known = {}, {}
    for k, v in at.items():
        x, s = v.double(), share[k].double()
        b = float((x.abs() / s.abs().clamp(min=1e-300)).where(s != 0, 0).median()) if bool((s != 0).any()) else 0.0
        inside = (s.abs() < 1) & (v != 0)
        weights[k] = torch.where(inside, 1 / (b * b * (1 - s.square()).clamp(min=NEAR)) if b else 0.0, 0.0)
        ends = (
            (x.abs() >= (1 - 1e-6) * b) & (x.abs() == x.abs().max())
            if b and x.abs().max() <= b * (1 + 1e-6)
            else v != v
        )
        known[k] = ends.reshape(-1).nonzero()[:, 0]
    words = "every coin's own law at this image, its bias's scale known"
    return Information(weights, "local", known={k: v for k, v in known.items() if len(v)}, assumes=words)


_COINS = {"stochastic": _rounded, "stochastic_sign": _signed}

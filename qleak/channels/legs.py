"""One leg on one row: sent, decoded, bounded, pushed through, read. `channel.py` maps these over rows and legs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qleak.channels import reading
from qleak.check import Expected
from qleak.types import Belief, Message, Stage, Tree


def send_leg(
    stages: Sequence[Stage], like: Tree, knobs: Any, x: Tree, noise: Any, state: Any
) -> tuple[Message, Any, Tree]:
    """(message, state, what a next leg starts from) of one row."""
    likes, sides, states = [], [], []
    shape = like
    for stage, knob, eps, memory in zip(stages, knobs, noise, state, strict=True):
        if stage.noise and any(eps[k].shape != v.shape for k, v in stage.draws(x).items()):
            raise Expected(
                f"Expected noise of the shapes of {stage.name}'s input, got {[tuple(e.shape) for e in eps.values()]}."
            )
        likes.append(shape)
        x, side, memory = stage.send(knob, x, eps, memory)
        sides.append(side)
        states.append(memory)
        shape = stage.shape(shape)
    message = Message(x, tuple(sides))
    return message, tuple(states), decode(stages, likes, knobs, message)


def likes_of(stages: Sequence[Stage], like: Tree) -> list[Tree]:
    """The `like` in front of every stage, and behind the last."""
    likes = [like]
    for stage in stages:
        likes.append(stage.shape(likes[-1]))
    return likes


def carried(stages: Sequence[Stage], like: Tree) -> Tree:
    """The `like` that a next leg starts from: value stages' shapes stay, what was selected and coded is dense again."""
    for stage in stages:
        like = stage.shape(like) if stage.kind == "value" else like
    return like


def lift_leg(stages: Sequence[Stage], like: Tree, knobs: Any, x: Tree) -> Tree:
    """Dense numbers behind a leg back to the space in front of it: undoes the value stages that change the shape."""
    likes = likes_of(stages, like)
    for stage, before, knob in reversed(list(zip(stages, likes, knobs, strict=False))):
        x = stage.lift(knob, x, before) if stage.lift else x
    return x


def receive_leg(stages: Sequence[Stage], like: Tree, knobs: Any, message: Message) -> Tree:
    """The server's dense numbers."""
    return decode(stages, likes_of(stages, like), knobs, message)


def decode(stages: Sequence[Stage], likes: Sequence[Tree], knobs: Any, message: Message) -> Tree:
    """Undoes select and code stages; what a value stage did (clip, scale, noise) stays done."""
    x = message.code
    for stage, like, knob, side in reversed(list(zip(stages, likes, knobs, message.side, strict=False))):
        if stage.kind != "value":
            x = stage.receive(knob, x, side, like)
    return x


def push_leg(stages: Sequence[Stage], knobs: Any, belief: Belief) -> Belief:
    """Through a leg the attacker does not see: every stage in dense coordinates, by its moments."""
    for stage, knob in zip(stages, knobs, strict=True):
        belief = stage.push(knob, belief, None)
    return belief


def cell_leg(stages: Sequence[Stage], like: Tree, knobs: Any, message: Message) -> tuple[Tree, Tree]:
    """Bounds on the value in front of a leg of select and code stages."""
    likes = likes_of(stages, like)
    lo = hi = message.code
    for stage, before, knob, side in reversed(list(zip(stages, likes, knobs, message.side, strict=False))):
        assert stage.cell is not None, stage.name
        lo, hi = (
            stage.cell(knob, (lo, hi), side, before) if stage.kind == "select" else stage.cell(knob, lo, side, before)
        )
    return lo, hi


def moments_leg(stages: Sequence[Stage], like: Tree, knobs: Any, message: Message) -> tuple[Tree, Tree]:
    """The numbers in front of a leg of additive noise and a code, as a Gaussian: where, and how wide."""
    var: Tree = {}
    at = message.code
    for stage, knob, side in zip(stages, knobs, message.side, strict=True):
        if stage.kind == "code":
            assert stage.moments is not None, stage.name
            at, wide = stage.moments(knob, message.code, side, like)
            var = {k: v + var.get(k, 0) for k, v in wide.items()}
        else:
            var = stage.push(knob, Belief({k: torch.zeros_like(v) for k, v in like.items()}, var), side).var
    return at, var


def read_leg(
    stages: Sequence[Stage], like: Tree, law: str, knobs: Any, message: Message, belief: Belief, moments: bool = False
) -> Tensor:
    """Negative log-likelihood of the message, summed: what is dropped, then the last code (or the numbers themselves).

    With `moments`, codes drawn by a coin are read as Gaussians of their own variance.
    """
    likes = likes_of(stages, like)
    code = stages[-1] if stages and stages[-1].kind == "code" else None
    misfit, kept = [], (message.code, message.code)
    if code:
        assert code.read is not None, code.name
        if any(s.kind == "select" for s in stages):
            assert code.cell is not None, code.name
            kept = code.cell(knobs[-1], message.code, message.side[-1], likes[-2])
    for stage, knob, side in zip(stages, knobs, message.side, strict=True):
        if stage.clear and law == "none":  # behind noise a scale is the noisy numbers' own
            misfit.append(stage.clear(knob, side, belief.mean))
        if stage is code:
            break
        if stage.kind == "select":
            assert stage.dropped is not None, stage.name
            misfit.append(stage.dropped(side, belief, kept, law))
        belief = stage.push(knob, belief, side)
    if code and moments and code.noise and code.moments:
        at, wide = code.moments(knobs[-1], message.code, message.side[-1], likes[-2])
        least = {k: v.clamp(min=1e-30) + belief.var.get(k, 0) for k, v in wide.items()}
        misfit.append({k: (m - at[k]).square() / (2 * least[k]) for k, m in belief.mean.items()})
    elif code:
        assert code.read is not None
        misfit.append(code.read(knobs[-1], message.code, message.side[-1], belief, law))
    else:
        misfit.append({k: reading.density(m, message.code[k], belief.var.get(k), law) for k, m in belief.mean.items()})
    return torch.stack([v.sum() for t in misfit for v in t.values()]).sum()


def entropy(code: Tensor) -> float:
    """n·H of the symbols of one tensor, in bits."""
    if not code.numel():
        return 0.0
    counts = code.detach().flatten().unique(return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum())

"""A chain of stages as one value: what a client sends, what a server decodes, what an attacker reads.

`channel = leg (join leg)*`, `leg = value* select? code?`. A stage out of that order closes the leg:
the message is decoded to dense numbers, its side information is dropped, and the next leg begins.
In front of a join every leg is mapped over the leading `row` axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import vmap

from qleak import random, tree
from qleak.channels import legs
from qleak.check import Expected
from qleak.types import Belief, Facts, Message, Stage, Tree

Knobs = tuple[tuple[dict[str, Tensor], ...], ...]
Noise = tuple[tuple[Tree, ...], ...]


@dataclass(frozen=True)
class Leg:
    """Stages between two joins (or decodings): `join?` then `value* select? code?`."""

    join: Stage | None
    stages: tuple[Stage, ...]

    @property
    def every(self) -> tuple[Stage, ...]:
        """The join, if any, and the stages."""
        return ((self.join,) if self.join else ()) + self.stages


@dataclass(frozen=True)
class Channel:
    """What `chain(stage, …)` returns; see docs/design.md. `like` is always the tree of one row."""

    legs: tuple[Leg, ...]
    spec: str = ""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages in order."""
        return tuple(s for leg in self.legs for s in leg.every)

    @property
    def joins(self) -> int:
        """Number of row axes the input carries."""
        return sum(leg.join is not None for leg in self.legs)

    def depth(self, leg: int) -> int:
        """Row axes that the message of `leg` still carries."""
        return sum(later.join is not None for later in self.legs[leg % len(self.legs) + 1 :])

    def upto(self, leg: int) -> Channel:
        """The channel that ends with `leg`: what an observer of that leg sees."""
        return replace(self, legs=self.legs[: leg % len(self.legs) + 1])

    def likes(self, like: Tree) -> list[Tree]:
        """The tree of one row in front of every leg, and behind the last: value stages may change its shape."""
        every = [like]
        for leg in self.legs:
            every.append(legs.carried(leg.stages, every[-1]))
        return every

    # --- facts ---

    def facts(self, like: Tree | None = None) -> Facts:
        """What is known of the release, folded along the chain. `like=None`: order only, no numbers."""
        facts = Facts()
        for i, leg in enumerate(self.legs):
            facts = _fold(facts, leg.every, like)
            like = legs.carried(leg.stages, like) if like is not None else None
            if i + 1 < len(self.legs):
                facts = _closed(facts, leg)
        return facts

    def law(self, leg: int, like: Tree | None = None) -> Facts:
        """The facts in front of the last code of `leg`: what the attacker has to read through."""
        before = self.upto(leg)
        last = before.legs[-1]
        if last.stages and last.stages[-1].kind == "code":
            before = replace(before, legs=(*before.legs[:-1], Leg(last.join, last.stages[:-1])))
        return before.facts(like)

    # --- sending ---

    def knobs(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Knobs:
        """Every stage's numbers as 0-dim tensors, leg by leg: the part that may become lanes."""
        return tuple(
            tuple({k: torch.tensor(v, dtype=dtype, device=device) for k, v in s.knobs.items()} for s in leg.stages)
            for leg in self.legs
        )

    def init(self, like: Tree, gen: Generator | None = None) -> tuple[Any, ...]:
        """The state of every stage; () for stateless ones."""
        return tuple(
            tuple(s.init(legs.carried(leg.stages[:j], at), gen) for j, s in enumerate(leg.stages))
            for leg, at in zip(self.legs, self.likes(like), strict=False)
        )

    def draw(self, gen: Generator, like: Tree, rows: Sequence[int] = ()) -> Noise:
        """All noise of one lane: one call per stage, tensor and row, in that order."""
        noise = []
        for i, shapes in enumerate(self.draws(like)):
            lead, every = tuple(rows[self.joins - self.depth(i) :]), zip(self.legs[i].stages, shapes, strict=True)
            noise.append(tuple({k: _rows(gen, s.noise or "", lead, v) for k, v in shape.items()} for s, shape in every))
        return tuple(noise)

    def draws(self, like: Tree) -> Noise:
        """The shapes of one row's noise, leg by leg and stage by stage; {} where a stage draws none."""
        every = zip(self.legs, self.likes(like), strict=False)
        pairs = [zip(leg.stages, legs.likes_of(leg.stages, at), strict=False) for leg, at in every]
        return tuple(tuple(s.draws(shape) if s.noise else {} for s, shape in leg) for leg in pairs)

    def send(self, knobs: Knobs, rows: Tree, noise: Noise, state: Any, like: Tree) -> tuple[tuple[Message, ...], Any]:
        """One message per leg. `rows` carries `joins` leading axes; never draws.

        Raises:
            Expected: noise or rows do not have the shapes that `draw` and `like` say, or rows are of half precision.
        """
        x, messages, states, likes = rows, [], [], self.likes(like)
        for k, v in rows.items():
            if v.dtype not in (torch.float32, torch.float64):
                raise Expected(f"Expected rows[{k!r}] of float32 or float64, got {v.dtype}: convert it first.")
            if tuple(v.shape[self.joins :]) != tuple(like[k].shape):
                raise Expected(
                    f"Expected rows[{k!r}] of {self.joins} row axes + {tuple(like[k].shape)}, got {tuple(v.shape)}."
                )
        for i, leg in enumerate(self.legs):
            if leg.join:
                x = leg.join.send({}, x, {}, ())[0]
            one_row = functools.partial(legs.send_leg, leg.stages, likes[i])
            lead = next(iter(x.values())).shape[: self.depth(i)]
            if 0 in lead:  # an empty batch: nothing is sent, and the join behind it sums to zero
                messages.append(Message({}, ()))
                states.append(state[i])
                x = {k: rows[next(iter(rows))].new_zeros(*lead, *v.shape) for k, v in likes[i + 1].items()}
                continue
            mapped = _mapped(one_row, self.depth(i), (None, 0, 0, 0))
            message, after, x = mapped(knobs[i], x, noise[i], state[i])
            messages.append(message)
            states.append(after)
        return tuple(messages), tuple(states)

    def receive(self, knobs: Knobs, message: Message, like: Tree, leg: int = -1) -> Tree:
        """The server's dense numbers from one leg's message (row axes kept), in the shape of `like`."""
        i, likes = leg % len(self.legs), self.likes(like)

        def decode(knobs: Knobs, message: Message) -> Tree:
            return self._lifted(knobs, legs.receive_leg(self.legs[i].stages, likes[i], knobs[i], message), likes, i)

        return _mapped(decode, self.depth(i), (None, 0))(knobs, message)

    def _lifted(self, knobs: Knobs, x: Tree, likes: Sequence[Tree], leg: int) -> Tree:
        """Dense numbers behind `leg` in the space of the client's row: what changed the shape, undone in reverse."""
        for i in reversed(range(leg + 1)):
            x = legs.lift_leg(self.legs[i].stages, likes[i], knobs[i], x)
        return x

    def bits(self, message: Message, like: Tree, leg: int = -1, coded: bool = False) -> float:
        """Bits of one leg's message as sent: every code and all side information.

        With `coded`, codes count at their empirical entropy per tensor, n·H: what an ideal adaptive
        entropy coder comes near (its tables are not counted).
        """
        i = leg % len(self.legs)
        if not message.code:
            return 0.0
        rows = math.prod(next(iter(message.code.values())).shape[: self.depth(i)])
        stages = self.legs[i].stages
        likes = legs.likes_of(stages, self.likes(like)[i])
        side = sum((s.cost(s.knobs, a, b) for s, a, b in zip(stages, likes, likes[1:], strict=False) if s.cost), 0.0)
        width = 32.0 if not stages or stages[-1].kind != "code" else self.upto(i).facts(like).width
        if coded and width < 32:  # numbers sent as they are have no symbols to count
            return rows * side + sum(legs.entropy(v) for v in message.code.values())
        return rows * (side + math.ceil(width) * tree.count(likes[-1]))

    # --- reading ---

    def has_cell(self, leg: int = -1) -> bool:
        """Whether `misfit` of this leg is the distance to `cell`: select and deterministic code stages alone."""
        i = leg % len(self.legs)
        stages = self.legs[0].stages
        return i == 0 and bool(stages) and all(s.cell and not s.clear and not s.noise for s in stages)

    def has_moments(self, leg: int = -1) -> bool:
        """Whether `moments` exist and say more than a cell: additive noise and a code, at least one of them random."""
        i = leg % len(self.legs)
        stages = self.legs[0].stages
        readable = all(s.moments or (s.kind == "value" and s.noise) for s in stages)
        return i == 0 and readable and any(s.noise for s in stages)

    def moments(self, knobs: Knobs, message: Message, like: Tree, leg: int = -1) -> tuple[Tree, Tree]:
        """(where, variance) of the numbers in front of the leg, coordinate by coordinate, read as Gaussians."""
        i = leg % len(self.legs)
        return legs.moments_leg(self.legs[i].stages, self.likes(like)[i], knobs[leg], message)

    def cell(self, knobs: Knobs, message: Message, like: Tree, leg: int = -1) -> tuple[Tree, Tree]:
        """Bounds on the value in front of the leg's own select and code stages, given the message.

        Raises:
            Expected: the leg sends plain numbers, or holds value stages, which have no cell.
        """
        i = leg % len(self.legs)
        stages = [s for s in self.legs[i].stages if s.kind != "value"]
        if len(stages) != len(self.legs[i].stages) or not stages:
            raise Expected(
                f"Expected a leg of select and code stages only, got {[s.name for s in self.legs[i].stages]}."
            )
        at = self.likes(like)[i]
        return _mapped(lambda k, m: legs.cell_leg(self.legs[i].stages, at, k, m), self.depth(i), (None, 0))(
            knobs[i], message
        )

    def misfit(
        self, knobs: Knobs, message: Message, guess: Tree, like: Tree, leg: int = -1, moments: bool = False
    ) -> Tensor:
        """Negative log-likelihood of one leg's message given the client's rows `guess`: a 0-dim tensor.

        The guess is pushed through every stage in front of the leg's last code, and that code is read:
        an interval, a half-line, a Bernoulli or a density. Zero (or the least value) at the truth
        where `facts(like).exact` and the channel draws nothing. With `moments`, codes drawn by a coin are
        read as Gaussians: smooth, and close to the likelihood.
        """
        i = leg % len(self.legs)
        belief = self._pushed(knobs, guess, i)
        if join := self.legs[i].join:
            belief = join.push({}, belief, None)
        law = self.law(leg, like).law
        read = functools.partial(legs.read_leg, self.legs[i].stages, self.likes(like)[i], law, moments=moments)
        return _mapped(read, self.depth(i), (None, 0, 0))(knobs[i], message, belief).sum()

    def expect(self, knobs: Knobs, guess: Tree, like: Tree, leg: int = -1) -> Tree:
        """The mean of what the server decodes from one leg for the client's rows `guess`: linear stages applied."""
        i = leg % len(self.legs)
        lift = functools.partial(self._lifted, likes=self.likes(like), leg=i)
        return _mapped(lift, self.depth(i), (None, 0))(knobs, self._pushed(knobs, guess, i + 1).mean)

    def _pushed(self, knobs: Knobs, guess: Tree, upto: int) -> Belief:
        """The guess behind the first `upto` legs."""
        belief = Belief(guess, {})
        for j, before in enumerate(self.legs[:upto]):
            if before.join:
                belief = before.join.push({}, belief, None)
            push = functools.partial(legs.push_leg, before.stages)
            belief = _mapped(push, self.depth(j), (None, 0))(knobs[j], belief)
        return belief


def stack(channels: Sequence[Channel]) -> Knobs:
    """The knobs of channels that differ in numbers only, stacked along a new first axis: levels as lanes.

    Raises:
        Expected: the channels differ in their stages.
    """
    names = [[s.name for s in c.stages] for c in channels]
    if any(n != names[0] for n in names):
        raise Expected(f"Expected channels of the same stages, got {[c.spec for c in channels]}.")
    every = [c.knobs() for c in channels]
    return tuple(
        tuple({k: torch.stack([e[i][j][k] for e in every]) for k in stage} for j, stage in enumerate(leg))
        for i, leg in enumerate(every[0])
    )


def _mapped(fn: Callable[..., Any], times: int, in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    for _ in range(times):
        fn = vmap(fn, in_dims=in_dims, randomness="error")
    return fn


def _rows(gen: Generator, law: str, lead: tuple[int, ...], like: Tensor) -> Tensor:
    if not lead:
        return random.DRAWS[law](gen, like.shape)
    if lead[0] == 0:
        return torch.zeros(*lead, *like.shape)
    return torch.stack([_rows(gen, law, lead[1:], like) for _ in range(lead[0])])


def _fold(facts: Facts, stages: Sequence[Stage], like: Tree | None) -> Facts:
    for stage in stages:
        facts = stage.fold(facts, facts.reset(), like)
        like = stage.shape(like) if like is not None else None
    return facts


def _closed(facts: Facts, leg: Leg) -> Facts:
    """A later leg sees numbers again (32 bits), and reads an earlier leg's selection or code by moments only."""
    coded = any(s.kind in ("select", "code") for s in leg.stages)
    return replace(facts, width=32.0, exact=facts.exact and not coded, law="mixed" if coded else facts.law)

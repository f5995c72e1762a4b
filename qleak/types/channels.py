"""The nouns of a channel: stages, what they send, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Generator, Tensor

from qleak.types.trees import Law, Side, Tree


class Message(NamedTuple):
    """What one leg sends: codes, and for every stage of the leg its side information (tensors only)."""

    code: Tree
    side: tuple[Side, ...]


class Belief(NamedTuple):
    """The attacker's guess on its way through a chain: mean, and variance ({} means zero)."""

    mean: Tree
    var: Tree


@dataclass(frozen=True)
class Bound:
    """‖·‖_p ≤ value. `value` is None while it depends on shapes; `adjacency` is set for sensitivities."""

    p: Literal[1, 2]
    value: float | None
    adjacency: Literal["", "add-or-remove-one", "replace-one"] = ""


@dataclass(frozen=True)
class Facts:
    """What is known of the values at one point of a chain, without looking at the data.

    Attributes:
        bound: norm bound on one row.
        sensitivity: how far the value moves between neighbouring data sets.
        unbiased: the expectation over the channel's own randomness is the value its linear stages give.
        width: bits of one sent coordinate, side information not counted.
        event: the privacy event (`dp_accounting.DpEvent`) of releasing the value, or None.
        law: distribution of the noise the attacker has to read through.
        exact: the attacker's reading is the exact likelihood (given side information).
        peak: L2 sensitivity of the maxima over the last axis, where it is known to be less than `sensitivity`: that of
            a vote's winning counts.
    """

    bound: Bound | None = None
    sensitivity: Bound | None = None
    unbiased: bool = True
    width: float = 32.0
    event: Any = None
    law: Law = "none"
    exact: bool = True
    peak: float | None = None

    def reset(self) -> Facts:
        """What is left in front of a stage that says nothing: no bound and no sensitivity."""
        return replace(self, bound=None, sensitivity=None, peak=None)


def _keep(before: Facts, reset: Facts, like: Tree | None) -> Facts:
    return reset


def _same(like: Tree) -> Tree:
    return like


def _unchanged(knobs: Any, y: Tree, side: Side, like: Tree) -> Tree:
    return y


def _stateless(like: Tree, gen: Generator | None) -> Any:
    return ()


@dataclass(frozen=True)
class Shrink:
    """A value stage that multiplies a row by a factor of its norm alone, so that clipping and summing can be one pass.

    Attributes:
        p: which norm, L1 or L2.
        scope: "all" (of the whole row) or "tensor" (of every tensor by itself).
        factor: `factor(knobs, norm) -> factor` of the same shape; with scope "tensor" the last axis is the row's tensors.
    """

    p: Literal[1, 2]
    scope: Literal["all", "tensor"]
    factor: Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """One step of a channel as pure functions on one row. See docs/design.md for the grammar.

    Attributes:
        name: the factory's name, e.g. ``uniform``.
        spec: the call that makes it again, e.g. ``uniform(levels=256)``.
        kind: "value" (dense to dense), "select" (keeps some coordinates), "code" (numbers to codes)
            or "join" (sums the leading row axis).
        send: `send(knobs, x, noise, state) -> (y, side, state)`; never draws.
        receive: `receive(knobs, y, side, like) -> x` (select and code stages).
        push: `push(knobs, belief, side | None) -> belief`; `side` only in the leg the attacker sees.
        fold: `fold(before, reset, like | None) -> facts`; `reset` is `before` without bound and
            sensitivity, so that keeping one is explicit.
        read: `read(knobs, code, side, belief, law) -> tree` of negative log-likelihoods (code stages).
        cell: `cell(knobs, code, side, like) -> (lo, hi)`, widened outward (code stages); a select
            stage takes the kept coordinates' `(lo, hi)` in place of `code`.
        dropped: `dropped(side, belief, kept, law) -> tree`: what a select stage's silence says, given
            the kept coordinates' `(lo, hi)`.
        clear: `clear(knobs, side, mean) -> tree` of squared residuals: side information in clear as
            equations on the guess, zero at the truth.
        moments: `moments(knobs, code, side, like) -> (at, var)`: the code as a Gaussian of the number in
            front of it, for codes drawn by a coin.
        cost: `cost(knobs, before, after) -> bits` of this stage's side information, from the `like` it
            gets and the `like` it sends.
        shape: the `like` of what `send` returns.
        lift: `lift(knobs, x, like) -> x`, for a value stage that changes the shape: back from what it sends to `like`.
            It is applied once, by who receives: joins, noise and codes behind the stage work in the small space.
        init: `init(like, generator) -> state`; () if stateless.
        knobs: numbers that may become lanes.
        noise: which draw `send` needs, of the shape of its input.
        draws: the `like` of that draw, where it is another than the input's.
        bind: `bind(facts in front) -> stage`: settles knobs that follow from a sensitivity, once, when
            the chain is built.
        shrink: set where `send` does no more than multiply a row by a factor of its norm.
    """

    name: str
    kind: Literal["value", "select", "code", "join"]
    send: Callable[..., tuple[Tree, Side, Any]]
    push: Callable[..., Belief]
    receive: Callable[..., Tree] = _unchanged
    fold: Callable[[Facts, Facts, Tree | None], Facts] = _keep
    read: Callable[..., Tree] | None = None
    cell: Callable[..., tuple[Tree, Tree]] | None = None
    dropped: Callable[..., Tree] | None = None
    cost: Callable[..., float] | None = None
    shape: Callable[[Tree], Tree] = _same
    lift: Callable[..., Tree] | None = None
    clear: Callable[..., Tree] | None = None
    moments: Callable[..., tuple[Tree, Tree]] | None = None
    init: Callable[[Tree, Generator | None], Any] = _stateless
    knobs: Mapping[str, float] = field(default_factory=dict)
    noise: Literal["uniform", "normal", "laplace"] | None = None
    draws: Callable[[Tree], Tree] = _same
    bind: Callable[[Facts], Stage] | None = None
    shrink: Shrink | None = None
    spec: str = ""

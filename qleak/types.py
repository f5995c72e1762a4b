"""The nouns of qleak: what flows from a client through a channel to a server and to an attacker.

Shapes are written in one vocabulary: `lane b c h w` for images, `class` for logits, `d` for a
flattened tree, `row` for what a join sums over (examples, clients, teachers). No logic lives here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Generator, Tensor

Tree = dict[str, Tensor]
Params = Tree
Buffers = Tree
Grads = Tree
Side = dict[str, Tree]
Law = Literal["none", "gauss", "laplace", "mixed"]


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer of a sequential net.

    Attributes:
        name: prefix of its parameters (`name.weight`, `name.bias`); empty without parameters.
        kind: "conv", "linear", "activation" or "flatten".
        options: what the kind needs (`in`, `out`, `kernel`, `stride`, `padding`, `function`).
    """

    name: str
    kind: Literal["conv", "linear", "activation", "flatten"]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A network as two pure functions.

    Attributes:
        init: `init(generator) -> (params, buffers)`.
        apply: `apply(params, buffers, x: [b c h w]) -> logits [b class]`; never writes a buffer.
        shape: `(c, h, w)` of one image.
        classes: number of classes.
        layers: the same net as a list of layers, for attacks that solve it; None when unknown.
        spec: the call that makes it again, e.g. ``lenet(classes=10)``.
        statistics: `statistics(params, buffers, x: [b c h w]) -> tree` of what every batch norm sees of a batch:
            `{layer}.mean` and `{layer}.var` (biased), `[channel]` each, in forward order; None without batch norm.
            `buffers` hold the running ones as `{layer}.running_mean` and `{layer}.running_var`, where it keeps any.
    """

    init: Callable[[Generator], tuple[Params, Buffers]]
    apply: Callable[[Params, Buffers, Tensor], Tensor]
    shape: tuple[int, int, int]
    classes: int
    layers: tuple[Layer, ...] | None = None
    spec: str = ""
    statistics: Callable[[Params, Buffers, Tensor], Tree] | None = None


@dataclass(frozen=True)
class Dataset:
    """Images `[n c h w]` in [0, 1], float32, with labels `[n]`.

    Attributes:
        facts: further per-example columns (`gender`, `hair`, …), each `[n]`.
    """

    x: Tensor
    y: Tensor
    name: str
    classes: int
    facts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """What a client computes before the channel.

    Attributes:
        update: `update(model, params, buffers, x [b c h w], y [b]) -> tree`, with `rows` leading axes.
        respond: `respond(slope, params, x [b c h w], target [b class]) -> tree`: the same as a pure function of
            images and label probabilities that an attacker can differentiate; `slope(params, x, target) -> grads`
            is the gradient of the mean loss over the images it gets.
        rows: number of leading row axes of the update (0: one gradient; 1: one per example or client).
        count: length of that axis.
        batch: number of images in one update.
        steps: gradient steps behind one row.
        part: images of one gradient step.
        scale: update/`scale` is a mean gradient: exact for one step, averaged along the path for several.
    """

    update: Callable[[Model, Params, Buffers, Tensor, Tensor], Tree]
    respond: Callable[[Callable[[Params, Tensor, Tensor], Tree], Params, Tensor, Tensor], Tree]
    rows: int
    batch: int
    count: int = 1
    steps: int = 1
    part: int = 1
    scale: float = 1.0
    spec: str = ""


# --- channels -------------------------------------------------------------------------------------


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
    """

    bound: Bound | None = None
    sensitivity: Bound | None = None
    unbiased: bool = True
    width: float = 32.0
    event: Any = None
    law: Law = "none"
    exact: bool = True


def _keep(before: Facts, reset: Facts, like: Tree | None) -> Facts:
    return reset


def _same(like: Tree) -> Tree:
    return like


def _unchanged(knobs: Any, y: Tree, side: Side, like: Tree) -> Tree:
    return y


def _stateless(like: Tree, gen: Generator | None) -> Any:
    return ()


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
        init: `init(like, generator) -> state`; () if stateless.
        knobs: numbers that may become lanes.
        noise: which draw `send` needs, of the shape of its input.
        bind: `bind(facts in front) -> stage`: settles knobs that follow from a sensitivity, once, when
            the chain is built.
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
    clear: Callable[..., Tree] | None = None
    moments: Callable[..., tuple[Tree, Tree]] | None = None
    init: Callable[[Tree, Generator | None], Any] = _stateless
    knobs: Mapping[str, float] = field(default_factory=dict)
    noise: Literal["uniform", "normal", "laplace"] | None = None
    bind: Callable[[Facts], Stage] | None = None
    spec: str = ""


# --- attacks --------------------------------------------------------------------------------------


class Guess(NamedTuple):
    """What an attack hands in, for every lane: images `[lane b c h w]`, labels `[lane b]`, own loss `[lane]`.

    `path` holds the guesses it chose among without the truth, `[lane point b c h w]`, where it keeps them.
    """

    x: Tensor
    labels: Tensor
    loss: Tensor
    path: Tensor | None = None


class Info(NamedTuple):
    """Diagnostics of one step, never needed for the next one: loss `[lane]`, status `[lane]` (see `Status`)."""

    loss: Tensor
    status: Tensor


class Status:
    """Codes of `Info.status`."""

    ACTIVE, CONVERGED, DIVERGED, FINISHED = range(4)
    NAMES = ("active", "converged", "diverged", "finished")


@dataclass(frozen=True)
class Optimizer:
    """A batched optimizer in optax's manner; every tensor of its state has `lane` as first axis.

    Attributes:
        init: `init(x [lane d]) -> state`.
        update: `update(state, x, loss [lane], grad [lane d]) -> (x, state)`: `loss` and `grad` were
            measured at `x`; one closure per lane and call, accepted or not.
        restart: `restart(state, lanes [lane] bool) -> state`: the objective of those lanes has changed,
            so their last loss is no yardstick for the next one.
    """

    init: Callable[[Tensor], Any]
    update: Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Any]]
    restart: Callable[[Any, Tensor], Any]
    spec: str = ""


@dataclass(frozen=True)
class Attack:
    """An attack as pure functions over lanes.

    Attributes:
        draw: `draw(generator, view) -> start`: everything random of one lane, as data.
        init: `init(view, start [lane …]) -> state`.
        step: `step(view, state) -> (state, info)`; one closure per lane.
        read: `read(view, state) -> guess`.
        steps: the largest number of steps.
        applies: a sentence why the attack cannot be used on this view, or "" if it can.
        papers: references.
        prior: the attack has an image prior, so its prior-only control means something.
        restarts: its start is random, so that restarts differ; a plan makes one lane a victim otherwise.
    """

    draw: Callable[[Generator, Any], Tree]
    init: Callable[[Any, Tree], Any]
    step: Callable[[Any, Any], tuple[Any, Info]]
    read: Callable[[Any, Any], Guess]
    steps: int
    applies: Callable[[Any], str]
    papers: tuple[str, ...] = ()
    prior: bool = False
    restarts: bool = True
    spec: str = ""

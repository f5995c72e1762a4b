"""The nouns of a client: its model, its data, and what it computes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Generator, Tensor

from qleak.types.trees import Buffers, Params, Tree


@dataclass(frozen=True)
class Layer:
    """One layer of a sequential net.

    Attributes:
        name: prefix of its parameters (`name.weight`, `name.bias`); empty without parameters.
        kind: "conv", "linear", "activation", "flatten", "pool" or "norm".
        options: what the kind needs (`in`, `out`, `kernel`, `stride`, `padding`, `function`, `groups`, `eps`).
    """

    name: str
    kind: Literal["conv", "linear", "activation", "flatten", "pool", "norm"]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Owner:
    """A layer that owns parameters, in a net opened for per-example gradients.

    Attributes:
        name: its name in the net.
        kind: "conv", "linear", or a norm: "group", "layer" or "batch" (by the running mean and variance among the buffers).
        options: `weight`, `bias` (names of its parameters, "" without) and `out`, the shape of its output without the
            batch axis; `stride` and `padding`, or `eps`, `groups`, `shape`.
    """

    name: str
    kind: Literal["conv", "linear", "group", "layer", "batch"]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tapped:
    """A net opened at the layers that own its parameters, each of which is used once.

    Attributes:
        layers: those layers, in forward order.
        run: `run(params, buffers, x, taps) -> (logits, inputs)`: `taps[layer.name] [b out]` is added to that layer's
            output, `inputs[layer.name]` is what it was given.
    """

    layers: tuple[Owner, ...]
    run: Callable[[Params, Buffers, Tensor, Tree], tuple[Tensor, Tree]]


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
        masks: `masks(generator, b) -> tree` of `mask/…: [b …]`: the dropout of one batch, which `apply` uses where it is
            among the buffers (without it nothing is dropped); None without dropout.
        tapped: the same net opened at its layers, for per-example gradients in one backward pass; None where a
            parameter is used other than once by a layer that is known.
        couples: why the logits of one image depend on other images of its batch (batch norm by the batch); "" where they
            do not.
        remade: `remade(mode) -> model`: the same net with batch norms by the batch ("train") or by running statistics
            among the buffers ("eval", blank where the net keeps none; "explicit": differentiable in them, too); None
            without batch norm.
        public: `public() -> images [k c h w]` that are no client's and part of every forward pass; None without.
    """

    init: Callable[[Generator], tuple[Params, Buffers]]
    apply: Callable[[Params, Buffers, Tensor], Tensor]
    shape: tuple[int, int, int]
    classes: int
    layers: tuple[Layer, ...] | None = None
    spec: str = ""
    statistics: Callable[[Params, Buffers, Tensor], Tree] | None = None
    masks: Callable[[Generator, int], Tree] | None = None
    tapped: Tapped | None = None
    couples: str = ""
    remade: Callable[[str], Model] | None = None
    public: Callable[[], Tensor] | None = None


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


def _drawless(gen: Generator, model: Model, count: int, lr: float) -> Tree:
    return {}


def _prepared(
    model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, draws: Tree
) -> tuple[Params, Tensor]:
    return params, x


@dataclass(frozen=True)
class Client:
    """What a client computes before the channel.

    Attributes:
        update: `update(model, params, buffers, x [b c h w], y [b], draws = {}) -> tree`, with `rows` leading axes:
            `prepare`, then `respond`.
        respond: `respond(slope, params, x [b c h w], target [b class], masks = {}) -> tree`: the same as a pure function
            of images and label probabilities that an attacker can differentiate; `slope(params, x, target, masks)` is
            the gradient of the mean loss over the images it gets.
        rows: number of leading row axes of the update (0: one gradient; 1: one per example or client).
        count: length of that axis.
        batch: number of images in one update.
        steps: gradient steps behind one row.
        part: images of one gradient step.
        scale: update/`scale` is a mean gradient: exact for one step, averaged along the path for several.
        draw: `draw(generator, model, b, lr) -> draws`: everything random of one update, as data; `lr` is the server's.
        prepare: `prepare(model, params, buffers, x, y, draws) -> (params, x)`: what the client makes of weights and
            images before it computes gradients (adversarial images, noisy weights).
        unsound: why what this client does earns no guarantee, whatever its channel adds; "" where nothing is wrong.
        claimed: the noise multiplier that a publication counts of this client as if its noise were on what is released;
            0 for none.
    """

    update: Callable[..., Tree]
    respond: Callable[..., Tree]
    rows: int
    batch: int
    count: int = 1
    steps: int = 1
    part: int = 1
    scale: float = 1.0
    draw: Callable[[Generator, Model, int, float], Tree] = _drawless
    prepare: Callable[[Model, Params, Buffers, Tensor, Tensor, Tree], tuple[Params, Tensor]] = _prepared
    unsound: str = ""
    claimed: float = 0.0
    spec: str = ""

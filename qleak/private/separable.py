"""Whether one example's gradient is a function of that example alone: what every per-example clip rests on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from qleak import random, tree
from qleak.check import Expected
from qleak.client import loss, one_hot
from qleak.client.losses import MASK
from qleak.types import Buffers, Model, Params, Tree

Losses = Callable[[Model, Params, Buffers, Tensor, Tensor], Tensor]
TRIED = 4  # examples: each in turn meets other neighbours
MOVED = 1e-4  # of a gradient's norm: far above rounding in float32, far below any dependence on a batch


def losses(model: Model, params: Params, buffers: Buffers, x: Tensor, target: Tensor) -> Tensor:
    """Each example's cross-entropy `[b]`, from one forward pass of the batch."""

    def of_one(logits: Tensor, target: Tensor) -> Tensor:
        return loss(replace(model, apply=lambda params, buffers, x: logits[None]), params, buffers, x, target[None])

    return vmap(of_one)(model.apply(params, buffers, x), target)


def jacobian(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, losses: Losses = losses) -> Tree:
    """∂ℓ_b/∂θ of every example's loss in one batched forward pass, `[b …]`: the rows that joint training clips."""
    target = one_hot(y, model.classes, x.dtype)
    values, pull, *_ = vjp(lambda params: losses(model, params, buffers, x, target), params)
    return vmap(lambda row: pull(row)[0])(torch.eye(len(x), dtype=values.dtype, device=values.device))


def check(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, losses: Losses = losses) -> None:
    """Every example but one is replaced, and that one's row of the batch Jacobian must not move; four are tried.

    Args:
        model: the net.
        params: weights, such as those a training starts from.
        buffers: its buffers; those below `mask/` have one entry an example.
        x: at least two images `[b c h w]`, of which the first four are used.
        y: their labels `[b]`.
        losses: `losses(model, params, buffers, x, target) -> [b]`; cross-entropy by default.

    Raises:
        Expected: an example's gradient depends on the examples beside it, with the cause where it is known.
    """
    if len(x) < 2:
        raise Expected(f"Expected at least 2 images to tell their gradients apart, got {len(x)}.")
    x, y = x[:TRIED], y[:TRIED]
    held = {k: v[:TRIED] if k.startswith(MASK) else v for k, v in buffers.items()}
    before = jacobian(model, params, held, x, y, losses)
    for i in range(len(x)):
        mine = (torch.arange(len(x), device=x.device) == i).view(-1, 1, 1, 1)
        others = random.uniform(random.generator("separable", i), x.shape).to(x.device, x.dtype)
        labels = torch.where(mine.flatten(), y, (y + 1) % model.classes)
        after = jacobian(model, params, held, torch.where(mine, x, others), labels, losses)
        was, now = tree.at(before, i), tree.at(after, i)
        moved, size = float(tree.norm(tree.sub(now, was))), float(tree.norm(was))
        if not moved <= MOVED * max(size, 1e-12):
            raise Expected(
                f"Expected each example's gradient to be its own, that of example {i} moves by {moved / max(size, 1e-12):.2g} of "
                f"its norm with the examples beside it: {_cause(model, params, held, x)}"
            )


def _cause(model: Model, params: Params, buffers: Buffers, x: Tensor) -> str:
    """Batch norm by the batch, where the running statistics say nothing to the logits; otherwise unknown."""
    if model.statistics is not None:
        other = {k: v + 1 if k.endswith(("running_mean", "running_var")) else v for k, v in buffers.items()}
        if torch.equal(model.apply(params, other, x), model.apply(params, buffers, x)):
            return (
                "batch norm takes its statistics from the batch. Take norm='group', mode='eval', "
                "or statistics of public images."
            )
    return "the model or the loss mixes examples (an index into the batch, a mean over it)."


def alone(model: Model) -> bool:
    """Whether the logits of a batch are those of each image alone, at fresh weights and made-up images, in float64.

    Then a batch's backward pass gives each example's own gradient. A model that is open must give them by its opened
    form, too. Known after the first call.
    """
    tapped = model.tapped
    outs = tuple((layer.name, tuple(layer.options["out"])) for layer in tapped.layers) if tapped else ()
    return _alone(model.init, model.apply, tapped.run if tapped else None, outs, model.shape)


@functools.lru_cache(maxsize=64)
def _alone(
    init: Callable[..., Any],
    apply: Callable[..., Tensor],
    run: Callable[..., Any] | None,
    outs: tuple[tuple[str, tuple[int, ...]], ...],
    shape: tuple[int, int, int],
) -> bool:
    params, buffers = (tree.to(t, torch.float64) for t in init(random.generator("separable", "weights")))
    x = random.uniform(random.generator("separable", "images"), (TRIED - 1, *shape)).double()
    taps = {name: x.new_zeros(len(x), *out) for name, out in outs}
    with torch.no_grad():
        try:
            together = run(params, buffers, x, taps)[0] if run else apply(params, buffers, x)
            apart = torch.cat([apply(params, buffers, x[i : i + 1]) for i in range(len(x))])
        except (RuntimeError, Expected):  # no float64, or a norm that needs more than one value
            return False
    return torch.allclose(together, apart, rtol=1e-8, atol=1e-10)

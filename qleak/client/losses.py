"""The losses a client differentiates, and their gradients as functions of what is private."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from qleak.types import Buffers, Model, Params, Tree

Slope = Callable[..., Tree]
MASK = "mask/"  # buffers whose names begin so have one entry an image: dropout masks


def loss(model: Model, params: Params, buffers: Buffers, x: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy −(1/b)Σ target·log softmax(logits) of `x [b c h w]` for probabilities `target [b class]`."""
    return -(target * F.log_softmax(model.apply(params, buffers, x), dim=-1)).sum(-1).mean()


def linear_loss(model: Model, params: Params, buffers: Buffers, x: Tensor, error: Tensor) -> Tensor:
    """⟨error, logits⟩: its gradient in θ is the backpropagation of an output error `[b class]` that is known.

    At the client's batch, with error = (softmax − target)/b, it has the same gradient as `loss`.
    """
    return (error * model.apply(params, buffers, x)).sum()


LOSSES = {"labels": loss, "errors": linear_loss}


def slope(model: Model, buffers: Buffers, given: str = "labels") -> Slope:
    """`(params, x, target, masks = {}) -> ∇_θ` of a loss of `LOSSES`; `masks` are buffers of this very batch."""

    def at(params: Params, x: Tensor, target: Tensor, masks: Tree | None = None) -> Tree:
        held = buffers | masks if masks else buffers
        return grad(lambda p: LOSSES[given](model, p, held, x, target))(params)

    return at


def one_hot(y: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels `[…]` as probabilities `[… class]`."""
    same = y[..., None] == torch.arange(classes, device=y.device)  # F.one_hot looks at values: not under vmap
    return same.to(dtype)

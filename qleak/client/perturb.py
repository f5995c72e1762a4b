"""Images moved within a small ball so that a net errs: the primitives that training and measuring share. Nothing draws.

White-box, untargeted, on the cross-entropy; pixels stay in [0, 1]. Images are `[b c h w]`, labels `[b]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from qleak import random, tree
from qleak.types import Buffers, Model, Params, Tree

KEY, SCALE = "weight_noise/key", "weight_noise/scale"


def image_slope(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor) -> Tensor:
    """∇ₓ Σ_j CE_j, which is each image's own where the model does not couple them: `[b c h w]`."""

    def total(x: Tensor) -> Tensor:
        return F.cross_entropy(model.apply(params, buffers, x), y, reduction="sum")

    return grad(total)(x.detach()).detach()


def steepest(g: Tensor, norm: str) -> Tensor:
    """The step of length 1 that raises a linear function of slope `g [b c h w]` most: sign(g), or g/‖g‖₂."""
    if norm == "linf":
        return g.sign()
    return g / length(g).clamp(min=torch.finfo(g.dtype).tiny)


def project(moved: Tensor, x: Tensor, epsilon: float, norm: str) -> Tensor:
    """`moved` brought back into the ball of radius `epsilon` around `x`, and into [0, 1]."""
    delta = moved - x
    if norm == "linf":
        return (x + delta.clamp(-epsilon, epsilon)).clamp(0, 1)
    return (x + delta * (epsilon / length(delta).clamp(min=1e-30)).clamp(max=1)).clamp(0, 1)


def length(x: Tensor) -> Tensor:
    """‖x_j‖₂ of each image, `[b 1 1 1]`."""
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def noisy(params: Params, draws: Tree, step: int) -> Params:
    """θ + s·ξ_step with unit normal ξ, where `draws` hold a key and a scale s; θ itself where they do not.

    One ξ for the whole batch. A pure function of key and step, so that noise of every inner step need not be drawn first.
    """
    if KEY not in draws:
        return params
    flat, unravel = tree.ravel(params)
    at = torch.full((1,), step, dtype=torch.int64, device=flat.device)
    unit = random.counted(draws[KEY].reshape(1), at, flat.numel())[0].to(flat.dtype)
    return unravel(flat + draws[SCALE].to(flat.dtype) * unit)

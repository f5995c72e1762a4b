"""Image priors: how plausible a guess is before any gradient is looked at."""

from __future__ import annotations

import torch
from torch import Tensor


def total_variation(x: Tensor, soft: float = 1e-3) -> Tensor:
    """Mean over pixels of √(Δ² + soft²) − soft, horizontally plus vertically (anisotropic).

    The soft corner keeps the gradient Lipschitz, which L-BFGS needs. Rudin, Osher, Fatemi (1992);
    as a prior of gradient inversion: Geiping et al. (2020). `[b c h w] -> []`.
    """
    return sum(((d.square() + soft**2).sqrt() - soft).mean() for d in differences(x)) + x.new_zeros(())


def value_and_slope(x: Tensor, weight: Tensor, walls: float, soft: float = 1e-3) -> tuple[Tensor, Tensor]:
    """weight·TV + walls·box of every lane, and its gradient, written out: `x [lane b c h w]`, `weight [lane]`."""
    off = x - x.clamp(0, 1)
    count = x[0].numel()
    value = walls * off.square().flatten(1).sum(1) / count
    slope = off.mul_(2 * walls / count)
    for axis in (-1, -2):
        side = x.shape[axis]
        if side == 1:
            continue
        d = x.narrow(axis, 1, side - 1) - x.narrow(axis, 0, side - 1)
        length = torch.addcmul(d.new_tensor(soft**2), d, d).sqrt_()
        value = value + weight * (length.flatten(1).mean(1) - soft)
        pull = d.div_(length).mul_((weight / d[0].numel()).view(-1, 1, 1, 1, 1))
        slope.narrow(axis, 1, side - 1).add_(pull)
        slope.narrow(axis, 0, side - 1).sub_(pull)
    return value, slope


def differences(x: Tensor) -> list[Tensor]:
    """Δx and Δy between neighbouring pixels, without a direction of one pixel. `[… h w]`."""
    both = (x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :])
    return [d for d in both if d.numel()]


def box(x: Tensor) -> Tensor:
    """Mean squared distance to [0, 1]: pixels have a range. `[b c h w] -> []`."""
    return (torch.relu(-x).square() + torch.relu(x - 1).square()).mean()

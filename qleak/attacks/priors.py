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


def differences(x: Tensor) -> list[Tensor]:
    """Δx and Δy between neighbouring pixels, without a direction of one pixel. `[… h w]`."""
    both = (x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :])
    return [d for d in both if d.numel()]


def box(x: Tensor) -> Tensor:
    """Mean squared distance to [0, 1]: pixels have a range. `[b c h w] -> []`."""
    return (torch.relu(-x).square() + torch.relu(x - 1).square()).mean()

"""First and second derivatives of the activations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SLOPES = ("sigmoid", "tanh", "relu", "leaky_relu", "softplus", "silu", "gelu")


def slope(function: str, z: Tensor, a: Tensor) -> Tensor:
    """act′(z), given z and a = act(z); differentiable."""
    match function:
        case "sigmoid":
            return torch.addcmul(a, a, a, value=-1)
        case "tanh":
            return 1 - a.square()
        case "relu":
            return (z > 0).to(z.dtype)
        case "leaky_relu":
            return torch.where(z > 0, torch.ones_like(z), torch.full_like(z, 0.01))
        case "softplus":
            return torch.sigmoid(z)
        case "silu":
            s = torch.sigmoid(z)
            return s + a * (1 - s)
        case "gelu":
            return torch.special.ndtr(z) + z * _density(z)
        case _:
            raise KeyError(function)


def curvature(function: str, z: Tensor, a: Tensor, slope: Tensor) -> Tensor | None:
    """act″(z), given act′(z) too; None where it is zero (almost) everywhere."""
    match function:
        case "sigmoid":
            return torch.addcmul(slope, slope, a, value=-2)
        case "tanh":
            return -2 * a * slope
        case "softplus":
            return torch.addcmul(slope, slope, slope, value=-1)
        case "silu":
            s = torch.sigmoid(z)
            return s * (1 - s) * (2 + z * (1 - 2 * s))
        case "gelu":
            return _density(z) * (2 - z.square())
        case _:
            return None


def _density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)

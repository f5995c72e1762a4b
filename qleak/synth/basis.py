"""Directions in which teachers' rows are sent: of the noised covariance of the records, or random."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qleak import random
from qleak.check import positive

SENSITIVITY = math.sqrt(2)  # ‖xxᵀ − x′x′ᵀ‖_F² = 2 − 2⟨x, x′⟩² for unit vectors


def pca(x: Tensor, dim: int, sigma: float, seed: int) -> Tensor:
    """Top eigenvectors `[d dim]` of Σ x xᵀ + noise over the records `x [n …]`, each of length 1: one Gaussian release.

    The symmetric matrix is released as its upper triangle, entries off the diagonal times √2, so that this vector's L2 norm
    is the matrix's Frobenius norm and replacing one record moves it by at most √2. Every entry of the vector gets
    N(0, σ²). (Analyze Gauss, Dwork, Talwar, Thakurta, Zhang 2014. The published DataLens code charges sensitivity 1, which
    holds where a record is added or removed, and half of its cost.)

    Raises:
        Expected: σ is not positive.
    """
    positive(sigma=sigma)
    rows = x.flatten(1).double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    d = rows.shape[1]
    noise = random.normal(random.generator(seed, "pca"), (d, d)).double().triu().to(x.device)
    upper = noise.triu(1) / math.sqrt(2)
    noisy = rows.T @ rows + sigma * (noise.diagonal().diag() + upper + upper.T)
    return torch.linalg.eigh(noisy).eigenvectors.flip(1)[:, :dim].to(x.dtype)


def gaussian(d: int, dim: int, seed: int) -> Tensor:
    """`[d dim]` of N(0, 1/dim): E‖Pᵀx‖² = ‖x‖². Public."""
    return random.normal(random.generator(seed, "projection"), (d, dim)) / math.sqrt(dim)

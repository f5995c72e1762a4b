"""Noisy sums of images, their second moments and their cells: queries of bounded sensitivity, and what follows for free.

Adjacency is replace-one throughout: one record's image and label both become anything else. Sums are in float64, so that
what a record adds is what the proofs say. Every query is a sum over records of a row that depends on this record, and on
what was released before.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor

from qleak import random

COUNT = 1 / 8  # length of a record's count beside its image, in units of the clip


def clip(x: Tensor, bound: float) -> Tensor:
    """Rows of `x [n d]` scaled down to L2 norm <= `bound`; float64."""
    wide = x.double()
    return wide * (bound / wide.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)


def sums(x: Tensor, cell: Tensor, cells: int, bound: float, count: float = COUNT) -> Tensor:
    """`[cell d+1]`: sums of clipped rows `x [n d]` by cell, and counts in units of `count` · `bound`.

    A record is the row v = e_cell ⊗ (x̄, aC) with ‖x̄‖ ≤ C and a = `count`: `sum_reach` bounds what replacing one does.
    """
    who = F.one_hot(cell, cells).double()
    return torch.cat([who.T @ clip(x, bound), count * bound * who.sum(0)[:, None]], 1)


def sum_reach(bound: float, count: float = COUNT, signed: bool = False) -> float:
    """L2 sensitivity of `sums`, attained.

    Rows of two cells are orthogonal: ‖v − v'‖² = ‖v‖² + ‖v'‖² ≤ 2C²(1 + a²). Within a cell the counts cancel, and
    ‖x̄ − x̄'‖² = ‖x̄‖² + ‖x̄'‖² − 2 x̄·x̄' ≤ 2C² where entries are never negative (pixels), ≤ 4C² where they may be: then
    counts of a = 1 come free.
    """
    return max(math.sqrt(2 * (1 + count**2)), 2 if signed else 0) * bound


def split_sums(noisy: Tensor, bound: float, count: float = COUNT) -> tuple[Tensor, Tensor]:
    """(means `[cell d]`, counts `[cell]`, at least 1) of noisy `sums`."""
    counts = (noisy[:, -1] / (count * bound)).clamp(min=1)
    return noisy[:, :-1] / counts[:, None], counts


def second(x: Tensor, cell: Tensor, cells: int, bound: float) -> Tensor:
    """`[cell d d]`: sums of x̄x̄ᵀ of clipped rows `x [n d]` by cell; its sensitivity is `second_reach`."""
    rows = clip(x, bound)
    return torch.stack([rows[cell == c].T @ rows[cell == c] for c in range(cells)])


def second_reach(bound: float) -> float:
    """L2 (Frobenius) sensitivity √2·C² of `second`, attained by orthogonal rows, or by two cells.

    Within a cell ‖uuᵀ − vvᵀ‖² = ‖u‖⁴ + ‖v‖⁴ − 2(u·v)² ≤ 2C⁴, between two ‖u‖⁴ + ‖v‖⁴ ≤ 2C⁴.
    """
    return math.sqrt(2) * bound**2


def symmetric(gen: Generator, shape: tuple[int, ...]) -> Tensor:
    """Symmetric noise `[… d d]`: N(0, 1) on the diagonal, N(0, ½) beside it.

    That is N(0, I) on (diagonal, √2 · upper triangle), in which the L2 norm is the Frobenius norm of symmetric matrices.
    """
    draws = random.normal(gen, shape)
    upper = draws.triu(1) / math.sqrt(2)
    return upper + upper.transpose(-1, -2) + torch.diag_embed(draws.diagonal(dim1=-2, dim2=-1))


def cosines(height: int, width: int, keep: int) -> Tensor:
    """The lowest `keep` × `keep` frequencies of the discrete cosine transform as orthonormal rows `[k hw]`; public."""
    return torch.kron(_cosines(height, keep), _cosines(width, keep))


def _cosines(n: int, keep: int) -> Tensor:
    at, wave = torch.arange(n, dtype=torch.float64) + 0.5, torch.arange(min(keep, n), dtype=torch.float64)
    rows = torch.cos(math.pi / n * wave[:, None] * at)
    return rows / rows.norm(dim=1, keepdim=True)


def principal(moment: Tensor, rank: int) -> Tensor:
    """Eigenvectors `[rank d]` of the largest eigenvalues of a symmetric matrix, largest first."""
    return torch.linalg.eigh(moment).eigenvectors.T.flip(0)[:rank]


def shrunk(moments: Tensor, counts: Tensor, noise: float) -> Tensor:
    """Noisy `[class r r]` moments, sums divided by `counts [class]`, drawn to a common diagonal where noise is the larger.

    In the pooled eigenbasis the classes' weighted mean is nearly diagonal: P = diag(λ). Of an entry's deviation D_ij from
    P, the share κλᵢλⱼ / (κλᵢλⱼ + vᵢⱼ) stays: Wiener's rule for a deviation of variance κλᵢλⱼ behind noise of variance v
    (`noise`² on a sum's diagonal, half of it beside). κ ≥ 0 of each class is what the moments themselves say:
    Σ(D² − v)/Σλᵢλⱼ. So the few large directions keep a class's own shape, and the many small ones share theirs.
    """
    pooled = torch.einsum("c,cii->i", counts / counts.sum(), moments).clamp(min=0)
    apart = moments - pooled.diag()
    prior = pooled[:, None] * pooled
    variance = (1 + torch.eye(len(pooled), dtype=moments.dtype, device=moments.device)) / 2
    return pooled.diag() + wiener(apart, prior, variance * ((noise / counts) ** 2)[:, None, None])


def wiener(x: Tensor, prior: Tensor, variance: Tensor) -> Tensor:
    """`x [a …]` times κ·prior/(κ·prior + variance), κ of each row `a` by moments: max(0, Σ(x² − variance)/Σ prior)."""
    inner = tuple(range(1, x.ndim))
    scale = (x.square() - variance).sum(inner, keepdim=True) / prior.sum().clamp(min=1e-30)
    signal = scale.clamp(min=0) * prior
    return x * signal / (signal + variance).clamp(min=1e-30)


def root(covariance: Tensor) -> Tensor:
    """F `[… r r]` with FFᵀ = the nearest positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]


def nearest_centre(z: Tensor, y: Tensor, centres: Tensor) -> Tensor:
    """The cell y·K + k of each `z [n r]`: the nearest of its own class's `centres [class K r]`."""
    found = torch.zeros_like(y)
    for c in range(len(centres)):
        mine = y == c
        found[mine] = torch.cdist(z[mine], centres[c].to(z)).argmin(1)
    return y * centres.shape[1] + found


def starts(factor: Tensor, count: int, gen: Generator, draws: int = 3000, rounds: int = 10) -> Tensor:
    """Centres `[class K r]` by k-means on draws of N(0, FFᵀ), `factor [class r r]`: nothing of the records but F is used."""
    classes, rank = factor.shape[:2]
    z = torch.einsum("cij,cnj->cni", factor, random.normal(gen, (classes, draws, rank)).to(factor))
    flat, y = rearrange(z, "c n r -> (c n) r"), torch.arange(classes).repeat_interleave(draws)
    centres = z[:, :count]
    for _ in range(rounds):
        cell = nearest_centre(flat, y, centres)
        total = torch.zeros(classes * count, rank, dtype=z.dtype).index_add_(0, cell, flat)
        size = torch.bincount(cell, minlength=classes * count)[:, None]
        centres = torch.where(size > 0, total / size.clamp(min=1), centres.flatten(0, 1)).view_as(centres)
    return centres

"""Weight gradients of linear layers that are never written down ("ghosts": Goodfellow 2015; Li et al. 2022).

Of b images the gradient of a matrix `[out in]` is U = δᵀh, with δ `[b out]` and h `[b in]`. Its distance from a message
G is wanted at every step, so G is split once: G = A B + R, A `[out b]` orthonormal, B = AᵀG, and R what b images cannot
explain, with AᵀR = 0; for an exact gradient that is rounding, and is left out. With T = Aᵀδᵀ and
δ⊥ = δ − TᵀAᵀ,

U − G = A C + δ⊥ᵀ h − R, C = T h − B,   ‖U − G‖² = ‖C‖² + ⟨δ⊥δ⊥ᵀ, hhᵀ⟩ − 2⟨δ⊥, hRᵀ⟩ + ‖R‖².

‖U‖² − 2⟨U, G⟩ + ‖G‖² would be the same, but the difference of large numbers: near the solution it is negative in float32.
Here no term cancels another as long as R is small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """G = A B + R: `a [lane b out]` is Aᵀ, `b [lane b in]`, `rest [lane out in]`, `size [lane]` ‖R‖².

    Where R is rounding, `rest` is `[lane 0 0]`.
    """

    a: Tensor
    b: Tensor
    rest: Tensor
    size: Tensor


class LowRank(NamedTuple):
    """V = w·(leftᵀ·right − R): `left [lane 2b out]`, `right [lane 2b in]`; `through [lane b out]` is hRᵀ."""

    left: Tensor
    right: Tensor
    rest: Tensor | None
    through: Tensor | None
    weight: Tensor | None = None

    def push(self, h: Tensor) -> Tensor:
        """The product h Vᵀ `[lane b out]`, for the h that V was made with."""
        found = torch.bmm(torch.bmm(h, self.right.mT), self.left)
        return self._weighed(found if self.through is None else found.sub_(self.through))

    def pull(self, delta: Tensor) -> Tensor:
        """δ V `[lane b in]`."""
        found = torch.bmm(torch.bmm(delta, self.left.mT), self.right)
        return self._weighed(found if self.rest is None else found.sub_(torch.bmm(delta, self.rest)))

    def _weighed(self, rows: Tensor) -> Tensor:
        return rows if self.weight is None else rows * self.weight


def pays(g: Tensor, b: int) -> bool:
    """Whether the factors of `[lane out in]` are fewer numbers, four times over."""
    return g.ndim == 3 and 8 * b * (g.shape[1] + g.shape[2]) <= g.shape[1] * g.shape[2]


def split(g: Tensor, b: int) -> Split:
    """The best A of b columns: the first left singular vectors of `g [lane out in]`, by the smaller Gram matrix in float64."""
    wide = g.double()
    if g.shape[1] <= g.shape[2]:
        a = torch.linalg.eigh(wide @ wide.mT).eigenvectors[..., -b:]
    else:
        a = torch.linalg.qr(wide @ torch.linalg.eigh(wide.mT @ wide).eigenvectors[..., -b:]).Q
    right = a.mT @ wide
    rest = wide - a @ right
    size = rest.square().sum((1, 2))
    rounding = 4 * torch.finfo(g.dtype).eps * torch.linalg.matrix_norm(wide)
    exact = bool((size <= rounding.square()).all())
    rest = g.new_zeros(len(g), 0, 0) if exact else rest.to(g.dtype)
    return Split(a.mT.to(g.dtype).contiguous(), right.to(g.dtype), rest, size.to(g.dtype))


def difference(parts: Split, delta: Tensor, h: Tensor) -> tuple[Tensor, LowRank]:
    """‖δᵀh − G‖² `[lane]` and δᵀh − G, for `delta [lane b out]` and `h [lane b in]`."""
    share = torch.bmm(delta, parts.a.mT)  # Tᵀ: image, column
    off = torch.baddbmm(delta, share, parts.a, alpha=-1)
    short = torch.baddbmm(parts.b, share.mT, h, beta=-1)
    value = short.square().sum((1, 2)) + (torch.bmm(off, off.mT) * torch.bmm(h, h.mT)).sum((1, 2)) + parts.size
    left, right = torch.cat([parts.a, off], 1), torch.cat([short, h], 1)
    if not parts.rest.numel():
        return value, LowRank(left, right, None, None)
    through = torch.bmm(h, parts.rest.mT)
    return value - 2 * (off * through).sum((1, 2)), LowRank(left, right, parts.rest, through)

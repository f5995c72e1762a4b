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

from qleak import native


class Split(NamedTuple):
    """G = A B + R: `a [lane b out]` is Aᵀ, `b [lane b in]`, `rest [lane out in]`, `size [lane]` ‖R‖².

    Where R is rounding, `rest` is `[lane 0 0]`.
    """

    a: Tensor
    b: Tensor
    rest: Tensor
    size: Tensor


class Cell(NamedTuple):
    """lo ≤ U ≤ hi, `[lane out in]` each."""

    lo: Tensor
    hi: Tensor


class Ghost(NamedTuple):
    """A direction V that is known by its products alone: `push [lane b out]` is hVᵀ, `pull [lane b in]` is δV."""

    push: Tensor
    pull: Tensor

    def times(self, weight: Tensor) -> Ghost:
        """w·V, one `weight [lane 1 1]` a lane."""
        return Ghost(self.push * weight, self.pull * weight)


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


def difference(parts: Split, delta: Tensor, h: Tensor, scale: float = 1.0) -> tuple[Tensor, Ghost]:
    """‖V‖² `[lane]` and V = scale·δᵀh − G, for `delta [lane b out]` and `h [lane b in]`."""
    error = delta if scale == 1 else delta * scale
    share = torch.bmm(error, parts.a.mT)  # Tᵀ: image, column
    off = torch.baddbmm(error, share, parts.a, alpha=-1)
    short = torch.baddbmm(parts.b, share.mT, h, beta=-1)
    value = short.square().sum((1, 2)) + (torch.bmm(off, off.mT) * torch.bmm(h, h.mT)).sum((1, 2)) + parts.size
    left, right = torch.cat([parts.a, off], 1), torch.cat([short, h], 1)
    push = torch.bmm(torch.bmm(h, right.mT), left)
    pull = torch.bmm(torch.bmm(delta, left.mT), right)
    if parts.rest.numel():
        through, back = _sides(parts.rest, delta, h)
        value = value - 2 * (off * through).sum((1, 2))
        push, pull = push - through, pull - back
    return value, Ghost(push, pull)


def outside(cell: Cell, delta: Tensor, h: Tensor, scale: float = 1.0) -> tuple[Tensor, Ghost]:
    """‖V‖² and V = U − proj U for the cell, U = scale·δᵀh: lane by lane, so that a matrix is made, used and forgotten in cache."""
    if native.serves(h):
        value, push, pull = native.outside(cell.lo, cell.hi, delta, h, scale)
        return value, Ghost(push, pull)
    values, pushed, pulled = [], [], []
    made, kept = torch.empty_like(cell.lo[0]), torch.empty_like(cell.lo[0])
    for i in range(len(h)):
        torch.mm(delta[i].mT, h[i], out=made)
        if scale != 1:
            made.mul_(scale)
        made.sub_(torch.clamp(made, cell.lo[i], cell.hi[i], out=kept))
        values.append(torch.linalg.vector_norm(made).square())
        pushed.append(h[i] @ made.mT)
        pulled.append(delta[i] @ made)
    return torch.stack(values), Ghost(torch.stack(pushed), torch.stack(pulled))


def _sides(rest: Tensor, delta: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(hRᵀ, δR)."""
    if native.serves(h):
        return native.sides(rest, delta, h)
    return torch.bmm(h, rest.mT), torch.bmm(delta, rest)


def large(cell: Cell) -> bool:
    """Whether a lane's matrix is worth a look of its own: on a CPU, from some tens of kilobytes on."""
    return cell.lo.ndim == 3 and cell.lo[0].numel() >= 2**14 and not cell.lo.is_cuda

"""What a gradient does not see at all: rank and spectrum of J, with labels and other images as nuisances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qleak import tree
from qleak.bounds import jacobian as jacobians
from qleak.bounds.jacobian import Jacobian
from qleak.check import between, whole
from qleak.client import slope
from qleak.types import Buffers, Client, Model, Params

BLIND = 1e-6
"""Singular values below this share of the largest count as nothing: what a float64 Gram matrix can tell, and about
what float32 gradients can."""


class Spectrum(NamedTuple):
    """Singular values of J `[n]`, falling; how many directions the update sees, does not see, and how unevenly.

    `condition` is the largest over the smallest singular value that is seen; noise of σ in the update is noise of
    σ/s in the image along a direction of singular value s, for an attacker without a prior.
    """

    values: Tensor
    rank: int
    unseen: int
    condition: float


def spectrum(jac: Jacobian) -> Spectrum:
    """Rank and spectrum of a Jacobian, by the eigenvalues of JᵀJ in float64."""
    return of_gram(jacobians.gram(jac, dict.fromkeys(jac.value, torch.ones((), dtype=torch.float64))))


def of_gram(matrix: Tensor) -> Spectrum:
    """The same from JᵀJ `[n n]`."""
    values = torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt().flip(0)
    top = float(values[0]) if len(values) else 0.0
    rank = int((values > BLIND * top).sum()) if top else 0
    return Spectrum(values, rank, len(values) - rank, top / float(values[rank - 1]) if rank else float("inf"))


def label_unknown(
    client: Client, model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, memory: float = 1e9
) -> Tensor:
    """JᵀJ `[n n]` of images `x [b c h w]` that is left when the label probabilities are free, too.

    The update is a function of x and of soft labels t `[b class]`, Σt = 1. With K = ∂g/∂t along that plane, what g says
    of x alone is the Schur complement JᵀJ − JᵀK(KᵀK)⁺KᵀJ: never more than for labels that are known.
    """
    params, buffers = tree.cast(params, torch.float64), tree.cast(buffers, torch.float64)
    x = x.double()
    jac = jacobians.jacobian(client, model, params, buffers, x, y, memory=memory)
    ones = dict.fromkeys(jac.value, torch.ones((), dtype=torch.float64))
    hot = (y[:, None] == torch.arange(model.classes)).double()

    def moved(direction: Tensor) -> dict[str, Tensor]:
        by_label = lambda t: client.respond(slope(model, buffers), params, x, t)  # noqa: E731
        return torch.func.jvp(by_label, (hot,), (direction,))[1]

    plane = []
    for i in range(len(y)):
        for c in range(model.classes):
            if c != int(y[i]):
                step = torch.zeros_like(hot)
                step[i, c], step[i, y[i]] = 1.0, -1.0
                plane.append(moved(step))
    seen = torch.stack([jacobians.pull(jac, ones, k) for k in plane])
    flat = torch.stack([torch.cat([v.flatten() for v in k.values()]) for k in plane])
    return jacobians.gram(jac, ones) - seen.T @ torch.linalg.pinv(flat @ flat.T, hermitian=True, rtol=1e-12) @ seen


def others_unknown(matrix: Tensor, pixels: int, image: int) -> Tensor:
    """F of one image of a batch, `[pixels pixels]`, the others unknown as well: the Schur complement in F `[n n]`.

    Raises:
        Expected: an image that the batch does not have.
    """
    whole(image=image, pixels=pixels)
    between(0, len(matrix) // pixels - 1, image=image)
    mine = torch.zeros(len(matrix), dtype=torch.bool)
    mine[image * pixels : (image + 1) * pixels] = True
    if bool(mine.all()):
        return matrix
    cross, rest = matrix[mine][:, ~mine], matrix[~mine][:, ~mine]
    return matrix[mine][:, mine] - cross @ torch.linalg.pinv(rest, hermitian=True, rtol=1e-12) @ cross.T

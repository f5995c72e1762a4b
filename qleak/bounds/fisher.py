"""Fisher information of a message about the pixels of its images: F = JᵀWJ, with what shortens a row in front."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jacrev

from qleak import tree
from qleak.bounds import jacobian as jacobians
from qleak.bounds.information import ALL, Information
from qleak.bounds.jacobian import Jacobian
from qleak.types import Buffers, Client, Model, Params, Tree


class Fisher(NamedTuple):
    """F `[n n]`, and gradients `[m n]` of numbers that are known without noise."""

    matrix: Tensor
    exact: Tensor


def fisher(jac: Jacobian, info: Information) -> Fisher:
    """F of a message at the image where `jac` was taken (with `info.front` inside it, where there is one).

    A stage that multiplies a row by a factor s of its norm alone has the Jacobian sJ + g(∇s)ᵀ, so

        F = s²JᵀWJ + s(JᵀWg ∇sᵀ + ∇s gᵀWJ) + (gᵀWg) ∇s∇sᵀ

    with one factor for each tensor, or one for all.
    """
    weights = {k: info.weights[k if k in info.weights else ALL] for k in jac.value}
    exact = jacobians.select(jac, info.known)
    if info.shrink is None:
        return Fisher(jacobians.gram(jac, weights), exact)
    factor, slopes = _factors(jac, info)
    scaled = {k: w.double() * factor[k].square() for k, w in weights.items()}
    matrix = jacobians.gram(jac, scaled)
    for k, slope in slopes.items():
        g = {n: v.double() * (n == k) for n, v in jac.value.items()}
        along = factor[k] * jacobians.pull(jac, weights, g)
        size = (weights[k].double() * g[k].square()).sum()
        matrix += torch.outer(along, slope) + torch.outer(slope, along) + size * torch.outer(slope, slope)
    return Fisher(matrix, exact)


def of_image(
    client: Client, model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, info: Information,
    memory: float = 1e9, block: int = 64,
) -> Fisher:  # fmt: skip
    """F at images `x [b c h w]` with labels `y [b]`: their Jacobian and F in one."""
    jac = jacobians.jacobian(client, model, params, buffers, x, y, info.front, memory, block)
    return fisher(jac, info)


def _factors(jac: Jacobian, info: Information) -> tuple[Tree, Tree]:
    """Each tensor's factor (0-dim), and its gradient in the pixels `[n]` where it has one.

    ∂s/∂x = (∂s/∂g)ᵀJ, and ∂s/∂g is a multiple of g (or of its signs), tensor by tensor.
    """
    assert info.shrink is not None
    stage = info.shrink
    knobs = {k: torch.tensor(v, dtype=torch.float64) for k, v in stage.knobs.items()}
    value = tree.cast(jac.value, torch.float64)
    # The factor is read off the stage itself: what it makes of a row, at each tensor's largest entry.
    at = {k: int(v.abs().argmax()) for k, v in value.items() if v.numel() and bool((v != 0).any())}

    def factors(g: Tree) -> Tree:
        sent = stage.send(knobs, g, {}, ())[0]
        return {k: sent[k].reshape(-1)[i] / g[k].reshape(-1)[i] for k, i in at.items()}

    one = torch.ones((), dtype=torch.float64)
    found = dict.fromkeys(value, one) | factors(value)
    slopes = {}
    for k in at:
        moved = jacrev(lambda g, k=k: factors(g)[k])(value)
        if any(bool((v != 0).any()) for v in moved.values()):
            slopes[k] = jacobians.pull(jac, dict.fromkeys(value, one), moved)
    return found, slopes

"""Attacks on a trained net by name, for the robust accuracy that a training reports: `pgd(epsilon=0.03, steps=20)`, `apgd()`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.check import at_least, one_of, positive, whole
from qleak.train import adversarial
from qleak.train.autopgd import LOSSES
from qleak.types import Buffers, Model, Params


@dataclass(frozen=True)
class Evasion:
    """`stands(model, params, buffers, x [n c h w], y [n], seed) -> [n]`: which images are still classified rightly."""

    stands: Callable[[Model, Params, Buffers, Tensor, Tensor, int], Tensor]
    spec: str = ""


@factory
def pgd(
    epsilon: float = 0.03, steps: int = 20, step_size: float = 0.01, norm: str = "linf", restarts: int = 1
) -> Evasion:
    """Projected gradient ascent from random starts (Madry et al. 2018); see `qleak.train.adversarial.pgd`.

    Args:
        epsilon: radius, in pixel units.
        steps: gradient steps of a start.
        step_size: length of one.
        norm: "linf" or "l2".
        restarts: random starts; an image has to stand all of them.
    """
    whole(steps=steps, restarts=restarts)
    at_least(1, steps=steps, restarts=restarts)
    at_least(0, epsilon=epsilon)
    positive(step_size=step_size)

    def stands(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, seed: int) -> Tensor:
        return adversarial.robust(
            model, params, buffers, x, y, "pgd", epsilon, steps, step_size, norm, restarts, seed
        )  # fmt: skip

    return Evasion(stands)


@factory
def fgsm(epsilon: float = 0.03, norm: str = "linf") -> Evasion:
    """One step along the sign of the slope (Goodfellow, Shlens, Szegedy 2015): the weakest of them.

    Args:
        epsilon: radius, in pixel units.
        norm: "linf" or "l2".
    """
    at_least(0, epsilon=epsilon)
    one_of(adversarial.NORMS, norm=norm)

    def stands(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, seed: int) -> Tensor:
        return adversarial.robust(model, params, buffers, x, y, "fgsm", epsilon, norm=norm, seed=seed)

    return Evasion(stands)


@factory
def apgd(epsilon: float = 0.03, steps: int = 100, restarts: int = 1, loss: str = "ce") -> Evasion:
    """PGD that finds its step sizes by itself (Croce & Hein 2020); see `qleak.train.autopgd`. L∞.

    Args:
        epsilon: radius, in pixel units.
        steps: gradient steps of a start.
        restarts: random starts; an image has to stand all of them.
        loss: "ce" (cross-entropy), or "dlr" (difference of logits ratio, from three classes on).
    """
    whole(steps=steps, restarts=restarts)
    at_least(1, steps=steps, restarts=restarts)
    at_least(0, epsilon=epsilon)
    one_of(LOSSES, loss=loss)

    def stands(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, seed: int) -> Tensor:
        name = "apgd-dlr" if loss == "dlr" else "apgd"
        return adversarial.robust(model, params, buffers, x, y, name, epsilon, steps, restarts=restarts, seed=seed)

    return Evasion(stands)


@factory
def ensemble(epsilon: float = 0.03, steps: int = 100, restarts: int = 5) -> Evasion:
    """APGD on the cross-entropy, APGD on the difference of logits, then PGD with restarts: an image stands if it stands all.

    After Croce & Hein 2020, without the targeted and the black-box attacks of theirs: an upper bound on what stands, and
    looser than AutoAttack's.

    Args:
        epsilon: radius of the L∞ ball, in pixel units.
        steps: gradient steps of a start.
        restarts: random starts of the PGD (steps of ε/4).
    """
    whole(steps=steps, restarts=restarts)
    at_least(1, steps=steps, restarts=restarts)
    positive(epsilon=epsilon)
    members = (
        apgd(epsilon, steps),
        apgd(epsilon, steps, loss="dlr"),
        pgd(epsilon, steps, epsilon / 4, restarts=restarts),
    )

    def stands(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, seed: int) -> Tensor:
        left = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for member in members:
            mine = left.nonzero()[:, 0] if not model.couples else torch.arange(len(x), device=x.device)
            if len(mine):
                left[mine] &= member.stands(model, params, buffers, x[mine], y[mine], seed)
        return left

    return Evasion(stands)

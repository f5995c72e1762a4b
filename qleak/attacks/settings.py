"""What distinguishes one matching attack from another, and where its images start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from qleak import random
from qleak.types import Optimizer


def patterned(side: int) -> random.Draw:
    """One `side`×`side` patch of standard normals, tiled over the image (Wei et al. 2020 start from such patterns)."""

    def draw(gen: Generator, shape: Sequence[int]) -> Tensor:
        *lead, h, w = shape
        patch = random.normal(gen, (*lead, side, side))
        return patch.repeat(*(1 for _ in lead), -(-h // side), -(-w // side))[..., :h, :w]

    return draw


STARTS: dict[str, random.Draw] = {
    "normal": random.normal,
    "uniform": random.uniform,
    "dark": lambda gen, shape: 0.1 * random.uniform(gen, shape),
    "solved": lambda gen, shape: 0.1 * random.uniform(gen, shape),  # where there is nothing to solve
    "zeros": lambda gen, shape: torch.zeros(tuple(shape)),
    "patterned4": patterned(4),
    "patterned16": patterned(16),
}

DRAWN = tuple(name for name in STARTS if name != "solved")
"""The starts that look at no message."""


@dataclass(frozen=True)
class Settings:
    """What distinguishes one matching attack from another.

    Attributes:
        objective: see `qleak.attacks.objectives`.
        labels: "joint" optimises soft labels with the image, "inferred" reads them off first, "errors"
            optimises the output error from its decoded value (see `cells`), "auto" does so where a code
            has more than two bits and infers labels elsewhere.
        rule: how labels are inferred, see `qleak.attacks.labels`.
        slack: unit in which output errors move, in parts of their decoded norm.
        weights: prior weight of each stage; one stage of weight 0 means no prior.
        fade: factor between stages, for a last stage on a channel that is not exact.
        steps: closures of each stage.
        factor: factor on the evidence.
        relative: divide the evidence by that of an update of zero, so that weights mean the same on every net.
        box: weight of the penalty on pixels outside [0, 1], times the prior weight or 1.
        clamp: put pixels back into [0, 1] after every update.
        penalties: further terms and their weights, see `qleak.attacks.penalties`.
        langevin: standard deviation of normal noise on the gradient, in parts of the step length.
        group: starts that are attacked together and kept near their mean by the penalty "consistency".
        patience: closures without 1 % improvement after which a lane counts as converged; 0 never.
        tolerance: a lane whose loss changes by less than this for 20 closures on end has converged; 0 never.
        gain: a stage that lowers the evidence by less than this share is the last one; see `stages.pick`.
        path: go on to the weakest prior in any case, so that the choice can be compared with the others.
    """

    objective: str
    optimizer: Optimizer
    labels: str = "inferred"
    slack: float = 1.0
    weights: tuple[float, ...] = (0.0,)
    fade: float = 0.1
    steps: tuple[int, ...] = (6000,)
    relative: bool = False
    box: float = 0.0
    start: str = "normal"
    patience: int = 0
    tolerance: float = 0.0
    gain: float = 0.0
    path: bool = False
    route: str = "auto"
    rule: str = "auto"
    factor: float = 1.0
    clamp: bool = False
    penalties: tuple[tuple[str, float], ...] = ()
    langevin: float = 0.0
    group: int = 1

    @property
    def has_prior(self) -> bool:
        """Whether anything but the message shapes the image."""
        return any(self.weights) or bool(self.penalties)

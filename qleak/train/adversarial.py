"""Images changed within a small ball so that a net errs: FGSM and PGD, for measuring robust accuracy.

Attacks are white-box, untargeted, on the cross-entropy; pixels stay in [0, 1]. Nothing here draws:
random starts come in as data.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from qleak import random
from qleak.check import Expected, at_least, one_of, positive, whole
from qleak.client.perturb import image_slope as slope
from qleak.client.perturb import length, project, steepest
from qleak.train.autopgd import apgd
from qleak.train.measure import correct
from qleak.types import Buffers, Model, Params

NORMS = ("linf", "l2")
ATTACKS = ("fgsm", "pgd", "apgd", "apgd-dlr")


def fgsm(
    model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, epsilon: float = 0.1, norm: str = "linf"
) -> Tensor:
    """Goodfellow, Shlens, Szegedy 2015: x + ε·sign ∇ₓ loss, clipped to [0, 1]; along ∇ₓ itself for norm="l2"."""
    _checked(epsilon, norm)
    return project(x + epsilon * steepest(slope(model, params, buffers, x, y), norm), x, epsilon, norm)


def pgd(
    model: Model,
    params: Params,
    buffers: Buffers,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    epsilon: float = 0.1,
    steps: int = 20,
    step_size: float | None = None,
    norm: str = "linf",
) -> Tensor:
    """Projected gradient ascent on the loss (Madry et al. 2018): x ← Π(x + α·steepest(∇ₓ loss)), from x + `start`.

    Args:
        model: the net.
        params: its weights.
        buffers: its buffers.
        x: images `[b c h w]` in [0, 1].
        y: true labels `[b]`.
        start: displacement of the first iterate, `[b c h w]`; see `starts`.
        epsilon: radius of the ball, in pixel units.
        steps: gradient steps.
        step_size: α; 2.5·ε/steps when not given.
        norm: "linf" or "l2".

    Returns:
        The first iterate that is classified wrongly, of each image; the last one where none is. Of a model that couples
        images the last one: all are changed together, and only the batch as a whole can be judged.
    """
    _checked(epsilon, norm)
    whole(steps=steps)
    at_least(1, steps=steps)
    if step_size is not None:
        positive(step_size=step_size)
    rate = 2.5 * epsilon / steps if step_size is None else step_size
    found = project(x + start, x, epsilon, norm)
    left = torch.arange(len(x), device=x.device)  # images that still stand
    for step in range(steps + 1):
        if len(left) and not model.couples:
            left = left[correct(model, params, buffers, found[left], y[left])]
        if not len(left) or step == steps:
            break
        here = found[left]
        moved = here + rate * steepest(slope(model, params, buffers, here, y[left]), norm)
        found[left] = project(moved, x[left], epsilon, norm)
    return found


def starts(generator: Generator, x: Tensor, epsilon: float, norm: str = "linf") -> Tensor:
    """A displacement uniform in the ball of radius `epsilon`, for each image of `x [b c h w]`."""
    if norm == "linf":
        return ((2 * random.uniform(generator, x.shape) - 1) * epsilon).to(x.device, x.dtype)
    direction = random.normal(generator, x.shape)
    radius = random.uniform(generator, (len(x), 1, 1, 1)) ** (1 / x[0].numel())
    return (direction / length(direction) * radius * epsilon).to(x.device, x.dtype)


def robust(
    model: Model,
    params: Params,
    buffers: Buffers,
    x: Tensor,
    y: Tensor,
    attack: str = "pgd",
    epsilon: float = 0.1,
    steps: int = 20,
    step_size: float | None = None,
    norm: str = "linf",
    restarts: int = 1,
    seed: int = 0,
    batch: int = 500,
) -> Tensor:
    """Which images are still classified rightly under attack: `[n]` booleans.

    An image counts only if it is right as it is, and in every restart: the attacker picks the best.

    Raises:
        Expected: an argument out of range.
    """
    one_of(ATTACKS, attack=attack)
    whole(restarts=restarts, seed=seed)
    at_least(1, restarts=restarts)
    _checked(epsilon, norm)
    if attack.startswith("apgd") and norm != "linf":
        raise Expected(f"Expected norm='linf' with attack={attack!r}, got {norm!r}.")
    stands = correct(model, params, buffers, x, y)
    for restart in range(1 if attack == "fgsm" else restarts):
        for i, rows in enumerate(torch.arange(len(x), device=x.device).split(batch)):
            start = starts(random.generator(seed, "pgd", restart, i), x[rows], epsilon, norm)
            kept = stands[rows] | bool(model.couples)  # coupled images are attacked together, or not at all
            rows, start = rows[kept], start[kept]
            if not len(rows):
                continue
            given = (model, params, buffers, x[rows], y[rows])
            if attack == "fgsm":
                changed = fgsm(*given, epsilon, norm)
            elif attack == "pgd":
                changed = pgd(*given, start, epsilon, steps, step_size, norm)
            else:
                changed = apgd(*given, start, epsilon, steps, "dlr" if attack == "apgd-dlr" else "ce")
            stands[rows] &= correct(model, params, buffers, changed, y[rows])
    return stands


def _checked(epsilon: float, norm: str) -> None:
    at_least(0, epsilon=epsilon)
    one_of(NORMS, norm=norm)
    if epsilon > 1 and norm == "linf":
        raise Expected(f"Expected epsilon={epsilon:g} in [0, 1], in units of the pixel range (8/255 is 0.0314).")

"""Auto-PGD: PGD whose step halves where progress stops, so that only the number of steps is chosen.

Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks" (ICML 2020),
Algorithm 1. A step goes along z = Π(x + η·sign g) with momentum, x ← Π(x + ¾(z − x) + ¼(x − x_before)), from η = 2ε. At
checkpoints η is halved, and the search goes back to the best image so far, where fewer than ¾ of the steps since
the last one raised the loss, or where η stayed and the best loss did, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from qleak.check import at_least, one_of, whole
from qleak.client.perturb import project
from qleak.train.measure import correct
from qleak.types import Buffers, Model, Params

MOMENTUM, PROGRESS = 0.75, 0.75


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log softmax(logits)_y of each image, `[b]`."""
    return F.cross_entropy(logits, y, reduction="none")


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, −(z_y − max_{i≠y} z_i)/(z_(1) − z_(3)), `[b]`: blind to the scale of the logits.

    z_(1) ≥ z_(2) ≥ … are the sorted logits; at least three classes (section 4.2 of the paper).
    """
    top = logits.sort(dim=1, descending=True).values
    mine = logits.gather(1, y[:, None])[:, 0]
    other = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf).amax(1)
    return -(mine - other) / (top[:, 0] - top[:, 2]).clamp(min=1e-12)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "dlr": dlr}


def checkpoints(steps: int) -> list[int]:
    """Steps ⌈p_j·steps⌉ at which η is looked at: p = 0, 0.22, then p_(j+1) = p_j + max(p_j − p_(j−1) − 0.03, 0.06)."""
    before, here, found = 0.0, 0.22, [0]
    while here <= 1:
        found.append(math.ceil(here * steps - 1e-9))
        before, here = here, here + max(here - before - 0.03, 0.06)
    return sorted({w for w in found if w < steps})


def apgd(
    model: Model,
    params: Params,
    buffers: Buffers,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    epsilon: float = 0.03,
    steps: int = 100,
    loss: str = "ce",
) -> Tensor:
    """The image of highest loss on the way of each image's search in the L∞ ball, or the first that is classified wrongly.

    Args:
        model: the net; one that couples images is attacked as the batch it is given, to the last step.
        params: its weights.
        buffers: its buffers.
        x: images `[b c h w]` in [0, 1].
        y: true labels `[b]`.
        start: displacement of the first iterate, `[b c h w]`.
        epsilon: radius, in pixel units.
        steps: gradient steps.
        loss: "ce" or "dlr".

    Raises:
        Expected: an argument out of range; "dlr" with fewer than three classes.
    """
    whole(steps=steps)
    at_least(1, steps=steps)
    one_of(LOSSES, loss=loss)
    at_least(3 if loss == "dlr" else 1, classes=model.classes)
    found = project(x + start, x, epsilon, "linf")
    if model.couples:
        return _search(model, params, buffers, x, y, found, epsilon, steps, loss)
    left = correct(model, params, buffers, found, y).nonzero()[:, 0]
    if len(left):
        found[left] = _search(model, params, buffers, x[left], y[left], found[left], epsilon, steps, loss)
    return found


def _search(
    model: Model,
    params: Params,
    buffers: Buffers,
    x: Tensor,
    y: Tensor,
    here: Tensor,
    epsilon: float,
    steps: int,
    loss: str,
) -> Tensor:
    def value(moved: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits = model.apply(params, buffers, moved)
        each = LOSSES[loss](logits, y)
        return each.sum(), (each, logits)

    def look(moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(slope, loss, still classified rightly) at `moved`."""
        g, (each, logits) = grad(value, has_aux=True)(moved)
        right = (logits.argmax(1) == y) & logits.isfinite().all(1)
        return g.detach(), each.detach().nan_to_num(-torch.inf), right

    wide = (slice(None), None, None, None)
    marks = checkpoints(steps)
    g, f, right = look(here)
    best, top, slope = here, f, g
    before, lost = here, ~right  # what has been found is kept, whatever its loss
    broken = here
    rate = torch.full_like(f, 2 * epsilon)
    rose, halved, top_then = torch.zeros_like(f), torch.zeros_like(lost), top
    for k in range(1, steps + 1):
        z = project(here + rate[wide] * g.sign(), x, epsilon, "linf")
        share = 1.0 if k == 1 else MOMENTUM
        moved = project(here + share * (z - here) + (1 - share) * (here - before), x, epsilon, "linf")
        was = f
        before, here = here, moved
        g, f, right = look(here)
        broken = torch.where((~right & ~lost)[wide], here, broken)
        lost = lost | ~right
        rose = rose + (f > was)
        better = f > top
        best, slope = torch.where(better[wide], here, best), torch.where(better[wide], g, slope)
        top = torch.where(better, f, top)
        if k in marks:
            since = k - marks[marks.index(k) - 1]
            halt = (rose < PROGRESS * since) | (~halved & (top <= top_then))
            rate = torch.where(halt, rate / 2, rate)
            here, g = torch.where(halt[wide], best, here), torch.where(halt[wide], slope, g)
            f = torch.where(halt, top, f)
            rose, halved, top_then = torch.zeros_like(f), halt, top
        if not model.couples and bool(lost.all()):
            break
    return best if model.couples else torch.where(lost[wide], broken, best)

"""Many discriminators at once: stacked parameters, one Adam state a teacher, streamed in chunks.

Teacher i's parameters and moments are row i of every tensor and are functions of its own records alone, so one
record can change one row: this is what the sensitivity of the vote stands on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import softplus

from qleak import random, tree
from qleak.types import Critic, Params, Public

BYTES = 256 * 2**20  # activations and gradients of one chunk of teachers
ACTIVATIONS = 64  # numbers kept for one pixel of one image, forth and back through a convolutional critic


class Moments(NamedTuple):
    """Adam's: steps taken (0-dim int64), first and second moments, `[slot …]` each; a slot is a teacher.

    Where the published defect is reproduced (`slots` < teachers) several teachers share a slot.
    """

    steps: Tensor
    first: Params
    second: Params


class Teachers(NamedTuple):
    """Parameters `[teacher …]` and their moments."""

    params: Params
    moments: Moments


def begin(critic: Critic, public: Public, sets: int, width: int, seed: int, shared: bool = False) -> Teachers:
    """`sets`·`width` teachers from `width` initial weights, repeated for every set as in the published code.

    Args:
        critic: the discriminator.
        public: shape of its images.
        sets: number of sets (`teachers_batch`).
        width: teachers of a set (`batch_teachers`).
        seed: of the weights.
        shared: one set of moments for all sets, the published defect; otherwise each teacher has its own.
    """
    first = tree.stack([critic.init(random.generator(seed, "critic", i), public) for i in range(width)])
    params = {k: v.repeat(sets, *[1] * (v.ndim - 1)) for k, v in first.items()}
    of = first if shared else params
    zeros = ({k: torch.zeros_like(v) for k, v in of.items()} for _ in range(2))
    return Teachers(params, Moments(torch.zeros((), dtype=torch.int64), *zeros))


def criterion(critic: Critic) -> Callable[[Params, Tensor, Tensor, Tensor], Tensor]:
    """`loss(params, real [b c h w], fake [b c h w], y [b class])` of one teacher; the fakes carry the real labels.

    mean sp(−D(x, y)) + mean sp(D(x̃, y)), sp = softplus (Goodfellow et al. 2014); with clipped weights
    mean D(x̃, y) − mean D(x, y) (Arjovsky et al. 2017).
    """

    def loss(params: Params, real: Tensor, fake: Tensor, y: Tensor) -> Tensor:
        on_real, on_fake = critic.apply(params, real, y), critic.apply(params, fake, y)
        if critic.clipped:
            return on_fake.mean() - on_real.mean()
        return softplus(-on_real).mean() + softplus(on_fake).mean()

    return loss


def direction(critic: Critic) -> Callable[[Tensor, Params, Tensor], Tensor]:
    """`v(x [b c h w], params, y [b class]) -> [b c h w]`: −∂/∂x mean sp(−D(x, y)), where a teacher wants images to go."""

    def wish(x: Tensor, params: Params, y: Tensor) -> Tensor:
        out = critic.apply(params, x, y)
        return out.mean() if critic.clipped else -softplus(-out).mean()

    return grad(wish)


def chunks(teachers: int, params: Params, batch: int, pixels: int) -> Iterator[slice]:
    """Slices of teachers whose gradients and activations fit `BYTES`, by a generous count of the latter."""
    each = 4 * (3 * sum(v[0].numel() for v in params.values()) + ACTIVATIONS * batch * pixels)
    size = max(1, BYTES // each)
    return (slice(at, min(at + size, teachers)) for at in range(0, teachers, size))


def adam(
    params: Params, moments: Moments, grads: Params, part: slice, slots: slice, lr: float, b1: float, clip: float
) -> None:
    """One step of Kingma, Ba 2015 (b2 = 0.999, ε = 1e-8) on the teachers of `part`, in place: the old state is used up."""
    steps = int(moments.steps)
    rate = lr / (1 - b1**steps)
    scale = (1 - 0.999**steps) ** 0.5
    for k, g in grads.items():
        m, s = moments.first[k][slots], moments.second[k][slots]
        m.mul_(b1).add_(g, alpha=1 - b1)
        s.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
        p = params[k][part]
        p.addcdiv_(m, (s.sqrt() / scale).add_(1e-8), value=-rate)
        if clip:
            p.clamp_(-clip, clip)


def train(
    critic: Critic,
    teachers: Teachers,
    part: slice,
    slots: slice,
    real: Tensor,
    fake: Tensor,
    y: Tensor,
    lr: float,
    b1: float,
) -> None:
    """One discriminator step of the teachers in `part`, in place; `real`, `fake [teacher b c h w]`, `y [teacher b class]`.

    `teachers.moments.steps` must already count this step.
    """  # fmt: skip
    grads = vmap(grad(criterion(critic)))(tree.at(teachers.params, part), real, fake, y)
    adam(teachers.params, teachers.moments, grads, part, slots, lr, b1, critic.clipped)


def wishes(critic: Critic, teachers: Teachers, part: slice, x: Tensor, y: Tensor) -> Tensor:
    """What the teachers in `part` send about the common images `x [b c h w]`, `y [b class]`: `[teacher b d]`."""
    found = vmap(direction(critic), in_dims=(None, 0, None))(x, tree.at(teachers.params, part), y)
    return found.flatten(2)

"""A generator that does not begin from noise: it first learns to make what another synthesizer releases."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad
from torch.nn.functional import one_hot

from qleak import random
from qleak.synth import makers
from qleak.synth.sets import public
from qleak.train.rules import adam
from qleak.types import Dataset, Maker, Params, Spend, Synthesizer

BATCH = 100


def start(
    teacher: Synthesizer, budget: Spend, maker: Maker, made: Params, data: Dataset, steps: int, rate: float, seed: int
) -> Params:
    """Spends `budget` on `teacher`, then fits G(z, y) to its samples: Adam on mean ‖G(z, y) − x‖², z drawn anew."""
    known = public(data)
    state = teacher.init(data, budget, random.key(seed, "warm"))
    for t in range(budget.steps):
        state = teacher.step(data, budget, state, t)
    released, rule = teacher.released(state), adam(b1=0.5)
    kept = rule.init(made)

    def loss(params: Params, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return (maker.apply(params, z, y) - x).square().mean()

    for i in range(steps):
        labels = (torch.arange(BATCH) % known.classes).to(data.x.device)
        x = teacher.sample(known, released, labels, random.key(seed, "warm sample", i))
        z = makers.noise(maker, BATCH, seed, "warm z", i).to(x.device)
        made, kept = rule.update(made, kept, grad(loss)(made, z, one_hot(labels, known.classes).to(x), x), rate)
    return made

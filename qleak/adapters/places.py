"""Places that both ends draw: `random_k` from 32 bits that travel in the payload."""

from __future__ import annotations

import torch

from qleak import random
from qleak.types import Stage, Tree


def noise(like: Tree, seed: int, j: int) -> Tree:
    """What stage j of the last leg draws for its places."""
    gen = random.generator("places", seed, j)
    return {k: random.uniform(gen, v.shape) for k, v in like.items()}


def index(stage: Stage, before: Tree, after: Tree, seed: int, j: int) -> Tree:
    """The places that `stage` keeps of that draw: its smallest numbers.

    Found by the k-th smallest, which costs a tenth of sorting; where that number is drawn twice, the stage itself says.
    """
    drawn, found = noise(before, seed, j), {}
    for k, v in drawn.items():
        count = after[k].numel()
        flat = v.reshape(-1)
        kept = (flat <= flat.kthvalue(count).values).nonzero()[:, 0] if count else flat[:0].to(torch.int64)
        if kept.numel() != count:
            return stage.send({}, {n: torch.zeros(v.shape) for n, v in before.items()}, drawn, ())[1]["index"]
        found[k] = kept
    return found

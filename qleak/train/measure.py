"""What a model is worth on a data set: loss and accuracy in one pass, and which images are right."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qleak.types import Buffers, Dataset, Model, Params


class Measure(NamedTuple):
    """Mean cross-entropy in nats (NaN where the model diverged), and the share of images classified right."""

    loss: float
    accuracy: float


def correct(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, batch: int = 1000) -> Tensor:
    """Whether the largest logit of each image is its label: `x [n c h w]`, `y [n]` -> `[n]` booleans.

    An image whose logits are not all finite counts as wrong.
    """
    with torch.no_grad():
        parts = []
        for some, label in zip(x.split(batch), y.split(batch), strict=True):
            logits = model.apply(params, buffers, some)
            parts.append((logits.argmax(1) == label) & logits.isfinite().all(1))
    return torch.cat(parts)


def measure(model: Model, params: Params, buffers: Buffers, data: Dataset, batch: int = 1000) -> Measure:
    """Loss and accuracy over `data`, in the dtype and on the device of the parameters.

    A model that has diverged answers with its first class (the largest of NaNs), which is chance.
    """
    some = next(iter(params.values()))
    losses, hits = [], []
    with torch.no_grad():
        for x, y in zip(data.x.split(batch), data.y.split(batch), strict=True):
            x, y = x.to(some.device, some.dtype), y.to(some.device)
            logits = model.apply(params, buffers, x)
            losses.append(F.cross_entropy(logits, y, reduction="sum").double())
            hits.append((logits.argmax(1) == y).sum())
    n = len(data.x)
    return Measure(float(torch.stack(losses).sum()) / n, int(torch.stack(hits).sum()) / n)

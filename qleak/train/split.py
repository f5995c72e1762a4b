"""Who holds which images: training and test sets, and the shards of a population of clients."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import torch
from torch import Generator, Tensor

from qleak import data, random
from qleak.check import Expected, positive
from qleak.data import take
from qleak.types import Dataset


def parse(split: str) -> float | None:
    """The concentration α of ``dirichlet(0.5)``, None for ``iid``.

    Raises:
        Expected: another text, or α <= 0.
    """
    if split == "iid":
        return None
    found = re.fullmatch(r"dirichlet\((?:alpha=)?([0-9.eE+-]+)\)", split.replace(" ", ""))
    try:
        alpha = float(found.group(1)) if found else 0.0
    except ValueError:
        found, alpha = None, 0.0
    if not found:
        raise Expected(f"Expected split={split!r} to be written iid or dirichlet(0.5).")
    positive(alpha=alpha)
    return alpha


def shards(split: str, y: Tensor, clients: int, generator: Generator) -> list[Tensor]:
    """The images of each client: `clients` index tensors that together hold every image of labels `y [n]` once.

    iid: a random permutation in equal parts (sizes differ by at most one). dirichlet(α): the images
    of each class are dealt out in proportions p ~ Dir(α, …, α) over clients (Hsu, Qi, Brown 2019);
    small α gives every client few classes. A client left with nothing gets one image of the largest shard.

    Raises:
        Expected: more clients than images, or a split that `parse` refuses.
    """
    alpha = parse(split)
    if clients > len(y):
        raise Expected(f"Expected clients={clients} <= {len(y)}, the number of training images.")
    order = random.permutation(generator, len(y))
    if alpha is None:
        return list(order.tensor_split(clients))
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for label in y.unique():
        mine = order[y[order] == label]
        cuts = (_dirichlet(generator, alpha, clients).cumsum(0) * len(mine)).round().to(torch.int64)
        for part, some in zip(parts, mine.tensor_split(cuts[:-1]), strict=True):
            part.append(some)
    dealt = [torch.cat(part) for part in parts]
    for i, part in enumerate(dealt):
        if not len(part):
            rich = max(range(clients), key=lambda k: len(dealt[k]))
            dealt[i], dealt[rich] = dealt[rich][-1:], dealt[rich][:-1]
    return dealt


def _dirichlet(generator: Generator, alpha: float, count: int) -> Tensor:
    """One draw of Dir(α, …, α), float64 `[count]`.

    Normalised Gamma(α) draws, in logarithms so that no α underflows:
    ln Γ(α) = ln Γ(α+1) + ln(u)/α in distribution, Γ(α+1) by its inverse distribution function.
    """
    from scipy.special import gammaincinv  # lazy: only where it is asked for

    u = random.uniform(generator, (2, count)).double().clamp(2**-25, 1 - 2**-25)
    logs = torch.from_numpy(np.log(gammaincinv(alpha + 1, u[0].numpy()))) + u[1].log() / alpha
    return logs.softmax(0)


def held_out(name: str) -> tuple[Dataset, Dataset, str]:
    """(training set, test set, in words) of a data set: its own splits, or every fifth image held out.

    Every fifth, and not the last fifth, because sets are often sorted by class.
    """
    train = data.load(name)
    try:
        return train, data.load(name, "test"), "its own test split"
    except Expected as error:
        if "split" not in str(error):
            raise
    fifth = torch.arange(len(train.x)) % 5 == 4
    return take(train, ~fifth), take(train, fifth), f"no test split: every fifth image of {name} held out"


def spread(some: Dataset, limit: int) -> Dataset:
    """`limit` images, evenly spread over the set (which may be sorted by class); all of them for 0."""
    if not 0 < limit < len(some.x):
        return some
    return take(some, torch.arange(limit) * len(some.x) // limit)


def cast(some: Dataset, dtype: torch.dtype, device: str) -> Dataset:
    """Images in `dtype` on `device`, labels there too."""
    return replace(some, x=some.x.to(device, dtype), y=some.y.to(device), facts={})

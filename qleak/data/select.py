"""Parts of a data set: minibatches, another label, and everything that some other set does not contain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Generator, Tensor

from qleak import random
from qleak.check import Expected, at_least, one_of, whole
from qleak.types import Dataset


def batches(data: Dataset, size: int, generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: minibatches x `[b c h w]`, y `[b]` of a random permutation; the last one may be short."""
    whole(size=size)
    at_least(1, size=size)
    order = random.permutation(generator, len(data.x))
    return ((data.x[rows], data.y[rows]) for rows in order.split(size))


def take(data: Dataset, rows: Tensor) -> Dataset:
    """The examples `rows`: indices, or a mask `[n]`."""
    return replace(data, x=data.x[rows], y=data.y[rows], facts={k: v[rows] for k, v in data.facts.items()})


def relabel(data: Dataset, fact: str, classes: int) -> Dataset:
    """`data` with the column `fact` as label, without the examples where it is −1: ``relabel(celeba, "hair", 3)``."""
    one_of(data.facts, fact=fact)
    column = data.facts[fact]
    if int(column.max()) >= classes:
        raise Expected(f"Expected classes={classes} > {int(column.max())}, the largest value of {fact!r}.")
    return take(replace(data, y=column, classes=classes), column >= 0)


def digests(x: Tensor) -> list[str]:
    """SHA-256 of the 8-bit pixels of every image `[n c h w]`: equal for equal pictures, whatever their source."""
    pixels = (x * 255).round().to(torch.uint8).flatten(1).contiguous().numpy()
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in pixels]


def without(data: Dataset, excluded: Iterable[str]) -> Dataset:
    """`data` without the images whose digest is in `excluded`, every copy of them included."""
    excluded = frozenset(excluded)
    return take(data, torch.tensor([digest not in excluded for digest in digests(data.x)], dtype=torch.bool))

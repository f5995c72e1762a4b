"""Which record belongs to which teacher: settled by a permutation of indices before a record is seen, never by a label."""

from __future__ import annotations

import torch
from torch import Tensor

from qleak import random
from qleak.check import Expected


def dealt(n: int, teachers: int, seed: int, shuffle: bool = True) -> Tensor:
    """Record indices `[teacher, ⌊n/teachers⌋]`, every record in at most one row; what is left over is not used.

    The map depends on n and the seed alone, so replacing one record (image and label) changes the data of one teacher.

    Args:
        n: number of records.
        teachers: number of rows.
        seed: of the permutation.
        shuffle: permute the indices first; otherwise rows are contiguous slices.

    Raises:
        Expected: fewer records than teachers.
    """
    if teachers > n:
        raise Expected(f"Expected teachers={teachers} <= {n}, the number of records: each needs one of its own.")
    order = random.permutation(random.generator(seed, "partition"), n) if shuffle else torch.arange(n)
    each = n // teachers
    return order[: teachers * each].reshape(teachers, each)


def batches(each: int, size: int, limit: int = 0) -> tuple[int, int]:
    """(records of a minibatch, minibatches of an epoch): B = min(size, each), ⌊each/B⌋ of them, at most `limit` if set."""
    batch = min(size, each)
    count = each // batch
    return batch, min(count, limit) if limit else count

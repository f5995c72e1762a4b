"""Groups of coordinates that share a scale: a whole tensor, an output channel, or a bucket.

Every scaled quantizer works on `[group, n]` rows and sends its scales as `[group]`; the code keeps
the tensor's own shape.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qleak.check import at_least, one_of, whole

PER = ("tensor", "channel", "bucket")


class Groups(NamedTuple):
    """How tensors are cut: `per` one of `PER`, `bucket` coordinates each (the last one may be short)."""

    per: str
    bucket: int

    def cut(self, like: Tensor) -> tuple[int, int]:
        """(groups, coordinates of each) of a tensor."""
        n = like.numel()
        if self.per == "channel" and like.ndim >= 2 and n:
            return like.shape[0], n // like.shape[0]
        if self.per == "bucket" and n:
            return math.ceil(n / self.bucket), min(self.bucket, n)
        return 1, n

    def rows(self, v: Tensor) -> Tensor:
        """`[group, n]`; a short last bucket is filled with its last coordinate, which moves no minimum or maximum."""
        flat, (groups, n) = v.reshape(-1), self.cut(v)
        missing = groups * n - flat.shape[0]
        if missing:
            flat = torch.cat([flat, flat[-1:].expand(missing)])
        return flat.reshape(groups, n)

    def zero_rows(self, v: Tensor) -> Tensor:
        """`[group, n]`; a short last bucket is filled with zeros, which moves no norm."""
        flat, (groups, n) = v.reshape(-1), self.cut(v)
        return torch.cat([flat, flat.new_zeros(groups * n - flat.shape[0])]).reshape(groups, n)

    def spread(self, scale: Tensor, like: Tensor) -> Tensor:
        """`[group]` to the tensor's shape: every coordinate gets its group's number."""
        groups, n = self.cut(like)
        return scale[:, None].expand(groups, n).reshape(-1)[: like.numel()].reshape(like.shape)

    def sides(self, after: dict[str, Tensor]) -> int:
        """Number of groups of all tensors together."""
        return sum(self.cut(v)[0] for v in after.values())


def groups(per: str, bucket: int) -> Groups:
    """Checked `Groups`.

    Raises:
        Expected: unknown `per`, or a bucket below 1.
    """
    one_of(PER, per=per)
    whole(bucket=bucket)
    at_least(1, bucket=bucket)
    return Groups(per, bucket)


def extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every row `[group, n] -> [group]`; zeros for empty rows."""
    if rows.shape[-1] == 0:
        return rows.new_zeros(rows.shape[0]), rows.new_zeros(rows.shape[0])
    return rows.amin(-1), rows.amax(-1)


def largest(rows: Tensor) -> Tensor:
    """Largest magnitude of every row `[group, n] -> [group]`; zeros for empty rows."""
    return rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[0])

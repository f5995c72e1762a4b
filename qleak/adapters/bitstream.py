"""Whole numbers of w bits as bytes, and numbers as the bytes they are; all at once, on any device.

Eight numbers of w bits are w bytes: byte i of such a group holds bits 8i … 8i+7, parts of at most 9 numbers, so the loops
below run over at most w bytes, each step over all groups together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stream(codes: Tensor, width: int) -> Tensor:
    """Numbers in [0, 2^width) `[n]` to ⌈n·width/8⌉ bytes, least significant bit first; uint8."""
    n = codes.numel()
    if width == 8:
        return codes.to(torch.uint8)
    kept = torch.int32 if width <= 24 else torch.int64
    groups = torch.cat([codes.to(kept), codes.new_zeros(-n % 8, dtype=kept)]).reshape(-1, 8)
    out = torch.zeros(groups.shape[0], width, dtype=torch.uint8, device=codes.device)
    for byte in range(width):
        held = torch.zeros(groups.shape[0], dtype=kept, device=codes.device)
        for j, shift in _parts(byte, width):
            held |= groups[:, j] << -shift if shift < 0 else groups[:, j] >> shift
        out[:, byte] = (held & 0xFF).to(torch.uint8)
    return out.reshape(-1)[: -(-n * width // 8)]


def unstream(data: Tensor, width: int, count: int) -> Tensor:
    """The inverse of `stream`: `[count]` numbers, uint8, int32 or int64 by their width."""
    if width == 8:
        return data
    kept = torch.int32 if width <= 24 else torch.int64
    rows = -(-count // 8)
    padded = torch.cat([data, data.new_zeros(rows * width - data.numel())]).reshape(rows, width).to(kept)
    out = torch.zeros(rows, 8, dtype=kept, device=data.device)
    for byte in range(width):
        for j, shift in _parts(byte, width):
            out[:, j] |= padded[:, byte] >> -shift if shift < 0 else padded[:, byte] << shift
    return (out & ((1 << width) - 1)).reshape(-1)[:count]


def to_bytes(v: Tensor) -> Tensor:
    """The bytes of a flat tensor's numbers."""
    return v.contiguous().view(torch.uint8)


def from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_bytes`; copied, as a slice of bytes need not be aligned."""
    return data.clone().view(dtype)


def _parts(byte: int, width: int) -> list[tuple[int, int]]:
    """(number, shift) of what lies in a byte of a group: the number shifted right by `shift` has its bits in place."""
    first, last = 8 * byte // width, (8 * byte + 7) // width
    return [(j, 8 * byte - j * width) for j in range(first, last + 1)]

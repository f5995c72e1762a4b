"""Seeds become lanes here, and nowhere else: the only file that touches `torch.Generator`.

Every draw belongs to a *path* such as ``(seed, "victim", 3, "init")``. The path is hashed to a
generator of its own, so a draw does not depend on which other draws are made, in what order, or
how many lanes run beside it (law 1). Draws are made on the CPU, contiguous, in float32, and moved
afterwards, so that every device and every dtype sees the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

Draw = Callable[[Generator, Sequence[int]], Tensor]


def key(*path: int | str) -> int:
    """A 63-bit seed for `path`: BLAKE2b over its parts, type-tagged so that 1 and "1" differ."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in path)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*path: int | str) -> Generator:
    """A fresh CPU generator that belongs to `path` alone."""
    return torch.Generator().manual_seed(key(*path))


def normal(gen: Generator, shape: Sequence[int]) -> Tensor:
    """Standard normal draws, float32, contiguous; one call on `gen`."""
    return torch.randn(tuple(shape), generator=gen)  # noqa: TID251


def uniform(gen: Generator, shape: Sequence[int]) -> Tensor:
    """Uniform draws in [0, 1), float32, contiguous; one call on `gen`."""
    return torch.rand(tuple(shape), generator=gen)  # noqa: TID251


def laplace(gen: Generator, shape: Sequence[int]) -> Tensor:
    """Standard Laplace draws (scale 1): −sign(u)·ln(1 − 2|u|) of u ~ U(−½, ½); one call on `gen`."""
    centred = uniform(gen, shape) - 0.5
    return -torch.sign(centred) * torch.log1p(-2 * centred.abs().clamp(max=0.5 - 2**-25))


def permutation(gen: Generator, count: int) -> Tensor:
    """A random permutation of 0 … count−1."""
    return torch.randperm(count, generator=gen)  # noqa: TID251


def integers(gen: Generator, high: int, shape: Sequence[int]) -> Tensor:
    """Uniform integers in [0, high)."""
    return torch.randint(high, tuple(shape), generator=gen)  # noqa: TID251


def counted(keys: Tensor, step: Tensor, count: int) -> Tensor:
    """Standard normal draws `[lane count]` as a pure function of `keys [lane]` and `step [lane]` (int64).

    A counter-based generator, for noise inside a long loop that cannot be drawn in advance: SplitMix64
    (Steele, Lea, Flood 2014) over (key, step, coordinate), two uniforms to a normal by Box–Muller.
    """
    at = torch.arange(2 * count, device=keys.device)
    mixed = _mix(_mix(keys[:, None] + step[:, None] * 0x632BE59BD9B4E019) + at)
    unit = ((mixed >> 11) & 0x1FFFFFFFFFFFFF).to(torch.float64) * 2**-53
    radius = (-2 * torch.log1p(-unit[:, :count])).sqrt()
    return (radius * torch.cos(2 * math.pi * unit[:, count:])).float()


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 words (arithmetic wraps; shifts are made logical by masks)."""
    z = z * -7046029254386353131 + -7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


DRAWS: dict[str, Draw] = {"normal": normal, "uniform": uniform, "laplace": laplace}

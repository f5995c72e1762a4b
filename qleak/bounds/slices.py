"""Rows of a Jacobian in slices of bounded size: forward over reverse, or reverse over reverse where rows are few."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from qleak.types import Tree

Function = Callable[[Tensor], Tree]
Cut = tuple[str, slice]
Slices = Callable[[], Iterator[tuple[str, slice, Tensor]]]


def cut_up(
    function: Function, x: Tensor, value: Tree, memory: float, block: int
) -> Callable[[], Iterator[tuple[str, slice, Tensor]]]:
    """Slices of J; kept where all of them fit into `memory`, made anew at each call where not."""
    made_at_once = groups({k: v.numel() for k, v in value.items()}, max(int(memory / 16 / x.numel()), 1))

    def columns(seeds: Tensor) -> Tree:
        return {k: v.flatten(1) for k, v in vmap(lambda v: jvp(function, (x,), (v,))[1])(seeds).items()}

    def made() -> Iterator[tuple[str, slice, Tensor]]:
        for group in made_at_once:
            rows = sum(cut.stop - cut.start for _, cut in group)
            make = forward(columns, x, group, block) if rows > x.numel() // 2 else reverse(function, x, group, block)
            yield from ((k, cut, j) for (k, cut), j in zip(group, make, strict=True))

    if len(made_at_once) > 1:
        return made
    kept = list(made())
    return lambda: iter(kept)


def groups(sizes: dict[str, int], most: int) -> list[list[Cut]]:
    """Slices of all rows, in groups of at most `most` rows that are made in one go."""
    found: list[list[Cut]] = [[]]
    left = most
    for name, size in sizes.items():
        start = 0
        while start < size:
            if not left:
                found.append([])
                left = most
            stop = min(start + left, size)
            found[-1].append((name, slice(start, stop)))
            left -= stop - start
            start = stop
    return found


def forward(columns: Callable[[Tensor], Tree], x: Tensor, group: list[Cut], block: int) -> list[Tensor]:
    """J `[rows n]` of each slice of a group, some columns at a time."""
    n = x.numel()
    out = [torch.empty(cut.stop - cut.start, n, dtype=x.dtype) for _, cut in group]
    for start in range(0, n, block):
        width = min(block, n - start)
        seeds = torch.zeros(width, n, dtype=x.dtype)
        seeds[range(width), range(start, start + width)] = 1
        found = columns(seeds.reshape(width, *x.shape))
        for j, (name, cut) in zip(out, group, strict=True):
            j[:, start : start + width] = found[name][:, cut].T
    return out


def reverse(function: Function, x: Tensor, group: list[Cut], block: int) -> list[Tensor]:
    """J `[rows n]` of each slice of a group, some rows at a time."""
    out = []
    for name, cut in group:
        back = vjp(lambda x, name=name, cut=cut: function(x)[name].reshape(-1)[cut], x)[1]
        rows = cut.stop - cut.start
        j = torch.empty(rows, x.numel(), dtype=x.dtype)
        for start in range(0, rows, block):
            width = min(block, rows - start)
            seeds = torch.zeros(width, rows, dtype=x.dtype)
            seeds[range(width), range(start, start + width)] = 1
            j[start : start + width] = vmap(lambda v, back=back: back(v)[0])(seeds).reshape(width, -1)
        out.append(j)
    return out

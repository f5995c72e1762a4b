"""Arithmetic on `dict[str, Tensor]`: a dict comprehension is the tree-map.

Trees keep torch's parameter names and their order. `ravel` flattens one to a vector with einops'
`pack`, and returns the inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import pack, unpack
from torch import Tensor

Tree = dict[str, Tensor]


def zip_map(fn: Callable[..., Tensor], *trees: Tree) -> Tree:
    """{k: fn(a[k], b[k], …)}: all trees share the keys of the first."""
    first = trees[0]
    return {k: fn(*(t[k] for t in trees)) for k in first}


def add(a: Tree, b: Tree) -> Tree:
    """A + b."""
    return {k: v + b[k] for k, v in a.items()}


def sub(a: Tree, b: Tree) -> Tree:
    """A − b."""
    return {k: v - b[k] for k, v in a.items()}


def scale(a: Tree, factor: float | Tensor) -> Tree:
    """Factor · a."""
    return {k: v * factor for k, v in a.items()}


def dot(a: Tree, b: Tree) -> Tensor:
    """Σ a·b over every entry: a 0-dim tensor."""
    return total({k: v * b[k] for k, v in a.items()})


def total(a: Tree) -> Tensor:
    """The sum of all entries: a 0-dim tensor."""
    return torch.stack([v.sum() for v in a.values()]).sum()


def norm(a: Tree, p: float = 2) -> Tensor:
    """The L_p norm of all entries together (p = 1 or 2): a 0-dim tensor."""
    if p == 1:
        return total({k: v.abs() for k, v in a.items()})
    return dot(a, a).sqrt()


def count(a: Tree) -> int:
    """The number of entries."""
    return sum(v.numel() for v in a.values())


def at(a: Tree, index: int | slice | Tensor) -> Tree:
    """Every tensor indexed along its first axis."""
    return {k: v[index] for k, v in a.items()}


def stack(trees: Sequence[Tree]) -> Tree:
    """Trees of equal shapes stacked along a new first axis."""
    return {k: torch.stack([t[k] for t in trees]) for k in trees[0]}


def to(a: Tree, *args: torch.device | torch.dtype | str) -> Tree:
    """Every tensor moved or cast as `Tensor.to` does."""
    return {k: v.to(*args) for k, v in a.items()}  # pyright: ignore[reportCallIssue, reportArgumentType]


def cast(a: Tree, dtype: torch.dtype) -> Tree:
    """Floating tensors in `dtype`; indices, keys and masks of other kinds as they are."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in a.items()}


def ravel(a: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """A vector `[d]` of all entries in key order, and the function that takes `[… d]` back to a tree."""
    vector, shapes = pack(list(a.values()), "*")
    names = list(a)

    def unravel(flat: Tensor) -> Tree:
        lead = "" if flat.ndim == 1 else " ".join(f"l{i}" for i in range(flat.ndim - 1)) + " "
        return dict(zip(names, unpack(flat, shapes, f"{lead}*"), strict=True))

    return vector, unravel


def nested_map(fn: Callable[..., Any], *nested: Any) -> Any:
    """`fn` over the tensors of equally nested dicts, lists, tuples and NamedTuples; other leaves come from the first."""
    first = nested[0]
    if isinstance(first, Tensor):
        return fn(*nested)
    if isinstance(first, dict):
        return {k: nested_map(fn, *(n[k] for n in nested)) for k in first}
    if isinstance(first, list | tuple):
        parts = [nested_map(fn, *group) for group in zip(*nested, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def flatten(nested: Any, path: str = "") -> Tree:
    """The tensors of a nested structure by path, `0/code/conv1.weight`."""
    if isinstance(nested, Tensor):
        return {path.removeprefix("/"): nested}
    names = getattr(nested, "_fields", None) or (nested if isinstance(nested, dict) else range(len(nested)))
    found: Tree = {}
    for name, part in zip(names, nested.values() if isinstance(nested, dict) else nested, strict=True):
        found |= flatten(part, f"{path}/{name}")
    return found


def unflatten(flat: Tree, like: Any, path: str = "") -> Any:
    """The inverse of `flatten`, into the structure of `like`."""
    names = iter(flatten(like, path))
    return nested_map(lambda leaf: flat[next(names)], like)

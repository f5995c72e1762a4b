"""Argument checks with one message form: what was expected, what came, how to mend it.

Every check raises `Expected`, whose text is one line such as ``Expected bits=0 >= 1.``
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qleak.errors import Expected, Failed, did_you_mean

__all__ = ["Expected", "Failed", "at_least", "between", "did_you_mean", "finite", "one_of", "positive", "whole"]


def at_least(low: float, **named: Any) -> None:
    """Each value is a finite number >= `low`."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low or math.isinf(value):
            raise Expected(f"Expected {name}={value!r} >= {low:g}.")


def positive(**named: Any) -> None:
    """Each value is a finite number > 0."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or math.isinf(value):
            raise Expected(f"Expected {name}={value!r} > 0.")


def between(low: float, high: float, **named: Any) -> None:
    """Each value is a number in [low, high]."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise Expected(f"Expected {name}={value!r} in [{low:g}, {high:g}].")


def whole(**named: Any) -> None:
    """Each value is an int (not a bool)."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise Expected(f"Expected {name}={value!r} to be a whole number.")


def one_of(options: Iterable[str], **named: Any) -> None:
    """Each value is one of `options`; a near miss is answered with a suggestion."""
    options = sorted(options)
    for name, value in named.items():
        if value not in options:
            raise Expected(
                f"Expected {name}={value!r} to be one of: {', '.join(options)}.{did_you_mean(value, options)}"
            )


def finite(**trees: Tensor | dict[str, Tensor]) -> None:
    """Each tensor (or every tensor of a tree) holds neither NaN nor infinity."""
    for name, tree in trees.items():
        for key, value in tree.items() if isinstance(tree, dict) else [("", tree)]:
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                where = f"{name}[{key!r}]" if key else name
                raise Expected(f"Expected {where} to be finite: {bad} of {value.numel()} entries are NaN or infinite.")

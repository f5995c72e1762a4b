"""Data sets with arguments, written as a call: ``lfw(size=32, limit=26)``, ``picture(path='cat.png')``.

A plan names its data by one text, so whatever decides the images has to stand in it.
"""

from __future__ import annotations

import ast
from typing import Any

from qleak.check import Expected


def parse(text: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call with literal keywords; None for any other text, such as a plain name or a path.

    Raises:
        Expected: a call whose arguments are not literals given by name.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return None
    try:
        if node.args or any(k.arg is None for k in node.keywords):
            raise ValueError
        return node.func.id, {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (ValueError, TypeError):
        raise Expected(f"Expected data {text!r} to be written like name(key=value, …), with plain values.") from None


def written(name: str, **options: Any) -> str:
    """The text that `parse` reads."""
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def only(text: str, options: dict[str, Any], *known: str) -> None:
    """Refuses arguments that the set does not take.

    Raises:
        Expected: one of `options` is not `known`.
    """
    for key in options:
        if key not in known:
            raise Expected(f"Expected data {text!r} with {', '.join(known)} at most, got {key}.")

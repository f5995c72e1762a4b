"""Cells that fit their columns in a terminal: names broken where they have joints, numbers with fewer digits, never cut."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

JOINTS = (r"(?<=\s)", r"(?<=[(,])", r"(?<=[=_/])|(?<=[A-Za-z]\.)|(?<=\.)(?=[A-Za-z])", "(?<=.)")
"""Where a name may be broken, the better before the worse: behind a space; a bracket or comma; "=", "_", "/" or at a dot that
is not a number's; anywhere."""


def add(grid: Table, *cells: str | Text, style: str = "") -> None:
    """Adds a row to columns of known width: every cell in lines that fit."""
    fitted = [cell if c.width is None else fit(cell, c.width) for cell, c in zip(cells, grid.columns, strict=True)]
    grid.add_row(*fitted, style=style)


def fit(cell: str | Text, width: int) -> Text:
    """A number in at most `width` characters, anything else in lines of at most `width`; the style stays."""
    text, style = (cell.plain, cell.style) if isinstance(cell, Text) else (cell, "")
    return Text(shorter(text, width) or folded(text, width), style=style)


def shorter(text: str, width: int) -> str:
    """A number that is too wide, with fewer digits: "1.89e+03" becomes "1890" in five columns, "2.18e+08" "2.2e8".

    Brackets, a sign and a question mark around it stay. "" where it is no number, or none that so few columns hold.
    """
    if len(text) <= width:
        return text
    found = re.fullmatch(r"(\(?)([-−+]?)(\d+\.?\d*(?:e[-+]?\d+)?)(\??\)?)", text)
    if found is None:
        return ""
    before, sign, number, after = found.groups()
    for digits in (3, 2, 1):
        rounded = float(f"{float(number):.{digits}g}")
        forms = (f"{rounded:g}", re.sub(r"\.?0*e\+?(-?)0*", r"e\1", f"{rounded:.{digits - 1}e}"))
        fitting = [f for f in forms if len(before + sign + f + after) <= width]
        if fitting:
            return before + sign + fitting[0] + after
    return ""


def folded(text: str, width: int) -> str:
    """A name in lines of at most `width` characters, each broken at the best joint that serves; an indent stays."""
    indent = text[: len(text) - len(text.lstrip())]
    lines = [indent]
    for piece in _pieces(text.lstrip(), width - len(indent)):
        if len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append(piece)
        else:
            lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _pieces(text: str, width: int, level: int = 0) -> Iterator[str]:
    """Parts of at most `width` characters, broken at joints of this level, and of the next where that is not enough."""
    for piece in re.split(JOINTS[level], text):
        if len(piece.rstrip()) <= width or level + 1 == len(JOINTS):
            yield piece
        else:
            yield from _pieces(piece, width, level + 1)

"""Labels that are called ε, beside what was measured: for trainings whose noise nothing in front of it bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qleak.report import columns, words

HEADS = ("ε", "nominal ε\n(a label)", "noise\nscale β", "L1 of an\nupdate", "L1/β (no\nguarantee)")
NOTE = (
    "No ε: nothing bounds the updates, so a nominal ε is a label. L1/β is the L1 norm of one measured update (mean over "
    "seeds) over the noise's scale: what the label would have to be for this one update if it were the largest there is. "
    "It is an estimate of one message, not a guarantee, and every further message adds to it."
)


def lines(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each channel with a nominal ε, cells in the order of `HEADS`; none where no channel has one."""
    summed = {s["channel"]: s for s in header.get("summary") or []}
    found = []
    for fact in header.get("facts") or []:
        if fact.get("nominal_epsilon") is None:
            continue
        seen = summed.get(fact["channel"], {}).get("update_l1")
        epsilon, scale = fact["epsilon"], fact["noise_scale"]
        cells = ["none" if epsilon is None else f"{epsilon:.3g}", f"{fact['nominal_epsilon']:g}", f"{scale:.3g}"]
        cells += [words.number(seen, ".4g"), words.number(None if seen is None else seen / scale, ".3g")]
        found.append({"channel": fact["channel"], "number": None, "front": False, "cells": cells})
    return found


def table(headers: Mapping[str, Mapping[str, Any]]) -> Iterator[RenderableType]:
    """The rows of each part in 80 columns, below its name, and what they mean; nothing without rows."""
    found = {part: rows for part, header in headers.items() if (rows := lines(header))}
    for part, rows in found.items():
        grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="")
        for i, (title, width) in enumerate(zip(("channel", *HEADS), (30, 5, 9, 8, 9, 10), strict=True)):
            grid.add_column(title, width=width, justify="right" if i else "left", vertical="bottom", overflow="fold")
        for row in rows:
            columns.add(grid, Text(row["channel"], style="bold"), *row["cells"])
        yield Text(f"Labels that are called ε{f', part {part}' if part else ''}:")
        yield grid
        yield Text("")
    if found:
        yield Text(f"{NOTE}\n")

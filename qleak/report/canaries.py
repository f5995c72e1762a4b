"""What one replaced record did to what was released, beside what was promised: for the terminal and the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qleak.report import columns, words

HEADS = ("teachers\nchanged", "largest move,\nof the promised", "divergence", "promised\nat most", "ε it shows")
NOTE = (
    "One record is replaced, and the same votes are followed by both runs. Divergence: half of the squared moves of all sums in "
    "units of the noise, the Kullback–Leibler divergence of the two runs' releases; above the promised one, the promise is "
    "broken, and so it is where one sum moves further than the promised sensitivity. ε: of Gaussian noise with that divergence. "
    "A canary that shows less proves nothing."
)


def rows(header: dict[str, Any]) -> list[tuple[str, bool, list[str]]]:
    """(arm, whether the promise is broken, cells in the order of `HEADS`) of every arm with a canary."""
    found = []
    for s in header.get("summary") or []:
        if s.get("canary_divergence") is None:
            continue
        broken = s["canary_divergence"] > s["canary_promised"] or s["canary_reach"] > 1 + 1e-4
        cells = [
            f"{s['canary_teachers']:.0f}", f"{s['canary_reach']:.2f}",
            words.number(s["canary_divergence"], ".4f") + words.interval(s.get("canary_divergence_ci"), ".4f"),
            words.number(s["canary_promised"], ".4f"), words.number(s["canary_epsilon"], ".3g"),
        ]  # fmt: skip
        found.append((s["method"], broken, cells))
    return found


def table(header: dict[str, Any]) -> Iterator[RenderableType]:
    """A row per arm, fit for 80 columns; nothing without canaries."""
    found = rows(header)
    if not found:
        return
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="")
    for i, (title, width) in enumerate(zip(("canary", *HEADS), (21, 8, 13, 12, 8, 6), strict=True)):
        grid.add_column(title, width=width, justify="right" if i else "left", vertical="bottom", overflow="fold")
    for arm, broken, cells in found:
        short = [cells[0], cells[1] + (" !" if broken else ""), cells[2].split(" ")[0], *cells[3:]]
        columns.add(grid, Text(arm, style="bold"), *short)
    yield grid
    broken = [arm for arm, broken, _ in found if broken]
    yield Text(
        f"! beyond what is promised: {'; '.join(broken)}." if broken else "No canary goes beyond what is promised."
    )
    yield Text("")

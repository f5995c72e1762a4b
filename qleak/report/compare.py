"""The frontier as people read it: a table in 80 columns, CSV, JSON, and what its page needs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from os.path import relpath
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qleak.report import columns, words
from qleak.report.frontier import Point

TITLES = (
    ("channel", None), ("bits", 5), ("ε", 6), ("strongest\nattack", 11), ("PSNR\ndB", 5), ("plain\ndB", 5),
    ("rebuilt", 7), ("test\naccuracy", 11),
)  # fmt: skip
HEADS = (
    "bits/\ncoordinate", "entropy\ncoded", "ε", "test\naccuracy", "PSNR dB\n(95% CI)", "strongest\nattack",
    "images\nrebuilt", "SSIM", "control\ndB", "plain\nattacker dB", "oracle\ndB", "train\naccuracy", "diverged",
)  # fmt: skip
PAIRS = ("psnr_ci", "test_accuracy_ci", "train_accuracy_ci")
LEGEND = (
    "Sorted by bits. PSNR: mean over images, of the strongest attack on each channel; low is private. Plain: what the "
    "plain attacker of the first papers gets. ± half of the 95% interval over seeds."
)


def table(points: Sequence[Point]) -> Iterator[RenderableType]:
    """The joined table, fit for 80 columns: a row per channel, "*" on the Pareto front, then what the columns mean."""
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="")
    for title, width in TITLES:
        # What is left of 80 columns, with one space behind every column but the last.
        width = width or 80 - sum(w or 0 for _, w in TITLES) - len(TITLES)
        justify = "left" if title in ("channel", "strongest\nattack") else "right"
        grid.add_column(title, width=width, justify=justify, vertical="bottom", overflow="fold")
    for p in points:
        columns.add(
            grid, Text(f"{'* ' if p.front else '  '}{p.channel}", style="bold" if p.front else ""),
            words.number(p.bits, ".2f"), words.number(p.epsilon, ".3g"), Text(bare(p.attack)),
            words.number(p.psnr, ".1f"), words.number(p.psnr_plain, ".1f"), rebuilt(p),
            accuracy(p.test_accuracy, p.test_accuracy_ci),
        )  # fmt: skip
    yield grid
    front = ""
    if any(p.front for p in points):
        front = " * on the Pareto front: no channel has at least its accuracy for less PSNR."
    yield Text(f"\n{LEGEND}{front}")


def rows(points: Sequence[Point], numbered: bool) -> list[dict[str, Any]]:
    """The same for a page: number (if the plot writes it), channel, front, and cells in the order of `HEADS`."""
    return [
        {
            "number": i if numbered else None, "channel": p.channel, "front": p.front,
            "cells": [
                words.number(p.bits, ".2f"), words.number(p.bits_entropy, ".2f"), words.number(p.epsilon, ".3g"),
                accuracy(p.test_accuracy, p.test_accuracy_ci),
                words.number(p.psnr, ".1f") + words.interval(p.psnr_ci, ".1f"), p.attack or "—", rebuilt(p),
                words.number(p.ssim, ".2f"), words.number(p.control, ".1f"), words.number(p.psnr_plain, ".1f"),
                words.number(p.psnr_oracle, ".1f"), accuracy(p.train_accuracy, p.train_accuracy_ci),
                "—" if p.seeds is None else f"{p.diverged}/{p.seeds}",
            ],
        }
        for i, p in enumerate(points, start=1)
    ]  # fmt: skip


def as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Points as plain values; `from_json` is its inverse."""
    return [p._asdict() for p in points]


def from_json(summary: Sequence[dict[str, Any]]) -> list[Point]:
    """Points as a study's summary holds them; fields of a newer version are left out."""
    points = []
    for s in summary:
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in s.items() if k in Point._fields}
        points.append(Point(**known))
    return points


def as_csv(points: Sequence[Point]) -> str:
    """Points as CSV with a header: an interval becomes two columns `…_low` and `…_high`, gaps are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([c for f in Point._fields for c in ((f"{f}_low", f"{f}_high") if f in PAIRS else (f,))])
    for p in points:
        cells: list[Any] = []
        for field, value in p._asdict().items():
            if field in PAIRS:
                cells += value or ("", "")
            else:
                cells.append(" & ".join(value) if isinstance(value, tuple) else value)
        writer.writerow(cells)
    return out.getvalue()


def page(folder: Path, out: Path) -> str | None:
    """The relative address of a run's page, seen from the file `out`."""
    from urllib.parse import quote

    found = folder / "report.html"
    return quote(Path(relpath(found.resolve(), out.resolve().parent)).as_posix()) if found.is_file() else None


def accuracy(mean: float | None, ci: tuple[float, float] | list[float] | None) -> str:
    """A share in percent, ± half of its interval."""
    if mean is None:
        return "—"
    half = "" if not ci or None in ci or math.isnan(ci[0]) else f" ±{50 * (ci[1] - ci[0]):.1f}"
    return f"{100 * mean:.1f}%{half}"


def rebuilt(p: Point) -> str:
    """Images that the strongest attack rebuilt."""
    return "—" if p.recovered is None else f"{p.recovered}/{p.images}"


def bare(attack: str | None) -> str:
    """An attack without its arguments."""
    return "—" if attack is None else attack.split("(")[0]

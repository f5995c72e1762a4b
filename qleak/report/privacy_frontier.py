"""Leakage and accuracy over ε: one table and one figure for channels that carry a privacy event."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qleak.report import columns, words
from qleak.report.compare import accuracy, rebuilt
from qleak.report.drawn import svg, tidy
from qleak.report.frontier import Point
from qleak.report.plots import line_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS = (
    "ε of one\nmessage",
    "ε of the\ntraining",
    "PSNR\ndB",
    "control\ndB",
    "images\nrebuilt",
    "labels\nfound",
    "test\naccuracy",
)
WIDTHS = (7, 8, 5, 7, 7, 6, 11)
NOTE = (
    "By ε of the attacked message, from private to open. PSNR, images and labels: of the strongest attack that was run; "
    "its control is the prior alone or another image's message. An ε bounds every attack, a PSNR only those that were run."
)


def private(points: Sequence[Point]) -> list[Point]:
    """Points whose attacked message has an ε, from small to large; then those without one, for comparison.

    Empty where no message has one.
    """
    known = sorted((p for p in points if _finite(p.epsilon_message)), key=lambda p: (p.epsilon_message or 0, p.channel))
    return [*known, *(p for p in points if p.epsilon_message is None)] if known else []


def cells(p: Point) -> list[str]:
    """One row, in the order of `HEADS`."""
    return [
        _epsilon(p.epsilon_message), _epsilon(p.epsilon) if p.seeds else "—",
        words.number(p.psnr, ".1f"), words.number(p.control, ".1f"), rebuilt(p),
        "—" if p.label_accuracy is None else f"{p.label_accuracy:.0%}", accuracy(p.test_accuracy, p.test_accuracy_ci),
    ]  # fmt: skip


def rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The table for a page."""
    return [{"channel": p.channel, "number": None, "front": p.front, "cells": cells(p)} for p in private(points)]


def table(points: Sequence[Point]) -> Iterator[RenderableType]:
    """The same in 80 columns; nothing where no message has an ε."""
    shown = private(points)
    if not shown:
        return
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="")
    grid.add_column("channel", width=80 - sum(WIDTHS) - len(WIDTHS) - 1, vertical="bottom", overflow="fold")
    for title, width in zip(HEADS, WIDTHS, strict=True):
        grid.add_column(title, width=width, justify="right", vertical="bottom", overflow="fold")
    for p in shown:
        columns.add(grid, Text(p.channel), *cells(p))
    yield Text("")
    yield grid
    yield Text(f"{NOTE}\n")


def family(channel: str) -> str:
    """A channel's stages without their numbers: what one line of the figure joins."""
    return re.sub(r"\([^()]*\)", "", channel)


def figure(points: Sequence[Point]) -> str:
    """PSNR of the strongest attack and test accuracy, one above the other, against ε of the attacked message (log).

    A line per family of channels, 95 % intervals as bands of bars; without an ε: level dashed lines. Empty where fewer
    than two messages have one.
    """
    shown = private(points)
    with_epsilon = [p for p in shown if p.epsilon_message is not None and p.epsilon_message > 0]
    families = list(dict.fromkeys(family(p.channel) for p in with_epsilon))
    if len(with_epsilon) < 2:
        return ""
    panels = (
        ("psnr", "psnr_ci", 1, "PSNR of the strongest\nattack, dB"),
        ("test_accuracy", "test_accuracy_ci", 100, "test accuracy, %"),
    )

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        handles: dict[str, Any] = {}
        first = None
        for i, (field, ci, factor, title) in enumerate(panels, start=1):
            axes = first = figure.add_subplot(2, 1, i, sharex=first)
            for k, name in enumerate(families):
                mine = [p for p in with_epsilon if family(p.channel) == name and getattr(p, field) is not None]
                if not mine:
                    continue
                at, mean = [float(p.epsilon_message or 0) for p in mine], [factor * getattr(p, field) for p in mine]
                around = [getattr(p, ci) or (getattr(p, field),) * 2 for p in mine]
                sides = [[max(m - factor * a[0], 0) for m, a in zip(mean, around, strict=True)],
                         [max(factor * a[1] - m, 0) for m, a in zip(mean, around, strict=True)]]  # fmt: skip
                handles[name] = axes.errorbar(
                    at, mean, yerr=sides, marker="o", markersize=4, capsize=2, label=f"_{name}", **line_of(k)
                )
            for j, p in enumerate([p for p in shown if p.epsilon_message is None and getattr(p, field) is not None]):
                colour = line_of(len(families) + j)["color"]
                name = f"{p.channel} (no ε)"
                level = axes.axhline(factor * getattr(p, field), color=colour, linestyle="--", label=f"_{name}")
                handles[name] = level
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))  # the usual one writes mathematics
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set(ylabel=title, xlabel="ε of the attacked message (to the left: more private)" if i == 2 else "")
            tidy(axes)
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=2, frameon=False, fontsize=8
        )

    return svg("over-epsilon", (8.6, 5.4 + 0.1 * len(families)), draw)


def _epsilon(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}" if value < 1e4 else f"{value:.1e}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)

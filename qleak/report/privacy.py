"""Trainings side by side: accuracy, clean and under attack, against the ε they have, or claim without having it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qleak import store
from qleak.report import columns, words
from qleak.report.compare import accuracy
from qleak.report.drawn import INK, svg, tidy
from qleak.report.training import Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIMED = "claimed, no guarantee"
WIDTHS = {"part": 18, "channel": 18, "ε": 9, "test\naccuracy": 11, "robust\naccuracy": 11, "diver-\nged": 6}
HEADS = ("channel", "ε", f"ε {CLAIMED}", "test accuracy", "robust accuracy", "train accuracy", "diverged", "CPU s")
TOLD = 6  # trainings that one sentence can name


class Curve(NamedTuple):
    """Test accuracy against ε, means over seeds, a point for every measured epoch with an ε above 0.

    `claimed`: its ε is a publication's claim.
    """

    name: str
    epsilon: list[float]
    accuracy: list[float]
    claimed: bool


def apply(header: dict[str, Any]) -> bool:
    """Whether a study's parts are trainings alone, two or more, to be read side by side."""
    parts = header.get("parts") or []
    return len(parts) > 1 and all(part["kind"] == "training" for part in parts)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The parts' summaries in one list, for the study's own: each object with its `part`.

    Raises:
        Expected: the study or a part is damaged.
    """
    found = []
    for part in store.read_run(folder)["parts"]:
        below = folder / part["folder"]
        summary = store.read_run(below).get("summary") if (below / "run.json").is_file() else None
        found += [{"part": part["name"]} | s for s in summary or []]
    return found


def epsilon(s: dict[str, Any]) -> str:
    """ε of a line; one that is only claimed in brackets, with a question mark."""
    if s.get("epsilon") is None and s.get("claimed_epsilon") is not None:
        return f"({s['claimed_epsilon']:.3g}?)"
    return words.number(s.get("epsilon"), ".3g")


def table(found: Sequence[dict[str, Any]]) -> Iterator[RenderableType]:
    """A row for each part and channel, fit for 80 columns; a channel that is the same everywhere is said once."""
    same = len({s["channel"] for s in found}) == 1
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="")
    longest = max((len(s["part"]) for s in found), default=0)
    names = WIDTHS["part"] + WIDTHS["channel"]
    part = names + 1 if same else min(max(longest, 4), WIDTHS["part"])
    for title, width in (WIDTHS | {"part": part, "channel": names - part}).items():
        if same and title == "channel":
            continue
        justify = "left" if title in ("part", "channel") else "right"
        grid.add_column(title, width=width, justify=justify, vertical="bottom", overflow="fold")
    for s in found:
        columns.add(
            grid, Text(s["part"], style="bold"), *([] if same else [Text(s["channel"])]), epsilon(s),
            accuracy(s["test_accuracy"], s.get("test_accuracy_ci")),
            accuracy(s.get("robust_accuracy"), s.get("robust_accuracy_ci")), f"{s['diverged']}/{s['n']}",
        )  # fmt: skip
    if same:
        yield Text(f"Channel: {found[0]['channel']}")
    yield grid
    note = f" (0.1?): {CLAIMED}." if any(s.get("claimed_epsilon") is not None for s in found) else ""
    yield Text(f"± half of the 95% interval over seeds.{note}\n")


def rows(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for a page: the part, and cells in the order of `HEADS`."""
    return [
        {
            "number": None, "channel": s["part"], "front": False,
            "cells": [
                s["channel"], words.number(s.get("epsilon"), ".3g"), words.number(s.get("claimed_epsilon"), ".3g"),
                accuracy(s["test_accuracy"], s.get("test_accuracy_ci")),
                accuracy(s.get("robust_accuracy"), s.get("robust_accuracy_ci")),
                accuracy(s["train_accuracy"], s.get("train_accuracy_ci")), f"{s['diverged']}/{s['n']}",
                words.number(s.get("cpu_s"), ".1f"),
            ],
        }
        for s in found
    ]  # fmt: skip


def verdict(found: Sequence[dict[str, Any]], header: dict[str, Any]) -> str:
    """One sentence: accuracies of the parts, and whose ε is none."""
    if not found:
        return f"Verdict: none yet, the study is {header.get('status', 'unfinished')}."
    shown = sorted((s for s in found if s["test_accuracy"] is not None), key=lambda s: -s["test_accuracy"])
    rest = len(shown) - TOLD
    kept = [*shown[: TOLD // 2], *shown[-(TOLD // 2) :]] if rest > 0 else shown
    several = len(found) > len({s["part"] for s in found})
    clauses = []
    for s in kept:
        name = f"{s['part']} · {s['channel']}" if several else s["part"]
        robust = s.get("robust_accuracy")
        under = f", {100 * robust:.1f}% under attack" if robust is not None else ""
        clauses.append(f"{name} {accuracy(s['test_accuracy'], s.get('test_accuracy_ci'))}{under}")
    if rest > 0:
        clauses.insert(TOLD // 2, f"… {rest} between …")
    claims = sum(s.get("claimed_epsilon") is not None for s in found)
    of = "all" if claims == len(found) else f"{claims} of {len(found)}"
    end = f"; the ε of {of} is {CLAIMED}" if claims else ""
    return f"Verdict: test accuracy: {'; '.join(clauses)}{end}."


def curves(name: str, run: Trained) -> list[Curve]:
    """One curve for each channel of a training that has an ε, guaranteed or claimed; a sole channel goes unnamed."""
    found = []
    for channel in run.channels():
        mine: dict[int, list[dict[str, Any]]] = {}
        for r in run.rows:
            if r["channel"] == channel and r.get("test_accuracy") is not None:
                mine.setdefault(r["epoch"], []).append(r)
        for field in ("epsilon", "claimed_epsilon"):
            at = [rs for _, rs in sorted(mine.items()) if all((r.get(field) or 0) > 0 for r in rs)]
            if at:
                spent = [max(r[field] for r in rs) for rs in at]
                reached = [fmean(r["test_accuracy"] for r in rs) for rs in at]
                title = name if name and len(run.channels()) == 1 else " · ".join(filter(None, [name, channel]))
                found.append(Curve(title, spent, reached, field != "epsilon"))
                break
    return found


def figure(runs: Sequence[tuple[str, Trained]], name: str = "privacy") -> str:
    """Test accuracy over ε as SVG: a dot an epoch, a curve a training; hollow where ε is claimed. "" without any ε."""
    found = [curve for title, run in runs for curve in curves(title, run)]
    if not found:
        return ""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from qleak.report.plots import line_of

    lines = -(-len(found) // 2) + any(curve.claimed for curve in found)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        handles = []
        for k, curve in enumerate(found):
            look = line_of(k)
            face = {"markerfacecolor": "none" if curve.claimed else look["color"], "markeredgecolor": look["color"]}
            percent = [100 * a for a in curve.accuracy]
            title = fill(f"{curve.name} ({CLAIMED})" if curve.claimed else curve.name, 56)
            handles += axes.plot(curve.epsilon, percent, marker="o", markersize=5, label=title, **look, **face)
        if any(curve.claimed for curve in found):
            handles.append(Line2D([], [], linestyle="", marker="o", markerfacecolor="none", markeredgecolor=INK))
            handles[-1].set_label(f"hollow: ε {CLAIMED}")
        low, high = min(min(c.epsilon) for c in found), max(max(c.epsilon) for c in found)
        if high > 4 * low:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))  # no mathtext in these figures
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="ε (to the left: more private)", ylabel="test accuracy, %")
        tidy(axes)
        figure.legend(handles, [str(h.get_label()) for h in handles], loc="outside lower center", ncols=2,
                      frameon=False, fontsize=8)  # fmt: skip

    return svg(name, (8.6, 4.2 + 0.3 * lines), draw)

"""A stored training as people read it: curves over seeds, the table of channels, one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qleak import store
from qleak.errors import Expected
from qleak.metrics import student
from qleak.report import columns, nominal, words
from qleak.report.compare import accuracy
from qleak.store import Row

MEASURES = {
    "train_accuracy": "train accuracy", "test_accuracy": "test accuracy",
    "train_loss": "train loss", "test_loss": "test loss",
}  # fmt: skip
TITLES = (
    ("channel", None), ("bits", 5), ("ε", 5), ("train\naccuracy", 11), ("test\naccuracy", 11), ("train\nloss", 6),
    ("test\nloss", 6), ("diver-\nged", 6),
)  # fmt: skip
HEADS = (
    "bits/\ncoordinate", "ε", "rounds", "uplink\nMB", "train\naccuracy", "test\naccuracy", "train\nloss", "test\nloss",
    "diverged", "CPU s",
)  # fmt: skip
ROBUST = (  # with robust accuracy two losses make room for it
    ("channel", None), ("bits", 5), ("ε", 5), ("train\naccuracy", 11), ("test\naccuracy", 11), ("robust", 11),
    ("diver-\nged", 6),
)  # fmt: skip
ATTACKED = ("round", "attack", "PSNR dB", "images rebuilt")
TICKS = "▁▂▃▄▅▆▇█"
MOST = 40  # ticks of one curve in the terminal
TOLD = 6  # channels that one sentence can name


class Band(NamedTuple):
    """A curve over seeds: the mean `at` epochs, and its 95 % t interval where there are two seeds or more."""

    at: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Trained:
    """A training's folder that has been read: `rows` are those of curves, `attacks` those of attacks on the way."""

    folder: Path
    header: dict[str, Any]
    rows: list[Row]
    attacks: list[Row]

    def channels(self) -> list[str]:
        """In the plan's order, whatever order the workers finished in."""
        order = [f["channel"] for f in self.header.get("facts") or []]
        return sorted(
            dict.fromkeys(r["channel"] for r in self.rows), key=lambda c: order.index(c) if c in order else 99
        )

    def band(self, channel: str, measure: str) -> Band:
        """The curve of one channel over every finite number, as in the summary: a seed that diverged counts, where its
        accuracy is still one, and takes no part where nothing is left of it.
        """
        values: dict[int, list[float]] = {}
        for r in self.rows:
            if r["channel"] == channel and r.get(measure) is not None:
                values.setdefault(r["epoch"], []).append(r[measure])
        at = sorted(values)
        intervals = [_interval(values[epoch]) for epoch in at]
        return Band(at, *(list(side) for side in zip(*intervals, strict=True))) if at else Band([], [], [], [])


def load(folder: Path) -> Trained:
    """Reads a training, finished or not.

    Raises:
        Expected: there is no run, it is damaged, or it is not a training.
    """
    header, rows = store.read_run(folder), store.read_rows(folder)
    if header.get("kind") != "training":
        raise Expected(f"Expected a run of kind 'training' at {folder}, got {header.get('kind')!r}.")
    attacks = {r["key"] for r in rows if "audit" in (r.get("kind"), *r)}
    measured = [r for r in rows if r["key"] not in attacks]
    return Trained(folder, header, measured, [r for r in rows if r["key"] in attacks])


def verdict(header: dict[str, Any]) -> str:
    """One sentence: test accuracy by channel, beside the exact gradient's."""
    found = header.get("summary") or []
    if not found:
        return f"Verdict: none yet, the run is {header.get('status', 'unfinished')}."
    known = [s for s in found if s["test_accuracy"] is not None]
    base = next((s for s in known if s["channel"] == "fp32"), None)
    shown = sorted((s for s in known if s is not base), key=lambda s: -s["test_accuracy"])
    rest = len(shown) - TOLD
    if rest > 0:
        shown = [*shown[: TOLD // 2], *shown[-(TOLD // 2) :]]
    clauses = []
    for s in ([base] if base else []) + shown:
        clause = f"{s['channel']} {accuracy(s['test_accuracy'], s.get('test_accuracy_ci'))}"
        if base and s is not base:
            clause += f" ({100 * (s['test_accuracy'] - base['test_accuracy']):+.1f} points)".replace("(-", "(−")
        clauses.append(clause)
    if rest > 0:
        clauses.insert(len(clauses) - TOLD // 2, f"… {rest} between …")
    lost = [f"{s['channel']} {s['diverged']} of {s['n']}" for s in found if s["diverged"]]
    clauses += [f"diverged: {', '.join(lost)}"] if lost else []
    seeds, epochs = max(s["n"] for s in found), max(s["epoch"] for s in found)
    many = f"{epochs} epoch{'' if epochs == 1 else 's'}, {seeds} seed{'' if seeds == 1 else 's'}"
    return f"Verdict: test accuracy after {many}: {'; '.join(clauses)}."


def next_step(header: dict[str, Any], folder: Path) -> tuple[str, str]:
    """A command worth trying now, and why."""
    run, seeds = f"qleak recipe run {header.get('recipe')}", (header.get("flags") or {}).get("seeds")
    if header.get("status") != "done":
        return f"{run} --config {folder}/run.json", "goes on where it stopped"
    if isinstance(seeds, int) and seeds < 3:
        return f"{run} --seeds 5", "an interval needs more seeds"
    return f"qleak compare {folder} AN_AUDIT", "what the same channels leak"


def table(run: Trained) -> Iterator[RenderableType]:
    """A row per channel fit for 80 columns, then test accuracy against epochs."""
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="")
    robust = has(run.header, "robust_accuracy")
    titles = ROBUST if robust else TITLES
    for i, (title, width) in enumerate(titles):
        width = width or 80 - sum(w or 0 for _, w in titles) - len(titles)
        grid.add_column(title, width=width, justify="right" if i else "left", vertical="bottom", overflow="fold")
    for s in run.header.get("summary") or []:
        columns.add(
            grid, Text(s["channel"], style="bold"), words.number(s["bits"], ".2f"), words.number(s["epsilon"], ".3g"),
            accuracy(s["train_accuracy"], s.get("train_accuracy_ci")),
            accuracy(s["test_accuracy"], s.get("test_accuracy_ci")),
            *([accuracy(s["robust_accuracy"], s.get("robust_accuracy_ci"))] if robust else
              [words.number(s["train_loss"], ".3f"), words.number(s["test_loss"], ".3f")]),
            f"{s['diverged']}/{s['n']}",
        )  # fmt: skip
    if run.header.get("summary"):
        yield grid
        yield Text("± half of the 95% interval over seeds; bits are those of one coordinate of one message.")
        for s in run.header["summary"]:
            if s.get("claimed_epsilon") is not None:
                yield Text(f"ε of {s['channel']}: {s['claimed_epsilon']:.3g} claimed, no guarantee.")
        yield Text("")
    yield from nominal.table({"": run.header})
    yield from sparks(run)


def has(header: dict[str, Any], field: str) -> bool:
    """Whether a summary has numbers in `field`."""
    return any(s.get(field) is not None for s in header.get("summary") or [])


def heads(header: dict[str, Any]) -> tuple[str, ...]:
    """The columns of a page's table: `HEADS`, and what was measured or claimed beside."""
    more = {"robust_accuracy": "robust\naccuracy", "claimed_epsilon": "claimed ε,\nno guarantee"}
    return (*HEADS, *(title for field, title in more.items() if has(header, field)))


def sparks(run: Trained) -> Iterator[RenderableType]:
    """Mean test accuracy against epochs, a line per channel on one scale."""
    curves = {channel: run.band(channel, "test_accuracy") for channel in run.channels()}
    curves = {channel: band for channel, band in curves.items() if len(band.at) > 1}
    if not curves:
        return
    low, high = min(min(b.mean) for b in curves.values()), max(max(b.mean) for b in curves.values())
    longest = max(min(len(b.at), MOST) for b in curves.values())
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    grid.add_column(width=80 - longest - 1 - 18, overflow="fold")
    grid.add_column(width=longest, no_wrap=True)
    grid.add_column(width=16)
    for channel, band in curves.items():
        columns.add(grid, Text(channel), spark(band.mean, low, high), f"{band.mean[0]:.1%} → {band.mean[-1]:.1%}")
    yield Text(f"Test accuracy, {low:.1%} (▁) to {high:.1%} (█), against epochs:")
    yield grid
    yield Text("")


def spark(values: list[float], low: float, high: float) -> str:
    """At most `MOST` of `values` as ticks, first and last among them."""
    n = min(len(values), MOST)
    kept = [values[round(i * (len(values) - 1) / max(n - 1, 1))] for i in range(n)]
    span = (high - low) or 1.0
    return "".join(TICKS[round((len(TICKS) - 1) * (v - low) / span)] for v in kept)


def rows(header: dict[str, Any]) -> list[dict[str, Any]]:
    """The table for a page: a channel and its cells in the order of `heads`."""
    return [
        {
            "channel": s["channel"], "number": None, "front": False,
            "cells": [
                words.number(s["bits"], ".2f"), words.number(s["epsilon"], ".3g"), words.number(s.get("rounds"), "d"),
                words.number(s.get("uplink_mb"), ".1f"), accuracy(s["train_accuracy"], s.get("train_accuracy_ci")),
                accuracy(s["test_accuracy"], s.get("test_accuracy_ci")),
                words.number(s["train_loss"], ".4f") + words.interval(s.get("train_loss_ci"), ".4f"),
                words.number(s["test_loss"], ".4f") + words.interval(s.get("test_loss_ci"), ".4f"),
                f"{s['diverged']}/{s['n']}", words.number(s.get("cpu_s"), ".1f"),
                *([accuracy(s.get("robust_accuracy"), s.get("robust_accuracy_ci"))] if has(header, "robust_accuracy") else []),
                *([words.number(s.get("claimed_epsilon"), ".3g")] if has(header, "claimed_epsilon") else []),
            ],
        }
        for s in header.get("summary") or []
    ]  # fmt: skip


def attacked(run: Trained) -> list[dict[str, Any]]:
    """The attacks on the way for a page: a row per channel, round and attack, cells in the order of `ATTACKED`."""
    found: dict[tuple[str, int, str], list[Row]] = {}
    for r in run.attacks:
        if r.get("control", "none") == "none" and r.get("selected", True) and r.get("psnr") is not None:
            found.setdefault((r["channel"], r["round"], str(r.get("attack", r.get("audit")))), []).append(r)
    lines = []
    for (channel, number, attack), mine in sorted(found.items()):
        psnr = sum(r["psnr"] for r in mine) / len(mine)
        cells = [str(number), attack, f"{psnr:.1f}", f"{sum(bool(r.get('success')) for r in mine)}/{len(mine)}"]
        lines.append({"channel": channel, "number": None, "front": False, "cells": cells})
    return lines


def setting(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """What was trained, as (term, description), from the plan."""
    clients = plan.get("clients", 1)
    who = words.says("clients", plan["client"])
    many = (
        "One client" if clients == 1 else f"{clients} clients, {plan.get('participation', 1):.0%} of them in a round,"
    )
    return [
        ("Model", words.says("models", plan["model"])),
        ("Data", f"{plan['data']}; dealt out {plan.get('split', 'iid')}."),
        ("Clients", f"{many} each sending through the channel. {who}"),
        ("Server", f"{plan['rule']}, learning rate {plan['lr']:g}, {plan.get('schedule', 'constant')} schedule, "
                   f"{plan['epochs']} epochs."),
        ("What is compared", "Every channel starts from the same weights and sees the same images in the same order "
                             "for the same seed, so that differences are the channel's."),
    ]  # fmt: skip


def _interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval; the mean alone, three times, for one value."""
    mean = fmean(values)
    return (mean, *student(values)) if len(values) > 1 else (mean, mean, mean)

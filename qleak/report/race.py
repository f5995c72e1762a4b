"""Attacks at equal time: PSNR over seconds, for audits that had a time limit."""

from __future__ import annotations

from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING

from qleak.report.drawn import COLOURS, STYLES, svg, tidy
from qleak.report.stored import Stored

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(run: Stored) -> dict[str, list[tuple[float, float]]]:
    """[(seconds, PSNR)] of every attack: the mean over images of each lane's last image so far; {} without a race."""
    lanes: dict[str, list[list[list[float]]]] = {}
    for row in run.rows:
        if row["control"] == "none" and row["selected"] and row.get("psnr_at"):
            lanes.setdefault(row["attack"], []).append(row["psnr_at"])
    found = {}
    for attack, every in lanes.items():
        start = max(line[0][0] for line in every)  # from where on each lane has something to show
        times = sorted({t for line in every for t, _ in line if t >= start})
        found[attack] = [(t, fmean(next(p for at, p in reversed(line) if at <= t) for line in every)) for t in times]
    return dict(sorted(found.items(), key=lambda item: -item[1][-1][1]))


def winners(run: Stored) -> list[tuple[float, str, float]]:
    """(seconds, attack, PSNR) of the leader at doubling times; [] without a race."""
    found = curves(run)
    if not found:
        return []
    last = max(line[-1][0] for line in found.values())
    told = []
    for i in range(6, -1, -1):
        at = last / 2**i
        held = {a: p for a, line in found.items() for t, p in line if t <= at}
        if held:
            best = max(held, key=lambda a: held[a])
            told.append((at, best, held[best]))
    return told


def figure(run: Stored) -> str:
    """PSNR over CPU seconds as SVG, a line per attack in the order of the final PSNR; empty without a race."""
    found = curves(run)
    if not found:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, (attack, line) in enumerate(found.items()):
            axes.plot(
                [t for t, _ in line], [p for _, p in line], label=fill(attack, 34), linewidth=1.6,
                marker="." if len(line) < 3 else "", color=COLOURS[i % len(COLOURS)], linestyle=STYLES[i // len(COLOURS) % len(STYLES)],
            )  # fmt: skip
        axes.set(xlabel="CPU seconds", ylabel="PSNR, dB", xscale="log")
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axes.xaxis.set_minor_formatter(lambda v, _: "")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        tidy(axes)

    return svg("race", (9.2, 3.8), draw)

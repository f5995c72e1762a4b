"""Figures over channels as inline SVG: the frontier of leakage and accuracy, training curves with their bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from textwrap import fill
from typing import TYPE_CHECKING, Any

from qleak.report.drawn import COLOURS, INK, STYLES, svg, tidy
from qleak.report.frontier import Point
from qleak.report.training import MEASURES, Trained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Segment = tuple[float, float, float, float]
"""A line from (x, y) to (x, y)."""
NAMED = 14  # marks that can carry their names; more are numbered as in the table
# Where a label may stand, from best to worst: offset in points, horizontal and vertical alignment.
PLACES = (
    (6, 6, "left", "bottom"), (6, -6, "left", "top"), (-6, 6, "right", "bottom"), (-6, -6, "right", "top"),
    (9, 0, "left", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top"), (-9, 0, "right", "center"),
    (10, 18, "left", "bottom"), (10, -18, "left", "top"), (-10, 18, "right", "bottom"), (-10, -18, "right", "top"),
)  # fmt: skip


def plotted(points: Sequence[Point]) -> list[Point]:
    """Points that have both coordinates."""
    return [p for p in points if p.psnr is not None and p.test_accuracy is not None]


def frontier(points: Sequence[Point]) -> str:
    """Test accuracy against the PSNR of the strongest attack, error bars at 95 %, the Pareto front as a staircase.

    Marks grow and change colour with the bits. Empty where no channel has both numbers.
    """
    shown = plotted(points)
    if not shown:
        return ""

    def draw(figure: Figure) -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize

        axes = figure.add_subplot()
        norm = Normalize(0, 5)
        scale = LinearSegmentedColormap.from_list("bits", [COLOURS[1], COLOURS[3], COLOURS[0]])
        for p in shown:
            assert p.psnr is not None and p.test_accuracy is not None
            log = math.log2(max(p.bits or 1.0, 1.0))
            colour, at = scale(norm(log)), (p.psnr, 100 * p.test_accuracy)
            sides: dict[str, Any] = {
                "xerr": _sides(at[0], p.psnr_ci, 1),
                "yerr": _sides(at[1], p.test_accuracy_ci, 100),
            }
            axes.errorbar(*at, **sides, fmt="none", ecolor=colour, elinewidth=1, alpha=0.55, label=f"_{p.channel}")
            edge = {"markeredgecolor": INK, "markeredgewidth": 1.4 if p.front else 0.5}
            axes.plot(*at, "o", color=colour, markersize=4 + 1.4 * log, label=f"_{p.channel}", **edge)
        front = sorted((p.psnr or 0.0, 100 * (p.test_accuracy or 0.0)) for p in shown if p.front)
        axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color=INK, linewidth=1, linestyle="--", zorder=1,
                  label="_Pareto front")  # fmt: skip
        axes.set(xlabel="PSNR of the strongest attack, dB (to the left: more private)", ylabel="test accuracy, %")
        axes.margins(0.12)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -4), min(high, 106))  # an interval over few seeds may leave what accuracies can be
        bar = figure.colorbar(ScalarMappable(norm, scale), ax=axes, fraction=0.03, pad=0.02, alpha=1)
        bar.set_ticks([0, 1, 2, 3, 4, 5], labels=["≤1", "2", "4", "8", "16", "32"])
        bar.set_label("bits/coordinate")
        tidy(axes)
        names = {p.channel: str(i) for i, p in enumerate(points, start=1)}
        if len(shown) <= NAMED:
            names = {p.channel: fill(p.channel, 30) for p in points}
        stairs = [s for (x, y), (a, b) in pairwise(front) for s in ((x, y, a, y), (a, y, a, b))]
        bars = [s for p in shown for s in _bars(p)]
        _label(
            figure,
            axes,
            [(p.psnr or 0.0, 100 * (p.test_accuracy or 0.0), names[p.channel]) for p in shown],
            stairs + bars,
        )

    return svg("frontier", (8.6, 5.2), draw)


def training_curves(run: Trained, name: str = "curves") -> str:
    """Accuracy and loss against epochs on both splits: means over seeds, bands at 95 %, a line per channel.

    Empty where nothing was measured twice.
    """
    channels = run.channels()
    found = {m: {c: run.band(c, m) for c in channels} for m in MEASURES}
    found = {m: {c: b for c, b in bands.items() if len(b.at) > 1} for m, bands in found.items()}
    found = {m: bands for m, bands in found.items() if bands}
    if not found:
        return ""
    from matplotlib.ticker import MaxNLocator

    columns = 2 if max(map(len, channels)) > 24 else 3
    lines = -(-len(channels) // columns)

    def draw(figure: Figure) -> None:
        handles: dict[str, Any] = {}
        for i, (measure, bands) in enumerate(found.items(), start=1):
            axes = figure.add_subplot(-(-len(found) // 2), 2, i)
            factor = 100 if measure.endswith("accuracy") else 1
            for channel, band in bands.items():
                look = line_of(channels.index(channel))
                mean, low, high = ([factor * v for v in side] for side in band[1:])
                handles[channel] = axes.plot(band.at, mean, label=channel, **look)[0]
                axes.fill_between(band.at, low, high, color=look["color"], alpha=0.15, linewidth=0, label=f"_{channel}")
            axes.set(title=MEASURES[measure], xlabel="epoch", ylabel="%" if factor == 100 else "")
            if factor == 100:  # an interval over few seeds may leave what accuracies can be
                low, high = axes.get_ylim()
                axes.set_ylim(max(low, -2), min(high, 102))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            tidy(axes)
        kept = [handles[c] for c in channels if c in handles]
        titles = [fill(str(h.get_label()), 46) for h in kept]
        figure.legend(kept, titles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)

    return svg(name, (8.6, 2.7 * -(-len(found) // 2) + 0.3 + 0.2 * lines), draw)


def line_of(k: int) -> dict[str, Any]:
    """How the k-th channel is drawn: colours first, then dashes, then widths."""
    turn = k // len(COLOURS)
    style = {"color": COLOURS[k % len(COLOURS)], "linestyle": STYLES[turn % len(STYLES)]}
    return style | {"linewidth": 1.3 + 0.9 * (turn // len(STYLES))}


def _sides(middle: float, ci: tuple[float, float] | None, factor: float) -> list[list[float]] | None:
    """An interval as matplotlib's distances below and above."""
    return None if ci is None else [[max(middle - factor * ci[0], 0.0)], [max(factor * ci[1] - middle, 0.0)]]


def _bars(p: Point) -> list[Segment]:
    """The error bars of a point, in data coordinates."""
    x, y = p.psnr or 0.0, 100 * (p.test_accuracy or 0.0)
    across = [(p.psnr_ci[0], y, p.psnr_ci[1], y)] if p.psnr_ci else []
    up = [(x, 100 * p.test_accuracy_ci[0], x, 100 * p.test_accuracy_ci[1])] if p.test_accuracy_ci else []
    return across + up


def _label(figure: Figure, axes: Axes, marks: list[tuple[float, float, str]], lines: list[Segment]) -> None:
    """Writes each name beside its mark, where it covers least of marks, upright or level `lines`, and earlier names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    FigureCanvasAgg(figure).draw()  # lays the figure out, so that sizes are known
    renderer = FigureCanvasAgg(figure).get_renderer()
    spots = [axes.transData.transform((x, y)) for x, y, _ in marks]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in spots]
    for x, y, a, b in lines:
        ends = axes.transData.transform([(x, y), (a, b)])
        # Two pixels wide: a line under a name is worse than none, and better than another name.
        taken.append(Bbox([ends.min(0) - 1, ends.max(0) + 1]))
    inside = axes.get_window_extent(renderer)
    for x, y, text in marks:
        best: tuple[float, Any, Any] | None = None
        for dx, dy, ha, va in PLACES:
            note = axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=8)
            box = note.get_window_extent(renderer)
            bad = sum(_area(Bbox.intersection(box, other)) for other in taken)
            bad += box.width * box.height - _area(Bbox.intersection(box, inside))
            if best is None or bad < best[0] - 1e-6:
                if best is not None:
                    best[1].remove()
                best = (bad, note, box)
            else:
                note.remove()
            if best[0] <= 1e-6:
                break
        assert best is not None
        taken.append(best[2])


def _area(box: Any) -> float:
    return 0.0 if box is None else box.width * box.height

"""Curves of trainings with nominal ε: one panel a label, with and without noise, every part, in % and of 10,000."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qleak.report.drawn import svg, tidy
from qleak.report.training import Band, Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(runs: Sequence[tuple[str, Trained]]) -> dict[float, dict[str, Band]]:
    """Test accuracy against epochs by nominal ε: `{ε: {part: band}}`, with each part's exact gradient as "without"."""
    found: dict[float, dict[str, Band]] = {}
    exact: dict[str, Band] = {}
    for part, run in runs:
        for fact in run.header.get("facts") or []:
            band, label = run.band(fact["channel"], "test_accuracy"), fact.get("nominal_epsilon")
            if label is not None and band.at:
                found.setdefault(label, {})[part or "with noise"] = band
            elif fact["channel"] == "fp32" and band.at:
                exact["without noise"] = band
    return {label: exact | parts for label, parts in sorted(found.items())}


def figure(runs: Sequence[tuple[str, Trained]], name: str = "nominal") -> str:
    """The panels as SVG: left axis in %, right axis in correct answers of 10,000; "" without a nominal ε."""
    found = panels(runs)
    if not found:
        return ""
    from matplotlib.ticker import MaxNLocator

    from qleak.report.plots import line_of

    names = list(dict.fromkeys(n for parts in found.values() for n in parts))
    columns = min(len(found), 3 if len(found) <= 6 else 5)
    rows = math.ceil(len(found) / columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for i, axes in enumerate(grid.flat):
            if i >= len(found):
                axes.set_visible(False)
                continue
            label = list(found)[i]
            for part, band in found[label].items():
                look = line_of(names.index(part))
                axes.plot(band.at, [100 * v for v in band.mean], marker="o", markersize=3, label=part, **look)
                low, high = ([100 * v for v in side] for side in (band.low, band.high))
                axes.fill_between(band.at, low, high, color=look["color"], alpha=0.15, linewidth=0, label=f"_{part}")
            axes.set(title=f"nominal ε {label:g}", ylim=(0, 100))
            tidy(axes)
            if i % columns == 0:
                axes.set_ylabel("test accuracy, %")
            if i % columns == columns - 1 or i == len(found) - 1:
                right = axes.secondary_yaxis("right", functions=(lambda v: 100 * v, lambda v: v / 100))
                right.set_ylabel("correct of 10,000")
            if i + columns >= len(found):
                axes.set_xlabel("epoch")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, titles = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, titles, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)

    return svg(name, (8.6, 0.7 + 2.3 * rows), draw)

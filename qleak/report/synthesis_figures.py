"""Figures of a synthesis as inline SVG: accuracy and ε along the way, and accuracy against ε at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qleak.report.drawn import INK, svg, tidy
from qleak.report.plots import line_of
from qleak.report.synthesis import Curve, Made, bare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 5.0  # budgets or steps further apart than this factor are drawn on a logarithmic axis


def curves(run: Made) -> str:
    """Accuracy against steps beside ε spent against steps, a line per arm, the floors as level bands.

    Empty where nothing was measured twice.
    """
    arms = [arm for arm in run.arms if not _is_floor(run, arm)]
    found = {arm: curve for arm in arms if len((curve := run.curve(arm)).at) > 1}
    if not found:
        return ""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharex=True)
        handles: dict[str, Any] = {}
        for arm, curve in found.items():
            look = line_of(arms.index(arm))
            handles[arm] = left.plot(curve.at, _percent(curve.mean), label=f"_{arm}", **look)[0]
            left.fill_between(
                curve.at,
                _percent(curve.low),
                _percent(curve.high),
                color=look["color"],
                alpha=0.15,
                linewidth=0,
                label=f"_{arm}",
            )
            spent = _known(curve)
            if spent:
                right.plot([t for t, _, _ in spent], [e for _, e, _ in spent], label=f"_{arm}", **look)
        _floors(left, run, handles)
        if len(handles) and not right.lines:
            right.text(0.5, 0.5, "no arm has an ε", ha="center", va="center", transform=right.transAxes)
        left.set(xlabel="steps", ylabel="accuracy on real images, %")
        right.set(xlabel="steps", ylabel="ε spent")
        right.set_ylim(bottom=0)
        _bounded(left)
        for axes in (left, right):
            tidy(axes)
        _legend(figure, handles)

    return svg("synthesis", (8.6, 3.3 + 0.11 * len(found)), draw)


def budgets(run: Made) -> str:
    """Accuracy against ε: marks with intervals at the end of every arm, thin lines along the way, the floor beneath.

    Arms without an ε are level dashed lines. Empty without a summary.
    """
    found = [s for s in run.header.get("summary") or [] if s["accuracy"] is not None]
    families = list(dict.fromkeys(bare(s["method"]) for s in found if not s["floor"]))
    known = [s for s in found if s["epsilon"] is not None and s["epsilon"] > 0]
    if not known:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        handles: dict[str, Any] = {}
        for k, family in enumerate(families):
            mine = [s for s in found if bare(s["method"]) == family and not s["floor"]]
            ended = sorted((s for s in mine if s in known), key=lambda s: s["epsilon"])
            look = line_of(k)
            for s in mine:
                way = [(e, a) for _, e, a in _known(run.curve(s["method"])) if e > 0]
                if len(way) > 1 and s["epsilon"] is not None:
                    thin: Any = look | {"linewidth": 0.9, "alpha": 0.6}
                    axes.plot([e for e, _ in way], [a for _, a in way], label=f"_{s['method']} · on the way", **thin)
            if ended:
                handles[family] = _points(axes, ended, **look, marker="o", markersize=5, label=f"_{family}")
            for s in (s for s in mine if s["epsilon"] is None):
                style: Any = {"color": look["color"], "linestyle": "--", "linewidth": 1}
                handles[f"{family} (no ε)"] = axes.axhline(100 * s["accuracy"], label=f"_{family} (no ε)", **style)
        floors = sorted((s for s in known if s["floor"]), key=lambda s: s["epsilon"])
        if len(floors) == 1:
            _floors(axes, run, handles)
        elif floors:
            handles["one noisy average"] = _points(
                axes, floors, color=INK, linestyle="--", marker="s", markersize=4, label="_one noisy average"
            )
        spread = [s["epsilon"] for s in known]
        if max(spread) > WIDE * min(spread):
            _logarithmic(axes)
        else:
            axes.set_xlim(left=0)
        axes.set(xlabel="ε spent (to the left: more private)", ylabel="accuracy on real images, %")
        _bounded(axes)
        tidy(axes)
        _legend(figure, handles)

    return svg("budgets", (8.6, 4.0 + 0.11 * len(families)), draw)


def _points(axes: Axes, found: Sequence[dict[str, Any]], **look: Any) -> Any:
    """Accuracies at their ε, joined, with 95 % intervals as bars."""
    mean = [100 * s["accuracy"] for s in found]
    around = [_interval(s) for s in found]
    sides = [[max(m - a[0], 0.0) for m, a in zip(mean, around, strict=True)],
             [max(a[1] - m, 0.0) for m, a in zip(mean, around, strict=True)]]  # fmt: skip
    return axes.errorbar([s["epsilon"] for s in found], mean, yerr=sides, capsize=3, **look)


def _interval(s: dict[str, Any]) -> tuple[float, float]:
    ci = s.get("accuracy_ci")
    low, high = ci if ci and None not in ci else (s["accuracy"], s["accuracy"])
    return 100 * low, 100 * high


def _floors(axes: Axes, run: Made, handles: dict[str, Any]) -> None:
    """A level line with its interval as a band for the one noisy average of every budget."""
    found = [s for s in run.header.get("summary") or [] if s["floor"] and s["accuracy"] is not None]
    for s, style in zip(found, ("--", ":", "-.", (0, (1, 4)), (0, (5, 6))) * len(found), strict=False):
        low, high = _interval(s)
        handles[s["method"]] = axes.axhline(
            100 * s["accuracy"], color=INK, linestyle=style, linewidth=1, label=f"_{s['method']}"
        )
        axes.axhspan(low, high, color=INK, alpha=0.1, linewidth=0, label=f"_{s['method']}")


def _known(curve: Curve) -> list[tuple[int, float, float]]:
    """(steps, ε, accuracy in percent) where there is an ε."""
    points = zip(curve.at, curve.epsilon, curve.mean, strict=True)
    return [(t, e, 100 * a) for t, e, a in points if e is not None]


def _is_floor(run: Made, arm: str) -> bool:
    return any(f["floor"] for f in run.header.get("facts") or [] if f["method"] == arm)


def _percent(values: list[float]) -> list[float]:
    return [100 * v for v in values]


def _bounded(axes: Axes) -> None:
    """An interval over few seeds may leave what accuracies can be."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2), min(high, 102))


def _logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))  # the usual one writes mathematics
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False, fontsize=8)

"""A figure as people take it away: SVG for the page, and the very numbers that were drawn as CSV.

The numbers are read back from the drawing itself, so that a figure and its table cannot differ. Series are named by the
artists' labels; a label that begins with "_" stays out of legends, and its underscore out of the table.

Matplotlib is imported inside, and only its objects are used: no pyplot, no global figure.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# At least 3:1 against white and against the report's dark background.
COLOURS = ("#3a7bd5", "#d0602b", "#17906b", "#b0509e", "#8a7a00", "#7a66c9")
STYLES = ("-", "--", "-.", ":")
INK = "#0a0b0c"  # stands for the page's text colour until the SVG is written
HEADS = ("panel", "series", "mark")  # of a table, before the two coordinates

Draw = Callable[["Figure"], None]


class Drawn(str):
    """Inline SVG text: text stays text and takes the page's colour, ids are its own, nothing points outside.

    Attributes:
        name: what it shows in one word; a file's name.
        size: width and height in inches.
        csv: every number drawn, with a header: `HEADS`, then both coordinates by the names of their axes.
    """

    name: str
    size: tuple[float, float]
    csv: str
    _draw: Draw

    @classmethod
    def of(cls, text: str, name: str, size: tuple[float, float], numbers: str, draw: Draw) -> Drawn:
        """SVG with what belongs to it."""
        made = cls(text)
        made.name, made.size, made.csv, made._draw = name, size, numbers, draw
        return made

    def png(self, dpi: int = 200) -> bytes:
        """The same drawing on white."""
        out = io.BytesIO()
        with _settings(self.name):
            _figure(self.size, self._draw, "white").savefig(out, format="png", dpi=dpi)
        return out.getvalue()

    def file(self) -> bytes:
        """The SVG as a file of its own: dark ink, and white paper by the viewer's choice."""
        head = '<?xml version="1.0" encoding="utf-8"?>\n'
        named = self.replace("<svg ", '<svg style="color: #0a0b0c; font-family: sans-serif" ', 1)
        return (head + named).encode()


def svg(name: str, size: tuple[float, float], draw: Draw) -> Drawn:
    """Draws once: SVG and numbers."""
    with _settings(name):
        figure = _figure(size, draw, "none")
        for axes in figure.axes:
            axes.set_facecolor("none")
        text = io.StringIO()
        figure.savefig(text, format="svg", dpi=144, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return Drawn.of(svg.replace(INK, "currentColor"), name, size, numbers(figure), draw)


def tidy(axes: Axes) -> None:
    """Faint grid behind, two spines."""
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def numbers(figure: Figure) -> str:
    """CSV of every line, bar, band and interval of a figure, in data coordinates, axes from left to right, top to bottom.

    A line across a whole panel has the other coordinate empty. Bands are their outlines. Nine digits.
    """
    shown = [a for a in figure.axes if a.get_visible() and a.get_label() != "<colorbar>"]
    titles = [[_line(t) for t in (a.get_title(), a.get_xlabel(), a.get_ylabel())] for a in shown]
    across, upright = ({t[i] for t in titles} - {""} for i in (1, 2))  # one name for all panels heads its column
    ways = [i for i, names in ((1, across), (2, upright)) if len(names) > 1]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [names.copy().pop() if len(names) == 1 else bare for names, bare in ((across, "x"), (upright, "y"))]
    writer.writerow((*HEADS, *heads, *(("", "x axis", "y axis")[i] for i in ways)))
    for axes, told in zip(shown, titles, strict=True):
        for series, mark, x, y in _marks(axes):
            writer.writerow((told[0], series, mark, _plain(x), _plain(y), *(told[i] for i in ways)))
    return out.getvalue()


def _line(text: str) -> str:
    return " ".join(text.split())


def _marks(axes: Axes) -> Iterator[tuple[str, str, Any, Any]]:
    """(series, mark, x, y) of what lies on axes; None where it reaches across."""
    import numpy as np
    from matplotlib.collections import LineCollection, PolyCollection, QuadMesh
    from matplotlib.container import Container
    from matplotlib.patches import Rectangle

    owner: dict[Artist, str] = {}
    for container in axes.containers:
        for child in _flat(container):
            owner[child] = (container.get_label() or "") if isinstance(container, Container) else ""
    across, upright = axes.get_yaxis_transform(which="grid"), axes.get_xaxis_transform(which="grid")
    for line in axes.get_lines():
        x, y = np.asarray(line.get_xdata(orig=False)), np.asarray(line.get_ydata(orig=False))
        series = _series(line, owner)
        if line.get_transform() == across:
            yield series, "level line", None, y[0]
        elif line.get_transform() == upright:
            yield series, "upright line", x[0], None
        else:
            mark = "point" if line.get_linestyle() in ("None", "", " ") else "line"
            yield from ((series, mark, a, b) for a, b in zip(x, y, strict=True))
    for found in axes.collections:
        series = _series(found, owner)
        if isinstance(found, LineCollection):
            yield from ((series, "interval", a, b) for part in found.get_segments() for a, b in part)
        elif isinstance(found, PolyCollection):
            yield from ((series, "band", a, b) for path in found.get_paths() for a, b in path.vertices)  # pyright: ignore[reportGeneralTypeIssues]
        elif not isinstance(found, QuadMesh):  # a colour bar's
            yield from ((series, "point", a, b) for a, b in found.get_offsets())  # pyright: ignore[reportGeneralTypeIssues]
    for patch in axes.patches:
        if isinstance(patch, Rectangle):
            left, low, wide, tall = patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()
            if patch.get_transform() - axes.transData == across - axes.transData:
                yield from ((_series(patch, owner), "level band", None, v) for v in (low, low + tall))
            else:
                middle = low + tall / 2
                yield from ((_series(patch, owner), "bar", v, middle) for v in (left, left + wide))


def _flat(container: Any) -> Iterator[Artist]:
    for child in container:
        if isinstance(child, tuple | list):
            yield from _flat(child)
        elif child is not None:
            yield child


def _series(artist: Artist, owner: dict[Artist, str]) -> str:
    for label in (str(owner.get(artist, "")), str(artist.get_label())):
        if label and not re.fullmatch(r"_child\d+|_nolegend_|_container\d+", label):
            return _line(label.removeprefix("_"))
    return ""


def _plain(value: Any) -> str:
    return "" if value is None else f"{float(value):.9g}"


def _settings(name: str) -> Any:
    from matplotlib import rc_context

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(inked, INK)
    settings |= {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9}
    return rc_context(settings)


def _figure(size: tuple[float, float], draw: Draw, paper: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor=paper)
    draw(figure)
    return figure

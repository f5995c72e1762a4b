"""Figures of a stored run: the picture grid as a PNG, loss curves and PSNR per arm as inline SVG.

Matplotlib is imported inside, and only its objects are used: no pyplot, no global figure.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from einops import rearrange

from qleak.errors import Expected, did_you_mean
from qleak.report.drawn import COLOURS, INK, STYLES, svg, tidy
from qleak.report.stored import Arm, Stored, by_arm, load, rgb, write_file
from qleak.report.words import floor
from qleak.store import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGEND = 8  # channels that fit a panel's own legend
DOTS = 1500  # more of them become a picture inside the SVG


def grid(folder: Path, out_png: Path, columns: Sequence[Arm] | Mapping[Arm, str] | None = None) -> Path:
    """Writes a PNG of victims × (original + arms): every image pixel a sharp square, the PSNR beneath.

    Args:
        folder: the run's folder.
        out_png: the file to write, atomically.
        columns: arms to show in this order, or arms with titles; all of them by default.

    Returns:
        `out_png`.

    Raises:
        Expected: the run has no pictures, or no such arm.
        Failed: the disk refused.
    """
    from matplotlib.figure import Figure

    run = load(folder)
    if not run.rows:
        raise Expected(f"Expected a run with pictures at {folder}, it has no rows yet.")
    arms = list(columns if columns is not None else run.arms())
    known = {" / ".join(arm): arm for arm in run.arms()}
    for arm in arms:
        if arm not in known.values():
            raise Expected(f"Unknown arm {' / '.join(arm)!r} of {folder}.{did_you_mean(' / '.join(arm), known)}")
    titles = columns if isinstance(columns, Mapping) else {arm: "\n".join(arm) for arm in arms}
    titles = {arm: "\n".join(fill(line, 20) for line in title.split("\n")) for arm, title in titles.items()}
    chosen = run.chosen()
    height, width = next(iter(run.originals.values())).shape[-2:]
    scale = max(1, round(168 / width))  # whole pixels, so that nearest neighbour stays exact
    gap, caption, head = 16, 30, 14 + 22 * max(1 + title.count("\n") for title in ("", *titles.values()))
    w, h = (len(arms) + 1) * (scale * width + gap) + gap, head + len(run.originals) * (scale * height + caption)
    figure = Figure(figsize=(w / 100, h / 100), dpi=100, facecolor="white")
    for i, (image, original) in enumerate(run.originals.items()):
        shown = [(original, f"image {image}", False)]
        for arm in arms:
            row = chosen[*arm, image]
            shown.append((run.guess(row), f"{row['psnr']:.1f} dB", row["success"]))
        for j, (pixels, text, bold) in enumerate(shown):
            left, top = gap + j * (scale * width + gap), head + i * (scale * height + caption)
            axes = figure.add_axes((left / w, 1 - (top + scale * height) / h, scale * width / w, scale * height / h))
            axes.imshow(rearrange(rgb(pixels), "c h w -> h w c").numpy(), interpolation="nearest", vmin=0, vmax=1)
            axes.set_axis_off()
            middle = (left + scale * width / 2) / w
            figure.text(middle, 1 - (top + scale * height + 4) / h, text, ha="center", va="top", size=11,
                        weight="bold" if bold else "normal")  # fmt: skip
            if i == 0:
                title = titles[arms[j - 1]] if j else "original"
                figure.text(middle, 1 - (head - 8) / h, title, ha="center", va="bottom", size=12, parse_math=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return write_file(out_png, png.getvalue())


def most_curves(run: Stored) -> int:
    """Lanes of an arm whose losses are drawn: fewer where arms are many, so that the page stays light."""
    return max(2, min(24, 480 // max(len(run.arms()), 1)))


def loss_curves(run: Stored) -> str:
    """The attackers' own losses against closures as SVG: a panel per attack, a colour per channel.

    Empty where no attack has steps.
    """
    from matplotlib.ticker import LogFormatter

    panels: dict[str, dict[str, list[Any]]] = {}
    for channel, attack in run.arms():
        curves = [c for c in run.curves((channel, attack), most_curves(run)) if len(c.at) > 1]
        if curves:
            panels.setdefault(attack, {})[channel] = curves
    if not panels:
        return ""
    channels = _channels(run)

    def draw(figure: Figure) -> None:
        wide = min(len(panels), 3)
        for i, (attack, found) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(-(-len(panels) // wide), wide, i)
            least = min((v for curves in found.values() for c in curves for v in c.loss if v > 0), default=1e-16)
            for channel, curves in found.items():
                k = channels.index(channel)
                for n, curve in enumerate(curves):
                    loss = [max(v, least / 10) for v in curve.loss]  # a loss of 0 lies on the floor
                    style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "linestyle": STYLES[k % len(STYLES)]}
                    style |= {"linewidth": 1.8} if curve.selected else {"linewidth": 0.8, "alpha": 0.5}
                    chosen = " · selected" if curve.selected else ""
                    axes.plot(curve.at, loss, label=f"_{channel} · lane {n + 1}{chosen}" if n else channel, **style)
            left = (i - 1) % wide == 0
            axes.set(title=fill(attack, 36), xlabel="closures", ylabel="own loss" if left else "", yscale="log")
            axes.yaxis.set_major_formatter(LogFormatter())  # the usual one writes mathematics
            axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
            if len(channels) <= LEGEND:
                axes.legend(frameon=False, fontsize=8)
            tidy(axes)
        if len(channels) > LEGEND:  # one for all panels, a line per channel
            lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
            kept = {fill(c, 60): lines[c] for c in channels if c in lines}
            figure.legend(kept.values(), kept.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)

    below = 0.09 * len(channels) if len(channels) > LEGEND else 0
    return svg("loss", (3.1 * min(len(panels), 3) + 0.6, 2.9 * -(-len(panels) // 3) + below), draw)


def psnr_bars(run: Stored) -> str:
    """PSNR per arm as SVG: bar the mean of the selected restarts, dots the images, tick the strongest control."""
    arms, chosen, channels = by_arm(run.header), run.chosen(), _channels(run)
    if not arms:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for y, ((channel, attack), found) in enumerate(arms.items()):
            colour = COLOURS[channels.index(channel) % len(COLOURS)]
            name = f"_{channel} · {attack}"
            axes.barh(y, found["none"]["psnr_selected"], height=0.6, color=colour, alpha=0.35, label=f"{name} · mean")
            dots = [r["psnr"] for (c, a, _), r in chosen.items() if (c, a) == (channel, attack)]
            axes.plot(dots, [y] * len(dots), "o", color=colour, markersize=5, alpha=0.8, label=f"{name} · image")
            if (control := floor(found)) is not None:
                axes.plot([control] * 2, [y - 0.38, y + 0.38], color=INK, linewidth=2, label=f"{name} · control")
        axes.axvline(run.header["plan"]["success"], color=INK, linestyle="--", linewidth=1, label="_threshold")
        axes.set_yticks(range(len(arms)), [fill(" · ".join(arm), 44) for arm in arms])
        axes.set(xlabel="PSNR of the selected restart, dB", xlim=(0, None))
        axes.invert_yaxis()
        tidy(axes)

    return svg("psnr", (8, 0.9 + 0.34 * len(arms)), draw)


def psnr_strips(run: Stored) -> str:
    """PSNR of every lane as SVG: a panel per attack, a line per channel.

    Dots are lanes (the selected ones ringed), the tick is the mean of the selected ones, the bar spans the quartiles,
    the band what the controls reach: their lanes, least to greatest. Dots are placed up and down by a fixed rule.
    """
    arms, channels = run.arms(), _channels(run)
    attacks = list(dict.fromkeys(attack for _, attack in arms))
    if not arms:
        return ""
    lanes: dict[tuple[str, str], list[Row]] = {arm: [] for arm in arms}
    controls: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}
    for r in run.rows:
        if r["psnr"] is not None and (arm := (r["channel"], r["attack"])) in lanes:
            if r["control"] == "none":
                lanes[arm].append(r)
            else:
                controls[arm].append(r["psnr"])
    heavy = sum(map(len, lanes.values())) > DOTS
    wide = min(len(attacks), 5)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(-(-len(attacks) // wide), wide, sharex=True, sharey=True, squeeze=False).flatten()
        for axes in panels[len(attacks) :]:
            axes.set_visible(False)
        for i, (axes, attack) in enumerate(zip(panels, attacks, strict=False)):
            for y, channel in enumerate(channels):
                _strip(axes, y, channel, lanes.get((channel, attack), []), controls.get((channel, attack), []), heavy)
            axes.axvline(run.header["plan"]["success"], color=INK, linestyle="--", linewidth=1, label="_threshold")
            axes.set(title=fill(attack, 24), ylim=(len(channels) - 0.5, -0.5))
            if i + wide >= len(attacks):
                axes.set_xlabel("PSNR, dB")
                axes.tick_params(labelbottom=True)
            tidy(axes)
        panels[0].set_yticks(range(len(channels)), [fill(c, 40) for c in channels], fontsize=8)

    tall = (0.34 if len(channels) < 12 else 0.26) * len(channels) + 0.9
    return svg("strips", (2.4 + min(1.8, 8 / wide) * wide, tall * -(-len(attacks) // wide)), draw)


def _strip(axes: Axes, y: int, name: str, lanes: list[Row], controls: list[float], heavy: bool) -> None:
    from numpy import percentile

    colour = COLOURS[y % len(COLOURS)]
    if controls:
        low, high = min(controls), max(controls)
        axes.barh(y, high - low, left=low, height=0.86, color=INK, alpha=0.13, linewidth=0, label=f"_{name} · controls")
    if not lanes:
        return
    psnr = [r["psnr"] for r in lanes]
    if len(psnr) >= 8:
        axes.plot(percentile(psnr, [25, 75]), [y, y], color=colour, linewidth=6, alpha=0.3, solid_capstyle="butt",
                  label=f"_{name} · quartiles")  # fmt: skip
    at = [y + 0.6 * ((0.618034 * i) % 1 - 0.5) for i in range(len(psnr))]
    axes.plot(psnr, at, "o", color=colour, markersize=2.6, markeredgewidth=0, alpha=0.75, rasterized=heavy,
              label=f"_{name} · lane")  # fmt: skip
    chosen = [(r["psnr"], h) for r, h in zip(lanes, at, strict=True) if r["selected"]]
    if chosen:
        x, h = zip(*chosen, strict=True)
        axes.plot(x, h, "o", color="none", markeredgecolor=INK, markersize=4.4, markeredgewidth=0.7, rasterized=heavy,
                  label=f"_{name} · selected")  # fmt: skip
        axes.plot(
            [sum(x) / len(x)] * 2, [y - 0.42, y + 0.42], color=colour, linewidth=2, label=f"_{name} · mean of selected"
        )


def _channels(run: Stored) -> list[str]:
    return list(dict.fromkeys(channel for channel, _ in run.arms()))

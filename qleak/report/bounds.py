"""Attacks beside what no attack can beat: the gap of every channel, from a run's header alone.

For noise and coins the bound is the local one. A code without noise has no Fisher information: its bound is that of its
cells ("chord"), and the Gaussian line stands beside it as an estimate.
"""

from __future__ import annotations

from math import log10
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from qleak.report.drawn import COLOURS, svg, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = {
    "cramer-rao": "unbiased attacks (Cramér–Rao)",
    "local": "local, with the prior",
    "chord": "cells, with the prior",
    "van-trees": "average over the prior (van Trees)",
    "rate": "bits sent (rate–distortion)",
    "dp-unbiased": "privacy, unbiased attacks",
    "dp-reconstruction": "privacy, any attack",
}
VACUOUS = 100.0  # dB from which on a bound says nothing


class Gap(NamedTuple):
    """One channel: its best attack and its bound, in dB; `gap` is positive where the attack stays below the bound.

    `kind` is the bound's: "local" for noise and coins, "chord" for codes without noise. `estimate` is what least squares
    would reach if the rounding of such a code were Gaussian noise: no bound, and often beaten.
    """

    channel: str
    attack: str
    psnr: float
    bound: float
    rigorous: bool
    gap: float
    kind: str = "local"
    estimate: float | None = None


def gaps(header: dict[str, Any]) -> list[Gap]:
    """Best attack against its bound, for every channel that has both; [] where no bounds were computed."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for s in (header.get("bounds") or {}).get("summary") or []:
        if s["psnr"] is not None:
            found.setdefault(s["channel"], {})[s["bound"]] = s
    out = []
    for channel, kinds in found.items():
        mine = reached(header, channel)
        line = kinds.get("local")
        rough = bool(line and line.get("estimate"))
        bound = kinds.get("chord") or (None if rough else line)
        if bound and mine:
            attack, psnr = max(mine, key=lambda a: a[1])
            more = (bound["bound"], line["psnr"] if line and rough else None)
            out.append(Gap(channel, attack, psnr, bound["psnr"], bound["rigorous"], bound["psnr"] - psnr, *more))
    return out


def reached(header: dict[str, Any], channel: str) -> list[tuple[str, float]]:
    """(attack, its PSNR) through a channel; of a captured batch the PSNR of its mean squared error, as bounds count it."""
    found = header.get("summary") or []
    if header.get("kind") == "captured":
        return [(s["attack"], -10 * log10(fmean(10 ** (-v / 10) for v in s["psnr"]))) for s in found if s["psnr"]]
    return [(a["attack"], a["psnr_selected"]) for a in found if (a["channel"], a["control"]) == (channel, "none")]


def table(header: dict[str, Any]) -> list[tuple[str, ...]]:
    """(channel, best attack, its PSNR, bound, gap) as text, a line per channel."""
    return [(g.channel, g.attack, f"{g.psnr:.1f}", f"{g.bound:.1f}", f"{g.gap:+.1f}") for g in gaps(header)]


def lines(header: dict[str, Any]) -> list[str]:
    """The bounds in sentences, for the terminal: the widest and the narrowest gap, theorems that say something, and the prior."""
    found = gaps(header)
    if not found:
        return []
    near, far = min(found, key=lambda g: g.gap), max(found, key=lambda g: g.gap)
    more = f", {far.gap:.1f} dB on {far.channel}" if far != near else ""
    said = [
        f"Bounds (linearised; images as {header['bounds']['prior']}): attacks stay {near.gap:.1f} dB below on "
        f"{near.channel}{more}."
    ]
    rough = [g for g in found if g.estimate is not None]
    if rough:
        told = ", ".join(f"{g.channel} {g.estimate:.1f} dB" for g in rough)
        said.append(f"Were rounding Gaussian noise, least squares would reach: {told}. An estimate, no bound.")
    beaten = [g.channel for g in found if g.gap < 0]
    if beaten:
        said.append(
            f"Beaten on {', '.join(beaten)}: the update is not linear there, or the image not one of the prior."
        )
    for s in header["bounds"]["summary"]:
        if (
            s["rigorous"]
            and s["bound"] in ("rate", "dp-reconstruction")
            and s["psnr"] is not None
            and s["psnr"] < VACUOUS
        ):
            said.append(f"No attack beats {s['psnr']:.1f} dB on {s['channel']}: {s['assumptions']}.")
    return said


def figure(header: dict[str, Any]) -> str:
    """The band between best attack and bound as SVG, a line per channel; empty without bounds."""
    found = gaps(header)
    if not found:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        at = range(len(found), 0, -1)
        axes.hlines(
            at,
            [g.psnr for g in found],
            [g.bound for g in found],
            color="0.8",
            linewidth=6,
            label="_from best attack to bound",
        )
        axes.plot([g.psnr for g in found], at, "o", color=COLOURS[0], label="best attack")
        axes.plot([g.bound for g in found], at, "|", color=COLOURS[1], markersize=12, label="bound")
        rough = [(g.estimate, y) for g, y in zip(found, at, strict=True) if g.estimate is not None]
        if rough:
            xs, ys = zip(*rough, strict=True)
            axes.plot(xs, ys, "x", color="0.4", label="Gaussian estimate, no bound")
        axes.set_yticks(list(at), [g.channel for g in found])
        axes.set(xlabel="PSNR, dB")
        axes.legend(frameon=False)
        tidy(axes)

    return svg("bounds", (7.0, 0.8 + 0.3 * len(found)), draw)

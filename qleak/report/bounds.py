"""Attacks beside what no attack can beat: the gap of every channel, from a run's header alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from qleak.report.figures import COLOURS, svg, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = {
    "cramer-rao": "unbiased attacks (Cramér–Rao)",
    "local": "local, with the prior",
    "van-trees": "average over the prior (van Trees)",
    "rate": "bits sent (rate–distortion)",
    "dp-unbiased": "privacy, unbiased attacks",
    "dp-reconstruction": "privacy, any attack",
}
VACUOUS = 100.0  # dB from which on a bound says nothing


class Gap(NamedTuple):
    """One channel: its best attack and a bound, in dB; `gap` is positive where the attack stays below the bound."""

    channel: str
    attack: str
    psnr: float
    bound: float
    rigorous: bool
    gap: float


def gaps(header: dict[str, Any], kind: str = "local") -> list[Gap]:
    """Best attack against one kind of bound, for every channel that has both; [] where no bounds were computed."""
    out = []
    for s in (header.get("bounds") or {}).get("summary") or []:
        mine = [a for a in header.get("summary") or [] if (a["channel"], a["control"]) == (s["channel"], "none")]
        if s["bound"] == kind and s["psnr"] is not None and mine:
            best = max(mine, key=lambda a: a["psnr_selected"])
            psnr = best["psnr_selected"]
            out.append(Gap(s["channel"], best["attack"], psnr, s["psnr"], s["rigorous"], s["psnr"] - psnr))
    return out


def table(header: dict[str, Any]) -> list[tuple[str, ...]]:
    """(channel, best attack, its PSNR, bound, gap) as text, a line per channel."""
    return [(g.channel, g.attack, f"{g.psnr:.1f}", f"{g.bound:.1f}", f"{g.gap:+.1f}") for g in gaps(header)]


def lines(header: dict[str, Any]) -> list[str]:
    """The bounds in sentences, for the terminal: the widest and the narrowest gap, theorems that say something, and the prior."""
    found = gaps(header)
    if not found:
        return []
    near, far = min(found, key=lambda g: g.gap), max(found, key=lambda g: g.gap)
    said = [
        f"Bounds (local linearised, {header['bounds']['prior']}): attacks stay {near.gap:.1f} dB below on {near.channel}, "
        f"{far.gap:.1f} dB on {far.channel}."
    ]
    beaten = [g.channel for g in found if g.gap < 0]
    if beaten:
        said.append(f"Beaten on {', '.join(beaten)}: this bound is an approximation there.")
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
    """The band between best attack and local bound as SVG, a line per channel; empty without bounds."""
    found = gaps(header)
    if not found:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        at = range(len(found), 0, -1)
        axes.hlines(at, [g.psnr for g in found], [g.bound for g in found], color="0.8", linewidth=6)
        axes.plot([g.psnr for g in found], at, "o", color=COLOURS[0], label="best attack")
        axes.plot([g.bound for g in found], at, "|", color=COLOURS[1], markersize=12, label="local bound")
        axes.set_yticks(list(at), [g.channel for g in found])
        axes.set(xlabel="PSNR, dB")
        axes.legend(frameon=False)
        tidy(axes)

    return svg("bounds", (7.0, 0.8 + 0.3 * len(found)), draw)

"""The top of a page: the verdict in clauses, one word on how it went, and the few numbers that a reader takes along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qleak.report import words
from qleak.report.compare import accuracy
from qleak.report.stored import by_arm


class Tile(NamedTuple):
    """One number with its name, and what it is of."""

    name: str
    value: str
    note: str = ""


def clauses(verdict: str, lead_is_title: bool = False) -> tuple[str, list[str]]:
    """The first clause and the others of a verdict, without its first word.

    With `lead_is_title` the first clause is what stands before the first colon.
    """
    text = verdict.removeprefix("Verdict: ")
    head, dot, last = text.rpartition(". ")
    if dot and "; " in head and "; " not in last:  # a sentence of its own behind the clauses
        text = f"{head}; {last}"
    if lead_is_title and ": " in text.split("; ")[0]:
        lead, rest = text.split(": ", 1)
        return f"{lead}:", rest.split("; ")
    lead, *rest = text.split("; ")
    return lead, rest


def tag(header: dict[str, Any]) -> tuple[str, str]:
    """(class of the page's style, words): whether images were rebuilt; ("", "") where that is not the question."""
    summary = header.get("summary")
    if not summary:
        return "none", "No result yet"
    if header.get("kind") == "audit":
        leaks = {c for (c, _), found in by_arm(header).items() if found["none"]["recovered"]}
        return ("leak", "Images were rebuilt") if leaks else ("held", "No image was rebuilt")
    if header.get("kind") == "captured":
        return ("leak", "Images were rebuilt") if summary[0].get("rebuilt") else ("held", "No image was rebuilt")
    return "", ""


def audit(header: dict[str, Any]) -> list[Tile]:
    """Of an audit: channels that leak, the best picture, the strongest control, ε."""
    arms = by_arm(header)
    if not arms:
        return []
    channels = list(dict.fromkeys(channel for channel, _ in arms))
    leaks = {c for (c, _), found in arms.items() if found["none"]["recovered"]}
    (channel, attack), found = max(arms.items(), key=lambda item: item[1]["none"]["psnr_selected_max"])
    best = found["none"]
    # A coded channel says more than the exact gradient.
    coded = {arm: f for arm, f in arms.items() if arm[0] != "fp32"} or arms
    (through, by), most = max(
        coded.items(), key=lambda item: (item[1]["none"]["recovered"], item[1]["none"]["psnr_selected"])
    )
    names = words.names_apart({a for _, a in arms})
    floors = [f for f in map(words.floor, arms.values()) if f is not None]
    known = [s["epsilon"] for f in arms.values() for s in f.values() if s.get("epsilon") is not None]
    return [
        Tile("Images rebuilt", f"{most['none']['recovered']} of {most['none']['images']}", f"{names[by]} on {through}"),
        Tile("Channels that leak", f"{len(leaks)} of {len(channels)}", f"above {header['plan']['success']:g} dB and every control"),
        Tile("Best picture", f"{best['psnr_selected_max']:.1f} dB", f"{names[attack]} on {channel}"),
        Tile("Strongest control", f"{max(floors):.1f} dB" if floors else "—", "what such attacks draw without this message"),
        Tile("Smallest ε", f"{min(known):.3g}" if known else "none", "of one message" if known else "nothing is differentially private"),
    ]  # fmt: skip


def captured(header: dict[str, Any]) -> list[Tile]:
    """Of a captured update: images, how well the message is explained, the best control."""
    if not header.get("summary"):
        return []
    s = header["summary"][0]
    tiles = [Tile("Images rebuilt", f"{s['rebuilt']} of {s['images']}", s["attack"].split("(")[0])]
    if s.get("psnr"):
        tiles.append(Tile("Best picture", f"{max(s['psnr']):.1f} dB", "against the truth that was given"))
    tiles.append(Tile("Unexplained", _ratio(s["residual"]), "of the message, by the best guess"))
    tiles.append(Tile("Best control", _ratio(s["control"]), "left unexplained without the client's image"))
    return tiles


def training(header: dict[str, Any]) -> list[Tile]:
    """Of a training: the exact gradient, the best and the worst coded channel, seeds."""
    known = [s for s in header.get("summary") or [] if s["test_accuracy"] is not None]
    if not known:
        return []
    base = [s for s in known if s["channel"] == "fp32"]
    coded = sorted((s for s in known if s["channel"] != "fp32"), key=lambda s: -s["test_accuracy"])
    tiles = [_learnt("Exact gradient", base[0])] if base else []
    tiles += [_learnt("Best coded channel" if base else "Best channel", coded[0])] if coded else []
    tiles += [_learnt("Worst channel", coded[-1])] if len(coded) > 1 else []
    seeds = max(s["n"] for s in known)
    return [*tiles, Tile("Seeds", f"{seeds}", f"{max(s['epoch'] for s in known)} epochs each")]


def synthesis(header: dict[str, Any]) -> list[Tile]:
    """Of a synthesis: the best arm with an ε, the best without, one noisy average."""
    known = [s for s in header.get("summary") or [] if s["accuracy"] is not None]
    private = [s for s in known if not s["floor"] and s["epsilon"] is not None]
    free = [s for s in known if not s["floor"] and s["epsilon"] is None]
    floors = [s for s in known if s["floor"]]
    titles = (("Best with an ε", private), ("One noisy average", floors), ("Best without any ε", free))
    tiles = []
    for title, mine in titles:
        if mine:
            best = max(mine, key=lambda s: s["accuracy"])
            tiles.append(Tile(title, accuracy(best["accuracy"], best.get("accuracy_ci")), best["method"]))
    return tiles


def frontier(points: Sequence[Any]) -> list[Tile]:
    """Of a frontier: channels on it, the most private one that still learns nearly as well as the best."""
    both = [p for p in points if p.psnr is not None and p.test_accuracy is not None]
    if not both:
        return []
    front, top = [p for p in both if p.front], max(p.test_accuracy for p in both)
    near = min((p for p in both if p.test_accuracy >= top - 0.02), key=lambda p: p.psnr)
    tiles = [
        Tile("On the Pareto front", f"{len(front)} of {len(both)}", "channels"),
        Tile("Best accuracy", f"{100 * top:.1f}%", max(both, key=lambda p: p.test_accuracy).channel),
        Tile("Least leakage within 2 points", f"{near.psnr:.1f} dB", near.channel),
    ]
    if near.recovered is not None:
        tiles.append(Tile("Rebuilt through that", f"{near.recovered} of {near.images}", "images, strongest attack"))
    return tiles


def _learnt(title: str, s: dict[str, Any]) -> Tile:
    return Tile(title, accuracy(s["test_accuracy"], s.get("test_accuracy_ci")), s["channel"])


def _ratio(value: float | None) -> str:
    return "—" if value is None else f"{value:.2g}"

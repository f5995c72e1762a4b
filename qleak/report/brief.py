"""A run's verdict in a few words, from its run.json alone and without torch: for lists of many runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def verdict(header: dict[str, Any]) -> str:
    """What came out, shortest first; "" where there is nothing yet or the summary is of another shape."""
    if header.get("status") == "failed":
        return str(header.get("error") or "failed")
    try:
        found = header.get("summary") or []
        return KINDS[header["kind"]](found) if found else ""
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return ""


def audit(summary: list[dict[str, Any]]) -> str:
    """The strongest attack behind each channel: images rebuilt, best PSNR."""
    said = []
    for name, mine in _by("channel", [s for s in summary if s.get("control") == "none"]).items():
        best = max(mine, key=lambda s: (s["recovered"], s["psnr_selected_max"]))
        said.append(f"{name} {best['recovered']}/{best['images']} rebuilt, best {best['psnr_selected_max']:.1f} dB")
    return "; ".join(said)


def training(summary: list[dict[str, Any]]) -> str:
    """Test accuracy of each channel."""
    return "; ".join(f"{s['channel']} {_share(s['test_accuracy'])}" for s in summary)


def study(summary: list[dict[str, Any]]) -> str:
    """A frontier's channels, or an audit's line for each part."""
    if "part" in summary[0]:
        return "; ".join(f"{part}: {audit(mine)}" for part, mine in _by("part", summary).items())
    said = []
    for s in summary:
        psnr = "" if s.get("psnr") is None else f"{s['psnr']:.1f} dB"
        accuracy = "" if s.get("test_accuracy") is None else _share(s["test_accuracy"])
        said.append(f"{s['channel']} {' at '.join(filter(None, (accuracy, psnr)))}".strip())
    return "; ".join(said)


def synthesis(summary: list[dict[str, Any]]) -> str:
    """Accuracy of a classifier trained on what each method made, at each budget."""
    arms = [s for s in summary if s["accuracy"] is not None]
    return "; ".join(f"{s['method'].split('(')[0]} {_share(s['accuracy'])} at ε {s['target_epsilon']:g}" for s in arms)


def captured(summary: list[dict[str, Any]]) -> str:
    """The verdict of a captured update."""
    return f"{summary[0]['verdict']}: {summary[0]['rebuilt']}/{summary[0]['images']}"


KINDS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "audit": audit, "training": training, "study": study, "synthesis": synthesis, "captured": captured,
}  # fmt: skip


def _by(field: str, summary: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for s in summary:
        found.setdefault(s[field], []).append(s)
    return found


def _share(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.1%}"

"""The ε ledger of a page: what every channel spends, on how many messages, and what that says; or that nothing has an ε."""

from __future__ import annotations

from typing import Any

from qleak.report import words

HEADS = ("ε of one message", "messages", "ε of all of them", "δ", "what it says")
NONE = (
    "No channel of this run carries an ε: nothing here is differentially private, and no table of attacks can stand in "
    "for that."
)
NOTE = (
    "ε bounds every attack, also those that nobody has thought of; a PSNR only those that were run. It is derived from what "
    "each channel sends (bound, noise, sampling, number of messages), and from nothing else. Strong (up to 1), reasonable "
    "(up to 10) and weak (above) are the words of Ponomareva et al. 2023, How to DP-fy ML (JAIR), about a whole training; they "
    "are that guide's, not a measurement of this run."
)


def rows(headers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each channel of audits and trainings that has an ε, claims one or is called by one, by the part's name."""
    found = []
    for part, header in headers.items():
        kind, delta = header.get("kind"), (header.get("plan") or {}).get("delta")
        ends = {s["channel"]: s for s in header.get("summary") or [] if "channel" in s}
        for fact in header.get("facts") or []:
            if "channel" not in fact:
                continue
            end = ends.get(fact["channel"], {})
            one, claimed = fact.get("epsilon"), end.get("claimed_epsilon")
            total = end.get("epsilon") if kind == "training" else one
            if one is None and total is None and claimed is None and fact.get("nominal_epsilon") is None:
                continue
            sent = end.get("rounds") if kind == "training" else 1
            name = " · ".join(filter(None, [part, fact["channel"]]))
            cells = [_short(one), words.number(sent, "d"), _short(total), words.number(delta, "g")]
            cells.append(_says(one if total is None else total, claimed, fact.get("nominal_epsilon")))
            found.append({"channel": name, "number": None, "front": False, "cells": cells})
    return found


def table(headers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Heads, rows and the note; without rows, what that means. {} for runs whose channels are not known yet."""
    known = {name: h for name, h in headers.items() if any("channel" in f for f in h.get("facts") or [])}
    if not known:
        return {}
    found = rows(known)
    return {"heads": HEADS, "rows": found, "note": NOTE if found else NONE}


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _says(epsilon: float | None, claimed: float | None, nominal: float | None) -> str:
    if epsilon is None:
        if claimed is not None:
            return f"{claimed:.3g} is claimed in print: no guarantee"
        return f"{nominal:g} is a label: no guarantee" if nominal is not None else "no guarantee"
    if epsilon <= 1:
        return "strong guarantee"
    return "reasonable guarantee" if epsilon <= 10 else "weak or no guarantee"

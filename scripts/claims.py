"""What a recipe's docstring claims, and whether a run's summary bears it out.

A claim is a line `CHANNEL ATTACK FIELD >= NUMBER` (or `<=`) under "Claims:" in the docstring; the fields are
those of run.json's summary for the runs without control. In place of an attack stands `training` for what is
learnt through a channel, `study` for a point of a joined table, `round-N` and an attack's name joined by a dot
(`round-1.dlg`) for an audit inside a training. The part of a study of audits stands in front of the channel
(`batch-4 fp32`). For a synthesis an arm's name stands in place of the channel and `synthesis` in place of an attack
(`one noisy average synthesis accuracy >= 0.7`). "Claims (--data cifar10-12k):" names the flags they were measured
with.
"""

from __future__ import annotations

import re
import shlex
from typing import Any, NamedTuple

HEAD = re.compile(r"^Claims(?: \((.*)\))?:$", re.M)
LINE = re.compile(r"^\s*(.+?) +([\w.-]+) +(\w+) +(>=|<=) +([\d.]+)$", re.M)


class Claim(NamedTuple):
    """One line of a docstring."""

    channel: str
    attack: str
    field: str
    relation: str
    number: float

    def __str__(self) -> str:
        return f"{self.channel} {self.attack} {self.field} {self.relation} {self.number:g}"


def claims(doc: str) -> list[Claim]:
    """Every claim in a docstring."""
    head = HEAD.search(doc)
    return [Claim(c, a, f, r, float(n)) for c, a, f, r, n in LINE.findall(doc[head.end() :])] if head else []


def flags(doc: str) -> list[str]:
    """The flags that the claims of a docstring are about; none for the recipe as it is."""
    head = HEAD.search(doc)
    return shlex.split(head.group(1)) if head and head.group(1) else []


def measured(claim: Claim, summary: list[dict[str, Any]]) -> float:
    """The number that a summary has for a claim; NaN where it has none."""
    mine = [s for s in summary if place(s) == claim.channel and arm(s) == claim.attack]
    found = [s[claim.field] for s in mine if s.get(claim.field) is not None]
    return float(found[0]) if found else float("nan")


def check(claim: Claim, summary: list[dict[str, Any]]) -> tuple[bool, float]:
    """Whether the summary bears the claim out, and the number it has. No number bears nothing out."""
    value = measured(claim, summary)
    return (value >= claim.number if claim.relation == ">=" else value <= claim.number), value


def place(line: dict[str, Any]) -> str:
    """The channel of a line, the study's part in front where audits stand side by side: `batch-4 fp32`; or the arm."""
    if "method" in line:
        return line["method"]
    return f"{line['part']} {line['channel']}" if "part" in line else line["channel"]


def arm(line: dict[str, Any]) -> str:
    """What a line of a summary is about, as claims name it; "" for a control."""
    if "method" in line:
        return "synthesis"
    if "front" in line:  # its "control" is a number: the strongest one of that channel
        return "study"
    if "control" not in line:
        return "training"
    name = line["attack"].split("(")[0] if line["control"] == "none" else ""
    return f"round-{line['round']}.{name}" if name and "round" in line else name

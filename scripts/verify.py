"""Law 7: what a recipe's docstring claims, compared with what its run says. `just verify`.

A claim is a line `CHANNEL ATTACK FIELD >= NUMBER` (or `<=`) under "Claims:" in the docstring; the fields are
those of run.json's summary for the runs without control. In place of an attack stands `training` for what is
learnt through a channel, `study` for a point of a joined table, `round-N` and an attack's name joined by a dot
(`round-1.dlg`) for an audit inside a training. The part of a study of audits stands in front of the channel
(`batch-4 fp32`). For a synthesis an arm's name stands in place of the channel and `synthesis` in place of an attack
(`one noisy average synthesis accuracy >= 0.7`). "Claims (--data cifar10-12k):" names the flags they were measured
with. Runs are made, or resumed, under runs/.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from qleak.cli import recipes

HEAD = re.compile(r"^Claims(?: \((.*)\))?:$", re.M)
LINE = re.compile(r"^\s*(.+?) +([\w.-]+) +(\w+) +(>=|<=) +([\d.]+)$", re.M)


def claims(doc: str) -> list[tuple[str, str, str, str, float]]:
    """(channel, attack, field, relation, number) of every claim in a docstring."""
    head = HEAD.search(doc)
    return [(c, a, f, r, float(n)) for c, a, f, r, n in LINE.findall(doc[head.end() :])] if head else []


def flags(doc: str) -> list[str]:
    """The flags that the claims of a docstring are about; none for the recipe as it is."""
    head = HEAD.search(doc)
    return shlex.split(head.group(1)) if head and head.group(1) else []


def check(claim: tuple[str, str, str, str, float], summary: list[dict]) -> tuple[bool, float]:
    """Whether the summary bears the claim out, and the number it has."""
    channel, attack, field, relation, number = claim
    mine = [s for s in summary if place(s) == channel and arm(s) == attack]
    found = [s[field] for s in mine if s.get(field) is not None]
    if not found:
        return False, float("nan")
    return (found[0] >= number if relation == ">=" else found[0] <= number), found[0]


def place(line: dict) -> str:
    """The channel of a line, with the study's part in front where audits stand side by side: `batch-4 fp32`; or the arm."""
    if "method" in line:
        return line["method"]
    return f"{line['part']} {line['channel']}" if "part" in line else line["channel"]


def arm(line: dict) -> str:
    """What a line of a summary is about, as claims name it; "" for a control."""
    if "method" in line:
        return "synthesis"
    if "front" in line:  # its "control" is a number: the strongest one of that channel
        return "study"
    if "control" not in line:
        return "training"
    name = line["attack"].split("(")[0] if line["control"] == "none" else ""
    return f"round-{line['round']}.{name}" if name and "round" in line else name


def audits(folder: Path) -> list[dict]:
    """The summaries of the audits inside a training."""
    lines = []
    for path in sorted(folder.glob("audits/*-round-*/run.json")):
        header = json.loads(path.read_text(encoding="utf-8"))
        number = int(path.parent.name.rsplit("-", 1)[1])
        lines += [s | {"round": number} for s in header.get("summary") or []]
    return lines


def main() -> int:
    """Runs every recipe that makes claims (or the ones named) and prints a line per claim."""
    failed = 0
    for name in sys.argv[1:] or recipes.names():
        doc = recipes.docstring(recipes.path_of(name))
        wanted = claims(doc)
        if not wanted:
            continue
        command = ["qleak", "recipe", "run", name, *flags(doc), "--json", "--out", "runs"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        header = json.loads(done.stdout)
        summary = header["summary"] + audits(Path("runs") / f"{name}-{header['plan_id']}")
        for claim in wanted:
            holds, value = check(claim, summary)
            failed += not holds
            print(f"{'holds' if holds else 'FAILS'}  {name}: {' '.join(map(str, claim))}  (measured {value:.4g})")
    return 1 if failed else 0


if __name__ == "__main__":
    assert Path("recipes").is_dir(), "run me from the repository"
    sys.exit(main())

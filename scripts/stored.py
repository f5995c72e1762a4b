"""Stored runs: found by plan id, read in full or compact form, and summed up again from their rows.

    results/NAME-ID/run.json        what the run was and what came out, in clear
                    rows.jsonl.xz   its rows (bounds.jsonl.xz: its bounds), compressed
                    PART/…          the same of a study's parts, and of audits inside a training
                    report.txt      what the terminal showed

`runs/` holds whole run folders with tensors and pages; both are read by the same functions.
"""

from __future__ import annotations

import json
import lzma
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOTS = (Path("results"), Path("runs"))
PACKED = ("rows.jsonl", "bounds.jsonl")


def find(plan_id: str, roots: tuple[Path, ...] = ROOTS) -> Path | None:
    """The folder of a finished run of a plan: the newest of the first root that has one."""
    for root in roots:
        found = [p.parent for p in root.glob(f"*-{plan_id}/run.json") if header(p.parent).get("status") == "done"]
        if found:
            return max(found, key=lambda folder: str(header(folder).get("finished")))
    return None


def header(folder: Path) -> dict[str, Any]:
    """run.json."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def rows(folder: Path, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    """The rows of a run folder, compressed or not; none if there is no such file."""
    if (packed := folder / f"{name}.xz").is_file():
        text = lzma.decompress(packed.read_bytes()).decode()
    elif (plain := folder / name).is_file():
        text = plain.read_text(encoding="utf-8")
    else:
        return []
    return [json.loads(line) for line in text.splitlines()]


def folders(folder: Path) -> list[Path]:
    """A run folder and those below it: a study's parts, audits inside a training."""
    return [p.parent for p in sorted(folder.rglob("run.json"))]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The summary of a run, and those of the audits inside it, with their `round`."""
    found = list(header(folder).get("summary") or [])
    for path in sorted(folder.glob("audits/*-round-*/run.json")):
        number = int(path.parent.name.rsplit("-", 1)[1])
        found += [s | {"round": number} for s in header(path.parent).get("summary") or []]
    return found


@contextmanager
def unpacked(folder: Path) -> Iterator[Path]:
    """A copy of a run's text files, as plain as a run writes them, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / folder.name
        for below in folders(folder):
            target = copy / below.relative_to(folder)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(below / "run.json", target / "run.json")
            for name in PACKED:
                if found := rows(below, name):
                    text = "".join(json.dumps(row) + "\n" for row in found)
                    (target / name).write_text(text, encoding="utf-8")
        yield copy


def again(folder: Path) -> list[dict[str, Any]]:
    """What `lines` has, summed up from the rows by today's code instead of read from run.json."""
    with unpacked(folder) as copy:
        for below in folders(copy)[::-1]:  # parts in front of what joins them
            told = header(below)
            found = _joined(below, told) if told["kind"] == "study" else _summed(told, rows(below))
            (below / "run.json").write_text(json.dumps(told | {"summary": found}), encoding="utf-8")
        return lines(copy)


def _joined(folder: Path, told: dict[str, Any]) -> list[dict[str, Any]]:
    """The joined table of a study, from its parts' summaries."""
    from qleak.report import parts, study

    if not parts.apply(told):
        return study.summary(folder)
    # Audits side by side have their gradients' norms in that table, too, which are read from tensors that are not kept.
    names = [part["folder"] for part in told["parts"]]
    return [s | {"part": name} for name in names for s in header(folder / name)["summary"]]


def _summed(told: dict[str, Any], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The summary of one run, from its rows."""
    from qleak import plans, scoring
    from qleak.engine import made, seeds

    text = told["plan"]
    if "stored(" in json.dumps(text.get("model", "")):  # a round's weights are not kept; no summary reads them
        text = text | {"model": "lenet()"}
    plan = plans.from_json(text)
    if told["kind"] == "audit":
        return scoring.summarise(plan, found)
    if told["kind"] == "training":
        return seeds.summarise(plan, [r for r in found if r.get("kind") != "audit"])
    spends: Any = [SimpleNamespace(steps=s["steps"], noise=s["noise"]) for s in told["summary"]]
    return made.summarise(plan, found, spends)


def cpu_seconds(folder: Path) -> float:
    """CPU seconds of a run: those of its lanes, trainings, syntheses and their judges, parts included.

    A run that was made before a faster kernel took longer than it would today: an upper bound.
    """
    total = 0.0
    for below in folders(folder):
        kind, last = header(below)["kind"], {}
        for row in rows(below):
            if kind == "audit":
                total += row.get("cpu_s") or 0.0
            elif row.get("kind") != "audit":  # cumulative over the epochs or steps of one training or synthesis
                key = row["key"].split("-")[:2]
                spent = last.setdefault(tuple(key), [0.0, 0.0])
                spent[0] = max(spent[0], row.get("cpu_s") or 0.0)
                spent[1] += row.get("judge_s") or 0.0
        total += sum(a + b for a, b in last.values())
    return total

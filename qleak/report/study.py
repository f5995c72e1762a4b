"""A stored study as people read it: the frontier over its parts, or audits side by side; one sentence, then the parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import RenderableType
from rich.text import Text

from qleak import store
from qleak.errors import Expected
from qleak.report import compare, frontier, nominal, privacy, privacy_frontier, training, words
from qleak.report import parts as side
from qleak.report.frontier import Part, Point


class Named(NamedTuple):
    """A part of a study: its name there, its folder and run.json (None where it was not run yet)."""

    name: str
    folder: Path
    header: dict[str, Any] | None


class Joined(NamedTuple):
    """A study that has been read, or the runs that `qleak compare` was given.

    `lines` stand in place of `points` where all parts are audits (see `report.parts`), or trainings (`report.privacy`).
    """

    folder: Path | None
    header: dict[str, Any]
    parts: list[Named]
    points: list[Point]
    notes: list[str]
    lines: Sequence[dict[str, Any]] = ()

    @property
    def aside(self) -> bool:
        """Whether its parts are audits to be read side by side."""
        return side.apply(self.header)

    @property
    def trained(self) -> bool:
        """Whether its parts are trainings to be read side by side."""
        return privacy.apply(self.header)

    def trainings(self) -> dict[str, Path]:
        """Folders of the trainings that were begun, by name."""
        return {p.name: p.folder for p in self.parts if p.header and p.header.get("kind") == "training"}

    def headers(self) -> dict[str, dict[str, Any]]:
        """run.json of every part that was run, by its name."""
        return {part.name: part.header for part in self.parts if part.header is not None}

    def folders(self) -> dict[str, Path]:
        """Folders of the parts that have numbers, by name."""
        return {part.name: part.folder for part in self.parts if part.header and part.header.get("summary")}


def load(folder: Path) -> Joined:
    """Reads a study, finished or not. The frontier is joined anew from the parts; its summary serves where they are gone.

    Raises:
        Expected: there is no run, it is damaged, or it is not a study.
    """
    header = store.read_run(folder)
    if header.get("kind") != "study":
        raise Expected(f"Expected a run of kind 'study' at {folder}, got {header.get('kind')!r}.")
    parts = []
    for part in header.get("parts") or []:
        below = folder / part["folder"]
        parts.append(Named(part["name"], below, store.read_run(below) if (below / "run.json").is_file() else None))
    missing = [part.name for part in parts if part.header is None]
    gone = [f"Not run yet, or gone: {', '.join(missing)}."] if missing else []
    if side.apply(header):
        return Joined(folder, header, parts, [], gone, side.lines(folder) or header.get("summary") or [])
    if privacy.apply(header):
        return Joined(folder, header, parts, [], gone, privacy.lines(folder) or header.get("summary") or [])
    runs = frontier.parts(part.folder for part in parts if part.header is not None)
    points = frontier.join_parts(runs) or compare.from_json(header.get("summary") or [])
    return Joined(folder, header, parts, points, [*frontier.notes(runs), *gone])


def summary(folder: Path) -> list[dict[str, Any]]:
    """What a study's run.json sums up: points of the frontier, or lines of audits or trainings side by side.

    Raises:
        Expected: a part is damaged.
    """
    if side.apply(store.read_run(folder)):
        return side.lines(folder)
    if privacy.apply(store.read_run(folder)):
        return privacy.lines(folder)
    return compare.as_json(frontier.join([folder]))


def of_runs(runs: list[Part]) -> Joined:
    """The same for runs that belong to no study."""
    parts = [Named(frontier.name(run), run.folder, run.header) for run in runs]
    return Joined(None, {}, parts, frontier.join_parts(runs), frontier.notes(runs))


def verdict(study: Joined) -> str:
    """One sentence: the front from private to accurate, and what breaks it."""
    if study.aside:
        return side.verdict(study.lines, study.header)
    if study.trained:
        return privacy.verdict(study.lines, study.header)
    if not study.points:
        return f"Verdict: none yet, the study is {study.header.get('status', 'unfinished')}."
    front = sorted((p for p in study.points if p.front), key=lambda p: p.psnr or 0.0)
    if not front:
        return "Verdict: no channel has both an accuracy and an attack, so there is no front."
    shown = front if len(front) <= 5 else [*front[:2], front[len(front) // 2], *front[-2:]]
    clauses = [
        f"{p.channel} {compare.accuracy(p.test_accuracy, p.test_accuracy_ci)} at {words.number(p.psnr, '.1f')} dB "
        f"({compare.rebuilt(p)} rebuilt)"
        for p in shown
    ]
    some = "" if shown is front else ", five of them"
    of = f"{len(front)} of {sum(p.psnr is not None and p.test_accuracy is not None for p in study.points)} channels"
    return (
        f"Verdict: on the front of test accuracy against PSNR are {of}{some}: {'; '.join(clauses)}. "
        "PSNR is that of the strongest attack that was run, no bound on others."
    )


def table(study: Joined) -> Iterator[RenderableType]:
    """The joined table, the notes, a line per part."""
    if study.points:
        yield from compare.table(study.points)
        yield from privacy_frontier.table(study.points)
    if study.trained and study.lines:
        yield from privacy.table(study.lines)
        yield from nominal.table(study.headers())
    elif study.lines:
        yield from side.table(study.lines)
        yield from side.norm_table(study.folders())
        yield from side.details(study.lines, study.headers())
    for note in study.notes:
        yield Text(f"Note: {note}")
    if study.folder is not None:
        for part in study.parts:
            status = "not run yet" if part.header is None else part.header.get("status", "unfinished")
            yield Text(f"Part {part.name} · {status} · {part.folder}")
    yield Text("")


def next_step(study: Joined) -> tuple[str, str]:
    """A command worth trying now, and why."""
    header = study.header
    if header.get("status") != "done":
        return f"qleak recipe run {header.get('recipe')} --config {study.folder}/run.json", "goes on where it stopped"
    finished = [part for part in study.parts if part.header is not None]
    if finished:
        return f"qleak report {finished[0].folder}", "one of its parts"
    return f"qleak report {study.folder}", "renders this study again"


def sentence(part: Named) -> str:
    """What a part found."""
    if part.header is None:
        return "Not run yet, or gone."
    kind = part.header.get("kind")
    if kind == "study":
        return "A study of its own."
    return training.verdict(part.header) if kind == "training" else words.verdict(part.header)

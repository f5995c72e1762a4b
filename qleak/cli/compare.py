"""`qleak compare`: runs side by side, a row per channel: what it leaks, what can be learnt through it, what it costs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qleak.errors import Expected, did_you_mean


def run(names: Sequence[str], html: Path | None, csv: Path | None, as_json: bool, out: Path) -> None:
    """Joins runs by channel; prints the table, or JSON; writes a page or a CSV file where asked.

    Args:
        names: run folders, or names of folders below `out`.
        html: the page to write.
        csv: the CSV file to write.
        as_json: print one JSON object in place of the table.
        out: where run folders lie.

    Raises:
        Expected: no such run, or none of them has numbers.
        Failed: the disk refused.
    """
    from rich.console import Console
    from rich.text import Text

    from qleak.report import compare, frontier, study

    given = frontier.parts([find(name, out) for name in names])
    runs = [run for run in given if run.header.get("kind") != "synthesis"]
    made = [f"`qleak report {run.folder}`" for run in given if run not in runs]
    if made and not runs:
        raise Expected(f"Expected an audit or a training, got a synthesis: {made[0]} has its arms side by side.")
    for command in made:
        print(f"qleak: a synthesis takes no part: {command} has its arms side by side.", file=sys.stderr)
    joined = study.of_runs(runs)
    if not joined.points:
        raise Expected(f"Expected an audit or a training with numbers among {', '.join(names)}, found none.")
    if as_json:
        folders = [str(run.folder) for run in runs]
        print(json.dumps({"points": compare.as_json(joined.points), "notes": joined.notes, "runs": folders}, indent=1))
    else:
        console = Console(highlight=False)
        for part in study.table(joined):
            console.print(part)
        console.print(Text(study.verdict(joined), style="bold"))
    written = []
    if csv is not None:
        from qleak.report.stored import write_file

        written.append(write_file(csv, compare.as_csv(joined.points).encode()))
    if html is not None:
        from qleak.report.html import write_comparison

        written.append(write_comparison(runs, html))
    if not as_json:
        for path in written:
            print(path)


def find(name: str, out: Path) -> Path:
    """The run folder that `name` means: itself, or the one of that name below `out`.

    Raises:
        Expected: there is neither.
    """
    from qleak import store

    for folder in (Path(name), out / name):
        if (folder / "run.json").is_file():
            return folder
    known = [folder.name for folder in store.list_runs(out)]
    raise Expected(f"Expected a run folder, or a run below {out}, got {name!r}.{did_you_mean(name, known)}")

"""Everything the pages say, made again: `just reproduce [NAME …] [--shard 2/8] [--list] [--full]`.

Each recipe runs with the flags its claims were measured with, by `qleak recipe run`, into runs/; what is there already goes on
where it stopped, and what is done costs a second. A recipe whose data are not here is skipped with the reason; one that fails
does not stop the others, and the exit code is 1 then. Ctrl-C ends the recipe that is running as Ctrl-C always does (its
rows are safe) and says what is left.

`--shard K/N` takes the K-th of N shares, cut by the CPU time that was measured (results/), the same on every machine. A study's parts
are shared out one by one: each is a run folder of its own. Copy all machines' runs/ together; `just reproduce` then joins
each study's parts, without running anything again.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from qleak.errors import Expected, Failed
from scripts import planned, stored
from scripts.planned import Job

UNKNOWN = 600.0  # CPU seconds that a recipe counts for where none were measured


class Unit(NamedTuple):
    """What belongs to one shard: a command, or one part of a study."""

    job: Job
    part: str
    cost: float
    measured: bool

    def __str__(self) -> str:
        return f"{self.job}{f' · {self.part}' if self.part else ''}"


def units(jobs: list[Job], results: Path = Path("results")) -> list[Unit]:
    """Every command or part with its measured CPU seconds; made of results/ alone, so that all machines agree."""
    out = []
    for job in jobs:
        folder = kept(job, results)
        if folder is None:
            out.append(Unit(job, "", UNKNOWN, False))
        elif parts := stored.header(folder).get("parts"):
            out += [Unit(job, p["name"], stored.cpu_seconds(folder / p["folder"]), True) for p in parts]
        else:
            out.append(Unit(job, "", stored.cpu_seconds(folder), True))
    return out


def kept(job: Job, results: Path = Path("results")) -> Path | None:
    """The stored run of a command."""
    found = [p.parent for p in sorted(results.glob(f"{job.name}-*/run.json"))]
    return next((folder for folder in found if planned.matches(job, stored.header(folder))), None)


def shard(found: list[Unit], number: int, of: int) -> list[Unit]:
    """The K-th of N shares: the costliest first, each to the share that has least so far."""
    shares: list[list[Unit]] = [[] for _ in range(of)]
    sums = [0.0] * of
    for unit in sorted(found, key=lambda u: (-u.cost, str(u))):
        least = sums.index(min(sums))
        shares[least].append(unit)
        sums[least] += unit.cost
    return shares[number - 1]


def whole(found: list[Unit]) -> list[Unit]:
    """Commands in place of their parts."""
    out: dict[Job, Unit] = {}
    for unit in found:
        before = out.get(unit.job)
        out[unit.job] = Unit(unit.job, "", unit.cost + (before.cost if before else 0.0), unit.measured)
    return list(out.values())


def show(found: list[Unit], measured_on: str) -> None:
    """One line each: CPU time, data, and why it cannot be run here."""
    print(f"{'CPU time':>9}  {'data':24}  command")
    for unit in found:
        cost = clock(unit.cost) if unit.measured else "unknown"
        why = planned.missing(unit.job)
        needs = ", ".join(planned.named(unit.job)) or "embedded"
        print(f"{cost:>9}  {needs:24}  {unit}{f'   [skipped here: {why}]' if why else ''}")
    print(
        f"\n{len(found)} in all, {clock(sum(u.cost for u in found if u.measured))} of CPU time as measured {measured_on}"
    )


def clock(seconds: float) -> str:
    """`2 h 03 min`, `12 min`, `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def make(unit: Unit, out: Path, extra: list[str]) -> int:
    """Runs one command or part in a process of its own; its exit code. Ctrl-C reaches it once, and it is waited for."""
    words = ["qleak", "recipe", "run", unit.job.name, *unit.job.flags, "--out", str(out), *extra]
    if unit.part:
        words = [sys.executable, "-m", "scripts.part", str(out), unit.part, unit.job.name, *unit.job.flags]
    process = subprocess.Popen(words, process_group=0)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        return 130


def main(argv: list[str] | None = None) -> int:
    """0 if everything that could be run is done, 1 if something failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="just reproduce", description="Every recipe as its claims have it, resumable."
    )
    parser.add_argument("names", nargs="*", help="recipes; none for all")
    parser.add_argument("--shard", default="", metavar="K/N", help="the K-th of N shares by measured CPU time")
    parser.add_argument("--list", action="store_true", help="CPU time and data of each; runs nothing")
    parser.add_argument("--full", action="store_true", help="at the papers' size; times are not known")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where run folders go")
    given = parser.parse_args(argv)
    jobs = planned.jobs(given.names)
    if given.full:
        jobs = [Job(j.name, (*j.flags, "--full")) for j in jobs if "full" in planned.known(j.name)]
    found = units(jobs)
    if given.shard:
        found = shard(found, *read_shard(given.shard))
    chosen = found if given.shard else whole(found)
    show(chosen, "in results/ (older code: an upper bound)")
    return 0 if given.list else run(chosen, given.out)


def read_shard(text: str) -> tuple[int, int]:
    """(K, N) of "K/N".

    Raises:
        Expected: anything else.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found.group(1)) <= int(found.group(2)):
        raise Expected(f"Expected --shard {text!r} as K/N with 1 <= K <= N, such as 2/8.")
    return int(found.group(1)), int(found.group(2))


def run(chosen: list[Unit], out: Path) -> int:
    """Runs what can be run here, and tells the rest at the end."""
    skipped = {u: why for u in chosen if (why := planned.missing(u.job))}
    todo = [u for u in chosen if u not in skipped]
    failed: dict[str, int] = {}
    began = time.monotonic()
    for i, unit in enumerate(todo):
        print(f"\n[{i + 1}/{len(todo)}, {clock(time.monotonic() - began)}] {unit}", flush=True)
        code = make(unit, out, [])
        if code == 130:
            left = [str(u) for u in todo[i:]]
            print(f"\nInterrupted; {i} of {len(todo)} are done. The same command goes on with {left[0]}.")
            return 130
        if code:
            failed[str(unit)] = code
    print(f"\n{len(todo) - len(failed)} of {len(chosen)} done in {clock(time.monotonic() - began)}.")
    for unit, why in skipped.items():
        print(f"skipped  {unit}: {why}")
    for name, code in failed.items():
        print(f"FAILED   {name}: exit code {code}")
    return 1 if failed else 0


if __name__ == "__main__":
    assert Path("recipes").is_dir(), "run me from the repository"
    try:
        sys.exit(main())
    except (Expected, Failed) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Expected) else 1)

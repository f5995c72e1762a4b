"""One part of a study, as a shard of `just reproduce` runs it: `python -m scripts.part OUT PART NAME [FLAGS]`.

The part's folder is the one that `qleak recipe run` would make and go on with: the study's own run.json first, then the
part's rows below it. The study itself is joined by `qleak recipe run`, once all parts are there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qleak import engine, machine, store
from qleak.cli import live
from qleak.cli import run as command
from qleak.cluster import Placed
from qleak.engine.study import SHARED
from qleak.errors import Expected, Failed
from qleak.plans import Study
from scripts import planned


def run(out: Path, part: str, job: planned.Job) -> Path:
    """Runs the part, or what is left of it; its folder.

    Raises:
        Expected: the recipe is no study, or has no such part.
    """
    plan = planned.plan_of(job)
    if not isinstance(plan, Study) or part not in plan.names:
        raise Expected(f"Expected a part of the study {job.name}, got {part!r}.")
    mine = plan.parts[plan.names.index(part)]
    device, workers, reasons = machine.place("auto", 0)
    header = command.header(plan, job.name, planned.flags_of(job), Placed(device, workers, workers, reasons))
    folder = out / f"{job.name}-{plan.id}"
    with store.open_run(folder, header) as study:
        shared = {k: study.header[k] for k in SHARED if k in study.header}
    say = live.Console()
    with store.open_run(folder / part, mine.header() | shared) as inner:
        if inner.header.get("status") != "done":
            with say.progress(mine) as bar:
                for event in engine.run(mine, inner, device, workers):
                    bar(event)
    return folder / part


def main() -> int:
    """Exit codes as those of `qleak recipe run`."""
    out, part, name, *flags = sys.argv[1:]
    try:
        print(run(Path(out), part, planned.Job(name, tuple(flags))))
    except KeyboardInterrupt:
        print("interrupted; the rows are safe, the same command goes on.", file=sys.stderr)
        return 130
    except (Expected, Failed) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, Expected) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

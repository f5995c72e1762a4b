"""Law 7: what a recipe's docstring claims, compared with what its run says. `just verify [NAME …] [--rerun]`.

Nothing is run: the run of the recipe's present plan is looked up by its id in results/, then in runs/, and the numbers that
claims are about are summed up again from its rows, so that a changed row and a changed summary are both seen. A claim is

    holds     the run bears it out, and its rows give the number that stands in its summary
    FAILS     the number is on the wrong side
    differs   the summary does not say what the rows say
    no run    no finished run of this plan is stored

and all but the first make the exit code 1. `--rerun` makes the runs afresh in a new folder, checks the claims against those,
and shows how far each number is from the stored one. How claims are written: scripts/claims.py.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from qleak.cli import recipes
from qleak.errors import Expected, Failed
from scripts import planned, stored
from scripts.claims import Claim, check, claims, measured

SAME = 1e-9  # of two sums of the same numbers in another order


class Verdict(NamedTuple):
    """One claim, and what became of it."""

    word: str
    recipe: str
    claim: Claim
    value: float = math.nan
    note: str = ""


def judge(recipe: str, wanted: list[Claim], said: list[dict[str, Any]], summed: list[dict[str, Any]]) -> list[Verdict]:
    """Each claim against the stored summary, and that against the one made of the rows."""
    out = []
    for claim in wanted:
        holds, value = check(claim, said)
        other = measured(claim, summed)
        if math.isnan(value):
            out.append(Verdict("FAILS", recipe, claim, value, "the summary has no such number"))
        elif not math.isclose(value, other, rel_tol=SAME):
            out.append(Verdict("differs", recipe, claim, value, f"the rows give {other:.6g}"))
        else:
            out.append(Verdict("holds" if holds else "FAILS", recipe, claim, value))
    return out


def plan_id(job: planned.Job, roots: tuple[Path, ...]) -> tuple[str, str]:
    """The id of the recipe's present plan, and a note where it had to be taken from the stored run.

    A plan that looks into its data cannot be made without them; the stored plan's own id stands in then.
    """
    try:
        return planned.plan_of(job).id, ""
    except (Expected, Failed) as error:
        for root in roots:
            for path in sorted(root.glob(f"{job.name}-*/run.json")):
                told = json.loads(path.read_text(encoding="utf-8"))
                if planned.matches(job, told):
                    return told["plan_id"], f"plan not made again: {str(error).split('.')[0]}"
        return "", ""


def verify(name: str, roots: tuple[Path, ...] = stored.ROOTS, doc: str = "") -> tuple[list[Verdict], dict[str, Any]]:
    """The verdicts on one recipe's claims and the run.json they rest on; nothing is run."""
    wanted = claims(doc or recipes.docstring(recipes.path_of(name)))
    if not wanted:
        return [], {}
    number, note = plan_id(planned.job(name), roots)
    folder = stored.find(number, roots) if number else None
    if folder is None:
        return [Verdict("no run", name, claim) for claim in wanted], {}
    found = judge(name, wanted, stored.lines(folder), stored.again(folder))
    return [v._replace(note="; ".join(filter(None, (v.note, note)))) for v in found], stored.header(folder)


def rerun(name: str, out: Path, roots: tuple[Path, ...] = stored.ROOTS) -> tuple[list[Verdict], dict[str, Any]]:
    """The same, of a run made now in `out`, with the distance to the stored number."""
    job = planned.job(name)
    wanted = claims(recipes.docstring(recipes.path_of(name)))
    if not wanted:
        return [], {}
    done = subprocess.run(
        ["qleak", "recipe", "run", name, *job.flags, "--json", "--out", str(out)], stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        return [Verdict("no run", name, claim, note=f"exit code {done.returncode}") for claim in wanted], {}
    told = json.loads(done.stdout)
    folder, before = out / f"{name}-{told['plan_id']}", stored.find(told["plan_id"], roots)
    found = judge(name, wanted, stored.lines(folder), stored.again(folder))
    old = stored.lines(before) if before else []
    return [v._replace(note=distance(v, measured(v.claim, old))) for v in found], told


def distance(verdict: Verdict, old: float) -> str:
    """How far a number is from the stored one."""
    if math.isnan(old):
        return "; ".join(filter(None, (verdict.note, "no number stored")))
    return "; ".join(filter(None, (verdict.note, f"stored {old:.6g}, {verdict.value - old:+.3g}")))


def main(argv: list[str] | None = None) -> int:
    """Prints a line per claim, and what failed at the end. 1 if anything did."""
    parser = argparse.ArgumentParser(prog="just verify", description="Every claim of every recipe against its run.")
    parser.add_argument("names", nargs="*", help="recipes; none for all that make claims")
    parser.add_argument("--rerun", action="store_true", help="make the runs afresh, and compare with the stored ones")
    parser.add_argument("--out", type=Path, help="with --rerun: where the runs go; a new folder by default")
    given = parser.parse_args(argv)
    out = given.out or Path(tempfile.mkdtemp(prefix="qleak-verify-")) if given.rerun else None
    counts: dict[str, int] = {}
    for name in given.names or recipes.names():
        found, told = rerun(name, out) if out else verify(name)
        if not found:
            continue
        when, git = str(told.get("finished") or "")[:10], str(told.get("git") or "")[:7]
        print(f"{name}  " + (f"run {told['plan_id']} of {when}{f', git {git}' if git else ''}" if told else ""))
        for v in found:
            counts[v.word] = counts.get(v.word, 0) + 1
            value = "" if math.isnan(v.value) else f"{v.value:10.4g}"
            print(f"  {v.word:7} {value:10}  {v.claim}{f'  ({v.note})' if v.note else ''}", flush=True)
    print("\nclaims: " + ", ".join(f"{n} {w}" for w, n in sorted(counts.items())[::-1]) + ".")
    if out:
        print(f"The runs are in {out}.")
    return 0 if set(counts) <= {"holds"} else 1


if __name__ == "__main__":
    assert Path("recipes").is_dir(), "run me from the repository"
    try:
        sys.exit(main())
    except (Expected, Failed) as error:
        print(f"verify: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Expected) else 1)

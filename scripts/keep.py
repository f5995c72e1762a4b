"""Keeps the numbers of finished runs below results/, small enough to commit: `just keep runs/NAME-ID …`.

Kept are run.json, the rows and the bounds of a run, of its parts and of the audits inside it, and what the terminal shows of
it; left out are tensors, models, samples, pictures, the recipe's source (it is in the repository) and the curves of races.
Paths of the machine are taken out, and a run that still has one is refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import os
import platform
import re
import shutil
import sys
import tempfile
from getpass import getuser
from pathlib import Path
from typing import Any

from qleak.errors import Expected
from scripts import stored

LEFT_OUT = ("source", "error")
CURVES = ("psnr_at", "psnr_path")
PLACE = re.compile(r"(?:/[\w.+-]+)+/(?=(?:[\w=().+-]+/)*models/)")


def main() -> int:
    """Keeps the run folders that are named."""
    for name in sys.argv[1:]:
        print(keep(Path(name), Path("results")))
    return 0


def keep(run: Path, results: Path) -> Path:
    """Writes the compact form of a finished run, in place of one that was kept before.

    Raises:
        Expected: the run is not done, or names this machine.
    """
    told = stored.header(run)
    if told.get("status") != "done":
        raise Expected(f"Expected a finished run in {run}, its status is {told.get('status')!r}.")
    target = results / f"{told['recipe']}-{told['plan_id']}"
    shutil.rmtree(target, ignore_errors=True)
    for below in stored.folders(run):
        place = target / below.relative_to(run)
        place.mkdir(parents=True, exist_ok=True)
        text = json.dumps(compact(stored.header(below)), indent=1, ensure_ascii=False) + "\n"
        (place / "run.json").write_text(clean(text, below), encoding="utf-8")
        for name in stored.PACKED:
            found = [{k: v for k, v in row.items() if k not in CURVES} for row in stored.rows(below, name)]
            if found:
                lines = clean("".join(json.dumps(row) + "\n" for row in found), below)
                (place / f"{name}.xz").write_bytes(lzma.compress(lines.encode(), preset=9))
    (target / "report.txt").write_text(clean(shown(run), run), encoding="utf-8")
    return target


def compact(told: dict[str, Any]) -> dict[str, Any]:
    """run.json without what the repository has anyway, and without the machine's name for itself."""
    kept = {k: v for k, v in told.items() if k not in LEFT_OUT}
    if "flags" in kept:
        kept["flags"] = kept["flags"] | {"out": "runs"}
    if "system" in kept:
        kept["system"] = "-".join(str(kept["system"]).split("-")[:1])
    return kept


def clean(text: str, run: Path) -> str:
    """Text without the paths in front of a run's models.

    Raises:
        Expected: it names the machine, its user, or another path.
    """
    text = PLACE.sub("", text)
    words = [w for w in (platform.node(), getuser()) if len(w) > 3]  # "root" is a word of its own
    for word in (r"/(?:tmp|home|root|work|mnt|Users|var)/", *(rf"\b{re.escape(w)}\b" for w in words if w != "root")):
        if found := re.search(word, text):
            raise Expected(
                f"Expected no name of a machine in {run}, found {text[max(0, found.start() - 40) :][:120]!r}."
            )
    return text


def shown(run: Path) -> str:
    """What `qleak report runs/NAME` prints of a run, 100 columns wide, without colour."""
    from qleak.report import terminal

    out, there = io.StringIO(), run.absolute()
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), contextlib.redirect_stdout(out):
        here = Path("runs") / there.name
        here.parent.mkdir()
        here.symlink_to(there)
        os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
        terminal.show(here)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    sys.exit(main())

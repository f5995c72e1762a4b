"""Writes the tables of docs/results.md between their markers: `just results`; `--check` only looks.

    <!-- NAME: made by `just results` -->
    …
    <!-- end NAME -->

What stands in them: scripts/tables.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from scripts.tables import TABLES

PAGE = Path("docs/results.md")
MARK = re.compile(r"(<!-- ([\w-]+): made by `just results` -->\n).*?(<!-- end \2 -->)", re.S)


def filled(text: str) -> str:
    """The page with every table made again.

    Raises:
        SystemExit: a marker names no table, or a table has no marker.
    """
    named = {m.group(2) for m in MARK.finditer(text)}
    if odd := named ^ set(TABLES):
        raise SystemExit(f"results: Expected one marker for each table, {', '.join(sorted(odd))} has none or no table.")
    return MARK.sub(lambda m: f"{m.group(1)}\n{TABLES[m.group(2)]()}\n\n{m.group(3)}", text)


def main() -> int:
    """Writes the page; with --check 1 if it is not up to date."""
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv:
        print("up to date" if before == after else f"{PAGE} is not what results/ says: `just results` writes it.")
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    print(f"{PAGE}: {len(TABLES)} tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())

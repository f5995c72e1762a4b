"""The rows of a run as a table for other programs: Parquet (lists stay lists) or CSV (lists are JSON text)."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from qleak import disk, folders
from qleak.errors import Expected, Failed

SUFFIXES = (".parquet", ".csv")


def table(folder: Path) -> dict[str, list[Any]]:
    """Columns of all rows of a run; None where a row has no such field.

    Rows of a study's parts stand one after another, with the part's name as the column `part`.

    Raises:
        Expected: there is no run, it is damaged, or it has no rows yet.
    """
    header = folders.read_run(folder)
    rows = folders.read_rows(folder)
    if header.get("kind") == "study":
        parts = [p for p in header.get("parts") or [] if (folder / p["folder"] / "run.json").is_file()]
        rows = [{"part": p["name"]} | row for p in parts for row in folders.read_rows(folder / p["folder"])]
    if not rows:
        raise Expected(f"Expected a run with rows at {folder}, it has none yet.")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def write(folder: Path, out: Path) -> int:
    """Writes the rows of a run to `out`, all of it or nothing; its ending decides on the format.

    Returns:
        The number of rows.

    Raises:
        Expected: another ending than .parquet or .csv, or see `table`.
        Failed: the disk refused, or pyarrow is not installed.
    """
    if out.suffix not in SUFFIXES:
        raise Expected(f"Expected a file that ends in {' or '.join(SUFFIXES)}, got {str(out)!r}.")
    if out.resolve().parent == folder.resolve() and (folder / out.name).exists():
        raise Expected(f"Expected a new file, or one outside the run folder, got {str(out)!r}.")
    columns = table(folder)
    disk.replace(out, parquet(columns) if out.suffix == ".parquet" else text(columns))
    return len(next(iter(columns.values())))


def text(columns: dict[str, list[Any]]) -> bytes:
    """Columns as CSV, UTF-8: nothing for None, JSON for lists, objects and truth values."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(columns)
    plain = lambda v: json.dumps(v) if isinstance(v, list | dict | bool) else v  # noqa: E731
    lines.writerows([plain(v) for v in row] for row in zip(*columns.values(), strict=True))
    return out.getvalue().encode()


def parquet(columns: dict[str, list[Any]]) -> bytes:
    """Columns as one Parquet file; a column of values that have no common type is JSON text.

    Raises:
        Failed: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Failed("Parquet needs pyarrow: pip install 'qleak[parquet]', or export to a .csv file.") from None
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            arrays[name] = pyarrow.array([None if v is None else json.dumps(v) for v in values])
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(arrays), out)
    return out.getvalue()

"""Run folders: what a run has done, on disk for good and exactly once. Only this file writes into them.

    runs/<id>/run.json                    one object: schema, kind, plan_id, and what the engine adds
              rows.jsonl                  one object a line, append-only; its `key` names a row for good
              tensors/<key>.safetensors   one file a key, characters unfit for a file name as %XX
              <name>.safetensors          trained models, with what made them as metadata
              .lock                       held, with the writer's process id, while a run is open

What a method has returned from survives kill -9 and power cuts. A row is there once its newline is:
whatever follows the last complete line was never reported as done, and is cut off at the next
opening. Save the tensors of a key before its row, so that a finished row always has them.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from qleak import disk
from qleak.errors import Expected

if TYPE_CHECKING:  # torch is imported where tensors are, so that listing runs stays quick
    from torch import Tensor

Row = dict[str, Any]

SCHEMA = 1
KINDS = ("audit", "training", "synthesis", "study", "captured")


class Run:
    """One open run folder; made by `open_run`, a context manager.

    Attributes:
        folder: where it lies.
        header: run.json as it stands.
        resumed: the folder held this run before.
        warning: one line on what had to be dropped at opening, or "".
    """

    def __init__(self, folder: Path, header: dict[str, Any], fresh: bool) -> None:
        self.folder = folder
        with ExitStack() as stack:
            stack.enter_context(disk.locked(folder))
            if fresh:
                disk.clear(folder)
            self.resumed = (folder / "run.json").exists()
            self.header: dict[str, Any] = read_run(folder) if self.resumed else {"schema": SCHEMA}
            self._rows, self._end, self.warning = _parse(folder / "rows.jsonl")
            wanted = header["plan_id"]
            held = self.header.get("plan_id") if self.resumed else "rows of no plan" if self._rows else wanted
            if held != wanted:
                raise Expected(
                    f"Expected {folder} to hold plan {wanted}, found {held}: "
                    "choose another --out or --name, or replace it with --fresh."
                )
            if not self.resumed:
                self.update(**header)
            with disk.disk(folder):
                self._file = os.open(folder / "rows.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                stack.callback(os.close, self._file)
                os.ftruncate(self._file, self._end)
                (folder / "tensors").mkdir(exist_ok=True)
                disk.sync(folder)
            self._open = stack.pop_all()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the lock; closing twice is fine."""
        self._open.close()

    def rows(self) -> list[Row]:
        """Every row, in the order they were appended."""
        return list(self._rows.values())

    def done(self) -> set[str]:
        """The keys of every row."""
        return set(self._rows)

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows in one write; those whose key is there already are skipped. NaN and ±∞ become null.

        Raises:
            Expected: a row without a `key` of type str.
            Failed: the disk refused; no earlier row is lost.
        """
        new: dict[str, Row] = {}
        for row in rows:
            if not isinstance(row.get("key"), str):
                raise Expected(f"Expected a row with a key of type str, got key={row.get('key')!r}.")
            if row["key"] not in self._rows:
                new.setdefault(row["key"], row)
        if not new:
            return
        lines = [_dumps(row) + "\n" for row in new.values()]
        data = "".join(lines).encode()
        with disk.disk(self.folder / "rows.jsonl"):
            os.ftruncate(self._file, self._end)  # what an append that failed half-way left behind
            disk.write(self._file, data)
        self._end += len(data)
        # Read back, so that a resumed run and an uninterrupted one work with the same rows.
        self._rows.update(zip(new, map(json.loads, lines), strict=True))

    def save(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Writes (or replaces) the tensors of `key`, from any device and of any strides, atomically.

        Raises:
            Failed: the disk refused; the tensors saved before are as they were.
        """
        import safetensors.torch
        import torch

        whole = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
        disk.replace(_tensors(self.folder, key), safetensors.torch.save(whole))

    def has(self, key: str) -> bool:
        """Whether tensors are saved under `key`."""
        return _tensors(self.folder, key).is_file()

    def load(self, key: str) -> dict[str, Tensor]:
        """The tensors saved under `key`; see `read_tensors`."""
        return read_tensors(self.folder, key)

    def model(self, name: str, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        """Writes (or replaces) `name`.safetensors in the run's own folder, atomically, with `about` as its metadata.

        Raises:
            Failed: the disk refused; the model saved before is as it was.
        """
        import safetensors.torch
        import torch

        whole = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
        path = self.folder / f"{name}.safetensors"
        with disk.disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        disk.replace(path, safetensors.torch.save(whole, about))

    def file(self, name: str, data: bytes) -> None:
        """Writes (or replaces) the file `name`, a path below the run's own folder, atomically.

        Raises:
            Failed: the disk refused; the file saved before is as it was.
        """
        path = self.folder / name
        with disk.disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        disk.replace(path, data)

    def holds(self, name: str) -> bool:
        """Whether the file `name` is there."""
        return (self.folder / name).is_file()

    def update(self, **fields: Any) -> None:
        """Sets fields of run.json and rewrites it atomically. NaN and ±∞ become null.

        Raises:
            Failed: the disk refused; run.json is as it was.
        """
        text = _dumps(self.header | fields, indent=1)
        disk.replace(self.folder / "run.json", (text + "\n").encode())
        self.header = json.loads(text)


def now() -> str:
    """The time as run.json writes it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def open_run(folder: Path, header: dict[str, Any], fresh: bool = False) -> Run:
    """Creates the run folder, or continues what it holds, and locks it until closed.

    Args:
        folder: the run's own folder; made with its parents.
        header: first content of run.json, with `kind` (see `KINDS`) and `plan_id`. A continued run
            keeps the run.json it has; `Run.update` changes it.
        fresh: forget the rows and tensors of an earlier run first (no other file is touched).

    Raises:
        Expected: the folder holds another plan, a newer schema, or a damaged file.
        Failed: another process writes there, or the disk refuses.
    """
    if header.get("kind") not in KINDS:
        raise Expected(f"Expected kind={header.get('kind')!r} to be one of: {', '.join(KINDS)}.")
    if not isinstance(header.get("plan_id"), str):
        raise Expected(f"Expected a header with a plan_id of type str, got plan_id={header.get('plan_id')!r}.")
    with disk.disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, header, fresh)


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a run, finished or being written, without a lock.

    Raises:
        Expected: there is no run, its run.json is damaged, or a newer qleak wrote it.
    """
    path = folder / "run.json"
    data = disk.read(path)
    if data is None:
        raise Expected(f"Expected a run folder with a run.json at {folder}, found none.")
    header = _object(data)
    if header is None or not isinstance(header.get("schema"), int):
        raise Expected(f"Expected {path} to be one JSON object with a schema: repair it, or start again with --fresh.")
    if header["schema"] > SCHEMA:
        raise Expected(f"Expected {path} to have schema <= {SCHEMA}, got {header['schema']}: update qleak.")
    return header


def read_rows(folder: Path) -> list[Row]:
    """The complete rows of a run, finished or being written, without a lock.

    Raises:
        Expected: a damaged line which is not the last one.
    """
    return list(_parse(folder / "rows.jsonl")[0].values())


def read_tensors(folder: Path, key: str) -> dict[str, Tensor]:
    """The tensors saved under `key`, on the CPU, without a lock.

    Raises:
        Expected: there are none, or the file is damaged.
    """
    import safetensors.torch

    path = _tensors(folder, key)
    data = disk.read(path)
    if data is None:
        raise Expected(f"Expected tensors of {key!r} at {path}, found none.")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError:
        raise Expected(f"Expected {path} to be a whole safetensors file: start again with --fresh.") from None


def list_runs(root: Path) -> list[Path]:
    """The run folders right below `root`, by name; none if there is no such folder."""
    return sorted(path.parent for path in root.glob("*/run.json"))


def _tensors(folder: Path, key: str) -> Path:
    return folder / "tensors" / f"{quote(key, safe='=,+@()')}.safetensors"


def _parse(path: Path) -> tuple[dict[str, Row], int, str]:
    """Rows by key, the length in bytes of the complete lines, and a warning if something follows them."""
    data = disk.read(path) or b""
    rows: dict[str, Row] = {}
    end = 0
    for number, line in enumerate(io.BytesIO(data), start=1):
        row = _object(line) or {}
        if line.endswith(b"\n") and isinstance(row.get("key"), str):
            rows.setdefault(row["key"], row)
            end += len(line)
        elif end + len(line) == len(data):
            return rows, end, f"Dropped an unfinished last line ({len(line)} bytes) of {path}; its row is made again."
        else:
            raise Expected(
                f"Expected line {number} of {path} to be one JSON object with a key: "
                "repair or delete that line, or start again with --fresh."
            )
    return rows, end, ""


def _object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in `data`, or None if it is anything else."""
    try:
        value = json.loads(data.decode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` with None for numbers that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value

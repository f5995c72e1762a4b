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

import json
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qleak import disk, folders
from qleak.errors import Expected
from qleak.folders import KINDS, SCHEMA, Row, list_runs, read_rows, read_run, read_tensors

if TYPE_CHECKING:  # torch is imported where tensors are, so that listing runs stays quick
    from torch import Tensor

__all__ = ["KINDS", "SCHEMA", "Row", "Run", "list_runs", "now", "open_run", "read_rows", "read_run", "read_tensors"]


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
            if fresh or (folder / folders.CLEARED).exists():  # a removal that was killed is brought to its end
                folders.clear(folder)
            self.resumed = disk.read(folder / "run.json") is not None
            self.header: dict[str, Any] = read_run(folder) if self.resumed else {"schema": SCHEMA}
            self._rows, self._end, self.warning = folders.parse(folder / "rows.jsonl")
            wanted = header["plan_id"]
            held = self.header.get("plan_id") if self.resumed else _orphans(folder, self._rows) or wanted
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
                os.fsync(self._file)  # a writer may have been killed in front of its own
                (folder / "tensors").mkdir(exist_ok=True)
                disk.sync(folder / "tensors")
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
        disk.replace(folders.tensors_path(self.folder, key), safetensors.torch.save(whole))

    def has(self, key: str) -> bool:
        """Whether tensors are saved under `key`."""
        return folders.held(self.folder, key)

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
        disk.make(path.parent)
        disk.replace(path, safetensors.torch.save(whole, about))

    def file(self, name: str, data: bytes) -> None:
        """Writes (or replaces) the file `name`, a path below the run's own folder, atomically.

        Raises:
            Failed: the disk refused; the file saved before is as it was.
        """
        path = self.folder / name
        disk.make(path.parent)
        disk.replace(path, data)

    def holds(self, name: str) -> bool:
        """Whether the file `name` is there."""
        return (self.folder / name).is_file()

    def update(self, **fields: Any) -> None:
        """Sets fields of run.json and rewrites it atomically. NaN and ±∞ become null; an error goes with its status.

        Raises:
            Failed: the disk refused; run.json is as it was.
        """
        wanted = self.header | fields
        if wanted.get("status") != "failed":
            wanted.pop("error", None)
        text = _dumps(wanted, indent=1)
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
        fresh: forget an earlier run first, with all that it wrote and the runs within (no other file is touched).

    Raises:
        Expected: the folder holds another plan, a newer schema, or a damaged file.
        Failed: another process writes there, or the disk refuses.
    """
    if header.get("kind") not in KINDS:
        raise Expected(f"Expected kind={header.get('kind')!r} to be one of: {', '.join(KINDS)}.")
    if not isinstance(header.get("plan_id"), str):
        raise Expected(f"Expected a header with a plan_id of type str, got plan_id={header.get('plan_id')!r}.")
    disk.make(folder)
    return Run(folder, header, fresh)


def _orphans(folder: Path, rows: dict[str, Row]) -> str:
    """What lies in a folder without a run.json that another run must have left: it would be taken for this one's."""
    if rows:
        return "rows of no plan"
    return "tensors of no plan" if folders.files(folder, folders.TENSORS, follow=True) else ""


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` with None for numbers that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value

"""Run folders as others see them, without a lock: header, rows, tensors, the runs within, every file a run writes.

Free of torch, so that hundreds of runs are listed in a blink; `store` is the one that writes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from qleak import disk
from qleak.errors import Expected

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]

SCHEMA = 1
KINDS = ("audit", "training", "synthesis", "study", "captured")

TENSORS = ("tensors/*.safetensors",)
MODELS = ("final_model.safetensors", "models/*.safetensors")
OTHERS = ("bounds.jsonl", "report.html", "samples/*/*.npz", "statistics/*.json")
CLEARED = ".run.json.cleared"
"""What run.json is called while a run is being removed: whoever finds it goes on removing."""


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a run, finished or being written, without a lock.

    Raises:
        Expected: there is no run, its run.json is damaged, or a newer qleak wrote it.
        Failed: the disk refused.
    """
    path = folder / "run.json"
    data = disk.read(path)
    if data is None:
        raise Expected(f"Expected a run folder with a run.json at {folder}, found none.")
    header = json_object(data)
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
    return list(parse(folder / "rows.jsonl")[0].values())


def read_tensors(folder: Path, key: str) -> dict[str, Tensor]:
    """The tensors saved under `key`, on the CPU, without a lock.

    Raises:
        Expected: there are none, or the file is damaged.
    """
    import safetensors.torch

    path = tensors_path(folder, key)
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


def within(folder: Path) -> list[Path]:
    """The run folders inside a run's: a study's parts, a training's audits. Links are nobody's part."""
    found = [*folder.glob("*/run.json"), *folder.glob("audits/*/run.json"), *folder.glob(f"*/{CLEARED}")]
    inner = sorted({p.parent for p in (*found, *folder.glob(f"audits/*/{CLEARED}"))})
    return [p for p in inner if not p.is_symlink() and not p.parent.is_symlink()]


def files(folder: Path, patterns: tuple[str, ...], follow: bool = False) -> list[Path]:
    """The files of these patterns that a run has written, and what a killed writer left of them.

    Args:
        folder: the run's own folder; runs within it are not looked into.
        patterns: of `TENSORS`, `MODELS`, `OTHERS`, or names.
        follow: through a folder that is a link, too.
    """
    found: list[Path] = []
    for pattern in patterns:
        where, _, name = pattern.rpartition("/")
        for each in (name, f".{name}.part", f".{name}.*.part"):
            found += folder.glob(f"{where}/{each}" if where else each)
    return [p for p in sorted(set(found)) if not p.is_dir() and (follow or not _linked(folder, p))]


def clear(folder: Path) -> None:
    """Removes a run and the runs within it, so that a kill at any moment leaves either the run or its removal.

    run.json is renamed first and goes last. Other people's files stay.

    Raises:
        Failed: a run within is being written, or the disk refused.
    """
    with disk.disk(folder):
        condemn(folder)
        for inner in within(folder):
            with disk.locked(inner):
                clear(inner)
        for path in files(folder, (*TENSORS, *MODELS, *OTHERS), follow=True):
            path.unlink()
        for path in files(folder, ("rows.jsonl", ".run.json.part")):  # after the tensors, which they vouch for
            path.unlink()
        disk.sync(folder)
        (folder / CLEARED).unlink(missing_ok=True)


def condemn(folder: Path) -> None:
    """Begins a removal, by a new name for run.json, which takes no space: whoever finds it goes on removing."""
    if (folder / "run.json").exists():
        (folder / "run.json").replace(folder / CLEARED)
        disk.sync(folder)


def tensors_path(folder: Path, key: str) -> Path:
    """Where the tensors of `key` lie."""
    return folder / "tensors" / f"{quote(key, safe='=,+@()')}.safetensors"


def held(folder: Path, key: str) -> bool:
    """Whether tensors are saved under `key`; they may have been removed since."""
    return tensors_path(folder, key).is_file()


def parse(path: Path) -> tuple[dict[str, Row], int, str]:
    """Rows by key, the length in bytes of the complete lines, and a warning if something follows them."""
    data = disk.read(path) or b""
    rows: dict[str, Row] = {}
    end = 0
    for number, line in enumerate(io.BytesIO(data), start=1):
        row = json_object(line) or {}
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


def json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in `data`, or None if it is anything else."""
    try:
        value = json.loads(data.decode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def every(folder: Path) -> Iterator[Path]:
    """A run's folder and, below it, those of the runs within."""
    yield folder
    for inner in within(folder):
        yield from every(inner)


def _linked(folder: Path, path: Path) -> bool:
    """Whether the way from `folder` to `path` leads over a link."""
    return any(p.is_symlink() for p in (path, *path.parents) if folder in p.parents)

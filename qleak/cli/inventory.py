"""What run folders hold and whether somebody writes there: the facts behind `qleak runs`, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qleak import disk, folders
from qleak.errors import Expected, Failed
from qleak.report import brief


def facts(folder: Path) -> dict[str, Any]:
    """One run as `qleak runs ls --json` tells it; a study's rows and size are those of its parts, too.

    Raises:
        Expected: it is damaged.
        Failed: the disk refused.
    """
    header = folders.read_run(folder)
    pid = disk.holder(folder)
    parts = [p["name"] for p in header.get("parts") or []]
    counted = folders.within(folder) if header.get("kind") == "study" else [folder]
    return {
        "folder": str(folder), "name": folder.name, "id": header.get("plan_id"), "recipe": header.get("recipe") or "",
        "kind": header.get("kind"), "status": status(header, pid), "pid": pid or None, "parts": parts,
        "rows": sum(lines(f / "rows.jsonl") for f in counted), "bytes": size(folder),
        "started": header.get("started"), "finished": header.get("finished"), "verdict": brief.verdict(header),
    }  # fmt: skip


def listed(root: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The facts of all runs right below `root`, newest first, and why others cannot be read.

    Raises:
        Expected: there is no such folder.
    """
    if not root.is_dir():
        raise Expected(f"Expected a folder with runs at {root}, found none: --out says where they lie.")
    found, damaged = [], []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        try:
            if (folder / "run.json").exists():
                found.append(facts(folder))
            elif (folder / folders.CLEARED).exists():
                damaged.append({"folder": str(folder), "error": f"{folder} is half removed: `qleak runs rm` goes on."})
            elif (folder / "rows.jsonl").exists():
                damaged.append({"folder": str(folder), "error": f"Expected a run.json at {folder}, found none."})
        except (Expected, Failed) as error:
            damaged.append({"folder": str(folder), "error": str(error)})
    return sorted(found, key=lambda f: (f["started"] or "", f["name"]), reverse=True), damaged


def status(header: dict[str, Any], pid: int) -> str:
    """The status of run.json; what says "running" although nobody writes there has been stopped."""
    said = header.get("status")
    if pid:
        return "running"
    return "stopped" if said in (None, "running") else str(said)


def known(folder: Path) -> Path:
    """The folder, if it is a run's: with a run.json of this program, or with what a run leaves beside a damaged one.

    Raises:
        Expected: it is not.
    """
    where = folder / "run.json" if (folder / "run.json").exists() else folder / folders.CLEARED
    header = folders.json_object(disk.read(where) or b"")
    ours = header is not None and isinstance(header.get("schema"), int) and header.get("kind") in folders.KINDS
    if folder.is_symlink() or not (ours or (where.is_file() and (folder / ".lock").is_file())):
        raise Expected(f"Expected a run folder, with the run.json of a run, got {str(folder)!r}.")
    return folder


def written(folder: Path) -> list[Path]:
    """Every file of a run and of the runs within it, locks last; nothing behind a link."""
    patterns = (*folders.TENSORS, *folders.MODELS, *folders.OTHERS, "rows.jsonl", "run.json", folders.CLEARED, ".lock")
    return [p for f in reversed(list(folders.every(folder))) for name in patterns for p in folders.files(f, (name,))]


def size(folder: Path) -> int:
    """Bytes that everything below a folder takes on the disk, links not followed."""
    total, waiting = 0, [os.fspath(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:  # a writer's temporary file has got its name
            continue
        except OSError as error:
            raise Failed(f"Expected to read {folder}, got {error.strerror}.") from error
    return total


def blocks(paths: Iterable[Path]) -> int:
    """Bytes that these files take on the disk."""
    return sum(p.lstat().st_blocks * 512 for p in paths)


def lines(path: Path) -> int:
    """Complete lines of a file, 0 where there is none; a row is complete with its newline."""
    return (disk.read(path) or b"").count(b"\n")


def human(size: float) -> str:
    """Bytes for people: "512 B", "12.3 MB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

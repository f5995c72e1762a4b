"""Files that survive kill -9 and power cuts: atomic replacement, whole writes, locks, one-line failures. For the store."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qleak.errors import Failed

# POSIX locks end with their process and are not inherited by forked workers, which could outlive a
# killed writer. The price: they do not keep the process that holds one from taking it again.
_HELD: set[Path] = set()


def read(path: Path) -> bytes | None:
    """The file's content, None if there is no such file."""
    with disk(path):
        return path.read_bytes() if path.is_file() else None


def replace(path: Path, data: bytes) -> None:
    """All of `data` under `path`, or what was there before. One writer at a time, so one temporary name."""
    part = path.with_name(f".{path.name}.part")
    with disk(path):
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write(file, data)
        finally:
            os.close(file)
        part.replace(path)
        sync(path.parent)


def write(file: int, data: bytes) -> None:
    """One write (a full disk may take less at a time, and says so the next time), then fsync."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    os.fsync(file)


def sync(folder: Path) -> None:
    """Makes new names in `folder` durable."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def clear(folder: Path) -> None:
    """Removes a run; run.json goes last, so that rows never stand without the plan they belong to."""
    with disk(folder):
        (folder / "rows.jsonl").unlink(missing_ok=True)
        made = [*(folder / "tensors").glob("*.safetensors*"), *(folder / "samples").glob("*/*.npz")]
        for path in made:
            path.unlink()
        sync(folder)
        (folder / "run.json").unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder; one process at a time, and it ends with the process."""
    path = folder.resolve() / ".lock"
    busy = f"is writing {folder}: wait for it, or choose another --out or --name."
    if path in _HELD:
        raise Failed(f"Expected to be the only writer, but this process (pid {os.getpid()}) {busy}")
    with ExitStack() as stack:
        with disk(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, file)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                pid = os.read(file, 20).decode() or "unknown"
                raise Failed(f"Expected to be the only writer, but another process (pid {pid}) {busy}") from None
            os.ftruncate(file, 0)
            os.write(file, str(os.getpid()).encode())
        _HELD.add(path)
        stack.callback(_HELD.discard, path)
        yield


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turns an OSError into one line for the user."""
    try:
        yield
    except OSError as error:
        raise Failed(
            f"Expected to read and write {path}, got {error.strerror or error}: "
            "mend that or choose another --out; what was reported as done is kept."
        ) from error

"""Files that survive kill -9 and power cuts: atomic replacement, whole writes, locks, one-line failures. For the store."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qleak.errors import Failed

# POSIX locks end with their process and are not inherited by forked workers, which could outlive a
# killed writer. The price: they do not keep the process that holds one from taking it again, and
# closing any descriptor of the file lets go of them; so whoever holds one is written down here.
_HELD: set[Path] = set()


def read(path: Path) -> bytes | None:
    """The file's content, None if there is no such file; no other trouble looks like that: what is absent is made anew."""
    with disk(path):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


def replace(path: Path, data: bytes) -> None:
    """All of `data` under `path`, or what was there before. One writer at a time, so one temporary name."""
    part = path.with_name(f".{path.name}.part")
    with disk(path):
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            try:
                write(file, data)
            finally:
                os.close(file)
            part.replace(path)
        except OSError:
            with suppress(OSError):
                part.unlink()  # half a file would keep a full disk full
            raise
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


def make(folder: Path) -> None:
    """Makes a folder with its parents, and their names durable."""
    with disk(folder):
        absent = [f for f in (folder, *folder.parents) if not f.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for new in absent:
            sync(new.parent)


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
                pid = os.read(file, 20).decode(errors="replace") or "unknown"
                raise Failed(f"Expected to be the only writer, but another process (pid {pid}) {busy}") from None
            if not path.exists() or not os.path.samestat(os.fstat(file), path.stat()):  # a lock nobody else can see
                raise Failed(
                    f"Expected to be the only writer, but another process has just removed {folder}: try again."
                )
            os.ftruncate(file, 0)
            os.write(file, str(os.getpid()).encode())
        _HELD.add(path)
        stack.callback(_HELD.discard, path)
        yield


def holder(folder: Path) -> int:
    """The process id of who holds the folder's lock, 0 if nobody does; asked without taking it.

    On a network's file system the process may be another machine's.
    """
    path = folder.resolve() / ".lock"
    if path in _HELD:
        return os.getpid()
    # C's struct flock: (type, whence, start, length, pid), in an order of the system's own.
    linux = sys.platform == "linux"
    form, ask = ("hhqqi", (fcntl.F_WRLCK, 0, 0, 0, 0)) if linux else ("qqihh", (0, 0, 0, fcntl.F_WRLCK, 0))
    with disk(path):
        try:
            file = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return 0
        try:
            answer = struct.unpack(form, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(form, *ask)))
        finally:
            os.close(file)
    kind, pid = (answer[0], answer[4]) if linux else (answer[3], answer[2])
    return 0 if kind == fcntl.F_UNLCK else pid


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

"""Compiles the kernels once a machine, keeps them, loads them, tries them; and says why where that fails."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = ("convolutions.cpp", "ghosts.cpp", "lbfgs.cpp")
HEADER = "vectors.h"
CHIP = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
FLAGS = ("-O3", CHIP, "-std=c++17", "-shared", "-fPIC")
PATIENCE = 120  # seconds a compiler may take; it takes two
KINDS = {torch.float32: "float", torch.float64: "double"}


class Library(NamedTuple):
    """The loaded kernels, or None; and who compiled them, or why there are none."""

    code: ctypes.CDLL | None
    reason: str


@functools.cache
def library() -> Library:
    """The kernels of this machine: from the cache folder, else compiled into it first.

    $CXX names the compiler (else c++, g++ or clang++), $XDG_CACHE_HOME the folder (else ~/.cache); QLEAK_NATIVE=0 means none.
    """
    if os.environ.get("QLEAK_NATIVE") == "0":
        return Library(None, "QLEAK_NATIVE=0")
    compiler = _compiler()
    if compiler is None:
        return Library(None, "no C++ compiler found")
    name = Path(compiler[0]).name
    try:
        path = _kept(compiler)
        if path.exists():
            try:
                return Library(_load(path), name)
            except OSError:  # a torn file: made anew
                path.unlink(missing_ok=True)
        return Library(_compile(compiler, path), name)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Library(None, f"{name}: {_line(error)}")


def described() -> str:
    """Whose kernels are used on a CPU, for the terminal."""
    code, reason = library()
    return f"kernels compiled by {reason}" if code else f"torch's kernels ({reason})"


def serves(x: Tensor) -> bool:
    """Whether such numbers are computed here: float32 or float64 on a CPU whose kernels could be compiled."""
    return x.device.type == "cpu" and x.dtype in KINDS and library().code is not None


@functools.cache
def call(name: str, kind: torch.dtype) -> Any:
    """One of the kernels, for numbers of this kind."""
    return getattr(library().code, f"{name}_{KINDS[kind]}")


def address(v: Tensor, kind: torch.dtype, *shape: int) -> int:
    """Where a tensor's numbers lie, for a kernel that will believe what it is told; the caller keeps the tensor.

    Raises:
        ValueError: it is not of this kind and shape, or not on the CPU.
    """
    if v.dtype != kind or v.shape != shape or v.is_cuda:
        raise ValueError(f"Expected {kind} {list(shape)} on the CPU; got {v.dtype} {list(v.shape)} on {v.device}.")
    return v.data_ptr()


def _compiler() -> list[str] | None:
    """The command in front of the flags."""
    if sys.platform == "win32":  # pragma: no cover: other flags, another kind of library
        return None
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        return asked
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def _kept(compiler: list[str]) -> Path:
    """Where the library lies: named by all that decides what it is, as homes are shared by unlike machines."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (*SOURCES, HEADER):
        digest.update((HERE / part).read_bytes())
    digest.update(repr((compiler, FLAGS, platform.machine(), _processor())).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "qleak" / "native" / f"kernels-{digest.hexdigest()}.so"


def _processor() -> str:
    """What the compiler looks at when it is to use all that this processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _compile(compiler: list[str], path: Path) -> ctypes.CDLL:
    """Into a file of its own first: whoever looks meanwhile, or after a crash, sees a whole library or none.

    What does not load, or computes something else, is not kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*compiler, *FLAGS, *(str(HERE / part) for part in SOURCES), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
        code = _load(made)
        made.replace(path)
    return code


def _load(path: Path) -> ctypes.CDLL:
    """The library, its calls declared, and one of them tried on numbers that are known.

    Raises:
        OSError: it does not load, lacks a call, or computes something else.
    """
    code = ctypes.CDLL(str(path))
    try:
        _declare(code)
    except AttributeError as error:
        raise OSError(f"the library is not whole: {error}") from None
    x, kernel, found = (ctypes.c_float * 4)(1, 2, 3, 4), (ctypes.c_float * 1)(2), (ctypes.c_float * 4)()
    sizes = (ctypes.c_int64 * 7)(2, 2, 1, 1, 1, 1, 0)
    at = [ctypes.addressof(v) for v in (x, kernel, found)]
    code.forward_float(at[0], at[1], None, at[2], sizes, 1, 1, 0, 0)
    if list(found) != [2, 4, 6, 8]:
        raise OSError("the library computes something else")
    return code


def _declare(code: ctypes.CDLL) -> None:
    pointer, number, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    sizes = ctypes.POINTER(number)
    arguments = {
        "forward": [*[pointer] * 4, sizes, number, number, flag, flag],
        "transposed": [*[pointer] * 3, sizes, number, number, flag, flag],
        "weigh": [*[pointer] * 5, sizes, number, number, real],
        "outside": [*[pointer] * 4, real, *[pointer] * 3, *[number] * 4],
        "sides": [*[pointer] * 5, *[number] * 4],
        "lbfgs": [*[pointer] * 10, *[number] * 4],
    }
    for name, kinds in arguments.items():
        for kind in KINDS.values():
            kernel = getattr(code, f"{name}_{kind}")
            kernel.argtypes, kernel.restype = kinds, None


def _line(error: BaseException) -> str:
    """The first line that says something: of a compiler, its first error."""
    said = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return next((line.strip() for line in said if "error" in line), said[0] if said else type(error).__name__)

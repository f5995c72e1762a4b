"""What this machine is, and where work is placed on it: never part of a plan."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qleak import native
from qleak.errors import Expected

PACKAGES = (
    "qleak",
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-image",
    "einops",
    "dp-accounting",
    "rich",
    "typer",
)


def place(device: str, workers: int) -> tuple[str, int, list[str]]:
    """The device, the number of worker processes, and why.

    Raises:
        Expected: the device does not exist here, or several workers are asked for on a GPU.
    """
    if workers < 0:
        raise Expected(f"Expected workers={workers} >= 0.")
    cores = cpus()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reason = f"device {device} ({'CUDA found' if device == 'cuda' else 'no CUDA found'})"
    else:
        reason = f"device {device} (as asked)"
    try:
        kind = torch.device(device).type
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        if device.startswith("cuda") and not torch.cuda.is_available():
            why = "torch finds no CUDA GPU here; --device auto takes what there is."
        raise Expected(f"Expected a device of this machine, --device {device}: {why}") from None
    if kind != "cpu" and workers > 1:
        raise Expected(f"Expected --workers {workers} to be 1 on {device}: lanes share the GPU in one process.")
    chosen = workers or (cores if kind == "cpu" else 1)
    why = "as asked" if workers else ("one per core, one thread each" if kind == "cpu" else "lanes share the GPU")
    return device, chosen, [reason, f"{chosen} worker{'s' if chosen > 1 else ''} ({why})"]


def cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def revision() -> str | None:
    """The git revision of the checkout this package runs from, if it is one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Identity(NamedTuple):
    """What a result depends on, beside the plan: equal `code`, `torch` and `chip` give equal bits."""

    qleak: str
    code: str
    torch: str
    chip: str
    gpu: str
    host: str


@functools.cache
def identity() -> Identity:
    """This process's, as it was at the first call."""
    kernels = "compiled" if native.library().code else "torch's"
    chip = f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}, {kernels} kernels"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return Identity(versions()["qleak"], _code(), torch.__version__, chip, gpu, platform.node())


def _code() -> str:
    """BLAKE2b (10 hex digits) of the package's sources, those left out that only show results."""
    root, found = Path(__file__).parent, hashlib.blake2b(digest_size=5)
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h")):
        room = path.relative_to(root).parts[0]
        if room not in ("adapters", "cli", "recipes", "report"):
            found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def describe() -> dict[str, Any]:
    """The environment fields of run.json."""
    return {
        "versions": versions(), "git": revision(), "cpu": cpu_name(), "cores": cpus(), "system": platform.platform(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip

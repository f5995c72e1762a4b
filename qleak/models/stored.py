"""Trained weights from a file or from a run's folder, as a model like any other."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Generator, Tensor

import qleak
from qleak.catalog import build
from qleak.check import Expected
from qleak.types import Buffers, Model, Params

BUFFERS = "buffers/"


def stored(path: str = "", digest: str = "") -> Model:
    """A trained network from a safetensors file whose metadata names its `model`, as every training run writes it.

    `init` ignores its generator and returns the stored weights.

    Args:
        path: the file; the shipped example run's when empty.
        digest: BLAKE2b of the model's name and every tensor (16 hex digits), filled in when empty, so
            that a plan's id follows the content; a file that has changed since is refused.

    Raises:
        Expected: no such file, another content than `digest`, no `model` in its metadata, or tensors
            that are not that model's.
    """
    path = path or str(shipped() / "final_model.safetensors")
    tensors, about = _read(Path(path).expanduser())
    found = _digest(tensors, about.get("model", ""))
    if digest not in ("", found):
        raise Expected(f"Expected {path} with digest {digest}, found {found}: the file has changed since.")
    if "model" not in about:
        raise Expected(f"Expected {path} to name its model in the metadata, e.g. model=lenet(channels=1, size=28).")
    model: Model = build("models", about["model"])
    params = {k: v for k, v in tensors.items() if not k.startswith(BUFFERS)}
    buffers = {k.removeprefix(BUFFERS): v for k, v in tensors.items() if k.startswith(BUFFERS)}
    expected = model.init(Generator())
    shapes = [{k: tuple(v.shape) for k, v in t.items()} for t in expected]
    if shapes != [{k: tuple(v.shape) for k, v in t.items()} for t in (params, buffers)]:
        raise Expected(f"Expected {path} to hold the parameters of {about['model']}.")

    def init(gen: Generator) -> tuple[Params, Buffers]:
        return {k: params[k].clone() for k in expected[0]}, {k: buffers[k].clone() for k in expected[1]}

    return replace(model, init=init, spec=f"stored(path={str(path)!r}, digest={found!r})")


stored.__factory__ = True  # type: ignore[attr-defined]  # its spec holds the digest it found, so `factory` will not do


def run(id: str = "example") -> Model:
    """The model that a training run wrote: ``run:ID``, or ``run:ID/0-2`` for channel 0, seed 2.

    Args:
        id: a run's folder, its name (or what only its name ends with) below ./runs, or the shipped "example".

    Raises:
        Expected: no such run, or it has written no such model (yet).
    """
    folder, name = folder_of(id)
    path = folder / "models" / f"{name}.safetensors" if name else folder / "final_model.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in (folder / "models").glob("*.safetensors"))) or "none"
        raise Expected(f"Expected a trained model at {path}; models of that run: {there}.")
    return stored(str(path))


run.__factory__ = True  # type: ignore[attr-defined]


def folder_of(id: str) -> tuple[Path, str]:
    """(folder, "channel-seed" or "") of ``ID`` or ``ID/0-2``.

    Raises:
        Expected: no such run, or several.
    """
    wanted, name = id.rstrip("/"), ""
    found = re.fullmatch(r"(.+)/(\d+-\d+(?:-round-\d+)?)", wanted)
    if found and not (Path(wanted) / "run.json").is_file():
        wanted, name = found.groups()
    if wanted and (Path(wanted).expanduser() / "run.json").is_file():
        return Path(wanted).expanduser(), name
    if wanted == "example" and not Path("runs/example").is_dir():
        return shipped(), name
    near = sorted(p.parent for p in Path("runs").glob("*/run.json") if wanted and p.parent.name.endswith(wanted))
    exact = [p for p in near if p.name == wanted]
    if len(exact or near) != 1:
        many = f"; several end so: {', '.join(p.name for p in near)}" if near else ""
        raise Expected(f"Expected a run's folder, or its name below ./runs, got {id!r}{many}.")
    return (exact or near)[0], name


def shipped() -> Path:
    """The example run that comes with qleak, in the installed package or in a checkout."""
    package = Path(qleak.__file__).parent
    installed = package / "assets" / "runs" / "example"
    return installed if installed.is_dir() else package.parent / "assets" / "runs" / "example"


def _digest(tensors: dict[str, Tensor], model: str) -> str:
    """Over content, not bytes: the header's metadata stand in no fixed order."""
    found = hashlib.blake2b(model.encode(), digest_size=8)
    for name, v in sorted(tensors.items()):
        found.update(f"{name} {v.dtype} {tuple(v.shape)}".encode())
        found.update(v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors, and the metadata in its header (eight bytes of length, then JSON)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Expected(f"Expected weights at {path}: {error.strerror}.") from None
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError):
        raise Expected(f"Expected {path} to be a whole safetensors file.") from None
    return tensors, header.get("__metadata__") or {}

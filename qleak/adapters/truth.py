"""The images an audited client held, where the auditor has them: npz, image file, folder, or a data set's by index."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qleak import data
from qleak.check import Expected
from qleak.data import called

IMAGES = ("x", "images", "x_train", "image", "arr_0")
LABELS = ("y", "labels", "y_train", "label", "arr_1")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class Truth(NamedTuple):
    """Images `x [b c h w]` in [0, 1], float32; labels `y [b]`, None where nothing says them."""

    x: Tensor
    y: Tensor | None


def read(text: str, shape: tuple[int, int, int]) -> Truth:
    """The images that `text` names, as a model of `shape` takes them: at most 1,000 of them.

    Raises:
        Expected: no such file, set or index, or images of another shape.
    """
    path = Path(text).expanduser()
    if path.suffix == ".npz":
        return checked(*_npz(path), shape, text)
    if path.suffix.lower() in SUFFIXES:
        if shape[1] != shape[2]:
            raise Expected(f"Expected a square model for the picture {text}, this one takes {shape}: write an npz.")
        one = data.load(called.written("picture", path=str(path), size=shape[1], channels=shape[0], label=0))
        return checked(one.x, None, shape, text)
    if path.is_dir():
        some = data.load(path.resolve(), size=shape[1], limit=1000)
        return checked(some.x, some.y if some.classes > 1 else None, shape, text)
    return checked(*_of_set(text), shape, text)


def checked(x: Tensor, y: Tensor | None, shape: tuple[int, int, int], said: str = "truth") -> Truth:
    """Images that fit: `[b c h w]`, `[b h w c]` turned round, `[b h w]` in grey, or one image; whole numbers in 255ths.

    Raises:
        Expected: another shape, values outside [0, 1], or another number of labels.
    """
    x = x[:, None] if x.ndim == 3 and (1, *x.shape[1:]) == shape else x
    x = x[None] if x.ndim == 3 else x
    if x.ndim == 4 and tuple(x.shape[1:]) != shape and (x.shape[3], x.shape[1], x.shape[2]) == shape:
        x = x.permute(0, 3, 1, 2)
    if x.ndim != 4 or tuple(x.shape[1:]) != shape or not len(x):
        raise Expected(f"Expected images of shape {shape} in {said}, got {tuple(x.shape)}.")
    x = x.float() if x.is_floating_point() else x.float() / 255
    if not bool(x.isfinite().all()) or float(x.min()) < 0 or float(x.max()) > 1:
        raise Expected(f"Expected pixels of {said} in [0, 1], got [{float(x.min()):g}, {float(x.max()):g}].")
    if y is not None:
        y = y.reshape(-1).long()
        if len(y) != len(x):
            raise Expected(f"Expected a label for each of {len(x)} images in {said}, got {len(y)}.")
    return Truth(x.contiguous(), y)


def _npz(path: Path) -> tuple[Tensor, Tensor | None]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            images = next((k for k in IMAGES if k in file.files), None)
            if images is None:
                raise Expected(f"Expected images under one of {', '.join(IMAGES)} in {path}, got {file.files[:4]}.")
            labels = next((k for k in LABELS if k in file.files), None)
            x = torch.from_numpy(np.array(file[images]))
            return x, None if labels is None else torch.from_numpy(np.array(file[labels]))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        if isinstance(error, Expected):
            raise
        raise Expected(f"Expected a readable npz at {path}: {str(error).splitlines()[0]}") from None


def _of_set(text: str) -> tuple[Tensor, Tensor]:
    """`mnist5k:3`, `mnist5k:3,8`, `mnist5k:0:4`, and image 0 without an index."""
    name, _, places = text.partition(":") if called.parse(text) is None else (text, "", "0")
    found = data.load(name)
    try:
        if ":" in places:
            first, last = places.split(":")
            index = list(range(int(first or 0), int(last)))
        else:
            index = [int(i) for i in (places or "0").split(",")]
    except ValueError:
        raise Expected(f"Expected indices such as {name}:3, {name}:3,8 or {name}:0:4, got {text!r}.") from None
    if not index or min(index) < 0 or max(index) >= len(found.x):
        raise Expected(f"Expected indices in 0 … {len(found.x) - 1} of {name}, got {places!r}.")
    return found.x[index], found.y[index]

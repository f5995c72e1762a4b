"""From stored arrays to a `Dataset`: the checks every loader ends with, and `.npz` files.

Images come as `[n c h w]`, `[n h w c]` or `[n h w]`, in uint8 or as floats that are already in [0, 1].
"""

from __future__ import annotations

import contextlib
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qleak.check import Expected, finite
from qleak.types import Dataset

GIGABYTE = 2**30
BUDGET = 2 * GIGABYTE  # largest set loaded at once, as float32; beyond it the user says which part
BROKEN = (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)


class Raw(NamedTuple):
    """What a reader returns: x `[n c h w]` uint8 or float, y `[n]`, number of classes, further columns `[n]`."""

    x: np.ndarray
    y: np.ndarray
    classes: int
    facts: Mapping[str, np.ndarray] = {}


def dataset(raw: Raw, name: str) -> Dataset:
    """A checked `Dataset`, float32 in [0, 1].

    Raises:
        Expected: no images, wrong shape or dtype, values outside [0, 1], or labels that do not fit.
    """
    x, y, classes, facts = raw
    if x.ndim != 4 or 0 in x.shape:
        raise Expected(f"Expected images n×c×h×w in {name}, got shape {x.shape}.")
    affordable(len(x), x.shape[1:], name)
    if y.shape != x.shape[:1]:
        raise Expected(f"Expected {len(x)} labels in {name}, one an image in one axis, got shape {y.shape}.")
    if y.dtype.kind not in "iu":
        raise Expected(f"Expected whole numbers as labels of {name}, got dtype {y.dtype}.")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise Expected(f"Expected labels of {name} in 0 … {classes - 1}, got {low} … {high}.")
    columns = {k: torch.from_numpy(v.astype(np.int64)) for k, v in facts.items()}
    return Dataset(_unit(x, name), torch.from_numpy(y.astype(np.int64)), name, classes, columns)


def _unit(x: np.ndarray, name: str) -> Tensor:
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise Expected(f"Expected images of {name} as uint8, or as floats in [0, 1], got dtype {x.dtype}.")
    images = torch.from_numpy(x.astype(np.float32, order="C"))
    if x.dtype == np.uint8:
        return images.div_(255)
    finite(**{f"{name}.x": images})
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise Expected(f"Expected float images of {name} in [0, 1], got {low:g} … {high:g}: rescale, or store uint8.")
    return images


def affordable(count: int, shape: tuple[int, ...], name: str) -> None:
    """`count` images of `shape` (c, h, w) fit in `BUDGET` bytes of float32."""
    each = 4 * int(np.prod(shape))
    if count * each > BUDGET:
        size = "×".join(map(str, shape))
        raise Expected(
            f"Expected limit <= {BUDGET // each} for {name}: "
            f"{count} images of {size} need {count * each / GIGABYTE:.1f} GB."
        )


@contextlib.contextmanager
def readable(what: str, mend: str) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise becomes one line that names the file and the way out."""
    try:
        yield
    except Expected:
        raise
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Expected(f"Expected {what} to be readable: {reason.rstrip('.')}. {mend}") from None


def channels_first(x: np.ndarray, name: str) -> np.ndarray:
    """`[n h w]`, `[n h w c]` or `[n c h w]` with 1 or 3 channels as `[n c h w]`."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4:
        first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
        if first != last:
            return x if first else x.transpose(0, 3, 1, 2)
    raise Expected(f"Expected images n×h×w, n×h×w×c or n×c×h×w with c = 1 or 3 in {name}, got shape {x.shape}.")


def npz(path: Path, split: str) -> Raw:
    """`x_train y_train x_test y_test` of an `.npz`, and optionally `classes`, one entry a class.

    Without `classes` their number is the largest label of both splits plus one. Pickled objects are
    refused, so a file from outside runs no code.
    """
    with (
        readable(str(path), "Write it with numpy.savez(x_train=…, y_train=…), without objects."),
        path.open("rb") as file,
        np.load(file, allow_pickle=False) as stored,
    ):
        keys = list(stored) if isinstance(stored, np.lib.npyio.NpzFile) else []
        splits = [s for s in ("train", "test") if f"x_{s}" in keys]
        if split not in splits:
            found = ", ".join(keys) or "no named arrays"
            raise Expected(f"Expected x_{split} in {path}, got {found}. Splits there: {', '.join(splits) or 'none'}.")
        labels = {s: stored[f"y_{s}"] for s in ("train", "test") if f"y_{s}" in keys}
        if split not in labels:
            raise Expected(f"Expected the labels y_{split} in {path}, got {', '.join(keys)}.")
        highest = [int(y.max()) for y in labels.values() if y.size and y.dtype.kind in "iu"]
        classes = len(stored["classes"]) if "classes" in keys else max(highest, default=0) + 1
        return Raw(channels_first(stored[f"x_{split}"], str(path)), labels[split], classes)

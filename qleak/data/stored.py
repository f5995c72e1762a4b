"""Public sets stored as arrays, in the folder layout that torchvision downloads and extracts.

Only the part that is asked for is read, and torchvision is not imported (that alone takes seconds).
A reader is `read(root, split, limit, size) -> Raw`; `needs_…` names the files of a split below the root.
"""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qleak.check import Expected
from qleak.data.arrays import Raw

# --- MNIST, Fashion-MNIST, KMNIST: idx files --------------------------------------------------------


def idx(path: Path, axes: int) -> np.ndarray:
    """A uint8 array in Lush's idx format: 0, 0, type 8, number of axes, then each length as big-endian int32."""
    header = 4 + 4 * axes
    with path.open("rb") as file:
        head = file.read(header)
    shape = tuple(np.frombuffer(head[4:], ">i4").tolist())
    want = header + int(np.prod(shape))
    if head[:4] != bytes([0, 0, 8, axes]) or len(head) != header or path.stat().st_size != want:
        raise ValueError(f"{path.name} is not an idx file of {axes} axes, or is cut short")
    return np.memmap(path, np.uint8, "r", offset=header, shape=shape)


def needs_idx(folder: str, split: str) -> tuple[str, ...]:
    """The images and the labels of `split`."""
    stem = {"train": "train", "test": "t10k"}[split]
    return f"{folder}/raw/{stem}-images-idx3-ubyte", f"{folder}/raw/{stem}-labels-idx1-ubyte"


def read_idx(folder: str, root: Path, split: str, limit: int | None, size: int | None) -> Raw:
    """Ten classes of 1×28×28 images."""
    images, labels = (root / need for need in needs_idx(folder, split))
    return Raw(idx(images, 3)[:limit, None], idx(labels, 1)[:limit], 10)


# --- CIFAR: pickles of one array and one list -------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Rebuilds numpy arrays of plain types and nothing else, so a file from outside runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        rebuild = np.empty(0).__reduce__()[0]
        allowed = {"_reconstruct": rebuild, "ndarray": np.ndarray, "dtype": _dtype}
        if module.split(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR file")


def _dtype(code: str, *_: object) -> np.dtype:
    return np.dtype(code)  # the flags that Python 2 wrote after the code are deprecated


def unpickle(file: BinaryIO) -> dict[str, Any]:
    """The dictionary in a pickle that Python 2 wrote."""
    return _Unpickler(file, encoding="latin1").load()


CIFAR = {
    "cifar10": ("cifar-10-batches-py", {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}),
    "cifar100": ("cifar-100-python", {"train": ["train"], "test": ["test"]}),
}


def needs_cifar(name: str, split: str) -> tuple[str, ...]:
    """The batches of `split`."""
    folder, batches = CIFAR[name]
    return tuple(f"{folder}/{batch}" for batch in batches[split])


def read_cifar(name: str, root: Path, split: str, limit: int | None, size: int | None) -> Raw:
    """10 or 100 (fine) classes of 3×32×32 images."""
    x, y = [], []
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    for need in needs_cifar(name, split):
        if limit is None or sum(map(len, y)) < limit:
            with (root / need).open("rb") as file:
                batch = unpickle(file)
            x.append(np.asarray(batch["data"]).reshape(-1, 3, 32, 32))
            y.append(np.asarray(batch[key]))
    return Raw(np.concatenate(x)[:limit], np.concatenate(y)[:limit], {"cifar10": 10, "cifar100": 100}[name])


# --- SVHN: Matlab files ----------------------------------------------------------------------------


def needs_svhn(split: str) -> tuple[str, ...]:
    """One file a split."""
    return (f"{split}_32x32.mat",)


def read_svhn(root: Path, split: str, limit: int | None, size: int | None) -> Raw:
    """Ten classes of 3×32×32 images; stored `h w c n`, the digit 0 as label 10."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    path = root / needs_svhn(split)[0]
    try:
        stored = loadmat(path)
    except (MatReadError, NotImplementedError, TypeError) as error:
        raise Expected(f"Expected {path} to be a Matlab 5 file: {error}. Fetch it again.") from None
    x, y = stored["X"].transpose(3, 2, 0, 1), stored["y"][:, 0]
    return Raw(x[:limit], np.where(y == 10, 0, y)[:limit], 10)


# --- STL-10: raw bytes -----------------------------------------------------------------------------


def needs_stl10(split: str) -> tuple[str, ...]:
    """The images and the labels of `split`."""
    return f"stl10_binary/{split}_X.bin", f"stl10_binary/{split}_y.bin"


def read_stl10(root: Path, split: str, limit: int | None, size: int | None) -> Raw:
    """Ten classes of 3×96×96 images; stored `n c w h`, labels from 1."""
    images, labels = (root / need for need in needs_stl10(split))
    x = np.memmap(images, np.uint8, "r").reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)
    return Raw(x[:limit], np.fromfile(labels, np.uint8)[:limit].astype(np.int64) - 1, 10)


def idx_set(folder: str) -> dict[str, Any]:
    """`needs` and `read` of a set of idx files in `folder`."""
    return {"needs": partial(needs_idx, folder), "read": partial(read_idx, folder)}


def cifar_set(name: str) -> dict[str, Any]:
    """`needs` and `read` of CIFAR-10 or CIFAR-100."""
    return {"needs": partial(needs_cifar, name), "read": partial(read_cifar, name)}

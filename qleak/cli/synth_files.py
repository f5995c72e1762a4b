"""Sample files of syntheses, this package's or others': read in their order, and judged on real images."""

from __future__ import annotations

import glob
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qleak.errors import Expected

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qleak.types import Dataset

SAMPLES, PUBLISHED = 10_000, 100_000
CELEBA = ("celeba-gender", "celeba-hair")
KNOWN = {
    "mnist": (1, 10),
    "fashion_mnist": (1, 10),
    "celeba-gender": (3, 2),
    "celeba-hair": (3, 3),
    "places365": (3, 3),
}
QUICK = {"cnn_classifier": "cnn_classifier(lr=1e-3, batch=128, epochs=10, optimizer='adam')"}
FULL = {"cnn_classifier": "cnn_classifier(lr=2e-3, batch=512, epochs=600)"}
FULL_CELEBA = {"cnn_classifier": "cnn_classifier(lr=1e-4, batch=256, epochs=250)"}
PICKLES = (".pkl", ".pickle", ".p", ".joblib", ".pt", ".pth")
ENDINGS = (".npz", ".npy")


class Series(NamedTuple):
    """Sample files in the order of their numbers, and the numbers that are missing among them."""

    paths: list[Path]
    missing: list[int]


def judged(
    prefix: str,
    dataset: str = "mnist",
    classifier: str = "cnn_classifier",
    seeds: int = 5,
    seed: int = 0,
    limit: int = 0,
    full: bool = False,
    size: int = 0,
) -> dict[str, Any]:
    """Trains on the samples of `prefix`, tests on the real test split: accuracy of the last epoch and the largest.

    The largest over epochs is what published tables report; it is chosen on the test set.

    Raises:
        Expected: no or unfit files, no such set or classifier, or wrong numbers.
    """
    from qleak import random
    from qleak.catalog import build
    from qleak.check import at_least, whole
    from qleak.engine.seeds import mean_interval

    whole(seeds=seeds, seed=seed, limit=limit, size=size)
    at_least(1, seeds=seeds)
    at_least(0, seed=seed, limit=limit, size=size)
    presets = QUICK if not full else FULL_CELEBA if dataset in CELEBA else FULL
    judge = build("classifiers", presets.get(classifier.strip().replace("-", "_"), classifier))
    wanted = limit or (PUBLISHED if full else SAMPLES)
    series = listed(prefix)
    x, y = read(series.paths, dataset, wanted)
    if size:
        x = _smaller(x, size)
    test = _test(dataset, x)
    if int(y.max()) >= test.classes:
        raise Expected(f"Expected labels in 0 … {test.classes - 1} of {dataset}, got {int(y.max())}.")
    fits = [judge.fit(x, y, test.x, test.y, test.classes, random.key("synth evaluate", seed, i)) for i in range(seeds)]
    last, largest = [float(curve[-1]) for curve in fits], [float(curve.max()) for curve in fits]
    found: dict[str, Any] = {
        "files": [str(path) for path in series.paths], "missing": series.missing, "dataset": dataset, "classifier": judge.spec,
        "samples": len(x), "wanted": wanted, "shape": list(x.shape[1:]), "classes": test.classes, "test_images": len(test.x),
        "seeds": seeds, "epochs": len(fits[0]), "accuracies": last, "accuracies_max": largest,
    }  # fmt: skip
    for name, values in (("accuracy", last), ("accuracy_max", largest)):
        found[name], found[f"{name}_ci"] = mean_interval(values)
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The result as text: what was read, the accuracy, and the one that the test set chose."""
    from qleak.report.compare import accuracy
    from qleak.report.synthesis import CHOSEN

    shape = "×".join(map(str, found["shape"]))
    said = [
        f"{found['samples']:,} images of {shape} from {len(found['files'])} file{'' if len(found['files']) == 1 else 's'}, "
        f"tested on {found['test_images']:,} of {found['dataset']}",
        found["classifier"],
    ]
    if found["missing"]:
        said.append(f"Missing among the files: {', '.join(map(str, found['missing']))}.")
    if found["samples"] < found["wanted"]:
        said.append(f"{found['wanted']:,} images were asked for; the files hold {found['samples']:,}.")
    many = f"{found['seeds']} seed{'' if found['seeds'] == 1 else 's'}"
    half = ", ± half of the 95% interval" if found["seeds"] > 1 else ""
    return [
        *said, "",
        f"accuracy, last epoch   {accuracy(found['accuracy'], found['accuracy_ci'])}   ({many}{half})",
        f"{CHOSEN}   {accuracy(found['accuracy_max'], found['accuracy_max_ci'])}",
    ]  # fmt: skip


def listed(prefix: str) -> Series:
    """`prefix` itself if it is a file, else every PREFIX*.npz or PREFIX*.npy by the last number of its name.

    Raises:
        Expected: there are none, only pickles, or files of several series.
    """
    alone = Path(prefix)
    if alone.is_file():
        _no_pickle(alone)
        return Series([alone], [])
    folder, start = (alone, "") if prefix.endswith("/") else (alone.parent, alone.name)
    there = sorted(path for path in folder.glob(f"{glob.escape(start)}*") if path.is_file())
    found = [path for path in there if path.suffix in ENDINGS]
    if not found:
        for path in there:
            _no_pickle(path)
        raise Expected(f"Expected files {prefix}*.npz, found none.")
    series: dict[str, dict[int, Path]] = {}
    for path in found:
        stem, digits = re.fullmatch(r"(.*?)(\d*)", path.stem).groups()  # type: ignore[union-attr]
        series.setdefault(f"{path.parent / stem}…{path.suffix}", {})[int(digits or -1)] = path
    if len(series) > 1:
        names = ", ".join(sorted(series))
        raise Expected(f"Expected one series of files at {prefix}, got {names}: give more of the name.")
    numbered = next(iter(series.values()))
    missing = [i for i in range(max(numbered)) if i not in numbered] if -1 not in numbered else []
    return Series([numbered[i] for i in sorted(numbered)], missing)


def _no_pickle(path: Path) -> None:
    """Pickles run code when they are read, so none is opened here."""
    with path.open("rb") as file:
        start = file.read(6)
    if path.suffix in PICKLES or (path.suffix not in ENDINGS and start[:1] == b"\x80"):
        raise Expected(
            f"Expected arrays in {path}, got a pickle: it could run any code, so it is not read. "
            "Where you trust it, load it and numpy.savez(file, data=array)."
        )
    if path.suffix not in ENDINGS:
        raise Expected(f"Expected {path} to end in .npz or .npy.")


def read(paths: list[Path], dataset: str, wanted: int) -> tuple[Tensor, Tensor]:
    """The first `wanted` images `[n c h w]` in [0, 1] and labels `[n]` of all files together; later files are not opened.

    Raises:
        Expected: a damaged or unfit file, or files of different shapes.
    """
    import torch

    parts: list[tuple[Tensor, Tensor]] = []
    for path in paths:
        parts.append(_one(path, dataset))
        if parts[-1][0].shape[1:] != parts[0][0].shape[1:]:
            shapes = [tuple(part[0].shape[1:]) for part in (parts[0], parts[-1])]
            raise Expected(f"Expected images {shapes[0]} in {path} as in {paths[0]}, got {shapes[1]}.")
        if sum(len(y) for _, y in parts) >= wanted:
            break
    x, y = (torch.cat(side)[:wanted] for side in zip(*parts, strict=True))
    return x, y


def _one(path: Path, dataset: str) -> tuple[Tensor, Tensor]:
    """One file: `data [n d+class]`, flat images beside one-hot labels, or images `x[_train]` and labels `y[_train]`."""
    import numpy as np
    import torch

    from qleak.data import arrays

    with arrays.readable(str(path), "Write it with numpy.savez(data=…), without objects."):
        stored = np.load(path, allow_pickle=False)
        held = {k: stored[k] for k in stored.files} if isinstance(stored, np.lib.npyio.NpzFile) else {"data": stored}
    if "data" in held:
        x, y = _flat(held["data"], held.get("shape"), path, dataset)
    else:
        names = next(((a, b) for a, b in (("x_train", "y_train"), ("x", "y")) if a in held and b in held), None)
        if names is None:
            raise Expected(
                f"Expected data, x_train and y_train, or x and y in {path}, got {', '.join(held) or 'nothing'}."
            )
        x, y = arrays.channels_first(held[names[0]], str(path)), held[names[1]]
    whole = y.dtype.kind in "iu" and y.size
    made = arrays.dataset(arrays.Raw(x, y, int(y.max()) + 1 if whole else 1), str(path))
    return made.x, made.y.to(torch.int64)


def _flat(data: np.ndarray, shape: np.ndarray | None, path: Path, dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of rows of d pixels and a one-hot label each.

    Without `shape` the channels and classes are those of the named set, and images are square.
    """
    if data.ndim != 2 or data.dtype.kind != "f":
        raise Expected(
            f"Expected floats n×(pixels + classes) as data of {path}, got {data.dtype} of shape {data.shape}."
        )
    if shape is not None and (shape.shape != (3,) or shape.dtype.kind not in "iu" or shape.min() < 1):
        raise Expected(f"Expected shape = (c, h, w) in {path}, got {shape.tolist()}.")
    channels, classes = KNOWN.get(dataset, (0, 0))
    if not classes:
        if shape is None:
            raise Expected(f"Expected the shape (c, h, w) beside data in {path}: {dataset} does not say which.")
        classes = _classes(dataset)
    width = data.shape[1]
    c, h, w = map(int, shape) if shape is not None else _square(width - classes, channels)
    if c * h * w + classes != width or h == 0:
        pixels = f"{c}×{h}×{w} = {c * h * w}" if shape is not None else f"{channels} square"
        raise Expected(
            f"Expected {pixels} pixels and {classes} classes of {dataset} a row in {path}, got {width} columns."
        )
    images, labels = data[:, : width - classes], data[:, width - classes :]
    if not ((labels == 1).sum(1) == 1).all() or not ((labels == 0).sum(1) == classes - 1).all():
        raise Expected(f"Expected the last {classes} columns of {path} to be one-hot labels.")
    return images.reshape(-1, c, h, w), labels.argmax(1)


def _square(pixels: int, channels: int) -> tuple[int, int, int]:
    side = math.isqrt(max(pixels // channels, 0))
    return channels, side, side


def _classes(dataset: str) -> int:
    from qleak.synth import sets

    return sets.records(dataset, "test", 0).classes


def _smaller(x: Tensor, size: int) -> Tensor:
    import torch.nn.functional as F

    if size > min(x.shape[-2:]):
        raise Expected(f"Expected size={size} <= {min(x.shape[-2:])}, the samples' own.")
    return F.adaptive_avg_pool2d(x, size)


def _test(dataset: str, x: Tensor) -> Dataset:
    """Real test images of the samples' size.

    Raises:
        Expected: no such set, or its images have another shape.
    """
    from qleak.synth import sets

    c, h, w = x.shape[1:]
    if h != w:
        raise Expected(f"Expected square samples, got {h}×{w}.")
    test = sets.records(dataset, "test", h)
    if tuple(test.x.shape[1:]) != (c, h, w):
        raise Expected(f"Expected samples of {'×'.join(map(str, test.x.shape[1:]))} as in {dataset}, got {c}×{h}×{w}.")
    return test

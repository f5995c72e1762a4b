"""Public sets that are lists of image files, in torchvision's folder layout; only what is asked for is decoded.

They are far too big to be held whole, so `limit` (the first N of the split, in the list's own
order) and `size` (centre square, area-averaged) matter here. A reader is
`read(root, split, limit, size) -> Raw`; `needs_…` names the files of a split below the root.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from qleak.check import Expected
from qleak.data.arrays import Raw
from qleak.data.images import decode


def _rows(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield line.split()


# --- CelebA ----------------------------------------------------------------------------------------

HAIR = ("Black_Hair", "Blond_Hair", "Brown_Hair")
PARTITION = {"train": "0", "valid": "1", "test": "2"}


def needs_celeba(split: str) -> tuple[str, ...]:
    """Attributes, partition and aligned images."""
    return "celeba/list_attr_celeba.txt", "celeba/list_eval_partition.txt", "celeba/img_align_celeba"


def read_celeba(root: Path, split: str, limit: int | None, size: int | None) -> Raw:
    """3×218×178 faces; the label is the gender (0 female, 1 male).

    Facts: `gender` again, and `hair` (0 black, 1 blond, 2 brown; −1 for none or more than one of
    them), the three classes of Wang et al., "DataLens" (CCS 2021).
    """
    attributes, partition, images = (root / need for need in needs_celeba(split))
    rows = _rows(attributes)
    next(rows, None)  # the number of images
    names = next(rows, [])
    male, hair = names.index("Male") + 1, [names.index(colour) + 1 for colour in HAIR]

    def chosen() -> Iterator[tuple[Path, int, int]]:
        for (file, part), row in zip(_rows(partition), rows, strict=True):
            if row[0] != file:
                raise Expected(f"Expected {attributes} and {partition.name} in one order, got {row[0]} and {file}.")
            if part == PARTITION[split]:
                colours = [i for i, column in enumerate(hair) if row[column] == "1"]
                yield images / file, int(row[male] == "1"), colours[0] if len(colours) == 1 else -1

    files, gender, colours = _columns(chosen(), limit, "celeba")
    y = np.array(gender)
    return Raw(decode(files, size, "celeba"), y, 2, {"gender": y, "hair": np.array(colours)})


def _columns(rows: Iterator[tuple[Any, ...]], limit: int | None, name: str) -> tuple[list[Any], ...]:
    taken = list(islice(rows, limit))
    if not taken:
        raise Expected(f"Expected images in this split of {name}, found none in its list.")
    return tuple(list(column) for column in zip(*taken, strict=True))


# --- LFW -------------------------------------------------------------------------------------------

PEOPLE = {"train": "peopleDevTrain.txt", "test": "peopleDevTest.txt", "10fold": "people.txt"}


def needs_lfw(split: str) -> tuple[str, ...]:
    """The split's list of people, the list of all names, and the funneled images."""
    return f"lfw-py/{PEOPLE[split]}", "lfw-py/lfw-names.txt", "lfw-py/lfw_funneled"


def read_lfw(root: Path, split: str, limit: int | None, size: int | None) -> Raw:
    """3×250×250 faces; the label is the person's place in `lfw-names.txt` (5,749 people)."""
    people, names, images = (root / need for need in needs_lfw(split))
    label = {row[0]: i for i, row in enumerate(_rows(names))}
    # Lines with one number only are the counts of folds and of people.
    chosen = (
        (images / person / f"{person}_{number:04d}.jpg", label[person])
        for person, count in (row for row in _rows(people) if len(row) == 2)
        for number in range(1, int(count) + 1)
    )
    files, y = _columns(chosen, limit, "lfw")
    return Raw(decode(files, size, "lfw"), np.array(y), len(label))


# --- Places365 -------------------------------------------------------------------------------------

PLACES = {
    "train": ("places365_train_standard.txt", "data_256_standard"),
    "val": ("places365_val.txt", "val_256"),
}


def needs_places365(split: str) -> tuple[str, ...]:
    """The categories, the split's list, and its small (256×256) images."""
    return "categories_places365.txt", *PLACES[split]


def read_places365(root: Path, split: str, limit: int | None, size: int | None) -> Raw:
    """3×256×256 photographs of 365 kinds of place; the training list is sorted by kind, `val` is not."""
    categories, files, images = (root / need for need in needs_places365(split))
    chosen = ((images / name.lstrip("/"), int(kind)) for name, kind in _rows(files))
    paths, y = _columns(chosen, limit, "places365")
    return Raw(decode(paths, size, "places365"), np.array(y), sum(1 for _ in _rows(categories)))


# --- LSUN ------------------------------------------------------------------------------------------

SCENES = (
    "bedroom",
    "bridge",
    "church_outdoor",
    "classroom",
    "conference_room",
    "dining_room",
    "kitchen",
    "living_room",
    "restaurant",
    "tower",
)


def needs_lsun(split: str) -> tuple[str, ...]:
    """One LMDB folder a scene."""
    return tuple(f"{scene}_{split}_lmdb" for scene in SCENES)


def read_lsun(root: Path, split: str, limit: int | None, size: int | None) -> Raw:
    """Ten kinds of scene, in turn (a bedroom, a bridge, …), of many sizes: give `size`.

    Not through torchvision's own class, which writes a pickle into the working directory and reads it back.
    """
    try:
        import lmdb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Expected("Expected the package lmdb for lsun: pip install lmdb.") from None

    with contextlib.ExitStack() as stack:

        def values(need: str, label: int) -> Iterator[tuple[bytes, int]]:
            store = stack.enter_context(lmdb.open(str(root / need), readonly=True, lock=False, readahead=False))
            cursor = stack.enter_context(store.begin()).cursor()
            return ((bytes(value), label) for value in cursor.iternext(keys=False, values=True))

        in_turn = zip_longest(*(values(need, label) for label, need in enumerate(needs_lsun(split))))
        files, y = _columns((pair for pair in chain.from_iterable(in_turn) if pair), limit, "lsun")
    return Raw(decode(files, size, "lsun"), np.array(y), len(SCENES))

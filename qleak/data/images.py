"""Image files to arrays: decoding, centre crop and area-averaged resize, and folders of images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qleak.check import Expected
from qleak.data.arrays import Raw, affordable

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
GREY, COLOUR = ("1", "L"), ("RGB", "RGBA", "P", "CMYK", "YCbCr")


def square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of `image`, averaged over areas down to `size`×`size` pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BOX)


def read(file: Path | bytes, size: int | None = None) -> np.ndarray:
    """One image file, or the bytes of one, as uint8 `[c h w]`; c is 1 for grey, 3 otherwise, transparency is dropped.

    Raises:
        Expected: not an image, damaged, or of more than 8 bits a channel.
    """
    label = "a stored image" if isinstance(file, bytes) else str(file)
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.mode not in GREY + COLOUR:
                raise Expected(f"Expected {label} in 8-bit grey or colour, got mode {image.mode!r}: convert it first.")
            if image.mode == "P":  # a palette may hold transparency, which Pillow takes off in two steps
                image = image.convert("RGBA")
            image = image.convert("L" if image.mode in GREY else "RGB")
            array = np.asarray(square(image, size) if size else image)
    except Expected:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise Expected(f"Expected {label} to be a readable image: {error}") from None
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def decode(files: Sequence[Path | bytes], size: int | None, name: str) -> np.ndarray:
    """All `files` as uint8 `[n c h w]`.

    Raises:
        Expected: an unreadable image, different sizes or channels, or more than fits in memory.
    """
    first = read(files[0], size)
    affordable(len(files), first.shape, f"{name} (or a smaller size)")
    x = np.empty((len(files), *first.shape), np.uint8)
    for i, file in enumerate(files):
        image = read(file, size)
        if image.shape != first.shape:
            got, want = ("×".join(map(str, a.shape)) for a in (image, first))
            where = f"image {i}" if isinstance(file, bytes) else str(file)
            mend = "make all grey or all colour" if len(image) != len(first) else "give size=N to crop and resize"
            raise Expected(f"Expected {where} to be {want} like the first image of {name}, got {got}: {mend}.")
        x[i] = image
    return x


def folder(path: Path, limit: int | None, size: int | None) -> Raw:
    """A folder of images: flat (every label 0), or one sub-folder a class, labelled in the order of their names.

    Files with other suffixes than `SUFFIXES` and hidden ones are not images.

    Raises:
        Expected: no such folder, no image in it or in one of its classes, or images beside sub-folders.
    """
    if not path.is_dir():
        raise Expected(f"Expected a folder of images or an .npz file at {path}, found none.")
    flat = _images(path)
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if flat and classes:
        raise Expected(f"Expected {path} to hold images or one sub-folder a class, got both.")
    groups = [flat] if flat else [_images(p) for p in classes]
    for place, group in zip([path] if flat or not classes else classes, groups or [[]], strict=True):
        if not group:
            raise Expected(f"Expected images in {place}, found none ({' '.join(sorted(SUFFIXES))}).")
    pairs = [(file, label) for label, group in enumerate(groups) for file in group][:limit]
    x = decode([file for file, _ in pairs], size, str(path))
    return Raw(x, np.array([label for _, label in pairs]), len(groups))


def _images(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))

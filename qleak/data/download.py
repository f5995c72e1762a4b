"""Downloads, on request only and through torchvision, which knows the addresses and the checksums."""

from __future__ import annotations

from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from qleak.check import Expected, Failed, did_you_mean
from qleak.data.sets import EMBEDDED, PUBLIC, home, names


def fetch(name: str, folder: Path | str | None = None, say: Callable[[str], None] = print) -> Path:
    """Downloads every split of `name` into the data folder and returns that folder.

    Args:
        name: a set of torchvision's.
        folder: the data folder; see `qleak.data.home`.
        say: is told what happens, a line at a time; torchvision shows its own progress bar.

    Raises:
        Expected: an unknown name, or a set that can only be had by hand (with how).
        Failed: the network, the server or the disk did not do its part.
    """
    root = home(folder)
    if name in EMBEDDED:
        say(f"{name} comes with qleak: nothing to download.")
        return root
    if name not in PUBLIC:
        raise Expected(f"Unknown data set {name!r}.{did_you_mean(name, names())} `qleak data ls` lists them.")
    source = PUBLIC[name]
    if source.manual:
        raise Expected(f"Expected {name} to be fetched by hand: {source.manual}.")
    say(f"Downloading {name} ({source.download}) into {root} with torchvision.")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for split in source.splits:
            download(name, root, split)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Failed(f"{name} could not be downloaded into {root}: {reason}") from None
    say(f"{name} is in {root}.")
    return root


def download(name: str, root: Path, split: str) -> None:
    """One call of torchvision's own class with `download=True`."""
    from torchvision import datasets  # takes seconds to import, so only here

    known: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "mnist": (datasets.MNIST, {"train": split == "train"}),
        "fashion_mnist": (datasets.FashionMNIST, {"train": split == "train"}),
        "kmnist": (datasets.KMNIST, {"train": split == "train"}),
        "cifar10": (datasets.CIFAR10, {"train": split == "train"}),
        "cifar100": (datasets.CIFAR100, {"train": split == "train"}),
        "svhn": (datasets.SVHN, {"split": split}),
        "stl10": (datasets.STL10, {"split": split}),
        "celeba": (datasets.CelebA, {"split": split}),
        "places365": (datasets.Places365, {"split": {"train": "train-standard"}.get(split, split), "small": True}),
    }
    make, options = known[name]
    make(root, download=True, **options)

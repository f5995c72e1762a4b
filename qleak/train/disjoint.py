"""Public images are public only where none of them is trained on."""

from __future__ import annotations

from qleak import data
from qleak.check import Expected
from qleak.types import Dataset, Model


def disjoint(model: Model, train: Dataset) -> None:
    """Refuses training images that are among the model's public ones, pixel for pixel.

    Raises:
        Expected: with how many of each; or the public images are not at hand.
    """
    if model.public is None:
        return
    public = data.digests(model.public())
    known = set(public)
    shared = [digest for digest in data.digests(train.x) if digest in known]
    if shared:
        held = sum(row in set(shared) for row in public)
        raise Expected(
            f"Expected public images that are not trained on: {held} of {len(public)} are {len(shared)} of the "
            f"{len(train.x)} training images of {train.name}. Take another set (public=…), or other images (skip=…)."
        )

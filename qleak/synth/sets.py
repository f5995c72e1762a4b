"""The sets that private data generation is measured on: by name, at one size, with the label that is asked for.

Three names are not sets of their own: `celeba-gender` and `celeba-hair` are CelebA with a column as label, and `places365`
has three classes here. No record is repeated to balance classes, as the published CelebA lists are in front of their partition:
a record that occurs twice can sit in two teachers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from qleak import data
from qleak.check import Expected, at_least, whole
from qleak.data import arrays, images, listed
from qleak.data.sets import SETS
from qleak.types import Dataset, Public

SIDE = 64  # of CelebA's and Places365's images where no size is given: the published one
GROUPS = ("indoor", "outdoor, natural", "outdoor, man-made")

# Kinds of place out of doors, as the authors of Places365 mark them, and which of those are nature: not built, not tilled.
_NATURAL = """
badlands bamboo_forest beach butte canal/natural canyon cliff coast creek crevasse desert/sand desert/vegetation
field/wild forest/broadleaf forest_path glacier grotto hot_spring ice_floe ice_shelf iceberg islet lagoon lake/natural
marsh mountain mountain_path mountain_snowy ocean pond rainforest river rock_arch sky snowfield swamp tundra
underwater/ocean_deep valley volcano waterfall watering_hole wave
"""
_BUILT = """
airfield alley amphitheater amusement_park apartment_building/outdoor aqueduct arch army_base athletic_field/outdoor
balcony/exterior balcony/interior barn barndoor baseball_field bazaar/outdoor beach_house beer_garden boardwalk
boat_deck boathouse botanical_garden bridge building_facade bullring cabin/outdoor campsite campus canal/urban
carrousel castle cemetery chalet church/outdoor construction_site corn_field corral cottage courthouse courtyard
crosswalk dam desert_road diner/outdoor doorway/outdoor downtown driveway embassy excavation farm field/cultivated
field_road fire_escape fire_station fishpond football_field forest_road formal_garden fountain garage/outdoor
gas_station gazebo/exterior general_store/outdoor golf_course greenhouse/outdoor hangar/outdoor harbor hayfield
heliport highway hospital hotel/outdoor house hunting_lodge/outdoor ice_skating_rink/outdoor igloo industrial_area
inn/outdoor japanese_garden junkyard kasbah kennel/outdoor landfill landing_deck lawn library/outdoor lighthouse
loading_dock lock_chamber mansion manufactured_home market/outdoor mausoleum medina moat/water mosque/outdoor motel
museum/outdoor oast_house office_building oilrig orchard pagoda palace park parking_garage/outdoor parking_lot pasture
patio pavilion phone_booth picnic_area pier playground plaza porch promenade racecourse raceway raft railroad_track
residential_neighborhood restaurant_patio rice_paddy roof_garden rope_bridge ruin runway sandbox schoolhouse shed
shopfront ski_resort ski_slope skyscraper slum soccer_field stadium/baseball stadium/football stadium/soccer
stage/outdoor street swimming_pool/outdoor synagogue/outdoor temple/asia topiary_garden tower tree_farm tree_house
trench vegetable_garden viaduct village vineyard volleyball_court/outdoor water_park water_tower wheat_field wind_farm
windmill yard zen_garden
"""
NATURAL = frozenset(_NATURAL.split())
BUILT = frozenset(_BUILT.split())


OF_FILES = ("celeba-gender", "celeba-hair", "places365")  # image files, decoded one by one: the first `limit` alone


def records(name: str, split: str = "train", size: int = 0, limit: int = 0) -> Dataset:
    """A labelled set of images for a synthesizer or a judge.

    Args:
        name: any name, path or call of `qleak.data.load`; "celeba-gender" (0 female, 1 male), "celeba-hair" (0 black,
            1 blond, 2 brown; faces of none or several of them left out), or "places365" with the classes of `group`, as
            many images of each.
        split: "train", "test" or what else the set has; "test" of Places365, whose test labels are not public, is its "val".
        size: images are averaged over areas to size×size pixels (image files: their largest centred square); 0 as stored,
            or 64 for CelebA and Places365.
        limit: the first so many records; 0 for all.

    Raises:
        Expected: an unknown set or one that is not at hand, or a size above its own.
    """
    whole(size=size, limit=limit)
    at_least(0, size=size, limit=limit)
    match name:
        case "celeba-gender":
            faces = data.load("celeba", split, limit=limit or None, size=size or SIDE)
            return replace(data.relabel(faces, "gender", 2), name=name)
        case "celeba-hair":
            return replace(_hair(split, size or SIDE, limit), name=name)
        case "places365":
            return _places(split, size or SIDE, limit)
    sized = size > 0 and name in SETS and SETS[name].sized
    found = data.load(name, split, limit=limit or None, size=size if sized else None)
    return found if sized or not size else pooled(found, size)


def public(found: Dataset) -> Public:
    """What everybody may know of a set: how many records, of which shape, how many classes."""
    c, h, w = found.x.shape[1:]
    return Public(len(found.x), (c, h, w), found.classes)


def pooled(found: Dataset, size: int) -> Dataset:
    """Images `[n c h w]` averaged over areas to `[n c size size]`.

    Raises:
        Expected: they are smaller than that.
    """
    least = min(found.x.shape[2:])
    if size > least:
        raise Expected(f"Expected size={size} <= {least}, the side of the images of {found.name}.")
    return replace(found, x=F.adaptive_avg_pool2d(found.x, size).clamp(0, 1))


def _hair(split: str, size: int, limit: int) -> Dataset:
    """Faces of one hair colour; about three of five are, so more are read than asked for."""
    asked = limit and -(-17 * limit // 10)
    while True:
        faces = data.load("celeba", split, limit=asked or None, size=size)
        kept = data.relabel(faces, "hair", len(listed.HAIR))
        if not limit or len(kept.y) >= limit or len(faces.y) < asked:
            return data.take(kept, torch.arange(min(limit or len(kept.y), len(kept.y))))
        asked *= 2


def group(category: str) -> int:
    """The class of a category such as "/b/beach": 0 indoor, 1 outdoor and natural, 2 outdoor and man-made.

    The three top levels of the hierarchy of scenes that Places365 comes with; each category is in one of them here. The
    publication does not say which three classes it took, and its code has none.
    """
    kind = category.split("/", 2)[-1]
    return 1 if kind in NATURAL else 2 if kind in BUILT else 0


def _places(split: str, size: int, limit: int) -> Dataset:
    """Places365 by `group`: `limit`/3 images of each, evenly spaced in the list, which is sorted by category."""
    split = "val" if split == "test" else split
    if split not in listed.PLACES:
        raise Expected(f"Expected split={split!r} of places365 to be one of: {', '.join(listed.PLACES)}.")
    root = data.home()
    categories, files, pictures = (root / need for need in listed.needs_places365(split))
    missing = [path for path in (categories, files, pictures) if not path.exists()]
    if missing:
        data.load("places365", split, limit=1)  # says what is missing, and how to get it
    with arrays.readable(f"places365 in {root}", "Delete it and get it again: `qleak data fetch places365`."):
        of = {int(kind): group(category) for category, kind in _pairs(categories)}
        rows = [(pictures / file.lstrip("/"), of[int(kind)]) for file, kind in _pairs(files)]
    chosen: list[int] = []
    for label in range(len(GROUPS)):
        mine = [i for i, (_, one) in enumerate(rows) if one == label]
        share = min(len(mine), limit // len(GROUPS) + (label < limit % len(GROUPS)) if limit else len(mine))
        chosen += [mine[i * len(mine) // share] for i in range(share)]
    if not chosen:
        raise Expected(f"Expected images in {files}, found none in its list.")
    chosen.sort()
    x = images.decode([rows[i][0] for i in chosen], size, "places365")
    raw = arrays.Raw(x, np.array([rows[i][1] for i in chosen]), len(GROUPS))
    return arrays.dataset(raw, "places365")


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                first, second = line.split()
                yield first, second

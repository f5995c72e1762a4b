"""Sets for private data generation, in their true layouts: labels, sizes, how many of each class."""

import pytest
import torch
import torch.nn.functional as F
from layouts import SHARED, celeba_layout, needs_mnist, picture, places365_layout

from qleak import data
from qleak.check import Expected
from qleak.synth import sets

PLACES = ["beach", "bedroom", "bridge", "wave", "kitchen", "field/wild"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QLEAK_DATA", str(tmp_path))
    return tmp_path


def places(root, each=4):
    """Places365's layout with six of its categories, the training list sorted by category."""
    (root / "categories_places365.txt").write_text("".join(f"/{c[0]}/{c} {i}\n" for i, c in enumerate(PLACES)))
    train = {f"/{c[0]}/{c}/{i}{j:07d}.jpg": i for i, c in enumerate(PLACES) for j in range(each)}
    val = {f"Places365_val_{j:08d}.jpg": (5 * j) % 6 for j in range(6)}
    for folder, name, files in [("data_256_standard", "train_standard", train), ("val_256", "val", val)]:
        for file in files:
            picture(root / folder / file.lstrip("/"), 32, 32)
        (root / f"places365_{name}.txt").write_text("".join(f"{f} {k}\n" for f, k in files.items()))


def test_celeba_by_gender(home):
    celeba_layout(home)
    got = sets.records("celeba-gender", size=8)
    want = data.load("celeba", size=8)
    assert got.name == "celeba-gender" and got.classes == 2
    assert torch.equal(got.x, want.x) and torch.equal(got.y, want.facts["gender"])
    assert got.y.unique().tolist() == [0, 1]  # as they come, none twice
    assert len(set(data.digests(got.x))) == len(got.x)
    assert sets.records("celeba-gender", "valid").x.shape == (2, 3, 64, 64)
    assert len(sets.records("celeba-gender", limit=2).y) == 2


def test_celeba_by_hair_drops_faces_of_no_one_colour(home):
    celeba_layout(home)
    every = data.load("celeba", size=8)
    hair = every.facts["hair"]
    got = sets.records("celeba-hair", size=8)
    assert (hair == -1).any() and got.classes == 3 and got.name == "celeba-hair"
    assert torch.equal(got.y, hair[hair >= 0]) and torch.equal(got.x, every.x[hair >= 0])
    for limit in (1, 2, 3):
        some = sets.records("celeba-hair", size=8, limit=limit)  # as many as asked for, whatever is dropped between
        assert torch.equal(some.x, got.x[:limit])
    assert len(sets.records("celeba-hair", size=8, limit=50).y) == len(got.y)


def test_places_have_three_classes_as_many_of_each(home):
    places(home)
    got = sets.records("places365", size=8, limit=6)
    assert got.classes == 3 and got.x.shape == (6, 3, 8, 8) and torch.bincount(got.y).tolist() == [2, 2, 2]
    every = sets.records("places365", size=8)
    assert torch.bincount(every.y).tolist() == [8, 12, 4]
    plain = data.load("places365", folder=home, size=8)
    want = torch.tensor([sets.group(f"/x/{PLACES[k]}") for k in plain.y])
    assert torch.equal(every.x, plain.x) and torch.equal(every.y, want)
    digests = data.digests(every.x)
    at = [digests.index(one) for one in data.digests(got.x)]
    assert (
        at == sorted(at) and len({int(plain.y[i]) for i in at}) > 3
    )  # spread over categories, not the first of the list
    test = sets.records("places365", "test", size=8)
    assert torch.equal(test.x, data.load("places365", "val", home, size=8).x) and len(test.y) == 6
    assert torch.bincount(sets.records("places365", size=8, limit=14).y).tolist() == [5, 5, 4]


def test_groups_are_those_of_the_scenes():
    assert [sets.group(f"/{c[0]}/{c}") for c in PLACES] == [1, 0, 2, 1, 0, 1]
    assert sets.group("/b/bazaar/outdoor") == 2 and sets.group("/b/bazaar/indoor") == 0
    assert not sets.NATURAL & sets.BUILT and (len(sets.NATURAL), len(sets.BUILT)) == (43, 161)


def test_other_layouts_and_missing_ones_are_named(home):
    with pytest.raises(Expected, match="qleak data fetch places365"):
        sets.records("places365", size=8)
    with pytest.raises(Expected, match="celeba"):
        sets.records("celeba-hair", size=8)
    with pytest.raises(Expected, match="Unknown data set 'celeba-hairy'"):
        sets.records("celeba-hairy")
    places365_layout(home)
    assert sets.records("places365", size=8).y.tolist() == [0, 0, 0]  # made-up categories are none of the outdoor ones
    with pytest.raises(Expected, match="split='valid' of places365"):
        sets.records("places365", "valid")
    (home / "places365_val.txt").write_text("a.jpg not_a_number\n")
    with pytest.raises(Expected, match="readable"):
        sets.records("places365", "test", size=8)


@needs_mnist
def test_arrays_are_averaged_over_areas(monkeypatch):
    monkeypatch.setenv("QLEAK_DATA", str(SHARED))
    plain = data.load("mnist", "test", limit=50)
    assert torch.equal(sets.records("mnist", "test", limit=50).x, plain.x)
    got = sets.records("mnist", "test", size=14, limit=50)
    assert torch.allclose(got.x, F.avg_pool2d(plain.x, 2), atol=1e-6) and torch.equal(got.y, plain.y)
    assert sets.records("mnist", "test", size=8, limit=5).x.shape == (5, 1, 8, 8)
    with pytest.raises(Expected, match="size=32 <= 28"):
        sets.records("mnist", "test", size=32, limit=5)
    with pytest.raises(Expected, match="limit=-1"):
        sets.records("mnist", limit=-1)


def test_sets_of_image_files_are_cropped_and_averaged_by_their_reader():
    assert torch.equal(sets.records("photos", size=16).x, data.load("photos", size=16).x)

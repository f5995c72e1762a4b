"""Data sets: the embedded ones, every public layout against torchvision's own reader, files from outside."""

import builtins
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from layouts import (
    ATTRIBUTES,
    LAYOUTS,
    SHARED,
    celeba_layout,
    cifar10_layout,
    idx_layout,
    labels,
    needs_mnist,
    noise,
    picture,
)
from PIL import Image

from qleak import data, random
from qleak.check import Expected, Failed
from qleak.data import arrays, download, images


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """No test reads the user's own data folder or writes into the checkout."""
    monkeypatch.setenv("QLEAK_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


SPLITS = [(name, split) for name in LAYOUTS for split in data.sets.PUBLIC[name].splits]


@pytest.fixture
def torchvision(monkeypatch):
    """torchvision's data sets without their checksums, which generated files cannot have."""
    from torchvision import datasets

    for module in ("cifar", "svhn", "stl10", "celeba", "lfw", "places365"):
        monkeypatch.setattr(sys.modules[f"torchvision.datasets.{module}"], "check_integrity", lambda *_, **__: True)
    return datasets


@pytest.mark.parametrize(("name", "split"), SPLITS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchvision's unpickling of old arrays
def test_public_sets_agree_with_torchvision(name, split, tmp_path, torchvision):
    write, cls, classes = LAYOUTS[name]
    write(tmp_path)
    options = {"train": split == "train"} if "MNIST" in cls or "CIFAR" in cls else {"split": split}
    if name == "places365":
        options = {"split": {"train": "train-standard"}.get(split, split), "small": True}
    oracle = list(getattr(torchvision, cls)(tmp_path, **options))
    got = data.load(name, split, tmp_path)
    assert (got.name, got.classes, len(got.x), got.x.dtype, got.y.dtype) == (
        name, classes, len(oracle), torch.float32, torch.int64,
    )  # fmt: skip
    for x, y, (image, target) in zip(got.x, got.y, oracle, strict=True):
        pixels = np.asarray(image)
        assert torch.equal((x * 255).round().to(torch.uint8).squeeze(0), torch.tensor(pixels.T).mT.squeeze(0))
        assert y == (target[ATTRIBUTES.index("Male")] if name == "celeba" else target)
    assert torch.equal(data.load(name, split, tmp_path, limit=1).x, got.x[:1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_set_says_how_to_get_it(name):
    with pytest.raises(Expected, match=rf"is not there. (`qleak data fetch {name}`|torchvision no longer)"):
        data.load(name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_damaged_set_is_one_line(name, tmp_path):
    LAYOUTS[name][0](tmp_path)
    for need in data.sets.PUBLIC[name].needs("train"):
        if (tmp_path / need).is_file():
            (tmp_path / need).write_bytes((tmp_path / need).read_bytes()[:-5000][:50])
    with pytest.raises(Expected) as error:
        data.load(name, "train", tmp_path)
    assert str(error.value).startswith("Expected") and "\n" not in str(error.value)


def test_cifar_pickles_run_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    cifar10_layout(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps({"data": Bomb()}, 2))
    with pytest.raises(Expected, match="has no place in a CIFAR file"):
        data.load("cifar10", "train", tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_celeba_facts_and_size(tmp_path):
    celeba_layout(tmp_path)
    train = data.load("celeba", "train", tmp_path, size=16)
    assert train.x.shape == (4, 3, 16, 16)
    assert train.facts["gender"].tolist() == train.y.tolist() == [1, 0, 1, 1]
    assert train.facts["hair"].tolist() == [0, 1, -1, -1]  # none of the three; two of them at once
    hair = data.relabel(train, "hair", 3)
    assert (hair.y.tolist(), hair.classes, len(hair.x)) == ([0, 1], 3, 2)
    with pytest.raises(Expected, match="fact='hat' to be one of"):
        data.relabel(train, "hat", 3)


def test_lsun_needs_lmdb(tmp_path, monkeypatch):
    for need in data.sets.PUBLIC["lsun"].needs("val"):
        (tmp_path / need).mkdir()
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(Expected, match=r"pip install lmdb\.$"):
        data.load("lsun", "val", tmp_path)


def test_lsun_takes_the_scenes_in_turn(tmp_path):
    lmdb = pytest.importorskip("lmdb", reason="the optional package lmdb is not installed")
    for label, need in enumerate(data.sets.PUBLIC["lsun"].needs("val")):
        with lmdb.open(str(tmp_path / need)) as store, store.begin(write=True) as txn:
            for i in range(1 + label % 2):
                picture(tmp_path / f"{label}{i}.webp", 20 + label, 30)
                txn.put(f"{i}".encode(), (tmp_path / f"{label}{i}.webp").read_bytes())
    scenes = data.load("lsun", "val", tmp_path, size=16)
    assert scenes.y.tolist() == [*range(10), 1, 3, 5, 7, 9] and scenes.x.shape == (15, 3, 16, 16)
    assert data.load("lsun", "val", tmp_path, limit=3, size=16).y.tolist() == [0, 1, 2]
    with pytest.raises(Expected, match="give size=N"):
        data.load("lsun", "val", tmp_path)


# --- embedded sets ------------------------------------------------------------------------------------


def test_mnist5k_are_real_digits():
    digits = data.load("mnist5k")
    assert digits.x.shape == (5000, 1, 28, 28) and digits.x.dtype == torch.float32
    assert digits.y.bincount().tolist() == [500] * 10 and digits.classes == 10
    assert digits.x.min() == 0 and digits.x.max() == 1 and len(set(data.digests(digits.x))) == 5000
    odd, even = data.take(digits, torch.arange(1, 5000, 2)), data.take(digits, torch.arange(0, 5000, 2))
    means = torch.stack([odd.x[odd.y == c].mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(even.x.flatten(1), means).argmin(1)
    assert (nearest == even.y).float().mean() > 0.75  # the class means of one half know the other half


def test_photos():
    photos = data.load("photos")
    assert photos.x.shape == (8, 3, 32, 32) and photos.classes == 8 and photos.y.tolist() == list(range(8))
    assert all(float(x.std()) > 0.03 for x in photos.x) and len(set(data.digests(photos.x))) == 8
    red, green, blue = photos.x[5].mean((1, 2)).tolist()  # an orange flower
    assert red > green > blue
    assert data.load("photos", size=8).x.shape == (8, 3, 8, 8)
    torch.testing.assert_close(data.load("photos", size=8).x.mean((2, 3)), photos.x.mean((2, 3)), atol=0.01, rtol=0)


def test_faces():
    faces = data.load("faces")
    assert faces.x.shape == (100, 1, 25, 25) and faces.classes == 100 and faces.y.tolist() == list(range(100))
    forehead, eyes, cheeks = (faces.x[:, 0, rows, 4:18].mean((1, 2)) for rows in (slice(2, 5), [7, 8], [11, 12]))
    assert ((eyes < cheeks) & (eyes < forehead)).float().mean() > 0.75  # 0.14 at most in the half without faces


def test_embedded_sets_import_none_of_their_packages(monkeypatch):
    usual = builtins.__import__

    def strict(name, *args, **kwargs):
        assert name.split(".")[0] not in ("mlxtend", "skimage", "sklearn", "torchvision")
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", strict)
    with pytest.raises(AssertionError):
        import skimage  # noqa: F401
    assert [len(data.load(name).x) for name in data.sets.EMBEDDED] == [5000, 8, 100]


@needs_mnist
def test_mnist5k_is_the_first_500_of_each_digit_of_mnist():
    mnist, digits = data.load("mnist", "train", SHARED), data.load("mnist5k")
    assert mnist.x.shape == (60_000, 1, 28, 28) and data.load("mnist", "test", SHARED).x.shape[0] == 10_000
    rows = torch.cat([torch.nonzero(mnist.y == c)[:500, 0] for c in range(10)])
    assert torch.equal(mnist.x[rows], digits.x)


# --- files from outside -------------------------------------------------------------------------------


def good(**changes):
    x, y = noise("npz", 6, 8, 8, 3), labels(6, 4)
    stored = {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[:2]} | changes
    return {k: v for k, v in stored.items() if v is not None}


def test_npz_by_path_and_by_name(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "tiny.npz", **good())  # type: ignore[arg-type]
    train = data.load("tiny")
    assert train.x.shape == (6, 3, 8, 8) and train.classes == 4 and len(data.load("tiny", "test").x) == 2
    assert torch.equal((train.x * 255).round().to(torch.uint8), torch.tensor(good()["x_train"]).permute(0, 3, 1, 2))
    monkeypatch.chdir(tmp_path / "data")
    for path in ("./tiny.npz", "tiny.npz", tmp_path / "data" / "tiny.npz"):
        assert torch.equal(data.load(path, limit=4).x, train.x[:4])
    grey = noise("grey", 6, 8, 8).astype(np.float64) / 255
    for x in (grey, grey[:, None], grey[..., None]):
        np.savez("grey.npz", **good(x_train=x, classes=np.array(list("abcdef"))))  # type: ignore[arg-type]
        assert data.load("./grey.npz").x.shape == (6, 1, 8, 8) and data.load("./grey.npz").classes == 6


HALF = np.full((6, 1, 8, 8), 0.5)
NAN = np.where(np.arange(64).reshape(8, 8) == 3, np.nan, HALF)
BAD_NPZ = {
    "NaN": ({"x_train": NAN}, r"x to be finite: 6 of 384 entries are NaN"),
    "range": ({"x_train": HALF * 3}, r"in \[0, 1\], got 1.5 … 1.5: rescale, or store uint8"),
    "dtype": ({"x_train": HALF.astype(int)}, r"as uint8, or as floats in \[0, 1\], got dtype int64"),
    "flat": ({"x_train": HALF.reshape(6, 64)}, r"n×h×w, .* got shape \(6, 64\)"),
    "five channels": ({"x_train": np.zeros((6, 8, 8, 5), np.uint8)}, r"c = 1 or 3"),
    "ambiguous": ({"x_train": np.zeros((6, 3, 8, 3), np.uint8)}, r"c = 1 or 3"),
    "empty": ({"x_train": HALF[:0], "y_train": labels(0, 4)}, r"Expected images n×c×h×w"),
    "no labels": ({"y_train": None}, r"Expected the labels y_train"),
    "no images": ({"x_train": None}, r"Expected x_train .* Splits there: test"),
    "fewer labels": ({"y_train": labels(5, 4)}, r"Expected 6 labels .* got shape \(5,\)"),
    "column of labels": ({"y_train": labels(6, 4)[:, None]}, r"one an image in one axis, got shape \(6, 1\)"),
    "float labels": ({"y_train": labels(6, 4) / 2}, r"whole numbers as labels"),
    "negative labels": ({"y_train": labels(6, 4) - 1}, r"in 0 … \d+, got -1"),
    "labels beyond classes": ({"classes": np.array(["a", "b"])}, r"in 0 … 1, got 0 … 3"),
    "objects": ({"x_train": np.array([object()])}, r"to be readable: Object arrays cannot be loaded"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz(case):
    changes, message = BAD_NPZ[case]
    np.savez("bad.npz", **good(**changes))  # type: ignore[arg-type]
    with pytest.raises(Expected, match=message) as error:
        data.load("./bad.npz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no archive at all"])
def test_a_file_that_is_no_npz(content):
    Path("bad.npz").write_bytes(content)
    with pytest.raises(Expected, match=r"Expected bad\.npz to be readable"):
        data.load("./bad.npz")


def test_folders():
    for name in ("pics/cat/b.png", "pics/cat/a.png", "pics/dog/c.PNG", "flat/a.png"):
        picture(Path(name), 12, 12)
    Path("pics/cat/notes.txt").write_text("not an image")
    pets = data.load("./pics/")
    assert pets.x.shape == (3, 3, 12, 12) and pets.y.tolist() == [0, 0, 1] and pets.classes == 2
    assert torch.equal((pets.x[0] * 255).round(), torch.tensor(noise("a.png", 12, 12, 3)).permute(2, 0, 1).float())
    flat = data.load(Path("flat"))
    assert flat.y.tolist() == [0] and flat.classes == 1
    assert data.load("./pics", limit=2, size=6).x.shape == (2, 3, 6, 6)


def test_bad_folders(tmp_path):
    cases = {
        "nowhere/": "folder of images or an .npz file",
        "empty/": "Expected images in empty, found none",
        "hollow/": "Expected images in hollow/dog, found none",
        "mixed/": "images or one sub-folder a class, got both",
        "sizes/": r"b\.png to be 3×12×12 .*, got 3×12×13: give size=N",
        "colours/": r"b\.png to be 3×12×12 .*, got 1×12×12: make all grey or all colour",
        "broken/": r"a\.png to be a readable image",
        "deep/": r"8-bit grey or colour, got mode 'I;16'",
    }
    Path("empty").mkdir()
    Path("hollow/dog").mkdir(parents=True)
    for path, width in {"hollow/cat/a": 12, "mixed/a": 12, "mixed/cat/a": 12, "sizes/a": 12, "sizes/b": 13}.items():
        picture(Path(f"{path}.png"), 12, width)
    picture(Path("colours/a.png"), 12, 12)
    Image.fromarray(noise("grey", 12, 12)).save("colours/b.png")
    picture(Path("broken/a.png"), 12, 12)
    Path("broken/a.png").write_bytes(Path("broken/a.png").read_bytes()[:200])
    Path("deep").mkdir()
    Image.fromarray(noise("deep", 12, 12).astype(np.uint16)).save("deep/a.png")
    for name, message in cases.items():
        with pytest.raises(Expected, match=message):
            data.load(f"./{name}")
    assert data.load("./sizes/", size=6).x.shape == (2, 3, 6, 6)
    with pytest.raises(Expected, match="split='test'"):
        data.load("./sizes/", "test")


def test_resize_averages_areas_of_the_centre_square():
    blocks = np.kron(np.array([[0, 100], [200, 40]], np.uint8), np.ones((4, 4), np.uint8))
    blocks[0, 0] = 16
    wide = np.pad(blocks, ((0, 0), (3, 3)), constant_values=255)
    assert np.asarray(images.square(Image.fromarray(wide), 2)).tolist() == [[1, 100], [200, 40]]


# --- names, limits, folders, downloads ----------------------------------------------------------------


def test_arguments():
    assert data.names()[:4] == ["mnist5k", "photos", "faces", "mnist"] and len(data.names()) == 14
    for call, message in {
        lambda: data.load("mnits"): r"Unknown data set 'mnits'. Did you mean 'mnist'\?",
        lambda: data.load("mnist5k", "test"): "split='test' of mnist5k to be one of: train",
        lambda: data.load("mnist5k", limit=0): "limit=0 >= 1",
        lambda: data.load("mnist5k", limit=1.5): "limit=1.5 to be a whole number",  # type: ignore[arg-type]
        lambda: data.load("mnist5k", size=32): "no size=32 for mnist5k",
        lambda: data.load("photos", size=0): "size=0 >= 1",
    }.items():
        with pytest.raises(Expected, match=message):
            call()
    Path("pets").mkdir()
    with pytest.raises(Expected, match=r"The path is written \./pets"):
        data.load("pets")


def test_nothing_falls_back_silently(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("cifar10-12k", "cifar10"):
        np.savez(tmp_path / "data" / f"{name}.npz", **good())  # type: ignore[arg-type]
    with pytest.raises(Expected, match=r"There is also 'cifar10-12k', '.*cifar10\.npz', another set"):
        data.load("cifar10")
    assert data.load("cifar10-12k").name == "cifar10-12k"


def test_a_set_too_big_for_memory_asks_for_a_limit(tmp_path, monkeypatch):
    celeba_layout(tmp_path)
    monkeypatch.setattr(arrays, "BUDGET", 2 * 4 * 3 * 218 * 178)
    with pytest.raises(Expected, match=r"limit <= 2 for celeba .* 4 images of 3×218×178"):
        data.load("celeba", "train", tmp_path)
    assert len(data.load("celeba", "train", tmp_path, limit=2).x) == 2


def test_home(tmp_path, monkeypatch):
    assert data.home("x") == Path("x") and data.home() == tmp_path / "data"
    monkeypatch.delenv("QLEAK_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.home() == tmp_path / "qleak" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.home() == Path.home() / ".cache" / "qleak" / "data"


def test_table(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    idx_layout("MNIST")(folder)
    np.savez(folder / "tiny.npz", **good())  # type: ignore[arg-type]
    rows = {row.name: row for row in data.table()}
    assert rows["photos"].present and rows["photos"].kind == "embedded" and rows["photos"].size == "8 images"
    assert rows["mnist"].present and rows["mnist"].how == "splits train, test"
    assert not rows["kmnist"].present and "qleak data fetch kmnist" in rows["kmnist"].how
    assert rows["tiny"].present and rows["tiny"].kind == "npz" and set(data.names()) <= set(rows)


def test_fetch_downloads_through_torchvision(tmp_path, monkeypatch, torchvision):
    def write(url, download_root, filename, md5):
        idx_layout("MNIST")(Path(download_root).parents[1])

    monkeypatch.setattr(sys.modules["torchvision.datasets.mnist"], "download_and_extract_archive", write)
    said: list[str] = []
    assert data.fetch("mnist", say=said.append) == tmp_path / "data"
    assert said[0].startswith("Downloading mnist (12 MB)") and len(data.load("mnist").x) == 6


def test_fetch_fails_in_one_line(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    for name in ("mnist", "svhn"):
        with pytest.raises(Failed, match=rf"{name} could not be downloaded into") as error:
            data.fetch(name, tmp_path, say=lambda line: None)
        assert "\n" not in str(error.value)
    (tmp_path / "file").touch()
    with pytest.raises(Failed, match="could not be downloaded"):
        data.fetch("mnist", tmp_path / "file" / "below", say=lambda line: None)


def test_fetch_knows_every_public_set(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(download, "download", lambda name, root, split: asked.append((name, split)))
    for name in data.sets.PUBLIC:
        if name in ("lfw", "lsun"):
            with pytest.raises(Expected, match=f"Expected {name} to be fetched by hand"):
                data.fetch(name, say=lambda line: None)
        else:
            data.fetch(name, say=lambda line: None)
    assert sorted(asked) == sorted(pair for pair in SPLITS if pair[0] != "lfw")
    data.fetch("mnist5k", say=lambda line: None)
    with pytest.raises(Expected, match="Unknown data set 'cifar'"):
        data.fetch("cifar")


# --- parts --------------------------------------------------------------------------------------------


def test_batches_are_a_permutation_of_the_path():
    digits = data.take(data.load("mnist5k"), torch.arange(0, 5000, 480))
    epoch = list(data.batches(digits, 4, random.generator(7, "epoch")))
    assert [len(x) for x, _ in epoch] == [4, 4, 3]
    x, y = (torch.cat(column) for column in zip(*epoch, strict=True))
    assert sorted(data.digests(x)) == sorted(data.digests(digits.x)) and not torch.equal(x, digits.x)
    assert all(digits.y[data.digests(digits.x).index(d)] == c for d, c in zip(data.digests(x), y, strict=True))
    again = torch.cat([x for x, _ in data.batches(digits, 4, random.generator(7, "epoch"))])
    other = torch.cat([x for x, _ in data.batches(digits, 4, random.generator(8, "epoch"))])
    assert torch.equal(again, x) and not torch.equal(other, x)
    with pytest.raises(Expected, match="size=0 >= 1"):
        data.batches(digits, 0, random.generator(7))


def test_without_drops_every_copy():
    digits = data.load("mnist5k", limit=5)
    twice = data.take(digits, torch.tensor([0, 1, 2, 1, 4]))
    assert torch.equal(data.without(twice, data.digests(digits.x[1:2])).x, digits.x[[0, 2, 4]])

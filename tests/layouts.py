"""Small generated sets in the true on-disk layouts, and where the real MNIST may be."""

import os
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from qleak import random

SHARED = Path(os.environ.get("QLEAK_DATA") or Path(__file__).parents[2] / "shared" / "data")
needs_mnist = pytest.mark.skipif(
    not (SHARED / "MNIST" / "raw" / "t10k-images-idx3-ubyte").exists(),
    reason="real MNIST is not at hand: set QLEAK_DATA (`qleak data fetch mnist`)",
)


def noise(name, *shape):
    return random.integers(random.generator("test_data", name), 256, shape).numpy().astype(np.uint8)


def labels(count, classes):
    return (np.arange(count) * 7 + 3) % classes


def write_idx(root, folder, train, test):
    for stem, (x, y) in {"train": train, "t10k": test}.items():
        raw = root / folder / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        head = struct.pack(">4i", 0x803, *x.shape)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(head + x.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, len(y)) + y.astype(np.uint8).tobytes()
        )


def idx_layout(folder):
    def write(root):
        write_idx(root, folder, (noise("x", 6, 28, 28), labels(6, 10)), (noise("t", 4, 28, 28), labels(4, 10)))

    return write


class Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes what Python 2 and its numpy wrote: byte strings, and a dtype with flags 0 and 1."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, obj):
        raw = obj.encode("latin1") if isinstance(obj, str) else obj
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(obj)

    dispatch[bytes] = dispatch[str] = save_string

    def reducer_override(self, obj):
        return (np.dtype, ("u1", 0, 1), obj.__reduce__()[2]) if isinstance(obj, np.dtype) else NotImplemented


def write_pickle(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Python2(file, protocol=2).dump(content)
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))


def cifar10_layout(root):
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": noise(name, 3, 3072), "labels": labels(3, 10).tolist(), "filenames": ["a.png"] * 3}
        write_pickle(root / "cifar-10-batches-py" / name, batch)
    write_pickle(root / "cifar-10-batches-py" / "batches.meta", {"label_names": list("abcdefghij")})


def cifar100_layout(root):
    for name in ("train", "test"):
        fine = {"fine_labels": labels(5, 100).tolist(), "coarse_labels": labels(5, 20).tolist()}
        write_pickle(root / "cifar-100-python" / name, {"data": noise(name, 5, 3072), **fine})
    write_pickle(root / "cifar-100-python" / "meta", {"fine_label_names": [str(i) for i in range(100)]})


def svhn_layout(root):
    for split in ("train", "test", "extra"):
        y = np.array([[10], [1], [9], [10]], np.uint8)  # the digit 0 is stored as 10
        stored = {"X": noise(split, 32, 32, 3, 4), "y": y}
        savemat(root / f"{split}_32x32.mat", stored, do_compression=True)


def stl10_layout(root):
    (root / "stl10_binary").mkdir()
    for split in ("train", "test"):
        noise(split, 3, 3, 96, 96).tofile(root / "stl10_binary" / f"{split}_X.bin")
        np.array([1, 10, 4], np.uint8).tofile(root / "stl10_binary" / f"{split}_y.bin")


def picture(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(path.name, height, width, 3)).save(path)


ATTRIBUTES = ["5_o_Clock_Shadow", "Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young"]


def celeba_layout(root):
    folder = root / "celeba"
    files = [f"{i:06d}.jpg" for i in range(1, 9)]
    rows = ["-1  1 -1 -1  1  1", "-1 -1  1 -1 -1  1", "-1 -1 -1  1 -1 -1", "-1 -1 -1 -1  1  1", " 1  1 -1  1  1 -1"]
    rows += ["-1 -1  1 -1 -1 -1", "-1  1 -1 -1  1 -1", "-1 -1 -1 -1 -1 -1"]
    for file in files:
        picture(folder / "img_align_celeba" / file, 218, 178)
    table = [f"{f} {r}" for f, r in zip(files, rows, strict=True)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(["8", " ".join(ATTRIBUTES) + " ", *table]) + "\n")
    parts = [f"{f} {p}" for f, p in zip(files, "00100212", strict=True)]
    (folder / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    # Tables that torchvision insists on and qleak does not need:
    (folder / "identity_CelebA.txt").write_text("".join(f"{f} {i}\n" for i, f in enumerate(files)))
    for name in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        (folder / name).write_text("8\nimage_id a b\n" + "".join(f"{f} 1 2\n" for f in files))


def lfw_layout(root):
    people = {"Ada_Lovelace": 2, "Alan_Turing": 1, "Emmy_Noether": 3}
    for person, count in people.items():
        for i in range(1, count + 1):
            picture(root / "lfw-py" / "lfw_funneled" / person / f"{person}_{i:04d}.jpg", 250, 250)
    (root / "lfw-py" / "lfw-names.txt").write_text("".join(f"{p}\t{n}\n" for p, n in people.items()))
    (root / "lfw-py" / "peopleDevTrain.txt").write_text("2\nEmmy_Noether\t3\nAda_Lovelace\t2\n")
    (root / "lfw-py" / "peopleDevTest.txt").write_text("1\nAlan_Turing\t1\n")
    (root / "lfw-py" / "people.txt").write_text("2\n1\nAda_Lovelace\t2\n2\nAlan_Turing\t1\nEmmy_Noether\t3\n")


def places365_layout(root):
    (root / "categories_places365.txt").write_text(
        "".join(f"/{c[0]}/{c} {i}\n" for i, c in enumerate(["abbey", "zoo"]))
    )
    train = {"/a/abbey/00000001.jpg": 0, "/z/zoo/00000001.jpg": 1, "/z/zoo/00000002.jpg": 1}
    val = {"Places365_val_00000001.jpg": 1, "Places365_val_00000002.jpg": 0}
    for file in train:
        picture(root / "data_256_standard" / file.lstrip("/"), 256, 256)
    for file in val:
        picture(root / "val_256" / file, 256, 256)
    for name, files in {"train_standard": train, "val": val}.items():
        (root / f"places365_{name}.txt").write_text("".join(f"{f} {k}\n" for f, k in files.items()))


LAYOUTS = {
    "mnist": (idx_layout("MNIST"), "MNIST", 10),
    "fashion_mnist": (idx_layout("FashionMNIST"), "FashionMNIST", 10),
    "kmnist": (idx_layout("KMNIST"), "KMNIST", 10),
    "cifar10": (cifar10_layout, "CIFAR10", 10),
    "cifar100": (cifar100_layout, "CIFAR100", 100),
    "svhn": (svhn_layout, "SVHN", 10),
    "stl10": (stl10_layout, "STL10", 10),
    "celeba": (celeba_layout, "CelebA", 2),
    "lfw": (lfw_layout, "LFWPeople", 3),
    "places365": (places365_layout, "Places365", 2),
}

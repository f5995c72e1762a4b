"""Makes the shipped weights `assets/weights/lenet-mnist.safetensors`; run by `just assets`.

The sigmoid LeNet of Zhu et al. 2019 with its wide initialisation, trained on MNIST's training set
without the 5,000 digits of `mnist5k`, which recipes use as victims: a victim the net was trained on
would be another experiment. Reads MNIST from $QLEAK_DATA or the cache folder (`qleak data fetch
mnist`), needs a few minutes on one thread, and states its result in the file's metadata.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from rich import print
from safetensors.torch import save_file

from qleak import data, random
from qleak.check import Failed
from qleak.models import lenet
from qleak.train import accuracy, cosine, fit
from qleak.types import Dataset

TARGET = Path(__file__).parent.parent / "assets" / "weights" / "lenet-mnist.safetensors"
EPOCHS, BATCH, LR, SEED = 15, 64, 3e-3, 0


def selection(folder: Path | None = None) -> Dataset:
    """What the net learns from: MNIST's training set without every image that occurs in `mnist5k`."""
    return data.without(data.load("mnist", "train", folder), data.digests(data.load("mnist5k").x))


def fingerprint(x: torch.Tensor) -> str:
    """One SHA-256 of a set of images, whatever their order."""
    return hashlib.sha256("\n".join(sorted(set(data.digests(x)))).encode()).hexdigest()


def main() -> None:
    """Trains, prints an epoch a line, and writes the file if it reached 95 % on MNIST's test set."""
    torch.set_num_threads(1)
    chosen, test, victims = selection(), data.load("mnist", "test"), data.load("mnist5k")
    print(f"{len(chosen.x):,} images of MNIST's 60,000, none of them in mnist5k")
    model = lenet(channels=1, size=28, classes=10)
    params, buffers = model.init(random.generator(SEED, "lenet-mnist"))
    trained = params
    epochs = fit(model, params, buffers, chosen, EPOCHS, BATCH, LR, SEED, schedule=cosine)
    for number, epoch in enumerate(epochs, start=1):
        trained = epoch.params
        print(f"epoch {number:2d}/{EPOCHS}  loss {epoch.loss:.4f}")
    reached = accuracy(model, trained, buffers, test)
    if reached < 0.95:
        raise Failed(f"Expected a test accuracy of 95 %, got {reached:.2%}: nothing was written.")
    metadata = {
        "model": model.spec,
        "test_accuracy": f"{reached:.4f}",
        "mnist5k_accuracy": f"{accuracy(model, trained, buffers, victims):.4f}",
        "training_images": str(len(chosen.x)),
        "excluded_sha256": fingerprint(victims.x),
        "recipe": f"Adam, lr {LR:g} falling along a cosine, batch {BATCH}, {EPOCHS} epochs, seed {SEED}",
        "torch": torch.__version__,
    }
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    save_file(trained, TARGET, metadata)
    TARGET.chmod(0o644)  # safetensors leaves it to its owner alone; it ships to others
    print(metadata)


if __name__ == "__main__":
    main()

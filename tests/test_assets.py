"""The shipped weights: as accurate as they say, and never shown a digit of `mnist5k`."""

import importlib.util
from pathlib import Path

import pytest
import torch
from layouts import SHARED, labels, needs_mnist, write_idx
from safetensors import safe_open

from qleak import data, models, random, train

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "assets" / "weights" / "lenet-mnist.safetensors"


def _script():
    spec = importlib.util.spec_from_file_location("make_assets", ROOT / "scripts" / "make_assets.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_assets = _script()


def metadata():
    with safe_open(WEIGHTS, "pt") as file:
        return file.metadata()


def reached(test):
    model = models.lenet_mnist()
    return train.accuracy(model, *model.init(random.generator()), test)


def overlap(chosen):
    """How many of the chosen images are in mnist5k."""
    victims = set(data.digests(data.load("mnist5k").x))
    return sum(digest in victims for digest in data.digests(chosen.x))


def test_the_file_is_small_and_float32():
    assert WEIGHTS.stat().st_size < 400_000
    params, _ = models.lenet_mnist().init(random.generator())
    assert {v.dtype for v in params.values()} == {torch.float32} and all(v.isfinite().all() for v in params.values())


def test_accuracy_on_digits_it_never_saw():
    assert reached(data.load("mnist5k")) == pytest.approx(float(metadata()["mnist5k_accuracy"]), abs=0.001)
    assert reached(data.load("mnist5k")) >= 0.95


@needs_mnist
def test_accuracy_on_the_test_set_of_mnist():
    stated = float(metadata()["test_accuracy"])
    assert stated >= 0.95
    assert reached(data.load("mnist", "test", SHARED)) == pytest.approx(stated, abs=0.001)


def test_an_untrained_net_fails_the_same_check():
    model = models.lenet(channels=1, size=28, classes=10)
    assert train.accuracy(model, *model.init(random.generator("untrained")), data.load("mnist5k")) < 0.5


def test_the_exclusion_stated_in_the_file_is_mnist5k():
    victims = data.load("mnist5k").x
    assert metadata()["excluded_sha256"] == make_assets.fingerprint(victims.flip(0))
    assert metadata()["excluded_sha256"] != make_assets.fingerprint(victims[1:])


def test_the_selection_leaves_out_mnist5k(tmp_path):
    victims = data.take(data.load("mnist5k"), torch.arange(0, 5000, 250))
    fresh = random.uniform(random.generator("fresh"), (30, 1, 28, 28))
    x = torch.cat([fresh[:10], victims.x, fresh[10:], victims.x[:3]])  # with copies
    pixels, y = (x[:, 0] * 255).round().to(torch.uint8).numpy(), labels(len(x), 10)
    write_idx(tmp_path, "MNIST", (pixels, y), (pixels[:1], y[:1]))
    chosen = make_assets.selection(tmp_path)
    assert overlap(chosen) == 0 and len(chosen.x) == 30
    assert torch.equal((chosen.x * 255).round(), (fresh * 255).round())
    assert overlap(data.load("mnist", "train", tmp_path)) == 23  # the check sees an unfiltered selection


@needs_mnist
def test_the_real_selection_leaves_out_mnist5k():
    chosen = make_assets.selection(SHARED)
    assert overlap(chosen) == 0 and len(chosen.x) == int(metadata()["training_images"]) == 55_000
    assert overlap(data.load("mnist", "train", SHARED)) == 5_000

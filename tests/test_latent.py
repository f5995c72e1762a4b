"""Synthesis in the latent space of a public autoencoder: what it releases, what it refuses, whom its codes depend on."""

from dataclasses import replace
from typing import Any, NamedTuple

import dp_accounting
import pytest
import torch
from layouts import SHARED, needs_mnist
from torch import Tensor

from qleak import catalog, data, random
from qleak.check import Expected
from qleak.synth import autoencoder, sets
from qleak.synth.methods.latent import latent
from qleak.types import Dataset, Public, Spend, Synthesizer


def gen(*path):
    return random.generator("test_latent", *path)


class Sums(NamedTuple):
    seed: Tensor
    means: Tensor


def noisy_sums(sigma=0.5, unsound=""):
    """A small synthesizer: class sums of what lies in [0, 1], clipped by nothing, with noise."""

    def init(private, spent, seed):
        assert private.x.shape[1:3] == (1, 1) and private.x.min() >= 0 and private.x.max() <= 1
        return Sums(torch.tensor(seed), torch.zeros(private.classes, private.x[0].numel()))

    def step(private, spent, state, t):
        who = torch.nn.functional.one_hot(private.y, private.classes).float()
        sums = who.T @ private.x.flatten(1)
        drawn = random.normal(random.generator(int(state.seed), t), sums.shape)
        return state._replace(means=(sums + sigma * drawn) / who.sum(0)[:, None].clamp(min=1))

    def spend(public, target, delta):
        assert public.shape[:2] == (1, 1)
        return Spend(1, lambda t: dp_accounting.GaussianDpEvent(sigma), lambda t: None, sigma, "one query")

    def sample(public, released, y, seed):
        return released["means"][y].clamp(0, 1).reshape(-1, *public.shape)

    return Synthesizer(
        spend, init, step, lambda s: {"means": s.means}, sample, unsound, ("a paper",), spec="noisy_sums()"
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A public set of 300 smooth 12×12 pictures, and the folder that holds it."""
    import numpy as np

    x, y = pictures("public", 300, 12)
    np.savez(tmp_path / "smooth.npz", x_train=x.numpy(), y_train=y.numpy(), x_test=x[:9].numpy(), y_test=y[:9].numpy())
    monkeypatch.setenv("QLEAK_DATA", str(tmp_path))
    return tmp_path


def pictures(name, n, side):
    coarse = random.uniform(gen(name), (n, 1, 3, 3))
    x = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").clamp(0, 1)
    return x, random.integers(gen(name, "y"), 3, (n,))


def private(n=120, side=8, name="private"):
    x, y = pictures(name, n, side)
    return Dataset(x, y, "records", 3)


def run(method, records, seed=1):
    c, h, w = records.x.shape[1:]
    public = Public(len(records.x), (c, h, w), records.classes)
    spent = method.spend(public, 1.0, 1e-5)
    state = method.init(records, spent, seed)
    for t in range(spent.steps):
        state = method.step(records, spent, state, t)
    return public, state, method.released(state)


def test_codes_are_synthesized_and_decoded(home):
    records = private()
    method = latent(noisy_sums(0.0), "smooth", hid_dim=9, epochs=20, lr=1e-2)
    public, state, held = run(method, records)
    assert state.codes.shape == (120, 1, 1, 9)
    assert not any(k.startswith("encoder") for k in held) and {k.split(".")[0] for k in held} == {"decoder", "inner"}
    x = method.sample(public, held, torch.tensor([0, 1, 2, 2]), 5)
    assert x.shape == (4, 1, 8, 8) and x.min() >= 0 and x.max() <= 1 and torch.equal(x[2], x[3])
    means = torch.stack([records.x[records.y == c].mean(0) for c in range(3)])
    spread = records.x.var()
    assert (x[:3] - means).square().mean() < 0.2 * spread  # the mean code stands for about the mean image


def test_a_seed_is_a_result(home):
    records, method = private(), latent(noisy_sums(), "smooth", hid_dim=5, epochs=1)
    held, again, other = (run(method, records, seed)[2] for seed in (1, 1, 2))
    assert all(torch.equal(held[k], again[k]) for k in held)
    assert not any(torch.equal(held[k], other[k]) for k in held)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_the_autoencoder_learns_to_rebuild(loss):
    x = pictures("public", 256, 8)[0]
    begun = autoencoder.init(gen("init"), (1, 8, 8), 9)
    made = autoencoder.fit(begun, x, loss, 40, 1e-2, "fit")
    other = pictures("other", 100, 8)[0]

    def error(params):
        return float((autoencoder.decode(params, autoencoder.encode(params, other)) - other).square().mean())

    assert error(made) < 0.3 * error(begun)
    assert autoencoder.loss_of(made, other, loss) < autoencoder.loss_of(begun, other, loss)


def test_one_record_changes_its_own_code_alone(home):
    records = private()
    method = latent(noisy_sums(), "smooth", hid_dim=5, epochs=2)
    other = replace(records, x=torch.cat([records.x[:7], 1 - records.x[7:8], records.x[8:]]))
    moved = [
        (run(m, records)[1], run(m, other)[1])
        for m in (method, latent(noisy_sums(), "smooth", 5, epochs=2, finetune=1))
    ]
    (a, b), (c, d) = moved
    changed = (a.codes != b.codes).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [7]
    assert all(torch.equal(a.net[k], b.net[k]) for k in a.net)
    assert int((c.codes != d.codes).flatten(1).any(1).sum()) > 100  # fine-tuning on private records: all of them move


def test_fine_tuning_earns_nothing_and_says_why(home):
    public = Public(120, (1, 8, 8), 3)
    tuned, plain = (latent(noisy_sums(), "smooth", 5, finetune=n) for n in (2, 0))
    assert "2 epochs of fine-tuning" in tuned.unsound and plain.unsound == ""
    assert tuned.spend(public, 1.0, 1e-5).event(1) is None and plain.spend(public, 1.0, 1e-5).event(1) is not None
    assert latent(noisy_sums(unsound="votes are shown"), "smooth").unsound == "votes are shown"
    both = latent(noisy_sums(unsound="votes are shown"), "smooth", finetune=1).unsound
    assert "fine-tuning" in both and "votes are shown" in both
    assert plain.papers == ("a paper",)


def test_public_images_must_be_public_and_fit(home):
    x, y = pictures("public", 300, 12)
    same = Dataset(torch.nn.functional.adaptive_avg_pool2d(x, 8), y, "records", 3)
    mixed = replace(same, x=torch.cat([same.x[:2], private().x[:58]]), y=same.y[:60])
    method = latent(noisy_sums(), "smooth")
    with pytest.raises(Expected, match="300 of 300 of smooth are among the 300 records"):
        run(method, same)
    with pytest.raises(Expected, match="2 of 300 of smooth are among the 60 records"):
        run(method, mixed)
    with pytest.raises(Expected, match="at least 16x16, like records, got 1x12x12 in smooth"):
        run(method, private(side=16))
    with pytest.raises(Expected, match="3 channels"):
        run(method, replace(private(), x=private().x.expand(-1, 3, -1, -1)))
    with pytest.raises(Expected, match="Unknown data set 'smoth'"):
        run(latent(noisy_sums(), "smoth"), private())


def test_arguments_are_checked_and_written_down():
    wrong: list[dict[str, Any]] = [
        {"hid_dim": 0},
        {"loss": "l1"},
        {"epochs": 0},
        {"finetune": -1},
        {"lr": 0.0},
        {"limit": -1},
    ]
    for bad in wrong:
        with pytest.raises(Expected, match=f"Expected {next(iter(bad))}="):
            latent(noisy_sums(), **bad)
    assert latent(noisy_sums(), hid_dim=7).spec.startswith(
        "latent(inner=noisy_sums(), public='fashion_mnist', hid_dim=7"
    )
    made = catalog.build("synthesizers", "latent(inner=class_means(spread=0.1), hid_dim=8)")
    assert catalog.build("synthesizers", made.spec).spec == made.spec and "spread=0.1" in made.spec
    assert catalog.build("synthesizers", "latent").unsound == ""


@needs_mnist
def test_the_default_runs_on_mnist_with_fashion_as_public(monkeypatch):
    monkeypatch.setenv("QLEAK_DATA", str(SHARED))
    records = sets.records("mnist", "train", size=8, limit=2000)
    method = latent(limit=1000, epochs=1)
    public, _, held = run(method, records)
    y = torch.arange(10)
    x = method.sample(public, held, y, 3)
    assert x.shape == (10, 1, 8, 8) and torch.isfinite(x).all()
    assert data.digests(x) == data.digests(method.sample(public, held, y, 3))
    with pytest.raises(Expected, match="among the 2000 records"):
        run(latent(public="mnist", limit=1000), records)

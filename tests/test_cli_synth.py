"""`qleak synth`: samples of a finished arm load as a data set, sample files are read in order, pickles are not opened."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from made import synthesis

from qleak import data, random
from qleak.catalog import build
from qleak.cli import synth, synth_files
from qleak.errors import Expected
from qleak.store import open_run, read_run
from qleak.synth import sets
from qleak.types import Dataset

NAMES = ["second moments", "top-5 sign", "as published", "one noisy average"]
JUDGE = "logistic(epochs=12, lr=0.02, batch=20)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished synthesis whose models are class means: class k is a bright square k, without noise."""
    path = synthesis(tmp_path_factory.mktemp("runs") / "made")
    means = torch.zeros(10, 1, 8, 8)
    for k in range(10):
        means[k].view(-1)[6 * k : 6 * k + 6] = 0.75
    with open_run(path, read_run(path)) as run:
        for key in ("0-0", "0-1", "1-0"):
            about = {"synthesizer": build("synthesizers", "class_means(spread=0.05)").spec, "public": json.dumps([600, [1, 8, 8], 10]),
                     "delta": "1e-05"}  # fmt: skip
            run.model(f"models/{key}", {"means": means}, about)
    return path


@pytest.fixture
def real(monkeypatch):
    """Real test images: a class's own six pixels are bright, in noise."""
    y = torch.arange(200) % 10
    x = 0.1 * random.uniform(random.generator("real"), (200, 1, 8, 8))
    for i, k in enumerate(y.tolist()):
        x[i].view(-1)[6 * k : 6 * k + 6] += 0.7

    def records(name, split="train", size=0, limit=0):
        assert split == "test" and size in (0, 8)
        return Dataset(x, y, name, 10, {})

    monkeypatch.setattr(sets, "records", records)
    return x, y


def columns(x, y, classes=10, dtype: type = np.float16):
    one_hot = torch.nn.functional.one_hot(y, classes)
    return torch.cat([x.flatten(1), one_hot.to(x)], 1).numpy().astype(dtype)


def test_samples_load_as_a_data_set(qleak, folder, tmp_path):
    code, out, err = qleak("synth", "sample", folder, "--n", 25, "--out", "mine.npz", "--png")
    assert code == 0, err
    assert "25 images of second moments, seed 0: ε 0.9991 at δ 1e-05; drawing costs nothing further." in out
    found = data.load(str(tmp_path / "mine.npz"))
    assert found.x.shape == (25, 1, 8, 8) and found.classes == 10 and found.y.tolist() == [i % 10 for i in range(25)]
    assert float(found.x.min()) >= 0 and float(found.x.max()) <= 1
    bright = torch.stack([found.x[i].view(-1)[6 * k : 6 * k + 6].mean() for i, k in enumerate(found.y.tolist())])
    assert float((bright - 0.75).abs().max()) < 0.15
    assert (tmp_path / "mine.png").read_bytes()[:4] == b"\x89PNG"


def test_a_class_an_arm_and_a_seed_are_chosen(qleak, folder, tmp_path):
    code, out, _ = qleak(
        "synth", "sample", folder, "--n", 4, "--class", 7, "--arm", "top-5 sign", "--seed-index", 0, "--png"
    )
    assert code == 0 and "top-5 sign" in out
    found = data.load(str(tmp_path / "samples-top-5-sign.npz"))
    assert found.y.tolist() == [7] * 4 and found.classes == 10
    assert synth.number("1", NAMES) == synth.number("top-5 sign", NAMES) == 1 and synth.number("", NAMES) == 0


def test_draws_are_a_prefix_of_one_sequence_and_follow_the_seed(folder):
    few, many = synth.drawn(str(folder), 5), synth.drawn(str(folder), 1005)
    assert torch.equal(few.x, many.x[:5]) and len(many.x) == 1005
    assert not torch.equal(few.x, synth.drawn(str(folder), 5, seed=1).x)
    sevens = synth.drawn(str(folder), 3, class_=7)
    assert torch.equal(sevens.x, many.x[many.y == 7][:3])  # the same images, not a batch of sevens alone
    assert synth.drawn(str(folder), 150, class_=7).y.tolist() == [7] * 150


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--n", 0], "Expected n=0 >= 1."),
        (["--arm", "second moment"], "Did you mean 'second moments'?"),
        (["--arm", "9"], "0 'second moments'"),
        (["--class", 10], "Expected class=10 in [0, 9]."),
        (["--seed-index", 2], "seeds that have: 0, 1."),
        (["--seed-index", -1], "Expected seed_index=-1 >= 0."),
        (["--arm", "as published"], "seeds that have: none."),
        (["--out", "x.txt"], "Expected --out x.txt to end in .npz."),
    ],
)
def test_wrong_samples_are_one_line_and_exit_2(qleak, folder, flags, text):
    code, _, err = qleak("synth", "sample", folder, *flags)
    assert code == 2 and len(err.strip().splitlines()) == 1 and text in err


def test_runs_that_have_nothing_to_sample_say_so(qleak, folder, tmp_path):
    code, _, err = qleak("synth", "sample", "nowhere")
    assert code == 2 and "Expected a run folder" in err
    half = synthesis(tmp_path / "half", status="interrupted")
    code, _, err = qleak("synth", "sample", half)
    assert code == 2 and "Expected second moments to have spent its budget with seed 0" in err and "interrupted" in err
    with open_run(tmp_path / "study", {"kind": "study", "plan_id": "x"}):
        pass
    assert "kind 'synthesis'" in qleak("synth", "sample", tmp_path / "study")[2]
    with open_run(tmp_path / "early", {"kind": "synthesis", "plan_id": "x", "status": "running"}):
        pass
    assert "Expected a synthesis that has begun" in qleak("synth", "sample", tmp_path / "early")[2]
    (half / "models").mkdir()
    (half / "models" / "0-0.safetensors").write_bytes(b"nothing")
    assert "whole safetensors file" in qleak("synth", "sample", half)[2]


def test_compare_says_where_a_synthesis_is_shown(qleak, folder):
    code, _, err = qleak("compare", folder)
    assert code == 2 and err.strip() == (
        f"qleak: Expected an audit or a training, got a synthesis: `qleak report {folder}` has its arms side by side."
    )


@pytest.mark.parametrize("room", ["synthesizers", "critics", "makers", "classifiers"])
def test_listings_of_the_parts(qleak, room):
    code, out, _ = qleak("ls", room)
    assert code == 0 and len(out.splitlines()) > 1


# --- sample files --------------------------------------------------------------------------------


def test_files_are_read_in_the_order_of_their_numbers(qleak, real, tmp_path):
    x, y = real
    for i in (0, 1, 2, 10):
        np.savez(
            tmp_path / f"eps-1.00.data-{i}.npz", data=columns(x[i : i + 1], y[i : i + 1]), shape=np.array([1, 8, 8])
        )
    series = synth_files.listed(str(tmp_path / "eps-1.00.data-"))
    assert [p.stem.rsplit("-", 1)[1] for p in series.paths] == ["0", "1", "2", "10"]  # not 0 1 10 2
    assert series.missing == [3, 4, 5, 6, 7, 8, 9]
    found, labels = synth_files.read(series.paths, "mnist", 100)
    torch.testing.assert_close(found, x[[0, 1, 2, 10]], atol=1e-3, rtol=0)
    assert labels.tolist() == y[[0, 1, 2, 10]].tolist()
    assert len(synth_files.read(series.paths, "mnist", 3)[0]) == 3
    code, out, _ = qleak("synth", "evaluate", tmp_path / "eps-1.00", "--classifier", JUDGE, "--seeds", 1)
    assert (
        code == 0 and "Missing among the files: 3, 4, 5, 6, 7, 8, 9." in out and "10,000 images were asked for" in out
    )


def test_samples_and_flat_rows_and_plain_arrays_say_the_same(qleak, folder, real, tmp_path):
    code, _, err = qleak("synth", "sample", folder, "--n", 200, "--out", "s.npz")
    assert code == 0, err
    made = data.load(str(tmp_path / "s.npz"))
    np.save(
        tmp_path / "flat.npy", columns(made.x, made.y, dtype=np.float32)
    )  # no shape: mnist says 1 channel, 10 classes
    np.savez(tmp_path / "xy.npz", x=made.x[:, 0].numpy(), y=made.y.numpy())
    results = []
    for name in ("s.npz", "flat.npy", "xy.npz"):
        code, out, err = qleak("synth", "evaluate", name, "--classifier", JUDGE, "--seeds", 2, "--json")
        assert code == 0, err
        results.append(json.loads(out))
    assert results[0]["accuracies"] == results[1]["accuracies"] == results[2]["accuracies"]
    assert results[0]["accuracy"] > 0.9 and results[0]["samples"] == 200 and results[0]["test_images"] == 200
    assert results[0]["accuracy_max"] >= results[0]["accuracy"] and len(results[0]["accuracy_ci"]) == 2
    code, out, _ = qleak("synth", "evaluate", "s.npz", "--classifier", JUDGE, "--seeds", 2)
    assert "accuracy, last epoch" in out and "max over epochs, chosen on the test set" in out


def test_wrong_labels_are_seen_by_the_judge(qleak, real, tmp_path):
    """The same images with labels moved by one: were the result read off anything but the labels, it would not fall."""
    x, y = real
    np.savez(tmp_path / "right.npz", x=x.numpy(), y=y.numpy())
    np.savez(tmp_path / "wrong.npz", x=x.numpy(), y=((y + 1) % 10).numpy())
    right, wrong = (
        synth_files.judged(str(tmp_path / f"{n}.npz"), classifier=JUDGE, seeds=1) for n in ("right", "wrong")
    )
    assert right["accuracy"] > 0.9 and wrong["accuracy"] < 0.1


def test_last_epoch_and_max_are_told_apart(real, tmp_path, monkeypatch):
    x, y = real
    np.savez(tmp_path / "a.npz", x=x.numpy(), y=y.numpy())
    curves = iter([torch.tensor([0.2, 0.9, 0.5]), torch.tensor([0.8, 0.3, 0.7])])
    monkeypatch.setattr(
        "qleak.catalog.build", lambda room, text: type("J", (), {"fit": lambda *a: next(curves), "spec": text})
    )
    found = synth_files.judged(str(tmp_path / "a.npz"), seeds=2)
    assert found["accuracy"] == pytest.approx(0.6) and found["accuracy_max"] == pytest.approx(0.85)
    assert found["accuracies"] == pytest.approx([0.5, 0.7])


@pytest.mark.parametrize(
    ("dataset", "full", "spec", "samples"),
    [
        ("mnist", False, "cnn_classifier(lr=0.001, batch=128, epochs=10, optimizer='adam'", 10_000),
        ("mnist", True, "cnn_classifier(lr=0.002, batch=512, epochs=600, optimizer='sgd'", 100_000),
        ("celeba-hair", True, "cnn_classifier(lr=0.0001, batch=256, epochs=250, optimizer='sgd'", 100_000),
    ],
)
def test_full_is_the_published_protocol(real, tmp_path, monkeypatch, dataset, full, spec, samples):
    x, y = real
    np.savez(tmp_path / "a.npz", x=x.numpy(), y=y.numpy())
    asked = build(
        "classifiers", (synth_files.FULL_CELEBA if "celeba" in dataset else synth_files.FULL)["cnn_classifier"]
    )
    seen = []

    def fake(room, text):
        seen.append(build(room, text).spec)
        return type("J", (), {"fit": lambda *a: torch.tensor([0.5]), "spec": text})

    monkeypatch.setattr("qleak.catalog.build", fake)
    found = synth_files.judged(str(tmp_path / "a.npz"), dataset, seeds=1, full=full)
    assert seen[0].startswith(spec) and found["wanted"] == samples and (seen[0] == asked.spec) == full


class Bomb:
    def __reduce__(self):
        return (sys.exit, (99,))


def test_pickles_are_refused_and_not_opened(qleak, real, tmp_path):
    for name in ("a-0.pkl", "b-0", "c-0.npy"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "d-0.npz", data=np.array([Bomb()], dtype=object))
    for name, text in (
        ("a-", "got a pickle: it could run any code"),
        ("b-0", "got a pickle"),
        ("c-", "to be readable"),
        ("d-", "to be readable"),
    ):
        code, _, err = qleak("synth", "evaluate", name, "--classifier", JUDGE)
        assert code == 2 and text in err and len(err.strip().splitlines()) == 1, err
    assert qleak("synth", "evaluate", "a-0.pkl")[0] == 2


def test_unfit_files_are_one_line(qleak, real, tmp_path):
    x, y = real
    good = columns(x, y, dtype=np.float32)
    cases = {
        "width": ({"data": good[:, :-1], "shape": np.array([1, 8, 8])}, "64 pixels and 10 classes of mnist a row"),
        "square": ({"data": good[:, 1:]}, "1 square pixels and 10 classes"),
        "narrow": ({"data": good[:, :10]}, "1 square pixels and 10 classes"),
        "hot": ({"data": np.where(good == 1, 0, good).astype(np.float32)}, "one-hot labels"),
        "range": ({"data": np.concatenate([2 * good[:, :64] - 1, good[:, 64:]], 1)}, "in [0, 1]"),
        "nan": ({"x": np.full((2, 8, 8), np.nan), "y": np.array([0, 1])}, "nan"),
        "keys": ({"images": good}, "Expected data, x_train and y_train, or x and y"),
        "classes": ({"x": x.numpy(), "y": (y + 1).numpy()}, "Expected labels in 0 … 9 of mnist, got 10."),
        "size": ({"x": np.zeros((4, 8, 6), np.float32), "y": np.zeros(4, int)}, "Expected square samples, got 8×6."),
        "ints": ({"data": good.astype(int)}, "Expected floats"),
    }  # fmt: skip
    for name, (held, text) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **held)
        code, _, err = qleak("synth", "evaluate", f"{name}.npz", "--classifier", JUDGE)
        assert code == 2 and text in err and len(err.strip().splitlines()) == 1, (name, err)
    np.savez(tmp_path / "e-0.npz", x=x.numpy(), y=y.numpy())
    np.savez(tmp_path / "e-1.npz", x=x[:, :, :4, :4].numpy(), y=y.numpy())
    assert "Expected images (1, 8, 8) in e-1.npz as in e-0.npz, got (1, 4, 4)." in qleak("synth", "evaluate", "e-")[2]
    (tmp_path / "f.npz").write_bytes(b"PK damaged")
    assert "to be readable" in qleak("synth", "evaluate", "f.npz")[2]
    assert "Expected files nothing*.npz, found none." in qleak("synth", "evaluate", "nothing")[2]
    assert (
        "Unknown classifier 'cnn_classifer'"
        in qleak("synth", "evaluate", "e-0.npz", "--classifier", "cnn_classifer")[2]
    )
    assert "Expected seeds=0 >= 1." in qleak("synth", "evaluate", "e-0.npz", "--seeds", 0)[2]
    assert "Expected size=9 <= 8" in qleak("synth", "evaluate", "e-0.npz", "--size", 9, "--classifier", JUDGE)[2]


def test_two_series_are_not_mixed(tmp_path):
    """eps-1.00 and eps-1.50 begin alike: their images are of different budgets."""
    for name in ("eps-1.00.data-0.npz", "eps-1.50.data-0.npz"):
        np.savez(tmp_path / name, data=np.zeros((1, 74), np.float16))
    with pytest.raises(Expected, match=r"one series of files.*eps-1\.00.*eps-1\.50"):
        synth_files.listed(str(tmp_path / "eps-1"))
    assert len(synth_files.listed(str(tmp_path / "eps-1.5")).paths) == 1

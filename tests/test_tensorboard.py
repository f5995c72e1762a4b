"""TensorBoard's files hold what the run has: own losses, scores, accuracies, ε, and the reconstructions as pictures."""

import builtins
import warnings
from itertools import pairwise

import pytest

from qleak import engine, looks, store
from qleak.adapters import tensorboard
from qleak.attacks import cells, dlg
from qleak.catalog import build
from qleak.channels import chain, clip_l2, gaussian, identity, mean, total, uniform
from qleak.client import gradient, per_example
from qleak.errors import Expected
from qleak.plans import Audit, Training

NET = build("models", "mlp(channels=1, size=28, classes=10, hidden=(8,))")


def logged(plan, folder, **asked):
    """The run's events through the adapter, and TensorBoard's own reader on what was written."""
    pytest.importorskip("tensorboard")
    head = {"kind": plan.kind, "plan_id": plan.id, "plan": plan.as_json(), "recipe": "", "flags": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of protobuf and numpy, inside tensorboard
        with (
            store.open_run(folder / "run", head) as run,
            tensorboard.logged(folder / "tb", run) as log,
        ):
            for event in engine.run(plan, run, look=looks.asked(**asked)):
                log(event)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        read = EventAccumulator(str(folder / "tb"), size_guidance={"images": 0, "scalars": 0})
        read.Reload()
    return read


def test_an_audit(tmp_path):
    plan = Audit(
        NET, "mnist5k", (3, 4000), (chain(uniform(bits=4)),), (dlg(outer=2), cells(stages=1, steps=20, last=10))
    )
    read = logged(plan, tmp_path, watch=1e-4)
    scalars, images = read.Tags()["scalars"], read.Tags()["images"]
    rows = [r for r in store.read_rows(tmp_path / "run") if r["control"] == "none"]
    for row in rows:
        found = {e.step: e.value for e in read.Scalars(f"psnr/{row['channel']} {row['attack']}")}
        assert found[row["image"]] == pytest.approx(row["psnr"], rel=1e-5)
        (picture,) = read.Images(f"reconstruction/{row['channel']} {row['attack']}/image {row['image']}")
        assert (picture.width, picture.height, picture.step) == (28, 28, row["closures"])
    losses = [t for t in scalars if t.startswith("loss/uniform(bits=4) dlg/0-0-lanes-0")]
    assert len(losses) == 1
    curve = read.Scalars(losses[0])
    assert curve[-1].value <= curve[0].value and curve[-1].step == 40
    steps = [e.step for e in read.Images("guess/uniform(bits=4) dlg/0-0-lanes-0/image 3")]
    assert steps[0] == 0 and all(b >= tensorboard.GROWTH * a for a, b in pairwise(steps))
    line = next(s for s in store.read_run(tmp_path / "run")["summary"] if s["control"] == "none")
    told = read.Scalars(f"summary psnr_selected/{line['channel']} {line['attack']} none")
    assert told[0].value == pytest.approx(line["psnr_selected"], rel=1e-5)
    assert not [t for t in images if "nan" in t.lower()]


def test_a_training_with_an_epsilon(tmp_path):
    channels = (chain(clip_l2(1.0), total(), gaussian(4.0), mean(16)),)
    plan = Training(NET, "mnist5k", channels, per_example(16), epochs=2, limit=200, seeds=2, sampling="poisson")
    read = logged(plan, tmp_path)
    rows = [r for r in store.read_rows(tmp_path / "run") if r["seed"] == 0]
    name = f"{rows[0]['channel']} seed 0"
    for measure in ("test_accuracy", "train_loss", "epsilon"):
        told = {e.step: e.value for e in read.Scalars(f"{measure}/{name}")}
        wanted = {r["epoch"]: r[measure] for r in rows if r[measure] is not None}
        assert told == pytest.approx(wanted, rel=1e-5) and len(wanted) >= 2


def test_without_the_extra_it_is_one_line(monkeypatch, tmp_path, qleak):
    real = builtins.__import__

    def absent(name, *args, **kw):
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(Expected, match=r"pip install 'qleak\[tensorboard\]'"):
        tensorboard.writer_type()
    code, _, err = qleak("recipe", "run", "pretrained_int8", "--tensorboard", "tb", "--quiet")
    assert code == 2
    assert err.strip() == "qleak: Expected the package tensorboard for --tensorboard: pip install 'qleak[tensorboard]'."
    assert not (tmp_path / "runs").exists(), "said before anything runs"


def test_an_exact_channel_and_clients_have_no_epsilon(tmp_path):
    plan = Training(NET, "mnist5k", (identity(),), gradient(batch=50), epochs=1, limit=200, seeds=1)
    read = logged(plan, tmp_path)
    assert not [t for t in read.Tags()["scalars"] if t.startswith("epsilon")]
    assert [t for t in read.Tags()["scalars"] if t.startswith("test_accuracy")]

"""Training plans: JSON and ids, rows and summaries, workers, kill -9 and resume, divergence, stored models, audits."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy import stats

from qleak import data, engine, random
from qleak.accounting import epsilon
from qleak.attacks import cells, dlg
from qleak.catalog import build, catalog
from qleak.channels import chain, clip_l2, gaussian, identity, mean, total, uniform
from qleak.check import Expected
from qleak.client import gradient, local_sgd, per_example
from qleak.engine import Finished, Rows, Step, lessons
from qleak.engine.seeds import mean_interval
from qleak.models.stored import stored
from qleak.plans import Audit, Training, from_json
from qleak.store import open_run, read_rows, read_run
from qleak.train import adam, federated, measure, sgd

MLP = build("models", "mlp(channels=1, size=8, classes=4, hidden=(12,))")
CONV = build("models", "convnet(channels=1, size=8, classes=4, width=2)")
ROW = {
    "key", "id", "kind", "model", "data", "client", "channel", "seed", "epoch", "round", "train_loss", "test_loss",
    "train_accuracy", "test_accuracy", "bits", "epsilon", "cpu_s", "status",
}  # fmt: skip
SUMMARY = {
    "channel", "n", "diverged", "epoch", "rounds", "train_loss", "train_loss_ci", "test_loss", "test_loss_ci",
    "train_accuracy", "train_accuracy_ci", "test_accuracy", "test_accuracy_ci", "bits", "epsilon", "uplink_mb", "cpu_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Four classes of noisy 8×8 patterns, sorted by class, 120 to train on and 60 to test."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    patterns = random.uniform(random.generator("patterns"), (4, 8, 8)).numpy()

    def draw(n, name):
        y = np.sort(np.arange(n) % 4)
        noise = random.uniform(random.generator("noise", name), (n, 8, 8)).numpy()
        return (0.5 * patterns[y] + 0.5 * noise).astype(np.float32), y

    (a, b), (c, d) = draw(120, "train"), draw(60, "test")
    np.savez(path, x_train=a, y_train=b, x_test=c, y_test=d)
    return str(path)


@pytest.fixture
def plan(tiny):
    return Training(
        CONV, tiny, (identity(), chain(uniform(levels=16))), gradient(batch=16), epochs=3, rule=adam(), lr=0.01, seeds=2
    )


def header(plan):
    return {"kind": plan.kind, "plan_id": plan.id, "plan": plan.as_json()}


def run(plan, folder, **options):
    with open_run(folder, header(plan)) as store:
        seen = list(engine.run(plan, store, **options))
    return {r["key"]: r for r in read_rows(folder)}, read_run(folder), seen


def timeless(rows):
    return {k: {n: v for n, v in r.items() if n != "cpu_s"} for k, r in rows.items()}


def models(folder):
    return {p.stem: load_file(p) for p in sorted((folder / "models").glob("*"))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[m][k], b[m][k]) for m in a for k in a[m])


# --- the plan ----------------------------------------------------------------------------------------


def test_a_plan_survives_json_and_its_id_follows_every_field(plan):
    text = json.loads(json.dumps(plan.as_json()))
    again = from_json(text)
    assert again.id == plan.id and again.as_json() == plan.as_json() and type(again) is Training
    changes = {
        "clients": 3, "participation": 0.5, "split": "dirichlet(0.5)", "epochs": 4, "lr": 0.02, "schedule": "cosine",
        "seeds": 3, "seed": 1, "model_seed": 1, "limit": 8, "eval_every": 2, "lanes": "loop", "dtype": "float64",
        "rule": sgd(0.5), "client": gradient(batch=8), "channels": (identity(),),
    }  # fmt: skip
    ids = {replace(plan, **{k: v}).id for k, v in changes.items()}
    assert len(ids | {plan.id}) == len(changes) + 1
    assert set(plan.lines()) >= {"model", "data", "channels", "training", "seeds"}


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "clients": ({"clients": 0}, r"clients=0 >= 1"),
        "participation": ({"participation": 0.0}, r"participation=0.0 > 0"),
        "too many take part": ({"participation": 1.5}, r"participation=1.5 in \[0, 1\]"),
        "split": ({"split": "dirichlet"}, r"split='dirichlet' to be written iid or dirichlet\(0.5\)"),
        "alpha": ({"split": "dirichlet(0)"}, r"alpha=0.0 > 0"),
        "schedule": ({"schedule": "linear"}, r"schedule='linear' to be constant, cosine or decay"),
        "rows": ({"client": per_example(4)}, r"one total\(\) for the rows in fp32 behind per_example\(batch=4\)"),
        "join": ({"channels": (chain(total()),)}, r"no total\(\) in total"),
        "attacks": ({"attack_rounds": (1,)}, r"attacks and attack_rounds together, got 0 and 1"),
        "round": ({"attack_rounds": (0,), "attacks": (cells(),)}, r"attack_rounds\[0\]=0 >= 1"),
        "sampling": ({"sampling": "poisson"}, "a per-example client with sampling='poisson'"),
        "lanes": ({"lanes": "vmap", "clients": 2}, r"one client and sampling='shuffle' with lanes='vmap'"),
    }.values(),
)
def test_plan_refusals(plan, change, message):
    with pytest.raises(Expected, match=message):
        replace(plan, **change)


def test_data_that_do_not_fit_are_refused(plan, tmp_path):
    for change, message in (
        ({"data": "mnist5k"}, "Expected data 'mnist5k' of shape"),
        ({"clients": 121}, "clients=121 <= 120"),
        ({"attack_rounds": (25,), "attacks": (dlg(),)}, "attack_rounds <= 24, the last round, got 25"),
        ({"attack_rounds": (1,), "attacks": (dlg(),), "victims": 8}, "victims=8 <= 7 batches"),
    ):
        with pytest.raises(Expected, match=message):
            run(replace(plan, **change), tmp_path / "-".join(change))


# --- rows, summary, events ---------------------------------------------------------------------------


def test_a_run_learns_and_says_so(plan, tmp_path):
    rows, head, seen = run(plan, tmp_path / "r")
    assert set(rows) == {f"{c}-{s}-{e}" for c in range(2) for s in range(2) for e in range(4)}
    assert all(set(r) >= ROW for r in rows.values())
    assert all(set(s) >= SUMMARY for s in head["summary"]) and head["status"] == "done"
    for c, label in enumerate(plan.labels()):
        last = [rows[f"{c}-{s}-3"] for s in range(2)]
        said = head["summary"][c]
        assert said["channel"] == label and said["n"] == 2 and said["diverged"] == 0 and said["rounds"] == 24
        values = [r["test_accuracy"] for r in last]
        assert said["test_accuracy"] == pytest.approx(sum(values) / 2)
        assert all(v > rows[f"{c}-{s}-0"]["test_accuracy"] for s, v in enumerate(values))
        assert said["uplink_mb"] == pytest.approx(24 * last[0]["bits"] * count(CONV) / 8e6)
    assert rows["0-0-0"]["bits"] == 32 and 4 < rows["1-0-0"]["bits"] < 6  # two 32-bit ends a tensor
    assert [e for e in seen if isinstance(e, Finished)] == [seen[-1]]
    steps = [e for e in seen if isinstance(e, Step)]
    assert steps[-1].label == "uniform(levels=16) seed 1" and steps[-1].text.startswith("epoch 3/3 · train loss ")
    assert sum(len(e.rows) for e in seen if isinstance(e, Rows)) == 16
    # the stored model is the one the row speaks of
    model = build("models", f"run:{tmp_path / 'r'}/1-0")
    params, buffers = model.init(random.generator("ignored"))
    assert measure(model, params, buffers, data.load(plan.data, "test")).accuracy == rows["1-0-3"]["test_accuracy"]


def count(model):
    return sum(v.numel() for v in model.init(random.generator(0))[0].values())


def test_channels_are_paired_and_seeds_differ(plan, tmp_path):
    rows, _, _ = run(replace(plan, channels=(identity(), chain(uniform(bits=24)))), tmp_path / "r")
    assert rows["0-0-0"]["train_loss"] == rows["1-0-0"]["train_loss"] != rows["0-1-0"]["train_loss"]
    assert rows["0-0-3"]["train_loss"] == pytest.approx(rows["1-0-3"]["train_loss"], rel=1e-3)


def test_workers_change_nothing(plan, tmp_path):
    one, _, _ = run(plan, tmp_path / "one")
    two, _, _ = run(plan, tmp_path / "two", workers=2)
    assert timeless(one) == timeless(two) and same(models(tmp_path / "one"), models(tmp_path / "two"))


def test_vmapped_lanes_equal_the_loop(plan, tmp_path):
    base = replace(plan, model=MLP, dtype="float64", seeds=2, channels=(chain(uniform(16)), chain(uniform(8))))
    loop, _, _ = run(replace(base, lanes="loop"), tmp_path / "loop")
    auto, _, seen = run(base, tmp_path / "auto")
    assert any("and 3 more" in e.label for e in seen if isinstance(e, Step))
    assert engine.choices(base)[0].startswith("lanes vmap (linear layers alone")
    assert engine.choices(plan)[0].startswith("lanes loop (convolutions on a CPU")
    for key, row in loop.items():
        assert auto[key]["train_loss"] == pytest.approx(row["train_loss"], abs=1e-9)
        assert auto[key]["round"] == row["round"] and auto[key]["uplink_mb"] == row["uplink_mb"]


def test_eval_every_leaves_rows_out_but_never_the_last(plan, tmp_path):
    rows, _, _ = run(replace(plan, eval_every=2, channels=(identity(),), seeds=1), tmp_path / "r")
    assert set(rows) == {"0-0-0", "0-0-2", "0-0-3"}


def test_a_diverged_training_is_a_row(plan, tmp_path):
    wild = replace(plan, rule=sgd(), lr=1e30, channels=(identity(),))
    rows, head, _ = run(wild, tmp_path / "r")
    assert head["status"] == "done" and head["summary"][0]["diverged"] == 2
    assert rows["0-0-3"]["status"] == "diverged" and rows["0-0-0"]["status"] == "ok"
    assert rows["0-0-3"]["train_loss"] is None and head["summary"][0]["train_loss"] is None
    assert head["summary"][0]["test_accuracy"] == 0.25  # the first of four classes: chance
    assert json.loads((tmp_path / "r" / "run.json").read_text())["summary"][0]["test_accuracy_ci"] == [0.25, 0.25]


def test_student_intervals():
    values = [0.81, 0.84, 0.80, 0.86]
    centre, (low, high) = mean_interval(values)
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert centre == pytest.approx(np.mean(values)) and (low, high) == pytest.approx(expected)
    assert mean_interval([0.5]) == (0.5, [None, None]) and mean_interval([]) == (None, [None, None])


# --- private training ----------------------------------------------------------------------------------


def test_private_training_through_a_join(plan, tmp_path):
    private = chain(clip_l2(1.0), total(), gaussian(4.0), mean(16))
    some = replace(plan, model=MLP, client=per_example(16), channels=(private,), epochs=2, rule=sgd(), lr=0.5)
    rows, head, _ = run(some, tmp_path / "r")
    first, last = rows["0-0-1"]["epsilon"], rows["0-0-2"]["epsilon"]
    assert rows["0-0-0"]["epsilon"] is None  # nothing was sent yet
    assert 0 < first < last == head["summary"][0]["epsilon"]
    again, _, _ = run(replace(some, delta=1e-3), tmp_path / "other")
    assert again["0-0-2"]["epsilon"] < last and again["0-0-2"]["train_loss"] == rows["0-0-2"]["train_loss"]
    assert rows["0-0-2"]["train_loss"] != rows["0-1-2"]["train_loss"]


def test_poisson_sampling_amplifies(plan, tmp_path):
    """ε against dp-accounting's own composition; batches of every size, each channel's the same."""
    private = chain(clip_l2(1.0), total(), gaussian(1.0), mean(8))
    some = replace(plan, model=MLP, client=per_example(8), channels=(private,), epochs=2, seeds=1, sampling="poisson")
    rows, _, _ = run(some, tmp_path / "r")
    plain, _, _ = run(replace(some, sampling="shuffle"), tmp_path / "plain")
    event = dp_accounting.PoissonSampledDpEvent(8 / 120, dp_accounting.GaussianDpEvent(1.0))
    assert rows["0-0-2"]["round"] == 30
    assert rows["0-0-2"]["epsilon"] == pytest.approx(epsilon(event, some.delta, 30), rel=1e-9)
    assert rows["0-0-2"]["epsilon"] < plain["0-0-2"]["epsilon"]
    fed, group, _ = lessons.begin(some, some.members()[:1])
    sizes = [len(federated.minibatch(fed[0], 0, i)[0]) for i in range(400)]
    spread = math.sqrt(120 * 8 / 120 * (1 - 8 / 120))
    assert abs(np.mean(sizes) - 8) < 4 * spread / 20 and np.std(sizes) == pytest.approx(spread, rel=0.2)
    empty = replace(fed[0], client=replace(fed[0].client, batch=0))
    after = federated.advance(empty, group.states[0], 0.1)
    assert all(v.isfinite().all() for v in after.params.values())
    with pytest.raises(Expected, match="adjacency 'add-or-remove-one'"):
        replace(some, channels=(chain(clip_l2(1.0), total("replace-one"), gaussian(1.0), mean(8)),))


# --- stop and go on ------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from qleak import engine
from qleak.engine import Rows
from qleak.plans import from_json
from qleak.store import open_run
import json
if __name__ == "__main__":
    plan = from_json(json.loads(sys.argv[1]))
    with open_run(__import__("pathlib").Path(sys.argv[2]), {"kind": plan.kind, "plan_id": plan.id}) as store:
        for event in engine.run(plan, store, workers=int(sys.argv[3])):
            if isinstance(event, Rows) and event.rows[-1]["epoch"] == 1:
                os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("workers", "lanes"), [(1, "loop"), (2, "loop"), (1, "vmap")])
def test_kill_9_after_an_epoch_loses_nothing(plan, tmp_path, workers, lanes):
    some = replace(plan, model=MLP if lanes == "vmap" else CONV, lanes=lanes, clients=1)
    whole, whole_head, _ = run(some, tmp_path / "whole")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(some.as_json()), str(tmp_path / "cut"), str(workers)], timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    cut = read_rows(tmp_path / "cut")
    assert 0 < len(cut) < len(whole) and not any(r["epoch"] == 3 for r in cut if r["seed"] == 1)
    time.sleep(0.1)
    rows, head, seen = run(some, tmp_path / "cut", workers=workers)
    assert timeless(rows) == timeless(whole)
    assert all(r in rows.values() for r in cut)
    assert same(models(tmp_path / "cut"), models(tmp_path / "whole"))
    strip = [{k: v for k, v in s.items() if k != "cpu_s"} for s in head["summary"]]
    assert strip == [{k: v for k, v in s.items() if k != "cpu_s"} for s in whole_head["summary"]]
    epochs = [e.rows for e in seen if isinstance(e, Rows)]
    assert sum(map(len, epochs)) == len(whole) - len(cut)


def test_federated_state_survives_too(plan, tmp_path):
    """Shards, participants, several client states and a half-done run: cut between two epochs, then go on."""
    some = replace(plan, clients=5, participation=0.4, split="dirichlet(0.5)", client=local_sgd(2, batch=4, lr=0.3), rule=sgd(), model=MLP,
                   lr=1.0, schedule="cosine", channels=(chain(uniform(16)),), seeds=1)  # fmt: skip
    whole, _, _ = run(some, tmp_path / "whole")
    with open_run(tmp_path / "cut", header(some)) as store:
        for event in engine.run(some, store):
            if isinstance(event, Rows) and event.rows[-1]["epoch"] == 2:
                break
    rows, _, _ = run(some, tmp_path / "cut")
    assert timeless(rows) == timeless(whole) and same(models(tmp_path / "cut"), models(tmp_path / "whole"))
    assert whole["0-0-3"]["train_loss"] < whole["0-0-0"]["train_loss"]


def test_a_finished_run_is_not_trained_again(plan, tmp_path):
    run(plan, tmp_path / "r")
    before = (tmp_path / "r" / "rows.jsonl").read_bytes()
    _, head, seen = run(plan, tmp_path / "r")
    assert [type(e) for e in seen] == [Finished] and head["status"] == "done"
    assert (tmp_path / "r" / "rows.jsonl").read_bytes() == before


# --- stored models -------------------------------------------------------------------------------------


def test_every_training_leaves_its_model(plan, tmp_path, monkeypatch):
    run(plan, tmp_path / "runs" / "here-1")
    folder = tmp_path / "runs" / "here-1"
    assert set(models(folder)) == {"0-0", "0-1", "1-0", "1-1"}
    with safe_open(folder / "models" / "1-1.safetensors", "pt") as file:
        about = file.metadata()
    assert about["model"] == CONV.spec and about["run"] == plan.id and about["seed"] == "1"
    monkeypatch.chdir(tmp_path)
    first = build("models", "run:here-1")
    assert build("models", "run:1").spec == first.spec  # what only its name ends with
    assert build("models", first.spec).spec == first.spec and "stored" in catalog("models")
    params, _ = first.init(random.generator("any"))
    assert all(torch.equal(v, models(folder)["0-0"][k]) for k, v in params.items())
    other, _ = build("models", "run:runs/here-1/1-1").init(random.generator("any"))
    assert not torch.equal(other["fc.weight"], params["fc.weight"])
    assert first.layers == CONV.layers and first.shape == CONV.shape
    for text, message in {
        "run:nowhere": "a run's folder, or its name below ./runs, got 'nowhere'",
        "run:here-1/7-0": "models of that run: 0-0, 0-1, 1-0, 1-1",
        "stored('missing.safetensors')": "weights at missing.safetensors",
    }.items():
        with pytest.raises(Expected, match=message):
            build("models", text)


def test_a_stored_model_is_its_content(plan, tmp_path):
    run(replace(plan, epochs=1, seeds=2), tmp_path / "r")
    a, b = (tmp_path / "r" / "models" / f"0-{i}.safetensors" for i in (0, 1))
    spec = stored(str(a)).spec
    audit = Audit(stored(str(a)), plan.data, (0,), (identity(),), (cells(),))
    assert from_json(audit.as_json()).id == audit.id
    a.write_bytes(b.read_bytes())
    assert stored(str(a)).spec != spec
    with pytest.raises(Expected, match="the file has changed since"):
        build("models", spec)
    a.write_bytes(b"nothing")
    with pytest.raises(Expected, match="to be a whole safetensors file"):
        stored(str(a))


# --- audits inside -------------------------------------------------------------------------------------


def test_rounds_are_audited_at_the_weights_they_began_with(plan, tmp_path):
    some = replace(plan, seeds=1, epochs=1, client=gradient(batch=8), attack_rounds=(1, 5),
                   attacks=(dlg(outer=1, inner=4),), victims=2)  # fmt: skip
    rows, head, _ = run(some, tmp_path / "r")
    audits = [r for r in rows.values() if r["kind"] == "audit"]
    assert {(r["channel"], r["round"]) for r in audits} == {(c, n) for c in some.labels() for n in (1, 5)}
    assert all(math.isfinite(r["psnr"]) and r["image"] < 16 for r in audits)
    first = load_file(tmp_path / "r" / "models" / "0-0-round-1.safetensors")
    start, _ = CONV.init(random.generator(0, "params", 0))
    assert all(torch.equal(first[k], start[k]) for k in start)
    inner = read_run(tmp_path / "r" / "audits" / "1-0-round-5")
    assert inner["status"] == "done" and inner["summary"]
    assert all(set(s) >= SUMMARY for s in head["summary"])
    again, _, _ = run(some, tmp_path / "r")
    assert timeless(again) == timeless(rows)


def test_choices_size_and_estimate(plan):
    assert engine.size(plan) == ("epochs", 12)
    said = engine.choices(plan)
    assert said[1:] == ["4 jobs", "test set: its own test split"]
    found = engine.estimate(plan)
    assert found["cpu_s"] > 0 and found["bytes"] > 120 * 64 * 4

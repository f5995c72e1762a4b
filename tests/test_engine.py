"""Laws 5 and 6: controls are run and must be beaten; stopping at any moment loses nothing that was reported."""

import functools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import qleak
from qleak import engine, jobs, random
from qleak.attacks import cells, dlg
from qleak.catalog import build
from qleak.channels import chain, identity, uniform
from qleak.check import Expected
from qleak.client import gradient
from qleak.jobs import Done
from qleak.metrics import Secret
from qleak.plans import Audit
from qleak.scoring import score_group, summarise
from qleak.store import open_run, read_rows, read_run
from qleak.types import Guess, Status

ROOT = Path(next(iter(qleak.__path__))).parent
MODEL = build("models", "lenet(channels=1, size=8, classes=4, width=3)")
ROW = {
    "id", "model", "client", "channel", "attack", "control", "image", "seed", "status",
    "loss", "mse", "psnr", "ssim", "label_ok", "selected", "bits", "epsilon",
}  # fmt: skip
SUMMARY = {
    "channel", "attack", "control", "n", "psnr_selected", "psnr_oracle",
    "success_rate", "success_ci", "label_accuracy", "cpu_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    x = random.uniform(random.generator("images"), (6, 8, 8)).numpy()
    np.savez(path, x_train=x, y_train=np.arange(6) % 4)
    return str(path)


@pytest.fixture
def plan(data):
    return Audit(
        MODEL, data, victims=(0, 2), channels=(identity(), chain(uniform(levels=16))),
        attacks=(dlg(outer=1, inner=4), cells(stages=1, steps=3, last=2)), restarts=(3, 2), chunk=3,
    )  # fmt: skip


def opened(plan, folder):
    return open_run(folder, {"kind": plan.kind, "plan_id": plan.id})


def run(plan, folder, **options):
    with opened(plan, folder) as store:
        for _ in engine.run(plan, store, **options):
            pass
    return {r["key"]: r for r in read_rows(folder)}, read_run(folder)


def timeless(rows):
    return {k: {n: v for n, v in r.items() if n != "cpu_s"} for k, r in rows.items()}


# --- rows and summary ------------------------------------------------------------------------------


def test_an_audit_has_every_field_and_one_row_a_lane(plan, tmp_path):
    rows, header = run(plan, tmp_path / "r")
    assert all(set(r) >= ROW for r in rows.values())
    assert all(set(s) >= SUMMARY for s in header["summary"])
    lanes = [
        (plan.labels()[c.channel], c.attack, lane.control, plan.victims[lane.victim], lane.restart)
        for c in plan.chunks()
        for lane in c.lanes
    ]
    names = ["dlg(outer=1, inner=4)", "cells(stages=1, steps=3, last=2)"]
    got = [(r["channel"], names.index(r["attack"]), r["control"], r["image"], r["seed"]) for r in rows.values()]
    assert len(lanes) == len(set(lanes)) == 2 * 2 * (5 + 2 + 2)
    assert sorted(got) == sorted(lanes)
    for r in rows.values():
        assert r["id"] == plan.id
        assert r["status"] in Status.NAMES
        assert r["bits"] > (32 if r["channel"] == "fp32" else 4) - 1e-9
        assert r["epsilon"] is None
        assert not (r["success"] and r["control"] != "none")
    assert header["status"] == "done"
    arms = [(s["channel"], s["attack"], s["control"]) for s in header["summary"]]
    assert len(arms) == len(set(arms)) == 2 * 2 * 3
    assert {a[2] for a in arms} == {"none", "prior-only", "wrong-gradient"}
    for s in header["summary"]:
        assert s["n"] == (5 if s["control"] == "none" else 2)
        assert s["psnr_oracle"] >= s["psnr_selected"] - 1e-12
        assert s["success_ci"][0] <= s["success_rate"] <= s["success_ci"][1]


def test_exactly_one_restart_is_selected_by_its_own_loss(plan, tmp_path):
    rows, _ = run(plan, tmp_path / "r")
    groups: dict = {}
    for r in rows.values():
        groups.setdefault((r["channel"], r["attack"], r["control"], r["image"]), []).append(r)
    assert len(groups) == 2 * 2 * 3 * 2
    for mine in groups.values():
        chosen = [r for r in mine if r["selected"]]
        assert len(chosen) == 1
        assert chosen[0]["loss"] == min(r["loss"] for r in mine)


def test_a_wrong_gradient_lane_reads_the_neighbours_message(plan):
    prepared = engine.prepare(plan)
    for chunk in plan.chunks():
        job = engine.job_of(plan, prepared, chunk)
        for i, lane in enumerate(chunk.lanes):
            whose = 1 - lane.victim if lane.control == "wrong-gradient" else lane.victim
            for k, v in prepared.messages[chunk.channel][whose].code.items():
                assert torch.equal(job.message.code[k][i], v)
            assert chunk.evidence == (lane.control != "prior-only")


# --- scoring ---------------------------------------------------------------------------------------


def fabricated(plan, secret, noise, losses=None, status=None):
    """Done results with a guess at a chosen distance of the truth: `noise[control][victim][restart]`."""
    found = []
    for chunk in (c for c in plan.chunks() if (c.channel, c.attack) == (0, 0)):
        x = [secret.x[n.victim] + noise[n.control][n.victim][n.restart] for n in chunk.lanes]
        y = torch.stack([secret.y[n.victim] for n in chunk.lanes])
        own = [(losses or noise)[n.control][n.victim][n.restart] for n in chunk.lanes]
        state = torch.full((len(x),), Status.FINISHED if status is None else status)
        none = torch.zeros(0, len(x))
        guess = Guess(torch.stack(x), y, torch.tensor(own))
        found.append((chunk, Done(chunk.key, guess, state, torch.ones(len(x)).long(), none, none[:, 0].long(), 1.0)))
    return found


SHARP, BLURRED = 0.01, 0.3  # 40 dB and 10 dB


def scored(plan, noise, **options):
    secret = Secret(torch.full((2, 1, 1, 8, 8), 0.5), torch.zeros(2, 1, dtype=torch.int64))
    secret.x[:, :, :, ::2] += 0.1
    rows = score_group(plan, secret, 0, 0, 32.0, 32.0, None, fabricated(plan, secret, noise, **options))
    return {(r["control"], plan.victims.index(r["image"]), r["seed"]): r for r in rows}


def controls(prior, wrong):
    return {"none": [[SHARP, BLURRED, BLURRED], [SHARP, SHARP]], "prior-only": prior, "wrong-gradient": wrong}


def test_a_success_beats_the_threshold_and_both_controls(plan):
    low, high = [[BLURRED], [BLURRED]], [[SHARP / 2], [BLURRED]]
    rows = scored(plan, controls(low, low))
    assert [rows["none", 0, r]["success"] for r in range(3)] == [True, False, False]
    for prior, wrong in ((high, low), (low, high), (high, high)):
        rows = scored(plan, controls(prior, wrong))
        assert rows["none", 0, 0]["psnr"] > plan.success + 15
        assert not any(rows["none", 0, r]["success"] for r in range(3))  # a control of this image is better
        assert all(rows["none", 1, r]["success"] for r in range(2))  # the other image's are not
        assert not any(r["success"] for k, r in rows.items() if k[0] != "none")
    equal = scored(plan, controls([[SHARP], [SHARP]], low))
    assert not any(r["success"] for r in equal.values())


def test_the_threshold_counts(plan):
    low = [[BLURRED], [BLURRED]]
    assert scored(replace(plan, success=39.0), controls(low, low))["none", 0, 0]["success"]
    assert not scored(replace(plan, success=41.0), controls(low, low))["none", 0, 0]["success"]


def test_selection_looks_at_the_loss_and_not_at_the_truth(plan):
    low = [[BLURRED], [BLURRED]]
    noise = controls(low, low)
    losses = {**noise, "none": [[3.0, 2.0, 1.0], [1.0, float("inf")]]}
    rows = scored(plan, noise, losses=losses)
    assert [rows["none", 0, r]["selected"] for r in range(3)] == [False, False, True]
    assert [rows["none", 1, r]["selected"] for r in range(2)] == [True, False]
    assert rows["none", 1, 1]["loss"] is None
    summary = {s["control"]: s for s in summarise(plan, list(rows.values()))}
    arm = summary["none"]
    assert arm["psnr_oracle"] == pytest.approx(40, abs=0.1)
    assert arm["psnr_selected"] == pytest.approx((40 - 20 * np.log10(0.3)) / 2, abs=0.1)
    assert arm["success_rate"] == pytest.approx(3 / 5)
    assert summary["prior-only"]["success_rate"] == 0


def test_all_diverged_still_selects_one(plan):
    noise = controls([[BLURRED], [BLURRED]], [[BLURRED], [BLURRED]])
    inf = {k: [[float("inf")] * 3] * 2 for k in noise}
    rows = scored(plan, noise, losses=inf, status=Status.DIVERGED)
    assert sum(r["selected"] for r in rows.values()) == 3 * 2
    assert {r["status"] for r in rows.values()} == {"diverged"}


# --- stopping and going on -------------------------------------------------------------------------


def test_a_stopped_run_goes_on_where_it_was(plan, tmp_path, monkeypatch):
    wanted, _ = run(plan, tmp_path / "whole")
    with opened(plan, tmp_path / "r") as store:
        stream = engine.run(plan, store)
        for _ in stream:
            if sum(store.has(f"chunk-{c.key}") for c in plan.chunks()) >= 2:
                break
        stream.close()
        kept = {c.key for c in plan.chunks() if store.has(f"chunk-{c.key}")}
    assert 2 <= len(kept) < len(plan.chunks())
    started = []
    events = jobs.events
    monkeypatch.setattr(jobs, "events", lambda job: started.append(job.chunk.key) or events(job))
    rows, header = run(plan, tmp_path / "r")
    assert sorted(started) == sorted({c.key for c in plan.chunks()} - kept)
    assert timeless(rows) == timeless(wanted)
    assert header["status"] == "done"
    started.clear()
    again, header = run(plan, tmp_path / "r")  # a finished run runs nothing
    assert (started, again, header["status"]) == ([], rows, "done")


def test_a_lost_row_is_made_again_from_its_tensors(plan, tmp_path, monkeypatch):
    wanted, _ = run(plan, tmp_path / "r")
    path = tmp_path / "r" / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    monkeypatch.setattr(jobs, "events", lambda job: pytest.fail("ran again"))
    rows, _ = run(plan, tmp_path / "r")
    assert rows == wanted
    assert len(path.read_bytes().splitlines()) == len(lines)


def test_a_stored_message_is_read_and_not_made_again(plan, tmp_path):
    """Law 1: attacks read the stored message; a client that would answer otherwise today changes nothing."""
    wanted, _ = run(plan, tmp_path / "r")
    with opened(plan, tmp_path / "r") as store:
        messages = {k: v + 0 for k, v in store.load("messages-0").items()}
        assert len(messages) == 2 * 8  # two victims, eight tensors
        for c in plan.chunks():
            (tmp_path / "r" / "tensors" / f"chunk-{c.key}.safetensors").unlink()
    (tmp_path / "r" / "rows.jsonl").write_bytes(b"")
    assert timeless(run(plan, tmp_path / "r")[0]) == timeless(wanted)


RECIPE = '''"""A slow little audit. It claims nothing."""

from qleak.catalog import build
from qleak.plans import Audit


def little(steps: int = 60) -> Audit:
    """The plan.

    Args:
        steps: closures.
    """
    return Audit(
        model=build("models", "lenet(channels=1, size=8, classes=4, width=3)"), data="DATA", victims=(0, 2),
        channels=(build("channels", "identity"), build("channels", "chain(uniform(levels=16))")),
        attacks=(build("attacks", f"idlg(outer={steps}, inner=1, tolerance=0.0)"),), restarts=3, chunk=2,
    )
'''


def command(tmp_path, data):
    recipe = tmp_path / "little.py"
    recipe.write_text(RECIPE.replace("DATA", data))
    code = "from qleak.cli import main; main()"
    return [
        sys.executable, "-W", "ignore", "-c", code, "recipe", "run", str(recipe), "--out", str(tmp_path / "runs"),
        "--workers", "1", "--device", "cpu", "--bounds", "no", "--quiet",
    ]  # fmt: skip


@pytest.fixture
def start():
    """Starts a command in a process of its own; none outlives the test."""
    running = []

    def go(argv):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # Under a shell's `&` SIGINT comes ignored, and Python then never raises KeyboardInterrupt.
        awake = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        running.append(subprocess.Popen(argv, env=environment, text=True, preexec_fn=awake, **pipes))
        return running[-1]

    yield go
    for process in running:
        process.kill()
        process.communicate()


def until_chunks(process, tmp_path, count):
    """Blocks until so many chunks are on disk; returns their names and modification times."""
    while True:
        found = list((tmp_path / "runs").glob("*/tensors/chunk-*.safetensors"))
        if len(found) >= count:
            return {p.name: p.stat().st_mtime_ns for p in found}
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"ended before it could be stopped: {process.returncode} {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_the_same_command_completes_a_stopped_run(how, tmp_path, data, start, qleak):
    argv = command(tmp_path, data)
    process = start(argv)
    kept = until_chunks(process, tmp_path, 1)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    (folder,) = (tmp_path / "runs").iterdir()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert err.startswith("qleak: interrupted;")
        assert len(err.strip().splitlines()) == 1
        assert read_run(folder)["status"] == "interrupted"
    else:
        assert process.returncode == -signal.SIGKILL
        assert read_run(folder)["status"] == "running"
    before = len(read_rows(folder))
    assert before < 2 * (3 * 2 + 2 + 2)
    code, out, err = qleak(*argv[argv.index("recipe") :])
    assert code == 0, out + err
    header, rows = read_run(folder), read_rows(folder)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    assert header["status"] == "done"
    assert len(lines) == len(rows) == len({json.loads(x)["key"] for x in lines}) == 2 * (3 * 2 + 2 + 2)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [folder.name]
    for name, written in kept.items():  # what was saved was not run again
        assert (folder / "tensors" / name).stat().st_mtime_ns == written


# --- bad input -------------------------------------------------------------------------------------


def refused(plan) -> str:
    with pytest.raises(Expected) as caught:
        engine.prepare(plan)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_nan_image_is_one_line(plan, tmp_path):
    x = np.full((4, 8, 8), 0.5, dtype=np.float32)
    x[1, 2, 3] = np.nan
    np.savez(tmp_path / "nan.npz", x_train=x, y_train=np.arange(4))
    text = refused(replace(plan, data=str(tmp_path / "nan.npz")))
    assert "to be finite: 1 of 256 entries are NaN or infinite." in text


@pytest.mark.parametrize("victim", [-1, 6, 10**9])
def test_a_victim_out_of_range_is_one_line(plan, victim):
    text = refused(replace(plan, victims=(victim,), restarts=1))
    assert text == f"Expected victim {victim} in 0 … 5 of data {plan.data!r}."


def test_a_batch_must_fit_behind_its_first_victim(plan):
    text = refused(replace(plan, victims=(5,), restarts=1, client=gradient(2)))
    assert text == f"Expected victim 5 in 0 … 4 of data {plan.data!r}."


def test_a_model_of_another_shape_is_one_line(plan):
    text = refused(replace(plan, model=build("models", "lenet(channels=3, size=32)")))
    assert text == f"Expected data {plan.data!r} of shape (3, 32, 32) for this model, got (1, 8, 8)."


def test_labels_that_do_not_fit_are_one_line(plan):
    few = build("models", "lenet(channels=1, size=8, classes=2, width=3)")
    assert refused(replace(plan, model=few)) == "Expected labels in 0 … 1, got 2 … 2."


def test_an_audit_whose_attacks_all_refuse_is_one_line(plan, tmp_path):
    gelu = build("models", "lenet(channels=1, size=8, classes=4, width=3, function='gelu')")
    only = replace(plan, model=gelu, attacks=(build("attacks", "closed_form"),))
    with pytest.raises(
        Expected, match=r"^Expected at least one attack that applies: closed_form needs .*layer 2 is gelu\.$"
    ):
        run(only, tmp_path / "r")
    rows, header = run(replace(only, attacks=(*only.attacks, dlg(outer=1, inner=2))), tmp_path / "both")
    assert {r["attack"] for r in rows.values()} == {"dlg(outer=1, inner=2)"}
    assert [r["attack"] for r in header["refused"]] == ["closed_form"] * 2

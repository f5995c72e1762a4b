"""One command rebuilds what a script saved that knows nothing of qleak; its exit codes and its document hold."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from captures import SHAPE, gradients, images, module

from qleak.check import Expected
from qleak.cli import audit as command
from qleak.models.adapted import adapted
from qleak.models.lenet import lenet

QUICK = ["--attacks", "closed_form", "--workers", "1"]


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """update.pt, half.pt, weights.pt and truth.npz beside net.py, by plain torch and numpy."""
    folder = tmp_path_factory.mktemp("cli")
    net = module(folder)
    x, y = images(1)
    update = gradients(net, x, y)
    torch.save([p.grad for p in net.parameters()], folder / "update.pt")
    torch.save({k: v.half() for k, v in update.items()}, folder / "half.pt")
    torch.save(net.state_dict(), folder / "weights.pt")
    np.savez(folder / "truth.npz", x=x.numpy(), y=y.numpy())
    return folder


def line(folder, update="update.pt", *more):
    shape = ",".join(map(str, SHAPE))
    model = ["--model", f"{folder}/net.py:LeNet", "--weights", str(folder / "weights.pt"), "--shape", shape]
    return ["audit", str(folder / update), *model, "--classes", "10", "--out", str(folder / "runs"), *more]


def test_one_command_rebuilds_what_a_script_saved(held, qleak):
    code, out, _ = qleak(*line(held, "update.pt", "--name", "one", *QUICK))
    assert code == 0 and "Verdict: images rebuilt" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    for part in ("Match:", "Channel:", "Batch:", "closed_form", "decoy"):
        assert part in out
    folder = held / "runs" / "one"
    assert {"run.json", "rows.jsonl", "tensors", "report.html"} <= {p.name for p in folder.iterdir()}
    again = (folder / "rows.jsonl").read_bytes()
    assert qleak(*line(held, "update.pt", "--name", "one", *QUICK))[0] == 0
    assert (folder / "rows.jsonl").read_bytes() == again
    assert qleak("report", str(folder))[0] == 0


def test_half_precision_is_read_through_its_rounding(held, qleak):
    truth = [
        "--truth",
        str(held / "truth.npz"),
        "--json",
        "--workers",
        "1",
        "--attacks",
        "refine(stages=1, steps=20, last=40)",
    ]
    code, out, _ = qleak(*line(held, "half.pt", "--budget", "3s", *truth))
    found = json.loads(out)
    assert code == 0 and found["schema"] == "qleak.audit/1" and found["match"]["dtype"] == "float16"
    assert found["verdict"] == "images rebuilt" and found["images"][0]["psnr_db"] > 20
    assert found["self_check"]["as_described"]


def test_fail_above_exits_3_with_and_without_the_truth(held, qleak):
    truth = ["--truth", str(held / "truth.npz")]
    code, _, err = qleak(*line(held, "update.pt", "--fail-above", "18", "--quiet", *truth, *QUICK))
    assert code == 3 and "exceeds --fail-above 18" in err
    code, _, err = qleak(*line(held, "update.pt", "--fail-above", "140", "--quiet", *truth, *QUICK))
    assert code == 0
    code, _, err = qleak(*line(held, "update.pt", "--fail-above", "18", "--quiet", *QUICK))
    assert code == 3 and "no --truth" in err


def test_what_cannot_be_read_is_one_line_and_exit_2(held, qleak):
    (held / "broken.pt").write_bytes(b"PK\x03\x04 this is no archive")
    (held / "text.npz").write_text("hello", encoding="utf-8")
    for args in (
        line(held, "broken.pt"), line(held, "text.npz"), line(held, "missing.pt"), line(held, "update.pt", "--budget", "soon"),
        line(held, "update.pt", "--labels", "three"), line(held, "update.pt", "--labels", "12"),
        line(held, "update.pt", "--name", "a/b"), line(held, "update.pt", "--normalise", "imagnet"),
        line(held, "update.pt", "--truth", str(held / "text.npz")), line(held, "update.pt", "--truth", "mnist5k:9999"),
    ):  # fmt: skip
        code, out, err = qleak(*args, "--quiet")
        assert code == 2, (args, err)
        assert err.startswith("qleak: Expected") or "Unknown" in err
        assert len(err.strip().splitlines()) == 1 and not out and len(err) < 500


def test_flags_are_read(held):
    assert [command.duration(t) for t in ("60", "90s", "2m", "1.5h")] == [60, 90, 120, 5400]
    assert command.triple("3,32,32") == command.triple("3x32x32") == (3, 32, 32) and command.triple("") is None
    for wrong in ("0s", "-1", "5 days", ""):
        with pytest.raises(Expected, match="--budget"):
            command.duration(wrong)
    with pytest.raises(Expected, match="--shape"):
        command.triple("3,32")


def test_an_adapted_net_is_the_net_behind_its_normalisation():
    from qleak import random

    base = lenet(1, 8, 4, width=3)
    net = adapted(base, (0.5,), (0.25,), held=("fc.bias",))
    x = random.uniform(random.generator("adapted"), (2, 1, 8, 8))
    params, buffers = net.init(random.generator(0))
    whole, _ = base.init(random.generator(0))
    assert list(params) == [k for k in whole if k != "fc.bias"]
    assert torch.allclose(net.apply(params, buffers, x), base.apply(whole, {}, (x - 0.5) / 0.25))
    for wrong in ({"mean": (0.5,)}, {"std": (0.0,), "mean": (0.5,)}, {"mean": (0.1, 0.2), "std": (1.0, 1.0)}):
        with pytest.raises(Expected):
            adapted(base, **wrong)
    with pytest.raises(Expected, match="no 'nothing'"):
        adapted(base, held=("nothing",)).init(random.generator(0))


@pytest.mark.slow
def test_kill_9_loses_nothing_and_ctrl_c_exits_130(held, qleak):
    """A run killed after its first chunk goes on with the same plan; one interrupted says so."""
    args = [
        sys.executable,
        "-c",
        "from qleak.cli import main; main()",
        *line(held, "update.pt", "--name", "killed", "--budget", "3s"),
    ]
    args += ["--workers", "1"]
    folder = held / "runs" / "killed"
    for what in (signal.SIGKILL, signal.SIGINT):
        child = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.time()
        for _ in range(1200):
            header = folder / "run.json"
            begun = header.exists() and header.stat().st_mtime > started  # the engine has written its status
            if begun and (
                what == signal.SIGINT or (folder / "tensors" / "chunk-0-wrong-gradient.safetensors").exists()
            ):
                break
            time.sleep(0.1)
        child.send_signal(what)
        child.wait(timeout=60)
        assert child.returncode == (-9 if what == signal.SIGKILL else 130)
        plan = json.loads((folder / "run.json").read_text(encoding="utf-8"))["plan_id"]
    code, out, err = qleak(*args[3:], "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["plan_id"] == plan and document["verdict"] == "images rebuilt"

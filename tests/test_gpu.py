"""The benchmark of `just gpu`, its functions run on the CPU; what needs CUDA skips. And replayed graphs, read-back."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from qleak.attacks import dlg
from qleak.attacks.device import graphed, read_back

ROOT = Path(__file__).parent.parent / "benchmarks"
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu = load("gpu")


@pytest.mark.parametrize("net", gpu.NETS)
def test_the_closure_is_that_of_the_sequential_twin(net):
    """Autograd twice, one lane after another, on every net."""
    view = gpu.scene(net, 2, "cpu", torch.float64)
    start = gpu.starts(view, dlg())
    value, dx, dlogits = gpu.closure(view)(start["x"], start["logits"])
    for i in range(2):
        image, logits = start["x"][i].clone().requires_grad_(), start["logits"][i].clone().requires_grad_()
        alone = view.at(torch.tensor([i]))
        closure = load("bench").twin_closure(alone, image, logits)
        assert torch.allclose(closure(), value[i])
        assert torch.allclose(image.grad, dx[i])
        assert torch.allclose(logits.grad, dlogits[i])


@pytest.mark.parametrize("device", DEVICES)
def test_closures_and_iterates_agree(device):
    for net in gpu.NETS if device == "cuda" else ("MNIST LeNet",):
        assert max(gpu.same_closures(net, device).values()) < 1e-6
        assert gpu.same_iterates(net, device, steps=5) < 1e-5


def test_other_weights_on_one_side_are_seen(monkeypatch):
    """The broken variant: a device that changes the weights by 0.1 %."""
    true, calls = gpu.scene, []

    def scene(*args):
        view = true(*args)
        calls.append(args)
        if len(calls) % 2:
            view = view._replace(params={k: v * 1.001 for k, v in view.params.items()})
        return view

    monkeypatch.setattr(gpu, "scene", scene)
    assert gpu.same_closures("MNIST LeNet", "cpu")["value"] > 1e-4
    assert gpu.same_iterates("MNIST LeNet", "cpu", steps=3) > 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_an_audit_agrees_row_by_row(device):
    found = gpu.same_audit(device, outer=1, restarts=1)
    assert found["rows"] >= 12
    assert found["status"] == 0
    assert found["loss"] < 0.05
    assert found["psnr"] < 0.1
    assert (gpu.gap(None, None), gpu.gap(None, 1.0), gpu.gap(1.0, 3.0)) == (0, float("inf"), 2)


@pytest.mark.parametrize("device", DEVICES)
def test_rates_and_the_memory_model(device, capsys):
    rows = gpu.rates("MNIST LeNet", device, (1, 4, 16), seconds=0.05)
    assert [r["lanes"] for r in rows] == [1, 4, 16]
    assert all(r["steps_per_s"] > 0 and r["closures_per_s"] > 0 for r in rows)
    assert all(r["graph"].startswith("not replayed: inputs on cpu") for r in rows if device == "cpu")
    a, b = gpu.memory_model(rows)
    assert a + 16 * b == pytest.approx(rows[-1]["bytes"], rel=0.1)
    assert b > 3 * 784 * 4  # a lane holds more than three pictures
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_memory_model_is_a_line():
    rows = [{"lanes": n, "bytes": 1000 + 50 * n} for n in (1, 4, 16, 64)]
    assert gpu.memory_model(rows) == pytest.approx((1000, 50))
    assert gpu.memory_model(rows[:1]) == (1050, 0)


def test_lanes_that_do_not_fit_end_the_table(monkeypatch):
    def rate(net, lanes, device, seconds):
        if lanes > 4:
            raise torch.cuda.OutOfMemoryError("no")
        return {"net": net, "lanes": lanes, "bytes": 1, "steps_per_s": 1.0, "closures_per_s": 1.0, "graph": ""}

    monkeypatch.setattr(gpu, "rate", rate)
    assert [r["lanes"] for r in gpu.rates("MNIST LeNet", "cpu", (1, 4, 16, 64))] == [1, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    assert capsys.readouterr().out == "No CUDA device here: nothing was measured.\n"


# --- replayed graphs, read-back --------------------------------------------------------------------


def test_on_a_cpu_the_function_stays_as_it_is():
    def square(x):
        return (x * x,)

    found = graphed(square, [torch.ones(3)])
    assert found.call is square
    assert not found.replayed
    assert found.reason == "not replayed: inputs on cpu"
    assert not graphed(square, []).replayed


@CUDA
def test_a_replayed_closure_is_the_closure():
    view = gpu.scene("colour LeNet", 4, "cuda")
    start = gpu.starts(view, dlg())
    inputs = start["x"], start["logits"]
    replay = graphed(gpu.closure(view), inputs)
    assert replay.replayed, replay.reason
    first = replay.call(*inputs)
    second = replay.call(inputs[0] + 0.1, inputs[1])
    assert gpu.apart(second[0], first[0]) > 1e-3  # outputs are copies, inputs are read
    for a, b in zip(replay.call(*inputs), gpu.closure(view)(*inputs), strict=True):
        assert gpu.apart(a, b) < 1e-4
    fewer = gpu.closure(view.at(torch.arange(2, device="cuda")))
    assert gpu.apart(graphed(fewer, [v[:2] for v in inputs]).call(*[v[:2] for v in inputs])[0], first[0][:2]) < 1e-4


@CUDA
def test_what_cannot_be_recorded_runs_as_it_is():
    def looks(x):
        return (x * float(x.sum()),)

    found = graphed(looks, [torch.ones(3, device="cuda")])
    assert not found.replayed
    assert found.reason.startswith("not replayed: ")
    assert torch.equal(found.call(torch.ones(3, device="cuda"))[0].cpu(), torch.full((3,), 3.0))


@pytest.mark.parametrize("device", DEVICES)
def test_values_are_read_as_they_were(device):
    value = torch.arange(4.0, device=device, requires_grad=True)
    reading = read_back(value)
    with torch.no_grad():
        value.add_(1)
    assert reading.wanted().tolist() == [0, 1, 2, 3]
    assert reading.wanted().device.type == "cpu"

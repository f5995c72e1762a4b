"""The benchmarks run: their numbers come from what they say they time."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from qleak import pool, random

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def closures(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("closures")
    sys.modules.pop("closures", None)


def test_both_closures_are_of_one_function(closures):
    """The sequential one and a lane of the batched one, at the same guess."""
    seen = closures.view("lenet_mnist", 1)
    image = random.uniform(random.generator("guess"), (1, *seen.model.shape)).requires_grad_()
    logits = torch.zeros(1, seen.model.classes).requires_grad_()
    value = closures.bench.twin_closure(seen, image, logits)()
    objective = closures.objectives.objective(seen, "l2")
    t = torch.softmax(logits.detach(), -1)[None]
    found, dx, _ = closures.routes.closure(seen, objective)(
        image.detach()[None], t, closures.objectives.goal(seen, "l2")
    )
    torch.testing.assert_close(found[0], value, rtol=1e-4, atol=0)
    torch.testing.assert_close(dx[0], image.grad, rtol=1e-3, atol=1e-5)


def test_rates_have_every_lane_count(closures):
    found = closures.measure("lenet_mnist", [1, 4], repeats=1, least=0.01, cores=1)
    assert set(found["ratio"]) == {1, 4} and found["route"] == "structured"
    assert all(v["min"] <= v["median"] <= v["max"] for v in found["ratio"].values())
    # A closure costs six passes of about one forward pass each: 2 FLOP a product of 0.39 M products.
    assert 2 < found["mflop"] < 12


def test_the_exponent_of_a_power_is_found(closures):
    rates = {n: n / n**1.25 for n in (16, 32, 512)}
    assert closures.exponent(rates) == pytest.approx(1.25)


def test_a_kept_heap_changes_no_number():
    a = torch.arange(2**18, dtype=torch.float32)
    want = (a * 3).sum()
    pool.keep_heap()
    assert torch.equal((a * 3).sum(), want)


def test_a_step_is_timed_with_both_kinds_of_kernels(closures, monkeypatch):
    steps = importlib.import_module("steps")
    asked = []
    monkeypatch.setattr(steps.native, "serves", lambda x: asked.append(1) or False)
    found = steps.measure(1, turns=1, least=0.0)
    sys.modules.pop("steps", None)
    assert set(found) == {"torch", "compiled"}
    assert all(set(v) == set(steps.PARTS) and min(v.values()) > 0 for v in found.values())
    assert asked  # "compiled" asks whether there are kernels; "torch" does not

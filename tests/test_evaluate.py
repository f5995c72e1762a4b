"""FGSM and PGD stay in their balls and do what they say; `qleak evaluate` counts right."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from qleak import data, engine, models, random, train
from qleak.catalog import build
from qleak.channels import identity
from qleak.check import Expected
from qleak.cli.evaluate import Attacked, measured
from qleak.client import gradient
from qleak.metrics import wilson
from qleak.plans import Training
from qleak.store import open_run
from qleak.train import adversarial, split
from qleak.train.adversarial import fgsm, pgd, robust, starts

LENET = build("models", "lenet-mnist")
PARAMS, BUFFERS = LENET.init(random.generator(0))


@pytest.fixture(scope="module")
def digits():
    return split.spread(data.load("mnist5k"), 200)


def linear(shape=(1, 4, 4), classes=3):
    """logits = W·x: its worst case in a ball is known in closed form."""
    model = models.mlp(1, 4, classes, hidden=())
    params, buffers = model.init(random.generator("linear"))
    return model, params, buffers


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_images_stay_in_the_ball_and_in_the_pixel_range(digits, attack, norm):
    x, y = digits.x[:40], digits.y[:40]
    epsilon = 0.1 if norm == "linf" else 1.5
    start = starts(random.generator("start"), x, epsilon, norm)
    size = (lambda d: d.abs().flatten(1).amax(1)) if norm == "linf" else (lambda d: d.flatten(1).norm(dim=1))
    assert float(size(start).max()) <= epsilon * (1 + 1e-6) and float(size(start).min()) > 0
    if attack == "fgsm":
        moved = fgsm(LENET, PARAMS, BUFFERS, x, y, epsilon, norm)
    else:
        moved = pgd(LENET, PARAMS, BUFFERS, x, y, start, epsilon, steps=5, norm=norm)
    assert float(moved.min()) >= 0 and float(moved.max()) <= 1
    assert float(size(moved - x).max()) <= epsilon * (1 + 1e-5)
    assert float(size(moved - x).min()) > 0.3 * epsilon
    loss = [F.cross_entropy(LENET.apply(PARAMS, BUFFERS, v), y).item() for v in (x, moved)]
    assert loss[1] > loss[0]


def test_starts_fill_the_ball():
    """In a ball of dimension d, E‖δ‖ = ε·d/(d+1); in a cube every coordinate has variance ε²/3."""
    x = torch.full((4000, 1, 2, 2), 0.5)
    round_ = starts(random.generator("l2"), x, 0.3, "l2").flatten(1).norm(dim=1)
    assert abs(round_.mean() / 0.3 - 4 / 5) < 4 * float(round_.std()) / 0.3 / 4000**0.5
    cube = starts(random.generator("linf"), x, 0.3)
    assert float(cube.var()) == pytest.approx(0.03, rel=0.05)


def test_fgsm_is_the_sign_of_the_slope():
    model, params, buffers = linear()
    x, y = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 2])
    x_ = x.clone().requires_grad_()
    F.cross_entropy(model.apply(params, buffers, x_), y).backward()
    expected = x + 0.05 * x_.grad.sign()
    torch.testing.assert_close(fgsm(model, params, buffers, x, y, 0.05), expected)
    direction = x_.grad / x_.grad.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(fgsm(model, params, buffers, x, y, 0.05, "l2"), x + 0.05 * direction)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_finds_the_closed_form_worst_case_of_a_linear_net(norm):
    """Two classes: the margin falls by exactly ε·‖w₁ − w₀‖ of the dual norm, and PGD errs just there."""
    model, params, buffers = linear(classes=2)
    weight, bias = params["fc1.weight"], params["fc1.bias"]
    w, b = weight[0] - weight[1], float(bias[0] - bias[1])
    x = torch.full((1, 1, 4, 4), 0.5)
    margin = float(w @ x.flatten()) + b
    y = torch.tensor([0 if margin > 0 else 1])
    dual = float(w.abs().sum()) if norm == "linf" else float(w.norm())
    needed = abs(margin) / dual
    for factor, stands in ((0.97, True), (1.03, False)):
        kept = robust(model, params, buffers, x, y, "pgd", needed * factor, steps=200, norm=norm)
        assert kept.tolist() == [stands]


def test_epsilon_zero_is_clean_accuracy_exactly(digits):
    clean = train.accuracy(LENET, PARAMS, BUFFERS, digits)
    for attack in ("fgsm", "pgd"):
        for norm in ("linf", "l2"):
            kept = robust(LENET, PARAMS, BUFFERS, digits.x, digits.y, attack, 0.0, steps=3, norm=norm)
            assert float(kept.double().mean()) == clean
    moved = pgd(LENET, PARAMS, BUFFERS, digits.x, digits.y, torch.zeros_like(digits.x), 0.0, 3, norm="l2")
    assert moved.equal(digits.x)


def test_pgd_is_at_least_as_strong_as_fgsm_and_restarts_only_help(digits):
    def accuracy(*how, **options):
        return float(robust(LENET, PARAMS, BUFFERS, digits.x, digits.y, *how, **options).double().mean())

    clean = train.accuracy(LENET, PARAMS, BUFFERS, digits)
    one = accuracy("fgsm", 0.1)
    many = accuracy("pgd", 0.1, steps=40)
    assert many <= one < clean
    curve = [accuracy("pgd", e, steps=10) for e in (0.0, 0.03, 0.06, 0.1)]
    assert curve == sorted(curve, reverse=True) and curve[-1] < curve[0]
    first = robust(LENET, PARAMS, BUFFERS, digits.x, digits.y, "pgd", 0.07, steps=2, restarts=1)
    three = robust(LENET, PARAMS, BUFFERS, digits.x, digits.y, "pgd", 0.07, steps=2, restarts=3)
    assert bool((three <= first).all())
    again = robust(LENET, PARAMS, BUFFERS, digits.x, digits.y, "pgd", 0.07, steps=2, restarts=3)
    assert again.equal(three)


def test_refusals(digits):
    x, y = digits.x[:2], digits.y[:2]
    for options, message in (
        ({"attack": "cw"}, "attack='cw' to be one of: apgd, apgd-dlr, fgsm, pgd"),
        ({"epsilon": -1.0}, "epsilon=-1.0 >= 0"),
        ({"epsilon": 8.0}, r"epsilon=8 in \[0, 1\], in units of the pixel range"),
        ({"norm": "l1"}, "norm='l1' to be one of: l2, linf"),
        ({"steps": 0}, "steps=0 >= 1"),
        ({"step_size": 0.0}, "step_size=0.0 > 0"),
        ({"restarts": 0}, "restarts=0 >= 1"),
    ):
        with pytest.raises(Expected, match=message):
            robust(LENET, PARAMS, BUFFERS, x, y, **options)


def test_a_net_of_nans_is_never_robust(digits):
    broken = {k: v * torch.nan for k, v in PARAMS.items()}
    assert not robust(LENET, broken, BUFFERS, digits.x[:5], torch.zeros(5, dtype=torch.int64)).any()
    assert not adversarial.correct(LENET, broken, BUFFERS, digits.x[:5], torch.zeros(5, dtype=torch.int64)).any()


# --- the command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    model = models.mlp(hidden=(16,))
    plan = Training(model, "mnist5k", (identity(),), gradient(50), epochs=2, seeds=2, limit=500)
    with open_run(folder, {"kind": plan.kind, "plan_id": plan.id, "plan": plan.as_json()}) as store:
        list(engine.run(plan, store))
    return folder, store.rows()


def test_evaluate_repeats_the_runs_own_test_accuracy(run):
    folder, rows = run
    for name, key in ((folder, "0-0-2"), (folder / "0-1", "0-1-2")):
        (row,) = measured(str(name), "", "test", 0, Attacked())["rows"]
        expected = next(r for r in rows if r["key"] == key)["test_accuracy"]
        assert row["accuracy"] == expected and row["n"] == 1000
        assert row["accuracy_ci"] == list(wilson(round(expected * 1000), 1000))


def test_evaluate_prints_one_table_or_json(run, qleak, monkeypatch):
    folder, _ = run
    monkeypatch.setenv("COLUMNS", "200")
    code, _, err = qleak("evaluate", "small", "--limit", "100", "--attack", "pgd", "--epsilon", "0.05", "--json")
    assert code == 2 and err.startswith("qleak: Expected a run's folder")
    common = ("--limit", "100", "--attack", "pgd", "--epsilon", "0.05", "--steps", "5", "--restarts", "2")
    code, out, err = qleak("evaluate", folder, *common, "--json")
    assert code == 0, err
    found = json.loads(out)
    clean, robust_ = found["rows"]
    assert found["data"] == "mnist5k" and "every fifth image" in found["split"] and found["epsilon"] == 0.05
    assert clean["attack"] == "none" and clean["n"] == robust_["n"] == 100
    assert robust_["accuracy"] < clean["accuracy"]
    low, high = robust_["accuracy_ci"]
    assert low <= robust_["accuracy"] <= high
    out = qleak("evaluate", folder, *common)[1]
    assert "pgd-5 linf ε=0.05, 2 starts" in out and f"{clean['accuracy']:.2%}" in out


def test_evaluate_takes_a_models_name_too():
    found = measured("lenet-mnist", "mnist5k", "train", 500, Attacked("fgsm", epsilon=0.0))
    assert [r["accuracy"] for r in found["rows"]] == [found["rows"][0]["accuracy"]] * 2
    assert found["rows"][0]["accuracy"] > 0.97 and found["model"] == "lenet_mnist()"
    for arguments, message in (
        (("lenet-mnist", "", "test", 0, Attacked()), "Expected --data SET"),
        (("lenet-mnist", "photos", "train", 0, Attacked()), r"got \(3, 32, 32\)"),
        (("lenet-mnist", "mnist5k", "test", -1, Attacked()), "limit=-1 >= 0"),
        (("lenet-mnist", "mnist5k", "test", 0, Attacked("none")._replace(attack="x")), "attack='x' to be one of"),
        (("nowhere", "", "test", 0, Attacked()), "Expected a run's folder"),
    ):
        with pytest.raises(Expected, match=message):
            measured(*arguments)


def test_replaced_models_are_not_confused(run):
    """The evaluated weights are the file's, whatever the model's own init would draw."""
    model = build("models", f"run:{run[0]}")
    drawn, _ = replace(model, init=models.mlp(hidden=(16,)).init).init(random.generator(0))
    kept, _ = model.init(random.generator(0))
    assert not torch.equal(drawn["fc1.weight"], kept["fc1.weight"])

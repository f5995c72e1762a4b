"""APGD against PGD on a trained net, and its parts one by one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from qleak import data, random
from qleak.catalog import build
from qleak.check import Expected
from qleak.cli.evaluate import Attacked, measured
from qleak.models import lenet5, mlp
from qleak.train import adversarial, autopgd, split

NET = build("models", "lenet-mnist")
PARAMS, BUFFERS = NET.init(random.generator(0))


@pytest.fixture(scope="module")
def digits():
    return split.spread(data.load("mnist5k"), 100)


def test_checkpoints_are_those_of_the_paper():
    assert autopgd.checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert autopgd.checkpoints(1) == [0]
    for steps in (2, 7, 20, 50):
        marks = autopgd.checkpoints(steps)
        assert marks[0] == 0 and marks == sorted(set(marks)) and marks[-1] < steps


def test_the_difference_of_logits_ratio():
    z = torch.tensor([[4.0, 1.0, 2.0, 0.0], [1.0, 3.0, 2.5, 2.0]], dtype=torch.float64)
    y = torch.tensor([0, 2])
    assert torch.allclose(autopgd.dlr(z, y), torch.tensor([-(4 - 2) / (4 - 1), -(2.5 - 3) / (3 - 2)]).double())
    assert torch.allclose(autopgd.dlr(7 * z + 3, y), autopgd.dlr(z, y))
    assert (autopgd.dlr(z, y) > 0).tolist() == (z.argmax(1) != y).tolist()
    with pytest.raises(Expected, match="classes"):
        net = mlp(1, 28, 2, hidden=())
        p, b = net.init(random.generator(0))
        x = torch.zeros(1, 1, 28, 28)
        autopgd.apgd(net, p, b, x, torch.zeros(1, dtype=torch.int64), x, loss="dlr")


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_images_stay_in_ball_and_box_and_gain(digits, loss):
    x, y = digits.x[:20], digits.y[:20]
    start = adversarial.starts(random.generator("start"), x, 0.1)
    moved = autopgd.apgd(NET, PARAMS, BUFFERS, x, y, start, 0.1, 15, loss)
    assert float((moved - x).abs().max()) <= 0.1 + 1e-6 and float(moved.min()) >= 0 and float(moved.max()) <= 1
    losses = [autopgd.LOSSES[loss](NET.apply(PARAMS, BUFFERS, v), y) for v in (x, moved)]
    assert (losses[1] >= losses[0]).all() and float(losses[1].mean()) > float(losses[0].mean()) + 0.1


def attacked(name, digits, **options):
    spec = f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})"
    return build("evasions", spec).stands(NET, PARAMS, BUFFERS, digits.x, digits.y, 0)


def test_it_breaks_at_least_what_pgd_breaks(digits):
    for epsilon in (0.03, 0.06):
        plain = attacked("pgd", digits, epsilon=epsilon, steps=20, step_size=0.01)
        strong = attacked("apgd", digits, epsilon=epsilon, steps=20)
        assert 0.05 < float(strong.double().mean()) < 0.95
        assert int(strong.sum()) <= int(plain.sum())


def test_the_ensemble_is_no_weaker_than_its_members(digits):
    some = split.spread(digits, 50)
    whole = attacked("ensemble", some, epsilon=0.1, steps=10, restarts=1)
    for name, options in {
        "apgd": {"steps": 10}, "apgd ": {"steps": 10, "loss": "dlr"}, "pgd": {"steps": 10, "step_size": 0.025},
    }.items():  # fmt: skip
        assert not (whole & ~attacked(name.strip(), some, epsilon=0.1, **options)).any()
    assert int(attacked("fgsm", some, epsilon=0.1).sum()) >= int(whole.sum())


def test_a_step_that_never_halves_is_told_apart(digits, monkeypatch):
    """With η = 2ε for ever the search hops between corners of the ball: the loss it reaches is lower."""
    x, y = digits.x, digits.y
    start = adversarial.starts(random.generator("start"), x, 0.02)

    def reached():
        moved = autopgd.apgd(NET, PARAMS, BUFFERS, x, y, start, 0.02, 30)
        stands = adversarial.correct(NET, PARAMS, BUFFERS, moved, y)
        return F.cross_entropy(NET.apply(PARAMS, BUFFERS, moved), y, reduction="none")[stands].double().mean()

    right = reached()
    monkeypatch.setattr(autopgd, "checkpoints", lambda steps: [0])
    assert float(reached()) < float(right)


def test_coupled_images_are_attacked_as_a_batch():
    net = lenet5(size=16, function="relu", pool="max", norm="batch")
    params, buffers = net.init(random.generator(0))
    x = random.uniform(random.generator("x"), (16, 1, 16, 16))
    y = net.apply(params, buffers, x).argmax(1)  # all right as they are
    sizes = []

    def apply(p, b, v):
        sizes.append(len(v))
        return net.apply(p, b, v)

    for attack in ("pgd", "apgd"):
        stands = adversarial.robust(replace(net, apply=apply), params, buffers, x, y, attack, 0.2, 5)
        assert set(sizes) == {16} and int(stands.sum()) < 16


def test_the_command_line_knows_it():
    found = measured("lenet-mnist", "mnist5k", "train", 20, Attacked("apgd", 0.1, 5))
    assert (
        found["rows"][1]["attack"].startswith("apgd-5") and found["rows"][1]["accuracy"] <= found["rows"][0]["accuracy"]
    )
    with pytest.raises(Expected, match="linf"):
        measured("lenet-mnist", "mnist5k", "train", 20, Attacked("apgd", 0.1, 5, norm="l2"))

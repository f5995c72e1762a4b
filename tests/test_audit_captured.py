"""A captured update is read, matched, checked against the truth, attacked within a budget, and judged honestly."""

import json
from dataclasses import replace

import pytest
import torch
from captures import SHAPE, gradients, images, module

import qleak
from qleak import engine, random, store
from qleak.adapters import audit as adapter
from qleak.adapters import captured, files, given, self_check
from qleak.adapters.given import Request
from qleak.catalog import build
from qleak.check import Expected
from qleak.models.traced import layers_of
from qleak.report import captured as report


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured")
    return folder, module(folder), *images(1)


def audited(net, update, **options):
    return qleak.audit(update, net, shape=SHAPE, **{"budget": 3, "attacks": "closed_form"} | options)


@pytest.fixture(scope="module")
def plain(held):
    """The choice made without any option, on a list of gradients: closed form, and cells from random starts."""
    _, net, x, y = held
    return qleak.audit(list(gradients(net, x, y).values()), net, shape=SHAPE, budget=1.5)


def test_a_plain_modules_gradient_list_is_rebuilt_and_two_kinds_of_starts_agree(held, plain):
    _, _, x, _ = held
    assert plain.verdict == "images rebuilt" and plain.document["basis"] == "agreement"
    assert {r["attack"].split("(")[0] for r in plain.rows} == {"closed_form", "cells"}
    assert float((plain.images - x).square().mean()) < 1e-4
    controls = [r["residual"] for r in plain.rows if r["control"] != "none"]
    assert plain.document["residual"] < min(controls) / 100
    assert {r["control"] for r in plain.rows} == {"none", "prior-only", "wrong-gradient"}


def test_the_page_shows_everything_and_the_document_keeps_its_schema(plain, tmp_path):
    page = plain._repr_html_()
    for part in ("What the verdict rests on", "What this cannot say", "decoy", "Match", "Channel", "data:image/png"):
        assert part in page
    saved = plain.save(tmp_path / "kept")
    assert (saved / "report.html").stat().st_size > 10_000
    document = json.loads(json.dumps(plain.document))
    assert document["schema"] == "qleak.audit/1"
    listed = (qleak_docs() / "audit-your-own.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in listed for key in document)
    with pytest.raises(Expected, match="no folder"):
        plain.save(saved)


def qleak_docs():
    from pathlib import Path

    return Path(__file__).parent.parent / "docs"


@pytest.mark.slow  # test_readme runs the block as well, without its verdict
def test_the_documented_lines_run(held, tmp_path, monkeypatch, capsys):
    """The Python block of docs/audit-your-own.md, word for word."""
    text = (qleak_docs() / "audit-your-own.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(code, "docs", "exec"), scope)
    assert scope["report"].verdict == "images rebuilt"
    assert "Verdict: images rebuilt" in capsys.readouterr().out
    assert (tmp_path / "runs" / "my-audit" / "report.html").exists()


def test_names_in_another_order_and_foreign_buffers_change_nothing(held):
    _, net, x, y = held
    update = gradients(net, x, y)
    shuffled = {f"module.{k}": update[k] for k in sorted(update, reverse=True)}
    shuffled["bn.running_mean"] = torch.zeros(4)
    found = audited(net, shuffled)
    assert found.verdict == "images rebuilt" and float((found.images - x).abs().max()) < 1e-2


def test_missing_biases_leave_the_rest_to_the_attack(held):
    _, net, x, y = held
    update = {k: v for k, v in gradients(net, x, y).items() if not k.endswith("conv1.bias")}
    found = audited(
        net, update, attacks="cells(stages=1, weight=0.001, steps=40, last=80)", restarts=1, truth=(x, y), budget=3
    )
    assert found.document["match"]["missing"] == ["conv1.bias"]
    assert found.verdict == "images rebuilt" and found.document["images"][0]["psnr_db"] > 20


def test_ranks_behind_a_coarse_code_bound_no_batch(held):
    """One image through 8 bits: the last layer's gradient has full rank, of rounding errors alone."""
    _, net, x, y = held
    update, channel = gradients(net, x, y), build("channels", "chain(uniform(levels=256))")
    message = channel.send(
        channel.knobs(), update, channel.draw(random.generator(0), update), channel.init(update), update
    )[0][-1]
    coarse = channel.receive(channel.knobs(), message, update)
    assert int(torch.linalg.matrix_rank(coarse["fc.weight"])) > 5
    ready = captured.prepared(Request(coarse, net, shape=SHAPE, attacks="refine", budget=1.0))
    assert ready.plan.client.batch == 1 and ready.about["channel"]["used"] == "uniform(levels=256)"
    assert "refine" in ready.plan.attacks[0].spec and ready.message.code["fc.weight"].shape == coarse["fc.weight"].shape


def test_numbers_of_another_update_are_no_success(held):
    """Noise of the update's size per tensor: nothing is found, and it is said to prove nothing."""
    _, net, x, y = held
    noise = {
        k: random.normal(random.generator("noise", k), v.shape) * v.std(correction=0)
        for k, v in gradients(net, x, y).items()
    }
    found = audited(net, noise)
    assert found.verdict == "nothing found (not a proof)" and not found.document["rebuilt"]
    assert "no proof" in " ".join(found.document["cannot_say"])


def test_the_truth_decides_where_it_is_there(held):
    _, net, x, y = held
    other, _ = images(2)
    update = gradients(net, x, y)
    assert audited(net, update, truth=(x, y)).verdict == "images rebuilt"
    wrong = audited(net, update, truth=(other[1:], y))
    assert wrong.verdict == "nothing found (not a proof)"
    assert "NOT reproduce" in report.checked(wrong.document["self_check"])


def check(update, net, x, y, **options):
    ask = Request(update, net, shape=SHAPE, truth=(x, y), attacks="closed_form", budget=5.0, **options)
    return captured.prepared(ask)


def said(ready):
    return report.checked(ready.about["self_check"])


def test_the_self_check_names_a_summed_loss_and_a_weight_difference(held):
    _, net, _, _ = held
    x, y = images(3)
    mean = gradients(net, x, y)
    assert "reproduces the update" in said(check(mean, net, x, y))
    summed = check(gradients(net, x, y, "sum"), net, x, y)
    assert "summed over 3 images" in said(summed) and summed.plan.client.scale == pytest.approx(3, rel=1e-4)
    stepped = check({k: -0.05 * v for k, v in mean.items()}, net, x, y)
    assert "-0.05 × the mean gradient (new weights minus old ones)" in said(stepped)
    assert stepped.plan.client.scale == pytest.approx(0.05, rel=1e-4)
    assert torch.allclose(stepped.update["fc.bias"], 0.05 * mean["fc.bias"], atol=1e-7)


def test_the_self_check_names_mode_normalisation_and_label_order(held):
    folder, net, _, _ = held
    x, y = images(3)
    normed = module(folder, "Normed")
    normed.train()
    trained = gradients(normed, x, y)
    fresh = module(folder, "Normed")
    assert "batch norm by the batch (train mode)" in said(check(trained, fresh, x, y))
    assert "reproduces the update" in said(check(gradients(fresh.eval(), x, y), fresh, x, y))
    normal = check(gradients(net, (x - 0.1307) / 0.3081, y), net, x, y)
    assert "MNIST's mean and deviation" in said(normal) and "0.1307" in normal.plan.model.spec
    swapped = check(gradients(net, x, y), net, x, y.flip(0))
    assert "labels in the order 3, 4, 5" in said(swapped) and swapped.truth.y.tolist() == y.tolist()


def test_a_self_check_that_compared_nothing_would_be_seen(held):
    """Every reading but the right one misses by far: the tolerance is not what makes readings fit."""
    _, net, _, _ = held
    x, y = images(3)
    tried = check(gradients(net, (x - 0.1307) / 0.3081, y), net, x, y).about["self_check"]["readings"]
    assert [r["name"] for r in tried if r["fits"]] == ["images normalised by MNIST's mean and deviation"]
    assert min(r["scaled"] for r in tried if not r["fits"]) > 20 * self_check.EXACT


def test_an_interrupted_run_goes_on_with_its_own_plan(held, tmp_path):
    _, net, x, y = held
    ask = Request(gradients(net, x, y), net, shape=SHAPE, batch=1, budget=0.5)
    with adapter.opened(ask, tmp_path / "run", {}) as (plan, run):
        events = engine.run(plan, run)
        while not any(run.has(f"chunk-{c.key}") for c in plan.chunks()):
            next(events)
        events.close()
        before = (tmp_path / "run" / "tensors" / "chunk-0-none.safetensors").read_bytes()
    with adapter.opened(ask, tmp_path / "run", {}) as (again, run):
        assert again.id == plan.id and run.resumed
        assert len(list(engine.run(again, run))) >= 2
        assert store.read_run(tmp_path / "run")["status"] == "done"
    assert (tmp_path / "run" / "tensors" / "chunk-0-none.safetensors").read_bytes() == before
    assert len(store.read_rows(tmp_path / "run")) == sum(len(c.lanes) for c in plan.chunks())


def test_a_chain_is_read_off_a_module_and_nothing_else_is(held):
    folder, net, _, _ = held
    layers = layers_of(net, SHAPE)
    assert [n.kind for n in layers] == ["conv", "activation", "conv", "activation", "flatten", "linear"]
    normed = layers_of(module(folder, "Normed"), SHAPE)
    assert [n.kind for n in normed or ()] == ["conv", "norm", "activation", "flatten", "linear"]

    class Skips(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x.flatten(1))
            return self.b(torch.sigmoid(h)) + h

    assert layers_of(Skips(), (1, 2, 2)) is None


def test_a_net_with_pooling_and_a_norm_is_attacked_by_cells(held):
    """Declared layers are not all solvable: the closed form stands back, and says nothing wrong of the batch."""
    x, y = images(1)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5, 1, 2), torch.nn.GroupNorm(2, 8), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(),
        torch.nn.Linear(8 * 36, 10),
    )  # fmt: skip
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(random.uniform(random.generator("pooled", name), p.shape) - 0.5)
    assert {"pool", "norm"} < {n.kind for n in layers_of(net, SHAPE) or ()}
    found = qleak.audit(gradients(net, x, y), net, shape=SHAPE, truth=(x, y), budget=2)
    assert {r["attack"].split("(")[0] for r in found.rows} == {"cells"}
    assert found.document["batch"]["least"] == found.document["batch"]["most"] == 1
    assert found.document["self_check"]["as_described"]
    assert found.document["residual"] < 0.7 * found.document["controls"]["residual"]


def test_what_is_held_fixed_and_what_the_weights_do_not_hold_is_said(held):
    folder, _, x, y = held
    net = module(folder)
    net.conv1.requires_grad_(False)
    net.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    update = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    whole = net.state_dict()
    trained = {k: v for k, v in whole.items() if k in update}
    for weights, missing in ((whole, False), (trained, True)):
        ready = captured.prepared(Request(update, net, weights, shape=SHAPE, attacks="closed_form", budget=1.0))
        text = dict(report.known({**ready.about}))["Match"]
        assert "Held fixed, as no update names them: conv1.weight, conv1.bias." in text
        assert ("holds no conv1.weight, conv1.bias" in text) is missing


@pytest.mark.parametrize("prefix", ["", "module."])
def test_running_statistics_go_to_the_norm_of_their_own_name(prefix):
    """`0.bn.running_mean` ends like `bn.running_mean`: each norm gets its own, in whatever order and behind any prefix."""
    statistics = ("bn.running_mean", "bn.running_var", "0.bn.running_mean", "0.bn.running_var")
    values = {k: torch.full((4,), float(i)) for i, k in enumerate(statistics)}
    buffers = {k: torch.zeros(4) for k in statistics}
    for names in (statistics, reversed(statistics)):
        tensors = {prefix + k: values[k] for k in names} | {f"{prefix}fc.weight": torch.ones(2, 4)}
        file = files.Captured(tensors, False, {}, "memory")
        _, found = given.weights_of(file, {"fc.weight": torch.zeros(2, 4)}, buffers)
        assert all(torch.equal(found[k], values[k]) for k in statistics)
        assert given.held(file, buffers) == []


def test_what_does_not_fit_is_said_in_one_line(held):
    _, net, x, y = held
    update = gradients(net, x, y)
    for options, words in (
        ({"truth": (x[:, :, :5], y)}, "shape"),
        ({"truth": (x, y), "batch": 2}, "2 images of truth"),
        ({"labels": (3, 4)}, "labels"),
        ({"client": "local_sgd(steps=2)", "scale": 0.1}, "--scale"),
    ):
        with pytest.raises(Expected, match=words) as error:
            audited(net, update, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(Expected, match="other than zero"):
        audited(net, {k: 0 * v for k, v in update.items()})
    with pytest.raises(Expected, match="NaN"):
        audited(net, {k: v / 0 for k, v in update.items()})


def test_a_code_that_leaves_the_image_open_is_not_called_rebuilt(held):
    """The rules on numbers alone: an explained decoy that is another picture takes an explained guess's worth away."""
    from qleak.engine import explained

    row = {"attack": "a", "restart": 0, "residual": 1e-4, "explained": True, "variation": 0.1, "labels": [3], "key": "k",
           "control": "none", "closures": 1, "steps": 1, "cut": False, "cpu_s": 0.0, "agreement": None}  # fmt: skip
    best = explained.Lane(torch.zeros(1, 1, 4, 4), torch.tensor([3]), row, ("solved",))
    decoy = row | {"control": "wrong-gradient", "own_residual": 1e-4, "own_psnr": [40.0]}
    plan = replace_plan()
    levels = {"control": 1.0, "floor": 0.0, "bar": 0.1}
    assert explained._verdict(plan, best, [best], [row, decoy], **levels)["verdict"] == "images rebuilt"
    wrong = decoy | {"own_psnr": [9.0]}
    assert explained._verdict(plan, best, [best], [row, wrong], **levels)["verdict"] == "partly"
    assert explained._verdict(plan, best, [best], [row], **levels)["verdict"] == "partly"
    lost = explained.Lane(best.x, best.labels, row | {"explained": False}, best.start)
    assert explained._verdict(plan, lost, [lost], [row, decoy], **levels)["verdict"].startswith("nothing found")


def replace_plan():
    from qleak.plans import Captured

    base = Captured(build("models", "lenet"), "", (build("channels", "chain()"),), (build("attacks", "closed_form"),))
    return replace(base, success=20.0)

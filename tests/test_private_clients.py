"""Rows of one forward pass, adversarial images, noise on the weights: each against a loop, and what they may not claim."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from qleak import random, tree
from qleak.accounting import claimed
from qleak.catalog import build
from qleak.channels import chain, clip_l2, gaussian, laplace, mean, total
from qleak.check import Expected
from qleak.client import adversarial, crowd, gradient, per_example, per_loss, reasons, weight_noise
from qleak.client.perturb import KEY, SCALE, noisy
from qleak.engine import training
from qleak.models import lenet5, mlp
from qleak.plans import Audit, Training
from qleak.private import fused
from qleak.store import open_run
from qleak.train import sgd

B = 5
COUPLED = lenet5(size=16, function="relu", pool="max", norm="batch")
PLAIN = lenet5(size=16, function="relu", pool="max")


def setting(model, b=B):
    params, buffers = model.init(random.generator(0))
    x = random.uniform(random.generator("x"), (b, 1, 16, 16)).double()
    return tree.to(params, torch.float64), buffers, x, torch.arange(b) % 10


def drawn(client, model, b=B, lr=0.1):
    found = client.draw(random.generator("draw"), model, b, lr)
    return {k: v.double() if v.is_floating_point() else v for k, v in found.items()}


def loop(model, params, buffers, x, y):
    """Gradients of single losses by the graph that is kept: what the original does."""
    free = {k: v.clone().requires_grad_() for k, v in params.items()}
    losses = F.cross_entropy(model.apply(free, buffers, x), y, reduction="none")
    each = [torch.autograd.grad(one, list(free.values()), retain_graph=True) for one in losses]
    return {k: torch.stack([g[i] for g in each]) for i, k in enumerate(params)}


def near(a, b, atol=1e-10):
    return all(torch.allclose(a[k], b[k], atol=atol) for k in b)


def test_rows_of_one_forward_pass_are_the_loop_with_the_kept_graph():
    for b in (1, B, 11):  # 11: more than a chunk
        for model in (COUPLED, PLAIN):
            if b > 1 or model is PLAIN:
                params, buffers, x, y = setting(model, b)
                assert near(per_loss(b).update(model, params, buffers, x, y), loop(model, params, buffers, x, y))
    params, buffers, x, y = setting(PLAIN)
    assert near(per_loss(B).update(PLAIN, params, buffers, x, y), per_example(B).update(PLAIN, params, buffers, x, y))
    empty = per_loss(B).update(PLAIN, params, buffers, x[:0], y[:0])
    assert all(v.shape == (0, *params[k].shape) for k, v in empty.items())
    assert not fused.is_per_example(per_loss(B)) and fused.is_per_example(adversarial(per_example(B)))


def ascended(model, buffers, x, y, at, epsilon, size, steps, start=None):
    """Madry's loop with autograd; `at(k)` gives the weights of step k."""
    z = (x + start).clamp(0, 1) if start is not None else x.clone()
    for k in range(steps):
        z = z.detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model.apply(at(k), buffers, z), y), z)
        z = (z.detach() + size * g.sign()).clamp(x - epsilon, x + epsilon).clamp(0, 1)
    return z.detach()


@pytest.mark.parametrize("model", [PLAIN, COUPLED])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_adversarial_images_are_those_of_the_loop(model, start):
    client = adversarial(per_loss(B), epsilon=0.05, step_size=0.02, steps=4, start=start)
    params, buffers, x, y = setting(model)
    draws = drawn(client, model)
    assert ("adversarial/start" in draws) == (start == "random")
    at, moved = client.prepare(model, params, buffers, x, y, draws)
    first = draws.get("adversarial/start")
    wanted = ascended(model, buffers, x, y, lambda k: params, 0.05, 0.02, 4, first)
    assert torch.allclose(moved, wanted, atol=1e-10) and at is params
    assert float((moved - x).abs().max()) <= 0.05 + 1e-12 and 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert float((moved - x).abs().max()) > 0.04
    losses = [F.cross_entropy(model.apply(params, buffers, v), y) for v in (x, moved)]
    assert losses[1] > losses[0]
    rows = client.update(model, params, buffers, x, y, draws)
    assert near(rows, loop(model, params, buffers, wanted, y))  # no gradient flows through the images


def test_adversarial_images_under_vmap():
    client = adversarial(per_example(B), steps=3)
    params, buffers, x, y = setting(PLAIN)
    other = {k: 0.9 * v for k, v in params.items()}
    stacked = tree.stack([params, other])
    lanes = vmap(lambda p: client.update(PLAIN, p, buffers, x, y, {}), randomness="error")(stacked)
    for i, p in enumerate((params, other)):
        assert near(tree.at(lanes, i), client.update(PLAIN, p, buffers, x, y, {}))


def test_noise_on_the_weights_has_the_scale_of_the_original():
    for root in (True, False):
        client = weight_noise(per_loss(16), 10.0, 3.1, root)
        params, buffers, x, y = setting(PLAIN, 16)
        draws = drawn(client, PLAIN, 16, lr=0.01)
        s = 0.01 * 3.1 * 10 / (4 if root else 16)
        assert float(draws[SCALE]) == pytest.approx(s)
        at, moved = client.prepare(PLAIN, params, buffers, x, y, draws)
        change = tree.ravel(tree.sub(at, params))[0]
        n = change.numel()
        assert abs(float(change.mean())) < 5 * s / math.sqrt(n)
        assert float(change.std()) == pytest.approx(s, rel=5 / math.sqrt(2 * n))
        assert torch.equal(moved, x)
        # One draw for the batch, and the gradient at the noisy weights for the clean ones.
        assert near(client.update(PLAIN, params, buffers, x, y, draws), loop(PLAIN, at, buffers, x, y))
    again = client.draw(random.generator("another"), PLAIN, 16, 0.01)
    assert int(again[KEY]) != int(draws[KEY])


@pytest.mark.parametrize("inside", [True, False])
def test_every_inner_step_has_noise_of_its_own(inside):
    pgd = {"epsilon": 0.05, "step_size": 0.02, "steps": 3}
    inner, outer = adversarial(per_loss(B), **pgd), adversarial(weight_noise(per_loss(B), 2.0), **pgd)
    client = weight_noise(inner, 2.0) if inside else outer
    params, buffers, x, y = setting(COUPLED)
    draws = drawn(client, COUPLED)
    at, moved = client.prepare(COUPLED, params, buffers, x, y, draws)
    noise = [tree.ravel(tree.sub(noisy(params, draws, k), params))[0] for k in range(4)]
    for i in range(4):
        for j in range(i):
            assert abs(float(torch.corrcoef(torch.stack([noise[i], noise[j]]))[0, 1])) < 0.05
    wanted = ascended(COUPLED, buffers, x, y, lambda k: noisy(params, draws, 1 + k), 0.05, 0.02, 3)
    assert torch.allclose(moved, wanted, atol=1e-10) and near(at, noisy(params, draws, 0))
    same = ascended(COUPLED, buffers, x, y, lambda k: params, 0.05, 0.02, 3)
    assert not torch.allclose(moved, same, atol=1e-3)


def test_clients_are_written_down_and_built_again():
    for client in (
        per_loss(),
        adversarial(),
        weight_noise(),
        weight_noise(adversarial(per_loss(8), steps=2), root=False),
    ):
        assert build("clients", client.spec).spec == client.spec
    with pytest.raises(Expected, match="once"):
        weight_noise(weight_noise())


NOISY = (chain(clip_l2(1.0), total(), gaussian(1.0)), chain(clip_l2(1.0), total(), laplace(scale=0.1, unbounded=True)))


def test_a_promise_that_cannot_be_kept_is_refused():
    net = mlp(1, 28, 10, hidden=(4,))
    flat = lenet5(norm="batch")
    for make in (
        lambda c, m: Training(m, "mnist5k", NOISY[:1], c), lambda c, m: Audit(m, "mnist5k", (0,), NOISY[:1], (build("attacks", "dlg"),), c),
    ):  # fmt: skip
        with pytest.raises(Expected, match=r"no guarantee: weight noise .* take per_example"):
            make(weight_noise(per_example(4)), net)
        for client in (per_loss(4), per_example(4), adversarial(crowd(gradient(2), 2))):
            with pytest.raises(Expected, match="no guarantee: batch norm"):
                make(client, flat)
            make(client, net)
        make(crowd(gradient(2), 2), flat)  # a row is a client here, who may do with his batch what he likes
    Training(flat, "mnist5k", NOISY[1:], per_loss(4))
    said = reasons(weight_noise(per_loss(4)), flat, "replacement")
    assert len(said) == 3 and not reasons(per_loss(4), net)


def test_seeds_train_together_as_they_do_apart(tmp_path):
    client = weight_noise(adversarial(per_example(10), steps=2, start="random"), 2.0)
    found = []
    for how in ("loop", "vmap"):
        plan = Training(
            mlp(1, 28, 10, hidden=(4,)), "mnist5k", (chain(clip_l2(1.0), total(), mean(10)),), client, epochs=1,
            epoch_rounds=2, seeds=2, limit=40, lanes=how, dtype="float64",
        )  # fmt: skip
        with open_run(tmp_path / how, plan.header()) as run:
            list(training.run(plan, run))
            rows = run.rows()
        found.append({r["key"]: r["test_loss"] for r in rows})
    assert found[0].keys() == found[1].keys()
    assert all(found[0][k] == pytest.approx(found[1][k], rel=1e-9) for k in found[0])


def test_rows_of_weight_noise_have_a_claim_and_no_epsilon(tmp_path):
    client = weight_noise(adversarial(per_loss(20), steps=1), 5.0)
    plan = Training(
        lenet5(function="relu", pool="max", norm="batch"), "mnist5k", (chain(clip_l2(3.1), total(), mean(20)),), client,
        sampling="replacement", epochs=1, epoch_rounds=2, rule=sgd(momentum=0.9), seeds=1, limit=40,
        robust=build("evasions", "fgsm"), robust_images=20,
    )  # fmt: skip
    assert "weight noise" in plan.lines()["no guarantee"]
    assert any(c.startswith("no guarantee: batch norm") for c in training.choices(plan))
    with open_run(tmp_path / "run", plan.header()) as run:
        list(training.run(plan, run))
        rows, summary = run.rows(), run.header["summary"]
    assert [r["epsilon"] for r in rows] == [None, None]
    assert rows[0]["claimed_epsilon"] is None
    assert rows[1]["claimed_epsilon"] == pytest.approx(claimed(5.0, "20/40", 2))
    assert summary[0]["claimed_epsilon"] == rows[1]["claimed_epsilon"] and summary[0]["epsilon"] is None
    assert summary[0]["robust_accuracy"] == rows[1]["robust_accuracy"]

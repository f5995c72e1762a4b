"""Levenberg–Marquardt: its linear algebra against dense matrices, its steps against what the theory promises."""

from dataclasses import replace

import pytest
import torch
from torch.func import jacrev, vmap

from qleak import random, tree
from qleak.attacks import gauss_newton, priors, second_order
from qleak.attacks.drive import drive
from qleak.attacks.second_order import levenberg_marquardt
from qleak.catalog import build
from qleak.channels import chain, gaussian, identity, sign, stochastic, uniform
from qleak.check import Expected
from qleak.client import View, gradient, local_sgd
from qleak.metrics import psnr
from qleak.types import Message, Status

LENET = "lenet(channels=1, size=8, classes=4, width=3)"


def smooth(size, seed):
    """A picture without sharp edges."""
    coarse = random.normal(random.generator("picture", seed), (1, 1, 3, 3))
    return torch.sigmoid(1.5 * torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=True))


def scene(spec=LENET, channel=None, lanes=1, client=None, dtype=torch.float32):
    """(view, images `[lane 1 c h w]`, labels `[lane 1]`) of a net with drawn weights."""
    model, channel, client = build("models", spec), channel or identity(), client or gradient()
    params = tree.to(model.init(random.generator(0, "params"))[0], dtype)
    x = torch.stack([smooth(model.shape[1], i).expand(client.batch, *model.shape) for i in range(lanes)]).to(dtype)
    y = torch.tensor([[i % model.classes] * client.batch for i in range(lanes)])
    sent = []
    for i in range(lanes):
        noise = channel.draw(random.generator("noise", i), params, ())
        update = client.update(model, params, {}, x[i], y[i])
        sent.append(channel.send(channel.knobs(), update, noise, channel.init(params), params)[0][-1])
    return View(model, params, {}, channel, client, tree.nested_map(lambda *t: torch.stack(t), *sent)), x, y


def begun(attack, view, seed=0):
    start = tree.stack([attack.draw(random.generator("start", seed, i), view) for i in range(view.lanes)])
    return tree.to(start, next(iter(view.params.values())).dtype)


def attacked(attack, view):
    *_, (guess, status, _) = drive(attack, view, begun(attack, view), every=1)
    return guess, status


# --- linear algebra --------------------------------------------------------------------------------


def curved(x):
    """A smooth map `[lane 4] -> [lane 6]`."""
    a = torch.arange(24.0, dtype=torch.float64).reshape(6, 4).sin()
    return torch.tanh(x @ a.mT) + (x @ a.mT).square()


def test_push_and_pull_are_the_jacobian_and_its_transpose():
    x, v = (random.normal(random.generator(n), (3, 4)).double() for n in "xv")
    w = random.normal(random.generator("w"), (3, 6)).double()
    local = gauss_newton.linearize(curved, x)
    dense = vmap(jacrev(lambda one: curved(one[None])[0]))(x)
    assert torch.allclose(local.value, curved(x))
    for _ in range(2):  # the graphs are kept
        assert torch.allclose(local.push(v), torch.einsum("ldn,ln->ld", dense, v))
        assert torch.allclose(local.pull(w), torch.einsum("ldn,ld->ln", dense, w))


def test_the_solve_is_that_of_the_dense_matrix():
    """With mask, prior and a damping of its own in every lane; and one iteration is not enough."""
    x, g = (random.normal(random.generator(n), (3, 4)).double() for n in "xg")
    local, dense = gauss_newton.linearize(curved, x), vmap(jacrev(lambda one: curved(one[None])[0]))(x)
    weight = (random.uniform(random.generator("m"), (3, 6)) > 0.4).double()
    damping = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    half = torch.einsum("ldn,ld,ldm->lnm", dense, weight, dense) + 0.3 * torch.eye(4).double()
    expected = torch.linalg.solve(half + damping[:, None, None] * torch.eye(4).double(), -g)
    found, early = (gauss_newton.solve(local, weight, lambda p: 0.3 * p, g, damping, n, 1e-12) for n in (8, 1))
    assert torch.allclose(found, expected)
    assert not torch.allclose(early, expected, rtol=1e-2)
    # what the gain ratio builds on, true of every iterate: δᵀ(H + λ)δ = −gᵀδ
    bent = torch.einsum("lnm,lm->ln", half, early) + damping[:, None] * early
    assert torch.allclose((early * bent).sum(1), -(g * early).sum(1))


def test_smoothing_is_half_the_gradient_of_total_variation():
    x = random.uniform(random.generator("x"), (2, 1, 3, 5, 4)).double()
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad((weight * vmap(priors.total_variation)(leaf)).sum(), leaf)
    smoothing = gauss_newton.smoothing(x, weight)
    assert torch.allclose(2 * smoothing(x), slope)
    p = random.normal(random.generator("p"), x.shape).double()
    assert float((p * smoothing(p)).sum()) > 0
    assert not gauss_newton.smoothing(x[..., :1, :1], weight)(p[..., :1, :1]).any()  # one pixel has no neighbours


# --- the attack ------------------------------------------------------------------------------------


def test_an_exact_gradient_comes_back():
    view, x, y = scene(dtype=torch.float64)
    guess, status = attacked(levenberg_marquardt(weight=1e-3, stages=2, last=25, gain=0.0), view)
    assert float(psnr(guess.x[0].float(), x[0].float())) > 60
    assert torch.equal(guess.labels, y)
    assert status.tolist() == [Status.FINISHED]


def test_another_message_gives_another_image():
    """The broken variant: weights that are not the client's."""
    view, x, _ = scene()
    other = view.model.init(random.generator(1, "params"))[0]
    guess, _ = attacked(levenberg_marquardt(weight=1e-3, stages=1, last=10), view._replace(params=other))
    assert float(psnr(guess.x[0], x[0])) < 20


def test_a_code_is_met_up_to_its_cells():
    """16 levels: the residual counts outside the cell only, and the guess is better than with decoded numbers as truth."""
    view, x, _ = scene(channel=chain(uniform(levels=16)))
    attack = levenberg_marquardt(stages=3, last=3, iterations=20, gain=0.0)
    guess, _ = attacked(attack, view)
    decoded = view.decoded()  # the same numbers taken at face value: no cell, every residual counts
    face, _ = attacked(attack, view._replace(channel=identity(), message=Message(decoded, ())))
    print(float(psnr(guess.x[0], x[0])), float(psnr(face.x[0], x[0])), guess.loss, face.loss)
    assert float(guess.loss[0]) < 0.1 * float(face.loss[0])
    assert float(psnr(guess.x[0], x[0])) > float(psnr(face.x[0], x[0]))


def test_a_step_is_kept_only_if_it_lowers_the_objective():
    """λ shrinks after good steps and grows after rejected ones, which leave the guess where it was."""
    view, *_ = scene(lanes=2)
    attack = levenberg_marquardt(stages=1, steps=12, settle=0.0, tau=1e-8)
    state = attack.init(view, begun(attack, view))
    taken = rejected = 0
    for _ in range(12):
        before = state
        state, info = attack.step(view, state)
        if bool((state.stage != before.stage).any()):
            break
        for lane in range(2):
            if before.damping[lane] == 0:
                continue
            if torch.equal(state.x[lane], before.x[lane]):
                rejected += 1
                assert state.damping[lane] == before.damping[lane] * before.growth[lane]
                assert state.growth[lane] == 2 * before.growth[lane]
            else:
                taken += 1
                assert info.loss[lane] < before.loss[lane]
                assert before.damping[lane] / 3.01 <= state.damping[lane] <= 2 * before.damping[lane]
    assert taken
    assert rejected


def test_a_lane_is_the_same_alone_and_beside_others():
    view, *_ = scene(lanes=3, dtype=torch.float64)
    attack = levenberg_marquardt(stages=1, steps=3, last=3, iterations=5)
    start = begun(attack, view)
    crowd = attack.init(view, start)
    alone = attack.init(view.at(torch.tensor([1])), tree.at(start, slice(1, 2)))
    for _ in range(5):
        crowd, _ = attack.step(view, crowd)
        alone, _ = attack.step(view.at(torch.tensor([1])), alone)
    assert torch.allclose(crowd.x[1], alone.x[0], rtol=1e-9, atol=1e-12)


def test_lanes_that_are_done_stand_still():
    view, *_ = scene(lanes=2)
    attack = levenberg_marquardt(stages=1, steps=2, last=2, iterations=3)
    state = attack.init(view, begun(attack, view))
    state = state._replace(status=torch.tensor([Status.FINISHED, Status.ACTIVE]))
    after, _ = attack.step(view, state)
    assert torch.equal(after.x[0], state.x[0])
    assert not torch.equal(after.x[1], state.x[1])
    still = after._replace(status=torch.full_like(after.status, Status.FINISHED))
    assert attack.step(view, still)[0] is still


def test_a_lane_of_nan_diverges_alone():
    view, *_ = scene(lanes=2)
    attack = levenberg_marquardt(stages=1, steps=2, last=2, iterations=3)
    start = begun(attack, view)
    start["x"][0, 0, 0, 0, 0] = torch.nan
    *_, (guess, status, _) = drive(attack, view, start, every=1)
    assert status.tolist() == [Status.DIVERGED, Status.FINISHED]
    assert bool(guess.x[1].isfinite().all())


@pytest.mark.parametrize(
    ("spec", "client"),
    [
        ("mlp(channels=1, size=6, classes=4, hidden=(12,))", gradient()),
        (LENET, local_sgd(2, batch=1)),
        (LENET, gradient(2)),
    ],
    ids=["mlp", "local_sgd", "labels-given"],
)
def test_other_clients_and_nets_take_the_same_steps(spec, client):
    view, _, y = scene(spec, client=client)
    view = view._replace(labels=y) if client.batch > 1 else view
    attack = levenberg_marquardt(stages=1, steps=2, last=2, iterations=4)
    assert attack.applies(view) == ""
    state = attack.init(view, begun(attack, view))
    losses = []
    for _ in range(2):
        state, info = attack.step(view, state)
        losses.append(float(info.loss[0]))
    assert losses[1] < losses[0] < 10


@pytest.mark.parametrize("layers", [True, False], ids=["declared", "unknown"])
def test_undeclared_nets_give_the_same_update(layers):
    view, *_ = scene(lanes=2, dtype=torch.float64)
    attack = levenberg_marquardt()
    state = attack.init(view, begun(attack, view))
    other = view if layers else view._replace(model=replace(view.model, layers=None))
    assert torch.allclose(second_order._update(other, state, state.x), second_order._update(view, state, state.x))


def test_without_evidence_only_the_prior_pulls():
    view, *_ = scene()
    attack = levenberg_marquardt(stages=1, steps=3, last=2, iterations=5)
    blind = view._replace(evidence=False)
    moved = {k: v if k == "fc.bias" else 3 * v + 1 for k, v in view.message.code.items()}
    other = blind._replace(message=view.message._replace(code=moved))
    first, second = attacked(attack, blind)[0], attacked(attack, other)[0]
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.x, attacked(attack, view)[0].x)


def test_what_cannot_be_used_is_said():
    attack = levenberg_marquardt()
    assert attack.applies(scene(channel=chain(uniform(levels=4)))[0]) == ""
    assert attack.applies(scene(channel=chain(stochastic(levels=16)))[0]) == ""
    headless = scene()[0]
    code = {k: v for k, v in headless.message.code.items() if not k.startswith("fc")}
    headless = headless._replace(
        message=headless.message._replace(code=code), params={k: headless.params[k] for k in code}
    )
    assert attack.applies(headless).startswith("needs a last linear layer")
    wrong = scene(channel=chain(gaussian(sigma=0.01, unbounded=True), sign()))[0]
    assert attack.applies(wrong).startswith("needs a message that pins the update to a box")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"steps": 0}, "Expected steps=0 >= 1."),
        ({"iterations": 1.5}, "Expected iterations=1.5 to be a whole number."),
        ({"tau": 0.0}, "Expected tau=0.0 > 0."),
        ({"start": "drak"}, "Expected start='drak' to be one of: dark, normal, uniform. Did you mean 'dark'?"),
    ],
)
def test_bad_arguments_are_one_line(arguments, text):
    with pytest.raises(Expected) as caught:
        levenberg_marquardt(**arguments)
    assert str(caught.value) == text

"""The later attacks: their optimizers, priors and clients against slow, obvious twins."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from qleak import engine, jobs, random, tree
from qleak.attacks import (
    adam,
    any_order,
    cells,
    inverting_gradients,
    levenberg_marquardt,
    one_gradient,
    penalties,
    see_through,
)
from qleak.attacks.drive import drive
from qleak.attacks.routes import closure, pick, update_of
from qleak.attacks.settings import STARTS
from qleak.catalog import build
from qleak.channels import chain, identity, mean, total
from qleak.check import Expected
from qleak.client import View, as_one_gradient, crowd, gradient, local_sgd, one_hot
from qleak.plans import Audit, from_json

NET = build("models", "lenet(channels=1, size=8, classes=4, width=3)")
NORMED = build("models", "resnet(depth=8, width=4, channels=1, size=8, classes=4)")


def batch(n, model=NET, dtype=torch.float64):
    x = random.uniform(random.generator("x", n), (n, *model.shape)).to(dtype)
    return x, torch.arange(n) % model.classes


def weights(model=NET, dtype=torch.float64):
    params, buffers = model.init(random.generator(0, "params"))
    return tree.to(params, dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in buffers.items()}


def view_of(client, model=NET, channel=None, lanes=1, **more):
    params, buffers = weights(model)
    channel, sent = channel or identity(), []
    for i in range(lanes):
        x, y = batch(client.batch + i, model)
        update = client.update(model, params, buffers, x[i:], y[i:])
        sent.append(
            channel.send(
                channel.knobs(),
                update,
                channel.draw(random.generator("c", i), params, (client.count,) * client.rows),
                channel.init(params),
                params,
            )[0][-1]
        )
    message = tree.nested_map(lambda *t: torch.stack(t), *sent)
    return View(model, params, buffers, channel, client, message, **more)


# --- optimizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["none", "hard"])
@pytest.mark.parametrize("schedule", ["constant", "steps", "cosine"])
def test_adam_takes_the_steps_of_torch(sign, schedule):
    steps, target = 16, torch.linspace(-1, 1, 5, dtype=torch.float64)
    x = torch.zeros(1, 5, dtype=torch.float64)
    ours = adam(0.1, sign=sign, schedule=schedule, total=steps)
    state = ours.init(x)
    theirs = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theirs], lr=0.1)
    decay = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "steps": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [6, 10, 14], 0.1),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    }[schedule]()
    for _ in range(steps):
        slope = 2 * (x - target) * torch.arange(1, 6)
        x, state = ours.update(state, x, x.sum(1), slope)
        theirs.grad = (2 * (theirs - target) * torch.arange(1, 6)).detach()
        theirs.grad = theirs.grad.sign() if sign == "hard" else theirs.grad
        optimizer.step()
        decay.step()
        torch.testing.assert_close(x[0], theirs.detach(), atol=1e-12, rtol=1e-9)


def test_a_soft_sign_is_hard_at_first_and_none_at_last():
    soft = adam(0.1, sign="soft", total=10)
    first = soft.update(soft.init(torch.zeros(1, 2)), torch.zeros(1, 2), torch.zeros(1), torch.tensor([[50.0, -80.0]]))[
        1
    ]
    torch.testing.assert_close(first.mean / 0.1, torch.tensor([[1.0, -1.0]]))
    late = soft.init(torch.zeros(1, 2))._replace(updates=torch.tensor([9.99]))
    moved = soft.update(late, torch.zeros(1, 2), torch.zeros(1), torch.tensor([[5.0, -8.0]]))[1]
    torch.testing.assert_close(moved.mean / 0.1, torch.tensor([[5.0, -8.0]]), atol=0.02, rtol=0)


def test_warmup_raises_the_step():
    slow = adam(1.0, warmup=4)
    x, state = torch.zeros(1, 1), slow.init(torch.zeros(1, 1))
    moves = []
    for _ in range(5):
        after, state = slow.update(state, x, x.sum(1), torch.ones(1, 1))
        moves.append(float(x - after))
        x = after
    assert moves == pytest.approx([0.25, 0.5, 0.75, 1, 1], abs=1e-3)


@pytest.mark.parametrize("text", ["adam(sign='soft')", "adam(schedule='steps')", "adam(sign='loud')"])
def test_a_schedule_without_an_end_is_one_line(text):
    with pytest.raises(Expected):
        build("attacks", text)


def test_counted_noise_is_normal_and_belongs_to_its_key():
    keys = torch.tensor([3, 4])
    noise = random.counted(keys, torch.tensor([7, 7]), 20000).double()
    assert (
        noise.mean().abs() < 0.02 and (noise.var() - 1).abs() < 0.03 and (noise**4).mean() == pytest.approx(3, abs=0.2)
    )
    assert abs(float((noise[0] * noise[1]).mean())) < 0.03
    alone = random.counted(keys[1:], torch.tensor([7]), 20000)
    assert torch.equal(alone[0].double(), noise[1])
    assert not torch.equal(random.counted(keys, torch.tensor([8, 7]), 20000)[0].double(), noise[0])


def test_patterns_repeat():
    x = STARTS["patterned4"](random.generator("p"), (2, 3, 10, 8))
    assert x.shape == (2, 3, 10, 8) and torch.equal(x[..., :4, :4], x[..., 4:8, 4:8]) and not torch.equal(x[0], x[1])


# --- penalties --------------------------------------------------------------------------------------


def test_variation_and_norm_by_hand():
    x = torch.tensor([[[[[0.0, 1.0], [3.0, 0.0]]]]])
    view = view_of(gradient())
    assert float(penalties.variation(view, x, x, 1)) == pytest.approx((1 + 3) / 2 + (3 + 1) / 2)
    assert float(penalties.norm(view, x, x, 1)) == pytest.approx(0.5 * 10 / 4)
    grey = torch.full((1, 1, 3, 4, 4), 0.3)
    assert float(penalties.double_opponents(view, grey, grey, 1)) == pytest.approx(1e-4, rel=1e-3)


def test_batch_statistics_count_only_where_they_are_shared():
    client = gradient(4)
    bare = view_of(client, NORMED)
    x, _ = batch(4, NORMED)
    other = x.flip(-1) * 0.5
    assert float(penalties.statistics(bare, other[None], other, 1)) == 0  # running means of 0 tell nothing
    true = NORMED.statistics(bare.params, bare.buffers, x)
    shared = bare._replace(statistics={k: v[None] for k, v in true.items()})
    assert float(penalties.statistics(shared, x[None], x, 1)) < 1e-4
    assert float(penalties.statistics(shared, other[None], other, 1)) > 0.1


def test_consistency_pulls_a_group_to_its_mean_and_stays_inside_it():
    x = torch.tensor([0.0, 2.0, 5.0, 5.0]).view(4, 1, 1, 1, 1)
    view = view_of(gradient())
    assert penalties.consistency(view, x, x, 2).tolist() == [1, 1, 0, 0]


def test_a_group_is_one_lane():
    attack = see_through(steps=6, group=3)
    view = view_of(gradient(), lanes=2)
    start = tree.to(tree.stack([attack.draw(random.generator("s", i), view) for i in range(2)]), torch.float64)
    *_, (both, _, _) = drive(attack, view, start, every=2)
    lane = torch.tensor([1])
    *_, (alone, _, _) = drive(attack, view.at(lane), tree.at(start, lane), every=2)
    torch.testing.assert_close(both.x[1:], alone.x, atol=1e-9, rtol=1e-9)
    assert both.x.shape == (2, 1, 1, 8, 8)


def test_pixels_are_clamped():
    attack = inverting_gradients(steps=4)
    view = view_of(gradient())
    start = tree.to(tree.stack([attack.draw(random.generator("s"), view)]), torch.float64)
    assert float(start["x"].min()) < 0
    state = attack.init(view, start)
    for _ in range(2):
        state, _ = attack.step(view, state)
    assert 0 <= float(state.x.min()) <= float(state.x.max()) <= 1


# --- clients ----------------------------------------------------------------------------------------


def sgd_by_torch(client, momentum, lr, x, y):
    params = {k: v.clone().requires_grad_() for k, v in weights()[0].items()}
    optimizer = torch.optim.SGD(params.values(), lr=lr, momentum=momentum)
    parts = list(zip(x.split(client.part), y.split(client.part), strict=True))
    for step in range(client.steps):
        optimizer.zero_grad()
        some, labels = parts[step % len(parts)]
        F.cross_entropy(NET.apply(params, {}, some), labels).backward()
        optimizer.step()
    return {k: v - params[k].detach() for k, v in weights()[0].items()}


@pytest.mark.parametrize(("epochs", "momentum"), [(0, 0.0), (2, 0.0), (0, 0.9), (2, 0.5)])
def test_local_sgd_is_torchs(epochs, momentum):
    client = local_sgd(steps=3, epochs=epochs, batch=2, lr=0.1, momentum=momentum)
    x, y = batch(6)
    ours = client.update(NET, weights()[0], {}, x, y)
    theirs = sgd_by_torch(client, momentum, 0.1, x, y)
    for k, v in ours.items():
        torch.testing.assert_close(v, theirs[k], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("momentum", "scale"), [(0.0, 0.3), (0.5, 0.1 * (1 + 1.5 + 1.75))])
def test_the_scale_of_local_steps_is_that_of_a_constant_gradient(momentum, scale):
    client = local_sgd(steps=3, batch=1, lr=0.1, momentum=momentum)
    constant = {"w": torch.ones(2)}
    moved = client.respond(lambda p, x, t: constant, {"w": torch.zeros(2)}, torch.zeros(3, 1), torch.zeros(3, 1))
    assert client.scale == pytest.approx(scale)
    torch.testing.assert_close(moved["w"], torch.full((2,), scale))


def test_one_local_step_is_a_scaled_gradient_on_every_route():
    view = view_of(local_sgd(steps=1, batch=2, lr=0.05), lanes=2)
    plain = view_of(gradient(2), lanes=2)
    x = torch.stack([batch(2)[0], batch(3)[0][1:]]) * 0.9
    t = one_hot(torch.tensor([[0, 1], [2, 3]]), 4, torch.float64)
    from qleak.attacks import objectives

    kind = objectives.objective(view, "l2")
    values = {r: closure(view, kind, r)(x, t, objectives.goal(view, "l2")) for r in ("structured", "double", "forward")}
    expected = closure(plain, kind, "double")(x, t, objectives.goal(plain, "l2"))
    for found in values.values():
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b * 0.05**2, atol=1e-12, rtol=1e-8)


@pytest.mark.parametrize("attack", [cells(steps=4), levenberg_marquardt(steps=4)], ids=["cells", "levenberg_marquardt"])
def test_the_length_of_one_local_step_changes_nothing(attack):
    """The evidence is relative, so lr·∇ must be attacked as ∇ is; an update simulated without lr would be far off."""
    found = []
    for client in (gradient(2), local_sgd(steps=1, batch=2, lr=0.05)):
        view = view_of(client)
        state = attack.init(view, tree.to(tree.stack([attack.draw(random.generator("s"), view)]), torch.float64))
        for _ in range(4):
            state, _ = attack.step(view, state)
        found.append(state.x)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


def test_several_steps_are_simulated_and_their_derivative_is_right():
    view = view_of(local_sgd(steps=2, batch=1, lr=0.2))
    assert pick(view.model, view.client, 500)[0] == "double"
    from qleak.attacks import objectives

    one = closure(view, objectives.objective(view, "l2"))
    x, y = batch(2)
    goal, t = objectives.goal(view, "l2"), one_hot(y, 4, torch.float64)[None]
    assert float(one(x[None], t, goal)[0]) < 1e-20  # the truth explains the update
    guess = x[None] * 0.8
    _, slope, _ = one(guess, t, goal)
    for at in ((0, 0, 0, 2, 3), (0, 1, 0, 5, 1)):
        step = torch.zeros_like(guess)
        step[at] = 1e-5
        numeric = (one(guess + step, t, goal)[0] - one(guess - step, t, goal)[0]) / 2e-5
        assert float(slope[at]) == pytest.approx(float(numeric), rel=1e-4)


def test_the_mistaken_attacker_is_right_for_one_step_and_wrong_for_more():
    x, y = batch(4)
    errors = []
    for steps in (1, 4):
        view = view_of(local_sgd(steps=steps, batch=4 // steps, lr=0.3))
        mistaken = view._replace(client=as_one_gradient(view.client))
        update = update_of(mistaken, x, one_hot(y, 4, torch.float64))
        errors.append(float(tree.norm(tree.sub(update, tree.at(view.decoded(), 0))) / tree.norm(update)))
    assert errors[0] < 1e-12 and errors[1] > 1e-3
    attack = one_gradient(cells(stages=1, steps=3, last=3))
    assert attack.applies(view) == "" and attack.spec.startswith("one_gradient(")


def test_the_likeliest_order_is_kept_after_the_screen():
    view = view_of(local_sgd(steps=3, batch=1, lr=0.5), lanes=2)
    attack = any_order(cells(stages=1, steps=40, last=20), orders=6, screen=10)
    start = tree.to(tree.stack([attack.draw(random.generator("s", i), view) for i in range(2)]), torch.float64)
    assert start["order"].shape == (2, 6, 3)
    assert all(sorted(o.tolist()) == [0, 1, 2] for o in start["order"].flatten(0, 1))
    state = attack.init(view, start)
    for _ in range(9):
        state, _ = attack.step(view, state)
    before = state.members.best_loss
    state, _ = attack.step(view, state)
    assert state.members.best_loss.shape == (2, 1)
    assert torch.equal(state.members.labels[:, 0].sort(1).values, attack.read(view, state).labels.sort(1).values)
    assert (state.members.best_loss[:, 0] <= before.amin(1)).all()


def test_an_aggregate_is_all_a_server_sees_of_a_crowd():
    client, channel = crowd(gradient(2), clients=3), chain(total(), mean(3))
    view = view_of(client, channel=channel)
    x, y = batch(6)
    whole = gradient(6).update(NET, view.params, {}, x, y)
    for k, v in tree.at(view.decoded(), 0).items():
        torch.testing.assert_close(v, whole[k], atol=1e-7, rtol=1e-6)  # 1/3 is a knob in float32
    for objective in ("cells", "l2", "cosine"):
        attack = cells(stages=1, steps=3, last=3, objective=objective, labels="inferred")
        assert attack.applies(view) == ""
        start = tree.to(tree.stack([attack.draw(random.generator("s"), view)]), torch.float64)
        *_, (guess, _, _) = drive(attack, view, start)
        assert guess.x.shape == (1, 6, 1, 8, 8) and guess.x.isfinite().all() and guess.loss.isfinite().all()


def test_a_crowd_needs_a_join():
    with pytest.raises(Expected, match="join 1 row axes"):
        Audit(NET, "mnist5k", (0,), (identity(),), (cells(),), client=crowd())
    with pytest.raises(Expected, match="rows of its own"):
        crowd(crowd())


# --- what the threat model grants -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import numpy as np

    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    x = random.uniform(random.generator("images"), (8, 8, 8)).numpy()
    np.savez(path, x_train=x, y_train=np.arange(8) % 4)
    return str(path)


def granted(data, *grants, model=NORMED):
    plan = Audit(model, data, (0, 4), (identity(),), (cells(),), client=gradient(4), grants=grants)
    prepared = engine.prepare(plan)
    chunk = next(c for c in plan.chunks() if c.evidence)
    return plan, chunk, prepared, jobs.view_of(engine.job_of(plan, prepared, chunk), plan)


def test_grants_reach_the_view_and_nothing_else_does(data):
    for grants in ((), ("buffers",), ("labels",), ("statistics",)):
        plan, chunk, prepared, view = granted(data, *grants)
        assert (view.labels is not None) == ("labels" in grants)
        assert (view.statistics is not None) == ("statistics" in grants)
        assert from_json(plan.as_json()).id == plan.id
    plan, chunk, prepared, view = granted(data, "labels", "statistics")
    wrong = [i for i, lane in enumerate(chunk.lanes) if lane.control == "wrong-gradient"]
    for i in wrong:  # everything in that control is somebody else's
        other = 1 - chunk.lanes[i].victim
        assert torch.equal(view.labels[i], prepared.secret.y[other])
        for k, v in view.statistics.items():
            assert torch.equal(v[i], prepared.statistics[other][k])


def test_hidden_buffers_are_blank(data):
    *_, prepared, view = granted(data)
    assert view.buffers.keys() == prepared.buffers.keys() and len(view.buffers)
    ends = {k.split(".")[-1]: float(v.abs().max()) for k, v in view.buffers.items()}
    assert ends["running_mean"] == 0 and ends["running_var"] == 1


def test_a_grant_that_cannot_be_given_is_one_line(data):
    for grants, model in ((("statistics",), NET), (("truth",), NORMED)):
        with pytest.raises(Expected):
            granted(data, *grants, model=model)


def test_plans_of_before_keep_their_id_and_can_be_read():
    plan = Audit(NET, "mnist5k", (0,), (identity(),), (cells(),))
    text = plan.as_json()
    assert "grants" not in text and "seconds" not in text
    assert from_json(text).grants == ("buffers",)
    other = replace(plan, grants=("buffers", "labels"))
    assert other.id != plan.id and from_json(other.as_json()).grants == ("buffers", "labels")


# --- a race ------------------------------------------------------------------------------------------


def test_a_race_ends_in_time_and_says_what_it_had_on_the_way(data, tmp_path):
    from qleak.report import race
    from qleak.report.stored import load
    from qleak.store import open_run

    slow = inverting_gradients(steps=100_000)
    plan = Audit(NET, data, (0, 1), (identity(),), (slow, cells()), controls=0, seconds=0.6)
    store = open_run(tmp_path / "race", plan.header("attack_race"))
    with store:
        list(engine.run(plan, store))
    stored = load(tmp_path / "race")
    lines = race.curves(stored)
    assert set(lines) == {"inverting_gradients(steps=100000)", "cells"}
    line = lines["inverting_gradients(steps=100000)"]
    assert len(line) >= 4 and all(a < b for (a, _), (b, _) in pairwise(line)) and line[-1][0] < 5
    final = [r["psnr"] for r in stored.rows if r["attack"].startswith("inverting")]
    assert line[-1][1] == pytest.approx(sum(final) / len(final), abs=1e-2)
    assert race.figure(stored).startswith("<svg") and race.winners(stored)[-1][2] == pytest.approx(
        max(v[-1][1] for v in lines.values())
    )


def test_without_a_clock_nothing_is_kept():
    clock = jobs.Watch(0)
    assert clock.found(None) == (None, None) and not clock.over() and not clock.look(1)

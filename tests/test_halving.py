"""Successive halving inside one lane (who goes on, what it costs, no lane looks at another), and the budget of `quick`."""

from dataclasses import replace

import pytest
import torch

from qleak import random, tree
from qleak.attacks import cells, group
from qleak.attacks.drive import drive
from qleak.attacks.halving import halving
from qleak.attacks.quick import quick
from qleak.catalog import build
from qleak.channels import chain, identity, uniform
from qleak.check import Expected
from qleak.client import View, gradient
from qleak.types import Status

MODEL = build("models", "lenet(channels=1, size=8, classes=4, width=3)")
SHORT = cells(weight=1e-3, stages=2, steps=12, last=16, gain=0.0)
RUNGS = (6, 12)


def view_of(channel, lanes=3):
    """One message per lane, each of an image of its own."""
    params = tree.to(MODEL.init(random.generator(0, "params"))[0], torch.float64)
    client, sent = gradient(), []
    for i in range(lanes):
        x = random.uniform(random.generator("image", i), (1, *MODEL.shape)).double()
        update = client.update(MODEL, params, {}, x, torch.tensor([i % MODEL.classes]))
        noise = channel.draw(random.generator("channel", i), params, ())
        sent.append(channel.send(channel.knobs(), update, noise, channel.init(params), params)[0][-1])
    return View(MODEL, params, {}, channel, client, tree.nested_map(lambda *t: torch.stack(t), *sent))


def begin(attack, view, seeds):
    return tree.to(tree.stack([attack.draw(random.generator("start", s), view) for s in seeds]), torch.float64)


def after(attack, view, steps, seeds=(7, 8, 9)):
    """The state after `steps`, and every step's own losses `[step lane]`."""
    state, losses = attack.init(view, begin(attack, view, seeds)), []
    for _ in range(steps):
        state, info = attack.step(view, state)
        losses.append(info.loss)
    return state, torch.stack(losses)


def alone(view, starts, steps, seeds=(7, 8, 9)):
    """All starts of all lanes as lanes of their own: images `[lane start d]`, own losses `[step lane start]`."""
    wide = view.at(torch.arange(view.lanes).repeat_interleave(starts))
    drawn = begin(halving(SHORT, starts), view, seeds)
    state, losses = SHORT.init(wide, {k: v.flatten(0, 1) for k, v in drawn.items()}), []
    for _ in range(steps):
        state, info = SHORT.step(wide, state)
        losses.append(info.loss.unflatten(0, (-1, starts)))
    return state.x.unflatten(0, (-1, starts)), torch.stack(losses)


@pytest.mark.parametrize("channel", [identity(), chain(uniform(levels=16))], ids=["exact", "uniform"])
def test_a_lane_is_the_same_alone_and_in_a_crowd(channel):
    attack, view = halving(SHORT, 4, RUNGS), view_of(channel)
    crowd, losses = after(attack, view, 20)
    for i, seed in enumerate((7, 8, 9)):
        one = view.at(torch.tensor([i]))
        drawn, both = begin(attack, one, (seed,)), begin(attack, view, (7, 8, 9))
        assert all(torch.equal(drawn[k][0], both[k][i]) for k in drawn)
        state, loss = after(attack, one, 20, (seed,))
        assert torch.allclose(state.members.x[0], crowd.members.x[i], rtol=0, atol=1e-6)
        assert torch.allclose(loss[:, 0], losses[:, i], rtol=1e-6)


def test_the_first_start_is_that_of_the_attack_itself():
    view = view_of(identity())
    many, one = begin(halving(SHORT, 4), view, (7, 8, 9)), begin(SHORT, view, (7, 8, 9))
    assert all(torch.equal(many[k][:, 0], one[k]) for k in one)


def kept(attack, view, rung, starts, left):
    """Whether `attack` holds, after `rung` steps, the starts of lowest own loss and no others."""
    x, losses = alone(view, starts, rung)
    last = losses[-1] if bool(losses[-1].isfinite().all()) else losses[-2]  # a new stage has no loss yet
    best = last.argsort(1)[:, :left].sort(1).values
    held = after(attack, view, rung)[0].members.x
    same = torch.stack([x[i, best[i]] for i in range(len(x))])
    return held.shape == same.shape and torch.allclose(held, same, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rung", [6, 12], ids=["inside a stage", "at the end of a stage"])
def test_the_starts_of_lowest_own_loss_go_on(rung):
    view = view_of(chain(uniform(levels=16)))
    assert kept(halving(SHORT, 5, (rung,)), view, rung, 5, 3)


@pytest.mark.parametrize("rung", [6, 12])
def test_keeping_the_others_or_the_first_ones_is_noticed(rung):
    """The broken variants: the worst go on, or any (a loss that the new stage has not measured says nothing)."""
    view = view_of(chain(uniform(levels=16)))

    def step(attack):
        return lambda v, state: (lambda s, i: (s, i._replace(loss=-i.loss)))(*attack.step(v, state))

    def blind(attack):
        return lambda v, state: (lambda s, i: (s, i._replace(loss=torch.zeros_like(i.loss))))(*attack.step(v, state))

    for broken in (step(SHORT), blind(SHORT)):
        assert not kept(halving(replace(SHORT, step=broken), 5, (rung,)), view, rung, 5, 3)


def test_every_start_is_counted():
    """4 starts to step 6, 2 to step 12, then 1: closures as counted by the attack that runs them."""
    done = torch.zeros(2, dtype=torch.int64)

    def step(view, state):
        done[int(view.lanes % 3 == 0)] += view.lanes
        return SHORT.step(view, state)

    attack, view = halving(replace(SHORT, step=step), 4, RUNGS), view_of(identity())
    *_, (guess, status, closures) = drive(attack, view, begin(attack, view, (7, 8, 9)), every=5)
    assert attack.steps == 40
    assert attack.closures(40) == 4 * 6 + 2 * 6 + 28
    assert [attack.closures(n) for n in (0, 5, 6, 7, 13)] == [0, 20, 24, 26, 37]
    assert closures.tolist() == [attack.closures(40)] * 3
    assert int(done.sum()) == int(closures.sum())
    assert status.tolist() == [Status.FINISHED] * 3
    assert bool(guess.x.isfinite().all())


def test_the_best_of_those_left_is_handed_in():
    view = view_of(chain(uniform(levels=16)))
    attack = halving(SHORT, 4, (6,))
    state, _ = after(attack, view, 20)
    assert state.members.x.shape[1] == 2
    inner = tree.nested_map(lambda v: v.flatten(0, 1) if v.ndim else v, state.members)
    guesses = SHORT.read(view.at(torch.arange(3).repeat_interleave(2)), inner)
    losses, guess = guesses.loss.unflatten(0, (3, 2)), attack.read(view, state)
    assert torch.equal(guess.loss, losses.amin(1))
    assert torch.equal(guess.x, guesses.x.unflatten(0, (3, 2))[torch.arange(3), losses.argmin(1)])


def test_a_group_without_rungs_keeps_everyone():
    attack = group.grouped(SHORT, 3)
    state, _ = after(attack, view_of(identity()), 3)
    assert state.members.x.shape[:2] == (3, 3)
    assert attack.closures(7) == 21


@pytest.mark.parametrize("budget", [30, 44, 91])
def test_quick_spends_its_budget_and_no_more(budget):
    attack, view = quick(budget), view_of(chain(uniform(levels=256)), lanes=1)
    *_, (guess, _, closures) = drive(attack, view, begin(attack, view, (7,)), every=1)
    assert attack.steps == budget and closures.tolist() == [budget]
    assert bool(guess.x.isfinite().all())
    assert halving(attack, rungs=(5, 10, 15)).closures(budget) == 8 * 5 + 4 * 5 + 2 * 5 + budget - 15


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: quick(29), "Expected closures=29 >= 30."),
        (lambda: quick(fade=0.0), "Expected fade=0.0 in [1e-06, 1]."),
        (lambda: halving(starts=1), "Expected starts=1 >= 2."),
        (lambda: halving(rungs=()), "Expected rungs=() to be rising numbers of steps >= 1."),
        (lambda: halving(rungs=(0, 5)), "Expected rungs=(0, 5) to be rising numbers of steps >= 1."),
        (lambda: halving(rungs=(30, 30)), "Expected rungs=(30, 30) to be rising numbers of steps >= 1."),
        (lambda: halving(rungs=(1.5,)), "Expected rungs[0]=1.5 to be a whole number."),
        (lambda: halving(keep=1.0), "Expected keep=1 between 0 and 1."),
        (lambda: halving(keep=0.0), "Expected keep=0 between 0 and 1."),
    ],
)
def test_bad_arguments_are_one_line(make, text):
    with pytest.raises(Expected) as caught:
        make()
    assert str(caught.value) == text

"""Law 4: a slow, obvious, sequential twin is the oracle for every fast path."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from qleak import client, random, tree
from qleak.attacks import adam, cells, dlg, idlg, layer_rules, lbfgs, routes, sign_adam, slopes, structured
from qleak.attacks.drive import drive
from qleak.attacks.objectives import goal, objective
from qleak.catalog import build
from qleak.channels import chain, identity, uniform
from qleak.client import LOSSES, View, gradient
from qleak.models.layers import ACTIVATIONS
from qleak.types import Layer, Message, Status

LENET = "lenet(channels=1, size=8, classes=4, width=3)"
MLP = "mlp(channels=1, size=6, classes=4, hidden=(7, 5))"
F64 = torch.float64


def view_of(spec, channel=None, lanes=3, batch=1, function="sigmoid"):
    channel = channel or identity()
    model = build("models", f"{spec[:-1]}, function='{function}')")
    params = tree.to(model.init(random.generator(0, "params"))[0], F64)
    client, sent = gradient(batch), []
    for i in range(lanes):
        x = random.uniform(random.generator("image", i), (batch, *model.shape)).to(F64)
        y = random.integers(random.generator("label", i), model.classes, (batch,))
        noise = channel.draw(random.generator("channel", i), params, ())
        sent.append(
            channel.send(channel.knobs(), client.update(model, params, {}, x, y), noise, channel.init(params), params)[
                0
            ][-1]
        )
    return View(model, params, {}, channel, client, tree.nested_map(lambda *t: torch.stack(t), *sent))


def plain_view(spec, lanes=3, batch=1, function="sigmoid"):
    """The same without a channel: `message` holds the bare gradients."""
    model = build("models", f"{spec[:-1]}, function='{function}')")
    params = tree.to(model.init(random.generator(0, "params"))[0], F64)
    sent = []
    for i in range(lanes):
        x = random.uniform(random.generator("image", i), (batch, *model.shape)).to(F64)
        y = random.integers(random.generator("label", i), model.classes, (batch,))
        sent.append(gradient(batch).update(model, params, {}, x, y))
    return View(model, params, {}, identity(), gradient(batch), Message(tree.stack(sent), ()))


def begin(attack, view, seeds):
    return tree.to(tree.stack([attack.draw(random.generator("start", s), view) for s in seeds]), F64)


# --- the classic attack ----------------------------------------------------------------------------


class Twin:
    """One lane of Zhu et al. 2019 as their code has it: autograd through autograd, torch's own L-BFGS."""

    def __init__(self, view, lane, start, label=None):
        self.view, self.label = view, label
        self.wanted = [v[lane] for v in view.message.code.values()]
        self.params = {k: v.clone().requires_grad_() for k, v in view.params.items()}
        self.free = [start["x"][lane].clone().requires_grad_()]
        if label is None:
            self.free.append(start["logits"][lane].clone().requires_grad_())
        self.optimizer = torch.optim.LBFGS(
            self.free, lr=1, max_iter=1, history_size=100, tolerance_grad=0, tolerance_change=0
        )

    def loss(self):
        logits = self.view.model.apply(self.params, {}, self.free[0])
        target = F.one_hot(self.label, 4).to(F64) if self.label is not None else self.free[1].softmax(-1)
        cross = -(target * F.log_softmax(logits, -1)).sum(-1).mean()
        update = torch.autograd.grad(cross, list(self.params.values()), create_graph=True)
        return sum(((a - b) ** 2).sum() for a, b in zip(update, self.wanted, strict=True))

    def closure(self):
        self.optimizer.zero_grad()
        value = self.loss()
        for v, slope in zip(self.free, torch.autograd.grad(value, self.free), strict=True):
            v.grad = slope
        return value

    def step(self):
        """(value, gradient, next iterate), flat."""
        value = self.closure().detach()
        slope = torch.cat([v.grad.flatten() for v in self.free])
        self.optimizer.step(self.closure)
        return value, slope, torch.cat([v.detach().flatten() for v in self.free])


def apart(attack, spec, label, steps=20) -> float:
    """The largest distance between the attack's lanes and their twins, relative, over the first iterates."""
    view = plain_view(spec)
    start = begin(attack, view, range(3))
    labels = [random.integers(random.generator("label", i), 4, (1,)) if label else None for i in range(3)]
    twins = [Twin(view, i, start, labels[i]) for i in range(3)]
    state, worst = attack.init(view, start), 0.0
    for _ in range(steps):
        state, info = attack.step(view, state)
        for i, twin in enumerate(twins):
            value, slope, x = twin.step()
            # the optimizer's state holds the value and gradient it was given
            for ours, theirs in ((state.optimizer.loss[i], value), (state.optimizer.grad[i], slope), (state.x[i], x)):
                worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)))
    assert bool((info.loss <= state.optimizer.loss).all())
    return worst


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("spec", [LENET, MLP], ids=["lenet", "mlp"])
def test_dlg_is_its_twin(spec):
    assert apart(dlg(outer=1), spec, label=False) <= 1e-8


@pytest.mark.parametrize("spec", [LENET, MLP], ids=["lenet", "mlp"])
def test_idlg_is_its_twin(spec):
    assert apart(idlg(outer=1), spec, label=True) <= 1e-8


def test_another_attack_is_not_the_twin():
    assert apart(dlg(outer=1, lr=0.999), LENET, label=False, steps=5) > 1e-6
    assert apart(dlg(outer=1, history=2), MLP, label=False, steps=8) > 1e-6


def test_a_wrong_slope_formula_is_caught(monkeypatch):
    """The broken variant: sigmoid′ without its a."""
    right = layer_rules.slope
    monkeypatch.setattr(layer_rules, "slope", lambda f, z, a: 1 - a if f == "sigmoid" else right(f, z, a))
    assert apart(dlg(outer=1), LENET, label=False, steps=2) > 1e-6


# --- optimizers ------------------------------------------------------------------------------------

SCALES = torch.linspace(0.1, 3, 12, dtype=F64)


def quadratic(x):
    return 0.5 * (SCALES * (x - 1).square()).sum(-1)


def quartic(x):
    return quadratic(x) + 0.05 * (x - x.roll(1, -1)).pow(4).sum(-1)


def ours(optimizer, f, x, steps):
    state, seen = optimizer.init(x), []
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        value = f(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        x, state = optimizer.update(state, x, value.detach(), slope)
        seen.append(x)
    return torch.stack(seen)


def theirs(make, f, x, steps, signed=False):
    rows = []
    for lane in x:
        leaf, seen = lane.clone().requires_grad_(), []
        optimizer = make([leaf])

        def closure(leaf=leaf):
            leaf.grad = torch.autograd.grad(f(leaf), leaf)[0]
            if signed:
                leaf.grad = leaf.grad.sign()
            return f(leaf)

        for _ in range(steps):
            closure()
            optimizer.step(closure)
            seen.append(leaf.detach().clone())
        rows.append(torch.stack(seen))
    return torch.stack(rows, 1)


def points(lanes=3):
    return torch.stack([random.normal(random.generator("point", i), (12,)) for i in range(lanes)]).to(F64)


def torch_lbfgs(history):
    return lambda leaves: torch.optim.LBFGS(
        leaves, lr=1, max_iter=1, history_size=history, tolerance_grad=0, tolerance_change=0
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("f", [quadratic, quartic])
@pytest.mark.parametrize("history", [4, 100])
def test_lbfgs_takes_the_steps_of_torch(f, history):
    """History 4 makes the ring wrap several times; close to the optimum torch stores no pair, and neither do we."""
    got, want = ours(lbfgs(history, False), f, points(), 15), theirs(torch_lbfgs(history), f, points(), 15)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)
    wrong = theirs(torch_lbfgs(3), f, points(), 15)
    assert float((got - wrong).abs().max()) > 1e-6


@pytest.mark.parametrize("signed", [False, True], ids=["adam", "sign_adam"])
def test_adam_takes_the_steps_of_torch(signed):
    make = sign_adam if signed else adam
    want = theirs(lambda leaves: torch.optim.Adam(leaves, lr=0.05), quartic, points(), 40, signed)
    torch.testing.assert_close(ours(make(lr=0.05), quartic, points(), 40), want, rtol=0, atol=1e-10)
    other = adam if signed else sign_adam
    assert float((ours(other(lr=0.05), quartic, points(), 40) - want).abs().max()) > 1e-3


def rosenbrock(x):
    a, b = x[..., :-1], x[..., 1:]
    return (100 * (b - a.square()).square() + (1 - a).square()).sum(-1)


def accepted(optimizer, steps=80):
    """Losses at the accepted points, `[step lane]`."""
    x = points()
    state, seen = optimizer.init(x), []
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        value = rosenbrock(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        x, state = optimizer.update(state, x, value.detach(), slope)
        seen.append(state.loss)
    return torch.stack(seen)


def test_armijo_never_accepts_an_increase():
    losses = accepted(lbfgs(10, True))
    assert bool((losses.diff(dim=0) <= 0).all())
    assert bool((losses[-1] < 0.1 * losses[0]).all())
    assert bool((accepted(lbfgs(10, False)).diff(dim=0) > 0).any())  # the same check fails without a line search


def test_a_lane_whose_objective_changes_accepts_a_higher_loss():
    """`restart`: the last loss is no yardstick after a change of the prior's weight."""
    x, optimizer = points(2), lbfgs(10, True)
    x1, state = optimizer.update(optimizer.init(x), x, torch.zeros(2, dtype=F64), torch.ones_like(x))
    state = optimizer.restart(state, torch.tensor([True, False]))
    _, state = optimizer.update(state, x1, torch.full((2,), 5.0, dtype=F64), torch.ones_like(x))
    assert state.loss.tolist() == [5.0, 0.0]


# --- derivative routes -----------------------------------------------------------------------------

EXACT = ["sigmoid", "tanh", "softplus", "relu", "leaky_relu"]


def three(view, given, kind="l2"):
    b, classes = view.client.batch, view.model.classes
    x = torch.stack([random.uniform(random.generator("x", i), (b, *view.model.shape)) for i in range(view.lanes)]).to(
        F64
    )
    t = torch.stack([random.normal(random.generator("t", i), (b, classes)) for i in range(view.lanes)]).to(F64)
    t = t.softmax(-1) if given == "labels" else 0.3 * t
    o, g = objective(view, kind), goal(view, kind)
    return {name: routes.closure(view, o, name, given)(x, t, g) for name in routes.ROUTES[1:]}


def disagreement(results) -> float:
    """Relative to the largest entry of each quantity of the double route."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for got in results.values()
        for a, b in zip(got, results["double"], strict=True)
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("given", ["labels", "errors"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("function", slopes.SLOPES)
@pytest.mark.parametrize("spec", [LENET, MLP], ids=["lenet", "mlp"])
def test_three_routes_agree(spec, function, batch, given):
    assert disagreement(three(plain_view(spec, batch=batch, function=function), given)) <= 1e-12


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("spec", [LENET, MLP], ids=["lenet", "mlp"])
def test_three_routes_agree_behind_a_quantizer(spec):
    view = view_of(spec, chain(uniform(levels=16)))
    for kind in ("l2", "cells"):
        assert disagreement(three(view, "labels", kind)) <= 1e-12


def lanes_differ(function, spec=LENET, batch=3, given="labels") -> float:
    view = plain_view(spec, batch=batch, function=function)
    x = torch.stack([random.uniform(random.generator("x", i), (batch, *view.model.shape)) for i in range(3)]).to(F64)
    t = torch.stack([random.normal(random.generator("t", i), (batch, 4)) for i in range(3)]).to(F64)
    want = vmap(lambda x, t: grad(lambda p: LOSSES[given](view.model, p, {}, x, t))(view.params))(x, t)
    got = structured.lane_gradients(view.model.layers, view.params, x, t, given)
    assert list(got) == list(want)
    return max(float((got[k] - want[k]).abs().max() / want[k].abs().max()) for k in want)


@pytest.mark.parametrize("given", ["labels", "errors"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("function", slopes.SLOPES)
@pytest.mark.parametrize("spec", [LENET, MLP], ids=["lenet", "mlp"])
def test_structured_gradients_are_the_gradients(spec, function, batch, given):
    assert lanes_differ(function, spec, batch, given) <= 1e-12


@pytest.mark.parametrize("function", slopes.SLOPES)
def test_a_wrong_slope_disagrees(function, monkeypatch):
    """The broken variant of both tests above, for every activation."""
    right = layer_rules.slope
    monkeypatch.setattr(layer_rules, "slope", lambda f, z, a: right(f, z, a) * 1.001)
    assert lanes_differ(function) > 1e-6
    assert disagreement(three(plain_view(MLP, function=function), "labels")) > 1e-6


def test_what_has_no_formulas_runs_under_vmap():
    assert {*slopes.SLOPES} == {*ACTIVATIONS}
    assert not structured.supports(None)
    assert not structured.supports((Layer("", "activation", {"function": "mish"}),))
    bare = replace(build("models", MLP), layers=None)
    assert routes.pick(bare, client.gradient(), 3)[0] == "double"
    assert routes.pick(bare, client.gradient(), routes.FORWARD_FROM)[0] == "forward"


# --- what happens to a broken lane -----------------------------------------------------------------


def broken_view():
    """Four lanes; the second one's message is infinite."""
    view = plain_view(LENET, lanes=4)
    code = {k: v.clone() for k, v in view.message.code.items()}
    code["conv1.weight"][1] = torch.inf
    return view._replace(message=Message(code, ()))


@pytest.mark.parametrize("attack", [dlg(outer=2, inner=10), idlg(outer=2, inner=10)], ids=["dlg", "idlg"])
def test_a_diverged_lane_ends_so_and_disturbs_nobody(attack):
    view = broken_view()
    *_, (guess, status, closures) = drive(attack, view, begin(attack, view, range(4)), every=5)
    assert status.tolist() == [Status.FINISHED, Status.DIVERGED, Status.FINISHED, Status.FINISHED]
    assert closures.tolist() == [20, 5, 20, 20]
    assert not bool(guess.loss[1].isfinite())
    others = torch.tensor([0, 2, 3])
    *_, (alone, _, _) = drive(attack, view.at(others), begin(attack, view, [0, 2, 3]), every=5)
    torch.testing.assert_close(guess.x[others], alone.x, rtol=0, atol=1e-9)
    torch.testing.assert_close(guess.loss[others], alone.loss, rtol=0, atol=1e-9)


def test_finished_lanes_leave_and_the_rest_goes_on_unchanged():
    """Lanes leave at different steps; each result is that of a drive in which nobody ever leaves."""
    attack, view = dlg(outer=1, inner=20), plain_view(LENET, lanes=4)
    leaving = {"sizes": []}

    def step(view, state):
        state, info = attack.step(view, state)
        leaving["sizes"].append(len(state.x))
        # lane with the lowest start value of its first pixel leaves first: a rule of the lane itself
        budget = 5 * (
            1 + state.labels.new_tensor([int(abs(float(v)) * 1e6) % 4 for v in view.message.code["fc.bias"][:, 0]])
        )
        over = state.since >= budget
        status = torch.where(over, Status.CONVERGED, state.status)
        return state._replace(status=status), info._replace(status=status)

    short = replace(attack, step=step)
    start = begin(attack, view, range(4))
    *_, (guess, status, closures) = drive(short, view, start, every=5)
    assert min(leaving["sizes"]) < 4 == max(leaving["sizes"])
    for i in range(4):
        one = torch.tensor([i])
        exact = replace(attack, steps=int(closures[i]))
        *_, (alone, _, _) = drive(exact, view.at(one), begin(attack, view, [i]), every=5)
        torch.testing.assert_close(guess.x[i], alone.x[0], rtol=0, atol=1e-8)
    assert set(status.tolist()) <= {Status.CONVERGED, Status.FINISHED}


def test_progress_is_reported_in_the_order_the_lanes_came():
    attack, view = cells(stages=1, steps=5, last=5), plain_view(LENET)
    *events, (guess, _, closures) = drive(attack, view, begin(attack, view, range(3)), every=5)
    assert [e.step for e in events] == [5, 10]
    torch.testing.assert_close(events[-1].loss, guess.loss.float())
    assert closures.tolist() == [10, 10, 10]

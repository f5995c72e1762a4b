"""The explicit formulas of every layer against autograd, in float64; ghosts against what they stand for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

from qleak import native, random, tree
from qleak.attacks import boxes, ghost, layer_norms, objectives, patches, priors, routes, structured
from qleak.catalog import build
from qleak.channels import chain, gaussian, identity, uniform
from qleak.client import LOSSES, View, gradient
from qleak.models.layers import activation, conv, flatten, linear, norm, pool, sequential
from qleak.models.traced import layers_of

F64 = torch.float64
NETS = {
    "strides": lambda: sequential(
        [conv("a", 2, 3, 5, 2, 2), activation("tanh"), conv("b", 3, 4, 3, 3, 1), activation("silu"), flatten(), linear("c", 16, 3)],
        (2, 9, 9),
    ),
    "narrow kernels": lambda: sequential(
        [conv("a", 1, 2, 1, 2, 0), conv("b", 2, 3, 2, 1, 1), activation("softplus"), flatten(), linear("c", 75, 4)], (1, 8, 8)
    ),
    "pools": lambda: sequential(
        [conv("a", 1, 3, 3, 1, 1), pool("max", 3, 2, 1), activation("gelu"), conv("b", 3, 3, 3), pool("mean", 2, 1, 1), flatten(),
         linear("c", 27, 4)],
        (1, 8, 8),
    ),
    "norms": lambda: sequential(
        [conv("a", 1, 4, 3), norm("n", 2, 4), activation("sigmoid"), conv("b", 4, 4, 3), norm("", 4, 4), flatten(), norm("m", 1, 64),
         linear("c", 64, 3)],
        (1, 8, 8),
    ),
    "norm by the batch": lambda: sequential(
        [conv("a", 1, 4, 3), norm("n", "batch", 4), activation("tanh"), flatten(), linear("c", 144, 3)], (1, 8, 8)
    ),
    "norm first": lambda: sequential([norm("n", 1, 2), conv("a", 2, 3, 3), flatten(), linear("c", 108, 3)], (2, 8, 8)),
    "lenet5": lambda: build("models", "lenet5(size=12, function='silu', norm='layer', pool='max')"),
    "running": lambda: build("models", "convnet64(width=1, size=9, function='sigmoid')"),
}  # fmt: skip


def world(name, batch=2, lanes=3):
    model = NETS[name]()
    params, buffers = model.init(random.generator("params"))
    draw = lambda k, v: random.uniform(random.generator(k), v.shape).to(F64)  # noqa: E731
    params = {k: v.to(F64) + 0.3 * draw(k, v) for k, v in params.items()}
    buffers = {k: 0.5 + draw(k, v) for k, v in buffers.items() if v.is_floating_point()}
    x = random.uniform(random.generator("x"), (lanes, batch, *model.shape)).to(F64)
    t = torch.softmax(random.normal(random.generator("t"), (lanes, batch, model.classes)).to(F64), -1)
    like = {k: random.normal(random.generator("goal", k), (lanes, *v.shape)).to(F64) for k, v in params.items()}
    return model, params, buffers, x, t, like


def error(name, given="labels", batch=2) -> float:
    """Largest relative error of misfit, ∂/∂x and ∂/∂t of ‖u − goal‖² + Σ sin u against autograd twice under `vmap`."""
    model, params, buffers, x, t, like = world(name, batch)

    def misfit(x, t, goal):
        u = grad(lambda p: LOSSES[given](model, p, buffers, x, t))(params)
        return torch.stack([(u[k] - goal[k]).square().sum() + u[k].sin().sum() for k in u]).sum()

    value = vmap(misfit)(x, t, like)
    dx, dt = vmap(grad(misfit, argnums=(0, 1)))(x, t, like)

    def half(u, goal):
        total = torch.stack([((u[k] - goal[k]).square() + u[k].sin()).flatten(1).sum(1) for k in u]).sum(0)
        return total, {k: u[k] - goal[k] + 0.5 * u[k].cos() for k in u}

    found = structured.closure(model.layers, params, buffers, structured.Slope(half, lambda goal: None), given)(
        x, t, like
    )
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, (value, dx, dt), strict=True))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("given", ["labels", "errors"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_explicit_formulas_are_the_derivatives(name, batch, given):
    if (name, batch) == ("norm by the batch", 1):
        batch = 3
    assert error(name, given, batch) <= 1e-10


@pytest.mark.parametrize(
    ("place", "part", "net"),
    [
        (patches, "_interleaved", "strides"),
        (layer_norms, "_jacobian", "norms"),
        (structured, "_error_tangents", "pools"),
    ],
)
def test_a_broken_formula_is_caught(place, part, net, monkeypatch):
    monkeypatch.setattr(native, "serves", lambda x: False)
    right = getattr(place, part)

    def broken(*args):
        found = right(*args)
        return found * 1.01 if isinstance(found, torch.Tensor) else tuple(v * 1.01 for v in found)

    monkeypatch.setattr(place, part, broken)
    assert error(net) > 1e-4


@pytest.mark.usefixtures("kernels")
def test_blocks_of_lanes_change_nothing(monkeypatch):
    model, params, buffers, x, t, like = world("strides", lanes=5)
    slope = objectives.half_slope(objectives.Objective(objectives._distance, True))
    run = structured.closure(model.layers, params, buffers, slope)
    whole = run(x, t, boxes.Point(like, {}, {}))
    monkeypatch.setattr(structured, "block", lambda *_: 2)
    for a, b in zip(run(x, t, boxes.Point(like, {}, {})), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_patches_are_what_unfold_makes():
    x = random.normal(random.generator("x"), (4, 3, 9, 8))
    for kernel, stride, padding in ((5, 2, 2), (3, 1, 1), (2, 3, 0), (1, 1, 0)):
        layer = conv("a", 3, 2, kernel, stride, padding)
        want = F.unfold(x, kernel, padding=padding, stride=stride)  # image, (channel, k, k), place
        want = want.unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2).mT.reshape(2, -1, 3 * kernel**2)
        assert torch.equal(patches.patches(layer, x.contiguous(memory_format=torch.channels_last), 2), want)


@pytest.mark.parametrize("shape", [(3, 2, 3, 5, 4), (2, 1, 1, 1, 6), (2, 1, 1, 1, 1)])
def test_the_smooth_prior_is_differentiated_by_hand(shape):
    x = (2 * random.normal(random.generator("x"), shape).to(F64)).requires_grad_()
    weight = torch.linspace(0.1, 2, shape[0], dtype=F64)
    want = weight * vmap(priors.total_variation)(x) + 0.7 * vmap(priors.box)(x)
    (slope,) = torch.autograd.grad(want.sum(), x)
    value, found = priors.value_and_slope(x.detach(), weight, 0.7)
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(found, slope)


# --- ghosts ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", [(40, 60), (60, 40)])
@pytest.mark.parametrize("exact", [True, False])
def test_a_ghost_stands_for_the_difference(size, exact):
    out, cin = size
    lanes, b = 3, 2
    rows = [
        random.normal(random.generator("row", i), (lanes, b, n)).to(F64) for i, n in enumerate((out, cin, out, cin))
    ]
    delta, h, other, seen = rows
    g = other.mT @ seen
    if not exact:
        g = g + 0.1 * random.normal(random.generator("noise"), g.shape).to(F64)
    value, low = ghost.difference(ghost.split(g, b), delta, h)
    want = delta.mT @ h - g
    torch.testing.assert_close(value, want.square().sum((1, 2)))
    torch.testing.assert_close(low.push, h @ want.mT)
    torch.testing.assert_close(low.pull, delta @ want)
    assert bool(ghost.split(g, b).rest.numel()) != exact


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_cell_is_met_lane_by_lane(scale):
    delta, h, off, wide = (
        random.normal(random.generator(k), s).to(F64)
        for k, s in (("d", (3, 2, 40)), ("h", (3, 2, 60)), ("o", (3, 40, 60)), ("w", (3, 40, 60)))
    )
    u = scale * delta.mT @ h
    cell = ghost.Cell(u + off - wide.abs(), u + off + wide.abs())
    value, met = ghost.outside(cell, delta, h, scale)
    want = u - u.clamp(cell.lo, cell.hi)
    torch.testing.assert_close(value, want.square().sum((1, 2)))
    torch.testing.assert_close(met.push, h @ want.mT)
    torch.testing.assert_close(met.pull, delta @ want)


@pytest.mark.usefixtures("kernels")
def test_a_ghost_is_accurate_where_the_plain_formula_cancels():
    """Near the solution in float32: the three large terms lose everything, the split nothing."""
    delta, h = (random.normal(random.generator(k), (1, 1, n)) for k, n in (("d", 100), ("h", 768)))
    g = (delta.double().mT @ h.double()).float()
    near = h + 1e-5 * random.normal(random.generator("off"), h.shape)
    want = float((delta.double().mT @ near.double() - g.double()).square().sum())
    found = float(ghost.difference(ghost.split(g, 1), delta, near)[0])
    plain = float(delta.square().sum() * near.square().sum() - 2 * (delta @ g @ near.mT).sum() + g.square().sum())
    assert abs(found - want) <= 1e-2 * want
    assert abs(plain - want) > 0.5 * want


def view(channel, batch=1):
    model = build("models", "mlp(channels=1, size=12, classes=30, hidden=(80,), function='tanh')")
    params = tree.to(model.init(random.generator(0))[0], F64)
    x, y = random.uniform(random.generator("x"), (batch, *model.shape)).to(F64), torch.arange(batch)
    update = gradient(batch).update(model, params, {}, x, y)
    noise = tree.nested_map(lambda v: v.to(F64), channel.draw(random.generator("noise"), params, ()))
    sent = channel.send(channel.knobs(dtype=F64), update, noise, channel.init(params), params)[0][-1]
    sent = tree.nested_map(lambda v: v[None].repeat(2, *[1] * v.ndim), sent)
    return View(model, params, {}, channel, gradient(batch), sent)


@pytest.mark.parametrize("route", ["structured", "double"])
def test_a_large_layer_behind_a_quantizer_is_a_ghost(route, monkeypatch):
    seen = view(chain(uniform(levels=16)))
    goal, o = objectives.goal(seen, "cells"), objectives.objective(seen, "cells")
    x = random.uniform(random.generator("guess"), (2, 1, *seen.model.shape)).to(F64)
    t = torch.softmax(random.normal(random.generator("t"), (2, 1, 30)).to(F64), -1)
    plain = routes.closure(seen, o, route)(x, t, goal)
    asked = []
    monkeypatch.setattr(ghost, "large", lambda cell: asked.append(cell.lo.ndim) or cell.lo.ndim == 3)
    for a, b in zip(routes.closure(seen, o, "structured")(x, t, goal), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert asked == [3, 3]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["l2", "cells", "weighted"])
@pytest.mark.parametrize("channel", [identity(), chain(gaussian(1e-3, unbounded=True))], ids=["exact", "noisy"])
def test_a_split_goal_changes_no_derivative(channel, kind, batch):
    seen = view(channel, batch)
    goal, o = objectives.goal(seen, kind), objectives.objective(seen, kind)
    assert set(goal.splits) == {"fc1.weight", "fc2.weight"}
    x = random.uniform(random.generator("guess"), (2, batch, *seen.model.shape)).to(F64)
    t = torch.softmax(random.normal(random.generator("t"), (2, batch, 30)).to(F64), -1)
    split, whole, double = (
        routes.closure(seen, o, route)(x, t, g)
        for route, g in (("structured", goal), ("structured", goal._replace(splits={})), ("double", goal))
    )
    for a, b, c in zip(split, whole, double, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)


# --- nets of one's own ----------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(36, 3)

    def forward(self, x):
        return self.b(F.max_pool2d(torch.relu(self.n(self.a(x))), 2).flatten(1))


def test_pools_and_norms_of_a_module_are_read():
    net = Own()
    kinds = [layer.kind for layer in layers_of(net, (1, 8, 8)) or ()]
    assert kinds == ["conv", "norm", "activation", "pool", "flatten", "linear"]
    by_batch = layers_of(net, (1, 8, 8), "train")
    assert by_batch is not None and by_batch[1].options["groups"] == "batch"


def test_wide_nets_without_layers_take_the_loop():
    model = build("models", "resnet(depth=8)")
    assert routes.pick(model, gradient(), 4, routes.WIDE)[0] == "loop"
    assert routes.pick(model, gradient(), 4, routes.WIDE, "cuda")[0] == "double"
    assert routes.pick(model, gradient(), 4, routes.weights(model))[0] == "double"

"""Derivative routes behind one name: loss, and gradient in the guess, for every lane.

The quantity is L(x, t) = M(∇_θ ℓ(θ; x, t)) for an objective M of the update.

- "double": reverse over reverse, `grad` of a function that calls `grad`, under `vmap`.
- "forward": with v = ∇M at the update, ∇_(x,t) L = d/dε ∇_(x,t) ℓ(θ + εv; x, t): one `jvp` of the input
  gradient (forward over reverse), under `vmap`.
- "loop": reverse over reverse, lane after lane without `vmap`, for nets so wide that one lane fills a core.
- "structured": forward over reverse by explicit formulas, all lanes together (see `structured`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vmap

from qleak import client as clients
from qleak import native, random, tree
from qleak.attacks import structured
from qleak.attacks.objectives import Objective, half_slope
from qleak.check import one_of
from qleak.client import View
from qleak.types import Client, Model, Tree

Closure = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor, Tensor]]
ROUTES = ("auto", "structured", "double", "forward", "loop")

# Under `vmap` forward over reverse wins from about this many lanes on, measured on two CPU cores.
FORWARD_FROM = 128


# From about this many weights on a lane keeps a core busy by itself, and `vmap` only adds batched kernels that are slower.
WIDE = 2_000_000


def pick(model: Model, client: Client, lanes: int, weights: int = 0, device: str = "cpu") -> tuple[str, str]:
    """The route for so many lanes of a net of so many weights, and the reason, for the terminal."""
    wide = weights >= WIDE and device == "cpu"
    if not clients.is_gradient(client):
        return ("loop", f"{weights:,} weights fill a core") if wide else ("double", "the update is not one gradient")
    if structured.supports(model.layers):
        kernels = f"; {native.described()}" if device == "cpu" else ""
        return "structured", f"the model declares its layers{kernels}"
    if wide:
        return "loop", f"{weights:,} weights fill a core"
    if lanes >= FORWARD_FROM:
        return "forward", f"{lanes} lanes >= {FORWARD_FROM}"
    return "double", f"{lanes} lanes < {FORWARD_FROM}"


def weights(model: Model) -> int:
    """How many numbers a model's parameters are."""
    return tree.count(model.init(random.generator(0, "weights"))[0])


def closure(view: View, objective: Objective, route: str = "auto", given: str = "labels") -> Closure:
    """`(x [lane b c h w], t [lane b class], goal [lane …]) -> (L [lane], ∂L/∂x, ∂L/∂t)`, lanes independent.

    `given` says what t is: "labels" (probabilities of the classes) or "errors" (of the logits).
    """
    one_of(ROUTES, route=route)
    known = _picked(view)
    name = known if route == "auto" or not clients.is_gradient(view.client) else route
    if name == "structured":
        return _structured(view, objective, given)
    if name == "loop":
        return _loop(
            _tape(view, objective, given) if clients.is_gradient(view.client) else _double(view, objective, given)
        )
    one = _forward(view, objective, given) if name == "forward" else _double(view, objective, given)
    return vmap(one, randomness="error")


def update_of(view: View, x: Tensor, target: Tensor, given: str = "labels") -> Tree:
    """What the client would compute from images `[b c h w]` with label probabilities (or errors) `[b class]`."""
    return view.client.respond(clients.slope(view.model, view.buffers, given), view.params, x, target)


def updates(view: View, x: Tensor, target: Tensor, given: str = "labels") -> Tree:
    """`update_of` for all lanes, `x [lane b c h w]`: by explicit formulas where `pick` takes them, else under `vmap`."""
    if _picked(view) == "structured":
        return _explicit(view, x, target, given)
    return vmap(lambda x, t: update_of(view, x, t, given), randomness="error")(x, target)


def _picked(view: View) -> str:
    device = next(iter(view.params.values())).device.type
    return pick(view.model, view.client, view.lanes, tree.count(view.params), device)[0]


def _loop(one: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Closure:
    def every(x: Tensor, target: Tensor, goal: Any) -> tuple[Tensor, Tensor, Tensor]:
        parts = [one(x[i], target[i], tree.nested_map(lambda v, i=i: v[i], goal)) for i in range(len(x))]
        value, dx, dt = (torch.stack(part) for part in zip(*parts, strict=True))
        return value, dx, dt

    return every


def _explicit(view: View, x: Tensor, target: Tensor, given: str) -> Tree:
    assert view.model.layers is not None
    update = structured.lane_gradients(view.model.layers, view.params, x, target, given, view.buffers)
    return update if view.client.scale == 1 else {k: v * view.client.scale for k, v in update.items()}


def _double(view: View, objective: Objective, given: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def one(x: Tensor, target: Tensor, goal: Any) -> tuple[Tensor, Tensor, Tensor]:
        both = grad_and_value(lambda x, t: objective.misfit(update_of(view, x, t, given), goal), argnums=(0, 1))
        (dx, dt), value = both(x, target)
        return value, dx, dt

    return one


def _tape(view: View, objective: Objective, given: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`_double` of a client that sends one gradient, by autograd itself: nested `grad` costs a sixth more outside `vmap`."""
    params = {k: v.detach().requires_grad_() for k, v in view.params.items()}

    def one(x: Tensor, target: Tensor, goal: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, target = x.detach().requires_grad_(), target.detach().requires_grad_()
        loss = clients.LOSSES[given](view.model, params, view.buffers, x, target)
        parts = torch.autograd.grad(
            view.client.scale * loss, list(params.values()), create_graph=True, materialize_grads=True
        )
        value = objective.misfit(dict(zip(params, parts, strict=True)), goal)
        dx, dt = torch.autograd.grad(value, [x, target], materialize_grads=True)
        return value.detach(), dx, dt

    return one


def _forward(view: View, objective: Objective, given: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def one(x: Tensor, target: Tensor, goal: Any) -> tuple[Tensor, Tensor, Tensor]:
        update = update_of(view, x, target, given)
        v, value = grad_and_value(lambda u: objective.misfit(u, goal))(update)

        def inputs(params: Tree) -> tuple[Tensor, Tensor]:
            return grad(lambda x, t: clients.LOSSES[given](view.model, params, view.buffers, x, t), argnums=(0, 1))(
                x, target
            )

        dx, dt = jvp(inputs, (view.params,), (v,))[1]
        return value, view.client.scale * dx, view.client.scale * dt

    return one


def _structured(view: View, objective: Objective, given: str) -> Closure:
    assert view.model.layers is not None
    return structured.closure(
        view.model.layers, view.params, view.buffers, half_slope(objective), given, view.client.scale
    )

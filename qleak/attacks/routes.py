"""Three derivative routes behind one name: loss, and gradient in the guess, for every lane.

The quantity is L(x, t) = M(∇_θ ℓ(θ; x, t)) for an objective M of the update.

- "double": reverse over reverse, `grad` of a function that calls `grad`, under `vmap`.
- "forward": with v = ∇M at the update, ∇_(x,t) L = d/dε ∇_(x,t) ℓ(θ + εv; x, t): one `jvp` of the input
  gradient (forward over reverse), under `vmap`.
- "structured": the update by explicit formulas for all lanes together, then one reverse pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vmap

from qleak import client as clients
from qleak.attacks import structured
from qleak.attacks.objectives import Objective, value_and_slope
from qleak.check import one_of
from qleak.client import View
from qleak.types import Client, Model, Tree

Closure = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor, Tensor]]
ROUTES = ("auto", "structured", "double", "forward")

# Under `vmap` forward over reverse wins from about this many lanes on, measured on two CPU cores.
FORWARD_FROM = 128


def pick(model: Model, client: Client, lanes: int) -> tuple[str, str]:
    """The route for so many lanes, and the reason, for the terminal."""
    if not clients.is_gradient(client):
        return "double", "the update is not one gradient"
    if structured.supports(model.layers):
        return "structured", "the model declares its layers"
    if lanes >= FORWARD_FROM:
        return "forward", f"{lanes} lanes >= {FORWARD_FROM}"
    return "double", f"{lanes} lanes < {FORWARD_FROM}"


def closure(view: View, objective: Objective, route: str = "auto", given: str = "labels") -> Closure:
    """`(x [lane b c h w], t [lane b class], goal [lane …]) -> (L [lane], ∂L/∂x, ∂L/∂t)`, lanes independent.

    `given` says what t is: "labels" (probabilities of the classes) or "errors" (of the logits).
    """
    one_of(ROUTES, route=route)
    known = pick(view.model, view.client, view.lanes)[0]
    name = known if route == "auto" or not clients.is_gradient(view.client) else route
    if name == "structured":
        return _structured(view, objective, given)
    one = _double(view, objective, given) if name == "double" else _forward(view, objective, given)

    return vmap(one, randomness="error")


def update_of(view: View, x: Tensor, target: Tensor, given: str = "labels") -> Tree:
    """What the client would compute from images `[b c h w]` with label probabilities (or errors) `[b class]`."""
    return view.client.respond(clients.slope(view.model, view.buffers, given), view.params, x, target)


def updates(view: View, x: Tensor, target: Tensor, given: str = "labels") -> Tree:
    """`update_of` for all lanes, `x [lane b c h w]`: by explicit formulas where `pick` takes them, else under `vmap`."""
    if pick(view.model, view.client, view.lanes)[0] == "structured":
        return _explicit(view, x, target, given)
    return vmap(lambda x, t: update_of(view, x, t, given), randomness="error")(x, target)


def _explicit(view: View, x: Tensor, target: Tensor, given: str) -> Tree:
    assert view.model.layers is not None
    update = structured.lane_gradients(view.model.layers, view.params, x, target, given)
    return update if view.client.scale == 1 else {k: v * view.client.scale for k, v in update.items()}


def _double(view: View, objective: Objective, given: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def one(x: Tensor, target: Tensor, goal: Any) -> tuple[Tensor, Tensor, Tensor]:
        both = grad_and_value(lambda x, t: objective.misfit(update_of(view, x, t, given), goal), argnums=(0, 1))
        (dx, dt), value = both(x, target)
        return value, dx, dt

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
    def every(x: Tensor, target: Tensor, goal: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, target = x.detach().requires_grad_(), target.detach().requires_grad_()
        update = _explicit(view, x, target, given)
        value, slope = value_and_slope(objective, {k: v.detach() for k, v in update.items()}, goal)
        dx, dt = torch.autograd.grad(list(update.values()), [x, target], [slope[k] for k in update])
        return value, dx, dt

    return every

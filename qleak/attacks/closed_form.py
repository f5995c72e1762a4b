"""The gradient of one image, solved instead of matched: one linear system per layer, from the last to the first.

The last linear layer gives its input, h = (∂b·∂W)/|∂b|², and the output error δ = ∂b (Phong et al.
2018; Geiping et al. 2020, proposition 3.1). Below it, for an affine layer z = A h + c with an
invertible activation above, z and δ_z = ∂ℓ/∂z are known, and h solves two linear sets at once: the
forward equations A h = z − c, and the weight-gradient equations ∂K = J(δ_z) h. Then
δ_h = Aᵀ δ_z, and on to the next layer. R-GAP (Zhu & Blaschko, ICLR 2021) stacks the same two sets;
here rows of the first are weighted by act′(z), so that they count in units of what is known (the
activation's output), which keeps saturated units from drowning the rest.

ReLU has no inverse, but needs none: where a > 0, z = a; where a = 0, act′ = 0, so that the unit's forward equation
drops out, and δ_z = 0, so that it has no part in the weight-gradient equations either. What is left may have fewer
equations than unknowns (`layer_systems.ranks`); then the least-squares solution of minimum norm is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import vjp

from qleak import tree
from qleak.attacks import labels, layer_systems
from qleak.catalog import factory
from qleak.check import Expected, positive
from qleak.client import View, is_gradient
from qleak.models.layers import ACTIVATIONS, INVERSES, apply_layer
from qleak.types import Attack, Guess, Info, Layer, Params, Status, Tree

RELU_EDGE = 1e-4
"""A unit counts as inactive below this share of its layer's largest activation: solved values are zero up to rounding."""

SOLVED: dict[str, Callable[[Tensor], Tensor]] = {**INVERSES, "relu": lambda a: torch.where(_active(a), a, 0)}
"""z from a = act(z); for ReLU zero in place of what cannot be known, where act′ is zero."""


class SolveState(NamedTuple):
    """The solution of every lane, and how well it meets the last system."""

    x: Tensor
    labels: Tensor
    loss: Tensor
    status: Tensor


@factory
def closed_form(ridge: float = 1e-10) -> Attack:
    """The closed-form attack on one image; exact gradients of an invertible net come back to > 90 dB.

    ReLU nets are solved from their active units. Refused are nets that do not declare their layers (residual
    connections, pooling, normalisation: no chain of affine layers), and activations that are neither invertible nor
    ReLU (GELU takes the same value twice).

    Args:
        ridge: Tikhonov weight of each system, in parts of its mean diagonal.
    """
    positive(ridge=ridge)

    def applies(view: View) -> str:
        if view.client.batch != 1 or not is_gradient(view.client):
            return "needs the gradient of one image."
        return refuse(view.model.layers)

    def draw(gen: Generator, view: View) -> Tree:
        return {"x": torch.full((1, *view.model.shape), 0.5)}  # what it answers without evidence: grey

    def init(view: View, start: Tree) -> SolveState:
        lane = start["x"].new_zeros(len(start["x"]))
        inferred = labels.bias_sign(view.decoded(), view.model.classes)
        assert inferred is not None
        active = Status.ACTIVE if view.evidence else Status.FINISHED
        return SolveState(
            start["x"], inferred, lane, torch.full(lane.shape, active, dtype=torch.int64, device=lane.device)
        )

    def step(view: View, state: SolveState) -> tuple[SolveState, Info]:
        x, loss = solve_lanes(view, ridge)
        x, loss = x.to(state.x), loss.to(state.x)
        state = SolveState(x, state.labels, loss, torch.full_like(state.status, Status.FINISHED))
        return state, Info(loss, state.status)

    def read(view: View, state: SolveState) -> Guess:
        return Guess(state.x, state.labels, state.loss)

    papers = ("Zhu, Blaschko. R-GAP: Recursive Gradient Attack on Privacy. ICLR 2021.",)
    return Attack(draw, init, step, read, 1, applies, papers, restarts=False)


def solve_lanes(view: View, ridge: float = 1e-10) -> tuple[Tensor, Tensor]:
    """`solve` for every lane: images `[lane 1 c h w]` and residuals `[lane]`, float64, on the CPU.

    Restarts and controls share messages, so each message is solved once.
    """
    assert view.model.layers is not None
    decoded, params = tree.to(view.decoded(), "cpu"), tree.to(view.params, "cpu")
    solved: list[tuple[Tensor, Tensor]] = []
    for i in range(view.lanes):
        twin = next((j for j in range(i) if all(torch.equal(v[j], v[i]) for v in decoded.values())), None)
        if twin is None:
            solved.append(solve(view.model.layers, view.model.shape, params, tree.at(decoded, i), ridge))
        else:
            solved.append(solved[twin])
    return torch.stack([s[0] for s in solved]), torch.stack([s[1] for s in solved])


def refuse(layers: tuple[Layer, ...] | None) -> str:
    """Why a net cannot be solved, naming the layer; "" if it can."""
    if layers is None:
        return "needs a model that declares its layers."
    if layers[-1].kind != "linear":
        return f"needs a last linear layer, layer {len(layers)} is {layers[-1].kind}."
    for i, layer in enumerate(layers, start=1):
        if layer.kind in ("pool", "norm"):
            return f"needs a chain of affine layers and activations: layer {i} is a {layer.kind}."
        if layer.kind == "activation" and layer.options["function"] not in SOLVED:
            known = ", ".join(sorted(SOLVED))
            return f"needs invertible activations ({known}): layer {i} is {layer.options['function']}."
    return ""


def solve(
    layers: tuple[Layer, ...], shape: tuple[int, int, int], params: Params, update: Tree, ridge: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """The image `[1 c h w]` in float64 whose gradient is `update`, and the largest relative residual of a layer.

    Raises:
        Expected: the gradient is zero, so nothing was sent.
    """
    params, update = tree.to(params, torch.float64), tree.to(update, torch.float64)
    shapes: list[tuple[int, ...]] = [(1, *shape)]
    for layer in layers:
        shapes.append(tuple(apply_layer(layer, params, torch.zeros(shapes[-1], dtype=torch.float64)).shape))
    last = layers[-1].name
    error, outer = update[f"{last}.bias"], update[f"{last}.weight"]
    if not float(error.abs().max()) > 0:
        raise Expected("Expected a gradient other than zero, to solve for its image.")
    h = (error @ outer / error.dot(error))[None]
    delta = (error @ params[f"{last}.weight"])[None]
    slope, residual = torch.ones_like(h), h.new_zeros(())
    for layer, before in reversed(list(zip(layers[:-1], shapes[:-2], strict=True))):
        if layer.kind == "activation":
            act = ACTIVATIONS[layer.options["function"]]
            h = SOLVED[layer.options["function"]](_inside(layer.options["function"], h))
            slope = vjp(act, h)[1](torch.ones_like(h))[0]
            delta = delta * slope
        elif layer.kind == "flatten":
            h, delta, slope = h.reshape(before), delta.reshape(before), slope.reshape(before)
        elif layer.kind == "linear":  # ∂W = δ hᵀ is the whole system
            outer, delta = update[f"{layer.name}.weight"], delta.reshape(1, -1)
            h = delta @ outer / delta.square().sum().clamp(min=1e-300)
            missed = (outer - delta.mT @ h).norm() / outer.norm().clamp(min=1e-300)
            delta, slope = delta @ params[f"{layer.name}.weight"], torch.ones_like(h)
            residual = torch.maximum(residual, missed)
        else:
            h, delta, missed = layer_systems.invert(layer, params, update, before, h, delta, slope, ridge)
            slope, residual = torch.ones_like(h), torch.maximum(residual, missed)
    return h, residual


def _active(a: Tensor) -> Tensor:
    return a > RELU_EDGE * a.amax().clamp(min=1e-300)


def _inside(function: str, a: Tensor) -> Tensor:
    """Clamped into the open range of an activation: float64 leaves exact values alone, decoded ones may lie outside."""
    edge = 1e-12
    match function:
        case "sigmoid":
            return a.clamp(edge, 1 - edge)
        case "tanh":
            return a.clamp(-1 + edge, 1 - edge)
        case "softplus":
            return a.clamp(min=edge)
        case _:
            return a

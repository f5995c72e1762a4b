"""The gradient of one image, solved instead of matched: one linear system per layer, from the last to the first.

The last linear layer gives its input, h = (∂b·∂W)/|∂b|², and the output error δ = ∂b (Phong et al.
2018; Geiping et al. 2020, proposition 3.1). Below it, for an affine layer z = A h + c with an
invertible activation above, z and δ_z = ∂ℓ/∂z are known, and h solves two linear sets at once: the
forward equations A h = z − c, and the weight-gradient equations ∂K = J(δ_z) h. Then
δ_h = Aᵀ δ_z, and on to the next layer. R-GAP (Zhu & Blaschko, ICLR 2021) stacks the same two sets;
here rows of the first are weighted by act′(z), so that they count in units of what is known (the
activation's output), which keeps saturated units from drowning the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import vjp, vmap

from qleak import tree
from qleak.attacks import labels
from qleak.catalog import factory
from qleak.check import Expected, positive
from qleak.client import View
from qleak.models.layers import ACTIVATIONS, INVERSES, apply_layer
from qleak.types import Attack, Guess, Info, Layer, Params, Status, Tree


class SolveState(NamedTuple):
    """The solution of every lane, and how well it meets the last system."""

    x: Tensor
    labels: Tensor
    loss: Tensor
    status: Tensor


@factory
def closed_form(ridge: float = 1e-10) -> Attack:
    """The closed-form attack on one image; exact gradients of an invertible net come back to > 90 dB.

    Args:
        ridge: Tikhonov weight of each system, in parts of its mean diagonal.
    """
    positive(ridge=ridge)

    def applies(view: View) -> str:
        if view.client.batch != 1 or view.client.rows:
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
        if layer.kind == "activation" and layer.options["function"] not in INVERSES:
            known = ", ".join(sorted(INVERSES))
            return f"needs invertible activations ({known}): layer {i} is {layer.options['function']}."
    return ""


def solve(
    layers: tuple[Layer, ...], shape: tuple[int, int, int], params: Params, update: Tree, ridge: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """The image `[1 c h w]` in float64 whose gradient is `update`, and the relative residual of the last system.

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
            h = INVERSES[layer.options["function"]](_inside(layer.options["function"], h))
            slope = vjp(act, h)[1](torch.ones_like(h))[0]
            delta = delta * slope
        elif layer.kind == "flatten":
            h, delta, slope = h.reshape(before), delta.reshape(before), slope.reshape(before)
        elif layer.kind == "linear":  # ∂W = δ hᵀ is the whole system
            outer, delta = update[f"{layer.name}.weight"], delta.reshape(1, -1)
            h = delta @ outer / delta.square().sum()
            residual = (outer - delta.mT @ h).norm() / outer.norm()
            delta, slope = delta @ params[f"{layer.name}.weight"], torch.ones_like(h)
        else:
            h, delta, residual = _invert(layer, params, update, before, h, delta, slope, ridge)
            slope = torch.ones_like(h)
    return h, residual


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


def _invert(
    layer: Layer,
    params: Params,
    update: Tree,
    before: tuple[int, ...],
    z: Tensor,
    delta: Tensor,
    slope: Tensor,
    ridge: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, δ_h, relative residual) in front of one affine layer, from z, δ_z and its weight gradient."""
    name = f"{layer.name}.weight"
    bare = {name: params[name], f"{layer.name}.bias": torch.zeros_like(params[f"{layer.name}.bias"])}
    zero = torch.zeros(before, dtype=torch.float64)
    offset = apply_layer(layer, params, zero)
    transpose = vjp(lambda h: apply_layer(layer, bare, h), zero)[1]

    def pull(
        kernel: Tensor,
    ) -> Tensor:  # row of J(δ): the weight-gradient entry in direction `kernel`, as a function of h
        return vjp(lambda h: apply_layer(layer, {**bare, name: kernel}, h), zero)[1](delta)[0].flatten()

    forward = vmap(lambda unit: transpose(unit)[0].flatten(), chunk_size=128)(_basis(z.shape))
    weights = vmap(pull, chunk_size=128)(_basis(params[name].shape))
    # Each set in units of its own size, so that neither outvotes the other.
    target = (slope * (z - offset)).flatten()
    first, second = 1 / target.norm().clamp(min=1e-300), 1 / update[name].norm().clamp(min=1e-300)
    rows = torch.cat([forward * slope.flatten()[:, None] * first, weights * second])
    goal = torch.cat([target * first, update[name].flatten() * second])
    h = _least_squares(rows, goal, ridge)
    residual = (goal - rows @ h).norm() / goal.norm()
    return h.reshape(before), transpose(delta)[0], residual


def _least_squares(rows: Tensor, goal: Tensor, ridge: float) -> Tensor:
    """The minimiser of |rows·h − goal|² + ridge·trace/d·|h|² in float64.

    The normal equations are factored in float32, which takes half the time, and the factor only
    preconditions conjugate gradients on the float64 rows, which restore the accuracy.
    """
    single = rows.float()
    normal = single.mT @ single
    mean = normal.diagonal().mean()
    normal.diagonal().add_(1e-6 * mean)
    factor = torch.linalg.cholesky(normal)
    weight = ridge * mean.double()

    def precondition(r: Tensor) -> Tensor:
        return torch.cholesky_solve(r.float()[:, None], factor)[:, 0].double()

    h = torch.zeros_like(rows[0])
    rest = rows.mT @ goal
    first = rest.norm()
    step = precondition(rest)
    product = rest.dot(step)
    for _ in range(100):
        image = rows.mT @ (rows @ step) + weight * step
        length = product / step.dot(image)
        h, rest = h + length * step, rest - length * image
        if rest.norm() <= 1e-14 * first:
            break
        turned = precondition(rest)
        product, before = rest.dot(turned), product
        step = turned + product / before * step
    return h


def _basis(shape: torch.Size) -> Tensor:
    return torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)

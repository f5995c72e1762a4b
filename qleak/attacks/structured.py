"""Gradients of many lanes at once by explicit formulas, for nets that declare their layers.

`vmap` over a gradient turns every convolution's weight gradient into a grouped convolution, which
is slow on a CPU. Here the backward pass is written out once per layer kind, so that lanes share
the big convolutions and only the weight gradients are a batched matrix product (unfold + bmm). The
result is an ordinary differentiable function of the images: one more reverse pass gives what an
attack needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qleak.models.layers import ACTIVATIONS
from qleak.types import Layer, Params, Tree


def slope(function: str, z: Tensor, a: Tensor) -> Tensor:
    """act'(z), given z and a = act(z); differentiable."""
    match function:
        case "sigmoid":
            return a * (1 - a)
        case "tanh":
            return 1 - a.square()
        case "relu":
            return (z > 0).to(z.dtype)
        case "leaky_relu":
            return torch.where(z > 0, torch.ones_like(z), torch.full_like(z, 0.01))
        case "softplus":
            return torch.sigmoid(z)
        case _:
            raise KeyError(function)


SLOPES = ("sigmoid", "tanh", "relu", "leaky_relu", "softplus")


def supports(layers: tuple[Layer, ...] | None) -> bool:
    """Whether every layer has an explicit backward formula here."""
    return layers is not None and all(
        layer.kind != "activation" or layer.options["function"] in SLOPES for layer in layers
    )


def lane_gradients(layers: tuple[Layer, ...], params: Params, x: Tensor, target: Tensor, given: str = "labels") -> Tree:
    """∇_θ of each lane's mean cross-entropy: `x [lane b c h w]`, `target [lane b class] -> {name: [lane …]}`.

    With `given="errors"`, `target` is the output error itself (see `client.linear_loss`).
    Differentiable in `x` and `target`. Equal to `vmap(grad(loss))`, proved by test in float64.
    """
    lanes, b = x.shape[:2]
    h = x.flatten(0, 1)
    tape: list[tuple[Tensor, Tensor]] = []  # input and output of every layer
    for layer in layers:
        out = _forward(layer, params, h)
        tape.append((h, out))
        h = out
    delta = target.flatten(0, 1)
    if given == "labels":
        delta = (torch.softmax(h, -1) * delta.sum(-1, keepdim=True) - delta) / b
    grads: Tree = {}
    first = next(i for i, layer in enumerate(layers) if layer.name)
    for i in range(len(layers) - 1, first - 1, -1):
        layer, (before, after) = layers[i], tape[i]
        if layer.name:
            weight, bias = _weight_gradient(layer, before, delta, lanes)
            grads[f"{layer.name}.bias"], grads[f"{layer.name}.weight"] = bias, weight
        if i > first:
            delta = _backward(layer, params, before, after, delta)
    return {k: grads[k] for k in params}


def _forward(layer: Layer, params: Params, h: Tensor) -> Tensor:
    match layer.kind:
        case "conv":
            weight, bias = params[f"{layer.name}.weight"], params[f"{layer.name}.bias"]
            return F.conv2d(h, weight, bias, stride=layer.options["stride"], padding=layer.options["padding"])
        case "linear":
            return F.linear(h, params[f"{layer.name}.weight"], params[f"{layer.name}.bias"])
        case "activation":
            return ACTIVATIONS[layer.options["function"]](h)
        case "flatten":
            return h.flatten(1)


def _weight_gradient(layer: Layer, h: Tensor, delta: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
    if layer.kind == "linear":
        h, delta = h.unflatten(0, (lanes, -1)), delta.unflatten(0, (lanes, -1))
        return torch.bmm(delta.mT, h), delta.sum(1)
    o = layer.options
    patches = F.unfold(h, o["kernel"], padding=o["padding"], stride=o["stride"])
    flat = delta.flatten(2)
    if len(h) == lanes:  # one image a lane: no copy to gather its positions
        weight = torch.bmm(flat, patches.mT)
    else:
        left = flat.unflatten(0, (lanes, -1)).transpose(1, 2).flatten(2)
        right = patches.unflatten(0, (lanes, -1)).transpose(1, 2).flatten(2)
        weight = torch.bmm(left, right.mT)
    return weight.reshape(lanes, o["out"], o["in"], o["kernel"], o["kernel"]), flat.sum(-1).unflatten(
        0, (lanes, -1)
    ).sum(1)


def _backward(layer: Layer, params: Params, before: Tensor, after: Tensor, delta: Tensor) -> Tensor:
    match layer.kind:
        case "linear":
            return delta @ params[f"{layer.name}.weight"]
        case "activation":
            return delta * slope(layer.options["function"], before, after)
        case "flatten":
            return delta.reshape(before.shape)
        case "conv":
            o = layer.options
            rest = [(n + 2 * o["padding"] - o["kernel"]) % o["stride"] for n in before.shape[2:]]
            return F.conv_transpose2d(
                delta, params[f"{layer.name}.weight"], stride=o["stride"], padding=o["padding"], output_padding=rest
            )

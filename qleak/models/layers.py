"""The layers of a sequential net, declared once: forward map, parameter shapes, inverse activations.

One declaration serves the forward pass, the closed-form attack and every later use that needs to
know what a layer is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from qleak import random
from qleak.check import Expected, one_of
from qleak.models import taps
from qleak.types import Buffers, Layer, Model, Params

Function = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Function] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}

# Inverses on the open range of the activation; ReLU, GELU and SiLU have none.
INVERSES: dict[str, Function] = {
    "sigmoid": torch.logit,
    "tanh": torch.atanh,
    "softplus": lambda a: a + torch.log(-torch.expm1(-a)),
    "leaky_relu": lambda a: torch.where(a > 0, a, a / 0.01),
}


def conv(name: str, cin: int, cout: int, kernel: int, stride: int = 1, padding: int = 0) -> Layer:
    """Convolution: z = K ⋆ h + b, `[b cin h w] -> [b cout h' w']`."""
    return Layer(name, "conv", {"in": cin, "out": cout, "kernel": kernel, "stride": stride, "padding": padding})


def linear(name: str, cin: int, cout: int) -> Layer:
    """Linear layer: z = W h + b, `[b cin] -> [b cout]`."""
    return Layer(name, "linear", {"in": cin, "out": cout})


def activation(function: str) -> Layer:
    """Elementwise activation by name (see `ACTIVATIONS`)."""
    one_of(ACTIVATIONS, activation=function)
    return Layer("", "activation", {"function": function})


def flatten() -> Layer:
    """`[b c h w] -> [b c·h·w]`."""
    return Layer("", "flatten")


def pool(function: str, kernel: int, stride: int = 0, padding: int = 0) -> Layer:
    """Means or maxima of windows, padded by zeros that count or by nothing: `[b c h w] -> [b c h' w']`; stride 0: the kernel's."""
    one_of(("mean", "max"), pool=function)
    return Layer("", "pool", {"function": function, "kernel": kernel, "stride": stride or kernel, "padding": padding})


def norm(name: str, groups: int | str, channels: int, eps: float = 1e-5, running: str = "") -> Layer:
    """γ (h − μ)/√(var + ε) + β, γ and β one number a channel; without a name neither.

    Args:
        name: prefix of its parameters, "" without.
        groups: so many groups of an image's channels share μ and var (Wu & He 2018), or every channel has its own over
            the "batch" (Ioffe & Szegedy 2015), or among the buffers ("running", `running_mean`, `running_var`).
        channels: number of channels.
        eps: ε.
        running: prefix of the running statistics among the buffers, where it is not `name`.
    """
    return Layer(name, "norm", {"groups": groups, "out": channels, "eps": eps, "running": running or name})


def apply_layer(layer: Layer, params: Params, h: Tensor, buffers: Buffers | None = None) -> Tensor:
    """The forward map of one layer on a batch."""
    match layer.kind:
        case "pool":
            o = layer.options
            return (F.avg_pool2d if o["function"] == "mean" else F.max_pool2d)(
                h, o["kernel"], o["stride"], o["padding"]
            )
        case "norm":
            return _normalised(layer, params, h, buffers or {})
        case "conv":
            weight, bias = params[f"{layer.name}.weight"], params[f"{layer.name}.bias"]
            return F.conv2d(h, weight, bias, stride=layer.options["stride"], padding=layer.options["padding"])
        case "linear":
            return F.linear(h, params[f"{layer.name}.weight"], params[f"{layer.name}.bias"])
        case "activation":
            return ACTIVATIONS[layer.options["function"]](h)
        case "flatten":
            return h.flatten(1)


def _normalised(layer: Layer, params: Params, h: Tensor, buffers: Buffers) -> Tensor:
    groups, eps = layer.options["groups"], layer.options["eps"]
    weight, bias = (params[f"{layer.name}.{end}"] if layer.name else None for end in ("weight", "bias"))
    if isinstance(groups, int):
        return F.group_norm(h, groups, weight, bias, eps)
    running = groups == "running"
    mean, var = (buffers[f"{layer.options['running']}.running_{end}"] if running else None for end in ("mean", "var"))
    return F.batch_norm(h, mean, var, weight, bias, training=not running, eps=eps)


def shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of one layer by full name."""
    o = layer.options
    if layer.kind == "conv":
        weight = (o["out"], o["in"], o["kernel"], o["kernel"])
    elif layer.kind == "linear":
        weight = (o["out"], o["in"])
    elif layer.kind == "norm" and layer.name:
        weight = (o["out"],)
    else:
        return {}
    return {f"{layer.name}.weight": weight, f"{layer.name}.bias": (o["out"],)}


def after(layer: Layer, before: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a layer's output for an input of shape `before`, batch first.

    By arithmetic: torch's meta tensors would tell, too, and import seconds' worth of its compiler for it.

    Raises:
        Expected: the layer does not fit such an input.
    """
    o = layer.options

    def misfit(wanted: str) -> Expected:
        where = f"{layer.kind} {layer.name}".strip()
        return Expected(f"Expected {wanted} in front of {where}; got {before[1:]}.")

    if layer.kind == "flatten":
        return (before[0], math.prod(before[1:]))
    if layer.kind == "conv" and (len(before) != 4 or before[1] != o["in"]):
        raise misfit(f"{o['in']} channels")
    if layer.kind == "linear":
        if before[1:] != (o["in"],):
            raise misfit(f"{o['in']} numbers")
        return (before[0], o["out"])
    if layer.kind in ("conv", "pool"):
        sides = [(n + 2 * o["padding"] - o["kernel"]) // o["stride"] + 1 for n in before[2:]]
        if len(sides) != 2 or min(sides) < 1:
            raise misfit(f"at least {o['kernel']} pixels a side")
        return (before[0], o.get("out", before[1]), *sides)
    return before


def default_init(gen: Generator, layer: Layer) -> Params:
    """Torch's default: weights and biases ~ U(−1/√fan_in, 1/√fan_in)."""
    o = layer.options
    bound = 1 / math.sqrt(o["in"] * o.get("kernel", 1) ** 2)
    return {k: (2 * random.uniform(gen, s) - 1) * bound for k, s in shapes(layer).items()}


def wide_init(gen: Generator, layer: Layer) -> Params:
    """Weights and biases ~ U(−0.5, 0.5): Zhu et al. 2019, the setting in which the first attack was shown."""
    return {k: random.uniform(gen, s) - 0.5 for k, s in shapes(layer).items()}


def sequential(
    layers: Sequence[Layer],
    shape: tuple[int, int, int],
    init: Callable[[Generator, Layer], Params] = default_init,
) -> Model:
    """A `Model` from its layers; `init(generator, layer)` draws the parameters of one layer; a norm starts at γ = 1, β = 0.

    Raises:
        Expected: a layer does not fit the output of the one before.
    """
    layers = tuple(layers)

    def initialise(gen: Generator) -> tuple[Params, Buffers]:
        params: Params = {}
        for layer in layers:
            if layer.kind == "norm":
                params |= {k: torch.full(s, float(k.endswith("weight"))) for k, s in shapes(layer).items()}
            elif shapes(layer):
                params |= init(gen, layer)
        return params, {}

    def apply(params: Params, buffers: Buffers, x: Tensor) -> Tensor:
        for layer in layers:
            x = apply_layer(layer, params, x)
        return x

    outs = tuple(accumulate(layers, lambda before, layer: after(layer, before), initial=(1, *shape)))[1:]
    plain = not any(layer.kind == "norm" for layer in layers)
    tapped = taps.of_layers(layers, outs, apply_layer) if plain else None
    return Model(initialise, apply, shape, outs[-1][1], layers, tapped=tapped)

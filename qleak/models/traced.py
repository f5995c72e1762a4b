"""A module's forward pass read as a list of layers, where it is a chain of the kinds that attacks can solve."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qleak import random
from qleak.models.layers import activation, apply_layer, conv, flatten, linear
from qleak.types import Layer

MODULES: dict[type, str] = {
    nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.ReLU: "relu", nn.SiLU: "silu", nn.Softplus: "softplus", nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu",
}  # fmt: skip
FUNCTIONS: dict[Any, str] = {
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", torch.tanh: "tanh", F.tanh: "tanh", torch.relu: "relu", F.relu: "relu",
    F.silu: "silu", F.softplus: "softplus", F.gelu: "gelu", F.leaky_relu: "leaky_relu",
}  # fmt: skip
METHODS = ("sigmoid", "tanh", "relu")
SIZES = ("size",)
TOLERANCE = 1e-5


def layers_of(module: nn.Module, shape: tuple[int, int, int]) -> tuple[Layer, ...] | None:
    """The layers of `module` on images of `shape`, None where it is no such chain.

    The forward pass is traced symbolically (torch.fx) and every step has to be a convolution or linear layer with bias, an
    activation by its defaults, a flattening or nothing (dropout at rest). What comes out has to compute what the module
    does, on noise, to 1e-5: a reading that is merely plausible is dropped.
    """
    if not all(p.requires_grad for p in module.parameters()):
        return None  # a frozen layer sends no gradient, so what an attack would solve is not there
    net = copy.deepcopy(module).eval()
    try:
        found = _chain(fx.symbolic_trace(net), dict(net.named_modules()))
    except Exception:  # whatever foreign code does under a tracer: it is then no chain that is known
        return None
    params = {k: v.detach() for k, v in net.named_parameters()}
    owned = [f"{layer.name}.{end}" for layer in found or () if layer.name for end in ("weight", "bias")]
    if found is None or sorted(owned) != sorted(params) or any(v.is_meta for v in params.values()):
        return None
    x = random.uniform(random.generator("traced"), (2, *shape))
    try:
        with torch.no_grad():
            want: Tensor = net(x)
            h = x
            for layer in found:
                h = apply_layer(layer, params, h)
    except RuntimeError:
        return None
    same = h.shape == want.shape and bool((h - want).abs().max() <= TOLERANCE * want.abs().max().clamp(min=1e-12))
    return found if same else None


def _chain(graph: fx.GraphModule, modules: dict[str, nn.Module]) -> tuple[Layer, ...] | None:
    """The layers along the one path from the input to the output; None where there is another."""
    layers: list[Layer] = []
    last: fx.Node | None = None
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if last is not None:
                return None
            last = node
        elif node.op == "output":
            return tuple(layers) if node.args[0] is last else None
        elif _size(node):
            continue
        elif last is None or node.args[:1] != (last,):
            return None
        else:
            step = _step(node, modules)
            if step is None:
                return None
            layers += step
            last = node
    return None


def _size(node: fx.Node) -> bool:
    """`x.size(0)`, `x.shape[0]`: numbers, not images."""
    if node.op == "call_method":
        return node.target in SIZES
    return node.op == "call_function" and node.target in (getattr, operator.getitem)


def _step(node: fx.Node, modules: dict[str, nn.Module]) -> list[Layer] | None:
    """The layers of one operation: none for what changes nothing, None for what is not known."""
    if node.op == "call_module":
        return _module(str(node.target), modules[str(node.target)])
    if node.op == "call_method":
        if node.target in METHODS:
            return [activation(str(node.target))]
        return [flatten()] if node.target in ("flatten", "view", "reshape") else None
    if node.target in (torch.flatten, torch.reshape):
        return [flatten()]
    name = FUNCTIONS.get(node.target) if len(node.args) == 1 and set(node.kwargs) <= {"inplace"} else None
    return [activation(name)] if name else None


def _module(name: str, part: nn.Module) -> list[Layer] | None:
    if isinstance(part, nn.Identity | nn.Dropout | nn.Dropout2d):
        return []
    if isinstance(part, nn.Flatten):
        return [flatten()]
    if isinstance(part, nn.Linear) and part.bias is not None:
        return [linear(name, part.in_features, part.out_features)]
    if isinstance(part, nn.Conv2d) and part.bias is not None and not isinstance(part.padding, str):
        square = all(len(set(v)) == 1 for v in (part.kernel_size, part.stride, part.padding))
        if square and part.groups == 1 and set(part.dilation) == {1} and part.padding_mode == "zeros":
            k, s, p = part.kernel_size[0], part.stride[0], part.padding[0]
            return [conv(name, part.in_channels, part.out_channels, k, s, p)]
        return None
    return [activation(MODULES[type(part)])] if type(part) in MODULES else None

"""A module's forward pass read as a list of layers, where it is a chain of the kinds that attacks can solve."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qleak import random
from qleak.models.layers import activation, apply_layer, conv, flatten, linear, norm, pool
from qleak.models.norm import Activation
from qleak.types import Layer

MODULES: dict[type, str] = {
    nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.ReLU: "relu", nn.SiLU: "silu", nn.Softplus: "softplus", nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu",
}  # fmt: skip
FUNCTIONS: dict[Any, str] = {
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", torch.tanh: "tanh", F.tanh: "tanh", torch.relu: "relu", F.relu: "relu",
    F.silu: "silu", F.softplus: "softplus", F.gelu: "gelu", F.leaky_relu: "leaky_relu",
}  # fmt: skip
POOLS: dict[Any, str] = {F.max_pool2d: "max", F.avg_pool2d: "mean", torch.max_pool2d: "max"}
POOLED = {
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
    "count_include_pad": True,
    "divisor_override": None,
}
METHODS = ("sigmoid", "tanh", "relu")
SIZES = ("size",)
TOLERANCE = 1e-5


class _Tracer(fx.Tracer):
    """Leaves our own activations whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Activation) or super().is_leaf_module(m, module_qualified_name)


def declared(module: nn.Module) -> tuple[Layer, ...] | None:
    """The layers of `module` as it stands (batch norms by the batch where they train), None where it is no such chain.

    The forward pass is traced symbolically (torch.fx) and every step has to be a convolution or linear layer with bias, an
    activation by its defaults, pooling, normalisation, a flattening or nothing (dropout at rest).
    """
    if not all(p.requires_grad for p in module.parameters()):
        return None  # a frozen layer sends no gradient, so what an attack would solve is not there
    try:
        graph = fx.GraphModule(module, _Tracer().trace(module))
        found = _chain(graph, dict(module.named_modules()))
    except Exception:  # whatever foreign code does under a tracer: it is then no chain that is known
        return None
    owned = [f"{layer.name}.{end}" for layer in found or () if layer.name for end in ("weight", "bias")]
    return found if sorted(owned) == sorted(k for k, _ in module.named_parameters()) else None


def layers_of(module: nn.Module, shape: tuple[int, int, int], mode: str = "eval") -> tuple[Layer, ...] | None:
    """`declared`, tried: what comes out has to compute what the module does on noise of `shape`, to 1e-5.

    A reading that is merely plausible is dropped. Batch norm goes by the running statistics or, with `mode="train"`,
    by the batch.
    """
    net = copy.deepcopy(module).eval()
    for part in net.modules():
        part.train(mode == "train" and isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d))
    found = declared(net)
    params = {k: v.detach() for k, v in net.named_parameters()}
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    if found is None or any(v.is_meta for v in params.values()):
        return None
    x = random.uniform(random.generator("traced"), (2, *shape))
    try:
        with torch.no_grad():
            want: Tensor = net(x)
            h = x
            for layer in found:
                h = apply_layer(layer, params, h, buffers)
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
    if node.target in POOLS:
        given = dict(zip(("kernel_size", "stride", "padding"), node.args[1:], strict=False)) | node.kwargs
        return _pool(POOLS[node.target], given)
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
    if isinstance(part, nn.AvgPool2d | nn.MaxPool2d):
        given = {
            k: v for k in (*POOLED, "kernel_size", "stride", "padding") if (v := getattr(part, k, None)) is not None
        }
        return _pool("mean" if isinstance(part, nn.AvgPool2d) else "max", given)
    if isinstance(part, nn.GroupNorm):
        return [norm(name if part.affine else "", part.num_groups, part.num_channels, part.eps)]
    if isinstance(part, nn.LayerNorm) and not part.elementwise_affine and len(part.normalized_shape) in (1, 3):
        return [norm("", 1, part.normalized_shape[0], part.eps)]  # of a whole image, or of a vector
    if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
        groups = "batch" if part.training or part.running_mean is None else "running"
        return [norm(name if part.affine else "", groups, part.num_features, part.eps, running=name)]
    if isinstance(part, Activation):
        return [activation(part.function)]
    return [activation(MODULES[type(part)])] if type(part) in MODULES else None


def _pool(function: str, given: Mapping[str, Any]) -> list[Layer] | None:
    if any(v != POOLED[k] for k, v in given.items() if k in POOLED) or len({*given} - {*POOLED}) > 3:
        return None
    numbers = []
    for name, usual in (("kernel_size", None), ("stride", None), ("padding", 0)):
        value = given.get(name, usual)
        value = given["kernel_size"] if value is None else value
        sides = {*value} if isinstance(value, tuple | list) else {value}
        if len(sides) != 1 or not all(isinstance(side, int) for side in sides):
            return None
        numbers += sides
    return [pool(function, *numbers)]

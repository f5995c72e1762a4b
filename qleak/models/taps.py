"""Nets opened at their layers: where each input is seen, and where a tap is added to each output (`Tapped`).

A layer counts as known where its parameters' gradients follow from its input and its output's gradient alone: a
convolution, a linear layer, a norm that looks at one example at a time. A parameter that is used other than once
(tied weights, a module called twice, a weight taken by hand) leaves the net closed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qleak.types import Buffers, Layer, Owner, Params, Tapped, Tree

KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.Linear: "linear",
    nn.GroupNorm: "group",
    nn.LayerNorm: "layer",
    nn.BatchNorm1d: "batch",
    nn.BatchNorm2d: "batch",
}
TRIED = (3, 2)  # sizes of two batches: an axis that is the batch has both


def of_layers(
    layers: Sequence[Layer], outs: Sequence[tuple[int, ...]], apply_layer: Callable[[Layer, Params, Tensor], Tensor]
) -> Tapped:
    """A sequential net, opened; `outs` are the shapes behind its layers."""
    found = []
    for layer, out in zip(layers, outs, strict=True):
        if layer.kind == "conv" or layer.kind == "linear":
            names = {"weight": f"{layer.name}.weight", "bias": f"{layer.name}.bias"}
            found.append(Owner(layer.name, layer.kind, {**layer.options, **names, "out": out[1:]}))

    def run(params: Params, buffers: Buffers, x: Tensor, taps: Tree) -> tuple[Tensor, Tree]:
        inputs: Tree = {}
        for layer in layers:
            inputs |= {layer.name: x} if layer.name else {}
            x = apply_layer(layer, params, x)
            x = x + taps[layer.name] if layer.name else x
        return x, inputs

    return Tapped(tuple(found), run)


def of_module(net: nn.Module, apply: Callable[..., Tensor], buffers: Buffers, shape: tuple[int, ...]) -> Tapped | None:
    """A module, opened by hooks while it runs; None where it does not qualify, or does not run on the meta device."""
    owners = {name: part for name, part in net.named_modules() if any(True for _ in part.parameters(False))}
    held = [p for part in owners.values() for p in part.parameters(False)]
    if len({id(p) for p in held}) != len(held) or not all(_known(part, buffers, n) for n, part in owners.items()):
        return None
    params = {k: torch.empty_like(v, device="meta") for k, v in net.named_parameters()}
    blank = {k: torch.empty_like(v, device="meta") for k, v in buffers.items()}
    tried = []
    for b in TRIED:
        calls: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        uses = _Uses(params)

        def note(name: str, x: Tensor, out: Tensor, calls: list = calls) -> None:
            calls.append((name, tuple(x.shape), tuple(out.shape)))

        try:
            with torch.no_grad(), uses:
                _hooked(owners, note, lambda b=b: apply(params, blank, torch.empty(b, *shape, device="meta")))
        except (RuntimeError, TypeError, NotImplementedError, AssertionError, ValueError):
            return None
        names = [name for name, *_ in calls]
        if sorted(names) != sorted(owners) or any(n != 1 for n in uses.count.values()):
            return None
        if any(x[0] != b or out[0] != b for _, x, out in calls):
            return None
        tried.append([(name, x[1:], out[1:]) for name, x, out in calls])
    if tried[0] != tried[1]:
        return None
    layers = tuple(_layer(name, owners[name], out) for name, _, out in tried[0])

    def run(params: Params, buffers: Buffers, x: Tensor, taps: Tree) -> tuple[Tensor, Tree]:
        inputs: Tree = {}

        def tap(name: str, x: Tensor, out: Tensor) -> Tensor:
            inputs[name] = x
            return out + taps[name]

        logits = _hooked(owners, tap, lambda: apply(params, buffers, x))
        return logits, inputs

    return Tapped(layers, run)


def _known(part: nn.Module, buffers: Buffers, name: str) -> bool:
    """A layer of `KINDS` itself (no subclass), whose rows are each example's own."""
    if type(part) is nn.Conv2d:
        return (
            part.groups == 1 and set(part.dilation) == {1} and part.padding_mode == "zeros" and part.padding != "same"
        )
    if type(part) in (nn.BatchNorm1d, nn.BatchNorm2d):
        return not part.training and f"{name}.running_mean".lstrip(".") in buffers
    return type(part) in KINDS


def _layer(name: str, part: nn.Module, out: tuple[int, ...]) -> Owner:
    prefix = f"{name}." if name else ""
    options: dict[str, Any] = {k: f"{prefix}{k}" if getattr(part, k) is not None else "" for k in ("weight", "bias")}
    for option, source in (("eps", "eps"), ("groups", "num_groups"), ("shape", "normalized_shape")):
        if hasattr(part, source):
            options[option] = getattr(part, source)
    if isinstance(part, nn.Conv2d):
        options |= {"stride": part.stride, "kernel": part.kernel_size}
        options["padding"] = (0, 0) if part.padding == "valid" else part.padding
    return Owner(name, KINDS[type(part)], options | {"out": out})  # type: ignore[arg-type]


def _hooked(parts: Mapping[str, nn.Module], hook: Callable[..., Any], run: Callable[[], Any]) -> Any:
    """`run()` while `hook(name, input, output)` sees every call of `parts`, and replaces the output it answers with one."""

    def named(name: str) -> Callable[..., Any]:
        return lambda part, args, out: hook(name, args[0], out)

    handles = [part.register_forward_hook(named(name)) for name, part in parts.items()]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


class _Uses(TorchDispatchMode):
    """Counts the operations that take each parameter itself."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.names = {id(v): k for k, v in params.items()}
        self.count = dict.fromkeys(params, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if id(value) in self.names:
                self.count[self.names[id(value)]] += 1
        return func(*args, **(kwargs or {}))

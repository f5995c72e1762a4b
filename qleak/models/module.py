"""Any `nn.Module` as a `Model`, through `torch.func.functional_call`; what batch norm does in it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from qleak.check import Expected, one_of
from qleak.models import taps
from qleak.models.fresh import fresh as drawn
from qleak.types import Buffers, Model, Params, Tree

MODES = ("eval", "train")


def from_module(
    module: nn.Module,
    shape: tuple[int, int, int],
    classes: int,
    spec: str = "",
    mode: str = "eval",
    fresh: bool = False,
) -> Model:
    """A `Model` around a copy of `module`; the module itself is left as it is.

    Batch norm normalises by its running statistics (`mode="eval"`, Dropout off), or by those of the batch
    it gets (`mode="train"`): x̂ = (x − mean_bhw x)/√(var_bhw x + ε), var biased (Ioffe & Szegedy 2015).
    In both modes the running ones are among the buffers (a threat model may share them), and no mode
    writes any: what training would make of them has to be computed from `Model.statistics`.

    Frozen parameters (`requires_grad` False) are no part of an update, and stand among the buffers; a tied one has the
    first of its names. Weights keep the module's dtype.

    Args:
        module: any module whose forward takes `[b c h w]` and returns `[b class]`; it may lie on the meta
            device if its weights are `fresh`.
        shape: `(c, h, w)` of one image.
        classes: number of logits.
        spec: the call that makes the model again, where there is one.
        mode: "eval" or "train".
        fresh: `init` draws new weights from its generator (see `qleak.models.fresh`); otherwise it ignores
            the generator and returns copies of those the module has.

    Raises:
        Expected: the module does not return `[b, classes]` for an input of `shape`, draws at random (Dropout
            in "train"), writes a buffer of its own, trains nothing, or cannot be called with other weights.
    """
    one_of(MODES, mode=mode)
    _callable(module)
    net = _still(module, mode)
    trained = [k for k, v in net.named_parameters() if v.requires_grad]
    frozen = {k: v.detach() for k, v in net.named_parameters() if not v.requires_grad}
    buffers = _buffers(net)
    if frozen and not trained:
        raise Expected("Expected a module that trains something: every parameter is frozen (requires_grad is False).")
    lost = [k for k, v in net.named_parameters() if v.is_meta and not fresh] + [
        k for k, v in buffers.items() if v.is_meta
    ]
    if lost:
        raise Expected(f"Expected a module with values, {lost[0]} lies on the meta device.")
    buffers |= frozen
    whole = {k: v.dtype for k, v in buffers.items() if not v.is_floating_point()}

    def init(gen: Generator) -> tuple[Params, Buffers]:
        every = drawn(net, gen) if fresh else {k: v.detach().clone() for k, v in net.named_parameters()}
        return {k: every[k] for k in trained}, {k: every[k] if k in frozen else v.clone() for k, v in buffers.items()}

    def apply(params: Params, buffers: Buffers, x: Tensor) -> Tensor:
        held = {k: v.to(whole[k]) if k in whole else v for k, v in buffers.items()}  # indices stay whole in float64
        try:
            with plain_attention():
                return functional_call(net, {**held, **params}, (x,))  # the trained one where a name is in both
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise Expected(
                f"Expected more than one value per channel in mode='train', batch norm got {str(error).split('got ')[-1]}:"
                " take a larger batch or image."
            ) from None

    _fits(net, apply, buffers, shape, classes, mode)
    norms = {name: m for name, m in net.named_modules() if isinstance(m, _BatchNorm)}
    if not norms:
        opened = None if frozen else taps.of_module(net, apply, buffers, shape)
        return Model(init, apply, shape, classes, None, spec, tapped=opened)
    batched = [name for name, m in norms.items() if m.training or m.running_mean is None]
    couples = f"batch norm {batched[0]} normalises by the batch" if batched else ""
    opened = None if couples or frozen else taps.of_module(net, apply, buffers, shape)

    @functools.cache
    def remade(mode: str) -> Model:
        other = copy.deepcopy(module)
        for part in other.modules():
            if mode != "train" and isinstance(part, _BatchNorm):
                _remember(part)
                part.__class__ = _Explicit if mode == "explicit" else part.__class__
        return from_module(other, shape, classes, spec, "train" if mode == "train" else "eval", fresh)

    return Model(
        init, apply, shape, classes, None, spec, _statistics(norms, apply), tapped=opened, couples=couples, remade=remade
    )  # fmt: skip


def _callable(module: nn.Module) -> None:
    """Refuses what `functional_call` cannot give other weights, or what cannot be copied."""
    if isinstance(module, torch.jit.ScriptModule):
        raise Expected(
            "Expected a module of Python code, got a compiled ScriptModule: pass the class it was made from."
        )
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise Expected(f"Expected the module inside, got {type(module).__name__} around it: pass its .module.")
    if isinstance(getattr(module, "_orig_mod", None), nn.Module):
        raise Expected("Expected the module as it was before torch.compile: pass its ._orig_mod.")
    blank = [k for k, v in module.named_parameters() if isinstance(v, nn.parameter.UninitializedParameter)]
    if blank:
        raise Expected(
            f"Expected parameters with shapes, {blank[0]} has none yet: run one batch through the lazy module."
        )


def _remember(part: _BatchNorm) -> None:
    """Gives a batch norm that keeps no running statistics blank ones."""
    if part.running_mean is not None:
        return
    part.track_running_stats = True
    device = "cpu" if part.weight is None else part.weight.device
    part.register_buffer("running_mean", torch.zeros(part.num_features, device=device))
    part.register_buffer("running_var", torch.ones(part.num_features, device=device))


def _still(module: nn.Module, mode: str) -> nn.Module:
    """A copy in `mode` whose norms keep no account of what they see, and that overwrites no activation."""
    try:
        net = copy.deepcopy(module).train(mode == "train")
    except (TypeError, RuntimeError) as error:
        raise Expected(f"Expected a module that can be copied: {str(error).splitlines()[0]}") from None
    for name, part in net.named_modules():
        if isinstance(part, _NormBase) and mode == "train":
            part.track_running_stats = False  # in training: by the batch alone, running ones neither read nor written
        if isinstance(part, _DropoutNd) and part.training and part.p > 0:
            raise Expected(
                f"Expected no dropout in mode='train', layer {name} has p={part.p:g}: set p=0 or mode='eval'."
            )
        if getattr(part, "inplace", None) is True:
            part.inplace = False  # type: ignore[assignment]
        for child, below in part.named_children():
            if isinstance(below, nn.Hardsigmoid):
                setattr(part, child, _Hardsigmoid())
    return net


class _Explicit(_BatchNorm):
    """Batch norm by running statistics in single operations: torch's own has no derivative with respect to them."""

    def forward(self, input: Tensor) -> Tensor:
        """`[b c …] -> [b c …]`."""
        assert self.running_mean is not None and self.running_var is not None
        shape = (-1, *(1,) * (input.ndim - 2))
        normal = (input - self.running_mean.reshape(shape)) * (self.running_var + self.eps).rsqrt().reshape(shape)
        return normal * self.weight.reshape(shape) + self.bias.reshape(shape) if self.affine else normal


class _Hardsigmoid(nn.Module):
    """relu6(h + 3)/6 in parts: torch's own kernel has no second derivative."""

    def forward(self, h: Tensor) -> Tensor:
        """`[…] -> […]`."""
        return F.relu6(h + 3) / 6


def _buffers(net: nn.Module) -> Buffers:
    """All buffers but the counter of batches, which no forward pass reads; blank running ones of a module without values."""
    found = {k: v.detach() for k, v in net.named_buffers() if not k.endswith("num_batches_tracked")}
    start = {"running_mean": 0.0, "running_var": 1.0}
    return {
        k: torch.full(v.shape, start[end], dtype=v.dtype) if v.is_meta and (end := k.split(".")[-1]) in start else v
        for k, v in found.items()
    }


def _statistics(
    norms: Mapping[str, nn.Module], apply: Callable[..., Tensor]
) -> Callable[[Params, Buffers, Tensor], Tree]:
    def statistics(params: Params, buffers: Buffers, x: Tensor) -> Tree:
        seen: Tree = {}

        def note(name: str) -> Callable[[nn.Module, Any], None]:
            def hook(part: nn.Module, args: tuple[Tensor, ...]) -> None:
                over = [0, *range(2, args[0].ndim)]
                seen[f"{name}.mean"], seen[f"{name}.var"] = args[0].mean(over), args[0].var(over, correction=0)

            return hook

        hooks = [part.register_forward_pre_hook(note(name)) for name, part in norms.items()]
        try:
            apply(params, buffers, x)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    return statistics


def plain_attention() -> AbstractContextManager[Any]:
    """Attention as softmax(q kᵀ/√d) v: the fused kernels have no second derivative."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch < 2.3
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


class _NoDraws(TorchDispatchMode):
    """Refuses an operation that would read the global generator, before it does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Expected(f"Expected a forward pass that draws nothing at random, it calls {func.name()}.")
        return func(*args, **(kwargs or {}))


def _fits(net: nn.Module, apply: Callable[..., Tensor], buffers: Buffers, shape: Any, classes: int, mode: str) -> None:
    """One forward pass of zeros: shape of the logits, no draw, no buffer written."""
    params = {k: v.detach() for k, v in net.named_parameters() if k not in buffers}
    some = next(iter(params.values()), torch.zeros(()))
    held = {k: torch.empty_like(v, device="meta") if some.is_meta else v.clone() for k, v in buffers.items()}
    b = 2 if mode == "train" else 1
    try:
        with torch.no_grad(), _NoDraws():
            before = {k: v._version for k, v in held.items()}
            out = apply(params, held, some.new_zeros(b, *shape))
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        text = str(error).split("\n")[0]
        raise Expected(f"Expected a module that takes images of shape {tuple(shape)}: {text}") from None
    written = [k for k, v in held.items() if v._version != before[k]]
    if written:
        raise Expected(f"Expected a forward pass that writes no buffer, it writes {written[0]} in mode={mode!r}.")
    found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if found != (b, classes):
        raise Expected(f"Expected the module to return [{b}, {classes}] for {b} images {tuple(shape)}, got {found}.")

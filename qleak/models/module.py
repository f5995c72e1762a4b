"""Any `nn.Module` as a `Model`, through `torch.func.functional_call`."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from qleak.check import Expected
from qleak.types import Buffers, Model, Params


def from_module(module: nn.Module, shape: tuple[int, int, int], classes: int, spec: str = "") -> Model:
    """A `Model` around `module` in evaluation mode, with its present weights.

    `init` ignores its generator and returns copies of the module's parameters and buffers, so the
    module itself is never changed. Batch norm in evaluation mode reads its buffers and writes none.

    Args:
        module: any module whose forward takes `[b c h w]` and returns `[b class]`.
        shape: `(c, h, w)` of one image.
        classes: number of logits.
        spec: the call that makes the model again, where there is one.

    Raises:
        Expected: the module does not return `[b, classes]` for an input of `shape`.
    """
    module = module.eval()

    def init(gen: Generator) -> tuple[Params, Buffers]:
        params = {k: v.detach().clone() for k, v in module.named_parameters()}
        return params, {k: v.detach().clone() for k, v in module.named_buffers()}

    def apply(params: Params, buffers: Buffers, x: Tensor) -> Tensor:
        return functional_call(module, (params, buffers), (x,))

    params, buffers = init(torch.Generator())
    some = next(iter(params.values()), torch.zeros(()))
    with torch.no_grad():
        out = apply(params, buffers, some.new_zeros(1, *shape))
    if out.shape != (1, classes):
        raise Expected(f"Expected the module to return [b, {classes}] for {shape}, got {tuple(out.shape)}.")
    return Model(init, apply, shape, classes, None, spec)

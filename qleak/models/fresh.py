"""Weights of any module from a generator alone, and modules made without touching torch's global generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from qleak import random
from qleak.types import Params

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()))


def fresh(module: nn.Module, gen: Generator) -> Params:
    """New parameters for `module` by the kind of layer that owns each, in the order of `named_parameters`.

    - convolutions and linear layers: U(−1/√fan_in, 1/√fan_in), weight and bias (torch's default);
      recurrent ones U(−1/√hidden, 1/√hidden);
    - norms: weight 1, bias 0;
    - the joint projection of `nn.MultiheadAttention`: U(±√(6/(rows + columns))), bias 0 (Glorot & Bengio 2010);
    - embeddings, tokens, positions and whatever else: N(0, 0.02²) (Dosovitskiy et al. 2021); a parameter of
      an unknown layer whose entries are all the same (a layer scale, a zero token) keeps its value.

    The module may lie on the meta device, where it has no values.
    """
    owners = dict(module.named_modules())
    return {
        name: _draw(gen, owners[name.rpartition(".")[0]], name.rpartition(".")[2], p.detach())
        for name, p in module.named_parameters()
    }


def _draw(gen: Generator, owner: nn.Module, leaf: str, p: Tensor) -> Tensor:
    def within(bound: float) -> Tensor:
        return ((2 * random.uniform(gen, p.shape) - 1) * bound).to(p.dtype)

    if isinstance(owner, NORMS):
        return torch.full(p.shape, float(leaf == "weight"), dtype=p.dtype)
    if isinstance(owner, _ConvNd | nn.Linear):
        return within(1 / math.sqrt(owner.weight[0].numel()))
    if isinstance(owner, nn.RNNBase):
        return within(1 / math.sqrt(owner.hidden_size))
    if isinstance(owner, nn.MultiheadAttention) and p.ndim == 2:
        return within(math.sqrt(6 / sum(p.shape)))
    if isinstance(owner, nn.MultiheadAttention) and leaf == "in_proj_bias":
        return torch.zeros(p.shape, dtype=p.dtype)
    if not p.is_meta and not isinstance(owner, nn.Embedding) and bool((p == p.reshape(-1)[:1]).all()):
        return p.cpu().clone()
    return (0.02 * random.normal(gen, p.shape)).to(p.dtype)


def blank(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """The module without values, on the meta device: nothing is drawn, no memory is taken."""
    with torch.device("meta"):
        return make(*args, **kwargs)


def constructed(make: Callable[[], Any]) -> Any:
    """What `make()` returns, its draws from a generator of its own: the global one is left as it was.

    For modules that compute constants when they are made, which the meta device would lose.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(random.generator("constructed").get_state())
        return make()

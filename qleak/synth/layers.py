"""Layers of generators and discriminators as pure functions of a dict: TensorFlow's SAME padding, batch norm by the batch.

`params` hold `{name}.weight` and `{name}.bias`; nothing keeps a buffer or writes in place, so that everything runs under
`vmap` and `grad`. Parameters keep the shapes that `apply` needs: a linear layer's bias `[c h w]` makes images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from qleak import random
from qleak.check import Expected
from qleak.types import Params, Public

STD = 0.02  # of every weight of DCGAN (Radford, Metz, Chintala 2016)
EPS = 1e-5  # of batch norm
LEAK = 0.2  # slope of a leaky relu below 0


def truncated(gen: Generator, shape: Sequence[int], std: float = STD) -> Tensor:
    """N(0, std²) without what lies beyond two of its standard deviations, by the inverse distribution function."""
    tail = math.erf(2 / math.sqrt(2))
    return std * math.sqrt(2) * torch.erfinv(tail * (2 * random.uniform(gen, shape) - 1))


def normal(gen: Generator, shape: Sequence[int], std: float = STD) -> Tensor:
    """N(0, std²)."""
    return std * random.normal(gen, shape)


def fan_in(gen: Generator, shape: Sequence[int]) -> Tensor:
    """U(±1/√in) for a weight `[out in]`: torch's default for linear layers."""
    return (2 * random.uniform(gen, shape) - 1) / math.sqrt(shape[1])


def weights(name: str, weight: Tensor, bias: Sequence[int]) -> Params:
    """A layer's weight, and its bias of 0 of the shape `bias`."""
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(tuple(bias))}


def scales(name: str, features: int) -> Params:
    """A batch norm's scale of 1 and shift of 0, `[features]` each."""
    return {f"{name}.weight": torch.ones(features), f"{name}.bias": torch.zeros(features)}


def linear(params: Params, name: str, h: Tensor) -> Tensor:
    """W h + b: `[b in] -> [b out]`; a bias of several axes is taken flat."""
    return F.linear(h, params[f"{name}.weight"], params[f"{name}.bias"].flatten())


def unflatten(params: Params, name: str, h: Tensor) -> Tensor:
    """The output of `linear`, `[b out]`, in the shape of its bias: `[b c h w]`."""
    return h.unflatten(1, params[f"{name}.bias"].shape)


def conv(params: Params, name: str, h: Tensor) -> Tensor:
    """5×5 convolution of stride 2 with TensorFlow's SAME padding, `[b c 2h 2w] -> [b c' h w]`, weight `[c' c 5 5]`.

    out(i) = Σ_k w(k) x(2i + k − 1): of three rows of zeros that an even side needs, one stands in front and two behind.
    """
    return F.conv2d(F.pad(h, (1, 2, 1, 2)), params[f"{name}.weight"], params[f"{name}.bias"], stride=2)


def deconv(params: Params, name: str, h: Tensor) -> Tensor:
    """The transpose of `conv`, `[b c h w] -> [b c' 2h 2w]`, weight `[c c' 5 5]`: out(j) = Σ_{i, k: 2i + k − 1 = j} w(k) x(i)."""
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    return F.conv_transpose2d(h, weight, bias, stride=2, padding=1)[..., :-1, :-1]


def batch_norm(params: Params, name: str, h: Tensor) -> Tensor:
    """γ (h − mean)/√(var + 10⁻⁵) + β by this batch's own (biased) statistics, `[b f]` or `[b f h w]`, per feature.

    A batch of one `[1 f]` is its own mean: what is left is β.
    """
    axes = [0, *range(2, h.ndim)]
    mean = h.mean(axes, keepdim=True)
    centred = h - mean
    scale = torch.rsqrt(centred.square().mean(axes, keepdim=True) + EPS)
    shape = (1, -1, *(1 for _ in axes[1:]))
    return centred * scale * params[f"{name}.weight"].reshape(shape) + params[f"{name}.bias"].reshape(shape)


def leaky(h: Tensor) -> Tensor:
    """Leaky relu, slope 0.2 below 0."""
    return F.leaky_relu(h, LEAK)


def beside(h: Tensor, y: Tensor) -> Tensor:
    """The label beside the features: `[b f]` and y `[b class]` to `[b f+class]`, or planes of it for `[b c h w]`."""
    if h.ndim == 4:
        y = y[:, :, None, None].expand(*y.shape, *h.shape[2:])
    return torch.cat([h, y.to(h)], 1)


def quarters(public: Public, who: str) -> tuple[int, int]:
    """(h/4, w/4).

    Raises:
        Expected: a side is no multiple of 4.
    """
    _, h, w = public.shape
    if h % 4 or w % 4:
        raise Expected(f"Expected images of sides that are multiples of 4 for {who}, got {h}x{w}.")
    return h // 4, w // 4

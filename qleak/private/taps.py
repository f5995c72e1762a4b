"""Clipped sums by book-keeping: one batched backward pass for all examples, and each layer's share of every norm.

A zero tap added to a layer's output has that output's gradient D. Where examples do not meet, row b of D and of the
layer's input A give example b's gradient: D_bᵀA_b of a linear layer, D_b U_bᵀ of a convolution with unfolded input U.
Norms need no such product where a Gram matrix is smaller, ‖D_b U_bᵀ‖² = ⟨D_bᵀD_b, U_bᵀU_b⟩ (Goodfellow 2015;
Li et al., ICLR 2022), and the sum Σ_b f_b D_b U_bᵀ is the gradient of one batch with its outputs weighted: book-keeping
needs no second backward pass (Bu, Wang, Zha, Karypis, ICML 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad
from torch.nn.grad import conv2d_weight

from qleak.check import Expected
from qleak.client import loss
from qleak.private.chunks import weights
from qleak.types import Buffers, Model, Owner, Params, Shrink, Tapped, Tree

BLOCK = 1 << 19  # numbers of an unfolded input at a time: half as many cost calls, more leave a core's cache
GRAM = 128  # multiply-adds that cost as much as to write, square and weight one number of a gradient, on a CPU


class Share(NamedTuple):
    """One layer's part: `squares[parameter] [b]`, and `total(factors[parameter] [b]) -> Σ_b f_b g_b`."""

    squares: Tree
    total: Callable[[Tree], Tree]


def clipped_sum(
    model: Model,
    params: Params,
    buffers: Buffers,
    x: Tensor,
    target: Tensor,
    shrink: Shrink,
    knobs: Mapping[str, Tensor],
) -> tuple[Tree, Tensor]:
    """(Σ_b f(‖g_b‖)·g_b, norms `[b]`, or `[b tensor]` of scope "tensor") of the gradients g_b of each example's loss.

    Raises:
        Expected: the model is not open (`Model.tapped`), or the norm is L1, which needs every entry.
    """
    if model.tapped is None or shrink.p == 1:
        raise Expected(f"Expected a model with taps and an L2 norm, got {model.spec or 'a model'} and L{shrink.p}.")
    slopes, inputs = opened(model, model.tapped, params, buffers, x, target)
    shares = [_share(layer, params, buffers, inputs[layer.name], slopes[layer.name]) for layer in model.tapped.layers]
    squares = {k: v for share in shares for k, v in share.squares.items()}
    factors, norm = weights({k: squares[k] for k in params}, shrink, knobs)
    sums = {k: v for share in shares for k, v in share.total(factors).items()}
    return {k: sums[k] for k in params}, norm


def opened(
    model: Model, tapped: Tapped, params: Params, buffers: Buffers, x: Tensor, target: Tensor
) -> tuple[Tree, Tree]:
    """(gradients of Σ_b ℓ_b at every layer's output, every layer's input), `[b …]` by layer."""
    zero = next(iter(params.values())).new_zeros(())
    taps = {layer.name: zero.expand(len(x), *layer.options["out"]) for layer in tapped.layers}

    def total(taps: Tree) -> tuple[Tensor, Tree]:
        inputs: Tree = {}

        def apply(params: Params, buffers: Buffers, x: Tensor) -> Tensor:
            logits, seen = tapped.run(params, buffers, x, taps)
            inputs.update(seen)
            return logits

        return len(x) * loss(replace(model, apply=apply), params, buffers, x, target), inputs

    return grad(total, has_aux=True)(taps)


def _share(layer: Owner, params: Params, buffers: Buffers, a: Tensor, d: Tensor) -> Share:
    weight, bias = layer.options["weight"], layer.options["bias"]
    match layer.kind:
        case "conv":
            pairs, sums = _conv(layer, params[weight].shape, a, d), (2, 3)
        case "linear":
            pairs, sums = _linear(a, d), tuple(range(1, d.ndim - 1))
        case _:
            scaled = _normal(layer, buffers, a)
            sums = (
                tuple(range(1, d.ndim - len(layer.options["shape"])))
                if layer.kind == "layer"
                else tuple(range(2, d.ndim))
            )
            pairs = _instance((d * scaled).sum(sums) if sums else d * scaled) if weight else None
    parts = {weight: pairs} if weight and pairs else {}
    if bias:
        parts[bias] = _instance(d.sum(sums) if sums else d)
    return Share(
        {k: squares for k, (squares, _) in parts.items()},
        lambda factors: {k: total(factors[k]) for k, (_, total) in parts.items()},
    )


Pair = tuple[Tensor, Callable[[Tensor], Tensor]]  # squared norms [b], and f [b] -> Σ_b f_b g_b


def _instance(g: Tensor, shape: tuple[int, ...] | None = None) -> Pair:
    """Of gradients `[b …]` as they are."""
    flat = g.flatten(1)
    return _squared(flat, 1), lambda f: (f.to(g.dtype) @ flat).view(shape or g.shape[1:])


def _linear(a: Tensor, d: Tensor) -> Pair:
    """`a [b … i]`, `d [b … o]`: ‖D‖²‖A‖² of one position, else by Gram matrices or by instance."""
    if a.ndim == 2:
        return _squared(d, 1) * _squared(a, 1), lambda f: (d * f[:, None]).mT @ a
    a, d = a.flatten(1, -2), d.flatten(1, -2)
    if not _gram_wins(d.shape[1], d.shape[2], a.shape[2]):
        return _instance(d.mT @ a)
    squares = ((d @ d.mT) * (a @ a.mT)).sum((1, 2))
    return squares, lambda f: torch.einsum("bto,bti->oi", d * f[:, None, None], a)


def _conv(layer: Owner, shape: tuple[int, ...], a: Tensor, d: Tensor) -> Pair:
    """`a [b c h w]`, `d [b o h' w']`: by Gram matrices of positions, or by instance."""
    stride, padding = _pair(layer.options["stride"]), _pair(layer.options["padding"])
    rows, width = d.flatten(2), math.prod(shape[1:])
    many = rows.shape[2]
    if any(padding):
        a = F.pad(a, (padding[1], padding[1], padding[0], padding[0]))
    blocks = list(zip(*(v.split(max(1, BLOCK // (many * width))) for v in (a, rows)), strict=True))
    if not _gram_wins(many, shape[0], width):
        return _bands(blocks, shape, stride)
    grams = []
    for part, slopes in blocks:
        u = _unfold(part, shape[2:], stride)
        grams.append(((slopes.mT @ slopes) * (u.mT @ u)).sum((1, 2)))

    def total(f: Tensor) -> Tensor:
        weighted = d * f[:, None, None, None]
        return conv2d_weight(a, tuple(shape), weighted, stride=tuple(stride))  # type: ignore[arg-type]

    return torch.cat(grams), total


def _bands(blocks: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, ...], stride: Sequence[int]) -> Pair:
    """By instance, one row of the kernel at a time.

    With its windows cut along w alone, a kernel row's share of the input is one run of memory: it is copied once and not
    once for each row. A vertical stride breaks the run.
    """
    if stride[0] != 1:
        found = [slopes @ _unfold(part, shape[2:], stride).mT for part, slopes in blocks]
        return _instance(torch.cat(found), tuple(shape))
    found = [[] for _ in range(shape[2])]
    for part, slopes in blocks:
        windows = part.unfold(3, shape[3], stride[1])  # b c h w' k
        wide, many = windows.shape[3], slopes.shape[2]
        flat = windows.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)  # b c·k h·w'
        for i, band in enumerate(found):
            band.append(slopes @ flat[:, :, i * wide : i * wide + many].mT)
    g = torch.cat([v for band in found for v in band]).view(shape[2], -1, shape[0] * shape[1] * shape[3])  # k b o·c·k
    split = (shape[2], shape[0], shape[1], shape[3])
    return _squared(g, (0, 2)), lambda f: (f.to(g.dtype) @ g).view(split).permute(1, 2, 0, 3)


def _squared(g: Tensor, over: int | tuple[int, ...]) -> Tensor:
    """Σ g² without the squares in memory."""
    return torch.linalg.vector_norm(g, dim=over).square()


def _gram_wins(positions: int, out: int, width: int) -> bool:
    """Whether Gram matrices take less time than gradients by instance, T²(d + p) < 128·d·p.

    The published rule, 2T² < d·p (Bu, Mao, Xu, NeurIPS 2022), compares memory alone: a layer of 128 channels and 16×16
    positions, just on its Gram side, takes twice as long that way as by instance.
    """
    return positions**2 * (out + width) < GRAM * out * width


def _unfold(a: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """`F.unfold`, `[b c h w] -> [b c·k·k h'·w']`, as one strided copy: three times as fast on a CPU."""
    windows = a.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])  # b c h' w' k k
    return windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value


def _normal(layer: Owner, buffers: Buffers, a: Tensor) -> Tensor:
    """What a norm makes of its input before its own weight and bias."""
    o = layer.options
    if layer.kind == "group":
        return F.group_norm(a, o["groups"], eps=o["eps"])
    if layer.kind == "layer":
        return F.layer_norm(a, o["shape"], eps=o["eps"])
    mean, var = (buffers[f"{layer.name}.{k}".lstrip(".")] for k in ("running_mean", "running_var"))
    return F.batch_norm(a, mean, var, training=False, eps=o["eps"])

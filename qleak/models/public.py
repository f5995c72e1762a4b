"""Batch norm by images that are nobody's secret: four ways to the statistics, three of which keep examples apart.

Batch norm by the batch makes every example's gradient depend on the others, so that clipping it bounds nothing. Public
images give statistics that depend on the weights alone, which are released anyway (Davody, Adelani, Kleinbauer, Klakow
2020, arXiv 2006.10919, take those of both together).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.func import vmap

from qleak import data
from qleak.catalog import factory
from qleak.check import Expected, at_least, one_of, whole
from qleak.models.lenet5 import lenet5
from qleak.types import Buffers, Model, Params, Tapped, Tree

MODES = ("joint", "example+public", "public", "public-detached")
CHUNK = 8  # examples that stand beside the public batch at a time
Forward = Callable[[Params, Buffers, Tensor], Tensor]


@factory
def public_norm(
    model: Model | None = None,
    mode: str = "public-detached",
    public: str = "fashion_mnist",
    public_size: int = 128,
    public_split: str = "train",
    skip: int = 0,
) -> Model:
    """A net whose batch norms take their statistics from public images, while training and while testing alike.

    Running statistics are neither read nor kept; no image is tested with the help of other test images, but in "joint".

    Args:
        model: any net with batch norm; `lenet5(function="relu", pool="max", norm="batch")` by default.
        mode: whose mean and biased variance a batch norm divides by. "joint": of batch and public images together, which
            couples the batch's examples; "example+public": of each image and the public ones; "public": of the public
            ones, gradients through them; "public-detached": the same as constants.
        public: the data set of the public images, by name. The publication has kmnist for MNIST, cifar100 for CIFAR-10.
        public_size: how many of them.
        public_split: of which split.
        skip: how many of its images are left out first.

    Raises:
        Expected: a net without batch norm; when it is first used: a data set that is not at hand, too small, or of images
            of another shape.
    """
    model = model or lenet5(function="relu", pool="max", norm="batch")
    one_of(MODES, mode=mode)
    whole(public_size=public_size, skip=skip)
    at_least(1, public_size=public_size)
    at_least(0, skip=skip)
    if model.remade is None:
        raise Expected(f"Expected a model with batch norm, got {model.spec or 'a model without'}.")
    if model.masks and mode in MODES[:2]:
        raise Expected(f"Expected a model without dropout with mode={mode!r}: public images have no masks.")
    by_batch, by_buffers = model.remade("train"), model.remade("explicit" if mode == "public" else "eval")

    def held() -> Tensor:
        return images(public, public_split, skip, public_size, model.shape)

    def statistics(params: Params, buffers: Buffers) -> Buffers:
        """`buffers` with the public images' statistics as running ones, layer by layer in one forward pass."""
        assert by_batch.statistics is not None
        found = by_batch.statistics(params, buffers, like(held(), params))
        if mode == "public-detached":
            found = {k: v.detach() for k, v in found.items()}
        ends = {"mean": "running_mean", "var": "running_var"}
        return buffers | {
            f"{k.rpartition('.')[0]}.{ends[k.rpartition('.')[2]]}".lstrip("."): v for k, v in found.items()
        }

    def joint(params: Params, buffers: Buffers, x: Tensor) -> Tensor:
        return by_batch.apply(params, buffers, torch.cat([x, like(held(), params)]))[: len(x)]

    def beside(params: Params, buffers: Buffers, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_zeros(0, model.classes)
        one = lambda image: joint(params, buffers, image[None])[0]  # noqa: E731
        return vmap(one, randomness="error", chunk_size=CHUNK)(x)

    def apart(params: Params, buffers: Buffers, x: Tensor) -> Tensor:
        return by_buffers.apply(params, statistics(params, buffers), x)

    def init(gen: Generator) -> tuple[Params, Buffers]:
        params, own = model.init(gen)
        return params, by_buffers.init(gen)[1] | own

    couples = "batch norm normalises by all images of the batch and the public ones together" if mode == "joint" else ""
    made = replace(
        model, init=init, apply={"joint": joint, "example+public": beside}.get(mode, apart), spec="", statistics=None,
        tapped=None, couples=couples, remade=None, public=held,
    )  # fmt: skip
    if mode == "public-detached" and by_buffers.tapped:
        made = replace(made, tapped=_opened(by_buffers.tapped, statistics))
    return made


def _opened(inner: Tapped, statistics: Callable[[Params, Buffers], Buffers]) -> Tapped:
    """`inner` by the public statistics: one public forward pass, then one of the batch.

    A reader of inputs normalises those of a batch norm by the buffers he holds, and not by the public statistics; so each
    is returned as that input which his buffers take to the same normalised one.
    """

    def run(params: Params, buffers: Buffers, x: Tensor, taps: Tree) -> tuple[Tensor, Tree]:
        found = statistics(params, buffers)
        logits, inputs = inner.run(params, found, x, taps)
        for layer in inner.layers:
            if layer.kind == "batch":
                at, eps = inputs[layer.name], layer.options["eps"]
                (m, v), (m0, v0) = (_moments(held, layer.name, at.ndim) for held in (found, buffers))
                inputs[layer.name] = (at - m) * ((v0 + eps) / (v + eps)).sqrt() + m0
        return logits, inputs

    return replace(inner, run=run)


def _moments(buffers: Buffers, name: str, dims: int) -> list[Tensor]:
    ends = ("running_mean", "running_var")
    return [buffers[f"{name}.{end}".lstrip(".")].reshape(-1, *(1,) * (dims - 2)) for end in ends]


def like(x: Tensor, params: Params) -> Tensor:
    """Images in the dtype and on the device of the parameters."""
    some = next(iter(params.values()))
    return x.to(some.device, some.dtype)


@functools.lru_cache(maxsize=8)
def images(name: str, split: str, skip: int, count: int, shape: tuple[int, int, int]) -> Tensor:
    """`count` images `[count c h w]` of a set behind the first `skip`, read once.

    Raises:
        Expected: the set is not at hand (a stand-in has to be asked for by name), too small, or of another shape.
    """
    try:
        found = data.load(name, split).x
    except Expected as error:
        other = "fashion_mnist" if shape[0] == 1 else "svhn"
        hint = "" if name == other else f" A stand-in has to be asked for by name: public={other}."
        raise Expected(f"{error}{hint}") from None
    if tuple(found.shape[1:]) != tuple(shape):
        raise Expected(f"Expected public images of shape {tuple(shape)}, {name} has {tuple(found.shape[1:])}.")
    if len(found) < skip + count:
        raise Expected(f"Expected skip + public_size <= {len(found)}, the images of {name}, got {skip} + {count}.")
    return found[skip : skip + count].clone()

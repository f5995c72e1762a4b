"""A net as someone else trained it: images normalised in front of it, batch norms in a mode, parameters held fixed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from qleak.catalog import factory
from qleak.check import Expected, one_of, positive
from qleak.models.lenet import lenet
from qleak.types import Buffers, Model, Params, Tree


@factory
def adapted(
    model: Model | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    mode: str = "",
    held: tuple[str, ...] = (),
) -> Model:
    """`model` on (x − mean)/std, x in [0, 1]; parameters in `held` are buffers, so that no update has to name them.

    Args:
        model: any net; `lenet()` by default.
        mean: of every channel, or one number for all; () leaves images alone.
        std: the same.
        mode: batch norms by running statistics ("eval"), by the batch ("train"), or "" as they are.
        held: names of parameters that an update does not hold: frozen ones, biases that were not sent.

    Raises:
        Expected: numbers for other than the net's channels, a name the net does not have, or no parameter left.
    """
    model = model or lenet()
    if mode:
        one_of(("eval", "train"), mode=mode)
        model = model.remade(mode) if model.remade else model
    channels = model.shape[0]
    if len(mean) != len(std) or len(mean) not in (0, 1, channels):
        raise Expected(f"Expected mean={mean} and std={std} of 1 or {channels} numbers each.")
    for value in std:
        positive(std=value)
    if not mean and not held:
        return replace(model, spec="")
    m, s = (torch.tensor(v).reshape(-1, 1, 1) if v else None for v in (mean, std))
    inner, names = model, tuple(held)

    def init(gen: Generator) -> tuple[Params, Buffers]:
        params, buffers = inner.init(gen)
        if unknown := [k for k in names if k not in params]:
            raise Expected(f"Expected parameters of the net in held={names}, it has no {unknown[0]!r}.")
        if len(names) == len(params):
            raise Expected("Expected at least one parameter that is not held.")
        kept = {k: v for k, v in params.items() if k not in names}
        return kept, buffers | {k: params[k] for k in names}

    def whole(params: Params, buffers: Buffers) -> tuple[Params, Buffers]:
        rest = {k: v for k, v in buffers.items() if k not in names}
        return params | {k: buffers[k] for k in names}, rest

    def normal(x: Tensor) -> Tensor:
        return x if m is None or s is None else (x - m.to(x)) / s.to(x)

    def apply(params: Params, buffers: Buffers, x: Tensor) -> Tensor:
        return inner.apply(*whole(params, buffers), normal(x))

    def statistics(params: Params, buffers: Buffers, x: Tensor) -> Tree:
        assert inner.statistics is not None
        return inner.statistics(*whole(params, buffers), normal(x))

    def remade(mode: str) -> Model:
        assert inner.remade is not None
        return adapted(inner.remade(mode), mean, std, "", names)

    return replace(
        inner, init=init, apply=apply, layers=None, spec="", tapped=None,
        statistics=statistics if inner.statistics else None, remade=remade if inner.remade else None,
    )  # fmt: skip

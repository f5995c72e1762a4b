"""Does the model reproduce the update from the truth? And where it does not: which other reading of it does?

Every alternative is one gradient, compared after the best factor: e = min_α ‖α·g − u‖/‖u‖. The factor itself tells a
summed loss (α = b), a weight difference (α = ±learning rate) and a mean gradient (α = 1) apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice, permutations
from typing import NamedTuple

import torch
from torch import Tensor

from qleak import random, tree
from qleak.adapters.truth import Truth
from qleak.channels import Channel
from qleak.check import Expected
from qleak.engine.audit import fresh
from qleak.models.adapted import adapted
from qleak.types import Buffers, Client, Model, Params, Tree

EXACT = 1e-3
"""Relative error below which two float32 computations of one gradient count as the same."""
HALF = 1e-2
"""The same for numbers that were stored in half precision."""
ORDERS = 24
ONE = 0.02
"""How far from 1 a factor may lie and still be none."""
PLAIN = "as described"
SETS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "ImageNet's mean and deviation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's mean and deviation": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100's mean and deviation": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "MNIST's mean and deviation": ((0.1307,), (0.3081,)),
    "mean 0.5 and deviation 0.5": ((0.5,), (0.5,)),
    "pixels in 0 … 255": ((0.0,), (1 / 255,)),
}


class Reading(NamedTuple):
    """One way to read the update: what is changed, the error as it stands and after the factor, and whether it fits."""

    name: str
    error: float
    scaled: float
    factor: float
    fits: bool
    mode: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    fresh: bool = False
    labels: tuple[int, ...] = ()


class Checked(NamedTuple):
    """Every reading that was tried, and the simplest one that fits (None: none does)."""

    readings: list[Reading]
    fit: Reading | None


def self_check(
    model: Model, params: Params, buffers: Buffers, client: Client, channel: Channel, update: Tree, truth: Truth,
    guessed: Tensor, half: bool = False,
) -> Checked:  # fmt: skip
    """Tries the model as it is, and then one change at a time, until something fits; pairs of changes last.

    Args:
        model: as the auditor described it.
        params: its weights.
        buffers: its buffers.
        client: what the client is said to have computed.
        channel: what the update came through; its own distortion is no misfit.
        update: the captured numbers, decoded.
        truth: the images.
        guessed: labels `[b]` that stand in where the truth has none.
        half: the numbers were stored in half precision.
    """
    y = truth.y if truth.y is not None else guessed
    readings: list[Reading] = []
    for name, mode, norm, blank, labels in _alternatives(model, buffers, y):
        if mode and norm and any(r.fits for r in readings):
            break  # pairs of changes only where no single one fits
        mean, std = SETS[norm] if norm else ((), ())
        try:
            seen = adapted(model, mean, std, mode) if mode or norm else model
            held = fresh(buffers) if blank else buffers
            got = client.update(seen, params, held, truth.x, torch.tensor(labels), {})
        except (Expected, RuntimeError) as error:
            if not readings:
                raise Expected(f"Expected a model that takes the truth: {str(error).splitlines()[0]}") from None
            continue
        got = {k: got[k].detach() for k in update}
        found = _compared(got, update, channel, params, HALF if half else EXACT)
        readings.append(Reading(name, *found, mode, mean, std, blank, tuple(labels)))
        if found[3] and len(readings) == 1 and abs(found[2] - 1) <= ONE:
            break
    fits = [r for r in readings if r.fits]
    plain = fits and fits[0].name == PLAIN
    return Checked(readings, fits[0] if plain else min(fits, key=lambda r: r.scaled, default=None))


def _alternatives(model: Model, buffers: Buffers, y: Tensor) -> Iterator[tuple[str, str, str, bool, list[int]]]:
    """(name, mode, normalisation, fresh buffers?, labels): the plain one, single changes, pairs of them."""
    right = y.tolist()
    yield PLAIN, "", "", False, right
    modes = {"batch norm by the batch (train mode)": "train", "batch norm by running statistics (eval mode)": "eval"}
    modes = modes if model.remade is not None else {}
    for name, mode in modes.items():
        yield name, mode, "", False, right
    if any(k.endswith("running_mean") for k in buffers):
        yield "fresh running statistics", "eval", "", True, right
    sets = [n for n, (mean, _) in SETS.items() if len(mean) in (1, model.shape[0])]
    for norm in sets:
        yield _said(norm), "", norm, False, right
    for order in islice(permutations(right), 1, ORDERS):
        if list(order) != right:
            yield f"labels in the order {', '.join(map(str, order))}", "", "", False, list(order)
    if len(right) == 1:
        for other in range(min(model.classes, 100)):
            if [other] != right:
                yield f"label {other}", "", "", False, [other]
    for name, mode in modes.items():
        for norm in sets:
            yield f"{name}, {_said(norm)}", mode, norm, False, right


def _said(norm: str) -> str:
    return norm if norm.startswith("pixels") else f"images normalised by {norm}"


def _compared(
    got: Tree, want: Tree, channel: Channel, like: Tree, tolerance: float
) -> tuple[float, float, float, bool]:
    """(error, error after the best factor, factor, whether it fits)."""
    size = float(tree.norm(want))
    power = float(tree.dot(got, got))
    factor = float(tree.dot(got, want)) / power if power > 0 else 1.0
    error = float(tree.norm(tree.sub(got, want))) / max(size, 1e-300)
    scaled = tree.scale(got, factor)
    off = float(tree.norm(tree.sub(scaled, want))) / max(size, 1e-300)
    own = 0.0
    if channel.stages and factor:
        noise = channel.draw(random.generator("self-check"), like)
        message = channel.send(channel.knobs(), scaled, noise, channel.init(like), like)[0][-1]
        sent = channel.receive(channel.knobs(), message, like)
        own = float(tree.norm(tree.sub(sent, scaled))) / max(float(tree.norm(scaled)), 1e-300)
    fits = math.isfinite(off) and off <= tolerance + 1.2 * own and off < 0.9
    return error, off, factor, fits


def factor_said(reading: Reading, batch: int, scale: float = 1.0, steps: int = 1) -> str:
    """What the factor of a reading that fits means; "" where it is 1."""
    alpha = reading.factor
    if abs(alpha - 1) <= ONE:
        return ""
    if batch > 1 and abs(alpha - batch) <= 0.02 * batch:
        return f"the loss is summed over {batch} images, not averaged"
    if batch > 1 and abs(alpha * batch - 1) <= 0.02:
        return f"the gradient is divided by {batch} once more"
    if abs(alpha + 1) <= ONE:
        return "the sign is turned: new weights minus old ones"
    if steps > 1:
        return f"the update is {alpha:.4g} × what these local steps send"
    kind = "new weights minus old ones" if alpha < 0 else "old weights minus new ones, or a scaled loss"
    return f"the update is {alpha * scale:.4g} × the mean gradient ({kind})"


def applied(reading: Reading, model: Model, buffers: Buffers) -> tuple[Model, Buffers]:
    """The model as the reading that fits has it."""
    if reading.mode or reading.mean:
        model = adapted(model, reading.mean, reading.std, reading.mode)
    return model, fresh(buffers) if reading.fresh else buffers

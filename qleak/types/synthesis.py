"""The nouns of private data generation: what makes images from private records, and who judges them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Generator, Tensor

from qleak.types.models import Dataset
from qleak.types.trees import Params, Tree


class Public(NamedTuple):
    """What everybody may know of the private records: how many, of which shape, how many classes (not how many of each)."""

    n: int
    shape: tuple[int, int, int]
    classes: int


class Spend(NamedTuple):
    """What a synthesizer does with its budget, settled before it sees a record.

    Attributes:
        steps: how many steps it makes.
        event: `event(t)`: the privacy event (`dp_accounting.DpEvent`) of everything released within t steps; None where
            nothing is guaranteed.
        claimed: `claimed(t)`: what published code would print as ε after t steps; None where it prints none.
        noise: standard deviation of the noise on what is released, in its units; 0 without.
        reason: why it stops there, in words.
        target: the ε that is not passed.
        delta: its δ.
    """

    steps: int
    event: Callable[[int], Any]
    claimed: Callable[[int], float | None]
    noise: float = 0.0
    reason: str = ""
    target: float = 0.0
    delta: float = 0.0


def _unsaid(public: Public, state: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Synthesizer:
    """Makes labelled images from private records by steps, each of which costs privacy.

    Attributes:
        spend: `spend(public, target_epsilon, delta) -> Spend`.
        init: `init(data, spend, seed) -> state` before anything is released: nested NamedTuples and dicts of tensors.
        step: `step(data, spend, state, t) -> state`, t = 0, 1, …; a pure function, all its draws from the seed in `state`
            (an int64 tensor) and t.
        released: `released(state) -> tree` of all that may leave the house: what samples are made of.
        sample: `sample(public, released, y [n], seed) -> x [n c h w]` in [0, 1].
        unsound: why it earns no ε, whatever its noise; "" where nothing is wrong.
        papers: what it rests on.
        statistics: `statistics(public, state) -> dict` of numbers that are NOT private (votes, losses, retained shares);
            asked for only where a plan says that nothing will be released.
        canary: `canary(data, spend, seed, kind) -> dict` of what one replaced record does to what is released, beside what
            is promised; None where nothing is known but the promise.
    """

    spend: Callable[[Public, float, float], Spend]
    init: Callable[[Dataset, Spend, int], Any]
    step: Callable[[Dataset, Spend, Any, int], Any]
    released: Callable[[Any], Tree]
    sample: Callable[[Public, Tree, Tensor, int], Tensor]
    unsound: str = ""
    papers: tuple[str, ...] = ()
    statistics: Callable[[Public, Any], dict[str, Any]] = _unsaid
    canary: Callable[[Dataset, Spend, int, str], dict[str, float]] | None = None
    spec: str = ""


@dataclass(frozen=True)
class Critic:
    """A discriminator of labelled images, as a function of one teacher's parameters.

    Attributes:
        init: `init(generator, public) -> params`.
        apply: `apply(params, x [b c h w], y [b class]) -> logits [b]`: large for real. Buffer-free: batch norm, where there
            is one, takes the statistics of this batch.
        clipped: weights are clipped to ± this after a step (the Wasserstein variant); 0 for no clipping.
    """

    init: Callable[[Generator, Public], Params]
    apply: Callable[[Params, Tensor, Tensor], Tensor]
    clipped: float = 0.0
    spec: str = ""


@dataclass(frozen=True)
class Maker:
    """A generator of images from noise and labels.

    Attributes:
        init: `init(generator, public) -> params`.
        apply: `apply(params, z [b z], y [b class]) -> x [b c h w]` in [0, 1]; batch norm by the batch.
        z_dim: length of z, uniform in [−1, 1].
    """

    init: Callable[[Generator, Public], Params]
    apply: Callable[[Params, Tensor, Tensor], Tensor]
    z_dim: int
    spec: str = ""


@dataclass(frozen=True)
class Classifier:
    """Trains on some images, tests on others.

    Attributes:
        fit: `fit(x [n c h w], y [n], test_x [m c h w], test_y [m], classes, seed) -> [epochs]`: test accuracy after every
            epoch, float64. The last is the result; the largest is chosen by the test set.
    """

    fit: Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
    spec: str = ""

"""What the published code of DataLens makes of privacy: its accountant, its data-dependent bounds, its partition.

Everything here is a *claim*, to stand beside an ε and never in its place. Why the published code does not earn what it
prints: its Adam moments are shared by all sets of teachers, so one record reaches every set; its partition hands some
records to two teachers, and moves other records when one is removed or relabelled; and its data-dependent bounds hold for
the release of one arg max, while it releases a noisy vector.

RDP stands for Rényi differential privacy (Mironov 2017): a curve over orders α, `[order]`, float64.

Source: Wang et al., "DataLens: Scalable Privacy Preserving Training via Gradient Compression and Aggregation" (CCS 2021), and
its published code; Papernot et al., "Scalable Private Learning with PATE" (2018).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qleak import accounting
from qleak.check import Expected, at_least, between, positive, whole
from qleak.synth.gnmax import convert, gnmax_logq, gnmax_rdp, orders


class Command(NamedTuple):
    """Settings of one published command: the set, teachers, records of each, images a step, k, σ and the ε it prints."""

    data: str
    teachers: int
    each: int
    images: int
    k: int
    sigma: float
    epsilon: float


COMMANDS = (  # δ = 10⁻⁵ throughout; fashion_mnist's first stands for mnist at ε = 1, too
    Command("fashion_mnist", 4000, 15, 15, 200, 5000.0, 1.0),
    Command("celeba-gender", 6000, 35, 30, 700, 9000.0, 1.0),
    Command("celeba-hair", 8000, 15, 15, 700, 9000.0, 1.0),
    Command("mnist", 4000, 15, 15, 300, 800.0, 10.0),
    Command("fashion_mnist", 4000, 15, 15, 350, 1000.0, 10.0),
    Command("celeba-gender", 6000, 35, 30, 500, 700.0, 10.0),
    Command("celeba-hair", 4000, 31, 30, 500, 700.0, 10.0),
)


# --- the accountant --------------------------------------------------------------------------------


def vote_rdp(k: int, sigma: float, count: int = 200, teachers: int = 1) -> Tensor:
    """RDP `[order]` of one image's noisy sum of top-k sign votes: α·2k·m²/σ², replace-one, for a record in m teachers.

    A teacher's vote moves by 2√k at most, on the same k coordinates, all flipped. The published code has m = 1.
    """
    whole(k=k, teachers=teachers)
    at_least(1, k=k, teachers=teachers)
    positive(sigma=sigma)
    return orders(count) * 2 * k * teachers**2 / sigma**2


def claimed_gaussian(releases: int, multiplier: float, delta: float = 1e-5, count: int = 200) -> float:
    """`claimed_epsilon` of any Gaussian releases of noise multiplier σ/Δ: RDP α/(2 multiplier²) each; 0 without any."""
    whole(releases=releases)
    at_least(0, releases=releases)
    positive(multiplier=multiplier)
    curve = releases * orders(count) / (2 * multiplier**2)
    found = convert(curve, delta, count)
    return found if releases else 0.0


def claimed_epsilon(
    steps: int, images: int, k: int, sigma: float, delta: float = 1e-5, orders: int = 200, teachers: int = 1
) -> float:
    """ε that the published accountant prints after `steps` generator steps of `images` noisy rows each.

    Data-independent and correct for one row; what it leaves out is how many teachers a record reaches (`teachers`, 1 in the
    published code): 2 for records that its partition repeats, up to the number of sets through the shared Adam moments.

    Args:
        steps: generator steps, >= 0.
        images: images of a step, each released by itself.
        k: coordinates that a teacher votes on.
        sigma: standard deviation of the noise on the sum of votes.
        delta: δ in (0, 1).
        orders: orders are 1.1, 2, 3, … orders − 1.
        teachers: how many teachers one record reaches.

    Raises:
        Expected: an argument out of range.
    """
    whole(steps=steps, images=images)
    at_least(0, steps=steps)
    at_least(1, images=images)
    whole(k=k, teachers=teachers)
    at_least(1, k=k, teachers=teachers)
    positive(sigma=sigma)
    return claimed_gaussian(steps * images, sigma / (2 * teachers * math.sqrt(k)), delta, orders)


def steps_allowed(epsilon: float, images: int, k: int, sigma: float, delta: float = 1e-5, orders: int = 200) -> int:
    """The last generator step whose claimed ε stays within `epsilon`: the step after it is drawn, charged and discarded.

    Raises:
        Expected: an argument out of range.
    """
    positive(epsilon=epsilon)

    def fits(steps: int) -> bool:
        return claimed_epsilon(steps, images, k, sigma, delta, orders) <= epsilon

    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def cost(steps: int, images: int, k: int, sigma: float, delta: float = 1e-5, teachers: int = 1) -> float:
    """ε of the same releases if a record reached `teachers` teachers and no more: the Gaussian's, not by way of RDP.

    Steps·images rows of noise multiplier σ/(2m√k) compose to one of multiplier σ/(2m√(k·steps·images)), adaptively, too
    (Dong, Roth, Su 2019). It is an ε of code that keeps teachers apart; of the published code it is no bound.

    Raises:
        Expected: an argument out of range.
    """
    whole(steps=steps, images=images, k=k, teachers=teachers)
    at_least(1, steps=steps, images=images, k=k, teachers=teachers)
    positive(sigma=sigma)
    between(0, 1, delta=delta)
    positive(delta=delta)
    found = accounting.epsilon(
        accounting.event("gaussian", sigma / (2 * teachers * math.sqrt(k * steps * images))), delta
    )
    return math.inf if found is None else found


def klevel_rdp(levels: int, d: int, sigma: float, count: int = 200) -> tuple[Tensor, Tensor]:
    """RDP `[order]` of one row of K-level votes of d coordinates: as charged α·K²·d/σ², and as it is α·(K−1)²·d/(2σ²).

    The published charge takes the number of levels for the range of a vote, K − 1, and puts it into a formula whose
    sensitivity is √2, without that √2: it overcharges, 3.6 times for K = 4.
    """
    whole(levels=levels, d=d)
    at_least(2, levels=levels)
    at_least(1, d=d)
    positive(sigma=sigma)
    unit = orders(count) * d / sigma**2
    return unit * levels**2, unit * (levels - 1) ** 2 / 2


# --- the data-dependent charge ---------------------------------------------------------------------


def dependent_rdp(noisy: Tensor, k: int, sigma: float, count: int = 200, least: bool = True) -> Tensor:
    """RDP `[order]` that the published code charges for the rows `noisy [image d]`, summed over them.

    It takes the *noised* sums of votes for counts, at σ, and then σ/√(2k) for the noise of a GNMax. `least=False` is its
    `signsgd_dept`, whose stopping rule has the data-dependent bound alone. With hundreds of coordinates that all carry noise,
    q is near 1 and the bound does not fire; where one coordinate holds nearly all votes, it claims a small part of what the
    release of the whole vector costs.
    """
    whole(k=k)
    at_least(1, k=k)
    return gnmax_rdp(gnmax_logq(noisy, sigma), sigma / math.sqrt(2 * k), count, least).sum(0)


# --- the partition ---------------------------------------------------------------------------------


def wrapped(y: Tensor, teachers: int, classes: int) -> Tensor:
    """Record indices `[teacher, ⌊n/teachers⌋]`, dealt by class 0, 1, … C−1, 0, 1, …; a class that runs out starts again.

    So every teacher has equally many of each class, give or take one, and records of scarce classes stand in two teachers
    (1,138 of MNIST's 60,000 for 4,000 teachers; none of Fashion-MNIST's) while as many of the others are left out.
    Which teacher has a record depends on the labels in front of it: this earns no ε, whatever noise follows.

    Args:
        y: labels `[n]` in the order of the records.
        teachers: number of teachers.
        classes: number of classes.

    Raises:
        Expected: fewer records than teachers, or a class without a record.
    """
    whole(teachers=teachers, classes=classes)
    between(1, len(y), teachers=teachers)
    each = len(y) // teachers
    rows = [torch.nonzero(y == label)[:, 0] for label in range(classes)]
    empty = [label for label, found in enumerate(rows) if not len(found)]
    if empty:
        raise Expected(f"Expected records of every class, found none of class {empty[0]}.")
    dealt = torch.arange(teachers * each)
    out = torch.empty_like(dealt)
    for label, found in enumerate(rows):
        mine = dealt[label::classes]
        out[mine] = found[(mine // classes) % len(found)]
    return out.reshape(teachers, each)


def reach(partition: Tensor, n: int) -> Tensor:
    """How many teachers of `partition [teacher, each]` hold each of n records, `[n]`."""
    pairs = torch.unique(partition + n * torch.arange(len(partition))[:, None])
    return torch.bincount(pairs % n, minlength=n)

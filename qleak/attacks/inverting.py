"""Inverting Gradients and the settings that later work made of it: cosine distance, Adam on signs, total variation."""

from __future__ import annotations

from dataclasses import replace

from qleak.attacks.adam import adam
from qleak.attacks.match import matching
from qleak.attacks.objectives import OBJECTIVES
from qleak.attacks.settings import DRAWN, Settings
from qleak.catalog import factory
from qleak.check import at_least, one_of, positive, whole
from qleak.types import Attack, Optimizer

GEIPING = "Geiping, Bauermeister, Dröge, Moeller. Inverting Gradients. NeurIPS 2020."


@factory
def inverting_gradients(
    steps: int = 24000, lr: float = 0.1, variation: float = 1e-4, objective: str = "cosine", start: str = "normal"
) -> Attack:
    """1 − cos(g′, g) over all layers jointly + TV, Adam on the sign of its gradient, pixels clamped to [0, 1].

    Geiping et al. (2020), equation 4, with their code's setting: standard normal start, lr 0.1 divided
    by 10 at 3/8, 5/8 and 7/8 of the steps. The iterate of lowest own loss is returned, where their code
    returns the last. An update of several local steps is matched by simulating them (their section 5.2).

    Args:
        steps: closures.
        lr: first step length.
        variation: weight of mean|Δx| + mean|Δy|.
        objective: see `qleak.attacks.objectives`.
        start: "normal", "uniform", "dark", "zeros", "patterned4" or "patterned16".
    """
    _checked(steps, lr, objective, start, variation=variation)
    optimizer = adam(lr, sign="hard", schedule="steps", total=steps)
    return matching(_settings(objective, optimizer, steps, start, variation=variation), (GEIPING,))


@factory
def modern(
    steps: int = 24000,
    lr: float = 0.1,
    double_opponents: float = 0.1,
    warmup: int = 50,
    objective: str = "cosine",
    start: str = "patterned4",
) -> Attack:
    """Inverting gradients with a soft sign, cosine decay after a warm-up, patterned start, double-opponent TV.

    The collected settings of the `breaching` framework (Geiping et al. 2022), without their prior on
    features.

    Args:
        steps: closures.
        lr: highest step length.
        double_opponents: weight of the variation of colours and opponent colours.
        warmup: closures over which lr rises.
        objective: see `qleak.attacks.objectives`.
        start: see `inverting_gradients`.
    """
    _checked(steps, lr, objective, start, double_opponents=double_opponents)
    optimizer = adam(lr, sign="soft", schedule="cosine", total=steps, warmup=warmup)
    papers = (GEIPING, "Åström, Schnörr. A geometric approach to color image regularization. 2017.")
    return matching(_settings(objective, optimizer, steps, start, double_opponents=double_opponents), papers)


@factory
def see_through(
    steps: int = 20000,
    lr: float = 0.1,
    factor: float = 1e-4,
    variation: float = 1e-4,
    norm: float = 1e-6,
    statistics: float = 0.1,
    consistency: float = 0.01,
    langevin: float = 0.01,
    group: int = 4,
    warmup: int = 50,
    rule: str = "yin",
) -> Attack:
    """See through Gradients: ½·factor·‖g′ − g‖² + TV + norm + batch-norm statistics + agreement of a group of starts.

    GradInversion, Yin et al. (CVPR 2021), equations 1–12: labels by their rule, Adam with cosine decay,
    normal noise on the gradient, starts that pull towards their mean (pixel by pixel: their
    registration by RANSAC-flow is left out). Batch-norm statistics of the secret batch enter only
    where the threat model shares them, the running ones otherwise.

    Args:
        steps: closures of every start.
        lr: highest step length.
        factor: twice the weight of the evidence.
        variation: weight of mean|Δx| + mean|Δy|.
        norm: weight of ½ mean x².
        statistics: weight of the batch-norm term, see `qleak.attacks.penalties.statistics`.
        consistency: weight of the group term.
        langevin: standard deviation of the noise.
        group: starts in a group.
        warmup: closures over which lr rises.
        rule: how labels are inferred, see `qleak.attacks.labels`.
    """
    whole(group=group)
    at_least(1, group=group)
    positive(factor=factor)
    weights = {"variation": variation, "norm": norm, "statistics": statistics, "consistency": consistency}
    _checked(steps, lr, "l2", "normal", **weights, langevin=langevin)
    optimizer = adam(lr, schedule="cosine", total=steps, warmup=warmup)
    made = _settings("l2", optimizer, steps, "normal", **weights, rule=rule, group=group, langevin=langevin)
    papers = ("Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov. See through Gradients. CVPR 2021.",)
    return matching(replace(made, factor=0.5 * factor), papers)


def _checked(steps: int, lr: float, objective: str, start: str, **weights: float) -> None:
    whole(steps=steps)
    at_least(1, steps=steps)
    positive(lr=lr)
    at_least(0, **weights)
    one_of(OBJECTIVES, objective=objective)
    one_of(DRAWN, start=start)


def _settings(
    objective: str,
    optimizer: Optimizer,
    steps: int,
    start: str,
    *,
    rule: str = "auto",
    group: int = 1,
    langevin: float = 0.0,
    **weights: float,
) -> Settings:
    penalties = tuple((name, weight) for name, weight in weights.items() if weight)
    return Settings(
        objective, optimizer, "inferred", steps=(steps,), start=start, clamp=True, penalties=penalties, rule=rule,
        group=group, langevin=langevin,
    )  # fmt: skip

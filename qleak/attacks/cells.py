"""The attacker who knows the channel, from random starts or from the closed form's answer."""

from __future__ import annotations

from qleak.attacks.adam import adam, sign_adam
from qleak.attacks.lbfgs import lbfgs
from qleak.attacks.match import matching
from qleak.attacks.objectives import OBJECTIVES
from qleak.attacks.settings import DRAWN, Settings
from qleak.catalog import factory
from qleak.check import at_least, between, one_of, positive, whole
from qleak.types import Attack

OPTIMIZERS = {"lbfgs": lambda lr: lbfgs(100, True, lr), "adam": adam, "sign_adam": sign_adam}
PAPERS = (
    "Geiping, Bauermeister, Dröge, Moeller. Inverting Gradients. NeurIPS 2020 (total variation).",
    "Dimitrov et al. Bayesian Framework for Gradient Leakage. ICLR 2022 (likelihood of a defence).",
)


@factory
def cells(
    weight: float = 0.1,
    fade: float = 0.1,
    stages: int = 6,
    steps: int = 100,
    last: int = 200,
    gain: float = 0.02,
    path: bool = False,
    objective: str = "cells",
    labels: str = "auto",
    slack: float = 0.01,
    start: str = "dark",
    optimizer: str = "lbfgs",
    lr: float = 1.0,
    route: str = "auto",
) -> Attack:
    """The attacker who knows the channel: any gradient inside the message's cell fits equally well.

    The evidence is the channel's own misfit (zero in the cell, squared distance outside, a likelihood
    behind noise) over ‖decoded‖². Total variation is faded by `fade` from stage to stage, until a
    stage no longer improves the evidence by `gain`: the smoothest image whose gradient lies in every
    cell. On an exact channel the cell is a point and the last stage has no prior. Behind a coin or noise the
    strongest weight is taken whose guess explains the message as well as the truth would (`stages.pick`).

    For one image the last bias gradient is the output error δ = p − y itself. The attacker starts δ
    there and lets it move within its cell beside the image, instead of computing it from the guess:
    on a trained net δ is tiny and hardly depends on the guess until the guess is right, which is
    what makes plain matching fail there. Otherwise the label is inferred first.

    Args:
        weight: prior weight of the first stage.
        fade: factor from one stage to the next.
        stages: number of stages with a prior.
        steps: closures of each of them.
        last: closures of the final stage, which has no prior on an exact channel.
        gain: a stage that lowers the evidence by less than this share is handed in.
        path: go on to the weakest prior in any case, so that the choice can be compared with the best one.
        objective: "cells", or for the same attack without its knowledge "l2", "weighted", "cosine",
            "straight_through"; see `qleak.attacks.objectives`.
        labels: "errors", "inferred", or "auto": errors where a code has more than two bits.
        slack: unit in which δ moves beside the pixels, in parts of its decoded norm: small keeps a
            hundred stiff directions out of the way, 1 helps a trained net out of local minima.
        start: "dark" (uniform in [0, 0.1)), "uniform" in [0, 1) or "normal".
        optimizer: "lbfgs", "adam" or "sign_adam".
        lr: step length of the optimizer.
        route: derivative route, see `qleak.attacks.routes`.
    """
    one_of(DRAWN, start=start)
    settings = _settings(
        weight, fade, stages, steps, last, gain=gain, path=path, objective=objective, labels=labels, slack=slack,
        start=start, optimizer=optimizer, lr=lr, route=route,
    )  # fmt: skip
    return matching(settings, PAPERS)


@factory
def refine(
    weight: float = 1e-3,
    fade: float = 0.1,
    stages: int = 3,
    steps: int = 100,
    last: int = 100,
    slack: float = 0.01,
    path: bool = False,
) -> Attack:
    """The closed form's answer, brought home by `cells`: no random start, no local minimum on a net that can be solved.

    A decoded message throws the closed form off, but not far; from there the constraints of every
    cell pull the image in. Refuses the nets that `closed_form` refuses.

    Args:
        weight: prior weight of the first stage.
        fade: factor from one stage to the next.
        stages: number of stages with a prior.
        steps: closures of each of them.
        last: closures of the final stage, which has no prior on an exact channel.
        slack: unit in which the output error moves, see `cells`.
        path: see `cells`.
    """
    settings = _settings(weight, fade, stages, steps, last, path=path, slack=slack, start="solved")
    return matching(settings, (*PAPERS, "Zhu, Blaschko. R-GAP: Recursive Gradient Attack on Privacy. ICLR 2021."))


@factory
def adaptive(
    weight: float = 0.3,
    fade: float = 0.3,
    stages: int = 9,
    steps: int = 50,
    last: int = 50,
) -> Attack:
    """`cells` for every channel alike: a finer path of prior weights, walked to its end, 500 closures.

    A fine even grid is read as numbers with small rounding errors ("graded", see `qleak.attacks.objectives`).
    Behind a coin or noise the weight matters most: too strong is blurred, too weak fits the noise. The choice
    (`stages.pick`) does not see the truth; what the truth would have chosen is reported beside it.

    Args:
        weight: prior weight of the first stage.
        fade: factor from one stage to the next.
        stages: number of stages with a prior.
        steps: closures of each of them.
        last: closures of the final stage.
    """
    settings = _settings(weight, fade, stages, steps, last, path=True, objective="graded")
    return matching(settings, (*PAPERS, "Morozov. On the solution of functional equations by regularization. 1966."))


def _settings(
    weight: float, fade: float, stages: int, steps: int, last: int, *, gain: float = 0.02, path: bool = False,
    objective: str = "cells", labels: str = "auto", slack: float = 0.01, start: str = "dark", optimizer: str = "lbfgs",
    lr: float = 1.0, route: str = "auto",
) -> Settings:  # fmt: skip
    whole(stages=stages, steps=steps, last=last)
    at_least(1, stages=stages, steps=steps, last=last)
    positive(weight=weight, slack=slack, lr=lr)
    between(1e-6, 1, fade=fade)
    between(0, 1, gain=gain)
    one_of(OPTIMIZERS, optimizer=optimizer)
    one_of(OBJECTIVES, objective=objective)
    one_of(["auto", "errors", "inferred"], labels=labels)
    return Settings(
        objective, OPTIMIZERS[optimizer](lr), labels, slack, (*(weight * fade**i for i in range(stages)), 0.0), fade,
        (steps,) * stages + (last,), relative=True, box=1.0, start=start, gain=gain, path=path, route=route,
    )  # fmt: skip

"""Wei's attack: the first one, with a patterned start and the client's own loss as a prior."""

from __future__ import annotations

from qleak.attacks.lbfgs import lbfgs
from qleak.attacks.match import matching
from qleak.attacks.settings import DRAWN, Settings
from qleak.catalog import factory
from qleak.check import at_least, one_of, positive, whole
from qleak.types import Attack


@factory
def cpl(outer: int = 300, inner: int = 20, lr: float = 1.0, task: float = 1.0, start: str = "patterned16") -> Attack:
    """Client privacy leakage: ½‖g′ − g‖² + task·ℓ(θ; x′, y′) from a patterned start, L-BFGS, pixels in [0, 1].

    Wei et al. (ESORICS 2020), algorithm 2, with the label read off first and the patch size of the
    `breaching` framework.

    Args:
        outer: outer iterations.
        inner: closures of one outer iteration.
        lr: step length.
        task: weight of the client's own loss at the guess.
        start: a patterned start, or another of `qleak.attacks.settings.STARTS`.
    """
    whole(outer=outer, inner=inner)
    at_least(1, outer=outer, inner=inner)
    at_least(0, task=task)
    positive(lr=lr)
    one_of(DRAWN, start=start)
    settings = Settings(
        "l2", lbfgs(100, armijo=False, lr=lr), "inferred", steps=(outer * inner,), start=start, clamp=True,
        penalties=(("task", task),) if task else (), factor=0.5, tolerance=1e-9,
    )  # fmt: skip
    return matching(settings, ("Wei, Liu, Loper, Chow, Gursoy, Truex, Wu. A Framework for Evaluating CPL. 2020.",))

"""The first attacks: image and label together (2019), or the label first (2020)."""

from __future__ import annotations

from qleak.attacks.lbfgs import lbfgs
from qleak.attacks.match import matching
from qleak.attacks.settings import Settings
from qleak.catalog import factory
from qleak.check import at_least, whole
from qleak.types import Attack


@factory
def dlg(
    outer: int = 300, inner: int = 20, lr: float = 1.0, history: int = 100, patience: int = 0, tolerance: float = 1e-9
) -> Attack:
    """Deep leakage from gradients: image and soft label together, Σ‖g′ − g‖², L-BFGS without line search.

    Zhu, Liu, Han (NeurIPS 2019), Algorithm 1, with their code's setting: standard normal start,
    300 × 20 closures, history 100, no restarts, no bounds. The iterate of lowest own loss is
    returned, where their code returns the last one.

    Args:
        outer: outer iterations.
        inner: closures of one outer iteration.
        lr: step length.
        history: pairs of L-BFGS.
        patience: freeze a lane after so many closures without 1 % improvement; 0 never does.
        tolerance: a lane whose loss changes by less for 20 closures on end has converged (their optimizer
            ends an outer iteration at the first such change, and then hardly moves).
    """
    papers = ("Zhu, Liu, Han. Deep Leakage from Gradients. NeurIPS 2019.",)
    return matching(_settings("joint", outer, inner, lr, history, patience, tolerance), papers)


@factory
def idlg(
    outer: int = 300, inner: int = 20, lr: float = 1.0, history: int = 100, patience: int = 0, tolerance: float = 1e-9
) -> Attack:
    """Improved DLG: the label by the sign of the last layer's gradient first, then `dlg` with it fixed.

    Zhao, Mopuri, Bilen (2020), with their code's setting (that of `dlg`).

    Args:
        outer: outer iterations.
        inner: closures of one outer iteration.
        lr: step length.
        history: pairs of L-BFGS.
        patience: freeze a lane after so many closures without 1 % improvement; 0 never does.
        tolerance: a lane whose loss changes by less for 20 closures on end has converged (their optimizer
            ends an outer iteration at the first such change, and then hardly moves).
    """
    papers = ("Zhao, Mopuri, Bilen. iDLG: Improved Deep Leakage from Gradients. 2020.",)
    return matching(_settings("inferred", outer, inner, lr, history, patience, tolerance), papers)


def _settings(
    labels: str, outer: int, inner: int, lr: float, history: int, patience: int, tolerance: float
) -> Settings:
    """Both attacks are one but for the way to the labels."""
    whole(outer=outer, inner=inner, patience=patience)
    at_least(0, patience=patience, tolerance=tolerance)
    at_least(1, outer=outer, inner=inner)
    optimizer = lbfgs(history, armijo=False, lr=lr)
    return Settings("l2", optimizer, labels, steps=(outer * inner,), patience=patience, tolerance=tolerance)

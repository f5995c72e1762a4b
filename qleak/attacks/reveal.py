"""The attack that asks for the labels alone: which classes are in the batch, and how often."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from qleak.attacks import labels
from qleak.catalog import factory
from qleak.check import one_of
from qleak.client import View
from qleak.types import Attack, Guess, Info, Status, Tree

PAPERS = {
    "idlg": "Zhao, Mopuri, Bilen. iDLG: Improved Deep Leakage from Gradients. 2020.",
    "yin": "Yin et al. See through Gradients: Image Batch Recovery via GradInversion. CVPR 2021.",
    "wainakh": "Wainakh et al. User-Level Label Leakage from Gradients in Federated Learning. PoPETs 2022.",
    "wainakh_whitebox": "Wainakh et al. User-Level Label Leakage from Gradients in Federated Learning. PoPETs 2022.",
    "ilrg": "Ma et al. Instance-wise Batch Label Restoration via Gradients in Federated Learning. ICLR 2023.",
    "geng": "Geng et al. Towards General Deep Leakage in Federated Learning. 2021.",
}


class Revealed(NamedTuple):
    """Grey images, the labels found, and the status of every lane."""

    x: Tensor
    labels: Tensor
    status: Tensor


@factory
def reveal(rule: str = "auto") -> Attack:
    """Infers labels and no image: hands in grey, so that `label_ok` is all there is to its rows.

    Args:
        rule: "auto", or one of `qleak.attacks.labels.RULES`.
    """
    one_of(("auto", *labels.RULES), rule=rule)

    def draw(gen: Generator, view: View) -> Tree:
        return {"x": torch.full((view.client.batch, *view.model.shape), 0.5)}

    def init(view: View, start: Tree) -> Revealed:
        lanes = len(start["x"])
        none = torch.zeros(lanes, view.client.batch, dtype=torch.int64, device=start["x"].device)
        active = Status.ACTIVE if view.evidence else Status.FINISHED
        return Revealed(start["x"], none, torch.full((lanes,), active, dtype=torch.int64, device=none.device))

    def step(view: View, state: Revealed) -> tuple[Revealed, Info]:
        found = labels.infer(view, rule)
        assert found is not None
        state = Revealed(state.x, found, torch.full_like(state.status, Status.FINISHED))
        return state, Info(_zero(state), state.status)

    def read(view: View, state: Revealed) -> Guess:
        return Guess(state.x, state.labels, _zero(state))

    papers = tuple(PAPERS[name] for name in ([rule] if rule != "auto" else ["idlg", "geng"]) if name in PAPERS)
    return Attack(draw, init, step, read, 1, lambda view: labels.refuse(view, rule), papers, restarts=False)


def _zero(state: Revealed) -> Tensor:
    return state.x.new_zeros(len(state.x))

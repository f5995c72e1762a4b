"""Labels from the last layer's gradient: of one image by its sign, of a batch by one of `RULES`."""

from __future__ import annotations

import torch
from torch import Tensor

from qleak.attacks.label_counts import counts, estimate, present, proven
from qleak.attacks.label_rules import (
    analytic,
    bias_corrected,
    geng,
    geng_estimate,
    ilrg,
    project,
    repeat,
    wainakh,
    wainakh_whitebox,
    yin,
)
from qleak.attacks.label_rules import idlg as idlg_batch
from qleak.attacks.label_seen import seen, why_not
from qleak.check import one_of
from qleak.client import View, is_gradient
from qleak.types import Tree


def last_bias(update: Tree, classes: int) -> Tensor | None:
    """The gradient of the last layer's bias `[… class]`, if the last tensor of the tree is one."""
    bias = list(update.values())[-1]
    return bias if bias.shape[-1] == classes and bias.ndim == min(v.ndim for v in update.values()) else None


def last_weight(update: Tree, classes: int) -> Tensor | None:
    """The gradient of the last linear layer's weight `[… class d]`, looked for from the end of the tree."""
    least = min(v.ndim for v in update.values())
    for value in reversed(list(update.values())):
        if value.ndim == least + 1 and value.shape[-2] == classes:
            return value
    return None


def idlg(update: Tree, classes: int) -> Tensor | None:
    """ĉ = argmin_c Σ_j ∂L/∂W[c, j] of the last linear layer, for one image: `[lane …] -> [lane 1]`.

    With a cross-entropy loss ∂L/∂W[c] = (p_c − y_c)·h, negative only for the true class while the
    features h are non-negative. Zhao, Mopuri, Bilen, "iDLG" (2020), equations 3–4.

    Returns:
        None when the model does not end in a linear layer with `classes` rows.
    """
    weight = last_weight(update, classes)
    return None if weight is None else weight.sum(-1).argmin(-1, keepdim=True)


def bias_sign(update: Tree, classes: int) -> Tensor | None:
    """ĉ = argmin_c ∂L/∂b[c] = p_c − y_c: needs no sign of the features. One image: `[lane …] -> [lane 1]`."""
    bias = last_bias(update, classes)
    return None if bias is None else bias.argmin(-1, keepdim=True)


def blind(view: View) -> bool:
    """Whether coordinates are missing at random: the last bias may be among them."""
    return any(s.kind == "select" and s.noise for s in view.channel.stages)


def readable(view: View) -> bool:
    """Whether the output error can be read off the message: all of it there, in more than two bits."""
    return not blind(view) and view.channel.upto(view.leg).facts().width > 2


def one_error(view: View) -> bool:
    """Whether the last bias gradient is the output error of one image: one gradient of it, of a net that has one."""
    bias = last_bias(view.params, view.model.classes)
    return view.client.batch == 1 and is_gradient(view.client) and bias is not None


def error_in_units(view: View, slack: float) -> tuple[Tensor, Tensor]:
    """(unit `[lane 1]`, decoded output error in that unit `[lane class]`): a unit is `slack` of the error's norm."""
    bias = last_bias(view.decoded(), view.model.classes)
    assert bias is not None
    bias = bias / view.client.scale
    unit = slack * bias.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return unit, bias / unit


RULES = {
    "idlg": idlg_batch,
    "analytic": analytic,
    "yin": yin,
    "wainakh": wainakh,
    "wainakh_whitebox": wainakh_whitebox,
    "bias_corrected": bias_corrected,
    "ilrg": ilrg,
    "geng": geng,
    "counts": counts,
    "present": present,
}
"""Rules for the labels of a batch: `rule(view) -> [lane b]`, ascending; "auto" chooses among them."""
NEEDS_BIAS = ("analytic", "bias_corrected", "ilrg")


def refuse(view: View, rule: str = "auto") -> str:
    """Why a rule cannot read this view, or "" if it can."""
    return "" if view.labels is not None else why_not(view, bias=rule in NEEDS_BIAS)


def infer(view: View, rule: str = "auto") -> Tensor | None:
    """The labels of every batch, `[lane b]` ascending; labels that are given come first. None if they cannot be read.

    "auto": for one image the smallest entry of ∂L/∂b, or without one the smallest row sum of ∂L/∂W; for more see
    `choose`.

    Raises:
        Expected: `rule` is none of `RULES` and not "auto".
    """
    one_of(("auto", *RULES), rule=rule)
    if view.labels is not None:
        return view.labels
    if rule != "auto":
        return None if refuse(view, rule) else RULES[rule](view)
    if view.client.batch > 1:
        return None if refuse(view) else choose(view)
    decoded = view.decoded()
    found = None if blind(view) else bias_sign(decoded, view.model.classes)
    return found if found is not None else idlg(decoded, view.model.classes)


def choose(view: View) -> Tensor:
    """Of `counts` and `geng` whichever lies closer to whole counts; `present` where both leave out a proven class.

    Lane by lane, from the message alone. `geng` looks at noise images only, which no noise of the channel can
    disturb; `counts` learns from the message what the batch looks like. A class proven to be there that is
    given no image says that the net knows its images too well for either: it is trained.
    """
    batch, there = view.client.batch, proven(view, seen(view))
    best, least = present(view), torch.full(there.shape[:1], torch.inf, dtype=torch.float64, device=there.device)
    whole, near, _ = estimate(view)
    rough = geng_estimate(view)
    for k, real in ((whole, near), (project(rough, batch), rough)):
        off = (real - k).double().square().sum(-1)
        off = torch.where((there & (k == 0)).any(-1), torch.inf, off)
        better = off < least
        best = torch.where(better[:, None], repeat(k, batch), best)
        least = torch.where(better, off, least)
    return best

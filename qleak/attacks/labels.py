"""Labels from the last layer's gradient."""

from __future__ import annotations

from torch import Tensor

from qleak.client import View
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


def infer(view: View) -> Tensor | None:
    """The label of one image from its update, `[lane 1]`; labels that are given come first. None if it cannot be read."""
    if view.labels is not None:
        return view.labels
    decoded = view.decoded()
    found = None if blind(view) else bias_sign(decoded, view.model.classes)
    return found if found is not None else idlg(decoded, view.model.classes)

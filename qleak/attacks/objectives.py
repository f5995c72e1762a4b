"""How far an update lies from a message: the attacker's evidence term.

Most messages pin the update to a convex set: a point for numbers sent in clear, a box of cells for
codes. The misfit is then the squared distance to that set, |u − P(u)|², with slope 2(u − P(u)), and
all an objective needs is the projection P. What can be worked out from the message once (the
decoded point, the ends of the cells) is its `goal`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from qleak import tree
from qleak.check import one_of
from qleak.client import View
from qleak.types import Tree

OBJECTIVES = ("l2", "cells")


class Objective(NamedTuple):
    """`misfit(update, goal) -> scalar` of one lane; `project(update, goal)` where it is a distance to a set."""

    misfit: Callable[[Tree, Any], Tensor]
    project: Callable[[Tree, Any], Tree] | None


def objective(view: View, kind: str) -> Objective:
    """The evidence term of an attacker.

    - "l2": Σ‖g′ − decoded‖² over all tensors, whatever the channel was: the attacker of 2019 (no ½, sum
      over layers; Zhu et al. 2019, equation 4).
    - "cells": the channel's own misfit: zero inside the message's cell, a likelihood where there is
      noise. On the identity channel it is the same as "l2".
    """
    one_of(OBJECTIVES, objective=kind)
    if kind == "l2" or not view.channel.stages:
        return _distance_to(lambda update, decoded: decoded)
    if view.channel.has_cell(view.leg):
        return _distance_to(lambda update, cell: {k: v.clamp(cell[0][k], cell[1][k]) for k, v in update.items()})
    knobs = view.channel.knobs(device=next(iter(view.params.values())).device)
    return Objective(lambda update, m: view.channel.misfit(knobs, m, update, view.like, view.leg), None)


def goal(view: View, kind: str) -> Any:
    """What `objective` needs of the messages, worked out once and stacked over lanes."""
    if kind == "l2" or not view.channel.stages:
        return view.decoded()
    if view.channel.has_cell(view.leg):
        knobs = view.channel.knobs(device=next(iter(view.params.values())).device)
        return vmap(lambda m: view.channel.cell(knobs, m, view.like, view.leg))(view.message)
    return view.message


def value_and_slope(objective: Objective, update: Tree, goal: Any) -> tuple[Tensor, Tree]:
    """Misfit `[lane]` and its gradient in the update, for all lanes: `{name: [lane …]}` each."""
    if objective.project is None:
        slope, value = vmap(grad_and_value(objective.misfit))(update, goal)
        return value, slope
    error = tree.sub(update, objective.project(update, goal))
    value = torch.stack([torch.linalg.vector_norm(v.flatten(1), dim=1).square() for v in error.values()]).sum(0)
    return value, {k: v.mul_(2) for k, v in error.items()}


def _distance_to(project: Callable[[Tree, Any], Tree]) -> Objective:
    def misfit(update: Tree, goal: Any) -> Tensor:
        error = tree.sub(update, project(update, goal))
        return tree.dot(error, error)

    return Objective(misfit, project)

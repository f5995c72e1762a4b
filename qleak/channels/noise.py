"""Additive noise. It needs a bound in front of it, and then sets the privacy event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.check import Expected, positive
from qleak.types import Belief, Facts, Side, Stage, Tree

VARIANCE = {"gaussian": 1.0, "laplace": 2.0}  # of one standard draw


@factory
def gaussian(sigma: float = 1.0, unbounded: bool = False) -> Stage:
    """Adds σ·N(0, 1) to every coordinate.

    With an L2 (or L1) sensitivity Δ in front, the release is a Gaussian mechanism of noise
    multiplier σ/Δ (Dwork & Roth 2014, Appendix A).

    Args:
        sigma: standard deviation, in the units of what is sent.
        unbounded: run without a bound, and so without any guarantee.
    """
    positive(sigma=sigma)

    def event(multiplier: float) -> Any:
        from dp_accounting import dp_event  # imports scipy: only where a guarantee is asked for

        return dp_event.GaussianDpEvent(multiplier)

    return _noise("gaussian", f"gaussian(sigma={sigma:g})", sigma, (1, 2), event, unbounded)


@factory
def laplace(eps: float | None = None, scale: float | None = None, unbounded: bool = False) -> Stage:
    """Adds β·Laplace(1) to every coordinate.

    `eps` sets β = Δ₁/eps from the L1 sensitivity Δ₁ in front of it (Dwork et al. 2006): pure
    eps-differential privacy for one release. `scale` sets β itself.

    Args:
        eps: ε of one release; 1.0 when neither argument is given.
        scale: β, in the units of what is sent.
        unbounded: run without a bound, and so without any guarantee; with `eps`, Δ₁ counts as 1.
    """
    if eps is not None and scale is not None:
        raise Expected(f"Expected one of eps={eps} and scale={scale}, got both.")
    if scale is not None:
        positive(scale=scale)
    target = 1.0 if eps is None else eps
    positive(eps=target)
    written = f"laplace(eps={target})" if scale is None else f"laplace(scale={scale:g})"

    def event(multiplier: float) -> Any:
        from dp_accounting import dp_event

        return dp_event.LaplaceDpEvent(multiplier)

    def of_scale(beta: float) -> Stage:
        return _noise("laplace", written, beta, (1,), event, unbounded)

    def bind(before: Facts) -> Stage:
        if before.sensitivity is None:
            return of_scale(1 / target)
        if before.sensitivity.value is None:
            raise Expected(f"Expected a sensitivity known in numbers before {written}: pass scale=… instead.")
        return of_scale(before.sensitivity.value / target)

    return of_scale(scale) if scale is not None else replace(of_scale(1 / target), bind=bind)


def _noise(
    name: Literal["gaussian", "laplace"],
    written: str,
    size: float,
    norms: tuple[int, ...],
    event: Callable[[float], Any],
    unbounded: bool,
) -> Stage:
    law: Literal["gauss", "laplace"] = "gauss" if name == "gaussian" else "laplace"

    def send(knobs: dict[str, Tensor], x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        return {k: v + knobs["size"].to(v.dtype) * noise[k].to(v.dtype) for k, v in x.items()}, {}, state

    def push(knobs: dict[str, Tensor], belief: Belief, side: Side | None) -> Belief:
        added = VARIANCE[name] * knobs["size"].square()
        return Belief(belief.mean, {k: belief.var.get(k, torch.zeros_like(m)) + added for k, m in belief.mean.items()})

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        alone = before.law == "none"
        both_gauss = before.law == law == "gauss"
        out = replace(reset, law=law if alone or both_gauss else "mixed", exact=before.exact and (alone or both_gauss))
        if unbounded:
            return out
        given = before.sensitivity
        if given is None or given.p not in norms:
            clip = "clip_l2" if name == "gaussian" else "clip_l1"
            bounded = "a bounded input" if given is None else f"an input bounded in L{norms[0]}, not L{given.p},"
            raise Expected(
                f"Expected {bounded} before {written}: put {clip}(...) in front, "
                "or pass unbounded=True to run without a guarantee."
            )
        # A value that is private already stays so: what follows is post-processing.
        return out if before.event or given.value is None else replace(out, event=event(size / given.value))

    return Stage(
        name, "value", send, push, fold=fold, knobs={"size": size}, noise="normal" if law == "gauss" else "laplace"
    )

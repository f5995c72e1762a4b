"""The prior's weight: a path from strong to weak, and the rule that picks a point of it without the truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qleak.client import View


def weights(path: Sequence[float], fade: float, view: View) -> list[float]:
    """The weight of every stage; a last one of 0 holds only where the message pins the gradient to a point."""
    if path[-1] or len(path) == 1:
        return list(path)
    exact = not any(s.kind in ("code", "select") or s.noise for s in view.channel.stages)
    return [*path[:-1], 0.0 if exact else path[-2] * fade]


def pick(evidence: Tensor, excess: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """Which stage the attacker hands in: `evidence [lane stage]` (inf: not reached) -> (stage, settled), `[lane]`.

    Behind a coin or noise, the strongest prior whose guess explains the message as well as the truth would:
    of n numbers the best fit of p pixels is expected to explain a share p/n too much, so the bound is
    n/(n − p) = 1 + `excess [lane]` times the smallest evidence of the path (`excess` 0: no such rule). It is
    the discrepancy principle (Morozov 1966) with the noise level taken from the fit.
    Elsewhere constraint satisfaction: the first stage that no longer lowers the evidence by the share
    `gain`, once it is below 0.1 (1 is what an update of zero has: a prior that still drowns the message
    proves nothing). `settled` says that weaker priors cannot change the answer.
    """
    reached = evidence.isfinite()
    last = (reached.sum(1) - 1).clamp(min=0)
    before = torch.cat([evidence.new_full((len(evidence), 1), torch.inf), evidence[:, :-1]], 1)
    level = (evidence >= (1 - gain) * before) & (evidence < 0.1) & bool(gain)
    bound = (1 + excess) * evidence.amin(1)
    noisy = excess > 0
    fits = torch.where(noisy[:, None], evidence <= bound[:, None], level) & reached
    return torch.where(fits.any(1), fits.to(torch.int64).argmax(1), last), fits.any(1) & ~noisy

"""The prior's weight: a path from strong to weak, and the rule that picks a point of it without the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qleak.attacks.device import maybe
from qleak.attacks.settings import Settings
from qleak.client import View
from qleak.types import Status


def weights(path: Sequence[float], fade: float, view: View) -> list[float]:
    """The weight of every stage; a last one of 0 holds only where the message pins the gradient to a point."""
    if path[-1] or len(path) == 1:
        return list(path)
    exact = not any(s.kind in ("code", "select") or s.noise for s in view.channel.stages)
    return [*path[:-1], 0.0 if exact else path[-2] * fade]


def pick(evidence: Tensor, excess: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """Which stage the attacker hands in: `evidence [lane stage]` (inf: not reached) -> (stage, settled), `[lane]`.

    Behind a coin or noise, the strongest prior whose guess explains the message as well as it should: of n
    numbers the best fit of p pixels is expected to explain a share p/n too much, so the bound is 1 + `excess [lane]`
    times the smallest evidence of the path (`excess` 0: no such rule). It is the discrepancy principle
    (Morozov 1966) with the noise level taken from the fit.
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


def advance(settings: Settings, state: Any, whole: bool) -> Any:
    """Ends stages that are over, and lanes that are done; with `whole`, only at the end of the path."""
    active = state.status == Status.ACTIVE
    state = state._replace(status=torch.where(active & (state.still >= 20), Status.CONVERGED, state.status))
    if settings.patience:
        improved = state.best_loss < 0.99 * state.mark_loss
        state = state._replace(
            mark_loss=torch.where(improved, state.best_loss, state.mark_loss),
            mark_since=torch.where(improved, 0, state.mark_since),
        )
        stuck = (state.status == Status.ACTIVE) & (state.mark_since >= settings.patience)
        state = state._replace(status=torch.where(stuck, Status.CONVERGED, state.status))
    budget = torch.tensor(settings.steps, device=state.x.device)
    over = (state.since >= budget[state.stage]) & (state.status == Status.ACTIVE)
    if not maybe(over):  # most steps end here
        return state
    state = recorded(state, over)
    final = state.stage == len(settings.steps) - 1
    settled = pick(state.trace, torch.zeros_like(state.size), settings.gain)[1]
    done = over & (final | (settled & (not whole)))
    following = over & ~done
    return state._replace(
        status=torch.where(done, Status.FINISHED, state.status),
        stage=state.stage + following,
        since=torch.where(following, 0, state.since),
        x=torch.where(following[:, None], state.best_x, state.x),
        best_loss=torch.where(following, torch.inf, state.best_loss),
        optimizer=settings.optimizer.restart(state.optimizer, following),
    )


def recorded(state: Any, over: Tensor) -> Any:
    """The best of the present stage, written into the trail of the lanes `over`."""
    here = over[:, None] & (torch.arange(state.trace.shape[1], device=over.device) == state.stage[:, None])
    here = here & state.best_loss.isfinite()[:, None]
    return state._replace(
        trail=torch.where(here[..., None], state.best_x[:, None], state.trail),
        trace=torch.where(here, state.best_evidence[:, None], state.trace),
        trail_loss=torch.where(here, state.best_loss[:, None], state.trail_loss),
    )

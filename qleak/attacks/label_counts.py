"""How often each class is in the batch: the most likely whole counts under everything the message says.

With k the counts, b·∂L/∂b = b·p̄ − k, p̄ being the batch's mean softmax. So k̂ = b·(p̄ − ∂L/∂b), and what is left to
find is p̄ and, behind a channel, ∂L/∂b itself. Both come from one picture of the last layer: as long as all images look
alike to it, ∂L/∂W ≈ t hᵀ with t = ∂L/∂b and h their common input. The d columns of ∂L/∂W measure t again, d times
over, and h gives p̄ = softmax(W h + b) at any stage of training. Classes that look different are put in afterwards:
∂L/∂W = A M with A = (P − I)·diag(k)/b and M the classes' own inputs, P their softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qleak.attacks.label_rules import project, repeat, smallest
from qleak.attacks.label_seen import Reading, Seen, dummies, seen, softmax_along
from qleak.channels.reading import soft_interval
from qleak.client import View

LOGIT_ERROR = 0.1
"""Standard deviation of a logit of p̄: what makes likely classes the less certain ones."""
NEAR, FAR = 16, 32
"""How far a count may lie from its rounded estimate, and how far partial sums may on the way (see `most_likely`)."""


class Fit(NamedTuple):
    """∂L/∂b ≈ t `[lane class]` of variance `var`, ∂L/∂W ≈ t hᵀ, and a correction of the logits W h + b."""

    t: Tensor
    var: Tensor
    h: Tensor
    shift: Tensor


def counts(view: View) -> Tensor:
    """The most likely labels `[lane b]`; see the module. Without a bias t comes from ∂L/∂W alone."""
    return repeat(estimate(view, proven(view, seen(view)))[0], view.client.batch)


def estimate(view: View, there: Tensor | None = None) -> tuple[Tensor, Tensor, Fit]:
    """(whole counts `[lane class]`, the estimate k̂ they were found next to, the fit)."""
    s, batch = seen(view), view.client.batch
    fit = rank_one(s, *dummies(view))
    mean = softmax_along(view, s, fit.h[:, None], fit.shift)[:, 0]
    k = most_likely(s, fit, mean, batch, there)
    for _ in range(2):
        mean = by_class(view, s, fit, k)
        k = most_likely(s, fit, mean, batch, there)
    return k, batch * (mean - fit.t), fit


def rank_one(s: Seen, dummy: Tensor, softmax: Tensor, rounds: int = 10) -> Fit:
    """The t and h of lowest weighted error, entries of ∂L/∂W free to move inside their intervals.

    Alternating least squares. h is drawn towards the mean of the model's inputs on noise images `dummy [n d]` as
    far as the message's own error says (James & Stein 1961): with an exact message not at all.
    """
    low, high = s.weight.lo, s.weight.hi
    known = s.weight.var.isfinite().to(s.weight.at)
    noise = torch.where(known > 0, s.weight.var, 0)
    prior = dummy.mean(0).expand(len(s.weight.at), -1)
    u, h = s.weight.at, prior
    t, var = _along(s, u, h, known, noise)
    for _ in range(1 if s.exact else rounds):
        t = s.bias.at if s.bias is not None and s.exact else t
        if s.bias is None:
            h = _rescaled(u, t, known, prior)
        else:
            h = _common(u, t, known, noise, prior, t.new_zeros(()) if s.exact else _doubt(s.bias, t))
        u = (t[..., None] * h[:, None]).clamp(low, high) if s.cells else s.weight.at
        t, var = _along(s, u, h, known, noise)
    return Fit(t, var, h, _shift(s, h, t, known, noise, softmax))


def _shift(s: Seen, h: Tensor, t: Tensor, known: Tensor, noise: Tensor, softmax: Tensor) -> Tensor:
    """What draws the logits of h to those of noise images `softmax [n class]`, as far as the message's error says.

    The error of a logit W[c]·h is that of h, and that of its length, which only ∂L/∂b measures.
    """
    usual = softmax.mean(0).clamp(min=1e-30).log()
    usual = usual - usual.mean()
    logits = h @ s.w.mT + s.b
    logits = logits - logits.mean(-1, keepdim=True)
    safe = (known * t[..., None].square()).sum(1).clamp(min=1e-30)
    error = ((known * t[..., None].square() * noise).sum(1) / safe.square()) @ s.w.square().mT
    if s.bias is not None:
        exact = s.bias.var.amax(-1, keepdim=True) == 0
        error = error + torch.where(exact, 0, _doubt(s.bias, t).clamp(max=1)) * logits.square()
    else:
        error = error + 0.01 * logits.square()
    apart = logits - usual
    gap = (apart.square() - error).mean(-1, keepdim=True).clamp(min=0)
    share = torch.where(error > 0, gap / (gap + error).clamp(min=1e-30), 1)
    return (share - 1) * apart


def _doubt(bias: Reading, t: Tensor) -> Tensor:
    """Relative variance of the length of h, as ∂L/∂b alone measures it: 1/Σ_c t_c²/var_c, `[lane 1]`."""
    return 1 / (t.square() / bias.var.clamp(min=1e-14)).sum(-1, keepdim=True).clamp(min=1e-12)


def _common(u: Tensor, t: Tensor, known: Tensor, noise: Tensor, prior: Tensor, doubt: Tensor) -> Tensor:
    """The h of the columns of ∂L/∂W, drawn to `prior`."""
    weight = known * t[..., None].square()
    total = weight.sum(1)
    # A column of which a channel left one entry out of many must not rest on that one alone.
    few = (known.amin((1, 2)) == 0).to(t) * t.square().mean(-1)
    safe = torch.where(total > 0, total, 1) + few[:, None]
    h = ((known * t[..., None] * u).sum(1) + few[:, None] * prior) / safe
    error = (weight * noise).sum(1) / safe.square()
    seen_ = (total > 0).to(h)
    gap = (seen_ * ((h - prior).square() - error)).sum(-1, keepdim=True) / seen_.sum(-1, keepdim=True).clamp(min=1)
    gap = gap.clamp(min=0)
    share = torch.where(error > 0, gap / (gap + error).clamp(min=1e-38), 1) * seen_
    h = prior + share * (h - prior)
    # Only ∂L/∂b says how long h is; where it hardly does, the noise images do.
    length = (h * prior).sum(-1, keepdim=True) / prior.square().sum(-1, keepdim=True).clamp(min=1e-38)
    length = torch.where(length > 1e-3, length, 1)
    share = (1 - doubt / (length - 1).square().clamp(min=1e-12)).clamp(min=0)
    return h * (1 + share * (length - 1)) / length


def _rescaled(u: Tensor, t: Tensor, known: Tensor, prior: Tensor) -> Tensor:
    """Without a bias nothing but the noise images says how long h is."""
    h = (known * t[..., None] * u).sum(1)
    length = h.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, h * prior.norm(dim=-1, keepdim=True) / length.clamp(min=1e-38), prior)


def _along(s: Seen, u: Tensor, h: Tensor, known: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The t and its variance: ∂L/∂W along h, and ∂L/∂b, by their precisions, inside the bias's intervals."""
    squares = known * h[:, None].square()
    total = squares.sum(-1)
    safe = torch.where(total > 0, total, 1)
    t = (known * h[:, None] * u).sum(-1) / safe
    # What a row holds beside t·h may as well lie along h: the variance that a difference between images can have.
    rest = known * (u - t[..., None] * h[:, None]).square()
    rest = (rest.sum(-1) - noise.sum(-1) * (1 + 4 / known.sum(-1).clamp(min=1).sqrt())).clamp(min=0)
    var = (squares * noise).sum(-1) / safe.square() + rest / safe
    half = (s.weight.lo.isfinite() != s.weight.hi.isfinite()).any(-1)  # signs measure no magnitude
    var = torch.where((total > 0) & ~half, var, torch.inf)
    if s.bias is None:
        return t, torch.where(var.isfinite(), var, t.square() + 1e-12)
    own = s.bias.var.clamp(min=1e-14)
    precision = 1 / own + 1 / var.clamp(min=1e-14)
    t = torch.where(precision > 0, (s.bias.at / own + t / var.clamp(min=1e-14)) / precision.clamp(min=1e-38), 0)
    return t.clamp(s.bias.lo, s.bias.hi), 1 / precision.clamp(min=1e-6)


def by_class(view: View, s: Seen, fit: Fit, k: Tensor, ridge: float = 1e-2) -> Tensor:
    """p̄ `[lane class]` with an input of its own for every class that is there.

    M = 1hᵀ + D, D the ridge solution of A D = ∂L/∂W − A 1 hᵀ for the classes with k > 0.
    """
    batch, classes = view.client.batch, k.shape[-1]
    n = min(batch, classes)
    there = k.argsort(dim=-1, descending=True, stable=True)[:, :n]
    share = k.gather(-1, there).to(fit.h) / max(batch, 1)
    own = torch.nn.functional.one_hot(there, classes).to(fit.h).mT
    middle = fit.h[:, None].expand(-1, n, -1)
    # Only as far as the message is exact: what a channel adds must not be taken for a difference between classes.
    error = torch.where(s.weight.var.isfinite(), s.weight.var, s.weight.at.square()).sum((-1, -2))
    power = s.weight.at.square().sum((-1, -2)).clamp(min=1e-38)
    doubt = (ridge + error / power)[:, None, None]
    p = softmax_along(view, s, middle, fit.shift).mT
    a = (p - own) * share[:, None]
    square = a.mT @ a
    mean = square.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    system = square + (doubt * mean + 1e-12) * torch.eye(n).to(a)
    rest = torch.where(s.weight.var.isfinite(), s.weight.at - fit.t[..., None] * fit.h[:, None], 0)
    own_inputs = middle + torch.linalg.solve(system.double(), (a.mT @ rest).double()).to(a)
    p = softmax_along(view, s, own_inputs, fit.shift).mT
    return (p * share[:, None]).sum(-1)


def most_likely(s: Seen, fit: Fit, mean: Tensor, batch: int, there: Tensor | None = None) -> Tensor:
    """The whole counts k ≥ 0, Σk = b, of largest likelihood, `[lane class]`.

    Σ_c −ln P(message | t_c = p̄_c − k_c/b) is a sum over classes, so the best k is found exactly, by dynamic
    programming over classes and partial sums of k − k⁰, k⁰ being the rounded estimate. (Exact within `NEAR` of it.)
    """
    start = project(batch * (mean - fit.t), batch)
    near, far = min(batch, NEAR), min(batch, FAR)
    step = torch.arange(-near, near + 1, device=start.device)
    k = start[..., None] + step
    t = mean[..., None] - k / max(batch, 1)
    own = (LOGIT_ERROR * mean * (1 - mean)).square() + (0.02 / max(batch, 1)) ** 2
    # A message holds one count a class; beyond a tenth of it the likelihood would only repeat what rounding says.
    wide = (own + fit.var)[..., None]
    cost = (t - fit.t[..., None]).square() / (2 * wide)
    if s.bias is not None and s.cells:
        low, high, v = (x[..., None].expand_as(t) for x in (s.bias.lo, s.bias.hi, own))
        free = ~(low.isfinite() | high.isfinite())
        cost = cost + torch.where(free, 0, soft_interval(t, torch.where(free, -1.0, low), high, v))
    if there is not None:
        cost = cost.double() + 1e9 * (there[..., None] & (k < 1))
    cost = torch.where((k >= 0) & (k <= batch), cost.double().nan_to_num(1e30, 1e30), torch.inf)
    return start + _cheapest(cost, near, far)


def _cheapest(cost: Tensor, near: int, far: int) -> Tensor:
    """Steps `[lane class]` of −near … near that sum to zero, of least total `cost [lane class step]`."""
    lanes, classes, _ = cost.shape
    best = torch.full((lanes, 2 * far + 1), torch.inf, dtype=cost.dtype, device=cost.device)
    best[:, far] = 0
    chosen = []
    for c in range(classes):
        padded = torch.nn.functional.pad(best, (near, near), value=torch.inf)
        before = padded.unfold(-1, 2 * near + 1, 1).flip(-1)  # [lane sum step]: the best at sum − step
        best, step = (before + cost[:, c, None]).min(-1)
        chosen.append(step)
    at = torch.full((lanes, 1), far, device=cost.device)
    steps = []
    for step in reversed(chosen):
        taken = step.gather(-1, at) - near
        steps.append(taken)
        at = at - taken
    return torch.cat(steps[::-1], -1)


def present(view: View) -> Tensor:
    """Every class that must be there once, the rest by the equations of `ilrg` over those alone.

    For trained nets, which know the images of one batch with very different confidence, so that one common input
    says nothing. Classes that are not proven there are taken by their smallest entry (`yin`) if none is.
    """
    s, batch = seen(view), view.client.batch
    score = s.weight.at.amin(-1)
    score = score if s.bias is None else torch.minimum(score, s.bias.at * s.weight.at.abs().amax((-1, -2))[:, None])
    there = proven(view, s)
    rank = torch.where(there, score, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    there = there & (rank < batch)
    # What is left goes round evenly, the strongest class first: sizes say how unsure the net is, not how many there are.
    size = -score / score.abs().amax(-1, keepdim=True).clamp(min=1e-38)
    k = (batch / there.sum(-1, keepdim=True).clamp(min=1) + 0.5 * size).double()
    once = there.long()
    rest = project(torch.where(there, k - once, -1e6), batch - once.sum(-1, keepdim=True))
    some = there.any(-1, keepdim=True)
    return torch.where(
        some, repeat(torch.where(some, once + rest, project(-score, batch)), batch), smallest(score, None, batch)
    )


def proven(view: View, s: Seen, sigmas: float = 6.0) -> Tensor:
    """Classes that must be in the batch, `[lane class]`: only a label makes an entry of ∂L/∂b[c] negative.

    The same holds for ∂L/∂W[c, j] where no input of the last layer is ever negative (sigmoid, ReLU), as
    on the noise images. Entries count from `sigmas` standard deviations of the message on.
    """
    found = torch.zeros_like(s.weight.at[..., 0], dtype=torch.bool)
    if bool((dummies(view)[0] >= 0).all()):
        found = _negative(s.weight, sigmas).any(-1)
    return found if s.bias is None else found | _negative(s.bias, sigmas)


def _negative(r: Reading, sigmas: float) -> Tensor:
    """Below zero for sure: by its interval where it has one, else by so many standard deviations."""
    slack = 1e-7 * r.at.abs().flatten(1).amax(-1).view(-1, *(1,) * (r.at.ndim - 1))
    below = (r.hi < 0) | ((r.hi <= 0) & r.lo.isneginf())  # a sign: the code of less than zero
    return torch.where(r.hi.isfinite(), below, r.at < -sigmas * r.var.sqrt() - slack)

"""Published rules for the labels of a batch, each a pure function of the view: `rule(view) -> [lane b]`, ascending.

Every rule hands in exactly b labels, whatever the message: most of them were written for exact gradients, where
signs are trusted; behind noise there are more negative entries than labels, or none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qleak.attacks.label_seen import Seen, dummies, seen, softmax_along
from qleak.client import View


def repeat(counts: Tensor, batch: int) -> Tensor:
    """Counts `[lane class]` that sum to b as labels `[lane b]`, ascending."""
    lanes, classes = counts.shape
    every = torch.arange(classes, device=counts.device).expand(lanes, -1).flatten()
    return every.repeat_interleave(counts.flatten()).view(lanes, batch)


def project(estimate: Tensor, batch: int | Tensor) -> Tensor:
    """The nearest whole counts: Euclidean projection of `[lane class]` to {k ≥ 0, Σk = b}, then largest remainders.

    `batch` is b, or one for every lane, `[lane 1]`.
    """
    wild = 1e9
    k = estimate.double().nan_to_num(0.0, wild, -wild).clamp(-wild, wild)
    ranked = k.sort(-1, descending=True).values
    places = torch.arange(1, k.shape[-1] + 1, device=k.device)
    excess = (ranked.cumsum(-1) - batch) / places
    last = (ranked > excess).sum(-1, keepdim=True).clamp(min=1) - 1
    k = (k - excess.gather(-1, last)).clamp(min=0)
    whole = (k + 1e-9).floor()
    rest = (batch - whole.sum(-1, keepdim=True)).round()
    rank = (k - whole).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (whole + (rank < rest)).long()


def smallest(score: Tensor, count: Tensor | None, batch: int) -> Tensor:
    """Labels `[lane b]`: the `count` classes of smallest score in turn, again from the first where b is larger."""
    order = score.argsort(dim=-1, stable=True)
    classes = score.shape[-1]
    count = torch.full_like(order[:, :1], classes) if count is None else count.clamp(1, classes)
    turn = torch.arange(batch, device=score.device)[None] % count
    return order.gather(-1, turn).sort(-1).values


def in_turn(score: Tensor, impact: Tensor, offset: Tensor | float, batch: int) -> Tensor:
    """Two stages on scores `[lane class]`: every negative class gets one label, then the lowest score, until b are out.

    A label given raises the score of *its* class by |impact|, `[lane]`.
    """
    found = []
    shifted, first = score, score < 0
    for _ in range(batch):
        waiting = torch.where(first, score, torch.inf)  # first stage: the negative classes, most negative first
        label = torch.where(first.any(-1), waiting.argmin(-1), (shifted - offset).argmin(-1))
        found.append(label)
        given = torch.nn.functional.one_hot(label, score.shape[-1])
        shifted = shifted - impact[:, None] * given
        first = first & (given == 0)
    none = torch.zeros(len(score), 0, dtype=torch.int64, device=score.device)
    return torch.stack(found, -1).sort(-1).values if found else none


def idlg(view: View) -> Tensor:
    """The b smallest row sums Σ_j ∂L/∂W[c, j], in turn again where b > classes.

    Zhao, Mopuri, Bilen, "iDLG" (2020), equations 3–4, for one image; several smallest rows are the usual extension.
    """
    return smallest(_sums(view), None, view.client.batch)


def analytic(view: View) -> Tensor:
    """The classes of negative ∂L/∂b, most negative first, in turn again where there are fewer than b.

    Exact for a batch without repeats on a net that is not sure of anything.
    """
    bias = _bias(view)
    return smallest(bias, (bias < 0).sum(-1, keepdim=True), view.client.batch)


def yin(view: View) -> Tensor:
    """The b classes of smallest min_j ∂L/∂W[c, j]. Yin et al., "See through Gradients" (CVPR 2021), equation 8."""
    return smallest(seen(view).weight.at.amin(-1), None, view.client.batch)


def wainakh(view: View) -> Tensor:
    """Impact m = (1 + 1/C)/b·Σ_{s<0} s of one image on the row sums s, then `in_turn`.

    Wainakh et al., "User-Level Label Leakage from Gradients in Federated Learning" (PoPETs 2022), section 4, the
    variant without a look at the model.
    """
    s = _sums(view)
    impact = s.clamp(max=0).sum(-1) * (1 + 1 / s.shape[-1]) / max(view.client.batch, 1)
    return in_turn(s, impact, 0.0, view.client.batch)


def wainakh_whitebox(view: View) -> Tensor:
    """`wainakh` with impact and offsets from the model: m = −E[Σ_j h_j]/b, o_c = E[p_c·Σ_j h_j] on noise images.

    The paper takes both from gradients of random data of every label; for a last linear layer their
    expectations are these two, without C passes.
    """
    h, p = dummies(view)
    s, size = _sums(view), h.sum(-1, keepdim=True)
    impact = (-size.mean() / max(view.client.batch, 1)).expand(len(s))
    return in_turn(s, impact, (p * size).mean(0), view.client.batch)


def bias_corrected(view: View) -> Tensor:
    """`wainakh` on ∂L/∂b, with m = Σ_{g<0} g/b. Geiping, "Breaching" (2022); here never more than b labels."""
    g = _bias(view)
    return in_turn(g, g.clamp(max=0).sum(-1) / max(view.client.batch, 1), 0.0, view.client.batch)


def ilrg(view: View) -> Tensor:
    """Counts that solve Σ_j k_j p_j[c] − k_c = b·∂L/∂b[c], Σ_j k_j = b, with p_j = softmax(W·e_j + b).

    e_j = ∂L/∂W[j] / ∂L/∂b[j] stands for the mean input of class j. Ma et al., "Instance-wise Batch Label
    Restoration via Gradients in Federated Learning" (ICLR 2023), section 3; solved by the pseudo-inverse.
    """
    s = seen(view)
    assert s.bias is not None
    p = softmax_along(view, s, class_means(s)).mT.double().nan_to_num(0.0)
    classes, batch = p.shape[-1], view.client.batch
    left = torch.cat([p - torch.eye(classes).to(p), torch.ones_like(p[:, :1])], 1)
    right = torch.cat([batch * s.bias.at, torch.full_like(s.bias.at[:, :1], batch)], 1).to(p)
    k = (torch.linalg.pinv(left) @ right[..., None])[..., 0]
    return repeat(project(k, batch), batch)


def class_means(s: Seen) -> Tensor:
    """∂L/∂W[c] / ∂L/∂b[c], `[lane class d]`; zero where ∂L/∂b[c] is."""
    assert s.bias is not None
    return (s.weight.at / s.bias.at[..., None]).nan_to_num(0.0, 0.0, 0.0)


def geng(view: View) -> Tensor:
    """Counts b·(p̄_c − s_c/Ō), with p̄ = mean softmax and Ō = mean Σ_j h_j of noise images, rounded to sum to b.

    Geng et al., "Towards General Deep Leakage in Federated Learning" (2021); for several local steps p̄ is
    averaged over the client's weights along its path, where Dimitrov et al. (TMLR 2022) average the two ends.
    """
    return repeat(project(geng_estimate(view), view.client.batch), view.client.batch)


def geng_estimate(view: View) -> Tensor:
    """The counts of `geng` before they are rounded, `[lane class]`."""
    h, p = dummies(view)
    s, size = seen(view), h.sum(-1).mean()
    p = softmax_along(view, s, h.expand(view.lanes, -1, -1)).mean(1) if view.client.steps > 1 else p.mean(0)
    return view.client.batch * (p - s.weight.at.sum(-1) / torch.where(size == 0, 1, size))


def _sums(view: View) -> Tensor:
    return seen(view).weight.at.sum(-1)


def _bias(view: View) -> Tensor:
    bias = seen(view).bias
    assert bias is not None
    return bias.at

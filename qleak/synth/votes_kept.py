"""What the published `save_vote` writes of a vote. NOT private: functions of the records without noise."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from qleak.synth import loop
from qleak.synth.loop import Options, State
from qleak.types import Public


def statistics(o: Options, known: Public, state: State) -> dict[str, object]:
    """How much of a vote top-k keeps, α_k = 1 − ‖v − top_k v‖/‖v‖ averaged over teachers and B images, and agreement.

    `kept` has k = d, d/2, d/4, d/8, d/16; `agreement` is the mean of |Σ sign v|/N over coordinates.
    """
    seed, device = int(state.seed), next(iter(state.maker.values())).device
    batch, _ = o.per(known.n)
    z = loop.noise(o.maker, batch, seed, -1, 0).to(device)
    wanted = one_hot(loop.labels(o, batch, known.classes, seed, 0, 0).to(device), known.classes).to(z)
    images = o.maker.apply(state.maker, z, wanted).detach()
    sent = torch.cat(list(loop.rows(o, state.teachers, images, wanted, None))).flatten(0, 1)
    agree = sent.unflatten(0, (o.count, batch)).sign().mean(0).abs().mean()
    sent = sent[sent.any(1)]  # a teacher that has nothing to say has no share either
    squares = sent.square().sort(dim=1, descending=True).values.cumsum(1)
    whole = squares[:, -1:].clamp(min=1e-30)
    d = sent.shape[1]
    sizes = [max(d >> i, 1) for i in range(5)]
    kept = {str(k): float((1 - ((whole - squares[:, k - 1 : k]).clamp(min=0) / whole).sqrt()).mean()) for k in sizes}
    return {"kept": kept, "agreement": float(agree)}

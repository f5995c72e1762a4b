"""Terms that later attacks add to the evidence: sharper priors on images, and what batch norms tell about a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from qleak import client as clients
from qleak.attacks.priors import differences
from qleak.client import View

Penalty = Callable[[View, Tensor, Tensor, int], Tensor]


def variation(view: View, x: Tensor, target: Tensor, group: int) -> Tensor:
    """mean|Δx| + mean|Δy|, without a soft corner (Geiping et al. 2020, equation 4). `[lane b c h w] -> [lane]`."""
    return sum((d.abs().flatten(1).mean(1) for d in differences(x)), x.new_zeros(len(x)))


def double_opponents(view: View, x: Tensor, target: Tensor, group: int) -> Tensor:
    """√(Δx² + Δy²), mean over pixels, of red, green, blue and their differences R−G, R−B, G−B.

    Isotropic variation of colours and opponent colours (Åström & Schnörr 2017, double-opponent
    vectorial TV); an image of one channel has no opponents. `[lane b c h w] -> [lane]`.
    """
    if x.shape[2] == 3:
        red, green, blue = x.unbind(2)
        x = torch.cat([x, torch.stack([red - green, red - blue, green - blue], 2)], 2)
    dx, dy = x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1]
    return (dx.square() + dy.square() + 1e-8).sqrt().flatten(1).mean(1)


def norm(view: View, x: Tensor, target: Tensor, group: int) -> Tensor:
    """½ mean x² (Yin et al. 2021, R_L2 with the mean in place of the norm). `[lane b c h w] -> [lane]`."""
    return 0.5 * x.square().flatten(1).mean(1)


def statistics(view: View, x: Tensor, target: Tensor, group: int) -> Tensor:
    """Σ_l ‖μ_l(x) − μ_l‖₂ + ‖σ²_l(x) − σ²_l‖₂ over batch norms, the first ten times as heavy.

    μ_l and σ²_l are those of the client's own batch where the threat model shares them
    (`View.statistics`), else the model's running ones, where its buffers are shared (DeepInversion, Yin
    et al. 2020, equation 4; in gradient inversion: Yin et al. 2021). Zero without either.
    """
    known = known_statistics(view)
    if known is None or view.model.statistics is None:
        return x.flatten(1).sum(1) * 0
    found = vmap(lambda one: view.model.statistics(view.params, view.buffers, one))(x)  # pyright: ignore[reportOptionalCall]
    total = x.new_zeros(len(x))
    for i, name in enumerate(found):
        weight = 10.0 if i < 2 else 1.0  # mean and variance of the first layer
        total = total + weight * ((found[name] - known[name]).square().sum(-1) + 1e-12).sqrt()
    return total


def known_statistics(view: View) -> dict[str, Tensor] | None:
    """What the attacker may know of the batch's statistics, by name: `[lane channel]`, or `[channel]` for running ones."""
    if view.statistics is not None:
        return view.statistics
    ends = {"running_mean": "mean", "running_var": "var"}
    split = {k: k.rpartition(".") for k in view.buffers}
    running = {f"{layer}.{ends[end]}": view.buffers[k] for k, (layer, _, end) in split.items() if end in ends}
    untold = all(float(v.abs().max()) == 0 for k, v in running.items() if k.endswith(".mean"))
    return None if not running or untold else running


def task(view: View, x: Tensor, target: Tensor, group: int) -> Tensor:
    """The client's own loss at the guess, mean cross-entropy: small for a net that fits its data (Wei et al. 2020)."""
    return vmap(lambda x, t: clients.loss(view.model, view.params, view.buffers, x, t))(x, target)


def consistency(view: View, x: Tensor, target: Tensor, group: int) -> Tensor:
    """‖x − mean of its group‖²/pixels: several starts pull towards each other (Yin et al. 2021, equation 12).

    Lanes of a group lie side by side. The mean is taken pixel by pixel, without their registration;
    slots of one label can disagree about which image they hold.
    """
    together = x.unflatten(0, (-1, group))
    mean = together.detach().mean(1, keepdim=True)
    return (together - mean).square().flatten(2).mean(2).flatten()


PENALTIES: dict[str, Penalty] = {
    f.__name__: f for f in (variation, double_opponents, norm, statistics, task, consistency)
}

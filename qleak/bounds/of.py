"""What no attacker can beat: the bounds that apply to a channel, with what each of them assumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qleak import random
from qleak.accounting import gaussian_mu
from qleak.bounds import cells as polytopes
from qleak.bounds import chord, cramer_rao, dp, rate
from qleak.bounds import jacobian as jacobians
from qleak.bounds.fisher import fisher
from qleak.bounds.information import information
from qleak.bounds.jacobian import Jacobian, update_of
from qleak.bounds.prior import Prior
from qleak.channels import Channel
from qleak.channels.channel import Leg
from qleak.check import Expected, at_least, one_of, whole
from qleak.metrics import PSNR_CAP
from qleak.types import Buffers, Client, Message, Model, Params, Tree

KINDS = ("cramer-rao", "local", "chord", "van-trees", "rate", "dp-unbiased", "dp-reconstruction")
GROUPS = 8  # parts of the draws that the jackknife leaves out, one at a time
MOST = 6500  # pixels of a batch: F and its inverse are dense
MOST_ROWS = 300_000  # numbers whose cells a walker can look at


class Setting(NamedTuple):
    """What is fixed while images and channels vary."""

    client: Client
    model: Model
    params: Params
    buffers: Buffers


class Bound(NamedTuple):
    """One bound on the reconstruction of one image (or batch), or the reason why there is none.

    Attributes:
        kind: one of `KINDS`.
        psnr: no attack is better, in dB, at most `PSNR_CAP`; ±∞ where `why` says why.
        mse: the same as a least mean squared error per pixel.
        map: least squared error pixel by pixel `[b c h w]`, where the bound has one.
        rigorous: a theorem whose assumptions are all in `assumptions`; False for an approximation.
        assumptions: in words.
        mc_error: one standard deviation of `mse` from drawing images.
        why: why there is no bound; "" where there is.
        estimate: rounding taken for Gaussian noise: what least squares reaches, and no bound at all.
    """

    kind: str
    psnr: float
    mse: float
    map: Tensor | None
    rigorous: bool
    assumptions: str
    mc_error: float = 0.0
    why: str = ""
    estimate: bool = False


def bound_of(
    setting: Setting, channel: Channel, x: Tensor, y: Tensor, prior: Prior, message: Message | None = None,
    kinds: Sequence[str] = ("cramer-rao", "local", "chord", "rate", "dp-unbiased", "dp-reconstruction"),
    jac: Jacobian | None = None, memory: float = 1e9, exact: bool = True,
) -> tuple[Bound, ...]:  # fmt: skip
    """The bounds of one update of images `x [b c h w]`, labels `y [b]` known to the attacker, one for each of `kinds`.

    Args:
        setting: client, model and weights.
        channel: what stands between; its last leg is seen.
        x: the images.
        y: their labels.
        prior: what the attacker knows of images.
        message: what was sent; codes need it.
        kinds: which bounds; "van-trees" is `average`'s.
        jac: the Jacobian at x, where it is already there (and nothing stands in front of the noise).
        memory: bytes for slices of the Jacobian.
        exact: coins by their own law; False for the Gaussian approximation of all codes.

    Raises:
        Expected: an unknown kind, or images of another shape than the prior's.
    """
    for kind in kinds:
        one_of([k for k in KINDS if k != "van-trees"], kind=kind)
    if tuple(x.shape[1:]) != tuple(prior.shape):
        raise Expected(f"Expected images of the prior's shape {tuple(prior.shape)}, got {tuple(x.shape[1:])}.")
    out = [_by_rate(channel, setting.params, prior, message, len(x), k) for k in kinds if k == "rate"]
    out += [_by_privacy(channel, setting, prior, k) for k in kinds if k.startswith("dp-")]
    if "chord" in kinds:
        out.append(_by_chords(setting, channel, x, y, prior, message, jac, memory))
    curved = [k for k in kinds if k in ("cramer-rao", "local")]
    if curved:
        out += _by_information(setting, channel, x, y, prior, message, curved, jac, memory, exact)
    return tuple(sorted(out, key=lambda b: list(kinds).index(b.kind)))


def average(
    setting: Setting, channel: Channel, prior: Prior, draws: int = 4, seed: int = 0, images: Tensor | None = None,
    memory: float = 1e9,
) -> Bound:  # fmt: skip
    """Van Trees' bound on the mean squared error of any attack, on average over images of the prior.

    Args:
        setting: client (of one image), model and weights.
        channel: what stands between; Gaussian or Laplace noise gives a theorem, codes their Gaussian approximation.
        prior: what images are drawn from, and what the attacker knows of them.
        draws: images that E F(x) is estimated from, a multiple of 8 from 8 on; labels are drawn uniformly.
        seed: of those draws.
        images: public images `[draws c h w]` in their place: E F is theirs, which is an approximation.
        memory: bytes for slices of the Jacobian.
    """
    whole(draws=draws)
    at_least(2, draws=draws)
    draws = len(images) if images is not None else draws
    if draws > GROUPS and draws % GROUPS:
        raise Expected(f"Expected draws={draws} to be a multiple of {GROUPS}, or fewer.")
    x = prior.draw(random.generator(seed, "bounds", "images"), draws) if images is None else images
    y = random.integers(random.generator(seed, "bounds", "labels"), setting.model.classes, (len(x),))
    groups: list[Tensor] = []
    kind, words = "exact", ""
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        one, at = image[None].to(next(iter(setting.params.values())).dtype), label[None]
        rows = _rows(setting, one, at)
        gen = random.generator(seed, "bounds", "channel", i)
        info = information(channel, rows, setting.params, _sent(channel, setting, rows, gen), exact=False)
        if info.why:
            return _none("van-trees", info.why)
        jac = jacobians.jacobian(*setting, one, at, info.front, memory)
        matrix, part = fisher(jac, info).matrix, i * min(GROUPS, draws) // draws
        if part == len(groups):
            groups.append(torch.zeros_like(matrix))
        groups[part] += matrix * (min(GROUPS, draws) / draws)
        kind, words = info.kind, info.assumes
    errors = cramer_rao.van_trees(groups, prior)
    whose = "public images" if images is not None else "its draws"
    said = f"{words}; x from {prior.name}, E F over {len(x)} of {whose}; the label known"
    return _bound("van-trees", errors, kind == "exact" and images is None, said, prior.shape)


def sound(bounds: Sequence[Bound]) -> Bound | None:
    """The tightest bound that is a theorem and holds for biased attacks too; None where there is none."""
    some = [b for b in bounds if b.rigorous and not b.why and b.kind not in ("cramer-rao", "dp-unbiased")]
    return min(some, key=lambda b: b.psnr) if some else None


def _by_information(
    setting: Setting, channel: Channel, x: Tensor, y: Tensor, prior: Prior, message: Message | None,
    kinds: Sequence[str], jac: Jacobian | None, memory: float, exact: bool,
) -> list[Bound]:  # fmt: skip
    if x.numel() > MOST:
        return [_none(k, f"{x.numel()} pixels are more than {MOST}") for k in kinds]
    try:
        info = information(channel, _rows(setting, x, y), setting.params, message, exact)
        if info.why:
            return [_none(k, info.why) for k in kinds]
        if jac is None or info.front is not None:
            jac = jacobians.jacobian(*setting, x, y, info.front, memory)
    except Expected as error:
        return [_none(k, str(error)) for k in kinds]
    found = fisher(jac, info)
    out = []
    for kind in kinds:
        if kind == "cramer-rao":
            errors = cramer_rao.cramer_rao(found.matrix, found.exact)
            why = "" if math.isfinite(errors.mse) else "the update does not see some directions of the image at all"
            said = f"unbiased attacks; {info.assumes}; labels known"
            bound = _bound(kind, errors, info.kind != "gaussian-approx", said, tuple(x.shape))
            out.append(bound._replace(why=why, rigorous=bound.rigorous and not why))
        else:
            wide = prior if len(x) == 1 else _batch(prior, len(x))
            errors = cramer_rao.local(found.matrix, wide, found.exact)
            said = f"the update linear around this image, which is one of {prior.name}; {info.assumes}; labels known"
            rough = info.kind == "gaussian-approx"
            out.append(_bound(kind, errors, False, said, tuple(x.shape))._replace(estimate=rough))
    return out


def _by_chords(
    setting: Setting, channel: Channel, x: Tensor, y: Tensor, prior: Prior, message: Message | None,
    jac: Jacobian | None, memory: float,
) -> Bound:  # fmt: skip
    """Half the squared distance of two walkers in the polytope of images with this very message."""
    if x.numel() > MOST:
        return _none("chord", f"{x.numel()} pixels are more than {MOST}")
    try:
        rows = _rows(setting, x, y)
        found = polytopes.cells(channel, rows, setting.params, message)
        if found.why:
            return _none("chord", found.why)
        if sum(v.numel() for v in found.at.values()) > MOST_ROWS:
            return _none("chord", f"more than {MOST_ROWS} numbers are sent")
        if jac is None or found.front is not None:
            jac = jacobians.jacobian(*setting, x, y, found.front, memory)
    except Expected as error:
        return _none("chord", str(error))
    part = polytopes.section(jac, found, x, prior if len(x) == 1 else _batch(prior, len(x)))
    if part is None:
        return _none("chord", "what travels in clear leaves nothing open")
    sweeps = chord.sweeps_for(part)
    errors = chord.errors(part, tuple(x.shape), sweeps, random.generator(0, "bounds", "walk"))
    said = (
        f"the update linear around this image, which is one of {prior.name} within [0, 1]; numbers in clear and black "
        f"or white pixels given away; two walkers after {sweeps} sweeps; labels known"
    )
    return _bound("chord", errors, False, said, tuple(x.shape))


def _batch(prior: Prior, b: int) -> Prior:
    """Independent images side by side."""
    basis = torch.block_diag(*[prior.basis] * b)
    return prior._replace(mean=prior.mean.repeat(b), values=prior.values.repeat(b), basis=basis)


def _by_rate(channel: Channel, params: Params, prior: Prior, message: Message | None, b: int, kind: str) -> Bound:
    if message is None:
        return _none(kind, "no message to count")
    bits = channel.bits(message, params)
    mse = rate.floor(prior, bits / b)
    said = f"any code of {bits:.0f} bits, on average over images of {prior.name}"
    return Bound(kind, _capped(mse), mse, None, True, said)


def _by_privacy(channel: Channel, setting: Setting, prior: Prior, kind: str) -> Bound:
    facts = channel.facts(setting.params)
    if facts.event is None:
        return _none(kind, "the channel earns no ε")
    if setting.client.unsound:
        return _none(kind, setting.client.unsound)
    # Both images could have been sent: what moves is one row replaced, twice as far as one row left out.
    times = 2.0 if _adjacency(channel, setting.params) == "add-or-remove-one" else 1.0
    mu = gaussian_mu(facts.event)
    if mu is None and times != 1:
        return _none(kind, "no closed form for this event")
    if kind == "dp-unbiased":
        two = dp.renyi(facts.event, 2.0) if mu is None else (times * mu) ** 2
        if two is None:
            return _none(kind, "no closed form for this event")
        mse = dp.unbiased(two)
        said = f"unbiased attacks, some image in [0, 1]; D₂ = {two:.3g} between any two images (Guo et al. 2022)"
        return Bound(kind, _capped(mse), mse, None, True, said)
    if mu is None:
        return _none(kind, "no Gaussian mechanism")
    psnr = dp.reached(prior, times * mu)
    said = f"not reached with probability ½ or more, x from {prior.name}; μ = {times * mu:.3g} (Hayes et al. 2023)"
    return Bound(kind, psnr, 10 ** (-psnr / 10), None, True, said)


def _adjacency(channel: Channel, params: Params) -> str:
    """What neighbouring means in front of the first noise."""
    for i, leg in enumerate(channel.legs):
        for j, stage in enumerate(leg.stages):
            if stage.kind == "value" and stage.noise:
                before = replace(channel, legs=(*channel.legs[:i], Leg(leg.join, leg.stages[:j])))
                given = before.facts(params).sensitivity
                return given.adjacency if given else ""
    return ""


def _rows(setting: Setting, x: Tensor, y: Tensor) -> Tree:
    dtype = next(iter(setting.params.values())).dtype
    return update_of(*setting, y)(x.to(dtype))


def _sent(channel: Channel, setting: Setting, rows: Tree, gen: torch.Generator) -> Message:
    lead = tuple(next(iter(rows.values())).shape[: setting.client.rows])
    noise = channel.draw(gen, setting.params, lead)
    sent, _ = channel.send(channel.knobs(), rows, noise, channel.init(setting.params), setting.params)
    return sent[-1]


def _bound(kind: str, errors: cramer_rao.Errors, rigorous: bool, said: str, shape: Sequence[int]) -> Bound:
    return Bound(kind, _capped(errors.mse), errors.mse, errors.map.reshape(*shape), rigorous, said, errors.mc_error)


def _capped(mse: float) -> float:
    return min(cramer_rao.psnr_of(mse), PSNR_CAP)


def _none(kind: str, why: str) -> Bound:
    return Bound(kind, math.inf, 0.0, None, False, "", why=why)

"""Number formats and small alphabets: what the binary form of an update's numbers says of the code they came from."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qleak.channels.floats import FORMATS, ulp

ENOUGH = 20.0  # bits of coincidence: one in a million


class Code(NamedTuple):
    """A code that explains the numbers: the text of its stage, and how well."""

    stage: str
    family: str
    certainty: str
    reasons: list[str]
    alternatives: list[str]


def signs(rows: list[Tensor]) -> Code | None:
    """±s in every tensor, and no zero: one bit."""
    if any(float(v.abs().amin()) != float(v.abs().amax()) for v in rows) or _spare(rows) < ENOUGH:
        return None
    plain = all(float(v.abs()[0]) == 1 for v in rows)
    reasons = ["every tensor holds two numbers of one magnitude" + (", 1" if plain else ", its own")]
    if plain:
        reasons.append("a fair coin for each sign would look the same")
        return Code("sign(scale='none')", "sign", "likely", reasons, ["stochastic_sign()"])
    return Code("sign()", "sign", "certain", reasons, [])


def ternary(rows: list[Tensor]) -> Code | None:
    """−s, 0, s in every tensor."""
    if any(float(v[v != 0].abs().amin()) != float(v.abs().amax()) for v in rows) or _spare(rows) < ENOUGH:
        return None
    reasons = ["every tensor holds nothing but −s, 0 and s; the clip in front cannot be seen"]
    same = ["terngrad(clip=0)", "stochastic(levels=3, range='max')", "uniform(levels=3, range='max')"]
    return Code("terngrad()", "ternary", "likely", reasons, same)


def _spare(rows: list[Tensor]) -> float:
    """Bits: coordinates beyond the one that sets each tensor's scale."""
    return float(sum(v.numel() - 1 for v in rows))


def binary(rows: list[Tensor]) -> Code | None:
    """Powers of two, a common power-of-two step, or a 16-bit float: read off the mantissas' last bits."""
    every = torch.cat([v[v != 0] for v in rows]).double()
    mantissa, exponent = torch.frexp(every.abs())
    whole = (mantissa * 2**24).long()
    last = exponent - 24 + _trailing(whole)  # the exponent of the lowest bit that is set
    fraction = -int(last.amin())
    top = float(every.abs().amax()) * 2.0**fraction
    # How many bits finer the format's own spacing is than the common step: what a coincidence would cost.
    spacing = {"float16": (exponent - 1).clamp(min=-14) - 10, "bfloat16": exponent - 8}
    finer = {k: float((-fraction - s).clamp(min=0).sum()) for k, s in spacing.items()}
    fits = {k: bool((last >= s).all()) for k, s in spacing.items()}
    fits["float16"] &= float(every.abs().amax()) <= FORMATS["e5m10"][2]
    if bool((mantissa == 0.5).all()) and every.numel() >= ENOUGH:
        shared = top <= 2 and sum(float(v[v != 0].abs().amin()) == 2.0**-fraction for v in rows) == len(rows) > 1
        if not shared:
            return _powers(rows)
    if 0 <= fraction <= 40 and top < 2**23 and finer["float16"] >= ENOUGH and finer["bfloat16"] >= ENOUGH:
        return _fixed(every, fraction, top)
    if not any(fits.values()) or every.numel() < 4:
        return None
    if all(fits.values()):  # the one whose own freedom is not used would be the coincidence
        unused = {
            "float16": finer["bfloat16"],
            "bfloat16": float((spacing["bfloat16"] - spacing["float16"]).clamp(min=0).sum()),
        }
        name = max(unused, key=lambda k: unused[k])
        sure = unused[name] >= ENOUGH and min(unused.values()) == 0
        other = "bfloat16()" if name == "float16" else "float16()"
        reasons = [f"every number is a {name}; most of what a {other[:-2]} could add is not used"]
        return Code(f"{name}()", name, "certain" if sure else "likely", reasons, [] if sure else [other])
    name = "float16" if fits["float16"] else "bfloat16"
    return Code(f"{name}()", name, "certain", [f"all {every.numel()} numbers are {name} to the last bit"], [])


def _trailing(whole: Tensor) -> Tensor:
    """Trailing zero bits of positive integers."""
    return (whole & -whole).double().log2().round().long()


def _powers(rows: list[Tensor]) -> Code:
    span = max(int(torch.frexp(v.abs().amax())[1] - torch.frexp(v[v != 0].abs().amin())[1]) + 1 for v in rows)
    bits = next((b for b in range(2, 9) if 2 ** (b - 1) - 1 >= span), 8)
    full = span == 2 ** (bits - 1) - 1
    reasons = [
        f"every number is ± a power of two; a tensor spans {span} exponents, {bits} bits have {2 ** (bits - 1) - 1}"
    ]
    more = [] if full else [f"logarithmic(bits={b})" for b in range(bits + 1, 9)]
    return Code(f"logarithmic(bits={bits})", "logarithmic", "certain" if full else "likely", reasons, more)


def _fixed(every: Tensor, fraction: int, top: float) -> Code:
    code = (every * 2.0**fraction).round()
    ends = [b for b in range(2, 25) if top in (2 ** (b - 1), 2 ** (b - 1) - 1)]
    hit = bool(ends) and int((code.abs() >= 2 ** (ends[0] - 1) - 1).sum()) > 2
    bits = ends[0] if hit else max(16, next(b for b in range(2, 25) if 2 ** (b - 1) > top))
    reasons = [f"all tensors share the step 2^-{fraction}, finer numbers would fit in float16; largest code {top:.0f}"]
    if hit:
        reasons.append(f"several numbers stand at the end of {bits} bits")
    more = [] if hit else [f"fixed_point(bits=n, fraction={fraction}) of any n that does not saturate"]
    sure = "certain" if hit and every.numel() > 100 else "likely"
    return Code(f"fixed_point(bits={bits}, fraction={fraction})", "fixed point", sure, reasons, more)


def eight(rows: list[Tensor]) -> Code | None:
    """Eight-bit floats under a scale of each tensor's own, whose largest magnitude is the largest number."""
    large = [v for v in rows if v.numel() > 1]
    if _spare(large) < 4:
        return None
    for form in ("e5m2", "e4m3"):  # e4m3 holds e5m2's mantissas
        mantissa, least, largest, _ = FORMATS[form]
        if all(_within(v, mantissa, least, largest) for v in rows):
            odd = form == "e4m3" or _spare(rows) >= 2 * ENOUGH
            reasons = [f"over its largest magnitude, every tensor holds {form} numbers only"]
            more = [] if odd else ["float8(format='e4m3', scale='max')"]
            return Code(
                f"float8(format='{form}', scale='max')", f"float8 {form}", "certain" if odd else "likely", reasons, more
            )
    return None


def _within(v: Tensor, mantissa: int, least: int, largest: float) -> bool:
    t = v.double().abs() / float(v.abs().amax()) * largest
    step = ulp(t, mantissa, least)
    return bool(((t / step - (t / step).round()).abs() <= 1e-6 * 2 ** (mantissa + 1)).all())


def codebook(rows: list[Tensor]) -> Code | None:
    """Few distinct numbers in every tensor, without a common step (which is looked for before)."""
    distinct = [int(v.unique().numel()) for v in rows]
    most = max(distinct)
    full = [d for v, d in zip(rows, distinct, strict=True) if v.numel() >= 8 * most]
    repeated = sum(v.numel() - int((v == 0).sum()) for v in rows) - sum(distinct)
    if not 2 <= most <= 256 or repeated < 3 * most or not full:
        return None
    reasons = [
        f"at most {most} distinct numbers a tensor, {sum(d == most for d in full)} of {len(full)} large ones exactly so, no step"
    ]
    fit = math.ceil(math.log2(most))
    more = ["any other codebook of as many points"] + ([f"kmeans(clusters={2**fit})"] if most != 2**fit else [])
    return Code(f"kmeans(clusters={most})", "k-means", "likely", reasons, more)

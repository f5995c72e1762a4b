"""Silence: which coordinates are zero, whether a fixed share of every tensor was kept, and by what rule."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qleak.adapters.formats import ENOUGH


class Kept(NamedTuple):
    """A selection that explains the zeros: the text of its stage, its family, how sure, why, what else, bits of evidence."""

    stage: str
    family: str
    certainty: str
    reasons: list[str]
    alternatives: list[str]
    bits: float = ENOUGH


def selection(update: dict[str, Tensor]) -> Kept | None:
    """A share of every tensor, or of all together, that was kept; None where zeros have no such law."""
    counts = [(v.numel(), int((v != 0).sum())) for v in update.values() if bool(v.any())]
    if all(n == m for n, m in counts):
        return None
    found = _share(counts)
    if found:
        text, matched, bits = found
        exact = _kept(text, counts)
        live = [v for v in update.values() if bool(v.any())]
        cut, rule = _cut([v for v, k in zip(live, exact, strict=True) if int((v != 0).sum()) == k < v.numel()])
        said = f"{matched} of {len(counts)} tensors keep exactly {text} of their coordinates"
        sure = "certain" if abs(cut - RANDOM) > 0.4 and 3 <= matched == len(counts) and bits >= ENOUGH else "likely"
        other = "random_k" if rule == "top_k" else "top_k"
        return Kept(
            f"{rule}({text})",
            rule,
            sure,
            [said, _why(cut, rule)],
            [] if sure == "certain" else [f"{other}({text})"],
            bits,
        )
    return _together(update)


RANDOM = 0.8  # log of (fifth smallest / smallest) kept magnitude: 2 without a threshold, near 0 behind one


def scattered(update: dict[str, Tensor]) -> Kept | None:
    """Most numbers of every matrix are zero, without a threshold, in rows and columns that are not: a random selection.

    Zeros of the gradient's own blur its share: the roundest that allows what was kept. Only for numbers of no code.
    """
    live = [v for v in update.values() if bool(v.any())]
    counts = [(v.numel(), int((v != 0).sum())) for v in live]
    wide = [v for v in live if v.ndim > 1 and v.numel() >= 100]
    filled = [
        float((m != 0).sum() / ((m != 0).any(0).sum() * (m != 0).any(1).sum())) for m in (v.flatten(1) for v in wide)
    ]
    cut, rule = _cut(wide)
    if len(wide) < 2 or max(filled) > 0.5 or rule != "random_k":
        return None
    ratios = [i / 100 for i in (*range(1, 10), *range(10, 100, 10))]
    ratio = next((r for r in ratios if all(m <= math.ceil(r * n) for n, m in counts)), None)
    if ratio is None:
        return None
    reasons = [f"no matrix is more than {max(filled):.0%} filled where it has numbers at all", _why(cut, rule)]
    reasons.append("the gradient's own zeros blur the share: the roundest that allows all counts")
    return Kept(f"random_k(ratio={ratio:g})", "random_k", "likely", reasons, ["random_k of a larger share"])


def _why(cut: float, rule: str) -> str:
    if rule == "top_k":
        return f"kept magnitudes begin at a threshold (the fifth smallest is {math.exp(cut):.2f} times the smallest)"
    return (
        f"kept magnitudes go down to zero (the fifth smallest is {math.exp(cut):.1f} times the smallest): no threshold"
    )


def _kept(text: str, counts: list[tuple[int, int]]) -> list[int]:
    """How many numbers of each tensor "ratio=0.1" or "k=50" keeps."""
    name, _, value = text.partition("=")
    return [min(int(value), n) if name == "k" else math.ceil(float(value) * n) for n, _ in counts]


def _cut(cut_off: list[Tensor]) -> tuple[float, str]:
    """Median over tensors of log(fifth smallest / smallest kept), and the rule it speaks for."""
    sizes = [v[v != 0].abs().double().sort().values for v in cut_off]
    for least in (40, 10, 5, 2):
        large = [s for s in sizes if s.numel() >= least]
        if large:
            at = min(4, least - 1)
            logs = torch.tensor([float((s[at] / s[0]).log()) for s in large])
            cut = float(logs.median())
            return cut, "top_k" if cut < RANDOM else "random_k"
    return 0.0, "top_k"


def _share(counts: list[tuple[int, int]]) -> tuple[str, int, float] | None:
    """("ratio=0.1" or "k=50", tensors that keep exactly that, bits); the others hold fewer numbers than that to begin with."""
    best: tuple[float, str, int] | None = None
    sizes, held = (torch.tensor(c, dtype=torch.float64) for c in zip(*counts, strict=True))
    for digits in range(1, 5):
        ratios = torch.arange(1, 10**digits, dtype=torch.float64) / 10**digits
        kept = (ratios[:, None] * sizes).ceil()
        able = (kept >= held).all(-1) & (((kept == held) & (held < sizes)).sum(-1) >= 2)
        for i in able.nonzero().reshape(-1).tolist():
            scored = _score([int(k) for k in kept[i]], counts, 3.3 * digits)
            if scored and (best is None or scored[0] > best[0]):
                best = (scored[0], f"ratio={float(ratios[i]):g}", scored[1])
    for k in {m for n, m in counts if m < n}:
        scored = _score([min(k, n) for n, _ in counts], counts, math.log2(k + 1) + 2)
        if scored and (best is None or scored[0] > best[0]):
            best = (scored[0], f"k={k}", scored[1])
    return best and (best[1], best[2], best[0])


def _score(kept: list[int], counts: list[tuple[int, int]], price: float) -> tuple[float, int] | None:
    """Bits that exact counts are worth, less the price of the number that gives them; None if a tensor keeps more."""
    if any(m > k for k, (_, m) in zip(kept, counts, strict=True)):
        return None
    hits = {(n, m) for k, (n, m) in zip(kept, counts, strict=True) if k == m and m < n}
    matched = sum(k == m for k, (_, m) in zip(kept, counts, strict=True))
    # One count sets the number; only shapes of their own say something.
    bits = sum(math.log2(n + 1) for n, _ in hits) - price
    # Fewer than kept: zeros of the gradient's own. The more of them, the weaker.
    loose = sum(1 if 2 * m > k else 1.5 for k, (_, m) in zip(kept, counts, strict=True) if m < k)
    return (bits - loose, matched) if len(hits) >= 2 and bits - loose >= 6 else None


def _together(update: dict[str, Tensor]) -> Kept | None:
    """One threshold for all tensors: every smallest kept magnitude stands just above it."""
    least = [(float(v[v != 0].abs().amin()), int((v != 0).sum())) for v in update.values() if bool(v.any())]
    some = [
        (a, m)
        for (a, m), v in zip(least, [v for v in update.values() if bool(v.any())], strict=True)
        if bool((v == 0).any()) and m >= 20
    ]
    if len(some) < 2 or max(a for a, _ in some) > 1.25 * min(a for a, _ in some):
        return None
    floor = min(a for a, _ in least)
    if floor < min(a for a, _ in some) * 0.999:
        return None
    n, m = sum(v.numel() for v in update.values()), sum(m for _, m in least)
    ratio = next(
        (f"{r:g}" for d in range(1, 8) for r in (math.floor(m / n * 10**d) / 10**d,) if r and math.ceil(r * n) == m),
        f"{(m - 0.5) / n:.9g}",
    )
    reasons = [
        f"the smallest kept magnitudes of {len(some)} tensors stand within a quarter of {floor:.3g}: one threshold for all"
    ]
    return Kept(f"top_k(ratio={ratio}, scope='global')", "top_k", "likely", reasons, [])

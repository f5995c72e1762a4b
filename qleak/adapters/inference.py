"""Which channel an update came through, from its numbers alone, and what can and cannot be told.

Told apart, in this order: what was kept (`top_k` per tensor or over all, `random_k`: exact shares, with or without a
threshold), then the code of the kept numbers (one-bit sign, powers of two, fixed point, float16, bfloat16, scaled
float8 e4m3 and e5m2, even grids per tensor, channel or bucket, ternary, QSGD, k-means codebooks), then low rank, then
exact float32 by what only an exact gradient has (`structure`).

Equivalent, that is, the same numbers come out: rounding to nearest and by a coin on one grid; fixed point of any width
that does not saturate; a low rank that the gradient has by itself, and none; any rescaling in front (clipping, means,
learning rates), which leaves no trace. Not determined: additive noise against a gradient of which no identity is known.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from qleak.adapters import formats, grids, sparsity, structure
from qleak.adapters.formats import Code
from qleak.adapters.recode import encode
from qleak.adapters.structure import Batch, batch_bounds

__all__ = ["Batch", "Verdict", "batch_bounds", "encode", "infer"]

SURE = ("certain", "likely", "not determined")


class Verdict(NamedTuple):
    """What `infer` found.

    Attributes:
        channel: a text that `qleak.catalog.build("channels", …)` takes; "chain()" for plain float32, "" for unknown.
        family: "plain", "uniform grid", "sign", "ternary", "qsgd", "logarithmic", "fixed point", "float16", "bfloat16",
            "float8 e4m3", "float8 e5m2", "k-means", "top_k", "random_k" (both possibly "+ …"), "low rank", "noise or
            plain", "nothing".
        certainty: "certain", "likely" or "not determined".
        reasons: what it rests on, one line each.
        alternatives: what would give the same numbers, or nearly.
    """

    channel: str
    family: str
    certainty: str
    reasons: list[str]
    alternatives: list[str]


def infer(update: dict[str, Tensor]) -> Verdict:
    """The channel that gives these numbers; see the module for what can be told.

    Args:
        update: what the server decoded, by parameter.
    """
    update = {k: v.detach().float() for k, v in update.items()}
    live = {k: v for k, v in update.items() if bool(v.any())}
    if not live:
        return Verdict("", "nothing", "not determined", ["every number is zero: nothing came through"], [])
    kept = sparsity.selection(update)
    # Zeros of the gradient's own (dead units, black pixels) leave its ranks as they are.
    if kept and (kept.bits >= formats.ENOUGH / 2 or not structure.exact(structure.linears(live))):
        return _with_code(kept, {k: v[v != 0] for k, v in live.items()}, live)
    code = code_of(live)
    if code:
        return Verdict(
            f"chain({code.stage})", code.family, code.certainty, code.reasons, [_chain(a) for a in code.alternatives]
        )
    return _numbers(live)


def code_of(update: dict[str, Tensor], whole: bool = True) -> Code | None:
    """The code of dense (`whole`) or of kept numbers, which have no buckets or channels that could be known."""
    rows = [v.reshape(-1) for v in update.values()]
    found = formats.signs(rows) or formats.binary(rows) or formats.ternary(rows) or grids.grid(update)
    return found or formats.eight(rows) or (grids.qsgd(update) if whole else None) or formats.codebook(rows)


def _with_code(kept: sparsity.Kept, values: dict[str, Tensor], live: dict[str, Tensor]) -> Verdict:
    """A selection and perhaps a code behind it; a code alone where the zeros are its own."""
    alone = code_of(live)
    code = code_of(values, whole=False)
    if alone and alone.family in ("ternary", "logarithmic", "fixed point", "qsgd") and kept.certainty != "certain":
        return Verdict(
            f"chain({alone.stage})", alone.family, alone.certainty, alone.reasons, [f"chain({kept.stage}, …)"]
        )
    if not code:
        reasons = [*kept.reasons, "the kept numbers show no code"]
        return Verdict(
            f"chain({kept.stage})", kept.family, kept.certainty, reasons, [_chain(a) for a in kept.alternatives]
        )
    sure = max(kept.certainty, code.certainty, key=SURE.index)
    more = [f"chain({kept.stage}, {a})" for a in code.alternatives] + [
        f"chain({a}, {code.stage})" for a in kept.alternatives
    ]
    reasons = [*kept.reasons, *code.reasons]
    return Verdict(f"chain({kept.stage}, {code.stage})", f"{kept.family} + {code.family}", sure, reasons, more)


def _numbers(live: dict[str, Tensor]) -> Verdict:
    """No code and no selection: low rank, an exact gradient, or one that noise cannot be told from."""
    found = structure.linears(live)
    rank = structure.thin(found)
    if rank:
        few = ", ".join(f"{layer.name} {layer.shape}" for layer in found if min(layer.shape) > rank)
        reasons = [f"no matrix has a rank above {rank} ({few}), which these layers' gradients would have by themselves"]
        return Verdict(f"chain(powersgd(rank={rank}))", "low rank", "likely", reasons, [])
    why = structure.exact(found)
    reasons = ["no common step, no number format, no small set of numbers, no share of zeros"]
    if why:
        more = []
        if all(not layer.convolution for layer in found):
            most = max(layer.rank for layer in found)
            more.append(f"chain(powersgd(rank={most})) or more, which would change nothing here")
        return Verdict("chain()", "plain", "certain", [*reasons, why], more)
    random = sparsity.scattered(live)
    if random:
        return Verdict(f"chain({random.stage})", random.family, random.certainty, random.reasons, random.alternatives)
    reasons.append("no layer shows an identity that noise would break: noise and an exact gradient look alike here")
    return Verdict(
        "", "noise or plain", "not determined", reasons, ["chain()", "chain(gaussian(…))", "chain(laplace(…))"]
    )


def _chain(stage: str) -> str:
    return f"chain({stage})" if stage.endswith(")") else stage

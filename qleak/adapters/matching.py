"""Whose parameter is which tensor: a captured update laid onto a model, with a table of how each one was found."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from qleak.adapters.files import Captured
from qleak.adapters.order import align
from qleak.check import Expected

PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "grad.", "gradients.")
SUFFIXES = (".grad", ".gradient")
STATISTICS = ("num_batches_tracked", "running_mean", "running_var")


class Line(NamedTuple):
    """One row of the table.

    Attributes:
        parameter: of the model; "" for what is no parameter of it.
        shape: of that parameter; () without one.
        found: the file's name; "" where the file has none.
        found_shape: as it lies in the file.
        how: "name", "name without prefix 'module.'", "name without suffix '.grad'", "name with prefix 'net.'", any of
            them followed by ", transposed" or ", HWIO to OIHW"; "order and shape", "shape alone"; "missing", "frozen" (a
            layer of which nothing came), "tied to 'name'"; "buffer", "extra".
    """

    parameter: str
    shape: tuple[int, ...]
    found: str
    found_shape: tuple[int, ...]
    how: str


class Matched(NamedTuple):
    """What `match` found.

    Attributes:
        update: the model's parameters that came, in the model's order and shapes.
        lines: the table, the model's parameters first.
        missing: parameters that did not come: an attack can use the others only.
        notes: one line each on what was decided without proof.
    """

    update: dict[str, Tensor]
    lines: list[Line]
    missing: list[str]
    notes: list[str]


def match(captured: Captured, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Matched:
    """The model's update, and how each tensor was found: by name, else by order and shape, else by shapes alone.

    Names match exactly, or up to a prefix that wrappers put in front (`module.`, `_orig_mod.`, any other if it leaves no
    choice) or the suffix `.grad`. A matrix that lies the other way round (Keras, JAX) is turned where its shape says so.

    Raises:
        Expected: shapes that do not fit, tensors of another model, or an order that leaves a choice; the first
            mismatch and how many there are.
    """
    floats = {k: v for k, v in captured.tensors.items() if v.is_floating_point()}
    shapes = {k: tuple(v.shape) for k, v in params.items()}
    notes: list[str] = []
    pairs = {} if captured.ordered else _named(list(floats), list(params), buffers)
    if captured.ordered:
        pairs = _counted(floats, shapes)
    if not pairs:
        places = align([tuple(v.shape) for v in floats.values()], list(shapes.values()), notes)
        names, targets = list(floats), list(params)
        pairs = {targets[p]: (names[f], how) for f, p, how in places}
        if pairs and not captured.ordered:
            notes.append(f"no name of the file ({few(floats)}) is the model's: matched without names")
        if not pairs and not captured.ordered:
            raise Expected(
                f"Expected names of the model's parameters ({few(params)}), got {few(floats)}: rename them, or send a list."
            )
    update, lines = {}, []
    turned, upright, wrong = [], [], []
    for name, shape in shapes.items():
        if name in pairs:
            found, how = pairs[name]
            value, turn = _fitted(floats[found], shape)
            if value is None:
                wrong.append(f"{found[:60]!r} of shape {tuple(floats[found].shape)} for {name[:60]!r} of {shape}")
                continue
            if len(shape) == 2 and shape[0] != shape[1]:
                (turned if turn else upright).append(name)
            update[name] = value
            lines.append(Line(name, shape, found, tuple(floats[found].shape), how + turn))
        else:
            lines.append(Line(name, shape, "", (), _absent(name, params, pairs)))
    used = {found for found, _ in pairs.values()}
    if wrong:
        raise Expected(
            f"Expected tensors of the model's shapes, got {wrong[0]} ({len(wrong)} of {len(pairs)} tensors do not fit): "
            "is it the same architecture?"
        )
    rest = [_leftover(k, v, captured.ordered, buffers, update) for k, v in captured.tensors.items() if k not in used]
    strangers = [line for line in rest if line.how == "extra"]
    weights = [k for k, s in shapes.items() if len(s) > 1 and k in update]
    if not update or (not weights and any(len(s) > 1 for s in shapes.values())) or len(strangers) > len(update):
        first = (
            f", the first stranger {strangers[0].found[:60]!r} of shape {strangers[0].found_shape}" if strangers else ""
        )
        raise Expected(
            f"Expected the update of a model with {len(params)} parameters ({few(params)}), matched {len(update)} "
            f"and left over {len(strangers)}{first}: is it the same architecture?"
        )
    update, lines = _squares(update, lines, shapes, turned, upright, notes)
    missing = [k for k in params if k not in update]
    return Matched(update, lines + rest, missing, notes + _remarks(lines, missing, strangers, turned, floats))


def _counted(floats: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, str]]:
    """A list with gaps (None for frozen parameters) whose places still count."""
    places = {int(k): k for k in floats if k.isdecimal()}
    names = list(shapes)
    if len(places) != len(floats) or list(places) == list(range(len(places))) or max(places, default=0) >= len(names):
        return {}
    fits = all(tuple(floats[k].shape) == shapes[names[i]] for i, k in places.items())
    return {names[i]: (k, "order and shape") for i, k in places.items()} if fits else {}


def _named(found: list[str], wanted: list[str], buffers: dict[str, Tensor]) -> dict[str, tuple[str, str]]:
    """{parameter: (name in the file, how)}; every name is used once."""
    pairs = {name: (name, "name") for name in found if name in wanted}
    left = [f for f in found if f not in pairs and f not in buffers]
    for f in left:  # wrappers' prefixes and .grad
        bare, cut, end = f, "", ""
        for suffix in SUFFIXES:
            bare, end = (bare.removesuffix(suffix), suffix) if bare.endswith(suffix) else (bare, end)
        while bare not in wanted and (prefix := next((p for p in PREFIXES if bare.startswith(p)), "")):
            bare, cut = bare.removeprefix(prefix), cut + prefix
        if bare in wanted and bare not in pairs and bare not in buffers:
            said = [f"prefix {cut!r}"] * bool(cut) + [f"suffix {end!r}"] * bool(end)
            pairs[bare] = (f, f"name without {' and '.join(said)}")
    used = {f for f, _ in pairs.values()}
    left, open_ = [f for f in left if f not in used], [w for w in wanted if w not in pairs]
    pairs |= _ends({f: [w for w in open_ if f.endswith(f".{w}")] for f in left}, "without", len)
    used = {f for f, _ in pairs.values()}
    left, open_ = [f for f in left if f not in used], [w for w in wanted if w not in pairs]
    return pairs | _ends({f: [w for w in open_ if w.endswith(f".{f}")] for f in left}, "with", lambda w: -len(w))


def _ends(fits: dict[str, list[str]], word: str, rank) -> dict[str, tuple[str, str]]:
    """Names of which one is the end of the other; the closest, and only where no two claim the same parameter."""
    best = {f: max(ws, key=rank) for f, ws in fits.items() if ws}
    claims = list(best.values())
    out = {}
    for f, w in best.items():
        if claims.count(w) == 1:
            prefix = f.removesuffix(w) if word == "without" else w.removesuffix(f)
            out[w] = (f, f"name {word} prefix {prefix!r}")
    return out


def _fitted(v: Tensor, shape: tuple[int, ...]) -> tuple[Tensor | None, str]:
    """The tensor in the model's shape and what was done to it; None where nothing fits."""
    if tuple(v.shape) == shape:
        return v, ""
    if v.ndim == 2 and tuple(v.T.shape) == shape:
        return v.T.contiguous(), ", transposed"
    if v.ndim == 4 and tuple(v.permute(3, 2, 0, 1).shape) == shape and shape[2] == shape[3]:
        return v.permute(3, 2, 0, 1).contiguous(), ", HWIO to OIHW"
    return None, ""


def _squares(
    update: dict[str, Tensor], lines: list[Line], shapes: dict[str, tuple[int, ...]],
    turned: list[str], upright: list[str], notes: list[str],
) -> tuple[dict[str, Tensor], list[Line]]:  # fmt: skip
    """Square matrices do not show which way they lie: they go with all others of the file."""
    square = [k for k, s in shapes.items() if k in update and len(s) == 2 and s[0] == s[1] > 1]
    if not turned or not square:
        return update, lines
    if upright:
        notes.append(f"{few(square)}: square, and the file's other matrices lie both ways; left as they are")
        return update, lines
    notes.append(f"{few(square)}: square, which does not show how they lie; transposed like the file's other matrices")
    update = {k: v.T.contiguous() if k in square else v for k, v in update.items()}
    return update, [
        line._replace(how=f"{line.how}, transposed") if line.parameter in square else line for line in lines
    ]


def _absent(name: str, params: dict[str, Tensor], pairs: dict[str, tuple[str, str]]) -> str:
    """Why a parameter did not come: it shares another's memory, its whole layer is frozen, or it is just not there."""
    twin = next((k for k in pairs if k in params and params[k].data_ptr() == params[name].data_ptr() != 0
                 and params[k].shape == params[name].shape), "")  # fmt: skip
    if twin:
        return f"tied to {twin!r}"
    layer = name.rpartition(".")[0]
    return "missing" if any(k.rpartition(".")[0] == layer for k in pairs) else "frozen"


def _leftover(name: str, v: Tensor, ordered: bool, buffers: dict[str, Tensor], update: dict[str, Tensor]) -> Line:
    """What is no parameter of the model: its buffers, any net's running statistics, counters, or something else."""
    ends = any(name == b or name.endswith(f".{b}") for b in buffers)
    statistic = name.rpartition(".")[2] in STATISTICS or not v.is_floating_point()
    listed = ordered and any(b.shape == v.shape for b in buffers.values())
    twin = next((k for k, u in update.items() if u.shape == v.shape and bool((u == v).all()) and bool(v.any())), "")
    how = "buffer" if ends or statistic or listed else f"tied to {twin!r}" if twin else "extra"
    return Line("", (), name, tuple(v.shape), how)


def _remarks(
    lines: list[Line], missing: list[str], strangers: list[Line], turned: list[str], floats: dict[str, Tensor]
) -> list[str]:
    """What a reader of the table should know, one line each."""
    notes = []
    if missing:
        notes.append(
            f"{len(missing)} of {len(lines)} parameters did not come ({few(missing)}): what rests on them is not used"
        )
    biases = [k for k in missing if re.search(r"bias$", k)]
    if biases:
        notes.append("without the last bias gradient the output error cannot be read off" if biases[-1] == lines[-1].parameter
                     else f"biases are missing: {few(biases)}")  # fmt: skip
    if strangers:
        notes.append(f"{len(strangers)} tensors fit no parameter and are ignored ({few([s.found for s in strangers])})")
    if turned or any("HWIO" in line.how for line in lines):
        notes.append("matrices lay the other way round: nets that put channels last also flatten in another order")
    return notes


def few(names) -> str:
    """The first three names."""
    every = [n[:40] for n in names]
    return ", ".join(every[:3]) + (f", … ({len(every)})" if len(every) > 3 else "")

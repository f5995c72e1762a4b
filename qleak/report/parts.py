"""Several audits side by side: a study that asks one question of different nets, clients or threat models.

Where no part is a training there is no accuracy to set against the leakage, and the parts, not the
channels, are what a reader compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qleak import store
from qleak.catalog import short
from qleak.report import columns, words
from qleak.report.stored import by_arm

WIDTHS = (5, 6, 7, 5, 7, 14, 5)
LAYERS = 16  # tensors whose gradient norms are listed one by one
VARIED = ("model", "data", "client", "grants", "dtype")
HEADS = ("parameters", "gradient norm", *(title.replace("\n", " ") for title in words.COLUMNS))


def apply(header: dict[str, Any]) -> bool:
    """Whether a study's parts are to be read side by side: two or more, none of them a training."""
    parts = header.get("parts") or []
    return len(parts) > 1 and all(part["kind"] == "audit" for part in parts)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The parts' summaries in one list, for the study's own: each object with its `part`, `parameters`, `gradient_norm`.

    The last two are measured on the gradient that was sent in full, and None where no channel was the identity.

    Raises:
        Expected: the study or a part is damaged.
    """
    found = []
    for part in store.read_run(folder)["parts"]:
        below = folder / part["folder"]
        summary = store.read_run(below).get("summary") if (below / "run.json").is_file() else None
        if not summary:
            continue
        count, norms = gradient(below)
        total = sum(v**2 for v in norms.values()) ** 0.5 if norms else None
        for s in summary:
            found.append({"part": part["name"], "parameters": count, "gradient_norm": total} | s)
    return found


def gradient(folder: Path) -> tuple[int | None, dict[str, float]]:
    """The number of parameters of an audit's net, and ‖g‖₂ of each of its tensors, root mean square over victims.

    Divided by the sum of step lengths where the client takes steps of its own (`Client.scale`). Empty
    where no channel was the identity, or the update is not one gradient.
    """
    from qleak.catalog import build

    header = store.read_run(folder)
    names = [fact["channel"] for fact in header.get("facts") or []]
    client = build("clients", header["plan"]["client"])
    if "fp32" not in names or client.rows:
        return None, {}
    if not any((folder / "tensors").glob("messages-*")):  # removed to save space
        return None, {}
    squares: dict[str, list[torch.Tensor]] = {}
    count = 0
    for key, value in store.read_tensors(folder, f"messages-{names.index('fp32')}").items():
        victim, kind, name = key.split("/", 2)
        if kind == "code":
            squares.setdefault(name, []).append((value.double() / client.scale).square().sum())
            count += value.numel() if victim == "0" else 0
    return count, {name: float(torch.stack(v).mean().sqrt()) for name, v in squares.items()}


def varied(headers: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What tells each part from the others, by name: "client gradient(batch=2)"."""
    plans = {name: header.get("plan") or {} for name, header in headers.items()}
    said = {name: {k: _said(k, plan.get(k)) for k in VARIED} for name, plan in plans.items()}
    differing = [k for k in VARIED if len({s[k] for s in said.values()}) > 1]
    return {name: " · ".join(f"{k} {s[k]}" for k in differing) for name, s in said.items()}


def _said(key: str, value: Any) -> str:
    if key == "grants":
        value = ("buffers",) if value is None else value  # plans leave the default out
        return ", ".join(value) or "nothing"
    return short(value) if key in ("model", "client") and value else str(value)


def arms(found: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """By channel and attack: of each part its objects by control."""
    grouped: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys(s["part"] for s in found):
        for arm, controls in by_arm({"summary": [s for s in found if s["part"] == name]}).items():
            grouped.setdefault(arm, {})[name] = controls
    return grouped


def verdict(found: Sequence[dict[str, Any]], header: dict[str, Any]) -> str:
    """One sentence: in each part the attack that rebuilt most."""
    clauses, held = [], True
    names = words.names_apart({s["attack"] for s in found})
    for name in dict.fromkeys(s["part"] for s in found):
        mine = [s for s in found if s["part"] == name and s["control"] == "none"]
        best = max(mine, key=lambda s: (s["recovered"], s["psnr_selected_max"]), default=None)
        if best is None:
            continue
        held &= not best["recovered"]
        through = f" through {best['channel']}" if len({s["channel"] for s in mine}) > 1 else ""
        clauses.append(
            f"{name}{through} {best['recovered']} of {best['images']} by {names[best['attack']]} "
            f"(best {best['psnr_selected_max']:.1f} dB)"
        )
    if not clauses:
        return f"Verdict: none yet, the study is {header.get('status', 'unfinished')}."
    proof = f", {words.NO_PROOF}" if held else ""
    return f"Verdict: images rebuilt, by part: {'; '.join(clauses)}{proof}."


def table(found: Sequence[dict[str, Any]]) -> Iterator[RenderableType]:
    """For each channel and attack a row a part, fit for 80 columns."""
    grouped = arms(found)
    names = words.names_apart({attack for _, attack in grouped})
    for i, ((channel, attack), by_part) in enumerate(grouped.items()):
        grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=i == 0, header_style="")
        grid.add_column("", width=80 - sum(WIDTHS) - 2 * len(WIDTHS), overflow="fold", vertical="bottom")
        for title, width in zip(words.COLUMNS, WIDTHS, strict=True):
            grid.add_column(title, width=width, justify="right", vertical="bottom")
        for name, controls in by_part.items():
            columns.add(grid, Text(f"  {name}"), *words.cells(controls["none"], words.floor(controls)))
        yield Text.assemble((names[attack], "bold"), f" · {channel}")
        yield grid
    yield Text("")


def details(found: Sequence[dict[str, Any]], headers: dict[str, dict[str, Any]]) -> Iterator[RenderableType]:
    """What each part is: what tells it from the others, parameters, norm of its gradient."""
    said = varied(headers)
    for name, one in {s["part"]: s for s in found}.items():
        sizes = [said.get(name, "")]
        if one.get("parameters") is not None:
            sizes += [f"{one['parameters']:,} parameters", f"gradient norm {one['gradient_norm']:.3g}"]
        yield Text(f"{name}: {' · '.join(filter(None, sizes))}")


def rows(found: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The same for a page: a title for each channel and attack, and a row of cells in the order of `HEADS` for each part."""
    tables = []
    for (channel, attack), by_part in arms(found).items():
        made = []
        for name, controls in by_part.items():
            s = controls["none"]
            cells = words.cells(s, words.floor(controls))
            cells[0] += words.interval(s.get("psnr_ci"), ".1f")
            sizes = [words.number(s.get("parameters"), ",d"), words.number(s.get("gradient_norm"), ".3g")]
            made.append({"number": None, "channel": name, "front": False, "cells": [*sizes, *cells]})
        tables.append((f"{attack} · {channel}", made))
    return tables


def norms(folders: dict[str, Path]) -> tuple[list[str], list[dict[str, Any]]] | None:
    """Gradient norms by layer: the parts' names, and a row for each tensor. None unless all have the same few tensors."""
    found = {name: gradient(folder)[1] for name, folder in folders.items()}
    names = sorted(next(iter(found.values()), {}))  # files do not keep the order of layers
    if not 0 < len(names) <= LAYERS or any(set(norms) != set(names) for norms in found.values()):
        return None
    made = [
        {"number": None, "channel": t, "front": False, "cells": [f"{norms[t]:.3g}" for norms in found.values()]}
        for t in names
    ]
    return list(found), made


def norm_table(folders: dict[str, Path]) -> Iterator[RenderableType]:
    """`norms` for the terminal."""
    if (found := norms(folders)) is None or len(found[0]) > 4:  # more columns than 80 characters hold
        return
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    grid.add_column("gradient norm of", width=24, overflow="fold")
    for name in found[0]:
        grid.add_column(name, width=12, justify="right", overflow="fold")
    for row in found[1]:
        columns.add(grid, row["channel"], *row["cells"])
    yield grid
    yield Text("")

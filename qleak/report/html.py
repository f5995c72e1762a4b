"""A run as one self-contained HTML file that opens offline."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from qleak.report import figures, words
from qleak.report.stored import Stored, by_arm, load, rgb, write_file

ENVIRONMENT = ("device", "workers", "cpu", "cores", "system", "cuda", "git", "started", "finished")


def write(folder: Path, out: Path) -> Path:
    """Renders a stored run, finished or not, and puts the file in place atomically.

    Args:
        folder: the run's folder.
        out: the HTML file.

    Returns:
        `out`.

    Raises:
        Expected: there is no run, it is damaged, or it is not an audit.
        Failed: the disk refused.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    run = load(folder)
    header = run.header
    strict: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    engine = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, **strict)
    text = engine.get_template("template.html.j2").render(
        header=header,
        recipe=header.get("recipe", "run"),
        verdict=words.verdict(header),
        grids=[grid for grid in (_grid(run), *(_grid(run, c) for c in words.CONTROLS)) if grid["lines"]],
        columns=[title.replace("\n", " ") for title in words.COLUMNS],
        channels=_table(header),
        refusals=words.refusals(header),
        curves=Markup(figures.loss_curves(run)),
        bars=Markup(figures.psnr_bars(run)),
        threats=words.threat_model(header, run.batch),
        environment=_environment(header),
        plan=json.dumps(header["plan"], indent=2, ensure_ascii=False),
        number=words.number,
    )
    return write_file(out, text.encode())


def _grid(run: Stored, control: str = "none") -> dict[str, Any]:
    """Pictures of the selected lanes: a line per image, the original first, None where an arm has no lane."""
    chosen = run.chosen(control)
    arms = list(dict.fromkeys((channel, attack) for channel, attack, _ in chosen))
    lines = []
    for image, original in run.originals.items() if arms else ():
        shown = []
        for arm in arms:
            row = chosen.get((*arm, image))
            shown.append(row and _picture(run.guess(row), " · ".join(arm), row))
        lines.append({"image": image, "label": run.labels[image], "original": _data_uri(original), "pictures": shown})
    return {"control": control, "arms": arms, "lines": lines}


def _picture(pixels: Tensor, arm: str, row: dict[str, Any]) -> dict[str, Any]:
    title = (
        f"PSNR {row['psnr']:.2f} dB · SSIM {row['ssim']:.3f} · own loss {words.number(row['loss'], '.3g')} · "
        f"seed {row['seed']} · {row['status']} after {row['closures']} closures"
    )
    psnr = f"{row['psnr']:.1f} dB"
    alt = f"Guess at image {row['image']} by {arm}: {psnr}"
    return {"uri": _data_uri(pixels), "title": title, "alt": alt, "psnr": psnr, "success": row["success"]}


def _data_uri(pixels: Tensor) -> str:
    from matplotlib.image import imsave

    png = io.BytesIO()
    imsave(png, rearrange(rgb(pixels), "c h w -> h w c").numpy(), format="png")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def _table(header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The table by channel: what it costs, and a line of cells for each attack and its controls."""
    channels: dict[str, dict[str, Any]] = {}
    for (channel, attack), found in by_arm(header).items():
        entry = channels.setdefault(channel, {"cost": words.cost(found["none"]), "lines": []})
        for control, s in found.items():
            name = attack if control == "none" else control
            cells = [*words.cells(s, words.floor(found) if control == "none" else None), f"{s['cpu_s']:.1f}"]
            entry["lines"].append({"name": name, "control": control != "none", "cells": cells})
    return channels


def _environment(header: dict[str, Any]) -> list[tuple[str, Any]]:
    known = [(name, header[name]) for name in ENVIRONMENT if header.get(name) is not None]
    return [*known, *(header.get("versions") or {}).items()]

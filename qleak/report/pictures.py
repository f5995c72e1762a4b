"""Pictures of a stored audit for its page: images × arms in small runs, channels × attackers in large ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qleak.report import words
from qleak.report.sheets import image_uri
from qleak.report.stored import Arm, Stored

SIDE = 64  # pixels of a picture in a sheet; larger ones are averaged down
WEIGHT = 4_500_000  # characters of pictures in all sheets; the first sheet is always whole


def grids(run: Stored) -> list[dict[str, Any]]:
    """One grid for the audit and one for each control, without those that have no lane."""
    return [grid for control in ("none", *words.CONTROLS) if (grid := _grid(run, control))["lines"]]


def _grid(run: Stored, control: str) -> dict[str, Any]:
    """Pictures of the selected lanes: a line per image, the original first, None where an arm has no lane."""
    chosen = {key: row for key, row in run.chosen(control).items() if run.held(row)}
    known = list(dict.fromkeys((channel, attack) for channel, attack, _ in chosen))
    spans = list(Counter(channel for channel, _ in known).items())
    arms = [arm for channel, _ in spans for arm in known if arm[0] == channel]
    names = words.names_apart({attack for _, attack in arms})
    lines = []
    for image, original in run.originals.items() if arms else ():
        shown = []
        for arm in arms:
            row = chosen.get((*arm, image))
            shown.append(row and _picture(run.guess(row), arm, row, names))
        lines.append({"image": image, "original": _original(run, image, original), "pictures": shown})
    heads = [{"name": names[a], "first": i == 0 or arms[i - 1][0] != c} for i, (c, a) in enumerate(arms)]
    return {"control": control, "about": words.CONTROLS.get(control, ""), "spans": spans, "arms": heads, "lines": lines}


def sheets(run: Stored) -> list[tuple[str, list[dict[str, Any]]]]:
    """Sheets of channels × attackers with what they show: the first victim, the others, the controls of the first.

    The first sheet is always made; the others as long as all of them together stay below `WEIGHT`.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for sheet in _sheets(run):
        first = sheet["image"] == next(iter(run.originals))
        title = f"Control {sheet['control']}" if sheet["control"] != "none" else "" if first else "Other images"
        groups.setdefault(title, []).append(sheet)
    return list(groups.items())


def _sheets(run: Stored) -> Iterator[dict[str, Any]]:
    weight = 0
    for control in ("none", *words.CONTROLS):
        chosen = {key: row for key, row in run.chosen(control).items() if run.held(row)}
        names = words.names_apart({attack for _, attack, _ in chosen})
        attacks = list(dict.fromkeys(attack for _, attack, _ in chosen))
        images = list(run.originals.items()) if control == "none" else list(run.originals.items())[:1]
        for image, original in images if attacks else ():
            lines = []
            for channel in dict.fromkeys(channel for channel, _, _ in chosen):
                found = [(attack, chosen.get((channel, attack, image))) for attack in attacks]
                shown = [row and _picture(_small(run.guess(row)), (channel, a), row, names) for a, row in found]
                lines.append({"channel": channel, "pictures": shown})
            made = sum(len(p["uri"]) for line in lines for p in line["pictures"] if p)
            if weight and weight + made > WEIGHT:
                break
            weight += made
            yield {
                "control": control, "image": image, "original": _original(run, image, _small(original)),
                "attacks": attacks, "lines": lines,
            }  # fmt: skip


def _small(pixels: Tensor) -> Tensor:
    factor = math.ceil(max(pixels.shape[-2:]) / SIDE)
    return pixels if factor == 1 else F.avg_pool2d(pixels[None], factor, ceil_mode=True)[0]


def _original(run: Stored, image: int, pixels: Tensor) -> dict[str, Any]:
    height, width = pixels.shape[-2:]
    alt = f"Original image {image}, class {run.labels[image]}"
    return {"uri": image_uri(pixels), "alt": alt, "width": width, "height": height}


def _picture(pixels: Tensor, arm: Arm, row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    title = (
        f"PSNR {row['psnr']:.2f} dB · SSIM {row['ssim']:.3f} · own loss {words.number(row['loss'], '.3g')} · "
        f"seed {row['seed']} · {row['status']} after {row['closures']} closures"
    )
    psnr, attack = f"{row['psnr']:.1f} dB", names[arm[1]]
    height, width = pixels.shape[-2:]
    alt = f"Guess at image {row['image']} by {arm[0]} · {attack}: {psnr}{', rebuilt' if row['success'] else ''}"
    return {
        "uri": image_uri(pixels), "title": title, "alt": alt, "psnr": psnr, "attack": attack, "success": row["success"],
        "width": width, "height": height,
    }  # fmt: skip

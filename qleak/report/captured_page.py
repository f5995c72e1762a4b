"""The page of a captured update's audit: pictures beside controls (and the truth), and every table."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qleak.report import captured, sheets
from qleak.report.captured import Audited
from qleak.store import Row

SHOWN = 16  # images of a batch


def context(run: Audited) -> dict[str, Any]:
    """Everything the template needs beside what all pages say."""
    header = run.header
    gone = not run.held(run.best()) and bool(run.rows)
    titles, lines = pictures(run) if run.found and not gone else ([], [])
    missing = ["The tensors of this run were removed: its pictures are left out."] if gone else []
    check = header.get("self_check") or {}
    return {
        "missing": missing, "verdict": captured.verdict(header), "title": "audit of a captured update", "titles": titles, "lines": lines,
        "rests_on": captured.rests_on(header), "known": captured.known(header), "match": header["match"]["lines"],
        "odd": bool(captured.unusual(header)), "readings": check.get("readings") or [],
        "heads": [h.replace("\n", " ") for h in captured.HEADS], "cannot": captured.CANNOT,
        "cells": [{"cells": captured.cells(r), "control": r["control"] != "none"} for r in captured.ordered(run.rows)],
        "command": header.get("flags", {}).get("command", ""),
    }  # fmt: skip


def pictures(run: Audited) -> tuple[list[str], list[list[dict[str, Any] | None]]]:
    """Column titles, and a line for each image: truth, best guess, next independent start, controls."""
    rows = captured.ordered(run.rows)
    best = rows[0]
    other = next((r for r in rows if r["control"] == "none" and r.get("agreement")), None)
    controls = [next((r for r in rows if r["control"] == c), None) for c in ("prior-only", "wrong-gradient")]
    truth, found = run.truth(), run.found or {}
    titles = ["truth"] if truth is not None else []
    titles += ["best guess", "another start", "prior-only", "decoy's guess"]
    sources = [(r, _ordered(run.guess(r), r)) if r and run.held(r) else (None, None) for r in (best, other, *controls)]
    lines = []
    for j in range(min(found["images"], SHOWN)):
        line: list[dict[str, Any] | None] = []
        if truth is not None:
            line.append({"uri": _uri(truth[j]), "alt": f"True image {j}", "note": "truth", "hit": False, "truth": True})
        for row, x in sources:
            line.append(row and _picture(x, row, j, hit=row is best and found["good"][j]))  # pyright: ignore[reportArgumentType]
        lines.append(line)
    return titles, lines


def _ordered(x: Tensor, row: Row) -> Tensor:
    return x[row["order"]] if row.get("order") is not None else x


def _picture(x: Tensor, row: Row, j: int, hit: bool) -> dict[str, Any]:
    scored = f"{row['psnr'][j]:.1f} dB" if row.get("psnr") else f"residual {captured.ratio(row['residual'])}"
    alt = f"Guess at image {j} by {row['attack'].split('(')[0]}, {row['control']}: {scored}"
    height, width = x.shape[-2:]
    return {
        "uri": _uri(x[j]), "alt": alt, "title": f"own residual {captured.ratio(row['residual'])}", "hit": hit, "truth": False,
        "note": scored + (" ✓ rebuilt" if hit else ""), "width": width, "height": height,
    }  # fmt: skip


def _uri(pixels: Tensor) -> str:
    return sheets.image_uri(pixels.float().clamp(0, 1))

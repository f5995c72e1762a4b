"""Reconstructions emerging: the stored iterates of a run as strips of pictures, where iterates were stored."""

from __future__ import annotations

from typing import Any

from qleak.report import film, words
from qleak.report.sheets import image_uri
from qleak.report.stored import Stored, rgb

FRAMES = 10  # pictures of a strip
STRIPS = 24  # strips of a page


def strips(run: Stored) -> list[dict[str, Any]]:
    """A strip for each channel × attack that has a film, of its first image: title, original, frames; at most `STRIPS`."""
    if not run.originals:
        return []
    found: dict[tuple[str, str], film.Film] = {}
    for (channel, attack, _), shown in film.films(run).items():
        found.setdefault((channel, attack), shown)
    return [_strip(run, arm, found[arm]) for arm in run.arms() if arm in found][:STRIPS]


def _strip(run: Stored, arm: tuple[str, str], shown: film.Film) -> dict[str, Any]:
    name, count = " · ".join(arm), len(shown.at)
    kept = sorted({round(i * (count - 1) / max(min(count, FRAMES) - 1, 1)) for i in range(min(count, FRAMES))})
    frames = []
    for i in kept:
        at, psnr = int(shown.at[i]), f"{float(shown.psnr[i]):.1f} dB"
        loss = words.number(float(shown.loss[i]), ".3g")
        alt = f"{name} after {at} closures: PSNR {psnr}, own loss {loss}"
        frames.append(
            {"uri": image_uri(rgb(shown.x[i]).float().clamp(0, 1)), "alt": alt, "at": f"{at:,}", "psnr": psnr}
        )
    original = {"uri": image_uri(run.originals[shown.image]), "alt": f"Original image {shown.image}"}
    return {"title": name, "frames": frames, "original": original}

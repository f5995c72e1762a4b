"""Films: how the guess of a channel × attack came about, from the frames that a run has kept (`film-…`), as a GIF."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qleak import folders, store
from qleak.errors import Expected
from qleak.metrics import psnr
from qleak.report.stored import Arm, Stored, load, rgb, write_file

INK, FAINT, PAPER, LINE = (28, 30, 36), (110, 115, 125), (255, 255, 255), (226, 229, 235)
TICKS, HOLD = 32, 2500
"""Pictures of a GIF, and milliseconds that the last one stays."""
MOST = 5
"""Channels × attacks in one GIF, the ones that get furthest."""


class Film(NamedTuple):
    """Frames `[frame c h w]` in [0, 1] of the selected guess at `image`, after `at [frame]` closures.

    `psnr [frame]` is measured against the original, which the attacker does not have; `loss [frame]` is his own.
    """

    image: int
    x: Tensor
    at: Tensor
    psnr: Tensor
    loss: Tensor


def films(run: Stored) -> dict[tuple[str, str, int], Film]:
    """The film of every selected guess that has one, by (channel, attack, image)."""
    found: dict[tuple[str, str, int], Film] = {}
    held: dict[str, dict[str, Tensor]] = {}
    for key, row in run.chosen().items():
        chunk = row["chunk"]
        if chunk not in held:
            there = folders.held(run.folder, f"film-{chunk}")
            held[chunk] = store.read_tensors(run.folder, f"film-{chunk}") if there else {}
        film = held[chunk]
        if not film or row["lane"] not in film["lane"].tolist():
            continue
        lane = film["lane"].tolist().index(row["lane"])
        x, truth = film["x"][lane, :, row["order"]], run.originals[row["image"]]
        rated = torch.stack([psnr(f[None], truth[None])[0] for f in x])
        found[key] = Film(row["image"], x, film["at"], rated, film["loss"][lane])
    return found


def chosen(found: dict[tuple[str, str, int], Film], image: int | None = None, most: int = MOST) -> dict[Arm, Film]:
    """The films of one image (the first that has some) for one GIF: at most `most` arms, the best, in the run's order.

    Raises:
        Expected: there are no films of it.
    """
    if not found:
        raise Expected("Expected a run with films: the same command with --film 24 adds them.")
    there = list(dict.fromkeys(i for _, _, i in found))
    image = there[0] if image is None else image
    mine = {(c, a): film for (c, a, i), film in found.items() if i == image}
    if not mine:
        raise Expected(f"Expected films of image {image}: there are films of {', '.join(map(str, there))}.")
    best = sorted(mine, key=lambda arm: -float(mine[arm].psnr[-1]))[:most]
    return {arm: film for arm, film in mine.items() if arm in best}


def clock(last: int, ticks: int = TICKS) -> list[int]:
    """Closures shown one after another: 0, then log-spaced up to `last`."""
    return sorted({0, *(round(last ** (i / (ticks - 2))) for i in range(ticks - 1))}) if last > 1 else [0, last]


def gif(folder: Path, target: Path, image: int | None = None, side: int = 128) -> Path:
    """Writes the films of one image side by side with the original; the clock counts closures, log-spaced.

    Args:
        folder: a run with films.
        target: the GIF.
        image: which image; the first that has films by default.
        side: pixels of a picture's width, about.

    Raises:
        Expected: no audit, no films, or no such image.
        Failed: the disk refused.
    """
    run = load(folder)
    shown = chosen(films(run), image)
    original = run.originals[next(iter(shown.values())).image]
    last = max(int(f.at[-1]) for f in shown.values())
    pages = [_page(original, shown, at, last, side) for at in clock(last)]
    return write_file(target, animated(pages))


def animated(pages: Sequence[Image.Image], each: int = 110, hold: int = HOLD, colours: int = 256) -> bytes:
    """A GIF that loops; `each` milliseconds a page, the last one for `hold`.

    One palette for all, of the last page above all: what stands still is the same on every page and written once.
    """
    data = io.BytesIO()
    sample = [*pages[:: max(1, len(pages) // 6)], *[pages[-1]] * 6]
    montage = Image.new("RGB", (pages[0].width, pages[0].height * len(sample)))
    for i, page in enumerate(sample):
        montage.paste(page, (0, i * page.height))
    palette = montage.quantize(colours, Image.Quantize.MEDIANCUT)
    flat = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pages]
    times = [6 * each, *[each] * (len(flat) - 2), hold] if len(flat) > 1 else [hold]
    flat[0].save(data, "GIF", save_all=True, append_images=flat[1:], duration=times, loop=0, optimize=True, disposal=1)
    return data.getvalue()


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface that matplotlib ships, so that pictures are the same everywhere."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def large(pixels: Tensor, side: int) -> Image.Image:
    """An image `[c h w]` in [0, 1], its pixels repeated up to about `side` of width; larger ones are averaged down."""
    small = Image.fromarray(rgb(pixels).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    wide, high = small.size
    if wide > side:
        return small.resize((side, round(high * side / wide)), Image.Resampling.BOX)
    scale = max(1, side // wide)
    return small.resize((wide * scale, high * scale), Image.Resampling.NEAREST)


def _page(original: Tensor, shown: dict[Arm, Film], now: int, last: int, side: int) -> Image.Image:
    """Original, guesses with their PSNR, and the clock."""
    pad, head, foot = 16, 42, 64
    pictures = [large(original, side)]
    captions: list[tuple[str, str, str, bool]] = [("original", "never sent", "", False)]
    for (channel, attack), film in shown.items():
        at = int((film.at <= now).nonzero()[-1])
        over = now >= int(film.at[-1])
        pictures.append(large(film.x[at], side))
        captions.append((channel, attack.split("(")[0], f"{float(film.psnr[at]):.1f} dB", over))
    wide, high = pictures[0].size
    page = Image.new("RGB", (pad + len(pictures) * (wide + pad), head + high + foot), PAPER)
    pen = ImageDraw.Draw(page)
    for i, (image, (top, below, number, over)) in enumerate(zip(pictures, captions, strict=True)):
        x = pad + i * (wide + pad)
        pen.text((x, 6), cut(top, wide, font(12, True)), INK, font(12, True))
        pen.text((x, 22), cut(below, wide, font(12)), FAINT, font(12))
        page.paste(image, (x, head))
        pen.text((x, head + high + 6), number, INK, font(14, over))
    bar(page, (pad, head + high + 36, page.width - pad), now, last)
    return page


def bar(page: Image.Image, where: tuple[int, int, int], now: int, last: int) -> None:
    """The clock: a bar from left to right at height y, (left, y, right), as long as log(closures)."""
    pen = ImageDraw.Draw(page)
    left, y, right = where
    share = math.log1p(now) / math.log1p(max(last, 1))
    pen.rectangle((left, y, right, y + 3), LINE)
    pen.rectangle((left, y, left + round(share * (right - left)), y + 3), INK)
    pen.text((left, y + 8), f"{now:,} closure{'' if now == 1 else 's'}", FAINT, font(12))


def cut(text: str, wide: int, face: ImageFont.FreeTypeFont) -> str:
    """The text, with an ellipsis where it is wider than `wide` pixels."""
    if face.getlength(text) <= wide:
        return text
    while text and face.getlength(text + "…") > wide:
        text = text[:-1]
    return text + "…"

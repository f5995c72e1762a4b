"""Makes `assets/demo.gif`: a photograph emerging from its 8-bit gradient, real iterates on a clock. `just demo`.

Setting of the recipe `untrained_int8`: the untrained colour LeNet, 8 bits a coordinate, the attack `cells` from a dark
random start. The run is kept under runs/demo and resumed; a minute or two on one core.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from qleak import engine, looks, store
from qleak.attacks import cells
from qleak.channels import chain, uniform
from qleak.models import lenet
from qleak.plans import Audit
from qleak.report.film import Film, animated, films, font, large
from qleak.report.stored import load
from qleak.types import Tree

RUN, TARGET = Path("runs/demo"), Path("assets/demo.gif")
PLAN = Audit(lenet(), "photos", (0,), (chain(uniform(bits=8)),), (cells(),), restarts=4)
FRAMES, PAGES = 72, 64
SIDE, WIDE, HIGH = 224, 832, 420
PAPER, INK, FAINT, LINE, GLOW = (13, 17, 23), (230, 237, 243), (139, 148, 158), (48, 54, 61), (255, 166, 87)
WARM = (38, 30, 27)
COLUMNS = (32, 304, 576)
TOP, PLOT = 62, (32, 336, 800, 394)  # top of the pictures; left, top, right, bottom of the curve


def main() -> None:
    """Runs what is missing, draws the pages, writes the GIF."""
    header = {"kind": PLAN.kind, "plan_id": PLAN.id, "recipe": "demo", "plan": PLAN.as_json(), "flags": {}}
    with store.open_run(RUN, header) as run:
        for _ in engine.run(PLAN, run, look=looks.asked(film=FRAMES)):
            pass
    read = load(RUN)
    (film,) = films(read).values()
    message = engine.prepare(PLAN).messages[0][0]
    numbers = sum(v.numel() for v in message.code.values())
    still = backdrop(large(read.originals[film.image], SIDE), codes(message.code), numbers)
    last = int(film.at[-1])
    ticks = sorted({0, *(round((last + 1) ** (i / (PAGES - 1))) - 1 for i in range(PAGES))})
    TARGET.write_bytes(animated([page(still, film, at, last) for at in ticks], each=90, hold=3200))
    TARGET.chmod(0o644)
    print(f"{TARGET}: {len(ticks)} pages, {TARGET.stat().st_size / 1e6:.2f} MB, {float(film.psnr[-1]):.1f} dB")


def codes(code: Tree) -> Image.Image:
    """What was sent: codes of the convolutions one a pixel, dark at their tensor's median, a side of it a colour."""
    side = SIDE // 4
    kernels = [v.flatten().float() for v in code.values() if v.ndim == 4]
    shown = torch.cat([v - v.median() for v in kernels])[: side * side] / 127
    level = shown.abs().clamp(max=1).pow(0.6)[:, None]
    plus, minus, dark = (torch.tensor(c) / 255 for c in ((255, 166, 87), (88, 166, 255), (22, 27, 34)))
    colour = torch.where(shown[:, None] > 0, plus, minus)
    pixels = (dark + level * (colour - dark)).unflatten(0, (side, side))
    small = Image.fromarray(pixels.mul(255).round().to(torch.uint8).numpy())
    return small.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def backdrop(original: Image.Image, sent: Image.Image, numbers: int) -> Image.Image:
    """Everything that stands still."""
    image = Image.new("RGB", (WIDE, HIGH), PAPER)
    pen = ImageDraw.Draw(image)
    titles = ("a photograph", "its gradient, 8 bits a number", "rebuilt from the gradient")
    below = ("stays with the client", f"{numbers:,} numbers are sent", "")
    for x, title, text in zip(COLUMNS, titles, below, strict=True):
        pen.text((x, 30), title, INK, font(15, True))
        pen.text((x, TOP + SIDE + 10), text, FAINT, font(14))
    for x, picture in zip(COLUMNS, (original, sent), strict=False):
        image.paste(picture, (x, TOP))
    for x in COLUMNS[1:]:
        arrow(pen, x - 36, TOP + SIDE // 2)
    return image


def arrow(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    """A small arrow to the right."""
    pen.line((x, y, x + 20, y), FAINT, 2)
    pen.polygon([(x + 24, y), (x + 16, y - 5), (x + 16, y + 5)], FAINT)


def page(still: Image.Image, film: Film, now: int, last: int) -> Image.Image:
    """The guess after `now` closures, its PSNR, and the way there."""
    image = still.copy()
    pen = ImageDraw.Draw(image)
    at = int((film.at <= now).nonzero()[-1])
    image.paste(large(film.x[at], SIDE), (COLUMNS[2], TOP))
    psnr = f"{float(film.psnr[at]):.1f} dB"
    pen.text((COLUMNS[2], TOP + SIDE + 8), psnr, GLOW, font(17, True))
    pen.text(
        (COLUMNS[2] + SIDE, TOP + SIDE + 10), f"{now:,} closure{'' if now == 1 else 's'}", FAINT, font(14), anchor="ra"
    )
    curve(image, film, at, now, last)
    return image


def curve(image: Image.Image, film: Film, at: int, now: int, last: int) -> None:
    """PSNR over closures (log) so far; drawn four times as large and averaged down, so that it is smooth."""
    fine, (left, top, right, bottom) = 4, PLOT
    strip = Image.new("RGB", (WIDE * fine, (HIGH - top + 8) * fine), PAPER)
    pen = ImageDraw.Draw(strip)
    low, high = 5.0, math.ceil(float(film.psnr.max()))
    place = lambda n, v: (  # noqa: E731
        fine * (left + (right - left) * math.log1p(n) / math.log1p(last)),
        fine * (bottom - top + 8 - (bottom - top) * (min(max(v, low), high) - low) / (high - low)),
    )
    points = [place(int(n), float(v)) for n, v in zip(film.at[: at + 1], film.psnr[: at + 1], strict=True)]
    points.append(place(now, float(film.psnr[at])))
    foot = fine * (bottom - top + 8)
    pen.polygon([(points[0][0], foot), *points, (points[-1][0], foot)], WARM)
    pen.line((fine * left, foot, fine * right, foot), LINE, fine)
    pen.line(points, GLOW, 2 * fine, "curve")
    x, y = points[-1]
    pen.ellipse((x - 5 * fine, y - 5 * fine, x + 5 * fine, y + 5 * fine), GLOW)
    image.paste(strip.resize((WIDE, HIGH - top + 8), Image.Resampling.LANCZOS), (0, top - 8))


if __name__ == "__main__":
    main()

"""A run in the terminal: pictures as half-blocks, the table, one verdict, the next command."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch.nn.functional as F
from einops import rearrange
from rich.color import Color
from rich.console import Console, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from qleak.report import bounds, captured, columns, sheets, study, synthesis, training, words
from qleak.report.stored import Stored, by_arm, load, rgb
from qleak.store import Row, read_run

WIDTHS = (5, 6, 7, 5, 7, 14, 5)
SHOWN = 4
SMALL = 16
COLOURLESS = Text("Pictures need a terminal with colours; report.html has them.\n")
REMOVED = Text("The tensors of this run were removed: there are no pictures.\n")


def show(folder: Path, quiet: bool = False, verbose: bool = False, console: Console | None = None) -> None:
    """Prints a stored run, fit for 80 columns, for no colour, and for a pipe.

    Args:
        folder: the run's folder.
        quiet: only the verdict.
        verbose: control arms as rows of their own.
        console: where to print; standard output by default.

    Raises:
        Expected: there is no run, it is damaged, or of a kind that has no report.
    """
    # Of NO_COLOR rich leaves out colours alone; no escape at all is what those ask for who set it.
    console = console or Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")
    kind = read_run(folder).get("kind")
    if kind == "training":
        trained = training.load(folder)
        parts, verdict = [] if quiet else training.table(trained), training.verdict(trained.header)
        command, why = training.next_step(trained.header, folder)
    elif kind == "synthesis":
        made = synthesis.load(folder)
        parts = [] if quiet else [*samples(made, console), *synthesis.table(made)]
        verdict, (command, why) = synthesis.verdict(made.header), synthesis.next_step(made.header, folder)
    elif kind == "captured":
        audited = captured.load(folder)
        parts = [] if quiet else [*guessed(audited, console), *captured.table(audited, verbose)]
        verdict, (command, why) = captured.verdict(audited.header), captured.next_step(audited.header, folder)
    elif kind == "study":
        joined = study.load(folder)
        parts, verdict = [] if quiet else study.table(joined), study.verdict(joined)
        command, why = study.next_step(joined)
    else:
        run = load(folder)
        parts, verdict = [] if quiet else [*pictures(run, console), *table(run, verbose)], words.verdict(run.header)
        command, why = words.next_step(run.header, folder)
    for part in parts:
        console.print(part)
    console.print(Text(verdict, style="bold"))
    if not quiet:
        console.print(Text(f"Next ({why}):\n  {command}"))


def pictures(run: Stored, console: Console) -> Iterator[RenderableType]:
    """Originals beside the selected reconstruction of every arm, wrapped to the width; no colour, no pictures."""
    arms, chosen = run.arms(), run.chosen()
    images = list(run.originals)[:SHOWN]
    if not run.rows:
        return
    if not images or not any(map(run.held, chosen.values())):
        yield REMOVED
        return
    if plain(console):
        yield COLOURLESS
        return
    wide = run.originals[images[0]].shape[-1]
    whole = (len(arms) + 1) * (wide + 2) <= console.width + 1
    side = wide if whole else math.ceil(wide / math.ceil(wide / SMALL))
    per = max(1, (console.width + 1) // (side + 2) - 1)  # arms beside the original, one space between columns
    for start in range(0, len(arms), per):
        part = arms[start : start + per]
        grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for title in (("original",), *part):
            title = "\n".join(columns.folded(name, side + 1) for name in title)
            grid.add_column(Text(title), width=side + 1, overflow="fold", vertical="bottom")
        for image in images:
            line = [blocks(run.originals[image], side) + Text(f"\nimage {image}\n")]
            for arm in part:
                row = chosen.get((*arm, image))
                line.append(blocks(run.guess(row), side) + _caption(row) if row and run.held(row) else Text("—"))
            grid.add_row(*line)
        yield grid
    if len(run.originals) > len(images):
        yield Text(f"… and {len(run.originals) - len(images)} more images in report.html\n")


def plain(console: Console) -> bool:
    """Whether the console has too few colours for pictures: a pipe, NO_COLOR, a dumb or an old terminal."""
    return console.no_color or console.color_system not in ("256", "truecolor")


def samples(run: synthesis.Made, console: Console) -> Iterator[RenderableType]:
    """One synthetic image of every class for each arm, as wide as the console; no colour, no pictures."""
    sheet_of = {arm: found for arm in run.arms if (found := run.sheet(arm)) is not None}
    if not sheet_of:
        if run.header.get("summary"):
            yield REMOVED
        return
    if plain(console):
        yield COLOURLESS
        return
    for arm, shown in sheet_of.items():
        first = rearrange(shown[1], "(k each) c h w -> k each c h w", k=run.classes)[:, 0]
        height, wide = first.shape[-2:]
        side = math.ceil(wide / math.ceil(wide / SMALL))
        small = F.adaptive_avg_pool2d(first.float(), (round(height * side / wide), side))
        most = max(1, (console.width + sheets.GAP) // (side + sheets.GAP))
        per = math.ceil(run.classes / math.ceil(run.classes / most))  # lines of one length
        yield Text(f"{arm} · seed {shown[0]} · one image of each class", style="bold")
        for start in range(0, len(small), per):
            line = sheets.tiled(small[None, start : start + per])
            yield blocks(line, line.shape[-1])
        yield Text("")


def guessed(run: captured.Audited, console: Console) -> Iterator[RenderableType]:
    """The best guess of a captured update, the truth beneath it where it was given; no colour, no pictures."""
    if run.found is None:
        return
    if not run.held(run.best()):
        yield REMOVED
        return
    if plain(console):
        yield COLOURLESS
        return
    for title, x in (("best guess", run.images()), ("truth", run.truth())):
        if x is not None:
            side = math.ceil(x.shape[-1] / math.ceil(x.shape[-1] / 2 / SMALL))
            most = max(1, (console.width + sheets.GAP) // (side + sheets.GAP))
            small = F.adaptive_avg_pool2d(x[:most].float(), (round(x.shape[-2] * side / x.shape[-1]), side))
            yield Text(title, style="bold")
            line = sheets.tiled(small[None])
            yield blocks(line, line.shape[-1])
    yield Text("")


def blocks(pixels: Tensor, side: int) -> Text:
    """An image `[c h w]` in [0, 1], averaged down to at most `side` columns; each half-block holds two pixels."""
    height, width = pixels.shape[-2:]
    factor = math.ceil(width / side)
    size = (2 * math.ceil(height / factor / 2), math.ceil(width / factor))
    small = F.adaptive_avg_pool2d(rgb(pixels), size).mul(255).round().int()
    lines = []
    for line in rearrange(small, "c (h half) w -> h w half c", half=2).tolist():
        styles = (Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)) for upper, lower in line)
        lines.append(Text.assemble(*(("▀", style) for style in styles)))
    return Text("\n").join(lines)


def _caption(row: Row) -> Text:
    return Text(f"\n{row['psnr']:.1f} dB{' ✓' if row['success'] else ''}\n", style="bold" if row["success"] else "")


def table(run: Stored, verbose: bool = False) -> Iterator[RenderableType]:
    """Channels with what they send, their attacks beneath; then what was not run, and why."""
    arms = by_arm(run.header)
    names = words.names_apart({attack for _, attack in arms})
    for i, channel in enumerate(dict.fromkeys(c for c, _ in arms)):
        mine = {attack: found for (c, attack), found in arms.items() if c == channel}
        grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=i == 0, header_style="")
        grid.add_column("", width=80 - sum(WIDTHS) - 2 * len(WIDTHS), overflow="fold", vertical="bottom")
        for title, width in zip(words.COLUMNS, WIDTHS, strict=True):
            grid.add_column(title, width=width, justify="right", vertical="bottom")
        for attack, found in mine.items():
            columns.add(grid, Text(f"  {names[attack]}"), *words.cells(found["none"], words.floor(found)))
            for control, s in found.items():
                if verbose and control != "none":
                    columns.add(grid, Text(f"   {control}"), *words.cells(s, None), style="dim")
        heading = Text.assemble((channel, "bold"), f" · {words.cost(next(iter(mine.values()))['none'])}")
        yield heading
        yield grid
    for line in (*words.refusals(run.header), *bounds.lines(run.header)):
        yield Text(line)
    yield Text("")

"""`--watch`: guesses emerging in the terminal, a picture of half-blocks for every channel × attack, drawn in place.

Pictures come with the engine's events (`Step.picture`). They are drawn as escape codes at once: a style object for
every pixel would cost more than the attack.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress import Progress
from rich.segment import ControlType, Segment

if TYPE_CHECKING:
    from qleak.engine import Event
    from qleak.engine.events import Step
    from qleak.looks import Looks
    from qleak.plans import Plan
    from qleak.store import Run

EVERY = 0.25
"""Seconds between two pictures, of a job as on the screen."""
SHARE = 50
"""The screen rests at least SHARE times as long as it was drawn: 2 % of one core at most."""
GAP, CAPTION, NARROW = 2, 3, 14
RAMP = " .:-=+*#%@"
RAW = [(ControlType.BELL,)]
"""Marks a segment as escape codes, which have no width; the code itself is never sent."""


class Panel(NamedTuple):
    """What is known of one channel × attack: `pixels` uint8 `[h w 3]`, a guess at `image`, with its own loss."""

    label: str
    pixels: np.ndarray
    image: int
    loss: float
    closures: int
    seen: int


class Mosaic:
    """The panels of a run, as large as the terminal allows; the latest ones where not all of them fit."""

    def __init__(self, colours: str) -> None:
        self.colours = colours
        self.panels: dict[str, Panel] = {}
        self.drawn: dict[str, tuple[Any, list[str]]] = {}
        self.count = 0

    def add(self, event: Step) -> None:
        """Takes a picture in; of several chunks of an arm the one of lowest own loss stays, until it moves on itself."""
        arm, held = event.key.split("-lanes-")[0], self.panels.get(event.key.split("-lanes-")[0])
        loss = math.inf if event.loss is None else event.loss
        if held is not None and held.image != event.image and held.loss <= loss:
            return
        self.count += 1
        self.panels[arm] = Panel(event.label, event.picture, event.image, loss, event.closures, self.count)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Rows of panels."""
        if not self.panels:
            return
        columns, rows, factor = fit(
            [p.pixels.shape[:2] for p in self.panels.values()], options.max_width, console.size.height - 2
        )
        latest = sorted(self.panels, key=lambda arm: self.panels[arm].seen)[-columns * rows :]
        shown = [arm for arm in self.panels if arm in latest]
        for start in range(0, len(shown), columns):
            parts = [self._panel(arm, factor) for arm in shown[start : start + columns]]
            for lines in zip(*(_level(part, max(map(len, parts))) for part in parts), strict=True):
                yield Segment((" " * GAP).join(lines), None, RAW)
                yield Segment.line()

    def _panel(self, arm: str, factor: int) -> list[str]:
        panel = self.panels[arm]
        key = (panel.seen, factor)
        if self.drawn.get(arm, (None, []))[0] != key:
            small = shrunk(panel.pixels, factor)
            wide = max(small.shape[1], NARROW)
            pad = " " * (wide - small.shape[1])
            lines = [line + pad for line in blocks(small, self.colours)]
            first, second = split(panel.label, wide)
            lines += [set_cell_size(t, wide) for t in (first, second, numbers(panel, wide))]
            self.drawn[arm] = (key, lines)
        return self.drawn[arm][1]


def numbers(panel: Panel, wide: int) -> str:
    """The longest of three ways to say image, own loss and closures that fits."""
    loss = f"{panel.loss:.0e}" if math.isfinite(panel.loss) else "–"
    ways = (
        f"image {panel.image} · loss {loss} at {panel.closures}",
        f"loss {loss} at {panel.closures}",
        f"{loss} @{panel.closures}",
    )
    return next((t for t in ways if len(t) <= wide), ways[-1])


def _level(part: list[str], height: int) -> list[str]:
    """Lines of a panel, filled up to `height` under its picture."""
    return part + [" " * cell_len(part[-1])] * (height - len(part))


def split(label: str, wide: int) -> tuple[str, str]:
    """A label on two lines: channel and attack, each cut with an ellipsis where it is too long."""
    channel, _, attack = label.rpartition(" ")
    cut = lambda t: t if len(t) <= wide else t[: wide - 1] + "…"  # noqa: E731
    return cut(channel), cut(attack)


def fit(sizes: list[tuple[int, int]], width: int, height: int) -> tuple[int, int, int]:
    """(columns, rows, factor): pictures of the given (h, w) averaged down by the least `factor` at which all fit."""
    columns = rows = factor = 1
    high, wide = max(h for h, _ in sizes), max(w for _, w in sizes)
    for factor in range(1, 9):
        each = max(math.ceil(wide / factor), NARROW)
        columns = max(1, (width + GAP) // (each + GAP))
        rows = max(1, height // (math.ceil(math.ceil(high / factor) / 2) + CAPTION))
        if (
            each <= width
            and math.ceil(math.ceil(high / factor) / 2) + CAPTION <= height
            and len(sizes) <= columns * rows
        ):
            break
        if math.ceil(wide / (factor + 1)) < NARROW and each <= width:  # smaller ones show nothing
            break
    return columns, rows, factor


def shrunk(pixels: np.ndarray, factor: int) -> np.ndarray:
    """uint8 `[h w 3]` averaged down by `factor`; edges repeat what is missing, and an even number of rows comes out."""
    h, w, _ = pixels.shape
    high = math.ceil(h / factor / 2) * 2
    padded = np.pad(pixels, ((0, high * factor - h), (0, -w % factor), (0, 0)), mode="edge").astype(np.float32)
    return padded.reshape(high, factor, -1, factor, 3).mean((1, 3)).round().astype(np.uint8)


def blocks(pixels: np.ndarray, colours: str) -> list[str]:
    """Lines of half-blocks, two pixels a cell, as escape codes for "truecolor" or "256"; else characters by brightness."""
    upper, lower = pixels[0::2], pixels[1::2]
    if colours not in ("truecolor", "256"):
        grey = (upper.astype(np.float32) + lower) @ np.array([0.299, 0.587, 0.114], np.float32) / 510
        return ["".join(RAMP[i] for i in line) for line in (grey * (len(RAMP) - 1)).round().astype(int).tolist()]
    if colours == "256":
        code = lambda c: f"5;{c}"  # noqa: E731
        pairs: Any = zip(indexed(upper).tolist(), indexed(lower).tolist(), strict=True)
    else:
        code = lambda c: f"2;{c[0]};{c[1]};{c[2]}"  # noqa: E731
        pairs = zip(upper.tolist(), lower.tolist(), strict=True)
    lines = []
    for above, below in pairs:
        parts, last = [], None
        for cell in zip(above, below, strict=True):
            parts.append("▀" if cell == last else f"\x1b[38;{code(cell[0])};48;{code(cell[1])}m▀")
            last = cell
        lines.append("".join(parts) + "\x1b[0m")
    return lines


def indexed(pixels: np.ndarray) -> np.ndarray:
    """The nearest of xterm's 240 fixed colours (a cube of 6³ and 24 greys) for `[… 3]`."""
    steps = np.array([0, 95, 135, 175, 215, 255])
    wide = pixels.astype(np.int64)
    at = np.abs(wide[..., None] - steps).argmin(-1)
    cube, cube_off = 16 + at @ np.array([36, 6, 1]), ((steps[at] - wide) ** 2).sum(-1)
    level = ((wide.mean(-1) - 8) / 10).round().clip(0, 23).astype(np.int64)
    grey_off = ((8 + 10 * level[..., None] - wide) ** 2).sum(-1)
    return np.where(grey_off < cube_off, 232 + level, cube)


def refused(console: Console, plan: Plan) -> str:
    """Why there is nothing to watch here; "" where there is."""
    if not looked_at(plan):
        return "--watch: this plan has no attack that can be looked at; the run goes on without pictures."
    if not console.is_terminal or console.is_dumb_terminal:
        return "--watch needs a terminal; the run goes on without pictures (--film N keeps them)."
    if console.size.width < 40 or console.size.height < 16:
        return "--watch needs a terminal of 40 × 16; the run goes on without pictures (--film N keeps them)."
    return ""


def looked_at(plan: Any) -> bool:
    """Whether any attack of the plan runs without a limit of seconds."""
    if plan.kind == "study":
        return any(looked_at(part) for part in plan.parts)
    return (plan.kind == "audit" and not plan.seconds) or (plan.kind == "training" and bool(plan.attack_rounds))


@contextmanager
def screen(console: Console, bar: Progress) -> Iterator[Callable[[Event], None]]:
    """A callable that takes the engine's events and draws their pictures above `bar`, which is not started itself."""
    from qleak.engine import Step

    plain = console.no_color or console.color_system not in ("256", "truecolor")
    mosaic = Mosaic("" if plain else str(console.color_system))
    due = 0.0
    with Live(
        Group(mosaic, bar), console=console, auto_refresh=False, transient=True, vertical_overflow="crop"
    ) as live:

        def show(event: Event) -> None:
            nonlocal due
            if isinstance(event, Step) and event.picture is not None:
                mosaic.add(event)
            began = time.perf_counter()
            if began >= due:
                live.refresh()
                due = time.perf_counter() + max(EVERY, SHARE * (time.perf_counter() - began))

        yield show


def check(film: int, board: Path | None) -> None:
    """Refuses, before anything runs, what could not be done.

    Raises:
        Expected: a film of one frame, or TensorBoard asked for and not installed.
    """
    from qleak import looks

    looks.asked(film=film)
    if board is not None:
        from qleak.adapters import tensorboard

        tensorboard.writer_type()


@contextmanager
def observed(
    plan: Plan, run: Run, say: Any, watch: bool, board: Path | None, film: int
) -> Iterator[tuple[Looks, Callable[[Event], None]]]:
    """What the engine is to look at, and a callable for its events: the bar, with watched pictures, and TensorBoard."""
    from qleak import looks

    pictures = watch and not say.silent
    if pictures and (why := refused(say.console, plan)):
        say.note(why)
        pictures = False
    with ExitStack() as stack:
        tell = [stack.enter_context(say.progress(plan, pictures))]
        if board is not None:
            from qleak.adapters import tensorboard

            tell.append(stack.enter_context(tensorboard.logged(Path(board) / run.folder.name, run)))

        def event(event: Event) -> None:
            for each in tell:
                each(event)

        yield looks.asked(EVERY if pictures or board else 0.0, film), event

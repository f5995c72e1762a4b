"""What the terminal shows while a run is going: the plan with every choice, then a bar with the loss of each arm."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from qleak.engine import Event
    from qleak.plans import Plan


class Console:
    """Prints to standard error while a run is going, so that standard output holds results only."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.console = rich.console.Console(stderr=True, highlight=False, quiet=silent)

    def note(self, text: str) -> None:
        """One plain line."""
        if text:
            self.console.print(text, markup=False, soft_wrap=True)

    def plan(self, recipe: str, plan: Plan, reasons: list[str], full: bool) -> None:
        """Plan, lanes, and every automatic choice with its reason."""
        size = "the paper's size" if full else "default size; --full runs the paper's"
        self.console.print(f"[bold]{recipe}[/bold] · {plan.id} · {size}", soft_wrap=True)
        lines = [(key, line) for key, value in plan.lines().items() for line in wrapped(value, self.console.width - 13)]
        lines += [("placed", line) for reason in reasons for line in hanging(reason, self.console.width - 13)]
        last = ""
        for key, line in lines:
            self.console.print(f"  {key if key != last else '':9s} {line}", markup=False, soft_wrap=True)
            last = key

    def estimate(self, plan: Plan, estimate: dict[str, float], workers: int) -> None:
        """The answer of `--dry-run`."""
        seconds = estimate["cpu_s"] / max(workers, 1)
        self.note(f"  memory    about {estimate['bytes'] / 2**20:.0f} MiB per worker")
        self.note(
            f"  time      at most about {seconds:.0f} s on {workers} workers (a few steps of every arm were timed)"
        )
        self.note("Nothing was run (--dry-run).")

    @contextmanager
    def progress(self, plan: Plan, pictures: bool = False) -> Iterator[Callable[[Event], None]]:
        """A callable that takes the engine's events and moves the bar, under the guesses where they are watched."""
        from qleak import engine
        from qleak.engine import Finished, Step

        unit, total = engine.size(plan)
        seen: dict[str, int] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=self.console, transient=True, disable=self.silent, refresh_per_second=4)
        with ExitStack() as stack:
            if pictures:
                from qleak.cli import watch

                show = stack.enter_context(watch.screen(self.console, bar))
            else:
                show = stack.enter_context(bar) and None
            task = bar.add_task(unit, total=total)

            def move(event: Event) -> None:
                if isinstance(event, Step):
                    seen[event.key] = event.done
                    bar.update(
                        task, completed=min(sum(seen.values()), total), description=f"{event.label} {event.text}"
                    )
                elif isinstance(event, Finished):
                    bar.update(task, completed=total)
                if show is not None:
                    show(event)

            yield move

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A callable that moves a bar on by one of `total`."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=self.silent) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)


def wrapped(value: str, width: int) -> list[str]:
    """Lines of at most `width` characters, broken between items (" · ") where possible."""
    lines = [""]
    for item in value.split(" · "):
        longer = f"{lines[-1]} · {item}" if lines[-1] else item
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines += hanging(item, width)
    return [line for line in lines if line] or [""]


def hanging(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, all but the first indented by two; words are never cut."""
    return textwrap.wrap(
        text, max(width, 20), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    ) or [""]


def quiet() -> Console:
    """A console that says nothing."""
    return Console(silent=True)

"""What the terminal shows while a run is going: the plan with every choice, then a bar with the loss of each arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qleak.catalog import short

if TYPE_CHECKING:
    from qleak.engine import Event
    from qleak.plans import Audit


class Console:
    """Prints to standard error while a run is going, so that standard output holds results only."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.console = rich.console.Console(stderr=True, highlight=False, quiet=silent)

    def note(self, text: str) -> None:
        """One plain line."""
        if text:
            self.console.print(text, markup=False, soft_wrap=True)

    def plan(self, recipe: str, plan: Audit, reasons: list[str], full: bool) -> None:
        """Plan, lanes, and every automatic choice with its reason."""
        lanes = sum(len(c.lanes) for c in plan.chunks())
        size = "the paper's size" if full else "default size; --full runs the paper's"
        self.console.print(f"[bold]{recipe}[/bold] · {plan.id} · {size}", soft_wrap=True)
        lines = {
            "model": short(plan.model.spec),
            "data": f"{plan.data} · images {_ranges(plan.victims)} · client {short(plan.client.spec)}",
            "channels": " · ".join(plan.labels()),
            "attacks": " · ".join(short(a.spec) for a in plan.attacks),
            "lanes": f"{lanes} in chunks of {plan.chunk} (restarts {_ranges(sorted(set(plan.restart_counts())))}, controls included)",
            "seeds": f"seed {plan.seed} · weights {plan.model_seed}",
            "placed": " · ".join(reasons),
        }
        for key, value in lines.items():
            self.console.print(f"  {key:9s} {value}", markup=False, highlight=False)

    def estimate(self, plan: Audit, estimate: dict[str, float], workers: int) -> None:
        """The answer of `--dry-run`."""
        seconds = estimate["cpu_s"] / max(workers, 1)
        self.note(f"  memory    about {estimate['bytes'] / 2**20:.0f} MiB per worker")
        self.note(f"  time      at most about {seconds:.0f} s on {workers} workers (3 steps of every arm were timed)")
        self.note("Nothing was run (--dry-run).")

    @contextmanager
    def progress(self, plan: Audit) -> Iterator[Callable[[Event], None]]:
        """A callable that takes the engine's events and moves the bar."""
        from qleak.engine import Finished, Step

        total = sum(plan.attacks[c.attack].steps * len(c.lanes) for c in plan.chunks())
        seen: dict[str, int] = {}
        losses: dict[str, float] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=self.silent) as bar:
            task = bar.add_task("closures", total=total)

            def move(event: Event) -> None:
                if isinstance(event, Step):
                    seen[event.chunk.key] = event.closures * len(event.chunk.lanes)
                    arm = f"{plan.labels()[event.chunk.channel]} {plan.attacks[event.chunk.attack].spec.split('(')[0]}"
                    losses[arm] = event.loss
                    shown = " ".join(f"{k} {v:.0e}" for k, v in list(losses.items())[-1:])
                    bar.update(task, completed=min(sum(seen.values()), total), description=f"loss {shown}")
                elif isinstance(event, Finished):
                    bar.update(task, completed=total)

            yield move


def quiet() -> Console:
    """A console that says nothing."""
    return Console(silent=True)


def _ranges(values: Any) -> str:
    values = list(values)
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}–{values[-1]}"
    return ", ".join(map(str, values[:8])) + (" …" if len(values) > 8 else "")

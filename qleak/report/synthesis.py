"""A stored synthesis as people read it: what every arm reached within its budget, beside one noisy average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qleak import store
from qleak.errors import Expected
from qleak.metrics import student
from qleak.report import canaries, columns, words
from qleak.report.compare import accuracy
from qleak.report.training import MOST, spark
from qleak.store import Row

if TYPE_CHECKING:
    from torch import Tensor

CHOSEN = "max over epochs, chosen on the test set"
TITLES = (
    ("arm", None), ("ε", 5), ("steps", 5), ("accuracy", 11), ("max *", 6), ("floor", 6), ("vs\nfloor", 6),
    ("Fréchet\ndist.", 7), ("CPU s", 6),
)  # fmt: skip
TOLD = 6  # arms of one budget that a sentence can name


class Curve(NamedTuple):
    """Means over seeds `at` steps, with 95 % t intervals where there are two seeds or more; `epsilon` spent by then."""

    at: list[int]
    epsilon: list[float | None]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Made:
    """A synthesis's folder that has been read."""

    folder: Path
    header: dict[str, Any]
    rows: list[Row]

    @cached_property
    def arms(self) -> list[str]:
        """Names in the plan's order; an arm's place here is its number in keys and files."""
        return [fact["method"] for fact in self.header.get("facts") or []]

    @cached_property
    def judge(self) -> str:
        """Whose accuracy is *the* accuracy: the only judge before the end."""
        return self.rows[0]["classifier"] if self.rows else ""

    def curve(self, arm: str) -> Curve:
        """The first judge's accuracy along the way."""
        found: dict[int, list[Row]] = {}
        for r in self.rows:
            if r["method"] == arm and r["classifier"] == self.judge and r["accuracy"] is not None:
                found.setdefault(r["step"], []).append(r)
        at, sides = sorted(found), []
        for step in at:
            values = [r["accuracy"] for r in found[step]]
            mean = fmean(values)
            sides.append((mean, *student(values)) if len(values) > 1 else (mean, mean, mean))
        mean, low, high = (list(side) for side in zip(*sides, strict=True)) if at else ([], [], [])
        return Curve(at, [found[step][0]["epsilon"] for step in at], mean, low, high)

    def sheet(self, arm: str) -> tuple[int, Tensor] | None:
        """(seed index, images `[class·k c h w]`, class by class) of the arm's first seed that was measured."""
        for path in sorted((self.folder / "tensors").glob(f"state-{self.arms.index(arm)}-*.safetensors"), key=_seed):
            images = _sheet(path)
            if images.ndim == 4 and len(images) and len(images) % self.classes == 0:
                return _seed(path), images
        return None

    @property
    def classes(self) -> int:
        """How many there are, as everybody knows."""
        return self.header["public"][2]


def load(folder: Path) -> Made:
    """Reads a synthesis, finished or not.

    Raises:
        Expected: there is no run, it is damaged, or it is not a synthesis.
    """
    header = store.read_run(folder)
    if header.get("kind") != "synthesis":
        raise Expected(f"Expected a run of kind 'synthesis' at {folder}, got {header.get('kind')!r}.")
    return Made(folder, header, store.read_rows(folder))


def bare(arm: str) -> str:
    """An arm's name without its budget."""
    return arm.rsplit(" ε=", 1)[0]


def standing(s: dict[str, Any]) -> str:
    """How an arm stands to one noisy average at the same ε, in words; "" where there is none to compare with."""
    floor = s.get("floor_accuracy")
    if floor is None or s["accuracy"] is None or s["floor"]:
        return ""
    gap = 100 * (s["accuracy"] - floor)
    unsure = ", within the intervals of the seeds" if _overlap(s.get("accuracy_ci"), s.get("floor_accuracy_ci")) else ""
    if abs(gap) < 0.05:
        return "no better than one noisy average"
    if gap < 0:
        return f"worse than one noisy average by {-gap:.1f} points{unsure}"
    return f"{gap:.1f} points above one noisy average{unsure}"


def _overlap(a: list[float] | None, b: list[float] | None) -> bool:
    """Whether two intervals meet; not known of a single seed."""
    if not a or not b or None in (*a, *b):
        return False
    return a[0] <= b[1] and b[0] <= a[1]


def verdict(header: dict[str, Any]) -> str:
    """A sentence per budget: what a classifier trained on synthetic images alone reaches, beside the floor."""
    found = [s for s in header.get("summary") or [] if s["accuracy"] is not None]
    if not found:
        return f"Verdict: none yet, the run is {header.get('status', 'unfinished')}."
    budgets = list(dict.fromkeys(s["target_epsilon"] for s in found))
    tell = _clause if len(budgets) == 1 else _brief
    said = []
    for budget in budgets:
        mine = [s for s in found if s["target_epsilon"] == budget]
        arms = sorted((s for s in mine if not s["floor"]), key=lambda s: -s["accuracy"])
        clauses = [tell(s) for s in arms[:TOLD]]
        if len(arms) > TOLD:
            clauses.append(f"{len(arms) - TOLD} more below them")
        clauses += [f"one noisy average reaches {_share(s)}" for s in mine if s["floor"]]
        said.append(f"at ε ≤ {budget:g} (δ {mine[0]['delta']:g}), {'; '.join(clauses)}")
    worse: dict[str, list[str]] = {}
    for s in found:
        if standing(s).startswith("worse") and len(budgets) > 1:
            worse.setdefault(bare(s["method"]), []).append(f"{s['target_epsilon']:g}")
    below = "; ".join(f"{name} at ε ≤ {', '.join(at)}" for name, at in worse.items())
    seeds = max(s["n"] for s in found)
    many = f"{seeds} seed{'' if seeds == 1 else 's'}"
    return (
        f"Verdict: {'. And '.join(said)}.{f' Worse than one noisy average: {below}.' if below else ''} "
        f"(Train on synthetic, test on real, last epoch, {many}.)"
    )


def _clause(s: dict[str, Any]) -> str:
    stands = standing(s)
    return f"{bare(s['method'])} reaches {_share(s)}{f' ({stands})' if stands else ''}{_promise(s)}"


def _brief(s: dict[str, Any]) -> str:
    return f"{bare(s['method'])} {_share(s)}{_promise(s)}"


def _promise(s: dict[str, Any]) -> str:
    if s["epsilon"] is not None:
        return ""
    claimed = s.get("claimed_epsilon")
    return ", no guarantee" if claimed is None else f", ε {claimed:.3g} claimed, no guarantee"


def _share(s: dict[str, Any]) -> str:
    return accuracy(s["accuracy"], s.get("accuracy_ci"))


def next_step(header: dict[str, Any], folder: Path) -> tuple[str, str]:
    """A command worth trying now, and why."""
    run, seeds = f"qleak recipe run {header.get('recipe')}", (header.get("plan") or {}).get("seeds")
    if header.get("status") != "done":
        return f"{run} --config {folder}/run.json", "goes on where it stopped"
    if isinstance(seeds, int) and seeds < 3 and "seeds" in (header.get("flags") or {}):
        return f"{run} --seeds 5", "an interval needs more seeds"
    return f"qleak synth sample {folder} --n 100", "labelled images, at no further cost in ε"


def table(run: Made) -> Iterator[RenderableType]:
    """A row per arm fit for 80 columns; then what ε is claimed, what the columns mean, and the other judges."""
    found = run.header.get("summary") or []
    if not found:
        yield from _sparks(run)
        return
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="")
    for i, (title, width) in enumerate(TITLES):
        width = width or 80 - sum(w or 0 for _, w in TITLES) - len(TITLES)
        grid.add_column(title, width=width, justify="right" if i else "left", vertical="bottom", overflow="fold")
    for s in found:
        columns.add(
            grid, Text(s["method"], style="bold"), spent(s["epsilon"]), str(s["steps"]), _share(s),
            percent(s["accuracy_max"]), *beside(s), words.number(s["distance"], ".4g"), words.number(s["cpu_s"], ".1f"),
        )  # fmt: skip
    yield grid
    yield Text(
        f"ε: exact for what was released, at δ {found[0]['delta']:g}. Accuracy on real test images of {run.judge or 'the first judge'}, "
        f"last epoch, ± half of the 95% interval over seeds. * {CHOSEN}. Floor: one noisy average at the same ε."
    )
    for s in found:
        if s["epsilon"] is None:
            claimed = s.get("claimed_epsilon")
            said = "nothing claimed" if claimed is None else f"{claimed:.3g} claimed, no guarantee"
            yield Text(f"ε of {s['method']}: {said}{_because(run, s['method'])}.")
    yield Text("")
    yield from canaries.table(run.header)
    yield from _judges(found)
    yield from _sparks(run)


def _sparks(run: Made) -> Iterator[RenderableType]:
    """The first judge's mean accuracy against steps, a line per arm on one scale; nothing without two measurements."""
    curves = {arm: curve for arm in run.arms if len((curve := run.curve(arm)).at) > 1}
    if not curves:
        return
    low, high = min(min(c.mean) for c in curves.values()), max(max(c.mean) for c in curves.values())
    longest = max(min(len(c.at), MOST) for c in curves.values())
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    grid.add_column(width=80 - longest - 32, overflow="fold")
    grid.add_column(width=longest, no_wrap=True)
    grid.add_column(width=29)
    for arm, curve in curves.items():
        steps = f"{curve.mean[0]:.1%} → {curve.mean[-1]:.1%} at step {curve.at[-1]}"
        columns.add(grid, Text(arm), spark(curve.mean, low, high), steps)
    yield Text(f"Accuracy, {low:.1%} (▁) to {high:.1%} (█), along the way:")
    yield grid
    yield Text("")


def _because(run: Made, arm: str) -> str:
    unsound = next((f.get("unsound") for f in run.header.get("facts") or [] if f["method"] == arm), "")
    return f" ({unsound.rstrip('.')})" if unsound else ""


def _judges(found: list[dict[str, Any]]) -> Iterator[RenderableType]:
    others = [(s["method"], j) for s in found for j in s["judges"][1:] if j["accuracy"] is not None]
    if not others:
        return
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="")
    for title, width in (("other judges", 59), ("accuracy", 11), ("max *", 6)):
        grid.add_column(title, width=width, justify="left" if width == 59 else "right", overflow="fold")
    for arm, j in others:
        columns.add(grid, Text(f"{arm} · {j['classifier']}"), _share(j), percent(j["accuracy_max"]))
    yield grid
    yield Text("")


def spent(epsilon: float | None) -> str:
    """ε in a table: three digits, "none" without a guarantee."""
    return "none" if epsilon is None else f"{epsilon:.3g}"


def percent(share: float | None) -> str:
    """A share with one digit behind the point."""
    return "—" if share is None else f"{100 * share:.1f}%"


def beside(s: dict[str, Any]) -> tuple[str, str]:
    """The floor's accuracy at the same ε, and the difference to it in points; dashes for the floor itself."""
    floor = s.get("floor_accuracy")
    if floor is None or s["floor"] or s["accuracy"] is None:
        return "—", "—"
    return percent(floor), f"{100 * (s['accuracy'] - floor):+.1f}".replace("-", "−")


def _seed(path: Path) -> int:
    number = path.stem.rsplit("-", 1)[1]
    return int(number) if number.isdigit() else 0


def _sheet(path: Path) -> Tensor:
    """The sheet alone: beside it lies a synthesis's whole state, which may be large."""
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:  # pyright: ignore[reportPrivateImportUsage]
            return file.get_tensor("sheet")
    except (OSError, safetensors.SafetensorError):
        raise Expected(
            f"Expected {path} to be a whole safetensors file with a sheet: start again with --fresh."
        ) from None

"""`qleak recipe run`: a recipe's signature becomes flags, its plan is run, its run folder is shown."""

from __future__ import annotations

import inspect
import itertools
import json
import multiprocessing
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import datetime
from multiprocessing import forkserver
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from qleak.check import one_of
from qleak.cli import live, recipes
from qleak.cli.bounded import bounded
from qleak.errors import Expected, Failed, did_you_mean
from qleak.plans import KINDS, Plan
from qleak.plans.audit import BOUNDS


class Common(NamedTuple):
    """Flags that every recipe has; what each means is said in `COMMON`."""

    config: Path | None = None
    name: str = ""
    out: Path = Path("runs")
    seed: int | None = None
    device: str = "auto"
    dtype: str = ""
    chunk: int = 0
    workers: int = 0
    cluster: str = ""
    memory: str = ""
    bounds: str = ""
    fail_above: float | None = None
    json: bool = False
    dry_run: bool = False
    fresh: bool = False
    quiet: bool = False
    verbose: bool = False
    watch: bool = False
    film: int = 0
    tensorboard: Path | None = None


COMMON: dict[str, tuple[Any, Any]] = {
    "config": (Path | None, typer.Option(help="JSON or TOML with any of these flags, or a run's run.json; flags win.")),
    "name": (str, typer.Option(help="Folder NAME_TIMESTAMP instead of RECIPE-ID.")),
    "out": (Path, typer.Option(help="Where run folders go.")),
    "seed": (int | None, typer.Option(help="Root of every random draw.")),
    "device": (str, typer.Option(help="auto, cpu, cuda, cuda:1, …")),
    "dtype": (str, typer.Option(help="float32 or float64.")),
    "chunk": (int, typer.Option(help="Lanes that run together; part of the plan.")),
    "workers": (int, typer.Option(help="Processes; 0: one per core on a CPU, one on a GPU.")),
    "cluster": (str, typer.Option(help="A dask scheduler, tcp://HOST:PORT, whose workers run the cells.")),
    "memory": (
        str,
        typer.Option(help="All that the run's processes may take, such as 4GB; workers are given up first."),
    ),
    "bounds": (
        str,
        typer.Option(
            help="What no attacker can beat: yes, no, auto (where it takes seconds); empty: as the recipe says."
        ),
    ),
    "fail_above": (float | None, typer.Option(help="Exit 3 when a non-oracle reconstruction exceeds so many dB.")),
    "json": (bool, typer.Option("--json", help="Print run.json instead of tables.")),
    "dry_run": (bool, typer.Option("--dry-run", help="Print plan, lanes, memory and estimated time; run nothing.")),
    "fresh": (bool, typer.Option("--fresh/--resume", help="Start over, or go on where the folder ends.")),
    "quiet": (bool, typer.Option("--quiet", help="Only the verdict.")),
    "verbose": (bool, typer.Option("--verbose", help="Every table row, controls included.")),
    "watch": (bool, typer.Option("--watch", help="Show guesses as they emerge, in the terminal.")),
    "film": (int, typer.Option(help="Frames kept of the best start of every channel × attack; `qleak film RUN`.")),
    "tensorboard": (Path | None, typer.Option(help="Folder for TensorBoard's event files.")),
}


def run_recipe(name: str, argv: list[str]) -> None:
    """Builds a command from the recipe's signature and runs it on `argv`."""
    if not {"--help", "--dry-run", "--config"} & set(argv) and not re.search("--workers|--cluster", " ".join(argv)):
        _warm_up()
    fn, path = recipes.load(name)
    preset = _config(argv, fn)
    command = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    command.command(path.stem)(_as_command(fn, preset, lambda own, common: execute(fn, name, own, common)))
    command(argv, prog_name=f"qleak recipe run {name}")


def _warm_up() -> None:
    """Lets the server that workers are forked from import torch while this process does the same."""
    if sys.platform == "linux":
        multiprocessing.get_context("forkserver").set_forkserver_preload(["qleak.jobs"])
        forkserver.ensure_running()


def _as_command(fn: Callable[..., Plan], preset: dict[str, Any], body: Callable[..., None]) -> Callable[..., None]:
    own = inspect.signature(fn, eval_str=True).parameters
    helps = _argument_help(inspect.getdoc(fn) or "")
    parameters = []
    for key, p in own.items():
        kind = Annotated[p.annotation, typer.Option(help=helps.get(key, ""))]
        parameters.append((key, kind, preset.get(key, p.default)))
    for key, (kind, option) in COMMON.items():
        if key not in own:
            parameters.append((key, Annotated[kind, option], preset.get(key, Common._field_defaults[key])))

    def call(**values: Any) -> None:
        mine = {k: values.pop(k) for k in own}
        body(mine, Common(**{k: v for k, v in values.items() if k in Common._fields}))

    kw = inspect.Parameter.KEYWORD_ONLY
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(k, kw, default=d, annotation=a) for k, a, d in parameters]
    )
    call.__annotations__ = {k: a for k, a, _ in parameters}
    module = sys.modules[fn.__module__].__doc__ or ""
    call.__doc__ = module.split("\n\n")[0]
    return call


def _argument_help(doc: str) -> dict[str, str]:
    """The `Args:` section of a Google docstring, by argument."""
    section = re.search(r"Args:\n(.*?)(\n\n|\Z)", doc, re.S)
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section.group(1) if section else "", re.M)
    return {name: " ".join(text.split()) for name, text in found}


def _config(argv: list[str], fn: Callable[..., Plan]) -> dict[str, Any]:
    """Values of `--config FILE`, checked against the recipe's flags. A run's run.json repeats that run."""
    given = [
        a.partition("=")[2] or (argv[i + 1 : i + 2] or [""])[0]
        for i, a in enumerate(argv)
        if a.split("=")[0] == "--config"
    ]
    if not given:
        return {}
    path = Path(given[-1])
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise Expected(f"Expected a readable --config file: {path}: {error.strerror}.") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Expected(f"Expected JSON or TOML in --config {path}: {error}.") from None
    if not isinstance(values, dict):
        raise Expected(f"Expected a table of flags in --config {path}, got {type(values).__name__}.")
    values = values["flags"] if isinstance(values.get("flags"), dict) else values
    known = {*inspect.signature(fn).parameters, *COMMON} - {"config"}
    values = {str(k).replace("-", "_"): v for k, v in values.items()}
    for key in values:
        if key not in known:
            raise Expected(f"Unknown key {key!r} in --config {path}.{did_you_mean(key, known)}")
    return {k: Path(v) if k == "out" else v for k, v in values.items()}


def _changed(plan: Any, common: Common) -> Any:
    """The plan with the flags that every recipe has, such as --seed; in a study, every part that knows them."""
    if parts := getattr(plan, "parts", None):
        return replace(plan, parts=tuple(_changed(part, common) for part in parts))
    given = {f.name: getattr(common, f.name, None) for f in fields(plan) if f.name != "bounds"}  # beside the plan
    changes = {k: v for k, v in given.items() if v not in (None, "", 0) or (k == "seed" and v == 0)}
    return replace(plan, **changes)


def execute(fn: Callable[..., Plan], name: str, own: dict[str, Any], common: Common) -> None:
    """Runs the plan that the flags make, or what is left of it, and shows the run folder.

    Raises:
        typer.Exit: 3 above `--fail-above`, 130 after Ctrl-C.
    """
    from qleak import cluster
    from qleak.cli import watch
    from qleak.engine import memory

    if common.bounds:
        one_of(BOUNDS, bounds=common.bounds)
    watch.check(common.film, common.tensorboard)
    limit, path = memory.read_size(common.memory), recipes.path_of(name)
    plan = fn(**own)
    if not isinstance(plan, tuple(KINDS.values())):
        raise Expected(f"Expected {path.stem}(…) to return a plan, got {type(plan).__name__}.")
    plan = _changed(plan, common)
    with cluster.placed(common.cluster, common.device, common.workers, plan) as (device, workers, number, reasons):
        if isinstance(workers, int):
            number, fits = memory.place(plan, device, workers, limit)
            workers, reasons = number, reasons + fits
        _execute(plan, path, name, own, common, cluster.Placed(device, workers, number, reasons))


def _execute(plan: Any, path: Path, name: str, own: dict[str, Any], common: Common, placed: Any) -> None:
    from qleak import engine, store
    from qleak.cli import watch
    from qleak.report import html, terminal

    device, workers, number, reasons = placed
    say = live.quiet() if common.quiet or common.json else live.Console()
    say.plan(path.stem, plan, reasons + engine.choices(plan), full=bool(own.get("full")))
    if common.dry_run:
        say.estimate(plan, engine.estimate(plan, "cpu" if common.cluster else device), number)
        return
    folder = _folder(common, path.stem, plan)
    with store.open_run(folder, header(plan, name, flags(own, common), placed), fresh=common.fresh) as run:
        say.note(run.warning)
        try:
            with watch.observed(plan, run, say, common.watch, common.tensorboard, common.film) as (look, bar):
                for event in engine.run(plan, run, device, workers, look):
                    bar(event)
            if late := getattr(workers, "late", []):
                say.note("\n".join(late))
                run.update(choices=[*run.header["choices"], *late])
            bounded(plan, run, common.bounds, say)
        except KeyboardInterrupt:
            run.update(status="interrupted")
            print(f"qleak: interrupted; {len(run.done())} rows are safe. The same command goes on.", file=sys.stderr)
            raise typer.Exit(130) from None
        except BaseException as error:
            run.update(status="failed", error=f"{type(error).__name__}: {error}")
            raise
    if plan.kind == "study":  # the engine may not read reports: whoever shows the study joins its parts
        _join(folder)
    try:
        page = html.write(folder, folder / "report.html")
        if common.json:
            print((folder / "run.json").read_text(encoding="utf-8"))
        else:
            terminal.show(folder, quiet=common.quiet, verbose=common.verbose)
            say.note(f"{folder}/  run.json  rows.jsonl  tensors/  {page.name}")
    except KeyboardInterrupt:
        print(f"qleak: interrupted; the run is done, `qleak report {folder}` shows it.", file=sys.stderr)
        raise typer.Exit(130) from None
    _gate(store.read_run(folder), common.fail_above)


def flags(own: dict[str, Any], common: Common) -> dict[str, Any]:
    """What run.json keeps of a command's flags: those that say what was run."""
    silent = ("config", "cluster", "fresh", "dry_run", "json")
    kept = {k: str(v) if isinstance(v, Path) else v for k, v in common._asdict().items() if k not in silent}
    return {**own, **kept}


def header(plan: Any, name: str, flags: dict[str, Any], placed: Any) -> dict[str, Any]:
    """First content of run.json of the plan that the recipe `name` made, for a run that is `cluster.Placed` somewhere."""
    from qleak import engine, machine

    return {
        **plan.header(name, flags),
        "source": recipes.path_of(name).read_text(encoding="utf-8"), "choices": placed.reasons + engine.choices(plan),
        "workers": placed.number, "device": placed.device, **machine.describe(),
    }  # fmt: skip


def _join(folder: Path) -> None:
    from qleak import store
    from qleak.report import study

    header = store.read_run(folder)
    with store.open_run(folder, header) as run:
        run.update(summary=study.summary(folder))


def _folder(common: Common, recipe: str, plan: Plan) -> Path:
    """RECIPE-ID, so that the same command finds it again; with --name the newest unfinished NAME_… of this plan."""
    from qleak import store

    if not common.name:
        return common.out / f"{recipe}-{plan.id}"
    if not re.fullmatch(r"[\w.-]+", common.name):
        raise Expected(f"Expected --name {common.name!r} of letters, digits, dots, dashes and underscores.")
    if not common.fresh and common.out.is_dir():
        for folder in sorted(common.out.glob(f"{common.name}_*"), reverse=True):
            try:
                header = store.read_run(folder)
            except (Expected, Failed):
                continue
            if header.get("plan_id") == plan.id and header.get("status") != "done":
                return folder
    stamp = f"{common.name}_{datetime.now():%Y%m%d-%H%M%S}"  # of an earlier run, too, where the clock was set back
    return next(f for i in itertools.count(1) if not (f := common.out / (f"{stamp}-{i}" if i > 1 else stamp)).exists())


def _gate(header: dict[str, Any], limit: float | None) -> None:
    worst = max((s["psnr_selected_max"] for s in header["summary"] if s.get("control") == "none"), default=0.0)
    if limit is not None and worst > limit:
        print(f"qleak: a reconstruction of {worst:.1f} dB exceeds --fail-above {limit:g}.", file=sys.stderr)
        raise typer.Exit(3)

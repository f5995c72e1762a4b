"""`qleak runs`: the run folders that are here. List, look at, export, remove."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from qleak.errors import Expected, Failed, did_you_mean

runs = typer.Typer(
    help="Run folders: list, show, export, remove.", no_args_is_help=True, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip

Run = Annotated[str, typer.Argument(help="A run's folder, or the name of one below --out.")]
Out = Annotated[Path, typer.Option(help="Where run folders lie.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]

KEPT = (
    "report, rows and summary stay, pictures and checkpoints are gone: the run can no longer be continued where it was \
stopped, nor its pictures or bounds be made again, unless it is run again"
)


@runs.command("ls")
def ls(out: Out = Path("runs"), as_json: AsJson = False) -> None:
    """Every run, newest first: kind, status, rows, size, day, and what came out."""
    from qleak.cli import inventory

    found, damaged = inventory.listed(out)
    if as_json:
        print(json.dumps({"runs": found, "damaged": damaged}, indent=1))
        return
    width = _width()
    column = width - 49
    if found:
        print(f"{'run':{column}} kind      status        rows     size started")
    for f in found:
        cells = f"{f['kind']:9} {f['status']:11} {f['rows']:>6} {inventory.human(f['bytes']):>8} {(f['started'] or '')[:10]}"
        if len(f["name"]) > column:
            print(f["name"])
        print(f"{f['name'] if len(f['name']) <= column else '':{column}} {cells}".rstrip())
        parts = f"{len(f['parts'])} parts: {', '.join(f['parts'])}" if f["parts"] else ""
        for line in filter(None, (parts, f["verdict"])):
            print(f"  {textwrap.shorten(line, width - 2, placeholder=' …')}")
    for each in damaged:
        print(f"damaged: {each['error']}")
    print(
        f"{len(found)} run{'' if len(found) == 1 else 's'} below {out}, {inventory.human(sum(f['bytes'] for f in found))}"
    )


@runs.command("show")
def show(run: Run, out: Out = Path("runs"), as_json: AsJson = False) -> None:
    """One run: what it is, its plan, how to repeat and to continue it, its files and their sizes."""
    from qleak import folders
    from qleak.cli import inventory

    folder = _find(run, out)
    header, told = folders.read_run(folder), inventory.facts(folder)
    files = inventory.written(folder)
    sizes = {str(p.relative_to(folder)): p.lstat().st_size for p in files if p.name != ".lock"}
    if as_json:
        print(json.dumps(told | {"plan": header.get("plan"), **_again(header, folder), "files": sizes}, indent=1))
        return
    _line("run", f"{folder}")
    held = f" by process {told['pid']}" if told["pid"] else ""
    many = f"{told['rows']} rows · {inventory.human(told['bytes'])} on disk"
    _line("is", f"{told['kind']} · plan {told['id']} · schema {header['schema']} · {told['status']}{held} · {many}")
    _line("time", f"started {told['started'] or 'never'}, finished {told['finished'] or 'not yet'} (UTC)")
    made = [f"{k} {v}" for k, v in (header.get("versions") or {}).items() if k in ("qleak", "python", "torch")]
    placed = [f"git {header['git']}"] if header.get("git") else []
    placed += [f"{header[k]}{' workers' * (k == 'workers')}" for k in ("cpu", "device", "workers") if header.get(k)]
    _line("made by", " · ".join([*made, *placed]) or "unknown")
    _line("verdict", told["verdict"] or "none yet")
    for name, plan in _plans(header):
        _line(f"plan{' ' * bool(name)}{name}", " · ".join(f"{k} {_said(v)}" for k, v in plan.items()))
    for name, text in _again(header, folder).items():
        _line(name, text)
    _line("files", f"{len(sizes)} files, by size:")
    for path, size in sorted(sizes.items(), key=lambda pair: -pair[1])[:20]:
        print(f"  {inventory.human(size):>9}  {path}")
    if len(sizes) > 20:
        print(f"  … and {len(sizes) - 20} smaller ones")


@runs.command("export")
def export(
    run: Run,
    file: Annotated[Path, typer.Argument(help="The file to write: FILE.parquet or FILE.csv.")],
    out: Out = Path("runs"),
) -> None:
    """Writes a run's rows as Parquet or CSV; lists stay lists in Parquet, and are JSON in CSV."""
    from qleak.report import exported

    count = exported.write(_find(run, out), file)
    print(f"{file}: {count} rows")


@runs.command("rm")
def rm(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or names of folders below --out.")],
    out: Out = Path("runs"),
    tensors: Annotated[bool, typer.Option("--tensors", help="Only pictures, messages and checkpoints.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Removes runs: the files that runs write, and nothing else; a run that is being written is refused."""
    from qleak import disk, folders
    from qleak.cli import inventory

    found = [inventory.known(_find(run, out)) for run in dict.fromkeys(runs)]
    with ExitStack() as stack:
        for each in (inner for folder in found for inner in folders.every(folder)):
            if pid := disk.holder(each):
                raise Failed(f"Expected a run that nobody writes, but process {pid} is writing {each}: stop it first.")
        for folder in found:
            paths = _doomed(folder, tensors)
            print(f"{folder}: {len(paths)} files, {inventory.human(inventory.blocks(paths))}")
        print("Only tensors: " + KEPT + "." if tensors else "This cannot be undone.")
        if not yes and not typer.confirm("Remove them?"):
            print("Nothing was removed.")
            raise typer.Exit(1)
        for each in (inner for folder in found for inner in folders.every(folder)):
            stack.enter_context(disk.locked(each))
        for folder in found:
            _remove(folder, tensors)


def _doomed(folder: Path, tensors: bool) -> list[Path]:
    from qleak import folders
    from qleak.cli import inventory

    paths = inventory.written(folder)
    if not tensors:
        return paths
    kept = {p for f in folders.every(folder) for p in folders.files(f, folders.TENSORS)}
    return [p for p in paths if p in kept]


def _remove(folder: Path, tensors: bool) -> None:
    """Removes what `_doomed` names, then the folders that are left empty; says what others have put there."""
    from qleak import disk, folders

    with disk.disk(folder):
        if tensors:
            for path in _doomed(folder, tensors):
                path.unlink(missing_ok=True)
            print(f"{folder}: tensors removed")
            return
        folders.condemn(folder)
        inside, paths = list(folders.every(folder)), _doomed(folder, tensors)
        for path in paths:
            path.unlink(missing_ok=True)
        made = {d for p in paths for d in (p.parent, p.parent.parent)} | {f / "tensors" for f in inside} | {folder}
        for each in sorted((d for d in made if d == folder or folder in d.parents), key=lambda d: -len(d.parts)):
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()
    left = sum(1 for p in folder.rglob("*") if not p.is_dir()) if folder.exists() else 0
    print(f"{folder}: removed" + (f"; {left} files that no run writes stay" if left else ""))


def _find(run: str, out: Path) -> Path:
    """The folder that `run` means: itself, or the one of that name below `out`.

    Raises:
        Expected: there is neither.
    """
    from qleak import folders

    for folder in (Path(run), out / run):
        if (folder / "run.json").exists() or (folder / folders.CLEARED).exists():
            return folder
    known = [folder.name for folder in folders.list_runs(out)]
    raise Expected(f"Expected a run folder, or a run below {out}, got {run!r}.{did_you_mean(run, known)}")


def _again(header: dict[str, Any], folder: Path) -> dict[str, str]:
    """How to continue a run (the same command does), and how to repeat it elsewhere."""
    flags, where = header.get("flags") or {}, shlex.quote(str(folder))
    if header.get("kind") == "captured":
        command = flags.get("command") or "qleak audit with the same update and flags"
        return {"continue": command, "repeat": f"{command} --out elsewhere"}
    if not header.get("recipe"):
        parent = folder.parent if (folder.parent / "run.json").exists() else None
        if parent is not None:
            return {"continue": f"it is a part of {parent}, whose command goes on with it"}
        return {"continue": f"qleak.engine.run of its plan on {where}, from Python, as it was begun"}
    command = f"qleak recipe run {shlex.quote(str(header['recipe']))} --config {where}/run.json"
    here = shlex.quote(str(folder.parent))
    return {"continue": f"{command} --out {here}", "repeat": f"{command} --out elsewhere"}


def _plans(header: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The plan's fields that say something, or those of each part."""
    plan = header.get("plan") or {}
    named = zip(plan.get("names") or [], plan.get("parts") or [], strict=False) if plan.get("parts") else [("", plan)]
    hidden = ("kind", "schema")
    return [(n, {k: v for k, v in p.items() if k not in hidden and v not in (None, "", [], {})}) for n, p in named]


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_said, value[:4])) + (f", … {len(value)} in all" if len(value) > 4 else "")
    return str(value)


def _line(name: str, text: str) -> None:
    """A term and what is said of it, wrapped; commands stay on one line, to be copied."""
    if text.startswith("qleak "):
        print(f"{name:9} {text}")
        return
    for i, line in enumerate(textwrap.wrap(text, _width() - 10, break_long_words=False) or [""]):
        print(f"{name if i == 0 else '':9} {line}")


def _width() -> int:
    return max(shutil.get_terminal_size((80, 24)).columns, 60) if sys.stdout.isatty() else 80

"""Recipes as files: found, listed and shown without importing anything but the standard library."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qleak.errors import Expected, did_you_mean


def folder() -> Path:
    """Where the shipped recipes lie: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def names(incomplete: str = "") -> list[str]:
    """All recipe names that start so; serves shell completion too."""
    found = sorted(p.stem for p in folder().glob("*.py") if not p.stem.startswith("_"))
    return [n for n in found if n.startswith(incomplete)]


def path_of(name: str) -> Path:
    """The file of a recipe given by name or by path.

    Raises:
        Expected: there is no such recipe or file.
    """
    if name.endswith(".py") or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise Expected(f"Expected a recipe file at {name}, found none.")
        return path
    if name.replace("-", "_") not in names():
        raise Expected(f"Unknown recipe {name!r}.{did_you_mean(name, names())} `qleak recipe ls` lists them.")
    return folder() / f"{name.replace('-', '_')}.py"


def docstring(path: Path) -> str:
    """The claim at the top of a recipe file, without running it."""
    try:
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    except SyntaxError as error:
        raise Expected(f"Expected Python in {path}, line {error.lineno}: {error.msg}.") from None


def load(name: str) -> tuple[Callable[..., Any], Path]:
    """The recipe's function (named like its file) and the file. Runs the file."""
    path = path_of(name)
    docstring(path)
    spec = importlib.util.spec_from_file_location(f"qleak.recipes.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    fn = getattr(module, path.stem, None)
    if not inspect.isfunction(fn):
        raise Expected(f"Expected {path.name} to define a function {path.stem}(…) that returns a plan.")
    return fn, path


def print_list() -> None:
    """One line per recipe: name and the first sentence of its claim."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it claims")
    for name in names():
        table.add_row(name, " ".join(docstring(folder() / f"{name}.py").split("\n\n")[0].split()))
    Console().print(table)


def print_source(name: str) -> None:
    """The file as it is."""
    print(path_of(name).read_text(encoding="utf-8"), end="")


def copy(name: str, target: Path) -> None:
    """Writes the source to `target` (a file, or a folder), never over an existing file."""
    source = path_of(name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise Expected(f"Expected a new file, {target} exists.")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{target} — run it with: qleak recipe run ./{target}")

"""Nets from code of one's own: ``file.py:Net`` or ``package.module:function``."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from qleak.check import Expected, did_you_mean, whole
from qleak.models.fresh import constructed
from qleak.models.module import from_module
from qleak.models.traced import layers_of
from qleak.types import Model


def imported(
    path: str = "qleak.models.convnet:convnet",
    shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    mode: str = "eval",
    fresh: bool = True,
    digest: str = "",
) -> Model:
    """What a function or class of your own returns: an `nn.Module`, or a qleak `Model`, which says its own shape.

    The named code is run, here and in every process that reads the plan. Modules are looked for in the
    working directory, too.

    Args:
        path: ``file.py:Net`` or ``package.module:function``; called without arguments.
        shape: `(c, h, w)` of one image.
        classes: number of logits.
        mode: batch norm by running statistics ("eval") or by the batch ("train"); a module's only.
        fresh: `init` draws new weights (see `qleak.models.fresh`); False keeps those the module is made
            with, whose draws from torch's global generator are the same each time. A module's only.
        digest: BLAKE2b of the source file (16 hex digits), filled in when empty, so that a plan's id
            follows the code; a file that has changed since is refused.

    Raises:
        Expected: no such file, module or name; code that fails; a result that is neither of the two.
    """
    where, colon, name = path.rpartition(":")
    if not colon or not where or not name:
        raise Expected(f"Expected path={path!r} to be written like file.py:Net or package.module:function.")
    if not (isinstance(shape, tuple | list) and len(shape) == 3):
        raise Expected(f"Expected shape={shape!r} to be (c, h, w).")
    whole(classes=classes, **dict(zip("chw", shape, strict=True)))
    with _here():
        module, found = _load(where)
        if digest not in ("", found):
            raise Expected(f"Expected {where} with digest {digest}, found {found}: the file has changed since.")
        make = _named(module, name, where)
        with _one_line(path):
            made = constructed(make)
    if isinstance(made, Model):
        if mode != "eval" or not fresh:
            raise Expected(f"Expected no mode and no fresh of {path}, which returns a Model that has settled both.")
        model = made
    elif isinstance(made, nn.Module):
        image = (shape[0], shape[1], shape[2])
        model = from_module(made, image, classes, mode=mode, fresh=fresh)
        model = replace(model, layers=layers_of(made, image, mode))
    else:
        raise Expected(f"Expected {path} to return an nn.Module or a qleak Model, got {type(made).__name__}.")
    spec = f"imported(path={path!r}, shape={model.shape!r}, classes={model.classes}, mode={mode!r}, fresh={fresh!r}"
    return replace(model, spec=f"{spec}, digest={found!r})")


imported.__factory__ = True  # type: ignore[attr-defined]  # its spec holds the digest it found, so `factory` will not do


def _load(where: str) -> tuple[ModuleType, str]:
    """The module, run anew if it is a file, and the digest of its source."""
    if not where.endswith(".py"):
        with _one_line(where):
            module = importlib.import_module(where)
        source = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
        return module, _digest(Path(source)) if source else ""
    file = Path(where).expanduser()
    if not file.is_file():
        raise Expected(f"Expected a file {where}.")
    found = _digest(file)
    spec = importlib.util.spec_from_file_location(f"qleak_imported_{file.stem}_{found}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and typing look their module up
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        with _one_line(where):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent.resolve()))
    return module, found


def _named(module: ModuleType, name: str, where: str) -> Any:
    made: Any = module
    for part in name.split("."):
        if not hasattr(made, part):
            raise Expected(f"Expected {name!r} in {where}.{did_you_mean(part, vars(made))}")
        made = getattr(made, part)
    if not callable(made):
        raise Expected(f"Expected {where}:{name} to be a function or a class, got {type(made).__name__}.")
    return made


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()


@contextlib.contextmanager
def _here() -> Iterator[None]:
    """The working directory is searched for modules, last."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(here)  # the last one, which is ours
        sys.path.reverse()


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever goes wrong in foreign code, as one line."""
    try:
        yield
    except Expected:
        raise
    except Exception as error:
        text = str(error).split("\n")[0]
        raise Expected(f"Expected {what} to run: {type(error).__name__}: {text}") from error

"""The package namespace is the registry: factories are found by module, built from text, and named again.

A *factory* is a function that returns a frozen dataclass with a `spec` field, the call that makes
it again. `build("channels", "uniform(levels=16)")` evaluates literals and nested factory calls
only; nothing else in the text is ever executed. Models may be code of one's own, ``file.py:Net``:
that file is run.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from qleak.check import Expected, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])
ROOMS = {
    "rules": "qleak.train.rules",
    "models": "qleak.models",
    "channels": "qleak.channels",
    "attacks": "qleak.attacks",
    "clients": "qleak.client",
    "evasions": "qleak.train.evasion",
    "critics": "qleak.synth.critics",
    "makers": "qleak.synth.makers",
    "classifiers": "qleak.synth.classifiers",
    "synthesizers": "qleak.synth.methods",
}
INSIDE = {"synthesizers": ("critics", "makers", "channels")}  # rooms whose parts stand inside another room's calls
NAMED = (
    "run",
    "torchvision",
    "timm",
    "imported",
)  # what stands behind their colon is a name: run:ID, torchvision:resnet18


def factory(fn: F) -> F:
    """Marks `fn` as a named factory and writes the call that was made into the result's `spec`."""
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def make(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return replace(fn(*args, **kwargs), spec=f"{fn.__name__}({_arguments(signature, bound.arguments)})")

    make.__factory__ = True  # type: ignore[attr-defined]
    return make  # type: ignore[return-value]


def _arguments(signature: inspect.Signature, values: dict[str, Any]) -> str:
    parts = []
    for name, value in values.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            parts += [_text(item) for item in value]
        else:
            parts.append(f"{name}={_text(value)}")
    return ", ".join(parts)


def _text(value: Any) -> str:
    return getattr(value, "spec", None) or getattr(value, "name", None) or repr(value)


def short(spec: str) -> str:
    """`spec` without the arguments that stand at their factory's default; for tables and titles."""
    tree = ast.parse(spec, mode="eval").body
    return _short(tree)


def _short(node: ast.expr) -> str:
    if not isinstance(node, ast.Call):
        return ast.unparse(node)
    name = ast.unparse(node.func)
    defaults: dict[str, str] = {}
    for room in ROOMS:
        if name in catalog(room):
            known = inspect.signature(catalog(room)[name]).parameters
            if all(k.arg in known for k in node.keywords):  # rooms may share a name, such as adam
                defaults = {p.name: repr(p.default) for p in known.values() if p.default is not p.empty}
    given = [_short(a) for a in node.args]
    given += [f"{k.arg}={_short(k.value)}" for k in node.keywords if defaults.get(str(k.arg)) != ast.unparse(k.value)]
    return f"{name}({', '.join(given)})" if given else name


@functools.cache
def catalog(room: str) -> dict[str, Callable[..., Any]]:
    """Every factory of `room` ("models", "channels", "attacks", "clients") by name, sorted."""
    package = importlib.import_module(ROOMS[room])
    modules = [package]
    if hasattr(package, "__path__"):
        modules = [
            importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)
        ]
    found: dict[str, Callable[..., Any]] = {}
    for module in modules:
        for name, value in vars(module).items():
            if getattr(value, "__factory__", False) and value.__module__ == module.__name__:
                if name in found:
                    raise Expected(f"Expected one factory named {name!r} in {room}, got two.")
                found[name] = value
    return dict(sorted(found.items()))


def build(room: str, text: str) -> Any:
    """The object that `text` names: ``lenet``, ``lenet-mnist``, ``uniform(levels=16)``, ``uniform:16``.

    Raises:
        Expected: the name is unknown (with a suggestion), or the arguments do not fit.
    """
    try:
        node = ast.parse(_normalise(room, text), mode="eval").body
    except SyntaxError:
        raise Expected(f"Expected {room[:-1]} {text!r} to be written like name(key=value, …).") from None
    return _build(room, node, text)


def several(room: str, text: str, every: Sequence[str]) -> tuple[Any, ...]:
    """The objects that `text` names, separated by ";"; "all" stands for `every`.

    Raises:
        Expected: see `build`.
    """
    return tuple(build(room, one) for one in (every if text == "all" else text.split(";")))


def _normalise(room: str, text: str) -> str:
    name, paren, rest = text.strip().partition("(")
    if room == "models" and ":" in text and is_code(text.strip()):  # file.py:Net is short for imported('file.py:Net')
        name, paren, rest = "imported", "(", f"{text.strip()!r})"
    elif not paren and ":" in name:  # uniform:16 is short for uniform(16)
        name, _, rest = name.partition(":")
        rest = repr(rest) if name.strip() in NAMED else rest
        paren, rest = "(", rest + ")"
    return name.replace("-", "_") + paren + rest


def is_code(text: str) -> bool:
    """``folder/file.py:Net``, ``package.module:function``, ``module:Net``, as opposed to ``run:ID`` or ``lenet(…)``."""
    where, _, name = text.rpartition(":")
    first = text.partition(":")[0].replace("-", "_").strip()
    if first in catalog("models") or not all(part.isidentifier() for part in name.split(".")):
        return False
    return where.endswith(".py") or all(part.isidentifier() for part in where.split("."))


def _build(room: str, node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name | ast.Attribute):
        node = ast.Call(func=node, args=[], keywords=[])
    if not isinstance(node, ast.Call):
        raise Expected(f"Expected {room[:-1]} {text!r} to be written like name(key=value, …).")
    name = ast.unparse(node.func).split(".")[-1]
    room = next((r for r in (room, *INSIDE.get(room, ())) if name in catalog(r)), room)
    known = catalog(room)
    if name not in known:
        raise Expected(f"Unknown {room[:-1]} {name!r}.{did_you_mean(name, known)} `qleak ls {room}` lists them.")
    args = [_value(room, a, text) for a in node.args]
    kwargs = {str(k.arg): _value(room, k.value, text) for k in node.keywords}
    try:
        inspect.signature(known[name]).bind(*args, **kwargs)
    except TypeError as error:
        options = inspect.signature(known[name]).parameters
        close = "".join(did_you_mean(k, options) for k in kwargs if k not in options)
        raise Expected(f"Expected {name}({', '.join(options)}): {error}.{close}") from None
    return known[name](*args, **kwargs)


def _value(room: str, node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call):
        return _build(room, node, text)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise Expected(f"Expected plain values in {text!r}, got {ast.unparse(node)!r}.") from None

"""What every plan can do: be named in tables, written as JSON, hashed to an id, read back."""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import Field, field, fields
from typing import Any, ClassVar

from qleak.catalog import build, short
from qleak.check import Expected

SCHEMA = 1
ROOM_OF = {
    "model": "models",
    "client": "clients",
    "channels": "channels",
    "attacks": "attacks",
    "rule": "rules",
    "robust": "evasions",
    "methods": "synthesizers",
    "classifiers": "classifiers",
}


class Written:
    """A frozen dataclass that prints, serialises and has an id: the base of every plan."""

    kind: ClassVar[str]

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values; `from_json` is its inverse."""
        values = {f.name: plain(getattr(self, f.name)) for f in fields(self) if not _silent(self, f)}  # pyright: ignore[reportArgumentType]
        return {"kind": self.kind, "schema": SCHEMA} | values

    def header(self, recipe: str = "", flags: dict[str, Any] | None = None) -> dict[str, Any]:
        """What run.json begins with."""
        return {"kind": self.kind, "plan_id": self.id, "plan": self.as_json(), "recipe": recipe, "flags": flags or {}}

    @property
    def id(self) -> str:
        """Ten hex digits of the plan's content."""
        text = json.dumps(self.as_json(), sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def later(default: Any) -> Any:
    """A field that plans did not always have: written down only where it differs, so that older plans keep their id."""
    return field(default=default, metadata={"later": True})


def _silent(plan: Any, f: Field[Any]) -> bool:
    return "later" in f.metadata and getattr(plan, f.name) == f.default


def read(cls: type, text: dict[str, Any]) -> Any:
    """The plan of class `cls` that `as_json` wrote.

    Raises:
        Expected: the plan is of a kind or schema this version does not know.
    """
    if text.get("kind") != cls.kind or text.get("schema") != SCHEMA:
        article = "an" if cls.kind[0] in "aeiou" else "a"
        raise Expected(
            f"Expected {article} {cls.kind} plan of schema {SCHEMA}, got {text.get('kind')!r} of {text.get('schema')!r}."
        )
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(cls) if f.name in text or "later" not in f.metadata):
        value = text[name]
        if name in ROOM_OF:
            room = ROOM_OF[name]
            if value is not None:
                value = tuple(build(room, v) for v in value) if isinstance(value, list) else build(room, value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def label(spec: str) -> str:
    """A channel's name in tables: what stands inside `chain(…)`, stages joined by ">"; "fp32" for the identity."""
    text = short(spec)
    if text in ("chain", "identity"):
        return "fp32"
    if not text.startswith("chain("):
        return text
    inner = ast.parse(text, mode="eval").body
    assert isinstance(inner, ast.Call)
    return " > ".join(ast.unparse(stage) for stage in inner.args)


def file_name(name: str) -> str:
    """A name from a table as part of a file's: everything but letters and digits becomes a dash."""
    return "".join(ch if ch.isalnum() else "-" for ch in name).strip("-")


def plain(value: Any) -> Any:
    """A field of a plan as JSON: specs for parts, lists for tuples."""
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    if isinstance(value, Written):
        return value.as_json()
    spec = getattr(value, "spec", None)
    if spec == "":
        raise Expected(
            f"Expected a {type(value).__name__.lower()} with a spec, so that the plan can be written down: "
            "make it with a factory, or pass spec=… to from_module."
        )
    return spec if spec is not None else value


def ranges(values: Any) -> str:
    """Numbers for a line of text: "0–5", or "2, 16"."""
    values = list(values)
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}–{values[-1]}"
    return ", ".join(map(str, values[:8])) + (" …" if len(values) > 8 else "")

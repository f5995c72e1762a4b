"""Plans: everything that decides a result, as frozen dataclasses that print, serialise and have an id.

Where it runs (device, workers, memory) is not part of a plan and never changes a number.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, NamedTuple

from qleak.catalog import build, short
from qleak.channels import Channel
from qleak.check import Expected, at_least, between, positive, whole
from qleak.client import gradient
from qleak.types import Attack, Client, Model

SCHEMA = 1
CONTROLS = ("none", "prior-only", "wrong-gradient")


class Lane(NamedTuple):
    """One independent attack: which victim, which restart, whose message, with or without evidence."""

    victim: int
    restart: int
    control: str


class Chunk(NamedTuple):
    """Lanes of one channel and one attack that run together."""

    key: str
    channel: int
    attack: int
    evidence: bool
    lanes: tuple[Lane, ...]


@dataclass(frozen=True)
class Audit:
    """What leaks: every channel × attack × victim × restart, with its controls.

    Attributes:
        model: the network; `model_seed` draws its weights where they are not trained.
        data: a data set by name; `victims` are indices into its training split.
        channels: what stands between the client and the attacker.
        attacks: who looks at it.
        client: what the client computes.
        restarts: dummy starts per victim: one number, or one per victim.
        controls: control lanes per victim and arm (prior-only and wrong-gradient).
        seed: root of every draw.
        success: PSNR in dB from which a reconstruction counts, if it beats both controls as well.
        chunk: lanes that run together; part of the plan because the last ulp depends on it.
        dtype: "float32" or "float64".
        delta: δ at which ε is reported.
    """

    model: Model
    data: str
    victims: tuple[int, ...]
    channels: tuple[Channel, ...]
    attacks: tuple[Attack, ...]
    client: Client = field(default_factory=gradient)
    restarts: int | tuple[int, ...] = 1
    controls: int = 1
    seed: int = 0
    model_seed: int = 0
    success: float = 20.0
    chunk: int = 16
    dtype: str = "float32"
    delta: float = 1e-5

    kind = "audit"

    def __post_init__(self) -> None:
        whole(seed=self.seed, model_seed=self.model_seed, controls=self.controls, chunk=self.chunk)
        at_least(0, seed=self.seed, model_seed=self.model_seed, controls=self.controls)
        at_least(1, chunk=self.chunk, victims=len(self.victims), channels=len(self.channels), attacks=len(self.attacks))
        positive(success=self.success)
        between(0, 1, delta=self.delta)
        if isinstance(self.restarts, tuple) and len(self.restarts) != len(self.victims):
            raise Expected(f"Expected one of restarts={self.restarts} per victim ({len(self.victims)}).")
        for restarts in self.restart_counts():
            whole(restarts=restarts)
            at_least(1, restarts=restarts)
        if len(set(self.victims)) != len(self.victims):
            raise Expected(f"Expected victims={self.victims} without repeats.")
        near = sorted(self.victims)
        if any(b - a < self.client.batch for a, b in pairwise(near)):
            raise Expected(f"Expected victims={self.victims} at least {self.client.batch} apart, the batch size.")
        if self.dtype not in ("float32", "float64"):
            raise Expected(f"Expected dtype={self.dtype!r} to be one of: float32, float64.")

    def restart_counts(self) -> tuple[int, ...]:
        """Restarts of each victim."""
        return self.restarts if isinstance(self.restarts, tuple) else (self.restarts,) * len(self.victims)

    def labels(self) -> list[str]:
        """Channel names for tables, e.g. "fp32", "uniform(bits=8)"."""
        return [label(c.spec) for c in self.channels]

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values; `from_json` is its inverse."""
        return {"kind": self.kind, "schema": SCHEMA} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @property
    def id(self) -> str:
        """Ten hex digits of the plan's content."""
        text = json.dumps(self.as_json(), sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()

    def chunks(self) -> list[Chunk]:
        """All lanes in chunks: per channel and attack first the lanes with evidence, then the prior-only ones."""
        found = []
        for c in range(len(self.channels)):
            for a in range(len(self.attacks)):
                with_ = list(self._lanes(("none", "wrong-gradient"), self.attacks[a].restarts))
                without = list(self._lanes(("prior-only",), self.attacks[a].restarts))
                for name, lanes in (("lanes", with_), ("prior", without)):
                    for start in range(0, len(lanes), self.chunk):
                        some = tuple(lanes[start : start + self.chunk])
                        key = f"{c}-{a}-{name}-{start // self.chunk}"
                        found.append(Chunk(key, c, a, name == "lanes", some))
        return found

    def _lanes(self, controls: tuple[str, ...], random: bool) -> Iterator[Lane]:
        for control in controls:
            if control == "wrong-gradient" and len(self.victims) == 1:
                continue  # there is nobody else's message to take
            for victim, restarts in enumerate(self.restart_counts()):
                number = restarts if control == "none" else self.controls
                for restart in range(number if random else min(number, 1)):
                    yield Lane(victim, restart, control)


Plan = Audit


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


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    spec = getattr(value, "spec", None)
    if spec == "":
        raise Expected(
            f"Expected a {type(value).__name__.lower()} with a spec, so that the plan can be written down: "
            "make it with a factory, or pass spec=… to from_module."
        )
    return spec if spec is not None else value


def from_json(text: dict[str, Any]) -> Plan:
    """The plan that `as_json` wrote.

    Raises:
        Expected: the plan is of a kind or schema this version does not know.
    """
    if text.get("kind") != "audit" or text.get("schema") != SCHEMA:
        raise Expected(
            f"Expected an audit plan of schema {SCHEMA}, got {text.get('kind')!r} of {text.get('schema')!r}."
        )
    rooms = {"model": "models", "client": "clients", "channels": "channels", "attacks": "attacks"}
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(Audit)):
        value = text[name]
        if name in rooms:
            room = rooms[name]
            value = tuple(build(room, v) for v in value) if isinstance(value, list) else build(room, value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return Audit(**values)

"""The study plan: several plans that answer one question together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qleak.check import Expected, at_least
from qleak.plans.audit import Audit
from qleak.plans.base import Written, label
from qleak.plans.training import Training


@dataclass(frozen=True)
class Study(Written):
    """Audits and trainings of the same channels, joined into one frontier; or audits alone, read side by side.

    Attributes:
        names: a name for every part: its folder below the study's.
        parts: the plans, run one after another, each resumable by itself.
    """

    names: tuple[str, ...]
    parts: tuple[Audit | Training, ...]

    kind: ClassVar[str] = "study"

    def __post_init__(self) -> None:
        at_least(1, parts=len(self.parts))
        if len(self.names) != len(self.parts) or len(set(self.names)) != len(self.names):
            raise Expected(f"Expected one name for each of {len(self.parts)} parts, got {self.names}.")

    def labels(self) -> list[str]:
        """Channel names for tables, each once."""
        return list(dict.fromkeys(label(c.spec) for part in self.parts for c in part.channels))

    def lines(self) -> dict[str, str]:
        """The plan in words, for the terminal."""
        found = {}
        differ = len({str(part.lines().get("threat")) for part in self.parts if isinstance(part, Audit)}) > 1
        keys = ("model", "data", "attacks", *(["threat"] if differ else []), "lanes", "training", "seeds")
        for name, part in zip(self.names, self.parts, strict=True):
            said = part.lines()
            found[name] = " · ".join(said[k] for k in keys if k in said)
        return found | {"channels": " · ".join(self.labels())}

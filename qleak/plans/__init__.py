"""Plans: everything that decides a result, as frozen dataclasses that print, serialise and have an id.

Where it runs (device, workers, memory) is not part of a plan and never changes a number.
"""

from __future__ import annotations

from typing import Any

from qleak.plans.audit import CONTROLS, Audit, Chunk, Lane
from qleak.plans.base import SCHEMA, label, read
from qleak.plans.captured import Captured
from qleak.plans.study import Study
from qleak.plans.synthesis import Synthesis
from qleak.plans.training import Member, Training

Plan = Audit | Training | Synthesis | Study | Captured
KINDS: dict[str, type[Plan]] = {
    "audit": Audit,
    "training": Training,
    "synthesis": Synthesis,
    "study": Study,
    "captured": Captured,
}

__all__ = [
    "CONTROLS",
    "KINDS",
    "SCHEMA",
    "Audit",
    "Captured",
    "Chunk",
    "Lane",
    "Member",
    "Plan",
    "Study",
    "Synthesis",
    "Training",
    "from_json",
    "label",
]


def from_json(text: dict[str, Any]) -> Any:
    """The plan that `as_json` wrote, of any kind.

    Raises:
        Expected: the plan is of a kind or schema this version does not know.
    """
    kind = KINDS.get(str(text.get("kind")), Audit)
    if kind is Study:
        text = text | {"parts": [from_json(part) for part in text["parts"]]}
    return read(kind, text)

"""What an engine says while it works."""

from __future__ import annotations

from typing import Any, NamedTuple


class Step(NamedTuple):
    """A job has moved on: `done` of at most `total` steps of its `label`; `text` is its latest number."""

    key: str
    label: str
    done: int
    total: int
    text: str


class Rows(NamedTuple):
    """Rows have been scored and stored."""

    rows: list[dict[str, Any]]


class Finished(NamedTuple):
    """The run is complete."""

    summary: list[dict[str, Any]]


Event = Step | Rows | Finished

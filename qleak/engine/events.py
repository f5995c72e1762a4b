"""What an engine says while it works."""

from __future__ import annotations

from typing import Any, NamedTuple


class Step(NamedTuple):
    """A job has moved on: `done` of at most `total` steps of its `label`; `text` is its latest number.

    Attacks say their own `loss` after so many `closures` of a lane; where they are watched, that of the lane which
    `picture` (uint8 `[h w 3]`, see `looks.small`) shows, a guess at `image`.
    """

    key: str
    label: str
    done: int
    total: int
    text: str
    loss: float | None = None
    closures: int = 0
    picture: Any = None
    image: int = -1


class Rows(NamedTuple):
    """Rows have been scored and stored."""

    rows: list[dict[str, Any]]


class Finished(NamedTuple):
    """The run is complete."""

    summary: list[dict[str, Any]]


Event = Step | Rows | Finished

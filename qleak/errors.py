"""The two errors a user meets, and suggestions. Free of heavy imports, so that the command line starts fast."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Expected(ValueError):
    """A wrong argument, file or flag: one line for the user, exit code 2."""


class Failed(RuntimeError):
    """A run that could not go on for a reason outside its arguments: one line, exit code 1."""


def did_you_mean(value: object, options: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(str(value), list(options), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""

"""The command line. Heavy imports happen inside commands, so that help is instant."""

from __future__ import annotations

import sys

from qleak.errors import Expected, Failed


def main() -> None:
    """Entry point `qleak`.

    Exit codes: 0 done, 1 a failure of the run, 2 wrong usage, 3 a reconstruction above
    `--fail-above`, 130 stopped by Ctrl-C.
    """
    from qleak.cli.app import app

    try:
        app()
    except Expected as error:
        sys.exit(_say(error, 2))
    except Failed as error:
        sys.exit(_say(error, 1))


def _say(error: Exception, code: int) -> int:
    print(f"qleak: {error}", file=sys.stderr)
    return code

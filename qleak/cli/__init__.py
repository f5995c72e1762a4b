"""The command line. Heavy imports happen inside commands, so that help is instant."""

from __future__ import annotations

import sys
import warnings

from qleak.errors import Expected, Failed


def main() -> None:
    """Entry point `qleak`.

    Exit codes: 0 done, 1 a failure of the run, 2 wrong usage, 3 a reconstruction above
    `--fail-above`, 130 stopped by Ctrl-C.
    """
    from qleak.cli.app import app

    quiet = "ignore:`torch.jit:FutureWarning"  # torchvision's own use of torch.jit, not the user's business
    sys.warnoptions.append(quiet)  # for worker processes, which get this one's options
    warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
    try:
        app()
    except Expected as error:
        sys.exit(_say(error, 2))
    except Failed as error:
        sys.exit(_say(error, 1))


def _say(error: Exception, code: int) -> int:
    print(f"qleak: {error}", file=sys.stderr)
    return code

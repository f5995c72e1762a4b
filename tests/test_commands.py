"""Every command of README and docs ends well; the two install lines are CI's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import PAGES, blocks


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "sh"):
            found += [line.split("#")[0].strip() for line in block.splitlines()]
    return [c for c in dict.fromkeys(found) if c and "pip install" not in c and not c.startswith("just ")]


QUICK = ("recipe ls", "ls ", "data ls", "doctor", "--help", "recipe show")
LONG = ("private_digits --dry-run", "--film 24")
"""Those whose like is among the others, and that take most of a minute."""


def tier(command: str):
    if any(q in command for q in QUICK):
        return ()
    return pytest.mark.evidence if any(q in command for q in LONG) else pytest.mark.slow


@pytest.mark.parametrize("command", [pytest.param(c, marks=tier(c)) for c in commands()])
def test_shell_blocks(command, tmp_path):
    words = command.split()
    program = shutil.which("qleak", path=str(Path(sys.executable).parent)) or shutil.which("qleak")
    assert words[0] == "qleak"
    assert program, "the command `qleak` is not installed"
    done = subprocess.run(
        [program, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr


def test_the_pages_have_commands_to_run():
    assert len(commands()) >= 5

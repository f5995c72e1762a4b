"""Workers that are killed in the middle of a message end in one clear line, and so do workers that are stopped amid one."""

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from qleak import pool

LARGE = 4_000_000  # bytes: more than any pipe holds
HALF = struct.pack("!i", LARGE) + bytes(60_000)  # what a kill leaves of it: its length, and as much as the pipe took


class Job(NamedTuple):
    key: str
    where: str


def runner(job):
    """Large progress of one job, and of the other half a message and a kill."""
    if job.where == "large":
        yield bytes(LARGE)
        yield len(job.key)
        return
    yield b"begun"
    yield b"more"
    while job.where == "slow":
        time.sleep(1)
    pipe, lock = pool._progress if job.where == "progress" else answers()
    lock.acquire()  # whoever is killed amid a message holds it, and goes on holding it
    os.write(pipe.fileno(), HALF)
    os.kill(os.getpid(), signal.SIGKILL)
    yield b"never"


def answers():
    """The executor's pipe of results and its lock, in its worker."""
    frame = sys._getframe()
    while "result_queue" not in frame.f_locals:
        frame = frame.f_back
    results = frame.f_locals["result_queue"]
    return results._writer, results._wlock


def main(where):
    jobs = [Job(f"{i}", "large") for i in range(3)] if where == "whole" else [Job("0", "large"), Job("1", where)]
    found = pool.results(jobs, runner, 2)
    for key, event in found:
        print(key, len(event) if isinstance(event, bytes) else f"result {event}", flush=True)
        if where == "slow" and key == "1":
            found.close()


def ran(where):
    """Of `main` in a process of its own, so that a hang ends: (exit code, stdout, stderr)."""
    code = f"import test_pool; test_pool.pool.GRACE = 1; test_pool.main({where!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("where", ["progress", pytest.param("result", marks=pytest.mark.slow)])
def test_a_kill_amid_a_large_message_is_one_clear_failure(where):
    code, _, said = ran(where)
    assert code == 1
    assert (
        said.strip()
        .splitlines()[-1]
        .endswith("A worker process died, probably out of memory. Run the same command with --workers 1.")
    )


@pytest.mark.slow
def test_large_progress_comes_whole():
    """Whole or not at all: progress that is still on its way when the last result is there is left out."""
    code, lines, said = ran("whole")
    assert (code, said) == (0, "")
    whole = {f"{key} {LARGE}" for key in "012"}
    assert {line for line in lines if "result" in line} == {f"{key} result 1" for key in "012"}
    assert set() < {line for line in lines if "result" not in line} <= whole


@pytest.mark.slow
def test_stopping_stops_the_workers():
    start = time.monotonic()
    code, lines, said = ran("slow")
    assert (code, said) == (0, "") and lines[-1].startswith("1 ")
    assert time.monotonic() - start < 50

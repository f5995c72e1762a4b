"""A tiny study, real in every part, and a process that runs it again and again to be killed or refused the disk.

One interpreter that has imported torch forks a child for every line it reads: `MODE SEED FOLDER`. The child works in
FOLDER on the run folder `s`, and says the keys of its rows after `Run.append` has returned: from then on they are safe.
"""

import errno
import os
import resource
import signal
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch

from qleak import engine, pool, store
from qleak.attacks import dlg
from qleak.catalog import build
from qleak.channels import chain, uniform
from qleak.client import gradient
from qleak.errors import Failed
from qleak.plans import Audit, Study, Training

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES)
CALLS = ("mkdir", "open", "write", "fsync", "ftruncate", "replace", "unlink")
VISIBLE = ("mkdir", "open", "write", "ftruncate", "replace", "unlink")  # a kill on either side of fsync looks the same


def study(data="mnist5k", hidden=4):
    net = build("models", f"mlp(channels=1, size=28, hidden=({hidden},))")
    channels, attack = (chain(), chain(uniform(levels=4))), dlg(outer=1, inner=2)
    audit = Audit(net, data, (0, 1), channels, (attack,), chunk=2)
    training = Training(
        net, data, channels[1:], gradient(batch=2), epochs=2, limit=4, seeds=1, test_limit=10, attack_rounds=(2,),
        attacks=(attack,), victims=1,
    )  # fmt: skip
    return Study(("leakage", "accuracy"), (audit, training))


def run(plan, folder):
    with store.open_run(folder, plan.header()) as run:
        for _ in engine.run(plan, run):
            pass


def say(text):
    os.write(saying, f"{text}\n".encode())


saying = 1


def talkative():
    """Appends say what is safe once they have returned."""
    real = store.Run.append

    def append(self, rows):
        rows = list(rows)
        real(self, rows)
        for row in rows:
            real_write(saying, f"safe {self.folder}|{row['key']}\n".encode())

    store.Run.append = append


real_write = os.write
fired: list[int] = []


def hooked(names, act):
    """`act(count, name, real, args, kwargs)` in place of every call of these names that reaches the disk."""
    count = iter(range(10**9))
    for name in names:
        real = getattr(os, name)

        def call(*args, name=name, real=real, **kwargs):
            return act(next(count), name, real, args, kwargs)

        setattr(os, name, call)


def kill_at(nth):
    """SIGKILL in front of the nth call that changes the disk; of a write, after half of its bytes."""

    def act(count, name, real, args, kwargs):
        if count == nth:
            if name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    hooked(VISIBLE, act)


def fail_at(nth, lasting):
    """An OSError at the nth call, its kind by turns; every second write takes half its bytes first.

    With `lasting`, every later call that needs space fails, too, as on a disk that stays full.
    """

    def act(count, name, real, args, kwargs):
        if count == nth or (lasting and count > nth and name in ("write", "mkdir", "open")):
            if name == "write" and nth % 2:
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            if name != "open" or args[1] & os.O_CREAT or not lasting:
                fired.append(count)
                number = ERRORS[nth % len(ERRORS)]
                raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    hooked(CALLS, act)


def remembered():
    """Results of jobs are made once: what is tested is what becomes of them. They are the same in every run."""
    real, known = pool.results, {}

    def results(todo, runner, workers):
        for job in todo:
            key = (runner.__module__, job.key, getattr(job, "saved", b""), str(job.plan))
            if key not in known:
                known[key] = list(real([job], runner, 1))
            yield from known[key]

    pool.results = results


def backwards():
    """A clock that goes back by a day whenever it is asked."""
    told = (datetime(2001, 1, 1, tzinfo=UTC) - timedelta(days=i) for i in range(10**6))
    store.now = engine.audit.now = engine.training.now = engine.study.now = lambda: next(told).isoformat()
    time.time = lambda: next(told).timestamp()


def child(mode, seed, folder, plan):
    os.chdir(folder)
    talkative()
    if mode in ("kill", "fail", "full"):
        os.fsync = lambda file: None  # counted, not waited for: a kill takes nothing from the kernel
    if mode == "kill":
        kill_at(seed)
    elif mode in ("fail", "full"):
        fail_at(seed, mode == "full")
    elif mode == "limit":  # the kernel itself cuts writes short, as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (seed, seed))
    elif mode == "nobody" and os.getuid() == 0:
        os.setuid(65534)
    elif mode == "clock":
        backwards()
        if seed:
            kill_at(seed)
    try:
        run(plan, Path("s"))
        real_write(saying, b"done although refused\n" if fired else b"done\n")
    except Failed as error:
        real_write(saying, f"failed {error}".replace("\n", "\\n").encode() + b"\n")
    except BaseException as error:  # said, not raised: the parent judges
        real_write(saying, f"broken {type(error).__name__} {error}".replace("\n", "\\n").encode() + b"\n")
    os._exit(0)


def main(data, warm):
    torch.set_num_threads(1)
    plan = study(data)
    remembered()
    os.chdir(warm)
    run(plan, Path("s"))
    say("ready")
    for line in sys.stdin:
        mode, seed, folder = line.split(maxsplit=2)
        pid = os.fork()
        if pid == 0:
            say(f"pid {os.getpid()}")
            child(mode, int(seed), folder.strip(), plan)
        os.waitpid(pid, 0)
        say("gone")


if __name__ == "__main__":
    if sys.argv[2] == "once":
        child("plain", 0, sys.argv[3], study(sys.argv[1]))
    main(*sys.argv[1:])

"""Every row exactly once: kills at any moment and at every call, full disks, set-back clocks, folders of older versions."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from killed import ERRORS, study
from tiers import sizes

from qleak import data, folders, store

TESTS = Path(__file__).parent
OLD = TESTS / "stored" / "schema-1"
TIMES = {"cpu_s", "started", "finished", "judge_s"}


class Forker:
    """The process of `killed.py`: each call is a child that runs the study, killed from outside after `delay` seconds."""

    def __init__(self, command, warm):
        (warm / "w").mkdir(parents=True)
        self.process = subprocess.Popen(
            [sys.executable, TESTS / "killed.py", command, warm / "w"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, mode, seed, folder, delay=None):
        self.process.stdin.write(f"{mode} {seed} {folder}\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline().split()[1])
        if delay is not None:
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        said = []
        while (line := self.process.stdout.readline()) != "gone\n":
            said.append(line.strip())
        safe = {tuple(s[5:].split("|", 1)) for s in said if s.startswith("safe ")}
        return safe, next((s for s in said if not s.startswith("safe ")), "killed")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Sixty of MNIST's images in a file of their own: read in a millisecond."""
    some = data.load("mnist5k")
    x, y = (some.x[::84] * 255).byte().numpy(), some.y[::84].numpy()
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    return str(path)


@pytest.fixture(scope="module")
def forker(digits, tmp_path_factory):
    made = Forker(digits, tmp_path_factory.mktemp("warm"))
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.fixture(scope="module")
def whole(forker, tmp_path_factory):
    """The run that nobody interrupted, and how long it took."""
    base = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    _, said = forker("plain", 0, base)
    assert said == "done"
    return content(base / "s"), time.monotonic() - began


def timeless(value):
    """`value` without anything that is a time."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def content(folder):
    """All that a run has stored, without times: headers, rows by key, tensors as bytes, models with their metadata."""
    found = {}
    for each in folders.every(folder):
        name = str(each.relative_to(folder))
        found[name, "header"] = timeless(store.read_run(each))
        found[name, "rows"] = {r["key"]: timeless(r) for r in store.read_rows(each)}
        for path in folders.files(each, (*folders.TENSORS, *folders.MODELS)):
            data = path.read_bytes()
            tensors = safetensors.torch.load(data)
            tensors.pop("cpu_s", None)
            if "history" in tensors:
                tensors["history"] = tensors["history"][..., :-1].clone()  # the last column is cpu_s
            about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")  # in any order
            found[name, path.name] = about, {k: (v.dtype, v.shape, v.numpy().tobytes()) for k, v in tensors.items()}
    return found


def raw(folder):
    """The complete lines of every rows.jsonl, as bytes."""
    return {p: p.read_bytes()[: p.read_bytes().rfind(b"\n") + 1] for p in folder.rglob("rows.jsonl")}


def keys(folder):
    """(folder, key) of every line, doubled ones twice."""
    base = folder.parent
    return [
        (str(p.parent.relative_to(base)), json.loads(line)["key"])
        for p, b in raw(folder).items()
        for line in b.splitlines()
    ]


def check(folder, before, safe):
    """Nothing that was there or said to be safe is lost, no byte of it changed, nothing doubled."""
    after, found = raw(folder), keys(folder)
    assert all(after[p].startswith(b) for p, b in before.items())
    assert safe <= set(found)
    assert len(found) == len(set(found))
    for each in folders.every(folder):
        if each == folder and not (folder / "run.json").exists():
            continue  # killed before there was a run
        assert store.read_run(each)["schema"] == 1
        for path in folders.files(each, (*folders.TENSORS, *folders.MODELS)):
            if path.suffix == ".safetensors":
                safetensors.torch.load_file(path)


def resumed(forker, base, before, safe, whole):
    """The same command ends the run, and it is the run that nobody interrupted."""
    check(base / "s", before, safe)
    before = raw(base / "s")
    again, said = forker("plain", 0, base)
    assert said == "done"
    check(base / "s", before, safe | again)
    assert content(base / "s") == whole[0]
    assert not list(base.rglob("*.part"))


@sizes("step", 7, 1)
def test_a_kill_at_every_call_loses_nothing(tmp_path, forker, whole, step):
    """The process kills itself in front of its 1st, 2nd, … call that changes the disk, and amid every write."""
    kills = range(0, 10**4, step)
    for nth in kills:
        base = tmp_path / str(nth)
        base.mkdir()
        safe, said = forker("kill", nth, base)
        if said == "done":
            break
        assert said == "killed"
        resumed(forker, base, {}, safe, whole)
        shutil.rmtree(base)
    print(f"killed at {kills.index(nth)} of {nth} calls")
    assert nth > 150


@sizes("count", 8, 50)
def test_kills_at_random_moments_lose_nothing(tmp_path, forker, whole, count):
    """SIGKILL from outside, again and again on one folder until its run is done, then on the next."""
    draw, kills, runs, rows = random.Random(0), 0, 0, 0
    while kills < count:
        base, safe, said = tmp_path / str(runs), set(), "killed"
        base.mkdir()
        while said == "killed" and kills < count:
            before = raw(base / "s")
            more, said = forker("plain", 0, base, draw.uniform(0, whole[1]))
            kills += said == "killed"
            safe |= more
            check(base / "s", before, safe)
        resumed(forker, base, raw(base / "s"), safe, whole)
        runs, rows = runs + 1, rows + len(keys(base / "s"))
    print(f"{kills} kills over {runs} runs of {rows} rows: 0 lost, 0 doubled")


@sizes("step", 9, 1)  # odd: each of the four errors in turn
@pytest.mark.parametrize(("mode", "times"), [("fail", 1), ("full", 5)])
def test_a_disk_that_refuses_any_call_loses_nothing(tmp_path, forker, whole, mode, times, step):
    """ENOSPC, EIO, EROFS, EACCES by turns at every call, or from some call on: one line, and the run goes on later."""
    refused = harmless = 0
    for nth in range(0, 10**4, step * times):
        base = tmp_path / str(nth)
        base.mkdir()
        safe, said = forker(mode, nth, base)
        if said == "done":
            break
        refused += 1
        if said == "done although refused":  # of a folder that is there already, nothing was needed
            harmless += 1
        else:
            assert said.startswith("failed Expected to read and write ")
            assert os.strerror(ERRORS[nth % 4]) in said
            assert "\\n" not in said
        resumed(forker, base, {}, safe, whole)
        shutil.rmtree(base)
    print(f"{mode}: refused at {refused} calls, {harmless} of them harmless")
    assert nth > 250
    assert harmless < refused / 10


@pytest.mark.slow
@pytest.mark.parametrize("limit", [50, 500, 2000, 3000, 8000, 16000])
def test_a_size_limit_of_the_kernel_loses_nothing(tmp_path, forker, whole, limit):
    safe, said = forker("limit", limit, tmp_path)
    assert said.startswith("failed ")
    assert "File too large" in said
    resumed(forker, tmp_path, {}, safe, whole)


@pytest.mark.slow
def test_a_folder_without_the_right_to_write(tmp_path, forker, whole):
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    forker("kill", 90, tmp_path)
    modes = {p: p.stat().st_mode for p in (tmp_path / "s").rglob("*")} | {tmp_path / "s": 0o755}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    _, said = forker("nobody", 0, tmp_path)
    assert "got Permission denied: mend that or choose another --out" in said
    for path, mode in modes.items():
        path.chmod(mode)
    resumed(forker, tmp_path, {}, set(), whole)


@pytest.mark.slow
def test_a_clock_that_goes_back_changes_nothing(tmp_path, forker, whole):
    safe, said = forker("clock", 100, tmp_path)
    assert said == "killed"
    before = raw(tmp_path / "s")
    more, said = forker("clock", 0, tmp_path)
    assert said == "done"
    check(tmp_path / "s", before, safe | more)
    assert content(tmp_path / "s") == whole[0]
    header = store.read_run(tmp_path / "s")
    assert header["finished"] < header["started"]


FULL = """
set -e
mount -t tmpfs -o size={size}k tmpfs {room}
{python} {killed} {digits} once {room} > {out}/first
mount -o remount,ro {room}
{python} {killed} {digits} once {room} > {out}/second
mount -o remount,rw,size=40m {room}
cp -r {room}/s {out}/before
{python} {killed} {digits} once {room} > {out}/third
cp -r {room}/s {out}/s
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full_and_then_read_only(tmp_path, digits, whole):
    """A memory disk of 120 kB, read-only afterwards, then large enough."""
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", tmp_path]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs rights this user has not")
    room, out = tmp_path / "room", tmp_path / "out"
    room.mkdir()
    out.mkdir()
    killed = TESTS / "killed.py"
    script = FULL.format(size=120, room=room, out=out, python=sys.executable, killed=killed, digits=digits)
    subprocess.run(["unshare", "-m", "sh", "-c", script], check=True)
    said = [(out / name).read_text().splitlines() for name in ("first", "second", "third")]
    assert "No space left on device" in said[0][-1]
    assert "Read-only file system" in said[1][-1]
    assert all(lines[-1].startswith("failed Expected to read and write") for lines in said[:2])
    assert said[2][-1] == "done"
    safe = {tuple(line[5:].split("|", 1)) for line in said[0] + said[2] if line.startswith("safe ")}
    check(out / "s", {out / "s" / p.relative_to(out / "before"): b for p, b in raw(out / "before").items()}, safe)
    assert content(out / "s") == whole[0]


# --- the command itself, with worker processes ----------------------------------------------------

RECIPE = '''
"""A tiny study, from the command line."""

import sys

sys.path.insert(0, {tests!r})
from killed import study


def tiny(data: str = ""):
    """The plan."""
    return study(data)
'''


def children(pid):
    """Every process below `pid`, whatever it does."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    parents = {int(p): (int(pp), args) for p, pp, args in (line.split(None, 2) for line in found.splitlines())}
    mine, more = {pid}, {pid}
    while more:
        more = {p for p, (parent, _) in parents.items() if parent in more} - mine
        mine |= more
    return {p: parents[p][1] for p in mine - {pid} if p in parents}


@sizes("targets", ("worker",), ("command", "worker", "group"))
def test_kills_of_the_command_its_workers_and_its_group(tmp_path, digits, targets, qleak):
    """`qleak recipe run` with two workers: SIGKILL to one process or all, then the same command ends the run."""
    (tmp_path / "tiny.py").write_text(RECIPE.format(tests=str(TESTS)))
    program = shutil.which("qleak", path=str(Path(sys.executable).parent)) or shutil.which("qleak")

    def begin(name):
        base = tmp_path / name
        base.mkdir(exist_ok=True)
        words = ["--data", digits, "--workers", "2", "--bounds", "no", "--quiet"]
        command = [program, "recipe", "run", "../tiny.py", *words]
        return base, subprocess.Popen(command, cwd=base, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def end(base):
        _, process = begin(base.name)
        said = process.communicate()[1]
        assert process.returncode == 0, said
        return next((base / "runs").iterdir())

    words = ["--data", digits, "--workers", "1", "--bounds", "no", "--quiet"]
    assert qleak("recipe", "run", "./tiny.py", *words)[0] == 0  # one process, which nobody kills
    (first,) = (tmp_path / "runs").iterdir()
    expected = {k: v for k, v in content(first).items() if k[1] != "header"}
    summary = timeless(store.read_run(first)["summary"])
    draw, orphans = random.Random(1), set()
    for i, target in enumerate(targets):
        base, process = begin(f"{target}-{i}")
        while not list(base.glob("runs/*/leakage/run.json")) and process.poll() is None:
            time.sleep(0.01)
        workers = {p for p, args in children(process.pid).items() if "forkserver" in args}
        while target == "worker" and process.poll() is None and len(workers) < 2:
            workers = {p for p, args in children(process.pid).items() if "forkserver" in args}
        time.sleep(draw.uniform(0, 0.1))
        orphans |= set(children(process.pid))
        before = {base / p.relative_to(base): b for p, b in raw(base).items()}
        if target == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            victim = process.pid if target == "command" else max(workers | {0}) or process.pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
        if target == "worker":
            assert process.returncode in (0, 1, -9), said  # 0: it had just done its work
            assert process.returncode != 1 or said.startswith("qleak: A worker process died"), said
        folder = end(base)
        check(folder, before, set())
        found = {k: v for k, v in content(folder).items() if k[1] != "header"}
        assert found == expected
        assert timeless(store.read_run(folder)["summary"]) == summary
    patience = time.monotonic() + 15
    while any(Path(f"/proc/{p}").exists() for p in orphans) and time.monotonic() < patience:
        time.sleep(0.2)
    assert not {p for p in orphans if Path(f"/proc/{p}").exists()}  # nobody outlives the command


# --- older versions -------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the stored study, at the place it was made at."""
    shutil.copytree(OLD, tmp_path / "schema-1")
    monkeypatch.chdir(tmp_path)
    return Path("schema-1")


def close(a, b):
    """Equal, numbers up to what another processor rounds differently."""
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, rel=1e-3, abs=1e-5)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(close, a, b)) if isinstance(a, list) and isinstance(b, list) else a == b


def portable(rows):
    """Rows without what another processor's last digits change: the digest of trained weights, and the id that holds it."""
    found = {}
    for key, row in rows.items():
        model = re.sub("digest='[0-9a-f]+'", "", row["model"])
        found[key] = {**row, "model": model, "id": row["id"] if model == row["model"] else ""}
    return found


def test_an_old_run_is_read_and_reported(old):
    from qleak.report import html, terminal

    for each, rows in (
        (old, 0),
        (old / "leakage", 12),
        (old / "accuracy", 7),
        (old / "accuracy/audits/0-0-round-2", 4),
    ):
        assert store.read_run(each)["schema"] == 1
        assert len(store.read_rows(each)) == rows
    for each in (old, old / "leakage", old / "accuracy"):
        assert html.write(each, each / "report.html").stat().st_size > 10_000
        terminal.show(each)


def test_an_old_run_that_is_done_is_left_as_it_is(old):
    from killed import run

    before = {p: p.read_bytes() for p in old.rglob("*") if p.is_file() and p.name != "run.json"}
    run(study(hidden=1), old)
    assert {p: p.read_bytes() for p in before} == before
    assert store.read_run(old)["plan_id"] == study(hidden=1).id  # plans keep their id


def test_the_rows_of_an_old_run_come_out_again(old):
    """Stopped in its middle and resumed, and run anew from its own plan: the rows of then."""
    from killed import run

    from qleak.plans import from_json

    def read():
        return {each: portable({r["key"]: timeless(r) for r in store.read_rows(each)}) for each in folders.every(old)}

    rows = read()
    for name, kept in (("leakage", 4), ("accuracy", 2)):
        path = old / name / "rows.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]) + b'{"key": "torn')
        header = store.read_run(old / name) | {"status": "running"}
        (old / name / "run.json").write_text(json.dumps(header))
        for path in [*(old / name).glob("tensors/chunk-1-*"), *(old / name).glob("tensors/state-*")]:
            path.unlink()
    run(from_json(store.read_run(old)["plan"]), old)
    again = read()
    assert close({str(k): v for k, v in again.items()}, {str(k): v for k, v in rows.items()})
    changed = rows[old / "leakage"] | {"0-0-none-0-0": rows[old / "leakage"]["0-0-none-0-0"] | {"psnr": 99.0}}
    assert not close(again[old / "leakage"], changed)  # and the comparison sees a changed number


def test_a_header_of_a_later_version_with_unknown_fields_is_read(old):
    header = store.read_run(old / "leakage") | {"something": {"new": 1}}
    (old / "leakage" / "run.json").write_text(json.dumps(header))
    with store.open_run(old / "leakage", header) as run:
        run.update(status="done")
    assert store.read_run(old / "leakage")["something"] == {"new": 1}


# --- what the sweeps have found -------------------------------------------------------------------


def header(**more):
    return {"kind": "audit", "plan_id": "a", **more}


def test_starting_over_is_finished_by_whoever_comes_next(tmp_path, monkeypatch):
    """Killed amid --fresh: neither half of the old run is taken for the new one."""
    for nth in range(100):
        folder = tmp_path / str(nth)
        for each in (folder, folder / "part"):
            with store.open_run(each, header()) as run:
                run.save("x", {})
                run.file("bounds.jsonl", b"{}")
                run.model("models/m", {}, {})
                run.append([{"key": "a"}])
                run.update(status="done", bounds=1)
        calls = iter(range(10**6))
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "rename"):
                real = getattr(os, name)

                def call(*args, real=real, calls=calls, nth=nth, **kwargs):
                    if next(calls) == nth:
                        raise SystemExit
                    return real(*args, **kwargs)

                patch.setattr(os, name, call)
            try:
                store.open_run(folder, header(), fresh=True).close()
            except SystemExit:
                pass
            else:
                break
        with store.open_run(folder, header()) as run:
            done = run.header.get("status") == "done"
            assert (
                done
                == bool(run.rows())
                == run.has("x")
                == run.holds("models/m.safetensors")
                == ("bounds" in run.header)
            )
        with store.open_run(folder / "part", header()) as run:
            assert (run.header.get("status") == "done") == bool(run.rows()) == run.has("x")
    assert nth > 8


def test_tensors_of_no_plan_are_not_taken_over(tmp_path):
    with store.open_run(tmp_path, header()) as run:
        run.save("victims", {})
    (tmp_path / "run.json").unlink()
    with pytest.raises(store.folders.Expected, match="found tensors of no plan"):
        store.open_run(tmp_path, header())


def test_a_disk_that_stumbles_once_is_not_an_empty_folder(tmp_path, monkeypatch):
    """An I/O error while reading must not look like a run without rows: those would be cut off."""
    with store.open_run(tmp_path, header()) as run:
        run.append([{"key": "a"}])
    real = Path.read_bytes

    def stumbling(path):
        if path.name in ("rows.jsonl", "run.json"):
            raise OSError(5, "Input/output error")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stumbling)
        with pytest.raises(store.folders.disk.Failed, match="Input/output error"):
            store.open_run(tmp_path, header())
    assert store.read_rows(tmp_path) == [{"key": "a"}]


def test_a_lock_of_a_removed_folder_is_none(tmp_path, monkeypatch):
    """Another process removes the folder between opening its lock and taking it: two writers could hold "the" lock."""
    import fcntl

    real = fcntl.lockf

    def late(*args):
        (tmp_path / ".lock").unlink()
        return real(*args)

    monkeypatch.setattr(fcntl, "lockf", late)
    with pytest.raises(store.folders.disk.Failed, match="has just removed"):
        store.open_run(tmp_path, header())


def test_an_error_goes_with_the_failure(tmp_path):
    with store.open_run(tmp_path, header()) as run:
        run.update(status="failed", error="Failed: no space")
        assert run.header["error"]
        run.update(status="running")
        assert "error" not in run.header


def test_a_page_is_all_there_or_as_it_was(old):
    """The kernel cuts report.html short: one line, the old page stays, nothing is left behind."""
    from qleak.report import html

    page = html.write(old / "leakage", old / "leakage" / "report.html")
    before = page.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(store.folders.disk.Failed, match="File too large"):
            html.write(old / "leakage", page)
        with store.open_run(old / "leakage", store.read_run(old / "leakage")) as run:
            for write in (
                lambda: run.file("bounds.jsonl", b"x" * 9000),
                lambda: run.file("samples/a/b.npz", b"x" * 9000),
            ):
                with pytest.raises(store.folders.disk.Failed, match="File too large"):
                    write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert page.read_bytes() == before
    assert not list(old.rglob(".*part"))


def test_two_names_in_one_second_are_two_folders(tmp_path, monkeypatch):
    """--name NAME twice within a second, or after the clock was set back: no run is taken for another."""
    from qleak.cli import run as command

    class Frozen(command.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2001, 1, 1)

    monkeypatch.setattr(command, "datetime", Frozen)
    common = command.Common(name="mine", out=tmp_path, fresh=True)
    found = []
    for _ in range(3):
        found.append(command._folder(common, "r", study(hidden=1)))
        found[-1].mkdir()
    assert len(set(found)) == 3

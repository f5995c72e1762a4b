"""Whatever was reported as done is still there: after kill -9, a full disk, a second writer, a bad line."""

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import qleak
from qleak.check import Expected, Failed
from qleak.store import list_runs, open_run, read_rows, read_run, read_tensors

HEADER = {"kind": "audit", "plan_id": "abc123"}
ROOT = Path(next(iter(qleak.__path__))).parent


def row(i, **more):
    return {"key": f"r{i}", "psnr": 20.5 + i, **more}


def opened(folder, **options):
    return open_run(folder, HEADER, **options)


def filled(folder, count=3):
    with opened(folder) as run:
        for i in range(count):
            run.save(f"r{i}", {"x": torch.full((2, 3), float(i))})
            run.append([row(i)])
    return folder


# --- the plain life of a run ----------------------------------------------------------------------


def test_a_run_is_continued(tmp_path):
    folder = tmp_path / "runs" / "a"
    with open_run(folder, {**HEADER, "started": 1}) as run:
        assert (run.resumed, run.warning, run.rows(), run.done()) == (False, "", [], set())
        run.append([row(0), row(1)])
        run.update(status="running")
    with open_run(folder, {**HEADER, "started": 2}) as run:
        assert (run.resumed, run.warning) == (True, "")
        assert run.done() == {"r0", "r1"}
        assert run.header == {"schema": 1, **HEADER, "started": 1, "status": "running"}
        run.append([row(2)])
        assert run.rows() == [row(0), row(1), row(2)]
    assert read_rows(folder) == [row(0), row(1), row(2)]
    assert read_run(folder)["status"] == "running"
    assert list_runs(tmp_path / "runs") == [folder]
    assert list_runs(tmp_path / "nowhere") == []


def test_a_row_is_written_once(tmp_path):
    with opened(tmp_path / "a") as run:
        run.append([row(0), row(0, again=True)])
        run.append([row(0, again=True), row(1)])
        run.append([])
    with opened(tmp_path / "a") as run:
        run.append([row(1, again=True)])
        assert run.rows() == [row(0), row(1)]
    assert (tmp_path / "a" / "rows.jsonl").read_text().count("\n") == 2


def test_numbers_json_does_not_know_become_null(tmp_path):
    with opened(tmp_path / "a") as run:
        run.append([row(0, loss=math.nan, curve=(1.0, [math.inf]), deep={"low": -math.inf})])
        run.update(best=math.nan)
        expected = row(0, loss=None, curve=[1.0, [None]], deep={"low": None})
        assert run.rows() == [expected]  # as a resumed run will read it
        assert run.header["best"] is None
    assert read_rows(tmp_path / "a") == [expected]
    for name in ("rows.jsonl", "run.json"):
        assert "NaN" not in (tmp_path / "a" / name).read_text()


def test_tensors_come_back_whatever_their_strides(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tree = {
        "t": base.T,
        "row": base[1],
        "same": base[1],
        "int": torch.tensor(3),
        "none": torch.empty(0, 2),
        "half": base.half(),
    }
    with opened(tmp_path / "a") as run:
        for key in ("plain", "chunk-3/fp32 ü", "..", ""):
            assert not run.has(key)
            run.save(key, tree)
            assert run.has(key)
            for back in (run.load(key), read_tensors(tmp_path / "a", key)):
                assert set(back) == set(tree)
                assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tree.items())
        run.save("plain", {})
        assert run.load("plain") == {}
    assert {p.parent for p in tmp_path.rglob("*.safetensors")} == {tmp_path / "a" / "tensors"}
    assert not list(tmp_path.rglob("*.part"))


def test_fresh_forgets_the_run_and_nothing_else(tmp_path):
    folder = filled(tmp_path / "a")
    (folder / "notes.txt").write_text("mine")
    (folder / "rows.jsonl").write_bytes(b"broken\nbroken\n")
    with open_run(folder, {**HEADER, "plan_id": "other"}, fresh=True) as run:
        assert (run.resumed, run.rows(), run.has("r0")) == (False, [], False)
    assert read_run(folder)["plan_id"] == "other"
    assert (folder / "notes.txt").read_text() == "mine"


# --- what cannot be opened ------------------------------------------------------------------------


def test_another_plan_is_not_mixed_in(tmp_path):
    folder = filled(tmp_path / "a")
    with pytest.raises(
        Expected, match=r"to hold plan zzz, found abc123: choose another --out or --name, .* --fresh\.$"
    ):
        open_run(folder, {**HEADER, "plan_id": "zzz"})
    opened(folder).close()  # and the failed opening has let go of the lock


def test_rows_without_a_plan_are_not_taken_over(tmp_path):
    folder = filled(tmp_path / "a")
    (folder / "run.json").unlink()
    with pytest.raises(Expected, match="found rows of no plan"):
        opened(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": "1"}', "\x00\x00"])
def test_a_damaged_header_is_named(tmp_path, text):
    folder = filled(tmp_path / "a")
    (folder / "run.json").write_text(text)
    for read in (read_run, opened):
        with pytest.raises(
            Expected, match=r"run\.json to be one JSON object with a schema: repair it, or .* --fresh\.$"
        ):
            read(folder)


def test_a_newer_schema_is_left_alone(tmp_path):
    folder = filled(tmp_path / "a")
    (folder / "run.json").write_text(json.dumps({**HEADER, "schema": 2}))
    with pytest.raises(Expected, match="schema <= 1, got 2: update qleak"):
        opened(folder)


@pytest.mark.parametrize("header", [{}, {"kind": "audit"}, {"kind": "audits", "plan_id": "a"}, {"plan_id": "a"}])
def test_a_header_needs_its_kind_and_plan(tmp_path, header):
    with pytest.raises(Expected):
        open_run(tmp_path / "a", header)
    assert not (tmp_path / "a").exists()


def test_missing_things_are_named(tmp_path):
    folder = filled(tmp_path / "a")
    with pytest.raises(Expected, match="found none"):
        read_run(tmp_path / "b")
    with pytest.raises(Expected, match="tensors of 'r9'"):
        read_tensors(folder, "r9")
    (folder / "tensors" / "r0.safetensors").write_bytes(b"half")
    with pytest.raises(Expected, match="whole safetensors file"):
        read_tensors(folder, "r0")
    with opened(folder) as run, pytest.raises(Expected, match="key of type str, got key=None"):
        run.append([{"psnr": 1.0}])


# --- damaged rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tail", [b'{"key": "r3", "psn', b'{"key": "r3"}', b"\x00" * 100, b"\xff\xfe", b"garbage\n", b"\n", b"{}\n"]
)
def test_a_torn_tail_is_dropped(tmp_path, tail):
    folder = filled(tmp_path / "a")
    with (folder / "rows.jsonl").open("ab") as file:
        file.write(tail)
    assert read_rows(folder) == [row(0), row(1), row(2)]  # a reader beside a live writer sees this often
    with opened(folder) as run:
        assert run.warning == (
            f"Dropped an unfinished last line ({len(tail)} bytes) of {folder / 'rows.jsonl'}; its row is made again."
        )
        assert run.rows() == [row(0), row(1), row(2)]
        assert (folder / "rows.jsonl").read_bytes().endswith(b"}\n")  # gone at once, for readers of other kinds
        run.append([row(3)])
    with opened(folder) as run:
        assert (run.warning, run.rows()) == ("", [row(0), row(1), row(2), row(3)])


def test_every_cut_of_the_file_is_valid(tmp_path):
    folder = filled(tmp_path / "a")
    data = (folder / "rows.jsonl").read_bytes()
    for cut in range(len(data) + 1):
        (folder / "rows.jsonl").write_bytes(data[:cut])
        with opened(folder) as run:
            assert len(run.rows()) == data[:cut].count(b"\n")
            assert bool(run.warning) == (cut > 0 and data[cut - 1 : cut] != b"\n")


@pytest.mark.parametrize("bad", [b"garbage", b"", b"[1]", b'{"psnr": 3}', b'{"key": 7}', b"\xff"])
def test_a_corrupt_middle_is_named_and_kept(tmp_path, bad):
    folder = filled(tmp_path / "a")
    lines = (folder / "rows.jsonl").read_bytes().split(b"\n")
    lines[1] = bad
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    for read in (read_rows, opened):
        with pytest.raises(
            Expected, match=r"Expected line 2 of .*rows\.jsonl to be .* delete that line, or .* --fresh\.$"
        ):
            read(folder)
    assert (folder / "rows.jsonl").read_bytes() == b"\n".join(lines)


def test_a_save_is_durable_in_the_only_right_order(tmp_path, monkeypatch):
    """Content before name, and the name itself: what a power cut would find. No test can cut the power."""
    calls = []
    with opened(tmp_path / "a") as run:
        for name in ("write", "fsync", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
        run.save("x", {})
        assert calls == ["write", "fsync", "replace", "fsync"]
        calls.clear()
        run.append([row(0), row(1)])
        assert calls == ["write", "fsync"]


# --- the disk refuses -----------------------------------------------------------------------------


@contextmanager
def failing(monkeypatch, nth, short=False):
    """The `nth` call that reaches the disk says ENOSPC; with `short`, a write takes half its bytes first."""
    calls = iter(range(10**6))

    def faulty(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            if next(calls) == nth:
                if short and name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "open", "write", "fsync", "ftruncate", "replace"):
            patch.setattr(os, name, faulty(name))
        yield


@pytest.mark.parametrize("short", [False, True])
def test_a_disk_that_fails_at_any_call_loses_nothing(tmp_path, monkeypatch, short):
    """Fault sweep: the 1st, 2nd, … call fails; what was reported stays, and the same command ends the run."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # counted, not waited for

    def work(run, reported):
        for i in range(3):
            run.save(f"r{i}", {"x": torch.full((2, 3), float(i))})
            run.append([row(i)])
            reported.add(f"r{i}")
        run.update(status="done")

    for nth in range(200):
        folder, reported = tmp_path / str(nth), set()
        try:
            with failing(monkeypatch, nth, short), opened(folder) as run:
                work(run, reported)
        except Failed as error:
            assert "No space left on device" in str(error) and "\n" not in str(error)
        else:
            break
        assert reported <= {r["key"] for r in read_rows(folder)}
        assert all(read_tensors(folder, r["key"]) for r in read_rows(folder))
        with opened(folder) as run:
            assert reported <= run.done()
            work(run, set())
        assert read_rows(folder) == [row(i) for i in range(3)]
        assert read_run(folder)["status"] == "done"
    assert nth > 30  # the sweep has reached every kind of call


def test_a_run_that_goes_on_after_a_failed_write_stays_whole(tmp_path, monkeypatch):
    with opened(tmp_path / "a") as run:
        run.append([row(0)])
        for nth in range(1, 3):  # 0 is ftruncate
            with failing(monkeypatch, nth, short=True), pytest.raises(Failed):
                run.append([row(1)])
            assert run.done() == {"r0"}
        run.append([row(2)])
    assert read_rows(tmp_path / "a") == [row(0), row(2)]


def test_a_real_size_limit(tmp_path):
    """The kernel itself cuts a write short at RLIMIT_FSIZE, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path / "a") as run:
        run.append([row(0)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(Failed, match="File too large"):
                run.append([row(1, text="x" * 100_000)])
            assert (tmp_path / "a" / "rows.jsonl").stat().st_size == 50_000  # a torn tail, really
            with pytest.raises(Failed, match="File too large"):
                run.save("r1", {"x": torch.zeros(100_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not run.has("r1")
        assert read_rows(tmp_path / "a") == [row(0)]
        run.append([row(1)])
    assert read_rows(tmp_path / "a") == [row(0), row(1)]


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "runs" / "a"):
        with pytest.raises(Failed, match=r"got (File exists|Not a directory): mend that or choose another --out"):
            opened(folder)
        with pytest.raises(Expected, match="found none"):
            read_run(folder)


# --- several processes ----------------------------------------------------------------------------

# One interpreter that has imported torch forks a writer for every line it reads, and waits for its end.
FORKER = """
import os, sys, time
from pathlib import Path
import torch
from qleak.store import open_run

def say(text):
    os.write(1, f"{text}\\n".encode())

def careful(run):
    for i in range(len(run.done()), 10**6):
        run.save(f"r{i}", {"x": torch.full((50,), float(i))})
        run.append([{"key": f"r{i}", "text": "x" * (500 * (i % 40))}])
        say(f"r{i}")

def careless(run):
    buffered = (run.folder / "rows.jsonl").open("a")
    for i in range(10**6):
        buffered.write('{"key": "r%d"}\\n' % i)
        say(f"r{i}")

def idle(run):
    worker = os.fork()  # a worker of the run, which outlives its parent
    if worker:
        say(worker)
    time.sleep(60)

for line in sys.stdin:
    mode, folder = line.split(maxsplit=1)
    pid = os.fork()
    if pid == 0:
        say(os.getpid())
        with open_run(Path(folder.strip()), {"kind": "audit", "plan_id": "abc123"}) as run:
            {"careful": careful, "careless": careless, "idle": idle}[mode](run)
    os.waitpid(pid, 0)
    say("gone")
"""


@pytest.fixture(scope="module")
def forker():
    command = [sys.executable, "-c", FORKER]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    yield child
    child.kill()
    child.communicate()


@contextmanager
def writer(forker, mode, folder):
    """A real process that has `folder` open: its pid, and what it has reported; killed on leaving."""
    forker.stdin.write(f"{mode} {folder}\n")
    forker.stdin.flush()
    pid = int(forker.stdout.readline())
    reported = [forker.stdout.readline().strip()]
    try:
        yield pid, reported
    finally:
        os.kill(pid, signal.SIGKILL)
        while (line := forker.stdout.readline()) != "gone\n":
            reported.append(line.strip())


def test_kill_9_at_any_moment_loses_nothing(tmp_path, forker):
    folder, all_reported = tmp_path / "a", []
    for i in range(15):
        with writer(forker, "careful", folder) as (_, reported):
            time.sleep(0.001 * i)
        all_reported += reported
        rows = read_rows(folder)
        assert set(all_reported) <= {r["key"] for r in rows}
        with opened(folder) as run:  # the lock has died with its process
            assert run.rows() == rows
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [r["key"] for r in lines] == [f"r{i}" for i in range(len(lines))]  # none lost, none doubled
    assert len(set(all_reported)) == len(all_reported) >= 15
    assert all(float(read_tensors(folder, r["key"])["x"][0]) == int(r["key"][1:]) for r in lines)


def test_the_kill_test_catches_a_writer_that_reports_too_early(tmp_path, forker):
    lost = []
    for i in range(5):  # once in a while its buffer has just been written out
        with writer(forker, "careless", tmp_path / str(i)) as (_, reported):
            time.sleep(0.01)
        lost.append(not set(reported) <= {r["key"] for r in read_rows(tmp_path / str(i))})
    assert any(lost)


def test_one_writer_at_a_time_and_the_lock_dies_with_it(tmp_path, forker):
    with writer(forker, "idle", tmp_path / "a") as (pid, reported):
        with pytest.raises(Failed, match=rf"another process \(pid {pid}\) is writing .*: wait for it, or choose"):
            opened(tmp_path / "a")
        assert read_run(tmp_path / "a")["plan_id"] == "abc123"  # readers need no lock
    worker = int(reported[0])
    try:
        with opened(tmp_path / "a") as run:  # although a forked worker lives on
            os.kill(worker, 0)
            run.append([row(0)])
    finally:
        os.kill(worker, signal.SIGKILL)


def test_one_writer_within_a_process(tmp_path):
    (tmp_path / "b").mkdir()
    with opened(tmp_path / "a") as run:
        with pytest.raises(Failed, match=rf"this process \(pid {os.getpid()}\) is writing"):
            opened(tmp_path / "b" / ".." / "a")
        run.append([row(0)])
        run.close()
        run.close()
    opened(tmp_path / "a").close()

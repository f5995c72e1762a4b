"""Work spread over executors: threads, processes, a dask cluster whose workers are killed. The numbers stay the same."""

import asyncio
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from concurrent.futures.thread import BrokenThreadPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from tiers import sizes

from qleak import cluster, data, engine, executors, machine, pool, store
from qleak.attacks import adaptive
from qleak.catalog import build
from qleak.channels import chain, sign, stochastic
from qleak.client import gradient
from qleak.errors import Expected, Failed
from qleak.plans import Audit, Study, Training

NET = "mlp(channels=1, size=28, hidden=(8,))"


@pytest.fixture(scope="module", autouse=True)
def digits(tmp_path_factory):
    """Real digits in a file that loads fast, on every worker, too."""
    global DIGITS
    some, path = data.load("mnist5k"), tmp_path_factory.mktemp("data") / "digits.npz"
    x, y = some.x[::25].squeeze(1).numpy(), some.y[::25].numpy()
    np.savez(path, x_train=x[:160], y_train=y[:160], x_test=x[160:], y_test=y[160:])
    DIGITS = str(path)


DIGITS = ""


def audit(images=2, steps=5, **more):
    channels, attacks = (chain(), chain(sign())), (adaptive(stages=2, steps=steps, last=steps),)
    return Audit(build("models", NET), DIGITS, tuple(range(images)), channels, attacks, **more)


def training(**more):
    channels = (chain(), chain(stochastic(levels=4)))
    return Training(
        build("models", NET), DIGITS, channels, gradient(batch=50), epochs=3, limit=100, **{"seeds": 2, **more}
    )


def study():
    return Study(("leakage", "accuracy"), (audit(images=1), training(seeds=1)))


@pytest.fixture(scope="module")
def here(tmp_path_factory, digits):
    """A study that was run in this process."""
    folder = tmp_path_factory.mktemp("runs") / "here"
    ran(study(), folder)
    return folder


def ran(plan, folder, workers=1):
    """The events of a whole run."""
    with store.open_run(folder, plan.header()) as run:
        return list(engine.run(plan, run, "cpu", workers))


def held(folder):
    """(rows by key, tensors by file and name) of a run and those below it, without what a clock said."""
    rows, tensors = {}, {}
    for path in sorted(folder.rglob("rows.jsonl")):
        lines = path.read_text().splitlines()
        found = {r["key"]: r for r in store.read_rows(path.parent)}
        assert len(lines) == len(found), f"a row twice in {path}"
        where = str(path.parent.relative_to(folder))
        rows |= {(where, key): {k: v for k, v in row.items() if k != "cpu_s"} for key, row in found.items()}
        for file in sorted((path.parent / "tensors").glob("*.safetensors")):
            for name, value in store.read_tensors(path.parent, file.stem).items():
                value = value[..., :-1] if name == "history" else value  # its last column is CPU seconds
                if name != "cpu_s":
                    tensors[where, file.stem, name] = value
    return rows, tensors


def same(a, b):
    """Whether two runs hold the same rows and, bit for bit, the same tensors."""
    (rows, tensors), (other, others) = held(a), held(b)
    assert rows
    assert tensors
    assert rows == other
    assert tensors.keys() == others.keys()
    return all(torch.equal(v.nan_to_num(7.0), others[k].nan_to_num(7.0)) for k, v in tensors.items())


class Mark(NamedTuple):
    key: str
    number: int
    saved: bytes


class Count(NamedTuple):
    key: str
    until: int
    saved: bytes = b""


def counting(job):
    """Counts to `until` from where it was saved; a number without a key in between is a sign of life."""
    if job.saved == str(job.until).encode():
        yield Mark(job.key, job.until, job.saved)
    for i in range(int(job.saved or 0), job.until):
        yield i
        yield Mark(job.key, i + 1, str(i + 1).encode())


def dying(job):
    os._exit(9)
    yield


def failing(job):
    yield 0
    raise Expected("Expected bits=0 in [1, 24].")


class Inline(Executor):
    """Runs a call at once, and remembers how many were under way."""

    def __init__(self, error=None):
        self.error, self.futures, self.most = error, [], 0

    def submit(self, fn, /, *args, **kwargs):
        if self.error:
            raise self.error
        future: Future[Any] = Future()
        self.futures.append((future, lambda: future.set_result(fn(*args, **kwargs))))
        self.most = max(self.most, sum(not f.done() for f, _ in self.futures))
        threading.Timer(0.02, self.finish).start()
        return future

    def finish(self):
        for future, call in self.futures:
            if future.set_running_or_notify_cancel() if not future.done() and not future.running() else False:
                call()
                return


# --- any executor ---------------------------------------------------------------------------------


def test_a_study_on_threads_in_stints_of_one_checkpoint_is_the_same(here, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "SECONDS", 0.0)
    with ThreadPoolExecutor(2) as team:
        events = ran(study(), tmp_path / "there", team)
    assert same(here, tmp_path / "there")
    count = len(study().parts[0].chunks())
    steps = [e for e in events if isinstance(e, engine.Step) and e.key.startswith("leakage")]
    assert [e.text for e in steps] == [f"{i + 1} of {count} chunks done" for i in range(count)]
    assert {e.done for e in steps} == {1000}


def test_the_comparison_sees_a_difference(here, tmp_path):
    shutil.copytree(here, tmp_path / "there")
    assert same(here, tmp_path / "there")
    file = next((tmp_path / "there" / "leakage" / "tensors").glob("chunk-*"))
    tensors = store.read_tensors(tmp_path / "there" / "leakage", file.stem)
    tensors["x"].view(-1)[0] += 1e-7
    safetensors.torch.save_file(tensors, file)
    assert not same(here, tmp_path / "there")


@pytest.mark.parametrize(("seconds", "stints"), [(0.0, 4), (60.0, 1)])
def test_a_job_goes_on_from_its_last_checkpoint(seconds, stints):
    team = Inline()
    found = list(executors.results([Count("a", 4)], counting, team, seconds))
    assert found[-1] == ("a", Mark("a", 4, b"4"))
    assert sorted({e.number for _, e in found}) == [1, 2, 3, 4]
    assert len(team.futures) == stints + (seconds == 0)  # the last one finds nothing left to do


def test_jobs_are_asked_for_when_they_are_needed_and_all_of_them_come():
    asked = []
    team = Inline()
    team._max_workers = 2
    todo = (asked.append(i) or Count(str(i), 1) for i in range(20))
    found = executors.results(todo, counting, team)
    first, _ = next(found)
    assert len(asked) <= 6
    assert {first, *(key for key, _ in found)} == {str(i) for i in range(20)}
    assert 1 < team.most <= 4


def test_stopping_cancels_what_waits_and_leaves_the_executor_open():
    team = Inline()
    found = executors.results([Count(str(i), 1) for i in range(9)], counting, team)
    next(found)
    found.close()
    assert any(f.cancelled() for f, _ in team.futures)
    assert all(f.cancelled() or f.done() or f.running() for f, _ in team.futures)
    assert list(executors.results([Count("again", 1)], counting, team)) == [("again", Mark("again", 1, b"1"))]


@pytest.mark.slow  # two processes import torch
def test_processes_give_the_rows_of_a_local_run_and_say_when_they_die(tmp_path):
    plan = audit()
    ran(plan, tmp_path / "here")
    context = get_context("forkserver" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(1, context) as team:
        ran(plan, tmp_path / "processes", team)
        assert same(tmp_path / "here", tmp_path / "processes")
        import test_cluster as importable  # under the name that another process knows it by

        with pytest.raises(Failed, match=r"died, probably out of memory\. The same"):
            list(pool.results([importable.Count("a", 1)], importable.dying, team))


def test_an_executor_that_breaks_or_refuses_ends_in_one_line():
    for error in (BrokenProcessPool("gone"), BrokenThreadPool("gone")):
        with pytest.raises(Failed, match=r"died, probably out of memory\. The same"):
            list(pool.results([Count("a", 1)], counting, Inline(error)))
    with pytest.raises(Failed, match=r"takes jobs: cannot schedule new .* The same command goes on\."):
        list(
            pool.results([Count("a", 1)], counting, Inline(RuntimeError("cannot schedule new futures after shutdown")))
        )


def test_a_jobs_own_error_comes_through_as_it_is():
    with ThreadPoolExecutor(1) as team, pytest.raises(Expected, match="Expected bits=0"):
        list(pool.results([Count("a", 1)], failing, team))


def test_a_worker_with_other_code_or_without_the_device_refuses():
    job = Count("a", 1)
    with pytest.raises(Failed, match=r"with the code of this qleak \(0000000000\), got \w{10} of version"):
        executors.stint(pickle.dumps(executors.Ask("0000000000", counting, job, 1.0)))
    if not torch.cuda.is_available():
        cuda = audit(images=1)
        prepared = engine.prepare(cuda)
        job = engine.job_of(cuda, prepared, cuda.chunks()[0], "cuda")
        with pytest.raises(Failed, match="Expected a GPU on every worker"):
            executors.stint(pickle.dumps(executors.Ask(machine.identity().code, counting, job, 1.0)))


def test_jobs_of_one_process_take_turns():
    """Levels of forward derivatives are the process's: two jobs at once would mix theirs."""
    with ThreadPoolExecutor(2) as team:
        list(executors.results([Count("a", 3), Count("b", 3)], alone, team))


_inside = 0


def alone(job):
    global _inside
    _inside += 1
    time.sleep(0.05)
    assert _inside == 1
    _inside -= 1
    yield Mark(job.key, 1, b"")


# --- a dask cluster -------------------------------------------------------------------------------

pytestmark = [
    # dask.distributed's own, in its constructors and at its end
    pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@contextmanager
def scheduler(folder, **more):
    """A scheduler in a process of its own: (address, process)."""
    file = folder / f"scheduler-{len(list(folder.glob('scheduler-*')))}.json"
    words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", *words], env={**ENVIRONMENT, **more},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(file.exists)
        yield json.loads(file.read_text())["address"], process
    finally:
        process.kill()
        process.wait()


def work(address, name):
    """A worker that nobody starts again."""
    from distributed import Worker

    async def serve():
        async with Worker(address, nthreads=1, name=name, dashboard=False, memory_limit=0) as one:
            await one.finished()

    asyncio.run(serve())


def worker(address, name):
    """`work` in a process of its own, which has torch already."""
    context = get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["qleak.engine", "distributed", "test_cluster"])
    import test_cluster as importable  # under the name that another process knows it by

    process = context.Process(target=importable.work, args=(address, name), daemon=True)
    process.start()
    return process


def until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_nobody_at_the_address_is_one_line(monkeypatch, qleak):
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "ANSWER", 0.3)
    code, _, err = qleak("recipe", "run", "pretrained_int8", "--cluster", "tcp://127.0.0.1:9")
    assert (code, err) == (1, "qleak: Expected a dask scheduler at tcp://127.0.0.1:9, got no answer for 0 s.\n")
    code, _, err = qleak("recipe", "run", "pretrained_int8", "--cluster", "nowhere://127.0.0.1:9")
    assert code == 2
    assert err.startswith("qleak: Expected --cluster tcp://HOST:PORT, got 'nowhere://")
    assert len(err.splitlines()) == 1
    code, _, err = qleak("recipe", "run", "pretrained_int8", "--cluster", "tcp://127.0.0.1:9", "--workers", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert "got both" in err


def test_a_cluster_in_this_process_gives_the_rows_of_a_local_run(here, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    plan = study()
    options: dict[str, Any] = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with (
        distributed.LocalCluster("127.0.0.1", protocol="tcp", **options) as dask,
        cluster.connect(dask.scheduler_address, patience=0.0) as team,
    ):
        device, said = cluster.survey(team)
        ran(plan, tmp_path / "there", team)
        assert team.late == []
        other = machine.identity()._replace(torch="1.0")
        monkeypatch.setattr(machine, "identity", lambda: other)
        team.met(other._replace(torch="1.1"))
        assert re.search(r"warning: 1 worker .* last digits: torch 1.1 there, 1.0 here", team.late[0])
        monkeypatch.undo()
        with pytest.raises(Failed, match=r"cells were cancelled .* The same command goes on"):
            raise team.explain(CancelledError())
        dask.scale(0)
        until(lambda: not team._threads())
        time.sleep(0.1)
        with pytest.raises(Failed, match=r"Expected a worker at tcp://.*, got none for 0 s: start some with `dask"):
            list(executors.results([Count("a", 1)], counting, team))
    assert same(here, tmp_path / "there")
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "1 workers have several threads, of which one works" in said[-1]
    assert cluster.needs(plan) == [f"every worker reads data {DIGITS} itself ($QLEAK_DATA there)"]
    assert cluster.needs(plan.parts[0]) == []


@sizes("count", 2, 20)
def test_killed_workers_lose_no_row_and_double_none(tmp_path, count):
    """Kill -9 in the middle of a cell, up to twenty times, in a study of attacks and trainings; then compare bit for bit."""
    pytest.importorskip("distributed")
    images = 4 if count > 2 else 1
    plan = Study(("leakage", "accuracy"), (audit(images=images, steps=25, chunk=1), training(seeds=1)))
    ran(plan, tmp_path / "here")
    killed, over, alive = [], threading.Event(), {}
    with scheduler(tmp_path) as (address, _), cluster.connect(address) as team:

        def start():
            name = f"worker-{len(killed) + len(alive)}"
            alive[name] = worker(address, name)

        def finished():
            return len(list((tmp_path / "there").rglob("chunk-*")))

        def kill():
            """Kills whoever is in a cell, and starts another in its place."""
            while len(killed) < count and not over.is_set():
                busy, names = team.client.processing(), team.client.scheduler_info()["workers"]
                due = len(killed) <= 2 * finished()  # spread over the run, more than one for some cells
                for name in [w["name"] for a, w in names.items() if due and busy.get(a) and w["name"] in alive][:1]:
                    time.sleep(0.1)  # into the cell
                    process = alive.pop(name)
                    process.kill()
                    process.join()
                    killed.append(name)
                    start()
                time.sleep(0.05)

        thread = threading.Thread(target=kill)
        try:
            start()
            start()
            cluster.survey(team)
            thread.start()
            ran(plan, tmp_path / "there", team)
        finally:
            over.set()
            if thread.ident:
                thread.join()
            for process in alive.values():
                process.kill()
                process.join()
    assert len(killed) == count
    assert same(tmp_path / "here", tmp_path / "there")


@pytest.mark.slow
def test_a_lost_scheduler_is_one_line_and_the_run_goes_on(tmp_path):
    pytest.importorskip("distributed")
    plan = audit(images=2, steps=15, chunk=1)
    ran(plan, tmp_path / "here")
    with scheduler(tmp_path) as (address, process):
        one = worker(address, "one")
        try:
            with cluster.connect(address) as team, store.open_run(tmp_path / "there", plan.header()) as run:
                cluster.survey(team)
                with pytest.raises(Failed, match=r"Lost the scheduler at tcp://.*; the same command goes on\.$"):
                    for _ in engine.run(plan, run, "cpu", team):
                        process.kill()
        finally:
            one.kill()
            one.join()
    done = list((tmp_path / "there" / "tensors").glob("chunk-*"))
    assert 0 < len(done) < len(plan.chunks())
    ran(plan, tmp_path / "there")
    assert same(tmp_path / "here", tmp_path / "there")

"""The memory fit, what is free, and the check in front of a run."""

from pathlib import Path

import pytest
import torch

from qleak.attacks import cells, closed_form, dlg
from qleak.channels import chain
from qleak.check import Expected, Failed
from qleak.engine import memory
from qleak.engine.memory import Fit
from qleak.models import lenet
from qleak.plans import Audit

GB = 10**9


def plan(**changes):
    base = {"attacks": (dlg(outer=2), cells(), closed_form()), "victims": (0, 1), "restarts": 4, "controls": 0}
    net = changes.pop("model", lenet(channels=1, size=28, classes=10))
    return Audit(net, "mnist5k", channels=(chain(),), **(base | changes))


def peak(run):
    with memory.Tally() as tally:
        run()
    return tally.top


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with 10 GB free, on which a process without tensors takes 0.5 GB."""
    monkeypatch.setattr(memory, "available", lambda device="cpu", root=None: 10 * GB)
    monkeypatch.setattr(memory, "resident", lambda: GB // 2)


# --- counting --------------------------------------------------------------------------------------


def test_the_peak_is_that_of_tensors_alive_at_once():
    mega = 10**6 // 4

    def one_after_another():
        for _ in range(5):
            torch.zeros(mega)

    def together():
        kept = [torch.zeros(mega) for _ in range(5)]
        [v.view(-1)[: mega // 2] for v in kept]  # views hold no memory of their own

    assert peak(one_after_another) == 10**6
    assert peak(together) == 5 * 10**6


def test_it_sees_below_vmap_and_grad():
    def run():
        f = torch.func.vmap(torch.func.grad(lambda x: (x[:, None] * x).square().sum()))
        f(torch.zeros(10, 500))

    assert peak(run) >= 10 * 500 * 500 * 4


def test_the_fit_tells_the_peak_of_more_lanes():
    """The line through one and three lanes, against eight lanes themselves; half its slope misses."""
    from qleak import jobs
    from qleak.engine import audit

    one = plan(attacks=(dlg(outer=2),))
    (found,) = memory.fit(one)
    assert (found.name, found.lanes) == ("dlg", 8)
    prepared, chunk, attack = audit.prepare(one), one.chunks()[0], one.attacks[0]

    def run():
        view = jobs.view_of(audit.job_of(one, prepared, chunk), one)
        state = attack.init(view, jobs.starts(one, chunk, view))
        for _ in range(12):
            state, _ = attack.step(view, state)

    true = peak(run)
    assert found.total == pytest.approx(true, rel=0.1)
    assert found._replace(lane=found.lane / 2).total < 0.7 * true


def test_every_attack_that_applies_has_a_fit_and_the_largest_is_first():
    found = memory.fit(plan())
    assert {f.name for f in found} == {"dlg", "cells", "closed_form"}
    assert found[0].total == max(f.total for f in found)
    deep = plan(model=lenet(channels=1, size=28, classes=10, function="gelu"))
    assert {f.name for f in memory.fit(deep)} == {"cells", "dlg"}  # `closed_form` refuses a net without inverse


# --- the check -------------------------------------------------------------------------------------


def test_what_fits_is_left_alone_and_said():
    workers, said = memory.place(plan(), workers=2)
    assert workers == 2
    assert len(said) == 1
    assert said[0].startswith("memory ")


def test_workers_are_given_up_first():
    fit = Fit("dlg", 16, 0.1 * GB, 0.05 * GB)  # 1.08 GB with its margin
    assert memory.within(fit, "cpu", 8, 0)[0] == 6  # 7 × 0.5 + 6 × 1.08 = 10.0 of the 10.5 GB
    workers, said = memory.within(fit, "cpu", 8, 4 * GB)
    assert workers == 2  # 3 × 0.5 + 2 × 1.08 = 3.7 GB; three would take 5.2
    assert said[1] == "2 of 8 workers (8 take 13.1 GB, 4 GB of --memory)"


def test_a_chunk_that_does_not_fit_is_refused_in_one_line_that_mends_it():
    fit = Fit("dlg", 4096, 0.1 * GB, 0.005 * GB)
    with pytest.raises(Failed) as caught:
        memory.within(fit, "cpu", 4, 3 * GB)
    text = str(caught.value)
    assert text == (
        "Expected 25.2 GB for one chunk of 4096 lanes of dlg with --workers 1, got 3 GB of --memory: "
        "use --chunk 396, or a larger --memory."
    )
    assert memory.within(fit._replace(lanes=396), "cpu", 4, 3 * GB)[0] == 1
    with pytest.raises(Failed):
        memory.within(fit._replace(lanes=397), "cpu", 4, 3 * GB)
    with pytest.raises(Failed, match=r"10\.5 GB of free memory: use --chunk 1646"):
        memory.within(fit, "cpu", 4, 0)
    with pytest.raises(Failed, match="use a smaller model"):
        memory.within(fit, "cpu", 4, GB // 2)


def test_a_run_is_refused_before_its_chunk_exists():
    with pytest.raises(Failed, match=r"for one chunk of 4096 lanes of dlg.*use --chunk \d+"):
        memory.place(plan(attacks=(dlg(),), restarts=2048, chunk=4096), limit=0.6 * GB)


def test_an_unknown_machine_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device="cpu", root=None: 0)
    assert memory.within(Fit("dlg", 16, GB, GB), "cpu", 3, 0)[0] == 3


# --- what there is ---------------------------------------------------------------------------------


def system(root: Path, files: dict[str, str]) -> int:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return AVAILABLE("cpu", root)


AVAILABLE = memory.available
MEMINFO = {"proc/meminfo": "MemTotal:  24000 kB\nMemAvailable:   20000 kB\n"}


def test_the_system_and_every_group_above_count(tmp_path):
    assert system(tmp_path / "none", {}) == 0
    assert system(tmp_path / "plain", MEMINFO) == 20000 * 1024
    two = {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}
    assert system(tmp_path / "free", MEMINFO | two) == 20000 * 1024
    above = {
        "sys/fs/cgroup/a/memory.max": "9000000",
        "sys/fs/cgroup/a/memory.current": "5000000",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 1000000\nactive_file 7\n",
    }
    assert system(tmp_path / "two", MEMINFO | two | above) == 5000000


def test_groups_of_version_1_and_containers_that_see_their_root_only(tmp_path):
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n3:cpuset:/\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "8000000",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000000",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 0\ntotal_inactive_file 0\n",
    }
    assert system(tmp_path, MEMINFO | files) == 6000000


def test_this_machine_says_something():
    assert AVAILABLE() > 0


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("4GB", 4 * GB), ("512 mb", 512 * 10**6), ("1.5GiB", 3 * 2**29), ("2g", 2 * GB), ("7", 7)],
)
def test_sizes(text, count):
    assert memory.read_size(text) == count


@pytest.mark.parametrize("text", ["lots", "4 parsecs", "-1GB", "0GB", "GB", "1e3MB"])
def test_bad_sizes_are_one_line(text):
    with pytest.raises(Expected, match=r"^Expected --memory of a number and a unit, such as 4GB or 512MB, got "):
        memory.read_size(text)


# --- the command -----------------------------------------------------------------------------------

RECIPE = '''"""One digit."""
from qleak import models
from qleak.attacks import dlg
from qleak.channels import chain
from qleak.plans import Audit

def digit(restarts: int = 2) -> Audit:
    """One digit."""
    net = models.lenet(channels=1, size=28, classes=10)
    return Audit(net, "mnist5k", (0,), (chain(),), (dlg(outer=1),), restarts=restarts, controls=0)
'''


def test_the_flag_limits_refuses_and_says_so(qleak, tmp_path):
    (tmp_path / "digit.py").write_text(RECIPE, encoding="utf-8")
    command = ("recipe", "run", "digit.py", "--out", "out", "--workers", 1)
    code, _, err = qleak(*command, "--memory", "100MB")
    assert code == 1
    assert "for one chunk of 2 lanes of dlg with --workers 1, got 100 MB of --memory: use a smaller model" in err
    assert len(err.strip().splitlines()) == 1
    assert qleak(*command, "--memory", "some")[0] == 2
    assert not (tmp_path / "out").exists()
    code, _, err = qleak(*command, "--memory", "3GB")
    assert code == 0
    (header,) = (tmp_path / "out").glob("*/run.json")
    assert '"memory 2.' in header.read_text(encoding="utf-8")  # 2 lanes of 1.2 MB, among the choices

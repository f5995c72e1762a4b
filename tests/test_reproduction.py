"""The road to every number: stored runs bear the claims out, a change of either is seen, and nothing is left out."""

import json
import lzma
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiers import sizes

from qleak.cli import recipes
from qleak.errors import Expected

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `scripts` is not installed
from scripts import claims, keep, part, planned, reproduce, results, smoke, stored, verify  # noqa: E402

sys.path.remove(str(ROOT))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def copied(tmp_path):
    """Folders like results/ with one stored run, to be changed."""

    def copy(name):
        (folder,) = Path("results").glob(f"{name}-*")
        shutil.copytree(folder, tmp_path / "results" / folder.name)
        return tmp_path / "results" / folder.name

    return copy


def words(found):
    return {v.word for v in found[0]}


def test_stored_runs_bear_claims_out():
    for name in ("pretrained_int8", "seeds"):
        assert words(verify.verify(name)) == {"holds"}, name


@pytest.mark.slow
def test_every_claim_holds(capsys):
    assert verify.main([]) == 0, capsys.readouterr().out


def test_a_changed_claim_fails():
    doc = recipes.docstring(recipes.path_of("pretrained_int8"))
    assert words(verify.verify("pretrained_int8", doc=doc.replace("psnr_selected >= 45", "psnr_selected >= 55"))) == {
        "holds",
        "FAILS",
    }
    found = verify.verify("pretrained_int8", doc="Claims:\n    fp32 nothing psnr_selected >= 1\n")[0]
    assert [v.word for v in found] == ["FAILS"] and "no such number" in found[0].note


def test_a_changed_summary_fails(copied):
    folder = copied("pretrained_int8")
    told = stored.header(folder)
    line = next(s for s in told["summary"] if s["attack"].startswith("refine") and s["channel"] != "fp32")
    line["psnr_selected"] += 0.001  # the claim still holds, the number is not that of the rows
    (folder / "run.json").write_text(json.dumps(told))
    found = verify.verify("pretrained_int8", (folder.parent,))[0]
    assert [v.word for v in found].count("differs") == 1 and "the rows give" in "".join(v.note for v in found)


def test_a_changed_row_fails(copied):
    folder = copied("pretrained_int8")
    rows = stored.rows(folder)
    row = next(
        r for r in rows if r["attack"].startswith("refine") and r["channel"] != "fp32" and r["control"] == "none"
    )
    row["psnr"] = row["psnr"] + 5.0
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (folder / "rows.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    assert "differs" in words(verify.verify("pretrained_int8", (folder.parent,)))


def test_a_missing_run_fails(tmp_path, monkeypatch, capsys, copied):
    assert words(verify.verify("pretrained_int8", (tmp_path / "none",))) == {"no run"}
    folder = copied("pretrained_int8")
    told = stored.header(folder) | {"status": "interrupted"}
    (folder / "run.json").write_text(json.dumps(told))
    assert words(verify.verify("pretrained_int8", (folder.parent,))) == {"no run"}
    monkeypatch.setattr(
        verify, "verify", lambda name: ([verify.Verdict("no run", name, claims.Claim("a", "b", "c", ">=", 1.0))], {})
    )
    assert verify.main(["pretrained_int8"]) == 1
    assert "1 no run" in capsys.readouterr().out


def test_a_plan_that_changed_has_no_run(monkeypatch):
    monkeypatch.setattr(planned, "plan_of", lambda job: SimpleNamespace(id="0123456789"))
    assert words(verify.verify("pretrained_int8")) == {"no run"}


def test_results_are_small_and_name_no_machine():
    files = [p for p in Path("results").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 6e6
    for path in files:
        text = lzma.decompress(path.read_bytes()).decode() if path.suffix == ".xz" else path.read_text(encoding="utf-8")
        assert keep.clean(text, path) == text, path
    assert {p.name for p in files} == {"run.json", "report.txt", "rows.jsonl.xz", "bounds.jsonl.xz"}


def test_a_path_of_the_machine_is_taken_out_or_refused(tmp_path):
    text = "stored(path='/data/me/runs/convergence_stage-1/models/0-0-round-1.safetensors')"
    assert keep.clean(text, tmp_path) == "stored(path='models/0-0-round-1.safetensors')"
    with pytest.raises(Expected, match="no name of a machine"):
        keep.clean("data in /home/someone/data", tmp_path)


def test_what_is_kept_is_what_was_there(copied, tmp_path):
    folder = copied("trained_vs_untrained")
    with stored.unpacked(folder) as plain:
        assert (plain / "trained" / "rows.jsonl").is_file()
        assert [len(stored.rows(f)) for f in stored.folders(plain)] == [
            len(stored.rows(f)) for f in stored.folders(folder)
        ]
    told = stored.header(folder) | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(told))
    with pytest.raises(Expected, match="a finished run"):
        keep.keep(folder, tmp_path)


def test_the_page_is_what_results_say():
    text = results.PAGE.read_text(encoding="utf-8")
    assert results.filled(text) == text, "`just results` writes docs/results.md"
    changed = re.sub(r"(\| 2020 attack, the same digit \| pictures only \| )\d+", r"\g<1>99", text)
    assert changed != text and results.filled(changed) == text
    with pytest.raises(SystemExit, match="marker"):
        results.filled(text.replace("<!-- dlg:", "<!-- gld:"))


def test_every_recipe_has_a_smoke_setting_that_parses():
    assert set(smoke.SETTINGS) == set(recipes.names())
    for name in smoke.SETTINGS:
        given = planned.flags_of(planned.Job(name, tuple(smoke.flags(name))))
        assert given.get("data", given.get("dataset", "photos")) in ("mnist5k", "photos", "faces", "auto"), name


def test_smoke_sees_what_is_missing(tmp_path):
    assert smoke.faults(tmp_path) == "0 run folders in place of one"
    folder = tmp_path / "a-1"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"kind": "audit", "status": "done", "summary": [{}]}))
    assert smoke.faults(tmp_path) == "a-1 has no rows"
    (folder / "rows.jsonl").write_text('{"key": "0"}\n')
    assert smoke.faults(tmp_path) == "no page"
    (folder / "report.html").write_text("x" * 2000)
    assert smoke.faults(tmp_path) == ""
    (folder / "run.json").write_text(json.dumps({"kind": "audit", "status": "running", "summary": []}))
    assert smoke.faults(tmp_path) == "a-1 is running with 0 lines"


ONE_OF_EACH = ("frontier", "private_digits")
"""A study, which is an audit and a training, and a synthesis."""


@sizes("names", ONE_OF_EACH, ())
def test_smoke(names):
    done = subprocess.run([sys.executable, "-m", "scripts.smoke", *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_smoke_fails_where_a_recipe_does(monkeypatch):
    monkeypatch.setitem(smoke.SETTINGS, "dlg_mnist", "--data mnist5k --index 0 --outer 0")
    assert "exit code 2" in smoke.smoke("dlg_mnist").why


def test_shards_share_everything_out_once():
    found = reproduce.units(planned.jobs())
    assert len({str(u) for u in found}) == len(found) and any(u.part for u in found)
    for of in (1, 3, 8):
        shares = [reproduce.shard(found, k, of) for k in range(1, of + 1)]
        assert sorted(str(u) for share in shares for u in share) == sorted(map(str, found))
        costs = [sum(u.cost for u in share) for share in shares]
        assert max(costs) <= sum(costs) / of + max(u.cost for u in found)
        assert shares == [reproduce.shard(found[::-1], k, of) for k in range(1, of + 1)]  # whatever the order
    assert {u.job for u in reproduce.whole(found)} == set(planned.jobs())


@pytest.mark.parametrize("text", ["0/8", "9/8", "2", "2/", "a/b", "1/0"])
def test_a_wrong_shard_is_one_line(text):
    with pytest.raises(Expected, match="as K/N"):
        reproduce.read_shard(text)


def test_reproduce_goes_on_after_a_failure_and_says_what_it_skipped(monkeypatch, capsys, tmp_path):
    three = [reproduce.Unit(planned.Job(n, ()), "", 1.0, True) for n in ("seeds", "gap", "attackers")]
    ran = []

    def make(unit, out, extra):
        ran.append(unit.job.name)
        return 1 if unit.job.name == "seeds" else 0

    monkeypatch.setattr(reproduce, "make", make)
    monkeypatch.setattr(planned, "missing", lambda job: "no such set in the data folder" if job.name == "gap" else "")
    assert reproduce.run(three, tmp_path) == 1
    out = capsys.readouterr().out
    assert ran == ["seeds", "attackers"]
    assert "skipped  gap: no such set" in out and "FAILED   seeds: exit code 1" in out and "1 of 3 done" in out
    monkeypatch.setattr(reproduce, "make", lambda unit, out, extra: 130)
    assert reproduce.run(three, tmp_path) == 130
    assert "goes on with seeds" in capsys.readouterr().out


def test_what_cannot_be_run_here_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("QLEAK_DATA", str(tmp_path))
    planned._present.cache_clear()
    planned.plan_of.cache_clear()
    try:
        assert planned.missing(planned.job("datalens_mnist")) == "no mnist in the data folder"
        assert planned.missing(planned.job("idlg_lfw")) == "no lfw in the data folder"
        assert planned.missing(planned.job("pretrained_int8")) == ""
        # A plan that cannot be made without its data is verified by its stored run, and that is said.
        found = verify.verify("dlg_mnist")
        assert words(found) == {"holds"} and "plan not made again" in found[0][0].note
    finally:
        planned._present.cache_clear()
        planned.plan_of.cache_clear()


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path):
    command = [sys.executable, "-m", "scripts.reproduce", "seeds", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(tmp_path.glob("*/rows.jsonl")):
        time.sleep(0.2)
        assert process.poll() is None
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130, out
    assert "goes on with seeds" in out and "rows are safe" in out
    (folder,) = tmp_path.glob("seeds-*")
    assert stored.header(folder)["status"] == "interrupted"


@pytest.mark.slow
def test_parts_run_apart_join_to_the_same_study(tmp_path, qleak):
    flags = tuple(smoke.flags("trained_vs_untrained"))
    job = planned.Job("trained_vs_untrained", flags)
    for name in ("trained", "untrained"):  # not in the study's order
        part.run(tmp_path / "apart", name, job)
    before = stored.rows(next((tmp_path / "apart").glob("*/trained")))
    for where in ("apart", "whole"):
        code, _, err = qleak("recipe", "run", job.name, *flags, "--workers", "1", "--quiet", "--out", tmp_path / where)
        assert code == 0, err
    one, other = (next((tmp_path / w).iterdir()) for w in ("apart", "whole"))
    assert stored.rows(one / "trained") == before  # nothing was run again
    for name in ("trained", "untrained"):
        rows = [[{k: v for k, v in r.items() if k != "cpu_s"} for r in stored.rows(f / name)] for f in (one, other)]
        assert sorted(rows[0], key=lambda r: r["key"]) == sorted(rows[1], key=lambda r: r["key"])
    assert stored.header(one)["status"] == "done" and len(stored.lines(one)) == len(stored.lines(other))
    with pytest.raises(Expected, match="a part of the study"):
        part.run(tmp_path, "nothing", job)

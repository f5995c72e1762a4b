"""`qleak runs`: what is here, what it is, how it goes on, and removing it without touching anything else."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import folders as made
import pytest

from qleak import store
from qleak.cli import inventory
from qleak.errors import Expected
from qleak.report import brief, exported

STORED = Path(__file__).parent / "stored" / "schema-1"


@pytest.fixture
def here(tmp_path):
    """Three runs of the schemas: a training that is done, one that was stopped, a study of two parts."""
    made.training(tmp_path / "runs" / "done-1", {"fp32": [0.91, 0.93], "sign": [0.85]})
    made.training(tmp_path / "runs" / "half-2", {"fp32": [0.5]}, status="running")
    shutil.copytree(STORED, tmp_path / "runs" / "study-3")
    return tmp_path / "runs"


def lines(folder):
    return sum(p.read_text().count("\n") for p in folder.rglob("rows.jsonl") if "audits" not in p.parts)


def test_ls_names_every_run_in_80_columns(qleak, here):
    code, out, err = qleak("runs", "ls")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    told = {line.split()[0]: line.split()[1:4] for line in out.splitlines() if line[:1].strip() and "-" in line[:7]}
    assert told["done-1"] == ["training", "done", str(lines(here / "done-1"))]
    assert told["half-2"][:2] == ["training", "stopped"]  # it says "running", and nobody writes there
    assert told["study-3"] == ["study", "done", str(lines(here / "study-3"))]
    assert "  fp32 92.0%; sign 85.0%" in out.splitlines()
    assert "  2 parts: leakage, accuracy" in out.splitlines()
    assert out.splitlines()[-1].startswith("3 runs below runs, ")


def test_ls_as_json_is_whole_and_newest_first(qleak, here):
    for name, day in (("done-1", "2026-01-02"), ("half-2", "2026-01-03")):
        with store.open_run(here / name, store.read_run(here / name)) as run:
            run.update(started=f"{day}T00:00:00+00:00")
    found = json.loads(qleak("runs", "ls", "--json")[1])
    days = [r["started"] for r in found["runs"]]
    assert days == sorted(days, reverse=True)
    study = next(r for r in found["runs"] if r["kind"] == "study")
    assert study["parts"] == ["leakage", "accuracy"]
    assert study["bytes"] == sum(p.stat().st_blocks * 512 for p in (here / "study-3").rglob("*") if p.is_file())
    assert found["damaged"] == []


def test_a_run_is_running_while_its_lock_is_held(qleak, here):
    hold = (
        "import sys, time; from qleak import disk; from pathlib import Path\n"
        "with disk.locked(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", hold, here / "half-2"], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        told = {r["name"]: (r["status"], r["pid"]) for r in json.loads(qleak("runs", "ls", "--json")[1])["runs"]}
        assert told["half-2"] == ("running", child.pid)
        code, _, err = qleak("runs", "rm", "half-2", "--yes")
        assert (code, (here / "half-2" / "rows.jsonl").exists()) == (1, True)
        assert f"process {child.pid} is writing" in err
        with store.open_run(here / "done-1", store.read_run(here / "done-1")):
            assert inventory.facts(here / "done-1")["pid"] == os.getpid()  # and asking has not let go of the lock
            probe = (
                f"from qleak import disk; from pathlib import Path; print(disk.holder(Path({str(here / 'done-1')!r})))"
            )
            said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
            assert int(said) == os.getpid()
    finally:
        child.kill()
        child.communicate()
    assert inventory.facts(here / "half-2")["status"] == "stopped"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 9, "kind": "audit"}', "\x00"])
def test_a_damaged_folder_is_a_line_and_no_crash(qleak, here, text):
    (here / "half-2" / "run.json").write_text(text)
    code, out, _ = qleak("runs", "ls")
    assert code == 0
    assert sum(line.startswith("damaged: ") and "half-2" in line for line in out.splitlines()) == 1
    assert "done-1" in out
    (here / "done-1" / "run.json").unlink()
    assert "Expected a run.json at runs/done-1" in qleak("runs", "ls")[1]


def test_summaries_of_any_shape_are_no_crash():
    for summary in ([{}], [1], {"a": 1}, "x", [{"channel": 1}], [None]):
        for kind in (*brief.KINDS, "other", None):
            assert isinstance(brief.verdict({"kind": kind, "summary": summary}), str)


def test_no_folder_and_no_runs_are_said(qleak, tmp_path):
    code, _, err = qleak("runs", "ls")
    assert (code, err) == (2, "qleak: Expected a folder with runs at runs, found none: --out says where they lie.\n")
    (tmp_path / "runs").mkdir()
    assert qleak("runs", "ls")[1] == "0 runs below runs, 0 B\n"
    code, _, err = qleak("runs", "show", "nope")
    assert code == 2
    assert "Expected a run folder, or a run below runs, got 'nope'." in err


def test_hundreds_of_runs_are_listed_in_a_blink_without_torch(tmp_path):
    made.training(tmp_path / "one", {"fp32": [0.9, 0.8, 0.7]}, epochs=20)
    for i in range(300):
        shutil.copytree(tmp_path / "one", tmp_path / "runs" / f"run-{i}")
    script = (
        "import sys, time\nfrom qleak.cli import main\nsys.argv = ['qleak', 'runs', 'ls']\nmain_began = time.process_time()\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(time.process_time() - main_began, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    seconds, torch = done.stderr.split()
    assert "300 runs" in done.stdout
    assert (float(seconds) < 1.0, torch) == (True, "False")


def test_show_says_how_it_goes_on(qleak, here):
    code, out, _ = qleak("runs", "show", "study-3")
    assert code == 0
    assert "schema 1 · done" in out
    assert "leakage/rows.jsonl" in out
    told = json.loads(qleak("runs", "show", "study-3", "--json")[1])
    assert told["files"]["leakage/rows.jsonl"] == (here / "study-3" / "leakage" / "rows.jsonl").stat().st_size
    assert told["plan"] == store.read_run(here / "study-3")["plan"]
    assert told["continue"].startswith("qleak recipe run ")
    assert told["continue"].endswith("--config runs/study-3/run.json --out runs")
    assert all(len(line) <= 80 for line in out.splitlines() if "qleak recipe" not in line)


# --- removing -------------------------------------------------------------------------------------


def test_rm_asks_and_removes_what_runs_write(qleak, here, monkeypatch):
    (here / "study-3" / "leakage" / "notes.txt").write_text("mine")
    for answer, gone in (("n\n", False), ("y\n", True)):
        with (here / "answer").open("w+") as file:
            file.write(answer)
            file.seek(0)
            monkeypatch.setattr(sys, "stdin", file)
            code, out, _ = qleak("runs", "rm", "study-3", "done-1")
        assert ((here / "done-1").exists(), code) == (not gone, 0 if gone else 1)
    left = [str(p.relative_to(here)) for p in (here / "study-3").rglob("*") if p.is_file()]
    assert left == ["study-3/leakage/notes.txt"]
    assert "runs/study-3: removed; 1 files that no run writes stay" in out
    assert (here / "half-2" / "rows.jsonl").exists()


def test_rm_follows_no_link(qleak, here, tmp_path):
    for name in ("outside", "elsewhere"):
        shutil.copytree(STORED / "leakage", tmp_path / name)
    (here / "done-1" / "tensors").rmdir()
    (here / "done-1" / "tensors").symlink_to(tmp_path / "outside" / "tensors")
    (here / "done-1" / "part").symlink_to(tmp_path / "elsewhere")
    (here / "done-1" / "final_model.safetensors").symlink_to(tmp_path / "outside" / "run.json")
    (here / "link").symlink_to(tmp_path / "elsewhere")
    before = {p: p.read_bytes() for n in ("outside", "elsewhere") for p in (tmp_path / n).rglob("*") if p.is_file()}
    assert qleak("runs", "rm", "done-1", "--yes")[0] == 0
    code, _, err = qleak("runs", "rm", "link", "--yes")
    assert (code, "Expected a run folder" in err) == (2, True)
    assert {
        p: p.read_bytes() for n in ("outside", "elsewhere") for p in (tmp_path / n).rglob("*") if p.is_file()
    } == before
    assert not (here / "done-1" / "run.json").exists()


@pytest.mark.parametrize("text", [None, "{}", '{"name": "x"}', '{"schema": 1, "kind": "web"}'])
def test_rm_refuses_what_is_no_run(qleak, tmp_path, text):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.jsonl").write_text("precious\n")
    if text is not None:
        (tmp_path / "other" / "run.json").write_text(text)
    code, _, err = qleak("runs", "rm", "other", "--yes")
    assert (code, err.startswith("qleak: Expected a run folder")) == (2, True)
    assert (tmp_path / "other" / "rows.jsonl").read_text() == "precious\n"


def test_rm_takes_a_damaged_run_and_a_half_removed_one(qleak, here):
    (here / "half-2" / "run.json").write_text("{")
    (here / "done-1" / "run.json").rename(here / "done-1" / ".run.json.cleared")
    assert "runs/done-1 is half removed: `qleak runs rm` goes on." in qleak("runs", "ls")[1]
    assert qleak("runs", "rm", "half-2", "done-1", "--yes")[0] == 0
    assert [p.name for p in here.iterdir()] == ["study-3"]


def test_rm_of_tensors_frees_the_disk_and_keeps_rows(qleak, here):
    rows = store.read_rows(here / "study-3" / "leakage")
    code, out, _ = qleak("runs", "rm", "--tensors", "study-3", "--yes")
    assert (code, "can no longer be continued" in " ".join(out.split())) == (0, True)
    assert not list((here / "study-3").rglob("tensors/*"))
    assert list((here / "study-3").rglob("models/*.safetensors"))
    assert store.read_rows(here / "study-3" / "leakage") == rows
    assert qleak("runs", "ls")[0] == 0


# --- exporting ------------------------------------------------------------------------------------


def test_csv_has_every_row_and_field(qleak, here, tmp_path):
    code, out, _ = qleak("runs", "export", "study-3", "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    parts = {n: store.read_rows(here / "study-3" / n) for n in ("leakage", "accuracy")}
    assert (code, out) == (0, f"rows.csv: {len(found)} rows\n")
    assert [(r["part"], r["key"]) for r in found] == [(n, r["key"]) for n, rows in parts.items() for r in rows]
    first = parts["leakage"][0]
    assert (float(found[0]["psnr"]), json.loads(found[0]["success"])) == (first["psnr"], first["success"])


def test_parquet_keeps_lists_and_types(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    with store.open_run(tmp_path / "a", {"kind": "audit", "plan_id": "p"}) as run:
        run.append([
            {"key": "a", "psnr": 1, "psnr_at": [[0.5, 10.0], [1.0, 12.5]], "odd": "x", "flag": True, "loss": None},
            {"key": "b", "psnr": 2.5, "odd": [1], "more": {"low": 1.0}},
        ])  # fmt: skip
    assert exported.write(tmp_path / "a", tmp_path / "a.parquet") == 2
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table["psnr_at"].to_pylist() == [[[0.5, 10.0], [1.0, 12.5]], None]
    assert table["psnr"].to_pylist() == [1.0, 2.5]
    assert table["odd"].to_pylist() == ['"x"', "[1]"]  # no common type: JSON
    assert table["more"].to_pylist() == [None, {"low": 1.0}]
    assert str(table.schema.field("flag").type) == "bool"


def test_what_cannot_be_exported_is_said(qleak, here, monkeypatch):
    for file, message in (("rows.xlsx", "ends in .parquet or .csv"), (here / "done-1" / "rows.csv", None)):
        code, _, err = qleak("runs", "export", "done-1", file)
        assert code == (2 if message else 0)
        assert (message or "") in err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = qleak("runs", "export", "done-1", "rows.parquet")
    assert (code, err) == (
        1, "qleak: Parquet needs pyarrow: pip install 'qleak[parquet]', or export to a .csv file.\n"
    )  # fmt: skip
    with store.open_run(here / "empty", {"kind": "audit", "plan_id": "p"}):
        pass
    with pytest.raises(Expected, match=r"Expected a run with rows at .*empty, it has none yet"):
        exported.table(here / "empty")


def test_listing_beside_a_writer_that_removes_is_no_crash(here):
    """Sizes are walked while files come and go."""
    began = time.monotonic()
    child = subprocess.Popen(
        ["sh", "-c", f"while :; do mkdir {here}/done-1/t; touch {here}/done-1/t/x; rm -r {here}/done-1/t; done"],
        stderr=subprocess.DEVNULL,
    )
    try:
        with contextlib.suppress(StopIteration):
            while time.monotonic() - began < 0.5:
                assert inventory.size(here / "done-1") > 0
    finally:
        child.kill()
        child.wait()


# --- the page -------------------------------------------------------------------------------------


def blocks(language):
    page = (Path(__file__).parent.parent / "docs" / "runs.md").read_text(encoding="utf-8")
    return [b.split("```")[0] for b in page.split(f"```{language}\n")[1:]]


def test_the_page_reads_rows_with_pandas(qleak, here, capsys):
    pytest.importorskip("pandas")
    (here / "study-3" / "leakage").rename(here / "RUN")
    (code,) = [b for b in blocks("text") if "pandas" in b]
    exec(compile(code, "runs.md", "exec"), {})
    assert "uniform(levels=4)" in capsys.readouterr().out


def test_the_page_reads_rows_with_duckdb(qleak, here, monkeypatch, capsys):
    duckdb = pytest.importorskip("duckdb")
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(here.parent)
    qleak("runs", "export", "study-3", "rows.parquet")
    (code,) = [b for b in blocks("text") if "import duckdb" in b]
    exec(compile(code, "runs.md", "exec"), {})
    assert "leakage" in capsys.readouterr().out
    (here / "study-3" / "leakage").rename(here / "RUN")
    (shell,) = [b for b in blocks("text") if "duckdb -c" in b]
    first, second = [line.split('"')[1] for line in shell.splitlines()]
    means = {(c, a): m for c, a, m in duckdb.sql(first).fetchall()}
    rows = [r for r in store.read_rows(here / "RUN") if r["control"] == "none" and r["channel"] == "fp32"]
    assert means["fp32", rows[0]["attack"]] == pytest.approx(sum(r["psnr"] for r in rows) / len(rows))
    assert {Path(name).parent.name for name, _ in duckdb.sql(second).fetchall()} >= {"RUN", "done-1", "half-2"}


def test_the_commands_of_the_page_exist(qleak, here):
    (here / "study-3").rename(here / "RUN")
    shutil.copytree(STORED, here / "frontier-7bcfd7804b")
    (shell,) = blocks("console")
    for line in shell.splitlines():
        words = line.split("#")[0].split()
        assert qleak(*words[1:], *(["--yes"] if words[2] == "rm" else []))[0] == 0, line
        if words[-1] == "RUN" and "--tensors" not in words and words[2] == "rm":
            shutil.copytree(STORED, here / "RUN")

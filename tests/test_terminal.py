"""`qleak report RUN` in a terminal of 80 columns: no line is longer, nothing is cut amid a word, no escape where none is
wanted, and a run whose tensors are gone is shown all the same.
"""

import io
import re
import shutil
import sys
from pathlib import Path

import pytest
from captures import SHAPE, gradients, images, module
from folders import audit, study, training
from made import synthesis
from rich.table import Table

from qleak.report import columns, html, terminal
from qleak.store import read_run

ROOT = Path(__file__).parents[1]
LONG = "clip_l2(bound=3.1) > gaussian(sigma=0.00142) > nominal_laplace(eps=1000000.0, by_tensors=True)"
KINDS = ("audit", "training", "study", "trainings", "synthesis", "captured", "stored", "stored/leakage", "example")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of every kind, with names and numbers that are hard on columns; and what the repository keeps."""
    root = tmp_path_factory.mktemp("runs")
    leaks = {LONG: {"levenberg_marquardt(damping=0.001)": 25.0}, "fp32": {"cells(objective='l2')": 33.0}}
    learns = {LONG: [0.7, 0.8], "fp32": [0.98, 0.97]}
    audit(root / "audit", leaks)
    training(root / "training", learns, epsilon=2.18e8)
    parts = {name: training(root / "trainings" / name, {LONG: [0.7, 0.8]}, epsilon=1890.0) for name in ("one", "two")}
    study(root / "trainings", {name: (path, "training") for name, path in parts.items()})
    below = root / "study"
    audit(below / "a", leaks)
    training(below / "b", learns, epsilon=2.18e8)
    study(below, {"leak": (below / "a", "audit"), "learn": (below / "b", "training")})
    synthesis(root / "synthesis")
    shutil.copytree(ROOT / "tests" / "stored" / "schema-1", root / "stored")
    shutil.copytree(ROOT / "assets" / "runs" / "example", root / "example")
    return root


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A real audit of an update whose tensors have other names than the model's."""
    from qleak import audit as audited

    root = tmp_path_factory.mktemp("captured")
    net, (x, y) = module(root), images(1)
    update = {f"wrapped.module.{k}": v for k, v in gradients(net, x, y).items()}
    folder = root / "run"
    audited(update, net, shape=SHAPE, truth=(x, y), budget=1, attacks="closed_form", bounds="no", folder=folder)
    return folder


@pytest.fixture
def shown(qleak, runs, request, monkeypatch):
    """What `qleak report` prints of a run, by name; the page is written elsewhere and tested elsewhere."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(html, "write", lambda run, out: out)

    def show(name):
        run = request.getfixturevalue("captured") if name == "captured" else runs / name
        code, out, err = qleak("report", run, "--out", "page.html")
        assert (code, err) == (0, "")
        return out

    return show


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_gets_80_plain_columns_with_whole_words(shown, kind):
    text = shown(kind)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in text and "▀" not in text
    assert "Verdict: " in text and lines[-1] == "page.html"
    assert not re.search(r"\w…", text)  # an ellipsis in place of letters
    for word in ("0.00142", "1000000.0", "nominal_laplace", "gaussian(", "marquardt", "levenberg_", "objective='l2')"):
        assert text.count(word[:5]) == text.count(word), word  # never a piece of it
    assert not re.search(r"\de[+-]?(\s|$)", text)  # nor half an exponent


@pytest.mark.parametrize("kind", ["audit", "synthesis", "captured"])
@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_a_terminal_without_colours_gets_no_escape_and_is_told(runs, captured, kind, environment, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    for name, value in ({"TERM": "xterm-256color", "COLUMNS": "80"} | environment).items():
        monkeypatch.setenv(name, value)
    if "NO_COLOR" not in environment:
        monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    terminal.show(captured if kind == "captured" else runs / kind)
    text = screen.getvalue()
    if environment:
        assert "\x1b" not in text and "▀" not in text
        assert "Pictures need a terminal with colours; report.html has them." in text
    else:  # the same screen with colours has both: the test can fail
        assert "\x1b" in text and "▀" in text
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in text.splitlines()) <= 80


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("audit", "training", "synthesis")]


@pytest.mark.parametrize("kind", ["captured", "stored/leakage", *SLOW])
def test_a_run_whose_tensors_were_removed_says_so(qleak, runs, captured, kind, tmp_path):
    copy = shutil.copytree(captured if kind == "captured" else runs / kind, tmp_path / "copy")
    assert qleak("runs", "rm", copy, "--tensors", "--yes")[0] == 0
    code, out, err = qleak("report", copy)
    assert (code, err) == (0, "") and "Verdict: " in out
    assert ("The tensors of this run were removed" in out) == (kind != "training")
    assert (copy / "report.html").stat().st_size > 5000


@pytest.mark.parametrize("gone", ["captured*", "chunk-*"])
def test_a_captured_run_without_some_of_its_tensors_is_shown(captured, gone, tmp_path):
    copy = shutil.copytree(captured, tmp_path / "copy")
    for path in (copy / "tensors").glob(gone):
        path.unlink()
    file = io.StringIO()
    console = terminal.Console(file=file, width=80, force_terminal=True, color_system="truecolor")
    terminal.show(copy, console=console)
    text = file.getvalue()
    assert ("best guess" in text and "truth\n" not in re.sub(r"\x1b\[[\d;]*m", "", text)) == (gone == "captured*")
    assert ("were removed" in text) == (gone == "chunk-*")
    page = html.write(copy, tmp_path / "page.html").read_text()
    assert ("tensors of this run were removed" in page) == (gone == "chunk-*")


def test_the_captured_audit_is_what_the_columns_say(shown, captured):
    s = read_run(captured)["summary"][0]
    text = shown("captured")
    row = next(line for line in text.splitlines() if line.startswith("closed_form") and "best" in line)
    assert row.split()[-1].isdigit() and f"{max(s['psnr']):.1f}" in row.split()


# --- cells ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [
        ("1.89e+03", 5, "1890"), ("2.18e+08", 6, "2.18e8"), ("2.18e+08", 5, "2.2e8"), ("(5.43e+06?)", 9, "(5.43e6?)"),
        ("2048.00", 5, "2050"), ("128.39", 5, "128"), ("0.0149", 5, "0.015"), ("-123.45", 6, "-123"),
        ("1.1e-07", 6, "1.1e-7"), ("98.0%", 5, "98.0%"), ("100.0% ±11.3", 11, ""), ("1e+06", 2, ""),
    ],
)  # fmt: skip
def test_a_number_loses_digits_and_never_its_size(text, width, short):
    assert columns.shorter(text, width) == short and len(short) <= max(width, len(short) * (width >= len(text)))
    if short and "%" not in short:
        assert float(short.strip("(?)")) == pytest.approx(float(text.strip("(?)")), rel=0.1)


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("* clip_l2 > gaussian(sigma=0.00142)", 22, ["* clip_l2 > gaussian(", "sigma=0.00142)"]),
        ("nominal_laplace(by_tensors=True)", 30, ["nominal_laplace(", "by_tensors=True)"]),
        ("  levenberg_marquardt", 17, ["  levenberg_", "marquardt"]),
        ("features.3.conv.weight", 12, ["features.3.", "conv.weight"]),
        ("laplace(eps=1000000.0)", 12, ["laplace(eps=", "1000000.0)"]),
        ("abcdefghijkl", 5, ["abcde", "fghij", "kl"]), ("  batch-1", 17, ["  batch-1"]), ("", 5, [""]),
    ],
)  # fmt: skip
def test_a_name_is_broken_at_its_joints(text, width, lines):
    assert columns.folded(text, width).split("\n") == lines


def test_a_row_fits_its_columns_and_keeps_its_style():
    grid = Table()
    grid.add_column(width=8)
    grid.add_column()
    columns.add(grid, terminal.Text("one_two_three", style="bold"), "1.89e+03 as it is")
    (name, value) = (next(iter(column.cells)) for column in grid.columns)
    assert (name.plain, name.style, str(value)) == ("one_two_\nthree", "bold", "1.89e+03 as it is")

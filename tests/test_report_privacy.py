"""Trainings side by side: numbers as stored, claims told from guarantees, the figure of accuracy over ε."""

import io
import re

import pytest
from folders import study, training
from rich.console import Console
from test_report import Page, widest

from qleak.report import html, privacy, terminal
from qleak.report import study as studies
from qleak.report import training as trainings
from qleak.store import open_run, read_rows, read_run

CHANNEL = "clip_l2(bound=3.1) > total > mean(batch=32)"


def made(folder, accuracies, claimed=None, robust=None, epsilon=None):
    """A training whose rows and summary have ε growing with the epoch, guaranteed or claimed, and robust accuracy."""
    training(folder, accuracies, epsilon=None)
    rows, header = read_rows(folder), read_run(folder)
    with open_run(folder, header, fresh=True) as run:
        for r in rows:
            share = r["epoch"] / 5
            if claimed is not None:
                r["claimed_epsilon"] = claimed * share or None
            r["epsilon"] = None if epsilon is None else epsilon * share or None
            if robust is not None:
                r["robust_accuracy"] = robust
        run.append(rows)
        summary = [
            s | {"epsilon": epsilon}
            | ({"claimed_epsilon": claimed} if claimed is not None else {})
            | ({"robust_accuracy": robust, "robust_accuracy_ci": [robust - 0.02, robust + 0.02]} if robust is not None else {})
            for s in header["summary"]
        ]  # fmt: skip
        run.update(status="done", facts=header["facts"], summary=summary)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "study"
    parts = {
        "noise10-batch": made(root / "a", {CHANNEL: [0.67, 0.69]}, claimed=0.0221, robust=0.541),
        "honest": made(root / "b", {CHANNEL: [0.8, 0.82]}, epsilon=0.276, robust=0.612),
    }
    return study(root, {n: (path, "training") for n, path in parts.items()})


def shown(folder, **options):
    file = io.StringIO()
    terminal.show(folder, console=Console(file=file, width=80), **options)
    return file.getvalue()


def test_the_terminal_tells_a_claim_from_a_guarantee(folder):
    text = shown(folder)
    assert widest(text) <= 80
    assert "(0.0221?)" in text and "0.276" in text and "(0.276?)" not in text
    assert "54.1% ±2.0" in text and "81.0%" in text and f"Channel: {CHANNEL}" in text
    assert "the ε of 1 of 2 is claimed, no guarantee" in " ".join(text.split())
    assert "Pareto" not in text


def test_several_channels_of_a_part_are_told_apart(tmp_path):
    finals = {"clip_l2 > total > gaussian(sigma=0.8) > mean(batch=256)": [0.8], "sign()": [0.6]}
    parts = {n: (made(tmp_path / n, finals, epsilon=1.0), "training") for n in ("none", "group", "public")}
    text = shown(study(tmp_path, parts))
    assert widest(text) <= 80 and "gaussian(sigma=0.8)" in text
    assert "none · sign() 60.0%" in " ".join(text.split())


def test_the_summary_of_the_study_is_its_lines(folder):
    found = studies.summary(folder)
    assert [(s["part"], s["channel"]) for s in found] == [("noise10-batch", CHANNEL), ("honest", CHANNEL)]
    assert found[0]["claimed_epsilon"] == 0.0221 and found[1]["epsilon"] == 0.276


def test_curves_are_means_with_a_dot_an_epoch(folder):
    (claim,) = privacy.curves("noise10-batch", trainings.load(folder / "a"))
    (honest,) = privacy.curves("honest", trainings.load(folder / "b"))
    assert claim.claimed and not honest.claimed
    assert claim.name == "noise10-batch" and privacy.curves("", trainings.load(folder / "a"))[0].name == CHANNEL
    assert claim.epsilon == pytest.approx([0.0221 * k / 5 for k in range(1, 6)])  # nothing was released at epoch 0
    assert honest.accuracy[-1] == pytest.approx(0.81)
    svg = privacy.figure([("noise10-batch", trainings.load(folder / "a")), ("honest", trainings.load(folder / "b"))])
    assert svg.startswith("<svg") and "claimed, no guarantee" in svg and "mathdefault" not in svg
    bare = privacy.figure([("honest", trainings.load(folder / "b"))])
    assert "claimed" not in bare and hollow(bare) == 0
    assert hollow(privacy.figure([("noise10", trainings.load(folder / "a"))])) >= 5


def hollow(svg):
    """Marks that are drawn and not filled."""
    return sum("fill-opacity: 0" in mark for mark in re.findall(r"<use [^>]*>", svg))


def test_pages_hold_table_and_figure(folder, tmp_path):
    text = html.write(folder, tmp_path / "study.html").read_text(encoding="utf-8")
    assert not Page(text).faults
    assert "Trainings side by side" in text and "0.0221" in text and "claimed" in text
    alone = html.write(folder / "a", tmp_path / "training.html").read_text(encoding="utf-8")
    assert "claimed ε, no guarantee" in alone and "robust accuracy" in alone and "54.1%" in alone
    assert "Test accuracy over ε" in alone


def test_a_training_without_any_of_it_looks_as_before(tmp_path):
    folder = training(tmp_path / "plain", {"fp32": [0.9, 0.92]})
    run = trainings.load(folder)
    assert privacy.figure([("", run)]) == "" and trainings.heads(run.header) == trainings.HEADS
    assert "robust" not in shown(folder)
    robust = shown(made(tmp_path / "robust", {CHANNEL: [0.9, 0.92]}, robust=0.5, claimed=0.1))
    assert "robust" in robust and widest(robust) <= 80 and "0.1 claimed, no guarantee" in robust

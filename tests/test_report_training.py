"""Reports of trainings, and of audits with many channels: numbers as stored, bands by hand, pages that stay light."""

import io
import math

import pytest
from folders import audit, training
from rich.console import Console
from test_report import Page, widest

from qleak.errors import Expected
from qleak.report import figures, html, pictures, plots, stored, terminal
from qleak.report import training as trainings
from qleak.store import open_run, read_run

LONG = "topk(fraction=0.01) > stochastic(levels=16) > gaussian(sigma=0.125)"
FINALS = {"fp32": [0.98, 0.97, 0.99], "uniform(bits=4)": [0.95, 0.95, 0.95], LONG: [0.7, None, 0.8], "sign()": [None]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training(tmp_path_factory.mktemp("runs") / "learn", FINALS)


def shown(folder, **options):
    file = io.StringIO()
    terminal.show(folder, console=Console(file=file, width=80), **options)
    return file.getvalue()


def test_the_band_is_the_t_interval(folder):
    run = trainings.load(folder)
    band = run.band("fp32", "test_accuracy")
    assert band.at == [0, 1, 2, 3, 4, 5]
    assert band.mean[-1] == pytest.approx(0.98)
    assert band.high[-1] - band.mean[-1] == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5)
    assert band.mean[-1] - band.low[-1] == pytest.approx(band.high[-1] - band.mean[-1])
    assert run.band("uniform(bits=4)", "test_accuracy").low[-1] == pytest.approx(0.95)


def test_a_seed_of_which_nothing_is_left_takes_no_part(folder):
    run = trainings.load(folder)
    assert run.band(LONG, "test_accuracy").mean[-1] == pytest.approx(0.75)
    assert run.band(LONG, "test_accuracy").mean[1] == pytest.approx(0.1 + 0.5 * ((0.7 + 0.5 + 0.8) / 3 - 0.1))
    assert run.band("sign()", "train_loss").at == [0, 1]
    assert run.band("sign()", "train_loss").low == run.band("sign()", "train_loss").mean  # one seed has no band
    assert run.band("nobody", "train_loss").at == []


def test_a_seed_that_diverged_counts_where_its_accuracy_is_still_one(tmp_path):
    rows = [{"key": str(i), "channel": "c", "epoch": 1, "test_accuracy": a, "train_loss": loss, "status": status}
            for i, (a, loss, status) in enumerate([(0.9, 0.2, "ok"), (0.1, None, "diverged")])]  # fmt: skip
    with open_run(tmp_path / "a", {"kind": "training", "plan_id": "t"}) as run:
        run.append(rows)
    found = trainings.load(tmp_path / "a")
    assert found.band("c", "test_accuracy").mean == [0.5] and found.band("c", "train_loss").mean == [0.2]


def test_attacks_on_the_way_are_no_points_of_curves(folder):
    assert len(trainings.load(folder).rows) == 6 * sum(map(len, FINALS.values()))
    assert trainings.load(folder).channels() == list(FINALS)


def test_attacks_on_the_way_have_their_own_table(folder, tmp_path):
    lines = trainings.attacked(trainings.load(folder))
    assert {"channel": "fp32", "number": None, "front": False, "cells": ["1", "cells", "99.0", "1/1"]} in lines
    assert len(lines) == 2 * len(FINALS)
    assert "<h2>Attacks on the way" in html.write(folder, tmp_path / "x.html").read_text()


def test_the_terminal_shows_the_table_and_the_curves(folder):
    text = shown(folder)
    assert widest(text) <= 80 and "\x1b" not in text
    row = next(line for line in text.splitlines() if line.startswith("fp32"))
    assert row.split()[1:] == ["32.00", "—", "98.0%", "±2.5", "98.0%", "±2.5", "0.300", "0.400", "0/3"]
    assert next(line for line in text.splitlines() if line.startswith("sign()")).split()[1:] == [
        "1.01", "—", "—", "—", "—", "—", "1/1",
    ]  # fmt: skip
    assert "▁" in text and "10.0% → 98.0%" in text
    said = " ".join(text.split())
    assert "Verdict: test accuracy after 5 epochs, 3 seeds: fp32 98.0% ±2.5; uniform(bits=4) 95.0% ±0.0" in said
    assert "(−3.0 points)" in said and f"diverged: {LONG} 1 of 3, sign() 1 of 1" in said
    assert "qleak compare" in said


def test_quiet_is_the_verdict_alone(folder):
    assert " ".join(shown(folder, quiet=True).split()) == trainings.verdict(read_run(folder))


def test_a_spark_keeps_both_ends():
    assert trainings.spark([0.0, 0.5, 1.0], 0.0, 1.0) == "▁▅█" and trainings.spark([0.3], 0.3, 0.3) == "▁"
    long = trainings.spark([i / 999 for i in range(1000)], 0.0, 1.0)
    assert len(long) == trainings.MOST and long[0] == "▁" and long[-1] == "█"


def test_many_channels_fit_one_sentence():
    found = [{"channel": f"c{i}", "n": 3, "diverged": 0, "epoch": 1, "test_accuracy": i / 40} for i in range(40)]
    said = trainings.verdict({"summary": found})
    assert "after 1 epoch, 3 seeds: c39 97.5%; c38" in said and "… 34 between …; c2 5.0%" in said
    assert said.count("%") == trainings.TOLD
    assert trainings.verdict({"status": "failed"}) == "Verdict: none yet, the run is failed."


def test_the_page_holds_curves_and_numbers(folder, tmp_path):
    text = html.write(folder, tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.faults == [] and "script" not in page.tags
    assert text.index("Verdict: ") < text.index("<h2>Curves") < text.index("<h2>Numbers") < text.index("<h2>Setting")
    told = ["98.0% ±2.5", "0.4000 (0.3800–0.4200)", "uniform(bits=4)", "12.5", "sgd(momentum=0.9)", "95% t intervals"]
    assert [t for t in told if t not in text] == []
    assert html.write(folder, tmp_path / "again.html").read_text() == text


def test_an_unfinished_training_shows_its_curves(tmp_path):
    half = training(tmp_path / "half", {"fp32": [0.9, 0.8]}, status="interrupted")
    text = html.write(half, tmp_path / "x.html").read_text()
    assert Page(text).faults == [] and "<svg" in text and "No numbers yet" in text
    assert "→" in shown(half) and "goes on where it stopped" in shown(half)
    plan = read_run(half)["plan"]
    with open_run(tmp_path / "none", {"kind": "training", "plan_id": "t", "plan": plan, "status": "failed"}):
        pass
    text = html.write(tmp_path / "none", tmp_path / "y.html").read_text()
    assert Page(text).faults == [] and "No curves yet" in text
    assert "none yet, the run is failed" in shown(tmp_path / "none")


def test_other_kinds_are_refused(tmp_path):
    leak = audit(tmp_path / "a", {"fp32": {"dlg": 12.0}})
    with pytest.raises(Expected, match="kind 'training'"):
        trainings.load(leak)
    with open_run(tmp_path / "s", {"kind": "synthesis", "plan_id": "x"}), pytest.raises(Expected, match="kind 'audit'"):
        stored.load(tmp_path / "s")


def test_every_channel_has_its_own_line():
    looks = [tuple(sorted(plots.line_of(k).items())) for k in range(48)]
    assert len(set(looks)) == 48


# --- audits with many channels --------------------------------------------------------------------

CHANNELS = ["fp32", *(f"uniform(bits={b})" for b in range(1, 17)), *(f"topk(fraction=0.{k:02d})" for k in range(1, 24))]
ATTACKS = ["dlg", "idlg", "cells", "closed_form"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    found = {c: {a: 6.0 + i + 3 * j for j, a in enumerate(ATTACKS)} for i, c in enumerate(CHANNELS)}
    return audit(tmp_path_factory.mktemp("runs") / "many", found, images=3, restarts=2, size=32)


@pytest.mark.slow
def test_forty_channels_by_four_attacks_stay_light_and_readable(many, tmp_path):
    out = html.write(many, tmp_path / "report.html")
    text = out.read_text()
    page = Page(text)
    assert page.faults == [] and out.stat().st_size < 8e6
    assert '<ul class="cards' in text and text.count("✓ rebuilt") > 0
    verdict = text[text.index("Verdict: ") :]
    assert verdict[: verdict.index("</p>")].count("did") < 8 and "more; through" in verdict


def test_sheets_hold_every_channel_and_attacker(many):
    (title, (first,)), (others, rest), *controls = pictures.sheets(stored.load(many))
    assert title == "" and [line["channel"] for line in first["lines"]] == CHANNELS
    assert first["image"] == 0 and first["attacks"] == ATTACKS
    assert [p["psnr"] for p in first["lines"][1]["pictures"]] == ["6.0 dB", "9.0 dB", "12.0 dB", "15.0 dB"]
    assert others == "Other images" and [s["image"] for s in rest] == [1, 2]
    assert [(name, len(sheets)) for name, sheets in controls] == [
        ("Control prior-only", 1),
        ("Control wrong-gradient", 1),
    ]


def test_arms_stand_in_the_plans_order_whoever_finished_first(tmp_path):
    found = {c: {"dlg": 12.0, "cells": 25.0} for c in ("fp32", "sign()", "uniform(bits=2)")}
    path = audit(tmp_path / "a", found) / "rows.jsonl"
    arms = stored.load(path.parent).arms()
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert stored.load(path.parent).arms() == arms and arms[0] == ("fp32", "dlg")


def test_sheets_stop_where_the_page_grows_heavy(many, monkeypatch):
    run = stored.load(many)
    monkeypatch.setattr(pictures, "WEIGHT", 1)
    assert [len(sheets) for _, sheets in pictures.sheets(run)] == [1]


def test_large_pictures_are_averaged_down(tmp_path):
    run = stored.load(audit(tmp_path / "a", {"fp32": {"dlg": 12.0}}, images=1, size=150))
    picture = run.originals[0]
    assert pictures._small(picture).shape == (3, 50, 50)
    assert pictures._small(picture)[:, 0, 0].tolist() == pytest.approx(picture[:, :3, :3].mean((1, 2)).tolist())
    assert pictures._small(picture[:, :64, :64]) is not None and pictures._small(picture[:, :64, :64]).shape[-1] == 64


def test_small_runs_keep_their_pictures(tmp_path):
    two = audit(tmp_path / "two", {c: {"dlg": 12.0, "cells": 25.0} for c in ("fp32", "sign()")})
    text = html.write(two, tmp_path / "two.html").read_text()
    assert 'class="grid"' in text and '<ul class="cards' not in text
    three = audit(tmp_path / "three", {c: {"dlg": 12.0, "cells": 25.0} for c in ("fp32", "sign()", "uniform(bits=2)")})
    text = html.write(three, tmp_path / "three.html").read_text()
    assert '<ul class="cards' in text and 'class="grid"' not in text


def test_strips_show_every_lane(tmp_path, monkeypatch):
    run = stored.load(audit(tmp_path / "a", {"fp32": {"dlg": 12.0, "cells": 25.0}}, images=2, restarts=4))
    svg = figures.psnr_strips(run)
    assert svg.startswith("<svg") and "currentColor" in svg and figures.INK not in svg
    colour = f"fill: {figures.COLOURS[0]}"
    dots = svg.count("<use")
    fewer = stored.load(audit(tmp_path / "b", {"fp32": {"dlg": 12.0, "cells": 25.0}}, images=2, restarts=2))
    assert colour in svg and dots - figures.psnr_strips(fewer).count("<use") >= 2 * 2 * 2
    monkeypatch.setattr(figures, "DOTS", 1)
    assert "data:image/png" in figures.psnr_strips(run)


def test_fields_of_later_runs_are_shown_where_they_are(tmp_path):
    extra = {"psnr_ci": [10.5, 14.5], "psnr_weight_oracle": 33.25, "bits_entropy": 1.75, "rounds_seen": 7}
    text = html.write(audit(tmp_path / "a", {"fp32": {"dlg": 12.0}}, extra=extra), tmp_path / "a.html").read_text()
    told = ["12.0 (10.5–14.5)", "33.25", "1.75 entropy-coded", "prior weight by the truth", "rounds seen"]
    assert [t for t in told if t not in text] == []
    text = html.write(audit(tmp_path / "b", {"fp32": {"dlg": 12.0}}), tmp_path / "b.html").read_text()
    assert [t for t in told if t in text] == []

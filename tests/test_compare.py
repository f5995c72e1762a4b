"""The frontier joins what the folders say, says what differs, and `qleak compare` prints it in 80 columns."""

import csv
import io
import json

import pytest
from folders import audit, bits_of, study, training
from test_report import Page

from qleak.cli import main
from qleak.errors import Expected
from qleak.report import compare, frontier, html, plots
from qleak.report import study as studies
from qleak.report.frontier import Point, join, join_parts, notes, pareto, parts

LEAKS = {
    "fp32": {"dlg(outer=30)": 25.0, "cells": 60.0}, "uniform(bits=8)": {"dlg(outer=30)": 9.0, "cells": 30.0},
    "uniform(bits=2)": {"dlg(outer=30)": 8.0, "cells": 12.0}, "sign()": {"idlg": 8.0, "cells": 14.0},
}  # fmt: skip
LEARNS = {
    "fp32": [0.98, 0.97, 0.99],
    "uniform(bits=8)": [0.97, 0.96, 0.98],
    "uniform(bits=2)": [0.95],
    "kmeans(bits=4)": [0.9],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    leak = audit(root / "leak", LEAKS, extra={"psnr_ci": [10.0, 31.0], "bits_entropy": 1.5})
    return leak, training(root / "learn", LEARNS)


def of(points, channel):
    return next(p for p in points if p.channel == channel)


def test_a_point_holds_both_sides(runs):
    points = join(runs)
    p = of(points, "uniform(bits=8)")
    assert (p.attack, p.psnr, p.psnr_ci, p.ssim, p.recovered, p.images) == ("cells", 30.0, (10.0, 31.0), 0.5, 2, 2)
    assert (p.plain, p.psnr_plain, p.psnr_oracle, p.control) == ("dlg(outer=30)", 9.0, 32.0, 7.0)
    assert p.test_accuracy == pytest.approx(0.97) and (p.seeds, p.diverged) == (3, 0)
    assert p.test_accuracy_ci == pytest.approx((0.97 - 0.02484, 0.97 + 0.02484), abs=1e-5)  # 4.3027 · 0.01 / √3
    assert (p.bits, p.bits_entropy, p.epsilon) == (8.01, 1.5, None)
    assert of(points, "sign()").plain == "idlg"
    assert of(points, "uniform(bits=2)").test_accuracy_ci is None  # one seed


def test_a_channel_that_one_side_knows_stays(runs):
    points = join(runs)
    assert [p.channel for p in points] == ["fp32", "uniform(bits=8)", "kmeans(bits=4)", "uniform(bits=2)", "sign()"]
    assert of(points, "sign()").test_accuracy is None and of(points, "kmeans(bits=4)").psnr is None


def test_the_attack_chosen_by_the_truth_is_not_the_strongest(tmp_path):
    leak = audit(tmp_path / "a", {"fp32": {"dlg": 20.0, "cells": 21.0}})
    header = json.loads((leak / "run.json").read_text())
    for s in header["summary"]:
        if s["attack"] == "dlg":
            s["psnr_oracle"] = s["psnr_selected_max"] = 90.0
    (leak / "run.json").write_text(json.dumps(header))
    (p,) = join([leak])
    assert (p.attack, p.psnr, p.psnr_oracle) == ("cells", 21.0, 90.0)


def test_an_attack_by_distance_is_plain_where_the_first_papers_are_not(tmp_path):
    found = {"fp32": {"cells(objective='l2')": 12.0, "cells": 30.0, "closed_form(l2x=1)": 5.0}}
    (p,) = join([audit(tmp_path / "a", found)])
    assert (p.plain, p.psnr_plain) == ("cells(objective='l2')", 12.0)
    (p,) = join([audit(tmp_path / "b", {"fp32": {"cells": 30.0}})])
    assert p.plain is None and p.psnr_plain is None


def test_the_strongest_of_several_audits_counts_and_the_first_training(tmp_path):
    a = audit(tmp_path / "a", {"fp32": {"cells": 20.0}})
    b = audit(tmp_path / "b", {"fp32": {"refine": 40.0}})
    first, second = training(tmp_path / "t", {"fp32": [0.9]}), training(tmp_path / "u", {"fp32": [0.95]})
    held = parts([a, b, first, second])
    (p,) = join_parts(held)
    assert (p.attack, p.psnr, p.test_accuracy) == ("refine", 40.0, 0.9)
    assert "fp32 was trained 2 times: t, given first, counts." in notes(held)


def test_the_plain_attacker_is_of_the_strongest_ones_model_and_data(tmp_path):
    a = audit(tmp_path / "a", {"fp32": {"cells": 40.0, "dlg": 11.0}})
    b = audit(tmp_path / "b", {"fp32": {"cells": 30.0, "dlg": 19.0}}, data="photos")
    (p,) = join([a, b])
    assert (p.psnr, p.psnr_plain, p.data) == (40.0, 11.0, ("mnist", "photos"))
    same = audit(tmp_path / "c", {"fp32": {"dlg": 19.0}})
    assert join([a, same])[0].psnr_plain == 19.0


def test_a_training_without_a_guarantee_borrows_none(tmp_path):
    a = audit(tmp_path / "a", {"fp32": {"cells": 20.0}}, extra={"epsilon": 3.0})
    t = training(tmp_path / "t", {"fp32": [0.9]})
    assert join([a])[0].epsilon == 3.0 and join([a, t])[0].epsilon is None
    assert "ε of fp32: none over the training, 3 in the audit." in notes(parts([a, t]))
    strong = training(tmp_path / "u", {"fp32": [0.9]}, epsilon=12.0)
    assert join([a, strong])[0].epsilon == 12.0


def test_what_differs_is_said(runs, tmp_path):
    assert notes(parts(runs)) == []
    other = training(tmp_path / "other", {"fp32": [0.5]}, model="mlp()", data="cifar10-12k")
    said = notes(parts([runs[0], other]))
    assert any("differ in their models" in n and "mlp (other)" in n and "(leak)" in n for n in said)
    assert any("differ in their data sets" in n and "cifar10-12k (other)" in n and "mnist (leak)" in n for n in said)
    assert any("No training" in n for n in notes(parts(runs[:1])))
    assert any("No audit" in n for n in notes(parts(runs[1:])))


def test_the_front_is_what_nothing_beats():
    def at(psnr, accuracy, channel):
        return Point(channel, psnr=psnr, test_accuracy=accuracy)

    points = [at(60, 0.9, "a"), at(30, 0.8, "b"), at(40, 0.7, "worse"), at(10, 0.5, "c"), at(30, 0.8, "twin")]
    points += [at(None, 1.0, "gap"), at(1, None, "gap2"), at(10, 0.4, "below"), at(70, 0.9, "louder")]
    assert pareto(points) == {"a", "b", "twin", "c"}
    assert pareto([at(None, 1.0, "gap")]) == set()


def test_points_survive_json(runs):
    points = join(runs)
    assert compare.from_json(json.loads(json.dumps(compare.as_json(points)))) == points
    assert compare.from_json([{"channel": "x", "a_later_field": 1}]) == [Point("x")]


# --- studies --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("study") / "s"
    made = {"leaks": (audit(root / "leaks", LEAKS), "audit"), "learns": (training(root / "learns", LEARNS), "training")}
    return study(root, {**made, "later": (root / "later", "audit")})


def test_a_study_stands_for_its_parts(folder):
    assert join([folder]) == join([folder / "leaks", folder / "learns"])
    assert len(parts([folder, folder / "leaks"])) == 2  # each run once
    loaded = studies.load(folder)
    assert loaded.points == join([folder]) and "Not run yet, or gone: later." in loaded.notes
    assert studies.verdict(loaded).startswith("Verdict: on the front of test accuracy against PSNR are 3 of 3 channels")


def test_a_study_without_its_parts_shows_its_summary(tmp_path, runs):
    points = join(runs)
    alone = study(tmp_path / "s", {"a": (tmp_path / "s" / "a", "audit")}, summary=compare.as_json(points))
    assert studies.load(alone).points == points


def test_the_study_page_has_the_frontier_first(folder, tmp_path):
    html.write(folder / "leaks", folder / "leaks" / "report.html")
    text = html.write(folder, folder / "report.html").read_text()
    page = Page(text)
    assert [f for f in page.faults if f != "loads leaks/report.html"] == []
    assert text.index("<h2>Frontier") < text.index("<h2>Part leaks") < text.index("<h2>Part learns")
    assert 'id="frontier-' in text and 'id="part1-' in text and '<a href="leaks/report.html">' in text
    assert "Not run yet, or gone" in text
    html.write(folder, tmp_path / "elsewhere.html")
    assert "/leaks/report.html" in (tmp_path / "elsewhere.html").read_text()


def test_an_empty_study_is_rendered(tmp_path):
    empty = study(tmp_path / "s", {}, status="interrupted")
    text = html.write(empty, tmp_path / "x.html").read_text()
    assert Page(text).faults == [] and "Verdict: none yet, the study is interrupted." in text


# --- the plot -------------------------------------------------------------------------------------


def test_the_plot_names_few_channels_and_numbers_many(runs):
    few = plots.frontier(join(runs))
    assert "uniform(bits=2)" in few and "sign()" not in few  # sign() was not trained
    many = [Point(f"c{i}", psnr=float(i), test_accuracy=0.5 + i / 100, bits=4.0) for i in range(plots.NAMED + 1)]
    svg = plots.frontier(many)
    assert "c3" not in svg and ">15</text>" in svg
    assert plots.frontier([Point("x", psnr=3.0)]) == ""


# --- the command ----------------------------------------------------------------------------------


def call(capsys, monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["qleak", "compare", *map(str, argv)])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        main()
    out = capsys.readouterr()
    return left.value.code or 0, out.out, out.err


def test_the_table_fits_80_columns(runs, tmp_path, capsys, monkeypatch):
    name = "topk(fraction=0.01) > stochastic(levels=16) > gaussian(sigma=0.125)"
    wide = audit(tmp_path / "wide", {name: {"dlg": 12.0}})
    code, out, err = call(capsys, monkeypatch, *runs, wide)
    assert code == 0 and err == "" and max(map(len, out.splitlines())) <= 80
    lines = out.splitlines()
    eight = next(line for line in lines if "uniform(bits=8)" in line)
    assert eight.startswith("* ") and eight.split()[2:] == ["8.01", "—", "cells", "30.0", "9.0", "2/2", "97.0%", "±2.5"]
    rows = lines[: next(i for i, line in enumerate(lines) if line.startswith("Sorted by bits"))]
    order = [next(i for i, line in enumerate(rows) if c in line) for c in ("fp32", "bits=8", "kmeans", "bits=2")]
    assert order == sorted(order)


def test_runs_are_found_by_name(runs, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "leak", "learn", "--out", runs[0].parent)
    assert code == 0 and "97.0%" in out
    code, out, err = call(capsys, monkeypatch, "leek", "--out", runs[0].parent)
    assert code == 2 and err.count("\n") == 1 and "got 'leek'. Did you mean 'leak'?" in err


def test_json_and_csv_hold_the_points(runs, tmp_path, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, *runs, "--json", "--csv", tmp_path / "t.csv")
    told = json.loads(out)
    assert code == 0 and compare.from_json(told["points"]) == join(runs) and told["notes"] == []
    rows = {r["channel"]: r for r in csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text()))}
    assert rows["uniform(bits=8)"]["psnr_ci_high"] == "31.0" and rows["sign()"]["test_accuracy_ci_low"] == ""
    assert float(rows["fp32"]["bits"]) == bits_of("fp32") and len(rows) == len(told["points"])


def test_the_page_is_one_file(runs, tmp_path, capsys, monkeypatch):
    html.write(runs[1], runs[1] / "report.html")
    code, out, _ = call(capsys, monkeypatch, *runs, "--html", tmp_path / "c.html")
    assert code == 0 and str(tmp_path / "c.html") in "".join(out.split())
    text = (tmp_path / "c.html").read_text()
    page = Page(text)
    assert [f for f in page.faults if "learn/report.html" not in f] == [] and "script" not in page.tags
    assert 'id="frontier-' in text and "kmeans(bits=4)" in text and "learn/report.html" in text


def test_runs_without_numbers_are_one_line(tmp_path, capsys, monkeypatch):
    unfinished = training(tmp_path / "u", {"fp32": [0.9]}, status="interrupted")
    assert any("u is interrupted: it has no numbers yet." in n for n in notes(parts([unfinished])))
    code, _, err = call(capsys, monkeypatch, unfinished)
    assert code == 2 and err.count("\n") == 1 and "found none" in err
    with pytest.raises(Expected, match=r"run\.json"):
        frontier.parts([tmp_path / "nothing"])
    assert call(capsys, monkeypatch, unfinished, "--html", tmp_path / "x.html")[0] == 2
    assert not (tmp_path / "x.html").exists()

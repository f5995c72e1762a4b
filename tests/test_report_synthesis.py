"""Reports of syntheses: numbers as stored, intervals by hand, arms below the floor called so, pages that stand alone."""

import io
import json
import math

import pytest
import torch
from folders import audit
from made import ARMS, CLASSES, synthesis
from rich.console import Console
from test_report import Page, widest

from qleak.errors import Expected
from qleak.report import canaries, html, sheets, terminal
from qleak.report import synthesis as syntheses
from qleak.report import synthesis_figures as figures
from qleak.report.synthesis_page import threat_model
from qleak.store import open_run, read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthesis(tmp_path_factory.mktemp("runs") / "made")


@pytest.fixture(scope="module")
def budgets(tmp_path_factory):
    return synthesis(tmp_path_factory.mktemp("runs") / "budgets", budgets=(0.2, 1.0, 10.0))


def shown(folder, colour=None, **options):
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=colour is not None, color_system=colour)
    terminal.show(folder, console=console, **options)
    return file.getvalue()


def flat(text):
    return " ".join(text.split())


def test_the_curve_is_the_mean_with_its_t_interval(folder):
    curve = syntheses.load(folder).curve("second moments")
    assert (
        curve.at == [0, 10, 20, 30, 40]
        and curve.mean[-1] == pytest.approx(0.92)
        and curve.mean[0] == pytest.approx(0.1)
    )
    assert curve.high[-1] - curve.mean[-1] == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-5)
    assert curve.epsilon == pytest.approx([0.9991 * (t / 40) ** 0.5 for t in curve.at])
    assert syntheses.load(folder).curve("nobody").at == []


def test_other_judges_are_no_points_of_the_curve(folder):
    run = syntheses.load(folder)
    assert run.judge == "mlp_classifier"
    assert run.curve("top-5 sign").mean[-1] == pytest.approx(0.62)  # with the second judge it were 0.595


def test_the_terminal_shows_the_table(folder):
    text = shown(folder)
    assert widest(text) <= 80 and "\x1b" not in text and "▀" not in text
    rows = {name: next(line for line in text.splitlines() if line.startswith(name)).split() for name in ARMS}
    assert rows["second moments"][2:] == ["0.999", "40", "92.0%", "±5.0", "93.0%", "76.0%", "+16.0", "12.5", "3.0"]
    assert rows["top-5 sign"][2:] == ["0.987", "40", "62.0%", "±5.0", "63.0%", "76.0%", "−14.0", "12.5", "3.0"]
    assert rows["as published"][2:4] == ["none", "40"] and rows["one noisy average"][-4:] == ["—", "—", "12.5", "3.0"]
    said = flat(text)
    assert "max over epochs, chosen on the test set" in said
    assert "ε of as published: 0.95 claimed, no guarantee (teachers share Adam moments)." in said
    assert "top-5 sign · logistic 57.0% ±5.0 58.0%" in said
    assert "top-5 sign ▁" in said and "10.0% → 62.0% at step 40" in said


def test_the_verdict_says_who_is_worse_than_one_noisy_average(folder):
    said = syntheses.verdict(read_run(folder))
    assert said.startswith(
        "Verdict: at ε ≤ 1 (δ 1e-05), second moments reaches 92.0% ±5.0 (16.0 points above one noisy average);"
    )
    assert "top-5 sign reaches 62.0% ±5.0 (worse than one noisy average by 14.0 points)" in said
    assert (
        "as published reaches 71.0% ±2.5 (worse than one noisy average by 5.0 points, within the intervals" not in said
    )
    assert "by 5.0 points), ε 0.95 claimed, no guarantee" in said and said.count("no guarantee") == 1
    assert "one noisy average reaches 76.0% ±2.5" in said and "last epoch, 3 seeds" in said
    assert flat(shown(folder, quiet=True)) == said


@pytest.mark.parametrize(
    ("accuracy", "ci", "stands"),
    [
        (0.80, [0.79, 0.81], "4.0 points above one noisy average"),
        (0.77, [0.74, 0.80], "1.0 points above one noisy average, within the intervals of the seeds"),
        (0.75, [0.74, 0.76], "worse than one noisy average by 1.0 points, within the intervals of the seeds"),
        (0.60, [0.59, 0.61], "worse than one noisy average by 16.0 points"),
        (0.76, [None, None], "no better than one noisy average"),
    ],
)
def test_an_arm_stands_above_the_floor_or_below(accuracy, ci, stands):
    s = {
        "floor": False,
        "accuracy": accuracy,
        "accuracy_ci": ci,
        "floor_accuracy": 0.76,
        "floor_accuracy_ci": [0.755, 0.765],
    }
    assert syntheses.standing(s) == stands
    assert syntheses.standing(s | {"floor": True}) == syntheses.standing(s | {"floor_accuracy": None}) == ""


def test_several_budgets_have_a_clause_each(budgets):
    said = syntheses.verdict(read_run(budgets))
    assert [f"at ε ≤ {e} (δ 1e-05), second moments 92.0%" in said for e in ("0.2", "1", "10")] == [True] * 3
    assert "Worse than one noisy average: top-5 sign at ε ≤ 0.2, 1, 10; as published at ε ≤ 0.2, 1, 10." in said
    text = shown(budgets)
    assert widest(text) <= 80
    assert next(line for line in text.splitlines() if line.startswith("top-5 sign ε=10")).split()[3] == "9.87"


def test_many_arms_fit_one_sentence(tmp_path):
    arms = {f"a{i:02d}": ([0.5 + i / 100] * 2, 1.0, None, "") for i in range(12)} | {
        "one noisy average": ([0.7, 0.7], 1.0, None, "")
    }
    said = syntheses.verdict(read_run(synthesis(tmp_path / "many", arms, seeds=2)))
    assert "a11 reaches 61.0% ±0.0" in said and "6 more below them" in said and "a05" not in said


def test_a_single_seed_has_no_interval(tmp_path):
    one = synthesis(tmp_path / "one", seeds=1, judges=("logistic",), quality=False)
    text = shown(one)
    assert "±" not in text.split("ε: exact")[0] and "other judges" not in text
    line = next(line for line in text.splitlines() if line.startswith("second moments"))
    assert line.split()[-2:] == ["—", "3.0"]
    page = html.write(one, tmp_path / "x.html").read_text()
    assert Page(page).faults == [] and "Quality and memorisation" not in page


def test_pictures_are_of_the_first_measured_seed_and_need_colour(folder):
    seed, images = syntheses.load(folder).sheet("top-5 sign") or pytest.fail("no sheet")
    assert seed == 0 and images.shape == (100, 1, 8, 8)
    text = shown(folder, colour="truecolor")
    assert text.count("▀") == len(ARMS) * 2 * 4 * (5 * 9 - 1)  # ten images in two lines, a half-block for two pixels
    assert max(line.count("▀") for line in text.splitlines()) == 5 * 9 - 1
    assert "one image of each class" in text and "one image of each class" not in shown(folder)


def test_only_the_sheet_of_a_checkpoint_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load", lambda data: pytest.fail("a whole checkpoint was read"))
    assert syntheses.load(folder).sheet("second moments") is not None
    broken = synthesis(tmp_path / "broken")
    (broken / "tensors" / "state-1-0.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(Expected, match="whole safetensors file"):
        html.write(broken, tmp_path / "x.html")


def test_a_sheet_has_a_column_per_class():
    images = torch.arange(6).reshape(6, 1, 1, 1).expand(6, 1, 2, 2) / 6  # classes 0 0 1 1 2 2
    picture = sheets.columns(images, 3)
    assert picture.shape == (3, 5, 8)
    assert (picture[0, ::3, ::3] * 6).round().tolist() == [[0, 2, 4], [1, 3, 5]]
    assert (picture[:, 2] == 0.5).all() and (picture[:, :, 2] == 0.5).all()
    assert sheets.png(picture, 3)[:4] == b"\x89PNG"


def test_the_page_says_all_of_it(folder, tmp_path):
    text = html.write(folder, tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.faults == [] and "script" not in page.tags and "<h2>Channels" not in text
    order = ["Verdict: ", "<h2>Synthetic images", "<h2>Numbers", "<h2>Accuracy over ε", "<h2>Along the way",
             "<h2>What is guaranteed", "<h2>Quality", "<h2>Every judge", "<h2>Arms", "<h2>How to repeat", "<h2>Papers"]  # fmt: skip
    assert [text.index(title) for title in order] == sorted(text.index(title) for title in order)
    told = ["92.0% ±5.0", "max over epochs, chosen on the test set", "373.2", "step 41 would pass ε", "teachers share Adam moments",
            "12.5 (12–13)", "1.020", "60,000 records", "replace-one", "exactly one teacher", "Wang 2021.", "0.9991"]  # fmt: skip
    assert [t for t in told if t not in text] == []
    assert len(page.images) == len(ARMS)
    assert (
        page.images[1]["alt"]
        == "Synthetic images of top-5 sign: 10 columns, one per class from 0 to 9, 10 samples each"
    )
    assert html.write(folder, tmp_path / "again.html").read_text() == text


def test_an_unfinished_synthesis_shows_its_curves(tmp_path):
    half = synthesis(tmp_path / "half", status="interrupted")
    text = html.write(half, tmp_path / "x.html").read_text()
    assert (
        Page(text).faults == [] and "No numbers yet" in text and "No images yet" in text and "<h2>Along the way" in text
    )
    assert "goes on where it stopped" in shown(half) and "at step 40" in shown(half)
    plan = read_run(half)["plan"]
    with open_run(tmp_path / "none", {"kind": "synthesis", "plan_id": "s", "plan": plan, "status": "running"}):
        pass
    text = html.write(tmp_path / "none", tmp_path / "y.html").read_text()
    assert Page(text).faults == [] and "none yet, the run is running" in text
    assert "none yet, the run is running" in shown(tmp_path / "none")


def test_curves_show_every_arm_with_steps_and_budgets_every_arm_with_an_epsilon(folder, budgets):
    run = syntheses.load(folder)
    curves, over = figures.curves(run), figures.budgets(run)
    for svg in (curves, over):
        assert svg.startswith("<svg") and "currentColor" in svg and "one noisy average" in svg
    assert "ε spent" in curves and "as published" in curves
    assert "as published (no ε)" in over and "second moments" in over
    assert "ε=0.2" not in figures.budgets(syntheses.load(budgets))  # one line per method


def test_nothing_to_draw_is_no_figure(tmp_path):
    arms = {"x": ([0.5, 0.6], None, None, "nothing is private"), "one noisy average": ([0.7, 0.7], None, None, "")}
    run = syntheses.load(synthesis(tmp_path / "a", arms, steps=0))
    assert figures.curves(run) == figures.budgets(run) == ""


def test_teachers_are_spoken_of_only_where_there_are_some(folder):
    header = read_run(folder)
    assert "Teachers" in dict(threat_model(header))
    facts = [fact | {"spec": "class_means"} for fact in header["facts"]]
    assert "Teachers" not in dict(threat_model(header | {"facts": facts}))
    assert "the 12 syntheses" in dict(threat_model(header))["What ε counts"]


def test_other_kinds_are_refused(tmp_path):
    with pytest.raises(Expected, match="kind 'synthesis'"):
        syntheses.load(audit(tmp_path / "a", {"fp32": {"dlg": 12.0}}))


@pytest.mark.slow
def test_what_the_engine_writes_is_what_reports_read(tmp_path):
    """The made-up folders have exactly the fields of a real one."""
    from qleak import engine
    from qleak.catalog import build
    from qleak.plans import Synthesis

    plan = Synthesis(
        data="mnist", methods=(build("synthesizers", "class_means(spread=0.1)"),), names=("narrow",),
        classifiers=(build("classifiers", "logistic(epochs=1)"),), size=8, limit=300, test_limit=200, samples=100, seeds=2,
        files=0, quality=False,
    )  # fmt: skip
    out = tmp_path / "real"
    with open_run(out, plan.header("narrow")) as run:
        for _ in engine.run(plan, run):
            pass
    real, fake = read_run(out), read_run(synthesis(tmp_path / "fake"))
    assert real["status"] == "done" and fake.keys() - real.keys() == set()
    for field in ("summary", "facts"):
        assert real[field][0].keys() == fake[field][0].keys()
    assert real["summary"][0]["judges"][0].keys() == fake["summary"][0]["judges"][0].keys()
    rows = [json.loads((f / "rows.jsonl").read_text().splitlines()[0]) for f in (out, tmp_path / "fake")]
    assert rows[0].keys() == rows[1].keys()
    _, images = syntheses.load(out).sheet("narrow") or pytest.fail("no sheet")
    assert images.shape == (10 * CLASSES, 1, 8, 8)
    page = html.write(out, tmp_path / "x.html").read_text()
    assert Page(page).faults == [] and page.count("data:image/png") == 2
    assert widest(shown(out)) <= 80


def test_canaries_beyond_what_is_promised_are_named(tmp_path):
    folder = synthesis(tmp_path / "run")
    with open_run(folder, read_run(folder)) as run:
        calm = {
            "canary_teachers": 1.0,
            "canary_reach": 0.9,
            "canary_divergence": 0.01,
            "canary_promised": 0.03,
            "canary_epsilon": 0.5,
        }
        broken = calm | {"canary_divergence": 0.05, "canary_teachers": 40.0}
        kinds = [calm, broken, calm | {"canary_reach": 1.5}]
        summary = run.header["summary"]
        run.update(summary=[s | more for s, more in zip(summary, [*kinds, {}], strict=True)])
    assert [broken for _, broken, _ in canaries.rows(read_run(folder))] == [False, True, True]
    text = shown(folder)
    assert "! beyond what is promised: top-5 sign; as published." in " ".join(text.split())
    page = html.write(folder, tmp_path / "x.html").read_text()
    assert "One record replaced" in page and page.count("promise broken") == 2
    assert widest(text) <= 80

"""A study: an audit and a training of the same channels, run as one and joined into one table."""

import json

import pytest

from qleak import engine, store
from qleak.attacks import adaptive, dlg
from qleak.catalog import build
from qleak.channels import chain, uniform
from qleak.client import gradient
from qleak.errors import Expected
from qleak.plans import Audit, Study, Training, from_json
from qleak.report import compare, frontier

RECIPE = '''
"""Two channels, both readers."""

from qleak.attacks import dlg, closed_form
from qleak.catalog import build
from qleak.channels import chain, sign
from qleak.client import gradient
from qleak.plans import Audit, Study, Training


def small(images: int = 2) -> Study:
    """The plan."""
    net = build("models", "mlp(channels=1, size=28, hidden=(8,))")
    channels = (chain(), chain(sign()))
    audit = Audit(net, "mnist5k", tuple(range(images)), channels, (dlg(outer=1),), bounds="no")
    training = Training(net, "mnist5k", channels, gradient(batch=50), epochs=1, limit=200, seeds=2)
    return Study(("leakage", "accuracy"), (audit, training))
'''


@pytest.fixture
def plan():
    net = build("models", "mlp(channels=1, size=28, hidden=(8,))")
    channels = (chain(), chain(uniform(levels=4)))
    audit = Audit(net, "mnist5k", (0, 7), channels, (dlg(outer=1), adaptive(stages=2, steps=5, last=5)))
    training = Training(net, "mnist5k", channels, gradient(batch=50), epochs=1, limit=200, seeds=2)
    return Study(("leakage", "accuracy"), (audit, training))


def header(plan):
    return {"kind": plan.kind, "plan_id": plan.id, "plan": plan.as_json(), "recipe": "", "flags": {}}


def test_a_study_is_written_down_and_read_back(plan):
    again = from_json(json.loads(json.dumps(plan.as_json())))
    assert again.id == plan.id
    assert [p.id for p in again.parts] == [p.id for p in plan.parts]
    other = Study(("leakage", "learning"), plan.parts)
    assert other.id != plan.id


def test_names_and_parts_belong_together(plan):
    with pytest.raises(Expected, match="Expected one name for each of 2 parts"):
        Study(("both",), plan.parts)


def test_its_parts_are_ordinary_runs_and_join_by_channel(plan, tmp_path):
    with store.open_run(tmp_path / "s", header(plan)) as run:
        unit, total = engine.size(plan)
        steps = [e for e in engine.run(plan, run) if isinstance(e, engine.Step)]
        run.update(summary=compare.as_json(frontier.join([tmp_path / "s"])))
    assert unit
    assert all(0 <= s.done <= 1000 for s in steps)
    assert total > 0
    points = {p["channel"]: p for p in store.read_run(tmp_path / "s")["summary"]}
    assert set(points) == {"fp32", "uniform(levels=4)"}
    for point in points.values():
        assert point["psnr"] is not None
        assert 0 <= point["test_accuracy"] <= 1
    assert points["uniform(levels=4)"]["bits"] < 3
    alone = store.read_run(tmp_path / "s" / "leakage")
    assert alone["plan_id"] == plan.parts[0].id
    assert alone["status"] == "done"
    weights = [
        s["psnr_weight_oracle"] for s in alone["summary"] if s["control"] == "none" and "adaptive" in s["attack"]
    ]
    chosen = [s["psnr_selected"] for s in alone["summary"] if s["control"] == "none" and "adaptive" in s["attack"]]
    assert all(w >= c - 1e-6 for w, c in zip(weights, chosen, strict=True))


def test_a_part_that_is_done_is_not_run_again(plan, tmp_path):
    with store.open_run(tmp_path / "s", header(plan)) as run:
        list(engine.run(plan, run))
    before = (tmp_path / "s" / "accuracy" / "rows.jsonl").read_bytes()
    with store.open_run(tmp_path / "s", header(plan)) as run:
        assert not [e for e in engine.run(plan, run) if isinstance(e, engine.Rows)]
    assert (tmp_path / "s" / "accuracy" / "rows.jsonl").read_bytes() == before


def test_starting_over_starts_every_part_over(plan, tmp_path):
    with store.open_run(tmp_path / "s", header(plan)) as run:
        list(engine.run(plan, run))
    rows = tmp_path / "s" / "accuracy" / "rows.jsonl"
    first = rows.stat().st_mtime_ns
    with store.open_run(tmp_path / "s", header(plan), fresh=True) as run:
        list(engine.run(plan, run))
    assert rows.stat().st_mtime_ns > first
    assert store.read_run(tmp_path / "s" / "accuracy")["status"] == "done"


@pytest.mark.slow
def test_the_command_line_runs_shows_and_compares_a_study(tmp_path, qleak):
    (tmp_path / "small.py").write_text(RECIPE, encoding="utf-8")

    def call(*words):
        code, out, err = qleak(*words)
        assert code == 0, err
        return out

    assert "Verdict" in call("recipe", "run", "./small.py", "--workers", "1")
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "report.html").stat().st_size > 10_000
    assert {p["channel"] for p in store.read_run(folder)["summary"]} == {"fp32", "sign"}
    assert "sign" in call("compare", str(folder / "leakage"), str(folder / "accuracy"))
    assert "sign" in call("report", str(folder))

"""The DataLens recipes: their flags, and small runs in the sets' true layouts, from images on disk to sample files."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
from layouts import celeba_layout
from test_synth_sets import places

from qleak import engine, store
from qleak.cli import recipes
from qleak.errors import Expected
from qleak.plans.lens import ARMS, lens, like

TINY = {
    "teachers_batch": 2, "batch_teachers": 1, "steps": 2, "epoch": 2, "seeds": 1, "samples": 12, "classifiers": "logistic(epochs=1)",
    "eval_every": 0, "files": 2, "limit": 0, "test": 0, "aggregate": "signsgd", "topk": 3, "size": 8,
}  # fmt: skip


def recipe(name):
    return recipes.load(f"datalens_{name}")[0]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "celeba_gender", "celeba_hair", "places365"])
def test_they_share_the_flags_of_the_published_command_line(name):
    fn = recipe(name)
    own = inspect.signature(fn, eval_str=True).parameters
    assert list(own) == list(inspect.signature(lens).parameters)
    assert own["dataset"].default.replace("-", "_") == name
    small, full = fn(), fn(full=True)
    assert small.id != full.id and small.size < full.size
    assert "dcgan_critic" in full.methods[0].spec and "dcgan_critic" not in small.methods[0].spec
    assert fn(dataset="kmnist").data == "kmnist"


def test_other_defaults_are_defaults_only():
    @like(size=16)
    def mine(**flags):
        return lens(**flags)

    assert mine().size == 16 and mine(size=8).size == 8 and lens().size == 8


def test_unknown_aggregators_are_named():
    with pytest.raises(Expected, match="Did you mean 'sign"):
        lens(aggregate="signsdg")
    assert len(lens(aggregate=",".join(ARMS)).methods) == len(ARMS)


@pytest.mark.parametrize(
    ("name", "layout", "classes"),
    [("celeba_gender", celeba_layout, 2), ("celeba_hair", celeba_layout, 3), ("places365", places, 3)],
)
def test_colour_sets_in_their_true_layouts(name, layout, classes, tmp_path, monkeypatch):
    monkeypatch.setenv("QLEAK_DATA", str(tmp_path))
    layout(tmp_path)
    plan = replace(recipe(name)(**TINY), per_file=6, quality=False)
    with store.open_run(tmp_path / "run", plan.header(name)) as run:
        events = list(engine.run(plan, run))
    (arm, floor) = events[-1].summary
    assert {"epsilon", "delta", "accuracy", "floor_accuracy", "cpu_s"} <= set(arm)
    assert 0.999 < arm["epsilon"] <= 1 and arm["delta"] == 1e-5 and arm["floor_accuracy"] == floor["accuracy"]
    files = sorted((tmp_path / "run" / "samples").rglob("*.npz"))
    assert [f.name for f in files] == ["eps-1.00.data-0.npz", "eps-1.00.data-1.npz"]
    data = np.load(files[0])["data"]
    assert data.shape == (6, 3 * 8 * 8 + classes) and (data[:, -classes:].sum(1) == 1).all()
    assert data.min() >= 0 and data.max() <= 1
    assert not np.array_equal(data, np.load(files[1])["data"])


def test_a_finished_run_makes_nothing_again(tmp_path, monkeypatch):
    monkeypatch.setenv("QLEAK_DATA", str(tmp_path))
    celeba_layout(tmp_path)
    plan = replace(recipe("celeba_gender")(**TINY), per_file=6, quality=False)
    for again in (False, True):
        with store.open_run(tmp_path / "run", plan.header("x")) as run:
            events = list(engine.run(plan, run))
            rows = run.rows()
        made = [e for e in events if isinstance(e, engine.Rows)]
        assert bool(made) != again
    (next((tmp_path / "run" / "samples").rglob("*data-1.npz"))).unlink()
    with store.open_run(tmp_path / "run", plan.header("x")) as run:
        list(engine.run(plan, run))
        assert run.rows() == rows
    assert len(list((tmp_path / "run" / "samples").rglob("*.npz"))) == 2


def test_ablation_and_defects_are_plans_of_one_exact_budget():
    ablation = recipe("ablation")(teachers="4000,100", topk="5,64", thresh="none,0.1", others="l2,non_private")
    assert len(ablation.methods) == 2 * (2 * 2 + 2) and len(set(ablation.names)) == len(ablation.names)
    for arm in ablation.arms():
        if "non_private" not in arm.name and not arm.floor:
            assert "calibrate=True" in arm.method.spec
    with pytest.raises(Expected, match="multiple of 100"):
        recipe("ablation")(teachers="150")
    defects = recipe("defects")()
    assert [bool(m.unsound) for m in defects.methods] == [False, True, True, True]
    assert defects.canary and defects.non_release

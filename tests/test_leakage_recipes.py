"""The leakage recipes: every default is a plan, images are named by index or file, audits stand side by side."""

import json
import shutil
import sys

import numpy as np
import pytest
from layouts import cifar10_layout, cifar100_layout, lfw_layout, write_idx
from PIL import Image

from qleak import data, engine, store
from qleak.attacks import cells
from qleak.channels import chain, sign
from qleak.cli import main, recipes
from qleak.client import gradient
from qleak.data import called
from qleak.data.picture import digest_of
from qleak.errors import Expected
from qleak.models import mlp
from qleak.plans import Audit, Study, from_json
from qleak.plans import victims as named
from qleak.report import html, parts, study

FIRST = ("dlg_mnist", "dlg_cifar10", "dlg_cifar100", "idlg_mnist", "idlg_cifar10", "idlg_cifar100", "idlg_lfw")
STUDIES = ("batch_size", "local_steps", "trained_vs_untrained", "architectures", "batchnorm_prior")
CLASSES = {"mnist": 10, "cifar10": 10, "cifar100": 100}


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Forty small images of every public set the recipes name, in the layouts they have on disk."""
    root = tmp_path / "sets"
    x = (np.arange(40 * 28 * 28).reshape(40, 28, 28) * 31 % 256).astype(np.uint8)
    write_idx(root, "MNIST", (x, np.arange(40) % 10), (x[:4], np.arange(4)))
    cifar10_layout(root)
    cifar100_layout(root)
    lfw_layout(root)
    monkeypatch.setenv("QLEAK_DATA", str(root))
    return root


@pytest.fixture
def file(tmp_path):
    """A colour picture that is no square: red above, blue below."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :, 0], pixels[20:, :, 2] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "two.png")
    return str(tmp_path / "two.png")


def plan_of(name, **flags):
    return recipes.load(name)[0](**flags)


def again(plan):
    return from_json(json.loads(json.dumps(plan.as_json())))


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST)
def test_the_first_papers_recipes_are_plans_of_one_image(name, sets):
    plan = plan_of(name, index="2")
    which = name.split("_")[1]
    assert again(plan).id == plan.id
    assert (plan.victims, plan.restarts, plan.controls, plan.chunk) == ((2,), 1, 1, 16)
    assert [a.spec.split("(")[0] for a in plan.attacks] == [name.split("_")[0]]
    assert plan.model.shape == ((1, 28, 28) if which == "mnist" else (3, 32, 32))
    assert plan.model.classes == CLASSES.get(which, data.load("lfw", limit=1).classes)
    assert len(data.load(plan.data).x) >= 3  # the engine finds the set by the plan's text alone
    assert "outer=300" in plan_of(name, index="2", full=True).attacks[0].spec
    assert {a.spec.split("(")[0] for a in plan_of(name, index="2", both=True).attacks} == {"dlg", "idlg"}


def test_a_long_range_runs_without_controls_in_wide_chunks(sets):
    assert (plan_of("dlg_mnist", index="0:20").controls, plan_of("dlg_mnist", index="0:20").chunk) == (1, 16)
    plan = plan_of("dlg_mnist", index="5:26")
    assert (plan.victims, plan.controls, plan.chunk) == (tuple(range(5, 26)), 0, 32)


@pytest.mark.parametrize("name", [*STUDIES, "inverting_gradients_cifar10"])
def test_the_other_defaults_are_plans(name, sets):
    plan = plan_of(name)
    assert again(plan).id == plan.id
    if "mnist5k" in str(plan.as_json()):  # --full asks for more images than the small sets of this test hold
        assert again(large := plan_of(name, full=True)).id == large.id != plan.id
    assert isinstance(plan, Study) == (name in STUDIES)
    assert all(plan.lines().values())


def test_every_batch_size_is_asked_about_the_same_images(sets):
    plan = plan_of("batch_size", batches="1,2,8")
    images = [{v + i for v in part.victims for i in range(part.client.batch)} for part in plan.parts]
    assert plan.names == ("batch-1", "batch-2", "batch-8")
    assert images[0] == images[1] == images[2]
    assert len(images[0]) == 16
    with pytest.raises(Expected, match="Expected batches of 3 that fill blocks of 8 images"):
        plan_of("batch_size", batches="3,8")


def test_every_number_of_steps_is_asked_about_the_same_images(sets):
    plan = plan_of("local_steps", steps="1,2,4,8", images=4)
    assert [part.client.steps for part in plan.parts] == [1, 2, 4, 8]
    assert {(part.client.batch, part.victims) for part in plan.parts} == {(4, (0, 20))}
    assert [part.client.part for part in plan.parts] == [4, 2, 1, 1]
    with pytest.raises(Expected, match="Expected steps=3 to divide images=4"):
        plan_of("local_steps", steps="3", images=4)


def test_the_threat_models_of_batch_norm_differ_in_what_is_shared(sets):
    plan = plan_of("batchnorm_prior", grants="none,running,batch")
    assert [part.grants for part in plan.parts] == [(), ("buffers",), ("statistics",)]
    assert "statistics" in plan.lines()["shared-batch"]
    with pytest.raises(Expected, match="Expected grants='all' of: none, running, batch"):
        plan_of("batchnorm_prior", grants="all")


# --- naming images --------------------------------------------------------------------------------


def test_indices_are_numbers_or_ranges():
    assert named.indices("25", 60000, "mnist") == (25,)
    assert named.indices(" 3 : 6 ", 6, "mnist") == (3, 4, 5)
    assert named.indices("59999", 60000, "mnist") == (59999,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("70000", "Expected index 70000 in 0 … 59999 of data 'mnist'."),
        ("59999:60001", "Expected index 60000 in 0 … 59999 of data 'mnist'."),
        ("5:5", "Expected index '5:5' to begin before it ends: the last one is left out."),
        ("-1", "Expected index '-1' as one number or as first:last, such as 25 or 0:1000."),
        ("1:2:3", "Expected index '1:2:3' as one number"),
        (":4", "Expected index ':4' as one number"),
        ("4:", "Expected index '4:' as one number"),
        ("", "Expected index '' as one number"),
        ("2.5", "Expected index '2.5' as one number"),
    ],
)
def test_other_indices_are_refused_in_one_line(text, message):
    with pytest.raises(Expected) as error:
        named.indices(text, 60000, "mnist")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_set_that_is_not_at_hand_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("QLEAK_DATA", str(tmp_path))
    with pytest.raises(Expected, match=r"`qleak data fetch cifar10` .*`--data photos --index 0` needs no download"):
        plan_of("dlg_cifar10")
    np.savez(tmp_path / "cifar10-12k.npz", x_train=np.zeros((3, 32, 32, 3), np.uint8), y_train=np.arange(3))
    with pytest.raises(Expected, match="'cifar10-12k', another set"):
        plan_of("dlg_cifar10")
    with pytest.raises(Expected, match=r"lfw-py/ in the data folder. `--data faces` needs no download"):
        plan_of("idlg_lfw")
    faces = plan_of("idlg_lfw", data="faces")
    assert (faces.model.shape, faces.model.classes, faces.data) == ((1, 25, 25), 100, "faces")


def test_numbers_and_blocks():
    assert named.numbers("4, 1,2,2", "batches") == (1, 2, 4)
    for bad in ("", "1,,2", "0,1", "a", "1.5"):
        with pytest.raises(Expected, match="as whole numbers above 0"):
            named.numbers(bad, "batches")
    assert named.spread(100, 8, 2) == (0, 50)
    with pytest.raises(Expected, match="Expected 2 × 8 images of a set that has them, got one of 15"):
        named.spread(15, 8, 2)


def test_a_net_that_does_not_fit_the_set_is_refused(sets):
    assert named.fitting("auto", "mnist")[0].shape == (1, 28, 28)
    with pytest.raises(Expected, match=r"Expected data 'mnist' of shape \(3, 32, 32\)"):
        named.fitting("lenet", "mnist")
    with pytest.raises(Expected, match="at most 5 classes"):
        named.fitting("lenet(channels=1, size=28, classes=5)", "mnist")


# --- sets with arguments, and pictures ------------------------------------------------------------


def test_calls_are_read_back_and_other_names_are_none():
    text = called.written("picture", path="it's (1).png", size=28, channels=1, label=3, digest="")
    assert called.parse(text) == (
        "picture",
        {"path": "it's (1).png", "size": 28, "channels": 1, "label": 3, "digest": ""},
    )
    for name in ("mnist", "cifar10-12k", "./pics/", "./a(b).npz", "x.npz", "/tmp/a b", ""):
        assert called.parse(name) is None
    for bad in ("picture('x.png')", "lfw(size=open('x'))", "lfw(**{})"):
        with pytest.raises(Expected, match="to be written like name"):
            called.parse(bad)


def test_sets_of_image_files_take_a_size_in_their_name(sets):
    assert data.load("lfw(size=8, limit=2)").x.shape == (2, 3, 8, 8)
    assert len(data.load("mnist(limit=3)").x) == 3
    assert len(data.load("mnist(limit=3)", limit=2).x) == 2
    with pytest.raises(Expected, match="Expected no size=8 for mnist"):
        data.load("mnist(size=8)")
    with pytest.raises(Expected, match="with size, limit at most, got shuffle"):
        data.load("lfw(shuffle=True)")
    with pytest.raises(Expected, match=r"Unknown data set 'pictures'. Did you mean 'picture'\?"):
        data.load("pictures(path='x')")
    with pytest.raises(Expected, match="Expected limit=0 >= 1"):
        data.load("mnist(limit=0)")


def test_a_picture_is_cropped_scaled_and_converted(file):
    colour = data.load(called.written("picture", path=file, size=4, label=7))
    assert (colour.x.shape, colour.y.tolist(), colour.classes) == ((1, 3, 4, 4), [7], 8)
    assert colour.x[0, :, 0, 0].tolist() == [1, 0, 0]
    assert colour.x[0, :, 3, 3].tolist() == [0, 0, 1]
    grey = data.load(called.written("picture", path=file, size=2, channels=1))
    np.testing.assert_allclose(grey.x[0, 0, :, 0], [76 / 255, 29 / 255], atol=1e-6)  # as Pillow's convert("L")
    with Image.open(file) as image:
        assert np.asarray(image.convert("L"))[[0, -1], 0].tolist() == [76, 29]
    with pytest.raises(Expected, match=r"Expected split='test' of picture"):
        data.load(called.written("picture", path=file), "test")


def test_grey_becomes_colour_where_the_net_wants_it(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grey.png")
    found = data.load(called.written("picture", path=str(tmp_path / "grey.png"), size=8)).x[0]
    assert found.shape == (3, 8, 8)
    assert (found == found[:1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "absent.png"}, "Expected an image file at 'absent.png'"),
        ({"path": ""}, "Expected an image file at ''"),
        ({"path": 3}, "Expected path=3 to be a text"),
        ({"channels": 2}, "Expected channels='2' to be one of: 1, 3"),
        ({"size": 0}, "Expected size=0 >= 1"),
        ({"label": -1}, "Expected label=-1 >= 0"),
        ({"colour": True}, "with path, size, channels, label, digest at most, got colour"),
        ({"digest": "0"}, "as the plan knew it"),
    ],
)
def test_bad_pictures_are_one_line(options, message, file):
    with pytest.raises(Expected) as error:
        data.load(called.written("picture", **{"path": file, **options}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_image_is_one_line(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(Expected, match="to be a readable image"):
        plan_of("dlg_mnist", image=str(tmp_path / "x.png"))


def test_a_picture_of_ones_own_is_attacked(file, tmp_path):
    plan = again(plan_of("dlg_cifar10", image=file, label=3, outer=1))
    assert digest_of(file) in plan.data
    with store.open_run(tmp_path / "run", plan.header()) as run:
        summary = next(e for e in engine.run(plan, run) if isinstance(e, engine.Finished)).summary
    victims = store.read_tensors(tmp_path / "run", "victims")
    assert victims["y"].tolist() == [[3]]
    assert victims["x"][0, 0, :, 0, 0].tolist() == [1, 0, 0]
    assert {s["control"] for s in summary} == {"none", "prior-only"}
    assert html.write(tmp_path / "run", tmp_path / "page.html").stat().st_size > 1000
    Image.new("RGB", (9, 9)).save(file)
    with pytest.raises(Expected, match="as the plan knew it"):  # another picture is another plan
        data.load(plan.data)


def test_a_picture_needs_a_label_of_the_net_and_a_set_has_its_own(file, sets):
    with pytest.raises(Expected, match="Expected label=10 in 0 … 9, the classes of the net"):
        plan_of("dlg_mnist", image=file, label=10)
    with pytest.raises(Expected, match="Expected label=3 together with an image file"):
        plan_of("dlg_mnist", index="1", label=3)


# --- audits side by side --------------------------------------------------------------------------


def beside(*channels):
    """Two nets of one hidden layer, attacked for a few steps."""
    audits = tuple(
        Audit(mlp(hidden=(h,)), "mnist5k", (0, 4000), channels, (cells(stages=1, steps=3, last=3),), gradient())
        for h in (3, 6)
    )
    return Study(("small", "large"), audits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("studies") / "s"
    plan = beside(chain(), chain(sign()))
    with store.open_run(made, plan.header("architectures")) as run:
        list(engine.run(plan, run))
        run.update(summary=study.summary(made))
    return made


def test_audits_of_one_channel_are_not_merged_into_a_point(folder):
    summary = store.read_run(folder)["summary"]
    own = [s for s in summary if s["control"] == "none"]
    assert [(s["part"], s["channel"]) for s in own] == [
        ("small", "fp32"), ("small", "sign"), ("large", "fp32"), ("large", "sign"),
    ]  # fmt: skip
    assert {s["control"] for s in summary} == {"none", "prior-only", "wrong-gradient"}
    for part, hidden in (("small", 3), ("large", 6)):
        alone = store.read_run(folder / part)["summary"]
        mine = [
            {k: v for k, v in s.items() if k not in ("part", "parameters", "gradient_norm")}
            for s in summary
            if s["part"] == part
        ]
        assert mine == alone
        assert {s["parameters"] for s in summary if s["part"] == part} == {785 * hidden + (hidden + 1) * 10}


def test_gradient_norms_are_those_of_what_was_sent(folder):
    import torch

    plan = from_json(store.read_run(folder)["plan"]).parts[0]
    prepared = engine.audit.prepare(plan)
    count, norms = parts.gradient(folder / "small")
    sent = [m.code for m in prepared.messages[0]]
    assert count == sum(v.numel() for v in sent[0].values())
    for name, value in norms.items():
        each = torch.stack([m[name].double().norm() for m in sent])
        assert value == pytest.approx(float(each.square().mean().sqrt()), rel=1e-6)
    # The two nets have tensors of the same names, so their norms stand beside each other.
    names, rows = parts.norms({p: folder / p for p in ("small", "large")})
    assert names == ["small", "large"]
    assert [row["channel"] for row in rows] == sorted(norms)


def test_the_study_is_shown_side_by_side(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qleak", "report", str(folder)])
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    shown = capsys.readouterr().out
    assert "Verdict: images rebuilt, by part: small" in shown
    assert "client" not in shown.split("Verdict")[0].replace("small: ", "")  # both clients are the same
    assert "model mlp(hidden=(3,)) · 2,395 parameters · gradient norm" in shown.replace("\n", " ")
    page = html.write(folder, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Side by side" in page
    assert "Frontier" not in page
    assert "Gradient norms by layer" in page


def test_an_unfinished_study_says_so(folder, tmp_path):
    plan = beside(chain())
    with store.open_run(tmp_path / "begun", plan.header("architectures")) as run:
        run.update(status="running", parts=[{"name": n, "folder": n, "kind": "audit"} for n in plan.names])
    begun = study.load(tmp_path / "begun")
    assert begun.aside
    assert study.verdict(begun) == "Verdict: none yet, the study is running."
    folder = shutil.copytree(folder, tmp_path / "half")
    shutil.rmtree(folder / "large")
    half = study.load(folder)
    assert "Not run yet, or gone: large." in half.notes
    assert "large" not in study.verdict(half)
    for where in (tmp_path / "begun", folder):
        assert html.write(where, tmp_path / "page.html").stat().st_size > 1000
    shutil.rmtree(folder / "small")
    assert {line["part"] for line in study.load(folder).lines} == {"small", "large"}  # the summary serves


def test_a_study_with_a_training_keeps_its_frontier():
    assert not parts.apply({"parts": [{"kind": "audit"}, {"kind": "training"}]})
    assert not parts.apply({"parts": [{"kind": "audit"}]})
    assert parts.apply({"parts": [{"kind": "audit"}, {"kind": "audit"}]})


def test_what_differs_between_parts_is_said():
    one = {"plan": beside(chain()).parts[0].as_json()}
    other = {"plan": one["plan"] | {"grants": ["statistics"]}}
    assert parts.varied({"a": one, "b": other}) == {"a": "grants buffers", "b": "grants statistics"}
    assert parts.varied({"a": one, "b": one}) == {"a": "", "b": ""}

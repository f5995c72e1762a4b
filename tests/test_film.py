"""Films: log-spaced frames of the selected lanes, added to a finished run without touching it, shown as a GIF."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from qleak import engine, looks, store
from qleak.attacks import cells, dlg
from qleak.catalog import build
from qleak.channels import chain, identity, uniform
from qleak.errors import Expected
from qleak.metrics import psnr
from qleak.plans import Audit
from qleak.report import film, stored

NET = "mlp(channels=1, size=28, classes=10, hidden=(8,))"
PLAN = Audit(
    build("models", NET), "mnist5k", (3, 4000), (identity(), chain(uniform(bits=4))), (dlg(outer=1), cells(stages=1, steps=20, last=10)),
    restarts=2,
)  # fmt: skip


def go(folder, frames=0, fresh=False):
    head = {"kind": PLAN.kind, "plan_id": PLAN.id, "plan": PLAN.as_json(), "recipe": "", "flags": {}}
    with store.open_run(folder, head, fresh) as run:
        return list(engine.run(PLAN, run, look=looks.asked(film=frames)))


def kept(folder):
    return {p.stem: store.read_tensors(folder, p.stem) for p in sorted((folder / "tensors").glob("film-*"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("film") / "run"
    go(folder, 9)
    return folder


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 6000])
@pytest.mark.parametrize("number", [2, 3, 9, 60])
def test_frames_are_log_spaced_from_the_start_to_the_end(steps, number):
    at = looks.frames(steps, number)
    assert at[0] == 0 and at[-1] == steps and at == sorted(set(at))
    assert len(at) == min(number, steps + 1) or (steps, number) == (1, 2)
    if steps == 6000 and number == 9:
        assert at == [0, 1, 3, 11, 39, 137, 483, 1702, 6000]


def test_a_film_ends_with_what_was_handed_in(run):
    films = kept(run)
    assert list(films) == [f"film-{c}-{a}-lanes-0" for c in (0, 1) for a in (0, 1)]
    for key, held in films.items():
        chunk = store.read_tensors(run, key.replace("film", "chunk"))
        lanes, at = held["lane"], held["at"]
        assert held["x"].shape == (2, len(at), 1, 1, 28, 28)
        assert torch.equal(held["x"][:, -1], chunk["x"][lanes].clamp(0, 1))
        assert torch.equal(held["loss"][:, -1], chunk["loss"][lanes])
        assert at[0] == 0 and at[-1] == chunk["closures"][lanes].max() and held["loss"][:, 0].isnan().all()
        assert not torch.equal(held["x"][:, 0], held["x"][:, -1])
        for lane in lanes.tolist():  # the best start of its victim
            same = [i for i in range(4) if i // 2 == lane // 2]
            assert chunk["loss"][lane] == chunk["loss"][same].min()


def test_frames_are_the_attack_as_it_ran(run):
    """Own losses of frames that fall on the points of the loss curve are the curve's."""
    checked = 0
    for key, held in kept(run).items():
        chunk = store.read_tensors(run, key.replace("film", "chunk"))
        for i, at in enumerate(held["at"].tolist()[:-1]):
            if at in chunk["curve_at"].tolist():
                point = chunk["curve_at"].tolist().index(at)
                assert torch.equal(held["loss"][:, i], chunk["curve"][point][held["lane"]])
                checked += 1
        assert len(held["at"]) == 9
    losses = kept(run)["film-0-0-lanes-0"]["loss"][:, 1:]
    assert checked or (losses[:, 1:] <= losses[:, :-1]).all()


def test_films_are_added_to_a_finished_run_and_change_nothing(run, tmp_path):
    folder = tmp_path / "run"
    go(folder)
    before = {p.name: p.read_bytes() for p in (folder / "tensors").iterdir()} | {
        "rows": (folder / "rows.jsonl").read_bytes()
    }
    assert not kept(folder)
    events = go(folder, 9)
    after = {p.name: p.read_bytes() for p in (folder / "tensors").iterdir()} | {
        "rows": (folder / "rows.jsonl").read_bytes()
    }
    assert {k: v for k, v in after.items() if not k.startswith("film-")} == before
    assert {k: {n: t.nan_to_num() for n, t in v.items()} for k, v in kept(folder).items()}.keys() == kept(run).keys()
    for key, held in kept(folder).items():
        assert all(torch.equal(v.nan_to_num(), kept(run)[key][n].nan_to_num()) for n, v in held.items())
    assert any(isinstance(e, engine.Step) for e in events)
    assert store.read_run(folder)["plan_id"] == store.read_run(run)["plan_id"] == PLAN.id
    (folder / "tensors" / "film-0-1-lanes-0.safetensors").unlink()
    keys = {e.key for e in go(folder, 9) if isinstance(e, engine.Step)}
    assert keys <= {"0-1-lanes-0"} and len(kept(folder)) == 4, "only the film that was missing"


def test_selected_guesses_have_films_with_their_psnr(run):
    read = stored.load(run)
    films = film.films(read)
    assert films.keys() == read.chosen().keys()
    for key, found in films.items():
        row = read.chosen()[key]
        assert float(found.psnr[-1]) == pytest.approx(row["psnr"], abs=1e-3)
        assert float(found.psnr[0]) == pytest.approx(float(psnr(found.x[:1], read.originals[row["image"]][None])[0]))


def test_the_gif_is_small_loops_and_ends_with_the_guess(qleak, run, tmp_path):
    target = tmp_path / "f.gif"
    code, out, err = qleak("film", run, target)
    assert (code, out.strip()) == (0, str(target)), err
    with Image.open(target) as gif:
        assert gif.info["loop"] == 0 and gif.n_frames > 5
        assert gif.width == 16 + 5 * (112 + 16)
        first = gif.convert("RGB").tobytes()
        gif.seek(gif.n_frames - 1)
        assert gif.info["duration"] == film.HOLD
        assert gif.convert("RGB").tobytes() != first
    assert target.stat().st_size < 500_000
    code, _, _ = qleak("film", run, target, "--image", 4000, "--side", 64)
    assert code == 0
    with Image.open(target) as gif:
        assert gif.width == 16 + 5 * (56 + 16)


def test_who_asks_for_what_is_not_there_is_told(qleak, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    for path in (folder / "tensors").glob("film-*"):
        path.unlink()
    for argv, text in [
        ((folder,), "Expected a run with films: the same command with --film 24 adds them."),
        ((run, "x.gif", "--image", 7), "Expected films of image 7: there are films of 3, 4000."),
        ((run, "x.gif", "--side", 3), "Expected side=3 in [16, 1024]."),
        ((tmp_path / "none",), "Expected a run folder"),
    ]:
        code, _, err = qleak("film", *argv)
        assert code == 2 and text in err
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    with pytest.raises(Expected, match="film=1"):
        looks.asked(film=1)


def test_the_clock_and_captions():
    assert film.clock(1) == [0, 1] and film.clock(0) == [0, 0]
    ticks = film.clock(800)
    assert ticks[0] == 0 and ticks[-1] == 800 and ticks == sorted(set(ticks))
    face = film.font(12)
    assert film.cut("short", 100, face) == "short"
    assert film.cut("uniform(bits=8, rounding=nearest)", 60, face).endswith("…")
    assert film.large(torch.zeros(1, 28, 28), 128).size == (112, 112)
    assert film.large(torch.zeros(3, 224, 224), 128).size == (128, 128)


def test_the_reconstruction_is_of_the_arm_that_gets_furthest(run):
    films = film.films(stored.load(run))
    best = film.chosen(films, 3, most=1)
    assert len(best) == 1
    top = max(float(f.psnr[-1]) for (_, _, image), f in films.items() if image == 3)
    assert float(next(iter(best.values())).psnr[-1]) == top


ASSETS = Path(__file__).parents[1] / "assets"


def test_the_shipped_film_is_small_and_loops():
    assert (ASSETS / "demo.gif").stat().st_size < 1_500_000
    with Image.open(ASSETS / "demo.gif") as gif:
        assert gif.info["loop"] == 0 and gif.n_frames > 30


def test_the_shipped_drawing_stands_alone_and_reads_aloud():
    text = (ASSETS / "method.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    names = {child.tag.rpartition("}")[2]: child for child in root}
    assert len(text) < 60_000 and root.get("role") == "img"
    assert all(
        names[t].get("id") in root.get("aria-labelledby", "").split() and names[t].text for t in ("title", "desc")
    )
    assert "prefers-color-scheme: dark" in text
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.rpartition("}")[2] in ("href", "src")]
    assert len(links) == 3 and all(v.startswith("data:image/png;base64,") for v in links), "nothing from elsewhere"
    assert "url(" not in text and "@import" not in text

"""Watching an attack changes nothing but the screen; pictures fit 80 × 24, with colours, with fewer, and with none."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from qleak import engine, jobs, looks, store
from qleak.attacks import cells, dlg
from qleak.attacks.drive import drive
from qleak.catalog import build, catalog
from qleak.channels import chain, uniform
from qleak.cli import live, watch
from qleak.engine.events import Step
from qleak.errors import Expected
from qleak.plans import Audit, Study
from qleak.types import Attack

NET = "mlp(channels=1, size=28, classes=10, hidden=(8,))"


def plan(**more):
    given = {"victims": (3, 4000), "restarts": 2} | more
    attacks = (dlg(outer=1), cells(stages=2, steps=12, last=6))
    return Audit(build("models", NET), "mnist5k", channels=(chain(uniform(bits=4)),), attacks=attacks, **given)


def run(plan, folder, workers=1, **asked):
    head = {"kind": plan.kind, "plan_id": plan.id, "plan": plan.as_json(), "recipe": "", "flags": {}}
    with store.open_run(folder, head) as opened:
        return list(engine.run(plan, opened, workers=workers, look=looks.asked(**asked)))


def results(folder):
    """Rows and tensors, without times."""
    rows = sorted(
        ({k: v for k, v in r.items() if k != "cpu_s"} for r in store.read_rows(folder)), key=lambda r: r["key"]
    )
    files = sorted(p.stem for p in (folder / "tensors").glob("chunk-*"))
    return rows, {f: {k: v for k, v in store.read_tensors(folder, f).items() if k != "cpu_s"} for f in files}


def same(one, other):
    (rows, tensors), (rows_, tensors_) = one, other
    equal = all(torch.equal(v, tensors_[f][k]) or v.isnan().any() for f in tensors for k, v in tensors[f].items())
    return rows == rows_ and tensors.keys() == tensors_.keys() and equal


def pictures(events):
    return [e for e in events if isinstance(e, Step) and e.picture is not None]


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert not pictures(run(plan(), folder))
    return folder


def test_rows_and_tensors_are_the_same_watched_or_not(unwatched, tmp_path):
    made = plan()
    events = run(made, tmp_path / "run", watch=1e-4, film=9)
    seen = pictures(events)
    assert len(seen) > len(made.channels) * len(made.attacks)
    assert {e.picture.shape for e in seen} == {(28, 28, 3)}
    assert {e.image for e in seen} == {3}, "the first victim of a chunk, so that the picture does not jump"
    assert same(results(unwatched), results(tmp_path / "run"))
    assert store.read_run(tmp_path / "run")["plan_id"] == store.read_run(unwatched)["plan_id"]


def test_a_look_that_would_touch_the_state_is_found(unwatched, tmp_path, monkeypatch):
    """The comparison above can fail: an attack whose `read` is no pure function."""
    honest = jobs.drive

    def meddling(attack, *args):
        def read(view, state):
            state.x.mul_(0.9)
            return attack.read(view, state)

        return honest(replace(attack, read=read), *args)

    monkeypatch.setattr(jobs, "drive", meddling)
    run(plan(), tmp_path / "run", watch=1e-4)
    assert not same(results(unwatched), results(tmp_path / "run"))


@pytest.mark.slow
def test_workers_send_pictures_too(unwatched, tmp_path):
    assert pictures(run(plan(), tmp_path / "run", workers=2, watch=0.05))
    assert same(results(unwatched), results(tmp_path / "run"))


def test_a_limit_of_seconds_is_not_looked_at(tmp_path):
    assert not pictures(run(plan(seconds=0.05), tmp_path / "run", watch=1e-4, film=9))
    assert not list((tmp_path / "run" / "tensors").glob("film-*"))
    assert not watch.looked_at(plan(seconds=1.0))
    assert watch.looked_at(plan()) and watch.looked_at(Study(("a",), (plan(),)))


def test_looks_are_rare_enough(monkeypatch):
    """A look that takes 10 ms is followed by half a second without one."""
    clock = iter([0.0, *(t / 1000 for t in range(0, 3000, 5))])
    now = [0.0]
    monkeypatch.setattr(looks.time, "perf_counter", lambda: now.__setitem__(0, next(clock)) or now[0])
    eye = looks.Eye(looks.Looks(watch=0.001), plan().chunks()[0], 100)
    seen = 0
    for step in range(200):
        if eye.due(step):
            seen += eye.look(step, step, torch.ones(6), torch.ones(6, 1, 1, 28, 28)) is not None
    assert 2 <= seen <= 6


def test_every_attack_can_be_read_before_its_first_step():
    """`drive` may be asked to look at step 0; whatever `qleak ls attacks` names answers with images of the right shape."""
    made = plan(victims=(3,), restarts=1)
    chunk = made.chunks()[0]
    prepared = engine.prepare(made)
    read = 0
    for name in catalog("attacks"):
        attack = build("attacks", name)
        job = engine.job_of(made, prepared, chunk)
        view = jobs.view_of(job, made)
        if not isinstance(attack, Attack) or attack.applies(view):
            continue
        start = jobs.starts(
            Audit(made.model, made.data, made.victims, made.channels, (attack,)), chunk._replace(attack=0), view
        )
        first = next(iter(drive(attack, view, start, 1, lambda step: True, lambda: True)))
        assert first.step == 0 and first.x.shape == (1, 1, 1, 28, 28), name
        read += 1
    assert read >= 5


def event(arm, label="uniform(bits=8) cells", side=32, image=0, loss=1e-3, closures=50, shade=0):
    pixels = np.full((side, side, 3), shade, np.uint8)
    pixels[: side // 2] = (250, 120, 10)
    return Step(f"{arm}-lanes-0", label, 5, 10, "", loss, closures, pixels, image)


def drawn(mosaic, width=80, height=24, **more):
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=True, legacy_windows=False, **more)
    console.print(mosaic)
    return out.getvalue()


@pytest.mark.parametrize("arms", [1, 2, 3, 5, 8, 30])
@pytest.mark.parametrize("side", [28, 32, 64])
def test_panels_fit_the_terminal(arms, side):
    mosaic = watch.Mosaic("")
    for i in range(arms):
        mosaic.add(event(f"{i}-0", side=side, closures=10 * i))
    lines = drawn(mosaic).rstrip("\n").split("\n")
    assert len(lines) <= 22 and max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert text.count("cells") == min(arms, {28: 10, 32: 8, 64: 8}[side])
    assert "@10" in text or "at 10" in text or arms > 8 or arms == 1


def test_few_panels_are_large_and_many_small():
    assert watch.fit([(32, 32)] * 2, 80, 22) == (2, 1, 1)
    assert watch.fit([(32, 32)] * 3, 80, 22)[2] == 2
    columns, rows, factor = watch.fit([(32, 32)] * 8, 80, 22)
    assert (columns * rows, factor) == (8, 2)
    assert watch.fit([(32, 32)] * 12, 200, 50)[2] == 1 or watch.fit([(32, 32)] * 10, 200, 50)[2] == 1


def test_colours():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0] = (255, 0, 0)
    assert watch.blocks(pixels, "truecolor") == ["\x1b[38;2;255;0;0;48;2;0;0;0m▀▀\x1b[0m"]
    assert watch.blocks(pixels, "256") == ["\x1b[38;5;196;48;5;16m▀▀\x1b[0m"]
    grey = watch.blocks(np.array([[[255] * 3, [0] * 3]] * 2, np.uint8), "")
    assert grey == ["@ "]
    assert "\x1b" not in "".join(watch.blocks(pixels, ""))
    assert watch.indexed(np.array([[128, 128, 128]], np.uint8)).tolist() == [244]


def test_the_better_of_two_chunks_stays():
    mosaic = watch.Mosaic("")
    for image, loss in ((0, 1e-3), (7, 1e-2), (9, 1e-4), (9, 1e-2)):
        mosaic.add(event("0-0", image=image, loss=loss))
    assert (mosaic.panels["0-0"].image, mosaic.panels["0-0"].loss) == (9, 1e-2)


def console(**more):
    given = {"file": io.StringIO(), "width": 80, "height": 24, "force_terminal": True, "legacy_windows": False}
    return Console(**given | more)


def test_who_cannot_see_is_told_once(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not watch.refused(console(), plan())
    assert "needs a terminal;" in watch.refused(console(force_terminal=False), plan())
    assert "40 × 16" in watch.refused(console(width=30), plan())
    assert "no attack that can be looked at" in watch.refused(console(), plan(seconds=1.0))
    monkeypatch.setenv("TERM", "dumb")
    assert "needs a terminal;" in watch.refused(console(), plan())


SYSTEMS = [({"color_system": "truecolor"}, "38;2;"), ({"color_system": "256"}, "38;5;"), ({"no_color": True}, "@")]


@pytest.mark.parametrize(("more", "has"), SYSTEMS)
def test_the_screen_draws_in_place(more, has, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = console(**more)
    bar = Progress(console=shown)
    bar.add_task("closures", total=10)
    with watch.screen(shown, bar) as show:
        for i in range(50):
            show(event("0-0", shade=255, closures=i))
    text = shown.file.getvalue()
    assert has in text
    assert text.count("image 0") <= 3, "some four times a second, not at every event"
    if "no_color" in more:
        assert "38;" not in text and "48;" not in text


def test_the_plan_is_readable_in_80_columns():
    reasons = ["device cpu (no CUDA found)", "memory " + "130 MB a chunk " * 12]
    say = live.Console()
    say.console = Console(file=io.StringIO(), width=80)
    say.plan("recipe", plan(), reasons, full=False)
    lines = say.console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    placed = lines[[line.split()[0] for line in lines].index("placed") :]
    assert placed[0] == "  placed    device cpu (no CUDA found)"
    assert placed[1].startswith("            memory 130 MB") and placed[2].startswith("              ")


def test_items_are_kept_whole():
    assert live.wrapped("fp32 · uniform(bits=8) · sign", 22) == ["fp32 · uniform(bits=8)", "sign"]
    assert live.wrapped("", 30) == [""]
    assert all(len(line) <= 30 for line in live.wrapped("a long item of many words, longer than a line · b", 30))


def test_a_film_needs_two_frames():
    with pytest.raises(Expected, match="film=1"):
        watch.check(1, None)


def test_a_picture_is_small_and_says_what_is_there():
    x = torch.full((3, 3, 64, 48), 0.5)
    x[0, 0] = float("nan")
    shown = looks.small(x)
    assert shown.shape == (64, 48, 3) and shown.dtype == np.uint8
    assert looks.small(torch.zeros(1, 1, 28, 28)).shape == (28, 28, 3)

"""Bounds beside an audit: computed after it, kept beside its rows, shown in terminal and page."""

import io
import json
import math
import re
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

import qleak
from qleak import data, engine, random
from qleak.bounds import Setting, bound_of, chord, natural
from qleak.catalog import build, catalog
from qleak.check import Expected
from qleak.cli import live
from qleak.cli.bounded import bounded
from qleak.client import gradient
from qleak.engine import bounds as beside
from qleak.engine.audit import prepare, run
from qleak.plans import Audit, Study
from qleak.report import bounds as shown
from qleak.report import html, terminal
from qleak.report.stored import load
from qleak.store import open_run, read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small audit, run to its end, and its bounds."""
    specs = ("gaussian(sigma=0.1, unbounded=True)", "uniform(levels=4)", "clip_l2(1.0), gaussian(20.0)", "sign()")
    plan = Audit(
        model=build("models", "lenet(channels=1, size=25, classes=4, width=2)"), data="faces", victims=(0, 1),
        channels=tuple(build("channels", f"chain({s})") for s in specs),
        attacks=(build("attacks", "dlg(outer=1, inner=3)"),), wrong=1,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("bounds") / "run"
    with open_run(place, {"kind": "audit", "plan_id": plan.id, "plan": plan.as_json()}) as store:
        for _ in run(plan, store):
            pass
        before = store.rows()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chord, "MOST", 2)  # sweeps
            rows = list(beside.run(plan, store, natural((1, 25, 25))))
        assert store.rows() == before
    return place, plan, rows


def test_every_channel_victim_and_kind_has_a_row(folder):
    place, plan, rows = folder
    assert len(rows) == len(plan.channels) * len(plan.victims) * len(beside.KINDS)
    assert [json.loads(line) for line in (place / "bounds.jsonl").read_text().splitlines()] == rows
    by = {(r["channel"], r["bound"], r["image"]): r for r in rows}
    noisy = by["gaussian(sigma=0.1, unbounded=True)", "local", 0]
    assert 5 < noisy["psnr"] < 60 and "spectrum" in noisy["assumptions"] and not noisy["rigorous"]
    assert by["sign", "local", 0]["psnr"] is None and by["sign", "local", 0]["why"]
    assert by["sign", "rate", 1]["rigorous"]
    private = by[plan.labels()[2], "dp-reconstruction", 0]
    assert private["rigorous"] and private["psnr"] < 20  # μ = 0.1: little more than a blind guess


def test_the_bounds_are_of_the_messages_that_were_sent(folder):
    """Coarser codes of the same victims, put in their place, give other bounds."""
    _, plan, rows = folder
    prepared = prepare(plan)
    swapped = prepared._replace(messages=[m[::-1] for m in prepared.messages])
    found = [
        r
        for r, _ in beside.rows(plan, swapped, natural((1, 25, 25)), ("local",))
        if r["channel"] == "uniform(levels=4)"
    ]
    mine = [r for r in rows if r["channel"] == "uniform(levels=4)" and r["bound"] == "local"]
    assert all(a["psnr"] != b["psnr"] for a, b in zip(found, mine, strict=True))


def test_the_report_shows_the_gap(folder, tmp_path):
    place, plan, _ = folder
    header = read_run(place)
    gaps = shown.gaps(header)
    assert [(g.channel, g.kind) for g in gaps] == list(
        zip(plan.labels(), ("local", "chord", "local", "chord"), strict=True)
    )
    assert [g.estimate is not None for g in gaps] == [False, True, False, False]
    assert gaps[1].estimate < gaps[1].bound
    assert all(g.gap == pytest.approx(g.bound - g.psnr) for g in gaps)
    page = html.write(place, tmp_path / "page.html").read_text()
    assert "What is left to gain" in page and f"{gaps[0].bound:.1f}" in page
    said = io.StringIO()
    console = Console(file=said, width=80)
    for part in terminal.table(load(place)):
        console.print(part)
    text = re.sub(r"\s+", " ", said.getvalue())
    assert "attacks stay" in text and "No attack beats" in text
    bare = {k: v for k, v in header.items() if k != "bounds"}
    assert shown.lines(bare) == [] and shown.figure(bare) == "" and shown.table(bare) == []


def test_a_beaten_bound_is_said_to_be_beaten():
    summary = [{"channel": "c", "attack": "a", "control": "none", "psnr_selected": 30.0}]
    bound = {
        "channel": "c",
        "bound": "local",
        "psnr": 28.0,
        "rigorous": False,
        "assumptions": "",
        "why": "",
        "images": 1,
    }
    header = {"summary": summary, "bounds": {"prior": "p", "summary": [bound]}}
    assert any("Beaten on c" in line for line in shown.lines(header))
    assert not any(
        "Beaten" in line for line in shown.lines(header | {"summary": [summary[0] | {"psnr_selected": 20.0}]})
    )


def test_a_gaussian_estimate_is_no_bound():
    """Rounding as Gaussian noise is beaten: it does not stand where a bound stands, nor alone."""
    summary = [{"channel": "c", "attack": "a", "control": "none", "psnr_selected": 50.0}]
    line = {"channel": "c", "psnr": 44.0, "rigorous": False, "assumptions": "", "why": "", "images": 1}
    rough, chord = (
        line | {"bound": "local", "estimate": True},
        line | {"bound": "chord", "psnr": 62.0, "estimate": False},
    )
    (gap,) = shown.gaps({"summary": summary, "bounds": {"prior": "p", "summary": [rough, chord]}})
    assert (gap.kind, gap.bound, gap.estimate, gap.gap) == ("chord", 62.0, 44.0, 12.0)
    assert not shown.gaps({"summary": summary, "bounds": {"prior": "p", "summary": [rough]}})
    said = " ".join(shown.lines({"summary": summary, "bounds": {"prior": "p", "summary": [rough, chord]}}))
    assert "c 44.0 dB. An estimate, no bound" in said and "Beaten" not in said


def test_the_prior_is_of_other_images_of_the_set_or_of_public_ones(folder, monkeypatch):
    _, plan, _ = folder
    victims = prepare(plan).secret.x
    name = beside.prior_for(plan.model.shape, victims, plan.data).name
    assert "spectrum" in name  # a small set of a shape that no public one has
    total = len(data.load(plan.data).x)
    monkeypatch.setattr(beside, "ENOUGH", total)
    name = beside.prior_for(plan.model.shape, victims, plan.data).name
    assert name.endswith(f"of {plan.data}") and int(name.split()[4].replace(",", "")) <= total - len(victims)


def test_an_interrupted_computation_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    """Killed after some rows, the same call makes only the others; with another prior it makes all of them."""
    place, plan, rows = folder
    shutil.copytree(place, tmp_path / "run")
    kept = (place / "bounds.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "bounds.jsonl").write_text("".join(kept[:-3]))
    made = []
    whole = beside.rows
    monkeypatch.setattr(beside, "rows", lambda *a: (made.append(r) or r for r in whole(*a)))
    monkeypatch.setattr(chord, "MOST", 2)
    with open_run(tmp_path / "run", read_run(place)) as store:
        assert list(beside.run(plan, store, natural((1, 25, 25)))) == rows
        assert [r["key"] for r, _ in made] == [r["key"] for r in rows[-3:]]
        assert store.load("bounds").keys() == {r["key"] for r in rows if r["bound"] == "local" and not r["why"]}
        made.clear()
        other = natural((1, 25, 25))._replace(name="another")
        assert {r["prior"] for r in beside.run(plan, store, other, ("rate",))} == {"another"}
        assert len(made) == len(plan.channels) * len(plan.victims)


def test_a_captured_update_with_its_truth_has_bounds(tmp_path):
    """Beside the audit of a noisy update whose image is known: the bound, above the attack; none without the truth."""
    net = build("models", "lenet(channels=1, size=12, classes=5, width=4)")
    params, buffers = net.init(random.generator(0))
    x, y = natural((1, 12, 12)).draw(random.generator(1), 1).float().clamp(0, 1), torch.tensor([3])
    update = gradient().update(net, params, buffers, x, y)
    sent = {k: v + 0.01 * random.normal(random.generator(2, k), v.shape) for k, v in update.items()}
    asked: Any = {"channel": "gaussian(0.01, unbounded=True)", "budget": 1.0, "attacks": "cells"}
    known = qleak.audit(sent, net, params, truth=(x, y), folder=tmp_path / "a", **asked)
    header = read_run(tmp_path / "a")
    (gap,) = shown.gaps(header)
    assert gap.kind == "local" and gap.bound > gap.psnr == shown.reached(header, gap.channel)[0][1]
    assert any("Bounds (linearised" in line for line in known.document["rests_on"])
    blind = qleak.audit(sent, net, params, folder=tmp_path / "b", **asked)
    assert not any("Bounds" in line for line in blind.document["rests_on"])
    assert "bounds" not in read_run(tmp_path / "b")


def test_a_study_of_audits_gets_bounds_part_by_part(folder, tmp_path):
    _, plan, _ = folder
    plan = replace(plan, channels=plan.channels[:1])
    study = Study(names=("one",), parts=(plan,))
    with open_run(tmp_path / "s", study.header()) as run:
        for _ in engine.run(study, run):
            pass
        bounded(study, run, "yes", live.quiet())
    assert read_run(tmp_path / "s" / "one")["bounds"]["summary"]


def test_what_takes_seconds_each_and_minutes_together_is_left_out(tmp_path, monkeypatch, capsys):
    """By "auto", a study's audits are counted together."""
    plan = Audit(
        model=build("models", "lenet(channels=1, size=25, classes=4, width=2)"), data="faces", victims=(0,),
        channels=(build("channels", "chain(sign())"),), attacks=(build("attacks", "closed_form"),),
    )  # fmt: skip
    study = Study(names=("one", "two"), parts=(plan, replace(plan, victims=(1,))))
    monkeypatch.setattr(beside, "seconds", lambda _: 0.6 * beside.SHORT)
    with open_run(tmp_path / "s", study.header()) as run:
        bounded(study, run, "auto", live.Console())
    assert "Bounds left out: they take about 24 s." in capsys.readouterr().err
    assert not (tmp_path / "s" / "one").exists()


def is_code(name):
    """Whether a channel of this stage alone is a code; None of what is no stage, or needs others in front."""
    try:
        return build("channels", f"chain({name}())").stages[0].kind == "code"
    except (TypeError, AttributeError, Expected):
        return None


CODES = sorted(filter(is_code, catalog("channels")))


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_a_bound_or_says_why_not(code):
    net = build("models", "mlp(channels=1, size=6, classes=3, hidden=(4,))")
    params, buffers = net.init(random.generator(0))
    x, y = random.uniform(random.generator(1), (1, 1, 6, 6)), torch.tensor([1])
    channel = build("channels", f"chain({code}())")
    update = gradient().update(net, params, buffers, x, y)
    noise = channel.draw(random.generator(2), params)
    (message,), _ = channel.send(channel.knobs(), update, noise, channel.init(params), params)
    setting = Setting(gradient(), net, params, buffers)
    for bound in bound_of(setting, channel, x, y, natural((1, 6, 6)), message):
        assert bound.why or math.isfinite(bound.psnr), bound

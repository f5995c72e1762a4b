"""Bounds beside an audit: computed after it, kept beside its rows, shown in terminal and page."""

import io
import json
import re

import pytest
from rich.console import Console

from qleak import data
from qleak.bounds import chord, natural
from qleak.catalog import build
from qleak.engine import bounds as beside
from qleak.engine.audit import prepare, run
from qleak.plans import Audit
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
    assert "spectrum" in beside.prior_for(plan, victims).name  # a small set of a shape that no public one has
    total = len(data.load(plan.data).x)
    monkeypatch.setattr(beside, "ENOUGH", total)
    name = beside.prior_for(plan, victims).name
    assert name.endswith(f"of {plan.data}") and int(name.split()[4].replace(",", "")) <= total - len(victims)

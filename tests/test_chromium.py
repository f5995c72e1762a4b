"""The page in a real browser: nothing logged, nothing loaded, no sideways scrolling, keys and pictures that work."""

import csv
import io
import shutil
import statistics

import pytest
import torch
from browser import CHROMIUM, Browser
from test_report import FP32, INT8, fake
from tiers import sizes

from qleak import random
from qleak.report import figures, html
from qleak.report.stored import load

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Expected Chromium on the PATH (Debian: chromium).")

WIDE = "document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake(tmp_path_factory.mktemp("runs") / "a-run")


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    return html.write(folder, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_logged_or_loaded_and_nothing_hangs_over(browser, page, width, scheme):
    browser.show(width, 844, scheme)
    browser.open(page)
    assert browser.ask(WIDE) == width
    assert browser.errors == [] and browser.requests == []
    dark = sum(int(v) for v in browser.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")[:3]) < 384
    assert dark == (scheme == "dark")


def made(kind, folder):
    """A run of a kind with a channel whose name is longer than a telephone is wide."""
    from captures import SHAPE, gradients, images, module
    from folders import audit, study, training
    from made import synthesis

    long = "clip_l2(bound=3.1) > gaussian(sigma=0.00142) > nominal_laplace(eps=1000000.0, by_tensors=True)"
    learns, leaks = {long: [0.7, 0.8], "fp32": [0.98, 0.97]}, {long: {"dlg()": 9.0}, "fp32": {"dlg()": 33.0}}
    if kind == "captured":
        from qleak import audit as audited

        folder.mkdir()
        net, (x, y) = module(folder), images(1)
        update = {f"wrapped.module.{k}": v for k, v in gradients(net, x, y).items()}
        options = {"budget": 1, "attacks": "closed_form", "bounds": "no", "folder": folder / "run"}
        audited(update, net, shape=SHAPE, truth=(x, y), **options)
        return folder / "run"
    if kind == "study":
        audit(folder / "a", leaks)
        training(folder / "b", learns, epsilon=2.18e8)
        study(folder, {"leak": (folder / "a", "audit"), "learn": (folder / "b", "training")})
    elif kind == "training":
        training(folder, learns, epsilon=2.18e8)
    else:
        synthesis(folder)
    return folder


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("training", "study", "synthesis")]


@pytest.mark.parametrize("kind", ["captured", *SLOW])
def test_a_page_of_every_kind_is_no_wider_than_a_telephone(browser, kind, tmp_path):
    made_page = html.write(made(kind, tmp_path / "run"), tmp_path / "page.html")
    for width in (390, 320):
        browser.show(width, 844)
        browser.open(made_page)
        assert browser.ask(WIDE) == width
        beyond = "[...document.querySelectorAll('main > *, main p, main li, dd, header *')]"
        assert browser.ask(f"{beyond}.filter(e => e.getBoundingClientRect().right > {width} + 1).length") == 0
    assert browser.errors == [] and browser.requests == []


def test_the_checks_can_fail(browser, page, tmp_path):
    bad = tmp_path / "bad.html"
    more = (
        '<p style="width: 900px">wide</p><img src="https://example.org/x.png" alt="x"><script>console.error(1)</script>'
    )
    bad.write_text(page.read_text().replace("</main>", more + "</main>"))
    browser.show(390, 844)
    browser.open(bad)
    assert browser.ask(WIDE) > 390
    assert any("Content Security Policy" in e for e in browser.errors)  # neither runs nor loads
    bad.write_text('<!doctype html><img src="http://127.0.0.1:9/x.png" alt="x"><script>console.error(1)</script>')
    browser.open(bad)
    assert browser.requests == ["http://127.0.0.1:9/x.png"] and len(browser.errors) >= 1


def test_without_scripts_all_is_there(browser, page):
    browser.show(script=False)
    browser.open(page)
    with_script = page.read_text()
    assert browser.errors == [] and with_script.count('class="pic"') == 24
    nodes = browser.call("DOM.getDocument", depth=0)["root"]["nodeId"]
    seen = browser.call("DOM.querySelectorAll", nodeId=nodes, selector=".pic:not([hidden]), section, figure svg")
    assert len(seen["nodeIds"]) > 30
    browser.show()


def test_pictures_answer_to_keys_and_presses(browser, page):
    browser.show()
    browser.open(page)
    focus = "document.activeElement.querySelector('img')?.alt"
    tip = "getComputedStyle(document.activeElement.querySelector('.tip')).position"
    browser.ask("document.querySelector('.pic').focus()")
    first = browser.ask(focus)
    assert FP32 in first and browser.ask(tip) == "fixed" and "PSNR" in browser.ask("document.activeElement.innerText")
    for _ in range(2):
        press(browser, "ArrowRight")
    assert browser.ask(focus) != first
    assert browser.ask("document.querySelectorAll('.pictures')[0].querySelectorAll('.pic[tabindex=\"0\"]').length") == 1
    browser.ask("document.activeElement.click()")
    assert browser.ask("document.getElementById('large').open") is True
    assert browser.ask("document.querySelectorAll('#large img').length") == 2  # the original beside it
    press(browser, "Escape")
    assert browser.ask("document.getElementById('large').open") is False
    assert browser.errors == []


def press(browser, key):
    for kind in ("rawKeyDown", "keyUp"):
        code = {"Escape": 27, "ArrowRight": 39, "Tab": 9}[key]
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


def test_the_first_tab_skips_to_the_findings(browser, page):
    browser.show()
    browser.open(page)
    press(browser, "Tab")
    assert browser.ask("document.activeElement.className") == "skip"
    assert browser.ask("document.activeElement.getBoundingClientRect().left") >= 0
    assert browser.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_every_figure_becomes_a_png_in_the_page(browser, page):
    browser.show()
    browser.open(page)
    browser.call("Browser.setDownloadBehavior", behavior="deny")
    made = browser.ask("""(async () => {
      for (const b of document.querySelectorAll('[data-save=png]')) b.click();
      for (let i = 0; i < 100 && document.querySelectorAll('figure[data-png]').length < document.querySelectorAll('figure svg').length; i++)
        await new Promise(r => setTimeout(r, 50));
      return [...document.querySelectorAll('figure[data-png]')].map(f => Number(f.dataset.png));
    })()""")
    assert len(made) == page.read_text().count("<svg") >= 3 and min(made) > 5000
    assert browser.errors == []


def test_it_prints_every_table_whole(browser, page, tmp_path):
    browser.show(794, 1123, "dark", media="print")
    browser.open(page)
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask(
        "[...document.querySelectorAll('.wide')].every(e => getComputedStyle(e).overflowX === 'visible')"
    )
    assert browser.pdf(tmp_path / "page.pdf").stat().st_size > 20_000
    browser.show()


def test_the_numbers_of_a_figure_are_those_drawn(folder):
    run = load(folder)
    lines = list(csv.DictReader(io.StringIO(figures.psnr_bars(run).csv)))
    drawn = sorted(
        float(r["PSNR of the selected restart, dB"]) for r in lines if r["series"] == f"{INT8} · cells · image"
    )
    assert drawn == pytest.approx(
        sorted(r["psnr"] for (c, a, _), r in run.chosen().items() if (c, a) == (INT8, "cells"))
    )
    assert [r["PSNR of the selected restart, dB"] for r in lines if r["series"] == "threshold"] == ["20"]
    losses = list(csv.DictReader(io.StringIO(figures.loss_curves(run).csv)))
    for curve in run.curves((INT8, "dlg")):
        assert {f"{v:.9g}" for v in curve.loss} <= {r["own loss"] for r in losses if r["panel"] == "dlg"}


def test_figures_are_written_as_files(folder, tmp_path):
    made = html.write_figures(folder, tmp_path / "figures")
    assert {p.name for p in made} == {f"{n}.{k}" for n in ("psnr", "strips", "loss") for k in ("svg", "png", "csv")}
    assert (tmp_path / "figures" / "psnr.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures" / "psnr.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("gone", ["all", "chunks", "victims"])
def test_a_run_whose_tensors_were_removed_has_a_page(folder, tmp_path, gone):
    copy = shutil.copytree(folder, tmp_path / "run")
    for path in (copy / "tensors").glob({"all": "*", "chunks": "chunk-*", "victims": "victims*"}[gone]):
        path.unlink()
    text = html.write(copy, tmp_path / "report.html").read_text()
    assert "tensors of this run were removed" in text and "<h2>Numbers" in text and "<h2>Every lane" in text
    assert ("<h2>Pictures" in text) is False
    assert "were removed" not in html.write(folder, tmp_path / "whole.html").read_text()


# --- a large run ----------------------------------------------------------------------------------


def large(folder, images):
    """Ten channels × four attacks × images × five restarts; pictures of noise, that nothing shrinks."""
    from test_report import PLAN, entry

    from qleak.store import open_run

    channels = [FP32, *(f"uniform(bits={b})" for b in range(9, 0, -1))]
    attacks, victims, restarts = ["dlg", "idlg", "cells", "adaptive"], range(images), 5
    at, rows, summary = torch.arange(25, 1025, 25), [], []
    plan = PLAN | {"victims": list(victims), "channels": channels, "attacks": attacks}
    with open_run(folder, {"kind": "audit", "plan_id": "large", "recipe": "large", "plan": plan}) as run:
        run.save(
            "victims",
            {
                "x": random.uniform(random.generator("large"), (images, 1, 3, 32, 32)),
                "y": torch.zeros(images, 1).long(),
            },
        )
        for i, c in enumerate(channels):
            for j, a in enumerate(attacks):
                key, lanes = f"{i}-{j}", [(v, r) for v in victims for r in range(restarts)]
                x = random.uniform(random.generator(key), (len(lanes), 1, 3, 32, 32))
                curve = (1 + i + j) * (0.1 + torch.exp(-at / 60.0))[:, None] * (1 + x[:, 0, 0, 0, 0])
                run.save(f"chunk-{key}", {"x": x, "loss": curve[-1], "curve": curve, "curve_at": at})
                rows += [
                    {
                        "key": f"{key}-{v}-{r}", "channel": c, "attack": a, "control": "none", "image": v, "seed": r,
                        "status": "finished", "loss": float(curve[-1, n]), "psnr": 5.0 + 40 * float(x[n, 0, 0, 1, 1]),
                        "ssim": 0.5, "order": 0, "selected": r == 0, "success": False, "closures": 1000, "chunk": key,
                        "lane": n, "bits": 8.0, "epsilon": None, "cpu_s": 1.0,
                    }
                    for n, (v, r) in enumerate(lanes)
                ]  # fmt: skip
                summary.append(entry(c, a, "none", 0, 10, 30.0))
        run.append(rows)
        run.update(status="done", summary=summary, facts=[])
    assert len(rows) == 200 * images
    return folder


@sizes("images", 1, 10)
def test_two_thousand_rows_open_in_two_seconds(browser, tmp_path, images):
    page = html.write(large(tmp_path / "large", images), tmp_path / "x.html")
    assert page.stat().st_size < 1.5e6 * max(images, 2)
    browser.show()
    found = []
    for _ in range(5):
        browser.open(page)
        found.append(browser.ask("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    print(f"{page.stat().st_size / 1e6:.2f} MB, load event after {sorted(round(v) for v in found)} ms")
    assert statistics.median(found) < 2000
    assert browser.errors == [] and browser.requests == []

"""Reports say what the files hold: in 80 columns, without colour, in a pipe, and in one HTML file that stands alone."""

import io
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from qleak import random
from qleak.check import Expected, Failed
from qleak.metrics import Secret, score, wilson
from qleak.report import figures, html, terminal, words
from qleak.report.stored import by_arm, load
from qleak.store import open_run, read_run

FP32, INT8 = "fp32", "uniform(bits=8)"
# Noise that an attacker leaves on the picture, by arm: `cells` sees through the quantizer, `dlg` does not.
NOISE = {(FP32, "dlg"): 0.05, (FP32, "cells"): 0.01, (INT8, "dlg"): 0.6, (INT8, "cells"): 0.03}
VICTIMS, SIZE, RESTARTS = [3, 8], 28, 2
PLAN = {
    "kind": "audit", "schema": 1, "model": "lenet_mnist()", "data": "mnist5k", "victims": VICTIMS,
    "channels": ["identity()", "chain(uniform(levels=None, bits=8))"],
    "attacks": ["dlg(outer=30, inner=20, lr=1.0, history=100, patience=0)", "cells(weight=0.01)", "closed_form()"],
    "client": "gradient(batch=1)", "restarts": RESTARTS, "controls": 1, "seed": 0, "model_seed": 0, "success": 20.0,
    "chunk": 16, "dtype": "float32", "delta": 1e-5,
}  # fmt: skip


def originals():
    """A disc and a cross, `[victim b c h w]`."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * 2, indexing="ij")
    disc = ((x**2 + y**2) < 0.5) * (0.6 + 0.4 * x)
    cross = ((x.abs() < 0.2) | (y.abs() < 0.2)) * (0.7 - 0.3 * y)
    return torch.stack([disc, cross])[:, None, None].float()


def fake(folder, recipe="pretrained_int8", status="done", **more):
    """A run folder in the engine's schema, with a diverged lane (NaN pixels, no loss) and an ε."""
    truth, labels = originals(), torch.tensor([[0], [7]])
    header = {
        "kind": "audit", "plan_id": "abc123def0", "recipe": recipe, "plan": PLAN, "flags": {"bits": 8, "seeds": 2},
        "choices": ["2 workers (one per core, one thread each)"], "source": "A claim.", "papers": ["Zhu 2019."],
        "device": "cpu", "workers": 2, "versions": {"torch": "2.9"}, "cpu": "A CPU", "cores": 2, "git": None,
    }  # fmt: skip
    with open_run(folder, header) as run:
        run.save("victims", {"x": truth, "y": labels})
        rows = []
        for arm, noise in NOISE.items():
            for control in ("none", "prior-only", "wrong-gradient"):
                rows += chunk(run, arm, control, truth, labels, noise)
        run.append(rows)
        known = {"unbiased": True, "exact": True}
        facts = [{"channel": c, "bits": bits(c), "epsilon": epsilon(c)} | known for c in (FP32, INT8)]
        refused = [{"channel": INT8, "attack": "closed_form", "reason": "needs exact numbers, not codes."}]
        run.update(status=status, facts=facts, refused=refused, summary=summary(rows), **more)
    return folder


def bits(channel):
    return 32.0 if channel == FP32 else 8.04


def epsilon(channel):
    return None if channel == FP32 else 3.25


def chunk(run, arm, control, truth, labels, noise):
    """The lanes of one arm under one control, as the engine stores them; the last dlg lane at fp32 diverged."""
    key = f"{[FP32, INT8].index(arm[0])}-{arm[1]}-{control}"
    lanes = [(v, r) for v in range(len(VICTIMS)) for r in range(RESTARTS if control == "none" else 1)]
    draw = random.normal(random.generator(key), (len(lanes), *truth.shape[1:]))
    x = torch.stack([truth[v] + noise * (1 + r) * draw[i] for i, (v, r) in enumerate(lanes)])
    x = x if control == "none" else 0.5 + 0.3 * draw
    loss = torch.tensor([noise * (1 + r) for _, r in lanes])
    if key == "0-dlg-none":
        x[-1], loss[-1] = torch.nan, torch.nan
    at = torch.arange(25, 625, 25)
    curve = loss * (1 + 100 * torch.exp(-at / 60.0))[:, None]
    closures = [600 if r == 0 else 300 for _, r in lanes]
    run.save(f"chunk-{key}", {"x": x, "loss": loss, "curve": curve, "curve_at": at})
    rows = []
    for i, (v, r) in enumerate(lanes):
        scores = {k: s[0] for k, s in score(x[i], labels[v], Secret(truth[v], labels[v])).items()}
        rows.append({
            "key": f"{key}-{VICTIMS[v]}-{r}", "channel": arm[0], "attack": arm[1], "control": control,
            "image": VICTIMS[v], "seed": r, "status": "finished", "loss": float(loss[i]), **scores, "selected": r == 0,
            "success": control == "none" and scores["psnr"] >= 20, "closures": closures[i], "chunk": key, "lane": i,
            "bits": bits(arm[0]), "epsilon": epsilon(arm[0]), "cpu_s": 1.5,
        })  # fmt: skip
    return rows


def summary(rows):
    out = []
    for arm in dict.fromkeys((r["channel"], r["attack"], r["control"]) for r in rows):
        mine = [r for r in rows if (r["channel"], r["attack"], r["control"]) == arm]
        out.append(line(*arm, mine))
    return out


def line(channel, attack, control, rows):
    chosen, wins = [r for r in rows if r["selected"]], sum(r["success"] for r in rows)
    return entry(
        channel, attack, control, sum(r["success"] for r in chosen), len(chosen), max(r["psnr"] for r in chosen),
        n=len(rows), psnr_selected=sum(r["psnr"] for r in chosen) / len(chosen), success_rate=wins / len(rows),
        success_ci=list(wilson(wins, len(rows))),
    )  # fmt: skip


def entry(channel, attack, control, recovered, images, best, **more):
    """One object of run.json's summary."""
    return {
        "channel": channel, "attack": attack, "control": control, "n": images, "images": images, "psnr_selected": best,
        "psnr_oracle": best + 1, "psnr_selected_max": best, "ssim_selected": 0.5, "recovered": recovered,
        "success_rate": recovered / images, "success_ci": [0.1, 0.9], "label_accuracy": 1.0, "bits": bits(channel),
        "epsilon": epsilon(channel), "cpu_s": 2.0,
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake(tmp_path_factory.mktemp("runs") / "a-run")


def shown(folder, width=80, color_system=None, **options):
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=color_system, force_terminal=bool(color_system))
    terminal.show(folder, console=console, **options)
    return file.getvalue()


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# --- the terminal ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(folder, tmp_path_factory):
    """The same run with a channel whose name is longer than a line."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("runs") / "long")
    name = "topk(fraction=0.01) > stochastic_quantizer(levels=16) > gaussian(sigma=0.125, bounded=True)"
    for path in (copy / "run.json", copy / "rows.jsonl"):
        path.write_text(path.read_text().replace(INT8, name))
    return copy


@pytest.mark.parametrize("name", ["folder", "long"])
@pytest.mark.parametrize("color_system", [None, "truecolor"])
def test_no_line_is_over_80_columns(name, color_system, request):
    folder = request.getfixturevalue(name)
    assert widest(shown(folder, color_system=color_system, verbose=True)) <= 80
    assert widest(shown(folder, width=140, color_system="truecolor")) > 80  # pictures do use the room there is


def widest(text):
    return max(map(len, plain(text).splitlines()))


def test_without_colour_there_are_no_escapes_and_no_pictures(folder):
    text = shown(folder)
    assert "\x1b" not in text and "▀" not in text
    assert "Pictures need a terminal with colours" in text


def test_no_color_is_respected(folder, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "▀" not in shown(folder, color_system="truecolor")


def test_a_pipe_gets_80_plain_columns(folder):
    code = f"from pathlib import Path; from qleak.report import terminal; terminal.show(Path({str(folder)!r}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    assert out.stderr == ""
    assert "\x1b" not in out.stdout and widest(out.stdout) <= 80
    assert "Verdict: " in out.stdout


def test_the_table_holds_the_numbers(folder):
    text = shown(folder)
    s = by_arm(read_run(folder))[INT8, "cells"]["none"]
    row = next(row for row in text.split(INT8)[1].splitlines() if row.startswith("  cells"))
    assert f"{s['psnr_selected']:.1f}" in row and "2/2" in row and "100% (51–100%)" in row
    assert f"{INT8} · 8.04 bits/coordinate · ε 3.25" in text and "fp32 · 32.00 bits/coordinate · ε —" in text
    assert "Not run on uniform(bits=8): closed_form needs exact numbers" in text
    assert "prior-only" not in text
    assert "prior-only" in (full := shown(folder, verbose=True)) and "wrong-gradient" in full


def test_pictures_wrap_and_are_captioned(folder):
    text = plain(shown(folder, width=60, color_system="truecolor"))
    assert text.count("original") == 2  # three columns fit beside the original, four arms need a second block
    assert text.count("image 3") == text.count("image 8") == 2
    assert "dB ✓" in text and "▀" * 15 not in text
    assert "▀" * SIZE in plain(shown(folder, width=160, color_system="truecolor"))  # whole pixels where there is room


def test_only_four_victims_are_shown(folder, monkeypatch):
    monkeypatch.setattr(terminal, "SHOWN", 1)
    text = plain(shown(folder, color_system="truecolor"))
    assert "image 8" not in text and "… and 1 more images" in text


def test_half_blocks_hold_the_right_colours():
    pixels = torch.zeros(3, 4, 2)
    pixels[0, 0], pixels[2, 3] = 1.0, 1.0  # top line red, bottom line blue
    text = terminal.blocks(pixels, side=2)
    assert text.plain == "▀▀\n▀▀"
    first, last = text.spans[0].style, text.spans[-1].style
    assert (first.color.triplet.hex, first.bgcolor.triplet.hex) == ("#ff0000", "#000000")
    assert (last.color.triplet.hex, last.bgcolor.triplet.hex) == ("#000000", "#0000ff")
    assert terminal.blocks(torch.ones(1, 25, 25), side=13).plain.splitlines() == ["▀" * 13] * 7


def test_quiet_is_the_verdict_alone(folder):
    assert " ".join(shown(folder, quiet=True).split()) == words.verdict(read_run(folder))


# --- the verdict ----------------------------------------------------------------------------------


def header(*arms, controls=("prior-only", "wrong-gradient"), **more):
    """A header whose controls reach 8 dB, or `floor`."""
    low = more.pop("floor", 8.0)
    found = [*arms, *(entry(a["channel"], a["attack"], c, 0, a["images"], low) for a in arms for c in controls)]
    return {"plan": PLAN, "status": "done", "recipe": "r", "summary": found, "flags": {}} | more


def test_verdict_names_who_broke_what_at_which_threshold():
    said = words.verdict(header(entry(INT8, "dlg", "none", 0, 4, 14.0), entry(INT8, "cells", "none", 4, 4, 31.2)))
    assert said == (
        "Verdict: uniform(bits=8) did not stop reconstruction: cells rebuilt 4 of 4 images above 20 dB and above "
        "both controls (best 31.2 dB), dlg 0 of 4."
    )


def test_verdict_puts_the_channel_before_the_exact_gradient():
    arms = [entry(FP32, "cells", "none", 3, 4, 90.0), entry(INT8, "cells", "none", 1, 4, 21.0)]
    assert words.verdict(header(*arms)) == (
        "Verdict: uniform(bits=8) did not stop reconstruction: cells rebuilt 1 of 4 images above 20 dB and above "
        "both controls (best 21.0 dB); nor did fp32: cells rebuilt 3 of 4 (best 90.0 dB)."
    )


def test_verdict_of_a_channel_that_held_is_no_proof():
    arms = [entry(FP32, "cells", "none", 3, 4, 90.0), entry(INT8, "cells", "none", 0, 4, 11.0)]
    assert words.verdict(header(*arms)).endswith(
        "; through uniform(bits=8) no image was rebuilt (best 11.0 dB), which is no proof of safety."
    )


def test_verdict_of_nothing_recovered_is_no_proof():
    said = words.verdict(header(entry(INT8, "dlg", "none", 0, 1, 9.0)))
    assert said == (
        "Verdict: nothing was recovered: no attack rebuilt any of 1 image above 20 dB and above both controls "
        "(dlg on uniform(bits=8): best 9.0 dB), which is no proof of safety."
    )
    assert "no better than a control" in words.verdict(header(entry(INT8, "dlg", "none", 0, 1, 24.0), floor=25.0))
    lucky = entry(INT8, "dlg", "none", 0, 1, 9.0, success_rate=0.5)
    assert "though restarts that the attacker did not choose got there" in words.verdict(header(lucky))


def test_verdict_names_attacks_by_what_tells_them_apart():
    once = [entry(INT8, "dlg(outer=30)", "none", 0, 4, 9.0), entry(INT8, "cells(steps=9)", "none", 1, 4, 31.0)]
    assert "cells rebuilt 1" in words.verdict(header(*once)) and ", dlg 0 of 4" in words.verdict(header(*once))
    twice = [*once, entry(INT8, "cells", "none", 0, 4, 9.0)]
    assert "cells(steps=9) rebuilt 1" in words.verdict(header(*twice))


def test_verdict_claims_only_the_controls_that_ran():
    arm = entry(INT8, "cells", "none", 1, 1, 31.0)
    assert "above the prior-only control" in words.verdict(header(arm, controls=("prior-only",)))
    assert "(no control was run)" in words.verdict(header(arm, controls=()))


def test_verdict_of_an_unfinished_run():
    assert words.verdict({"status": "interrupted"}) == "Verdict: none yet, the run is interrupted."


def test_next_step_follows_the_outcome():
    here, won, lost = Path("runs/x"), entry(INT8, "cells", "none", 1, 1, 31.0), entry(INT8, "cells", "none", 0, 1, 9.0)

    def step(*arms, **more):
        return words.next_step(header(*arms, **more), here)[0]

    assert step(won, flags={"bits": 8}) == "qleak recipe run r --bits 4"
    assert step(lost, flags={"bits": 8, "seeds": 2}) == "qleak recipe run r --seeds 8"
    assert step(won, flags={"bits": 1, "full": False}) == "qleak recipe run r --full"
    assert step(won) == "qleak report runs/x"
    assert step(won, status="interrupted") == "qleak recipe run r --config runs/x/run.json"


# --- the page -------------------------------------------------------------------------------------

SCRIPT = (Path(html.__file__).parent / "page.js").read_text().strip()
VOID = {"meta", "link", "img", "br", "hr", "input", "col"}


class Page(HTMLParser):
    """Balanced tags, ids, images and every attribute that could load something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.images, self.links, self.faults = [], [], [], [], [], []
        self.headless = 0  # tables without a caption, headers without a scope
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]
        self.faults += [f"id {i} twice" for i in {i for i in self.ids if self.ids.count(i) > 1}]
        self.faults += [f"loads {url}" for url in self.links if not url.startswith(("data:", "#"))]
        self.faults += ["an image without alt" for image in self.images if not image.get("alt")]

    def handle_starttag(self, tag, attributes):
        self._note(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._note(tag, attributes)

    def handle_data(self, data):
        if self.open and self.open[-1] == "script" and data.strip() != SCRIPT:
            self.tags.append("script")

    def _note(self, tag, attributes):
        found = dict(attributes)
        if tag != "script" or found:  # the page's own is known by its text
            self.tags.append(tag)
        self.headless += (tag == "table") - (tag == "caption") + (tag == "th" and "scope" not in found)
        self.ids += [found["id"]] if "id" in found else []
        self.images += [found] if tag == "img" else []
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "data", "poster")]
        self.links += re.findall(r"url\(([^)]*)\)", found.get("style") or "")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")


def render(folder, out):
    return html.write(folder, out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    return render(folder, tmp_path_factory.mktemp("page"))


def test_the_page_is_well_formed_and_loads_nothing(page):
    parsed = Page(page)
    assert parsed.faults == [] and parsed.headless == 0
    assert "@import" not in page and "script" not in parsed.tags
    assert {"table", "svg", "details", "caption"} <= set(parsed.tags)
    assert set(re.findall(r"https?://[^/\"]*/", page)) == {"http://www.w3.org/"}  # the names of SVG's namespaces


REMOTE = '<img src="https://x.org/a.png" alt="a">'


@pytest.mark.parametrize("bad", ["<p>", "</p>", '<img src="data:,">', REMOTE, '<i id="a"></i><b id="a"></b>'])
def test_the_page_check_can_fail(bad):
    assert Page(f"<html>{bad}</html>").faults


def test_the_page_says_everything(page):
    assert page.index("Verdict: ") < page.index("<h2>Pictures") < page.index("<h2>Numbers")
    assert "own loss — · seed 1" not in page  # the diverged lane is not selected
    assert len(Page(page).images) == 2 * (1 + 4) + 2 * 2 * (1 + 4)  # the audit's grid and those of two controls
    told = ["3.25", "8.04", "closed_form needs exact numbers", "Zhu 2019.", "one per core", "mnist5k", "A claim."]
    told += ["not given", "qleak recipe run pretrained_int8 --config run.json", "prefers-color-scheme", "A CPU"]
    assert [t for t in told if t not in page] == []


def test_a_lane_that_diverged_is_grey_and_has_no_curve(folder):
    run = load(folder)
    row = next(r for r in run.rows if r["loss"] is None)
    assert torch.equal(run.guess(row), torch.full((1, SIZE, SIZE), 0.5))
    assert len(run.curves((FP32, "dlg"))) == 3 and len(run.curves((INT8, "dlg"))) == 4
    assert [c.selected for c in run.curves((INT8, "dlg"))] == [True, True, False, False]
    assert run.curves((INT8, "dlg"))[2].at[-1] == 300  # where the lane froze


def test_a_batch_is_shown_in_the_order_of_the_truth(tmp_path):
    first, second = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    with open_run(tmp_path / "a", {"kind": "audit", "plan_id": "x", "plan": {"victims": [10]}}) as run:
        run.save("victims", {"x": torch.stack([first, second])[None], "y": torch.tensor([[4, 5]])})
        run.save("chunk-k", {"x": torch.stack([second, first])[None]})
        run.append([{"key": str(i), "image": 10 + i, "chunk": "k", "lane": 0, "order": 1 - i} for i in range(2)])
    stored = load(tmp_path / "a")
    assert stored.batch == 2 and stored.labels == {10: 4, 11: 5}
    assert all(torch.equal(stored.guess(row), stored.originals[row["image"]]) for row in stored.rows)
    assert not torch.equal(stored.guess(stored.rows[0]), stored.originals[11])


def test_hostile_text_stays_text(tmp_path):
    bad = "<script>alert(1)</script>"
    text = render(fake(tmp_path / "a", recipe=bad, choices=[bad], papers=[f'"{bad}'], source=bad), tmp_path)
    assert text.count("<script") == 1 and text.count("&lt;script&gt;") >= 5
    assert Page(text).faults == []
    assert "[bold]" in shown(fake(tmp_path / "b", recipe="[bold]"))  # no markup in the terminal either


def test_a_run_without_rows_is_rendered(tmp_path):
    with open_run(tmp_path / "a", {"kind": "audit", "plan_id": "x", "plan": PLAN, "recipe": "r", "status": "failed"}):
        pass
    assert Page(render(tmp_path / "a", tmp_path)).faults == []
    assert "Verdict: none yet, the run is failed." in shown(tmp_path / "a")
    with pytest.raises(Expected, match="no rows yet"):
        figures.grid(tmp_path / "a", tmp_path / "a.png")


def test_the_same_run_gives_the_same_page(folder, page, tmp_path):
    assert render(folder, tmp_path) == page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]  # no part is left over


def test_a_page_that_cannot_be_written_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed, match=r"Expected to write .*: choose another file"):
        html.write(folder, tmp_path / "file" / "report.html")


def test_other_kinds_of_run_are_refused(tmp_path):
    with open_run(tmp_path / "a", {"kind": "study", "plan_id": "x"}), pytest.raises(Expected, match="kind 'audit'"):
        load(tmp_path / "a")


# --- figures --------------------------------------------------------------------------------------


def test_grid_has_sharp_pixels(folder, tmp_path):
    picture = imread(figures.grid(folder, tmp_path / "grid.png"))
    scale, gap = 168 // SIZE, 16
    truth = originals()[0, 0, 0].mul(255).int()
    top = 14 + 22 * 2
    block = torch.from_numpy(picture[top : top + 168, gap : gap + 168, 0]).mul(255).round().int()
    assert (block - truth.repeat_interleave(scale, 0).repeat_interleave(scale, 1)).abs().max() <= 1
    assert picture.shape[1] == 5 * (168 + gap) + gap


def test_grid_takes_chosen_arms_with_titles(folder, tmp_path):
    out = figures.grid(folder, tmp_path / "two.png", {(INT8, "cells"): "knows the $quantizer"})
    assert imread(out).shape[1] == 2 * (168 + 16) + 16
    with pytest.raises(Expected, match=r"Unknown arm .*bits=8\) / cell' .* Did you mean '.*bits=8\) / cells'"):
        figures.grid(folder, tmp_path / "x.png", [(INT8, "cell")])
    assert not (tmp_path / "x.png").exists()


def test_svg_takes_the_colour_of_the_page(folder):
    for svg in (figures.loss_curves(load(folder)), figures.psnr_bars(load(folder))):
        assert svg.startswith("<svg") and "currentColor" in svg and figures.INK not in svg
        assert "uniform(bits=8)" in svg  # text stays text
        assert "#000000" not in svg


def test_colours_are_seen_on_both_backgrounds():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    css = (Path(html.__file__).parent / "page.css").read_text()
    light, dark, printed = (dict(re.findall(r"--(\w+): (#\w{6})", b)) for b in re.findall(r":root \{([^}]*)\}", css))
    assert printed == light
    for theme in (light, dark):
        assert all(contrast(c, theme["back"]) >= 3 for c in figures.COLOURS)
        for name in ("text", "soft", "hit", "link"):
            assert min(contrast(theme[name], theme[back]) for back in ("back", "fill", "card")) >= 4.5
    assert contrast("#ffff00", light["back"]) < 3

"""Every Python block of README and docs does what it says, and links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


TOGETHER = ("tutorial.md",)
"""Pages whose blocks build on one another, as cells of a notebook do; they run as one."""


def snippets() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        code = blocks(page.read_text(encoding="utf-8"), "python")
        found += [(page.name, b) for b in (["\n".join(code)] if page.name in TOGETHER else code)]
    return found


@pytest.mark.parametrize(
    ("page", "code"),
    [pytest.param(p, c, marks=pytest.mark.slow if p in TOGETHER else ()) for p, c in snippets()],
    ids=lambda v: v[:12],
)
def test_python_blocks(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    exec(compile(code, page, "exec"), {})


def test_the_attack_in_the_readme_is_short_and_rebuilds_its_digit(capsys):
    (code,) = (b for b in blocks(PAGES[0].read_text(encoding="utf-8"), "python") if "LBFGS" in b)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
    exec(compile(code, "README.md", "exec"), {})
    assert float(re.search(r"rebuilt at (\d+) dB", capsys.readouterr().out)[1]) >= 40


def test_the_pages_have_blocks_to_run():
    assert snippets()


def test_links_between_pages_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"

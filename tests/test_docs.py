"""The pages keep their word: parts of one's own work as written, pages are listed and built, citations are whole."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def parts(page: str) -> dict[str, str]:
    """{path named in a heading: the first python block below it}."""
    found = re.findall(r"^## .*?`([\w/]+\.py)`.*?^```python\n(.*?)^```", page, re.M | re.S)
    return dict(found)


@pytest.fixture
def house(tmp_path):
    """A copy of the package with the files of docs/extend.md dropped into their rooms; runs a module there."""
    here = tmp_path / "here"
    shutil.copytree(ROOT / "qleak", here / "qleak", ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in parts((DOCS / "extend.md").read_text(encoding="utf-8")).items():
        assert not (here / path).exists(), f"{path} is a part already: the page needs another example"
        (here / path).write_text(text, encoding="utf-8")

    def run(*words):
        env = {**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words], cwd=here, env=env, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_page_shows_one_file_of_each_kind():
    rooms = [Path(p).parent.name for p in parts((DOCS / "extend.md").read_text(encoding="utf-8"))]
    assert rooms == ["channels", "models", "attacks", ""]


@pytest.mark.slow
def test_a_channel_of_ones_own_goes_through_every_law(house):
    out = house("-m", "pytest", ROOT / "tests/test_channels.py", "-k", "truncate", "-p", "no:cacheprovider", "-c", os.devnull,
                "--import-mode=importlib", "-q")  # fmt: skip
    assert int(re.search(r"(\d+) passed", out)[1]) >= 6


@pytest.mark.slow
def test_a_recipe_of_ones_own_parts_does_what_its_page_says(house, tmp_path):
    house("-c", "from qleak.cli import main; main()", "recipe", "run", "./my_recipe.py", "--victims", "1", "--quiet")
    (header,) = (tmp_path / "here" / "runs").glob("my_recipe-*/run.json")
    summary = json.loads(header.read_text())["summary"]
    arms = {s["attack"].split("(")[0]: s["psnr_selected"] for s in summary if s["control"] == "none"}
    print(arms)
    assert arms["smooth"] >= 25
    assert arms["cells"] >= 25


def test_the_notebook_is_the_page():
    """Its cells are the page's blocks, it was executed without an error, and it ends in a figure."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from make_tutorial import NOTEBOOK, cells
    finally:
        sys.path.pop(0)
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    held = [(c["cell_type"], "".join(c["source"])) for c in book["cells"]]
    page = cells((DOCS / "tutorial.md").read_text(encoding="utf-8"))
    assert held == page, "run `just tutorial`"
    assert held != [(kind, text.replace("quick", "cells")) for kind, text in page]
    outputs = [o for c in book["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert NOTEBOOK.stat().st_size < 300_000


def test_the_citation_has_what_the_format_requires():
    """Citation File Format 1.2.0: four required keys; version and licence are the package's."""
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["cff-version"] == "1.2.0"
    assert all(set(a) & {"name", "family-names"} for a in cited["authors"])
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["version"], cited["license"]) == (package["version"], "MIT")


def test_every_room_has_a_reference_page():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import build_reference as reference
    finally:
        sys.path.pop(0)
    for room in reference.ROOMS:
        assert reference.modules(room), room
        assert "::: qleak." in reference.page(room)
    named = {m for room in reference.ROOMS for m in reference.modules(room)}
    for room in ("channels", "attacks", "models", "clients"):
        from qleak.catalog import catalog

        assert {f.__module__ for f in catalog(room).values()} <= named


@pytest.mark.slow
def test_the_pages_build_without_a_warning_and_load_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {p.relative_to(tmp_path / "site").as_posix(): p.read_text() for p in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "tutorial.html", "sharp-edges.html", "reference/channels.html"} <= set(pages)
    loaded = r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?:https?:)?//[^\"']+"
    assert not {name: found for name, text in pages.items() if (found := re.findall(loaded, text))}
    assert re.search(loaded, '<script src="https://cdnjs.example/a.js"></script>')
    assert "Uniform quantization, rounding to nearest" in pages["reference/channels.html"]

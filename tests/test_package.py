"""Wheel and source distribution: what they hold, what they leave out, and that what is installed from one works."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), made without a network: hatchling is what the environment has. The wheel is made from the sdist."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "-o", out, ROOT], check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def held(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def test_the_wheel_holds_all_that_runs(built):
    names = held(built[0])
    sources = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "qleak").rglob("*")
        if p.suffix in (".py", ".cpp", ".h", ".j2", ".css", ".js")
    }
    recipes = {f"qleak/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "recipes").glob("*.py")}
    weights = {f"qleak/assets/{p.name}" for p in (ROOT / "assets/weights").iterdir() if p.is_file()}
    assert sources <= names
    assert recipes <= names
    assert weights <= names
    assert any(n.startswith("qleak/assets/runs/") for n in names)


def test_neither_holds_tests_in_the_package_data_or_leftovers(built):
    wheel, sdist = built
    with tarfile.open(sdist) as file:
        inside = {n.partition("/")[2] for n in file.getnames()}
    for name in held(wheel):
        assert name.startswith("qleak"), name
    for name in held(wheel) | inside:
        assert "__pycache__" not in name and not name.endswith((".pyc", ".npz")), name
        assert not name.startswith(("runs/", "site/")), name
    assert wheel.stat().st_size < 5e6
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "justfile"} <= inside
    assert {"recipes/pretrained_int8.py", "tests/test_channels.py", "docs/channels.md"} <= inside


def test_the_sdist_holds_what_its_own_tests_and_pages_need(built):
    """From the sdist alone: README and docs, their links, the citation, the notebook, the way pages are built."""
    with tarfile.open(built[1]) as file:
        inside = {n.partition("/")[2] for n in file.getnames()}
    wanted = {"CITATION.cff", "CONTRIBUTING.md", "mkdocs.yml", "examples/tutorial.ipynb", "scripts/build_reference.py"}
    assert wanted <= inside, f"pyproject.toml, tool.hatch.build.targets.sdist: {sorted(wanted - inside)}"


def test_what_is_installed_from_the_wheel_works(built, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path / "lib", built[0]],
        check=True, capture_output=True,
    )  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
    code = "import qleak, sys; from qleak.cli import main; print(qleak.__file__); main()"

    def run(*words):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert str(tmp_path / "lib") in done.stdout.splitlines()[0]
        return done.stdout

    listed = run("recipe", "ls")
    assert all(p.stem in listed for p in (ROOT / "recipes").glob("*.py"))
    load = "from qleak import models, random; print(len(models.lenet_mnist().init(random.generator(0))[0]))"
    done = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "8", done.stderr

"""The house's arrows: imports point one way, randomness has one home, modules stay small."""

import ast
import re
from pathlib import Path

import pytest

import qleak

PACKAGE = Path(qleak.__file__).parent
RANKS = [
    {"errors"},
    {"types", "check", "random", "tree"},
    {"catalog", "native"},
    {"models", "data", "channels", "metrics"},
    {"client", "accounting", "calibration", "ledger"},
    {"private"},
    {"attacks", "train"},
    {"bounds", "synth"},
    {"disk"},
    {"folders"},
    {"plans", "store"},
    {"looks", "jobs", "scoring", "pool", "executors", "cluster", "engine", "machine"},
    {"report", "adapters"},
    {"cli", "recipes"},
]
RANK = {room: i for i, rooms in enumerate(RANKS) for room in rooms}


def imports(source: str) -> set[str]:
    """Rooms of qleak that a module imports anywhere in its text, type checking blocks left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("qleak.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "qleak":
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qleak."):
            found.add(node.module.split(".")[1])
    return found


def backward(room: str, source: str) -> set[str]:
    return {other for other in imports(source) & set(RANK) if RANK[other] > RANK[room]}


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    assert room_of(path) in RANK, f"{path} is a room the plan does not know"
    assert not backward(room_of(path), path.read_text(encoding="utf-8"))


def test_the_import_test_sees_an_arrow_that_points_back():
    assert backward("channels", "from qleak.attacks import cells") == {"attacks"}
    assert backward("tree", "def f():\n    import qleak.engine") == {"engine"}
    assert not backward("attacks", "from qleak.channels import chain")


BANNED = re.compile(
    r"torch\.manual_seed|torch\.rand(n|int|perm)?\(|torch\.(randn|rand)_like|np\.random|numpy\.random|\.(normal|uniform)_\("
)


def test_draws_live_in_random_py_only():
    for path in MODULES:
        if path.name != "random.py":
            assert not BANNED.search(path.read_text(encoding="utf-8")), path
    assert BANNED.search("x = torch.randn(3)")
    assert BANNED.search("torch.manual_seed(0)")


def test_every_vmap_forbids_hidden_randomness():
    """Deterministic maps may leave the default ("error"); asking for anything else is a breach of law 1."""
    for path in MODULES:
        assert not re.search(r"randomness=[\"'](same|different)", path.read_text(encoding="utf-8")), path


def test_modules_stay_readable():
    long = {
        str(p.relative_to(PACKAGE)): n for p in MODULES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 300
    }
    assert not long

"""What `mkdocs build` makes besides the pages in docs/: the reference from docstrings, the order of pages, code colours.

A hook of mkdocs.yml. Nothing is fetched and nothing imported: docstrings are read from the sources.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ORDER = {
    "Start": ["index", "first-five-minutes", "concepts", "tutorial", "threat-models", "sharp-edges", "results"],
    "Use": ["audit-your-own", "capture", "runs", "reports", "watching", "scale-out", "extend"],
    "Parts": ["channels", "attacks", "labels", "models", "privacy", "bounds", "synthesis"],
    "Inside": ["design", "performance"],
}
ROOMS = {
    "channels": "what happens to an update on its way",
    "attacks": "what an observer rebuilds",
    "models": "networks as pure parameter dicts",
    "client": "what is computed before the channel",
    "data": "embedded sets, folders, files",
    "plans": "everything that decides a result",
    "engine": "a plan as a stream of events",
    "train": "the server's side",
    "private": "clipped sums of per-example gradients",
    "accounting": "ε of a privacy event",
    "bounds": "what no attacker can beat",
    "synth": "private data generation",
    "report": "terminal, pages and figures from a run's files",
    "adapters": "captured updates, DDP, Flower",
    "native": "three inner loops in C++",
    "types": "the nouns",
    "basics": "draws, checks, trees, figures of merit, run folders",
}
SINGLE = {
    "basics": ["errors", "check", "random", "tree", "catalog", "metrics", "calibration", "ledger", "store", "scoring"]
}


def modules(room: str) -> list[str]:
    """Dotted names of a room's modules that have something public to say, the package itself first."""
    if room in SINGLE:
        return [f"qleak.{name}" for name in SINGLE[room] if (ROOT / f"qleak/{name}.py").is_file()]
    if (ROOT / f"qleak/{room}.py").is_file():
        return [f"qleak.{room}"]
    paths = sorted((ROOT / "qleak" / room).rglob("*.py"))
    return [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths if p.stem != "__init__" and public(p)]


def public(path: Path) -> list[str]:
    """Names of a module's functions, classes and stages that do not begin with an underscore and are documented."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_") and ast.get_docstring(n)]


def page(room: str) -> str:
    """The reference page of a room: one directive a module."""
    text = f"# {room}\n\n{ROOMS[room][0].upper()}{ROOMS[room][1:]}.\n"
    for name in modules(room):
        text += f"\n::: {name}\n"
    return text


def colours() -> str:
    """Pygments' colours by day and by night, and a little air."""
    from pygments.formatters import HtmlFormatter

    day = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    night = HtmlFormatter(style="github-dark").get_style_defs('[data-bs-theme="dark"] .highlight')
    return "\n".join((day, night, EXTRA))


EXTRA = """
.highlight, .highlight pre { background: transparent !important; }
pre { padding: .8rem 1rem; border: 1px solid var(--bs-border-color); border-radius: .4rem; }
img { max-width: 100%; height: auto; }
table { display: block; overflow-x: auto; }
.doc-contents { padding-left: 1rem; border-left: 2px solid var(--bs-border-color); }
"""


def on_config(config: Any) -> Any:
    """The order of pages: those that exist, and whatever is new at the end."""
    here = {p.stem for p in (ROOT / "docs").glob("*.md") if not p.name.endswith(".tmp.md")}
    nav: list[Any] = [{title: [f"{n}.md" for n in names if n in here]} for title, names in ORDER.items()]
    if rest := sorted(here - {n for names in ORDER.values() for n in names}):
        nav.append({"More": [f"{n}.md" for n in rest]})
    config["nav"] = [*nav, {"Reference": [f"reference/{room}.md" for room in ROOMS]}]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pictures of the repository are found beside the pages; links to other files of it become the names of those files."""
    markdown = re.sub(r"(!\[[^\]]*\]\()\.\./(assets/)", r"\1\2", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)\)", r"\1 (`\2`)", markdown)


def on_files(files: Any, config: Any) -> Any:
    """Adds the reference pages, the style sheet, and the pictures that lie beside docs/."""
    from mkdocs.structure.files import File

    for room in ROOMS:
        files.append(File.generated(config, f"reference/{room}.md", content=page(room)))
    files.append(File.generated(config, "assets/extra.css", content=colours()))
    for path in sorted((ROOT / "assets").glob("*.svg")):
        files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    return files

"""One page from its template: style and script go inside, sections get names and a list of contents, nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from qleak.report import words
from qleak.report.drawn import Drawn

HERE = Path(__file__).parent
SECTION = re.compile(r"<section><h2>(.*?)</h2>", re.DOTALL)
CONTENTS = "<!-- contents -->"


def render(template: str, **context: Any) -> str:
    """The HTML text. Only the page's own script may run: its hash is the sole one that the page's policy names."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    strict: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    engine = Environment(loader=FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True, **strict)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    more = {
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")), "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "number": words.number, "inline": Markup, "csv_uri": csv_uri,
    }  # fmt: skip
    return _contents(engine.get_template(template).render(**more, **context))


def csv_uri(drawn: Drawn) -> str:
    """The numbers of a figure as a link."""
    return f"data:text/csv;base64,{base64.b64encode(drawn.csv.encode()).decode()}"


def figures(context: Any) -> list[Drawn]:
    """Every figure in a page's context, in its order, each name once."""
    found: dict[str, Drawn] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Drawn):
            found.setdefault(value.name, value)
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(inner)

    walk(context)
    return list(found.values())


def _contents(text: str) -> str:
    """Gives every section an id and its heading as name, and lists them where the template leaves room."""
    titles: dict[str, str] = {}

    def named(match: re.Match[str]) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"<[^>]*>|&\w+;", "", match[1]).lower()).strip("-") or "section"
        name, i = slug, 2
        while name in titles:
            name, i = f"{slug}-{i}", i + 1
        titles[name] = match[1]
        return f'<section id="{name}" aria-label="{match[1]}"><h2>{match[1]}</h2>'

    text = SECTION.sub(named, text)
    items = "".join(f'<li><a href="#{name}">{title}</a></li>\n' for name, title in titles.items())
    listed = f'<nav aria-label="Contents"><ol>\n{items}</ol></nav>' if len(titles) > 1 else ""
    return text.replace(CONTENTS, listed, 1)

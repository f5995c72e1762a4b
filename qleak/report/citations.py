"""What a plan rests on, as BibTeX: the papers its attacks name, and those that the docstrings of its parts cite.

Entries hold what the project's own text says and nothing else; a paper that is written in no known form becomes `@misc`
with the whole line as its title.
"""

from __future__ import annotations

import inspect
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

from qleak.catalog import catalog

ROOMS = ("channels", "attacks", "clients", "models", "rules", "synthesizers")
FIELDS = ("channels", "attacks", "client", "model", "rule", "arms", "methods")
QUOTED = re.compile(r'((?:[A-ZÅÖÄÉ][\w’\'-]+(?: et al\.)?(?:, (?:and )?| and )?)+),? "([^"]+?),?" \(([^()]*?)(\d{4})\)')
PLAIN = re.compile(
    r"(?P<authors>[^.]+?(?: et al)?)\. (?P<title>.+?)\. (?P<venue>[^.(]*?),? ?(?P<year>\d{4})(?P<note>.*)$"
)
TICKED = re.compile(r"(?P<authors>[^']+?), '(?P<title>[^']+)' \((?P<venue>[^()]*?) ?(?P<year>\d{4})\)(?P<note>.*)$")
SPECIAL = re.compile(r"[\\{}&%$#_~^]")


class Paper(NamedTuple):
    """A reference in parts; `text` is how the project writes it."""

    text: str
    authors: str
    title: str
    venue: str
    year: str
    note: str


def papers(header: dict[str, Any]) -> list[Paper]:
    """Every paper of a run's attacks, then those of channels, client, model and rule; each title once."""
    found = {p.title: p for p in reversed([*map(read, header.get("papers") or []), *_cited(header.get("plan") or {})])}
    return list(reversed(found.values()))


def read(text: str) -> Paper:
    """'Authors. Title. Venue year (note).' or "Authors, 'Title' (Venue year)" in parts."""
    if m := TICKED.match(text) or PLAIN.match(text):
        note = m["note"].strip(" .,;()")
        return Paper(text, m["authors"].strip(), m["title"].strip(), m["venue"].strip(" ,."), m["year"], note)
    year = re.search(r"\b(?:19|20)\d\d\b", text)
    return Paper(text, "", text.rstrip("."), "", year[0] if year else "", "")


def bibtex(paper: Paper) -> str:
    """One entry; authors are the surnames that were named."""
    names = re.split(r",\s*(?:and\s+)?|\s+and\s+", re.sub(r",?\s*et al\.?$", ", others", paper.authors))
    fields = {
        "author": " and ".join(n for n in names if n), "title": f"{{{_tex(paper.title)}}}",
        "booktitle": _tex(paper.venue), "year": paper.year, "note": _tex(paper.note),
    }  # fmt: skip
    lines = [f"  {k} = {{{_tex(v) if k == 'author' else v}}}" for k, v in fields.items() if v]
    return f"@{'inproceedings' if paper.venue else 'misc'}{{{key(paper)},\n" + ",\n".join(lines) + "\n}"


def key(paper: Paper) -> str:
    """zhu2019deep: first author, year, first word of the title, in ASCII."""
    first = paper.authors.split(",")[0].split(" ")[0]
    word = next((w for w in re.findall(r"[\w-]+", paper.title) if w.lower() not in ("a", "an", "the", "on")), "")
    return re.sub(r"[^a-z0-9]", "", _ascii(f"{first}{paper.year}{word}").lower()) or "paper"


def _cited(plan: dict[str, Any]) -> Iterator[Paper]:
    """Papers in the docstrings of the factories that a plan names, and of the files they are in."""
    for part in [plan, *(p for p in plan.get("parts") or [] if isinstance(p, dict))]:
        specs = [part.get(f) for f in FIELDS]
        text = " ".join(str(s) for spec in specs if spec for s in (spec if isinstance(spec, list) else [spec]))
        for name in dict.fromkeys(re.findall(r"\b([a-z_]\w*)\(", text)):
            for room in ROOMS:
                if (made := catalog(room).get(name)) is not None:
                    yield from _quoted(made.__doc__)
                    yield from _quoted(getattr(inspect.getmodule(made), "__doc__", None))


def _quoted(text: str | None) -> Iterator[Paper]:
    for m in QUOTED.finditer(" ".join((text or "").split())):
        authors, title, venue = m[1].removesuffix(",").replace(" and ", ", "), m[2], m[3].strip(" ,")
        yield Paper(
            f"{authors.removesuffix('.')}. {title}. {f'{venue} ' if venue else ''}{m[4]}.",
            authors,
            title,
            venue,
            m[4],
            "",
        )


def _tex(text: str) -> str:
    known = {"\\": r"\textbackslash ", "~": r"\textasciitilde ", "^": r"\textasciicircum "}
    return SPECIAL.sub(lambda m: known.get(m[0], "" if m[0] in "{}" else f"\\{m[0]}"), text)


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()

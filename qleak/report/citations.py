"""What a plan rests on, as BibTeX: the papers its attacks name, and those that the docstrings of its parts cite.

Entries hold what the project's own text says; a paper that is written in no known form becomes `@misc` with the whole line
as its title. The papers that most runs rest on are written out in `MAIN`, whatever short form the text uses.
"""

from __future__ import annotations

import inspect
import re
import unicodedata
from collections.abc import Iterable, Iterator
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


MAIN = {
    (line[0].split(",")[0], line[3]): Paper(f"{line[0]}. {line[1]}. {' '.join(filter(None, line[2:4]))}.", *line)
    for line in (
        ("Zhu, Liu, Han", "Deep Leakage from Gradients", "NeurIPS", "2019", ""),
        ("Zhao, Mopuri, Bilen", "iDLG: Improved Deep Leakage from Gradients", "", "2020", "arXiv:2001.02610"),
        ("Geiping, Bauermeister, Dröge, Moeller",
         "Inverting Gradients: How easy is it to break privacy in federated learning?", "NeurIPS", "2020", ""),
        ("Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang", "Deep Learning with Differential Privacy", "CCS", "2016", ""),
        ("Wang, Wu, Long, Rimanic, Zhang, Li",
         "DataLens: Scalable Privacy Preserving Training via Gradient Compression and Aggregation", "CCS", "2021", ""),
        ("Alistarh, Grubic, Li, Tomioka, Vojnovic",
         "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", "NeurIPS", "2017", ""),
        ("Wen, Xu, Yan, Wu, Wang, Chen, Li",
         "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning", "NeurIPS", "2017", ""),
        ("Vogels, Karimireddy, Jaggi",
         "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", "NeurIPS", "2019", ""),
    )
}  # fmt: skip
"""By first author and year, all authors, title and venue."""


def whole(paper: Paper) -> Paper:
    """A paper as `MAIN` has it: of the same first author and year, and the same first word of the title; else as it is."""
    main = MAIN.get((paper.authors.split(",")[0].split(" ")[0], paper.year))
    return main if main and key(main) == key(paper) else paper


def papers(header: dict[str, Any]) -> list[Paper]:
    """Every paper of a run's attacks, then those of channels, client, model and rule; each title once."""
    named = [*map(read, header.get("papers") or []), *_cited(header.get("plan") or {})]
    found = {p.title: p for p in reversed([whole(p) for p in named])}
    return list(reversed(found.values()))


def read(text: str) -> Paper:
    """'Authors. Title. Venue year (note).' or "Authors, 'Title' (Venue year)" in parts."""
    if m := TICKED.match(text) or PLAIN.match(text):
        note = m["note"].strip(" .,;()")
        return Paper(text, m["authors"].strip(), m["title"].strip(), m["venue"].strip(" ,."), m["year"], note)
    year = re.search(r"\b(?:19|20)\d\d\b", text)
    return Paper(text, "", text.rstrip("."), "", year[0] if year else "", "")


def entries(papers: Iterable[Paper]) -> list[str]:
    """An entry for each paper; of papers that would share a key the second gets a "b", the third a "c"."""
    taken: dict[str, int] = {}
    made = []
    for paper in papers:
        taken[key(paper)] = n = taken.get(key(paper), 0) + 1
        made.append(bibtex(paper, "" if n == 1 else chr(96 + n)))
    return made


def bibtex(paper: Paper, suffix: str = "") -> str:
    """One entry, `suffix` behind its key; authors are the surnames that were named."""
    names = re.split(r",\s*(?:and\s+)?|\s+and\s+", re.sub(r",?\s*et al\.?$", ", others", paper.authors))
    fields = {
        "author": " and ".join(n for n in names if n), "title": f"{{{_tex(paper.title)}}}",
        "booktitle": _tex(paper.venue), "year": paper.year, "note": _tex(paper.note),
    }  # fmt: skip
    lines = [f"  {k} = {{{_tex(v) if k == 'author' else v}}}" for k, v in fields.items() if v]
    return f"@{'inproceedings' if paper.venue else 'misc'}{{{key(paper)}{suffix},\n" + ",\n".join(lines) + "\n}"


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
    for (surname, year), paper in MAIN.items():  # "(Abadi et al. 2016, Algorithm 1)"
        if re.search(rf"\b{surname} et al\.,? \(?{year}", " ".join((text or "").split())):
            yield paper
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

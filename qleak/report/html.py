"""A run, or several beside each other, as one self-contained HTML file that opens offline."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

from qleak.errors import Failed
from qleak.report import (
    bounds,
    captured,
    captured_page,
    citations,
    compare,
    epsilons,
    figures,
    filmstrips,
    headline,
    nominal,
    nominal_panels,
    page,
    parts,
    pictures,
    plots,
    privacy,
    privacy_frontier,
    race,
    study,
    synthesis,
    synthesis_page,
    training,
    words,
)
from qleak.report.frontier import Part
from qleak.report.stored import Stored, by_arm, load, write_file
from qleak.store import read_run

ENVIRONMENT = ("device", "workers", "cpu", "cores", "system", "cuda", "git", "started", "finished")
BARS = 24  # arms that a bar each can show; the table and the dots show more
# Fields of an audit's summary that not every run has, with their columns.
OPTIONAL = {
    "psnr_weight_oracle": "prior weight\nby the truth, dB",
    "rounds_seen": "rounds\nseen",
    "counts_exact": "label counts\nexact",
}


def write(folder: Path, out: Path) -> Path:
    """Renders a stored run of any kind, finished or not, and puts the file in place atomically.

    Args:
        folder: the run's folder.
        out: the HTML file.

    Returns:
        `out`.

    Raises:
        Expected: there is no run, it is damaged, or of a kind that has no report.
        Failed: the disk refused.
    """
    template, context = _context(folder, out)
    return write_file(out, page.render(template, **context).encode())


def write_figures(folder: Path, out: Path) -> list[Path]:
    """Every figure of a run's page as files of its own in the folder `out`: SVG, PNG and the numbers drawn as CSV.

    Raises:
        Expected: as for `write`.
        Failed: the disk refused.
    """
    found = page.figures(_context(folder, out / "report.html")[1])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failed(f"Expected to make {out}, got {error.strerror or error}: choose another folder.") from error
    return [
        write_file(out / f"{drawn.name}.{kind}", data)
        for drawn in found
        for kind, data in (("svg", drawn.file()), ("png", drawn.png()), ("csv", drawn.csv.encode()))
    ]


def write_comparison(runs: list[Part], out: Path) -> Path:
    """Renders the frontier of runs that have been read: plot, table, notes, and links to their own pages.

    Raises:
        Failed: the disk refused.
    """
    joined = study.of_runs(runs)
    context = _of_run({}, study.verdict(joined), headline.frontier(joined.points)) | {"title": "qleak compare"}
    context |= _front(joined, out, whole=False)
    return write_file(out, page.render("compare.html.j2", **context).encode())


def _context(folder: Path, out: Path) -> tuple[str, dict[str, Any]]:
    """The template of a run's page, and everything that it shows."""
    kind = read_run(folder).get("kind")
    if kind == "training":
        return "training.html.j2", _training(training.load(folder))
    if kind == "synthesis":
        made = synthesis.load(folder)
        of_run = _of_run(made.header, synthesis.verdict(made.header), headline.synthesis(made.header))
        return "synthesis.html.j2", of_run | synthesis_page.context(made)
    if kind == "captured":
        audited = captured.load(folder)
        of_run = _of_run(audited.header, captured.verdict(audited.header), headline.captured(audited.header))
        return "captured.html.j2", of_run | captured_page.context(audited)
    if kind == "study":
        return "study.html.j2", _study(study.load(folder), out)
    return "audit.html.j2", _audit(load(folder))


def _of_run(header: dict[str, Any], verdict: str, tiles: list[headline.Tile]) -> dict[str, Any]:
    """What every run's page says: what was found, its header, how to repeat it, where it ran, what it rests on."""
    known = [(name, header[name]) for name in ENVIRONMENT if header.get(name) is not None]
    lead, clauses = headline.clauses(
        verdict, lead_is_title=header.get("kind") not in ("audit", "captured", "synthesis")
    )
    papers = citations.papers(header)
    bibtex = "\n\n".join(citations.entries(papers))
    return {
        "header": header, "title": header.get("recipe", "run"), "verdict": verdict, "lead": lead, "clauses": clauses,
        "tag": headline.tag(header) if header else ("", ""), "tiles": tiles, "missing": [],
        "plan": json.dumps(header.get("plan", {}), indent=2, ensure_ascii=False),
        "environment": [*known, *(header.get("versions") or {}).items()],
        "ledger": epsilons.table({"": header}) if header.get("kind") in ("audit", "training") else {},
        "papers": papers, "bibtex": bibtex,
        "bibtex_uri": f"data:text/plain;charset=utf-8;base64,{b64encode(bibtex.encode()).decode()}",
    }  # fmt: skip


def _audit(run: Stored) -> dict[str, Any]:
    header, arms = run.header, run.arms()
    large = len({channel for channel, _ in arms}) >= 3
    extra = [f for f in OPTIONAL if any(s.get(f) is not None for s in header.get("summary") or [])]
    sheets = pictures.sheets(run) if large else []
    return _of_run(header, words.verdict(header), headline.audit(header)) | {
        "missing": _missing(run.missing),
        "films": filmstrips.strips(run),
        "grids": [] if large else pictures.grids(run),
        "sheets": sheets,
        "cut": sum(len(group) for title, group in sheets if title in ("", "Other images")) < len(run.originals),
        "columns": [title.replace("\n", " ") for title in (*words.COLUMNS, *(OPTIONAL[f] for f in extra))],
        "channels": _table(header, extra),
        "refusals": words.refusals(header),
        "strips": figures.psnr_strips(run),
        "curves": figures.loss_curves(run),
        "most": figures.most_curves(run),
        "race": race.figure(run),
        "leaders": [(f"{t:.2g}", attack, f"{p:.1f}") for t, attack, p in race.winners(run)],
        "band": bounds.figure(header),
        "gaps": bounds.table(header),
        "bounded": bounds.lines(header),
        "bars": figures.psnr_bars(run) if len(arms) <= BARS else "",
        "threats": words.threat_model(header, run.batch),
    }  # fmt: skip


def _training(run: training.Trained, name: str = "curves") -> dict[str, Any]:
    return _of_run(run.header, training.verdict(run.header), headline.training(run.header)) | {
        "curves": plots.training_curves(run, name),
        "privacy": privacy.figure([("", run)]),
        "columns": [title.replace("\n", " ") for title in training.heads(run.header)],
        "rows": training.rows(run.header),
        "labels": _labels([run.header]),
        "refusals": words.refusals(run.header),
        "attack_columns": training.ATTACKED,
        "attacked": training.attacked(run),
        "setting": training.setting(run.header["plan"]),
    }


def _front(joined: study.Joined, out: Path, whole: bool = True) -> dict[str, Any]:
    """The frontier of a study or a comparison: plot, table, notes, and its parts, with their numbers if `whole`."""
    shown = len(plots.plotted(joined.points))
    return {
        "frontier": plots.frontier(joined.points),
        "numbered": shown > plots.NAMED,
        "absent": len(joined.points) - shown,
        "heads": [title.replace("\n", " ") for title in compare.HEADS],
        "points": compare.rows(joined.points, shown > plots.NAMED),
        "notes": joined.notes,
        "parts": [_part(i, part, out, whole) for i, part in enumerate(joined.parts)],
    }


def _study(joined: study.Joined, out: Path) -> dict[str, Any]:
    norms = parts.norms(joined.folders()) if joined.aside else None
    aside = {"aside": joined.aside, "side_heads": parts.HEADS, "norms": norms}
    aside["side"] = parts.rows(joined.lines) if joined.aside else []
    aside["varied"] = parts.varied(joined.headers()) if joined.aside else {}
    aside |= _trainings(joined)
    of_run = _of_run(joined.header, study.verdict(joined), headline.frontier(joined.points))
    of_run |= {"ledger": epsilons.table(joined.headers())}
    return of_run | aside | _front(joined, out)


def _missing(keys: list[str]) -> list[str]:
    """What a page lacks because tensors are gone."""
    gone = f"{len(keys)} file{'' if len(keys) == 1 else 's'} of tensors"
    return [f"{gone} of this run were removed: pictures and curves that need them are left out."] if keys else []


def _labels(headers: list[dict[str, Any]]) -> dict[str, Any]:
    """Channels whose ε is a label: their table, {} without any."""
    rows = [row for header in headers for row in nominal.lines(header)]
    heads = [title.replace("\n", " ") for title in nominal.HEADS]
    return {"heads": heads, "rows": rows, "note": nominal.NOTE} if rows else {}


def _trainings(joined: study.Joined) -> dict[str, Any]:
    """Trainings side by side: their table, and accuracy over ε."""
    runs = [(name, training.load(folder)) for name, folder in joined.trainings().items()]
    return {
        "trained": joined.trained, "trained_heads": privacy.HEADS if joined.trained else (),
        "trained_rows": privacy.rows(joined.lines) if joined.trained else [],
        "privacy": privacy.figure(runs) if runs else "",
        "labels": _labels([run.header for _, run in runs]),
        "panels": nominal_panels.figure(runs),
        "over_epsilon": privacy_frontier.figure(joined.points),
        "epsilon_heads": [title.replace("\n", " ") for title in privacy_frontier.HEADS],
        "epsilon_rows": privacy_frontier.rows(joined.points),
        "epsilon_note": privacy_frontier.NOTE,
    }  # fmt: skip


def _part(i: int, part: study.Named, out: Path, whole: bool) -> dict[str, Any]:
    """A part's section: its sentence, its numbers, and where its own page is."""
    header = part.header or {}
    made: dict[str, Any] = {"name": part.name, "kind": header.get("kind"), "status": header.get("status", "unfinished")}
    made |= {"said": study.sentence(part), "page": compare.page(part.folder, out), "folder": str(part.folder)}
    made |= {"columns": [], "curves": "", "rows": [], "channels": {}}
    if whole and made["kind"] == "training":
        trained = training.load(part.folder)
        made["curves"] = plots.training_curves(trained, f"part{i}")
        made["columns"] = [title.replace("\n", " ") for title in training.heads(header)]
        made["rows"] = training.rows(header)
    elif whole and made["kind"] == "audit":
        made["columns"] = [title.replace("\n", " ") for title in words.COLUMNS]
        made["channels"] = _table(header, [])
    return made


def _table(header: dict[str, Any], extra: list[str]) -> dict[str, dict[str, Any]]:
    """The table by channel: what it costs, and a line of cells for each attack and its controls."""
    channels: dict[str, dict[str, Any]] = {}
    for (channel, attack), found in by_arm(header).items():
        entry = channels.setdefault(channel, {"cost": words.cost(found["none"]), "lines": []})
        for control, s in found.items():
            name = attack if control == "none" else control
            cells = words.cells(s, words.floor(found) if control == "none" else None)
            cells[0] += words.interval(s.get("psnr_ci"), ".1f")
            cells += [words.number(s.get(f), ".4g") for f in extra]
            entry["lines"].append({"name": name, "control": control != "none", "cells": [*cells, f"{s['cpu_s']:.1f}"]})
    return channels

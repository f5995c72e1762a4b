"""A run, or several beside each other, as one self-contained HTML file that opens offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qleak.report import (
    bounds,
    captured,
    captured_page,
    compare,
    figures,
    nominal,
    nominal_panels,
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
    kind = read_run(folder).get("kind")
    if kind == "training":
        return _render("training.html.j2", out, **_training(training.load(folder)))
    if kind == "synthesis":
        made = synthesis.load(folder)
        return _render("synthesis.html.j2", out, **_of_run(made.header) | synthesis_page.context(made))
    if kind == "captured":
        audited = captured.load(folder)
        return _render("captured.html.j2", out, **_of_run(audited.header) | captured_page.context(audited))
    if kind == "study":
        return _render("study.html.j2", out, **_study(study.load(folder), out))
    return _render("audit.html.j2", out, **_audit(load(folder)))


def write_comparison(runs: list[Part], out: Path) -> Path:
    """Renders the frontier of runs that have been read: plot, table, notes, and links to their own pages.

    Raises:
        Failed: the disk refused.
    """
    joined = study.of_runs(runs)
    return _render(
        "compare.html.j2", out, title="qleak compare", verdict=study.verdict(joined), **_front(joined, out, whole=False)
    )


def _render(template: str, out: Path, **context: Any) -> Path:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    strict: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    engine = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, **strict)
    text = engine.get_template(template).render(number=words.number, **context)
    return write_file(out, text.encode())


def _of_run(header: dict[str, Any]) -> dict[str, Any]:
    """What every run's page says: its header, how to repeat it, where it ran."""
    known = [(name, header[name]) for name in ENVIRONMENT if header.get(name) is not None]
    return {
        "header": header, "title": header.get("recipe", "run"),
        "plan": json.dumps(header.get("plan", {}), indent=2, ensure_ascii=False),
        "environment": [*known, *(header.get("versions") or {}).items()],
    }  # fmt: skip


def _audit(run: Stored) -> dict[str, Any]:
    from markupsafe import Markup

    header, arms = run.header, run.arms()
    large = len({channel for channel, _ in arms}) >= 3
    extra = [f for f in OPTIONAL if any(s.get(f) is not None for s in header.get("summary") or [])]
    sheets = pictures.sheets(run) if large else []
    return _of_run(header) | {
        "verdict": words.verdict(header),
        "grids": [] if large else pictures.grids(run),
        "sheets": sheets,
        "cut": sum(len(group) for title, group in sheets if title in ("", "Other images")) < len(run.originals),
        "columns": [title.replace("\n", " ") for title in (*words.COLUMNS, *(OPTIONAL[f] for f in extra))],
        "channels": _table(header, extra),
        "refusals": words.refusals(header),
        "strips": Markup(figures.psnr_strips(run)),
        "curves": Markup(figures.loss_curves(run)),
        "most": figures.most_curves(run),
        "race": Markup(race.figure(run)),
        "leaders": [(f"{t:.2g}", attack, f"{p:.1f}") for t, attack, p in race.winners(run)],
        "band": Markup(bounds.figure(header)),
        "gaps": bounds.table(header),
        "bounded": bounds.lines(header),
        "bars": Markup(figures.psnr_bars(run) if len(arms) <= BARS else ""),
        "threats": words.threat_model(header, run.batch),
    }  # fmt: skip


def _training(run: training.Trained, name: str = "curves") -> dict[str, Any]:
    from markupsafe import Markup

    return _of_run(run.header) | {
        "verdict": training.verdict(run.header),
        "curves": Markup(plots.training_curves(run, name)),
        "privacy": Markup(privacy.figure([("", run)])),
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
    from markupsafe import Markup

    shown = len(plots.plotted(joined.points))
    return {
        "frontier": Markup(plots.frontier(joined.points)),
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
    return _of_run(joined.header) | {"verdict": study.verdict(joined)} | aside | _front(joined, out)


def _labels(headers: list[dict[str, Any]]) -> dict[str, Any]:
    """Channels whose ε is a label: their table, {} without any."""
    rows = [row for header in headers for row in nominal.lines(header)]
    heads = [title.replace("\n", " ") for title in nominal.HEADS]
    return {"heads": heads, "rows": rows, "note": nominal.NOTE} if rows else {}


def _trainings(joined: study.Joined) -> dict[str, Any]:
    """Trainings side by side: their table, and accuracy over ε."""
    from markupsafe import Markup

    runs = [(name, training.load(folder)) for name, folder in joined.trainings().items()]
    return {
        "trained": joined.trained, "trained_heads": privacy.HEADS if joined.trained else (),
        "trained_rows": privacy.rows(joined.lines) if joined.trained else [],
        "privacy": Markup(privacy.figure(runs)) if runs else "",
        "labels": _labels([run.header for _, run in runs]),
        "panels": Markup(nominal_panels.figure(runs)),
        "over_epsilon": Markup(privacy_frontier.figure(joined.points)),
        "epsilon_heads": [title.replace("\n", " ") for title in privacy_frontier.HEADS],
        "epsilon_rows": privacy_frontier.rows(joined.points),
        "epsilon_note": privacy_frontier.NOTE,
    }  # fmt: skip


def _part(i: int, part: study.Named, out: Path, whole: bool) -> dict[str, Any]:
    """A part's section: its sentence, its numbers, and where its own page is."""
    from markupsafe import Markup

    header = part.header or {}
    made: dict[str, Any] = {"name": part.name, "kind": header.get("kind"), "status": header.get("status", "unfinished")}
    made |= {"said": study.sentence(part), "page": compare.page(part.folder, out), "folder": str(part.folder)}
    made |= {"columns": [], "curves": "", "rows": [], "channels": {}}
    if whole and made["kind"] == "training":
        trained = training.load(part.folder)
        made["curves"] = Markup(plots.training_curves(trained, f"part{i}"))
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

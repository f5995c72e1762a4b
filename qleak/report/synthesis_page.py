"""What a synthesis's page holds: sheets, tables, and in plain words what is and is not guaranteed."""

from __future__ import annotations

from typing import Any

from qleak.report import canaries, sheets, synthesis_figures, words
from qleak.report.compare import accuracy
from qleak.report.synthesis import CHOSEN, Made, beside, percent, spent, verdict

HEADS = (
    "ε spent", "ε by the published\naccountant", "steps", "accuracy,\nlast epoch", CHOSEN, "floor at\nthe same ε",
    "difference,\npoints", "seeds", "CPU s",
)  # fmt: skip
QUALITY = ("Fréchet\ndistance", "nearest-neighbour\nratio", "copies")
JUDGES = ("judge", "accuracy,\nlast epoch", CHOSEN)
FACTS = (
    "synthesizer",
    "budget ε",
    "ε",
    "ε by the published accountant",
    "steps",
    "noise σ",
    "why it stops",
    "why it has no ε",
)


def context(run: Made) -> dict[str, Any]:
    """Everything the template needs beside what all pages say."""
    header = {k: v for k, v in run.header.items() if k != "facts"}  # the template's own table is of channels
    found = run.header.get("summary") or []
    flat = {"number": None, "front": False}
    return {
        "header": header,
        "verdict": verdict(run.header),
        "sheets": pictures(run),
        "heads": _heads(HEADS),
        "rows": [flat | {"channel": s["method"], "cells": cells(s)} for s in found],
        "curves": synthesis_figures.curves(run),
        "budgets": synthesis_figures.budgets(run),
        "quality_heads": _heads(QUALITY),
        "quality": [flat | {"channel": s["method"], "cells": quality(s)} for s in found if s["distance"] is not None],
        "judge_heads": _heads(JUDGES),
        "judges": [
            flat | {"channel": s["method"], "cells": [j["classifier"], *_judged(j)]} for s in found for j in s["judges"]
        ],
        "canary_heads": _heads(canaries.HEADS),
        "canaries": [
            flat | {"channel": f"{arm}{' — promise broken' if broken else ''}", "cells": shown}
            for arm, broken, shown in canaries.rows(run.header)
        ],
        "canary_note": canaries.NOTE,
        "threats": threat_model(run.header),
        "fact_heads": FACTS,
        "facts": [(fact["method"], facts(fact)) for fact in run.header.get("facts") or []],
    }  # fmt: skip


def _heads(titles: tuple[str, ...]) -> list[str]:
    return [title.replace("\n", " ") for title in titles]


def cells(s: dict[str, Any]) -> list[str]:
    """One arm of the summary, in the order of `HEADS`."""
    return [
        spent(s["epsilon"]), words.number(s.get("claimed_epsilon"), ".3g"), str(s["steps"]), *_judged(s), *beside(s),
        str(s["n"]), f"{s['cpu_s']:.1f}",
    ]  # fmt: skip


def _judged(s: dict[str, Any]) -> list[str]:
    return [accuracy(s["accuracy"], s.get("accuracy_ci")), accuracy(s["accuracy_max"], s.get("accuracy_max_ci"))]


def quality(s: dict[str, Any]) -> list[str]:
    """One arm of the summary, in the order of `QUALITY`."""
    return [
        words.number(s["distance"], ".4g") + words.interval(s.get("distance_ci"), ".4g"),
        words.number(s["nearest"], ".3f") + words.interval(s.get("nearest_ci"), ".3f"), percent(s["copies"]),
    ]  # fmt: skip


def facts(fact: dict[str, Any]) -> list[str]:
    """What was settled of an arm before a record was seen, in the order of `FACTS`."""
    return [
        fact["spec"], f"{fact['target_epsilon']:g}", "none" if fact["epsilon"] is None else f"{fact['epsilon']:.6g}",
        words.number(fact.get("claimed_epsilon"), ".4g"), str(fact["steps"]), f"{fact['noise']:.4g}" if fact["noise"] else "none",
        fact["reason"] or "—", fact["unsound"] or "—",
    ]  # fmt: skip


def pictures(run: Made) -> list[dict[str, Any]]:
    """One PNG per arm: a column per class, all samples of the sheet below each other."""
    found = []
    for arm in run.arms:
        shown = run.sheet(arm)
        if shown is not None:
            seed, images = shown
            each = len(images) // run.classes
            alt = f"Synthetic images of {arm}: {run.classes} columns, one per class from 0 to {run.classes - 1}, {each} samples each"
            picture = sheets.columns(images, run.classes)
            found.append({
                "arm": arm, "seed": seed, "alt": alt, "uri": sheets.uri(sheets.png(picture)),
                "width": picture.shape[2], "height": picture.shape[1],
            })  # fmt: skip
    return found


def threat_model(header: dict[str, Any]) -> list[tuple[str, str]]:
    """What is protected, from whom, and what is not, as (term, description), from the plan."""
    plan = header["plan"]
    n, (c, h, w), classes = header["public"] if header.get("public") else (0, (0, 0, 0), 0)
    public = f"{n:,} records, images of {c}×{h}×{w}, {classes} classes" if n else "the number and shape of the records"
    released = "What samples are made of, after the last step: whoever holds it, or any number of samples, learns no more than ε allows."
    several = len(header.get("facts") or []) * plan["seeds"]
    said = [
        ("What is private", f"Every record of {plan['data']}: one image with its label."),
        ("What is public", f"{public}; how often each class occurs is not. All settings of the methods."),
        ("Neighbours", "Two sets of the same size that differ in one record, image and label (replace-one). ε bounds how "
                       "far a single record can shift what is released."),
        ("What is released", f"{released} Sampling, and training on samples, costs nothing further."),
        ("What ε counts", f"One synthesis of one arm, at δ {plan['delta']:g}. Whoever publishes several of the {several} "
                          "syntheses of this run pays for each: their budgets compose."),
    ]  # fmt: skip
    if any("teachers" in f["spec"] or "datalens" in f["spec"] for f in header.get("facts") or []):
        said.append((
            "Teachers", "In an arm with an ε a record is given to exactly one teacher by its index, before anything is seen of "
            "it, so that replacing it changes the vote of that teacher alone; what teachers keep between steps is their own.",
        ))  # fmt: skip
    said += [
        ("Where the noise comes from", "From this run's seed, which its files hold, so that it can be repeated. ε holds towards "
                                       "those who do not know it: a real release needs a secret seed, and neither run.json "
                                       "nor checkpoints are published."),
        ("What is not charged", "Settings (steps, noise, thresholds, clipping) were chosen by people who had seen results "
                                "on these very sets. Choosing among arms by this table is not charged either."),
        ("Not for release", "Distances to training images, copies and the Fréchet distance compare with private records "
                            "without noise: they judge this run, and publishing them is outside the guarantee."),
        ("How it is judged", f"A classifier learns from {plan['samples']:,} synthetic images, and nothing else, and is tested "
                             "on real test images. Its accuracy is that of the last epoch. Published numbers are often the "
                             "largest over epochs: that one is chosen on the test set, and stands beside it, labelled."),
        ("One noisy average", "The floor: the mean image of every class, released once with Gaussian noise at the same ε. "
                              "A method below it is worse than one query."),
    ]  # fmt: skip
    return said

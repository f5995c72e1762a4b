"""What a run says in words: the verdict, the cells of its tables, the threat model, what to try next."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qleak.catalog import catalog
from qleak.report.stored import by_arm

COLUMNS = ("PSNR\ndB", "oracle\ndB", "control\ndB", "SSIM", "images\nrebuilt", "success\n(95% CI)", "label\nfound")
CONTROLS = {
    "prior-only": "The same attack without the message: what its prior draws by itself.",
    "wrong-gradient": "The same attack on another image's message: what any gradient yields.",
}
TOLD = 6  # channels that one sentence can name each by itself
NO_PROOF = "which is no proof of safety"


def verdict(header: dict[str, Any]) -> str:
    """One sentence: what was rebuilt through which channel, above which threshold, and what that does not prove."""
    arms = by_arm(header)
    if not arms:
        return f"Verdict: none yet, the run is {header.get('status', 'unfinished')}."
    bar = f"above {header['plan']['success']:g} dB{_controls(header)}"
    names, leaks, held = names_apart({attack for _, attack in arms}), [], []
    # The exact gradient is the baseline, so what a channel changes is said first.
    for channel in sorted(dict.fromkeys(c for c, _ in arms), key=lambda c: c == "fp32"):
        mine = [found["none"] | {"attack": names[a]} for (c, a), found in arms.items() if c == channel]
        mine.sort(key=lambda s: (-s["recovered"], -s["psnr_selected_max"]))
        (leaks if mine[0]["recovered"] else held).append((channel, mine))
    if not leaks:
        channel, best = max(((c, m[0]) for c, m in held), key=lambda pair: pair[1]["psnr_selected_max"])
        note = _unselected([s for _, mine in held for s in mine])
        return (
            f"Verdict: nothing was recovered: no attack rebuilt any of {_count(best['images'])} {bar} "
            f"({best['attack']} on {channel}: {_best(best, header)}){note}, {NO_PROOF}."
        )
    clauses = []
    told = len(leaks) + len(held) if len(leaks) + len(held) <= TOLD else TOLD // 2
    if len(leaks) > told:
        leaks.sort(key=lambda pair: (pair[0] == "fp32", -pair[1][0]["recovered"], -pair[1][0]["psnr_selected_max"]))
    for i, (channel, mine) in enumerate(leaks[:told]):
        best, rest = mine[0], "".join(f", {s['attack']} {s['recovered']} of {s['images']}" for s in mine[1:])
        opening = f"nor did {channel}" if i else f"{channel} did not stop reconstruction"
        images = f"{best['images']}" if i else f"{_count(best['images'])} {bar}"
        rebuilt = f"{best['attack']} rebuilt {best['recovered']} of {images}"
        clauses.append(f"{opening}: {rebuilt} ({_best(best, header)}){rest}")
    if others := leaks[told:]:
        clauses.append(f"nor did {len(others)} more")
    if len(held) > told:
        channel, mine = max(held, key=lambda pair: pair[1][0]["psnr_selected_max"])
        most = f"most on {channel}: {_best(mine[0], header)}"
        note = _unselected([s for _, mine in held for s in mine])
        clauses.append(f"through {len(held)} channels no image was rebuilt ({most}){note}, {NO_PROOF}")
        held = []
    for channel, mine in held:
        held_up = f"through {channel} no image was rebuilt ({_best(mine[0], header)})"
        clauses.append(f"{held_up}{_unselected(mine)}, {NO_PROOF}")
    return f"Verdict: {'; '.join(clauses)}."


def floor(found: dict[str, Any]) -> float | None:
    """PSNR of the strongest control of an arm, None if none was run."""
    return max((s["psnr_selected"] for control, s in found.items() if control != "none"), default=None)


def names_apart(attacks: Iterable[str]) -> dict[str, str]:
    """Attacks without the arguments that tell none of them apart; all arguments stand in the plan."""
    parsed = {a: _call(a) for a in attacks}
    shown = {}
    for attack, (name, options) in parsed.items():
        others = [o for a, (n, o) in parsed.items() if n == name and a != attack]
        telling = [f"{k}={v}" for k, v in options.items() if any(o.get(k) != v for o in others)]
        shown[attack] = f"{name}({', '.join(telling)})" if telling else name
    return shown


def _call(spec: str) -> tuple[str, dict[str, str]]:
    node = ast.parse(spec, mode="eval").body
    if not isinstance(node, ast.Call):
        return spec, {}
    return ast.unparse(node.func), {str(k.arg): ast.unparse(k.value) for k in node.keywords}


def _controls(header: dict[str, Any]) -> str:
    ran = {s["control"] for s in header["summary"]} - {"none"}
    if not ran:
        return " (no control was run)"
    return " and above both controls" if len(ran) == 2 else f" and above the {ran.pop()} control"


def _best(s: dict[str, Any], header: dict[str, Any]) -> str:
    beaten = not s["recovered"] and s["psnr_selected_max"] >= header["plan"]["success"]
    return f"best {s['psnr_selected_max']:.1f} dB{', no better than a control' if beaten else ''}"


def _unselected(arms: list[dict[str, Any]]) -> str:
    """A lane that got there without being chosen is no success of the attacker, and no comfort either."""
    lucky = any(s["success_rate"] for s in arms)
    return ", though restarts that the attacker did not choose got there" if lucky else ""


def _count(images: int) -> str:
    return f"{images} image{'' if images == 1 else 's'}"


def cells(s: dict[str, Any], control: float | None) -> list[str]:
    """One object of the summary as text, in the order of `COLUMNS`; `control` is the PSNR of the strongest one."""
    low, high = s["success_ci"]
    oracle = max(s["psnr_oracle"], s.get("psnr_weight_oracle") or 0.0)
    return [
        f"{s['psnr_selected']:.1f}", f"{oracle:.1f}", number(control, ".1f"), f"{s['ssim_selected']:.2f}",
        f"{s['recovered']}/{s['images']}", f"{s['success_rate']:.0%} ({100 * low:.0f}–{high:.0%})",
        f"{s['label_accuracy']:.0%}",
    ]  # fmt: skip


def cost(s: dict[str, Any]) -> str:
    """What a channel sends and what it guarantees."""
    coded = "" if s.get("bits_entropy") is None else f" ({s['bits_entropy']:.2f} entropy-coded)"
    return f"{number(s['bits'], '.2f')} bits/coordinate{coded} · ε {number(s['epsilon'], '.3g')}"


def number(value: float | None, form: str) -> str:
    """A number, or a dash for none."""
    return "—" if value is None else format(value, form)


def interval(ci: Any, form: str) -> str:
    """An interval behind its mean, or nothing for none."""
    return f" ({format(ci[0], form)}–{format(ci[1], form)})" if ci and None not in ci else ""


def refusals(header: dict[str, Any]) -> list[str]:
    """One line for each attack that does not apply to a channel."""
    return [f"Not run on {r['channel']}: {r['attack']} {r['reason']}" for r in header.get("refused") or []]


def next_step(header: dict[str, Any], folder: Path) -> tuple[str, str]:
    """A command worth trying now, and why."""
    run, flags = f"qleak recipe run {header.get('recipe')}", header.get("flags") or {}
    if header.get("status") != "done":
        return f"{run} --config {folder}/run.json", "goes on where it stopped"
    recovered = any(found["none"]["recovered"] for found in by_arm(header).values())
    bits, seeds = flags.get("bits"), flags.get("seeds")
    if recovered and isinstance(bits, int) and bits > 1:
        return f"{run} --bits {bits // 2}", "does a coarser channel stop it?"
    if not recovered and isinstance(seeds, int):
        return f"{run} --seeds {4 * seeds}", "more restarts may get there"
    if flags.get("full") is False:
        return f"{run} --full", "the paper's size"
    return f"qleak report {folder}", "renders this run again"


def threat_model(header: dict[str, Any], batch: int) -> list[tuple[str, str]]:
    """Who knows what, as (term, description), derived from the plan."""
    plan = header["plan"]
    sends = f"One update made from {_count(batch)} at a time, through the channel. {says('clients', plan['client'])}"
    sees = (
        "The message exactly as it was sent; the channel and its settings; the architecture and every weight; "
        f"how many images one update holds{told(plan.get('grants', ['buffers']))}. {says('models', plan['model'])}"
    )
    success = (
        f"A PSNR of at least {plan['success']:g} dB that also beats every control of the same image. The restart that "
        "counts is chosen by the attacker's own loss; in the oracle column the truth chooses restart and weight, "
        "which no attacker can."
    )
    return [
        ("What the client sends", sends),
        ("What the attacker sees", sees),
        ("What the attacker does not see", hidden(plan.get("grants", ["buffers"]))),
        *((f"The attack {spec.split('(')[0]}", says("attacks", spec)) for spec in plan["attacks"]),
        ("What counts as success", success),
        *((f"The control {name}", what) for name, what in CONTROLS.items()),
    ]


def told(grants: list[str]) -> str:
    """What the threat model shares beside the message, as the end of a sentence."""
    names = {
        "buffers": "the model's buffers", "labels": "the true labels", "statistics": "the batch statistics of every batch norm",
    }  # fmt: skip
    return "".join(f"; {names[g]}" for g in grants)


def hidden(grants: list[str]) -> str:
    """What it keeps from the attacker."""
    labels = "" if "labels" in grants else ", and their labels: these are inferred, not given"
    buffers = "" if "buffers" in grants else ". Running statistics of batch norms are withheld"
    return f"The images{labels}{buffers}."


def says(room: str, spec: str) -> str:
    """The first paragraph of a factory's docstring, so that a new part describes itself; the spec if it is unknown."""
    made = catalog(room).get(spec.split("(")[0])
    return spec if made is None else " ".join((made.__doc__ or spec).split("\n\n")[0].replace("`", "").split())

"""`qleak audit UPDATE`: what a captured update gives away, within a budget of CPU seconds."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qleak.errors import Expected

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def audit(
    update: Annotated[Path, typer.Argument(help="The update: .safetensors, .npz, .pt or .pth; a state dict or a list of tensors.")],
    model: Annotated[str, typer.Option(help="A model of `qleak ls models`, file.py:Net, package.module:function, torchvision:NAME.")],
    weights: Annotated[Path | None, typer.Option(help="The weights the update was computed at; the model's own without.")] = None,
    shape: Annotated[str, typer.Option(help="c,h,w of one image, for code of your own (3,32,32 when not given).")] = "",
    classes: Annotated[int | None, typer.Option(help="Number of logits, for code of your own (10 when not given).")] = None,
    mode: Annotated[str, typer.Option(help="Batch norms by running statistics (eval) or by the batch (train).")] = "",
    normalise: Annotated[str, typer.Option(help="What images go through first: imagenet, cifar10, cifar100, mnist or half.")] = "",
    batch: Annotated[int, typer.Option(help="Number of images; 0: what truth or labels say, or the update proves.")] = 0,
    client: Annotated[str, typer.Option(help="gradient, or \"local_sgd(steps=…, batch=…, lr=…)\".")] = "gradient",
    scale: Annotated[float, typer.Option(help="Update = scale · mean gradient: a learning rate; the batch size of a summed loss.")] = 1.0,
    channel: Annotated[str, typer.Option(help="uniform:256 and the like; auto: inferred from the numbers.")] = "auto",
    labels: Annotated[str, typer.Option(help="Known labels, such as 3,5; inferred without.")] = "",
    truth: Annotated[str, typer.Option(help="The images, to check and to score: npz, picture, folder, or set:index.")] = "",
    attacks: Annotated[str, typer.Option(help="Attacks separated by ; in place of the choice made here.")] = "",
    restarts: Annotated[int, typer.Option(help="Random starts; 0: four, or as many as the budget holds.")] = 0,
    budget: Annotated[str, typer.Option(help="CPU time of all attacks together, such as 60s or 5m.")] = "60s",
    success: Annotated[float, typer.Option(help="dB from which two pictures count as the same.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Root of every random draw.")] = 0,
    bounds: Annotated[str, typer.Option(help="With --truth, what no attacker can beat: yes, no, auto (where it takes seconds).")] = "auto",
    out: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
    name: Annotated[str, typer.Option(help="The run folder's name in place of audit-ID.")] = "",
    workers: Annotated[int, typer.Option(help="Processes; 0: one per core.")] = 0,
    fail_above: Annotated[float | None, typer.Option(help="Exit 3 above so many dB; without --truth, when images are rebuilt.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the document of schema qleak.audit/1 instead.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="Start over, or go on where the folder ends.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the verdict.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Every line of every table.")] = False,
) -> None:  # fmt: skip
    """What a captured update gives away: reads, matches, attacks within a budget, and says what the verdict rests on.

    Exit codes: 0 done, 2 wrong usage or an unreadable update, 3 above --fail-above, 130 stopped by Ctrl-C (the same
    command goes on).
    """
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    if name and not re.fullmatch(r"[\w.-]+", name):
        raise Expected(f"Expected --name {name!r} of letters, digits, dots, dashes and underscores.")
    seconds, size, known = duration(budget), triple(shape), whole_numbers(labels)

    from qleak import engine, machine
    from qleak.adapters import audit as adapter
    from qleak.adapters.given import Request, request_id
    from qleak.check import one_of
    from qleak.cli import live
    from qleak.cli.bounded import bounded
    from qleak.plans.audit import BOUNDS
    from qleak.report import html, terminal

    one_of(BOUNDS, bounds=bounds)
    if not update.exists():
        raise Expected(f"Expected an update at {update}, found none.")
    ask = Request(
        update, model, weights, size, classes, mode, normalise, client, scale, batch, channel, known, truth or None, attacks,
        restarts, seconds, success, seed,
    )  # fmt: skip
    folder = out / (name or f"audit-{request_id(ask)}")
    say = live.quiet() if quiet or as_json else live.Console()
    _, count, _ = machine.place("cpu", workers)
    flags["command"] = f"qleak {shlex.join(sys.argv[1:])}" if sys.argv[1:2] == ["audit"] else ""
    try:

        def tell(plan: Any, reasons: list[str]) -> None:
            for term, value in {"audit": plan.id, **plan.lines(), "placed": " · ".join(reasons)}.items():
                say.note(f"  {term:9s} {value}")

        with adapter.opened(ask, folder, flags, count, fresh, tell) as (plan, run):
            say.note(run.warning)
            with say.progress(plan) as bar:
                for event in engine.run(plan, run, "cpu", count) if run.header.get("status") != "done" else ():
                    bar(event)
            bounded(plan, run, bounds, say)
        page = html.write(folder, folder / "report.html")
        report = adapter.report(folder)
    except KeyboardInterrupt:
        print("qleak: interrupted; what was finished is safe. The same command goes on.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(report.document, indent=1))
    else:
        terminal.show(folder, quiet=quiet, verbose=verbose)
        say.note(f"{folder}/  run.json  rows.jsonl  tensors/  {page.name}")
    gate(report.document, fail_above)


def gate(document: dict[str, Any], limit: float | None) -> None:
    """Exit 3 where a reconstruction exceeds `limit` dB, or, without a truth to measure by, where images were rebuilt."""
    if limit is None:
        return
    scored = [i["psnr_db"] for i in document["images"] if i["psnr_db"] is not None]
    if scored and max(scored) > limit:
        print(f"qleak: a reconstruction of {max(scored):.1f} dB exceeds --fail-above {limit:g}.", file=sys.stderr)
        raise typer.Exit(3)
    if not scored and document["verdict"] == "images rebuilt":
        print("qleak: images were rebuilt, and there is no --truth to measure --fail-above by.", file=sys.stderr)
        raise typer.Exit(3)


def duration(text: str) -> float:
    """Seconds of "60", "60s", "5m" or "1h".

    Raises:
        Expected: anything else, or nothing at all.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text)
    if not found or found[2] not in UNITS or not float(found[1]) > 0:
        raise Expected(f"Expected --budget {text!r} as a time above 0, such as 60s or 5m.")
    return float(found[1]) * UNITS[found[2]]


def triple(text: str) -> tuple[int, int, int] | None:
    """(c, h, w) of "3,32,32"; None of "".

    Raises:
        Expected: anything else.
    """
    if not text:
        return None
    values = whole_numbers(text.replace("x", ","), "--shape")
    if len(values) != 3 or min(values) < 1:
        raise Expected(f"Expected --shape {text!r} as c,h,w, such as 3,32,32.")
    return values[0], values[1], values[2]


def whole_numbers(text: str, flag: str = "--labels") -> tuple[int, ...]:
    """The whole numbers of "3,5"; () of "".

    Raises:
        Expected: anything else.
    """
    parts = [p.strip() for p in text.split(",")] if text else []
    if not all(p.isdecimal() for p in parts):
        raise Expected(f"Expected {flag} {text!r} as whole numbers separated by commas.")
    return tuple(map(int, parts))

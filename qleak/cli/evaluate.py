"""`qleak evaluate`: clean and robust accuracy of a trained model, with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from qleak.errors import Expected

ATTACKS = ("none", "fgsm", "pgd", "apgd", "apgd-dlr")


class Attacked(NamedTuple):
    """How images are attacked; see `qleak.train.adversarial`."""

    attack: str = "none"
    epsilon: float = 0.1
    steps: int = 20
    step_size: float | None = None
    norm: str = "linf"
    restarts: int = 1
    seed: int = 0


def evaluate(
    run: Annotated[str, typer.Argument(help="A training run (folder, or name below ./runs; /0-2 for channel 0, seed 2) "
                                            "or a model, e.g. lenet-mnist.")],
    data: Annotated[str, typer.Option(help="Data set; the run's own when not given.")] = "",
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "test",
    limit: Annotated[int, typer.Option(help="So many images, spread over the split; 0 for all.")] = 0,
    attack: Annotated[str, typer.Option(help="none, fgsm, pgd, apgd or apgd-dlr.")] = "none",
    epsilon: Annotated[float, typer.Option(help="Radius of the ball, in units of the pixel range.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Steps of PGD or APGD.")] = 20,
    step_size: Annotated[float | None, typer.Option(help="PGD step; 2.5·epsilon/steps when not given.")] = None,
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    restarts: Annotated[int, typer.Option(help="Starts; an image must withstand all.")] = 1,
    seed: Annotated[int, typer.Option(help="Root of the random starts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:  # fmt: skip
    """Accuracy of a trained model, clean and under attack, with Wilson 95 % intervals."""
    found = measured(run, data, split, limit, Attacked(attack, epsilon, steps, step_size, norm, restarts, seed))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{run} · {found['data']} {found['split']}", markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for title in ("attack", "images", "accuracy", "95 % interval"):
        table.add_column(title, justify="left" if title == "attack" else "right", no_wrap=True)
    for row in found["rows"]:
        low, high = row["accuracy_ci"]
        table.add_row(row["attack"], str(row["n"]), f"{row['accuracy']:.2%}", f"{low:.2%} – {high:.2%}")
    console.print(table)


def measured(name: str, data: str, split: str, limit: int, how: Attacked) -> dict[str, Any]:
    """Model, data and one row per attack: clean first.

    Raises:
        Expected: no such run, model, data or split; or images that do not fit the model.
    """
    from qleak import random
    from qleak.check import at_least, one_of, whole
    from qleak.metrics import wilson
    from qleak.train import adversarial, measure
    from qleak.train.split import spread

    one_of(ATTACKS, attack=how.attack)
    whole(limit=limit)
    at_least(0, limit=limit)
    model, own = resolve(name)
    images, split = _images(data or own, split)
    images = spread(images, limit)
    if tuple(images.x.shape[1:]) != model.shape or images.classes > model.classes:
        raise Expected(
            f"Expected images {model.shape} of at most {model.classes} classes for the model, "
            f"got {tuple(images.x.shape[1:])} of {images.classes} in {images.name}."
        )
    params, buffers = model.init(random.generator("evaluate"))
    dtype = next(iter(params.values())).dtype
    x, y, n = images.x.to(dtype), images.y, len(images.x)
    clean = round(measure(model, params, buffers, images).accuracy * n)
    counts = [("none", clean)]
    if how.attack != "none":
        kept = adversarial.robust(model, params, buffers, x, y, *how)
        counts.append((_called(how), int(kept.sum())))
    rows = [
        {"attack": what, "n": n, "accuracy": right / n, "accuracy_ci": list(wilson(right, n))} for what, right in counts
    ]
    asked = how._asdict() if how.attack != "none" else {}
    return {"model": model.spec, "data": images.name, "split": split, **asked, "rows": rows}


def resolve(name: str) -> tuple[Any, str]:
    """The model, and the data set its run was trained on ("" for a model that is no run's)."""
    from qleak.catalog import build, catalog, is_code
    from qleak.models.stored import folder_of

    bare = name.removeprefix("run:")
    known = name.split("(")[0].split(":")[0].replace("-", "_") in catalog("models") or is_code(name)
    if name == bare and not Path(name).exists() and known:
        return build("models", name), ""
    from qleak import store

    folder, _ = folder_of(bare)
    own = store.read_run(folder).get("plan", {}).get("data", "")
    return build("models", f"run:{bare}"), own


def _images(name: str, split: str) -> tuple[Any, str]:
    """The split of the data set; the held-out part where it has no test split."""
    from qleak import data
    from qleak.train.split import held_out

    if not name:
        raise Expected("Expected --data SET: this model does not say what it was trained on.")
    if split != "test":
        return data.load(name, split), split
    _, test, said = held_out(name)
    return test, f"({said})" if "held out" in said else split


def _called(how: Attacked) -> str:
    ball = f"{how.norm} ε={how.epsilon:g}"
    if how.attack == "fgsm":
        return f"fgsm {ball}"
    return f"{how.attack}-{how.steps} {ball}, {how.restarts} start{'s' if how.restarts > 1 else ''}"

"""`qleak synth`: labelled images out of a finished synthesis, and sample files judged by a classifier of real images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from qleak.errors import Expected, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}
SHOWN = 10  # images of a class on a sheet

synth = typer.Typer(help="Private synthetic images: draw them, and judge files of them.", **PLAIN)


@synth.command()
def sample(
    run: Annotated[str, typer.Argument(help="A synthesis run: its folder, or its name below ./runs.")],
    n: Annotated[int, typer.Option(help="How many images, classes in equal parts.")] = 100,
    arm: Annotated[str, typer.Option(help="The arm's name or number; the first when not given.")] = "",
    seed_index: Annotated[int, typer.Option(help="Which of the arm's syntheses.")] = 0,
    class_: Annotated[int | None, typer.Option("--class", help="Only this class.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw; public, it costs nothing.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The npz to write; samples-ARM.npz when not given.")] = None,
    png: Annotated[bool, typer.Option("--png", help="Write a sheet beside it, a column per class.")] = False,
) -> None:  # fmt: skip
    """Draws labelled images from what a synthesis released; this costs no further ε.

    The npz holds x_train [n c h w] (float32 in [0, 1]), y_train [n] and classes: --data ./FILE.npz reads it.
    """
    found = drawn(run, n, arm, seed_index, class_, seed)
    import io

    import numpy as np

    from qleak.plans.base import file_name
    from qleak.report import sheets
    from qleak.report.stored import write_file

    path = out or Path(f"samples-{file_name(found.arm)}.npz")
    if path.suffix != ".npz":
        raise Expected(f"Expected --out {path} to end in .npz.")
    data = io.BytesIO()
    names = np.array([str(k) for k in range(found.classes)])
    np.savez_compressed(data, x_train=found.x.numpy(), y_train=found.y.numpy(), classes=names)
    print(write_file(path, data.getvalue()))
    if png:
        picture = sheet(found.x, found.y, found.classes)
        scale = max(1, round(560 / picture.shape[2]))
        print(write_file(path.with_suffix(".png"), sheets.png(picture, scale)))
    cost = (
        "no guarantee"
        if found.epsilon is None
        else f"ε {found.epsilon:.4g} at δ {found.delta:g}; drawing costs nothing further"
    )
    print(f"{n} images of {found.arm}, seed {seed_index}: {cost}.")


class Drawn(NamedTuple):
    """Images `x [n c h w]` in [0, 1] with labels `y [n]`, of which arm, and what it has spent."""

    x: Tensor
    y: Tensor
    classes: int
    arm: str
    epsilon: float | None
    delta: float


def drawn(name: str, n: int, arm: str = "", seed_index: int = 0, class_: int | None = None, seed: int = 0) -> Drawn:
    """The first `n` images of an endless sequence that belongs to the model and `seed`.

    Images are always drawn in whole parts of all classes, so that a maker's batch norm sees batches like those that
    were judged; `class_` keeps one class of them.

    Raises:
        Expected: no such run, arm, seed or class; the arm has not ended yet; or n < 1.
    """
    from qleak.check import at_least, whole

    whole(n=n, seed_index=seed_index, seed=seed)
    at_least(1, n=n)
    at_least(0, seed_index=seed_index, seed=seed)
    import torch
    from safetensors import SafetensorError, safe_open

    from qleak import store
    from qleak.catalog import build
    from qleak.cli.compare import find
    from qleak.engine import making
    from qleak.plans.synthesis import Arm
    from qleak.types import Public

    folder = find(name, Path("runs"))
    header = store.read_run(folder)
    if header.get("kind") != "synthesis":
        raise Expected(f"Expected a run of kind 'synthesis' at {folder}, got {header.get('kind')!r}.")
    facts = header.get("facts") or []
    if not facts:
        raise Expected(f"Expected a synthesis that has begun at {folder}, its status is {header.get('status')!r}.")
    index = number(arm, [fact["method"] for fact in facts])
    fact, path = facts[index], folder / "models" / f"{index}-{seed_index}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(p.stem.split("-")[1] for p in path.parent.glob(f"{index}-*.safetensors"))) or "none"
        raise Expected(
            f"Expected {fact['method']} to have spent its budget with seed {seed_index} in {folder} "
            f"({header.get('status')}); seeds that have: {there}."
        )
    about, released = {}, {}
    try:
        with safe_open(path, "pt") as file:  # pyright: ignore[reportPrivateImportUsage]
            about, released = file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        about = {}
    if not {"public", "synthesizer", "delta"} <= about.keys():
        raise Expected(f"Expected {path} to be a whole safetensors file with what made it: start again with --fresh.")
    count, shape, classes = json.loads(about["public"])
    if class_ is not None and not 0 <= class_ < classes:
        raise Expected(f"Expected class={class_} in [0, {classes - 1}].")
    public = Public(count, tuple(shape), classes)
    made = Arm(fact["method"], build("synthesizers", about["synthesizer"]), fact["target_epsilon"])
    total = math.ceil(n * (classes if class_ is not None else 1) / making.PART) * making.PART
    y = torch.arange(total) % classes
    with torch.no_grad():
        x = making.draw(made, public, released, y, seed, "drawn")
    kept = (torch.arange(total) if class_ is None else (y == class_).nonzero().flatten())[:n]
    return Drawn(x[kept], y[kept], classes, fact["method"], fact["epsilon"], float(about["delta"]))


def number(arm: str, names: list[str]) -> int:
    """Which arm is meant, by its name or number; the first one for "".

    Raises:
        Expected: there is no such arm.
    """
    if arm in names:
        return names.index(arm)
    if arm.isdigit() and int(arm) < len(names):
        return int(arm)
    if arm == "":
        return 0
    listed = ", ".join(f"{i} {name!r}" for i, name in enumerate(names))
    raise Expected(f"Expected --arm {arm!r} to be one of: {listed}.{did_you_mean(arm, names)}")


def sheet(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """One picture `[3 H W]`: at most `SHOWN` images of each class below each other; ten a line of a single class."""
    import torch

    from qleak.report import sheets

    present = [k for k in range(classes) if bool((y == k).any())]
    if len(present) == 1:
        wide = min(SHOWN, len(x))
        rows = min(len(x) // wide, SHOWN)
        return sheets.tiled(x[: rows * wide].reshape(rows, wide, *x.shape[1:]))
    each = min(SHOWN, *(int((y == k).sum()) for k in present))
    return sheets.columns(torch.cat([x[y == k][:each] for k in present]), len(present))


@synth.command()
def evaluate(
    prefix: Annotated[str, typer.Argument(help="Files PREFIX*.npz, or one npz or npy file.")],
    dataset: Annotated[str, typer.Option(help="mnist, fashion_mnist, celeba-gender, celeba-hair, places365 or another "
                                              "set: its test split is the test.")] = "mnist",
    classifier: Annotated[str, typer.Option(help="cnn_classifier, mlp_classifier, logistic, or a call with settings of "
                                                 "your own.")] = "cnn_classifier",
    seeds: Annotated[int, typer.Option(help="Trainings of the classifier.")] = 5,
    seed: Annotated[int, typer.Option(help="Root of them.")] = 0,
    limit: Annotated[int, typer.Option(help="The first so many samples; 0: 10,000, with --full 100,000.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="The published protocol: 600 epochs of SGD (250 on CelebA).")] = False,
    size: Annotated[int, typer.Option(help="Average both sides down to size × size pixels; 0: as in the files.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:  # fmt: skip
    """Trains a classifier on synthetic images alone and tests it on real ones: last epoch, and the largest beside it."""
    from qleak.cli import synth_files

    found = synth_files.judged(prefix, dataset, classifier, seeds, seed, limit, full, size)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for line in synth_files.lines(found):
        print(line)

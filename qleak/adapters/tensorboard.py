"""A run's events as TensorBoard's: own losses and guesses of attacks as they run, scores, accuracies and ε as rows come.

Needs the extra `tensorboard`; the event files are written by torch's own `SummaryWriter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qleak import disk
from qleak.engine import Event, Finished, Rows, Step
from qleak.errors import Expected
from qleak.metrics import picture
from qleak.store import Run

EPOCH = (
    "train_loss",
    "test_loss",
    "train_accuracy",
    "test_accuracy",
    "robust_accuracy",
    "epsilon",
    "claimed_epsilon",
    "uplink_mb",
)
ARM = ("psnr_selected", "ssim_selected", "success_rate", "label_accuracy", "bits", "epsilon")
GROWTH = 1.25
"""An arm's next guess is written after so many times the closures of its last: the early ones change most."""


def writer_type() -> Any:
    """Torch's `SummaryWriter`.

    Raises:
        Expected: the extra is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Expected(
            "Expected the package tensorboard for --tensorboard: pip install 'qleak[tensorboard]'."
        ) from None
    return SummaryWriter


@contextmanager
def logged(folder: Path, run: Run) -> Iterator[Callable[[Event], None]]:
    """A callable that writes the engine's events of `run` into `folder`.

    Raises:
        Expected: the extra is not installed.
        Failed: the disk refused.
    """
    made = writer_type()
    with disk.disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        writer = made(str(folder))
    last: dict[str, int] = {}

    def log(event: Event) -> None:
        if isinstance(event, Step):
            _step(writer, event, last)
        elif isinstance(event, Rows):
            for row in event.rows:
                _row(writer, run, row)
        elif isinstance(event, Finished):
            for line in event.summary:
                _arm(writer, line)

    try:
        writer.add_text("plan", "\n".join(f"    {k}: {v}" for k, v in run.header.get("plan", {}).items()))
        yield log
    finally:
        with disk.disk(folder):
            writer.close()


def _step(writer: Any, event: Step, last: dict[str, int]) -> None:
    """Own loss over closures and the guess, of an attack; a chunk is a curve of its own."""
    tag = f"{event.label}/{event.key}"
    if event.loss is not None and math.isfinite(event.loss):
        writer.add_scalar(f"loss/{tag}", event.loss, event.closures)
    if event.picture is not None and event.closures >= GROWTH * last.get(tag, 0):
        last[tag] = max(event.closures, 1)
        writer.add_image(f"guess/{tag}/image {event.image}", event.picture, event.closures, dataformats="HWC")


def _row(writer: Any, run: Run, row: dict[str, Any]) -> None:
    """An epoch of a training, a measured step of a synthesis, or what an attack handed in for one image."""
    if row.get("kind") == "training":
        for name in EPOCH:
            _scalar(writer, f"{name}/{row['channel']} seed {row['seed']}", row.get(name), row["epoch"])
    elif row.get("kind") == "synthesis":
        for name in ("accuracy", "epsilon"):
            _scalar(
                writer, f"{name}/{row['method']} {row['classifier']} seed {row['seed']}", row.get(name), row["step"]
            )
    elif row.get("selected") and row.get("control") == "none" and "chunk" in row:
        arm = f"{row['channel']} {row['attack']}"
        _scalar(writer, f"psnr/{arm}", row["psnr"], row["image"])
        if row.get("kind") != "audit" and run.has(
            f"chunk-{row['chunk']}"
        ):  # audits of a round have folders of their own
            x = run.load(f"chunk-{row['chunk']}")["x"][row["lane"], row["order"]].float()
            shown = picture(x) if len(x) in (1, 3) else picture(x).mean(0, keepdim=True)
            writer.add_image(f"reconstruction/{arm}/image {row['image']}", shown, row["closures"])


def _arm(writer: Any, line: dict[str, Any]) -> None:
    """An audit's means over images, by arm and control."""
    if "psnr_selected" in line:
        arm = f"{line['channel']} {line['attack']} {line['control']}"
        for name in ARM:
            _scalar(writer, f"summary {name}/{arm}", line.get(name), 0)


def _scalar(writer: Any, tag: str, value: float | None, at: int) -> None:
    if value is not None and math.isfinite(value):
        writer.add_scalar(tag, float(value), at)

"""A stored run as reports need it: the header, the rows, and the pictures and curves that rows point to."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from einops import repeat
from torch import Tensor

from qleak import store
from qleak.errors import Expected, Failed
from qleak.folders import held
from qleak.metrics import picture
from qleak.store import Row

Arm = tuple[str, str]
"""A channel and an attack, as tables name them."""


class Curve(NamedTuple):
    """Own loss of one lane: `loss` at `at` closures, finite points only; `selected` by that loss for some image."""

    at: list[int]
    loss: list[float]
    selected: bool


@dataclass(frozen=True)
class Stored:
    """A run folder that has been read.

    Attributes:
        folder: where it lies.
        header: run.json.
        rows: rows.jsonl.
        originals: true images `[c h w]` in [0, 1], by their index in the data set.
        labels: their classes.
        chunks: the tensors of every chunk that a row points to.
        batch: number of images in one update.
        missing: keys of tensors that are gone: what needs them is left out.
    """

    folder: Path
    header: dict[str, Any]
    rows: list[Row]
    originals: dict[int, Tensor]
    labels: dict[int, int]
    chunks: dict[str, dict[str, Tensor]]
    batch: int
    missing: list[str] = field(default_factory=list)

    def held(self, row: Row) -> bool:
        """Whether the tensors of a row are (still) there."""
        return row["chunk"] in self.chunks

    def arms(self) -> list[Arm]:
        """Every channel × attack that has rows."""
        return list(dict.fromkeys((r["channel"], r["attack"]) for r in self.rows if r["control"] == "none"))

    def chosen(self, control: str = "none") -> dict[tuple[str, str, int], Row]:
        """The row that the attacker's own loss selects, by (channel, attack, image)."""
        mine = [r for r in self.rows if r["control"] == control and r["selected"]]
        return {(r["channel"], r["attack"], r["image"]): r for r in mine}

    def guess(self, row: Row) -> Tensor:
        """The reconstruction `[c h w]` of a row as it was scored: in [0, 1], mid-grey where it is not finite."""
        x = self.chunks[row["chunk"]]["x"][row["lane"], row["order"]].float()
        return picture(x)

    def curves(self, arm: Arm, most: int = 24) -> list[Curve]:
        """Loss curves of at most `most` lanes of an arm, selected lanes first; lanes without points have none."""
        lanes: dict[tuple[str, int], list[Row]] = {}
        for r in self.rows:
            if r["control"] == "none" and (r["channel"], r["attack"]) == arm:
                lanes.setdefault((r["chunk"], r["lane"]), []).append(r)
        curves = [self._curve(rows) for rows in lanes.values()]
        return sorted((c for c in curves if c.at), key=lambda c: not c.selected)[:most]

    def _curve(self, rows: list[Row]) -> Curve:
        chunk, lane = self.chunks.get(rows[0]["chunk"], {}), rows[0]["lane"]
        if "curve" not in chunk:
            return Curve([], [], False)
        # A frozen lane repeats its last loss until the whole chunk has ended.
        points = zip(chunk["curve_at"].tolist(), chunk["curve"][:, lane].tolist(), strict=True)
        kept = [(at, loss) for at, loss in points if at <= rows[0]["closures"] and math.isfinite(loss)]
        return Curve([at for at, _ in kept], [loss for _, loss in kept], any(r["selected"] for r in rows))


def load(folder: Path) -> Stored:
    """Reads a run, finished or not.

    Raises:
        Expected: there is no run, it is damaged, or it is not an audit.
    """
    header, rows = store.read_run(folder), store.read_rows(folder)
    if header.get("kind") != "audit":
        raise Expected(f"Expected a run of kind 'audit' at {folder}, got {header.get('kind')!r}.")
    if not rows:  # the victims are stored before the first row
        return Stored(folder, header, [], {}, {}, {}, 1)
    # The summary is in the plan's order, rows in that of the workers.
    order = {(s["channel"], s["attack"]): i for i, s in enumerate(header.get("summary") or [])}
    rows.sort(key=lambda r: order.get((r.get("channel"), r.get("attack")), len(order)))
    chunks, missing = {}, []
    for key in dict.fromkeys(r["chunk"] for r in rows if "chunk" in r):
        if (found := _tensors(folder, f"chunk-{key}")) is None:
            missing.append(f"chunk-{key}")
        else:
            chunks[key] = found
    victims = _tensors(folder, "victims")
    if victims is None:
        batch = 1 + max(r["image"] - max(v for v in header["plan"]["victims"] if v <= r["image"]) for r in rows)
        return Stored(folder, header, rows, {}, {}, chunks, batch, ["victims", *missing])
    batch = victims["x"].shape[1]
    images = [start + j for start in header["plan"]["victims"] for j in range(batch)]
    originals = dict(zip(images, victims["x"].flatten(0, 1).float(), strict=True))
    labels = dict(zip(images, victims["y"].flatten().tolist(), strict=True))
    return Stored(folder, header, rows, originals, labels, chunks, batch, missing)


def _tensors(folder: Path, key: str) -> dict[str, Tensor] | None:
    """Tensors of a run; None where they were removed. A damaged file is said."""
    return store.read_tensors(folder, key) if held(folder, key) else None


def by_arm(header: dict[str, Any]) -> dict[Arm, dict[str, Any]]:
    """The summary of a run: for each arm its objects by control, "none" always among them."""
    arms: dict[Arm, dict[str, Any]] = {}
    for s in header.get("summary") or []:
        arms.setdefault((s["channel"], s["attack"]), {})[s["control"]] = s
    return {arm: found for arm, found in arms.items() if "none" in found}


def rgb(pixels: Tensor) -> Tensor:
    """An image `[c h w]` as `[3 h w]`: three channels stay, any other number becomes their mean as grey."""
    return pixels if len(pixels) == 3 else repeat(pixels.mean(0), "h w -> c h w", c=3)


def write_file(path: Path, data: bytes) -> Path:
    """All of `data` under `path`, or what was there before.

    Raises:
        Failed: the disk refused.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise Failed(f"Expected to write {path}, got {error.strerror or error}: choose another file.") from error
    return path

"""Captured updates on disk: what a rank or client sent, decoded under its parameters' names, and the bytes it sent.

One step is two files. `step-000003-rank-1.safetensors` holds the decoded numbers, float32, and what `qleak audit` reads.
`step-000003-rank-1.payload.safetensors` holds the tensors that were handed to the network, in their own types, in the
order of the calls; its metadata's `layout` (JSON) says for each the call, bucket and parameters.

Metadata (strings): `capture` (version of this layout), `quantity` ("gradient" or "difference"), `hook`, `channel` (the spec of
a channel that gives these numbers, "" where there is none), `step`, `rank`, `world`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from qleak.adapters import files
from qleak.types import Tree

VERSION = "1"


class Sent(NamedTuple):
    """One tensor handed to the network, in which call, of which bucket's parameters."""

    call: str
    tensor: Tensor
    names: list[str]
    bucket: int = 0


def save(folder: Path, decoded: Tree, sent: Sequence[Sent], meta: Mapping[str, Any]) -> Path:
    """Writes both files of a step; returns the path of the decoded one.

    Args:
        folder: made where it is missing.
        decoded: what was sent, as the receiver reads it, by parameter.
        sent: what was handed to the network, in order; nothing leaves the payload's file away.
        meta: `step` and `rank` (numbers), `bucket` where a step is sent in parts, and whatever else is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = {"capture": VERSION, "quantity": "gradient"} | {k: str(v) for k, v in meta.items()}
    name = f"step-{int(text['step']):06d}-rank-{text['rank']}" + (
        f"-bucket-{text['bucket']}" if "bucket" in text else ""
    )
    path = folder / f"{name}.safetensors"
    if sent:
        layout = [
            {
                "call": s.call,
                "bucket": s.bucket,
                "names": s.names,
                "dtype": str(s.tensor.dtype),
                "shape": [*s.tensor.shape],
            }
            for s in sent
        ]
        held = {f"sent.{i}": s.tensor for i, s in enumerate(sent)}
        files.write(folder / f"{name}.payload.safetensors", held, text | {"layout": json.dumps(layout)})
    files.write(path, decoded, text)
    return path

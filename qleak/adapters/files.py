"""Captured updates as files: safetensors, npz and torch's own, read without running or trusting anything in them.

Every number a file claims (lengths, shapes, offsets) is checked against its size before memory is asked for, and what is
read is plain dense tensors. The kind is told from the content; an extension that says otherwise is noted in `meta`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from qleak import disk
from qleak.adapters import safe_zip
from qleak.check import Expected
from qleak.errors import Failed

HEADER = 16 * 2**20  # bytes of a safetensors header
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
          "U8": 1, "BOOL": 1}  # fmt: skip
SUFFIXES = {".safetensors": "safetensors", ".npz": "npz", ".pt": "pt", ".pth": "pt"}
SAVED = 'save tensors with safetensors, numpy.savez, or torch.save({"gradients": {name: tensor}}, …)'


class Captured(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: float32 by name, finite; counters such as `num_batches_tracked` stay whole numbers.
        ordered: whether they came as a bare list: the names are then "0", "1", …, and say only the order (a number
            that is left out stood for None, a frozen parameter).
        meta: what the file says beside its tensors, and `dtype` (what the numbers were stored as), `part` and `ignored`
            (which part of a checkpoint was read), `note` (an extension that does not fit the content).
        kind: "safetensors", "npz" or "pt", by content.
    """

    tensors: dict[str, Tensor]
    ordered: bool
    meta: dict[str, str]
    kind: str


def read(path: Path, limit: int = 4 * 2**30) -> Captured:
    """The tensors of `path`, as float32.

    Args:
        path: a file of `safetensors`, `numpy.savez` or `torch.save` (its zip format).
        limit: bytes that all tensors may take, unpacked and at four bytes a number or more.

    Raises:
        Expected: no such file, another format, anything damaged, too large, not finite, or more than plain tensors;
            one line. Nothing in the file is run, whatever it holds.
    """
    path = Path(path)
    where = f"Expected {_short(str(path.name) or str(path), 80)} to be a whole file of tensors, but it "
    try:
        if not path.is_file():
            raise Expected(f"Expected a file of tensors at {_short(str(path), 160)}: there is none.")
        kind = _kind(path, limit)
        ordered, about = False, {}
        if kind == "safetensors":
            tensors, about = _safetensors(path, limit)
        elif kind == "npz":
            tensors, ordered = safe_zip.npz(path, limit)
        else:
            tensors, ordered, about = safe_zip.pt(path, limit)
        tensors, dtypes = _numbers(tensors)
    except OSError as error:
        raise Expected(f"{where}cannot be read: {_short(error.strerror or str(error), 80)}.") from None
    except MemoryError:
        raise Failed(f"{where}does not fit into memory: allow it more, or cut the file into parts.") from None
    except Expected as error:
        text = str(error)
        raise Expected(text if text.startswith("Expected") else f"{where}{text}; {SAVED}.") from None
    except (*safe_zip.RAISED, safetensors.SafetensorError) as error:
        said = _short(f"{type(error).__name__}: {error}", 80)
        raise Expected(f"{where}is damaged ({said}): copy it again, or {SAVED}.") from None
    about = {k: v for k, v in about.items() if not k.startswith("within ")} | {"dtype": ", ".join(dtypes)}
    claimed = SUFFIXES.get(path.suffix.lower())
    if claimed != kind:
        about["note"] = f"named {_short(path.suffix or 'without extension', 20)}, holds {kind}: read by its content"
    return Captured(tensors, ordered, about, kind)


def write(path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    """`tensors` as a safetensors file with `meta` in its header, all of it or nothing.

    Raises:
        Failed: the disk refuses.
    """
    whole = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    disk.replace(Path(path), safetensors.torch.save(whole, metadata={str(k): str(v) for k, v in meta.items()}))


def _short(text: str, most: int) -> str:
    """One printable line of at most `most` characters, the middle left out."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= most else f"{line[: most // 2 - 1]}…{line[-(most // 2 - 1) :]}"


def _kind(path: Path, limit: int) -> str:
    """By the first bytes, and in a zip by the entries' names."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if size == 0:
        raise Expected("is empty")
    if size > limit + 2 * HEADER:
        raise Expected(f"has {size} bytes, more than {limit} allowed")
    if head[:4] == b"PK\x03\x04":
        opened, entries = safe_zip.archive(path, limit)
        opened.close()
        if any(name.split("/")[-1] == "data.pkl" for name in entries):
            return "pt"
        if any(name.endswith(".npy") for name in entries):
            return "npz"
        raise Expected("is a zip archive of neither arrays nor tensors")
    if head[:1] == b"\x80" or head[257:262] == b"ustar":
        raise Expected("is a pickle or an old torch.save, which can hold programs and is not read")
    if head[:6] == b"\x93NUMPY":
        raise Expected("is a single .npy array")
    if len(head) > 8 and head[8:9] == b"{":
        return "safetensors"
    raise Expected("begins like none of safetensors, .npz and .pt")


def _safetensors(path: Path, limit: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Header first: lengths, offsets and shapes against the file's size; then the safetensors library."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER, size - 8):
            raise Expected(f"claims a header of {length} bytes in a file of {size} (at most {HEADER})")
        header = json.loads(file.read(length), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise Expected("has no table of tensors in its header")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise Expected("has metadata that are no texts")
    spans, total = [], 0
    for name, entry in header.items():
        begin, end, numbers, width = _span(name, entry, size - 8 - length)
        spans.append((begin, end))
        total += numbers * max(4, width)
    if any(a[1] > b[0] for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False)):
        raise Expected("has tensors that share bytes")
    if total > limit:
        raise Expected(f"claims {total} bytes of numbers, more than {limit} allowed")
    with safetensors.safe_open(str(path), "pt") as opened:  # pyright: ignore[reportPrivateImportUsage]
        return {name: opened.get_tensor(name) for name in header}, about


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Expected("holds the same name twice")
    return found


def _span(name: str, entry: Any, room: int) -> tuple[int, int, int, int]:
    """(begin, end, numbers, bytes of one) of a tensor in the header."""
    shown = _short(name, 60)
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in WIDTHS:
        raise Expected(f"holds {shown!r} of dtype {_short(str(dtype), 20)}, which is not read")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in (*shape, begin, end)):
        raise Expected(f"holds {shown!r} of shape {_short(str(shape), 40)} at {_short(str([begin, end]), 40)}")
    numbers = math.prod(shape)
    if end > room or numbers * WIDTHS[dtype] != end - begin:
        raise Expected(f"holds {shown!r} of shape {_short(str(shape), 40)} in bytes {begin} to {end} of {room}")
    return begin, end, numbers, WIDTHS[dtype]


def _numbers(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Finite float32 tensors, counters as they are, and the dtypes that were stored."""
    out: dict[str, Tensor] = {}
    dtypes: list[str] = []
    for name, v in tensors.items():
        shown, dtype = _short(name, 60), str(v.dtype).removeprefix("torch.")
        if not v.is_floating_point():
            if v.dtype is torch.bool or v.is_complex() or (v.numel() > 1 and "num_batches_tracked" not in name):
                raise Expected(f"holds {shown!r} of {dtype}: codes have to be decoded to numbers first")
            out[name] = v
            continue
        single = v.to(torch.float32)
        bad = int((~torch.isfinite(single)).sum())
        if bad:
            raise Expected(f"holds {shown!r} with {bad} of {v.numel()} numbers NaN, infinite or beyond float32")
        out[name] = single
        dtypes += [dtype] if dtype not in dtypes else []
    if not dtypes:
        raise Expected("holds no tensor of floating-point numbers")
    return out, sorted(dtypes)

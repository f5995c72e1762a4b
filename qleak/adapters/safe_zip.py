"""Zip archives from strangers: npz and torch's own. Every claim is checked against the file's size before it is read."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qleak.adapters import safe_pickle
from qleak.check import Expected

PICKLE = 16 * 2**20  # bytes of a torch file's structure: names, shapes and places; never its numbers
DEPTH, COUNT = 8, 100_000  # nesting and number of tensors
PARTS = ("gradients", "gradient", "grads", "update", "delta", "state_dict", "model_state_dict", "model", "params")
RAISED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, KeyError, IndexError, TypeError,
          AttributeError, OverflowError, RecursionError, SyntaxError, RuntimeError, StopIteration)  # fmt: skip


def archive(path: Path, limit: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """The opened archive and its entries by name.

    Raises:
        Expected: names twice, encrypted entries, or more bytes than `limit` once unpacked.
    """
    opened = zipfile.ZipFile(path)
    entries = opened.infolist()
    if len({e.filename for e in entries}) != len(entries):
        raise Expected("holds the same name twice")
    if any(e.flag_bits & 1 for e in entries):
        raise Expected("is encrypted")
    total = sum(e.file_size for e in entries)
    if total > limit:
        raise Expected(f"unpacks to {total} bytes, more than {limit} allowed")
    return opened, {e.filename: e for e in entries}


def npz(path: Path, limit: int) -> tuple[dict[str, Tensor], bool]:
    """(tensors by name, whether they are only numbered) of an .npz file.

    Raises:
        Expected: objects, structures, or shapes that do not fit the bytes.
    """
    opened, entries = archive(path, limit)
    arrays: dict[str, Tensor] = {}
    with opened:
        for name, entry in entries.items():
            if not name.endswith(".npy"):
                raise Expected(f"holds {name[:60]!r}, which is no .npy array")
            arrays[name.removesuffix(".npy")] = _npy(opened, entry, name)
    if arrays and list(arrays) == [f"arr_{i}" for i in range(len(arrays))]:
        return dict(zip(map(str, range(len(arrays))), arrays.values(), strict=True)), True
    return arrays, False


def _npy(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> Tensor:
    """One array; its header is checked against the entry's size before its numbers are unpacked."""
    with opened.open(entry) as file:
        head = io.BytesIO(file.read(min(entry.file_size, 2**16)))
        version = np.lib.format.read_magic(head)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = header(head)
        if dtype.hasobject or dtype.fields or dtype.kind not in "fiubc":
            raise Expected(f"holds {name[:60]!r} of dtype {str(dtype)[:40]}, which is no array of numbers")
        claimed, held = math.prod(shape) * dtype.itemsize, entry.file_size - head.tell()
        if any(n < 0 for n in shape) or claimed != held:
            raise Expected(f"holds {name[:60]!r} of shape {str(shape)[:60]}: {claimed} bytes claimed, {held} there")
        data = bytearray(head.read())
        data += file.read()
    if len(data) != held:
        raise Expected(f"holds {name[:60]!r} with {len(data)} of {held} bytes")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(np.ascontiguousarray(array, dtype.newbyteorder("=")).reshape(shape))


def pt(path: Path, limit: int) -> tuple[dict[str, Tensor], bool, dict[str, str]]:
    """(tensors by name, whether they came as a bare list, further entries) of a file of `torch.save`.

    Raises:
        Expected: TorchScript, anything but plain dense tensors, or places outside the file.
    """
    opened, entries = archive(path, limit)
    with opened:
        root = next(name for name in entries if name.split("/")[-1] == "data.pkl").removesuffix("data.pkl")
        if f"{root}constants.pkl" in entries:
            raise Expected("is a TorchScript program: save its state_dict() or gradients instead")
        size = entries[f"{root}data.pkl"].file_size
        if size > PICKLE:
            raise Expected(f"has {size} bytes of structure, more than {PICKLE}")
        order = entries.get(f"{root}byteorder")
        if order and (order.file_size > 16 or opened.read(order) != b"little"):
            raise Expected("is not little-endian: save it again on this machine")
        tree = safe_pickle.plans(opened.read(entries[f"{root}data.pkl"]))
        found, ordered, about = tensors_of(tree)
        _fits(found, limit)
        held: dict[str, bytearray] = {}
        return {k: _strided(opened, entries, root, k, p, held) for k, p in found.items()}, ordered, about


def tensors_of(tree: Any) -> tuple[dict[str, safe_pickle.Plan], bool, dict[str, str]]:
    """The tensors of a state dict, a list, or the one part of a checkpoint that holds them; what else it says."""
    about: dict[str, str] = {}
    if isinstance(tree, dict):
        parts = [k for k in PARTS if isinstance(tree.get(k), dict | list | tuple) and tree[k]]
        if parts and not any(isinstance(v, safe_pickle.Plan) for v in tree.values()):
            about = {str(k)[:60]: str(v)[:200] for k, v in tree.items() if isinstance(v, str | int | float)}
            about["part"] = parts[0]
            if len(tree) > len(about):
                others = [
                    str(k)[:40] for k, v in tree.items() if k != parts[0] and not isinstance(v, str | int | float)
                ]
                about |= {"ignored": ", ".join(others)[:200]} if others else {}
            tree = tree[parts[0]]
    ordered = isinstance(tree, list | tuple) and not isinstance(tree, safe_pickle.Plan)
    if isinstance(tree, safe_pickle.Plan) or not isinstance(tree, dict | list | tuple):
        raise Expected("is one tensor or none, not a state dict or a list of tensors")
    found: dict[str, safe_pickle.Plan] = {}
    for i, (name, value) in enumerate(_leaves(tree, "", 0)):
        if i > COUNT:  # a few lists that hold each other unfold to any number
            raise Expected(f"holds more than {COUNT} entries")
        if isinstance(value, safe_pickle.Plan):
            if name in found:
                raise Expected(f"holds the name {name[:60]!r} twice")
            found[name] = value
        elif isinstance(value, str | int | float):
            about[name[:60]] = str(value)[:200]
        elif value is not None and not isinstance(value, dict | list | tuple):  # None: a frozen parameter's gradient
            raise Expected(f"holds {type(value).__name__} at {name[:60]!r}, which is no tensor")
    return found, ordered, about


def _leaves(tree: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Everything in a nested structure by its path, the inner structures themselves included."""
    if depth > DEPTH:
        raise Expected(f"nests its tensors deeper than {DEPTH}")
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield f"{path}{key}", value
        if isinstance(value, dict | list | tuple) and not isinstance(value, safe_pickle.Plan):
            yield from _leaves(value, f"{path}{key}.", depth + 1)


def _fits(found: dict[str, safe_pickle.Plan], limit: int) -> None:
    """Strides may repeat one number for ever: what counts is the number of coordinates."""
    total = sum(math.prod(p.shape) * max(4, _dtype(p.storage.dtype).itemsize) for p in found.values())
    if total > limit:
        raise Expected(f"claims {total} bytes of numbers, more than {limit} allowed")


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _strided(opened: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], root: str, name: str,
             plan: safe_pickle.Plan, held: dict[str, bytearray]) -> Tensor:  # fmt: skip
    record, dtype = f"{root}data/{plan.storage.key}", _dtype(plan.storage.dtype)
    if record not in entries:
        raise Expected(f"lacks the record of {name[:60]!r}")
    if entries[record].file_size != plan.storage.numbers * dtype.itemsize:
        there = entries[record].file_size
        raise Expected(
            f"holds {name[:60]!r} of {plan.storage.numbers} numbers in {there} bytes of {plan.storage.dtype}"
        )
    if not math.prod(plan.shape):
        return torch.zeros(plan.shape, dtype=dtype)
    if record not in held:
        held[record] = bytearray(opened.read(entries[record]))
    flat = torch.frombuffer(held[record], dtype=dtype)
    return flat.as_strided(plan.shape, plan.stride, plan.offset).clone(memory_format=torch.contiguous_format)

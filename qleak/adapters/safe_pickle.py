"""The pickle inside a torch file, read as data: thirty opcodes that can make dicts, lists, numbers and tensor plans.

Narrower than `torch.load(weights_only=True)`: nothing is imported, called or allocated here, not even a tensor. A tensor
comes out as its plan (which record, which dtype, shape and strides), so that all claims are checked before bytes are read.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from qleak.check import Expected

STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
REBUILT = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    "torch Size",
}
KINDS = {
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no numbers",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantized tensor",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
MARK = object()


class Name(NamedTuple):
    """A global that the pickle names; never looked up."""

    text: str


class Storage(NamedTuple):
    """A record of the archive: `data/<key>`, `numbers` numbers of `dtype`."""

    key: str
    dtype: str
    numbers: int


class Plan(NamedTuple):
    """A strided tensor over a storage, in numbers of its dtype."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _opcodes(data: bytes) -> Iterator[tuple[Any, Any, int | None]]:
    """`pickletools.genops`, quiet about odd escapes in a damaged file's strings."""
    found = pickletools.genops(data)
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            item = next(found, None)
        if item is None:
            return
        yield item


def plans(data: bytes) -> Any:
    """Nested dicts, lists, tuples, numbers, strings and `Plan`s of the pickle `data`.

    Raises:
        Expected: an opcode or a name outside the few that plain tensors need (code is never run).
        ValueError, IndexError, TypeError, KeyError, ...: the pickle is damaged.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def above() -> list[Any]:
        """What lies above the last mark, which goes with it."""
        at = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is MARK)
        found = stack[at + 1 :]
        del stack[at:]
        return found

    for opcode, arg, _ in _opcodes(data):
        op = opcode.name
        if op in ("PROTO", "FRAME"):
            continue
        if op == "STOP":
            return stack.pop()
        if op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op in NUMBERS:
            stack.append(arg)
        elif op == "MARK":
            stack.append(MARK)
        elif op in ("BINPUT", "LONG_BINPUT"):
            memo[_a(int, arg)] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[_a(int, arg)])
        elif op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[op])
        elif op == "TUPLE":
            stack.append(tuple(above()))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif op in ("APPEND", "APPENDS"):
            items = [stack.pop()] if op == "APPEND" else above()
            _a(list, stack[-1]).extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = [stack.pop() for _ in range(2)][::-1] if op == "SETITEM" else above()
            _fill(_a(dict, stack[-1]), items)
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            text = str(arg) if op == "GLOBAL" else " ".join([str(_a(str, stack.pop())) for _ in range(2)][::-1])
            stack.append(_known(text))
        elif op == "BINPERSID":
            stack.append(_storage(_a(tuple, stack.pop())))
        elif op == "REDUCE":
            args = _a(tuple, stack.pop())
            stack.append(_rebuilt(_a(Name, stack.pop()), args))
        elif op == "BUILD":  # OrderedDict's attributes (a state dict's versions): not data
            stack.pop()
            _a(dict, stack[-1])
        else:
            raise Expected(f"holds opcode {op}, which plain tensors do not need")
    raise ValueError("no end")


def _a(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{kind} is missing")
    return value


def _fill(target: dict, items: list[Any]) -> None:
    """Keys are strings or numbers: the hash of a nested tuple can take forever. None twice."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):
            raise ValueError("a key that is no name")
        if key in target:
            raise Expected(f"holds the name {str(key)[:60]!r} twice")
        target[key] = value


def _known(text: str) -> Name:
    module, _, name = text.partition(" ")
    dtype = module == "torch" and (name.removesuffix("Storage") != name or name in STORAGES.values())
    if text not in REBUILT and not dtype:
        what = KINDS.get(name, "") if module == "torch._utils" else ""
        raise Expected(f"holds {what}" if what else f"names {'.'.join((module, name))[:60]!r}, which is no tensor")
    return Name(text)


def _storage(args: tuple) -> Storage:
    tag, kind, key, _, count = args
    name = _a(Name, kind).text.removeprefix("torch ")
    if tag != "storage" or not isinstance(key, str) or not _whole(count):
        raise ValueError("a storage without a place")
    if name not in STORAGES:
        raise Expected(f"holds numbers of {name[:40]!r}, which are not read")
    return Storage(key, STORAGES[name], count)


def _rebuilt(name: Name, args: tuple) -> Any:
    if name.text == "collections OrderedDict":
        target: dict[Any, Any] = {}
        for pair in args[0] if args else ():
            _fill(target, list(_a(list | tuple, pair)) if isinstance(pair, list | tuple) else [])
        return target
    if name.text == "torch Size":
        return tuple(_a(tuple, args[0]))
    if name.text == "torch._utils _rebuild_parameter":
        return _a(Plan, args[0])
    if name.text != "torch._utils _rebuild_tensor_v2":
        raise Expected(f"calls {name.text[:60]!r}, which makes no tensor")
    storage, offset, shape, stride = args[:4]
    numbers = (offset, *_a(tuple, shape), *_a(tuple, stride))
    if not all(_whole(n) for n in numbers) or len(shape) != len(stride) or len(shape) > 16:
        raise ValueError("a shape that is none")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if 0 not in shape and last >= _a(Storage, storage).numbers:
        raise Expected(f"holds a tensor of shape {str(shape)[:60]} over a storage of {storage.numbers} numbers")
    return Plan(_a(Storage, storage), offset, shape, stride)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48

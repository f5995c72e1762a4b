"""Captured updates are read whole or refused in one line: nothing runs, nothing unbounded is allocated."""

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tiers import sizes

from qleak import random
from qleak.adapters import files, safe_pickle
from qleak.errors import Expected, Failed

TREE = {"fc.weight": torch.arange(12.0).reshape(3, 4) / 7, "fc.bias": torch.tensor([1.0, -2.0, 0.5])}


def archived(tree, **options) -> bytes:
    out = io.BytesIO()
    torch.save(tree, out, **options)
    return out.getvalue()


def zipped(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in entries:
            file.writestr(name, data)
    return out.getvalue()


def npz(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def header(table: dict | str, data: bytes = b"") -> bytes:
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    return struct.pack("<Q", len(text)) + text + data


def npy(shape, descr="<f4", data=b"") -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def pickled(body: bytes) -> bytes:
    return zipped([("archive/data.pkl", body), ("archive/version", b"3\n")])


def refused(path: Path, limit: int = 2**26) -> str:
    """The one line; anything but Expected and Failed goes through."""
    with pytest.raises((Expected, Failed)) as caught:
        files.read(path, limit)
    text = str(caught.value)
    assert text.startswith("Expected")
    assert "\n" not in text
    assert len(text) < 400
    return text


def good(folder: Path) -> dict[str, bytes]:
    files.write(folder / "good.safetensors", TREE, {"from": "test"})
    return {
        "safetensors": (folder / "good.safetensors").read_bytes(),
        "npz": npz(**{k: v.numpy() for k, v in TREE.items()}),
        "pt": archived(TREE),
        "list.pt": archived(list(TREE.values())),
    }


# --- what is read ---


@pytest.mark.parametrize("name", ["safetensors", "npz", "pt"])
def test_every_format_gives_the_same_tensors(tmp_path, name):
    path = tmp_path / f"update.{name}"
    path.write_bytes(good(tmp_path)[name])
    captured = files.read(path)
    assert (captured.kind, captured.ordered, captured.meta["dtype"]) == (name, False, "float32")
    assert captured.tensors.keys() == TREE.keys()
    assert all(torch.equal(v, TREE[k]) for k, v in captured.tensors.items())


def test_torch_files_are_what_torch_load_makes_of_them(tmp_path):
    base = torch.arange(24.0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    for i, tree in enumerate(
        [
            {"t": base[:12].reshape(3, 4).T, "s": base[3::2]},
            {"z": torch.zeros(0, 3), "e": base[:1].expand(5)},
            net.state_dict(),
        ]
    ):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(archived(tree))
        ours, theirs = files.read(path).tensors, torch.load(path, weights_only=True)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_lists_parts_and_frozen_gradients(tmp_path):
    path = tmp_path / "update.pt"
    w, b = TREE.values()
    path.write_bytes(archived({"epoch": 3, "optimizer": {"lr": 0.1}, "gradients": [w, None, b.double()]}))
    captured = files.read(path)
    assert captured.ordered
    assert list(captured.tensors) == ["0", "2"]
    assert captured.meta == {"epoch": "3", "part": "gradients", "ignored": "optimizer", "dtype": "float32, float64"}
    path.write_bytes(archived((w, b)))
    assert list(files.read(path).tensors) == ["0", "1"]
    (tmp_path / "a.npz").write_bytes(npz(arr_0=w.numpy(), arr_1=b.numpy()))
    assert files.read(tmp_path / "a.npz").ordered


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_widths_become_float32(tmp_path, dtype):
    for name in ("u.safetensors", "u.pt"):
        path, stored = tmp_path / name, {k: v.to(dtype) for k, v in TREE.items()}
        files.write(path, stored, {}) if name.endswith("s") else path.write_bytes(archived(stored))
        captured = files.read(path)
        assert captured.meta["dtype"] == str(dtype).removeprefix("torch.")
        assert all(
            v.dtype is torch.float32 and torch.equal(v, TREE[k].to(dtype).float()) for k, v in captured.tensors.items()
        )


def test_content_counts_and_the_extension_is_noted(tmp_path):
    for name, data in good(tmp_path).items():
        path = tmp_path / f"{name}.txt"
        path.write_bytes(data)
        captured = files.read(path)
        assert captured.kind in name
        assert captured.kind in captured.meta["note"]


def test_written_files_come_back_with_their_meta(tmp_path):
    files.write(tmp_path / "u.safetensors", {"a": TREE["fc.weight"].T}, {"channel": "chain()"})
    captured = files.read(tmp_path / "u.safetensors")
    assert torch.equal(captured.tensors["a"], TREE["fc.weight"].T)
    assert captured.meta == {"channel": "chain()", "dtype": "float32"}
    with pytest.raises(Failed):
        files.write(tmp_path / "no" / "u.safetensors", TREE, {})


# --- what is refused ---


class Runs:
    """A pickle that makes a file when it is loaded by something that runs code."""

    def __init__(self, marker: Path, how: int = 0) -> None:
        self.marker, self.how = str(marker), how

    def __reduce__(self):
        if self.how == 1:
            return eval, (f"open({self.marker!r}, 'w').close()",)
        return Path.touch, (Path(self.marker),)


def hostile(folder: Path, marker: Path) -> dict[str, bytes]:
    """Hand-made malformed files, one idea each."""
    nan, sized = torch.tensor([1.0, float("nan")]), {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    deep = b"\x80\x02" + b"(" * 5000 + b"]" + b"t" * 5000 + b"."
    laughs = (
        b"\x80\x02]q\x00"
        + b"".join(b"]q" + bytes([i + 1]) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60))
        + b"."
    )
    endless = b"\x80\x02]q\x00h\x00a."
    tuple_key = b"\x80\x02}" + b")" + b"".join(b"q\x01h\x01h\x01\x86" for _ in range(60)) + b"K\x01s."
    names = ("os\nsystem", "builtins\neval", "torch\nload", "torch.hub\nload", "numpy.core.multiarray\n_reconstruct")
    globals_ = [b"c" + name.encode() + b"\n" for name in names]
    plain = archived({"a": torch.arange(4.0)})
    body = zipfile.ZipFile(io.BytesIO(plain)).read("archive/data.pkl")
    grown = body.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85")  # shape (2147483647,) over four numbers
    assert grown != body
    negative = body.replace(b"K\x04\x85", b"J\xff\xff\xff\xff\x85")
    return {
        "empty": b"",
        "text": b"gradients of round 3\n" * 40,
        "json": b'{"fc.weight": [1, 2, 3]}',
        "eight": b"\x00" * 8,
        "huge header": struct.pack("<Q", 2**62) + b"{" * 100,
        "long header": struct.pack("<Q", 2**31) + b"{}" * 100,
        "no table": header("[1, 2]"),
        "brace only": header("{"),
        "deep json": header('{"a":' * 50_000 + "1" + "}" * 50_000),
        "not utf8": struct.pack("<Q", 4) + b'{"\xff\xfe',
        "no tensors": header({}),
        "metadata": header({"__metadata__": {"a": 1}, "a": sized}, b"\0" * 8),
        "twice": header('{"a":' + json.dumps(sized) + ',"a":' + json.dumps(sized) + "}", b"\0" * 8),
        "negative shape": header({"a": {**sized, "shape": [-2, -1]}}, b"\0" * 8),
        "fractional shape": header({"a": {**sized, "shape": [2.0]}}, b"\0" * 8),
        "true shape": header({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4),
        "huge shape": header({"a": {**sized, "shape": [2**40, 2**40]}}, b"\0" * 8),
        "wrong bytes": header({"a": {**sized, "shape": [3]}}, b"\0" * 8),
        "outside": header({"a": {**sized, "data_offsets": [4, 12]}}, b"\0" * 8),
        "backwards": header({"a": {**sized, "data_offsets": [8, 0]}}, b"\0" * 8),
        "shared": header({"a": sized, "b": sized}, b"\0" * 8),
        "hole": header({"a": sized, "b": {**sized, "data_offsets": [16, 24]}}, b"\0" * 24),
        "trailing": header({"a": sized}, b"\0" * 80),
        "dtype": header({"a": {**sized, "dtype": "F99"}}, b"\0" * 8),
        "ints": header({"a": {**sized, "dtype": "I32"}}, b"\0" * 8),
        "no offsets": header({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
        "entry text": header({"a": "F32"}, b"\0" * 8),
        "nan": header({"a": sized}, struct.pack("<2f", float("nan"), 1)),
        "newline name": header({"a\nb\x1b[31m" * 400: {**sized, "dtype": "BOOL"}}, b"\0" * 8),
        "inf npz": npz(a=np.array([1, np.inf])),
        "float64 beyond": npz(a=np.array([1e300])),
        "objects": npz(a=np.array([{}, []], dtype=object)),
        "complex": npz(a=np.ones(3, complex)),
        "strings": npz(a=np.array(["x"])),
        "structure": npz(a=np.zeros(2, [("x", "f4")])),
        "npy alone": npy((2,), data=b"\0" * 8),
        "npz text": zipped([("a.txt", b"hello"), ("b.npy", npy((2,), data=b"\0" * 8))]),
        "npz twice": b"",
        "npy claims": zipped([("a.npy", npy((10**12,), data=b"\0" * 8))]),
        "npy negative": zipped([("a.npy", npy((-2, -1), data=b"\0" * 8))]),
        "npy code": zipped([("a.npy", npy(f"(__import__('os').mknod({str(marker)!r}),)", data=b"\0" * 8))]),
        "npy object": zipped([("a.npy", npy((1,), "|O", pickle.dumps(Runs(marker))))]),
        "npy version": zipped([("a.npy", b"\x93NUMPY\x09\x09" + b"\0" * 80)]),
        "npy deep": zipped([("a.npy", npy("(" * 3000 + ")" * 3000, data=b"\0" * 8))]),
        "other zip": zipped([("hello.txt", b"hello")]),
        "zip of nothing": zipped([]),
        "script": zipped([("m/data.pkl", b"\x80\x02}."), ("m/constants.pkl", b"\x80\x02).")]),
        "raw pickle": pickle.dumps(Runs(marker)),
        "old torch": archived(TREE, _use_new_zipfile_serialization=False),
        "object": pickled(pickle.dumps(Runs(marker), protocol=2)),
        "eval": pickled(pickle.dumps({"a": Runs(marker, 1)}, protocol=2)),
        "deep": pickled(deep),
        "laughs": pickled(laughs),
        "endless": pickled(endless),
        "tuple key": pickled(tuple_key),
        "no end": pickled(b"\x80\x02}q\x00"),
        "memo": pickled(b"\x80\x02}r\xff\xff\xff\x7f."),
        "long text": pickled(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0f."),
        "missing record": pickled(body),
        "grown": zipped([("archive/data.pkl", grown), ("archive/data/0", b"\0" * 16)]),
        "negative": zipped([("archive/data.pkl", negative), ("archive/data/0", b"\0" * 16)]),
        "short record": zipped([("archive/data.pkl", body), ("archive/data/0", b"\0" * 12)]),
        "big endian": zipped([("archive/data.pkl", body), ("archive/data/0", b"\0" * 16), ("archive/byteorder", b"big")]),
        "nan pt": archived({"a": nan}),
        "meta": archived({"a": torch.zeros(3, device="meta")}),
        "sparse": archived({"a": torch.eye(3).to_sparse()}),
        "bool": archived({"a": torch.tensor([True, False])}),
        "int pt": archived({"a": torch.arange(4)}),
        "module": archived(torch.nn.Linear(2, 2)),
        "one tensor": archived(torch.zeros(2)),
        "numbers": archived({"a": 1, "b": 2.0}),
        "expanded": archived({"a": torch.zeros(1).expand(2**40)}),
        **{f"global {i}": pickled(b"\x80\x02" + g + b"X\x05\x00\x00\x00ls -l\x85R.") for i, g in enumerate(globals_)},
    }  # fmt: skip


def twice(tmp_path: Path) -> bytes:
    with pytest.warns(UserWarning, match="Duplicate"):
        return zipped([("a.npy", npy((2,), data=b"\0" * 8))] * 2)


def test_hand_made_hostile_files_are_refused_in_one_line(tmp_path):
    marker = tmp_path / "marker"
    every = hostile(tmp_path, marker) | {"npz twice": twice(tmp_path)}
    for i, (name, data) in enumerate(every.items()):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(data)
        try:
            refused(path)
        except BaseException as error:
            raise AssertionError(name) from error
        assert not marker.exists(), name
    pickle.loads(pickle.dumps(Runs(marker)))
    assert marker.exists(), "the trap would have gone off in an ordinary unpickler"


def test_places_that_hold_no_file(tmp_path):
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for path in (
        tmp_path,
        tmp_path / "nowhere",
        tmp_path / "none.pt",
        tmp_path / ("x" * 300),
        Path("a\0b"),
        Path("/dev/null"),
    ):
        assert "file" in refused(path)


def test_reasons_name_the_tensor_and_the_way_out(tmp_path):
    every = hostile(tmp_path, tmp_path / "marker")
    for name, words in {
        "nan": ("'a'", "NaN"), "ints": ("'a'", "decoded"), "sparse": ("sparse",), "old torch": ("pickle", "safetensors"),
        "expanded": ("allowed",), "eval": ("eval",), "script": ("state_dict",),
    }.items():  # fmt: skip
        path = tmp_path / "x.pt"
        path.write_bytes(every[name])
        assert all(w in refused(path) for w in words), (name, refused(path))


def mutated(data: bytes, seed: int) -> bytes:
    """One of: cut off, bits flipped, a block overwritten, zeroed, repeated, two halves of different places."""
    gen = random.generator("captured", seed)
    draw = lambda high, n=1: [int(v) for v in random.integers(gen, max(high, 1), (n,))]  # noqa: E731
    size, (how,) = len(data), draw(5)
    out = bytearray(data)
    if how == 0:
        return data[: draw(size)[0]]
    if how == 1:
        for at in draw(size, 1 + draw(8)[0]):
            out[at] ^= 1 << draw(8)[0]
        return bytes(out)
    at, length = draw(size)[0], 1 + draw(64)[0]
    if how == 2:
        out[at : at + length] = bytes(draw(256, length))
    elif how == 3:
        out[at : at + length] = b"\xff" * length
    else:
        out[at:at] = out[at : at + length]
    return bytes(out)


def check_mutations(folder: Path, count: int) -> tuple[int, int]:
    """(refused, read): a flipped bit inside a number is still a number where the format has no checksum."""
    bad = 0
    bodies = good(folder)
    inner = zipfile.ZipFile(io.BytesIO(bodies["pt"]))
    records = [(e.filename, inner.read(e)) for e in inner.infolist()]
    for seed in range(count):
        kind = (*bodies, "pickle")[seed % 5]
        if kind == "pickle":  # past the archive's checksum, into the structure itself
            data = zipped([(n, mutated(d, seed) if n.endswith("data.pkl") else d) for n, d in records])
        else:
            data = mutated(bodies[kind], seed)
        path = folder / "mutated.bin"
        path.write_bytes(data)
        try:
            captured = files.read(path, 2**26)
        except (Expected, Failed) as error:
            assert "\n" not in str(error), data
            assert len(str(error)) < 400, data
            bad += 1
        else:
            assert all(v.isfinite().all() and v.numel() <= 2**20 for v in captured.tensors.values())
    return bad, count - bad


@sizes("count", 420, 20_000, fast=True)
def test_mutated_files_are_read_or_refused(tmp_path, count):
    bad, fine = check_mutations(tmp_path, count)
    print(f"{count} mutated files: {bad} refused, {fine} read")
    assert bad > 0.59 * count, (bad, fine)


BOMBS = """
import resource, sys
from pathlib import Path
from qleak.adapters import files
from qleak.errors import Expected, Failed
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, held + 2**28))
for path in sys.argv[2:]:
    try:
        files.read(Path(path), int(sys.argv[1]))
    except (Expected, Failed) as error:
        print(len(str(error)), str(error))
"""


def zip_of(stream: bytes, size: int) -> bytes:
    """An archive with one deflated entry that says it unpacks to `size` bytes."""
    name, big = b"a.npy", struct.pack("<HHQ", 1, 8, size)
    sizes = struct.pack("<HHHHIII", 0, 8, 0, 33, 0, len(stream), 0xFFFFFFFF)
    local = b"PK\x03\x04" + struct.pack("<H", 45) + sizes + struct.pack("<HH", len(name), len(big)) + name + big
    entry = (
        b"PK\x01\x02" + struct.pack("<HH", 45, 45) + sizes + struct.pack("<HHHHHII", len(name), len(big), 0, 0, 0, 0, 0)
    )
    entry += name + big
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local) + len(stream), 0)
    return local + stream + entry + end


def bombs(folder: Path) -> tuple[list[Path], int]:
    """Ten megabytes that unpack to ten gigabytes, the same with a modest claim, and a sparse file of ten gigabytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    size, flush = 10 * 2**30, zlib.Z_FULL_FLUSH
    head = npy((size // 4,))
    first = packer.compress(head) + packer.flush(flush)
    block = packer.compress(bytes(2**24)) + packer.flush(flush)  # the same bytes wherever it stands
    stream = first + block * (size // 2**24) + packer.flush()
    assert len(stream) < 11 * 2**20
    paths = [folder / "claims.npz", folder / "hides.npz", folder / "sparse.safetensors"]
    paths[0].write_bytes(zip_of(stream, size + len(head)))
    paths[1].write_bytes(zip_of(stream, len(head) + 2**10))
    with paths[2].open("wb") as file:  # nothing, behind a header that is true
        text = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return paths, size


def test_bombs_stay_within_memory(tmp_path):
    paths, size = bombs(tmp_path)
    assert "unpacks to" in refused(paths[0])
    assert "damaged" in refused(paths[1])  # no more is unpacked than was claimed, and that has another checksum
    assert "allowed" in refused(paths[2])
    # Where the limit is generous, memory is what ends it: a quarter of a gigabyte here.
    run = subprocess.run(
        [sys.executable, "-c", BOMBS, str(2 * size), *map(str, paths)], capture_output=True, text=True, check=False
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 3, run.stderr[-2000:]
    assert all(int(line.split()[0]) < 400 for line in lines)
    assert "memory" in lines[0]


def test_the_sum_of_small_entries_counts(tmp_path):
    data = zipped([(f"{i}.npy", npy((2**18,), data=bytes(2**20))) for i in range(20)], zipfile.ZIP_DEFLATED)
    path = tmp_path / "bomb.npz"
    path.write_bytes(data)
    assert "unpacks to" in refused(path, 2**23)
    assert len(files.read(path, 2**25).tensors) == 20


def test_the_pickle_reader_knows_no_code():
    with pytest.raises(Expected, match=r"posix\.system|nt\.system"):
        safe_pickle.plans(pickle.dumps(__import__("os").system))
    assert safe_pickle.plans(pickle.dumps({"a": [1, 2.5, (None, True)]}, 2)) == {"a": [1, 2.5, (None, True)]}

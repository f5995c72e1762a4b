"""The compiled kernels against torch; lanes by themselves; and every way in which there may be none."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qleak import native, random
from qleak.attacks import ghost, lbfgs, routes
from qleak.catalog import build as built
from qleak.client import gradient
from qleak.native import Geometry, build

F64 = torch.float64
compiled = pytest.mark.skipif(native.library().code is None, reason=native.described())


def draw(*shape, name="x", dtype=F64):
    return random.normal(random.generator(name, *shape), shape).to(dtype)


def images(*shape, name="x", dtype=F64):
    return draw(*shape, name=name, dtype=dtype).contiguous(memory_format=torch.channels_last)


@st.composite
def geometries(draws):
    kernel, padding = draws(st.integers(1, 6)), draws(st.integers(0, 6))
    least = max(1, kernel - 2 * padding)
    h, w = draws(st.integers(least, least + 20)), draws(st.integers(least, least + 20))
    return Geometry(
        h, w, draws(st.integers(1, 20)), draws(st.integers(1, 36)), kernel, draws(st.integers(1, 4)), padding
    )


def lane_by_lane(function, lanes, *tensors):
    """`function` of each lane's slice, one behind the other."""
    parts = [[v.unflatten(0, (lanes, -1))[i] for v in tensors] for i in range(lanes)]
    return torch.cat([function(i, *part) for i, part in enumerate(parts)])


@compiled
@settings(deadline=None)
@given(
    geometries(),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([F64, torch.float32]),
)
def test_convolutions_are_torchs(g, lanes, b, own, onto, dtype):
    x, d = images(lanes * b, g.cin, g.height, g.width), images(lanes * b, g.cout, *g.sides, name="d")
    shape = (g.cout, g.cin, g.kernel, g.kernel)
    k = draw(lanes, *shape, name="k") if own else draw(*shape, name="k")
    bias, base = draw(lanes, g.cout, name="bias")[slice(None) if own else 0], images(*d.shape, name="onto")
    of = lambda v, i: v[i] if own else v  # noqa: E731
    forward = lane_by_lane(lambda i, x: F.conv2d(x, of(k, i), of(bias, i), g.stride, g.padding), lanes, x)

    leaf = x.clone().requires_grad_()
    out = lane_by_lane(lambda i, x: F.conv2d(x, of(k, i), None, g.stride, g.padding), lanes, leaf)
    (transposed,) = torch.autograd.grad(out, leaf, d)

    each = draw(lanes, *shape, name="k").requires_grad_()
    out = lane_by_lane(lambda i, x: F.conv2d(x, each[i], None, g.stride, g.padding), lanes, x)
    (weights,) = torch.autograd.grad(out, each, d)
    less, total = draw(lanes, *shape, name="less"), d.unflatten(0, (lanes, b)).sum((1, 3, 4))

    near = {"rtol": 0, "atol": 1e-10 if dtype == F64 else 1e-3 * math.sqrt(g.cin * g.cout)}
    x, d, k, bias, less = (v.to(dtype) for v in (x, d, k, bias, less))
    if onto:
        kept = base.to(dtype, copy=True)
        assert native.forward(g, x, k, bias, lanes, kept) is kept
        torch.testing.assert_close(kept.to(F64), forward + base, **near)
        kept = x.clone()
        assert native.transposed(g, d, k, lanes, kept) is kept
        torch.testing.assert_close(kept.to(F64), transposed + x.to(F64), **near)
    else:
        torch.testing.assert_close(native.forward(g, x, k, bias, lanes).to(F64), forward, **near)
        torch.testing.assert_close(native.transposed(g, d, k, lanes).to(F64), transposed, **near)
    found, sums = native.weigh(g, x, d, less if onto else None, 0.5, lanes)
    torch.testing.assert_close(found.to(F64), 0.5 * weights - (less.to(F64) if onto else 0), **near)
    torch.testing.assert_close(sums.to(F64), 0.5 * total, **near)


@compiled
def test_a_lane_is_the_same_alone_and_in_a_crowd():
    g = Geometry(11, 9, 5, 18, 3, 2, 1)
    x, d = images(6, 5, 11, 9, dtype=torch.float32), images(6, 18, 6, 5, name="d", dtype=torch.float32)
    k, bias = draw(3, 18, 5, 3, 3, dtype=torch.float32), draw(3, 18, dtype=torch.float32)
    crowd = (native.forward(g, x, k, bias, 3), native.transposed(g, d, k, 3), native.weigh(g, x, d, None, 1.0, 3)[0])
    x, d = x[2:4], d[2:4]
    alone = (native.forward(g, x, k[1:2], bias[1:2], 1), native.transposed(g, d, k[1:2], 1))
    assert torch.equal(crowd[0][2:4], alone[0])
    assert torch.equal(crowd[1][2:4], alone[1])
    assert torch.equal(crowd[2][1:2], native.weigh(g, x, d, None, 1.0, 1)[0])


def steps(lanes, history, armijo):
    """Iterates on unlike quartics, in float64, with a lane that starts at its optimum and stores nothing."""
    optimizer, x = lbfgs(history, armijo), draw(lanes, 30, name="start")
    centre = draw(lanes, 30, name="centre")
    x[0] = centre[0]
    state, seen = optimizer.init(x), []
    for _ in range(25):
        off = x - centre
        loss, slope = (0.5 * off.square() + 0.05 * off.pow(4)).sum(1), off + 0.2 * off.pow(3)
        x, state = optimizer.update(state, x, loss, slope)
        seen.append(x)
    return torch.stack(seen)


@compiled
@pytest.mark.parametrize("armijo", [True, False])
@pytest.mark.parametrize("history", [3, 8, 100])
def test_lbfgs_takes_the_same_steps_with_and_without(history, armijo, monkeypatch):
    ours = steps(4, history, armijo)
    monkeypatch.setattr(native, "serves", lambda x: False)
    torch.testing.assert_close(ours, steps(4, history, armijo), rtol=0, atol=1e-9)
    assert float((ours - steps(4, 2, armijo)).abs().max()) > 1e-6


@compiled
@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (33, 130)])
def test_a_linear_layer_is_met_as_torch_meets_it(size, b, monkeypatch):
    lanes, (out, cin) = 3, size
    delta, h = draw(lanes, b, out, name="d"), draw(lanes, b, cin, name="h")
    lo, wide = draw(lanes, out, cin, name="lo"), draw(lanes, out, cin, name="wide").abs()
    lo[0, 0, 0] = -torch.inf
    cell = ghost.Cell(lo, torch.where(wide > 1, torch.inf, lo + wide))
    found, rest = ghost.outside(cell, delta, h, 0.7), ghost._sides(lo[1:], delta[1:], h[1:])
    monkeypatch.setattr(native, "serves", lambda x: False)
    want, plain = ghost.outside(cell, delta, h, 0.7), ghost._sides(lo[1:], delta[1:], h[1:])
    for ours, theirs in zip((found[0], *found[1], *rest), (want[0], *want[1], *plain), strict=True):
        torch.testing.assert_close(ours, theirs)


@compiled
def test_what_is_not_a_number_stays_so():
    delta, h = torch.tensor([[[torch.nan, 1.0]]]), torch.ones(1, 1, 3)
    value, push, pull = native.outside(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), delta, h, 1.0)
    assert value.isnan().all()
    assert push[0, 0].isnan().tolist() == [True, False]
    assert pull.isnan().all()


@compiled
def test_a_kernel_is_told_nothing_wrong():
    g = Geometry(5, 5, 2, 3, 3, 1, 1)
    x, d, k = images(2, 2, 5, 5), images(2, 3, 5, 5, name="d"), draw(3, 2, 3, 3, name="k")
    native.forward(g, x, k, None, 2)
    wrong = [
        lambda: native.forward(g, x[:, :1], k, None, 2),
        lambda: native.forward(g, x, k.float(), None, 2),
        lambda: native.forward(g, x, k[None], None, 2),
        lambda: native.forward(g, x, k, draw(2), 2),
        lambda: native.transposed(g, d[:, :, :4], k, 2),
        lambda: native.weigh(g, x, d[:1], None, 1.0, 2),
        lambda: native.weigh(g, x, d, k, 1.0, 2),
        lambda: native.sides(draw(2, 3, 4), draw(2, 1, 3), draw(2, 1, 5)),
        lambda: native.outside(draw(2, 3, 4), draw(2, 3, 5), draw(2, 1, 3), draw(2, 1, 4), 1.0),
    ]
    for each in wrong:
        with pytest.raises(ValueError, match=r"Expected torch\.float64"):
            each()
    state = lbfgs(4).init(draw(2, 6))
    part = state.pairs.transpose(0, 1).contiguous().transpose(0, 1)
    rest = [torch.zeros(2, dtype=torch.int64), *(torch.ones(2, dtype=F64) for _ in range(2)), state.x, state.x, 1]
    with pytest.raises(ValueError, match="in one piece"):
        native.lbfgs(part, state.inverse, state.yy, state.diagonal, *rest)


# --- where there are none -------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache folder of its own; `library()` asked anew each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("CXX", "QLEAK_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    return build.library.__wrapped__


def kept(folder: Path) -> list[Path]:
    return [p for p in (folder / "qleak" / "native").rglob("*") if p.is_file()]


@compiled
def test_it_is_compiled_once_and_a_torn_file_is_made_anew(fresh, tmp_path, monkeypatch):
    path = build._kept(build._compiler() or [])
    path.parent.mkdir(parents=True)
    path.write_text("torn")
    assert fresh().code is not None
    assert kept(tmp_path) == [path]
    assert path.stat().st_size > 1000
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert fresh().code is not None


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


TO = 'for last; do :; done; echo made > "$last"'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo 'x.cpp:1: error: no such thing' >&2; exit 1", "compiler: x.cpp:1: error: no such thing"),
        ("exit 1", "returned non-zero exit status 1"),
        (TO, "compiler: "),  # not a library: the loader's own words
    ],
)
def test_a_compiler_that_fails_is_named_and_nothing_is_kept(fresh, tmp_path, monkeypatch, text, reason):
    monkeypatch.setenv("CXX", script(tmp_path, text))
    code, why = fresh()
    assert code is None
    assert reason in why
    assert "\n" not in why
    assert not kept(tmp_path)


def test_no_compiler_an_absent_one_and_none_wanted(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert "No such file" in fresh().reason
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fresh() == (None, "no C++ compiler found")
    monkeypatch.setenv("QLEAK_NATIVE", "0")
    assert fresh() == (None, "QLEAK_NATIVE=0")


@compiled
def test_a_folder_that_takes_nothing(fresh, tmp_path):
    (tmp_path / "qleak").write_text("a file in the way")
    code, why = fresh()
    assert code is None
    assert "Not a directory" in why or "File exists" in why


@compiled
def test_a_library_that_computes_something_else_is_refused(fresh, tmp_path, monkeypatch):
    for part in (*build.SOURCES, build.HEADER):
        text = (build.HERE / part).read_text(encoding="utf-8")
        (tmp_path / part).write_text(text.replace("+= at[i * step + r] * tap", "-= at[i * step + r] * tap"))
    monkeypatch.setattr(build, "HERE", tmp_path)
    assert "computes something else" in fresh().reason
    assert not kept(tmp_path)
    (tmp_path / "lbfgs.cpp").write_text("")
    assert "not whole" in fresh().reason


@compiled
def test_two_processes_at_once_leave_one_library(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    ask = "from qleak import native; assert native.library().code, native.described()"
    both = [subprocess.Popen([sys.executable, "-c", ask], env=env) for _ in range(2)]
    assert [p.wait(120) for p in both] == [0, 0]
    assert len(kept(tmp_path)) == 1


def test_the_reason_is_printed():
    model = built("models", "lenet")
    assert routes.pick(model, gradient(), 4)[1].endswith(native.described())
    assert "kernels" not in routes.pick(model, gradient(), 4, device="cuda")[1]


@pytest.mark.slow
@compiled
def test_kernels_touch_nothing_beyond_their_arrays(tmp_path):
    command = [*(build._compiler() or ()), "-g", "-O1", "-std=c++17", build.CHIP, "-fsanitize=address,undefined"]
    command += ["-fno-sanitize-recover=all", str(Path(__file__).with_name("kernels.cpp"))]
    program = tmp_path / "kernels"

    def run(folder: Path):
        sources = [str(folder / part) for part in build.SOURCES]
        made = subprocess.run([*command, *sources, "-o", str(program)], capture_output=True, text=True)
        if made.returncode and "sanit" in made.stderr.lower():
            pytest.skip("the compiler has no sanitizers")
        assert made.returncode == 0, made.stderr
        return subprocess.run([program], capture_output=True, text=True)

    done = run(build.HERE)
    assert done.returncode == 0, done.stderr[:3000]
    assert int(done.stdout.split()[0]) > 300
    for part in (*build.SOURCES, build.HEADER):  # and the check sees one step too far
        text = (build.HERE / part).read_text(encoding="utf-8")
        (tmp_path / part).write_text(text.replace("i < d; i++) out[i] = -gammas", "i <= d; i++) out[i] = -gammas"))
    assert "heap-buffer-overflow" in run(tmp_path).stderr

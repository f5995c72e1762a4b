"""Codes without noise: walkers from the truth stay below what the best estimator errs, and reach it."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm

from qleak import random
from qleak.bounds import Setting, bound_of, chord, natural
from qleak.bounds.cells import Cells, cells, columns, moved, section
from qleak.bounds.jacobian import jacobian, of_function, select, update_of
from qleak.catalog import build
from qleak.client import gradient
from qleak.models import lenet


def uniform(*path, shape):
    return random.uniform(random.generator("chord", *path), shape).double()


def cut(a, x, step, prior, shift=0.0, stretch=1.0, box=False):
    """The section of a linear update ax `[d]` that is rounded to multiples of `step`, at image x `[n]`."""
    at = a @ x
    middle = ((at - shift) / step).round() * step + shift
    half = stretch * step / 2
    found = Cells({"y": at}, {"y": middle - half}, {"y": middle + half}, [])
    image = x.reshape(1, *prior.shape)
    return section(of_function(lambda v: {"y": a @ v.flatten()}, image), found, image, prior, box)


def flat(n):
    return natural((1, 1, n), std=1e4, exponent=0.0)


# --- against exact answers ---


def test_of_a_box_chords_are_the_answer_and_walkers_attain_it():
    n, steps = 60, torch.linspace(0.05, 0.1, 60).double()
    turn = torch.linalg.qr(uniform("turn", shape=(n, n)) - 0.5)[0]
    part = cut(turn, uniform("x", shape=(n,)), steps, flat(n))
    assert np.allclose(np.sort(chord.chords(part)), steps, rtol=1e-3)
    found = [chord.errors(part, (n,), 10, random.generator("box", i)) for i in range(20)]
    mean = np.mean([e.mse for e in found])
    assert mean == pytest.approx(float(steps.square().mean()) / 12, rel=0.1)
    assert found[0].mc_error == pytest.approx(np.std([e.mse for e in found]), rel=0.5)


ROWS, PIXELS, STEP = 10, 3, 0.8


def small_polytopes(count, stretch=1.0, sweeps=(1, 12)):
    """(posterior mean's error by rejection, chords' bound, walkers' bounds) on average over images of [0, 1]³."""
    sums = []
    a = uniform("a", shape=(ROWS, PIXELS)) * 2 - 1
    cube = uniform("cube", shape=(40_000, PIXELS))
    seen = cube @ a.T
    for i in range(count):
        x, shift = uniform("x", i, shape=(PIXELS,)), uniform("shift", i, shape=(ROWS,))
        code = ((a @ x - shift) / STEP).round()
        same = cube[(((seen - shift) / STEP).round() == code).all(1)]
        if len(same) < 30:
            continue
        part = cut(a, x, STEP, flat(PIXELS), shift, stretch, box=True)
        # The spread, which the mean of few draws shows as much as that of many.
        exact = float(same.var(0).sum())
        walks = [PIXELS * chord.errors(part, (PIXELS,), s, random.generator("p", i)).mse for s in sweeps]
        sums.append((exact, float((chord.chords(part) ** 2).sum()) / 12, *walks))
    assert len(sums) > 0.8 * count
    table = np.array(sums)
    return table.mean(0), table.std(0) / math.sqrt(len(table))


def test_no_bound_is_above_the_best_estimator_of_a_small_polytope():
    (exact, chords, short, long), (_, _, off, far) = small_polytopes(120)
    assert chords < exact and short < exact + 2 * off
    assert long == pytest.approx(exact, abs=3 * far) and chords < 0.7 * exact


def test_cells_that_are_too_wide_would_be_seen():
    (exact, _, long), (_, _, far) = small_polytopes(60, stretch=1.5, sweeps=(12,))
    assert long > exact + 3 * far


def test_with_a_prior_the_truth_is_a_draw_of_the_gaussian_in_its_cells():
    """y = x₁ + x₂ in a half-line or a cell: the spread by weighted draws of the prior."""
    prior = natural((1, 1, 2), std=0.5)
    a, draws = torch.tensor([[1.0, 1.0]]).double(), prior.draw(random.generator("d"), 4000).flatten(1)
    total = (draws @ a.T)[:, 0]
    for lo, hi in ((1.3, math.inf), (0.9, 1.2)):
        inside = draws[(total > lo) & (total < hi)]
        found = []
        for i, x in enumerate(inside[:50]):
            ends = [torch.tensor([v], dtype=torch.float64) for v in (lo, hi)]
            known = Cells({"y": a @ x}, {"y": ends[0]}, {"y": ends[1]}, [])
            image = x.reshape(1, 1, 1, 2)
            part = section(of_function(lambda v: {"y": a @ v.flatten()}, image), known, image, prior, False)
            found.append(2 * chord.errors(part, (2,), 15, random.generator("w", i)).mse)
        spread = float(inside.var(0).sum())
        assert np.mean(found) == pytest.approx(spread, abs=4 * np.std(found) / math.sqrt(len(found)))


def test_draws_on_a_chord_follow_the_cut_gaussian():
    for low, high, a, b in (
        (-1.0, 2.0, 1.0, 0.3),
        (-0.5, 0.1, 4.0, 30.0),
        (-1e-3, 2e-3, 9.0, -4.0),
        (-2.0, 9.0, 1.0, -40.0),
    ):
        law = truncnorm(low * a**0.5 + b / a**0.5, high * a**0.5 + b / a**0.5, -b / a, 1 / a**0.5)
        for p in (0.01, 0.3, 0.5, 0.97):
            assert chord._draw(low, high, a, b, p) == pytest.approx(law.ppf(p), abs=2e-3 * (high - low))
        assert law.cdf(chord._draw(low, high, a, b, None)) == pytest.approx(1 - law.cdf(0.0), abs=2e-3)


# --- of a network's messages ---


@pytest.fixture(scope="module")
def small():
    """A small LeNet, its weights, one image with a black corner and its label."""
    model = lenet(channels=1, size=8, width=3, classes=4)
    params, buffers = model.init(random.generator("net"))
    x = random.uniform(random.generator("image"), (1, 1, 8, 8))
    x[..., :2, :3] = 0
    return Setting(gradient(), model, params, buffers), x, torch.tensor([2])


def sent(setting, x, y, spec):
    channel = build("channels", f"chain({spec})")
    rows = update_of(*setting, y)(x)
    noise = channel.draw(random.generator("message"), setting.params)
    message = channel.send(channel.knobs(), rows, noise, channel.init(setting.params), setting.params)[0][-1]
    return channel, rows, message


def test_rows_along_directions_are_those_of_the_jacobian(small):
    setting, x, y = small
    channel, rows, message = sent(setting, x, y, "uniform(levels=16)")
    found, jac = cells(channel, rows, setting.params, message), jacobian(*setting, x, y)
    part = section(jac, found, x, natural((1, 8, 8)))
    # Black pixels and the ends of every tensor's grid stay as they are.
    assert np.abs(part.V[(x == 0).flatten().numpy()]).max() == 0 and len(found.clear) == 2 * len(rows)
    ends = {k: torch.tensor([int(v.argmin()), int(v.argmax())]) for k, v in rows.items()}
    still = select(jac, ends).numpy() @ part.V
    loud = select(jac, {k: torch.arange(4) for k in rows}).numpy() @ part.V
    assert np.abs(still).max() < 1e-6 * np.abs(loud).max()
    some, places = np.array([3, 0, 7]), np.arange(0, len(part.u), 5)
    whole = columns(part, some)
    assert (
        np.allclose(whole[:, places], columns(part, some, places)) and (np.abs(whole) <= part.reach * (1 + 1e-9)).all()
    )
    assert np.allclose(moved(part, some, np.array([1.0, -2.0, 0.5])), np.array([1.0, -2.0, 0.5]) @ whole)
    # A step into one of them changes the numbers as the rows say.
    moved_by = 1e-4 * torch.from_numpy(part.V[:, 2] / np.abs(part.V[:, 2]).max()).reshape(x.shape)
    double = {k: v.double() for k, v in setting.params.items()}
    update = update_of(setting.client, setting.model, double, setting.buffers, y)
    up, down = update(x.double() + moved_by), update(x.double() - moved_by)
    name = "fc.weight"
    half = (found.hi[name] - found.lo[name]).double() / 2
    expected = ((up[name] - down[name]) / 2 / half).flatten().numpy()
    mine = columns(part, np.array([2]))[0] * 1e-4 / np.abs(part.V[:, 2]).max()
    start = len(part.u) - expected.size
    assert np.allclose(mine[start:], expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())


def test_a_walk_that_looks_at_near_rows_is_the_walk_that_looks_at_all(small, monkeypatch):
    setting, x, y = small
    channel, rows, message = sent(setting, x, y, "uniform(levels=64)")
    part = section(jacobian(*setting, x, y), cells(channel, rows, setting.params, message), x, natural((1, 8, 8)))
    few = chord.walk(part, 3, random.generator("walk"))
    monkeypatch.setattr(chord, "NEAR", 1)
    assert np.allclose(few, chord.walk(part, 3, random.generator("walk")), rtol=1e-6, atol=1e-9)
    u = part.u + sum(moved(part, np.array([k]), few[[k]]) for k in range(len(few)))
    assert np.abs(u).max() <= 1 + 1e-9 and np.abs(few).min() > 0


def test_bounds_of_codes_and_what_is_none(small):
    setting, x, y = small
    prior = natural((1, 8, 8))
    jac = jacobian(*setting, x, y)

    def both(spec):
        channel, _, message = sent(setting, x, y, spec)
        return bound_of(setting, channel, x, y, prior, message, ("chord", "local"), jac)

    psnrs = []
    for levels in (4, 256):
        walked, line = both(f"uniform(levels={levels})")
        assert line.estimate and not walked.estimate and walked.map.shape == x.shape and not walked.why
        psnrs.append(walked.psnr)
    assert psnrs == sorted(psnrs) and psnrs[0] + 15 < psnrs[-1]
    for spec in ("sign()", "float8()", "clip_l2(0.1), uniform(levels=16)"):
        assert 0 < both(spec)[0].mse < float(prior.values.mean()), spec
    for spec in ("gaussian(0.1, unbounded=True)", "stochastic(levels=16)"):
        walked, line = both(spec)
        assert "without noise" in walked.why and not line.estimate
    assert both("top_k(ratio=0.5), uniform(levels=16)")[0].why

"""The two sets of equations in front of a convolution: operators against matrices, both preconditioners, minimum norm."""

import pytest
import torch
import torch.nn.functional as F

from qleak import random, tree
from qleak.attacks import layer_systems
from qleak.attacks.layer_systems import System, backward
from qleak.catalog import build
from qleak.models.layers import conv

KINDS = [(3, 5, 2, 2, 8), (2, 3, 1, 1, 6), (2, 4, 3, 1, 9), (1, 5, 2, 0, 9)]  # in, kernel, stride, padding, size


def drawn(*shape, name="x"):
    return random.normal(random.generator(name, *shape), shape).double()


def system(cin, kernel, stride, padding, size, out=4, known=1.0):
    """A drawn system of which a share `known` of the units has a forward equation, and its unknowns."""
    h, weight = drawn(cin, size, size, name="h"), drawn(out, cin, kernel, kernel, name="k")
    z = F.conv2d(h[None], weight, stride=stride, padding=padding)[0]
    scale = random.uniform(random.generator("s"), z.shape).double() + 0.5
    scale = scale * (random.uniform(random.generator("known"), z.shape) < known)
    layer = conv("c", cin, out, kernel, stride, padding)
    block = layer_systems._coefficients(layer, (1, *h.shape), drawn(1, *z.shape, name="d"))
    return System(weight, scale, scale * z, block, h.flatten(1) @ block.mT, tuple(h.shape), stride, padding), h


def matrices(s):
    """A and I ⊗ T as matrices, column by column."""
    units = torch.eye(s.target.new_zeros(s.shape).numel(), dtype=torch.float64).view(-1, *s.shape)
    forward = torch.stack([s.forward(u).flatten() for u in units], 1)
    return forward, torch.block_diag(*[s.block] * s.shape[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_adjoint_is_one(kind):
    s, h = system(*kind)
    w = drawn(*s.target.shape, name="w")
    assert torch.allclose((s.forward(h) * w).sum(), (h * s.adjoint(w)).sum())
    (expected,) = torch.func.vjp(lambda v: F.conv2d(v[None], s.kernel, stride=s.stride, padding=s.padding)[0], h)[1](w)
    assert torch.allclose(backward(w, s.kernel, s.shape, s.stride, s.padding), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [1.0, 0.4, 0.0])
def test_both_preconditioners_invert_the_normal_matrix(kind, known):
    """Against the matrix itself; a matrix without the second set is another one."""
    s, _ = system(*kind, known=known)
    forward, block = matrices(s)
    normal = forward.mT @ forward + block.mT @ block
    mean = normal.diagonal().mean()
    shifted = normal + layer_systems.SHIFT * mean * torch.eye(len(normal), dtype=torch.float64)
    v = shifted @ drawn(*s.shape, name="v").flatten()
    expected = drawn(*s.shape, name="v")
    exact = layer_systems._woodbury(s, mean)(v.view(s.shape))
    assert torch.allclose(exact, expected, atol=1e-6)
    rough = layer_systems._cholesky(s, mean)(v.view(s.shape))
    assert float((shifted @ rough.flatten() - v).norm() / v.norm()) < 1e-3
    alone = layer_systems._woodbury(s._replace(block=0 * s.block), mean)(v.view(s.shape))
    assert not torch.allclose(alone, expected, atol=1e-2)


@pytest.mark.parametrize(("few", "close"), [(0, 1e-6), (10**9, 1e-3)])  # Woodbury in float64, Cholesky in float32
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_lead_to_the_solution_of_minimum_norm(kind, few, close, monkeypatch):
    """2 output channels, a third of their units known: fewer equations than unknowns in most of these layers."""
    monkeypatch.setattr(layer_systems, "FEW", few)
    s, h = system(*kind, out=2, known=0.3)
    forward, block = matrices(s)
    rows, goals = torch.cat([forward, block]), torch.cat([s.target.flatten(), s.goal.flatten()])
    expected = torch.linalg.pinv(rows, rtol=1e-8) @ goals
    found = layer_systems._least_squares(s, 1e-12)
    assert float((found.flatten() - expected).norm() / expected.norm()) < close
    short = int(torch.linalg.matrix_rank(rows, rtol=1e-8)) < rows.shape[1]
    assert bool((found - h).norm() > 1e-2 * h.norm()) == short


def test_few_known_units_take_the_other_way(monkeypatch):
    taken = []
    for name in ("_cholesky", "_woodbury"):
        true = getattr(layer_systems, name)
        monkeypatch.setattr(layer_systems, name, lambda *a, name=name, true=true: taken.append(name) or true(*a))
    for known in (1.0, 0.1):
        layer_systems._least_squares(system(2, 3, 1, 1, 6, known=known)[0], 1e-10)
    assert taken == ["_cholesky", "_woodbury"]


def test_a_colour_photograph_comes_back():
    """The LeNet of Zhu et al. on 32×32×3: > 90 dB from the exact gradient, as by the older dense route; one CPU second."""
    from qleak import data
    from qleak.attacks.closed_form import solve
    from qleak.client import gradient
    from qleak.metrics import psnr

    net, photos = build("models", "lenet()"), data.load("photos")
    params = net.init(random.generator(0, "params"))[0]
    update = gradient().update(net, params, {}, photos.x[:1], photos.y[:1])
    found, residual = solve(net.layers, net.shape, params, update)
    assert float(psnr(found.float(), photos.x[:1])) > 90
    assert float(residual) < 1e-4
    # the broken variant: the weight gradients of another photograph
    wrong = gradient().update(net, params, {}, photos.x[1:2], photos.y[:1])
    mixed = {k: wrong[k] if k == "conv1.weight" else v for k, v in update.items()}
    assert float(psnr(solve(net.layers, net.shape, params, mixed)[0].float(), photos.x[:1])) < 40
    assert tree.count(update) == tree.count(params)

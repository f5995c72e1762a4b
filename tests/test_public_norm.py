"""Batch norm by public images: each mode against formulas written out, and which of them keep examples apart."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from qleak import data, models, random, tree
from qleak.catalog import build
from qleak.channels import chain, clip_l2, gaussian, total
from qleak.check import Expected
from qleak.client import per_example, slope
from qleak.client.losses import one_hot
from qleak.engine import training
from qleak.models import lenet5, public, public_norm, resnet
from qleak.plans import Training
from qleak.private import chunks, taps

K, B = 6, 4
APART = ("example+public", "public", "public-detached")


@pytest.fixture
def held(monkeypatch):
    """Public images of the nets under test, made up."""
    x = random.uniform(random.generator("public"), (K, 1, 16, 16))
    monkeypatch.setattr(public, "images", lambda *given: x)
    return x.double()


def small(norm="batch"):
    return lenet5(size=16, function="relu", pool="max", norm=norm)


def batch(b=B):
    x = random.uniform(random.generator("x"), (b, 1, 16, 16)).double()
    return x, torch.arange(b) % 10


def weights(model):
    params, buffers = model.init(random.generator(0))
    return tree.to(params, torch.float64), tree.to(buffers, torch.float64)


def by_hand(p, x, pub, mode):
    """The forward pass of LeNet-5 with its four batch norms written out; indices of `nn.Sequential`."""
    b = len(x)

    def norm(h, q):
        over = [0, *range(2, h.ndim)]
        seen = {"joint": torch.cat([h, q]), "public": q, "public-detached": q.detach()}[mode]
        mean, var = seen.mean(over, keepdim=True), seen.var(over, correction=0, keepdim=True)
        return (h - mean) / (var + 1e-5).sqrt(), (q - mean) / (var + 1e-5).sqrt()

    h, q = x, pub
    for i, padding in ((0, 2), (4, 0)):
        h, q = (F.relu(F.conv2d(v, p[f"{i}.weight"], p[f"{i}.bias"], padding=padding)) for v in (h, q))
        h, q = (F.max_pool2d(v, 2) for v in norm(h, q))
    h, q = h.flatten(1), q.flatten(1)
    for i in (9, 12):
        h, q = norm(*(F.relu(F.linear(v, p[f"{i}.weight"], p[f"{i}.bias"])) for v in (h, q)))
    assert len(h) == b
    return F.linear(h, p["15.weight"], p["15.bias"])


@pytest.mark.parametrize("mode", public.MODES)
def test_each_mode_is_its_formula(held, mode):
    model = public_norm(small(), mode, public_size=K)
    params, buffers = weights(model)
    x, y = batch()

    def wanted(p, x):
        if mode == "example+public":
            return torch.cat([by_hand(p, one[None], held, "joint") for one in x])
        return by_hand(p, x, held, mode)

    assert torch.allclose(model.apply(params, buffers, x), wanted(params, x), atol=1e-10)

    def loss(p):
        return F.cross_entropy(wanted(p, x), y)

    given = slope(model, buffers)(params, x, one_hot(y, 10, torch.float64))
    mine = grad(loss)(params)
    assert all(torch.allclose(given[k], mine[k], atol=1e-9) for k in params)
    other = {"public": "public-detached", "public-detached": "public"}.get(mode, "public")
    broken = grad(lambda p: F.cross_entropy(by_hand(p, x, held, other), y))(params)
    assert not all(torch.allclose(given[k], broken[k], atol=1e-4) for k in params)  # the test can tell modes apart


def rows_move(model):
    """How far rows 1 … of the gradients of single losses move when image 0 is another one."""
    params, buffers = weights(model)
    x, y = batch()
    z = x.clone()
    z[0] = 1 - z[0]

    def row(x, which):
        return grad(lambda p: F.cross_entropy(model.apply(p, buffers, x), y, reduction="none") @ which)(params)

    each = torch.eye(B, dtype=torch.float64)
    before, after = (vmap(lambda e, v=v: row(v, e))(each) for v in (x, z))
    assert max(float((before[k][0] - after[k][0]).abs().max()) for k in before) > 1e-4
    return max(float((before[k][1:] - after[k][1:]).abs().max()) for k in before)


@pytest.mark.parametrize("mode", APART)
def test_examples_are_kept_apart(held, mode):
    model = public_norm(small(), mode, public_size=K)
    assert model.couples == "" and rows_move(model) < 1e-12


def test_joint_statistics_and_a_batchs_own_couple_examples(held):
    for model in (public_norm(small(), "joint", public_size=K), small()):
        assert model.couples and rows_move(model) > 1e-4
        assert model.tapped is None
    assert rows_move(small("layer")) < 1e-12 and rows_move(small("group")) < 1e-12


def test_the_public_pass_is_made_once_for_all_examples(held):
    model = public_norm(small(), "public-detached", public_size=K)
    params, buffers = weights(model)
    x, _ = batch(64)
    seen = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "convolution" in str(func) and "backward" not in str(func):
                seen.append(args[0].shape[0] if args[0].ndim == 4 else args[0].shape[:2])
            return func(*args, **(kwargs or {}))

    with Counting():
        vmap(lambda a: model.apply(params, buffers, a[None])[0])(x)
    assert seen.count(K) == 2 and len(seen) == 4  # two convolutions of the public batch, two of the examples


@pytest.mark.parametrize("affine", [False, True])
def test_taps_give_the_clipped_sum_of_vmapped_gradients(held, affine):
    net = resnet(depth=8, width=2, size=16, channels=1) if affine else small()
    model = public_norm(net, "public-detached", public_size=K)
    assert model.tapped is not None
    params, buffers = weights(model)
    x, y = batch(5)
    stage = clip_l2(0.5)
    knobs = {k: torch.tensor(v, dtype=torch.float64) for k, v in stage.knobs.items()}
    target = one_hot(y, 10, torch.float64)
    found = [way.clipped_sum(model, params, buffers, x, target, stage.shrink, knobs) for way in (taps, chunks)]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-9)
    assert all(torch.allclose(found[0][0][k], found[1][0][k], atol=1e-9) for k in params)
    one = per_example(5).update(model, params, buffers, x, y)
    norms = torch.stack([v.flatten(1).square().sum(1) for v in one.values()]).sum(0).sqrt()
    assert torch.allclose(found[0][1], norms, atol=1e-9)


def test_one_image_alone_is_classified_as_in_company(held):
    for mode in APART:
        model = public_norm(small(), mode, public_size=K)
        params, buffers = weights(model)
        x, _ = batch()
        whole = model.apply(params, buffers, x)
        assert torch.allclose(torch.cat([model.apply(params, buffers, a[None]) for a in x]), whole, atol=1e-10)
        assert model.apply(params, buffers, x[:0]).shape == (0, 10)


def test_nets_of_the_original():
    for norm in ("none", "batch", "layer", "group"):
        model = lenet5(function="relu", pool="max", norm=norm)
        assert tree.count(model.init(random.generator(0))[0]) == 61_706
    plain = lenet5()
    assert list(plain.init(random.generator(0))[0])[2] == "3.weight"  # stored weights of older runs still fit
    p, b = weights(small("layer"))
    h = F.relu(F.conv2d(batch()[0], p["0.weight"], p["0.bias"], padding=2))
    h = F.max_pool2d(F.layer_norm(h, h.shape[1:]), 2)
    h = F.relu(F.conv2d(h, p["4.weight"], p["4.bias"]))
    h = F.max_pool2d(F.layer_norm(h, h.shape[1:]), 2).flatten(1)
    for i in (9, 12):
        h = F.relu(F.linear(h, p[f"{i}.weight"], p[f"{i}.bias"]))
        h = F.layer_norm(h, h.shape[1:])
    wanted = F.linear(h, p["15.weight"], p["15.bias"])
    assert torch.allclose(small("layer").apply(p, b, batch()[0]), wanted, atol=1e-10)
    bare = models.resnet18(width=4, affine=False)
    assert not any("norm" in k for k in bare.init(random.generator(0))[0])
    assert models.resnet18(width=4, norm="layer").couples == ""


def test_what_does_not_fit_is_one_line():
    with pytest.raises(Expected, match="with batch norm"):
        public_norm(lenet5())
    model = public_norm(public="kmnist")
    with pytest.raises(Expected, match=r"stand-in .* public=fashion_mnist") as error:
        model.public()
    assert "\n" not in str(error.value)
    with pytest.raises(Expected, match="shape"):
        public_norm(public="photos").public()
    with pytest.raises(Expected, match="skip"):
        public_norm(public="mnist5k", skip=5000).public()
    spec = public_norm(mode="joint", public_size=30).spec
    assert build("models", spec).spec == spec


def plan(model, channels=(), **more):
    channels = channels or (chain(clip_l2(1.0), total()),)
    return Training(model, "mnist5k", channels, per_example(8), epochs=1, seeds=1, limit=200, **more)


def test_public_images_are_not_trained_on():
    with pytest.raises(Expected, match=r"of 50 are \d+ of the 200 training images"):
        training._fits(plan(public_norm(public="mnist5k", public_size=50)))
    held_out = data.load("mnist5k").x[4:5]  # every fifth image is tested on
    assert len(held_out)
    training._fits(plan(public_norm(public="mnist5k", public_size=1, skip=4)))


def test_a_guarantee_needs_examples_that_are_apart(held):
    noisy = (chain(clip_l2(1.0), total(), gaussian(1.0)),)
    for model in (public_norm(mode="joint"), lenet5(function="relu", norm="batch"), models.resnet(channels=1, size=28)):
        with pytest.raises(Expected, match=r"no guarantee: batch norm .*mode='public-detached'"):
            plan(model, noisy)
        plan(model)  # without noise nothing is promised
    plan(public_norm(mode="public-detached"), noisy)
    plan(lenet5(norm="group"), noisy)

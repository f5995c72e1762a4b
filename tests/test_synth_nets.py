"""Nets of private data generation: their sizes, their padding, their norms, and that teachers run as lanes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from qleak import random, tree
from qleak.catalog import build, catalog
from qleak.check import Expected
from qleak.synth import critics, layers, makers
from qleak.types import Public

MNIST = Public(60_000, (1, 28, 28), 10)
CELEBA = Public(100_000, (3, 64, 64), 2)
SMALL = Public(1_000, (1, 8, 8), 10)
COLOUR = Public(100, (3, 12, 8), 3)
CRITICS = (
    "dcgan_critic(4, 8)",
    "dcgan_critic(4, 8, wgan=True)",
    "projection_critic",
    "linear_critic",
    "simple_critic(8)",
)
MAKERS = ("dcgan_maker(4, 8, z_dim=5)", "dcgan_maker(4, 8, tanh=True)", "mlp_maker(8)", "simple_maker(8)")


def gen(*path):
    return random.generator("test_synth_nets", *path)


def images(public, n, *path):
    x = random.uniform(gen("x", *path), (n, *public.shape))
    return x, F.one_hot(random.integers(gen("y", *path), public.classes, (n,)), public.classes).float()


def noise(maker, n, *path):
    return 2 * random.uniform(gen("z", *path), (n, maker.z_dim)) - 1


def filled(params, *path):
    """Every parameter moved from where it starts, so that biases and zeros take part."""
    g = gen("filled", *path)
    return {k: v + 0.3 * random.normal(g, v.shape) for k, v in params.items()}


@pytest.mark.parametrize(
    ("critic", "public", "count"),
    [
        (critics.dcgan_critic(), MNIST, 555_655),  # what the published net has
        # conv 5·5·25 + 5, conv 7·34·25 + 34, norm, linear 256·(34·16·16 + 2) + 256, norm, linear 258 + 1
        (critics.dcgan_critic(), CELEBA, 630 + 5_984 + 68 + 2_228_992 + 512 + 259),
        (critics.dcgan_critic(wgan=True), MNIST, 555_655 - 2 * 42 - 2 * 256),
        (critics.linear_critic(), SMALL, 650),
        (critics.projection_critic(16), SMALL, 64 * 16 + 16 + 10 * 16 + 16 + 1),
        (critics.simple_critic(128, 2), SMALL, 74 * 128 + 128 + 128 * 128 + 128 + 128 + 1),
    ],
)
def test_critics_have_as_many_parameters_as_their_formula_says(critic, public, count):
    assert tree.count(critic.init(gen(), public)) == count


@pytest.mark.parametrize(
    ("maker", "public", "count"),
    [
        # fc 60·1024 + 1024, norm, fc 1034·6272 + 6272, norm, deconv 138·128·25 + 128, norm, deconv 138·25 + 1
        (makers.dcgan_maker(), MNIST, 62_464 + 2_048 + 6_491_520 + 12_544 + 441_728 + 256 + 3_451),
        # fc 102·1024 + 1024, norm, fc 1026·32768 + 32768, norm, deconv 130·128·25 + 128, norm, deconv 130·3·25 + 3
        (makers.dcgan_maker(z_dim=100), CELEBA, 105_472 + 2_048 + 33_652_736 + 65_536 + 416_128 + 256 + 9_753),
        (makers.mlp_maker(), SMALL, 42 * 256 + 256 + 512 + 256 * 256 + 256 + 512 + 256 * 64 + 64),
    ],
)
def test_makers_have_as_many_parameters_as_their_formula_says(maker, public, count):
    assert tree.count(maker.init(gen(), public)) == count
    if "dcgan" in maker.spec:
        assert f"{count:,}" in (makers.dcgan_maker.__doc__ or "")


def test_the_weights_start_as_published():
    params = critics.dcgan_critic().init(gen(), MNIST)
    weight = params["conv2.weight"]
    assert weight.abs().max() <= 0.04 and weight.abs().max() > 0.0395  # cut at two standard deviations
    assert abs(float(weight.std()) - 0.02 * 0.8796) < 2e-4  # the deviation of what is left: √(1 − 4φ(2)/(2Φ(2) − 1))
    assert abs(float(params["fc1.weight"].std()) - 0.02) < 1e-4 and float(params["fc1.weight"].abs().max()) > 0.06
    again = critics.dcgan_critic().init(gen(), MNIST)
    assert all(torch.equal(params[k], again[k]) for k in params)
    assert not torch.equal(critics.dcgan_critic().init(gen("other"), MNIST)["fc1.weight"], params["fc1.weight"])


def same(x, weight, stride=2):
    """TensorFlow's SAME, by its definition: total padding max((⌈n/s⌉ − 1)s + k − n, 0), the smaller half in front."""
    pads = []
    for n in (x.shape[3], x.shape[2]):
        total = max((math.ceil(n / stride) - 1) * stride + weight.shape[2] - n, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride)


@pytest.mark.parametrize("side", [2, 8, 14])
def test_convolutions_are_padded_as_tensorflow_does(side):
    x, weight = random.normal(gen("a"), (2, 3, side, side)).double(), random.normal(gen("w"), (4, 3, 5, 5)).double()
    params = {"c.weight": weight, "c.bias": torch.zeros(4).double()}
    got = layers.conv(params, "c", x)
    assert torch.allclose(got, same(x, weight), atol=1e-12)
    torch_way = F.conv2d(x, weight, stride=2, padding=2)
    assert got.shape == torch_way.shape and not torch.allclose(got, torch_way)  # two rows in front are another net


def test_deconvolution_is_the_transpose_of_that_convolution():
    x, h = random.normal(gen("a"), (2, 3, 8, 6)).double(), random.normal(gen("h"), (2, 4, 4, 3)).double()
    weight = random.normal(gen("w"), (4, 3, 5, 5)).double()
    up = layers.deconv({"d.weight": weight, "d.bias": torch.zeros(3).double()}, "d", h)
    assert up.shape == x.shape
    assert math.isclose(float((up * x).sum()), float((h * same(x, weight)).sum()), rel_tol=1e-10)
    shifted = F.conv_transpose2d(h, weight, stride=2, padding=2, output_padding=1)  # the usual way of torch
    assert not math.isclose(float((shifted * x).sum()), float((h * same(x, weight)).sum()), rel_tol=1e-3)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)])
def test_batch_norm_is_torchs_by_the_batch(shape):
    h = 3 * random.normal(gen("h"), shape) + 1
    scale, shift = random.normal(gen("s"), (3,)), random.normal(gen("b"), (3,))
    got = layers.batch_norm({"n.weight": scale, "n.bias": shift}, "n", h)
    assert torch.allclose(got, F.batch_norm(h, None, None, scale, shift, training=True, eps=1e-5), atol=1e-5)


@pytest.mark.parametrize("spec", CRITICS)
@pytest.mark.parametrize("public", [SMALL, COLOUR], ids=["8x8", "colour"])
def test_teachers_run_as_lanes(spec, public):
    critic = build("critics", spec)
    rows = [filled(critic.init(gen("teacher", i), public), i) for i in range(3)]
    data = [images(public, 5, i) for i in range(3)]
    x, y = torch.stack([d[0] for d in data]), torch.stack([d[1] for d in data])

    def loss(params, x, y):
        return F.softplus(-critic.apply(params, x, y)).mean()

    by_weights, by_images = grad(loss), grad(loss, argnums=1)
    lanes = vmap(by_weights)(tree.stack(rows), x, y)
    pixels = vmap(by_images, in_dims=(0, None, None))(tree.stack(rows), x[0], y[0])  # the same fakes for every teacher
    assert pixels.shape == (3, 5, *public.shape) and pixels.abs().amax((1, 2, 3, 4)).min() > 0
    for i, params in enumerate(rows):
        assert critic.apply(params, *data[i]).shape == (5,)
        alone = by_weights(params, *data[i])
        assert all(torch.allclose(lanes[k][i], alone[k], atol=1e-5) for k in alone)
        assert torch.allclose(pixels[i], by_images(params, x[0], y[0]), atol=1e-5)


@pytest.mark.parametrize("spec", CRITICS)
def test_critics_see_the_label_and_the_image(spec):
    critic = build("critics", spec)
    params = filled(critic.init(gen(), SMALL))
    x, y = images(SMALL, 4)
    here = critic.apply(params, x, y)
    assert not torch.allclose(here, critic.apply(params, x, y.roll(1, 1)))
    assert not torch.allclose(here, critic.apply(params, x.flip(0), y))


def test_a_critic_with_norms_couples_a_batch_and_the_others_do_not():
    x, y = images(SMALL, 4)
    coupled = {}
    for spec in CRITICS:
        critic = build("critics", spec)
        params = filled(critic.init(gen(), SMALL))
        alone = critic.apply(params, x[:2], y[:2])
        coupled[spec] = not torch.allclose(critic.apply(params, x, y)[:2], alone, atol=1e-5)
    assert [spec for spec in CRITICS if coupled[spec]] == ["dcgan_critic(4, 8)"]


def test_the_linear_critic_learns_real_means_less_fake_means():
    critic = critics.linear_critic()
    params = critic.init(gen(), SMALL)
    real, y = images(SMALL, 20, "real")
    fake = images(SMALL, 20, "fake")[0]

    def loss(params):
        return F.softplus(-critic.apply(params, real, y)).mean() + F.softplus(critic.apply(params, fake, y)).mean()

    step = grad(loss)(params)["classes.weight"]
    assert torch.allclose(-step, y.T @ (real - fake).flatten(1) / (2 * 20), atol=1e-6)


def test_the_projection_critic_is_its_formula():
    params = filled(critics.projection_critic(16).init(gen(), SMALL))
    x, y = images(SMALL, 3)
    h = F.leaky_relu(x.flatten(1) @ params["hidden.weight"].T + params["hidden.bias"], 0.2)
    want = [
        float(h[i] @ params["classes.weight"][int(y[i].argmax())] + h[i] @ params["out.weight"][0] + params["out.bias"])
        for i in range(3)
    ]
    got = critics.projection_critic(16).apply(params, x, y)
    assert torch.allclose(got, torch.tensor(want), atol=1e-5)


def test_only_the_wasserstein_critic_is_clipped():
    assert critics.dcgan_critic(wgan=True, clip=0.05).clipped == 0.05
    assert all(build("critics", spec).clipped == 0 for spec in CRITICS if "wgan" not in spec)


@pytest.mark.parametrize("spec", MAKERS)
@pytest.mark.parametrize("public", [SMALL, COLOUR], ids=["8x8", "colour"])
def test_makers_make_images_of_any_shape(spec, public):
    maker = build("makers", spec)
    params = filled(maker.init(gen(), public))
    z, y = noise(maker, 6), images(public, 6)[1]
    x = maker.apply(params, z, y)
    assert x.shape == (6, *public.shape) and 0 <= x.min() < x.max() <= 1
    assert not torch.allclose(x, maker.apply(params, z, y.roll(1, 1)))
    steps = grad(lambda p: maker.apply(p, z, y).square().sum())(params)
    dead = {k for k, v in steps.items() if float(v.abs().max()) < 1e-6}
    in_front_of_norms = {"fc1.bias", "fc2.bias", "deconv1.bias"} if "dcgan" in spec else {"fc0.bias", "fc1.bias"}
    assert dead <= in_front_of_norms  # a norm by the batch takes any constant away


def test_only_makers_without_norms_make_every_image_by_itself():
    for spec in MAKERS:
        maker = build("makers", spec)
        params = filled(maker.init(gen(), SMALL))
        z, y = noise(maker, 6), images(SMALL, 6)[1]
        alike = torch.allclose(maker.apply(params, z, y)[:3], maker.apply(params, z[:3], y[:3]), atol=1e-6)
        assert alike == (spec == "simple_maker(8)")


def test_a_maker_can_follow_an_image():
    """A few steps of plain descent bring each maker closer to given pictures, so its gradients point the right way."""
    target, y = images(SMALL, 8)
    for spec in ("dcgan_maker(8, 16)", "mlp_maker(32)", "simple_maker(32)"):
        maker = build("makers", spec)
        params, z = maker.init(gen(), SMALL), noise(maker, 8)

        def loss(p, maker=maker, z=z):
            return (maker.apply(p, z, y) - target).square().mean()

        before = float(loss(params))
        for _ in range(40):
            params = tree.zip_map(lambda p, g: p - 2.0 * g, params, grad(loss)(params))
        assert float(loss(params)) < 0.9 * before, spec


@pytest.mark.parametrize("room", ["critics", "makers"])
def test_every_net_works_without_arguments(room):
    for name in catalog(room):
        net = build(room, name)
        assert build(room, net.spec).spec == net.spec
        assert net.init(gen(), SMALL)


def test_bad_sizes_are_named():
    odd = Public(10, (1, 10, 8), 2)
    with pytest.raises(Expected, match="multiples of 4 for dcgan_critic, got 10x8"):
        critics.dcgan_critic().init(gen(), odd)
    with pytest.raises(Expected, match="multiples of 4 for dcgan_maker"):
        makers.dcgan_maker().init(gen(), odd)
    for make, bad in [
        (critics.dcgan_critic, {"df_dim": 0}),
        (critics.dcgan_critic, {"clip": 0.0}),
        (critics.projection_critic, {"hidden": 0}),
        (critics.linear_critic, {"centre": 2.0}),
        (critics.simple_critic, {"depth": 1.5}),
        (makers.dcgan_maker, {"z_dim": 0}),
        (makers.mlp_maker, {"layers": 0}),
        (makers.simple_maker, {"hidden": -1}),
    ]:
        with pytest.raises(Expected, match=f"Expected {next(iter(bad))}="):
            make(**bad)

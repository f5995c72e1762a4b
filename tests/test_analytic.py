"""Attacks that solve instead of searching: division by the bias gradient, and the closed form of ReLU nets."""

from dataclasses import replace

import pytest
import torch

from qleak import random, tree
from qleak.attacks import layer_systems
from qleak.attacks.analytic import analytic, separate, solve_labels
from qleak.attacks.closed_form import closed_form, solve
from qleak.attacks.drive import drive
from qleak.catalog import build
from qleak.channels import chain, identity, uniform
from qleak.check import Expected
from qleak.client import View, gradient, local_sgd, per_example
from qleak.metrics import match, psnr
from qleak.types import Status

MLP = "mlp(channels=1, size=6, classes=5, hidden=(48, 12), function='{}')"


def scene(spec, batch=1, channel=None, dtype=torch.float64, seed=0, same=False):
    """(view of one lane, images `[b c h w]`, labels `[b]`) of a net with drawn weights."""
    model, channel = build("models", spec), channel or identity()
    params = tree.to(model.init(random.generator(seed, "params"))[0], dtype)
    x = random.uniform(random.generator("images", seed), (batch, *model.shape)).to(dtype)
    y = torch.zeros(batch, dtype=torch.int64) if same else torch.arange(batch) % model.classes
    client = gradient(batch)
    noise = channel.draw(random.generator("noise"), params, ())
    update = client.update(model, params, {}, x, y)
    sent = channel.send(channel.knobs(), update, noise, channel.init(params), params)[0][-1]
    return View(model, params, {}, channel, client, tree.nested_map(lambda t: t[None], sent)), x, y


def attacked(attack, view):
    start = tree.stack([attack.draw(random.generator("start", i), view) for i in range(view.lanes)])
    start = tree.to(start, next(iter(view.params.values())).dtype)
    *_, (guess, status, _) = drive(attack, view, start)
    return guess, status


def exclusive(count, each, pixels, mixed, seed=0):
    """Images `[b d]` and a first layer's gradients in which `each` neurons see one image alone and `mixed` several."""
    x = random.uniform(random.generator("x", seed), (count, pixels)).double()
    alone = torch.eye(count, dtype=torch.float64).repeat(each, 1)
    drawn = random.normal(random.generator("delta", seed), (count * each + mixed, count)).double()
    delta = torch.cat([alone, torch.ones(mixed, count, dtype=torch.float64)]) * drawn
    return x, delta @ x, delta.sum(1)


def found_in(images, x):
    """How many true images are among the images, up to 1e-6."""
    return int((torch.cdist(x, images).amin(1) < 1e-6).sum())


# --- division by the bias gradient -----------------------------------------------------------------


@pytest.mark.parametrize("function", ["sigmoid", "tanh", "relu", "leaky_relu", "gelu", "softplus"])
def test_one_image_comes_back_exactly_behind_any_activation(function):
    view, x, y = scene(MLP.format(function))
    guess, status = attacked(analytic(), view)
    assert float((guess.x[0] - x).abs().max()) < 1e-10
    assert torch.equal(guess.labels[0], y)
    assert float(guess.loss[0]) < 1e-20
    assert status.tolist() == [Status.FINISHED]


def test_the_weights_of_the_net_are_not_needed_but_the_bias_gradient_is():
    """The broken variant: rows divided by another message's bias gradient are no image."""
    view, x, _ = scene(MLP.format("relu"))
    other, *_ = scene(MLP.format("relu"), seed=1)
    code = {**view.message.code, "fc1.bias": other.message.code["fc1.bias"]}
    guess, _ = attacked(analytic(), view._replace(message=view.message._replace(code=code)))
    assert float((guess.x[0] - x).abs().max()) > 0.1
    assert float(guess.loss[0]) > 1e-3


@pytest.mark.parametrize("count", [2, 4, 8])
def test_images_with_neurons_of_their_own_come_back(count):
    x, weight, bias = exclusive(count, each=3, pixels=30, mixed=40)
    zero = torch.zeros_like(bias)
    found = separate(weight, bias, count, 1e-4, 0.05, torch.zeros_like(weight), zero)
    assert found_in(found.x, x) == count
    assert found.votes.tolist() == [3] * count
    # and with mixtures alone nothing is found: rows agree with none
    mixed = separate(
        weight[3 * count :], bias[3 * count :], count, 1e-4, 0.05, weight[3 * count :] * 0, zero[3 * count :]
    )
    assert found_in(mixed.x, x) == 0
    assert int(mixed.votes.max()) <= 1


def test_mixtures_that_agree_are_told_from_images():
    """Two images of one class weigh almost the same in every neuron: the largest group is their mean."""
    x, weight, bias = exclusive(2, each=2, pixels=30, mixed=0)
    delta = 1 + 1e-6 * random.normal(random.generator("even"), (20, 2)).double()
    weight, bias = torch.cat([weight, delta @ x]), torch.cat([bias, delta.sum(1)])
    found = separate(weight, bias, 2, 1e-4, 0.05, torch.zeros_like(weight), torch.zeros_like(bias))
    assert found_in(found.x, x) == 2
    middle = (weight[-20:] / bias[-20:, None]).mean(0)
    assert float((found.x - middle).norm(dim=1).min()) > 0.1


def test_a_batch_of_a_relu_net_comes_back_with_its_labels():
    view, x, y = scene("mlp(channels=1, size=6, classes=5, hidden=(200,), function='relu')", batch=2)
    guess, _ = attacked(analytic(), view)
    order = match(guess.x[0].float(), x.float())
    assert float(psnr(guess.x[0][order].float(), x.float()).min()) > 90
    assert torch.equal(guess.labels[0][order], y)
    assert float(guess.loss[0]) < 1e-15


@pytest.mark.parametrize("function", ["sigmoid", "relu"])
def test_a_batch_that_cannot_be_separated_says_so(function):
    """Sigmoid neurons are active for every image: the own loss must not pretend."""
    hidden = 200 if function == "sigmoid" else 2
    view, *_ = scene(f"mlp(channels=1, size=6, classes=5, hidden=({hidden},), function='{function}')", batch=4)
    guess, _ = attacked(analytic(), view)
    assert guess.x.shape == (1, 4, 1, 6, 6)
    assert bool(guess.x.isfinite().all())
    assert float(guess.loss[0]) > 1e-4


def test_labels_are_solved_from_the_images():
    """Also repeated ones; and given labels, in whatever order, are dealt to their images."""
    view, x, y = scene("mlp(channels=1, size=6, classes=5, hidden=(30,))", batch=6)
    update = tree.at(view.decoded(), 0)
    assert torch.equal(solve_labels(view.model.layers, view.params, {}, x, update), y)
    assert torch.equal(solve_labels(view.model.layers, view.params, {}, x.flip(0), update, y), y.flip(0))
    assert not torch.equal(solve_labels(view.model.layers, view.params, {}, 1 - x, update), y)


def test_codes_cost_precision_and_no_more():
    view, x, y = scene(MLP.format("relu"), channel=chain(uniform(levels=256)), dtype=torch.float32)
    guess, _ = attacked(analytic(), view)
    assert float(psnr(guess.x[0], x)) > 40
    assert torch.equal(guess.labels[0], y)
    coarse, *_ = scene(MLP.format("relu"), channel=chain(uniform(levels=4)), dtype=torch.float32)
    assert float(psnr(attacked(analytic(), coarse)[0].x[0], x)) < float(psnr(guess.x[0], x)) - 10


def test_without_evidence_it_answers_grey():
    view, *_ = scene(MLP.format("relu"))
    guess, status = attacked(analytic(), view._replace(evidence=False))
    assert torch.equal(guess.x, torch.full_like(guess.x, 0.5))
    assert status.tolist() == [Status.FINISHED]


def test_what_cannot_be_read_is_named():
    view, *_ = scene(MLP.format("relu"))
    attack = analytic()
    assert attack.applies(view) == ""
    assert attack.applies(view._replace(client=per_example(2))) == "needs the gradient of one batch."
    assert attack.applies(view._replace(client=local_sgd(2))) == "needs the gradient of one batch."
    nameless = view._replace(model=replace(view.model, layers=None))
    assert attack.applies(nameless) == "needs a model that declares its layers."
    lenet = view._replace(model=build("models", "lenet(channels=1, size=8, classes=4, width=3)"))
    assert attack.applies(lenet) == "needs a linear layer on the pixels, layer 1 is conv."


@pytest.mark.parametrize("name", ["tolerance", "margin"])
def test_bad_arguments_are_one_line(name):
    with pytest.raises(Expected, match=rf"^Expected {name}=0.0 > 0\.$"):
        analytic(**{name: 0.0})


# --- the closed form of ReLU nets ------------------------------------------------------------------

RELU_CONV = "convnet(channels=1, size=8, classes=6, width={}, function='{}')"


@pytest.mark.parametrize("hidden", [(40,), (40, 20), (40, 30, 20)])
def test_relu_mlps_are_solved_exactly(hidden):
    view, x, y = scene(f"mlp(channels=1, size=6, classes=5, hidden={hidden}, function='relu')")
    assert closed_form().applies(view) == ""
    guess, _ = attacked(closed_form(), view)
    assert float((guess.x[0] - x).abs().max()) < 1e-8
    assert torch.equal(guess.labels[0], y)
    assert float(guess.loss[0]) < 1e-10


def test_a_relu_convolution_with_equations_enough_is_solved():
    """One convolution of stride 1 below the linear layer: its active units outnumber the pixels."""
    from qleak.models.layers import activation, conv, flatten, linear, sequential

    net = sequential([conv("c", 1, 8, 3, padding=1), activation("relu"), flatten(), linear("fc", 8 * 64, 5)], (1, 8, 8))
    params = tree.to(net.init(random.generator(0))[0], torch.float64)
    x = random.uniform(random.generator("x"), (1, 1, 8, 8)).double()
    update = gradient().update(net, params, {}, x, torch.tensor([2]))
    found, residual = solve(net.layers, net.shape, params, update)
    assert float((found - x).abs().max()) < 1e-8
    assert float(residual) < 1e-8
    assert [r.deficit for r in layer_systems.ranks(net)] == [0, 0]
    # the broken variant: inactive units taken at their word, z = 0
    zeros = net.layers[0], replace(net.layers[1], options={"function": "leaky_relu"}), *net.layers[2:]
    wrong, missed = solve(zeros, net.shape, params, update)
    assert float((wrong - x).abs().max()) > 1e-3
    assert float(missed) > 1e-3


def test_leaky_relu_knows_z_from_the_sign_of_a():
    view, x, _ = scene(RELU_CONV.format(16, "leaky_relu"))
    guess, _ = attacked(closed_form(), view)
    assert float((guess.x[0] - x).abs().max()) < 1e-5


def test_a_net_with_too_few_equations_is_answered_without_a_crash():
    """Width 2: conv1 sees 2·16 outputs of 64 pixels, half of them inactive."""
    view, x, _ = scene(RELU_CONV.format(2, "relu"))
    assert max(r.deficit for r in layer_systems.ranks(view.model)) > 0
    guess, _ = attacked(closed_form(), view)
    assert bool(guess.x.isfinite().all())
    assert float((guess.x[0] - x).abs().max()) > 0.05


def test_a_dead_net_is_answered_without_a_crash():
    view, *_ = scene(RELU_CONV.format(2, "relu"))
    params = {k: v - 10 if k == "conv3.bias" else v for k, v in view.params.items()}
    update = gradient().update(view.model, params, {}, torch.full((1, 1, 8, 8), 0.5).double(), torch.tensor([1]))
    found, residual = solve(view.model.layers, view.model.shape, params, update)
    assert bool(found.isfinite().all())
    assert bool(residual.isfinite())


def test_equations_are_counted():
    """By hand: convnet(width=2) on 8×8: conv1 1×64 -> 2×16, conv2 -> 4×4, conv3 -> 8×1, fc 8 -> 6."""
    counted = {r.layer: r[1:] for r in layer_systems.ranks(build("models", RELU_CONV.format(2, "relu")))}
    assert counted == {"fc": (8, 6, 8), "conv3": (16, 4, 16), "conv2": (32, 8, 32), "conv1": (64, 16, 18)}
    sigmoid = {r.layer: r.forward for r in layer_systems.ranks(build("models", RELU_CONV.format(2, "sigmoid")))}
    assert sigmoid == {"fc": 6, "conv3": 8, "conv2": 16, "conv1": 32}
    with pytest.raises(Expected, match="declares its layers"):
        layer_systems.ranks(replace(build("models", "mlp"), layers=None))


def test_the_coefficients_are_those_of_the_weight_gradient():
    """T of every input channel gives ∂K, for strides and paddings; the counted rank bounds the true one."""
    for spec in (RELU_CONV.format(3, "sigmoid"), "lenet(channels=2, size=8, classes=4, width=3)"):
        model = build("models", spec)
        layer = model.layers[0]
        h = random.uniform(random.generator("h"), (1, *model.shape)).double()
        params = tree.to(model.init(random.generator(0))[0], torch.float64)
        z = layer_systems.apply_layer(layer, params, h)
        delta = random.normal(random.generator("d"), z.shape).double()
        kernel = params[f"{layer.name}.weight"].clone().requires_grad_()
        z = layer_systems.apply_layer(layer, {**params, f"{layer.name}.weight": kernel}, h)
        (expected,) = torch.autograd.grad((z * delta).sum(), kernel)
        block = layer_systems._coefficients(layer, tuple(h.shape), delta)
        got = torch.stack([(block @ h[0, i].flatten()).unflatten(0, kernel[:, 0].shape) for i in range(h.shape[1])], 1)
        assert torch.allclose(got, expected)
        rank = next(r for r in layer_systems.ranks(model) if r.layer == layer.name)
        assert int(torch.linalg.matrix_rank(block)) * h.shape[1] <= rank.weights


def test_gelu_is_refused_by_name():
    view, *_ = scene(RELU_CONV.format(2, "gelu"))
    assert closed_form().applies(view) == (
        "needs invertible activations (leaky_relu, relu, sigmoid, softplus, tanh): layer 2 is gelu."
    )

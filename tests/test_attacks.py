"""What the attacks reach in cases whose answer is known, and what they refuse."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from qleak import random, tree
from qleak.attacks import cells, closed_form, dlg, idlg, labels, refine
from qleak.attacks.drive import drive
from qleak.catalog import build
from qleak.channels import chain, identity, uniform
from qleak.check import Expected
from qleak.client import View, gradient
from qleak.metrics import psnr
from qleak.types import Message, Status

LENET = "lenet(channels=1, size=8, classes={}, width=3)"
MLP = "mlp(channels=1, size=6, classes=4, hidden=(40, 10))"


def smooth(size, seed):
    """A picture without sharp edges: a 3×3 grid of random values, magnified."""
    coarse = random.normal(random.generator("picture", seed), (1, 1, 3, 3))
    return torch.sigmoid(1.5 * F.interpolate(coarse, size=size, mode="bicubic", align_corners=True))


def scene(spec, channel=None, lanes=1, batch=1, seed=0):
    """(view, images `[lane b c h w]`, labels `[lane b]`) of a net with drawn weights."""
    model, channel = build("models", spec), channel or identity()
    params, _ = model.init(random.generator(seed, "params"))
    client, sent = gradient(batch), []
    x = torch.stack([torch.cat([smooth(model.shape[1], 10 * i + j) for j in range(batch)]) for i in range(lanes)])
    y = torch.tensor([[(i + j) % model.classes for j in range(batch)] for i in range(lanes)])
    for i in range(lanes):
        noise = channel.draw(random.generator("noise", i), params, ())
        update = client.update(model, params, {}, x[i], y[i])
        sent.append(channel.send(channel.knobs(), update, noise, channel.init(params), params)[0][-1])
    return View(model, params, {}, channel, client, tree.nested_map(lambda *t: torch.stack(t), *sent)), x, y


def attacked(attack, view):
    start = tree.stack([attack.draw(random.generator("start", i), view) for i in range(view.lanes)])
    *_, (guess, status, _) = drive(attack, view, start)
    return guess, status


def decibels(guess, x):
    return [float(psnr(g.float(), t)[0]) for g, t in zip(guess.x, x, strict=True)]


# --- cells -----------------------------------------------------------------------------------------


def test_cells_recovers_a_smooth_picture_from_an_exact_gradient():
    """`gain=0`: on a net this small the first two stages are all prior, and the rule of 2 % takes that for the end."""
    view, x, y = scene(LENET.format(4))
    attack = cells(weight=1e-3, stages=4, steps=60, last=200, gain=0.0)
    guess, status = attacked(attack, view)
    assert min(decibels(guess, x)) > 30
    assert torch.equal(guess.labels, y)
    assert status.tolist() == [Status.FINISHED]


@pytest.mark.slow
def test_knowing_the_cells_beats_believing_the_decoded_numbers():
    """64 levels, ten classes: the attacker who knows the channel is better on every picture and by 3 dB on average."""
    view, x, _ = scene(LENET.format(10), chain(uniform(levels=64)), lanes=3)
    knowing = decibels(attacked(cells(stages=4, steps=60, last=60), view)[0], x)
    blind = decibels(attacked(cells(stages=4, steps=60, last=60, objective="l2"), view)[0], x)
    assert sum(knowing) / 3 > sum(blind) / 3 + 3, (knowing, blind)


def test_the_prior_vanishes_on_an_exact_channel_only():
    """A message of cells keeps some prior to the last stage; weights of one or several stages both work."""
    for stages in (1, 2, 3):
        attack = cells(stages=stages, steps=2, last=2, gain=0.0)
        for channel in (identity(), chain(uniform(levels=16))):
            view, *_ = scene(LENET.format(4), channel)
            guess, _ = attacked(attack, view)
            assert bool(guess.x.isfinite().all())


# --- the closed form -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [LENET.format(10), MLP], ids=["lenet", "mlp"])
@pytest.mark.parametrize("function", ["sigmoid", "tanh", "softplus", "leaky_relu"])
def test_closed_form_solves_an_exact_gradient(spec, function):
    view, x, y = scene(f"{spec[:-1]}, function='{function}')", lanes=2)
    assert closed_form().applies(view) == ""
    guess, status = attacked(closed_form(), view)
    assert min(decibels(guess, x)) > 90
    assert torch.equal(guess.labels, y)
    assert status.tolist() == [Status.FINISHED] * 2


def test_closed_form_solves_the_message_and_nothing_else():
    """The broken variant: a gradient of other weights does not give the picture."""
    view, x, _ = scene(LENET.format(10), lanes=2)
    other, *_ = scene(LENET.format(10), lanes=2, seed=1)
    guess, _ = attacked(closed_form(), view._replace(params=other.params))
    assert max(decibels(guess, x)) < 40


def test_a_zero_gradient_is_one_line():
    view, *_ = scene(LENET.format(4))
    nothing = Message({k: torch.zeros_like(v) for k, v in view.message.code.items()}, ())
    with pytest.raises(Expected, match=r"^Expected a gradient other than zero, to solve for its image\.$"):
        attacked(closed_form(), view._replace(message=nothing))


@pytest.mark.parametrize("attack", [closed_form(), refine()], ids=["closed_form", "refine"])
def test_what_cannot_be_inverted_is_named(attack):
    for spec, where in ((LENET.format(4), "layer 2 is"), (MLP, "layer 3 is")):
        view, *_ = scene(f"{spec[:-1]}, function='gelu')")
        why = attack.applies(view)
        assert why.startswith("needs invertible activations (leaky_relu, relu, sigmoid, softplus, tanh): ")
        assert why.endswith(f"{where} gelu.")
    view, *_ = scene(LENET.format(4))
    unknown = view._replace(model=replace(view.model, layers=None))
    assert attack.applies(unknown) == "needs a model that declares its layers."


def test_a_batch_is_refused_by_what_needs_one_image():
    view, *_ = scene(LENET.format(4), batch=2)
    assert closed_form().applies(view) == "needs the gradient of one image."
    assert dlg().applies(view) == ""


@pytest.mark.parametrize(
    "attack", [dlg(), idlg(), cells(), closed_form(), refine()], ids=lambda a: a.spec.split("(")[0]
)
def test_attacks_apply_to_the_net_of_the_papers(attack):
    assert attack.applies(scene(LENET.format(4))[0]) == ""


def test_a_label_that_cannot_be_read_is_said():
    """Without a last layer of one row per class there is nothing to read a label from, unless it is given."""
    view, _, y = scene(LENET.format(4))
    code = {k: v for k, v in view.message.code.items() if not k.startswith("fc")}
    headless = view._replace(message=Message(code, ()), params={k: view.params[k] for k in code})
    for attack in (idlg(), cells()):
        assert attack.applies(headless).startswith("needs a last linear layer")
        assert attack.applies(headless._replace(labels=y)) == ""
    assert dlg().applies(headless) == ""


# --- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [LENET.format(10), MLP], ids=["lenet", "mlp"])
def test_label_rules_are_right_on_every_class(spec):
    """Sigmoid features are positive, which the rule of iDLG needs."""
    view, _, y = scene(spec, lanes=build("models", spec).classes)
    classes = view.model.classes
    assert sorted(y.flatten().tolist()) == list(range(classes))
    assert torch.equal(labels.idlg(view.decoded(), classes), y)
    assert torch.equal(labels.bias_sign(view.decoded(), classes), y)


def test_the_bias_needs_no_sign_of_the_features():
    """With features of both signs the rule of iDLG fails on some class, the bias on none."""
    wrong = 0
    for seed in range(5):
        view, _, y = scene(f"{LENET.format(10)[:-1]}, function='tanh')", lanes=10, seed=seed)
        assert torch.equal(labels.bias_sign(view.decoded(), 10), y)
        wrong += int((labels.idlg(view.decoded(), 10) != y).sum())
    assert wrong > 0


def test_rules_find_nothing_without_a_last_layer():
    assert labels.last_bias({"w": torch.zeros(2, 3)}, 4) is None
    assert labels.idlg({"w": torch.zeros(5, 3), "b": torch.zeros(5)}, 4) is None
    assert labels.bias_sign({"w": torch.zeros(5, 3), "b": torch.zeros(5)}, 4) is None


# --- controls --------------------------------------------------------------------------------------

SHORT = cells(weight=1e-3, stages=3, steps=50, last=100, gain=0.0)


@pytest.mark.parametrize(
    "attack",
    [cells(stages=2, steps=10, last=5), idlg(outer=1), dlg(outer=1), closed_form()],
    ids=lambda a: a.spec.split("(")[0],
)
def test_without_evidence_the_message_says_the_label_and_no_more(attack):
    view, *_ = scene(LENET.format(4), lanes=2)
    view = view._replace(evidence=False)
    code = {k: (v if k == "fc.bias" else torch.flip(v, [0]) * 3 + 0.1) for k, v in view.message.code.items()}
    code["fc.weight"] = view.message.code["fc.weight"]
    other = view._replace(message=Message(code, ()))
    before, after = attacked(attack, view)[0], attacked(attack, other)[0]
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    # and the same comparison sees a message that is used
    with_evidence, changed = (attacked(attack, v._replace(evidence=True))[0] for v in (view, other))
    assert not torch.equal(with_evidence.x, changed.x)


@pytest.mark.slow
def test_controls_stay_below_a_success():
    """Another image's message gives the other image; a prior alone gives a grey patch."""
    view, x, _ = scene(LENET.format(4), lanes=2)
    own, swapped = attacked(SHORT, view)[0], attacked(SHORT, view.at(torch.tensor([1, 0])))[0]
    assert min(decibels(own, x)) > 20
    assert max(decibels(swapped, x)) < 20
    assert min(decibels(swapped, x.flip(0))) > 20
    assert max(decibels(attacked(SHORT, view._replace(evidence=False))[0], x)) < 20


# --- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: dlg(outer=0), "Expected outer=0 >= 1."),
        (lambda: idlg(inner=1.5), "Expected inner=1.5 to be a whole number."),
        (lambda: cells(stages=0), "Expected stages=0 >= 1."),
        (lambda: cells(weight=0.0), "Expected weight=0.0 > 0."),
        (lambda: cells(labels="inferre"), "Expected labels='inferre' to be one of: auto, errors, inferred. Did you mean 'inferred'?"),
        (lambda: cells(optimizer="lbfg"), "Expected optimizer='lbfg' to be one of: adam, lbfgs, sign_adam. Did you mean 'lbfgs'?"),
        (lambda: closed_form(ridge=0.0), "Expected ridge=0.0 > 0."),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(make, text):
    with pytest.raises(Expected) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize("objective", ["l3", "cell"])
def test_an_unknown_objective_is_one_line(objective):
    view, *_ = scene(LENET.format(4))
    with pytest.raises(
        Expected,
        match=f"^Expected objective='{objective}' to be one of: cells, cosine, graded, l2, straight_through, weighted",
    ):
        attacked(cells(objective=objective), view)

"""Training: update rules against torch.optim, epochs that depend on their seed alone, clear refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from qleak import data, models, random, train, tree
from qleak.check import Expected, Failed
from qleak.types import Model

RULES = {
    "sgd": (train.sgd(), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (train.sgd(momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "adam": (train.adam(), lambda p: torch.optim.Adam(p, lr=0.1)),
    "adam, other": (train.adam(0.5, 0.99, 1e-3), lambda p: torch.optim.Adam(p, 0.1, betas=(0.5, 0.99), eps=1e-3)),
}
NET = models.mlp(channels=1, size=28, classes=10, hidden=(32,))


def digits(step=25):
    return data.take(data.load("mnist5k"), torch.arange(0, 5000, step))


@pytest.mark.parametrize("name", RULES)
def test_steps_equal_torch_optim(name):
    rule, oracle = RULES[name]
    params, buffers = NET.init(random.generator("rule", name))
    params = tree.to(params, torch.float64)
    theirs = {k: v.clone().requires_grad_() for k, v in params.items()}
    optimizer, state, learn = oracle(list(theirs.values())), rule.init(params), train.step(NET, rule)
    some = digits(500)
    x, y = some.x.double(), some.y
    for _ in range(3):
        params, state, loss = learn(params, state, buffers, x, y, 0.1)
        optimizer.zero_grad()
        expected = F.cross_entropy(NET.apply(theirs, buffers, x), y)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), atol=1e-13, rtol=1e-13)
        for k, value in params.items():
            torch.testing.assert_close(value, theirs[k].detach(), atol=1e-12, rtol=1e-12)


def test_the_oracle_rejects_another_rule():
    wrong, oracle = train.sgd(momentum=0.8), RULES["momentum"][1]
    weight = torch.ones(3, dtype=torch.float64).requires_grad_()
    optimizer, params = oracle([weight]), {"w": weight.detach().clone()}
    state = wrong.init(params)
    for _ in range(2):  # the first step has no velocity yet
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        params, state = wrong.update(params, state, {"w": torch.ones(3, dtype=torch.float64)}, 0.1)
    assert not torch.allclose(params["w"], weight.detach(), atol=1e-6)


def test_fit_learns_and_repeats():
    some = digits()
    params, buffers = NET.init(random.generator("fit"))
    before = {k: v.clone() for k, v in params.items()}
    epochs = list(train.fit(NET, params, buffers, some, epochs=8, batch=20, lr=2e-2, schedule=train.cosine))
    again = list(train.fit(NET, params, buffers, some, epochs=8, batch=20, lr=2e-2, schedule=train.cosine))
    other = list(train.fit(NET, params, buffers, some, epochs=8, batch=20, lr=2e-2, seed=1))
    assert all(torch.equal(params[k], before[k]) for k in params)
    assert all(torch.equal(epochs[-1].params[k], again[-1].params[k]) for k in params)
    assert not torch.equal(epochs[0].params["fc1.bias"], other[0].params["fc1.bias"])
    assert epochs[-1].loss < 0.5 * epochs[0].loss
    assert train.accuracy(NET, params, buffers, some) < 0.5 < train.accuracy(NET, epochs[-1].params, buffers, some)


def test_accuracy_counts_every_image_once():
    some = digits(700)
    answers = (some.y + (torch.arange(8) >= 5)) % 10  # right for the first five of eight images
    by_digest = dict(zip(data.digests(some.x), answers, strict=True))

    def apply(params, buffers, x):
        return F.one_hot(torch.stack([by_digest[digest] for digest in data.digests(x)]), 10)

    model = Model(NET.init, apply, NET.shape, 10)
    assert train.accuracy(model, {}, {}, some, batch=3) == 5 / 8


def test_cosine():
    assert [round(train.cosine(t), 12) for t in (0, 0.5, 1)] == [1, 0.5, 0]


def test_refusals():
    some = digits(500)
    params, buffers = NET.init(random.generator("refusals"))
    for options, message in {
        "epochs": (0, "epochs=0 >= 1"),
        "batch": (0, "batch=0 >= 1"),
        "lr": (0, "lr=0 > 0"),
    }.items():
        with pytest.raises(Expected, match=message[1]):
            train.fit(NET, params, buffers, some, **{options: message[0]})
    with pytest.raises(Expected, match=r"images \(1, 28, 28\) .* got \(3, 32, 32\) of 8 in photos"):
        train.fit(NET, params, buffers, data.load("photos"))
    with pytest.raises(Expected, match=r"momentum=2 in \[0, 1\]"):
        train.sgd(momentum=2)
    with pytest.raises(Expected, match="b1=1 in"):
        train.adam(b1=1)
    broken = {k: v * math.inf for k, v in params.items()}
    with pytest.raises(Failed, match="diverged in epoch 1: the loss is nan"):
        next(train.fit(NET, broken, buffers, some))

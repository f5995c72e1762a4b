"""Labels of a batch: counts are exact where the formulas say so, and every rule hands in b labels, come what may."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qleak import data, random, scoring, tree
from qleak.attacks import label_counts, label_rules, labels, reveal
from qleak.attacks.drive import drive
from qleak.attacks.label_seen import gain, path, seen
from qleak.channels import chain, gaussian, mean, sign, total, uniform
from qleak.check import Expected
from qleak.client import View, crowd, gradient, local_sgd, per_example
from qleak.models import lenet, lenet_mnist, mlp
from qleak.models.layers import flatten, linear, sequential
from qleak.types import Client, Message

CLASSES = 5
MODEL = mlp(channels=1, size=4, classes=CLASSES, hidden=(12,), function="sigmoid")


def view_of(y, client=None, channel=None, model=MODEL, dtype=torch.float64, x=None, params=None):
    """A view of one update a row of `y [lane b]`, of uniform-noise images."""
    client, channel = client or gradient(y.shape[1]), channel or chain()
    params = params or tree.to(model.init(random.generator(0, "params"))[0], dtype)
    sent = []
    for i, labels_ in enumerate(y):
        gen = random.generator("test_labels", i)
        images = random.uniform(gen, (len(labels_), *model.shape)).to(dtype) if x is None else x
        update = client.update(model, params, {}, images, labels_)
        count = tuple(next(iter(update.values())).shape[: client.rows])
        noise = channel.draw(gen, params, count)
        sent.append(channel.send(channel.knobs(), update, noise, channel.init(params), params)[0][-1])
    return View(model, params, {}, channel, client, tree.nested_map(lambda *t: torch.stack(t), *sent))


def drawn(lanes, batch, classes=CLASSES):
    return random.integers(random.generator("test_labels", lanes, batch), classes, (lanes, batch)).sort(-1).values


def test_counts_are_exact_where_all_images_are_one():
    """One image with many labels: p̄ is softmax(W h + b) to the last digit, for any counts and b > classes."""
    y = drawn(8, 3 * CLASSES)
    view = view_of(y, x=random.uniform(random.generator("one"), (1, 1, 4, 4)).double().expand(y.shape[1], -1, -1, -1))
    whole, near, fit = label_counts.estimate(view)
    assert torch.equal(label_rules.repeat(whole, y.shape[1]), y)
    assert (whole - near).abs().max() < 1e-6
    s = seen(view)
    assert torch.allclose(s.weight.at, fit.t[..., None] * fit.h[:, None], atol=1e-10)


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_counts_and_ilrg_find_repeated_classes_of_generic_batches(batch):
    y = drawn(10, batch)
    view = view_of(y)
    assert torch.equal(labels.infer(view), y)
    assert torch.equal(label_counts.counts(view), y)
    if batch <= 8:  # above, ∂L/∂W[c]/∂L/∂b[c] is unsafe where ∂L/∂b[c] is close to zero
        assert torch.equal(label_rules.ilrg(view), y)


def test_the_exactness_tests_can_fail():
    """The same message with its sign turned is b·(p̄ + ∂L/∂b): nothing is found."""
    y = drawn(10, 8)
    view = view_of(y)
    turned = view._replace(message=Message({k: -v for k, v in view.message.code.items()}, view.message.side))
    assert torch.equal(label_counts.counts(view), y)
    assert not (label_counts.counts(turned) == y).all(-1).any()


def test_counts_need_no_bias():
    bare = sequential([flatten(), linear("fc", 16, CLASSES)], (1, 4, 4))
    params = tree.to(bare.init(random.generator(0))[0], torch.float64)
    weight = {"fc.weight": params["fc.weight"]}
    model = bare.__class__(**{**vars(bare), "apply": lambda p, b, x: x.flatten(1) @ p["fc.weight"].mT, "layers": None})
    y = drawn(6, 4)
    one = random.uniform(random.generator("one"), (1, 1, 4, 4)).double().expand(4, -1, -1, -1)
    view = view_of(y, model=model, params=weight, x=one)
    assert [labels.refuse(view, r) != "" for r in ("analytic", "bias_corrected", "ilrg", "counts", "geng")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert labels.infer(view, "ilrg") is None
    assert torch.equal(label_counts.counts(view), y)


def stale(score, impact, batch):
    """The two stages with the slip that circulates: the second lowers the class that the first came to last."""
    score, found = score.clone(), []
    for c in torch.nonzero(score < 0)[:, 0].tolist()[:batch]:
        found.append(c)
        score[c] -= impact
    last = found[-1]
    while len(found) < batch:
        found.append(int(score.argmin()))
        score[last] -= impact
    return sorted(found)


def test_wainakh_gives_the_second_label_to_the_right_class():
    score, impact = torch.tensor([[-3.0, 0.2, -2.5, 0.3]]), torch.tensor([-1.0])
    right = [0, 0, 0, 2, 2]
    assert label_rules.in_turn(score, impact, 0.0, 5).tolist() == [right]
    assert stale(score[0], impact[0], 5) != right


def test_b_smallest_rows_and_negative_entries():
    score = torch.tensor([[0.3, -0.2, 0.1, -0.5]])
    assert label_rules.smallest(score, None, 3).tolist() == [[1, 2, 3]]
    assert label_rules.smallest(score, None, 6).tolist() == [[0, 1, 1, 2, 3, 3]]
    assert label_rules.smallest(score, torch.tensor([[2]]), 3).tolist() == [[1, 3, 3]]


@settings(max_examples=40, deadline=None)
@given(k=st.lists(st.floats(-1e9, 1e9) | st.just(float("nan")) | st.just(float("inf")), min_size=1, max_size=8),
       batch=st.integers(0, 40))  # fmt: skip
def test_projected_counts_are_whole_and_sum_to_b(k, batch):
    found = label_rules.project(torch.tensor([k]), batch)
    assert found.sum() == batch and bool((found >= 0).all())


@given(k=st.lists(st.integers(0, 9), min_size=1, max_size=8), off=st.floats(-0.45, 0.45))
def test_projection_keeps_whole_counts_and_common_errors(k, off):
    true = torch.tensor([k])
    assert torch.equal(label_rules.project(true.double() + off, int(true.sum())), true)


def test_cheapest_steps_are_those_of_all():
    """Against trying every choice of steps that sums to zero."""
    for seed in range(5):
        cost = random.uniform(random.generator("cost", seed), (1, 4, 5)).double()
        every = torch.cartesian_prod(*[torch.arange(-2, 3)] * 4)
        every = every[every.sum(-1) == 0]
        prices = torch.stack([cost[0, c, every[:, c] + 2] for c in range(4)]).sum(0)
        assert label_counts._cheapest(cost, 2, 8)[0].tolist() == every[prices.argmin()].tolist()


CHANNELS = ("chain()", "chain(uniform(levels=4))", "chain(sign())", "chain(gaussian(sigma=1.0, unbounded=True))",
            "chain(random_k(ratio=0.1))", "chain(top_k(ratio=0.1))", "chain(stochastic(levels=4))")  # fmt: skip


def adversarial(kind, seed):
    """Updates that no batch sends."""
    like = tree.to(MODEL.init(random.generator(0, "params"))[0], torch.float32)
    gen = random.generator("adversarial", seed)
    made = {
        "zeros": lambda v: torch.zeros_like(v),
        "noise": lambda v: random.normal(gen, v.shape),
        "positive": lambda v: random.uniform(gen, v.shape) + 0.1,
        "negative": lambda v: -random.uniform(gen, v.shape) - 0.1,
        "huge": lambda v: 1e20 * random.normal(gen, v.shape),
        "constant": lambda v: torch.full_like(v, -1.0),
    }[kind]
    return like, {k: made(v) for k, v in like.items()}


@settings(max_examples=10, deadline=None)
@given(kind=st.sampled_from(["zeros", "noise", "positive", "negative", "huge", "constant"]),
       channel=st.sampled_from(CHANNELS), batch=st.integers(1, 13), seed=st.integers(0, 9))  # fmt: skip
def test_every_rule_hands_in_b_labels_whatever_comes(kind, channel, batch, seed):
    from qleak.catalog import build

    channel = build("channels", channel)
    like, update = adversarial(kind, seed)
    noise = channel.draw(random.generator(seed), like)
    message = channel.send(channel.knobs(), update, noise, channel.init(like), like)[0][-1]
    both = tree.nested_map(lambda v: torch.stack([v, v]), message)
    view = View(MODEL, like, {}, channel, gradient(batch), both)
    for rule in ("auto", *labels.RULES):
        found = labels.infer(view, rule)
        assert found is not None and found.shape == (2, batch) and found.dtype == torch.int64, rule
        assert 0 <= int(found.min()) <= int(found.max()) < CLASSES
        assert torch.equal(found, found.sort(-1).values) and torch.equal(found[0], found[1]), rule


@pytest.mark.parametrize("rule", ["auto", "ilrg", "counts"])
def test_a_lane_alone_says_what_it_says_in_a_crowd(rule):
    view = view_of(drawn(6, 4), channel=chain(uniform(levels=16)), dtype=torch.float32)
    alone = torch.cat([labels.infer(view.at(torch.tensor([i])), rule) for i in range(6)])
    assert torch.equal(labels.infer(view, rule), alone)


def test_channels_and_counts():
    y = drawn(12, 4)
    for channel in (uniform(levels=256), uniform(levels=16), gaussian(sigma=1e-3, unbounded=True)):
        view = view_of(y, channel=chain(channel), dtype=torch.float32)
        assert torch.equal(labels.infer(view), y), channel.spec
    one = drawn(12, 1)
    assert torch.equal(label_counts.counts(view_of(one, channel=chain(sign()), dtype=torch.float32)), one)


@pytest.mark.parametrize("client", [local_sgd(1, batch=4), local_sgd(4, batch=2, lr=0.05), local_sgd(2, 3, 3, lr=0.1)])
def test_local_steps(client):
    y = drawn(6, client.batch)
    assert torch.equal(labels.infer(view_of(y, client)), y)
    forgotten = view_of(y, client)._replace(client=client.__class__(**{**vars(client), "scale": 1.0}))
    assert not torch.equal(labels.infer(forgotten), y)


def test_path_is_where_gradients_were_taken():
    def at(steps):
        return path(View(MODEL, {}, {}, chain(), Client(None, None, rows=0, batch=1, steps=steps), Message({}, ())))  # type: ignore[arg-type]

    assert at(1) == [0.0] and at(4) == [0.0, 0.25, 0.5, 0.75]
    assert len(at(80)) == 8 and 0 < min(at(80)) < max(at(80)) < 1


@pytest.mark.parametrize(
    ("client", "channel", "factor"),
    [(per_example(4), chain(total(), mean(4)), 1.0), (per_example(4), chain(total()), 4.0),
     (crowd(gradient(2), clients=3), chain(total()), 3.0), (crowd(local_sgd(2, 3, 2), 2), chain(total()), 2.0)],
)  # fmt: skip
def test_aggregates(client, channel, factor):
    y = drawn(5, client.batch)
    view = view_of(y, client, channel)
    assert gain(view) == pytest.approx(factor)
    assert torch.equal(labels.infer(view), y)


def test_granted_labels_come_first_and_one_image_stays_as_it_was():
    y = drawn(5, 1)
    view = view_of(y, dtype=torch.float32)
    assert torch.equal(labels.infer(view), labels.bias_sign(view.decoded(), CLASSES))
    wrong = (y + 1) % CLASSES
    assert torch.equal(labels.infer(view._replace(labels=wrong)), wrong)
    with pytest.raises(Expected, match="Expected rule='ilgr' to be one of"):
        labels.infer(view, "ilgr")


def test_a_trained_net_is_recognised():
    """On a net that is sure of itself the counts leave out classes that are proven, and `present` answers instead."""
    digits, model, client = data.load("mnist5k"), lenet_mnist(), gradient(2)
    params = model.init(random.generator(0))[0]
    y = torch.tensor([[0, 1], [2, 4], [1, 3], [5, 9], [6, 7], [3, 8], [0, 9], [4, 9]])
    sent = [client.update(model, params, {}, digits.x[500 * k + 7], digits.y[500 * k + 7]) for k in y]
    view = View(model, params, {}, chain(), client, Message(tree.stack(sent), ()))
    there = label_counts.proven(view, seen(view))
    truth = torch.zeros_like(there).scatter(1, y, True)
    assert not (there & ~truth).any() and there.sum() >= 15
    free = label_rules.repeat(label_counts.estimate(view)[0], 2)
    assert (free == y).all(-1).sum() <= 4 < 7 <= (labels.infer(view) == y).all(-1).sum()


def test_reveal_hands_in_grey_images_and_labels():
    y = drawn(4, 3)
    view = view_of(y, model=lenet(1, 8, CLASSES), dtype=torch.float32)
    attack = reveal()
    assert (attack.restarts, attack.prior, attack.steps, attack.applies(view)) == (False, False, 1, "")
    start = tree.stack([attack.draw(random.generator(0), view)] * 4)
    guess, _, closures = list(drive(attack, view, start))[-1]
    assert bool((guess.x == 0.5).all()) and torch.equal(guess.labels, y) and closures.tolist() == [1] * 4
    blind = view._replace(evidence=False)
    assert not torch.equal(list(drive(attack, blind, start))[-1][0].labels, y)
    with pytest.raises(Expected):
        reveal(rule="none")


def test_exact_counts_are_of_batches():
    rows_ = [{"chunk": "a", "lane": 0, "label_ok": True}, {"chunk": "a", "lane": 0, "label_ok": False},
             {"chunk": "a", "lane": 1, "label_ok": True}, {"chunk": "b", "lane": 0, "label_ok": True}]  # fmt: skip
    assert scoring._counts_exact(rows_) == pytest.approx(2 / 3)

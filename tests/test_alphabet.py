"""Codes stay in their alphabet for the most unlucky coin: the largest number below 1, and 0."""

import pytest
import torch

from qleak import random, tree
from qleak.adapters import payload
from qleak.catalog import build

LIKE = {"weight": torch.zeros(7, 90), "bias": torch.zeros(7), "one": torch.zeros(1)}
COINS = ("qsgd(norm='max')", "qsgd()", "qsgd(levels=7, bucket=1)", "qsgd(levels=1, norm='max')", "terngrad()", "terngrad(clip=0)",
         "stochastic()", "stochastic(levels=3, range='max')",
         "stochastic(levels=16, per='bucket')")  # fmt: skip


def unlucky(noise, u):
    """Every draw in [0, 1) is `u`."""
    return tree.nested_map(lambda v: torch.full_like(v, u), noise)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 0.5], ids=["least", "most", "half"])
@pytest.mark.parametrize("spec", COINS)
def test_a_coin_next_to_one_adds_no_level(spec, u):
    channel = build("channels", f"chain({spec})")
    # Scales of one number, whose quotient by the step is the number of levels, or a little more in float32.
    update = {k: random.normal(random.generator("alphabet", k), v.shape) * 0.013 for k, v in LIKE.items()}
    update["weight"][:, 1:] *= torch.linspace(0, 1, 89).square()
    noise = unlucky(channel.draw(random.generator("coin"), LIKE), u)
    (message,), _ = channel.send(channel.knobs(), update, noise, channel.init(LIKE), LIKE)
    back = payload.unpack(channel, payload.pack(channel, message, LIKE), LIKE)
    assert all(torch.equal(back.code[k], v) for k, v in message.code.items())


def test_clamping_leaves_qsgd_unbiased_at_its_largest_number():
    """The largest magnitude of a bucket is a level itself: it is sent as it is, whatever the coin."""
    channel = build("channels", "chain(qsgd(levels=15, norm='max', bucket=8))")
    update = {"w": torch.tensor([0.3, -0.1, 0.7, -0.7, 0.2, 0.0, 0.65, 0.5])}
    for i in range(20):
        noise = channel.draw(random.generator("fair", i), update)
        (message,), _ = channel.send(channel.knobs(), update, noise, channel.init(update), update)
        got = channel.receive(channel.knobs(), message, update)["w"]
        assert torch.allclose(got[2:4], update["w"][2:4], rtol=1e-6)

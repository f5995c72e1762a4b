"""Messages as bytes: every channel of the catalog there and back, at the length it says."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_channels import CHANNELS as CONTRACT
from test_channels import some

from qleak import random, tree
from qleak.adapters import payload
from qleak.adapters.bitstream import stream, unstream
from qleak.channels import (
    chain,
    error_feedback,
    gaussian,
    identity,
    klevel,
    mean,
    powersgd,
    qsgd,
    random_k,
    rounds,
    sign,
    stochastic,
    threshold,
    top_k,
    total,
    uniform,
)
from qleak.check import Expected, Failed

LIKE = {"w": torch.zeros(4, 3, 5), "b": torch.zeros(7)}
EDGE = {"empty": torch.zeros(0), "one": torch.zeros(1), "flat": torch.zeros(()), "w": torch.zeros(3, 5)}
CHANNELS = [
    *CONTRACT,
    chain(klevel(levels=5)),
    chain(random_k(k=3), gaussian(0.1, unbounded=True)),
    chain(gaussian(0.1, unbounded=True), random_k(ratio=0.3), uniform(levels=8)),
    rounds(chain(random_k(k=3)), times=3),
    chain(uniform(levels=2**24)),
]
SEED = 4_000_000_000


def sent(channel, x, like, seed=SEED):
    noise = payload.draw(channel, random.generator("noise"), like, seed)
    return channel.send(channel.knobs(), x, noise, channel.init(like), like)[0][-1]


def same(a, b):
    """Message for message: names, shapes and numbers."""
    one, other = tree.flatten(a), tree.flatten(b)
    assert set(one) == set(other)
    for k, v in one.items():
        assert v.shape == other[k].shape and torch.equal(v, other[k].to(v.dtype)), k


@pytest.mark.parametrize("channel", CHANNELS, ids=lambda c: c.spec)
def test_there_and_back_at_the_length_that_is_counted(channel):
    x = some()
    message = sent(channel, x, LIKE)
    data = payload.pack(channel, message, LIKE, SEED)
    back = payload.unpack(channel, data, LIKE)
    same(message, back)
    got, expected = (channel.receive(channel.knobs(), m, LIKE) for m in (back, message))
    near = 1e-6 if "powersgd" in channel.spec else 0  # a product of equal matrices may round by their strides
    for k in LIKE:
        torch.testing.assert_close(got[k], expected[k], rtol=near, atol=near)
    bits = channel.bits(message, LIKE)
    fields = getattr(channel, "times", 1) * (1 + len(LIKE))  # codes, and places of every tensor
    assert data.dtype == torch.uint8 and bits / 8 <= data.numel() <= bits / 8 + fields
    assert data.numel() == payload.size(channel, LIKE)


@pytest.mark.parametrize("channel", CHANNELS, ids=lambda c: c.spec)
def test_tensors_without_numbers_and_of_one(channel):
    x = {k: random.normal(random.generator(k), v.shape) for k, v in EDGE.items()}
    try:
        message = sent(channel, x, EDGE)
    except (RuntimeError, IndexError):  # the stage itself has no answer to an empty tensor
        pytest.skip("the channel does not send empty tensors")
    same(message, payload.unpack(channel, payload.pack(channel, message, EDGE, SEED), EDGE))


def test_a_release_is_packed_like_a_message():
    channel = chain(sign(scale="none"), total("replace-one"), mean(3), uniform(levels=16))
    rows = some(rows=(3,))
    message = channel.send(
        channel.knobs(), rows, channel.draw(random.generator(0), LIKE, (3,)), channel.init(LIKE), LIKE
    )
    same(message[0][-1], payload.unpack(channel, payload.pack(channel, message[0][-1], LIKE), LIKE))


def test_memory_that_both_ends_follow_is_not_sent():
    channel = chain(powersgd(rank=1))
    knobs, state = channel.knobs(), channel.init(LIKE)
    for number in range(3):
        before = state
        (message,), state = channel.send(
            knobs, some(number), channel.draw(random.generator(0), LIKE), state, LIKE
        )  # fmt: skip
        same(message, payload.unpack(channel, payload.pack(channel, message, LIKE), LIKE, before))
    forgot = payload.unpack(channel, payload.pack(channel, message, LIKE), LIKE)
    assert not torch.equal(forgot.side[0]["start"]["w"], message.side[0]["start"]["w"])


def test_places_come_from_their_seed_and_noise_does_not():
    """Who knows the places' seed knows nothing of the noise beside them."""
    channel = chain(gaussian(1.0, unbounded=True), random_k(k=5))
    draws = [payload.draw(channel, random.generator(g), LIKE, s) for g, s in (("a", 1), ("b", 1), ("a", 2))]
    (noise, places), (other_noise, same_places), (same_noise, other_places) = (d[0] for d in draws)
    assert torch.equal(places["w"], same_places["w"]) and not torch.equal(noise["w"], other_noise["w"])
    assert torch.equal(noise["w"], same_noise["w"]) and not torch.equal(places["w"], other_places["w"])
    wrong = sent(channel, some(), LIKE, 1)
    with pytest.raises(Expected, match="seed=2"):
        payload.pack(channel, wrong, LIKE, 2)


@pytest.mark.slow
def test_ties_at_the_last_place_are_the_stage_s_own():
    """Of a million float32 draws some are equal; seed 7 has a pair right at the tenth."""
    like = {"w": torch.zeros(1_000_000)}
    channel = chain(random_k(ratio=0.1))
    message = sent(channel, {"w": torch.ones(1_000_000)}, like, 7)
    same(message, payload.unpack(channel, payload.pack(channel, message, like, 7), like))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 31), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_streams_of_any_width(width, count, seed):
    codes = random.integers(random.generator(seed), 2**width, (count,))
    data = stream(codes, width)
    assert data.numel() == math.ceil(count * width / 8)
    assert torch.equal(unstream(data, width, count).long(), codes)
    # Bit i of the stream is bit i mod w of number i div w: the layout itself, number by number.
    whole = sum(int(b) << (8 * i) for i, b in enumerate(data))
    assert whole == sum(int(c) << (width * i) for i, c in enumerate(codes))


def test_signs_are_bits_and_three_levels_two():
    message = sent(
        chain(sign(scale="none")), {"w": torch.tensor([1.0, -1, -1, 1, 1, 1, -1, -1, 1])}, {"w": torch.zeros(9)}
    )
    assert payload.pack(chain(sign(scale="none")), message, {"w": torch.zeros(9)}).tolist() == [0b00111001, 1]
    votes = chain(threshold(1.0))
    message = sent(votes, {"w": torch.tensor([2.0, 0.0, -2.0])}, {"w": torch.zeros(3)})
    assert payload.pack(votes, message, {"w": torch.zeros(3)}).tolist() == [0b00_01_10]


@pytest.mark.parametrize(
    "channel",
    [identity(), chain(uniform()), chain(uniform(bits=4)), chain(uniform(bits=5)), chain(sign()), chain(qsgd()),
     chain(top_k(ratio=0.01)), chain(top_k(ratio=0.3), stochastic(levels=3)), chain(random_k(ratio=0.1))],
    ids=lambda c: c.spec,
)  # fmt: skip
def test_a_million_numbers_are_packed_at_once(channel):
    """CPU seconds of one thread, the best of two; number by number it would be tens."""
    like = {"w": torch.zeros(1000, 1000)}
    message = sent(channel, {"w": random.normal(random.generator(0), (1000, 1000))}, like, 8)
    took = []
    for _ in range(2):
        start = time.process_time()
        data = payload.pack(channel, message, like, 8)
        middle = time.process_time()
        payload.unpack(channel, data, like)
        took.append((middle - start, time.process_time() - middle))
    assert min(t[0] for t in took) < 0.2 and min(t[1] for t in took) < 0.2


def test_bad_payloads_are_one_line():
    channel = chain(uniform(levels=16))
    message = sent(channel, some(), LIKE)
    data = payload.pack(channel, message, LIKE)
    for bad in (data[:-1], data.to(torch.int32), torch.cat([data, data])):
        with pytest.raises(Expected, match="bytes from chain"):
            payload.unpack(channel, bad, LIKE)
    with pytest.raises(Expected, match="equal rounds"):
        payload.unpack(rounds(channel, 4), data[:3], LIKE)
    with pytest.raises(Failed, match=r"\[0, 15\]"):
        payload.pack(channel, message._replace(code={k: v + 9 for k, v in message.code.items()}), LIKE)
    with pytest.raises(Expected, match="32 bits"):
        payload.draw(error_feedback(), random.generator(0), LIKE, 2**32)

"""A small autoencoder: images to codes in [0, 1] and back, each image by itself.

Parameters in one dict, `encoder.…` and `decoder.…`. There are no norms, so the code of a record is a function of that
record alone: a mechanism on codes has the neighbours that the same mechanism on images has.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.func import grad

from qleak import random
from qleak.synth import layers
from qleak.train.rules import adam
from qleak.types import Params

BATCH = 128
PART = 4096  # images encoded at a time
LOSSES = ("mse", "bce")


def init(gen: Generator, shape: tuple[int, int, int], code: int, hidden: int = 256) -> Params:
    """Weights U(±1/√in) of d → hidden → code → hidden → d, biases 0."""
    d, params = math.prod(shape), {}
    params |= layers.weights("encoder.fc1", layers.fan_in(gen, (hidden, d)), [hidden])
    params |= layers.weights("encoder.fc2", layers.fan_in(gen, (code, hidden)), [code])
    params |= layers.weights("decoder.fc1", layers.fan_in(gen, (hidden, code)), [hidden])
    return params | layers.weights("decoder.fc2", layers.fan_in(gen, (d, hidden)), shape)


def encode(params: Params, x: Tensor) -> Tensor:
    """Codes `[b code]` in [0, 1] of images `[b c h w]`: linear, relu, linear, sigmoid."""
    return torch.sigmoid(_two(params, "encoder", x.flatten(1)))


def decode(params: Params, code: Tensor) -> Tensor:
    """Images `[b c h w]` in [0, 1] of codes `[b code]`: linear, relu, linear, sigmoid."""
    return torch.sigmoid(layers.unflatten(params, "decoder.fc2", _two(params, "decoder", code)))


def _two(params: Params, half: str, h: Tensor) -> Tensor:
    return layers.linear(params, f"{half}.fc2", torch.relu(layers.linear(params, f"{half}.fc1", h)))


def codes(params: Params, x: Tensor) -> Tensor:
    """`encode` of many images, a part at a time."""
    return torch.cat([encode(params, part) for part in x.split(PART)])


def decoder(params: Params) -> Params:
    """What `decode` needs, without the encoder."""
    return {k: v for k, v in params.items() if k.startswith("decoder.")}


def loss_of(params: Params, x: Tensor, loss: str) -> Tensor:
    """Mean over pixels of (x̂ − x)² ("mse") or −x ln x̂ − (1 − x) ln(1 − x̂) ("bce"): 0-dim."""
    made = decode(params, encode(params, x))
    if loss == "mse":
        return F.mse_loss(made, x)
    made = made.clamp(1e-7, 1 - 1e-7)
    return -(x * made.log() + (1 - x) * (1 - made).log()).mean()


def fit(params: Params, x: Tensor, loss: str, epochs: int, lr: float, *path: int | str) -> Params:
    """`epochs` of Adam in minibatches of 128 on images `[n c h w]`, in orders drawn from `path`."""
    rule = adam()
    state, step = rule.init(params), grad(lambda p, batch: loss_of(p, batch, loss))
    for epoch in range(epochs):
        for rows in random.permutation(random.generator(*path, epoch), len(x)).split(BATCH):
            params, state = rule.update(params, state, step(params, x[rows.to(x.device)]), lr)
    return params

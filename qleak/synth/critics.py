"""Discriminators: what each teacher trains on its own records.

All are functions of one teacher's parameters, images `x [b c h w]` in [0, 1] and one-hot labels `y [b class]` to logits
`[b]`, large for real, and run as lanes (`vmap`) over stacked parameters.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Generator, Tensor

from qleak.catalog import factory
from qleak.check import at_least, between, positive, whole
from qleak.synth import layers
from qleak.types import Critic, Params, Public


@factory
def dcgan_critic(df_dim: int = 32, dfc_dim: int = 256, wgan: bool = False, clip: float = 0.01) -> Critic:
    """The conditional DCGAN discriminator of DataLens: the label is put beside the input of every layer.

    x, y → conv to c + C channels, leaky relu → conv to df_dim + C, norm, leaky relu → flat, linear to dfc_dim, norm, leaky
    relu → linear to 1, for C classes; convolutions 5×5 of stride 2, padded as TensorFlow's SAME, N(0, 0.02²) truncated at two
    standard deviations, linear weights N(0, 0.02²). 555,655 parameters for 28×28×1 and ten classes. Norms take the
    statistics of the batch, so what one record teaches depends on the others of its minibatch, all of its own teacher.

    `wgan` drops the norms and clips weights to ±`clip` after a step (Arjovsky, Chintala, Bottou 2017). The published code
    has a gradient penalty there that sums over one axis alone, takes the fourth power, and fails on colour images; it is
    not kept.

    Args:
        df_dim: channels of the second convolution, without the label's.
        dfc_dim: features of the hidden linear layer.
        wgan: no norms, clipped weights, for the Wasserstein loss.
        clip: the bound on weights, with `wgan` alone.

    Raises:
        Expected: a bad size; at `init`, images whose sides are no multiples of 4.

    Sources: Radford, Metz, Chintala 2016; Wang et al. 2021 (DataLens), published settings.
    """
    whole(df_dim=df_dim, dfc_dim=dfc_dim)
    at_least(1, df_dim=df_dim, dfc_dim=dfc_dim)
    positive(clip=clip)

    def init(gen: Generator, public: Public) -> Params:
        h, w = layers.quarters(public, "dcgan_critic")
        c, labels = public.shape[0], public.classes
        first, second = c + labels, df_dim + labels
        params = layers.weights("conv1", layers.truncated(gen, (first, c + labels, 5, 5)), [first])
        params |= layers.weights("conv2", layers.truncated(gen, (second, first + labels, 5, 5)), [second])
        params |= {} if wgan else layers.scales("norm2", second)
        params |= layers.weights("fc1", layers.normal(gen, (dfc_dim, second * h * w + labels)), [dfc_dim])
        params |= {} if wgan else layers.scales("norm3", dfc_dim)
        return params | layers.weights("fc2", layers.normal(gen, (1, dfc_dim + labels)), [1])

    def norm(params: Params, name: str, h: Tensor) -> Tensor:
        return h if wgan else layers.batch_norm(params, name, h)

    def apply(params: Params, x: Tensor, y: Tensor) -> Tensor:
        h = layers.leaky(layers.conv(params, "conv1", layers.beside(x, y)))
        h = layers.leaky(norm(params, "norm2", layers.conv(params, "conv2", layers.beside(h, y))))
        h = layers.leaky(norm(params, "norm3", layers.linear(params, "fc1", layers.beside(h.flatten(1), y))))
        return layers.linear(params, "fc2", layers.beside(h, y))[:, 0]

    return Critic(init, apply, clipped=clip if wgan else 0.0)


@factory
def projection_critic(hidden: int = 16) -> Critic:
    """D(x, y) = ⟨h(x), V_y⟩ + ⟨w, h(x)⟩ + b with one hidden layer h(x) = leaky(W x + a) of the flat image.

    The label enters as a product with features instead of beside them, which is learnt in far fewer steps. Weights are
    U(±1/√in).

    Args:
        hidden: features of h.

    Source: Miyato, Koyama, "cGANs with Projection Discriminator" (2018), equation 7.
    """
    whole(hidden=hidden)
    at_least(1, hidden=hidden)

    def init(gen: Generator, public: Public) -> Params:
        hide = layers.weights("hidden", layers.fan_in(gen, (hidden, math.prod(public.shape))), [hidden])
        classes = {"classes.weight": layers.fan_in(gen, (public.classes, hidden))}
        return hide | classes | layers.weights("out", layers.fan_in(gen, (1, hidden)), [1])

    def apply(params: Params, x: Tensor, y: Tensor) -> Tensor:
        h = layers.leaky(layers.linear(params, "hidden", x.flatten(1)))
        return (h * (y.to(h) @ params["classes.weight"])).sum(1) + layers.linear(params, "out", h)[:, 0]

    return Critic(init, apply)


@factory
def linear_critic(centre: float = 0.2) -> Critic:
    """D(x, y) = ⟨x − centre, V_y⟩ + c_y, from zeros: what it learns first is a class's real mean less its mean of fakes.

    The least that can tell classes apart: 650 parameters at 8×8 and ten classes. Its gradient in the image, V_y, is the same
    for every image of a class.

    Args:
        centre: what is subtracted from every pixel, so that c_y has less to do.
    """
    between(0, 1, centre=centre)

    def init(gen: Generator, public: Public) -> Params:
        return layers.weights("classes", torch.zeros(public.classes, math.prod(public.shape)), [public.classes])

    def apply(params: Params, x: Tensor, y: Tensor) -> Tensor:
        y = y.to(x)
        # All classes' scores first: over stacked teachers that is 0.7 of the time of picking V_y for every image.
        return (((x.flatten(1) - centre) @ params["classes.weight"].T + params["classes.bias"]) * y).sum(1)

    return Critic(init, apply)


@factory
def simple_critic(hidden: int = 128, depth: int = 2) -> Critic:
    """A multilayer perceptron of the flat image with the label beside it, for records of any length: d + C → hidden → … → 1.

    Leaky relus, no norms, weights U(±1/√in). The stand-in for the small net that DataLens keeps for records of 20 numbers.

    Args:
        hidden: features of every hidden layer.
        depth: number of hidden layers.
    """
    whole(hidden=hidden, depth=depth)
    at_least(1, hidden=hidden, depth=depth)

    def init(gen: Generator, public: Public) -> Params:
        widths = [math.prod(public.shape) + public.classes, *(hidden for _ in range(depth)), 1]
        params: Params = {}
        for i, (wide, out) in enumerate(pairwise(widths)):
            params |= layers.weights(f"fc{i}", layers.fan_in(gen, (out, wide)), [out])
        return params

    def apply(params: Params, x: Tensor, y: Tensor) -> Tensor:
        h = layers.beside(x.flatten(1), y)
        for i in range(depth):
            h = layers.leaky(layers.linear(params, f"fc{i}", h))
        return layers.linear(params, f"fc{depth}", h)[:, 0]

    return Critic(init, apply)

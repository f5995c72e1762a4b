"""Generators: noise and a label to an image.

`z [b z]` uniform in [−1, 1] and one-hot `y [b class]` to `x [b c h w]` in [0, 1]. Norms take the statistics of the batch, in
sampling too, as the published code does: an image depends a little on the others that are made with it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Generator, Tensor

from qleak import random
from qleak.catalog import factory
from qleak.check import at_least, whole
from qleak.synth import layers
from qleak.types import Maker, Params, Public


@factory
def dcgan_maker(gf_dim: int = 64, gfc_dim: int = 1024, z_dim: int = 50, tanh: bool = False) -> Maker:
    """The conditional DCGAN generator of DataLens: the label is put beside the input of every layer.

    z, y → linear to gfc_dim, norm, relu → linear to 2·gf_dim·(h/4)·(w/4), norm, relu → deconv to 2·gf_dim channels, norm,
    relu → deconv to c, sigmoid; deconvolutions 5×5 of stride 2, padded as TensorFlow's SAME, all weights N(0, 0.02²).
    7,014,011 parameters for 28×28×1 and ten classes (z_dim 50), 34,251,929 for 64×64×3 and two (z_dim 100).

    Args:
        gf_dim: half the channels of the image in the making.
        gfc_dim: features of the first layer.
        z_dim: length of z: 50 for MNIST, 64 for Fashion-MNIST at ε = 10, 100 for CelebA.
        tanh: (1 + tanh)/2 instead of the sigmoid.

    Raises:
        Expected: a bad size; at `init`, images whose sides are no multiples of 4.

    Sources: Radford, Metz, Chintala 2016; Wang et al. 2021 (DataLens), published settings.
    """
    whole(gf_dim=gf_dim, gfc_dim=gfc_dim, z_dim=z_dim)
    at_least(1, gf_dim=gf_dim, gfc_dim=gfc_dim, z_dim=z_dim)
    wide = 2 * gf_dim

    def init(gen: Generator, public: Public) -> Params:
        h, w = layers.quarters(public, "dcgan_maker")
        c, labels = public.shape[0], public.classes
        flat = wide * h * w
        params = layers.weights("fc1", layers.normal(gen, (gfc_dim, z_dim + labels)), [gfc_dim])
        params |= layers.scales("norm1", gfc_dim)
        params |= layers.weights("fc2", layers.normal(gen, (flat, gfc_dim + labels)), [wide, h, w])
        params |= layers.scales("norm2", flat)
        params |= layers.weights("deconv1", layers.normal(gen, (wide + labels, wide, 5, 5)), [wide])
        params |= layers.scales("norm3", wide)
        return params | layers.weights("deconv2", layers.normal(gen, (wide + labels, c, 5, 5)), [c])

    def apply(params: Params, z: Tensor, y: Tensor) -> Tensor:
        h = torch.relu(layers.batch_norm(params, "norm1", layers.linear(params, "fc1", layers.beside(z, y))))
        h = torch.relu(layers.batch_norm(params, "norm2", layers.linear(params, "fc2", layers.beside(h, y))))
        h = layers.beside(layers.unflatten(params, "fc2", h), y)
        h = torch.relu(layers.batch_norm(params, "norm3", layers.deconv(params, "deconv1", h)))
        h = layers.deconv(params, "deconv2", layers.beside(h, y))
        return (1 + torch.tanh(h)) / 2 if tanh else torch.sigmoid(h)

    return Maker(init, apply, z_dim)


@factory
def mlp_maker(hidden: int = 256, z_dim: int = 32, layers: int = 2) -> Maker:
    """A multilayer perceptron with batch norm: z, y → (linear to hidden, norm, relu) × layers → linear, sigmoid.

    For small images. Weights U(±1/√in).

    Args:
        hidden: features of every hidden layer.
        z_dim: length of z.
        layers: number of hidden layers.
    """
    return _perceptron(hidden, z_dim, layers, norm=True)


@factory
def simple_maker(hidden: int = 128, z_dim: int = 32, layers: int = 1) -> Maker:
    """`mlp_maker` without norms, so that every image is made of its own z and label alone.

    For records of any length, and where samples must not depend on how they are batched.

    Args:
        hidden: features of every hidden layer.
        z_dim: length of z.
        layers: number of hidden layers.
    """
    return _perceptron(hidden, z_dim, layers, norm=False)


def _perceptron(hidden: int, z_dim: int, depth: int, norm: bool) -> Maker:
    whole(hidden=hidden, z_dim=z_dim, layers=depth)
    at_least(1, hidden=hidden, z_dim=z_dim, layers=depth)

    def init(gen: Generator, public: Public) -> Params:
        widths = [z_dim + public.classes, *(hidden for _ in range(depth))]
        params: Params = {}
        for i, (wide, out) in enumerate(pairwise(widths)):
            params |= layers.weights(f"fc{i}", layers.fan_in(gen, (out, wide)), [out])
            params |= layers.scales(f"norm{i}", out) if norm else {}
        return params | layers.weights("out", layers.fan_in(gen, (math.prod(public.shape), hidden)), public.shape)

    def apply(params: Params, z: Tensor, y: Tensor) -> Tensor:
        h = layers.beside(z, y)
        for i in range(depth):
            h = layers.linear(params, f"fc{i}", h)
            h = torch.relu(layers.batch_norm(params, f"norm{i}", h) if norm else h)
        return torch.sigmoid(layers.unflatten(params, "out", layers.linear(params, "out", h)))

    return Maker(init, apply, z_dim)


def noise(maker: Maker, count: int, *path: int | str) -> Tensor:
    """The maker's z `[count z]`, uniform in [−1, 1]; the draw belongs to `path`."""
    return 2 * random.uniform(random.generator(*path), (count, maker.z_dim)) - 1

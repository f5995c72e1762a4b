"""Another synthesizer, run on the codes of an autoencoder that was trained on public images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from qleak import catalog, data, random
from qleak.catalog import factory
from qleak.check import Expected, at_least, one_of, positive, whole
from qleak.synth import autoencoder
from qleak.types import Dataset, Params, Public, Spend, Synthesizer, Tree

TUNED = (
    "the autoencoder is trained on the private records ({} epochs of fine-tuning) without noise: its decoder is released, "
    "and codes of one record depend on others; take finetune=0"
)
INNER = "inner."


class State(NamedTuple):
    """The autoencoder, the private records' codes `[n 1 1 code]`, and the inner synthesizer's state."""

    net: Params
    codes: Tensor
    inner: Any


@factory
def latent(
    inner: Synthesizer | str = "class_means()",
    public: str = "fashion_mnist",
    hid_dim: int = 32,
    loss: str = "mse",
    epochs: int = 3,
    finetune: int = 0,
    lr: float = 1e-3,
    limit: int = 10_000,
) -> Synthesizer:
    """Encodes the private records, synthesizes codes, and decodes them.

    The autoencoder is trained on the public set alone; it maps each record to a code in [0, 1]^hid_dim that depends on no
    other, so the inner mechanism's neighbours, sensitivity and ε are what they are for images of the shape (1, 1, hid_dim),
    and decoding is post-processing. What the public images cannot express is lost: they should resemble the private ones.

    A gain is not to be expected where class means do well: on MNIST at 8×8, ε = 1 and Fashion-MNIST as public, a logistic
    judge trained on 10,000 samples of the defaults reaches 0.28-0.35 (3 seeds), 0.51 with ten epochs and
    `class_means(clip=5.7, spread=0.1)` within, and 0.76-0.77 with class means of pixels. Codes lie about ½, so `class_means`
    needs a clip near √hid_dim to leave them whole.

    It stands for the options `ae`, `train_ae`, `finetune_ae`, `hid_dim` and `loss` of DataLens, whose code calls a package that was
    never published; the net here (256 hidden features, no norms) is not that one.

    Args:
        inner: the synthesizer that runs on codes, or the text of one. Convolutional nets need images: take others.
        public: a data set by name whose training images are public; pooled to the size of the private ones.
        hid_dim: length of a code.
        loss: of the reconstruction, "mse" or "bce".
        epochs: passes over the public images.
        finetune: further passes over the *private* records. Nothing is guaranteed then.
        lr: Adam's learning rate.
        limit: the first so many public images; 0 for all.

    Raises:
        Expected: an argument out of range; at `init`, public images that are not at hand, of other channels, smaller than
            the private ones, or among them.
    """
    whole(hid_dim=hid_dim, epochs=epochs, finetune=finetune, limit=limit)
    at_least(1, hid_dim=hid_dim, epochs=epochs)
    at_least(0, finetune=finetune, limit=limit)
    one_of(autoencoder.LOSSES, loss=loss)
    positive(lr=lr)
    within: Synthesizer = catalog.build("synthesizers", inner) if isinstance(inner, str) else inner

    def coded(known: Public) -> Public:
        return known._replace(shape=(1, 1, hid_dim))

    def spend(known: Public, target_epsilon: float, delta: float) -> Spend:
        found = within.spend(coded(known), target_epsilon, delta)
        return found._replace(event=lambda t: None) if finetune else found

    def init(private: Dataset, spent: Spend, seed: int) -> State:
        shape = (private.x.shape[1], private.x.shape[2], private.x.shape[3])
        x = _public(public, limit, private).to(private.x)
        net = autoencoder.init(random.generator(seed, "autoencoder"), shape, hid_dim)
        net = {k: v.to(x) for k, v in net.items()}
        net = autoencoder.fit(net, x, loss, epochs, lr, seed, "autoencoder", "public")
        if finetune:
            net = autoencoder.fit(net, private.x, loss, finetune, lr, seed, "autoencoder", "private")
        codes = autoencoder.codes(net, private.x)[:, None, None, :]
        return State(net, codes, within.init(_with(private, codes), spent, seed))

    def step(private: Dataset, spent: Spend, state: State, t: int) -> State:
        return state._replace(inner=within.step(_with(private, state.codes), spent, state.inner, t))

    def released(state: State) -> Tree:
        return autoencoder.decoder(state.net) | {INNER + k: v for k, v in within.released(state.inner).items()}

    def sample(known: Public, held: Tree, y: Tensor, seed: int) -> Tensor:
        of_inner = {k.removeprefix(INNER): v for k, v in held.items() if k.startswith(INNER)}
        codes = within.sample(coded(known), of_inner, y, seed).flatten(1)
        return autoencoder.decode(held, codes)

    def statistics(known: Public, state: State) -> dict[str, Any]:
        return within.statistics(coded(known), state.inner)

    said = "; ".join(why for why in (TUNED.format(finetune) if finetune else "", within.unsound) if why)
    return Synthesizer(spend, init, step, released, sample, said, within.papers, statistics)


def _with(private: Dataset, codes: Tensor) -> Dataset:
    """The private records as codes `[n 1 1 code]`."""
    return replace(private, x=codes, facts={})


def _public(name: str, limit: int, private: Dataset) -> Tensor:
    """Public images in the private ones' shape `[m c h w]`, none of which is among them.

    Raises:
        Expected: they cannot be brought to that shape, or some are private.
    """
    found = data.load(name, "train", limit=limit or None)
    (c, h, w), (channels, height, width) = found.x.shape[1:], private.x.shape[1:]
    if c != channels or h < height or w < width:
        raise Expected(
            f"Expected public images of {channels} channels and at least {height}x{width}, like {private.name}, got "
            f"{c}x{h}x{w} in {name}: take another set (public=…)."
        )
    x = F.adaptive_avg_pool2d(found.x, (height, width)).clamp(0, 1)
    known = set(data.digests(private.x.cpu()))
    shared = sum(digest in known for digest in data.digests(x))
    if shared:
        raise Expected(
            f"Expected public images that are not private: {shared} of {len(x)} of {name} are among the {len(private.x)} "
            f"records of {private.name}. Take another set (public=…)."
        )
    return x

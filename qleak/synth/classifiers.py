"""Who judges synthetic images: trained on them, tested on real ones.

Test accuracy is kept after every epoch, because published figures differ in which one they print: the last, which a
user of the images would get, or the largest, which is chosen by the test set and so is no estimate of anything.

Training draws from the seed alone. Nothing here fails on what a poor synthesizer may hand in: one class only, constant
images, or images on which the net diverges (its logits are then NaN, its guesses constant, its accuracy near chance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from qleak import check, random
from qleak.catalog import factory
from qleak.check import Expected
from qleak.types.synthesis import Classifier
from qleak.types.trees import Params

Net = Callable[[Params, Tensor, Generator | None], Tensor]
SMALLEST = 8  # two 3x3 convolutions around a pooling leave one pixel of 8


@factory
def cnn_classifier(
    lr: float = 2e-3, batch: int = 512, epochs: int = 600, optimizer: str = "sgd", jitter: float = 0.0
) -> Classifier:
    """The convolutional judge of published tables.

    conv 3x3-32, relu, maxpool 2, dropout 0.2, conv 3x3-64, relu, dropout 0.25, dense 64, relu, dense; no padding, Glorot
    uniform weights, zero biases. The defaults are plain SGD without momentum at 2·10⁻³ for 600 epochs on 100,000 images;
    `optimizer="adam"` gets to its end within 20.

    Args:
        lr: learning rate.
        batch: images a step.
        epochs: passes over the images.
        optimizer: "sgd" or "adam".
        jitter: standard deviation of Gaussian noise added to every training image anew; 0 for none.

    Raises:
        Expected: an argument out of range; images smaller than 8 pixels a side.

    Source: Wang et al., DataLens, CCS 2021 (arXiv 2103.11109), evaluation of MNIST and Fashion-MNIST.
    """
    return Classifier(fit=_fit(cnn_params, cnn_logits, lr, batch, epochs, optimizer, jitter))


@factory
def mlp_classifier(
    hidden: int = 128,
    epochs: int = 8,
    jitter: float = 0.05,
    lr: float = 1e-3,
    batch: int = 128,
    optimizer: str = "adam",
) -> Classifier:
    """One hidden layer of relu units: the quick judge, blind to where a pixel is.

    Args:
        hidden: units.
        epochs: passes over the images.
        jitter: standard deviation of Gaussian noise added to every training image anew; 0 for none.
        lr: learning rate.
        batch: images a step.
        optimizer: "sgd" or "adam".

    Raises:
        Expected: an argument out of range.
    """
    check.whole(hidden=hidden)
    check.at_least(1, hidden=hidden)

    def init(gen: Generator, shape: tuple[int, int, int], classes: int) -> Params:
        return {**_layer(gen, "dense", (hidden, math.prod(shape))), **_layer(gen, "out", (classes, hidden))}

    def logits(params: Params, x: Tensor, gen: Generator | None) -> Tensor:
        return _dense(params, "out", F.relu(_dense(params, "dense", x.flatten(1))))

    return Classifier(fit=_fit(init, logits, lr, batch, epochs, optimizer, jitter))


@factory
def logistic(epochs: int = 20, lr: float = 2e-3, batch: int = 128, optimizer: str = "adam") -> Classifier:
    """Multinomial logistic regression on the pixels.

    Args:
        epochs: passes over the images.
        lr: learning rate.
        batch: images a step.
        optimizer: "sgd" or "adam".

    Raises:
        Expected: an argument out of range.
    """

    def init(gen: Generator, shape: tuple[int, int, int], classes: int) -> Params:
        return _layer(gen, "out", (classes, math.prod(shape)))

    def logits(params: Params, x: Tensor, gen: Generator | None) -> Tensor:
        return _dense(params, "out", x.flatten(1))

    return Classifier(fit=_fit(init, logits, lr, batch, epochs, optimizer, 0.0))


def cnn_params(gen: Generator, shape: tuple[int, int, int], classes: int) -> Params:
    """Weights of `cnn_classifier`'s net for images of `shape` (c, h, w)."""
    channels, height, width = shape
    if min(height, width) < SMALLEST:
        raise Expected(f"Expected images of at least {SMALLEST}x{SMALLEST} pixels, got {height}x{width}.")
    flat = 64 * ((height - 2) // 2 - 2) * ((width - 2) // 2 - 2)
    return {
        **_layer(gen, "conv1", (32, channels, 3, 3)),
        **_layer(gen, "conv2", (64, 32, 3, 3)),
        **_layer(gen, "dense", (64, flat)),
        **_layer(gen, "out", (classes, 64)),
    }


def cnn_features(params: Params, x: Tensor, gen: Generator | None = None) -> Tensor:
    """What `cnn_classifier`'s last layer is given, `[n 64]`; `gen` draws the dropout, None drops nothing."""
    hidden = F.max_pool2d(F.relu(F.conv2d(x, params["conv1.weight"], params["conv1.bias"])), 2)
    hidden = F.relu(F.conv2d(_dropped(hidden, 0.2, gen), params["conv2.weight"], params["conv2.bias"]))
    return F.relu(_dense(params, "dense", _dropped(hidden, 0.25, gen).flatten(1)))


def cnn_logits(params: Params, x: Tensor, gen: Generator | None = None) -> Tensor:
    """Logits `[n class]` of `cnn_classifier`'s net."""
    return _dense(params, "out", cnn_features(params, x, gen))


def _fit(
    init: Callable[[Generator, tuple[int, int, int], int], Params],
    logits: Net,
    lr: float,
    batch: int,
    epochs: int,
    optimizer: str,
    jitter: float,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]:
    """`Classifier.fit` of a net, after a look at the settings."""
    check.positive(lr=lr)
    check.whole(batch=batch, epochs=epochs)
    check.at_least(1, batch=batch, epochs=epochs)
    check.at_least(0, jitter=jitter)
    check.one_of(("sgd", "adam"), optimizer=optimizer)

    def fit(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, classes: int, seed: int) -> Tensor:
        params = init(random.generator(seed, "judge", "init"), (x.shape[1], x.shape[2], x.shape[3]), classes)
        seen = learn(params, logits, x, y, lr, batch, epochs, optimizer, jitter, seed)
        return torch.tensor([accuracy(logits, now, test_x, test_y) for now in seen], dtype=torch.float64)

    return fit


def learn(
    params: Params,
    logits: Net,
    x: Tensor,
    y: Tensor,
    lr: float,
    batch: int,
    epochs: int,
    optimizer: str,
    jitter: float,
    seed: int,
) -> Iterator[Params]:
    """Minimises the mean cross-entropy and yields the parameters after every epoch (written in place).

    Order, dropout and jitter of epoch e are drawn from (seed, "judge", e) alone.
    """
    leaves = [value.requires_grad_() for value in params.values()]
    rule = torch.optim.SGD(leaves, lr) if optimizer == "sgd" else torch.optim.Adam(leaves, lr, foreach=True)
    for epoch in range(epochs):
        gen = random.generator(seed, "judge", epoch)
        for chosen in random.permutation(gen, len(x)).split(batch):
            images = x[chosen]
            if jitter:
                images = images + jitter * random.normal(gen, images.shape)
            rule.zero_grad()
            F.cross_entropy(logits(params, images, gen), y[chosen]).backward()
            rule.step()
        yield {name: value.detach() for name, value in params.items()}


@torch.no_grad()
def accuracy(logits: Net, params: Params, x: Tensor, y: Tensor) -> float:
    """Share of images that are guessed right, nothing dropped."""
    right = [(logits(params, a, None).argmax(1) == b).sum() for a, b in zip(x.split(1000), y.split(1000), strict=True)]
    return float(sum(right)) / max(len(y), 1)


def _layer(gen: Generator, name: str, shape: tuple[int, ...]) -> Params:
    """Glorot uniform weights `[out in …]` and zero biases."""
    window = math.prod(shape[2:])
    bound = math.sqrt(6 / (window * (shape[0] + shape[1])))
    return {f"{name}.weight": bound * (2 * random.uniform(gen, shape) - 1), f"{name}.bias": torch.zeros(shape[0])}


def _dense(params: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def _dropped(x: Tensor, share: float, gen: Generator | None) -> Tensor:
    """Inverted dropout: what is kept is scaled up."""
    return x if gen is None else x * (random.uniform(gen, x.shape) >= share) / (1 - share)

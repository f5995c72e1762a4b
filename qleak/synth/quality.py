"""What accuracy does not say of synthetic images: how far their features are from real ones', and whether any is a copy."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qleak import check, random
from qleak.check import Expected
from qleak.synth import classifiers
from qleak.types.models import Dataset

Net = Callable[[Tensor], Tensor]
COPIED = 1 / 3  # a nearest neighbour this much nearer than the second is a copy


def feature_net(data: Dataset, seed: int, epochs: int = 2, limit: int = 10_000) -> Net:
    """An evaluator: x [n c h w] -> features [n 64] of a small CNN trained to classify `data`, the real training set.

    The net of `classifiers.cnn_classifier` (Adam, 10⁻³, batches of 128) on `limit` records spread over the set, read at
    its last hidden layer. It is not private and no synthesizer may see it: it measures, and is not released. Deterministic
    in `data` and `seed`; distances by nets of different seeds are not comparable.

    Raises:
        Expected: images smaller than 8 pixels a side.
    """
    chosen = torch.arange(0, len(data.x), max(math.ceil(len(data.x) / limit), 1))
    x, y = data.x[chosen], data.y[chosen]
    channels, height, width = x.shape[1:]
    params = classifiers.cnn_params(random.generator(seed, "evaluator"), (channels, height, width), data.classes)
    params = {name: value.to(x) for name, value in params.items()}
    for now in classifiers.learn(params, classifiers.cnn_logits, x, y, 1e-3, 128, epochs, "adam", 0.0, seed):
        params = now

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return torch.cat([classifiers.cnn_features(params, part) for part in images.split(1000)])

    return features


def distance(fake: Tensor, real: Tensor, net: Net) -> float:
    """Fréchet distance of the features of two sets of images `[n c h w]`; 0 for identical ones, no unit.

    ‖m − m'‖² + tr S + tr S' − 2 tr (S½ S' S½)½ of means and covariances of `net(x) [n d]`, in float64, the root exact by
    eigenvalues. Like FID, but in the features of a net of one's own: figures of different nets are not comparable. It is
    biased upwards in small sets, as every plug-in estimate is.

    Raises:
        Expected: fewer than two images on a side, or features that are not finite.

    Source: Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017, eq. 6.
    """
    return frechet(net(fake), net(real))


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Wasserstein-2 distance of Gaussians with the means and covariances of `a [n d]` and `b [m d]`."""
    if min(len(a), len(b)) < 2:
        raise Expected(f"Expected at least two images on each side, got {len(a)} and {len(b)}.")
    check.finite(a=a, b=b)
    first, second = a.double(), b.double()
    here, there = torch.cov(first.T).reshape(a.shape[1], -1), torch.cov(second.T).reshape(a.shape[1], -1)
    root = _root(here)
    between = torch.linalg.eigvalsh(root @ there @ root).clamp(min=0).sqrt().sum()
    gap = (first.mean(0) - second.mean(0)).square().sum()
    return max(float(gap + here.trace() + there.trace() - 2 * between), 0.0)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.T)


def nearest(fake: Tensor, real: Tensor, k: int = 1, chunk: int = 256) -> Tensor:
    """Root mean square distance per pixel to the k nearest of `real [m c h w]` for each of `fake [n c h w]`: `[n k]`, ascending."""
    if len(real) < k:
        raise Expected(f"Expected at least {k} real images, got {len(real)}.")
    there, size = real.flatten(1), math.sqrt(real[0].numel())
    # ‖a − b‖² by a product is fast but not exact near 0, where copies are: candidates first, then exact differences.
    found = [
        torch.cdist(part, there).topk(min(2 * k + 2, len(real)), largest=False).indices
        for part in fake.flatten(1).split(chunk)
    ]
    candidates = torch.cat(found) if found else torch.zeros(0, k, dtype=torch.long)
    exact = [
        (part[:, None] - there[at]).norm(dim=2)
        for part, at in zip(fake.flatten(1).split(chunk), candidates.split(chunk), strict=True)
    ]
    return torch.cat(exact).sort(1).values[:, :k] / size if exact else torch.zeros(0, k)


def memorisation(fake: Tensor, train: Tensor, test: Tensor) -> dict[str, float]:
    """Are synthetic images copies of training records, more than of real images that nobody trained on?

    Distances are Euclidean in pixels. Returns a dict:
        copies: share of fakes whose nearest training image is at most 1/3 as far as the second nearest (its ratio test).
        copies_control: the same among as many test images as there are; chance, on records that were not used.
        nearest: median over fakes of (distance to the nearest training image) / (to the nearest test image), both sets
            cut to the same size; 1 without memorisation, 0 for copies.
        nearest_train, nearest_test: those two medians, per pixel.

    Nothing of it may leave the house: it reads training records without noise.

    Source: Yoon, Choi, Kwon, Ryu, "Diffusion probabilistic models generalize when they fail to memorize", SPIGM at
    ICML 2023 (ratio 1/3); Carlini et al., "Extracting training data from diffusion models", USENIX Security 2023 (distance relative to
    neighbours').
    """
    size = min(len(train), len(test))
    cut = train[torch.arange(0, len(train), max(len(train) // size, 1))[:size]]
    from_train, from_test = nearest(fake, train, 2), nearest(fake, test, 2)
    to_cut, to_test = nearest(fake, cut)[:, 0], from_test[:, 0]
    # A copied record that the cut leaves out is caught by `copies`; the median speaks of the bulk.
    ratio = torch.where(to_cut == to_test, 1.0, to_cut / to_test.clamp(min=1e-12))
    return {
        "copies": _copied(from_train),
        "copies_control": _copied(from_test),
        "nearest": float(ratio.median()),
        "nearest_train": float(to_cut.median()),
        "nearest_test": float(to_test.median()),
    }


def _copied(distances: Tensor) -> float:
    """Share of rows `[n 2]` whose first is at most a third of the second (two records may be equal)."""
    return float((distances[:, 0] <= COPIED * distances[:, 1]).double().mean())

"""How close a guess came: MSE, PSNR, SSIM, labels, batch matching, and intervals for success rates.

Every image score looks at the guess as a picture: pixels that are NaN or infinite count as mid-grey
(0.5), the rest is clamped to [0, 1]. So a diverged lane gets the score of a grey patch, not a NaN,
and PSNR = −10·log10(MSE) holds throughout. Sums run in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from qleak import check
from qleak.check import Expected

PSNR_CAP = 150.0
"""PSNR in dB of an exact match (MSE ≤ 1e-15): finite, so that JSON can hold it."""


class Secret(NamedTuple):
    """What the attacker is after: images `x [b c h w]` in [0, 1], labels `y [b]`. Only `score` reads one."""

    x: Tensor
    y: Tensor


def mse(guess: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each image: `[b c h w]`, `[b c h w]` -> `[b]`, float64.

    Raises:
        Expected: the shapes differ, or the truth is not in [0, 1].
    """
    guess, truth = _pictures(guess, truth)
    return reduce((guess - truth).square(), "b c h w -> b", "mean")


def psnr(guess: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10·log10(1 / MSE) of each image in dB: `[b]`, at most `PSNR_CAP`.

    Raises:
        Expected: as `mse`.
    """
    return (-10 * mse(guess, truth).log10()).clamp(max=PSNR_CAP)


def ssim(guess: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image, in [−1, 1], averaged over channels: `[b]`.

    Wang, Bovik, Sheikh, Simoncelli 2004, eq. 13, with K₁ = 0.01, K₂ = 0.03 and a square window of
    7 pixels, or of the largest odd side that fits (scikit-image's `structural_similarity`).

    Raises:
        Expected: as `mse`; or an image smaller than 3×3.
    """
    from skimage.metrics import structural_similarity  # lazy: 0.2 s that other scores do not need

    guess, truth = _pictures(guess, truth)
    side = min(guess.shape[-2:])
    if side < 3:
        raise Expected(f"Expected images of at least 3×3 pixels for SSIM, got b c h w = {tuple(guess.shape)}.")
    window = min(7, side - 1 + side % 2)
    pairs = zip(guess.numpy(), truth.numpy(), strict=True)
    values = [structural_similarity(g, t, win_size=window, data_range=1.0, channel_axis=0) for g, t in pairs]
    return torch.tensor(values, dtype=torch.float64)


def match(guess: Tensor, truth: Tensor) -> Tensor:
    """Which guess belongs to which true image: `order [b]`, so that `guess[order]` lines up with `truth`.

    The bijection with the smallest sum of MSEs (Hungarian method): a gradient does not know the
    order of its batch.

    Raises:
        Expected: as `mse`.
    """
    from scipy.optimize import linear_sum_assignment

    guess, truth = (rearrange(x, "b c h w -> b (c h w)") for x in _pictures(guess, truth))
    products = einsum(truth, guess, "t d, g d -> t g")  # ‖t − g‖² = ‖t‖² + ‖g‖² − 2·t·g, without a [t g d] tensor
    norms = rearrange(truth.square().sum(1), "t -> t 1") + rearrange(guess.square().sum(1), "g -> 1 g")
    _, order = linear_sum_assignment((norms - 2 * products).numpy())
    return torch.from_numpy(order)


def labels_found(guessed: Tensor, true: Tensor) -> list[bool]:
    """For each true label, whether the guessed multiset still has it: `[b]`, `[b]` -> b booleans.

    A guessed label is used up by the first true label it answers: guessing {3, 3} for (3, 5) finds
    one of two. For one image this is equality.

    Raises:
        Expected: different numbers of labels.
    """
    if guessed.shape != true.shape or guessed.ndim != 1:
        raise Expected(f"Expected guessed labels of shape [{len(true)}], got {list(guessed.shape)}.")
    left = Counter(guessed.tolist())
    found = []
    for label in true.tolist():
        found.append(left[label] > 0)
        left[label] -= found[-1]
    return found


def label_accuracy(guessed: Tensor, true: Tensor) -> float:
    """Overlap of the two multisets of labels, divided by b: `[b]`, `[b]` -> [0, 1].

    Raises:
        Expected: different numbers of labels, or none.
    """
    found = labels_found(guessed, true)
    check.at_least(1, labels=len(found))
    return sum(found) / len(found)


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a success rate: (p̂ + z²/2n ± z·√(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n).

    Wilson 1927; unlike p̂ ± z·se it stays in [0, 1] and is honest at 0 or n successes. Without
    trials, (0, 1).

    Args:
        successes: how many of the trials succeeded.
        n: number of trials.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper end.

    Raises:
        Expected: counts that are not 0 <= successes <= n, or a level that is not a probability.
    """
    check.whole(successes=successes, n=n)
    check.at_least(0, n=n)
    check.between(0, n, successes=successes)
    if not 0 < level < 1:
        raise Expected(f"Expected level={level!r} between 0 and 1, both excluded.")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    # The ends are exactly 0 and 1 there; rounding would say 1e-17.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def student(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of a mean of n ≥ 2 independent values: mean ± t·s/√n with n − 1 degrees of freedom.

    Raises:
        Expected: fewer than two values.
    """
    from scipy.stats import t

    check.at_least(2, values=len(values))
    middle = fmean(values)
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return middle - half, middle + half


def score(x: Tensor, labels: Tensor, secret: Secret) -> dict[str, list[Any]]:
    """One guessed batch against the truth; the only function that sees a `Secret`.

    Args:
        x: guessed images `[b c h w]`, in any order.
        labels: guessed labels `[b]`.
        secret: the true batch.

    Returns:
        Lists of b numbers, in the order of the true batch and fit for JSON: `mse`, `psnr` (dB),
        `ssim`, `label_ok` (see `labels_found`; its mean is `label_accuracy`) and `order` (see `match`).

    Raises:
        Expected: the guess has another shape than the truth, or the truth is not in [0, 1].
    """
    order = match(x, secret.x)
    x = x[order.to(x.device)]
    scores = {"mse": mse, "psnr": psnr, "ssim": ssim}
    return {
        **{name: fn(x, secret.x).tolist() for name, fn in scores.items()},
        "label_ok": labels_found(labels, secret.y),
        "order": order.tolist(),
    }


def picture(x: Tensor) -> Tensor:
    """A guess as it is scored and shown: in [0, 1], mid-grey where it is not finite."""
    return torch.where(x.isfinite(), x, 0.5).clamp(0, 1)


def _pictures(guess: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU; the guess grey where it is not finite, and clamped to [0, 1]."""
    if truth.ndim != 4:
        raise Expected(f"Expected true images b c h w, got the shape {tuple(truth.shape)}.")
    if guess.shape != truth.shape:
        raise Expected(f"Expected a guess of b c h w = {tuple(truth.shape)}, got {tuple(guess.shape)}.")
    guess, truth = guess.detach().double().cpu(), truth.detach().double().cpu()
    check.finite(truth=truth)
    if truth.numel() and not 0 <= truth.min() <= truth.max() <= 1:
        raise Expected(f"Expected true images in [0, 1], got [{truth.min():g}, {truth.max():g}]: undo the scaling.")
    return picture(guess), truth

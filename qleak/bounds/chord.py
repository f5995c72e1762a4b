"""What rounding to nearest hides: a bound for codes without noise, by walkers that start at the truth.

Behind such a code all images of one polytope are one and the same to an attacker (`cells`), and Cramér–Rao has nothing to
say. If the update is linear there and x a draw of the prior, the truth is a draw of the posterior on that polytope. No
estimator errs less on average than the posterior's spread, E‖x − x̂‖² ≥ E tr Cov(x|M), and of this spread every chord
through the truth holds a part: given all other coordinates of an orthonormal basis, coordinate k is uniform on its chord
(or the prior's Gaussian, cut off there), so tr Cov ≥ Σ_k E chord_k²/12.

That is far too little, for polytopes of many faces are narrow from any point near their rim, yet wide. So two walkers
leave the truth along chords: Gibbs sampling, whose equilibrium is the posterior. They are in equilibrium from the first
step, since the truth is; and given the truth they are independent, so Cov(y, z) = Cov E[y|x] ≥ 0 and

    E‖y − z‖²/2 = tr Cov(x|M) − tr Cov E[y|x] ≤ tr Cov(x|M)

however short the walk: the bound is true at once, and tightens with every sweep. Most steps mirror the point in its
chord's law (over-relaxation, Adler, Phys. Rev. D 23, 1981), which keeps the equilibrium and walks faster; the last
sweep draws.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import log_ndtr, ndtri_exp
from torch import Generator

from qleak import random
from qleak.bounds.cells import Section, columns, moved
from qleak.bounds.cramer_rao import Errors
from qleak.check import whole

MIRRORED = 0.95  # share of the steps that mirror
BLOCK = 64  # directions between two looks at all rows
NEAR = 24  # one row in so many is looked at in every step
WORK = 4e9  # directions × rows × sweeps of a default walk: some twenty-five seconds
MOST = 64  # sweeps of a default walk


def sweeps_for(of: Section) -> int:
    """Sweeps that a default walk can afford, in [4, 64]: 64 for a LeNet on digits, 15 for one on colours."""
    return int(min(max(WORK / (of.V.shape[1] * len(of.u) + 1), 4), MOST))


def chords(of: Section) -> np.ndarray:
    """Lengths `[k]` in pixel units of the polytope's chords through the truth, along the directions."""
    out = np.empty(of.V.shape[1])
    for k in range(len(out)):
        low, high = _ends(of.u, columns(of, np.array([k]))[0])
        out[k] = (high - low) * np.linalg.norm(of.V[:, k])
    return out


def errors(of: Section, shape: tuple[int, ...], sweeps: int, gen: Generator) -> Errors:
    """The least mean squared error of an image `[…]` of `shape`, by two walks of `sweeps` over all directions.

    One image is one draw: `mc_error` takes the directions for independent.
    """
    whole(sweeps=sweeps)
    apart = (walk(of, sweeps, gen) - walk(of, sweeps, gen)) / math.sqrt(2)
    each = torch.from_numpy((apart * np.linalg.norm(of.V, axis=0)) ** 2)
    map = torch.from_numpy((of.V @ apart) ** 2)
    error = math.sqrt(2 / 3 * float(each.square().sum())) / len(map)
    return Errors(float(map.mean()), map.reshape(shape), error)


def walk(of: Section, sweeps: int, gen: Generator) -> np.ndarray:
    """Where a walker is after so many sweeps, along the directions `[k]`; the truth is 0.

    A step looks at the rows that could be in its way. All others have kept more room than the walker can have come
    since they were last looked at, so this is the walk that looks at all of them.
    """
    count = of.V.shape[1]
    u, s, at = of.u.copy(), of.s.copy(), np.zeros(count)
    near = min(len(u), max(256, len(u) // NEAR)) - 1
    for sweep in range(sweeps):
        order = random.permutation(gen, count).numpy()
        luck = random.uniform(gen, (count, 2)).double().numpy()
        done = 0
        while done < count:
            room = (1 - np.abs(u)) / of.reach
            limit = math.inf if near + 1 == len(u) else float(np.partition(room, near)[near])
            places = np.flatnonzero(room <= limit)
            some = order[done : done + BLOCK]
            rows, here = columns(of, some, places), u[places]
            steps, gone = np.zeros(len(some)), 0.0
            for j, k in enumerate(some):
                c = rows[j]
                low, high = _ends(here, c)
                if gone + max(high, -low) > limit:
                    if j:
                        break
                    low, high = _ends(u, columns(of, some[:1])[0])
                p, kind = luck[done + j]
                step = _draw(
                    low, high, float(of.P[k, k]), float(s[k]), None if kind < MIRRORED and sweep < sweeps - 1 else p
                )
                steps[j], gone = step, gone + abs(step)
                here = here + step * c
                at[k] += step
                s += step * of.P[k]
                if gone > limit:
                    j += 1
                    break
            else:
                j = len(some)
            u += moved(of, some[:j], steps[:j])
            done += j
    return at


def _ends(u: np.ndarray, c: np.ndarray) -> tuple[float, float]:
    """How far one may go back and forth along c with |u + tc| ≤ 1."""
    inverse = 1 / np.where(np.abs(c) < 1e-200, 1e-200, c)
    middle, half = u * inverse, np.abs(inverse)
    return min(-float((half + middle).min()), 0.0), max(float((half - middle).min()), 0.0)


def _draw(low: float, high: float, a: float, b: float, p: float | None) -> float:
    """A draw of exp(−½at² − bt) on [low, high] by its quantile p; for None, 0 mirrored: its quantile's complement."""
    if a * max(low * low, high * high) + abs(b) * (high - low) < 1e-4:
        return low + high if p is None else low + (high - low) * p
    root = math.sqrt(a)
    z0, z1, middle, sign = low * root + b / root, high * root + b / root, b / root, 1.0
    if z0 > 0:  # by the tail that has the numbers
        z0, z1, middle, sign = -z1, -z0, -middle, -1.0
        p = None if p is None else 1 - p
    if z1 - z0 < 1e-5:
        return low + high if p is None else low + (high - low) * p
    bottom, top = float(log_ndtr(z0)), float(log_ndtr(z1))
    least = math.exp(bottom - top)
    if p is None:
        p = 1 - min(max((math.exp(float(log_ndtr(middle)) - top) - least) / (1 - least), 0.0), 1.0)
    z = float(ndtri_exp(min(top + math.log(least + p * (1 - least) + 1e-300), -1e-300)))
    return min(max((sign * min(max(z, z0), z1) - b / root) / root, low), high)

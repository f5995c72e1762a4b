"""Gaussian image priors, of public images or of the spectrum of natural images: what an attacker knows beforehand.

x ~ N(m, C), pixels as vectors `[n]` of c·h·w numbers in [0, 1] units. Images drawn from it may leave [0, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from scipy.fft import idctn
from torch import Generator, Tensor

from qleak import data, random
from qleak.check import Expected, at_least, between, finite, positive


class Prior(NamedTuple):
    """N(m, C) over images: `mean [n]`, and C = B diag(values) Bᵀ by `values [n]` > 0 and orthonormal `basis [n n]`.

    `shape` is (c, h, w) of an image; `name` says where it is from.
    """

    mean: Tensor
    values: Tensor
    basis: Tensor
    shape: tuple[int, int, int]
    name: str

    def precision(self) -> Tensor:
        """C⁻¹ `[n n]`: the prior's own Fisher information."""
        return (self.basis / self.values) @ self.basis.T

    def covariance(self) -> Tensor:
        """C `[n n]`."""
        return (self.basis * self.values) @ self.basis.T

    def draw(self, gen: Generator, count: int) -> Tensor:
        """Images `[count c h w]`, float64."""
        z = random.normal(gen, (count, len(self.mean))).double()
        return (self.mean + (z * self.values.sqrt()) @ self.basis.T).reshape(count, *self.shape)


def fitted(images: Tensor, shrink: float = 0.1, floor: float = 1e-6, name: str = "") -> Prior:
    """The Gaussian of images `[k c h w]`: their mean and C = (1 − s)·S + s·diag_DCT(S) + floor·1.

    S is the covariance, and diag_DCT(S) keeps of it, in the 2-D cosine basis, what each frequency's channels have in
    common: a power spectrum, which few images are enough for. Shrinking towards it gives a full rank to any number.

    Args:
        images: public images, none of them a victim's.
        shrink: s in [0, 1]; 1 keeps the spectrum alone.
        floor: variance of every pixel that nothing explains, in squared [0, 1] units; half a grey level has 1e-6.
        name: where they are from.

    Raises:
        Expected: fewer than two images, numbers that are not finite, or an argument out of range.
    """
    at_least(2, images=len(images))
    between(0, 1, shrink=shrink)
    positive(floor=floor)
    finite(images=images)
    shape = tuple(images.shape[1:])
    flat = images.double().flatten(1)
    mean = flat.mean(0)
    centred = flat - mean
    c, plane = shape[0], dct_basis((1, *shape[1:]))
    waves = centred.reshape(len(flat), c, -1) @ plane
    power = einsum(waves, waves, "k a f, k b f -> a b f") / (len(flat) - 1)
    smooth = rearrange((plane * power[:, :, None]) @ plane.T, "a b p q -> (a p) (b q)")
    full = (1 - shrink) * (centred.T @ centred) / (len(flat) - 1) + shrink * smooth
    values, basis = torch.linalg.eigh(full)
    return Prior(mean, values.clamp(min=0) + floor, basis, shape, name or f"a Gaussian fitted to {len(flat):,}")  # type: ignore[arg-type]


def natural(
    shape: tuple[int, int, int] = (3, 32, 32), exponent: float = 2.0, std: float = 0.25, grey: float = 0.9
) -> Prior:
    """Natural images without data: grey on average, variance ∝ 1/f^exponent at spatial frequency f.

    Power spectra of natural images fall as 1/f² (Field, "Relations between the statistics of natural images and the
    response properties of cortical cells", JOSA A 1987). In the 2-D cosine basis; channels share `grey` of their variance.

    Args:
        shape: (c, h, w).
        exponent: α of the power spectrum.
        std: standard deviation of a pixel.
        grey: correlation of two channels, in [0, 1).
    """
    positive(std=std)
    at_least(0, exponent=exponent)
    if not 0 <= grey < 1:
        raise Expected(f"Expected grey={grey!r} in [0, 1).")
    c, h, w = shape
    u, v = torch.meshgrid(torch.arange(h).double() / h, torch.arange(w).double() / w, indexing="ij")
    f = (u.square() + v.square()).sqrt()
    power = f.clamp(min=0.5 / max(h, w)).pow(-exponent).flatten()  # f = 0 counts as half of the lowest frequency
    power = std**2 * power * len(power) / power.sum()
    mix = grey * torch.ones(c, c).double() + (1 - grey) * torch.eye(c).double()
    share, colours = torch.linalg.eigh(mix)
    plane = dct_basis((1, h, w))
    values = (share[:, None] * power).flatten()
    basis = torch.kron(colours.contiguous(), plane.contiguous())
    mean = torch.full((c * h * w,), 0.5, dtype=torch.float64)
    return Prior(mean, values, basis, shape, f"1/f^{exponent:g} spectrum")


def public(name: str, shape: tuple[int, int, int], but: Tensor | None = None, most: int = 12_000) -> Prior:
    """`fitted` to the data set `name`, without the images `but [k c h w]` (victims) and any copy of them.

    Raises:
        Expected: images of another shape, or fewer than two left.
    """
    images = data.load(name).x[:most]
    if tuple(images.shape[1:]) != tuple(shape):
        raise Expected(f"Expected images of {tuple(shape)} as the prior, got {name!r} of {tuple(images.shape[1:])}.")
    if but is not None:
        near = torch.cdist(images.flatten(1), but.flatten(1).float()).square().amin(1) / images[0].numel()
        images = images[near > 1e-4]
    return fitted(images, name=f"a Gaussian fitted to {len(images):,} of {name}")


def dct_basis(shape: tuple[int, ...]) -> Tensor:
    """The orthonormal cosine basis (DCT-II) of every channel: columns `[n n]`, float64."""
    c, h, w = shape
    plane = np.asarray(idctn(np.eye(h * w).reshape(h * w, h, w), axes=(1, 2), norm="ortho")).reshape(h * w, h * w)
    return torch.block_diag(*[torch.from_numpy(plane.T.copy())] * c)

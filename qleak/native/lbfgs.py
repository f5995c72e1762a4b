"""One update of the compact form of L-BFGS for all lanes: see `attacks/lbfgs.py`, whose tensors these are."""

from __future__ import annotations

import torch
from torch import Tensor

from qleak.native.build import call


def lbfgs(
    pairs: Tensor, inverse: Tensor, yy: Tensor, diagonal: Tensor, place: Tensor, pivot: Tensor, gamma: Tensor,
    y: Tensor, g: Tensor, used: int,
) -> Tensor:  # fmt: skip
    """−Hg `[lane d]`, after the pair in `place [lane]` has been entered into `inverse`, `yy` and `diagonal`, in place.

    Of the ring's places the first `used` hold pairs; the last of all is where those lie that are not to be entered.
    """
    lanes, places, _, d = pairs.shape
    place, pivot, gamma, y, g = (v.contiguous() for v in (place, pivot.double(), gamma, y, g))
    found = torch.empty_like(g)
    held = (pairs, inverse, yy, diagonal, place, pivot, gamma, y, g, found)
    call("lbfgs", pairs.dtype)(*(v.data_ptr() for v in held), lanes, places, used, d)
    return found

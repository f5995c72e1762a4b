"""One update of the compact form of L-BFGS for all lanes: see `attacks/lbfgs.py`, whose tensors these are."""

from __future__ import annotations

import torch
from torch import Tensor

from qleak.native.build import address, call


def lbfgs(
    pairs: Tensor, inverse: Tensor, yy: Tensor, diagonal: Tensor, place: Tensor, pivot: Tensor, gamma: Tensor,
    y: Tensor, g: Tensor, used: int,
) -> Tensor:  # fmt: skip
    """−Hg `[lane d]`, after the pair in `place [lane]` has been entered into `inverse`, `yy` and `diagonal`, in place.

    Of the ring's places the first `used` hold pairs; the last of all is where those lie that are not to be entered.
    """
    (lanes, places, _, d), kind = pairs.shape, pairs.dtype
    if not all(v.is_contiguous() for v in (pairs, inverse, yy, diagonal)):
        raise ValueError("Expected pairs and matrices in one piece: they are written in place.")
    place, pivot, gamma, y, g = (v.contiguous() for v in (place, pivot.double(), gamma, y, g))
    found = torch.empty_like(g)
    square, one = [address(v, torch.float64, lanes, places, places) for v in (inverse, yy)], (lanes,)
    call("lbfgs", kind)(
        pairs.data_ptr(), *square, address(diagonal, torch.float64, lanes, places),
        address(place, torch.int64, *one), address(pivot, torch.float64, *one), address(gamma, kind, *one),
        *(address(v, kind, lanes, d) for v in (y, g)), found.data_ptr(), lanes, places, used, d,
    )  # fmt: skip
    return found

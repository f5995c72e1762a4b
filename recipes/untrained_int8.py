"""An int8 gradient of an untrained colour LeNet gives its photograph back, to an attacker who reads codes as cells.

Systems 1 and 2 in the setting of the first paper: the sigmoid LeNet with weights U(−0.5, 0.5), one 32×32
photograph. The first photograph is attacked from 16 starts, the others from two. With the exact gradient `cells`
succeeds from every start, and `closed_form` needs none.

Claims:
    fp32 cells success_rate >= 1.0
    fp32 closed_form psnr_selected >= 90
    uniform(bits=8) refine psnr_selected >= 30
    uniform(bits=8) cells psnr_selected >= 28
    uniform(bits=8) dlg psnr_selected <= 22
"""

from qleak.catalog import build, several
from qleak.channels import chain, identity, uniform
from qleak.plans import Audit

OTHERS = ("cells()", "refine()", "closed_form()")


def untrained_int8(
    bits: int = 8,
    seeds: int = 16,
    others: int = 2,
    photos: int = 6,
    model: str = "lenet",
    data: str = "photos",
    attacks: str = "all",
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        bits: bits of the uniform quantizer.
        seeds: restarts on the first photograph.
        others: restarts on each of the others.
        photos: number of photographs.
        model: a model of `qleak ls models`.
        data: a data set of 32×32 colour images.
        attacks: "all", or attacks separated by ";".
        full: the papers' size: 32 restarts everywhere, 300 × 20 closures.
    """
    outer = 300 if full else 30
    return Audit(
        model=build("models", model),
        data=data,
        victims=tuple(range(photos)),
        channels=(identity(), chain(uniform(bits=bits))),
        attacks=several("attacks", attacks, (f"dlg(outer={outer})", f"idlg(outer={outer})", *OTHERS)),
        restarts=32 if full else (seeds, *(others,) * (photos - 1)),
    )

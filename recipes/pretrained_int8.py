"""An int8 gradient of a trained LeNet gives its digit back: 50 dB, 3 of 3, where the 2019 attack sees 5 dB of noise.

Systems 1 and 2: the sigmoid LeNet of the first gradient inversion papers, trained on MNIST to 98.7 %, and digits it
has never seen. Arms {fp32, int8} × {dlg, idlg, cells, refine, closed_form}: the attackers of 2019 and 2020, who take
the decoded numbers at face value, two who know the quantizer (from a random start, and from the closed form), and the
solve that needs no iteration. "Gradients of a trained net are small" protects against the first two only.

Claims:
    uniform(bits=8) refine psnr_selected >= 45
    uniform(bits=8) refine recovered >= 3
    uniform(bits=8) dlg psnr_selected <= 10
    uniform(bits=8) idlg psnr_selected <= 10
    fp32 dlg psnr_selected <= 10
    fp32 closed_form psnr_selected >= 100
"""

from qleak.catalog import build, several
from qleak.channels import chain, identity, uniform
from qleak.plans import Audit

OTHERS = ("cells(slack=1.0)", "refine()", "closed_form()")


def pretrained_int8(
    bits: int = 8,
    seeds: int = 1,
    victims: int = 3,
    first: int = 100,
    model: str = "lenet-mnist",
    data: str = "mnist5k",
    attacks: str = "all",
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        bits: bits of the uniform quantizer.
        seeds: restarts per victim and arm.
        victims: number of images, evenly spread over the 5,000 digits.
        first: index of the first one.
        model: a model of `qleak ls models`.
        data: a data set of 28×28 grey images.
        attacks: "all", or attacks separated by ";".
        full: the papers' size: 32 restarts, 300 × 20 closures.
    """
    outer = 300 if full else 20
    return Audit(
        model=build("models", model),
        data=data,
        victims=tuple(first + 5000 // victims * i for i in range(victims)) if victims > 0 else (),
        channels=(identity(), chain(uniform(bits=bits))),
        attacks=several("attacks", attacks, (f"dlg(outer={outer})", f"idlg(outer={outer})", *OTHERS)),
        restarts=32 if full else seeds,
    )

"""How often does an attack diverge? One photograph, one setting, many random starts.

The success rate over starts of the 2019 attack, the 2020 one with the label inferred first, and `cells`, on the exact
gradient and behind 8 bits, with Wilson's interval.

Measured: `cells` rebuilds the photograph from 16 of 16 starts (45.7 dB from the exact gradient, 28.4 behind 8 bits); dlg
and idlg from none within 600 closures, best 12.6 and 13.6 dB.

Claims:
    fp32 cells success_rate >= 1
    uniform(bits=8) cells success_rate >= 1
    fp32 dlg success_rate <= 0.1
    fp32 idlg success_rate <= 0.1
"""

from qleak.catalog import build, several
from qleak.plans import Audit


def seeds(
    channel: str = "chain(uniform(bits=8))",
    starts: int = 16,
    images: int = 1,
    model: str = "lenet",
    data: str = "photos",
    outer: int = 30,
    attacks: str = "all",
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        channel: beside the identity.
        starts: random starts on each image.
        images: the first so many images of the set.
        model: a model of `qleak ls models`, or run:ID.
        data: a data set that fits it.
        outer: outer iterations of `dlg` and `idlg`, 20 closures each.
        attacks: "all", or attacks separated by ";".
        full: 256 starts, 300 outer iterations.
    """
    outer = 300 if full else outer
    return Audit(
        model=build("models", model),
        data=data,
        victims=tuple(range(images)),
        channels=(build("channels", "chain()"), build("channels", channel)),
        attacks=several("attacks", attacks, (f"dlg(outer={outer})", f"idlg(outer={outer})", "cells()")),
        restarts=256 if full else starts,
    )

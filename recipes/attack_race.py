"""Which attack wins at equal time? Every attack of the package on the same victims, the same CPU seconds each.

The figure shows PSNR over seconds. What an attack holds at a moment is its iterate of lowest own loss; attacks that are
done early keep what they have.

Measured (exact gradient, two photographs, 40 CPU seconds each): closed_form 99 dB after 7 s, refine 69, cells 46 after 19 s,
levenberg_marquardt 41, idlg 38, dlg 21, modern 19, inverting_gradients 13, cpl 11, see_through 8. Before the closed form
is done, `cells` leads from the first second on.

Claims:
    fp32 closed_form psnr_selected >= 90
    fp32 cells psnr_selected >= 35
"""

from qleak.catalog import build, several
from qleak.plans import Audit

ATTACKS = (
    "dlg()", "idlg()", "cpl()", "inverting_gradients(steps=2000)", "modern(steps=2000)", "see_through(steps=1000)",
    "closed_form()", "refine()", "levenberg_marquardt()", "cells()",
)  # fmt: skip


def attack_race(
    channel: str = "chain()",
    images: int = 2,
    seconds: float = 40.0,
    attacks: str = "all",
    model: str = "lenet",
    data: str = "photos",
    batch: int = 1,
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        channel: what stands between.
        images: victims.
        seconds: CPU seconds of every attack for all its victims together.
        attacks: "all", or attacks separated by ";".
        model: a model of `qleak ls models`, or run:ID.
        data: a data set that fits it.
        batch: images in one gradient.
        full: ten times the seconds, four times the victims.
    """
    images, seconds = (4 * images, 10 * seconds) if full else (images, seconds)
    return Audit(
        model=build("models", model),
        data=data,
        victims=tuple(range(0, images * batch, batch)),
        channels=(build("channels", channel),),
        attacks=several("attacks", attacks, ATTACKS),
        client=build("clients", f"gradient(batch={batch})"),
        controls=0,
        seconds=seconds,
    )

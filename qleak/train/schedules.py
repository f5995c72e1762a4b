"""Factors on the server's learning rate, by their text in a plan."""

from __future__ import annotations

import re

from qleak.check import Expected
from qleak.train.loop import cosine


def factor(schedule: str, done: int, epoch: int, total: int) -> float:
    """The factor after `done` of `total` rounds, `epoch` rounds an epoch.

    "constant"; "cosine": half a cosine from 1 to 0 over all rounds; "decay(γ)": γ^e in epoch e = 0, 1, …, which is
    `torch.optim.lr_scheduler.StepLR` with a step of one epoch.

    Raises:
        Expected: another text, or γ outside (0, 1].
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return cosine(done / total)
    found = re.fullmatch(r"decay\((?:gamma=)?(0?\.\d+|1(?:\.0*)?)\)", schedule.replace(" ", ""))
    if not found or float(found.group(1)) <= 0:
        raise Expected(
            f"Expected schedule={schedule!r} to be constant, cosine or decay(0.9), a factor in (0, 1] an epoch."
        )
    return float(found.group(1)) ** (done // epoch)

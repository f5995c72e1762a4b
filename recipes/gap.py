"""How far are attacks from what no attacker can beat? Best attack against bound, over noise and grids of any fineness.

For noise and coins the bound is the local linearised one with a Gaussian prior of public photographs (`qleak.bounds`), by
the exact Fisher information of the noise or the coins' own law; for rounding to nearest it is that of the cells ("chord").
Rounding taken for Gaussian noise is an estimate and no bound. docs/bounds.md says what is a theorem. The bounds follow the
attacks in the same run.

Measured (four photographs, colour LeNet, one start each; attack, bound in dB): Gaussian noise of 1e-4 41.6, 54.9; 1e-3 34.2,
42.4; 0.01 24.7, 29.3; 0.1 15.0, 20.0. By a coin, 256 levels 32.6, 41.4; 40 levels 25.6, 30.8; 16 levels 20.4, 26.3; 4 levels 12.5,
20.4. Rounding (bound by cells): 256 levels 33.9, 54.1; 40 levels 25.4, 43.8; 16 levels 22.3, 39.3; 4 levels 18.6, 29.1. No
attack beats its bound on any photograph. Behind coarse noise and coins 5 to 8 dB are left; behind rounding 10 to 20, which a
longer walk would narrow. 21 minutes on one core, nearly all of them the cells'.

Claims:
    gaussian(sigma=0.0001, unbounded=True) adaptive psnr_selected >= 38
    gaussian(sigma=0.001, unbounded=True) adaptive psnr_selected >= 30
    gaussian(sigma=0.01, unbounded=True) adaptive psnr_selected >= 21
    gaussian(sigma=0.1, unbounded=True) adaptive psnr_selected <= 19
    uniform(levels=256) adaptive psnr_selected >= 30
    uniform(levels=4) adaptive psnr_selected >= 16
    stochastic(levels=4) adaptive psnr_selected <= 16
"""

from qleak.catalog import build, several
from qleak.plans import Audit

SIGMAS = (1e-4, 1e-3, 1e-2, 1e-1)
LEVELS = (256, 40, 16, 4)
CHANNELS = (
    *(f"chain(gaussian(sigma={s}, unbounded=True))" for s in SIGMAS),
    *(f"chain(uniform(levels={n}))" for n in LEVELS),
    *(f"chain(stochastic(levels={n}))" for n in LEVELS),
)


def gap(
    channels: str = "all",
    images: int = 4,
    seeds: int = 1,
    model: str = "lenet",
    data: str = "photos",
    attacks: str = "all",
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        channels: "all", or channels separated by ";".
        images: the first so many images of the set.
        seeds: restarts on each of them.
        model: a model of `qleak ls models`, or run:ID.
        data: a data set that fits it.
        attacks: "all", or attacks separated by ";".
        full: 8 restarts on 6 images.
    """
    return Audit(
        model=build("models", model),
        data=data,
        victims=tuple(range(6 if full else images)),
        channels=several("channels", channels, CHANNELS),
        attacks=several("attacks", attacks, ("adaptive()",)),
        restarts=8 if full else seeds,
        wrong=1,
        bounds="yes",
    )

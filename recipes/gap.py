"""How far are attacks from what no attacker can beat? Best attack against bound, over noise and grids of any fineness.

For noise and coins the bound is the local linearised one with a Gaussian prior of public photographs (`qleak.bounds`), by
the exact Fisher information of the noise or the coins' own law; for rounding to nearest it is that of the cells ("chord").
Rounding taken for Gaussian noise is an estimate and no bound. docs/bounds.md says what is a theorem. The bounds follow the
attacks in the same run.

Measured (six photographs, colour LeNet, the messages and attacks of `quantization_sweep`, eight restarts; attack, local
bound in dB): Gaussian noise of 1e-4 41.3, 50.4; 1e-3 32.9, 38.2; 0.01 23.2, 27.8; 0.1 13.4, 19.5. By a coin, 256 levels 32.3,
37.1; 40 levels 24.3, 28.8; 16 levels 20.9, 25.1; 4 levels 11.4, 19.7. Rounding (one photograph; attack, bound by cells): 256
levels 30.8, 47.0; 40 levels 25.6, 37.6; 16 levels 23.3, 33.4; 4 levels 20.1, 24.2. No attack beats its bound. Behind noise and
coins 4 to 9 dB are left; behind rounding 4 to 16, which a longer walk would narrow.

Claims:
    gaussian(sigma=0.0001, unbounded=True) adaptive psnr_selected >= 38
    gaussian(sigma=0.001, unbounded=True) adaptive psnr_selected >= 30
    gaussian(sigma=0.01, unbounded=True) adaptive psnr_selected >= 21
    gaussian(sigma=0.1, unbounded=True) adaptive psnr_selected <= 19
    uniform(levels=256) adaptive psnr_selected >= 30
    uniform(levels=4) adaptive psnr_selected >= 16
    stochastic(levels=4) adaptive psnr_selected <= 16
"""

from qleak.attacks import adaptive
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
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        channels: "all", or channels separated by ";".
        images: the first so many images of the set.
        seeds: restarts on each of them.
        model: a model of `qleak ls models`, or run:ID.
        data: a data set that fits it.
        full: 8 restarts on 6 images.
    """
    return Audit(
        model=build("models", model),
        data=data,
        victims=tuple(range(6 if full else images)),
        channels=several("channels", channels, CHANNELS),
        attacks=(adaptive(),),
        restarts=8 if full else seeds,
        wrong=1,
        bounds="yes",
    )

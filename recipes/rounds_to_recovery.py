"""How many rounds until a random channel has told everything? The same batch sent again and again, likelihoods added.

Stochastic rounding to few levels, TernGrad and noise hide an image once; each round is a new draw of the same
gradient. The first number of rounds that rebuilds an image is the channel's rounds-to-recovery.

Measured (three photographs): four stochastic levels go from 11.4 dB in one round to 19.2 in 16 and 21.8 in 64, noise of
0.1 from 14.5 to 22.7. TernGrad stays at 8 dB for all 64 rounds: its codes are almost all zero, and their mean says
little more than their first draw.

Claims:
    rounds(channel=chain(stochastic(levels=4)), times=1) adaptive psnr_selected <= 14
    rounds(channel=chain(stochastic(levels=4)), times=64) adaptive psnr_selected >= 19
    rounds(channel=chain(terngrad), times=64) adaptive psnr_selected <= 11
    rounds(channel=chain(gaussian(sigma=0.1, unbounded=True)), times=64) adaptive psnr_selected >= 20
"""

from qleak.catalog import build, several
from qleak.channels import rounds
from qleak.plans import Audit


def rounds_to_recovery(
    channels: str = "chain(stochastic(levels=4));chain(terngrad());chain(gaussian(sigma=0.1, unbounded=True))",
    times: str = "1,4,16,64",
    images: int = 3,
    model: str = "lenet",
    data: str = "photos",
    attacks: str = "all",
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        channels: random channels separated by ";".
        times: numbers of rounds.
        images: the first so many images of the set.
        model: a model of `qleak ls models`, or run:ID.
        data: a data set that fits it.
        attacks: "all", or attacks separated by ";".
        full: 8 restarts on six images.
    """
    return Audit(
        model=build("models", model),
        data=data,
        victims=tuple(range(6 if full else images)),
        channels=tuple(rounds(c, int(k)) for c in several("channels", channels, ()) for k in times.split(",")),
        attacks=several("attacks", attacks, ("adaptive()",)),
        restarts=8 if full else 1,
        wrong=1,
    )

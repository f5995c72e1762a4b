"""How many rounds until a random channel has told everything? The same batch sent again and again, likelihoods added.

Stochastic rounding to few levels, TernGrad and noise hide an image once; each round is a new draw of the same
gradient. The first number of rounds that rebuilds an image is the channel's rounds-to-recovery.
"""

from qleak.attacks import adaptive
from qleak.catalog import build, several
from qleak.channels import rounds
from qleak.plans import Audit


def rounds_to_recovery(
    channels: str = "chain(stochastic(levels=4));chain(terngrad());chain(gaussian(sigma=0.1, unbounded=True))",
    times: str = "1,4,16,64",
    images: int = 3,
    model: str = "lenet",
    data: str = "photos",
    full: bool = False,
) -> Audit:
    """The plan.

    Args:
        channels: random channels separated by ";".
        times: numbers of rounds.
        images: the first so many images of the set.
        model: a model of `qleak ls models`, or run:ID.
        data: a data set that fits it.
        full: 8 restarts on six images.
    """
    return Audit(
        model=build("models", model),
        data=data,
        victims=tuple(range(6 if full else images)),
        channels=tuple(rounds(c, int(k)) for c in several("channels", channels, ()) for k in times.split(",")),
        attacks=(adaptive(),),
        restarts=8 if full else 1,
        wrong=1,
    )

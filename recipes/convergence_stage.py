"""Does the attack work at every stage of convergence? The same digits, attacked at the start, the middle and the end.

A sigmoid LeNet learns the embedded digits through each channel; in the first round, half-way and in the last one its
own weights are used to attack some of its first batches of one.

Measured: yes, for one who knows the net. From the first round to the last the closed form has 115–120 dB on the exact
gradient, and `refine` 49–54 dB behind 8 bits. The attack of 2019 falls off as the net learns: mean 81, 54, 20 dB on the
exact gradient, 43, 33, 7 dB behind 8 bits (the optimisation fails, not the information).

Claims:
    fp32 round-1.closed_form psnr_selected >= 100
    fp32 round-2000.closed_form psnr_selected >= 100
    uniform(bits=8) round-1.refine psnr_selected >= 45
    uniform(bits=8) round-2000.refine psnr_selected >= 45
    fp32 round-1.dlg psnr_selected >= 60
    uniform(bits=8) round-2000.dlg psnr_selected <= 20
"""

from qleak.catalog import build, several
from qleak.client import gradient
from qleak.plans import Training
from qleak.train import adam

OTHERS = ("cells(slack=1.0)", "adaptive()", "refine()", "closed_form()")


def convergence_stage(
    model: str = "lenet(channels=1, size=28, classes=10)",
    data: str = "mnist5k",
    bits: int = 8,
    rounds: str = "1,500,2000",
    limit: int = 2000,
    victims: int = 4,
    lr: float = 1e-3,
    attacks: str = "all",
    full: bool = False,
) -> Training:
    """The plan.

    Args:
        model: a model of `qleak ls models`.
        data: what it learns.
        bits: of the uniform quantizer beside the identity.
        rounds: rounds whose weights are attacked, counted from 1.
        limit: training images of an epoch, one image a round.
        victims: training images attacked.
        lr: learning rate of Adam.
        attacks: "all", or attacks separated by ";".
        full: the 2019 attack at 300 × 20 closures.
    """
    return Training(
        model=build("models", model),
        data=data,
        channels=(build("channels", "chain()"), build("channels", f"chain(uniform(bits={bits}))")),
        client=gradient(batch=1),
        epochs=1,
        rule=adam(),
        lr=lr,
        limit=limit,
        seeds=1,
        attack_rounds=tuple(int(r) for r in rounds.split(",")),
        attacks=several("attacks", attacks, (f"dlg(outer={300 if full else 20})", *OTHERS)),
        victims=victims,
    )

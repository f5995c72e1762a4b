"""What training takes from the attacker: the same digits, one architecture, untrained and trained.

The first papers attack fresh weights U(−0.5, 0.5). The trained LeNet has seen MNIST without these digits. The table of
gradient norms stands beside that of the attacks, layer by layer: what a net is right about has a small output error, and
every gradient is that error sent back.

Measured (8 digits): training makes the gradient 250 times smaller (norm 23.5 against 0.094, every layer alike) and stops
the 2020 attack (83 dB against 4, 0 of 8), not one that reads errors instead of labels (`cells` 108 against 64 dB, 8 and
6 of 8), nor the closed form (119 dB on both): smaller is not less.

Claims:
    untrained fp32 idlg psnr_selected >= 40
    trained fp32 idlg psnr_selected <= 10
    trained fp32 cells recovered >= 5
    trained fp32 closed_form psnr_selected >= 100
"""

from qleak.catalog import build, several
from qleak.plans import Audit, Study
from qleak.plans.victims import fitting, spread


def trained_vs_untrained(
    data: str = "mnist5k",
    images: int = 8,
    untrained: str = "lenet(channels=1, size=28, classes=10)",
    trained: str = "lenet-mnist",
    channels: str = "chain()",
    outer: int = 30,
    restarts: int = 1,
    attacks: str = "all",
    full: bool = False,
) -> Study:
    """The plan.

    Args:
        data: a data set that fits both nets, and that the trained one has not seen.
        images: images attacked, spread over the set.
        untrained: a model with fresh weights.
        trained: the same architecture with trained ones; run:ID for one of your own.
        channels: channels separated by ";".
        outer: outer iterations of `idlg`, 20 closures each.
        restarts: random starts on each image.
        attacks: "all", or attacks separated by ";".
        full: 100 images, 4 restarts, 300 outer iterations.
    """
    outer = 300 if full else outer
    _, count = fitting(untrained, data)
    victims = spread(count, 1, 100 if full else images)
    parts = [
        Audit(
            model=build("models", name),
            data=data,
            victims=victims,
            channels=several("channels", channels, ("chain()",)),
            attacks=several("attacks", attacks, (f"idlg(outer={outer})", "cells()", "closed_form()")),
            restarts=4 if full else restarts,
            wrong=2,
            chunk=8,
        )
        for name in (untrained, trained)
    ]
    return Study(("untrained", "trained"), tuple(parts))

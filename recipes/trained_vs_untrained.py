"""What training takes from the attacker: the same digits, one architecture, untrained and trained.

The first papers attack fresh weights U(−0.5, 0.5). The trained LeNet has seen MNIST without these digits. The table of
gradient norms stands beside that of the attacks, layer by layer: what a net is right about has a small output error, and
every gradient is that error sent back.
"""

from qleak.attacks import cells, closed_form, idlg
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
            attacks=(idlg(outer=outer), cells(), closed_form()),
            restarts=4 if full else restarts,
            wrong=2,
            chunk=8,
        )
        for name in (untrained, trained)
    ]
    return Study(("untrained", "trained"), tuple(parts))

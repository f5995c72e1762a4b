"""Does a larger batch hide its images? The same images, alone and averaged into gradients of ever larger batches.

Blocks of consecutive images, spread over the set, are cut into batches of each size, so that every size is asked about
the same images. Labels are inferred from each gradient. Batches are taken from a set in mixed order: `mnist5k` is
sorted by class, and in a batch of one class there is nothing to tell apart.
"""

from qleak.attacks import cells
from qleak.catalog import several
from qleak.client import gradient
from qleak.plans import Audit, Study
from qleak.plans.victims import cut, fitting, numbers, spread


def batch_size(
    batches: str = "1,2,4,8",
    model: str = "lenet(channels=1, size=28, classes=10)",
    data: str = "mnist",
    blocks: int = 2,
    channels: str = "chain()",
    restarts: int = 1,
    full: bool = False,
) -> Study:
    """The plan.

    Args:
        batches: batch sizes; each divides the largest.
        model: a model of `qleak ls models`, run:ID, or "auto" for the first papers' LeNet in the set's shape.
        data: a data set that fits it, in mixed order.
        blocks: blocks of as many images as the largest batch holds.
        channels: channels separated by ";".
        restarts: random starts on each batch.
        full: batches of 1 to 64, 4 restarts.
    """
    sizes = numbers("1,2,4,8,16,32,64" if full else batches, "batches")
    net, count = fitting(model, data)
    places = spread(count, sizes[-1], blocks)
    parts = [
        Audit(
            model=net,
            data=data,
            victims=cut(places, sizes[-1], b),
            channels=several("channels", channels, ("chain()",)),
            attacks=(cells(),),
            client=gradient(batch=b),
            restarts=4 if full else restarts,
            wrong=1,
            chunk=max(1, sizes[-1] // b),
        )
        for b in sizes
    ]
    return Study(tuple(f"batch-{b}" for b in sizes), tuple(parts))

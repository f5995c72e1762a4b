"""Does a larger batch hide its images? The same images, alone and averaged into gradients of ever larger batches.

Blocks of consecutive images, spread over the set, are cut into batches of each size, so that every size is asked about
the same images. Labels are inferred from each gradient. Batches are taken from a set in mixed order: `mnist5k` is
sorted by class, and in a batch of one class there is nothing to tell apart.

Measured (16 digits, sigmoid LeNet, labels inferred, all right): median PSNR 107.6, 102.6, 55.5 and 51.5 dB at batches of 1,
2, 4 and 8, of which 16, 14, 13 and 13 of 16 images are rebuilt. A grey batch of 8 has more equations than pixels; a
colour batch of 8 (32×32, `--model lenet --data cifar10-12k`) has fewer, and there it comes to about 15 dB.

Claims:
    batch-1 fp32 cells psnr_selected >= 80
    batch-4 fp32 cells psnr_selected >= 35
    batch-8 fp32 cells psnr_selected >= 30
    batch-8 fp32 cells label_accuracy >= 0.99
"""

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
    attacks: str = "all",
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
        attacks: "all", or attacks separated by ";".
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
            attacks=several("attacks", attacks, ("cells()",)),
            client=gradient(batch=b),
            restarts=4 if full else restarts,
            wrong=1,
            chunk=max(1, sizes[-1] // b),
        )
        for b in sizes
    ]
    return Study(tuple(f"batch-{b}" for b in sizes), tuple(parts))

"""What do batch-norm statistics give away? One attack on the same batches, with and without what the norms saw of them.

See through Gradients (Yin et al., CVPR 2021) pulls the statistics of its guess towards known ones: those of the secret
batch itself, where clients share them as buffers of their model, or the running ones of a trained net. Beside it stands
inverting gradients, which has no use for either.

Measured (batches of 4, 300 closures, untrained ResNet-8): nothing is rebuilt either way, see through gradients 7.0 dB
without and 8.1 with the batch's statistics, inverting gradients 9.0: at this budget neither shows what the statistics give
away, which is no proof that they give away little.

Claims (--data cifar10-12k):
    shared-batch fp32 see_through psnr_selected <= 12
    shared-none fp32 see_through psnr_selected <= 12
"""

from qleak.attacks import inverting_gradients, see_through
from qleak.channels import identity
from qleak.check import Expected
from qleak.client import gradient
from qleak.plans import Audit, Study
from qleak.plans.victims import fitting, spread

GRANTS = {"none": (), "running": ("buffers",), "batch": ("statistics",)}


def batchnorm_prior(
    grants: str = "none,batch",
    model: str = "resnet(depth=8, width=8, mode='train')",
    data: str = "cifar10",
    batch: int = 4,
    batches: int = 2,
    steps: int = 300,
    factor: float = 1e-4,
    statistics: float = 0.1,
    group: int = 1,
    full: bool = False,
) -> Study:
    """The plan.

    Args:
        grants: what the threat model shares, separated by commas: none, running (statistics of the model; an
            untrained net has none to share), batch (what the norms saw of the secret batch).
        model: a model with batch norm, or run:ID.
        data: a data set that fits it, such as cifar10-12k.
        batch: images of one update.
        batches: updates attacked, spread over the set.
        steps: closures of every start.
        factor: weight of the evidence in see through gradients, twice.
        statistics: weight of the statistics there.
        group: starts that pull towards each other.
        full: the paper's 20,000 closures and groups of four, 8 batches.
    """
    steps, group, batches = (20000, 4, 8) if full else (steps, group, batches)
    net, count = fitting(model, data)
    chosen = [name.strip() for name in grants.split(",")]
    for name in chosen:
        if name not in GRANTS:
            raise Expected(f"Expected grants={grants!r} of: {', '.join(GRANTS)}.")
    parts = [
        Audit(
            model=net,
            data=data,
            victims=spread(count, batch, batches),
            channels=(identity(),),
            attacks=(
                see_through(steps=steps, factor=factor, statistics=statistics, group=group),
                inverting_gradients(steps=steps),
            ),
            client=gradient(batch=batch),
            wrong=1,
            grants=GRANTS[name],
            chunk=1,
        )
        for name in chosen
    ]
    return Study(tuple(f"shared-{name}" for name in chosen), tuple(parts))

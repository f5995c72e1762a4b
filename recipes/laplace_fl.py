"""Federated learning with Laplace noise on unclipped gradients, as published code does it: its ε is a label.

One client sends the mean gradient of 64 digits a step, Laplace(mean, sensitivity/ε) is added to every coordinate of each of
its eight tensors, and the server takes an Adadelta step. Nothing bounds a gradient's L1 norm, so no ε is reported; the
nominal one stands beside the norm that was measured. The second part divides the noise by √8.
`--sync epoch` is the code as it was written, bug for bug: the client keeps its weights for an epoch and sends the sum of
its gradients since.

Measured (6,400 digits, 100 steps, three seeds, test accuracy at nominal ε 0.1, 0.5, 1, 10, 100, 1000): 5.8, 16.3, 32.2, 84.2,
93.0, 95.1 % unscaled, 9.5, 45.1, 69.3, 87.6, 94.8, 95.1 % divided by √8, 94.8 % without noise. The L1 norm of one update is
400 to 2,300, where the label assumes 1.

Claims:
    unscaled fp32 training test_accuracy >= 0.93
    unscaled nominal_laplace(eps=0.1) training test_accuracy <= 0.15
    unscaled nominal_laplace(eps=10.0) training test_accuracy >= 0.75
    unscaled nominal_laplace training test_accuracy <= 0.5
    scaled nominal_laplace(by_tensors=True) training test_accuracy >= 0.6
"""

from qleak.catalog import build
from qleak.channels import chain, nominal_laplace
from qleak.check import one_of
from qleak.client import gradient
from qleak.plans import Study, Training
from qleak.plans.levels import levels
from qleak.train import adadelta

PARTS = {"unscaled": False, "scaled": True}


def laplace_fl(
    eps: str = "0.1,0.5,1,10,100,1000",
    sensitivity: float = 1.0,
    mean: float = 0.0,
    scale_by_tensors: str = "both",
    epochs: int = 1,
    batch: int = 64,
    lr: float = 1.0,
    limit: int = 6400,
    test: int = 1000,
    seeds: int = 3,
    sync: str = "step",
    data: str = "mnist",
    model: str = "mnist_net",
    full: bool = False,
) -> Study:
    """The plan.

    Args:
        eps: nominal ε, separated by commas; a training without noise is always beside them.
        sensitivity: the L1 sensitivity that the noise assumes, and nothing enforces.
        mean: location of the noise.
        scale_by_tensors: noise divided by √m, m the number of tensors: "yes", "no", or "both", a part each.
        epochs: passes over the training images.
        batch: images of one gradient.
        lr: learning rate of Adadelta, times 0.7 from epoch to epoch.
        limit: training images; 0 for all.
        test: test images; 0 for all.
        seeds: trainings per channel.
        sync: "step" (new weights every step) or "epoch" (the fault of the published code).
        data: a data set of the model's shape.
        model: a model of `qleak ls models`.
        full: ε from 0.1 to 1.0 in tenths, 14 epochs, all images.
    """
    one_of(["both", "yes", "no"], scale_by_tensors=scale_by_tensors)
    labels = [i / 10 for i in range(1, 11)] if full else levels(eps, "eps")
    names = {"both": ("unscaled", "scaled"), "yes": ("scaled",), "no": ("unscaled",)}[scale_by_tensors]
    parts = [
        Training(
            model=build("models", model),
            data=data,
            channels=(chain(), *(chain(nominal_laplace(e, sensitivity, mean, PARTS[name])) for e in labels)),
            client=gradient(batch=batch),
            epochs=14 if full else epochs,
            rule=adadelta(),
            lr=lr,
            schedule="decay(0.7)",
            seeds=seeds,
            limit=0 if full else limit,
            test_limit=0 if full else test,
            sync=sync,
            update_norms=True,
        )
        for name in names
    ]
    return Study(names, tuple(parts))

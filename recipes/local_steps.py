"""Do local steps hide images? The same images in one gradient step, and in several on ever smaller minibatches.

A client of federated averaging sends the sum of K steps. `any_order(cells())` simulates them, and searches for the
order in which they saw the inferred labels; `one_gradient(cells())` takes the sum for a single mean gradient. The images
are the same for every K: K minibatches of one K-th of them, and passes over single images where K is larger than
their number.

Measured (8 digits of two clients, labels and order unknown): no, for one who simulates them. Median PSNR 50.1 dB for one
step (7 of 8 rebuilt), 69.4 for two (8 of 8), 45.4 for four (8 of 8), 25.9 for eight in two passes (4 of 8); several steps
are several looks. One who takes the sum for a gradient has 5.9, 4.6 and 4.8 dB, less than without any evidence.

Claims:
    steps-1 fp32 cells psnr_selected >= 33
    steps-2 fp32 any_order psnr_selected >= 50
    steps-4 fp32 any_order psnr_selected >= 35
    steps-2 fp32 one_gradient psnr_selected <= 10
    steps-4 fp32 one_gradient psnr_selected <= 10
"""

from qleak.attacks import any_order, one_gradient
from qleak.catalog import build
from qleak.channels import identity
from qleak.check import Expected
from qleak.client import local_sgd
from qleak.plans import Audit, Study
from qleak.plans.victims import fitting, numbers, spread
from qleak.types import Client


def local_steps(
    steps: str = "1,2,4,8",
    images: int = 4,
    lr: float = 0.05,
    momentum: float = 0.0,
    model: str = "lenet(channels=1, size=28, classes=10)",
    data: str = "mnist",
    clients: int = 2,
    restarts: int = 1,
    attack: str = "cells(stages=5, steps=60, last=100)",
    full: bool = False,
) -> Study:
    """The plan.

    Args:
        steps: numbers K of local steps; each divides `images`, or is a multiple of it.
        images: images of one client.
        lr: the client's learning rate.
        momentum: of the client's own optimizer.
        model: a model of `qleak ls models`, run:ID, or "auto" for the first papers' LeNet in the set's shape.
        data: a data set that fits it, in mixed order.
        clients: clients attacked, each with images of its own.
        restarts: random starts on each client.
        attack: of the steps simulated, and of their sum taken for a gradient.
        full: 8 images, K from 1 to 32, 8 clients, 4 restarts.
    """
    counts = numbers("1,2,4,8,16,32" if full else steps, "steps")
    images, clients = (8, 8) if full else (images, clients)
    net, count = fitting(model, data)
    victims = spread(count, images, clients)
    plain = build("attacks", attack)
    parts = [
        Audit(
            model=net,
            data=data,
            victims=victims,
            channels=(identity(),),
            attacks=(any_order(plain) if k > 1 else plain, one_gradient(plain)),
            client=divided(k, images, lr, momentum),
            restarts=4 if full else restarts,
            wrong=1,
            chunk=2,
        )
        for k in counts
    ]
    return Study(tuple(f"steps-{k}" for k in counts), tuple(parts))


def divided(k: int, images: int, lr: float, momentum: float) -> Client:
    """A client whose k steps go over `images` images: minibatches of images/k, or k/images passes over single ones.

    Raises:
        Expected: neither comes out even.
    """
    if images % k == 0:
        return local_sgd(steps=k, batch=images // k, lr=lr, momentum=momentum)
    if k % images == 0:
        return local_sgd(steps=images, epochs=k // images, batch=1, lr=lr, momentum=momentum)
    raise Expected(f"Expected steps={k} to divide images={images}, or to be a multiple of them.")

"""The client's side of a round, and what an observer of its channel holds."""

from qleak.client.losses import LOSSES, MASK, Slope, linear_loss, loss, one_hot, slope
from qleak.client.private import adversarial, per_loss, weight_noise
from qleak.client.responses import as_one_gradient, crowd, gradient, is_gradient, local_sgd, per_example
from qleak.client.sound import coupled, guard, reasons
from qleak.client.view import View

__all__ = [
    "LOSSES", "MASK", "Slope", "View", "adversarial", "as_one_gradient", "coupled", "crowd", "gradient", "guard",
    "is_gradient", "linear_loss", "local_sgd", "loss", "one_hot", "per_example", "per_loss", "reasons", "slope",
    "weight_noise",
]  # fmt: skip

"""Networks as pure parameter dicts."""

from qleak.models.layers import sequential
from qleak.models.lenet import lenet, lenet_mnist
from qleak.models.mlp import mlp
from qleak.models.module import from_module

__all__ = ["from_module", "lenet", "lenet_mnist", "mlp", "sequential"]

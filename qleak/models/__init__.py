"""Networks as pure parameter dicts."""

from qleak.models.convnet import convnet
from qleak.models.layers import sequential
from qleak.models.lenet import lenet, lenet_mnist
from qleak.models.mlp import mlp
from qleak.models.module import from_module
from qleak.models.stored import stored

__all__ = ["convnet", "from_module", "lenet", "lenet_mnist", "mlp", "sequential", "stored"]

"""Networks as pure parameter dicts."""

from qleak.models.convnet import convnet
from qleak.models.convnet64 import convnet64
from qleak.models.imported import imported
from qleak.models.layers import sequential
from qleak.models.lenet import deep_lenet, lenet, lenet_mnist
from qleak.models.lenet5 import lenet5
from qleak.models.mlp import deep_mlp, mlp
from qleak.models.mnist_net import mnist_net
from qleak.models.module import from_module
from qleak.models.public import public_norm
from qleak.models.resnet import resnet, resnet18
from qleak.models.stored import stored
from qleak.models.torchvision_nets import torchvision
from qleak.models.vgg import vgg
from qleak.models.vit import vit

__all__ = [
    "convnet",
    "convnet64",
    "deep_lenet",
    "deep_mlp",
    "from_module",
    "imported",
    "lenet",
    "lenet5",
    "lenet_mnist",
    "mlp",
    "mnist_net",
    "public_norm",
    "resnet",
    "resnet18",
    "sequential",
    "stored",
    "torchvision",
    "vgg",
    "vit",
]

"""The parts that nets are made of by name: norms and activations as modules."""

from __future__ import annotations

from torch import Tensor, nn

from qleak.check import one_of
from qleak.models.layers import ACTIVATIONS

NORMS = ("batch", "group", "layer", "none")


def norm2d(name: str, channels: int, affine: bool = True) -> nn.Module:
    """A norm of `[b c h w]`: "batch" (Ioffe & Szegedy 2015), "group" (Wu & He 2018), "layer" (Ba et al. 2016) or "none".

    Groups have 16 channels; all channels are one group where 16 does not divide them, and in "layer", whose weights are a
    channel's. Without `affine` there are no weights.
    """
    one_of(NORMS, norm=name)
    if name == "batch":
        return nn.BatchNorm2d(channels, affine=affine)
    if name in ("group", "layer"):
        return nn.GroupNorm(channels // 16 if channels % 16 == 0 and name == "group" else 1, channels, affine=affine)
    return nn.Identity()


class Activation(nn.Module):
    """An activation of `qleak.models.layers.ACTIVATIONS`, elementwise."""

    def __init__(self, function: str) -> None:
        super().__init__()
        one_of(ACTIVATIONS, function=function)
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        """`[…] -> […]`."""
        return ACTIVATIONS[self.function](h)

    def extra_repr(self) -> str:
        """The name, for `print(module)`."""
        return self.function

"""A small vision transformer: Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qleak.catalog import factory
from qleak.check import Expected, at_least, whole
from qleak.models.fresh import blank
from qleak.models.module import from_module
from qleak.models.norm import Activation
from qleak.types import Model


class Attention(nn.Module):
    """softmax(q kᵀ/√d) v over heads of width d, written out: fused kernels have no second derivative."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        """`[b token dim] -> [b token dim]`."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)): norms in front, as in the paper."""

    def __init__(self, dim: int, heads: int, hidden: int, function: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), Activation(function), nn.Linear(hidden, dim))

    def forward(self, h: Tensor) -> Tensor:
        """`[b token dim] -> [b token dim]`."""
        h = h + self.attention(self.norm1(h))
        return h + self.mlp(self.norm2(h))


class ViT(nn.Module):
    """Patches, a class token, learned positions, encoders; the class token's last state is read."""

    def __init__(
        self, patch: int, dim: int, depth: int, heads: int, function: str, channels: int, size: int, classes: int
    ) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, dim))
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.encoders = nn.Sequential(*(Encoder(dim, heads, 4 * dim, function) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[b c h w] -> [b class]`."""
        h = self.patches(x).flatten(2).mT
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions
        return self.fc(self.norm(self.encoders(h)[:, 0]))


@factory
def vit(
    patch: int = 4,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    function: str = "gelu",
    channels: int = 3,
    size: int = 32,
    classes: int = 10,
) -> Model:
    """A pre-norm vision transformer with a class token and learned positions; hidden layers of 4·dim.

    Args:
        patch: side of a square patch; divides `size`.
        dim: width of a token.
        depth: number of encoder blocks.
        heads: attention heads; divides `dim`.
        function: activation of the hidden layers, see `qleak.models.layers.ACTIVATIONS`.
        channels: image channels c.
        size: image height and width.
        classes: number of logits.
    """
    numbers = {"patch": patch, "dim": dim, "depth": depth, "heads": heads}
    whole(**numbers, channels=channels, size=size, classes=classes)
    at_least(1, **numbers, channels=channels, size=size, classes=classes)
    if size % patch:
        raise Expected(f"Expected patch={patch} to divide size={size}.")
    if dim % heads:
        raise Expected(f"Expected heads={heads} to divide dim={dim}.")
    net = blank(ViT, patch, dim, depth, heads, function, channels, size, classes)
    return from_module(net, (channels, size, size), classes, fresh=True)

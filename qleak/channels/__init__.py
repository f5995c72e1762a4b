"""Channels: what happens to an update between the client and everybody else."""

from qleak.channels.aggregate import mean, scale, total
from qleak.channels.channel import Channel, stack
from qleak.channels.clip import clip_l1, clip_l2
from qleak.channels.compose import chain, identity
from qleak.channels.noise import gaussian, laplace
from qleak.channels.quantize import uniform
from qleak.channels.sign import sign, stochastic_sign, threshold
from qleak.channels.sparsify import top_k

__all__ = [
    "Channel",
    "chain",
    "clip_l1",
    "clip_l2",
    "gaussian",
    "identity",
    "laplace",
    "mean",
    "scale",
    "sign",
    "stack",
    "stochastic_sign",
    "threshold",
    "top_k",
    "total",
    "uniform",
]

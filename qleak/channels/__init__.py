"""Channels: what happens to an update between the client and everybody else."""

from qleak.channels.aggregate import mean, scale, total
from qleak.channels.channel import Channel, stack
from qleak.channels.clip import automatic, clip_l1, clip_l2, clip_layers
from qleak.channels.compose import chain, identity
from qleak.channels.feedback import error_feedback
from qleak.channels.fixed_point import fixed_point
from qleak.channels.floats import bfloat16, float8, float16
from qleak.channels.kmeans import kmeans
from qleak.channels.logarithmic import logarithmic
from qleak.channels.noise import gaussian, laplace
from qleak.channels.nominal import nominal_laplace
from qleak.channels.powersgd import powersgd
from qleak.channels.qsgd import qsgd, terngrad
from qleak.channels.quantize import stochastic, uniform
from qleak.channels.repeat import rounds
from qleak.channels.sign import sign, stochastic_sign, threshold
from qleak.channels.sparsify import random_k, top_k

__all__ = [
    "Channel",
    "automatic",
    "bfloat16",
    "chain",
    "clip_l1",
    "clip_l2",
    "clip_layers",
    "error_feedback",
    "fixed_point",
    "float8",
    "float16",
    "gaussian",
    "identity",
    "kmeans",
    "laplace",
    "logarithmic",
    "mean",
    "nominal_laplace",
    "powersgd",
    "qsgd",
    "random_k",
    "rounds",
    "scale",
    "sign",
    "stack",
    "stochastic",
    "stochastic_sign",
    "terngrad",
    "threshold",
    "top_k",
    "total",
    "uniform",
]

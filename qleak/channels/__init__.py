"""Channels: what happens to an update between the client and everybody else."""

from qleak.channels.aggregate import mean, scale, total
from qleak.channels.channel import Channel, stack
from qleak.channels.clip import automatic, clip_l1, clip_l2, clip_layers, unit
from qleak.channels.compose import chain, identity
from qleak.channels.feedback import error_feedback
from qleak.channels.fixed_point import fixed_point
from qleak.channels.floats import bfloat16, float8, float16
from qleak.channels.klevel import klevel
from qleak.channels.kmeans import kmeans
from qleak.channels.logarithmic import logarithmic
from qleak.channels.noise import gaussian, laplace
from qleak.channels.nominal import nominal_laplace
from qleak.channels.powersgd import powersgd
from qleak.channels.project import block_mean, onto, project
from qleak.channels.qsgd import qsgd, terngrad
from qleak.channels.quantize import stochastic, uniform
from qleak.channels.repeat import rounds
from qleak.channels.sign import sign, stochastic_sign, threshold
from qleak.channels.sketch import count_sketch
from qleak.channels.sparsify import random_k, top_k
from qleak.channels.vote import gnmax, histogram

__all__ = [
    "Channel",
    "automatic",
    "bfloat16",
    "block_mean",
    "chain",
    "clip_l1",
    "clip_l2",
    "clip_layers",
    "count_sketch",
    "error_feedback",
    "fixed_point",
    "float16",
    "float8",
    "gaussian",
    "gnmax",
    "histogram",
    "identity",
    "klevel",
    "kmeans",
    "laplace",
    "logarithmic",
    "mean",
    "nominal_laplace",
    "onto",
    "powersgd",
    "project",
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
    "unit",
]

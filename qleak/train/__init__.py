"""The server's side: what it learns from the gradients it is sent."""

from qleak.train.loop import Epoch, accuracy, cosine, fit, step
from qleak.train.measure import Measure, measure
from qleak.train.rules import Rule, adam, sgd

__all__ = ["Epoch", "Measure", "Rule", "accuracy", "adam", "cosine", "fit", "measure", "sgd", "step"]

"""The server's side: what it learns from the gradients it is sent."""

from qleak.train.loop import Epoch, accuracy, cosine, fit, step
from qleak.train.measure import Measure, measure
from qleak.train.rules import Rule, adadelta, adam, sgd

__all__ = ["Epoch", "Measure", "Rule", "accuracy", "adadelta", "adam", "cosine", "fit", "measure", "sgd", "step"]

"""The server's side: what it learns from the gradients it is sent."""

from qleak.train.sgd import Epoch, Rule, accuracy, adam, cosine, fit, sgd, step

__all__ = ["Epoch", "Rule", "accuracy", "adam", "cosine", "fit", "sgd", "step"]

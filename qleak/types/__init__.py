"""The nouns of qleak: what flows from a client through a channel to a server and to an attacker.

Shapes are written in one vocabulary: `lane b c h w` for images, `class` for logits, `d` for a
flattened tree, `row` for what a join sums over (examples, clients, teachers). No logic lives here.
"""

from qleak.types.attacks import Attack, Guess, Info, Optimizer, Status
from qleak.types.channels import Belief, Bound, Facts, Message, Shrink, Stage
from qleak.types.models import Client, Dataset, Layer, Model, Owner, Tapped
from qleak.types.synthesis import Classifier, Critic, Maker, Public, Spend, Synthesizer
from qleak.types.trees import Buffers, Grads, Law, Params, Side, Tree

__all__ = [
    "Attack", "Belief", "Bound", "Buffers", "Classifier", "Client", "Critic", "Dataset", "Facts", "Grads", "Guess", "Info", "Law", "Layer",
    "Maker", "Message", "Model", "Optimizer", "Owner", "Params", "Public", "Shrink", "Side", "Spend", "Stage", "Status",
    "Synthesizer", "Tapped", "Tree",
]  # fmt: skip

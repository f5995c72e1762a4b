"""What an observer of a channel holds: everything an attack may use, and nothing else."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.func import vmap

from qleak.channels import Channel
from qleak.types import Buffers, Client, Message, Model, Params, Tree


class View(NamedTuple):
    """Everything the attacker may see, and nothing else (law 2).

    Attributes:
        model: the architecture.
        params: the weights the update was computed at.
        buffers: the buffers, where the threat model shares them.
        channel: the channel, with its levels and its facts.
        client: what the client computes (its kind and batch size).
        message: the messages of one leg, stacked over lanes.
        leg: which leg of the channel is seen.
        labels: `[lane b]` only where the threat model grants them.
        statistics: what the client's batch norms saw of its batch, `[lane …]`, only where the threat model shares it
            (see `Model.statistics`).
        evidence: False in the prior-only control: the gradient term is removed.
    """

    model: Model
    params: Params
    buffers: Buffers
    channel: Channel
    client: Client
    message: Message
    leg: int = -1
    labels: Tensor | None = None
    statistics: Tree | None = None
    evidence: bool = True

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return len(next(iter(self.message.code.values())))

    @property
    def like(self) -> Tree:
        """The tree of one row."""
        return self.params

    def decoded(self) -> Tree:
        """The server's dense numbers, `[lane …]`."""
        knobs = self.channel.knobs(device=next(iter(self.params.values())).device)
        return vmap(lambda m: self.channel.receive(knobs, m, self.like, self.leg))(self.message)

    def at(self, lanes: Tensor) -> View:
        """The same view of some lanes."""
        code = {k: v[lanes] for k, v in self.message.code.items()}
        side = tuple({n: {k: v[lanes] for k, v in t.items()} for n, t in s.items()} for s in self.message.side)
        labels = None if self.labels is None else self.labels[lanes]
        statistics = None if self.statistics is None else {k: v[lanes] for k, v in self.statistics.items()}
        return self._replace(message=Message(code, side), labels=labels, statistics=statistics)

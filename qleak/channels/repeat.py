"""Several rounds on the same batch: what a random channel hides once, it does not hide again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import vmap

from qleak import tree
from qleak.catalog import factory
from qleak.channels.channel import Channel, Knobs, Noise
from qleak.channels.compose import chain
from qleak.channels.feedback import Feedback
from qleak.channels.quantize import stochastic
from qleak.check import Expected, at_least, whole
from qleak.types import Facts, Message, Tree


@factory
def rounds(channel: Channel | None = None, times: int = 4) -> Channel:
    """The same update sent `times` times through a channel without memory, each time with fresh noise.

    Messages get a leading axis of rounds. The attacker adds their likelihoods, and the intervals of a
    deterministic code intersect to the same one. Bits and privacy events count `times` over.

    Args:
        channel: `chain(stochastic())` by default.
        times: number of rounds.

    Raises:
        Expected: the channel has memory, or times is below 1.
    """
    whole(times=times)
    at_least(1, times=times)
    channel = chain(stochastic()) if channel is None else channel
    if isinstance(channel, Feedback | Rounds):
        raise Expected(f"Expected a channel without memory or rounds of its own in rounds(…), got {channel.spec}.")
    return Rounds(channel.legs, times=times)


@dataclass(frozen=True)
class Rounds(Channel):
    """A channel whose messages have a leading axis `round`."""

    times: int = 1

    def facts(self, like: Tree | None = None) -> Facts:
        """Those of one round, its privacy event composed with itself."""
        once = super().facts(like)
        if once.event is None:
            return once
        from dp_accounting import dp_event

        return replace(once, event=dp_event.SelfComposedDpEvent(once.event, self.times))

    def draw(self, gen: Generator, like: Tree, rows: Sequence[int] = ()) -> Noise:
        """Every round's own noise."""
        drawn = [super(Rounds, self).draw(gen, like, rows) for _ in range(self.times)]
        return tree.nested_map(lambda *t: torch.stack(t), *drawn)

    def send(self, knobs: Knobs, rows: Tree, noise: Noise, state: Any, like: Tree) -> tuple[tuple[Message, ...], Any]:
        """All rounds at once; a channel without memory keeps its state."""
        one = super().send
        sent = [
            one(knobs, rows, tree.nested_map(lambda t, i=i: t[i], noise), state, like)[0] for i in range(self.times)
        ]
        return tree.nested_map(lambda *t: torch.stack(t), *sent), state

    def receive(self, knobs: Knobs, message: Message, like: Tree, leg: int = -1) -> Tree:
        """The mean over rounds of what the server decodes."""
        one = super().receive
        decoded = vmap(lambda m: one(knobs, m, like, leg))(message)
        return {k: v.mean(0) for k, v in decoded.items()}

    def bits(self, message: Message, like: Tree, leg: int = -1, coded: bool = False) -> float:
        """Bits of all rounds."""
        one = super().bits
        if not coded:  # every round costs the same
            return self.times * one(tree.nested_map(lambda t: t[0], message), like, leg)
        return sum(one(tree.nested_map(lambda t, i=i: t[i], message), like, leg, True) for i in range(self.times))

    def cell(self, knobs: Knobs, message: Message, like: Tree, leg: int = -1) -> tuple[Tree, Tree]:
        """The intersection over rounds."""
        one = super().cell
        lo, hi = vmap(lambda m: one(knobs, m, like, leg))(message)
        return {k: v.amax(0) for k, v in lo.items()}, {k: v.amin(0) for k, v in hi.items()}

    def misfit(
        self, knobs: Knobs, message: Message, guess: Tree, like: Tree, leg: int = -1, moments: bool = False
    ) -> Tensor:
        """The sum over rounds."""
        one = super().misfit
        return vmap(lambda m: one(knobs, m, guess, like, leg, moments))(message).sum()

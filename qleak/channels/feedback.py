"""Error feedback: what a compressor left out is added to the next round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Generator, Tensor

from qleak import tree
from qleak.catalog import factory
from qleak.channels.channel import Channel, Knobs, Noise
from qleak.channels.compose import chain
from qleak.channels.sign import sign
from qleak.check import Expected
from qleak.types import Facts, Message, Tree


@factory
def error_feedback(channel: Channel | None = None) -> Channel:
    """Sends C(x + e) and keeps e ← x + e − C(x + e): nothing is lost for good, only late.

    e is the state of one client, zero in the first round. It is secret: the cell of a message holds for
    the sum of a client's gradients less what it has sent, not for one round's gradient, so from the second
    round on the reading is not exact, and no bound or privacy event survives. Karimireddy, Rebjock, Stich,
    Jaggi, "Error Feedback Fixes SignSGD" (ICML 2019), Algorithm 2, for `chain(sign())`, the default.

    Args:
        channel: a channel without joins.

    Raises:
        Expected: the channel has a join, or a privacy guarantee that memory would break.
    """
    channel = chain(sign()) if channel is None else channel
    if channel.joins:
        raise Expected(
            f"Expected a channel without joins in error_feedback(…), got {channel.spec}: wrap the client's part."
        )
    if channel.facts(None).event is not None:
        raise Expected(
            f"Expected a channel without a privacy guarantee in error_feedback(…), got {channel.spec}: memory breaks it."
        )
    return Feedback(channel.legs)  # fmt: skip


@dataclass(frozen=True)
class Feedback(Channel):
    """A channel with memory; its state is (states of the stages, residual)."""

    def facts(self, like: Tree | None = None) -> Facts:
        """Those of the channel, less everything that memory breaks."""
        inner = super().facts(like)
        return replace(inner, bound=None, sensitivity=None, event=None, unbiased=False, exact=False)

    def init(self, like: Tree, gen: Generator | None = None) -> tuple[Any, ...]:
        """Residual zero."""
        return super().init(like, gen), {k: v.new_zeros(v.shape) for k, v in like.items()}

    def send(self, knobs: Knobs, rows: Tree, noise: Noise, state: Any, like: Tree) -> tuple[tuple[Message, ...], Any]:
        """The message of x + e, and the state of the next round."""
        inner, residual = state
        wanted = tree.add(rows, residual)
        messages, inner = super().send(knobs, wanted, noise, inner, like)
        decoded: dict[str, Tensor] = self.receive(knobs, messages[-1], like)
        return messages, (inner, tree.sub(wanted, decoded))

"""What messages cost: bits, ε, how many of them a budget allows, and the ledger of those that were sent."""

from __future__ import annotations

import functools
from typing import Any

from qleak import ledger as ledgers
from qleak import tree
from qleak.accounting import claimed, epsilon
from qleak.calibration import steps_within
from qleak.check import Expected
from qleak.plans import Training
from qleak.train import federated
from qleak.types import Tree


class Price:
    """Bits and ε of a client's messages; ε takes a second to compute, so each is computed once.

    ε composes every message of the client that sent most: of Poisson-sampled events at the `rate` of
    the smallest shard, or without any amplification where shards are shuffled (never too small).
    """

    def __init__(self, plan: Training, like: Tree, bits: list[float], sizes: list[int]) -> None:
        self.bits, self.coordinates = bits, tree.count(like)
        rate = federated.rate(min(sizes), plan.client.batch)
        events = [c.facts(like).event if plan.sampling != "replacement" else None for c in plan.channels]
        if plan.sampling == "poisson":
            from dp_accounting import PoissonSampledDpEvent  # lazy: two seconds with scipy.signal

            events = [event and PoissonSampledDpEvent(rate, event) for event in events]
        rounds = plan.epochs * plan.rounds(sizes[: plan.clients])
        self.events = events
        self.claimed = functools.lru_cache(maxsize=None)(
            lambda releases: claimed(plan.client.claimed, rate, releases, plan.delta) if releases else None
        )
        self.epsilon = functools.lru_cache(maxsize=None)(
            lambda channel, releases: epsilon(events[channel], plan.delta, releases) if releases else None
        )
        self.budget = functools.lru_cache(maxsize=None)(lambda c: budget(plan, c, events[c], rounds))

    def ledger(self, channel: int, releases: int) -> str:
        """What a client of that channel has released, to be accounted again by anyone; "" without a guarantee."""
        event = self.events[channel]
        return ledgers.to_json(ledgers.record_event(ledgers.Ledger(), event, releases)) if event and releases else ""


def budget(plan: Training, channel: int, event: Any, rounds: int) -> int:
    """Messages a client may send until ε would exceed the plan's target; 0 where it sets none, or all `rounds` fit.

    Raises:
        Expected: the channel has no ε to stop at, or one message already costs more.
    """
    if not plan.target_epsilon:
        return 0
    name = plan.labels()[channel]
    if event is None:
        raise Expected(
            f"Expected a channel with a guarantee beside target_epsilon={plan.target_epsilon:g}, got {name}."
        )
    found = steps_within(event, plan.target_epsilon, plan.delta, rounds)
    if not found:
        raise Expected(
            f"Expected target_epsilon={plan.target_epsilon:g} >= {epsilon(event, plan.delta):.3g}, "
            f"what one message through {name} costs."
        )
    return found if found < rounds else 0

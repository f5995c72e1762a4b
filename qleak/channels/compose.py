"""`chain`: stages to a channel, parsed into legs, its facts checked when it is built."""

from __future__ import annotations

from dataclasses import replace

from qleak.catalog import factory
from qleak.channels.channel import Channel, Leg
from qleak.check import Expected
from qleak.types import Facts, Stage

RANK = {"value": 0, "select": 1, "code": 2}


@factory
def chain(*stages: Stage) -> Channel:
    """`channel = leg (join leg)*`, `leg = value* select? code?`.

    A stage out of that order closes the leg: the message is decoded to dense numbers and the next
    leg begins. `chain()` is the identity channel.

    Raises:
        Expected: a stage needs something that no stage in front of it provides, for example noise
            without a bound.
    """
    for stage in stages:
        if not isinstance(stage, Stage):
            raise Expected(f"Expected stages in chain(…), got {stage!r}.")
    stages = _bound(stages)
    legs: list[Leg] = []
    join: Stage | None = None
    leg: list[Stage] = []
    for stage in stages:
        if stage.kind == "join":
            if leg or join or legs:
                legs.append(Leg(join, tuple(leg)))
            else:
                legs.append(Leg(None, ()))  # rows reach the join as they are
            join, leg = stage, []
        else:
            if leg and _closes(leg[-1], stage):
                legs.append(Leg(join, tuple(leg)))
                join, leg = None, []
            leg.append(stage)
    channel = Channel((*legs, Leg(join, tuple(leg))))
    channel.facts(None)
    return channel


def _bound(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Settles the stages whose knobs follow from the facts in front of them."""
    facts, settled = Facts(), []
    for stage in stages:
        settled.append(replace(stage.bind(facts), spec=stage.spec) if stage.bind else stage)
        facts = settled[-1].fold(facts, facts.reset(), None)
    return tuple(settled)


def _closes(last: Stage, stage: Stage) -> bool:
    return RANK[stage.kind] < RANK[last.kind] or (stage.kind == last.kind != "value")


@factory
def identity() -> Channel:
    """The update as it is, 32 bits a coordinate: the channel of the first papers."""
    return chain()

"""The audit plan: what leaks from one update, for every channel × attack × victim × restart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, NamedTuple

from qleak.catalog import short
from qleak.channels import Channel
from qleak.check import Expected, at_least, between, one_of, positive, whole
from qleak.client import gradient, guard, is_gradient
from qleak.plans.base import Written, label, later, ranges
from qleak.types import Attack, Client, Model

CONTROLS = ("none", "prior-only", "wrong-gradient")
GRANTS = ("buffers", "labels", "statistics")


BOUNDS = ("auto", "yes", "no")


class Lane(NamedTuple):
    """One independent attack: which victim, which restart, whose message, with or without evidence."""

    victim: int
    restart: int
    control: str


class Chunk(NamedTuple):
    """Lanes of one channel and one attack that run together."""

    key: str
    channel: int
    attack: int
    evidence: bool
    lanes: tuple[Lane, ...]


@dataclass(frozen=True)
class Audit(Written):
    """What leaks: every channel × attack × victim × restart, with its controls.

    Attributes:
        model: the network; `model_seed` draws its weights where they are not trained.
        data: a data set by name; `victims` are indices into its training split.
        channels: what stands between the client and the attacker.
        attacks: who looks at it.
        client: what the client computes.
        restarts: dummy starts per victim: one number, or one per victim.
        controls: control lanes per victim and arm (prior-only and wrong-gradient).
        grants: what the threat model shares beside the message: "buffers" of the model (running statistics), true
            "labels", batch "statistics" that the client's batch norms saw.
        seconds: CPU seconds after which a chunk hands in what it has, and notes the PSNR on the way (0: no limit);
            the one setting whose result depends on the machine.
        bounds: what no attacker can beat, computed after the attacks: "yes", "no", or "auto": where it takes seconds.
        wrong: victims that get a wrong-gradient lane in an arm, another one from channel to channel; 0: all.
        seed: root of every draw.
        success: PSNR in dB from which a reconstruction counts, if it beats both controls as well.
        chunk: lanes that run together; part of the plan because the last ulp depends on it.
        dtype: "float32" or "float64".
        delta: δ at which ε is reported.
    """

    model: Model
    data: str
    victims: tuple[int, ...]
    channels: tuple[Channel, ...]
    attacks: tuple[Attack, ...]
    client: Client = field(default_factory=gradient)
    restarts: int | tuple[int, ...] = 1
    controls: int = 1
    seed: int = 0
    model_seed: int = 0
    success: float = 20.0
    chunk: int = 16
    dtype: str = "float32"
    delta: float = 1e-5
    wrong: int = 0
    grants: tuple[str, ...] = later(("buffers",))
    seconds: float = later(0.0)
    bounds: str = later("auto")

    kind: ClassVar[str] = "audit"

    def __post_init__(self) -> None:
        whole(seed=self.seed, model_seed=self.model_seed, controls=self.controls, chunk=self.chunk, wrong=self.wrong)
        at_least(0, seed=self.seed, model_seed=self.model_seed, controls=self.controls, wrong=self.wrong)
        at_least(1, chunk=self.chunk, victims=len(self.victims), channels=len(self.channels), attacks=len(self.attacks))
        positive(success=self.success)
        at_least(0, seconds=self.seconds)
        between(0, 1, delta=self.delta)
        one_of(BOUNDS, bounds=self.bounds)
        if isinstance(self.restarts, tuple) and len(self.restarts) != len(self.victims):
            raise Expected(f"Expected one of restarts={self.restarts} per victim ({len(self.victims)}).")
        for restarts in self.restart_counts():
            whole(restarts=restarts)
            at_least(1, restarts=restarts)
        if len(set(self.victims)) != len(self.victims):
            raise Expected(f"Expected victims={self.victims} without repeats.")
        near = sorted(self.victims)
        if any(b - a < self.client.batch for a, b in pairwise(near)):
            raise Expected(f"Expected victims={self.victims} at least {self.client.batch} apart, the batch size.")
        for grant in self.grants:
            one_of(GRANTS, grants=grant)
        if "statistics" in self.grants and (self.model.statistics is None or not is_gradient(self.client)):
            raise Expected(
                'Expected grants="statistics" of a model with batch norm and one gradient step: '
                f"{short(self.model.spec)}, {short(self.client.spec)}."
            )
        for channel in self.channels:
            if channel.joins != self.client.rows:
                raise Expected(
                    f"Expected channels that join {self.client.rows} row axes (total() each), as "
                    f"{short(self.client.spec)} sends them, got {label(channel.spec)}."
                )
        guard(self.client, self.model, self.channels)
        if self.dtype not in ("float32", "float64"):
            raise Expected(f"Expected dtype={self.dtype!r} to be one of: float32, float64.")

    def restart_counts(self) -> tuple[int, ...]:
        """Restarts of each victim."""
        return self.restarts if isinstance(self.restarts, tuple) else (self.restarts,) * len(self.victims)

    def labels(self) -> list[str]:
        """Channel names for tables, e.g. "fp32", "uniform(bits=8)"."""
        return [label(c.spec) for c in self.channels]

    def lines(self) -> dict[str, str]:
        """The plan in words, for the terminal."""
        lanes = sum(len(c.lanes) for c in self.chunks())
        restarts = ranges(sorted(set(self.restart_counts())))
        return {
            "model": short(self.model.spec),
            "data": f"{self.data} · images {ranges(self.victims)} · client {short(self.client.spec)}",
            "channels": " · ".join(self.labels()),
            "attacks": " · ".join(short(a.spec) for a in self.attacks),
            "threat": "the attacker has the message, the weights" + "".join(f", {g}" for g in sorted(self.grants)),
            "lanes": f"{lanes} in chunks of {self.chunk} (restarts {restarts}, controls included)",
            "seeds": f"seed {self.seed} · weights {self.model_seed}",
        }

    def chunks(self) -> list[Chunk]:
        """All lanes in chunks: per channel and attack first the lanes with evidence, then the prior-only ones."""
        found = []
        for c in range(len(self.channels)):
            for a in range(len(self.attacks)):
                with_ = list(self._lanes(c, ("none", "wrong-gradient"), self.attacks[a].restarts))
                without = list(self._lanes(c, ("prior-only",), self.attacks[a].restarts))
                for name, lanes in (("lanes", with_), ("prior", without)):
                    for start in range(0, len(lanes), self.chunk):
                        some = tuple(lanes[start : start + self.chunk])
                        key = f"{c}-{a}-{name}-{start // self.chunk}"
                        found.append(Chunk(key, c, a, name == "lanes", some))
        return found

    def _lanes(self, channel: int, controls: tuple[str, ...], random: bool) -> Iterator[Lane]:
        for control in controls:
            if control == "wrong-gradient" and len(self.victims) == 1:
                continue  # there is nobody else's message to take
            for victim, restarts in enumerate(self.restart_counts()):
                turn = (victim - channel * self.wrong) % len(self.victims)
                if control == "wrong-gradient" and self.wrong and turn >= self.wrong:
                    continue
                number = restarts if control == "none" else self.controls
                for restart in range(number if random else min(number, 1)):
                    yield Lane(victim, restart, control)

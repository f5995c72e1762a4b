"""The plan of an audit of one captured update: who attacks it, and the controls that a success has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from qleak.catalog import short
from qleak.channels import Channel
from qleak.check import Expected, at_least, positive, whole
from qleak.client import gradient
from qleak.plans.audit import Chunk, Lane
from qleak.plans.base import Written, label, later
from qleak.types import Attack, Client, Model


@dataclass(frozen=True)
class Captured(Written):
    """What one update, captured elsewhere, gives away; its tensors lie in the run folder, `digest` names them.

    Message 0 is the captured one; 1 … `controls` are *decoys*: updates of images that are nobody's (1/f noise), through
    the same model, client and channel. Attacks on decoys are the wrong-gradient control of the captured update, and show
    what the attack is worth on this model, since a decoy's image is known.

    Attributes:
        model: the network; its weights lie in the run folder.
        digest: of update, weights, buffers, given labels and truth.
        channels: one channel: what the update came through.
        attacks: who looks at it.
        client: what the client computed.
        labels: those that are given; () where attacks infer them.
        restarts: random starts of every attack that has one.
        controls: decoys.
        budget: CPU seconds of all attacks together.
        success: dB from which two images count as the same.
        seed: root of every draw.
        seconds: CPU seconds after which a chunk hands in what it has; set by the engine.
    """

    model: Model
    digest: str
    channels: tuple[Channel, ...]
    attacks: tuple[Attack, ...]
    client: Client = field(default_factory=gradient)
    labels: tuple[int, ...] = ()
    restarts: int = 4
    controls: int = 2
    budget: float = 60.0
    success: float = 20.0
    seed: int = 0
    dtype: str = "float32"
    seconds: float = later(0.0)

    kind: ClassVar[str] = "captured"

    def __post_init__(self) -> None:
        whole(seed=self.seed, restarts=self.restarts, controls=self.controls)
        at_least(0, seed=self.seed, seconds=self.seconds)
        at_least(1, restarts=self.restarts, controls=self.controls, attacks=len(self.attacks))
        positive(budget=self.budget, success=self.success)
        if len(self.channels) != 1 or self.channels[0].joins != self.client.rows or self.client.rows:
            raise Expected("Expected one channel and a client with one update: no rows, no joins.")
        if self.labels and len(self.labels) != self.client.batch:
            raise Expected(f"Expected labels={self.labels} of {self.client.batch} images, the batch.")
        if any(not 0 <= v < self.model.classes for v in self.labels):
            raise Expected(f"Expected labels={self.labels} in 0 … {self.model.classes - 1}.")

    @property
    def victims(self) -> tuple[int, ...]:
        """The messages: 0 is the captured one."""
        return tuple(range(1 + self.controls))

    def lines(self) -> dict[str, str]:
        """The plan in words, for the terminal."""
        return {
            "model": short(self.model.spec),
            "client": f"{short(self.client.spec)} · channel {label(self.channels[0].spec)}",
            "attacks": " · ".join(short(a.spec) for a in self.attacks),
            "controls": f"prior-only, wrong-gradient ({self.controls} decoys)",
            "budget": f"{self.budget:g} CPU seconds · {self.restarts} restarts · seed {self.seed}",
        }

    def chunks(self) -> list[Chunk]:
        """For every attack its lanes on the captured message, those on decoys, and one without evidence."""
        found = []
        for a, attack in enumerate(self.attacks):
            starts = range(self.restarts if attack.restarts else 1)
            lanes = {
                "none": tuple(Lane(0, r, "none") for r in starts),
                "wrong-gradient": tuple(Lane(v, 0, "wrong-gradient") for v in self.victims[1:]),
                "prior-only": (Lane(0, 0, "prior-only"),) if attack.prior else (),
            }
            found += [Chunk(f"{a}-{c}", 0, a, c != "prior-only", some) for c, some in lanes.items() if some]
        return found

    def share(self, chunk: Chunk) -> float:
        """CPU seconds of a chunk: the budget in parts of lanes, one-step attacks left out."""
        timed = [c for c in self.chunks() if self.attacks[c.attack].steps > 1]
        return self.budget * len(chunk.lanes) / max(1, sum(len(c.lanes) for c in timed))

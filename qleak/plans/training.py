"""The training plan: what the server learns through each channel, over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from qleak.catalog import short
from qleak.channels import Channel
from qleak.check import Expected, at_least, between, one_of, positive, whole
from qleak.client import gradient, guard, reasons
from qleak.plans.base import Written, label, later
from qleak.private.adaptive import Settings
from qleak.train import adaptive_rounds
from qleak.train.evasion import Evasion
from qleak.train.federated import round_count
from qleak.train.rules import Rule, sgd
from qleak.train.schedules import factor
from qleak.train.split import parse
from qleak.types import Attack, Client, Model


class Member(NamedTuple):
    """One training: which channel, which seed index."""

    channel: int
    seed: int

    @property
    def key(self) -> str:
        """Its name in rows and files, "channel-seed"."""
        return f"{self.channel}-{self.seed}"


@dataclass(frozen=True)
class Training(Written):
    """What is learnt: every channel × seed, the same images in the same order for each channel.

    Attributes:
        model: the network.
        data: a data set by name; trained on its training split, tested on its test split (sets without
            one: every fifth image is held out).
        channels: what stands between each client and the server.
        client: what a client computes from its next `client.batch` images.
        clients: the population C; each client has its own shard and its own channel state.
        participation: ⌈participation · C⌉ clients take part in a round, drawn anew each time.
        split: how images are dealt out, "iid" or "dirichlet(0.5)".
        sampling: "shuffle" (passes over the shard in new orders), "poisson" for per-example clients: every
            image takes part with probability client.batch / n by itself, which is what amplifies privacy; or
            "replacement": every image of a batch is drawn anew, for which no ε is known here.
        epochs: an epoch is as many rounds as cover the training set once, or `epoch_rounds`.
        rule: what the server does with the average of the decoded updates.
        lr: its learning rate; 1 with `sgd()` and `local_sgd(…)` is federated averaging.
        schedule: factor on `lr`, "constant", "cosine" over all rounds, or "decay(0.9)" an epoch.
        seeds: trainings per channel; each has its own weights, shards, orders and noise.
        seed: root of shards, orders and channel noise.
        model_seed: root of the weights.
        limit: training images, spread evenly over the set; 0 for all of them.
        eval_every: epochs between measurements (the first and the last are always made).
        lanes: "auto", "loop" (one training a job) or "vmap" (all that fit together in one).
        attack_rounds: rounds (from 1) whose weights are audited, on the first seed of every channel.
        attacks: who attacks there.
        victims: how many victims, the first `victims` batches of the training split.
        dtype: "float32" or "float64".
        delta: δ at which ε is reported.
        epoch_rounds: rounds of an epoch; 0 for as many as cover the training set once.
        robust: an attack on images whose robust accuracy is measured beside the clean one, or None.
        robust_images: test images it is measured on, spread evenly over the set.
        target_epsilon: training stops before a round that would take its ε above this; 0 for no budget.
        sync: "step" (clients get new weights every round), or "epoch": the one client keeps its weights for an epoch
            and sends the sum of its gradients since, a fault of a published implementation.
        test_limit: test images that are measured on, spread evenly over the set; 0 for all of them.
        update_norms: rows have the mean L1 norm of what a client puts into the channel, on one fixed batch.
        clip_quantile: the clipping bound follows this quantile of the norms from round to round (Andrew et al. 2021), and
            the noise follows the bound; 0 for the channel's own bound throughout. ε stays the channel's: the sum gets
            more noise, so that sum and count together cost what it says.
        clip_rate: η, the step in the logarithm of the bound.
        clip_sigma: σ_b of the noise on the count; 0 for the paper's client.batch/20.
    """

    model: Model
    data: str
    channels: tuple[Channel, ...]
    client: Client = field(default_factory=lambda: gradient(batch=64))
    clients: int = 1
    participation: float = 1.0
    split: str = "iid"
    sampling: str = "shuffle"
    epochs: int = 5
    rule: Rule = field(default_factory=lambda: sgd(momentum=0.9))
    lr: float = 0.05
    schedule: str = "constant"
    seeds: int = 3
    seed: int = 0
    model_seed: int = 0
    limit: int = 0
    eval_every: int = 1
    lanes: str = "auto"
    attack_rounds: tuple[int, ...] = ()
    attacks: tuple[Attack, ...] = ()
    victims: int = 1
    dtype: str = "float32"
    delta: float = 1e-5
    epoch_rounds: int = later(0)
    robust: Evasion | None = later(None)  # noqa: RUF009
    robust_images: int = later(1000)
    target_epsilon: float = later(0.0)
    sync: str = later("step")
    test_limit: int = later(0)
    update_norms: bool = later(False)
    clip_quantile: float = later(0.0)
    clip_rate: float = later(0.2)
    clip_sigma: float = later(0.0)

    kind: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        counts = {"clients": self.clients, "epochs": self.epochs, "seeds": self.seeds, "eval_every": self.eval_every}
        whole(**counts, seed=self.seed, model_seed=self.model_seed, limit=self.limit, victims=self.victims)
        at_least(1, **counts, victims=self.victims, channels=len(self.channels))
        at_least(0, seed=self.seed, model_seed=self.model_seed, limit=self.limit)
        positive(lr=self.lr, participation=self.participation)
        between(0, 1, participation=self.participation, delta=self.delta)
        factor(self.schedule, 0, 1, 1)
        whole(epoch_rounds=self.epoch_rounds, robust_images=self.robust_images, test_limit=self.test_limit)
        at_least(0, test_limit=self.test_limit, epoch_rounds=self.epoch_rounds, target_epsilon=self.target_epsilon)
        at_least(1, robust_images=self.robust_images)
        one_of(["step", "epoch"], sync=self.sync)
        one_of(["auto", "loop", "vmap"], lanes=self.lanes)
        one_of(["shuffle", "poisson", "replacement"], sampling=self.sampling)
        one_of(["float32", "float64"], dtype=self.dtype)
        parse(self.split)
        if self.sync == "epoch" and (self.clients > 1 or self.client.rows or self.lanes == "vmap"):
            raise Expected("Expected one client, one gradient an update and lanes other than 'vmap' with sync='epoch'.")
        for channel in self.channels:
            if channel.joins != self.client.rows:
                sums = "one total() for the rows" if self.client.rows else "no total()"
                raise Expected(
                    f"Expected {sums} in {label(channel.spec)} behind {short(self.client.spec)}: "
                    f"its update has {self.client.rows} row axes, the channel joins {channel.joins}."
                )
        guard(self.client, self.model, self.channels)
        between(0, 1, clip_quantile=self.clip_quantile)
        positive(clip_rate=self.clip_rate)
        at_least(0, clip_sigma=self.clip_sigma)
        if settings := self.adaptive():
            if self.clients > 1 or self.lanes == "vmap":
                raise Expected("Expected one client and lanes other than 'vmap' with an adaptive clipping bound.")
            for channel in self.channels:
                adaptive_rounds.check(self.client, channel, settings.sigma)
        whole(**{f"attack_rounds[{i}]": r for i, r in enumerate(self.attack_rounds)})
        at_least(1, **{f"attack_rounds[{i}]": r for i, r in enumerate(self.attack_rounds)})
        if bool(self.attack_rounds) != bool(self.attacks):
            raise Expected(
                f"Expected attacks and attack_rounds together, got {len(self.attacks)} and {len(self.attack_rounds)}."
            )
        if self.lanes == "vmap" and (self.clients > 1 or self.sampling == "poisson"):
            raise Expected("Expected one client and sampling='shuffle' with lanes='vmap': batches must have one size.")
        if self.sampling == "poisson" and not self.client.rows:
            raise Expected(f"Expected a per-example client with sampling='poisson', got {short(self.client.spec)}.")
        for channel in self.channels if self.sampling == "poisson" else ():
            if any("replace-one" in stage.spec for stage in channel.stages):
                raise Expected(
                    f"Expected adjacency 'add-or-remove-one' in {label(channel.spec)} with sampling='poisson': "
                    "its amplification is known for that one."
                )

    def adaptive(self) -> Settings | None:
        """How the clipping bound follows the norms; None where it is fixed."""
        if not self.clip_quantile:
            return None
        sigma = self.clip_sigma or self.client.batch / 20
        return Settings(self.clip_quantile, self.clip_rate, sigma, self.client.batch)

    def per_round(self) -> int:
        """Clients that take part in a round: ⌈participation · C⌉ (up to rounding of the product)."""
        return max(1, math.ceil(self.participation * self.clients - 1e-9))

    def rounds(self, sizes: Sequence[int]) -> int:
        """Rounds of an epoch, for shards of these sizes."""
        return self.epoch_rounds or round_count(sizes, self.per_round(), self.client.batch)

    def labels(self) -> list[str]:
        """Channel names for tables, e.g. "fp32", "uniform(bits=8)"."""
        return [label(c.spec) for c in self.channels]

    def members(self) -> list[Member]:
        """Every training of the plan."""
        return [Member(c, s) for c in range(len(self.channels)) for s in range(self.seeds)]

    def lines(self) -> dict[str, str]:
        """The plan in words, for the terminal."""
        who = f"client {short(self.client.spec)}"
        if self.clients > 1:
            who = f"{self.clients} clients, {self.per_round()} a round, {self.split} · each {short(self.client.spec)}"
        found = {
            "model": short(self.model.spec),
            "data": f"{self.data}{f' · {self.limit} images' if self.limit else ''} · {who}",
            "channels": " · ".join(self.labels()),
            "training": f"{self.epochs} epochs · {short(self.rule.spec)} · lr {self.lr:g} · {self.schedule}",
            "seeds": f"{self.seeds} per channel · seed {self.seed} · weights {self.model_seed}",
        }
        if self.sampling != "shuffle":
            found["data"] += {"poisson": " · Poisson batches", "replacement": " · with replacement"}[self.sampling]
        if self.target_epsilon:
            found["training"] += f" · stops at ε {self.target_epsilon:g}"
        if self.clip_quantile:
            found["training"] += f" · bound at quantile {self.clip_quantile:g}"
        if self.robust:
            found["training"] += f" · robust to {short(self.robust.spec)}"
        if why := reasons(self.client, self.model, self.sampling):
            found["no guarantee"] = "; ".join(why)
        if self.attacks:
            at = ", ".join(map(str, self.attack_rounds))
            found["attacks"] = f"{' · '.join(short(a.spec) for a in self.attacks)} in rounds {at}"
        return found

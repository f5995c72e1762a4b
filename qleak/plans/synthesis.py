"""The synthesis plan: what is made of private records within a budget, and how it is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from qleak.catalog import build, short
from qleak.check import Expected, at_least, between, one_of, positive, whole
from qleak.plans.base import Written
from qleak.synth.canary import KINDS
from qleak.types import Classifier, Synthesizer

FLOOR = "one noisy average"


class Arm(NamedTuple):
    """One row of the table: a synthesizer at one budget."""

    name: str
    method: Synthesizer
    epsilon: float
    floor: bool = False


class Trial(NamedTuple):
    """One synthesis: which arm, which seed index."""

    arm: int
    seed: int

    @property
    def key(self) -> str:
        """Its name in rows and files, "arm-seed"."""
        return f"{self.arm}-{self.seed}"


@dataclass(frozen=True)
class Synthesis(Written):
    """What is synthesised and judged: every method × ε × seed; beside them, for every ε, the one-query floor.

    The judge trains on synthetic images alone and is tested on real ones. Its accuracy is that of the last epoch; the
    largest over epochs, which published numbers report, is chosen by the test set and stands beside it, labelled.

    Attributes:
        data: private records, a set of `qleak.synth.sets`; tested on its test split.
        methods: who makes images.
        names: what they are called in tables; () for their specs.
        classifiers: the judges; the first one's accuracy is *the* accuracy.
        size: images are averaged down to size × size pixels first; 0 for the set's own size.
        limit: training records, spread evenly over the set; 0 for all.
        test_limit: test images, spread evenly; 0 for all.
        epsilons: budgets ε that are not passed.
        delta: their δ.
        samples: synthetic images a judge learns from, classes in equal parts.
        eval_every: steps between measurements by the first judge; 0 for the end alone.
        save_every: steps between checkpoints (measurements are checkpoints, too).
        seeds: syntheses per arm; each has its own partition, weights and noise.
        seed: root of all of them.
        files: sample files that each arm's first seed writes when its budget is spent.
        per_file: images of one.
        quality: Fréchet distance and memorisation are measured at the end.
        statistics: statistics that are not private are written down; refused unless `non_release`.
        non_release: nothing of this run will leave the house.
        canary: one record is replaced ("bright", "inverted" or "relabelled"), and what that does to all that is released is
            measured beside what is promised; also a statistic that is not private, so it needs `non_release`.
    """

    data: str
    methods: tuple[Synthesizer, ...]
    names: tuple[str, ...] = ()
    classifiers: tuple[Classifier, ...] = field(default_factory=lambda: (build("classifiers", "mlp_classifier"),))
    size: int = 0
    limit: int = 0
    test_limit: int = 0
    epsilons: tuple[float, ...] = (1.0,)
    delta: float = 1e-5
    samples: int = 10_000
    eval_every: int = 0
    save_every: int = 10
    seeds: int = 5
    seed: int = 0
    files: int = 10
    per_file: int = 10_000
    quality: bool = True
    statistics: bool = False
    non_release: bool = False
    canary: str = ""

    kind: ClassVar[str] = "synthesis"

    def __post_init__(self) -> None:
        counts = {
            "seeds": self.seeds,
            "samples": self.samples,
            "per_file": self.per_file,
            "save_every": self.save_every,
        }
        sizes = {"size": self.size, "limit": self.limit, "test_limit": self.test_limit, "eval_every": self.eval_every}
        whole(**counts, **sizes, seed=self.seed, files=self.files)
        at_least(1, **counts, methods=len(self.methods), classifiers=len(self.classifiers), epsilons=len(self.epsilons))
        at_least(0, **sizes, seed=self.seed, files=self.files)
        positive(**{f"epsilons[{i}]": e for i, e in enumerate(self.epsilons)}, delta=self.delta)
        between(0, 1, delta=self.delta)
        if self.names and (len(self.names) != len(self.methods) or len({*self.names, FLOOR}) != len(self.names) + 1):
            raise Expected(f"Expected one name for each of {len(self.methods)} methods, got {self.names}.")
        one_of(["", *KINDS], canary=self.canary)
        if (self.statistics or self.canary) and not self.non_release:
            raise Expected(
                "Expected non_release beside statistics and canaries: votes and losses are functions of private records without noise, "
                "and void the guarantee of whatever is released with them. Pass --non-release to write them all the same."
            )

    def arms(self) -> list[Arm]:
        """Every method at every budget, then the floor at every budget."""
        names = self.names or tuple(short(m.spec) for m in self.methods)
        floor = build("synthesizers", "class_means")
        several = len(self.epsilons) > 1
        found = []
        for name, method, is_floor in (
            *((n, m, False) for n, m in zip(names, self.methods, strict=True)),
            (FLOOR, floor, True),
        ):
            found += [Arm(f"{name} ε={e:g}" if several else name, method, e, is_floor) for e in self.epsilons]
        return found

    def labels(self) -> list[str]:
        """Arms' names for tables."""
        return [arm.name for arm in self.arms()]

    def members(self) -> list[Trial]:
        """Every synthesis of the plan."""
        return [Trial(a, s) for a in range(len(self.arms())) for s in range(self.seeds)]

    def lines(self) -> dict[str, str]:
        """The plan in words, for the terminal."""
        size = f" · {self.size}×{self.size} pixels" if self.size else ""
        return {
            "data": f"{self.data}{size}{f' · {self.limit} records' if self.limit else ''}",
            "arms": " · ".join(self.labels()),
            "budget": f"ε {', '.join(f'{e:g}' for e in self.epsilons)} at δ {self.delta:g}, replace-one",
            "judges": f"{' · '.join(short(c.spec) for c in self.classifiers)} · {self.samples:,} synthetic images",
            "seeds": f"{self.seeds} per arm · seed {self.seed}",
        }  # fmt: skip

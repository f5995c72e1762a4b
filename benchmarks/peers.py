"""Against `breaching`, the framework of Geiping et al.: `python benchmarks/peers.py --python PATH`.

PATH is the Python of an environment with torch and breaching 0.1.2, which is no dependency of qleak. Both sides get
the same weights, gradients and starts, neither is told a label, pixels are not normalised. They take turns, one
thread each, and each is charged its own processor time. PSNR is qleak's on both sides' images; nothing stops at the
truth. Every repetition has photographs of its own.

1. Deep leakage (image and label, L-BFGS) on the sigmoid LeNet: breaching one image after another from one start;
   `dlg` (the same algorithm, iterations and first starts), `cells` as it is and in a quarter of its closures ("short"), each
   as one batch of 16 lanes on the same images.
2. Inverting gradients on two nets at equal steps and total variation: one lane, and one batch of 8 lanes.

Every repetition that is over is appended to `results/peers.jsonl`; Ctrl-C reports those.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qleak import data, machine, metrics, models, random, tree
from qleak.attacks import cells, dlg, inverting_gradients
from qleak.attacks.drive import Progress, drive
from qleak.channels import identity
from qleak.check import Failed
from qleak.client import View, gradient
from qleak.types import Attack, Model, Params, Tree

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peers.jsonl"
RECOVERED = 20.0  # dB
INNER = 20  # closures of one outer iteration of torch.optim.LBFGS, which breaching uses as it is


class Case(NamedTuple):
    """A net and the victims' updates; `x` is looked at by `metrics` alone."""

    name: str
    model: Model
    params: Params
    x: Tensor
    y: Tensor
    sent: list[Any]

    def view(self, rows: Iterable[int]) -> View:
        """What the attacker sees, one lane for each of `rows`."""
        message = pytree.tree_map(lambda *v: torch.stack(v), *(self.sent[i] for i in rows))
        return View(self.model, self.params, {}, identity(), gradient(), message)

    def start(self, attack: Attack, image: int, number: int) -> Tree:
        """Start `number` on an image, the same for every attack that draws the same law."""
        return attack.draw(random.generator(0, "start", image, number), self.view([image]))


def case(name: str, model: Model, images: int) -> Case:
    victims, channel, client = data.load("cifar10-12k", "test", limit=images), identity(), gradient()
    params, sent = model.init(random.generator(0, "params"))[0], []
    for i in range(images):
        update = client.update(model, params, {}, victims.x[i : i + 1], victims.y[i : i + 1])
        noise = channel.draw(random.generator(0, "channel", i), params, ())
        sent.append(channel.send(channel.knobs(), update, noise, channel.init(params), params)[0][-1])
    return Case(name, model, params, victims.x, victims.y, sent)


@dataclass
class Tally:
    """What one contestant did in one repetition: every attack's PSNR, and the processor time of all."""

    name: str
    cpu_s: float = 0.0
    closures: int = 0
    psnr: list[float] = field(default_factory=list)

    @property
    def ok(self) -> int:
        """Attacks that recovered their image."""
        return sum(v >= RECOVERED for v in self.psnr)

    def row(self) -> dict[str, Any]:
        """For the result file."""
        each = {"cpu_s_per_attack": self.cpu_s / len(self.psnr), "cpu_s_per_recovered": self.per_recovered()}
        return {**vars(self), "attacks": len(self.psnr), "recovered": self.ok, **each}

    def per_recovered(self) -> float | None:
        """Seconds for each recovered image, failures paid for; None without one."""
        return self.cpu_s / self.ok if self.ok else None


class Rival:
    """breaching in its own process, which computes only while it is asked."""

    def __init__(self, python: str, folder: Path):
        self.folder = folder
        self.log = (folder / "stderr.txt").open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [python, str(HERE / "peer_breaching.py"), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True,
        )  # fmt: skip
        self.versions = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            tail = (self.folder / "stderr.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise Failed(f"Expected breaching to answer, but it ended: {' '.join(tail)}")
        return json.loads(line)

    def attack(self, tally: Tally, which: Case, kind: str, image: int, start: int, overrides: list[str]) -> None:
        """One attack by one of its own configurations, added to the tally."""
        ask = {"net": which.name, "attack": kind, "image": image, "start": start, "overrides": overrides}
        assert self.process.stdin
        print(json.dumps(ask), file=self.process.stdin, flush=True)
        found = self._answer()
        with np.load(self.folder / "answer.npz") as file:
            tally.psnr += metrics.psnr(torch.from_numpy(file["x"]), which.x[image : image + 1]).tolist()
        tally.cpu_s += found["cpu_s"]
        tally.closures += found["closures"]

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()
        self.log.close()


class Own:
    """One attack of qleak on a batch of lanes, advanced in turns."""

    def __init__(self, tally: Tally, which: Case, attack: Attack, lanes: list[tuple[int, int]]):
        self.tally, self.steps, self.done = tally, attack.steps, False
        self.truth = which.x[[i for i, _ in lanes]]
        view, start = which.view([i for i, _ in lanes]), tree.stack([which.start(attack, *lane) for lane in lanes])
        self.run = drive(attack, view, start)

    def advance(self, share: float = 1.0) -> None:
        """Goes on until `share` of all steps is done; at 1, to the end."""
        began = time.process_time()
        while not self.done:
            now = next(self.run)
            if isinstance(now, Progress):
                if share < 1 and now.step >= share * self.steps:
                    break
                continue
            self.done = True
            guess, _, closures = now
            self.tally.closures = int(closures.sum())
            self.tally.psnr += metrics.psnr(guess.x.flatten(0, 1), self.truth).tolist()
        self.tally.cpu_s += time.process_time() - began


def export(which: Case, folder: Path, starts: dict[str, Tree]) -> None:
    """Weights, gradients, starts, and one probe (made-up image and label) at which both nets must agree."""
    probe, label = random.uniform(random.generator(0, "probe"), (1, *which.model.shape)), torch.zeros(1).long()
    arrays = {f"params.{k}": v for k, v in which.params.items()}
    arrays |= {"probe.x": probe, "probe.y": label, "probe.out": which.model.apply(which.params, {}, probe)}
    arrays |= {f"probe.{k}": v for k, v in gradient().update(which.model, which.params, {}, probe, label).items()}
    for i in range(len(which.sent)):
        arrays |= {f"gradient.{i}.{k}": v[0] for k, v in which.view([i]).decoded().items()}
    for key, drawn in starts.items():
        arrays |= {f"start.{key}.{k}": v for k, v in drawn.items()}
    np.savez(folder / f"{which.name}.npz", **{k: v.detach().numpy() for k, v in arrays.items()})  # pyright: ignore[reportArgumentType]
    layers = [{"kind": layer.kind, "options": dict(layer.options)} for layer in which.model.layers or ()]
    spec = {"layers": layers, "params": list(which.params), "shape": which.model.shape, "classes": which.model.classes}
    (folder / f"{which.name}.json").write_text(json.dumps(spec), encoding="utf-8")


def leakage(rival: Rival, which: Case, images: range, outer: int, same: bool) -> list[Tally]:
    """Part 1, one repetition; `dlg` takes part only where `same`, for it takes longest."""
    lanes = [(i, s) for i in images for s in range(16 // len(images))]
    out = [Tally("breaching deepleakage"), Tally("cells"), Tally("cells, short"), Tally("dlg")][: 3 + same]
    attacks = (cells(), cells(stages=3, steps=50, last=50), dlg(outer=outer))
    own = [Own(t, which, attack, lanes) for t, attack in zip(out[1:], attacks, strict=False)]
    for turn, i in enumerate(images):
        rival.attack(out[0], which, "deepleakage", i, 0, [f"optim.max_iterations={outer}"])
        for one in own:
            one.advance((turn + 1) / len(images))
    return out


def inverting(rival: Rival, which: Case, images: range, steps: int, variation: float) -> list[Tally]:
    """Part 2, one repetition on one net: the first image alone on both sides, and one batch."""
    attack = inverting_gradients(steps=steps, variation=variation)
    lanes = [(i, s) for i in images for s in range(8 // len(images))]
    out = [Tally("breaching invertinggradients"), Tally("1 lane"), Tally(f"{len(lanes)} lanes")]
    batch, alone = Own(out[2], which, attack, lanes), Own(out[1], which, attack, lanes[:1])
    batch.advance(0.5)
    overrides = [f"optim.max_iterations={steps}", f"regularization.total_variation.scale={variation}"]
    rival.attack(out[0], which, "invertinggradients", images[0], 0, overrides)
    alone.advance()
    batch.advance()
    return out


def compare(repetitions: list[list[Tally]]) -> dict[str, Any]:
    """Rival over qleak, `[least, median, largest]` of the repetitions: time per attack, closure and recovered image."""
    out: dict[str, Any] = {}
    for k in range(1, max(map(len, repetitions))):
        pairs = [(r[0], r[k]) for r in repetitions if k < len(r)]
        ratios = {
            "attack": [(a.cpu_s / len(a.psnr)) / (b.cpu_s / len(b.psnr)) for a, b in pairs],
            "closure": [(a.cpu_s / a.closures) / (b.cpu_s / b.closures) for a, b in pairs],
            "recovered": [a / b for p, q in pairs if (a := p.per_recovered()) and (b := q.per_recovered())],
        }
        out[next(r[k].name for r in repetitions if k < len(r))] = {
            n: [min(v), median(v), max(v)] for n, v in ratios.items() if v
        }
    return out


def report(title: str, repetitions: list[list[Tally]]) -> None:
    """Prints one part, pooled over repetitions, and its ratios."""
    ratios = compare(repetitions)
    print(f"\n{title}\n{'':30}{'recovered':>10}{'PSNR median':>13}{'CPU s':>8}{'per attack':>12}", end="")
    print(f"{'per recovered':>15}{'ms a closure':>14}   breaching / qleak: min median max")
    for k in range(max(map(len, repetitions))):
        parts = [r[k] for r in repetitions if k < len(r)]
        t = Tally(parts[0].name, sum(p.cpu_s for p in parts), sum(p.closures for p in parts))
        t.psnr = [v for p in parts for v in p.psnr]
        each = f"{t.per_recovered():.2f}" if t.ok else "-"
        print(f"{t.name:30}{t.ok:>6}/{len(t.psnr):<3}{median(t.psnr):>13.1f}{t.cpu_s:>8.1f}", end="")
        print(f"{t.cpu_s / len(t.psnr):>12.2f}{each:>15}{t.cpu_s / t.closures * 1e3:>14.2f}   ", end="")
        print("; ".join(f"{n} {' '.join(f'{v:.1f}' for v in r)}" for n, r in ratios.get(t.name, {}).items()))


def warm_up(rival: Rival, cases: list[Case]) -> None:
    for which in cases:
        for attack in (dlg(outer=1), cells(steps=5, stages=1, last=5), inverting_gradients(steps=20)):
            Own(Tally(""), which, attack, [(0, 0), (1, 0)]).advance()
        rival.attack(Tally(""), which, "deepleakage", 0, 0, ["optim.max_iterations=1"])
        rival.attack(Tally(""), which, "invertinggradients", 0, 0, ["optim.max_iterations=20"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="Python of an environment with torch and breaching")
    for name, default, words in (
        ("--repetitions", 3, "of everything"), ("--images", 2, "photographs of a repetition (1, 2, 4 or 8)"),
        ("--outer", 60, "L-BFGS iterations"), ("--same", 1, "last repetitions, with dlg"), ("--parts", "12", "which"),
        ("--steps", 100, "of inverting gradients"), ("--variation", 1e-2, "total variation of both sides"),
    ):  # fmt: skip
        parser.add_argument(name, type=type(default), default=default, help=f"{words}; default %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    nets = {"lenet": models.lenet(classes=10), "convnet": models.convnet()}
    cases = [case(name, model, args.images * args.repetitions) for name, model in nets.items()]
    with tempfile.TemporaryDirectory() as name:
        drawer, folder = dlg(), Path(name)  # its image is the normal start of inverting gradients too
        for which in cases:
            export(which, folder, {f"{i}.0": which.start(drawer, i, 0) for i in range(len(which.sent))})
        rival = Rival(args.python, folder)
        warm_up(rival, cases)
        parts: dict[str, list[list[Tally]]] = {}
        try:
            for n in range(args.repetitions):
                found = repetition(rival, cases, n, args)
                for title, tallies in found.items():
                    parts.setdefault(title, []).append(tallies)
                record(args, rival.versions, n, found)
        except KeyboardInterrupt:
            print("interrupted: what is over is reported", file=sys.stderr)
            rival.process.kill()
        rival.close()
    for title, repetitions in parts.items():
        report(title, repetitions)


def repetition(rival: Rival, cases: list[Case], n: int, args: argparse.Namespace) -> dict[str, list[Tally]]:
    images, found = range(n * args.images, (n + 1) * args.images), {}
    if "1" in args.parts:
        same = n >= args.repetitions - args.same
        found["deep leakage, sigmoid LeNet"] = leakage(rival, cases[0], images, args.outer, same)
    for which in cases * ("2" in args.parts):
        found[f"inverting gradients, {which.name}"] = inverting(rival, which, images, args.steps, args.variation)
    return found


def record(args: argparse.Namespace, versions: dict[str, Any], n: int, found: dict[str, list[Tally]]) -> None:
    settings = {k: v for k, v in vars(args).items() if k != "python"}
    line = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "args": settings, "rival": versions}
    line |= {"repetition": n, "parts": {title: [t.row() for t in tallies] for title, tallies in found.items()}}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, **machine.describe()}) + "\n")


if __name__ == "__main__":
    main()

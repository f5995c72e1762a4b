"""A step of `dlg` and its two halves, with compiled kernels and with torch's operations, in turns: `just bench-steps`.

The colour LeNet, exact gradient, a full history of 100 pairs, one thread; milliseconds a lane, medians of the turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import bench
import closures
import torch
from rich.console import Console
from rich.table import Table

from qleak import native, pool, random, tree
from qleak.attacks import dlg, lbfgs, objectives, routes

PARTS = ("a step", "derivatives", "L-BFGS")


def parts(lanes: int) -> dict[str, Callable[[], Any]]:
    """What is timed, each ready for another call."""
    attack, seen, optimizer = dlg(), closures.view("lenet", lanes), lbfgs(armijo=False)
    start = tree.stack(bench.starts(attack, seen.at(torch.tensor([0])), lanes))
    state = attack.init(seen, start)
    for _ in range(110):
        state, _ = attack.step(seen, state)
    held = {"state": state, "pairs": attack.step(seen, state)[0].optimizer}
    objective, target = objectives.objective(seen, "l2"), torch.softmax(start["logits"], -1)
    slope = random.normal(random.generator("slope"), held["pairs"].x.shape) * 1e-3

    def step() -> None:
        held["state"], _ = attack.step(seen, held["state"])

    def turn() -> None:
        _, held["pairs"] = optimizer.update(held["pairs"], held["pairs"].x, held["pairs"].loss, slope)

    return dict(
        zip(PARTS, (step, lambda: routes.closure(seen, objective)(start["x"], target, state.goal), turn), strict=True)
    )


def measure(lanes: int, turns: int, least: float) -> dict[str, dict[str, float]]:
    """Milliseconds a lane: `{"compiled" or "torch": {part: median}}`."""
    runs = parts(lanes)
    found: dict[str, dict[str, list[float]]] = {kind: {part: [] for part in PARTS} for kind in ("torch", "compiled")}
    for _ in range(turns):
        for kind, times in found.items():
            with mock.patch.object(native, "serves", native.serves if kind == "compiled" else lambda x: False):
                for part, run in runs.items():
                    times[part].append(1e3 * closures.timed(run, least) / lanes)
    return {kind: {part: statistics.median(v) for part, v in times.items()} for kind, times in found.items()}


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lanes", default="1,4,16,32")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--least", type=float, default=0.2, help="seconds of a measurement")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pool.keep_heap()
    table = Table("lanes", *PARTS, title=f"ms a lane, torch's → compiled ({native.described()})")
    for lanes in map(int, asked.lanes.split(",")):
        found = measure(lanes, asked.turns, asked.least)
        table.add_row(str(lanes), *(f"{found['torch'][p]:.2f} → {found['compiled'][p]:.2f}" for p in PARTS))
    Console().print(table)


if __name__ == "__main__":
    main()

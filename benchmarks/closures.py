"""Closures a second: qleak's lanes against the sequential closure, on one core and on two. `just bench-closures`.

A closure is the misfit ‖g′ − g‖² of one lane with its gradients in image and label. The sequential one is autograd twice
(`bench.twin_closure`); qleak's is `routes.closure` as an attack calls it. The contestants take turns, so a ratio compares
seconds of the same moments; medians with least and largest of the repetitions. FLOPs are counted by torch, on qleak's
pass (`--net lenet` 10 MFLOP a lane), the peak is that of a product of 1024×1024 matrices.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import bench
import torch
from torch.utils.flop_counter import FlopCounterMode

from qleak import client, machine, models, native, pool, random
from qleak.attacks import objectives, routes, structured
from qleak.client import View
from qleak.types import Model

RESULTS = Path(__file__).parent / "results" / "closures.jsonl"
NETS: dict[str, tuple[Callable[[], Model], str]] = {
    "lenet": (models.lenet, "photos"),
    "lenet_mnist": (models.lenet_mnist, "mnist5k"),
    "convnet64": (models.convnet64, "photos"),
    "resnet18": (models.resnet18, "photos"),
}
Run = Callable[[], Any]


def view(net: str, lanes: int) -> View:
    """`lanes` times the attacker's view of one image's exact gradient."""
    make, images = NETS[net]
    return bench.victim(0, make(), images)[0].at(torch.zeros(lanes, dtype=torch.int64))


def sequential(net: str) -> Run:
    """One closure of the twin."""
    seen = view(net, 1)
    image = random.normal(random.generator("x"), (1, *seen.model.shape)).requires_grad_()
    logits = random.normal(random.generator("t"), (1, seen.model.classes)).requires_grad_()
    return bench.twin_closure(seen, image, logits)


def batched(net: str, lanes: int) -> Run:
    """One closure of every lane."""
    seen = view(net, lanes)
    x = random.normal(random.generator("x"), (lanes, 1, *seen.model.shape))
    t = torch.softmax(random.normal(random.generator("t"), (lanes, 1, seen.model.classes)), -1)
    goal, o = objectives.goal(seen, "l2"), objectives.objective(seen, "l2")
    return lambda: routes.closure(seen, o)(x, t, goal)


def timed(run: Run, least: float) -> float:
    """Seconds of one call, over as many as take `least` seconds."""
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < least or not count:
        run()
        count += 1
    return spent / count


def worker(net: str, lanes: int, least: float, end: Connection) -> None:
    """In a process of its own: times whenever asked, closures a second."""
    torch.set_num_threads(1)
    pool.keep_heap()
    run = batched(net, lanes)
    run()
    end.send(0.0)
    while end.recv():
        end.send(lanes / timed(run, least))


class Two:
    """Two worker processes that hold half of the lanes each."""

    def __init__(self, net: str, lanes: int, least: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.ends = []
        for part in (lanes // 2, lanes - lanes // 2):
            mine, theirs = context.Pipe()
            process = context.Process(target=worker, args=(net, part, least, theirs), daemon=True)
            process.start()
            self.ends.append(mine)
        for end in self.ends:
            end.recv()

    def rate(self) -> float:
        """Closures a second of both together."""
        for end in self.ends:
            end.send(True)
        return sum(end.recv() for end in self.ends)

    def close(self) -> None:
        """Ends them."""
        for end in self.ends:
            end.send(False)


def flops(net: str) -> float:
    """Floating-point operations of one closure of one lane, as torch counts the products that run; of explicit formulas."""
    if not structured.supports(NETS[net][0]().layers):
        return math.nan
    run = batched(net, 1)
    with mock.patch.object(native, "serves", return_value=False), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def peak() -> float:
    """FLOP/s of one thread on a 1024×1024 product."""
    a = random.normal(random.generator("a"), (1024, 1024))
    a @ a
    return 2 * 1024**3 / min(timed(lambda: a @ a, 0.05) for _ in range(5))


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def exponent(rates: dict[int, float], least: int = 16) -> float:
    """The p of seconds ∝ lanes^p, by least squares on logarithms."""
    pairs = [(math.log(n), math.log(n / r)) for n, r in rates.items() if n >= least]
    mean = [statistics.mean(v) for v in zip(*pairs, strict=True)]
    across = sum((a - mean[0]) ** 2 for a, _ in pairs)
    return sum((a - mean[0]) * (b - mean[1]) for a, b in pairs) / across if across else math.nan


def measure(net: str, lanes: list[int], repeats: int, least: float, cores: int) -> dict[str, Any]:
    """Every ratio, repetition by repetition."""
    twin, run = sequential(net), {n: batched(net, n) for n in lanes}
    two = {n: Two(net, n, least) for n in lanes if n >= 2} if cores > 1 else {}
    timed(twin, least)
    one_core: dict[int, list[float]] = {n: [] for n in lanes}
    two_cores: dict[int, list[float]] = {n: [] for n in two}
    best, slowest = dict.fromkeys(lanes, 0.0), []
    for _ in range(repeats):
        for n in lanes:
            before = timed(twin, least)
            rate = n / timed(run[n], least)
            both = two[n].rate() if n in two else 0.0
            single = (before + timed(twin, least)) / 2  # of the moments on either side
            slowest.append(1 / single)
            one_core[n].append(rate * single)
            best[n] = max(best[n], rate)
            if both:
                two_cores[n].append(both * single)
    for pair in two.values():
        pair.close()
    return {
        "net": net, "route": routes.pick(NETS[net][0](), client.gradient(), lanes[-1], routes.weights(NETS[net][0]()))[0],
        "sequential_per_s": spread(slowest), "ratio": {n: spread(v) for n, v in one_core.items()},
        "ratio_two": {n: spread(v) for n, v in two_cores.items()}, "per_s": best,
        "exponent": exponent(best), "mflop": flops(net) / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", default="lenet,lenet_mnist")
    parser.add_argument("--lanes", default="1,16,32,128,512")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--least", type=float, default=0.3, help="seconds of one timing")
    parser.add_argument("--cores", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool.keep_heap()
    top = peak()
    print(f"peak of one thread {top / 1e9:.0f} GFLOP/s")
    for net in args.nets.split(","):
        found = measure(net, [int(n) for n in args.lanes.split(",")], args.repeats, args.least, args.cores)
        mean = found["sequential_per_s"]["median"]
        print(f"\n{net}: route {found['route']}, {found['mflop']:.2f} MFLOP a closure, sequential {mean:.0f} a second")
        print(f"{'lanes':>7}{'closures/s':>12}{'of peak':>9}   {'one core: min, median, max':28}two cores")
        for n, r in found["ratio"].items():
            said = [
                f"{v['min']:5.1f} {v['median']:5.1f} {v['max']:5.1f}" if v else ""
                for v in (r, found["ratio_two"].get(n))
            ]
            share = found["per_s"][n] * found["mflop"] * 1e6 / top
            print(f"{n:>7}{found['per_s'][n]:>12.0f}{share:>9.1%}   {said[0]:28}{said[1]}")
        print(f"seconds ∝ lanes^{found['exponent']:.3f} from 16 lanes on")
        line = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **found, "peak_gflops": top / 1e9}
        line |= {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, "args": vars(args)}
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **machine.describe()}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

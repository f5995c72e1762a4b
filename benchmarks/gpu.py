"""One CUDA device against the CPU: the same numbers, then closures per second and memory at 1 … 4,096 lanes: `just gpu`.

Three checks (closures and their gradients, L-BFGS iterates, an audit row by row), then rates of `dlg` at powers of 4, the
closure alone as a replayed graph, and the fit bytes = a + b·lanes. Without a CUDA device it says so and ends.
Results are appended to benchmarks/results/gpu.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from qleak import data, engine, machine, random, tree
from qleak.attacks import cells, closed_form, dlg
from qleak.attacks.device import graphed
from qleak.catalog import build
from qleak.channels import chain, identity
from qleak.client import View, gradient
from qleak.engine.memory import Tally, size
from qleak.plans import Audit
from qleak.store import open_run
from qleak.types import Attack

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
NETS = {  # name: (model, data)
    "colour LeNet": ("lenet()", "photos"),
    "MNIST LeNet": ("lenet_mnist()", "mnist5k"),
    "ResNet": ("resnet()", "photos"),
}
LANES = tuple(4**i for i in range(7))


def scene(net: str, lanes: int, device: str, dtype: torch.dtype = torch.float32) -> View:
    """The attacker's view of one exact gradient, for so many lanes; made on the CPU, so that every device sees the same."""
    spec, name = NETS[net]
    images, model, channel, client = data.load(name), build("models", spec), identity(), gradient()
    params, buffers = (tree.cast(t, dtype) for t in model.init(random.generator(0, "params")))
    x, y = images.x[:1].to(dtype), images.y[:1] % model.classes
    update = client.update(model, params, buffers, x, y)
    noise = channel.draw(random.generator(0, "channel"), params, ())
    sent = channel.send(channel.knobs(), update, noise, channel.init(params), params)[0][-1]
    move: Callable[[Any], Any] = lambda t: tree.nested_map(lambda v: v.to(device), t)  # noqa: E731
    view = View(model, move(params), move(buffers), channel, client, move(tree.nested_map(lambda v: v[None], sent)))
    return view.at(torch.zeros(lanes, dtype=torch.int64, device=device))


def starts(view: View, attack: Attack) -> tree.Tree:
    """Every lane's start, drawn on the CPU."""
    like = next(iter(view.params.values()))
    drawn = [attack.draw(random.generator(0, "start", i), view) for i in range(view.lanes)]
    return {k: v.to(like) for k, v in tree.stack(drawn).items()}


def closure(view: View) -> Callable[..., tuple[Tensor, ...]]:
    """(x `[lane b c h w]`, logits `[lane b class]`) -> (|∇ℓ(x) − g|² `[lane]`, its two gradients): the definition, by torch.func."""
    target = view.decoded()

    def misfit(x: Tensor, logits: Tensor, goal: tree.Tree) -> tuple[Tensor, Tensor]:
        def loss(params: tree.Tree) -> Tensor:
            out = view.model.apply(params, view.buffers, x)
            return -(F.softmax(logits, -1) * F.log_softmax(out, -1)).sum(-1).mean()

        update = grad(loss)(view.params)
        value = torch.stack([(update[k] - goal[k]).square().sum() for k in goal]).sum()
        return value, value

    each = vmap(grad(misfit, argnums=(0, 1), has_aux=True), randomness="error")

    def call(x: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        (dx, dlogits), value = each(x, logits, target)
        return value, dx, dlogits

    return call


def apart(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, in float64 on the CPU."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def same_closures(net: str, device: str, lanes: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Relative difference of closure values and of both gradients, device against CPU."""
    found = []
    for place in (device, "cpu"):
        view = scene(net, lanes, place, dtype)
        start = starts(view, dlg())
        found.append(closure(view)(start["x"], start["logits"]))
    return {name: apart(a, b) for name, a, b in zip(("value", "dx", "dlogits"), *found, strict=True)}


def same_iterates(net: str, device: str, lanes: int = 4, steps: int = 10, dtype: torch.dtype = torch.float64) -> float:
    """Largest relative difference of the first L-BFGS iterates of `dlg`, device against CPU."""
    paths = []
    for place in (device, "cpu"):
        view, attack = scene(net, lanes, place, dtype), dlg()
        state, path = attack.init(view, starts(view, attack)), []
        for _ in range(steps):
            state, _ = attack.step(view, state)
            path.append(state.x.detach().cpu().clone())
        paths.append(path)
    return max(apart(a, b) for a, b in zip(*paths, strict=True))


def same_audit(device: str, outer: int = 2, restarts: int = 2) -> dict[str, float]:
    """A whole audit in float64, through the engine and a run folder, row by row: largest differences of loss and PSNR."""
    plan = Audit(
        build("models", "lenet(channels=1, size=28, classes=10)"), "mnist5k", (0, 1), (chain(),),
        (dlg(outer=outer), cells(stages=2, steps=10 * outer, last=10 * outer), closed_form()), restarts=restarts, chunk=4, dtype="float64",
    )  # fmt: skip
    found = []
    for place in (device, "cpu"):
        with tempfile.TemporaryDirectory() as folder, open_run(Path(folder) / "run", plan.header("gpu")) as run:
            for _ in engine.run(plan, run, place, 1):
                pass
            found.append({r["key"]: r for r in run.rows()})
    there, here = found
    if there.keys() != here.keys():
        raise SystemExit(f"rows differ: {sorted(there.keys() ^ here.keys())}")
    pairs = [(there[k], here[k]) for k in here]
    status = sum(a["status"] != b["status"] for a, b in pairs)
    loss = max(gap(a["loss"], b["loss"]) / max(abs(b["loss"] or 0), 1e-12) for a, b in pairs)
    return {"rows": len(here), "status": status, "loss": loss, "psnr": max(gap(a["psnr"], b["psnr"]) for a, b in pairs)}


def gap(a: float | None, b: float | None) -> float:
    """|a − b|; prior-only lanes have no loss on either side."""
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return abs(a - b)


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def per_second(run: Callable[[], Any], lanes: int, device: str, seconds: float) -> float:
    """Calls × lanes per wall second, after three calls to warm up; at least two calls."""
    for _ in range(3):
        run()
    synchronize(device)
    began, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - began < seconds:
        run()
        calls += 1
        if calls % 8 == 0:
            synchronize(device)  # else the queue runs ahead of the clock
    synchronize(device)
    return calls * lanes / (time.perf_counter() - began)


def rate(net: str, lanes: int, device: str, seconds: float = 1.0) -> dict[str, Any]:
    """Attack steps per second over all lanes, the closure alone (plain and replayed), and the attack's peak bytes."""
    view, attack = scene(net, lanes, device), dlg()
    start = starts(view, attack)
    cuda, before = torch.device(device).type == "cuda", 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with Tally() as tally:
        state = attack.init(view, start)
        for _ in range(2):
            state, _ = attack.step(view, state)
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else tally.top
    held = [state]

    def step() -> None:
        held[0], _ = attack.step(view, held[0])

    x, logits = start["x"].clone(), start["logits"].clone()
    plain, replay = closure(view), graphed(closure(view), (x, logits))
    found = {"net": net, "lanes": lanes, "bytes": int(peak), "tallied": int(tally.top), "graph": replay.reason}
    found["steps_per_s"] = round(per_second(step, lanes, device, seconds), 1)
    found["closures_per_s"] = round(per_second(lambda: plain(x, logits), lanes, device, seconds), 1)
    if replay.replayed:
        if (worst := max(apart(a, b) for a, b in zip(replay.call(x, logits), plain(x, logits), strict=True))) > 1e-4:
            raise SystemExit(f"the replayed closure differs by {worst:.1e}")
        found["replayed_per_s"] = round(per_second(lambda: replay.call(x, logits), lanes, device, seconds), 1)
    return found


def rates(net: str, device: str, counts: Sequence[int], seconds: float = 1.0) -> list[dict[str, Any]]:
    """`rate` at every number of lanes, up to the first that does not fit."""
    found = []
    for lanes in counts:
        try:
            found.append(rate(net, lanes, device, seconds))
        except torch.cuda.OutOfMemoryError:
            print(f"{net}: {lanes} lanes do not fit", file=sys.stderr)
            break
        finally:
            if torch.device(device).type == "cuda":
                torch.cuda.empty_cache()
        print(line(found[-1]), flush=True)
    return found


def line(r: dict[str, Any]) -> str:
    """A row of the table."""
    replayed = f"{r['replayed_per_s']:>12.0f}" if "replayed_per_s" in r else f"{'–':>12}"
    return f"{r['net']:14}{r['lanes']:>6}{r['steps_per_s']:>12.0f}{r['closures_per_s']:>12.0f}{replayed}{size(r['bytes']):>12}"


def memory_model(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(a, b) of bytes = a + b·lanes by least squares of relative errors; (bytes, 0) of a single row."""
    lanes, bytes_ = np.array([r["lanes"] for r in rows], float), np.array([r["bytes"] for r in rows], float)
    if len(rows) < 2:
        return float(bytes_[0]), 0.0
    b, a = np.polyfit(lanes, bytes_, 1, w=1 / bytes_)
    return float(a), float(b)


def measure(device: str, counts: Sequence[int], seconds: float) -> dict[str, Any]:
    """Everything, printed as it comes. Raises SystemExit where the device's numbers are not the CPU's."""
    checks: dict[str, Any] = {net: same_closures(net, device) for net in NETS}
    for net, found in checks.items():
        found["iterates"] = same_iterates(net, device)
        print(f"{net:14}" + "  ".join(f"{k} {v:.1e}" for k, v in found.items()) + "  (relative, float64)", flush=True)
        if worst := [f"{k} {v:.1e}" for k, v in found.items() if not v < 1e-5]:
            raise SystemExit(f"{net}: {device} differs from the CPU: {', '.join(worst)}")
    audit = same_audit(device)
    print("audit         " + "  ".join(f"{k} {v:.3g}" for k, v in audit.items()), flush=True)
    if audit["status"] or not audit["loss"] < 0.05 or not audit["psnr"] < 0.1:
        raise SystemExit(f"audit: rows on {device} differ from the CPU's")
    print(f"{'':14}{'lanes':>6}{'steps/s':>12}{'closures/s':>12}{'replayed/s':>12}{'peak':>12}")
    rows, models = [], {}
    for net in NETS:
        if mine := rates(net, device, counts, seconds):
            rows += mine
            models[net] = memory_model(mine)
            a, b = models[net]
            print(f"{net:14} bytes = {size(max(a, 0))} + {size(b)} · lanes; closures {mine[-1]['graph']}", flush=True)
    return {"checks": checks, "audit": audit, "rows": rows, "memory": models}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="default %(default)s; cpu tries the program itself")
    parser.add_argument("--lanes", type=int, default=max(LANES), help="largest number of lanes, default %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement, default %(default)s")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print("No CUDA device here: nothing was measured.")
        return
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # the CPU has none
    found = measure(args.device, [n for n in LANES if n <= args.lanes], args.seconds)
    if torch.device(args.device).type == "cuda":
        RESULTS.parent.mkdir(exist_ok=True)
        row = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "args": vars(args), **found, **machine.describe()}
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

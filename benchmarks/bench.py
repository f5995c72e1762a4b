"""Speed against the sequential twin: `just bench`, or `just bench --quick`. See docs/performance.md.

One process, one thread, CPU time; the contestants advance in turn, in proportion to their own work. The stop at
a small MSE looks at the truth: it exists here only, and is the same for all.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from qleak import data, machine, metrics, pool, random, tree
from qleak.attacks import cells, closed_form, dlg, quick, refine
from qleak.attacks.drive import lanes_at
from qleak.channels import identity
from qleak.client import View, gradient
from qleak.models import lenet
from qleak.types import Attack, Model, Status, Tree

INNER = 20
RESULTS = Path(__file__).parent / "results" / "bench.jsonl"
Slices = Iterator[float]  # the share of its own work a contestant has done


@dataclass
class Score:
    """What one contestant has done so far."""

    name: str
    n: int
    cpu_s: float = 0.0
    closures: int = 0
    at: list[int] = field(default_factory=list)  # closures of each lane that reached the threshold

    def row(self) -> dict[str, Any]:
        """The line of the table and of the result file."""
        median = sorted(self.at)[len(self.at) // 2] if self.at else None
        return {
            "name": self.name, "n": self.n, "ok": len(self.at), "ci": metrics.wilson(len(self.at), self.n),
            "cpu_s": round(self.cpu_s, 2), "closures": self.closures,
            "closures_per_cpu_s": round(self.closures / max(self.cpu_s, 1e-9), 1), "median_closures_to_success": median,
        }  # fmt: skip


def victim(photo: int, model: Model | None = None, name: str = "photos") -> tuple[View, torch.Tensor]:
    """The attacker's view (one lane) of one exact gradient, the colour LeNet's by default, and the picture it came from."""
    images, model, client, channel = data.load(name), model or lenet(), gradient(), identity()
    params, buffers = model.init(random.generator(0, "params"))
    x, y = images.x[photo : photo + 1], images.y[photo : photo + 1]
    update = client.update(model, params, buffers, x, y)
    noise = channel.draw(random.generator(0, "channel"), params, ())
    sent = channel.send(channel.knobs(), update, noise, channel.init(params), params)[0][-1]
    return View(model, params, buffers, channel, client, pytree.tree_map(lambda v: v[None], sent)), x


def starts(attack: Attack, view: View, seeds: int) -> list[Tree]:
    return [attack.draw(random.generator(0, "start", 0, seed), view) for seed in range(seeds)]


def twin_closure(view: View, image: torch.Tensor, logits: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Zhu et al.'s closure, without the gradients of the weights that their `.backward()` computes and nobody reads."""
    target = [v[0] for v in view.message.code.values()]
    params = {k: v.detach().clone().requires_grad_() for k, v in view.params.items()}

    def closure() -> torch.Tensor:
        image.grad = logits.grad = None
        out = view.model.apply(params, view.buffers, image)
        loss = -(F.softmax(logits, -1) * F.log_softmax(out, -1)).sum(-1).mean()
        update = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        misfit = torch.stack([(u - g).square().sum() for u, g in zip(update, target, strict=True)]).sum()
        image.grad, logits.grad = torch.autograd.grad(misfit, [image, logits])
        return misfit.detach()

    return closure


def sequential(score: Score, view: View, truth: torch.Tensor, lanes: list[Tree], outer: int, mse: float) -> Slices:
    """(A) One seed after another: autograd twice, torch's L-BFGS."""
    for seed, start in enumerate(lanes):
        image, logits = (start[k].clone().requires_grad_() for k in ("x", "logits"))
        optimizer = torch.optim.LBFGS([image, logits], lr=1, max_iter=INNER)
        closure = twin_closure(view, image, logits)
        for i in range(outer):
            before = score.closures - optimizer.state[image].get("func_evals", 0)
            optimizer.step(closure)
            done = optimizer.state[image]["func_evals"]
            score.closures = before + done
            reached = float(metrics.mse(image.detach(), truth)) <= mse
            score.at += [done] * reached
            if reached or not bool(image.isfinite().all()):
                break
            if (i + 1) % 25 == 0:
                yield (seed + i / outer) / len(lanes)
        yield (seed + 1) / len(lanes)


def batched(score: Score, attack: Attack, view: View, truth: torch.Tensor, lanes: list[Tree], mse: float) -> Slices:
    """(B, C, D) All lanes in one batch; lanes that reached the threshold, or that the attack itself ended, leave it."""
    view = view.at(torch.zeros(len(lanes), dtype=torch.int64))
    state = attack.init(view, tree.stack(lanes))
    for step in range(1, attack.steps + 1):
        state, _ = attack.step(view, state)
        score.closures += len(state.x)
        if step % INNER and step < attack.steps:
            continue
        pictures = state.x.detach().flatten(1)[:, : truth.numel()].unflatten(1, truth.shape[1:])
        reached = metrics.mse(pictures, truth.expand_as(pictures)) <= mse
        score.at += [step] * int(reached.sum())
        keep = torch.nonzero(~reached & (state.status == Status.ACTIVE))[:, 0]
        if not len(keep):
            return
        if len(keep) < len(state.x):
            view, state = view.at(keep), lanes_at(state, keep)
        yield step / attack.steps


def race(entries: list[tuple[Score, Slices]]) -> None:
    """The contestant that has done the smallest share goes next; its CPU time is its own."""
    share, said = [0.0] * len(entries), 0.0
    while min(share) < 1:
        if min(share) >= said + 0.05:
            said = min(share)
            doing = ", ".join(f"{x.name[:1]} {x.cpu_s:.0f} s {x.closures} closures {len(x.at)} ok" for x, _ in entries)
            print(f"{said:4.0%} {doing}", file=sys.stderr, flush=True)
        i = share.index(min(share))
        began = time.process_time()
        share[i] = next(entries[i][1], 1.0)
        entries[i][0].cpu_s += time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("--photo", 0), ("--seeds", 16), ("--outer", 300), ("--mse", 1e-3), ("--patience", 400)):
        parser.add_argument(name, type=type(default), default=default, help="default %(default)s")
    parser.add_argument("--quick", action="store_const", const={"seeds": 4, "mse": 1e-2}, default={}, help="for trying")
    parser.add_argument("--skip", default="", help="contestants to leave out, for example AP")
    args = parser.parse_args()
    vars(args).update(args.quick)
    torch.set_num_threads(1)
    pool.keep_heap()  # as the engine does
    view, truth = victim(args.photo)
    plain = dlg(outer=args.outer)
    contestants = {
        "A": ("A sequential twin", None),
        "B": ("B batched, same algorithm", plain),
        "P": (f"P = B with patience {args.patience}", dlg(outer=args.outer, patience=args.patience)),
        "C": ("C label + continuation", cells()),
        "Q": ("Q the same in 300 closures", quick()),
    }
    s, entries = {}, []
    for k, (name, attack) in contestants.items():
        if k not in args.skip:
            s[k], lanes = Score(name, args.seeds), starts(attack or plain, view, args.seeds)
            list(batched(Score("", 2), attack or plain, view, truth, lanes[:2], 1.0))  # warm up, not counted
            run = batched(s[k], attack, view, truth, lanes, args.mse) if attack else None
            entries.append((s[k], run or sequential(s[k], view, truth, lanes, args.outer, args.mse)))
    race(entries)
    for name, attack in (("D refine, one lane", refine()), ("D closed form", closed_form())):
        s[name] = Score(name, 1)
        race([(s[name], batched(s[name], attack, view, truth, starts(attack, view, 1), args.mse))])
    report(s, vars(args))


def compare(s: dict[str, Score]) -> dict[str, Any]:
    ratios = {}
    for k, target, aim in (("B", 6, 8), ("P", 6, 8), ("C", 25, 40), ("Q", 25, 40)):
        if {k, "A"} <= set(s):
            total, ok = s["A"].cpu_s / s[k].cpu_s, len(s[k].at) / max(len(s["A"].at), 1)
            ratios[k] = {"cpu": round(total, 2), "cpu_per_success": round(total * ok, 2), "target": target, "aim": aim}
    return ratios


def report(s: dict[str, Score], args: dict[str, Any]) -> None:
    rows, ratios = [score.row() for score in s.values()], compare(s)
    print(f"{'':28}{'ok':>6}  {'Wilson 95 %':<14}{'CPU s':>8}{'closures':>10}{'per CPU s':>16}{'median to ok':>14}")
    for r in rows:
        ci, median = f"{r['ci'][0]:.2f} … {r['ci'][1]:.2f}", str(r["median_closures_to_success"])
        print(f"{r['name']:28}{r['ok']:>3}/{r['n']:<3} {ci:<14}{r['cpu_s']:>8.1f}{r['closures']:>10}", end="")
        print(f"{r['closures_per_cpu_s']:>16.0f}{median:>14}")
    for k, r in ratios.items():
        words = [f"{w} {r[w]} {'met' if r['cpu'] >= r[w] else 'NOT met'}" for w in ("target", "aim")]
        print(f"CPU(A)/CPU({k}) {r['cpu']:.1f} in total, {r['cpu_per_success']:.1f} per success: {', '.join(words)}")
    RESULTS.parent.mkdir(exist_ok=True)
    line = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "args": args, "rows": rows, "ratios": ratios}
    line["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, **machine.describe()}) + "\n")


if __name__ == "__main__":
    main()

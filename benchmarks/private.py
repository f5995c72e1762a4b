"""Sums of clipped per-example gradients: `python benchmarks/private.py [--repetitions 30] [--only lenet5]`.

One process, one thread; all ways take turns on the same weights and images, so that a busy machine slows all, and each
is charged its own processor time. The non-private gradient of the batch is the unit. Opacus (no dependency of qleak) is
run as its training loop runs it, up to the sum: `hooks` with its per-sample gradients, `ghost` with two backward passes.
Every way's sum is compared with the first one's before any is timed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from qleak import models, random
from qleak.channels import clip_l2
from qleak.client import one_hot, slope
from qleak.models.lenet5 import _lenet5
from qleak.models.resnet import ResNet
from qleak.private import chunks, taps
from qleak.types import Model, Params, Tree

BOUND = 1
CASES: dict[str, tuple[Callable[[], Model], Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet5": (lambda: models.lenet5(function="relu"), lambda: _lenet5(1, 28, 10, "relu", "mean", "none"), (32, 256)),
    "resnet18": (
        lambda: models.resnet18(norm="group"),
        lambda: ResNet(3, 10, (64, 128, 256, 512), (2, 2, 2, 2), "group", "relu", "conv"),
        (8,),
    ),
}  # fmt: skip


def ours(model: Model, params: Params, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tree]]:
    """The non-private gradient (of the sum), and the clipped sums of qleak."""
    target, stage = one_hot(y, model.classes), clip_l2(BOUND)
    assert stage.shrink is not None
    given = (model, params, {}, x, target, stage.shrink, {k: torch.tensor(v) for k, v in stage.knobs.items()})
    plain = slope(model, {})
    return {
        "non-private": lambda: plain(params, x, target),
        "taps": lambda: taps.clipped_sum(*given)[0],
        "chunks": lambda: chunks.clipped_sum(*given)[0],
        "vmap, whole batch": lambda: chunks.clipped_sum(*given, chunk=len(x))[0],
    }


def theirs(make: Callable[[], nn.Module], params: Params, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tree]]:
    """Torch's own gradient, and the clipped sums of Opacus."""
    nets = [make() for _ in range(3)]
    for net in nets:
        net.load_state_dict(params)
    batch = {"noise_multiplier": 0.0, "max_grad_norm": BOUND, "expected_batch_size": len(x)}

    def plain() -> Tree:
        nets[2].zero_grad()
        F.cross_entropy(nets[2](x), y, reduction="sum").backward()
        return {k: p.grad for k, p in nets[2].named_parameters() if p.grad is not None}

    hooked = GradSampleModule(nets[0], loss_reduction="sum")
    optimizer = DPOptimizer(torch.optim.SGD(hooked.parameters(), lr=0.1), loss_reduction="sum", **batch)

    def hooks() -> Tree:
        optimizer.zero_grad()
        F.cross_entropy(hooked(x), y, reduction="sum").backward()
        optimizer.clip_and_accumulate()
        return {k: p.summed_grad for k, p in nets[0].named_parameters()}  # type: ignore[misc]

    fast = GradSampleModuleFastGradientClipping(nets[1], loss_reduction="sum", max_grad_norm=BOUND)
    second = DPOptimizerFastGradientClipping(torch.optim.SGD(fast.parameters(), lr=0.1), loss_reduction="sum", **batch)
    criterion = DPLossFastGradientClipping(fast, second, nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum")

    def ghost() -> Tree:
        second.zero_grad()
        criterion(fast(x), y).backward()
        return {k: p.grad for k, p in nets[1].named_parameters() if p.grad is not None}

    return {"torch, non-private": plain, "Opacus hooks": hooks, "Opacus ghost": ghost}


def turns(ways: dict[str, Callable[[], Tree]], repetitions: int) -> dict[str, list[float]]:
    """CPU milliseconds of every way, turn by turn; two turns to warm up."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repetitions + 2):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if turn >= 2:
                spent[name].append((time.process_time() - began) * 1e3)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--only", choices=sorted(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, (model_of, module_of, batches) in CASES.items():
        if options.only not in (None, name):
            continue
        model = model_of()
        params, _ = model.init(random.generator("net"))
        for b in batches:
            x = random.uniform(random.generator("images", b), (b, *model.shape))
            y = random.integers(random.generator("labels", b), model.classes, (b,))
            ways = ours(model, params, x, y) | theirs(module_of, params, x, y)
            clipped = [way() for said, way in ways.items() if "non-private" not in said]
            for other in clipped[1:]:
                for k, v in clipped[0].items():
                    torch.testing.assert_close(other[k], v, rtol=1e-3, atol=1e-4)
            spent = turns(ways, options.repetitions if name == "lenet5" else max(3, options.repetitions // 6))
            print(f"{name}, B = {b}: CPU ms (median), times non-private (median of the turns' ratios)")
            unit = spent["non-private"]
            for said, times in spent.items():
                ratio = median(t / u for t, u in zip(times, unit, strict=True))
                print(f"  {said:20s} {median(times):9.2f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()

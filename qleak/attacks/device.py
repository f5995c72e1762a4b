"""A GPU kept busy from Python: replayed graphs of pure functions, losses read back without waiting, looks where they are free.

A closure of a small net is some hundred kernels of a few microseconds; launching them from Python takes longer than
running them. `graphed` records them once and replays them as one. What may be recorded is a pure function of tensors of
fixed shapes: a whole attack step is not, because L-BFGS reads as many pairs as a counter in Python says, and a replayed
graph would read the recorded number for ever. So the closure is recorded, and the step around it stays as it is. When lanes leave
the batch, shapes change, and the function is recorded again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Pure = Callable[..., tuple[Tensor, ...]]
"""Tensors in, tensors out, no other effect, no look at a value on the way (`.item()`, `.cpu()`, `bool(t)`)."""

WARM = 3
"""Runs on a side stream before recording: libraries choose algorithms and allocate workspace then (torch's own advice)."""


class Graphed(NamedTuple):
    """`call` computes what the function does; `reason` says why it is replayed, or why not."""

    call: Pure
    replayed: bool
    reason: str


def graphed(function: Pure, like: Sequence[Tensor]) -> Graphed:
    """`function` as a replayed CUDA graph for inputs like `like`, or as it is, with the reason.

    The outputs of a replay are copies, so that the next replay does not change them. Inputs of another shape, dtype or
    device go to the function itself.

    Args:
        function: pure, see `Pure`.
        like: example inputs, all on one CUDA device.
    """
    devices = {v.device for v in like}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return Graphed(function, False, f"not replayed: inputs on {', '.join(sorted(map(str, devices)))}")
    return _recorded(function, [v.detach().clone() for v in like])


def _recorded(function: Pure, given: list[Tensor]) -> Graphed:  # pragma: no cover: needs CUDA (test_gpu.py)
    """`graphed` on one CUDA device; `given` are the inputs that a replay reads."""
    device = given[0].device
    try:
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM):
                    function(*given)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made = function(*given)
    except RuntimeError as error:  # a look at a value, an operator that may not be recorded, no memory
        torch.cuda.synchronize(device)
        return Graphed(function, False, f"not replayed: {str(error).splitlines()[0]}")

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        if len(inputs) != len(given) or any(_kind(a) != _kind(b) for a, b in zip(inputs, given, strict=True)):
            return function(*inputs)
        with torch.cuda.device(device):
            for mine, theirs in zip(given, inputs, strict=True):
                mine.copy_(theirs, non_blocking=True)
            graph.replay()
            return tuple(v.clone() for v in made)

    return Graphed(call, True, f"replayed as one CUDA graph on {device}")


class Reading(NamedTuple):
    """A copy on its way to the CPU; `wanted` waits for it."""

    host: Tensor
    arrived: torch.cuda.Event | None

    def wanted(self) -> Tensor:
        """The values, on the CPU."""
        if self.arrived is not None:  # pragma: no cover: needs a CUDA device
            self.arrived.synchronize()
        return self.host


def read_back(value: Tensor) -> Reading:
    """Starts copying to pinned memory behind the work already queued, and returns at once; on a CPU a plain copy.

    The value may be overwritten in place afterwards: its stream reaches the copy first.
    """
    value = value.detach()
    if value.device.type != "cuda":
        return Reading(value.clone() if value.device.type == "cpu" else value.cpu(), None)
    return _copying(value)


def _copying(value: Tensor) -> Reading:  # pragma: no cover: needs CUDA (tests/test_gpu.py)
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    with torch.cuda.device(value.device):
        host.copy_(value, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    return Reading(host, arrived)


def _kind(value: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return value.shape, value.dtype, value.device


def maybe(mask: Tensor) -> bool:
    """False where no entry is true: a look is free on a CPU; a GPU would wait for it, and gets the benefit of the doubt."""
    return mask.is_cuda or bool(mask.any())


def finite(x: Tensor) -> Tensor:
    """Whether all of `x [lane …]` is finite, `[lane]`: by the largest number, a tenth of the time of asking each."""
    return x.flatten(1).abs().amax(1) < torch.inf

"""What torch's own communication hooks send, recorded while they run.

    model.register_comm_hook(ddp.state(model), recording(fp16_compress_hook, "captured"))

The tensors are those the hook hands to `torch.distributed`, taken as it hands them over. The hook is waited for, one bucket
after another, so that each call belongs to a bucket: a recorded training computes the same numbers, more slowly.

What a rank sent, decoded:

- `allreduce_hook`, `fp16_compress_hook`, `bf16_compress_hook`: the buffer times the number of ranks, by which they divide
  first. fp16's division is exact above the subnormal numbers, so the decoded gradient is that of `chain(float16())`.
- `quantization_pertensor_hook`, `quantization_perchannel_hook`: scale·(code − zero point), uint8, one scale a *bucket* (all of
  its parameters together), or one for every 512 coordinates. torch's observers stretch the range to hold 0 and round the
  zero point, so this is no `uniform(levels=256)` of a tensor, and `channel` is left empty.
- `powerSGD_hook`: P̂ Qᵀ of every matrix that is compressed, where Q = Mᵀ P̂ is this rank's and P̂ = orth(Σ P) everybody's;
  M is the gradient plus this rank's error, where that is fed back. Other tensors as they are. Until the state's
  `start_powerSGD_iter` the hook is `allreduce_hook`, and is recorded so.

Vogels, Karimireddy, Jaggi, "PowerSGD" (NeurIPS 2019); torch.distributed.algorithms.ddp_comm_hooks.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from qleak.adapters import capture
from qleak.adapters.ranks import Hook, State, names_of
from qleak.check import Expected, did_you_mean
from qleak.types import Tree

_PATCH = threading.Lock()


@dataclass
class Call:
    """A collective call: what was handed over, the tensor itself, and what stood in it when the next call came."""

    name: str
    sent: Tensor
    live: Tensor
    later: Tensor | None = None


def recording(hook_fn: Callable[..., Any], folder: Path | str, inner: Any = None) -> Hook:
    """`hook_fn` itself, with what this rank sent written to `folder` after every step (`qleak.adapters.capture`).

    Args:
        hook_fn: one of `KNOWN`, from `torch.distributed.algorithms.ddp_comm_hooks`.
        folder: made where it is missing.
        inner: the state `hook_fn` takes: a process group (None for the default one) or a `PowerSGDState`.

    Raises:
        Expected: a hook whose payload is not known here.
    """
    name = getattr(hook_fn.func if isinstance(hook_fn, functools.partial) else hook_fn, "__name__", repr(hook_fn))
    if name not in KNOWN:
        raise Expected(f"Expected one of {', '.join(sorted(KNOWN))}, got {name}.{did_you_mean(name, KNOWN)}")
    decode = KNOWN[name]
    decoded: Tree = {}
    sent: list[capture.Sent] = []
    channels: set[str] = set()

    def run(state: State, bucket):  # unannotated: DDP compares annotations with its types, and these would be text
        names, index, last = names_of(state, bucket), bucket.index(), bucket.is_last()
        shapes = [state.like[k].shape for k in names]
        with _taped() as calls:
            out = hook_fn(inner, bucket).wait()
        out = out[0] if isinstance(out, list) else out
        flat, channel = decode(calls, shapes, state.world, inner)
        parts = flat[: sum(s.numel() for s in shapes)].split([s.numel() for s in shapes])
        decoded.update({k: v.reshape(s) for k, v, s in zip(names, parts, shapes, strict=True)})
        sent.extend(capture.Sent(c.name, c.sent, names, index) for c in calls)
        if (basis := calls[1].later if len(calls) == 3 else None) is not None:
            sent.append(capture.Sent("shared basis", basis, names, index))
        channels.add(channel)
        if last:
            spec = channels.pop() if len(channels) == 1 else ""
            meta = {"hook": name, "channel": spec, "step": state.step, "rank": state.rank, "world": state.world}
            ordered = {k: decoded[k] for k in state.like if k in decoded}
            capture.save(Path(folder), ordered, sent, meta | {"torch": torch.__version__})
            state.step += 1
            for held in (decoded, sent, channels):
                held.clear()
        done = Future(devices=[out.device] if out.is_cuda else None)
        done.set_result(out)
        return done

    return run


class _Nested:
    """A gather's work whose future holds `[stacked]`, as torch's quantization hooks read it (written for NCCL).

    Gloo's holds the tensors themselves, over which those hooks fail when they are not recorded.
    """

    def __init__(self, work: Any, tensors: list[Tensor]) -> None:
        self.work, self.tensors = work, tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)

    def get_future(self) -> Future:
        """Done when the gather is."""
        return self.work.get_future().then(lambda done: (done.wait(), [torch.stack(self.tensors)])[1])


@contextmanager
def _taped() -> Iterator[list[Call]]:
    """The collective calls made meanwhile: the hooks look them up in `torch.distributed`, where they are replaced."""
    calls: list[Call] = []

    def note(name: str, tensor: Tensor) -> None:
        if calls:
            calls[-1].later = calls[-1].live.detach().clone()
        calls.append(Call(name, tensor.detach().clone(), tensor))

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        note("all_reduce", tensor)
        return reduce(tensor, *args, **kwargs)

    def all_gather(tensor_list: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        note("all_gather", tensor)
        work = gather(tensor_list, tensor, *args, **kwargs)
        return work and _Nested(work, tensor_list)

    with _PATCH:
        reduce, gather = dist.all_reduce, dist.all_gather
        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        try:
            yield calls
        finally:
            dist.all_reduce, dist.all_gather = reduce, gather


# --- decoders: (calls, shapes, ranks, the hook's state) -> (flat numbers of this rank, channel) ---

Decoded = tuple[Tensor, str]


def _reduced(channel: str) -> Callable[..., Decoded]:
    def decode(calls: Sequence[Call], shapes: Sequence[torch.Size], world: int, inner: Any) -> Decoded:
        return calls[0].sent.to(torch.float32) * world, channel

    return decode


def _per_tensor(calls: Sequence[Call], shapes: Sequence[torch.Size], world: int, inner: Any) -> Decoded:
    (scale, zero), codes = calls[0].sent, calls[1].sent
    return scale * (codes.to(torch.float32) - zero), ""


def _per_channel(calls: Sequence[Call], shapes: Sequence[torch.Size], world: int, inner: Any) -> Decoded:
    (scale, zero), codes = calls[0].sent, calls[1].sent
    return (scale[:, None] * (codes.to(torch.float32) - zero[:, None])).reshape(-1), ""


def _power(calls: Sequence[Call], shapes: Sequence[torch.Size], world: int, inner: Any) -> Decoded:
    """The hook stacks matrices by shape, in the order in which shapes first appear."""
    if len(calls) == 1:
        return calls[0].sent.to(torch.float32) * world, "chain()"
    if len(calls) != 3:
        raise Expected(f"Expected powerSGD_hook to make 1 or 3 collective calls, it made {len(calls)}.")
    basis = calls[1].later
    assert basis is not None
    ranks = {s: min(s[0], s[1:].numel(), inner.matrix_approximation_rank) for s in shapes if s}
    rule = {s: (s[0] + s[1:].numel()) * r * inner.min_compression_rate < s.numel() for s, r in ranks.items()}
    thin = [i for i, s in enumerate(shapes) if rule.get(s)]
    found: dict[int, Tensor] = {}
    flat = iter(calls[0].sent.split([shapes[i].numel() for i in range(len(shapes)) if i not in thin]))
    for i in (i for i in range(len(shapes)) if i not in thin):
        found[i] = next(flat)
    at_p = at_q = 0
    flattened = {i: (shapes[i][0], shapes[i][1:].numel()) for i in thin}
    for shape in dict.fromkeys(flattened.values()):
        for i in (i for i in thin if flattened[i] == shape):
            (n, m), r = shape, ranks[shapes[i]]
            p, q = basis[at_p : at_p + n * r].view(n, r), calls[2].sent[at_q : at_q + m * r].view(m, r)
            found[i], at_p, at_q = (p @ q.mT).reshape(-1), at_p + n * r, at_q + m * r
    return torch.cat([found[i] for i in range(len(shapes))]), f"chain(powersgd(rank={inner.matrix_approximation_rank}))"


KNOWN: dict[str, Callable[..., Decoded]] = {
    "allreduce_hook": _reduced("chain()"),
    "fp16_compress_hook": _reduced("chain(float16())"),
    "bf16_compress_hook": _reduced("chain(bfloat16())"),
    "quantization_pertensor_hook": _per_tensor,
    "quantization_perchannel_hook": _per_channel,
    "powerSGD_hook": _power,
}
"""The hooks of torch whose payload is understood."""

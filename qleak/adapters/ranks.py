"""What a rank of `DistributedDataParallel` knows from step to step, and its buckets by the parameters' names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from qleak.check import Expected
from qleak.types import Tree

Bucket = dist.GradBucket  # pyright: ignore[reportPrivateImportUsage]
Hook = Callable[[Any, Bucket], Future]


@dataclass
class State:
    """What a rank's hook holds from step to step.

    Attributes:
        names: of the parameters that are trained, by the identity of the parameter.
        like: those parameters' shapes, float32, in the model's order.
        group: the process group, None for the default one.
        step: steps done.
        sent: bytes of payload this rank has handed to the collective, all steps together.
        dense: bytes the same gradients have as float32.
        memory: the channel's state; None before the first step.
        waiting: buckets of this step so far.
    """

    names: dict[int, str]
    like: Tree
    group: dist.ProcessGroup | None = None
    step: int = 0
    sent: int = 0
    dense: int = 0
    memory: Any = None
    waiting: list[tuple[list[str], Tensor, Future]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return dist.get_rank(self.group)

    @property
    def world(self) -> int:
        """Processes in the group."""
        return dist.get_world_size(self.group)


def state(model: nn.Module, group: dist.ProcessGroup | None = None) -> State:
    """The state `register_comm_hook` takes beside `hook`: names and shapes of what `model` trains.

    Args:
        model: the module, or the `DistributedDataParallel` around it.
        group: the process group the model was given; None for the default one.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    trained = {k: p for k, p in inner.named_parameters() if p.requires_grad}
    like = {k: torch.zeros(p.shape, device=p.device) for k, p in trained.items()}
    return State({id(p): k for k, p in trained.items()}, like, group)


def names_of(state: State, bucket: Bucket) -> list[str]:
    """The names of a bucket's parameters, in its order.

    Raises:
        Expected: a parameter that was not among the model's when `state` was made.
    """
    found = [state.names.get(id(p), "") for p in bucket.parameters()]
    if "" in found:
        raise Expected("Expected a bucket of the model that ddp.state(model) was given, got another's parameters.")
    return found


def gradients(waiting: list[tuple[list[str], Tensor, Future]], like: Tree) -> Tree:
    """Float32 gradients of all waiting buckets by name, in the order of `like`."""
    held: Tree = {}
    for names, flat, _ in waiting:
        parts = flat.split([like[k].numel() for k in names])
        held |= {
            k: part.to(torch.float32, copy=True).reshape(like[k].shape) for k, part in zip(names, parts, strict=True)
        }
    return {k: held[k] for k in like}

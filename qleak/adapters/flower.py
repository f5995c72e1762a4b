"""Flower client mods: a client's update as it leaves, recorded to files or sent through a channel.

    app = ClientApp(mods=[flower.recording("captured", lr=0.1)])
    app = ClientApp(mods=[flower.through(chain(uniform(levels=16)), seed=0, record="captured")])

A mod (`mod(message, context, call_next)`) sees the weights w₀ a client is given and the weights w₁ it answers with. The update
is w₀ − w₁, the way down: after one step of SGD it is lr times the gradient, and with `lr` it is divided by it. w₁ was rounded
to the weights' type, so a difference is right to half a unit in their last place, and its codes are blurred by as much:
a channel's own recorder (`through(…, record=…)`) writes them exactly.

Run with Flower 1.41 (its simulation, two clients, two rounds; examples/flower), whose messages hold `array_records`.

Array records must have the parameters' names for keys (those of `ArrayRecord(net.state_dict())` do); those of a `NumPyClient`
are numbered, and take names from `names`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qleak.adapters import capture, sending
from qleak.channels import Channel
from qleak.check import Expected, positive
from qleak.types import Tree

Mod = Callable[[Any, Any, Callable[[Any, Any], Any]], Any]


def library() -> ModuleType:
    """The `flwr` package, imported when a mod is used.

    Raises:
        Expected: it is not installed.
    """
    try:
        import flwr  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Expected("Expected Flower to be installed for its mods: pip install 'flwr[simulation]'.") from None
    return flwr


def recording(folder: Path | str, lr: float | None = None, names: Sequence[str] = ()) -> Mod:
    """A mod that writes every update of this client to `folder` (`qleak.adapters.capture`), and changes nothing.

    Args:
        folder: made where it is missing.
        lr: the learning rate of the client's one step, if it makes one: the file then holds the gradient.
        names: of the parameters; empty for every floating array of the record (running statistics among them).

    Raises:
        Expected: Flower is not installed, or lr is not positive.
    """
    library()
    if lr is not None:
        positive(lr=lr)

    def mod(msg: Any, ctxt: Any, call_next: Callable[[Any, Any], Any]) -> Any:
        given = arrays(msg, names)  # before the client sees the message: it may train in place
        reply = call_next(msg, ctxt)
        if not trains(msg) or reply.has_error():
            return reply
        returned = arrays(reply, names)
        shared = [k for k in given if k in returned]
        update = {k: (given[k] - returned[k]) / (lr or 1.0) for k in shared}
        _fits(update, names)
        meta = {"hook": "qleak.adapters.flower.recording", "channel": "", "lr": "" if lr is None else lr}
        meta |= {"quantity": "difference" if lr is None else "gradient", "step": _count(ctxt, "qleak-recorded")}
        sent = [capture.Sent("reply", v, [k]) for k, v in returned.items()]
        capture.save(Path(folder), {k: v.float() for k, v in update.items()}, sent, meta | {"rank": ctxt.node_id})
        return reply

    return mod


def through(channel: Channel, seed: int = 0, names: Sequence[str] = (), record: Path | str | None = None) -> Mod:
    """A mod that sends every update of this client through `channel`: the reply holds w₀ − decoded in place of w₁.

    The reply stays an array record of float numbers, as the server's strategy expects one: what it costs in Flower's own
    serialisation does not shrink. `qleak.adapters.payload` packs the codes, and their bytes are among the reply's metrics
    as `qleak-bytes`. Draws come from (seed, node, message). Memory is kept for a node as long as its process lives.

    Args:
        channel: without joins.
        seed: root of the draws.
        names: of the parameters; empty for every floating array of the record.
        record: a folder for the decoded update and its payload.

    Raises:
        Expected: Flower is not installed, or a channel with a join.
    """
    library()
    if channel.joins:
        raise Expected(f"Expected a channel without joins in a client's mod, got {channel.spec}.")
    memory: dict[Any, Any] = {}

    def mod(msg: Any, ctxt: Any, call_next: Callable[[Any, Any], Any]) -> Any:
        given = arrays(msg, names)
        reply = call_next(msg, ctxt)
        if not trains(msg) or reply.has_error():
            return reply
        returned = arrays(reply, names)
        update = {k: (v - returned[k]).float() for k, v in given.items() if k in returned}
        _fits(update, names)
        node, number = ctxt.node_id, _count(ctxt, "qleak-sent")
        left = sending.send(channel, update, update, memory.get(node), ("flower", seed), (node, number))
        memory[node] = left.memory
        _replace(reply, {k: (given[k] - left.decoded[k]).to(given[k].dtype) for k in update}, names)
        for metrics in reply.content.metric_records.values():
            metrics["qleak-bytes"] = left.data.numel()
        if record is not None:
            meta = {"hook": "qleak.adapters.flower.through", "channel": channel.spec, "quantity": "difference"}
            sent = [capture.Sent("reply", left.data, list(left.decoded))]
            capture.save(Path(record), left.decoded, sent, meta | {"step": number, "rank": node})
        return reply

    return mod


def trains(msg: Any) -> bool:
    """Whether a message asks for training ("train", or "train.<action>")."""
    return str(msg.metadata.message_type).split(".")[0] == "train"


def arrays(msg: Any, names: Sequence[str] = ()) -> Tree:
    """The floating arrays of a message's one array record, by key; by `names`, in order, where those are given.

    Raises:
        Expected: several array records in a message that has some.
    """
    records = list(msg.content.array_records.values())
    if not records:
        return {}
    if len(records) > 1:
        raise Expected(f"Expected one array record in a message, got {len(records)}.")
    held = {k: torch.from_numpy(v.numpy().copy()) for k, v in _named(records[0], names).items()}
    return {k: v for k, v in held.items() if v.is_floating_point()}


def _named(record: Any, names: Sequence[str]) -> dict[str, Any]:
    """Arrays by parameter: under their own keys where those are the names, numbered ones in order."""
    if not names or set(names) <= set(record):
        return {k: v for k, v in record.items() if not names or k in names}
    if len(record) != len(names):
        raise Expected(f"Expected as many names as arrays ({len(record)}), got {len(names)}.")
    return dict(zip(names, record.values(), strict=True))


def _replace(reply: Any, tensors: dict[str, Tensor], names: Sequence[str]) -> None:
    """Puts `tensors` into the reply's array record; other arrays stay as they are."""
    from flwr.app import Array, ArrayRecord  # pyright: ignore[reportMissingImports]

    (key, record), *_ = reply.content.array_records.items()
    keys = {id(v): k for k, v in record.items()}
    new = {keys[id(v)]: Array(tensors[k].numpy()) for k, v in _named(record, names).items() if k in tensors}
    reply.content[key] = ArrayRecord({k: new.get(k, v) for k, v in record.items()})


def _fits(update: Tree, names: Sequence[str]) -> None:
    if not update:
        raise Expected("Expected a reply with floating arrays under the keys of the message's, got none.")
    lost = [k for k in names if k not in update]
    if lost:
        raise Expected(f"Expected an array {lost[0]!r} in message and reply, it is missing.")


def _count(ctxt: Any, key: str) -> int:
    """How many messages this node has answered, kept in its context."""
    from flwr.app import MetricRecord  # pyright: ignore[reportMissingImports]

    record = ctxt.state.metric_records.get(key)
    number = int(record["count"]) if record is not None else 0
    ctxt.state[key] = MetricRecord({"count": number + 1})
    return number

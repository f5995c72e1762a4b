"""What an auditor hands in, as the project's own objects: update, model, weights, client, truth."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qleak.adapters import files, matching, memory, self_check
from qleak.adapters import truth as truths
from qleak.adapters.truth import Truth
from qleak.catalog import build, is_code
from qleak.check import Expected, one_of
from qleak.client import gradient, local_sgd
from qleak.models.adapted import adapted
from qleak.types import Buffers, Client, Model, Params

CODE = ("torchvision", "timm")
NORMALISE = {
    "imagenet": "ImageNet's",
    "cifar10": "CIFAR-10's",
    "cifar100": "CIFAR-100's",
    "mnist": "MNIST's",
    "half": "mean 0.5",
}


@dataclass(frozen=True)
class Request:
    """What is asked for; every field but `update` and `model` has a default. See `qleak audit --help`."""

    update: Any
    model: Any
    weights: Any = None
    shape: tuple[int, int, int] | None = None
    classes: int | None = None
    mode: str = ""
    normalise: str = ""
    client: str = "gradient"
    scale: float = 1.0
    batch: int = 0
    channel: str = "auto"
    labels: tuple[int, ...] = ()
    truth: Any = None
    attacks: str = ""
    restarts: int = 0
    budget: float = 60.0
    success: float = 20.0
    seed: int = 0


def request_id(ask: Request) -> str:
    """Ten hex digits of the request and of the files it names: a repeated command finds its run again."""
    parts = []
    for name in Request.__dataclass_fields__:
        value = getattr(ask, name)
        path = Path(value).expanduser() if isinstance(value, str | Path) and str(value) else None
        if name in ("update", "weights", "truth") and path is not None and path.is_file():
            parts.append([name, hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()])
        else:
            parts.append([name, str(value)])
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=5).hexdigest()


def read(given: Any) -> files.Captured:
    """A file, a dict of tensors, or a list of them in the order of the parameters."""
    if isinstance(given, files.Captured):
        return given
    if isinstance(given, str | Path):
        return files.read(Path(given).expanduser())
    if isinstance(given, list | tuple):
        given, ordered = {str(i): v for i, v in enumerate(given)}, True
    elif isinstance(given, dict):
        ordered = False
    else:
        raise Expected(f"Expected a path, a dict or a list of tensors, got {type(given).__name__}.")
    if wrong := [k for k, v in given.items() if not isinstance(v, Tensor)]:
        raise Expected(f"Expected tensors only, {wrong[0]!r} is a {type(given[wrong[0]]).__name__}.")
    if bad := [k for k, v in given.items() if not bool(torch.isfinite(v).all())]:
        raise Expected(f"Expected finite numbers, {bad[0]!r} holds NaN or infinity.")
    kinds = {str(v.dtype).removeprefix("torch.") for v in given.values() if v.is_floating_point()}
    meta = {"dtype": next(iter(kinds))} if len(kinds) == 1 else {}
    tensors = {k: v.detach().cpu().float() if v.is_floating_point() else v.detach().cpu() for k, v in given.items()}
    return files.Captured(tensors, ordered, meta, "memory")


def model_of(ask: Request) -> Model:
    """The model as it is asked for, with images normalised and batch norms in a mode where that is asked for, too.

    Raises:
        Expected: no such model, or another shape than its own.
    """
    shape = ask.shape or (3, 32, 32)
    classes = 10 if ask.classes is None else ask.classes
    net = ask.model
    if isinstance(net, nn.Module) or (isinstance(net, Model) and not net.spec):
        if isinstance(net, nn.Module) and ask.classes is None:
            net.eval()
            with torch.no_grad():
                classes = net(torch.zeros(1, *shape)).shape[-1]
        net = memory.keep(net, shape, classes)
    elif isinstance(net, str):
        text = net.strip()
        if is_code(text) and "(" not in text:
            net = build("models", f"imported(path={text!r}, shape={tuple(shape)!r}, classes={classes}, fresh=False)")
        elif text.partition(":")[0] in CODE and "(" not in text:
            room, _, name = text.partition(":")
            net = build("models", f"{room}(name={name!r}, classes={classes}, size={shape[1]})")
        else:
            net = build("models", text)
    if not isinstance(net, Model):
        raise Expected(f"Expected a model by name, an nn.Module or a qleak Model, got {type(net).__name__}.")
    if ask.shape is not None and tuple(ask.shape) != net.shape:
        raise Expected(f"Expected shape={tuple(ask.shape)} to be that of the model, {net.shape}.")
    if not (ask.mode or ask.normalise):
        return net
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if ask.normalise:
        one_of(NORMALISE, normalise=ask.normalise)
        mean, std = next(v for k, v in self_check.SETS.items() if k.startswith(NORMALISE[ask.normalise]))
    return adapted(net, mean, std, ask.mode)


def weights_of(found: files.Captured, params: Params, buffers: Buffers) -> tuple[Params, Buffers]:
    """Weights by the same rules as an update, all of them; buffers by name or its end, where they are there."""
    matched = matching.match(found, params, buffers)
    if matched.missing:
        raise Expected(
            f"Expected weights for every parameter, {matched.missing[0]!r} is missing ({len(matched.missing)} are)."
        )
    ends = _ends(found, buffers)
    held = {k: ends[k].to(v.dtype) if k in ends else v for k, v in buffers.items()}
    return {k: matched.update[k].to(v.dtype).reshape(v.shape) for k, v in params.items()}, held


def held(found: files.Captured | None, buffers: Buffers) -> list[str]:
    """What stays fixed beside the parameters: which frozen tensors, and what the weights' file left to the model's own values."""
    if not buffers:
        return []
    counted = {k: v for k, v in buffers.items() if v.is_floating_point()}
    frozen = [k for k in counted if k.rpartition(".")[2] not in matching.STATISTICS]
    notes = [f"held fixed, as no update names them: {matching.few(frozen)}"] if frozen else []
    own = [] if found is None else [k for k in counted if k not in _ends(found, buffers)]
    if own:
        notes.append(
            f"the weights' file holds no {matching.few(own)}: the model's own values, which may not be the client's"
        )
    return notes


def _ends(found: files.Captured, buffers: Buffers) -> Buffers:
    """The file's values of buffers, by name or the shortest that ends in it, where shapes agree.

    `layer1.0.bn1.running_mean` ends like the first norm's `bn1.running_mean`, and may well have its shape.
    """
    ends = {k: min((n for n in found.tensors if n == k or n.endswith(f".{k}")), key=len, default="") for k in buffers}
    return {k: found.tensors[n] for k, n in ends.items() if n and found.tensors[n].shape == buffers[k].shape}


def client_of(ask: Request, batch: int) -> Client:
    """The client as it is asked for; a scale makes it one step of that learning rate.

    Raises:
        Expected: a scale beside local steps, which have their own.
    """
    if ask.client.strip() in ("gradient", "gradient()"):
        return gradient(batch) if ask.scale == 1 else local_sgd(steps=1, batch=batch, lr=float(ask.scale))
    made = build("clients", ask.client)
    if ask.scale != 1:
        raise Expected("Expected --scale with --client gradient only: local_sgd(lr=…) has its own.")
    return made


def truth_of(given: Any, shape: tuple[int, int, int]) -> Truth:
    """Tensors `x` or `(x, y)`, or what `truth.read` reads."""
    if isinstance(given, Truth):
        return given
    if isinstance(given, str | Path):
        return truths.read(str(given), shape)
    if isinstance(given, tuple):
        return truths.checked(given[0], torch.as_tensor(given[1]), shape)
    return truths.checked(given, None, shape)

"""torchvision's classifiers by name: ``torchvision:resnet18``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qleak.catalog import factory
from qleak.check import Expected, Failed, at_least, one_of, whole
from qleak.models.fresh import constructed
from qleak.models.module import from_module
from qleak.types import Model


@factory
def torchvision(
    name: str = "resnet18", classes: int = 10, size: int = 32, weights: str = "none", mode: str = "eval"
) -> Model:
    """A classifier of torchvision for three channels, untrained or with its weights for ImageNet.

    Nothing is fetched: `weights="default"` needs the file in torch hub's folder, and the classes it was
    trained for. Images are taken as they are: torchvision's weights expect them normalised by ImageNet's
    mean and deviation.

    Args:
        name: a builder such as "resnet18", "mobilenet_v2", "vit_b_16" (`torchvision.models.list_models`).
        classes: number of logits; 1000 with weights.
        size: image height and width.
        weights: "none" (drawn by `init`, see `qleak.models.fresh`) or "default" (kept; `init` draws nothing).
        mode: batch norm by running statistics ("eval") or by the batch ("train").

    Raises:
        Expected: no such net, another number of classes than the weights', weights that are not on disk.
    """
    from torchvision import models

    whole(classes=classes, size=size)
    at_least(1, classes=classes, size=size)
    one_of(models.list_models(module=models), name=name)
    one_of(["none", "default"], weights=weights)
    options: dict[str, Any] = (
        {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    )
    if weights == "default" and options:
        options["transform_input"] = True  # as these two were trained
    state = _weights(models.get_model_weights(name)["DEFAULT"], name, classes) if weights == "default" else None

    def make() -> nn.Module:
        try:
            return models.get_model(name, num_classes=classes, **options, **_image(name, size))
        except ValueError as error:
            raise Expected(f"Expected size={size} to fit {name}: {error}") from None

    net = constructed(make)
    if state is not None:
        net.load_state_dict({k: v for k, v in state.items() if not (options and k.startswith(("aux", "AuxLogits")))})
    return from_module(net, (3, size, size), classes, mode=mode, fresh=state is None)


def _image(name: str, size: int) -> dict[str, Any]:
    return (
        {"image_size": size} if name.startswith("vit_") else {"input_size": (size, size)} if name == "maxvit_t" else {}
    )


def _weights(entry: Any, name: str, classes: int) -> dict[str, torch.Tensor]:
    """The tensors of `entry` from torch hub's folder.

    Raises:
        Expected: wrong number of classes, or no such file.
        Failed: the file is not whole (its name holds the start of its SHA-256).
    """
    trained = len(entry.meta["categories"])
    if classes != trained:
        raise Expected(f"Expected classes={classes} to be {trained}, which the weights of {name} were trained for.")
    path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[-1]
    if not path.is_file():
        raise Expected(
            f"Expected the weights of {name} at {path}: fetch them once with "
            f"python -c \"from torchvision.models import get_model; get_model('{name}', weights='DEFAULT')\"."
        )
    start = path.stem.rsplit("-", 1)[-1]
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(start):
        raise Failed(f"Expected {path} with a SHA-256 that starts with {start}: remove the file and fetch it again.")
    return torch.load(path, map_location="cpu", weights_only=True)

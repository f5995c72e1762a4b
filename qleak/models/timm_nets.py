"""timm's classifiers by name, where timm is installed: ``timm:resnet18``."""

from __future__ import annotations

from typing import Any

from torch import nn

from qleak.catalog import factory
from qleak.check import Expected, at_least, did_you_mean, whole
from qleak.models.fresh import constructed
from qleak.models.module import from_module
from qleak.types import Model


@factory
def timm(name: str = "resnet18", classes: int = 10, size: int = 32, channels: int = 3, mode: str = "eval") -> Model:
    """An untrained classifier of timm (Wightman, "PyTorch Image Models", 2019), an optional dependency.

    Nothing is fetched: weights are drawn by `init` (see `qleak.models.fresh`).

    Args:
        name: a builder such as "resnet18", "vit_tiny_patch16_224" (`timm.list_models()`).
        classes: number of logits.
        size: image height and width.
        channels: image channels c.
        mode: batch norm by running statistics ("eval") or by the batch ("train").

    Raises:
        Expected: timm is not installed, no such net, or one that does not take such images.
    """
    whole(classes=classes, size=size, channels=channels)
    at_least(1, classes=classes, size=size, channels=channels)
    try:
        import timm as library  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Expected("Expected timm to be installed for timm:NAME: pip install timm.") from None
    if not library.is_model(name):
        raise Expected(f"Expected a net of timm, got {name!r}.{did_you_mean(name, library.list_models())}")

    def make() -> nn.Module:
        options: dict[str, Any] = {"pretrained": False, "num_classes": classes, "in_chans": channels}
        try:
            return library.create_model(name, img_size=size, **options)
        except TypeError:  # nets of convolutions take any size
            return library.create_model(name, **options)

    return from_module(constructed(make), (channels, size, size), classes, mode=mode, fresh=True)

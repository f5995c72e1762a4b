"""Nets that live in this process only, so that a plan can name them: `imported('qleak.adapters.memory:net0')`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qleak.catalog import build
from qleak.check import Expected
from qleak.types import Model

_HELD: dict[str, Any] = {}


def keep(net: nn.Module | Model, shape: tuple[int, int, int], classes: int) -> Model:
    """The model of a module, or of a `Model` without a spec, with a spec that this process can build again."""
    name = f"net{len(_HELD)}"
    _HELD[name] = net
    path = f"{__name__}:{name}"
    if isinstance(net, Model):
        return build("models", f"imported(path={path!r})")
    return build("models", f"imported(path={path!r}, shape={shape!r}, classes={classes}, fresh=False)")


def __getattr__(name: str) -> Callable[[], Any]:
    """What makes the net called `name`.

    Raises:
        Expected: a net of another process.
    """
    if name in _HELD:
        return lambda: _HELD[name]
    if name.startswith("net"):
        raise Expected(f"Expected {name} among the nets of this process: it lived in another one.")
    raise AttributeError(name)

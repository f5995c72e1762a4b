"""qleak: how much of the training data can be rebuilt from what was shared?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qleak import attacks, channels, data, metrics, models
    from qleak.adapters.audit import audit
    from qleak.client import View, gradient, local_sgd, per_example
    from qleak.plans import Audit, Study, Training

__all__ = [
    "Audit",
    "Study",
    "Training",
    "View",
    "attacks",
    "audit",
    "channels",
    "data",
    "gradient",
    "local_sgd",
    "metrics",
    "models",
    "per_example",
]

_HOME = (
    dict.fromkeys(("Audit", "Study", "Training"), "qleak.plans")
    | dict.fromkeys(("View", "gradient", "local_sgd", "per_example"), "qleak.client")
    | {"audit": "qleak.adapters.audit"}
)


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used, so that `qleak --help` does not import torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in __all__:
        return import_module(f"qleak.{name}")
    raise AttributeError(f"module 'qleak' has no attribute {name!r}")

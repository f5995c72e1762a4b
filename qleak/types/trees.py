"""The alphabet: trees of tensors. Shapes are written in one vocabulary, see `qleak.types`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Tree = dict[str, Tensor]
Params = Tree
Buffers = Tree
Grads = Tree
Side = dict[str, Tree]
Law = Literal["none", "gauss", "laplace", "mixed"]

"""Data sets by name: embedded ones, torchvision's, image folders and `.npz` files."""

from qleak.data.download import fetch
from qleak.data.select import batches, digests, relabel, take, without
from qleak.data.sets import Row, home, load, names, table

__all__ = ["Row", "batches", "digests", "fetch", "home", "load", "names", "relabel", "table", "take", "without"]

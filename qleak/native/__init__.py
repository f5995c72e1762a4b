"""Machine code for three loops in which an attack spends its time, and for which torch has no fast kernel.

- `forward`, `transposed`, `weigh`: convolutions of small images in many lanes, each with its own kernels;
- `outside`, `sides`: the weight gradient of a linear layer met row by row, never written down;
- `lbfgs`: one update of the compact form, which reads a lane's pairs twice.

The sources lie beside this file. The machine's own C++ compiler makes them into one library when it is first wanted (a few
seconds), which is kept in the user's cache folder. Without a compiler, or with `QLEAK_NATIVE=0`, the callers compute the
same by torch's operations: equal but for rounding, and slower. Nothing here can be differentiated; everything runs in the
calling thread, every lane by itself and in one fixed order, whoever else is in the batch.
"""

from qleak.native.build import Library, described, library, serves
from qleak.native.convolutions import Geometry, forward, transposed, weigh
from qleak.native.ghosts import outside, sides
from qleak.native.lbfgs import lbfgs

__all__ = [
    "Geometry",
    "Library",
    "described",
    "forward",
    "lbfgs",
    "library",
    "outside",
    "serves",
    "sides",
    "transposed",
    "weigh",
]

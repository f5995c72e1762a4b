"""How much memory a run takes, found out on two small chunks and held against what there is, before anything is allocated.

Lanes stream through in chunks, so that the peak is that of one chunk times the workers. Chunks are part of a plan and never
depend on memory: workers are given up first, and only a run of which not one chunk fits is refused.
"""

from __future__ import annotations

import re
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qleak import jobs, tree
from qleak.check import Expected, Failed
from qleak.engine import audit
from qleak.plans import Audit, Chunk, Study

MARGIN = 1.2
"""What allocators lose between blocks, and operators need inside, on top of the tensors that were counted: a process grew by
1.03 to 1.13 times the fit (dlg and cells on the colour LeNet, 64 and 256 lanes)."""
PATIENCE = 0.25
"""CPU seconds of the first measurement from which the second is left out."""
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Fit(NamedTuple):
    """Peak bytes of the tensors of one chunk, `fixed + lane · lanes`, for the attack that takes most."""

    name: str
    lanes: int
    fixed: float
    lane: float

    @property
    def total(self) -> float:
        """Bytes of the largest chunk."""
        return self.fixed + self.lane * self.lanes


class Tally(TorchDispatchMode):
    """Counts the bytes of every tensor that an operator returns, as long as its storage lives; `top` is the peak.

    What operators need inside is not seen. On the attacks' closures the peak is within 7 % of the allocator's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.top = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                if storage not in self.seen:
                    self.seen.add(storage)
                    self.now += storage.nbytes()
                    self.top = max(self.top, self.now)
                    weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def fit(plan: Audit, device: str = "cpu") -> list[Fit]:
    """The fit of every attack of an audit, the largest first: its first steps with one lane and with three.

    An attack whose first steps take long (it solves a system before it starts) is measured with one lane alone, and a
    lane counted as three times its state.
    """
    prepared = audit.prepare(plan)
    chunks, _ = audit.applicable(plan, prepared, plan.chunks())
    largest: dict[int, Chunk] = {}
    for chunk in sorted(chunks, key=lambda c: (len(c.lanes), c.evidence)):
        largest[chunk.attack] = chunk
    found = []
    for a, chunk in largest.items():
        began = time.process_time()
        one, state = _measured(plan, prepared, chunk, device, 1)
        if time.process_time() - began > PATIENCE:
            lane = 3.0 * state
        else:
            lane = max(0.0, (_measured(plan, prepared, chunk, device, 3)[0] - one) / 2)
        found.append(Fit(plan.attacks[a].spec.split("(")[0], len(chunk.lanes), max(0.0, one - lane), lane))
    return sorted(found, key=lambda f: -f.total)


def _measured(plan: Audit, prepared: audit.Prepared, chunk: Chunk, device: str, lanes: int) -> tuple[int, int]:
    """Peak bytes of the first lane of a chunk, so many times over, from its message to its guess, and bytes of its state."""
    attack = plan.attacks[chunk.attack]
    with Tally() as tally:
        part = chunk._replace(lanes=chunk.lanes[:1] * lanes)  # one message: attacks that solve it do so once
        view = jobs.view_of(audit.job_of(plan, prepared, part, device), plan)
        state = attack.init(view, jobs.starts(plan, part, view))
        for _ in range(min(2, attack.steps)):
            state, _ = attack.step(view, state)
        attack.read(view, state)
    return tally.top, sum(v.nbytes for v in tree.flatten(state).values())


def place(plan: Any, device: str = "cpu", workers: int = 1, limit: float = 0) -> tuple[int, list[str]]:
    """How many workers fit, and why; `limit` bytes (0: what the machine has) hold for all processes of the run together.

    Plans without audits are not measured: (workers, []).

    Raises:
        Failed: not one chunk fits.
    """
    parts = [p for p in (plan.parts if isinstance(plan, Study) else (plan,)) if isinstance(p, Audit)]
    fits = [f for part in parts for f in fit(part, device)[:1]]
    if not fits:
        return workers, []
    return within(max(fits, key=lambda f: f.total), device, workers, limit)


def within(worst: Fit, device: str, workers: int, limit: float) -> tuple[int, list[str]]:
    """`place`, for a chunk that was measured."""
    process = resident() if torch.device(device).type == "cpu" else 0
    free = available(device)
    have = min(limit or float("inf"), free + process if free else float("inf"))
    whose = "--memory" if limit and have == limit else "free memory"

    def need(count: int) -> float:
        return (count + (count > 1)) * process + count * worst.total * MARGIN  # the parent holds no chunk

    if need(1) > have:
        lanes = int(((have - process) / MARGIN - worst.fixed) / max(worst.lane, 1.0))
        mend = f"use --chunk {lanes}" if 0 < lanes < worst.lanes else "use a smaller model"
        raise Failed(
            f"Expected {size(need(1))} for one chunk of {worst.lanes} lanes of {worst.name} with --workers 1, "
            f"got {size(max(have, 0))} of {whose}: {mend}, or a larger --memory."
        )
    fitting = max(n for n in range(1, workers + 1) if need(n) <= have or n == 1)
    said = [f"memory {size(worst.total)} a chunk ({worst.name}: {size(worst.fixed)} + {size(worst.lane)} a lane)"]
    if fitting < workers:
        said.append(f"{fitting} of {workers} workers ({workers} take {size(need(workers))}, {size(have)} of {whose})")
    return fitting, said


def available(device: str = "cpu", root: Path = Path("/")) -> int:
    """Bytes free for use: on CUDA as the driver says, else the least of the system's and every control group's; 0: unknown.

    A group's page cache can be taken back, so that inactive files count as free (version 1 and 2 of control groups).
    """
    if torch.device(device).type == "cuda":  # pragma: no cover: needs a CUDA device
        return torch.cuda.mem_get_info(device)[0]
    found = [int(m[1]) * 1024 for m in re.finditer(r"^MemAvailable:\s+(\d+)", _read(root / "proc/meminfo"), re.M)]
    for line in _read(root / "proc/self/cgroup").splitlines():
        kinds, path = line.split(":", 2)[1:]
        if kinds and "memory" not in kinds.split(","):
            continue
        base = root / ("sys/fs/cgroup/memory" if kinds else "sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        here = base / path.strip("/")
        for group in (here, *here.parents):  # inside a container the path may not exist, its root does
            limit, used = (_read(group / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                cache = re.search(r"^(?:total_)?inactive_file (\d+)", _read(group / "memory.stat"), re.M)
                found.append(max(0, int(limit) - int(used) + int(cache[1] if cache else 0)))
            if group == base:
                break
    return min(found, default=0)


def resident() -> int:
    """Bytes of this process alone, which a worker needs at most as well; mapped files are shared. 0 where the system is silent."""
    found = re.search(r"^RssAnon:\s+(\d+)", _read(Path("/proc/self/status")), re.M)
    return int(found[1]) * 1024 if found else 0


def read_size(text: str) -> int:
    """Bytes of "4GB", "512 MB" or "1.5GiB"; 0 for "", no limit.

    Raises:
        Expected: the text is no positive number with such a unit.
    """
    if not text:
        return 0
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    unit = found and (found[2] if found[2] in UNITS else f"{found[2]}b")
    if not found or unit not in UNITS or not float(found[1]) > 0:
        raise Expected(f"Expected --memory of a number and a unit, such as 4GB or 512MB, got {text!r}.")
    return int(float(found[1]) * UNITS[unit])


def size(count: float) -> str:
    """Bytes in words: "3.2 GB", "85 MB", "12 kB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""

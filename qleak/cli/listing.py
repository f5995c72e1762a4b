"""`qleak ls`, `qleak data ls` and `qleak doctor`: what there is."""

from __future__ import annotations

import inspect
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qleak.errors import Expected, did_you_mean

ROOMS = ("channels", "attacks", "models", "clients", "rules", "synthesizers", "critics", "makers", "classifiers")


def print_room(room: str) -> None:
    """Every factory of a room: how it is called, and the first sentence of its docstring."""
    if room == "data":
        print_data(None)
        return
    if room not in ROOMS:
        raise Expected(
            f"Expected one of {', '.join((*ROOMS, 'data'))}, got {room!r}.{did_you_mean(room, (*ROOMS, 'data'))}"
        )
    from qleak.catalog import catalog

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, fn in catalog(room).items():
        table.add_row(name, escape(" ".join((inspect.getdoc(fn) or "").split("\n\n")[0].split())))
        arguments = ", ".join(_argument(p) for p in inspect.signature(fn).parameters.values())
        table.add_row("", escape(f"({arguments})"), style="dim")
    Console(highlight=False).print(table)


def _argument(p: inspect.Parameter) -> str:
    if p.kind is inspect.Parameter.VAR_POSITIONAL:
        return f"*{p.name}"
    return p.name if p.default is p.empty else f"{p.name}={p.default!r}"


def print_data(folder: Path | None) -> None:
    """Data sets: present or not, size, how to get them."""
    from qleak import data

    table = Table(box=None, pad_edge=False)
    for title, fixed in (("name", True), ("here", True), ("size", True), ("how to get it", False)):
        table.add_column(title, no_wrap=fixed)
    for row in data.table(folder):
        here = {True: "yes", False: "no", None: ""}[row.present]
        table.add_row(row.name, here, row.size, escape(row.how))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"folder: {data.home(folder)} (set QLEAK_DATA or --data-dir to change it)", markup=False, soft_wrap=True
    )


def print_doctor() -> None:
    """Versions, device, memory, data folder, recipes."""
    import torch

    from qleak import data, machine, native
    from qleak.cli import recipes
    from qleak.engine import memory

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    found = [*machine.versions().items(), ("cpu", f"{machine.cpu_name()}, {machine.cpus()} cores for this process")]
    found += [("native", native.described())]
    found += [("memory", f"{memory.available() / 2**30:.1f} GiB free")]
    found += [
        ("cuda", torch.cuda.get_device_name() if torch.cuda.is_available() else "none; everything runs on the CPU")
    ]
    folder = data.home()
    found += [("data folder", f"{folder} ({'present' if folder.is_dir() else 'absent; embedded sets need none'})")]
    found += [("recipes", ", ".join(recipes.names("")))]
    for key, value in found:
        table.add_row(key, value)
    console.print(table)
    low = [p for p, v in machine.versions().items() if v == "absent"]
    console.print(f"Missing: {', '.join(low)}." if low else "Everything qleak needs is installed.")

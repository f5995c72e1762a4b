"""Makes the README's picture: photographs, and what comes back from their gradients. `just picture`.

Takes a few minutes on two cores; the run is kept under runs/readme and resumed.
"""

from __future__ import annotations

from pathlib import Path

from qleak import engine, machine, store
from qleak.attacks import dlg, refine
from qleak.channels import chain, identity, uniform
from qleak.models import lenet
from qleak.plans import Audit
from qleak.report import figures

PLAN = Audit(
    model=lenet(),
    data="photos",
    victims=(0, 1, 2, 3),
    channels=(identity(), *(chain(uniform(bits=bits)) for bits in (8, 4, 2))),
    attacks=(dlg(outer=75), refine(weight=0.1, stages=6, last=200)),
)


def main() -> None:
    """Runs what is missing and draws the grid."""
    header = {"kind": PLAN.kind, "plan_id": PLAN.id, "recipe": "readme", "plan": PLAN.as_json(), "flags": {}}
    with store.open_run(Path("runs/readme"), header) as run:
        for event in engine.run(PLAN, run, workers=machine.cpus()):
            if isinstance(event, engine.Finished):
                for line in event.summary:
                    print(line["channel"], line["attack"], line["control"], f"{line['psnr_selected']:.1f} dB")
    names = PLAN.labels()
    old, new = (
        next(s["attack"] for s in store.read_run(Path("runs/readme"))["summary"] if s["attack"].startswith(n))
        for n in ("dlg", "refine")
    )
    columns = {
        (names[0], old): "fp32\n2019 attack",
        (names[1], old): "int8\n2019 attack",
        (names[1], new): "int8\nknows the cells",
        (names[2], new): "4 bit\nknows the cells",
        (names[3], new): "2 bit\nknows the cells",
    }
    print(figures.grid(Path("runs/readme"), Path("assets/readme.png"), columns))


if __name__ == "__main__":
    main()

"""The audit of a captured update as plain values: what `--json` prints, schema `qleak.audit/1`."""

from __future__ import annotations

from typing import Any

from qleak.catalog import short
from qleak.errors import Expected
from qleak.report.captured import CANNOT, Audited, rests_on, verdict

SCHEMA = "qleak.audit/1"


def document(run: Audited) -> dict[str, Any]:
    """Everything as plain values, schema `qleak.audit/1`; its fields are listed in docs/audit-your-own.md.

    Raises:
        Expected: the run is not finished.
    """
    s, header = run.found, run.header
    if s is None:
        raise Expected(f"Expected a finished run at {run.folder}, it is {header.get('status', 'unfinished')}.")
    plan = header["plan"]
    each = [
        {
            "image": j, "rebuilt": s["good"][j], "label": s["labels"][j] if s["psnr"] is None else None,
            "agreement_db": s["agreement"][j] if s["agreement"] else None,
            "psnr_db": s["psnr"][j] if s["psnr"] else None, "ssim": s["ssim"][j] if s["ssim"] else None,
        }
        for j in range(s["images"])
    ]  # fmt: skip
    return {
        "schema": SCHEMA, "verdict": s["verdict"], "sentence": verdict(header), "basis": s["basis"], "rebuilt": s["rebuilt"],
        "images": each, "labels": s["labels"], "attack": s["attack"], "residual": s["residual"],
        "controls": {
            "residual": s["control"], "floor": s["floor"], "bar": s["bar"], "psnr_db": s.get("psnr_control"), "decoys": s["decoys"],
        },
        "restarts": {"starts": s["starts"], "explain": s["witnesses"] + bool(s["explained"])},
        "match": header["match"], "channel": header["channel"], "batch": header["batch"], "self_check": header.get("self_check"),
        "model": short(plan["model"]), "client": short(plan["client"]), "weights": header["weights"], "rests_on": rests_on(header),
        "cannot_say": list(CANNOT), "budget_cpu_s": plan["budget"], "cpu_s": s["cpu_s"], "cut": s["cut"], "seed": plan["seed"],
        "plan_id": header["plan_id"], "folder": str(run.folder),
    }  # fmt: skip

"""The side of `breaching` in `benchmarks/peers.py`: attacks on request, in an environment of its own.

Started by peers.py as `PYTHON peer_breaching.py FOLDER`; knows nothing of qleak and never sees a true image. FOLDER
holds `NET.json` (the layers) and `NET.npz` (weights, one probe to compare the two nets by, the gradients and starts).
Every line of standard input is a request, every line of standard output its answer; the reconstruction is left in
FOLDER. Only `reconstruct` is timed: processor time of this process, one thread.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

warnings.filterwarnings("ignore")
import breaching  # noqa: E402  # pyright: ignore[reportMissingImports]
import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402  # pyright: ignore[reportMissingImports]

FUNCTIONS = {"sigmoid": torch.nn.Sigmoid, "relu": torch.nn.ReLU}


def network(folder: Path, name: str) -> tuple[torch.nn.Module, dict[str, Any], dict[str, torch.Tensor]]:
    """The net of the files, its declaration, and all arrays; refused unless output and gradient agree at the probe."""
    spec = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(folder / f"{name}.npz") as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files}
    net = torch.nn.Sequential(*(layer(d["kind"], d["options"]) for d in spec["layers"]))
    with torch.no_grad():
        for own, key in zip(net.parameters(), spec["params"], strict=True):
            own.copy_(arrays[f"params.{key}"])
    out = net(arrays["probe.x"])
    found = [out, *torch.autograd.grad(torch.nn.CrossEntropyLoss()(out, arrays["probe.y"]), list(net.parameters()))]
    known = [arrays["probe.out"], *(arrays[f"probe.{k}"] for k in spec["params"])]
    for a, b in zip(found, known, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    return net, spec, arrays


def layer(kind: str, o: dict[str, Any]) -> torch.nn.Module:
    match kind:
        case "conv":
            return torch.nn.Conv2d(o["in"], o["out"], o["kernel"], stride=o["stride"], padding=o["padding"])
        case "linear":
            return torch.nn.Linear(o["in"], o["out"])
        case "activation":
            return FUNCTIONS[o["function"]]()
        case _:
            return torch.nn.Flatten()


def answer(folder: Path, ask: dict[str, Any]) -> dict[str, Any]:
    """One attack of `breaching` by its own configuration `ask["attack"]`, from the start that qleak's lane has too."""
    net, spec, arrays = network(folder, ask["net"])
    config = breaching.get_attack_config(ask["attack"], overrides=ask["overrides"])
    attacker = breaching.attacks.prepare_attack(net, torch.nn.CrossEntropyLoss(), config)
    meta = OmegaConf.create(
        {"shape": spec["shape"], "classes": spec["classes"], "modality": "vision", "task": "classification",
         "mean": [0.0] * spec["shape"][0], "std": [1.0] * spec["shape"][0]}
    )  # fmt: skip
    secret_free = {"num_data_points": 1, "labels": None, "local_hyperparams": None}
    key = f"{ask['image']}.{ask['start']}"

    def begin(shape: Any) -> torch.Tensor:
        """In place of its own normal draw: images have four axes, label logits two."""
        made = arrays[f"start.{key}.{'x' if len(shape) == 4 else 'logits'}"].clone()
        made.requires_grad, made.grad = True, torch.zeros_like(made)
        return made

    attacker._initialize_data = begin
    closures = 0
    compute = attacker._compute_objective

    def counted(*parts: Any) -> Any:
        closure = compute(*parts)

        def call() -> torch.Tensor:
            nonlocal closures
            closures += 1
            return closure()

        return call

    attacker._compute_objective = counted
    gradients = [arrays[f"gradient.{ask['image']}.{k}"].clone() for k in spec["params"]]
    payload = [{"parameters": [p.detach() for p in net.parameters()], "buffers": [], "metadata": meta}]
    shared = [{"gradients": gradients, "buffers": None, "metadata": secret_free}]
    began = time.process_time()
    found, stats = attacker.reconstruct(payload, shared, server_secrets={})
    spent = time.process_time() - began
    out = folder / "answer.npz"
    np.savez(out, x=found["data"].detach().numpy())
    return {"cpu_s": spent, "closures": closures, "iterations": len(stats["Trial_0_Val"])}


def main() -> None:
    wire = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the framework prints goes to standard error
    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "breaching": breaching_version()}
    print(json.dumps(versions), file=wire, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(Path(sys.argv[1]), json.loads(line))), file=wire, flush=True)


def breaching_version() -> str:
    from importlib.metadata import version

    return version("breaching")


if __name__ == "__main__":
    main()

"""Two Flower clients, two rounds on MNIST digits; every update is recorded, with and without a channel.

Run by `just flower`, or by hand where Flower is installed: `python examples/flower/app.py FOLDER`. Recorded files are read by
`qleak audit`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import load_file
from torch import nn

from qleak import data, random
from qleak.adapters import flower
from qleak.channels import chain, uniform
from qleak.client import gradient
from qleak.models import from_module
from qleak.train import split

CLIENTS, ROUNDS, BATCH, LR = 2, 2, 8, 0.1
CHANNEL = chain(uniform(levels=16))


class Net(nn.Module):
    """A small convolutional net with batch norm, so that records hold more than parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 14 * 14, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[b 1 28 28] -> [b 10]`."""
        return self.head(torch.sigmoid(self.norm(self.conv(x))).flatten(1))


def start() -> dict[str, torch.Tensor]:
    """The weights of the first round, the same every time."""
    model = from_module(Net(), (1, 28, 28), 10, fresh=True)
    return Net().state_dict() | model.init(random.generator("flower"))[0]


def batch(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's images and labels."""
    digits = split.spread(data.load("mnist5k"), 200)
    rows = torch.arange(client, 200, CLIENTS)[:: 100 // BATCH][:BATCH]
    return digits.x[rows], digits.y[rows]


def train(msg: Message, context: Context) -> Message:
    """One step of SGD on this client's batch."""
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    x, y = batch(int(context.node_config["partition-id"]))
    nn.functional.cross_entropy(net(x), y).backward()
    torch.optim.SGD(net.parameters(), lr=LR).step()
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": BATCH})}
    return Message(content=RecordDict(content), reply_to=msg)


def client(folder: Path, through: bool) -> ClientApp:
    """A client whose mods record what leaves it."""
    names = [k for k, _ in Net().named_parameters()]
    recorder = flower.recording(folder, lr=LR, names=names)
    app = ClientApp(mods=[flower.through(CHANNEL, 0, names, folder) if through else recorder])
    app.train()(train)
    return app


def server() -> ServerApp:
    """Federated averaging."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=CLIENTS)
        strategy.start(grid, ArrayRecord(start()), num_rounds=ROUNDS)

    return app


def main(out: Path) -> None:
    """Both simulations; what they left is held against what the clients computed."""
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    for name, through in (("plain", False), ("levels", True)):
        folder = out / name
        run_simulation(server(), client(folder, through), CLIENTS, backend_config=resources)
        found = sorted(p for p in folder.glob("step-*.safetensors") if "payload" not in p.name)
        if len(found) != CLIENTS * ROUNDS:
            raise SystemExit(f"Expected {CLIENTS * ROUNDS} files in {folder}, found {len(found)}.")
        for path in found[:CLIENTS]:
            checked(path, through)
    print(f"Wrote {2 * CLIENTS * ROUNDS} updates and their payloads to {out}.")


def checked(path: Path, through: bool) -> None:
    """The first round's update against autograd's gradient of one of the clients: equal, or within half a level."""
    held = load_file(path)
    model = from_module(Net(), (1, 28, 28), 10, mode="train")
    params = {k: v for k, v in start().items() if k in held}
    far = []
    for one in range(CLIENTS):
        exact = gradient(batch=BATCH).update(model, params, model.init(random.generator(0))[1], *batch(one))
        scaled = {k: v * (LR if through else 1.0) for k, v in exact.items()}
        half = {k: float(v.max() - v.min()) / 15 / 2 + 1e-7 if through else 1e-5 for k, v in scaled.items()}
        far.append(max(float((held[k] - v).abs().max()) / half[k] for k, v in scaled.items()))
    if not min(far) < 1.01 < max(far):
        raise SystemExit(f"Expected {path} to hold the update of one client, it is off by {min(far):g} tolerances.")
    print(f"{path.name}: client {far.index(min(far))}, off by {min(far):.2g} of the tolerance.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "captured").resolve())

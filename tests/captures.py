"""Updates as scripts write them that know nothing of qleak: plain torch modules, plain torch.save."""

import importlib.util

import torch
from torch import nn

from qleak import random

NET = """
import torch
from torch import nn


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5, 2, 2)
        self.conv2 = nn.Conv2d(8, 8, 5, 1, 2)
        self.fc = nn.Linear(8 * 36, 10)

    def forward(self, x):
        h = torch.sigmoid(self.conv1(x))
        h = torch.sigmoid(self.conv2(h))
        return self.fc(h.flatten(1))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, 2, 1)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 36, 10)

    def forward(self, x):
        return self.fc(torch.sigmoid(self.bn(self.conv(x))).flatten(1))
"""
SHAPE = (1, 12, 12)


def module(folder, name="LeNet"):
    """A net of net.py in `folder`, weights U(−0.5, 0.5) (norms as they begin)."""
    file = folder / "net.py"
    if not file.exists():
        file.write_text(NET, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("captured_net", file)
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    net = getattr(code, name)()
    with torch.no_grad():
        for key, p in net.named_parameters():
            if "bn" not in key:
                p.copy_(random.uniform(random.generator("net", key), p.shape) - 0.5)
    return net


def images(count=1):
    """Smooth pictures in [0, 1] with labels: two bumps on a dark ground each."""
    grid = torch.linspace(-1, 1, 12)
    yy, xx = torch.meshgrid(grid, grid, indexing="ij")
    at = random.uniform(random.generator("bumps"), (count, 2, 2)) * 1.2 - 0.6
    bumps = [[torch.exp(-((yy - a[0]) ** 2 + (xx - a[1]) ** 2) / 0.08) for a in pair] for pair in at]
    x = torch.stack([0.1 + 0.5 * one + 0.35 * two for one, two in bumps])[:, None]
    return x.clamp(0, 1), torch.arange(3, 3 + count)


def gradients(net, x, y, reduction="mean"):
    """Named gradients of cross-entropy, by plain torch."""
    net.zero_grad()
    nn.functional.cross_entropy(net(x), y, reduction=reduction).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}

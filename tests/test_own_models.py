"""Code of one's own as a model: its gradient is plain autograd's, or one line says why not."""

import copy
import importlib.util
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qleak import random
from qleak.catalog import build
from qleak.check import Expected
from qleak.client import gradient, per_example
from qleak.models import from_module
from qleak.models.fresh import constructed

SHAPE, CLASSES, BATCH = (3, 8, 8), 5, 4
X = random.uniform(random.generator("own"), (BATCH, *SHAPE))
Y = torch.arange(BATCH) % CLASSES


class Own(nn.Module):
    """Batch norm, a buffer of its own and a whole number among them, a scale that is a bare parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.full((6, 1, 1), 0.5))
        self.register_buffer("shift", torch.linspace(-1, 1, 6)[:, None, None])
        self.register_buffer("order", torch.tensor([5, 4, 3, 2, 1, 0]))
        self.register_buffer("loose", torch.tensor(2.0), persistent=False)
        self.head = nn.Linear(54, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.norm(self.conv(x))) * self.scale + self.shift
        return self.head(self.loose * h[:, self.order].flatten(1))


class Frozen(Own):
    def __init__(self):
        super().__init__()
        self.conv.requires_grad_(False)
        self.norm.weight.requires_grad = False


class Tied(nn.Module):
    """One matrix under two names, both ways round."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(192, 16), nn.Linear(192, 16, bias=False)
        self.up.weight = self.down.weight
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.down(x.flatten(1)))
        return self.head(torch.tanh(self.up(h @ self.up.weight)))


def used(make, dtype=torch.float32):
    """The module after one batch of training, so that running statistics say something."""
    net = constructed(make).to(dtype)
    net.train()(X.to(dtype) * 2 - 0.3)
    return net


def plain(net, x, mode):
    """Autograd's gradient, on a copy."""
    net = copy.deepcopy(net).train(mode == "train")
    F.cross_entropy(net(x), Y).backward()
    return {k: p.grad for k, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [Own, Frozen, Tied])
def test_the_gradient_is_autograds(make, dtype, mode):
    net = used(make, dtype)
    expected = plain(net, X.to(dtype), mode)
    model = from_module(net, SHAPE, CLASSES, mode=mode)
    params, buffers = model.init(random.generator(0))
    found = gradient(batch=BATCH).update(model, params, buffers, X.to(dtype), Y)
    near = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    assert list(found) == list(expected) == list(params)
    for k, v in expected.items():
        assert found[k].dtype == dtype and float(v.abs().max()) > 0
        torch.testing.assert_close(found[k], v, rtol=near, atol=near * float(v.abs().max()))
    other = plain(net, X.to(dtype), "train" if mode == "eval" else "eval")
    if make is not Tied:  # the modes do differ
        assert max(float((found[k] - v).abs().max() / v.abs().max()) for k, v in other.items()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_weights_of_another_type_run_in_float32(dtype):
    net = used(Own, dtype)
    model = from_module(net, SHAPE, CLASSES)
    params, buffers = ({k: v.float() for k, v in t.items()} for t in model.init(random.generator(0)))
    found = gradient(batch=BATCH).update(model, params, buffers, X, Y)
    for k, v in plain(copy.deepcopy(net).float(), X, "eval").items():
        torch.testing.assert_close(found[k], v, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_stand_among_the_buffers():
    net = used(Frozen)
    for fresh in (False, True):
        model = from_module(net, SHAPE, CLASSES, fresh=fresh)
        params, buffers = model.init(random.generator(0))
        assert list(params) == ["scale", "norm.bias", "head.weight", "head.bias"]
        assert {"conv.weight", "conv.bias", "norm.weight", "shift", "order", "loose"} <= set(buffers)
        assert torch.equal(buffers["conv.weight"], net.conv.weight) != fresh
        moved = model.apply(params, buffers | {"conv.weight": -buffers["conv.weight"]}, X)
        assert not torch.allclose(moved, model.apply(params, buffers, X), atol=1e-3), "they are used"
        rows = per_example(batch=BATCH).update(model, params, buffers, X, Y)
        assert {k: tuple(v.shape) for k, v in rows.items()} == {k: (BATCH, *v.shape) for k, v in params.items()}
        assert model.tapped is None
    assert net.conv.weight.requires_grad is False and net.scale.requires_grad


def test_a_tied_weight_is_one_parameter_and_moves_both():
    model = from_module(used(Tied), SHAPE, CLASSES)
    params, buffers = model.init(random.generator(0))
    assert "up.weight" not in params and "down.weight" in params
    half = gradient(batch=BATCH).update(model, params, buffers, X, Y)["down.weight"]
    untied = copy.deepcopy(used(Tied))
    untied.up.weight = nn.Parameter(untied.up.weight.detach().clone())
    parts = plain(untied, X, "eval")
    torch.testing.assert_close(half, parts["down.weight"] + parts["up.weight"], rtol=1e-4, atol=1e-7)
    assert float(parts["up.weight"].abs().max()) > 1e-6


# --- by name ---------------------------------------------------------------------------------------------------------

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten())
        self.head = nn.Linear(4 * 30 * 30, 10)
        self.body[0].bias.requires_grad = False

    def forward(self, x):
        return self.head(self.body(x))

def factory():
    return Net().double()
"""


@pytest.mark.parametrize(
    "name", ["own_net.py:Net", "own_net.py:factory", "own_package.nets:factory", "own_package.nets:Net"]
)
def test_files_and_packages(name, tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(SOURCE)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "nets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    for module in [m for m in sys.modules if m.startswith("own_package")]:
        monkeypatch.delitem(sys.modules, module)
    where = tmp_path / name.partition(":")[0].replace("own_package.nets", "own_package/nets.py")
    spec = importlib.util.spec_from_file_location("by_hand", where)
    by_hand = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(by_hand)
    net = getattr(by_hand, name.partition(":")[2])()
    dtype = next(net.parameters()).dtype
    x = random.uniform(random.generator("x"), (BATCH, 3, 32, 32)).to(dtype)
    for mode in ("eval", "train"):
        model = build("models", f"imported({name!r}, mode={mode!r})")
        params, buffers = model.init(random.generator(1))
        assert "body.0.bias" in buffers and "body.0.bias" not in params
        held = {k: v for k, v in buffers.items() if k in dict(net.named_parameters()) or "running" in k}
        net.load_state_dict(params | held, strict=False)
        found = gradient(batch=BATCH).update(model, params, buffers, x, Y)
        for k, v in plain(net, x, mode).items():
            torch.testing.assert_close(found[k], v, rtol=1e-4, atol=1e-6)


def test_torchvision_by_name():
    from torchvision.models import get_model

    net = constructed(lambda: get_model("shufflenet_v2_x0_5", num_classes=10))
    x = random.uniform(random.generator("x"), (BATCH, 3, 32, 32))
    for mode in ("eval", "train"):
        model = build("models", f"torchvision('shufflenet_v2_x0_5', mode={mode!r})")
        params, buffers = model.init(random.generator(1))
        net.load_state_dict(params | buffers, strict=False)
        found = gradient(batch=BATCH).update(model, params, buffers, x, Y)
        for k, v in plain(net, x, mode).items():
            torch.testing.assert_close(found[k], v, rtol=1e-3, atol=1e-4 * float(v.abs().max()) + 1e-7)


def test_timm_by_name_or_one_line(monkeypatch):
    """Where timm is missing a stand-in of the three calls that are made of it shows what is passed on."""
    if importlib.util.find_spec("timm") is None:
        with pytest.raises(Expected, match="pip install timm"):
            build("models", "timm:resnet18")
        stand_in = types.ModuleType("timm")
        stand_in.is_model = lambda name: name == "own"
        stand_in.list_models = lambda: ["own"]

        def create_model(name, pretrained, num_classes, in_chans):  # takes no img_size, as its nets of convolutions
            assert not pretrained
            return nn.Sequential(nn.Conv2d(in_chans, 2, 3), nn.Flatten(), nn.Linear(2 * 6 * 6, num_classes))

        stand_in.create_model = create_model
        monkeypatch.setitem(sys.modules, "timm", stand_in)
        model = build("models", "timm('own', classes=7, size=8, channels=1)")
        assert (model.shape, model.classes) == ((1, 8, 8), 7) and model.spec.startswith("timm(name='own'")
        with pytest.raises(Expected, match="Did you mean 'own'"):
            build("models", "timm:owm")
    else:
        model = build("models", "timm:resnet18")
        x = random.uniform(random.generator("x"), (BATCH, 3, 32, 32))
        assert model.apply(*model.init(random.generator(0)), x).shape == (BATCH, 10)


# --- one line for the rest --------------------------------------------------------------------------------------------


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.lock = nn.Linear(192, CLASSES), threading.Lock()

    def forward(self, x):
        return self.head(x.flatten(1))


class Detached(nn.Module):
    """Needs an argument that no client has."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, CLASSES)

    def forward(self, x, mask):
        return self.head(x.flatten(1) * mask)


def scripted():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).requires_grad_(False),
            "every parameter is frozen",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES)), "1.weight has none yet"),
        (lambda: nn.DataParallel(nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))), "pass its .module"),
        pytest.param(
            lambda: torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))),
            "pass its ._orig_mod",
            marks=pytest.mark.slow,
        ),
        (scripted, "ScriptModule"),
        (Locked, "can be copied"),
        (Detached, "mask"),
    ],
)
def test_one_line_for_what_cannot_be_taken(make, said):
    with pytest.raises(Expected) as error:
        from_module(constructed(make), SHAPE, CLASSES)
    assert said in str(error.value) and "\n" not in str(error.value)

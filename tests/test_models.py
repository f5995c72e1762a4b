"""Every net of the catalogue: reproducible weights, pure forward passes, two derivatives; batch norm's two modes."""

import copy
import json
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jvp, vmap

from qleak import random, tree
from qleak.attacks import structured
from qleak.catalog import build, catalog
from qleak.check import Expected, Failed
from qleak.client import gradient, one_hot, slope
from qleak.models import from_module
from qleak.models.fresh import blank, constructed, fresh
from qleak.models.imported import imported
from qleak.models.norm import norm2d

# The nets at sizes that keep the test short; a net not named here is tested as it comes without arguments.
SMALL = {
    "resnet": ["resnet(depth=8, width=4, size=8)", "resnet(depth=8, width=16, size=8, norm='group', function='silu')",
               "resnet(depth=8, width=4, size=8, mode='eval', shortcut='conv')", "resnet(depth=8, width=4, size=8, norm='none')"],
    "resnet18": ["resnet18(width=4, size=16, function='softplus')"],
    "vgg": ["vgg(width=2)", "vgg(depth=13, width=2, norm='none', function='leaky_relu')"],
    "convnet64": ["convnet64(width=2, size=12)", "convnet64(width=2, size=18, mode='train')"],
    "vit": ["vit(patch=4, dim=8, depth=2, heads=2, size=8)"],
    "torchvision": ["torchvision(name='shufflenet_v2_x0_5', size=32)"],
    "timm": ["timm"] if find_spec("timm") else [],  # an optional dependency
    "deep_lenet": ["deep_lenet(depth=4, width=3, size=12, classes=5)"],
    "deep_mlp": ["deep_mlp(depth=3, width=8, size=8)"],
    "convnet": ["convnet(width=4, size=12)"],
    "mlp": ["mlp(size=8, hidden=(8,))"],
}  # fmt: skip
NETS = [text for name in catalog("models") for text in SMALL.get(name, [name])]
F64 = torch.float64


def scene(model, b=2, seed=0, dtype=F64):
    params, buffers = (tree.to(t, dtype) for t in model.init(random.generator(seed)))
    x = random.uniform(random.generator(seed, "x"), (b, *model.shape)).to(dtype)
    return params, buffers, x


def same(a, b):
    return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


def cosine(model, buffers, params, x, target):
    """1 − ⟨g(x), goal⟩/(‖g(x)‖·‖goal‖) as a function of x, for the gradient of another image."""
    u = slope(model, buffers)
    other = random.uniform(random.generator("other"), x.shape).to(x)
    goal = u(params, other, target)

    def of(x):
        g = u(params, x, target)
        return 1 - tree.dot(g, goal) / (tree.norm(g) * tree.norm(goal))

    return of


@pytest.fixture(params=NETS, scope="module")
def model(request):
    return build("models", request.param)


def test_weights_come_from_the_generator_alone(model):
    before = torch.get_rng_state()
    again = build("models", model.spec)
    first, second = model.init(random.generator("w", 1)), again.init(random.generator("w", 1))
    assert same(first[0], second[0]) and same(first[1], second[1])
    assert all(bool(v.isfinite().all()) and not v.requires_grad for t in first for v in t.values())
    assert torch.equal(before, torch.get_rng_state())
    assert again.spec == model.spec == build("models", json.loads(json.dumps(model.spec))).spec
    if not model.spec.startswith(("stored", "lenet_mnist")):
        assert not same(first[0], model.init(random.generator("w", 2))[0])


def test_forward_passes_are_pure_and_lanes_are_single_images(model):
    params, buffers, x = scene(model)
    x, held = x[:, None], [copy.deepcopy(t) for t in (params, buffers)]
    if "mode='train'" in model.spec:
        x = torch.stack([x, x.flip(0)], 1).flatten(1, 2)  # two images a lane
    looped = torch.stack([model.apply(params, buffers, v) for v in x])
    lanes = vmap(lambda v: model.apply(params, buffers, v), randomness="error")(x)
    torch.testing.assert_close(lanes, looped)
    assert looped.shape == (2, x.shape[1], model.classes)
    assert same(params, held[0]) and same(buffers, held[1])


def test_two_derivatives_by_either_route(model):
    """∂/∂x of the cosine to a target gradient: finite, not zero, lanes as single images; and ∂g/∂θ·v by `jvp`."""
    params, buffers, x = scene(model)
    target = one_hot(torch.tensor([1, 0]), model.classes, F64)
    of = cosine(model, buffers, params, x, target)
    lanes = torch.stack([x, x.flip(0)])
    found = vmap(grad(of), randomness="error")(lanes)
    one = grad(of)(lanes[1])
    assert bool(found.isfinite().all()) and float(one.norm()) > 0
    assert float((found[1] - one).norm() / one.norm()) < 1e-6

    def inputs(p):
        return grad(lambda v: -(target * F.log_softmax(model.apply(p, buffers, v), -1)).sum())(x)

    v = slope(model, buffers)(params, x, target)
    assert bool(jvp(inputs, (params,), (v,))[1].isfinite().all())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("resnet", 269_722),  # 0.27 M: He et al. 2016, table 6
        ("resnet(depth=32)", 464_154),  # 0.46 M
        ("resnet(depth=44)", 658_586),  # 0.66 M
        ("resnet(depth=56)", 853_018),  # 0.85 M
        ("resnet18", 11_173_962),  # torchvision's 11,689,512 with a 3×3 stem and 10 classes
        ("vgg", 9_231_114),  # the eight convolutions of column A and one linear layer
        ("convnet64", 2_904_970),
        ("lenet5", 61_706),
    ],
)
def test_parameter_counts(text, count):
    model = build("models", text)
    assert tree.count(model.init(random.generator(0))[0]) == count


def test_resnet18_is_torchvisions_but_for_the_stem():
    """Counts by arithmetic: 7×7 stem and 1,000 classes become 3×3 and 10."""
    from torchvision.models import resnet18

    theirs = sum(p.numel() for p in blank(resnet18).parameters())
    assert theirs - 64 * 3 * (49 - 9) - 990 * 513 == 11_173_962


# --- batch norm -----------------------------------------------------------------------------------


class Net(nn.Module):
    """Two batch norms, one of them over features, with running statistics that are not blank."""

    def __init__(self, p=0.0):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(p)
        self.fc, self.last, self.out = nn.Linear(4 * 36, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x):
        h = torch.relu(self.bn(self.conv(x)))
        return self.out(self.last(self.fc(self.drop(h.flatten(1)))))


def used(p=0.0):
    net = constructed(lambda: Net(p)).double()
    noise = random.normal(random.generator("used"), (16, 3, 8, 8)).double()
    constructed(lambda: net.train()(noise))  # moves the running statistics
    return net


IMAGES = random.uniform(random.generator("images"), (6, 3, 8, 8)).double()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_modes_are_torchs_own(mode):
    net = used()
    model = from_module(net, (3, 8, 8), 5, mode=mode)
    params, buffers = model.init(random.generator(0))
    own, state = copy.deepcopy(net).train(mode == "train"), copy.deepcopy(net.state_dict())
    torch.testing.assert_close(model.apply(params, buffers, IMAGES), own(IMAGES), rtol=0, atol=1e-12)
    assert set(buffers) == {f"{n}.running_{s}" for n in ("bn", "last") for s in ("mean", "var")}
    other = {k: v + 1 for k, v in buffers.items()}
    moved = float((model.apply(params, other, IMAGES) - model.apply(params, buffers, IMAGES)).abs().max())
    assert (moved > 1e-3) == (mode == "eval")  # in training nothing reads them
    assert net.training and same(state, net.state_dict()), "the module itself was changed"


def test_modes_differ_and_group_norm_has_none():
    net = used()
    a, b = (from_module(net, (3, 8, 8), 5, mode=m) for m in ("eval", "train"))
    state = a.init(random.generator(0))
    assert float((a.apply(*state, IMAGES) - b.apply(*state, IMAGES)).abs().max()) > 1e-2
    group = [build("models", f"resnet(depth=8, norm='group', size=8, mode='{m}')") for m in ("eval", "train")]
    params, buffers, x = scene(group[0])
    assert torch.equal(*(m.apply(params, buffers, x) for m in group)) and group[0].statistics is None
    assert norm2d("group", 64).num_groups == 4 and norm2d("group", 10).num_groups == 1


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_statistics_by_hand(mode):
    net = used()
    model = from_module(net, (3, 8, 8), 5, mode=mode)
    params, buffers = model.init(random.generator(0))
    found = model.statistics(params, buffers, IMAGES)
    first = F.conv2d(IMAGES, params["conv.weight"], params["conv.bias"])
    assert list(found) == ["bn.mean", "bn.var", "last.mean", "last.var"]
    flat = first.transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["bn.mean"], flat.sum(1) / flat.shape[1])
    torch.testing.assert_close(found["bn.var"], (flat - found["bn.mean"][:, None]).square().sum(1) / flat.shape[1])
    by = (
        [found["bn.mean"], found["bn.var"]]
        if mode == "train"
        else [buffers["bn.running_mean"], buffers["bn.running_var"]]
    )
    h = (first - by[0][:, None, None]) / (by[1][:, None, None] + 1e-5).sqrt()
    h = torch.relu(h * params["bn.weight"][:, None, None] + params["bn.bias"][:, None, None]).flatten(1)
    torch.testing.assert_close(found["last.mean"], F.linear(h, params["fc.weight"], params["fc.bias"]).mean(0))

    lanes = torch.stack([IMAGES, IMAGES.flip(1)])
    mapped = vmap(lambda x: model.statistics(params, buffers, x), randomness="error")(lanes)
    for k, v in model.statistics(params, buffers, lanes[1]).items():
        torch.testing.assert_close(mapped[k][1], v)

    def far(x):
        return tree.total({k: (v - 1).square() for k, v in model.statistics(params, buffers, x).items()})

    assert torch.autograd.gradcheck(lambda x: far(x), IMAGES.clone().requires_grad_(), fast_mode=True)
    assert bool(grad(lambda x: grad(far)(x).square().sum())(IMAGES).isfinite().all())
    assert not net.bn._forward_pre_hooks


def test_statistics_give_torchs_running_ones():
    """A blank net in training moves its running statistics by momentum 0.1 towards those of the batch (unbiased)."""
    net = constructed(Net).double().train()
    model = from_module(net, (3, 8, 8), 5, mode="train")
    seen = model.statistics(*model.init(random.generator(0)), IMAGES)
    net(IMAGES)
    count = 6 * 36
    torch.testing.assert_close(net.bn.running_mean, 0.1 * seen["bn.mean"])
    torch.testing.assert_close(net.bn.running_var, 0.9 + 0.1 * seen["bn.var"] * count / (count - 1))


def test_a_client_in_training_mode_leaks_a_batch_of_its_own():
    """A batch's gradient in "train" is no mean of single gradients; in "eval" it is."""
    for mode, equal in (("eval", True), ("train", False)):
        model = build("models", f"resnet(depth=8, width=4, size=8, mode='{mode}')")
        params, buffers, x = scene(model)
        y = torch.tensor([1, 2])
        whole = gradient(batch=2).update(model, params, buffers, x, y)
        single = [gradient().update(model, params, buffers, x[i : i + 1], y[i : i + 1]) for i in (0, 1)]
        mean = {k: (single[0][k] + single[1][k]) / 2 for k in whole}
        assert (float(tree.norm(tree.sub(whole, mean)) / tree.norm(whole)) < 1e-9) == equal


# --- what from_module refuses ---------------------------------------------------------------------


def refused(*args, **kwargs):
    with pytest.raises(Expected) as error:
        from_module(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


class Noisy(nn.Module):
    """Drops units by the functional, where no Dropout layer can be found."""

    def __init__(self, always=False):
        super().__init__()
        self.fc, self.always = nn.Linear(12, 3), always

    def forward(self, x):
        return self.fc(F.dropout(x.flatten(1), 0.5, self.training or self.always))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.fc(x.flatten(1))


def test_randomness_is_refused_in_training_and_off_in_evaluation():
    before = torch.get_rng_state()
    with torch.device("meta"):
        drop, noisy, always = Net(0.5), Noisy(), Noisy(True)
    assert "layer drop has p=0.5" in refused(drop, (3, 8, 8), 5, mode="train", fresh=True)
    assert "draws nothing at random" in refused(noisy, (3, 2, 2), 3, mode="train", fresh=True)
    assert "draws nothing at random" in refused(always, (3, 2, 2), 3, fresh=True)
    model = from_module(used(0.5), (3, 8, 8), 5)
    state = model.init(random.generator(0))
    assert torch.equal(model.apply(*state, IMAGES), model.apply(*state, IMAGES))
    from_module(noisy, (3, 2, 2), 3, fresh=True)
    assert torch.equal(before, torch.get_rng_state())


def test_what_else_is_refused():
    assert "[1, 4]" in refused(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 2), 4)
    assert "(3, 2, 3)" in refused(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 3), 3)
    assert "writes seen" in refused(Counter(), (3, 2, 2), 3)
    assert "meta device" in refused(blank(nn.Linear, 2, 2), (3, 2, 2), 3)
    assert "one of: eval, train" in refused(nn.Flatten(), (3, 2, 2), 12, mode="test")
    model = build("models", "resnet18(width=4, size=8)")  # the last stage has 1×1 maps
    params, buffers, x = scene(model)
    model.apply(params, buffers, x)
    with pytest.raises(Expected, match="more than one value per channel"):
        model.apply(params, buffers, x[:1])


@pytest.mark.parametrize(
    "text",
    ["resnet(depth=21)", "resnet(norm='instance')", "resnet(function='swish')", "resnet(shortcut='a')", "resnet18(mode='x')",
     "vgg(depth=12)", "vgg(size=28)", "vit(patch=5)", "vit(heads=5)", "convnet64(size=8)", "lenet5(size=8)",
     "deep_lenet(depth=0)", "deep_mlp(depth=-1)", "torchvision(name='resnet81')", "torchvision(name='squeezenet1_1', mode='train')",
     "torchvision(weights='default')", "resnet(width=0)"],
)  # fmt: skip
def test_wrong_arguments_are_one_line(text):
    with pytest.raises(Expected) as error:
        build("models", text)
    assert str(error.value).startswith(("Expected", "Unknown")) and "\n" not in str(error.value)


# --- fresh weights --------------------------------------------------------------------------------


def test_fresh_weights_follow_torchs_rules():
    net = nn.ModuleDict({
        "conv": nn.Conv2d(8, 16, 3, groups=2), "up": nn.ConvTranspose2d(8, 4, 3), "fc": nn.Linear(400, 30),
        "bn": nn.BatchNorm2d(3), "ln": nn.LayerNorm(5), "table": nn.Embedding(50, 40),
        "mix": nn.MultiheadAttention(32, 4), "scale": nn.ParameterList([torch.full((3,), 1e-6), torch.arange(300.0)]),
    })  # fmt: skip
    found = fresh(net, random.generator("f"))
    for name, fan in (("conv", 4 * 9), ("up", 4 * 9), ("fc", 400)):
        bound = fan**-0.5
        top = float(found[f"{name}.weight"].abs().max())
        assert 0.97 * bound < top <= bound and float(found[f"{name}.bias"].abs().max()) <= bound
    for name in ("bn", "ln"):
        assert bool((found[f"{name}.weight"] == 1).all()) and bool((found[f"{name}.bias"] == 0).all())
    assert abs(float(found["table.weight"].std()) - 0.02) < 2e-3
    assert abs(float(found["scale.1"].std()) - 0.02) < 4e-3
    assert bool((found["scale.0"] == 1e-6).all())
    assert float(found["mix.in_proj_weight"].abs().max()) <= (6 / 128) ** 0.5
    assert bool((found["mix.in_proj_bias"] == 0).all())
    assert same(found, fresh(net, random.generator("f"))) and list(found) == [n for n, _ in net.named_parameters()]


def test_deep_lenet_at_depth_three_is_lenet():
    a, b = build("models", "deep_lenet(width=4, size=12)"), build("models", "lenet(width=4, size=12)")
    assert a.layers == b.layers
    assert same(a.init(random.generator(0))[0], b.init(random.generator(0))[0])
    assert b.spec == "lenet(channels=3, size=12, classes=100, width=4, function='sigmoid', init='wide')"
    five = build("models", "deep_lenet(depth=5, size=12)")
    assert [x.options["stride"] for x in five.layers if x.kind == "conv"] == [2, 2, 1, 1, 1]
    assert build("models", "deep_mlp(depth=2, width=5)").layers == build("models", "mlp(hidden=(5, 5))").layers


def test_a_chain_of_known_layers_takes_the_explicit_route_and_nothing_else_does():
    for name in ("mlp(size=4, hidden=(6,), function='silu')", "lenet5(pool='max', norm='group')", "convnet64(width=4)"):
        assert structured.supports(build("models", name).layers)
    assert not structured.supports(build("models", "resnet(depth=8)").layers)


# --- names ----------------------------------------------------------------------------------------

CODE = """
from torch import nn
from beside import WIDTH
from qleak.models import mlp

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, WIDTH)
        self.out = nn.Linear(WIDTH, 10)
    def forward(self, x):
        return self.out(self.fc(x.flatten(1)).relu())

def grey():
    return mlp(size=8, classes=4)

def broken():
    return 1 / 0

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my-net.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "beside.py").write_text("WIDTH = 7\n", encoding="utf-8")
    (tmp_path / "loose_net.py").write_text("from qleak.models import lenet5\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_code_by_name(folder):
    before = torch.get_rng_state()
    model = build("models", "my-net.py:Net")
    assert model.spec.startswith(
        "imported(path='my-net.py:Net', shape=(3, 32, 32), classes=10, mode='eval', fresh=True, digest='"
    )
    assert build("models", model.spec).spec == model.spec
    params, _ = model.init(random.generator(0))
    assert params["fc.weight"].shape == (7, 3072) and not same(params, model.init(random.generator(1))[0])
    kept = [imported("my-net.py:Net", fresh=False).init(random.generator(i))[0] for i in (0, 1)]
    assert same(*kept)  # the constructor's own draws are the same each time, in every process
    grey = build("models", f"{folder}/my-net.py:grey")
    assert grey.shape == (1, 8, 8) and grey.classes == 4 and build("models", grey.spec).spec == grey.spec
    assert build("models", "loose_net:lenet5").shape == (1, 28, 28)
    assert build("models", "qleak.models:lenet5").classes == 10
    assert torch.equal(before, torch.get_rng_state())


def test_changed_code_is_refused(folder):
    spec = build("models", "my-net.py:Net").spec
    (folder / "my-net.py").write_text(CODE + "\n# other\n", encoding="utf-8")
    with pytest.raises(Expected, match="has changed since"):
        build("models", spec)


@pytest.mark.parametrize(
    ("text", "says"),
    [("my-net.py:Nett", "Did you mean 'Net'"), ("my-net.py:number", "a function or a class"), ("absent.py:Net", "a file"),
     ("my-net.py:broken", "ZeroDivisionError"), ("absent.module:Net", "ModuleNotFoundError"), ("os:getcwd", "got str"),
     ("imported:my-net.py", "file.py:Net"), ("lenett:5", "Unknown model"), ("torch.nn:Flatten", "[1, 10]"),
     ("imported(path='my-net.py:grey', mode='train')", "returns a Model")],
)  # fmt: skip
def test_wrong_names_are_one_line(folder, text, says):
    with pytest.raises(Expected) as error:
        build("models", text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_torchvisions_weights_come_from_disk_only(tmp_path, monkeypatch):
    """A stand-in file with the right name: used if its digest fits the name, refused otherwise, never fetched."""
    import hashlib

    from torchvision.models import ShuffleNet_V2_X0_5_Weights, shufflenet_v2_x0_5

    entry = ShuffleNet_V2_X0_5_Weights.DEFAULT
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    text = "torchvision(name='shufflenet_v2_x0_5', classes=1000, weights='default')"
    with pytest.raises(Expected, match="fetch them once with python -c"):
        build("models", text)
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    net = constructed(shufflenet_v2_x0_5)
    file = place / entry.url.rsplit("/", 1)[-1]
    torch.save(net.state_dict(), file)
    with pytest.raises(Failed, match="SHA-256"):
        build("models", text)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    other = file.rename(place / f"shufflenet-{digest}.pth")
    monkeypatch.setattr(type(entry), "url", property(lambda self: f"https://x/{other.name}"))
    model = build("models", text)
    params, buffers = model.init(random.generator(0))
    assert same(params, dict(net.named_parameters()))
    assert torch.equal(buffers["conv1.1.running_var"], net.conv1[1].running_var)


def test_torchvision_by_name():
    model = build("models", "torchvision:squeezenet1_1")
    assert model.spec == "torchvision(name='squeezenet1_1', classes=10, size=32, weights='none', mode='eval')"
    assert model.shape == (3, 32, 32) and model.statistics is None


class Fused(nn.Module):
    """Layers whose own kernels have no second derivative on a CPU: fused attention and Hardsigmoid."""

    def __init__(self):
        super().__init__()
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.gate, self.fc = nn.Hardsigmoid(), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.gate(self.mix(x.flatten(2).mT)).mean(1))


def test_kernels_without_a_second_derivative_are_written_out():
    net = constructed(Fused).double()
    model = from_module(net, (8, 3, 3), 5)
    params, buffers, x = scene(model)
    torch.testing.assert_close(model.apply(params, buffers, x), net.eval()(x))
    target = one_hot(torch.tensor([1, 2]), 5, F64)
    found = vmap(grad(cosine(model, buffers, params, x, target)), randomness="error")(x[None])
    assert bool(found.isfinite().all()) and float(found.norm()) > 0
    with pytest.raises(RuntimeError, match="not implemented"):
        grad(lambda x: grad(lambda x: net(x).square().sum())(x).square().sum())(x)

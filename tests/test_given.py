"""What a captured update is audited with: pictures for truth, nets, weights, clients; one line for what does not fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from qleak import data
from qleak.adapters import files, given, memory, truth
from qleak.adapters.given import Request
from qleak.catalog import build
from qleak.errors import Expected
from qleak.models import lenet

SHAPE = (3, 8, 8)


def pictures(count=2):
    return torch.linspace(0, 1, count * 192).reshape(count, *SHAPE)


# --- the truth ------------------------------------------------------------------------------------


def test_pictures_are_read_from_npz_files_folders_and_sets(tmp_path):
    x = pictures()
    np.savez(tmp_path / "a.npz", images=x.numpy(), labels=np.array([4, 2]))
    found = truth.read(str(tmp_path / "a.npz"), SHAPE)
    assert torch.equal(found.x, x) and found.y.tolist() == [4, 2]
    np.savez(tmp_path / "last.npz", x=(x.permute(0, 2, 3, 1) * 255).round().byte().numpy())  # channels last, bytes
    found = truth.read(str(tmp_path / "last.npz"), SHAPE)
    assert float((found.x - x).abs().max()) <= 0.5 / 255 + 1e-6 and found.y is None
    drawn = (x[1].permute(1, 2, 0) * 255).round().byte().numpy()
    for place in (tmp_path / "one.png", tmp_path / "many" / "cat" / "a.png", tmp_path / "many" / "dog" / "b.png"):
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn).save(place)
    one = truth.read(str(tmp_path / "one.png"), SHAPE)
    assert one.x.shape == (1, *SHAPE) and one.y is None and float((one.x[0] - x[1]).abs().max()) < 0.01
    many = truth.read(str(tmp_path / "many"), SHAPE)
    assert many.x.shape == (2, *SHAPE) and many.y.tolist() == [0, 1]
    digits = data.load("mnist5k")
    for text, index in (("mnist5k", [0]), ("mnist5k:3", [3]), ("mnist5k:3,8", [3, 8]), ("mnist5k:1:3", [1, 2])):
        found = truth.read(text, (1, 28, 28))
        assert torch.equal(found.x, digits.x[index]) and torch.equal(found.y, digits.y[index])


def test_grey_pictures_need_no_channel_and_one_needs_no_batch():
    assert truth.checked(torch.zeros(28, 28)[None], None, (1, 28, 28)).x.shape == (1, 1, 28, 28)
    assert truth.checked(torch.zeros(5, 28, 28), None, (1, 28, 28)).x.shape == (5, 1, 28, 28)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (torch.zeros(2, 3, 9, 8), None, r"Expected images of shape \(3, 8, 8\) in truth, got \(2, 3, 9, 8\)\.$"),
        (torch.zeros(0, 3, 8, 8), None, r"got \(0, 3, 8, 8\)"),
        (torch.full((1, 3, 8, 8), 2.0), None, r"Expected pixels of truth in \[0, 1\], got \[2, 2\]\.$"),
        (torch.full((1, 3, 8, 8), torch.nan), None, "Expected pixels of truth"),
        (torch.zeros(2, 3, 8, 8), torch.tensor([1]), "Expected a label for each of 2 images in truth, got 1"),
    ],
)
def test_pictures_that_do_not_fit_are_one_line(x, y, said):
    with pytest.raises(Expected, match=said):
        truth.checked(x, y, SHAPE)


def test_files_and_places_that_do_not_fit_are_one_line(tmp_path):
    np.savez(tmp_path / "other.npz", pixels=np.zeros(3))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and no more")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    for text, shape, said in (
        (tmp_path / "other.npz", SHAPE, "Expected images under one of x, images"),
        (tmp_path / "torn.npz", SHAPE, "Expected a readable npz at "),
        (tmp_path / "absent.npz", SHAPE, "Expected a readable npz at "),
        (tmp_path / "a.png", (3, 8, 9), "Expected a square model for the picture"),
        ("mnist5k:x", (1, 28, 28), "Expected indices such as mnist5k:3, mnist5k:3,8 or mnist5k:0:4"),
        ("mnist5k:5000", (1, 28, 28), r"Expected indices in 0 … 4999 of mnist5k, got '5000'"),
        ("mnist5k:3:3", (1, 28, 28), "Expected indices in 0"),
        ("mnist5k:-1", (1, 28, 28), "Expected indices in 0"),
        ("mnist5j", (1, 28, 28), "Did you mean 'mnist5k'"),
    ):
        with pytest.raises(Expected, match=said) as error:
            truth.read(str(text), shape)
        assert "\n" not in str(error.value)


def test_truth_comes_as_tensors_too():
    x = pictures()
    assert given.truth_of((x, [4, 2]), SHAPE).y.tolist() == [4, 2]
    assert given.truth_of(x, SHAPE).y is None
    same = truth.Truth(x, None)
    assert given.truth_of(same, SHAPE) is same
    assert given.truth_of("mnist5k:3", (1, 28, 28)).x.shape == (1, 1, 28, 28)


# --- the update, the net, the client --------------------------------------------------------------


def test_an_update_in_memory_is_checked_like_a_file():
    found = given.read([torch.ones(2, dtype=torch.float16), torch.ones(3, dtype=torch.float16)])
    assert found.ordered and found.meta == {"dtype": "float16"} and found.tensors["0"].dtype == torch.float32
    assert given.read(found) is found
    assert not given.read({"w": torch.ones(2)}).ordered
    for wrong, said in (
        (3, "Expected a path, a dict or a list of tensors, got int"),
        ({"w": [1.0]}, "Expected tensors only, 'w' is a list"),
        ([torch.tensor([1.0, torch.inf])], "Expected finite numbers, '0' holds NaN or infinity"),
    ):
        with pytest.raises(Expected, match=said):
            given.read(wrong)


def ask(**more):
    return Request(**({"update": None, "model": "lenet(channels=1, size=28, classes=10)"} | more))


def test_nets_come_by_name_as_modules_and_as_models():
    assert given.model_of(ask()).shape == (1, 28, 28)
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    assert given.model_of(ask(model=module, shape=SHAPE)).classes == 7, "asked for by one empty picture"
    net = lenet(1, 8, 4, width=3)
    assert given.model_of(ask(model=replace(net, spec=""), shape=(1, 8, 8))).shape == (1, 8, 8)
    adapted = given.model_of(ask(normalise="mnist"))
    assert adapted.spec != given.model_of(ask()).spec
    for wrong, said in (
        ({"model": 3}, "Expected a model by name, an nn.Module or a qleak Model, got int"),
        ({"shape": (3, 32, 32)}, r"Expected shape=\(3, 32, 32\) to be that of the model, \(1, 28, 28\)"),
        ({"normalise": "mnits"}, "Did you mean 'mnist'"),
        ({"model": "lenett"}, "Did you mean 'lenet'"),
    ):
        with pytest.raises(Expected, match=said):
            given.model_of(ask(**wrong))


def test_a_net_of_another_process_says_so():
    with pytest.raises(Expected, match="net999 among the nets of this process"):
        memory.net999  # noqa: B018
    with pytest.raises(AttributeError):
        memory.nothing  # noqa: B018


def test_a_learning_rate_makes_one_step_and_stands_alone():
    assert given.client_of(ask(), 2).spec == build("clients", "gradient(batch=2)").spec
    assert "lr=0.5" in given.client_of(ask(scale=0.5), 2).spec
    with pytest.raises(Expected, match="--scale with --client gradient only"):
        given.client_of(ask(client="local_sgd(steps=2)", scale=0.5), 2)


def test_weights_need_every_parameter_and_leave_other_statistics_to_the_model():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    params = {k: v.detach() for k, v in net.named_parameters()}
    buffers = dict(net.named_buffers())
    state = {f"module.{k}": v.clone() for k, v in net.state_dict().items()}
    state["module.1.running_mean"] += 3
    del state["module.1.running_var"]
    found = files.Captured(state, False, {}, "memory")
    weights, own = given.weights_of(found, params, buffers)
    assert all(torch.equal(weights[k], v) for k, v in params.items())
    assert own["1.running_mean"].tolist() == [3, 3] and own["1.running_var"].tolist() == [1, 1]
    (note,) = given.held(found, buffers)
    assert "1.running_var" in note and "1.running_mean" not in note
    assert given.held(found, {}) == []
    assert "held fixed" in given.held(None, {"0.weight": params["0.weight"]})[0]
    del state["module.0.bias"]
    with pytest.raises(Expected, match=r"weights for every parameter, '0\.bias' is missing"):
        given.weights_of(found, params, buffers)

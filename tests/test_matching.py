"""Which tensor of a file is which parameter: names, wrappers' names, order, shapes, and what is refused."""

import pytest
import torch

from qleak import random
from qleak.adapters.files import Captured
from qleak.adapters.matching import Matched, match
from qleak.errors import Expected
from qleak.models import convnet, lenet, mlp


def captured(tensors: dict, ordered: bool = False) -> Captured:
    return Captured(tensors, ordered, {"dtype": "float32"}, "pt")


def listed(values) -> Captured:
    return captured({str(i): v for i, v in enumerate(values) if v is not None}, ordered=True)


@pytest.fixture
def params():
    return lenet(channels=1, size=28, classes=10).init(random.generator("matching"))[0]


def whole(matched: Matched, params: dict, how: str) -> bool:
    same = all(torch.equal(matched.update[k], v) for k, v in params.items())
    return same and list(matched.update) == list(params) and {line.how for line in matched.lines} == {how}


def test_exact_names_in_any_order(params):
    shuffled = dict(sorted(params.items(), key=lambda item: str(item[1].sum())))
    assert list(shuffled) != list(params)
    matched = match(captured(shuffled), params, {})
    assert whole(matched, params, "name")
    assert matched.missing == matched.notes == []


@pytest.mark.parametrize(
    ("rename", "how"),
    [
        (lambda k: f"module.{k}", "name without prefix 'module.'"),
        (lambda k: f"_orig_mod.module.{k}", "name without prefix '_orig_mod.module.'"),
        (lambda k: f"{k}.grad", "name without suffix '.grad'"),
        (lambda k: f"model.{k}.grad", "name without prefix 'model.' and suffix '.grad'"),
        (lambda k: f"backbone.stem.{k}", "name without prefix 'backbone.stem.'"),
    ],
)
def test_names_of_wrappers(params, rename, how):
    assert whole(match(captured({rename(k): v for k, v in params.items()}), params, {}), params, how)


def test_a_model_that_is_itself_wrapped(params):
    wrapped = {f"net.{k}": v for k, v in params.items()}
    assert whole(match(captured(params), wrapped, {}), wrapped, "name with prefix 'net.'")


def test_an_ending_that_two_tensors_claim_is_taken_by_none(params):
    twice = {k: v for k, v in params.items() if k != "fc.bias"} | {
        "a.fc.bias": params["fc.bias"] * 2,
        "b.fc.bias": params["fc.bias"] * 3,
    }
    matched = match(captured(twice), params, {})
    assert matched.missing == ["fc.bias"]
    assert [line.how for line in matched.lines if line.found.endswith("fc.bias")] == ["extra", "extra"]


def test_lists_go_by_order_and_equal_shapes_are_noted(params):
    matched = match(listed(params.values()), params, {})
    assert whole(matched, params, "order and shape")
    assert "share their shape" in matched.notes[0]  # conv2 and conv3
    distinct = {k: v for k, v in params.items() if k.startswith(("conv1", "fc"))}
    assert match(listed(distinct.values()), distinct, {}).notes == []


def test_foreign_names_fall_back_to_order_and_say_so(params):
    matched = match(captured({f"layer_{i}": v for i, v in enumerate(params.values())}), params, {})
    assert whole(matched, params, "order and shape")
    assert "without names" in " ".join(matched.notes)


def test_a_list_out_of_order_goes_by_shapes_that_occur_once():
    params = mlp(size=8, hidden=(5,)).init(random.generator("matching"))[0]
    matched = match(listed(reversed(params.values())), params, {})
    assert whole(matched, params, "shape alone")
    assert "occur once" in matched.notes[0]


def test_lists_with_gaps(params):
    kept = [k for k in params if k != "conv2.bias"]
    matched = match(listed(None if k == "conv2.bias" else v for k, v in params.items()), params, {})
    assert matched.missing == ["conv2.bias"]  # a None keeps the places
    assert all(torch.equal(matched.update[k], params[k]) for k in kept)
    assert list(match(listed(params[k] for k in kept), params, {}).update) == kept  # one way even so
    with pytest.raises(Expected, match="more than one way"):  # but conv2 could as well be conv3
        match(listed(v for k, v in params.items() if not k.startswith("conv2")), params, {})
    weights = [v for k, v in params.items() if k.endswith("weight")]
    matched = match(listed(weights), params, {})
    assert all(torch.equal(matched.update[k], params[k]) for k in params if k.endswith("weight"))
    assert "output error" in " ".join(matched.notes)


def test_missing_biases_and_frozen_layers(params):
    some = {k: v for k, v in params.items() if k not in ("fc.bias", "conv1.weight", "conv1.bias")}
    matched = match(captured(some), params, {})
    assert matched.missing == ["conv1.weight", "conv1.bias", "fc.bias"]
    how = {line.parameter: line.how for line in matched.lines}
    assert (how["conv1.weight"], how["conv1.bias"], how["fc.bias"]) == ("frozen", "frozen", "missing")
    assert "output error" in " ".join(matched.notes)
    last = match(captured({k: v for k, v in params.items() if k.startswith("fc")}), params, {})
    assert len(last.missing) == 6


def test_buffers_and_counters_are_not_parameters(params):
    buffers = {"bn.running_mean": torch.zeros(12), "bn.num_batches_tracked": torch.tensor(3)}
    matched = match(
        captured(params | {f"module.{k}": v for k, v in buffers.items()} | {"step": torch.tensor(4)}), params, buffers
    )
    assert [(line.found, line.how) for line in matched.lines[8:]] == [
        ("module.bn.running_mean", "buffer"), ("module.bn.num_batches_tracked", "buffer"), ("step", "buffer"),
    ]  # fmt: skip
    assert list(matched.update) == list(params)
    matched = match(listed([*params.values(), torch.zeros(7), torch.tensor(3)]), params, {"mean": torch.zeros(7)})
    assert [line.how for line in matched.lines[8:]] == ["buffer", "buffer"]


def test_tied_weights_in_either(params):
    tied = params | {"head.weight": params["fc.weight"]}
    matched = match(captured(params), tied, {})
    assert matched.lines[-1].how == "tied to 'fc.weight'"
    assert matched.missing == ["head.weight"]
    matched = match(captured(tied), params, {})
    assert matched.lines[-1].how == "tied to 'fc.weight'"
    assert len(matched.update) == 8


def test_matrices_that_lie_the_other_way_round():
    params = mlp(size=8, hidden=(12, 12)).init(random.generator("matching"))[0]
    turned = match(captured({k: v.T.contiguous() if v.ndim == 2 else v for k, v in params.items()}), params, {})
    assert all(torch.equal(turned.update[k], v) for k, v in params.items())
    assert turned.lines[0].how == turned.lines[2].how == "name, transposed"  # the second is square: like the others
    assert any("square" in n for n in turned.notes)
    square = captured({k: v.T.contiguous() if k == "fc2.weight" else v for k, v in params.items()})
    assert match(square, params, {}).notes == []  # cannot be seen, and is not guessed
    conv = convnet(channels=1, size=8, width=4).init(random.generator("matching"))[0]
    keras = {k: v.permute(2, 3, 1, 0).contiguous() if v.ndim == 4 else v for k, v in conv.items()}
    matched = match(captured(keras), conv, {})
    assert all(torch.equal(matched.update[k], v) for k, v in conv.items())
    assert matched.lines[0].how == "name, HWIO to OIHW"


def test_other_nets_are_refused_with_the_first_mismatch_and_a_count(params):
    other = lenet(channels=3, size=32, classes=100).init(random.generator("matching"))[0]
    with pytest.raises(
        Expected, match=r"'conv1.weight' of shape \(12, 3, 5, 5\) for 'conv1.weight' of \(12, 1, 5, 5\) \(3 of 8"
    ):
        match(captured(other), params, {})
    with pytest.raises(Expected, match=r"tensor 0 of shape .* places differ"):
        match(listed(convnet().init(random.generator("matching"))[0].values()), params, {})
    with pytest.raises(Expected, match="same architecture"):
        match(captured({"fc.bias": params["fc.bias"]}), params, {})  # no weight at all
    with pytest.raises(Expected, match="left over 9"):
        match(captured(params | {f"x{i}": torch.ones(3) for i in range(9)}), params, {})
    with pytest.raises(Expected):
        match(captured({"step": torch.tensor(1)}), params, {})

"""The shape behind a layer is what torch gives there, and a layer that does not fit is named."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from qleak.errors import Expected
from qleak.models.layers import activation, after, apply_layer, conv, flatten, linear, norm, pool, sequential, shapes

small = st.integers(1, 5)


@given(small, small, small, small, st.integers(0, 2), st.integers(1, 9), st.integers(1, 9))
def test_convolutions_and_pools_have_torchs_shape(b, c, kernel, stride, padding, height, width):
    assume(min(height, width) + 2 * padding >= kernel)
    layers = [conv("c", c, 3, kernel, stride, padding)]
    if 2 * padding <= kernel:  # torch's own rule for pools
        layers += [pool(f, kernel, stride, padding) for f in ("mean", "max")]
    for layer in layers:
        found = after(layer, (b, c, height, width))
        params = {k: torch.zeros(s) for k, s in shapes(layer).items()}
        assert found == tuple(apply_layer(layer, params, torch.zeros(b, c, height, width)).shape)


def test_the_others_have_torchs_shape():
    h = torch.zeros(2, 4, 3, 5)
    for layer in (activation("relu"), norm("n", 2, 4), flatten()):
        params = {k: torch.zeros(s) for k, s in shapes(layer).items()}
        assert after(layer, (2, 4, 3, 5)) == tuple(apply_layer(layer, params, h).shape)
    assert after(linear("l", 7, 3), (2, 7)) == (2, 3)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([conv("a", 1, 2, 3)], r"Expected 1 channels in front of conv a; got \(3, 8, 8\)."),
        ([conv("a", 3, 2, 9)], r"Expected at least 9 pixels a side in front of conv a; got \(3, 8, 8\)."),
        ([flatten(), linear("b", 100, 2)], r"Expected 100 numbers in front of linear b; got \(192,\)."),
        ([linear("b", 3, 2)], r"Expected 3 numbers in front of linear b; got \(3, 8, 8\)."),
        ([flatten(), pool("max", 2)], r"Expected at least 2 pixels a side in front of pool; got \(192,\)."),
    ],
)
def test_a_layer_that_does_not_fit_is_named(layers, said):
    with pytest.raises(Expected, match=said):
        sequential(layers, (3, 8, 8))

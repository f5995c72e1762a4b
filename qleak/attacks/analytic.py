"""The closed form: one image out of one gradient of a sequential net, layer by layer, without iterating.

A linear layer gives its input away: dW = δ hᵀ and db = δ, so h = dWᵀδ / |δ|² (Phong et al., IEEE TIFS
2018; Geiping et al., NeurIPS 2020, Prop. 3.1), and for a hard label the only negative entry of the last db
is the label (Zhao et al., iDLG, 2020). Below the lowest linear layer the recursion is that of R-GAP (Zhu &
Blaschko, ICLR 2021): once the output a = f(z), z = A h + b of a convolution and δ = ∂L/∂z are known, its
input h solves two sets of equations that are linear in h,

    (i)  A h = f⁻¹(a) − b        (ii)  G h = dK,   G = ∂²⟨δ, A h⟩ / ∂K ∂h        and  ∂L/∂h = Aᵀ δ.

What is different here. R-GAP solves unweighted least squares, which amplifies the error of a layer by
1/f′ in the next. Here every layer hands down a Gaussian: its input h and the *precision* P of it, the
inverse covariance. With D = diag f′(z), noise σ in dK and a prior N(μ, τ⁻¹) (see `_prior`),

    P′ = Aᵀ D P D A + GᵀG / σ² + τ,        P′ h = Aᵀ D P D (z − b) + Gᵀ dK / σ² + τ μ,

the information form of a Kalman filter, so both sets carry the weight of their own errors and nothing is
tuned. σ is the noise the caller expects plus the rounding of the gradient's dtype, plus what the error of
δ does to G h. The latter, and the distance a unit keeps from the ends of f's range, are measured on a
*twin*: one draw from the posterior, handed down beside the mean.

Exact float32 gradients give 100–125 dB, float64 ones machine precision. With noise the first-order error
propagation through f⁻¹ is what limits it: the result is then a start for an iterative attack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qleak import check
from qleak.check import Expected
from qleak.models.layers import INVERSES
from qleak.types import Grads, Layer, Params

SPREAD = 0.3  # standard deviation of a pixel around mid-grey; photographs have 0.2–0.3


class Known(NamedTuple):
    """What is known at one point of the net, on its way down.

    Attributes:
        mean: the value there `[d]`.
        delta: gradient of the loss with respect to it `[d]`.
        precision: inverse covariance of `mean` `[d d]`.
        twin: one draw from the posterior of (value, delta), `[d]` each.
    """

    mean: Tensor
    delta: Tensor
    precision: Tensor
    twin: tuple[Tensor, Tensor]


def refuse(layers: Sequence[Layer] | None) -> str:
    """Why a net cannot be solved, in one sentence that names the first layer in the way; "" if it can.

    Only what lies below the lowest linear layer has to be inverted, so an MLP may have any activation.
    """
    if not layers:
        return "closed_form needs a model that declares its layers (Model.layers is None)."
    if layers[-1].kind != "linear":
        return f"closed_form needs a last layer that is linear with a bias, got {layers[-1].kind}."
    for i, layer in enumerate(layers[: _lowest(layers)]):
        function = layer.options.get("function", "")
        if layer.kind == "activation" and function not in INVERSES:
            return (
                f"closed_form cannot invert layer {i + 1} ({function}): needs an invertible activation"
                f" such as {', '.join(list(INVERSES)[:-1])} or {list(INVERSES)[-1]}."
            )
    return ""


def solve(
    layers: Sequence[Layer],
    shape: tuple[int, int, int],
    params: Params,
    grads: Grads,
    noise: Mapping[str, float | Tensor] | None = None,
    edge: float = math.inf,
    ridge: float = 1e-13,
) -> tuple[Tensor, Tensor, Tensor]:
    """The image whose gradient is `grads`: mean cross-entropy with a hard label, a batch of one.

    Args:
        layers: the net, see `refuse`.
        shape: `(c, h, w)` of the image.
        params: its parameters.
        grads: the gradient, decoded.
        noise: expected standard deviation of the error of every gradient tensor, e.g. step/√12 for a
            uniform quantizer; a missing name means 0. Rounding of the tensor's dtype is always added.
        edge: standard deviation of the difference of two neighbouring pixels, for a smooth prior; ∞: none.
        ridge: added to every system in units of its mean diagonal, so that a net that does not determine
            its image gives the image nearest to grey; refinement takes its bias away again.

    Returns:
        The image `[1 c h w]` in float64, not clamped; its label `[1]`, int64; the residual
        |∇ℓ(x, label) − grads| / |grads|, which is near 1 when `grads` is not one image's gradient.

    Raises:
        Expected: the net is refused, or the gradient is zero or not finite.
    """
    if reason := refuse(layers):
        raise Expected(reason)
    check.finite(grads=grads)
    device = grads[f"{layers[-1].name}.bias"].device
    # A tensor of rounding errors has about the size of eps times its root mean square.
    sigma = {
        k: math.hypot(float((noise or {}).get(k, 0)), torch.finfo(v.dtype).eps * _rms(v)) for k, v in grads.items()
    }
    params, grads = ({k: v.detach().to("cpu", torch.float64) for k, v in t.items()} for t in (params, grads))
    label = grads[f"{layers[-1].name}.bias"].argmin()[None]

    start = _lowest(layers)
    levels, spans = _prior(layers[:start], params, shape)
    known = _read_linear(layers[start], params, grads, sigma, deep=start > 0)
    for i in reversed(range(start)):
        layer = layers[i]
        if layer.kind == "activation":
            known = _through_activation(layer.options["function"], known)
        elif layer.kind != "flatten":  # everything is flat already
            prior = _grey(levels[i].numel(), spans[i]) if i or math.isinf(edge) else _smooth(shape, edge)
            known = _through_affine(layer, params, grads, sigma, known, levels[i], spans[i], prior, ridge)
    x = known.mean.reshape(1, *shape)
    return x.to(device), label.to(device), _residual(layers, params, grads, x, label).to(device)

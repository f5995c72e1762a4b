"""The Jacobian of a client's update in the pixels of its images, in pieces, and the Gram matrices JᵀWJ made of it.

J = ∂g/∂x has a row for every number sent and a column for every pixel: 85,000 × 3,072 for the colour LeNet, 2 GB in
float64. What a bound needs is JᵀWJ `[n n]` alone, for some diagonal W, so J is made in pieces and never held whole:

- A linear layer's gradient is δhᵀ, of its output's error δ `[c]` and its input h `[f]`. Its c·f rows are
  δ_c ∂h_f + h_f ∂δ_c, and for any weights W `[c f]`

      JᵀWJ = Hᵀdiag(Wᵀδ²)H + Dᵀdiag(Wh²)D + DᵀSH + (DᵀSH)ᵀ,  S = W ∘ δhᵀ,  H = ∂h/∂x, D = ∂δ/∂x,

  which costs c + f rows in place of c·f (nine tenths of that LeNet).
- A convolution's rows follow from ∂δ and ∂h by two matrix products, so that only backpropagation to the layers'
  outputs is differentiated, and not the gradients of shared weights.
- All other rows come in slices of bounded size: forward over reverse (a `jvp` of `grad` for each pixel) or, where a
  slice has fewer rows than half the pixels, reverse over reverse (a `vjp` for each row).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from scipy.linalg import get_blas_funcs
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.functional import unfold

from qleak import tree
from qleak.bounds.slices import Function, Slices, cut_up, forward, groups
from qleak.check import Expected, positive, whole
from qleak.client import is_gradient, one_hot, slope
from qleak.types import Buffers, Client, Model, Params, Tree


class Outer(NamedTuple):
    """A linear layer's part: error `delta [c]`, input `h [f]`, and their Jacobians `D [c n]`, `H [f n]`."""

    delta: Tensor
    h: Tensor
    D: Tensor
    H: Tensor


class Jacobian(NamedTuple):
    """J in pieces, float64.

    Attributes:
        value: what is sent, g, as a tree.
        outer: parameters whose rows are an outer product.
        slices: `slices() -> (name, rows, J [rows n])` of all other parameters, made again at each call unless they fit.
        pixels: n, of all images of the update together.
    """

    value: Tree
    outer: dict[str, Outer]
    slices: Slices
    pixels: int


def update_of(client: Client, model: Model, params: Params, buffers: Buffers, y: Tensor) -> Function:
    """The client's update as a function of its images `x [b c h w]`, for labels `y [b]`.

    Raises:
        Expected: a client that changes its images or weights first, or draws masks: its update is not this function.
    """
    if client.prepare is not Client.__dataclass_fields__["prepare"].default or model.masks is not None:
        raise Expected(f"Expected a client whose update is a function of its images alone, got {client.spec}.")
    target = one_hot(y, model.classes, next(iter(params.values())).dtype)
    return lambda x: client.respond(slope(model, buffers), params, x, target)


def jacobian(
    client: Client, model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor,
    front: Callable[[Tree], Tree] | None = None, memory: float = 1e9, block: int = 64,
) -> Jacobian:  # fmt: skip
    """J at images `x [b c h w]` with labels `y [b]`, in float64.

    Args:
        client: what is computed of them; one row axis or none.
        model: the network.
        params: its weights.
        buffers: its buffers.
        x: the images.
        y: their labels.
        front: what the channel does to the update before its first noise or code, where that is differentiable.
        memory: bytes that the slices of J may take.
        block: derivatives taken at a time.

    Raises:
        Expected: a client whose update is not a function of its images alone.
    """
    positive(memory=memory)
    whole(block=block)
    params, buffers, x = tree.cast(params, torch.float64), tree.cast(buffers, torch.float64), x.double()
    update = update_of(client, model, params, buffers, y)
    if front is None and model.tapped is not None and is_gradient(client) and len(x) == 1:
        found = _opened(client, model, params, buffers, x, y, memory, block)
        if all(_same(part, found.value[name]) for name, part in found.outer.items()):
            return found
    function = update if front is None else lambda x: front(update(x))
    return of_function(function, x, memory, block)


def of_function(function: Function, x: Tensor, memory: float = 1e9, block: int = 64) -> Jacobian:
    """J of any differentiable function of images, row by row or pixel by pixel."""
    return Jacobian(value := function(x), {}, cut_up(function, x, value, memory, block), x.numel())


def gram(jac: Jacobian, weights: Tree) -> Tensor:
    """JᵀWJ `[n n]`, float64, for weights of every number sent: a 0-dim tensor or one of the parameter's shape each."""
    n = jac.pixels
    total = torch.zeros(n, n, dtype=torch.float64)
    for name, part in jac.outer.items():
        total += _outer_gram(part, weights[name].double())
    syrk: Any = get_blas_funcs("syrk", dtype="float64")
    packed = torch.zeros(n, n, dtype=torch.float64).numpy().T  # Fortran order, as BLAS wants it
    for name, rows, j in jac.slices():
        w = weights[name].double()
        root = w.sqrt() if not w.ndim else w.reshape(-1)[rows].sqrt()[:, None]
        packed = syrk(1.0, (j * root).numpy().T, beta=1.0, c=packed, overwrite_c=1)
    upper = torch.from_numpy(packed.T)  # its lower triangle is filled
    return total + upper + upper.tril(-1).T


def pull(jac: Jacobian, weights: Tree, rows: Tree) -> Tensor:
    """JᵀW·rows `[n]`, for a vector of the shape of what is sent."""
    out = torch.zeros(jac.pixels, dtype=torch.float64)
    for name, part in jac.outer.items():
        m = (weights[name].double() * rows[name].double()).expand(len(part.delta), len(part.h))
        out += part.H.T @ (m.T @ part.delta) + part.D.T @ (m @ part.h)
    for name, cut, j in jac.slices():
        m = (weights[name].double() * rows[name].double()).reshape(-1)[cut]
        out += j.T @ m
    return out


def select(jac: Jacobian, places: dict[str, Tensor]) -> Tensor:
    """The rows of J at flat `places[name] [k]`: `[Σk n]`, in the order of the names of what is sent."""
    found: dict[str, Tensor] = {}
    for name, part in jac.outer.items():
        if name in places:
            c, f = places[name] // len(part.h), places[name] % len(part.h)
            found[name] = part.delta[c, None] * part.H[f] + part.h[f, None] * part.D[c]
    for name, cut, j in jac.slices():
        if name in places:
            out = found.setdefault(name, j.new_zeros(len(places[name]), jac.pixels))
            inside = (places[name] >= cut.start) & (places[name] < cut.stop)
            out[inside] = j[places[name][inside] - cut.start]
    return torch.cat([found[k] for k in jac.value if k in found]) if found else torch.zeros(0, jac.pixels).double()


def _same(part: Outer, sent: Tensor) -> bool:
    """Whether what the client sends is the gradient of the loss that was differentiated."""
    return torch.allclose(part.delta[:, None] * part.h, sent, rtol=1e-6, atol=1e-9 * float(sent.abs().amax()))


def _outer_gram(part: Outer, w: Tensor) -> Tensor:
    w = w.expand(len(part.delta), len(part.h))
    over_h, over_d = w.T @ part.delta.square(), w @ part.h.square()
    cross = part.D.T @ ((w * part.delta[:, None] * part.h) @ part.H)
    return part.H.T @ (over_h[:, None] * part.H) + part.D.T @ (over_d[:, None] * part.D) + cross + cross.T


def _opened(
    client: Client, model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, memory: float, block: int
) -> Jacobian:  # fmt: skip
    """J of one image in a net whose layers are known.

    Only the errors δ at the layers' outputs and the layers' inputs h are differentiated; a convolution's rows follow as
    ∂δ U + δ ∂U with its unfolded input U, a linear layer's are kept as the outer product they are.
    """
    tapped, scale = model.tapped, client.scale
    assert tapped is not None
    flat = [o for o in tapped.layers if o.kind == "linear" and len(o.options["out"]) == 1]
    convs = [o for o in tapped.layers if o.kind == "conv"]
    owned = {o.options[k] for o in flat + convs for k in ("weight", "bias") if o.options[k]}
    rest = {k: v for k, v in params.items() if k not in owned}
    zeros = {o.name: x.new_zeros(1, *o.options["out"]) for o in tapped.layers}
    target = one_hot(y, model.classes, x.dtype)

    def heart(x: Tensor) -> Tree:
        """All that the update is made of: every layer's δ and h, and the gradients of other layers' parameters."""

        def cost(some: Params, taps: Tree) -> tuple[Tensor, Tree]:
            out, inputs = tapped.run(params | some, buffers, x, zeros | taps)
            return -(target * torch.log_softmax(out, -1)).sum(-1).mean(), inputs

        taps = {o.name: zeros[o.name] for o in flat + convs}
        (slopes, errors), inputs = grad(cost, argnums=(0, 1), has_aux=True)(rest, taps)
        parts = {k: scale * v for k, v in slopes.items()}
        for o in flat + convs:
            parts |= {f"δ {o.name}": scale * errors[o.name][0], f"h {o.name}": inputs[o.name][0]}
        return parts

    value = heart(x)

    def columns(seeds: Tensor) -> Tree:
        """Rows of J for some directions `[k …]`: `[k rows]` each."""
        moved = vmap(lambda v: jvp(heart, (x,), (v,))[1])(seeds)
        out = {k: moved[k].flatten(1) for k in rest}
        for o in flat:
            out |= {f"{part} {o.name}": moved[f"{part} {o.name}"].flatten(1) for part in "δh"}
        for o in convs:
            kernel = params[o.options["weight"]].shape[2:]
            spread = functools.partial(
                unfold, kernel_size=kernel, stride=o.options["stride"], padding=o.options["padding"]
            )
            d, u = value[f"δ {o.name}"].flatten(1), spread(value[f"h {o.name}"][None])[0]
            dd, du = moved[f"δ {o.name}"].flatten(2), spread(moved[f"h {o.name}"])
            out[o.options["weight"]] = (dd @ u.T + d @ du.mT).flatten(1)
            if o.options["bias"]:
                out[o.options["bias"]] = dd.sum(-1)
        return out

    sizes = {k: v.numel() for k, v in rest.items()}
    sizes |= {o.options[k]: params[o.options[k]].numel() for o in convs for k in ("weight", "bias") if o.options[k]}
    inner = {f"{part} {o.name}": value[f"{part} {o.name}"].numel() for o in flat for part in "δh"}
    parts = groups(sizes, max(int(memory / 16 / x.numel()), 1))
    first = [(k, slice(0, n)) for k, n in inner.items()] + (parts[0] if len(parts) == 1 else [])
    rows = dict(zip([k for k, _ in first], forward(columns, x, first, block), strict=True))
    outer = {}
    for o in flat:
        d, h = f"δ {o.name}", f"h {o.name}"
        outer[o.options["weight"]] = Outer(value[d], value[h].flatten(), rows[d], rows[h])
    kept = [(o.options["bias"], slice(0, len(d)), d) for o in flat if o.options["bias"] for d in [rows[f"δ {o.name}"]]]
    if len(parts) == 1:
        kept += [(k, cut, rows[k]) for k, cut in parts[0]]

    def slices() -> Iterator[tuple[str, slice, Tensor]]:
        yield from kept
        for group in parts if len(parts) > 1 else []:
            yield from ((k, cut, j) for (k, cut), j in zip(group, forward(columns, x, group, block), strict=True))

    sent = update_of(client, model, params, buffers, y)(x)
    return Jacobian(sent, outer, slices, x.numel())

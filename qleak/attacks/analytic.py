"""Images read off the first linear layer: every row of its gradient, over its bias gradient, is a mean of inputs.

For z = W x + b of a batch, ∂L/∂W_j = Σ_i δ_ji x_iᵀ and ∂L/∂b_j = Σ_i δ_ji, so W_j/b_j is a weighted mean of the
images: of one image the image itself (Phong et al. 2018). In a ReLU net δ_ji = 0 wherever image i leaves neuron j
passive, so a neuron that one image alone activates gives that image exactly (Fowl et al. 2022 and Boenisch et al.
2023, there helped by the server; here with the weights as they are). Which rows those are is seen without the truth:
weights δ_ji differ from neuron to neuron, so rows that agree belong to a single image, unless they lie between other
such groups: images of one class have almost equal weights, and their mixtures crowd around the middle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from qleak import tree
from qleak.attacks import boxes, labels, objectives, routes
from qleak.catalog import factory
from qleak.check import positive
from qleak.client import View, one_hot
from qleak.models.layers import apply_layer
from qleak.types import Attack, Buffers, Guess, Info, Layer, Params, Status, Tree

PAPERS = (
    "Phong, Aono, Hayashi, Wang, Moriai. Privacy-Preserving Deep Learning via Additively HE. IEEE TIFS 2018.",
    "Fowl, Geiping, Czaja, Goldblum, Goldstein. Robbing the Fed. ICLR 2022.",
    "Boenisch et al. When the Curious Abandon Honesty. EuroS&P 2023.",
)


GROUPS = 4
"""Groups of agreeing rows that are looked at, for every image wanted: mixtures agree by chance."""


class ReadState(NamedTuple):
    """The images and labels read off, and the share of the message that they leave unexplained."""

    x: Tensor
    labels: Tensor
    loss: Tensor
    status: Tensor


class Found(NamedTuple):
    """Images `[b d]` of one message, best supported first, and how many of its rows agree on each `[b]`."""

    x: Tensor
    votes: Tensor


@factory
def analytic(tolerance: float = 1e-4, margin: float = 0.05) -> Attack:
    """The images of a batch by division, for nets that begin with a linear layer on the pixels.

    Rows are grouped by agreement; groups of two and more that are no convex combination of others are images, the
    largest first. Places left over are filled
    with the rows that lie in the range of pixels and differ most from what was found: mixtures, or single images that
    nothing confirms. Labels are solved from the last linear layer. The own loss is ‖u(x̂, ŷ) − decoded‖²/‖decoded‖²,
    1 at worst for an attack that knows nothing.

    Args:
        tolerance: root mean square difference of pixels up to which two rows agree, beyond what the code explains.
        margin: how far outside [0, 1] a pixel of a row may lie, beyond what the code explains.
    """
    positive(tolerance=tolerance, margin=margin)

    def draw(gen: Generator, view: View) -> Tree:
        return {"x": torch.full((view.client.batch, *view.model.shape), 0.5)}  # grey, what it answers without evidence

    def init(view: View, start: Tree) -> ReadState:
        x = start["x"]
        guessed = torch.zeros(len(x), view.client.batch, dtype=torch.int64, device=x.device)
        if view.client.batch == 1:
            inferred = labels.infer(view)
            guessed = guessed if inferred is None else inferred
        active = Status.ACTIVE if view.evidence else Status.FINISHED
        status = torch.full((len(x),), active, dtype=torch.int64, device=x.device)
        return ReadState(x, guessed, x.new_zeros(len(x)), status)

    def step(view: View, state: ReadState) -> tuple[ReadState, Info]:
        if not view.evidence:
            return state, Info(state.loss, state.status)
        x, guessed, loss = read_lanes(view, tolerance, margin)
        state = ReadState(
            x.to(state.x), guessed.to(state.labels), loss.to(state.loss), torch.full_like(state.status, Status.FINISHED)
        )
        return state, Info(state.loss, state.status)

    def read(view: View, state: ReadState) -> Guess:
        return Guess(state.x, state.labels, state.loss)

    return Attack(draw, init, step, read, 1, refuse, PAPERS, restarts=False)


def refuse(view: View) -> str:
    """Why a view cannot be read, naming the layer; "" if it can."""
    if view.client.rows or view.client.steps > 1:
        return "needs the gradient of one batch."
    if view.model.layers is None:
        return "needs a model that declares its layers."
    number, first = next((i, v) for i, v in enumerate(view.model.layers, start=1) if v.kind != "flatten")
    if first.kind != "linear":
        return f"needs a linear layer on the pixels, layer {number} is {first.kind}."
    if view.model.layers[-1].kind != "linear":
        return f"needs a last linear layer, layer {len(view.model.layers)} is {view.model.layers[-1].kind}."
    return ""


def read_lanes(view: View, tolerance: float, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images `[lane b c h w]`, labels `[lane b]` and own loss `[lane]`, in float64; equal messages are read once."""
    assert view.model.layers is not None
    name = first_linear(view.model.layers).name
    rounding = 2 * torch.finfo(next(iter(view.params.values())).dtype).eps
    decoded, error = tree.to(view.decoded(), torch.float64), spread(view)
    params = tree.to(view.params, torch.float64)
    done: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(view.lanes):
        mine = tree.at(decoded, i)
        twin = next((j for j in range(i) if all(torch.equal(v[j], mine[k]) for k, v in decoded.items())), None)
        given = None if view.labels is None else view.labels[i]
        if twin is not None and given is None:
            done.append(done[twin])
            continue
        weight, bias = mine[f"{name}.weight"], mine[f"{name}.bias"]
        noise = [error[f"{name}.{part}"][i].double() + rounding * bias.abs().max() for part in ("weight", "bias")]
        if view.client.batch == 1:
            x = single(weight, bias)[None]
        else:
            x = separate(weight, bias, view.client.batch, tolerance, margin, noise[0], noise[1]).x
        x = x.clamp(0, 1)
        found = solve_labels(view.model.layers, params, view.buffers, x.reshape(-1, *view.model.shape), mine, given)
        images = x.reshape(-1, *view.model.shape)
        wide = view._replace(params=params)
        update = routes.update_of(wide, images, one_hot(found, view.model.classes, torch.float64))
        gap = {k: update[k] - v for k, v in mine.items()}
        done.append((images, found, tree.dot(gap, gap) / tree.dot(mine, mine).clamp(min=1e-300)))
    x, found, loss = (torch.stack(parts) for parts in zip(*done, strict=True))
    return x, found, loss


def first_linear(layers: tuple[Layer, ...]) -> Layer:
    """The first layer with parameters."""
    return next(layer for layer in layers if layer.name)


def spread(view: View) -> Tree:
    """Standard deviation of the decoded numbers, `{name: [lane …]}`: 0 for exact ones, a cell's width/√12 for codes."""
    goal = objectives.goal(view, "cells")
    zero = {k: v.new_zeros(view.lanes, *v.shape) for k, v in view.like.items()}
    if not isinstance(goal, boxes.Box | boxes.Point):
        return zero
    if objectives.is_noisy(view, "cells"):
        return {k: (0.5 / goal.weight[k].clamp(min=1e-38)).sqrt().expand_as(v) for k, v in zero.items()}
    width = {k: (goal.hi[k] - goal.lo[k]) / 12**0.5 for k in zero}
    size = view.decoded()  # open cells: as unsure as the number is large
    return {k: torch.where(v.isfinite(), v, size[k].abs()) for k, v in width.items()}


def single(weight: Tensor, bias: Tensor) -> Tensor:
    """X = Σ_j b_j W_j/Σ_j b_j²: the least-squares image of one example, `[j d]`, `[j] -> [d]`."""
    return bias @ weight / bias.square().sum().clamp(min=1e-300)


def separate(
    weight: Tensor, bias: Tensor, batch: int, tolerance: float, margin: float, noise: Tensor, bias_noise: Tensor
) -> Found:
    """`batch` images from the rows of a weight gradient `[j d]` and its bias gradient `[j]`.

    A row is as sure as its bias gradient is large: an error ε in W_j and b_j moves W_j/b_j by about ε/|b_j|. Rows
    with |b_j| not above that error are left out.

    Args:
        weight: ∂L/∂W.
        bias: ∂L/∂b.
        batch: images wanted; missing ones repeat the mean of all.
        tolerance: see `analytic`.
        margin: see `analytic`.
        noise: standard deviation of ∂L/∂W `[j d]`.
        bias_noise: standard deviation of ∂L/∂b `[j]`.
    """
    mean = single(weight, bias)
    sure = torch.nonzero(bias.abs() > (3 * bias_noise).clamp(min=1e-300))[:, 0]
    if not len(sure):
        return Found(mean.expand(batch, -1), torch.zeros(batch, dtype=torch.int64))
    rows, b = weight[sure] / bias[sure, None], bias[sure]
    # the image itself is at most 1, so the bias gradient's error counts once for every pixel
    sigma = (noise[sure].square().mean(1) + bias_noise[sure].square()).sqrt() / b.abs()
    slack = margin + 3 * sigma
    inside = ((rows >= -slack[:, None]) & (rows <= 1 + slack[:, None])).all(1)
    rows, sigma = rows[inside], sigma[inside]
    if not len(rows):
        return Found(mean.expand(batch, -1), torch.zeros(batch, dtype=torch.int64))
    distance = torch.cdist(rows, rows) / rows.shape[1] ** 0.5
    limit = tolerance + 1.5 * (sigma[:, None].square() + sigma.square()).sqrt()
    agree = distance <= limit
    found, error = _groups(rows, agree, (sigma.square() + tolerance**2).rsqrt(), GROUPS * batch)
    found = _vertices(found, error, batch)
    return _filled(found, rows, sigma, mean, batch)


def _groups(rows: Tensor, agree: Tensor, sure: Tensor, most: int) -> tuple[Found, Tensor]:
    """Largest groups of agreeing rows, at least two rows each, at most `most`: weighted means, and their errors.

    Greedy: the row with most agreement first, then without the rows it explains. Surer rows break ties.
    """
    left = torch.ones(len(rows), dtype=torch.bool)
    images, votes, error = [rows[:0]], [], []
    while len(votes) < most:
        count = (agree & left).sum(1) * left
        best = int((count + 0.5 * sure / sure.max()).mul(left).argmax())
        if int(count[best]) < 2:
            break
        share = sure.square() * (agree[best] & left)
        images.append((share @ rows / share.sum())[None])
        votes.append(int(count[best]))
        error.append(float(1 / sure[agree[best] & left].max()))
        left &= ~agree[best]
    return Found(torch.cat(images), torch.tensor(votes, dtype=torch.int64)), torch.tensor(error)


def _vertices(found: Found, error: Tensor, batch: int) -> Found:
    """Without the groups between others (convex combinations up to 3 errors), the smallest looked at first."""
    from scipy.optimize import nnls

    keep = list(range(len(found.x)))
    for i in sorted(keep, key=lambda i: int(found.votes[i])):
        others = [k for k in keep if k != i]
        if len(others) < 2:
            break
        heavy = 10 * rms(found.x)  # weights that sum to 1, as one more equation
        system = torch.cat([found.x[others].mT, torch.full((1, len(others)), heavy)])
        goal = torch.cat([found.x[i], torch.tensor([heavy])])
        _, missed = nnls(system.numpy(), goal.numpy())
        if missed / found.x.shape[1] ** 0.5 < 3 * float(error[i]):
            keep.remove(i)
    keep = keep[:batch]
    return Found(found.x[keep], found.votes[keep])


def rms(x: Tensor) -> float:
    """Norm of a typical row, so that one equation weighs like all pixels."""
    return float(x.square().sum(1).mean().sqrt())


def _filled(found: Found, rows: Tensor, sigma: Tensor, mean: Tensor, batch: int) -> Found:
    """Places left over, one by one, from the row that differs most from everything chosen, counted in its own error."""
    x = found.x
    while len(x) < batch:
        others = torch.cat([mean[None], x])
        far = torch.cdist(rows, others).amin(1) / rows.shape[1] ** 0.5
        best = int((far - 3 * sigma).argmax())
        x = torch.cat([x, rows[best][None]])
    votes = torch.cat([found.votes, found.votes.new_ones(batch - len(found.votes))])
    return Found(x, votes)


def solve_labels(
    layers: tuple[Layer, ...], params: Params, buffers: Buffers, x: Tensor, update: Tree, given: Tensor | None = None
) -> Tensor:
    """Labels `[b]` of images, in their order, from the last linear layer's gradient.

    ∂L/∂W = Σ_i e_i h_iᵀ and ∂L/∂b = Σ_i e_i with e_i = (p_i − y_i)/b. The features h_i and probabilities p_i follow from
    the images, so the errors are the least-squares solution of a linear system, and y_i = p_i − b·e_i. Labels that are
    given (in unknown order) are dealt out so that these scores sum to the most.
    """
    h = x
    for layer in layers[:-1]:
        h = apply_layer(layer, params, h, buffers)
    last = layers[-1].name
    system = torch.cat([h, h.new_ones(len(h), 1)], 1)  # [b d+1]
    goal = torch.cat([update[f"{last}.weight"], update[f"{last}.bias"][:, None]], 1)  # [class d+1]
    error = torch.linalg.pinv(system.mT, rtol=1e-9) @ goal.mT  # [b class]
    logits = F.linear(h, params[f"{last}.weight"], params[f"{last}.bias"])
    score = torch.softmax(logits, -1) - len(x) * error
    if given is None:
        return score.argmax(-1)
    from scipy.optimize import linear_sum_assignment

    _, order = linear_sum_assignment(-score[:, given].numpy())
    return given[torch.from_numpy(order)]

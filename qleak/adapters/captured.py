"""From what an auditor has (an update, a model, perhaps weights and the truth) to a plan and what the run folder holds."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak import random, tree
from qleak.adapters import attackers, given, inference, matching, self_check
from qleak.adapters.given import Request
from qleak.adapters.self_check import Checked
from qleak.adapters.structure import images
from qleak.catalog import build
from qleak.channels import Channel
from qleak.check import Expected
from qleak.client import View, local_sgd
from qleak.metrics import Secret
from qleak.models.adapted import adapted
from qleak.plans import Captured, label
from qleak.types import Buffers, Client, Message, Model, Params, Tree


class Ready(NamedTuple):
    """A plan, the tensors behind it, and what the report tells of how they were found (plain values)."""

    plan: Captured
    update: Tree
    params: Params
    buffers: Buffers
    message: Message
    truth: Secret | None
    about: dict[str, Any]


def prepared(ask: Request) -> Ready:
    """Reads, matches, infers, checks, and plans; nothing is attacked yet.

    Raises:
        Expected: anything that does not fit, in one line.
    """
    update_file, weights_file = given.read(ask.update), None if ask.weights is None else given.read(ask.weights)
    model = given.model_of(ask)
    params, buffers = model.init(random.generator(ask.seed, "params"))
    if weights_file is not None:
        params, buffers = given.weights_of(weights_file, params, buffers)
    matched = matching.match(update_file, params, buffers)
    update = {k: matched.update[k].float() for k in params if k in matched.update}
    notes = [*matched.notes, *given.held(weights_file, buffers)]
    if matched.missing:
        model = adapted(model, held=tuple(matched.missing))
        params, buffers = {k: params[k] for k in update}, buffers | {k: params[k] for k in matched.missing}
    if not any(bool(v.any()) for v in update.values()):
        raise Expected("Expected an update with a number other than zero: nothing was sent.")
    channel, message, about_channel = _channel(ask.channel, update)
    bounds = _bounds(channel, about_channel["note"], update, model)
    known = None if ask.truth is None else given.truth_of(ask.truth, model.shape)
    batch = ask.batch or (len(known.x) if known else len(ask.labels) or max(1, bounds.least))
    client = given.client_of(ask, batch)
    if known is not None and len(known.x) != client.batch:
        raise Expected(f"Expected {client.batch} images of truth, one for each of the batch, got {len(known.x)}.")
    if bounds.least > client.batch:
        notes.append(
            f"The update proves at least {images(bounds.least)}, more than the {client.batch} assumed: give --batch."
        )
    guessed = _guessed(model, params, buffers, channel, client, message, ask.labels)
    told, right = None, None
    if known is not None:
        half = update_file.meta.get("dtype", "float32") in ("float16", "bfloat16")
        checked = self_check.self_check(model, params, buffers, client, channel, update, known, guessed, half)
        told = _told(checked, client)
        right = known.y if known.y is not None else guessed
        if (fit := checked.fit) is not None:
            model, buffers = self_check.applied(fit, model, buffers)
            if fit.labels != tuple(right.tolist()):
                right = torch.tensor(fit.labels)
            if abs(fit.factor - 1) > self_check.ONE:
                client, update, flipped = _rescaled(client, update, fit.factor)
                if flipped:
                    channel, message, about_channel = _channel(about_channel["channel"] or "chain()", update)
    secret = None if known is None or right is None else Secret(known.x, right)
    digest = _digest(update, params, buffers, secret)
    attacks, restarts, why = attackers.choose(model, client, channel, ask.attacks, ask.restarts)
    plan = Captured(
        model, digest, (channel,), attacks, client, tuple(ask.labels), restarts, 2, float(ask.budget), float(ask.success), ask.seed
    )  # fmt: skip
    plan, paced = attackers.fitted(plan, params, buffers, message, bool(ask.attacks), bool(ask.restarts))
    lines = [{**n._asdict(), "shape": list(n.shape), "found_shape": list(n.found_shape)} for n in matched.lines]
    about = {
        "match": {
            "kind": update_file.kind, "lines": lines, "missing": list(matched.missing), "notes": notes,
            "dtype": update_file.meta.get("dtype", "float32"), "numbers": tree.count(update), "of": tree.count(params),
        },
        "channel": about_channel,
        "batch": {
            "used": client.batch, "least": bounds.least, "most": bounds.most, "reasons": bounds.reasons,
            "given": bool(ask.batch),
        },
        "self_check": told,
        "weights": "given" if ask.weights is not None else "the model's own initialisation",
        "choices": [why, *paced],
    }  # fmt: skip
    return Ready(plan, update, params, buffers, message, secret, about)


def _rescaled(client: Client, update: Tree, factor: float) -> tuple[Client, Tree, bool]:
    """The client whose mean gradient is multiplied by the factor that was found, and the update with its sign."""
    if factor < 0:
        update = tree.scale(update, -1.0)
    if client.steps != 1:  # a path of steps has no factor of its own: the numbers are divided instead
        return client, tree.scale(update, 1 / abs(factor)), True
    return local_sgd(steps=1, batch=client.batch, lr=client.scale * abs(factor)), update, factor < 0


def _channel(text: str, update: Tree) -> tuple[Channel, Message, dict[str, Any]]:
    """The channel as given or as inferred, and the message it gives; plain numbers where its codes cannot be rebuilt."""
    about: dict[str, Any] = {
        "given": text != "auto",
        "certainty": "given",
        "reasons": [],
        "alternatives": [],
        "note": "",
    }
    spec = text
    if text == "auto":
        found = inference.infer(update)
        spec = found.channel
        about |= {
            "certainty": found.certainty,
            "reasons": found.reasons,
            "alternatives": found.alternatives,
            "family": found.family,
        }
    exact = build("channels", "chain()")
    message = None
    channel = exact
    if spec and spec not in ("chain()", "identity", "identity()"):
        channel = build("channels", spec)
        channel = channel if isinstance(channel, Channel) else build("channels", f"chain({channel.spec})")
        try:
            message = inference.encode(channel, update)
            if message is None:
                raise Expected("its codes cannot be rebuilt")
        except Expected as error:
            about["note"] = (
                f"The codes of {label(channel.spec)} could not be rebuilt ({str(error).rstrip('.')}): read as plain numbers."
            )
            channel, message = exact, None
    if message is None:
        message = exact.send(
            exact.knobs(), update, exact.draw(random.generator("exact"), update), exact.init(update), update
        )[0][-1]
    return channel, message, about | {"channel": spec, "used": label(channel.spec)}


def _bounds(channel: Channel, note: str, update: Tree, model: Model) -> inference.Batch:
    """Bounds of the batch; behind a coarse code there are none, as ranks and signs are those of its rounding errors."""
    if channel.stages or note:
        return inference.Batch(
            1, None, ["no bound: behind a coarse code, ranks and signs are those of its rounding errors"]
        )
    return inference.batch_bounds(update, model)


def _guessed(
    model: Model, params: Params, buffers: Buffers, channel: Channel, client: Client, message: Message, labels_given: tuple[int, ...]
) -> Tensor:  # fmt: skip
    """Labels `[b]` as an attack infers them from the message, zeros where none can be read."""
    from qleak.attacks import labels

    if labels_given:
        return torch.tensor(labels_given)
    lane = tree.nested_map(lambda v: v[None], message)
    try:
        found = labels.infer(View(model, params, buffers, channel, client, lane))
    except (Expected, RuntimeError):
        found = None
    return torch.zeros(client.batch, dtype=torch.int64) if found is None else found[0]


def _told(checked: Checked, client: Client) -> dict[str, Any]:
    fit = checked.fit
    said = self_check.factor_said(fit, client.batch, client.scale, client.steps) if fit else ""
    return {
        "readings": [r._asdict() for r in checked.readings],
        "fits": None if fit is None else fit.name,
        "as_described": bool(fit and fit.name == self_check.PLAIN and not said),
        "factor": None if fit is None else fit.factor, "factor_means": said,
    }  # fmt: skip


def _digest(update: Tree, params: Params, buffers: Buffers, secret: Secret | None) -> str:
    made = hashlib.blake2b(digest_size=8)
    for part in (update, params, buffers, secret._asdict() if secret else {}):
        for name, value in part.items():
            made.update(name.encode())
            made.update(value.detach().cpu().contiguous().numpy().tobytes())
    return made.hexdigest()

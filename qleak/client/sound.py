"""Whether a channel's guarantee holds for what a client sends: reasons why it does not, in words."""

from __future__ import annotations

from qleak.channels import Channel
from qleak.check import Expected
from qleak.types import Client, Model

SEPARATE = "take norm='group', or public_norm(model, mode='public-detached'), whose statistics are those of public images alone"
NATURAL = Client.__dataclass_fields__["prepare"].default


def coupled(client: Client, model: Model) -> str:
    """Why clipping the client's rows bounds no example's share under this model; "" where it does.

    Rows of one example each, or of images that were prepared together, must not depend on other rows' images. A crowd's
    rows are whole clients, each with its own batch: there a model may couple the images of one.
    """
    if not client.rows or not model.couples:
        return ""
    if client.count == client.batch:
        return f"{model.couples}, so that an example's gradient is not its own"
    if client.prepare is not NATURAL:
        return f"{model.couples}, so that adversarial images are made of all rows together"
    return ""


def reasons(client: Client, model: Model, sampling: str = "") -> list[str]:
    """Everything that stands between this client and a guarantee, channel apart."""
    found = [client.unsound, coupled(client, model)]
    if client.claimed and sampling == "replacement":
        found.append("batches drawn with replacement are counted as Poisson samples")
    elif client.claimed and sampling == "shuffle":
        found.append("shuffled batches are counted as Poisson samples")
    return [reason for reason in found if reason]


def guard(client: Client, model: Model, channels: tuple[Channel, ...]) -> None:
    """Refuses a channel that promises an ε behind a client that cannot have it.

    Raises:
        Expected: with the reason, and what to do instead.
    """
    why = client.unsound or coupled(client, model)
    if not why:
        return
    for channel in channels:
        if channel.facts().event is not None:
            fix = "take per_example(…) in its place" if client.unsound else SEPARATE
            raise Expected(f"Expected no ε of {channel.spec}, there is no guarantee: {why}. To have one, {fix}.")

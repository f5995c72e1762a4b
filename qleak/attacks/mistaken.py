"""An attacker who is mistaken about the client: the control that says what simulating local steps is worth."""

from __future__ import annotations

from dataclasses import replace

from torch import Generator

from qleak.attacks.cells import cells
from qleak.catalog import factory
from qleak.client import View, as_one_gradient
from qleak.types import Attack, Tree


@factory
def one_gradient(attack: Attack | None = None) -> Attack:
    """`attack` (`cells()` by default) with every update taken for one mean gradient times the sum of its step lengths.

    What single-step attacks do on federated averaging: right for K = 1, wrong by the client's drift
    for more.
    """
    inner = attack or cells()

    def seen(view: View) -> View:
        return view._replace(client=as_one_gradient(view.client))

    def applies(view: View) -> str:
        return "needs a client with one update." if view.client.rows else inner.applies(seen(view))

    def draw(gen: Generator, view: View) -> Tree:
        return inner.draw(gen, seen(view))

    return replace(
        inner,
        draw=draw,
        init=lambda view, start: inner.init(seen(view), start),
        step=lambda view, state: inner.step(seen(view), state),
        read=lambda view, state: inner.read(seen(view), state),
        applies=applies,
    )

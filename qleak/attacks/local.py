"""Updates of several local steps: the order of their images searched for, or the steps mistaken for one."""

from __future__ import annotations

from dataclasses import replace

from torch import Generator

from qleak.attacks.cells import cells
from qleak.attacks.group import grouped
from qleak.catalog import factory
from qleak.check import at_least, whole
from qleak.client import View, as_one_gradient
from qleak.types import Attack, Tree


@factory
def any_order(attack: Attack | None = None, orders: int = 24, screen: int = 25) -> Attack:
    """`attack` (`cells()` by default) from several random orders of the inferred labels; the likeliest goes on alone.

    The update tells which labels a client holds, not which of its steps saw them. An order that is wrong cannot
    explain the update, which shows in the own loss after a few closures. Simulating the steps is
    Geiping et al. (2020), section 5.2, where labels and order are given.

    Args:
        attack: what to run, simulating the client's steps.
        orders: orders tried.
        screen: closures after which the one of lowest own loss is kept.
    """
    whole(orders=orders, screen=screen)
    at_least(1, orders=orders, screen=screen)
    return grouped(attack or cells(), orders, ((screen, 1),))


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

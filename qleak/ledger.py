"""What was released, written down: enough to compute ε again later, with any accountant.

A ledger is a list of entries in plain numbers. It travels as JSON inside a checkpoint, so a run that
goes on keeps its past, and a better accountant can look at it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from qleak import check
from qleak.accounting import ADJACENCY, Epsilons, both, event
from qleak.check import Expected

SCHEMA = 1


class Entry(NamedTuple):
    """`releases` releases of one mechanism.

    Attributes:
        mechanism: "gaussian" or "laplace".
        sigma: noise multiplier: noise scale / sensitivity under `adjacency`.
        rate: Poisson sampling rate in (0, 1]; 1 means that all take part.
        releases: how many, >= 1.
        adjacency: which data sets are neighbours: what `sigma`'s sensitivity was taken over.
        unit: what one data set has more than its neighbour: "example", "client", …
    """

    mechanism: str
    sigma: float
    rate: float
    releases: int
    adjacency: str = ADJACENCY
    unit: str = "example"


class Ledger(NamedTuple):
    """Entries in the order of their releases."""

    entries: tuple[Entry, ...] = ()


def record(ledger: Ledger, entry: Entry) -> Ledger:
    """The ledger with one more entry; releases of the same kind as the last entry's are counted there.

    Raises:
        Expected: a value out of range, or an adjacency or unit that differs from the ledger's: ε of
            different neighbourhoods does not add up.
    """
    event(entry.mechanism, entry.sigma, entry.rate)
    check.whole(releases=entry.releases)
    check.at_least(1, releases=entry.releases)
    check.one_of((ADJACENCY, "replace-one"), adjacency=entry.adjacency)
    if not isinstance(entry.unit, str) or not entry.unit:
        raise Expected(f"Expected unit={entry.unit!r} to be a word such as 'example' or 'client'.")
    if not ledger.entries:
        return Ledger((entry,))
    last = ledger.entries[-1]
    if (last.adjacency, last.unit) != (entry.adjacency, entry.unit):
        raise Expected(
            f"Expected one adjacency and unit a ledger, got {last.adjacency} of one {last.unit} "
            f"and {entry.adjacency} of one {entry.unit}."
        )
    if last._replace(releases=0) == entry._replace(releases=0):
        return Ledger((*ledger.entries[:-1], last._replace(releases=last.releases + entry.releases)))
    return Ledger((*ledger.entries, entry))


def record_event(
    ledger: Ledger, privacy: Any, releases: int = 1, adjacency: str = ADJACENCY, unit: str = "example"
) -> Ledger:
    """`record` of `releases` releases of a `dp_accounting.DpEvent`: noise, sampled or not, and compositions.

    Raises:
        Expected: an event of another kind, None included; whatever `record` refuses.
    """
    for mechanism, sigma, rate, count in _plain(privacy):
        ledger = record(ledger, Entry(mechanism, sigma, rate, releases * count, adjacency, unit))
    return ledger


def composed(ledger: Ledger) -> Any:
    """The whole ledger as one `dp_accounting.ComposedDpEvent`."""
    import dp_accounting as dp

    return dp.ComposedDpEvent(
        [dp.SelfComposedDpEvent(event(e.mechanism, e.sigma, e.rate), e.releases) for e in ledger.entries]
    )


def spent(ledger: Ledger, delta: float = 1e-5) -> Epsilons:
    """ε of everything in the ledger at δ; 0 of an empty one."""
    return both(composed(ledger), delta) if ledger.entries else Epsilons(0.0, 0.0, 0.0, 0.0)


def to_json(ledger: Ledger) -> str:
    """`{"schema": 1, "entries": [{"mechanism": …, "sigma": …, …}, …]}`."""
    return json.dumps({"schema": SCHEMA, "entries": [e._asdict() for e in ledger.entries]})


def from_json(text: str) -> Ledger:
    """The ledger that `to_json` wrote, checked entry by entry.

    Raises:
        Expected: text that is no ledger of this schema, or an entry that `record` refuses.
    """
    try:
        written = json.loads(text)
        if written["schema"] != SCHEMA:
            raise Expected(f"Expected a ledger of schema {SCHEMA}, got {written['schema']!r}.")
        entries = [Entry(**e) for e in written["entries"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise Expected(f"Expected a ledger's JSON, got {text[:60]!r}.") from error
    ledger = Ledger()
    for entry in entries:
        ledger = record(ledger, entry)
    return ledger


def _plain(privacy: Any) -> Iterator[tuple[str, float, float, int]]:
    """(mechanism, σ, rate, count) of every release an event is made of."""
    import dp_accounting as dp

    match privacy:
        case dp.GaussianDpEvent(noise_multiplier=sigma):
            yield "gaussian", float(sigma), 1.0, 1
        case dp.LaplaceDpEvent(noise_multiplier=scale):
            yield "laplace", float(scale), 1.0, 1
        case dp.PoissonSampledDpEvent(
            sampling_probability=rate, event=dp.GaussianDpEvent() | dp.LaplaceDpEvent() as inner
        ):
            ((mechanism, sigma, _, _),) = _plain(inner)
            yield mechanism, sigma, float(rate), 1
        case dp.SelfComposedDpEvent(event=inner, count=count):
            parts = list(_plain(inner))

            yield from ((mechanism, sigma, rate, n * count) for mechanism, sigma, rate, n in parts)
        case dp.ComposedDpEvent(events=events):
            for inner in events:
                yield from _plain(inner)
        case _:
            raise Expected(f"Expected an event of Gaussian or Laplace noise, Poisson-sampled or not, got {privacy}.")

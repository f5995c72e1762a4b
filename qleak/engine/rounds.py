"""Audits inside a training run: what leaks from the weights of chosen rounds, through the same channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qleak import store as stores
from qleak.check import Expected
from qleak.engine import audit
from qleak.engine.events import Event, Rows, Step
from qleak.looks import NONE, Looks
from qleak.models.stored import stored
from qleak.plans import Audit, Training
from qleak.pool import Workers
from qleak.store import Run


def plan_of(plan: Training, store: Run, channel: int, number: int) -> Audit:
    """The audit of round `number` (from 1) behind one channel: the weights the round began with, the first victims."""
    model = stored(str(store.folder / "models" / f"{channel}-0-round-{number}.safetensors"))
    return Audit(
        model, plan.data, tuple(i * plan.client.batch for i in range(plan.victims)), (plan.channels[channel],),
        plan.attacks, plan.client, seed=plan.seed, dtype=plan.dtype, delta=plan.delta,
    )  # fmt: skip


def audits(plan: Training, store: Run, device: str, workers: Workers = 1, look: Looks = NONE) -> Iterator[Event]:
    """Runs the audits of the first seed of every channel, each in a run folder of its own below `audits/`.

    Their rows are the run's rows too, with kind "audit" and the round.
    """
    for channel in range(len(plan.channels)):
        for number in plan.attack_rounds:
            name = f"{channel}-0-round-{number}"
            if not (store.folder / "models" / f"{name}.safetensors").is_file():
                continue  # a round that was never reached
            mine = plan_of(plan, store, channel, number)
            folder = store.folder / "audits" / name
            other = (folder / "run.json").is_file() and stores.read_run(folder).get("plan_id") != mine.id
            with stores.open_run(folder, mine.header(), fresh=other) as inner:  # other: the training was started over
                try:
                    for event in audit.run(mine, inner, device, workers, look):
                        if isinstance(event, Step):
                            yield event._replace(key=f"audit-{name}-{event.key}", label=f"round {number} {event.label}")
                except Expected as error:  # no attack applies here: said, and the training stands
                    refused = {"channel": plan.labels()[channel], "attack": "all", "reason": f"round {number}: {error}"}
                    store.update(refused=[*store.header.get("refused", []), refused])
                rows = inner.rows()
            fresh = [_row(r, channel, number) for r in rows]
            done = store.done()
            fresh = [r for r in fresh if r["key"] not in done]
            if fresh:
                store.append(fresh)
                yield Rows(fresh)


def _row(row: dict[str, Any], channel: int, number: int) -> dict[str, Any]:
    return row | {"key": f"audit-{channel}-0-{number}-{row['key']}", "kind": "audit", "round": number}

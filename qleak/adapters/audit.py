"""`qleak.audit`: an honest verdict on one captured update, from Python; the command line goes through `run` as well."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qleak import engine, machine, store
from qleak.adapters import captured
from qleak.adapters.given import Request, request_id
from qleak.catalog import short
from qleak.check import Expected, one_of
from qleak.engine import bounds as beside
from qleak.engine import captured as work
from qleak.plans import from_json
from qleak.plans.audit import BOUNDS
from qleak.report import captured as said
from qleak.report import html
from qleak.report.captured_document import document as documented


@dataclass(frozen=True)
class Report:
    """What an audit found; shown as a page of its own in a notebook.

    Attributes:
        verdict: "images rebuilt", "partly" or "nothing found (not a proof)".
        sentence: the verdict with what it rests on.
        rows: one dict a lane: attack, control, residual, agreement, and with the truth psnr and ssim.
        images: the best guess, `[b c h w]` in [0, 1].
        document: everything as plain values, schema "qleak.audit/1" (docs/audit-your-own.md).
        folder: the run folder; a temporary one, gone with the report, unless it was named.
    """

    verdict: str
    sentence: str
    rows: list[dict[str, Any]]
    images: Tensor
    document: dict[str, Any]
    folder: Path

    def save(self, folder: str | Path) -> Path:
        """Copies the run folder, report.html included.

        Raises:
            Expected: something is there already.
        """
        target = Path(folder).expanduser()
        if target.exists():
            raise Expected(f"Expected no folder at {target} yet: name another one.")
        shutil.copytree(self.folder, target, ignore=shutil.ignore_patterns(".lock"))
        html.write(target, target / "report.html")
        return target

    def _repr_html_(self) -> str:
        """The report's page in a frame, so that its style stays its own."""
        from html import escape

        page = (self.folder / "report.html").read_text(encoding="utf-8")
        return f'<iframe srcdoc="{escape(page, quote=True)}" style="width:100%;height:40rem;border:0"></iframe>'

    def __str__(self) -> str:
        return self.sentence


def audit(
    update: Any,
    model: Any,
    params: Any = None,
    *,
    truth: Any = None,
    channel: str = "auto",
    batch: int = 1,
    client: str = "gradient",
    scale: float = 1.0,
    labels: tuple[int, ...] = (),
    shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    normalise: str = "",
    mode: str = "",
    attacks: str = "",
    restarts: int = 0,
    budget: float = 60.0,
    success: float = 20.0,
    seed: int = 0,
    workers: int = 1,
    bounds: str = "auto",
    folder: str | Path | None = None,
) -> Report:
    """Attacks one captured update within a budget of CPU seconds, with controls, and says what the result rests on.

    Args:
        update: a file, a dict of tensors by parameter name, or a list in the order of the parameters.
        model: an `nn.Module`, a qleak `Model`, or its spec as text, such as "lenet(classes=10)" or "net.py:Net".
        params: the weights the update was computed at: a state dict or a file; the model's own when not given.
        truth: the images, where the auditor has them: `x`, `(x, y)`, or what `--truth` takes.
        channel: a spec such as "uniform(levels=256)"; "auto" infers it from the numbers.
        batch: number of images; 0: as many as the update proves, or as the truth has.
        client: "gradient" or "local_sgd(…)".
        scale: update = scale · mean gradient: a learning rate, or the batch size of a summed loss.
        labels: where they are known; inferred otherwise.
        shape: (c, h, w) of an image, for modules.
        classes: number of logits, for modules given as text.
        normalise: "imagenet", "cifar10", "cifar100", "mnist" or "half": what images go through in front of the model.
        mode: batch norms by running statistics ("eval") or by the batch ("train").
        attacks: specs separated by ";" in place of the choice made here.
        restarts: random starts; 0: four, or as many as the budget holds.
        budget: CPU seconds of all attacks together.
        success: dB from which two pictures count as the same.
        seed: root of every draw.
        workers: processes; a module that lives in this process only needs 1.
        bounds: with the truth, what no attacker can beat: "yes", "no" or "auto", where it takes seconds.
        folder: the run folder; a temporary one when not given.

    Raises:
        Expected: anything that does not fit, in one line.
    """
    one_of(BOUNDS, bounds=bounds)
    ask = Request(
        update, model, params, shape, classes, mode, normalise, client, scale, batch, channel, tuple(labels), truth, attacks,
        restarts, budget, success, seed,
    )  # fmt: skip
    made = "" if folder else tempfile.mkdtemp(prefix="qleak-audit-")
    target = Path(folder).expanduser() if folder else Path(made) / "audit"
    with opened(ask, target, {}, workers=workers) as (plan, run):
        for _ in engine.run(plan, run, "cpu", workers):
            pass
        if beside.due(plan, run, bounds)[0]:
            for _ in beside.beside(plan, run):
                pass
    html.write(target, target / "report.html")
    found = report(target)
    if made:
        weakref.finalize(found, shutil.rmtree, made, ignore_errors=True)
    return found


def report(folder: Path) -> Report:
    """The report of a finished run.

    Raises:
        Expected: there is no run of a captured update, or it is not finished.
    """
    found = said.load(folder)
    document = documented(found)
    return Report(document["verdict"], document["sentence"], found.rows, found.images(), document, folder)


@contextmanager
def opened(
    ask: Request, folder: Path, flags: dict[str, Any], workers: int = 1, fresh: bool = False,
    tell: Callable[[Any, list[str]], None] = lambda plan, reasons: None,
) -> Iterator[tuple[Any, store.Run]]:  # fmt: skip
    """The run folder of a request, open, with its plan: the one it holds, or a new one with everything it needs.

    A plan of `cells` depends on how fast the machine is, so a run goes on with the plan it began with.
    """
    asked, ready = request_id(ask), None
    header = {} if fresh or not (folder / "run.json").exists() else store.read_run(folder)
    if header.get("request") == asked and (folder / "tensors" / "captured.safetensors").exists():
        plan = from_json(header["plan"])
        reasons = list(header.get("choices") or [])
    else:
        ready = captured.prepared(ask)
        fresh = fresh or header.get("request") == asked  # killed before it held the update: nothing was done
        plan = ready.plan
        _, _, placed = machine.place("cpu", workers)
        reasons = [*placed, *ready.about["choices"], *engine.choices(plan)]
        header = {
            **plan.header("audit", flags), "request": asked, "choices": reasons, "workers": workers, "device": "cpu",
            "asked": {"update": _named(ask.update), "model": short(plan.model.spec), "truth": _named(ask.truth)},
            **{k: v for k, v in ready.about.items() if k != "choices"}, **machine.describe(),
        }  # fmt: skip
    tell(plan, reasons)
    with store.open_run(folder, header, fresh=fresh) as run:
        if ready is not None:
            work.hold(run, ready.update, ready.params, ready.buffers, ready.message, ready.truth)
        try:
            yield plan, run
        except KeyboardInterrupt:
            run.update(status="interrupted")
            raise
        except BaseException as error:
            run.update(status="failed", error=f"{type(error).__name__}: {error}")
            raise


def _named(given: Any) -> str:
    """A file's name or a text as it was given; what kind of object it was otherwise."""
    if isinstance(given, str | Path):
        return Path(given).name if Path(given).suffix else str(given)
    return "" if given is None else f"a {type(given).__name__} in memory"

"""Leakage against usefulness: audits and trainings of the same channels, joined from their folders alone.

A point is a channel. Its privacy is the PSNR of the strongest attack that was run on it, its use the test accuracy that
a model reaches through it. A channel that only one side knows stays, with gaps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qleak import store
from qleak.catalog import short

PLAIN = ("dlg", "idlg")


class Point(NamedTuple):
    """One channel. PSNR in dB, bits a coordinate of one uplink message, intervals at 95 %, None where nothing is known.

    Attributes:
        channel: its label, which joins the runs.
        models: what was attacked and trained, each once, short.
        data: the data sets, each once.
        bits: sent per coordinate, side information included; a training's number before an audit's.
        bits_entropy: the same with an entropy code behind it.
        epsilon: of the whole training where there is one, else of the messages that an audit attacked.
        attack: the strongest: highest mean PSNR over images of the restart that its own loss selects.
        psnr: that mean; `psnr_ci` its interval over images.
        ssim: mean SSIM of the same guesses.
        recovered: how many of its `images` it rebuilt.
        control: PSNR of the strongest control of that attack, which shows nothing but the prior.
        plain: the attacker of the first papers (dlg, else idlg, else one that minimises the l2 distance), on the
            model and data of the strongest.
        psnr_plain: its PSNR.
        psnr_oracle: highest over these attacks, restarts chosen by the truth, which no attacker can.
        test_accuracy: mean over seeds in [0, 1]; so is `train_accuracy`.
        seeds: trainings, of which `diverged` diverged.
        label_accuracy: share of labels that attack found, over the same images.
        epsilon_message: of the one message that the audits attacked; `epsilon` composes those of a training.
        front: no other point has at least its accuracy and at most its PSNR, and one of them strictly.
    """

    channel: str
    models: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    bits: float | None = None
    bits_entropy: float | None = None
    epsilon: float | None = None
    attack: str | None = None
    psnr: float | None = None
    psnr_ci: tuple[float, float] | None = None
    ssim: float | None = None
    recovered: int | None = None
    images: int | None = None
    control: float | None = None
    plain: str | None = None
    psnr_plain: float | None = None
    psnr_oracle: float | None = None
    test_accuracy: float | None = None
    test_accuracy_ci: tuple[float, float] | None = None
    train_accuracy: float | None = None
    train_accuracy_ci: tuple[float, float] | None = None
    seeds: int | None = None
    diverged: int | None = None
    front: bool = False
    label_accuracy: float | None = None
    epsilon_message: float | None = None


class Part(NamedTuple):
    """A run that was read: where, and its run.json."""

    folder: Path
    header: dict[str, Any]


def join(folders: Iterable[Path]) -> list[Point]:
    """One point per channel label, by bits from many to few, then by name.

    Of several audits the strongest attack counts, of several trainings of one channel the first given.

    Raises:
        Expected: a folder holds no run, or a damaged one.
    """
    return join_parts(parts(folders))


def parts(folders: Iterable[Path]) -> list[Part]:
    """The runs in `folders`, each once; a study stands for its parts, as far as they exist.

    Raises:
        Expected: a folder holds no run, or a damaged one.
    """
    found: dict[Path, Part] = {}
    for folder in folders:
        header = store.read_run(folder)
        if header.get("kind") == "study":
            below = [folder / part["folder"] for part in header.get("parts") or []]
            for part in parts(path for path in below if (path / "run.json").is_file()):
                found.setdefault(part.folder.resolve(), part)
        else:
            found.setdefault(folder.resolve(), Part(folder, header))
    return list(found.values())


def join_parts(runs: Sequence[Part]) -> list[Point]:
    """`join` of runs that have been read."""
    lines: dict[str, tuple[list[Any], list[Any]]] = {}
    for run in runs:
        kind = run.header.get("kind")
        for s in run.header.get("summary") or []:
            if kind in ("audit", "training"):
                lines.setdefault(s["channel"], ([], []))[kind == "training"].append((run, s))
    points = [_point(channel, audits, trainings) for channel, (audits, trainings) in lines.items()]
    front = pareto(points)
    points = [p._replace(front=p.channel in front) for p in points]
    return sorted(points, key=lambda p: (-(p.bits if p.bits is not None else -1.0), p.channel))


def pareto(points: Sequence[Point]) -> set[str]:
    """Channels that no other beats: most accurate for their PSNR. Points with a gap take no part."""
    known = [(p.channel, p.test_accuracy, p.psnr) for p in points if p.test_accuracy is not None and p.psnr is not None]
    beaten = {
        channel
        for channel, accuracy, psnr in known
        for _, other, leak in known
        if other >= accuracy and leak <= psnr and (other > accuracy or leak < psnr)
    }
    return {channel for channel, _, _ in known} - beaten


def notes(runs: Sequence[Part]) -> list[str]:
    """What a reader of the joined table must know: what differs between the runs, and what is missing."""
    said = []
    for what, values in (("models", _model), ("data sets", _data)):
        groups: dict[str, list[str]] = {}
        for run in runs:
            groups.setdefault(values(run), []).append(name(run))
        if len(groups) > 1:
            listed = "; ".join(f"{value} ({', '.join(names)})" for value, names in groups.items())
            said.append(f"The runs differ in their {what}, compare with care: {listed}.")
    for run in runs:
        if run.header.get("kind") not in ("audit", "training"):
            said.append(f"{name(run)} is of kind {run.header.get('kind')!r} and takes no part.")
        elif not run.header.get("summary"):
            said.append(f"{name(run)} is {run.header.get('status', 'unfinished')}: it has no numbers yet.")
        elif run.header.get("status") != "done":
            said.append(f"{name(run)} is {run.header.get('status', 'unfinished')}: its numbers may change.")
    said += _repeated(runs)
    for kind, missing in (("training", "test accuracy"), ("audit", "PSNR")):
        if not any(run.header.get("kind") == kind for run in runs):
            said.append(f"No {kind} among the runs, so there is no {missing} and no front.")
    return said


def name(run: Part) -> str:
    """A run in a sentence."""
    return run.folder.resolve().name


def _point(
    channel: str, audits: list[tuple[Part, dict[str, Any]]], trainings: list[tuple[Part, dict[str, Any]]]
) -> Point:
    held = [*trainings, *audits]
    point = Point(
        channel,
        models=tuple(dict.fromkeys(_model(run) for run, _ in held)),
        data=tuple(dict.fromkeys(_data(run) for run, _ in held)),
        bits=_first(held, "bits"),
        bits_entropy=_first(held, "bits_entropy"),
        # Of one run alone: a training without a guarantee does not borrow the one of a single message.
        epsilon=(trainings or audits)[0][1].get("epsilon"),
        epsilon_message=audits[0][1].get("epsilon") if audits else None,
    )
    # An attack whose guesses have no finite PSNR has none in its summary, and beats nothing.
    attacks = [(run, s) for run, s in audits if s["control"] == "none" and s["psnr_selected"] is not None]
    if attacks:
        run, best = max(attacks, key=lambda pair: pair[1]["psnr_selected"])
        # Beside it only what attacked the same model on the same data.
        attacks = [(r, s) for r, s in attacks if (_model(r), _data(r)) == (_model(run), _data(run))]
        plain = _plain(attacks)
        oracles = [s["psnr_oracle"] for _, s in attacks if s.get("psnr_oracle") is not None]
        point = point._replace(
            attack=best["attack"], psnr=best["psnr_selected"], psnr_ci=_pair(best.get("psnr_ci")),
            ssim=best["ssim_selected"], recovered=best["recovered"], images=best["images"],
            control=_control(run, best), label_accuracy=best.get("label_accuracy"), psnr_oracle=max(oracles, default=None),
            plain=plain and plain["attack"], psnr_plain=plain and plain["psnr_selected"],
        )  # fmt: skip
    if trainings:
        s = trainings[0][1]
        point = point._replace(
            test_accuracy=s["test_accuracy"], test_accuracy_ci=_pair(s.get("test_accuracy_ci")),
            train_accuracy=s.get("train_accuracy"), train_accuracy_ci=_pair(s.get("train_accuracy_ci")),
            seeds=s["n"], diverged=s["diverged"],
        )  # fmt: skip
    return point


def _plain(attacks: list[tuple[Part, dict[str, Any]]]) -> dict[str, Any] | None:
    """The strongest arm of the plainest attacker that was run."""
    for bare in PLAIN:
        if mine := [s for _, s in attacks if s["attack"].split("(")[0] == bare]:
            return max(mine, key=lambda s: s["psnr_selected"])
    mine = [s for _, s in attacks if re.search(r"\bl2\b", s["attack"])]
    return max(mine, key=lambda s: s["psnr_selected"], default=None)


def _control(run: Part, best: dict[str, Any]) -> float | None:
    arm = (best["channel"], best["attack"])
    found = [s for s in run.header["summary"] if (s["channel"], s["attack"]) == arm and s["control"] != "none"]
    return max((s["psnr_selected"] for s in found if s["psnr_selected"] is not None), default=None)


def _repeated(runs: Sequence[Part]) -> list[str]:
    """Channels with several trainings, of which one counts, and those whose runs disagree on ε."""
    trained: dict[str, list[Part]] = {}
    guarantees: dict[str, dict[str, float | None]] = {}
    for run in runs:
        kind = run.header.get("kind")
        for s in run.header.get("summary") or []:
            if kind == "training":
                trained.setdefault(s["channel"], []).append(run)
            if kind in ("audit", "training"):
                guarantees.setdefault(s["channel"], {}).setdefault(kind, s.get("epsilon"))
    said = []
    for channel, several in trained.items():
        if len(several) > 1:
            said.append(f"{channel} was trained {len(several)} times: {name(several[0])}, given first, counts.")
    for channel, epsilon in guarantees.items():
        if len(epsilon) == 2 and epsilon["audit"] != epsilon["training"]:
            shown = {kind: "none" if e is None else f"{e:.3g}" for kind, e in epsilon.items()}
            said.append(f"ε of {channel}: {shown['training']} over the training, {shown['audit']} in the audit.")
    return said


def _model(run: Part) -> str:
    spec = (run.header.get("plan") or {}).get("model")
    if not isinstance(spec, str):
        return "unknown"
    try:
        return short(spec)
    except SyntaxError:  # written by hand
        return spec


def _data(run: Part) -> str:
    return str((run.header.get("plan") or {}).get("data", "unknown"))


def _first(held: list[tuple[Part, dict[str, Any]]], field: str) -> Any:
    return next((s[field] for _, s in held if s.get(field) is not None), None)


def _pair(interval: Any) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval and None not in interval else None

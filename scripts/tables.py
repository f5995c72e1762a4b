"""The tables of docs/results.md, each made of stored runs below results/.

Originals' numbers are typed here, and their sources on the page; every number of ours is read from a stored run's summary, so
that none can be older than the run it came from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from scripts import claims, planned, reproduce, stored

RESULTS = Path("results")


@cache
def told(name: str, *flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """run.json and the summary lines of the stored run of a command; no flags: those of its claims."""
    job = planned.Job(name, flags) if flags else planned.job(name)
    folder = reproduce.kept(job, RESULTS)
    if folder is None:
        raise SystemExit(f"results: Expected a stored run of {job} in {RESULTS}/: make it, then `just keep` it.")
    return stored.header(folder), stored.lines(folder)


def value(name: str, place: str, arm: str, field: str, flags: tuple[str, ...] = ()) -> float:
    """One number of a stored run, named as claims name it."""
    found = claims.measured(claims.Claim(place, arm, field, ">=", 0.0), told(name, *flags)[1])
    if found != found:
        raise SystemExit(f"results: Expected {field} of {place} {arm} in the stored run of {name}, found none.")
    return found


def db(*where: str) -> str:
    """A PSNR."""
    return f"{value(where[0], where[1], where[2], 'psnr_selected'):.0f} dB"


def pc(name: str, place: str, arm: str = "training", field: str = "test_accuracy", flags: tuple[str, ...] = ()) -> str:
    """A share in per cent."""
    return f"{100 * value(name, place, arm, field, flags):.1f} %"


def point(name: str, channel: str) -> str:
    """Leakage and accuracy of a channel in a joined table."""
    return f"{value(name, channel, 'study', 'psnr'):.0f} dB at {pc(name, channel, 'study')}"


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def dlg() -> str:
    """System 1."""
    name = "dlg_cifar10"
    n, wins = (f"{value(name, 'fp32', 'dlg', field):.0f}" for field in ("images", "recovered"))
    labels = pc(name, "fp32", "idlg", "label_accuracy")
    digits = [
        pc("label_inference", c, "reveal", "label_accuracy")
        for c in ("fp32", "uniform(levels=16)", "uniform(levels=4)")
    ]
    geiping = "46.3 ± 12.7 dB (Geiping et al. 2020, table 1, quoted from memory)"
    readme = "100 % (MNIST, CIFAR-100, LFW; the authors' README; 2019 attack: 89.9, 83.3, 79.1 %)"
    why = (
        "60×20 closures in place of 300×20, one start: it is all or nothing, so the mean says how often; "
        "theirs is taken of images that are not clamped"
    )
    rows = [
        (
            "2019 attack, a digit, exact gradient",
            "pictures only",
            db("dlg_mnist", "fp32", "dlg"),
            "one image, one start",
        ),
        ("2020 attack, the same digit", "pictures only", db("idlg_mnist", "fp32", "idlg"), "as above"),
        (f"2019 attack, {n} colour images", geiping, f"{db(name, 'fp32', 'dlg')}, {wins} of {n} rebuilt", why),
        (f"2020 attack, the same {n}", "none given", db(name, "fp32", "idlg"), "as above"),
        ("label of one image, 2020 rule", readme, f"{labels} of {n}; {digits[0]} of 100 digits", "no difference"),
        ("labels through 16 and 4 levels", "not tried", f"{digits[1]}, {digits[2]}", "—"),
    ]
    return table(("what", "original", "here", "why they differ"), rows)


def quantization() -> str:
    """System 2."""
    sweep, cost = "quantization_sweep", "accuracy_under_channel"
    heads = ("channel", "paper of 2019: defence?", "attack of 2019, here", "attack that knows the channel, here")
    rows = []
    for channel, said in (
        ("fp32", "no, 76.3 %"), ("float16", "no, 76.1 %"), ("uniform(levels=256)", "int8: yes, at 53.7 %"), ("uniform(levels=16)", "—"),
        ("uniform(levels=4)", "—"), ("sign", "—"), ("stochastic(levels=16)", "—"), ("stochastic(levels=4)", "—"), ("terngrad", "—"),
        ("top_k(ratio=0.6)", "pruning of 30 % and more: yes"), ("top_k(ratio=0.01)", "99 % pruned: yes"),
        ("gaussian(sigma=0.01, unbounded=True)", "noise of 0.01: yes, at 45.3 %"),
        ("gaussian(sigma=0.1, unbounded=True)", "noise of 0.1: yes, at 1 % or less"),
    ):  # fmt: skip
        found = claims.measured(claims.Claim(channel, "training", "test_accuracy", ">=", 0.0), told(cost)[1])
        if found != found:
            joined = claims.measured(
                claims.Claim(channel, "study", "test_accuracy", ">=", 0.0), told("dlg_defences")[1]
            )
            acc = f"{100 * joined:.1f} % (`dlg_defences`)" if joined == joined else "—"
        else:
            acc = f"{100 * found:.1f} %"
        rows.append((channel, said, db(sweep, channel, "dlg"), db(sweep, channel, "adaptive"), acc))
    return table((*heads, "accuracy through it (Fashion-MNIST), here"), rows)


def laplace() -> str:
    """System 3."""
    rows = []
    for eps in ("0.1", "0.5", "1.0", "10.0", "100.0", "1000.0"):
        inside = "" if eps == "1.0" else f"eps={eps}"
        plain = f"unscaled nominal_laplace{f'({inside})' if inside else ''}"
        scaled = f"scaled nominal_laplace({', '.join(filter(None, (inside, 'by_tensors=True')))})"
        norm = value("laplace_fl", plain, "training", "update_l1")
        rows.append((eps.removesuffix(".0"), pc("laplace_fl", plain), pc("laplace_fl", scaled), f"{norm:,.0f}"))
    norm = value("laplace_fl", "unscaled fp32", "training", "update_l1")
    rows.append(("no noise", pc("laplace_fl", "unscaled fp32"), pc("laplace_fl", "scaled fp32"), f"{norm:,.0f}"))
    return table(("nominal ε", "accuracy", "accuracy, noise / √8", "L1 norm of an update (the label assumes 1)"), rows)


def honest() -> str:
    """System 3 with an ε that holds."""
    name, rows = "laplace_fl_honest", []
    for place in (
        "local fp32", "local clip_l1 > laplace(eps=100.0)", "local clip_l2 > gaussian", "central total > mean(batch=64)",
        "central clip_l1 > total > laplace(eps=100.0) > mean(batch=64)",
        "central clip_l2 > total > gaussian(sigma=0.5) > mean(batch=64)",
    ):  # fmt: skip
        eps = claims.measured(claims.Claim(place, "training", "epsilon", ">=", 0.0), told(name)[1])
        rows.append((f"`{place}`", f"{eps:.3g}" if eps == eps else "none", pc(name, place)))
    return table(("part and channel", "ε of the training (δ = 1e-5)", "accuracy"), rows)


def private() -> str:
    """System 4 as published."""
    published = {
        ("10", "batch"): "94.8",
        ("10", "none"): "89.8",
        ("5", "batch"): "95.9",
        ("5", "none"): "91.2",
        ("1", "batch"): "96.5",
        ("1", "none"): "95.6",
    }
    rows = []
    for (noise, norm), said in published.items():
        place = f"noise{noise}-{norm} clip_l2(bound=3.1) > total > mean(batch=32)"
        claimed = value("dp_batchnorm_pgd", place, "training", "claimed_epsilon")
        mine = (pc("dp_batchnorm_pgd", place), pc("dp_batchnorm_pgd", place, field="robust_accuracy"))
        rows.append((noise, norm, f"{said} %", *mine, "none", f"{claimed:.3g}"))
    return table(
        (
            "noise multiplier",
            "norm",
            "original, after epoch 1",
            "here, after 400 steps",
            "here, under PGD",
            "ε",
            "ε it would print",
        ),
        rows,
    )


def private_honest() -> str:
    """System 4 with a guarantee."""
    rows = []
    for sigma in ("0.8", "1.5", "4.0"):
        places = {
            n: f"{n} clip_l2 > total > gaussian(sigma={sigma}) > mean(batch=256)" for n in ("none", "public", "group")
        }
        eps = value("dp_robust_honest", places["none"], "training", "epsilon")
        cells = [
            f"{pc('dp_robust_honest', p)} ({pc('dp_robust_honest', p, field='robust_accuracy')})"
            for p in places.values()
        ]
        rows.append((f"{eps:.3g}", *cells))
    return table(("ε (δ = 1e-5)", "no norm", "batch norm by public images", "group norm"), rows)


def lens() -> str:
    """System 5."""
    arms = ("top-k stochastic sign", "unit length, no compression", "non-private mean", "one noisy average")
    rows = []
    for name, said in (
        ("datalens_mnist", "71.2 %; 96.5 % without privacy"),
        ("datalens_fashion_mnist", "64.8 %; 80.3 % without privacy"),
    ):
        rows.append((f"`{name}`", said, *(pc(name, a, "synthesis", "accuracy") for a in arms), "—"))
    digits = [
        f"{pc('private_digits', f'{m} ε=1', 'synthesis', 'accuracy')} at 28×28"
        for m in ("class moments", "one noisy average")
    ]
    rows.append(("`private_digits`", "—", "—", "—", "—", digits[1], digits[0]))
    heads = (
        "recipe, ε = 1",
        "original (28×28, largest over epochs)",
        "top-5 signs",
        "unit length",
        "no privacy",
        "one noisy average",
        "class moments",
    )
    return table(heads, rows)


def canary() -> str:
    """What the published code's ε is worth."""
    rows = []
    for arm in ("as promised", "moments shared by sets", "records dealt by class, wrapping", "both, as published"):
        said = [
            value("datalens_defects", arm, "synthesis", f)
            for f in ("canary_teachers", "canary_reach", "canary_epsilon")
        ]
        rows.append((arm, f"{said[0]:.0f}", f"{said[1]:.1f}", f"{said[2]:.2f}"))
    return table(
        (
            "case",
            "teachers that one record changes",
            "reach of one sum (promised: 1)",
            "ε that the canary shows (promised: 1)",
        ),
        rows,
    )


def repeat() -> str:
    """Command, CPU time and data of every recipe, with the date of the stored run."""
    rows = []
    for unit in reproduce.whole(reproduce.units(planned.jobs(), RESULTS)):
        folder = reproduce.kept(unit.job, RESULTS)
        run = stored.header(folder) if folder else {}
        when = str(run.get("finished") or "not run")[:10] + (f", {run['git'][:7]}" if run.get("git") else "")
        needs = ", ".join(data_of(unit.job, run))
        rows.append(
            (
                f"`qleak recipe run {unit.job}`",
                reproduce.clock(unit.cost) if unit.measured else "unknown",
                needs or "embedded",
                when,
            )
        )
    return table(("command", "CPU time", "data", "stored run"), rows)


def data_of(job: planned.Job, run: dict[str, Any]) -> list[str]:
    """The sets that a command needs: by its stored plan, so that the page is the same on every machine."""
    if not run:
        return sorted({str(v) for k, v in planned.flags_of(job).items() if k in ("data", "dataset")})
    return planned.sets_in(run["plan"])


TABLES: dict[str, Callable[[], str]] = {
    "dlg": dlg, "quantization": quantization, "laplace": laplace, "laplace-honest": honest, "private": private,
    "private-honest": private_honest, "datalens": lens, "canary": canary, "repeat": repeat,
}  # fmt: skip

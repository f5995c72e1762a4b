"""The audit of a captured update in words: verdict, what it rests on, what it cannot say; and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from qleak import folders, store
from qleak.errors import Expected
from qleak.metrics import picture
from qleak.plans import label
from qleak.report import bounds, columns, words
from qleak.store import Row

HEADS = ("attack", "lane", "residual", "explains", "agrees\ndB", "PSNR\ndB", "closures")
WIDTHS = (16, 13, 9, 8, 6, 6, 8)  # of the same in the terminal
CANNOT = (
    "An update that withstood these attacks in this time may fall to others: nothing found is no proof of safety.",
    "Without the truth a picture is judged by how well it explains the message and by independent starts that agree; "
    "only the truth shows that it is the client's image.",
    "Noise added on purpose cannot be told from numbers that are simply exact, so no ε is read off an update.",
    "Everything holds for the model and weights that were given: with others the residuals mean nothing.",
)


@dataclass(frozen=True)
class Audited:
    """A run folder that has been read."""

    folder: Path
    header: dict[str, Any]
    rows: list[Row]

    @property
    def found(self) -> dict[str, Any] | None:
        """The summary; None before the run is done."""
        summary = self.header.get("summary")
        return summary[0] if summary else None

    def held(self, row: Row | None) -> bool:
        """Whether the pictures of a row are (still) there."""
        return row is not None and folders.held(self.folder, f"chunk-{row['chunk']}")

    def guess(self, row: Row) -> Tensor:
        """The pictures of a row, `[b c h w]` in [0, 1]."""
        x = store.read_tensors(self.folder, f"chunk-{row['chunk']}")["x"][row["lane"]].float()
        return picture(x)

    def best(self, control: str = "none") -> Row | None:
        """The row of smallest residual of a control."""
        mine = [r for r in self.rows if r["control"] == control]
        return min(mine, key=lambda r: number_or(r["residual"]), default=None)

    def images(self) -> Tensor:
        """The best guess, in the order of the truth where there is one."""
        row = self.best()
        if row is None:
            raise Expected(f"Expected a finished run at {self.folder}.")
        x = self.guess(row)
        return x[row["order"]] if row.get("order") is not None else x

    def truth(self) -> Tensor | None:
        """The images that were given as truth; None without one, and where they were removed."""
        held = folders.held(self.folder, "captured")
        return store.read_tensors(self.folder, "captured").get("truth/x") if held else None


def number_or(value: float | None, other: float = float("inf")) -> float:
    """A number of a row; JSON knows no infinity."""
    return other if value is None else value


def load(folder: Path) -> Audited:
    """Reads a run, finished or not.

    Raises:
        Expected: there is no run, it is damaged, or of another kind.
    """
    header = store.read_run(folder)
    if header.get("kind") != "captured":
        raise Expected(f"Expected a run of kind 'captured' at {folder}, got {header.get('kind')!r}.")
    return Audited(folder, header, store.read_rows(folder))


def verdict(header: dict[str, Any]) -> str:
    """One or two sentences: what was found, and the numbers it rests on."""
    if not header.get("summary"):
        return f"Verdict: none yet, the run is {header.get('status', 'unfinished')}."
    s = header["summary"][0]
    name, count = s["attack"].split("(")[0], f"{s['rebuilt']} of {s['images']}"
    explains = f"{name} explains the message to {ratio(s['residual'])}, the best control to {ratio(s['control'])}"
    if s["psnr"] is not None:
        best = f"best {max(s['psnr']):.1f} dB against the truth, best control {s['psnr_control']:.1f} dB"
        tail = "" if s["rebuilt"] else ", which is no proof of safety"
        return f"Verdict: {s['verdict']}. {count} {images(s['images'])} rebuilt ({best}){tail}; {explains}."
    if s["basis"] == "agreement":
        said = f"{s['witnesses'] + 1} independent starts explain it, {agreed(s)}"
    elif s["basis"] == "decoys" and s["rebuilt"]:
        said = f"on decoys, whose images are known, such an explanation was the image ({decoys(s)})"
    elif s["basis"] == "decoys":
        said = f"but on decoys, whose images are known, such an explanation was another picture ({decoys(s)})"
    elif s["explained"]:
        said = "but no second independent start and no decoy confirms it"
    else:
        return f"Verdict: {s['verdict']}. No guess explains the message: {explains}."
    return f"Verdict: {s['verdict']}. {count} {images(s['images'])}; {explains}; {said}."


def images(count: int) -> str:
    """image, or images."""
    return "image" if count == 1 else "images"


def ratio(value: float | None) -> str:
    """A relative residual."""
    return "no number" if value is None else f"{value:.2g}"


def agreed(s: dict[str, Any]) -> str:
    """How well independent starts agree."""
    known = [a for a in s["agreement"] or [] if a is not None]
    least = f"{min(known):.1f} dB" if known else "nothing"
    return f"and agree to {least}" if s["rebuilt"] == s["images"] else f"and agree to {least} at the least"


def decoys(s: dict[str, Any]) -> str:
    """What the attack made of decoys."""
    return ", ".join(f"{min(d['psnr']):.1f} dB" for d in s["decoys"]) or "none"


def rests_on(header: dict[str, Any]) -> list[str]:
    """What the verdict rests on, line by line."""
    s = (header.get("summary") or [None])[0]
    if s is None:
        return []
    plan = header["plan"]
    lines = [
        f"Residual: what the client would have sent of the best guess differs from the message by {ratio(s['residual'])} "
        f"of its norm; the best control's guess by {ratio(s['control'])}, a decoy's true image by {ratio(s['floor'])}. "
        f"Explained counts below {ratio(s['bar'])}.",
        f"Restarts: {s['starts']} independent starts, {s['witnesses']} others explain the message"
        + (f", {agreed(s)} (the bar is {plan['success']:g} dB)." if s["agreement"] else "."),
        f"Decoys (1/f noise through the same model and channel, images known): the same attack reached {decoys(s)}.",
        f"Plausibility: mean variation of the best guess {s['variation']:.3f} (photographs: hundredths; noise: tenths).",
    ]
    if s["psnr"] is not None:
        shown, similar = (", ".join(f"{v:.{n}f}" for v in s[k]) for k, n in (("psnr", 1), ("ssim", 2)))
        lines.insert(
            0,
            f"Truth: PSNR {shown} dB, SSIM {similar}; controls at most {s['psnr_control']:.1f} dB.",
        )
    if s["cut"]:
        lines.append(
            f"The budget of {plan['budget']:g} CPU seconds cut {len(s['cut'])} lanes short: a larger --budget may find more."
        )
    return lines + bounds.lines(header)


def known(header: dict[str, Any]) -> list[tuple[str, str]]:
    """Match, channel, batch, self-check, in a line or two each, as (term, text)."""
    m, c, b = header["match"], header["channel"], header["batch"]
    by = ", ".join(f"{n} by {how}" if how != "missing" else f"{n} missing" for how, n in hows(header).items())
    text = f"{m['numbers']:,} numbers ({m['kind']}, {m['dtype']}): {by}. {sentences(m['notes'], ' ')}"
    alike = f" Equivalent or possible as well: {', '.join(c['alternatives'])}." if c["alternatives"] else ""
    channel = label(c["channel"]) if c["channel"] else "not determined"
    origin = "as given" if c["given"] else c["certainty"]
    read = "" if c["used"] == channel else f", read as {c['used']}"
    proves = f"at least {b['least']}" if b["most"] is None else f"{b['least']} to {b['most']}"
    if b["most"] == b["least"]:
        proves = f"{b['least']}"
    proven = f"; the update proves {proves}" if b["most"] is not None or b["least"] > 1 else ""
    said = [
        ("Match", text.strip()),
        ("Weights", f"{header['weights']}."),
        (
            "Channel",
            f"{channel} ({origin}){read}. {sentences(c['reasons'])}{alike} {c['note']}".strip(),
        ),
        (
            "Batch",
            f"{b['used']} {'given' if b['given'] else 'assumed'}{proven}. {sentences(b['reasons'])}".strip(),
        ),
    ]
    if check := header.get("self_check"):
        said.append(("Self-check", checked(check)))
    return said


def sentences(reasons: list[str], between: str = "; ") -> str:
    """Reasons as one sentence, or, with `between` " ", as one each."""
    parts = [r.strip().rstrip(".") for r in reasons]
    if between == " ":
        return " ".join(f"{_capital(part)}." for part in parts)
    return f"{_capital(between.join(parts))}." if parts else ""


def _capital(text: str) -> str:
    """A large first letter, unless the first word is a name such as `fc.weight`."""
    first, _, rest = text.partition(" ")
    return text if not first.isalpha() or rest.startswith("(") else text[:1].upper() + text[1:]


def checked(check: dict[str, Any]) -> str:
    """The self-check's outcome as a sentence."""
    first = check["readings"][0]
    if check["as_described"]:
        return f"the model reproduces the update from the truth (relative error {first['error']:.1g})."
    if check["fits"] is None:
        best = min(check["readings"], key=lambda r: number_or(r["scaled"]))
        return (
            f"the model does NOT reproduce the update from the truth: relative error {first['error']:.2g} as described, "
            f"at best {best['scaled']:.2g} ({best['name']}). Model, weights or truth are others than the client's."
        )
    fit = next(r for r in check["readings"] if r["name"] == check["fits"])
    why = "; ".join(t for t in (check["fits"] if check["fits"] != first["name"] else "", check["factor_means"]) if t)
    return (
        f"as described the error is {first['error']:.2g}; it is {fit['scaled']:.1g} with: {why}. The audit goes on so."
    )


def hows(header: dict[str, Any]) -> dict[str, int]:
    """How many parameters were found in which way."""
    found: dict[str, int] = {}
    for line in header["match"]["lines"]:
        found[line["how"]] = found.get(line["how"], 0) + 1
    return found


def unusual(header: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the match table that were not found by their very name."""
    return [line for line in header["match"]["lines"] if line["how"] != "name"]


def cells(row: Row) -> list[str]:
    """One row, in the order of `HEADS`."""
    own = row["control"] == "none"
    agrees = words.number(min(row["agreement"]), ".1f") if row.get("agreement") else "—"
    scored = words.number(max(row["psnr"]), ".1f") if row.get("psnr") else "—"
    lane = f"start {row['restart'] + 1}" if own else row["control"].replace("wrong-gradient", f"decoy {row['message']}")
    mark = "✓ best" if row["selected"] else "yes" if row.get("explained") else "no"
    return [row["attack"].split("(")[0], lane, ratio(row["residual"]), mark, agrees, scored, str(row["closures"])]


def ordered(rows: list[Row]) -> list[Row]:
    """The captured message's lanes first, by residual; controls last."""
    return sorted(rows, key=lambda r: (r["control"] != "none", number_or(r["residual"])))


def table(run: Audited, verbose: bool = False) -> Iterator[RenderableType]:
    """What was read and inferred, and every lane."""
    for term, text in known(run.header):
        yield Text.assemble((f"{term}: ", "bold"), text)
    odd = unusual(run.header)
    if odd:
        yield Text("")
        grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
        for title, width in (("parameter", 24), ("shape", 13), ("found as", 20), ("how", 17)):
            grid.add_column(title, width=width)
        for line in odd if verbose else odd[:12]:
            shape = "×".join(map(str, line["shape"]))
            columns.add(grid, line["parameter"] or "—", shape, line["found"] or "—", line["how"])
        yield grid
        if len(odd) > 12 and not verbose:
            yield Text(f"… and {len(odd) - 12} more lines in report.html")
    if (check := run.header.get("self_check")) and not check["as_described"]:
        yield Text("")
        for r in sorted(check["readings"], key=lambda r: number_or(r["scaled"]))[: None if verbose else 6]:
            yield Text(
                f"  {'✓' if r['fits'] else ' '} {r['name']}: error {ratio(r['error'])}, {ratio(r['scaled'])} at factor {r['factor']:.3g}"
            )
    if run.rows:
        yield Text("")
        grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
        for i, (title, width) in enumerate(zip(HEADS, WIDTHS, strict=True)):
            grid.add_column(title, width=width, justify="left" if i < 2 else "right", vertical="bottom")
        for row in ordered(run.rows):
            columns.add(grid, *cells(row), style="" if row["control"] == "none" else "dim")
        yield grid
    for refused in run.header.get("refused_attacks") or []:
        yield Text(f"Not run: {refused['attack']} {refused['reason']}")
    yield Text("")


def next_step(header: dict[str, Any], folder: Path) -> tuple[str, str]:
    """A command worth trying now, and why."""
    s = (header.get("summary") or [None])[0]
    if s is None:
        return f"qleak report {folder}", "the run is not finished; its own command goes on"
    if not s["rebuilt"] and s["cut"]:
        return f"qleak audit … --budget {4 * header['plan']['budget']:g}s", "the budget cut attacks short"
    return f"qleak report {folder}", "renders this run again"

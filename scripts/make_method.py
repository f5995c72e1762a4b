"""Makes `assets/method.svg`: a client's gradient, the channel, and the two who read what comes out. `just demo` first.

The photograph, the codes and the guess are those of `assets/demo.gif` (runs/demo), the accuracies those of the shipped
example run. Light and dark follow the reader's scheme.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from make_demo import PLAN, RUN
from PIL import Image
from torch import Tensor

from qleak import engine, store
from qleak.report.film import films
from qleak.report.stored import load

TARGET, EXAMPLE = Path("assets/method.svg"), Path("assets/runs/example")
STYLE = """
text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; font-size: 15px }
.head { font-weight: 600; font-size: 18px } .soft { fill: #59636e; font-size: 14px }
.small { fill: #59636e; font-size: 12.5px } .mid { text-anchor: middle }
.card { fill: #f6f8fa; stroke: #d1d9e0 } .flow { fill: none; stroke: #818b98; stroke-width: 2 }
.tip { fill: #818b98 } .pill { fill: #ffffff; stroke: #d1d9e0 } .axis { stroke: #d1d9e0 }
.learn { stroke: #0969da } .learns { fill: #0969da } .leaks { fill: #bc4c00 }
.curve { fill: none; stroke-width: 2.5; stroke-linecap: round; stroke-linejoin: round } .thin { stroke-dasharray: 1 6 }
image { image-rendering: pixelated } .frame { fill: none; stroke-width: 2.5 } .leak { stroke: #bc4c00 }
.plain { stroke: #818b98; stroke-width: 1 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .soft, .small { fill: #9198a1 } .card { fill: #151b23; stroke: #3d444d }
.flow { stroke: #9198a1 } .tip { fill: #9198a1 } .pill { fill: #0d1117; stroke: #3d444d } .axis { stroke: #3d444d }
.learn { stroke: #58a6ff } .learns { fill: #58a6ff } .leak { stroke: #ffa657 } .leaks { fill: #ffa657 } .plain { stroke: #9198a1 }
}
"""
TITLE = "A client's gradient passes through a channel; two readers look at what comes out"
STAGES = ("clip", "select", "quantize", "add noise")


def main() -> None:
    """Draws the picture from stored runs."""
    read = load(RUN)
    (film,) = films(read).values()
    psnr = f"{float(film.psnr[-1]):.1f} dB"
    code = engine.prepare(PLAN).messages[0][0].code
    parts = [
        client(uri(read.originals[film.image])), channel(), message(uri(heat(code, 12, 36))),
        server(*accuracies()), attacker(uri(film.x[-1]), psnr), flows(),
    ]  # fmt: skip
    desc = (
        "Left, a client with a photograph computes a gradient. In the middle, the channel: clip, select, quantize, add noise; it "
        "costs bits and earns an epsilon. Right, two readers of the same message: the server, whose accuracy rises over the "
        f"epochs, and the attacker, whose reconstruction of the photograph from 8 bits a coordinate reaches {psnr}."
    )
    TARGET.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 430" width="1000" height="430" role="img" '
        f'aria-labelledby="title desc">\n<title id="title">{TITLE}</title>\n<desc id="desc">{desc}</desc>\n'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n",
        encoding="utf-8",
    )
    print(f"{TARGET}: {TARGET.stat().st_size / 1e3:.1f} kB")


def uri(pixels: Tensor) -> str:
    """An image `[3 h w]` in [0, 1] as a PNG in a link."""
    data = io.BytesIO()
    array = pixels.mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(array).save(data, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def heat(code: dict[str, Tensor], high: int, wide: int) -> Tensor:
    """Codes of the convolutions as `[3 h w]`, from grey at their tensor's median to a colour on either side."""
    kernels = torch.cat([(v.float() - v.float().median()).flatten() for v in code.values() if v.ndim == 4])
    shown = kernels[: high * wide].unflatten(0, (high, wide)) / 127
    plus, minus, zero = (
        torch.tensor(c)[:, None, None] / 255 for c in ((240, 136, 62), (56, 139, 253), (129, 139, 152))
    )
    return zero + shown.abs().clamp(max=1).pow(0.6) * (torch.where(shown > 0, plus, minus) - zero)


def accuracies() -> tuple[list[float], list[float]]:
    """Test accuracy by epoch of the example run: exact updates, and updates in 16 levels."""
    rows = [r for r in store.read_rows(EXAMPLE) if r["seed"] == 0]
    names = list(dict.fromkeys(r["channel"] for r in rows))
    exact, coded = (
        [r["test_accuracy"] for r in sorted(rows, key=lambda r: r["epoch"]) if r["channel"] == n] for n in names[:2]
    )
    return exact, coded


def card(x: int, y: int, wide: int, high: int) -> str:
    """A panel."""
    return f'<rect class="card" x="{x}" y="{y}" width="{wide}" height="{high}" rx="14"/>'


def client(photo: str) -> str:
    """The client and the image that stays there."""
    return (
        card(20, 95, 200, 240) + '<text class="head mid" x="120" y="128">client</text>'
        f'<image x="56" y="146" width="128" height="128" href="{photo}"/>'
        '<rect class="frame plain" x="56" y="146" width="128" height="128"/>'
        '<text class="soft mid" x="120" y="302">its photograph stays,</text>'
        '<text class="soft mid" x="120" y="322">its gradient leaves</text>'
    )


def channel() -> str:
    """The channel's stages, and what it costs and earns."""
    pills = "".join(
        f'<rect class="pill" x="322" y="{148 + 34 * i}" width="116" height="26" rx="13"/>'
        f'<text class="mid" x="380" y="{166 + 34 * i}">{stage}</text>'
        for i, stage in enumerate(STAGES)
    )
    return (
        card(300, 95, 160, 240) + '<text class="head mid" x="380" y="128">channel</text>' + pills
        + '<text class="soft mid" x="380" y="308">costs bits, earns ε</text>'
    )  # fmt: skip


def message(codes: str) -> str:
    """What is sent."""
    return (
        f'<image x="514" y="191" width="108" height="48" href="{codes}" preserveAspectRatio="none"/>'
        '<rect class="frame plain" x="514" y="191" width="108" height="48"/>'
        '<text class="soft mid" x="568" y="178">the message</text>'
    )


def server(exact: list[float], coded: list[float]) -> str:
    """The first reader, with the accuracy of a training through the channel."""
    left, top, wide, high = 856, 52, 100, 96
    place = lambda i, v: f"{left + wide * i / (len(exact) - 1):.1f},{top + high - high * v:.1f}"  # noqa: E731
    line = lambda values: " ".join(place(i, v) for i, v in enumerate(values))  # noqa: E731
    return (
        card(700, 20, 280, 170) + '<text class="head learns" x="722" y="54">server</text>'
        '<text x="722" y="82">Does the model</text><text x="722" y="102">still learn?</text>'
        f'<text class="small" x="722" y="150">{coded[-1]:.0%} in 16 levels</text>'
        f'<text class="small" x="722" y="168">{exact[-1]:.0%} exact (dots)</text>'
        f'<path class="axis" d="M{left} {top}V{top + high}H{left + wide}" fill="none"/>'
        f'<polyline class="curve learn" points="{line(coded)}"/><polyline class="curve learn thin" points="{line(exact)}"/>'
    )


def attacker(guess: str, psnr: str) -> str:
    """The second reader, with what he rebuilds."""
    return (
        card(700, 240, 280, 170) + '<text class="head leaks" x="722" y="274">attacker</text>'
        '<text x="722" y="302">What can</text><text x="722" y="322">be rebuilt?</text>'
        f'<text class="small" x="722" y="370">{psnr} from</text><text class="small" x="722" y="388">8 bits a number</text>'
        f'<image x="840" y="261" width="128" height="128" href="{guess}"/>'
        '<rect class="frame leak" x="840" y="261" width="128" height="128"/>'
    )


def flows() -> str:
    """Arrows: client to channel, channel to message, message to both."""
    tip = lambda x, y: f'<path class="tip" d="M{x} {y}l-11 -6v12z"/>'  # noqa: E731
    return (
        '<text class="soft mid" x="260" y="200">∂L/∂w</text><path class="flow" d="M220 215H290"/>' + tip(298, 215)
        + '<path class="flow" d="M460 215H504"/>' + tip(512, 215)
        + '<path class="flow" d="M624 205C664 205 650 105 690 105"/>' + tip(699, 105)
        + '<path class="flow" d="M624 225C664 225 650 325 690 325"/>' + tip(699, 325)
    )  # fmt: skip


if __name__ == "__main__":
    main()

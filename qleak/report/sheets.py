"""Images and sheets of them, one column per class, as PNGs."""

from __future__ import annotations

import base64
import io

import torch
from einops import rearrange
from torch import Tensor

from qleak.report.stored import rgb

GAP = 1  # pixels between two images


def columns(images: Tensor, classes: int) -> Tensor:
    """One picture `[3 H W]` of images `[class·k c h w]`, class by class: a column per class, k rows, grey between."""
    grid = rearrange(images, "(classes k) c h w -> k classes c h w", classes=classes)
    return tiled(grid)


def tiled(grid: Tensor) -> Tensor:
    """One picture `[3 H W]` of a grid of images `[row column c h w]` in [0, 1], `GAP` grey pixels between them."""
    rows, wide, _, h, w = grid.shape
    out = torch.full((3, rows * (h + GAP) - GAP, wide * (w + GAP) - GAP), 0.5)
    for i in range(rows):
        for j in range(wide):
            top, left = i * (h + GAP), j * (w + GAP)
            out[:, top : top + h, left : left + w] = rgb(grid[i, j].float().clamp(0, 1))
    return out


def png(picture: Tensor, scale: int = 1) -> bytes:
    """A PNG of `[3 H W]` in [0, 1]; every pixel becomes scale × scale sharp ones."""
    from PIL import Image

    large = picture.mul(255).round().byte().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    grey = bool((large[0] == large[1]).all() and (large[0] == large[2]).all())  # a third of the weight
    pixels = large[0].numpy() if grey else rearrange(large, "c h w -> h w c").contiguous().numpy()
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="png", optimize=True)
    return data.getvalue()


def uri(data: bytes) -> str:
    """A PNG for a page that stands alone."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image_uri(pixels: Tensor) -> str:
    """One image `[c h w]` in [0, 1] as such a PNG."""
    return uri(png(rgb(pixels)))

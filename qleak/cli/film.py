"""`qleak film RUN`: the frames that a run has kept, as an animated GIF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def film(
    run: Annotated[Path, typer.Argument(help="A folder of a run that was made with --film N.")],
    target: Annotated[Path | None, typer.Argument(help="The GIF to write; RUN/film.gif without.")] = None,
    image: Annotated[
        int | None, typer.Option(help="Index of the image in its data set; the first one filmed without.")
    ] = None,
    side: Annotated[int, typer.Option(help="Width of a picture in pixels, about.")] = 128,
) -> None:
    """Guesses emerging side by side with the original, as a GIF; closures run on a log scale."""
    from qleak.check import between
    from qleak.report import film as films

    between(16, 1024, side=side)
    print(films.gif(run, target or run / "film.gif", image, side))

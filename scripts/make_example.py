"""The shipped example run, `run:example`: a small ReLU LeNet learns the embedded digits, as it is and through 4 bits."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

MODEL = "lenet(channels=1, size=28, classes=10, function='relu', init='default')"
FLAGS = ["--data", "mnist5k", "--model", MODEL, "--channels", "chain();chain(uniform(levels=16))", "--limit", "0"]
KEPT = ("run.json", "rows.jsonl", "final_model.safetensors", "models")


def main() -> None:
    """Runs the recipe in an empty folder and keeps what a reader of the run needs."""
    target = Path("assets/runs/example").resolve()
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(
            ["qleak", "recipe", "run", "accuracy_under_channel", *FLAGS, "--seeds", "1"], cwd=place, check=True
        )
        (made,) = (Path(place) / "runs").iterdir()
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in KEPT:
            copy = shutil.copytree if (made / name).is_dir() else shutil.copy2
            copy(made / name, target / name)


if __name__ == "__main__":
    assert Path("recipes").is_dir(), "run me from the repository"
    main()

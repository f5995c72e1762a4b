"""Every recipe in its smallest setting, from plan to page: `just smoke [NAME …]`. Embedded data only, minutes on two cores.

What comes out says nothing: nets are narrow, attacks stop after a step or two. A recipe passes if its command ends with exit
code 0 and leaves a finished run with rows, a summary and a page. Each runs by the command line itself, in a folder that is
removed afterwards and with a data folder that is empty, so that nothing but embedded sets can be read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from qleak import machine
from scripts import stored

SMALL = "--model 'lenet(channels=1, size=28, classes=10, width=2)'"
NARROW = "--model 'lenet(width=2)'"
RESNET = "resnet(depth=8, width=2, channels=1, size=28, classes=10, mode="
LEARNS = "--data mnist5k --epochs 1 --limit 64 --seeds 1"
DIGIT = "--data mnist5k --index 0 --outer 1"
PHOTO = "--data photos --index 0 --outer 1"
BRIEF = "cells(stages=1, steps=2, last=2)"
ATTACK = f"--attacks '{BRIEF}'"
BOTH = "--attacks 'dlg(outer=1); adaptive(stages=2, steps=2, last=2)'"
LENS = """--dataset mnist5k --size 8 --teachers-batch 2 --batch-teachers 5 --epoch 2 --steps 2 --seeds 1 --limit 500 --test 100
    --files 0"""
SETTINGS: dict[str, str] = {
    "accuracy_under_channel": f"{LEARNS} {SMALL} --channels 'chain(); chain(sign())' ",
    "architectures": f"--widths 2 --depths 2 --hidden 4 --images 1 {ATTACK}",
    "attack_race": f"--images 1 --seconds 0.1 {NARROW}",
    "attackers": f"--images 1 --channels 'chain(sign())' {NARROW} {ATTACK}",
    "batch_size": f"--data mnist5k {SMALL} --batches 1,2 --blocks 1 {ATTACK}",
    "batchnorm_prior": f"--data mnist5k --model \"{RESNET}'train')\" --batch 2 --batches 1 --steps 2",
    "convergence_stage": f"{SMALL} --rounds 1,2 --limit 4 --victims 1 {ATTACK}",
    "datalens_ablation": """--dataset mnist5k --size 8 --teachers 10 --topk 5 --thresh 0.1 --others l2 --steps 2 --limit 500
        --test 100 --seeds 1""",
    "datalens_celeba_gender": LENS,
    "datalens_celeba_hair": LENS,
    "datalens_defects": """--dataset mnist5k --size 8 --teachers-batch 2 --batch-teachers 5 --steps 2 --limit 500 --test 100
        --seeds 1""",
    "datalens_fashion_mnist": LENS,
    "datalens_mnist": LENS,
    "datalens_places365": LENS,
    "dlg_cifar10": PHOTO,
    "dlg_cifar100": PHOTO,
    "dlg_defences": f"{LEARNS} --images 1 --channels 'chain(); chain(float16())' {BOTH}",
    "dlg_mnist": DIGIT,
    "dp_batchnorm_pgd": """--dataset mnist5k --public mnist5k --noise-multiplier 1 --batch-size 2 --public-size 4 --public-skip 9
        --epochs 1 --limit 32 --test 50 --seeds 1 --adv-num-steps 1""",
    "dp_robust_honest": """--data mnist5k --public mnist5k --sigma 4 --batch 8 --public-size 4 --public-skip 9 --epochs 1
        --limit 32 --test 50 --seeds 1 --attack fgsm""",
    "dp_vs_leakage": f"""{LEARNS} --test 50 {ATTACK} --model 'convnet(channels=1, size=28, width=2)' --eps 3000
        --multipliers 1 --images 1 --batch 16""",
    "frontier": f"{LEARNS} {SMALL} --images 1 --channels 'chain(); chain(sign())' {BOTH}",
    "gap": f"--images 1 --channels 'chain(gaussian(sigma=0.1, unbounded=True))' {SMALL} --data mnist5k {ATTACK} --bounds yes",
    "idlg_cifar10": PHOTO,
    "idlg_cifar100": PHOTO,
    "idlg_lfw": "--data faces --index 0 --outer 1",
    "idlg_mnist": DIGIT,
    "inverting_gradients_cifar10": f"--data mnist5k --images 1 --steps 2 --model \"{RESNET}'eval')\"",
    "label_inference": "--victims 4",
    "laplace_fl": f"{LEARNS} --test 50 --eps 1 --batch 32",
    "laplace_fl_honest": f"{LEARNS} --test 50 --eps 10 --batch 4 --clients 4 --participation 0.5 --steps 1",
    "local_steps": f"--data mnist5k {SMALL} --steps 1,2 --images 2 --clients 1 --attack '{BRIEF}'",
    "pretrained_int8": f"--victims 1 --attacks 'dlg(outer=1); {BRIEF}; closed_form()'",
    "private_digits": "--data mnist5k --epsilon 10 --seeds 1 --samples 100",
    "quantization_sweep": f"--channels 'chain(sign())' --images 1 --seeds 1 {NARROW} {BOTH}",
    "rounds_to_recovery": f"--channels 'chain(terngrad())' --times 1,2 --images 1 {NARROW} {ATTACK}",
    "seeds": f"--starts 2 --outer 1 {NARROW} {ATTACK}",
    "trained_vs_untrained": f"--images 1 {ATTACK}",
    "untrained_int8": f"--photos 1 --seeds 1 --others 1 {NARROW} {ATTACK}",
}


class Result(NamedTuple):
    """What became of one recipe: its CPU seconds, and "" in `why` where it passed."""

    name: str
    seconds: float
    why: str


def flags(name: str) -> list[str]:
    """The words behind `qleak recipe run NAME`."""
    words = shlex.split(SETTINGS[name])
    return words if "--bounds" in words else [*words, "--bounds", "no"]


def smoke(name: str) -> Result:
    """Runs one recipe in this process, in a folder of its own."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        why = _command(name, Path(place)) or faults(Path(place))
    return Result(name, time.process_time() - began, why)


def _command(name: str, out: Path) -> str:
    """Runs the command; what it said last where it did not end well."""
    from qleak.cli import main

    said = io.StringIO()
    os.environ["QLEAK_DATA"] = str(out / "no-data")
    words = ["qleak", "recipe", "run", name, *flags(name), "--out", str(out), "--workers", "1", "--quiet"]
    before, sys.argv = sys.argv, words
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
    except SystemExit as stop:
        if stop.code:
            return f"exit code {stop.code}: {' '.join(said.getvalue().split())[-300:]}"
    except Exception as error:  # a bug of the recipe is what is looked for: the others go on
        return f"{type(error).__name__}: {error}"
    finally:
        sys.argv = before
    return ""


def faults(out: Path) -> str:
    """What a folder of runs lacks of one finished run with rows, summaries and a page; "" if nothing."""
    found = sorted(out.glob("*/run.json"))
    if len(found) != 1:
        return f"{len(found)} run folders in place of one"
    for folder in stored.folders(found[0].parent):
        told, rows = stored.header(folder), stored.rows(folder)
        if told.get("status") != "done" or not told.get("summary"):
            return f"{folder.relative_to(out)} is {told.get('status')} with {len(told.get('summary') or [])} lines"
        if told["kind"] != "study" and not rows:
            return f"{folder.relative_to(out)} has no rows"
    page = found[0].parent / "report.html"
    return "" if page.is_file() and page.stat().st_size > 1000 else "no page"


def main() -> int:
    """Prints a line per recipe; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="just smoke", description="Every recipe in its smallest setting.")
    parser.add_argument("names", nargs="*", help="recipes; none for all")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: one per core")
    given = parser.parse_args()
    names, began = given.names or sorted(SETTINGS), time.monotonic()
    if unknown := set(names) - set(SETTINGS):
        parser.error(f"no smoke setting for {', '.join(sorted(unknown))}: scripts/smoke.py holds one line a recipe")
    jobs = given.jobs or machine.cpus()
    failed = []
    with multiprocessing.get_context("spawn").Pool(jobs, _one_thread) as pool:
        for result in pool.imap_unordered(smoke, names):
            word = "FAILED" if result.why else "ok"
            print(f"{word:6} {result.seconds:6.1f} s  {result.name}  {result.why}".rstrip(), flush=True)
            failed += [result.name] if result.why else []
    verdict = f"{len(failed)} failed: {', '.join(sorted(failed))}" if failed else "all passed"
    print(f"\n{len(names)} recipes in {time.monotonic() - began:.0f} s, {jobs} processes: {verdict}.")
    return 1 if failed else 0


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    assert Path("recipes").is_dir(), "run me from the repository"
    sys.exit(main())

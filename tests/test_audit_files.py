"""Two hundred updates, captured, written and read again the way `qleak audit FILE --channel auto` reads them."""

from collections import Counter

import numpy as np
import torch
from test_inference import NETS, SWEEP, exact, family, net, right, sent
from tiers import sizes

from qleak.adapters import capture, captured
from qleak.adapters.given import Request
from qleak.adapters.inference import Verdict

SUFFIXES = ("safetensors", "npz", "pt", "list.pt")
UNTOLD = ("gaussian", "laplace")


def written(folder, suffix, update, i, channel=""):
    """The file a rank or a script leaves behind: a capture with its payload's metadata, or plain tensors."""
    path = folder / f"update-{i}.{suffix}"
    if suffix == "safetensors":
        return capture.save(folder, update, (), {"step": i, "rank": 0, "channel": channel})
    if suffix == "npz":
        np.savez(path, **{k: v.numpy() for k, v in update.items()})
    else:
        torch.save({"gradients": update} if suffix == "pt" else list(update.values()), path)
    return path


def case(i):
    """(spec, the update's seed, file format) number i; formats turn with the round, so each family meets several."""
    grid = SWEEP["GRID"]
    return grid[i % len(grid)], i + i // len(grid), SUFFIXES[(i + i // len(grid)) % len(SUFFIXES)]


def audited(folder, i):
    """What the audit of file i takes as its channel, and whether that is right; None where nothing was sent."""
    spec, seed, suffix = case(i)
    update = exact(seed)
    received = sent(spec, update, i)
    if not any(bool(v.any()) for v in received.values()):
        return None
    model, params = net(NETS[seed % len(NETS)], bool(seed // len(NETS) % 2))
    file = written(folder, suffix, received, i)
    about = captured.prepared(Request(file, model, params, batch=1 + seed % 8, attacks="closed_form")).about["channel"]
    verdict = Verdict(about["channel"], about["family"], about["certainty"], about["reasons"], about["alternatives"])
    return about, right(spec, verdict, update, received)


def table(folder, cases):
    """{family: Counter of right, all, rebuilt codes and certainties}, and a line for each that went wrong."""
    found: dict[str, Counter] = {}
    wrong = []
    for i in cases:
        spec, seed, suffix = case(i)
        outcome = audited(folder, i)
        if outcome is None:
            continue
        about, ok = outcome
        line = found.setdefault(family(spec), Counter())
        line += Counter({"right": ok, "all": 1, "codes": not about["note"], about["certainty"]: 1})
        if not ok:
            wrong.append(f"{i} {NETS[seed % len(NETS)]} {suffix} {spec} -> {about['channel']} {about['certainty']}")
            assert about["certainty"] != "certain", wrong[-1]
    return found, wrong


@sizes("step", 13, 1)  # prime to the grid's length: 17 of the 220, each through a channel of its own
def test_two_hundred_files_are_read_as_what_was_sent(tmp_path, step):
    found, wrong = table(tmp_path, range(0, 220, step))
    heads = ("right", "all", "certain", "likely", "not determined", "codes")
    print(f"\n{'family':12s} {' '.join(f'{h:>14s}' for h in heads)}")
    for name, line in found.items():
        print(f"{name:12s} {' '.join(f'{line[h]:14d}' for h in heads)}")
    print(*wrong, sep="\n")
    told = [line for name, line in found.items() if name not in UNTOLD]
    assert sum(line["all"] for line in told) >= 150 // step
    assert sum(line["right"] for line in told) >= 0.95 * sum(line["all"] for line in told), wrong
    assert all(found[n]["right"] == found[n]["not determined"] == found[n]["all"] for n in UNTOLD if n in found)


def test_every_format_gives_the_same_verdict(tmp_path):
    """One update through 16 levels, in four formats; halves on disk are a code of their own."""
    update = exact(5, NETS[1], False, 1)
    received = sent("chain(uniform(levels=16))", update)
    model, params = net(NETS[1], False)
    channels = {
        suffix: captured.prepared(
            Request(written(tmp_path, suffix, received, 0), model, params, attacks="closed_form")
        ).about["channel"]
        for suffix in SUFFIXES
    }
    assert {about["used"] for about in channels.values()} == {"uniform(levels=16)"}
    assert all(about == channels["npz"] for about in channels.values())
    half = {k: v.half() for k, v in received.items()}
    torch.save(half, tmp_path / "half.pt")
    about = captured.prepared(Request(tmp_path / "half.pt", model, params, attacks="closed_form")).about["channel"]
    assert about["channel"] != channels["pt"]["channel"] or about["note"]

"""Shapes without names: which of a list belongs to which parameter, and whether the order leaves a choice."""

from __future__ import annotations

from collections.abc import Sequence

from qleak.check import Expected

Shape = tuple[int, ...]
Place = tuple[int, int, str]  # (which found, which wanted, how)


def align(found: Sequence[Shape], wanted: Sequence[Shape], notes: list[str]) -> list[Place]:
    """(found, wanted, how) of every tensor that has a place: the same order, a part of it, or shapes that occur once.

    A shorter list is laid into the parameters (what is frozen or missing left out), a longer one holds them (buffers left
    out); either only where there is one way to do it.

    Raises:
        Expected: the order leaves a choice, or nothing fits; the first mismatch and how many.
    """
    if not found:
        raise Expected("Expected at least one tensor of numbers, got none.")
    if list(found) == list(wanted):
        twins = len(wanted) - len(set(wanted))
        if twins:
            notes.append(f"{twins} parameters share their shape with another: the order alone tells them apart")
        return [(i, i, "order and shape") for i in range(len(found))]
    short, long = (found, wanted) if len(found) <= len(wanted) else (wanted, found)
    ways = count(short, long)
    if ways == 1:
        places = embed(short, long)
        pairs = list(enumerate(places)) if short is found else [(p, i) for i, p in enumerate(places)]
        return [(f, w, "order and shape") for f, w in pairs]
    if ways == 0:
        once = {s for s in found if list(found).count(s) == 1 == list(wanted).count(s)}
        if len(once) * 2 >= len(found):
            notes.append("the order is not the model's: matched by shapes that occur once")
            return [(list(found).index(s), list(wanted).index(s), "shape alone") for s in wanted if s in once]
        at = next(
            (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted))
        )
        there = f"shape {found[at]}" if at < len(found) else "nothing"
        wrong = sum(a != b for a, b in zip(found, wanted, strict=False)) + abs(len(found) - len(wanted))
        raise Expected(
            f"Expected tensor {at} of shape {wanted[at] if at < len(wanted) else 'none'}, got {there} ({wrong} of "
            f"{max(len(found), len(wanted))} places differ): is it the same architecture? Names would tell."
        )
    raise Expected(
        f"Expected {len(wanted)} tensors or names for them, got {len(found)} that fit in more than one way: "
        "send them by name, or None where one is left out."
    )


def count(short: Sequence[Shape], long: Sequence[Shape]) -> int:
    """In how many ways `short` is a subsequence of `long`."""
    ways = [1] + [0] * len(short)
    for shape in long:
        for i in range(len(short), 0, -1):
            ways[i] += ways[i - 1] if short[i - 1] == shape else 0
    return ways[-1]


def embed(short: Sequence[Shape], long: Sequence[Shape]) -> list[int]:
    """The places of `short` in `long`, the first way there is."""
    places, at = [], 0
    for shape in short:
        at = next(i for i in range(at, len(long)) if long[i] == shape) + 1
        places.append(at - 1)
    return places

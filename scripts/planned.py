"""Recipes as plans without running them: the plan of a command line, its id, and the data it needs."""

from __future__ import annotations

import inspect
import json
import re
from functools import cache
from typing import Any, NamedTuple

import typer

from qleak.cli import recipes, run
from qleak.errors import Expected, Failed
from scripts import claims

# Beside each recipe as its claims have it: settings whose numbers the pages quote.
FURTHER = (("accuracy_under_channel", ("--data", "cifar10-12k")),)


class Job(NamedTuple):
    """One command: `qleak recipe run NAME FLAGS`."""

    name: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.name, *self.flags))


def job(name: str) -> Job:
    """A recipe with the flags that its claims were measured with."""
    return Job(name, tuple(claims.flags(recipes.docstring(recipes.path_of(name)))))


def jobs(names: list[str] | None = None) -> list[Job]:
    """Every recipe (or those named) as its claims have it, and the further settings that are quoted."""
    chosen = names or recipes.names()
    return [j for n in chosen for j in (job(n), *(Job(f, g) for f, g in FURTHER if f == n))]


@cache
def plan_of(job: Job) -> Any:
    """The plan of a command line, as the command itself would make it.

    Raises:
        Expected: a wrong flag, or a set that the plan must look into and that is not here.
    """
    fn, _ = recipes.load(job.name)
    own, common = _given(job)
    return run._changed(fn(**own), common)


def flags_of(job: Job) -> dict[str, Any]:
    """Every flag of a command with its value, as run.json keeps them."""
    return run.flags(*_given(job))


def known(name: str) -> list[str]:
    """The flags that a recipe has of its own."""
    return list(inspect.signature(recipes.load(name)[0]).parameters)


@cache
def _given(job: Job) -> tuple[dict[str, Any], run.Common]:
    """A command's flags, the recipe's own and those that all have, parsed as the command itself does."""
    made: list[tuple[dict[str, Any], run.Common]] = []
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command(job.name)(
        run._as_command(recipes.load(job.name)[0], {}, lambda own, common: made.append((own, common)))
    )
    command(list(job.flags), standalone_mode=False)
    return made[0]


def missing(job: Job) -> str:
    """Why this machine cannot run a command, in words; "" if it can."""
    absent = [name for name in named(job) if name not in _present()]
    if absent:
        return f"no {' and no '.join(absent)} in the data folder"
    try:
        plan_of(job)
    except (Expected, Failed) as error:
        return str(error)
    return ""


def named(job: Job) -> list[str]:
    """The data sets of a command, also where its plan cannot be made without them: then those its flags name."""
    try:
        return needs(plan_of(job))
    except (Expected, Failed):
        return sorted({str(v) for k, v in flags_of(job).items() if k in ("data", "dataset", "public")})


def needs(plan: Any) -> list[str]:
    """The data sets that a plan names and that are not embedded, the public images of a norm included."""
    return sets_in(plan.as_json())


def sets_in(plan: dict[str, Any]) -> list[str]:
    """The same of a plan as run.json has it."""
    from qleak.data.sets import EMBEDDED, SETS

    names = "|".join(sorted({*SETS, "cifar10-12k"}, key=len, reverse=True))
    return sorted({*re.findall(rf"(?<![\w-])(?:{names})(?!\w)", json.dumps(plan))} - set(EMBEDDED))


@cache
def _present() -> set[str]:
    from qleak import data

    return {row.name for row in data.table() if row.present}


def matches(job: Job, told: dict[str, Any]) -> bool:
    """Whether a stored run was made by a command: the recipe's flags that both know have the same values."""
    own, before = _given(job)[0], told.get("flags", {})
    return told.get("recipe") == job.name and all(str(own[k]) == str(before[k]) for k in own if k in before)

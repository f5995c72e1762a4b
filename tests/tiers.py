"""One test in two sizes: the smaller guards the behaviour in CI, the full one prints the figures that a report shows."""

import pytest


def sizes(name, small, full, fast=False):
    """Parametrizes `name`: `small` among the slow tests (among the fast ones with `fast`), `full` with --evidence."""
    tier = () if fast else pytest.mark.slow
    return pytest.mark.parametrize(
        name,
        [pytest.param(small, marks=tier, id="small"), pytest.param(full, marks=pytest.mark.evidence, id="full")],
    )

"""Three tiers: the fast tests always run, `slow` ones with --slow, `evidence` with --evidence. One intra-op thread, as the engine uses."""

import sys

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption(
        "--evidence", action="store_true", help="run the tests at full size that print a report's figures, too"
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        for tier in ("slow", "evidence"):
            if item.get_closest_marker(tier) and not config.getoption(f"--{tier}"):
                item.add_marker(pytest.mark.skip(reason=f"{tier}: run with --{tier}"))


@pytest.fixture
def qleak(monkeypatch, capsys, tmp_path):
    """Runs a command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    from qleak.cli import main

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["qleak", *map(str, argv)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture(params=["compiled", "torch"])
def kernels(request, monkeypatch):
    """The test runs with the compiled kernels, and once more with torch's operations in their place."""
    from qleak import native

    if request.param == "torch":
        monkeypatch.setattr(native, "serves", lambda x: False)
    elif native.library().code is None:
        pytest.skip(native.described())
    return request.param

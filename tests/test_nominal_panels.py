"""The panels hold what the rows say: one a label, noise-free beside it, both axes."""

from pathlib import Path

from qleak.report import nominal_panels
from qleak.report.training import Trained


def run(channels):
    rows = [
        {"key": f"{c}-{s}-{e}", "channel": name, "seed": s, "epoch": e, "test_accuracy": 0.1 + 0.2 * e + 0.01 * s}
        for c, (name, _) in enumerate(channels) for s in range(2) for e in range(3)
    ]  # fmt: skip
    facts = [{"channel": name, "nominal_epsilon": eps} for name, eps in channels]
    return Trained(Path(), {"facts": facts}, rows, [])


def test_a_panel_for_every_label_with_and_without_noise():
    runs = [("unscaled", run([("fp32", None), ("b", 1.0), ("a", 0.1)])), ("scaled", run([("fp32", None), ("c", 0.1)]))]
    found = nominal_panels.panels(runs)
    assert list(found) == [0.1, 1.0]
    assert list(found[0.1]) == ["without noise", "unscaled", "scaled"] and list(found[1.0]) == [
        "without noise",
        "unscaled",
    ]
    assert found[0.1]["scaled"].at == [0, 1, 2] and abs(found[0.1]["scaled"].mean[-1] - 0.505) < 1e-9
    drawn = nominal_panels.figure(runs)
    assert "nominal ε 0.1" in drawn and "correct of 10,000" in drawn and "scaled" in drawn


def test_no_label_no_figure():
    assert nominal_panels.figure([("", run([("fp32", None), ("sign", None)]))]) == ""

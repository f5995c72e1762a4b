"""Law 7: claims can be read from docstrings, and a claim that does not hold is seen."""

import sys
from pathlib import Path

import pytest

from qleak.cli import recipes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def verify():
    sys.path.insert(0, str(ROOT))
    try:
        from scripts import claims
    finally:
        sys.path.remove(str(ROOT))
    return claims


SUMMARY = [
    {"channel": "uniform(bits=8)", "attack": "refine", "control": "none", "psnr_selected": 50.0},
    {"channel": "uniform(bits=8)", "attack": "refine", "control": "prior-only", "psnr_selected": 9.0},
    {"channel": "fp32", "attack": "dlg(outer=20)", "control": "none", "psnr_selected": 5.0},
]


def test_claims_are_read_and_checked(verify):
    doc = "Says much.\n\nClaims:\n    uniform(bits=8) refine psnr_selected >= 45\n    fp32 dlg psnr_selected <= 4\n"
    first, second = verify.claims(doc)
    assert first == ("uniform(bits=8)", "refine", "psnr_selected", ">=", 45.0)
    assert verify.check(first, SUMMARY) == (True, 50.0)
    assert verify.check(second, SUMMARY) == (False, 5.0)
    assert not verify.check(verify.Claim("fp32", "absent", "psnr_selected", ">=", 0.0), SUMMARY)[0]


def test_claims_about_trainings_studies_and_rounds(verify):
    summary = [
        {"channel": "sign", "n": 3, "test_accuracy": 0.8},
        {"channel": "sign", "front": True, "psnr": 15.0, "test_accuracy": 0.8, "control": 9.5, "attack": "cells"},
        {"channel": "sign", "attack": "dlg(outer=3)", "control": "none", "round": 500, "psnr_selected": 7.0},
        {"channel": "sign", "attack": "dlg(outer=3)", "control": "none", "round": 1, "psnr_selected": 30.0},
    ]
    doc = "Claims:\n    sign training test_accuracy >= 0.7\n    sign study psnr <= 16\n    sign round-500.dlg psnr_selected <= 8\n"
    side = [{"part": "batch-4", "channel": "sign", "attack": "cells", "control": "none", "psnr_selected": 33.0}]
    (claim,) = verify.claims("Claims:\n    batch-4 sign cells psnr_selected >= 30\n")
    assert verify.check(claim, side) == (True, 33.0) and not verify.check(claim, summary)[0]
    assert [verify.check(c, summary) for c in verify.claims(doc)] == [(True, 0.8), (True, 15.0), (True, 7.0)]


def test_claims_about_arms_of_a_synthesis(verify):
    summary = [
        {"method": "top-5 sign", "floor": False, "accuracy": 0.62, "epsilon": 0.9991, "judges": []},
        {"method": "top-5 sign ε=10", "floor": False, "accuracy": 0.9, "epsilon": 9.9, "judges": []},
        {"method": "as published", "floor": False, "accuracy": 0.7, "epsilon": None, "judges": []},
    ]
    doc = (
        "Claims (--seeds 5):\n    top-5 sign synthesis accuracy >= 0.5\n    top-5 sign synthesis epsilon <= 1\n"
        "    top-5 sign ε=10 synthesis accuracy >= 0.95\n    as published synthesis epsilon <= 1\n"
    )
    claims = verify.claims(doc)
    assert [c[:3] for c in claims[::2]] == [
        ("top-5 sign", "synthesis", "accuracy"),
        ("top-5 sign ε=10", "synthesis", "accuracy"),
    ]
    found = [verify.check(c, summary) for c in claims]
    assert found[:3] == [(True, 0.62), (True, 0.9991), (False, 0.9)]
    assert not found[3][0]  # no ε is no small ε
    assert not verify.check(claims[0], SUMMARY)[0]


def test_claims_may_name_their_flags(verify):
    doc = "Says much.\n\nClaims (--data x --index 0:4):\n    fp32 dlg psnr_selected >= 4\n"
    assert verify.flags(doc) == ["--data", "x", "--index", "0:4"] and len(verify.claims(doc)) == 1
    assert verify.flags("Claims:\n    fp32 dlg psnr_selected >= 4\n") == []


# Built, tried on other sets, and not measured for lack of their own: no number, no claim.
UNMEASURED = {
    "dlg_cifar100", "idlg_cifar100", "idlg_lfw", "datalens_celeba_gender", "datalens_celeba_hair", "datalens_places365",
}  # fmt: skip


def test_every_measured_recipe_makes_claims(verify):
    for name in set(recipes.names()) - UNMEASURED:
        assert verify.claims(recipes.docstring(recipes.path_of(name))), name

"""Law 2: the guess depends on the View alone, and a View holds nothing of the Secret."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import qleak
from qleak import engine, jobs, random
from qleak.attacks import dlg
from qleak.attacks.drive import drive
from qleak.catalog import build, catalog
from qleak.channels import chain, identity, uniform
from qleak.metrics import Secret
from qleak.plans import Audit
from qleak.types import Attack, Guess

PACKAGE = Path(next(iter(qleak.__path__)))
MODEL = build("models", "lenet(channels=1, size=8, classes=4, width=3)")
ATTACKS = {name: made for name, make in catalog("attacks").items() if isinstance(made := make(), Attack)}
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    x = random.uniform(random.generator("images"), (6, 8, 8)).numpy()
    np.savez(path, x_train=x, y_train=np.arange(6) % 4)
    return str(path)


def plan_of(data, *attacks, channel=None):
    return Audit(MODEL, data, victims=(0, 1), channels=(channel or identity(),), attacks=attacks)


def prepared_job(plan):
    prepared = engine.prepare(plan)
    return prepared, engine.job_of(plan, prepared, plan.chunks()[0])


def guess_of(attack, plan, job) -> Guess:
    view = jobs.view_of(job, plan)
    short = replace(attack, steps=min(STEPS, attack.steps))
    plan = replace(plan, attacks=(short,))
    *_, (guess, _, _) = drive(short, view, jobs.starts(plan, job.chunk, view), every=3)
    return guess


def ignores_the_secret(make, data, channel=None) -> bool:
    """Whether the guess of `make(secret)` stays bitwise the same when the Secret is overwritten and the View is kept.

    It is overwritten in place, so that a reference to it from anywhere would be seen.
    """
    plan = plan_of(data, dlg(), channel=channel)
    prepared, job = prepared_job(plan)
    attack = make(prepared.secret)
    before = guess_of(attack, plan, job)
    prepared.secret.x.fill_(0.25)
    prepared.secret.y.fill_(3)
    after = guess_of(attack, plan, job)
    return all(torch.equal(a, b) for a, b in zip(present(before), present(after), strict=True))


def present(guess):
    """The parts that an attack handed in."""
    return [part for part in guess if part is not None]


@pytest.mark.parametrize("channel", [identity(), chain(uniform(levels=16))], ids=["fp32", "uniform16"])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_guess_depends_on_the_view_alone(name, channel, data):
    plan = plan_of(data, ATTACKS[name], channel=channel)
    if why := ATTACKS[name].applies(jobs.view_of(prepared_job(plan)[1], plan)):
        pytest.skip(why)
    assert ignores_the_secret(lambda secret: ATTACKS[name], data, channel)


def test_the_attacks_of_the_paper_are_covered():
    assert {"dlg", "idlg", "cells", "closed_form"} <= set(ATTACKS)


@pytest.mark.parametrize("field", ["x", "y"])
def test_an_attack_that_peeks_is_caught(field, data):
    """The broken variant: a closure over the Secret, one that reads the image and one that reads the label."""
    honest = dlg()

    def peeking(secret):
        def read(view, state):
            guess = honest.read(view, state)
            if field == "x":
                return guess._replace(x=guess.x + 1e-6 * secret.x[0])
            return guess._replace(labels=secret.y[0].expand_as(guess.labels).clone())

        return replace(honest, read=read)

    assert not ignores_the_secret(peeking, data)


# --- what a job and a view hold ----------------------------------------------------------------------


def reachable(value, seen=None):
    """Every tensor in a value: containers, dataclasses' fields, default arguments, closures and what they hold."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return
    seen[id(value)] = value  # kept alive, so that no other object gets its id
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from reachable(v, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for v in value:
            yield from reachable(v, seen)
    elif callable(value) and hasattr(value, "__code__"):
        cells_ = [c.cell_contents for c in value.__closure__ or () if c is not None]
        yield from reachable([*cells_, *(value.__defaults__ or ())], seen)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from reachable(getattr(value, name), seen)


def holds(value, secret: Secret) -> bool:
    """Whether any tensor reachable from `value` is, or shares memory with, a secret image or batch."""
    wanted = [secret.x, *secret.x, *secret.x.flatten(0, 1)]
    memory = {secret.x.untyped_storage().data_ptr(), secret.y.untyped_storage().data_ptr()}
    for t in reachable(value):
        if t.untyped_storage().data_ptr() in memory:
            return True
        flat = t.detach().flatten().double()
        if any(len(flat) == w.numel() and torch.allclose(flat, w.flatten().double(), atol=1e-6) for w in wanted):
            return True
    return False


@pytest.mark.parametrize("name", ATTACKS)
def test_a_job_and_a_view_hold_no_secret(name, data):
    plan = plan_of(data, ATTACKS[name])
    prepared, job = prepared_job(plan)
    for chunk in plan.chunks():
        job = engine.job_of(plan, prepared, chunk)
        view = jobs.view_of(job, plan)
        assert not holds((job, view), prepared.secret)
        assert not holds(jobs.starts(plan, chunk, view), prepared.secret)
        assert set(view._fields) == {
            "model", "params", "buffers", "channel", "client", "message", "leg", "labels", "statistics", "evidence"
        }  # fmt: skip
        assert view.labels is None and view.statistics is None


def test_the_walk_finds_a_secret_wherever_it_hides(data):
    plan = plan_of(data, dlg())
    prepared, job = prepared_job(plan)
    x = prepared.secret.x
    hidden = replace(plan.attacks[0], read=lambda view, state: x)
    for holder in (
        job._replace(buffers={"b": x[0, 0].clone()}),
        job._replace(buffers={"b": x.double().flatten()}),
        job._replace(params={"y": prepared.secret.y[:1]}),
        hidden,
        jobs.view_of(job, plan)._replace(labels=prepared.secret.y),
    ):
        assert holds(holder, prepared.secret)


def test_a_job_is_plain_data(data):
    """What crosses to a worker is JSON and tensors: nothing that could carry a secret along."""
    _, job = prepared_job(plan_of(data, dlg()))
    allowed = (torch.Tensor, str, int, float, bool, type(None))
    leaves = pytree.tree_leaves(tuple(job))
    assert all(isinstance(leaf, allowed) for leaf in leaves), {type(leaf) for leaf in leaves}


# --- who may see a Secret ----------------------------------------------------------------------------


def mentions(source: str) -> bool:
    """Whether the code (not its comments or docstrings) names Secret."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id == "Secret":
            return True
        if isinstance(node, ast.Attribute) and node.attr in ("Secret", "secret"):
            return True
        if isinstance(node, ast.alias) and node.name.split(".")[-1] == "Secret":
            return True
    return False


def test_only_the_engine_and_the_scores_know_the_secret():
    knowing = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if mentions(p.read_text(encoding="utf-8"))}
    # Of a captured update the truth, where it is given, and the decoys' images go to the scores alone.
    captured = {"engine/captured.py", "engine/decoys.py", "adapters/captured.py"}
    # Bounds are of the very images that were sent; no attack sees them.
    assert knowing == {"engine/audit.py", "engine/bounds.py", "scoring.py", "metrics.py"} | captured


def test_only_score_takes_a_secret():
    taking = []
    for node in ast.walk(ast.parse((PACKAGE / "metrics.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            notes = [ast.unparse(a.annotation) for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation]
            taking += [node.name for note in notes if "Secret" in note]
    assert taking == ["score"]


@pytest.mark.parametrize(
    "code",
    [
        "from qleak.metrics import Secret",
        "import qleak.metrics as m\nm.Secret",
        "def f(p): return p.secret.x",
        "Secret",
    ],
)
def test_the_mention_check_can_fail(code):
    assert mentions(code)
    assert not mentions('"""A Secret."""\n# Secret\n')


def test_attacks_import_neither_data_nor_scores():
    for path in (PACKAGE / "attacks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            assert not any(n.startswith(("qleak.data", "qleak.metrics", "qleak.engine")) for n in names), path

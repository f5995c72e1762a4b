"""DP-SGD whose bound follows a quantile of the norms: the round by hand, its convergence, and its price."""

import math

import pytest
import torch

from qleak import models, random, store, tree
from qleak.channels import chain, clip_l1, clip_l2, gaussian, laplace, mean, total
from qleak.check import Expected
from qleak.client import per_example
from qleak.engine import lessons, training
from qleak.plans import Training, from_json
from qleak.plans.training import Member
from qleak.private.adaptive import multiplier
from qleak.train import adaptive_rounds, federated, sgd


def plan(bound=0.05, z=1.0, **changes):
    fields = {
        "model": models.mlp(hidden=(16,)), "data": "mnist5k", "client": per_example(batch=64), "sampling": "poisson",
        "channels": (chain(clip_l2(bound), total(), gaussian(sigma=z * bound), mean(64)),), "epochs": 3, "seeds": 1,
        "limit": 1000, "lr": 0.5, "rule": sgd(), "clip_quantile": 0.5, "clip_sigma": 5.0, "dtype": "float64",
    }  # fmt: skip
    return Training(**fields | changes)


def first(plan):
    (fed,), group, _ = lessons.begin(plan, (Member(0, 0),))
    return fed, group.states[0]


def test_one_round_by_hand():
    fed, state = first(plan())
    x, y = federated.minibatch(fed, 0, 0)
    rows = fed.client.update(fed.model, state.params, fed.buffers, x, y)
    norms = torch.stack([tree.norm(tree.at(rows, i)) for i in range(len(x))])
    factor = (0.05 / norms).clamp(max=1)
    noise = federated.noise_of(fed, 0, 0, len(x), state.params)
    size = multiplier(1.0, 5.0) * 0.05
    after = adaptive_rounds.advance(fed, state, 0.5)
    for k, v in rows.items():
        summed = torch.einsum("b...,b->...", v, factor) + size * noise[1][0][k]
        assert torch.allclose(after.params[k], state.params[k] - 0.5 * summed / 64, atol=1e-9)
    coin = random.normal(random.generator(0, "count", 0, 0), ())
    share = 0.5 + ((norms <= 0.05).sum() - len(x) / 2 + 5.0 * coin) / 64
    assert float(after.bound["bound"]) == pytest.approx(0.05 * math.exp(-0.2 * (float(share) - 0.5)), rel=1e-6)


def test_the_bound_comes_to_the_quantile_and_noise_follows_it():
    made = plan(lr=1e-9, clip_sigma=2.0)  # weights stand still, so that the quantile does
    fed, state = first(made)
    rows = fed.client.update(fed.model, state.params, fed.buffers, fed.data.x[:500], fed.data.y[:500])
    median = torch.stack([tree.norm(tree.at(rows, i)) for i in range(500)]).median()
    for _ in range(120):
        state = adaptive_rounds.advance(fed, state, 1e-9)
    assert float(state.bound["bound"]) == pytest.approx(float(median), rel=0.15)
    wide = adaptive_rounds.knobs(fed.channel, torch.tensor(4.0), 1.5)
    assert float(wide[0][0]["bound"]) == pytest.approx(0.2) and float(wide[1][0]["size"]) == pytest.approx(0.05 * 6)
    assert float(wide[1][1]["factor"]) == pytest.approx(1 / 64), "the mean stays a mean"


def test_rows_have_the_bound_and_the_same_epsilon_as_a_fixed_one(tmp_path):
    def rows(name, **changes):
        made = plan(epochs=1, **changes)
        with store.open_run(tmp_path / name, made.header()) as run:
            list(training.run(made, run))
            return run.rows()

    moving, fixed = rows("a"), rows("b", clip_quantile=0.0)
    assert moving[0]["clip_bound"] == pytest.approx(0.05) and moving[-1]["clip_bound"] > 0.05
    assert moving[-1]["epsilon"] == fixed[-1]["epsilon"] > 0 and "clip_bound" not in fixed[-1]


def test_refusals_and_old_plans():
    with pytest.raises(Expected, match="clip_l2 and total"):
        plan(channels=(chain(clip_l1(1.0), total(), laplace(eps=1.0), mean(64)),))
    with pytest.raises(Expected, match="clip_l2, total and gaussian"):
        plan(channels=(chain(clip_l2(1.0), total(), mean(64)),))
    with pytest.raises(Expected, match="too small for multiplier"):
        plan(clip_sigma=0.4)
    assert "clip_quantile" not in plan(clip_quantile=0.0, clip_sigma=0.0).as_json()
    assert from_json(plan().as_json()).adaptive() == plan().adaptive()

"""Twenty private steps of ResNet-18, the size that the full grids train: it runs, it moves, its price is known."""

import pytest
import torch

from qleak import models, store
from qleak.accounting import epsilon
from qleak.channels import chain, clip_l2, gaussian, mean, total
from qleak.client import adversarial, per_example
from qleak.engine import lessons, training
from qleak.plans import Training
from qleak.plans.training import Member
from qleak.private import fused


@pytest.mark.slow
def test_resnet18_with_group_norm_trains_in_private(tmp_path):
    plan = Training(
        model=models.resnet18(norm="group"), data="photos", client=adversarial(per_example(batch=2), steps=1),
        channels=(chain(clip_l2(1.0), total(), gaussian(sigma=1.0), mean(2)),), sampling="poisson", epochs=1,
        epoch_rounds=20, seeds=1, test_limit=2, lr=0.1,
    )  # fmt: skip
    assert fused.pick(plan.model, plan.channels[0].stages[0].shrink)[0] == "taps"
    before = lessons.begin(plan, (Member(0, 0),))[1].states[0].params
    with store.open_run(tmp_path / "run", plan.header()) as run:
        list(training.run(plan, run))
        row, after = run.rows()[-1], run.load("state-0-0")
    assert row["round"] == 20 and row["status"] == "ok"
    moved = [float((after[f"states/0/params/{k}"] - v).abs().max()) for k, v in before.items()]
    assert min(moved) > 0 and torch.tensor(moved).isfinite().all()
    from dp_accounting import PoissonSampledDpEvent

    count = len(lessons.sets(plan)[0].x)
    event = PoissonSampledDpEvent(2 / count, plan.channels[0].facts(before).event)
    assert row["epsilon"] == pytest.approx(epsilon(event, 1e-5, 20))

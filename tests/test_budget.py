"""A training stops before its ε would exceed the target, says what it released, and measures robustness on the way."""

import pytest
from safetensors import safe_open

from qleak import ledger, models, store
from qleak.accounting import epsilon
from qleak.attacks import dlg
from qleak.channels import chain, clip_l2, gaussian, laplace, mean, total
from qleak.check import Expected
from qleak.cli.recipes import load
from qleak.client import per_example, weight_noise
from qleak.engine import audit, training
from qleak.plans import Audit, Training, from_json
from qleak.train.evasion import pgd
from qleak.train.schedules import factor

PRIVATE = chain(clip_l2(1.0), total(), gaussian(sigma=1.0), mean(64))


def plan(**changes):
    fields = {
        "model": models.mlp(hidden=(16,)), "data": "mnist5k", "channels": (PRIVATE,), "client": per_example(batch=64),
        "sampling": "poisson", "epochs": 3, "seeds": 1, "limit": 640, "lr": 0.5, "target_epsilon": 3.2,
    }  # fmt: skip
    return Training(**fields | changes)


def run(plan, folder):
    with store.open_run(folder, plan.header()) as held:
        list(training.run(plan, held))
        return held.rows(), held.folder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(plan(robust=pgd(epsilon=0.05, steps=2), robust_images=40), tmp_path_factory.mktemp("budget") / "run")


def test_training_stops_at_the_last_round_that_fits(done):
    rows, _ = done
    last, poisson = rows[-1], _sampled(0.1)
    allowed = last["round"]
    assert 10 < allowed < 20, "the budget ends inside an epoch"
    assert last["epsilon"] == pytest.approx(epsilon(poisson, 1e-5, allowed)) and last["epsilon"] <= 3.2
    assert epsilon(poisson, 1e-5, allowed + 1) > 3.2
    assert last["status"] == "stopped" and rows[1]["status"] == "ok"


def _sampled(rate):
    from dp_accounting import PoissonSampledDpEvent

    return PoissonSampledDpEvent(rate, PRIVATE.facts({}).event)


def test_the_ledger_travels_with_the_model_and_gives_the_same_epsilon(done):
    rows, folder = done
    with safe_open(str(folder / "final_model.safetensors"), "pt") as file:
        held = ledger.from_json(file.metadata()["ledger"])
    assert [e.releases for e in held.entries] == [rows[-1]["round"]]
    assert ledger.spent(held, 1e-5).reported == pytest.approx(rows[-1]["epsilon"])


def test_robust_accuracy_is_a_column_and_not_above_the_clean_one(done):
    rows, _ = done
    assert all(0 <= r["robust_accuracy"] <= 1 for r in rows)
    assert rows[-1]["robust_accuracy"] < rows[-1]["test_accuracy"]


def test_what_has_no_epsilon_has_no_budget(tmp_path):
    open_ended = chain(laplace(scale=1.0, unbounded=True))
    with pytest.raises(Expected, match="a channel with a guarantee beside target_epsilon"):
        run(plan(channels=(open_ended,), client=models_client(), sampling="shuffle"), tmp_path / "a")
    with pytest.raises(Expected, match="what one message"):
        run(plan(target_epsilon=0.01), tmp_path / "b")


def models_client():
    from qleak.client import gradient

    return gradient(batch=64)


def test_sampling_with_replacement_has_no_epsilon(tmp_path):
    rows, _ = run(plan(sampling="replacement", target_epsilon=0.0, epochs=1), tmp_path / "c")
    assert rows[-1]["epsilon"] is None


def test_old_plans_keep_their_id_and_new_fields_come_back():
    old = plan(target_epsilon=0.0)
    assert "target_epsilon" not in old.as_json() and "robust" not in old.as_json()
    new = plan(robust=pgd(), epoch_rounds=5)
    assert from_json(new.as_json()).as_json() == new.as_json() != old.as_json()
    assert from_json(new.as_json()).robust.spec == pgd().spec


def test_schedules():
    assert [factor("decay(0.5)", i, 2, 6) for i in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert factor("cosine", 3, 2, 6) == pytest.approx(0.5)
    for wrong in ("decay(0)", "decay(2)", "linear"):
        with pytest.raises(Expected, match="schedule="):
            factor(wrong, 0, 1, 1)


def test_a_budget_that_all_rounds_fit_stops_nothing(tmp_path):
    rows, _ = run(plan(target_epsilon=50.0, epochs=1), tmp_path / "d")
    assert rows[-1]["round"] == 10 and rows[-1]["status"] == "ok"


def test_audited_rounds_are_counted_by_the_plans_own_epochs(tmp_path):
    changes = {"target_epsilon": 0.0, "epochs": 1, "epoch_rounds": 3, "attacks": (dlg(outer=1),)}
    with pytest.raises(Expected, match="attack_rounds <= 3"):
        run(plan(attack_rounds=(4,), **changes), tmp_path / "e")


def test_an_audit_leaves_a_clients_integer_draws_whole():
    """Cast to a float, a key of 62 bits would be another one, or fail."""
    chosen = {"model": models.mlp(hidden=(4,)), "data": "mnist5k", "victims": (0,), "attacks": (dlg(outer=1),)}
    noisy = Audit(channels=(chain(total()),), client=weight_noise(per_example(batch=1)), **chosen)
    plain = Audit(channels=(chain(total()),), client=per_example(batch=1), **chosen)
    sent, clean = (audit.prepare(p).messages[0][0].code for p in (noisy, plain))
    assert all(v.isfinite().all() for v in sent.values()) and any(not sent[k].equal(clean[k]) for k in sent)


@pytest.mark.parametrize(("name", "flags"), [
    ("dp_batchnorm_pgd", {"noise_multiplier": "ten"}), ("dp_batchnorm_pgd", {"tune_lr": "0.1,x"}),
    ("dp_robust_honest", {"sigma": "-1"}), ("dp_robust_honest", {"normalization": "instance"}),
])  # fmt: skip
def test_wrong_lists_in_flags_are_one_line(name, flags):
    with pytest.raises(Expected, match=next(iter(flags))):
        load(name)[0](**flags)

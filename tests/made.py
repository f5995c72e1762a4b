"""Run folders of syntheses in the engine's schema, with numbers that can be told in advance; made through the store."""

import torch
from folders import interval

from qleak import random
from qleak.store import open_run

ARMS = {  # final accuracies, one a seed; ε; claimed ε; why unsound
    "second moments": ([0.90, 0.92, 0.94], 0.9991, None, ""),
    "top-5 sign": ([0.60, 0.62, 0.64], 0.9873, None, ""),
    "as published": ([0.70, 0.71, 0.72], None, 0.95, "teachers share Adam moments."),
    "one noisy average": ([0.75, 0.76, 0.77], 1.0, None, ""),
}
SHAPE, CLASSES = (1, 8, 8), 10


def synthesis(
    folder, arms=None, budgets=(1.0,), steps=40, status="done", quality=True, judges=("mlp_classifier", "logistic"), seeds=3, **more
):  # fmt: skip
    """A synthesis of each arm × budget; half of what is missing towards the final accuracy is made up every 10 steps."""
    arms = ARMS if arms is None else arms
    several = len(budgets) > 1
    plan = {
        "kind": "synthesis", "schema": 1, "data": "mnist", "methods": ["x()"] * (len(arms) - 1), "size": 8, "limit": 0, "delta": 1e-5,
        "samples": 1000, "epsilons": list(budgets), "seeds": seeds, "seed": 0, "classifiers": list(judges),
    }  # fmt: skip
    header = {
        "kind": "synthesis",
        "plan_id": "m",
        "recipe": "private",
        "plan": plan,
        "flags": {},
        "papers": ["Wang 2021."],
    }
    with open_run(folder, header) as run:
        rows, facts, summary, a = [], [], [], -1
        for name, (finals, epsilon, claimed, unsound) in arms.items():
            for budget in budgets:
                a += 1
                floor, last = name == "one noisy average", 1 if name == "one noisy average" else steps
                arm, finals_ = f"{name} ε={budget:g}" if several else name, finals[:seeds]
                spent = None if epsilon is None else epsilon * budget
                facts.append({
                    "method": arm, "spec": "class_means" if floor else "datalens(teachers=1000)", "floor": floor,
                    "target_epsilon": budget, "steps": last, "epsilon": spent, "claimed_epsilon": claimed, "noise": 373.25,
                    "reason": f"step {last + 1} would pass ε", "unsound": unsound,
                })  # fmt: skip
                for seed, final in enumerate(finals_):
                    for step in sorted({0, *range(10, last, 10), last}) if not floor else [last]:
                        share = 1 - 0.5 ** (step / 10) if step < last else 1.0
                        for j, judge in enumerate(judges if step == last else judges[:1]):
                            end = j == 0 and step == last and quality
                            accuracy = 0.1 + (final - 0.1) * share - 0.05 * j
                            rows.append({
                                "key": f"{a}-{seed}-{step}-{j}", "kind": "synthesis", "id": "m", "data": "mnist", "method": arm,
                                "target_epsilon": budget, "floor": floor, "seed": seed, "step": step,
                                "epsilon": None if spent is None else spent * (step / last) ** 0.5, "claimed_epsilon": claimed,
                                "delta": 1e-5, "classifier": judge, "accuracy": accuracy, "accuracy_max": accuracy + 0.01,
                                "distance": 12.5 if end else None, "copies": 0.0 if end else None,
                                "nearest": 1.02 if end else None, "cpu_s": 3.0, "judge_s": 1.0,
                                "status": "spent" if step == last else "going",
                            })  # fmt: skip
                    if status == "done":
                        draw = random.uniform(random.generator("made", a, seed), (CLASSES * 10, *SHAPE))
                        run.save(
                            f"state-{a}-{seed}",
                            {"sheet": draw, "state/huge": torch.zeros(3), "step": torch.tensor(last)},
                        )
                if status != "done":
                    continue
                mean, ci = sum(finals_) / len(finals_), interval(finals_) or [None, None]
                higher = [None, None] if None in ci else [c + 0.01 for c in ci if c is not None]
                summary.append({
                    "method": arm, "floor": floor, "target_epsilon": budget, "epsilon": spent, "claimed_epsilon": claimed,
                    "delta": 1e-5, "n": len(finals_), "steps": last, "noise": 373.25, "classifier": judges[0],
                    "accuracy": mean, "accuracy_ci": ci, "accuracy_max": mean + 0.01, "accuracy_max_ci": higher,
                    "distance": 12.5 if quality else None, "distance_ci": [12.0, 13.0] if quality else [None, None],
                    "copies": 0.0 if quality else None, "copies_ci": [None, None], "nearest": 1.02 if quality else None,
                    "nearest_ci": [None, None], "cpu_s": 3.0,
                    "judges": [{"classifier": judge, "accuracy": mean - 0.05 * j, "accuracy_ci": ci, "accuracy_max": mean - 0.05 * j + 0.01,
                                "accuracy_max_ci": [None, None]} for j, judge in enumerate(judges)],
                })  # fmt: skip
        floors = {s["target_epsilon"]: s for s in summary if s["floor"]}
        for s in summary:
            floor = floors.get(s["target_epsilon"], {})
            s["floor_accuracy"], s["floor_accuracy_ci"] = floor.get("accuracy"), floor.get("accuracy_ci")
        run.append(rows)
        done = {"summary": summary} if status == "done" else {}
        run.update(
            **{"status": status, "facts": facts, "public": [60000, list(SHAPE), CLASSES], "refused": []} | done | more
        )
    return folder

"""Run folders in the engines' schemas, with numbers that can be told in advance; made through the store."""

import math

import torch
from scipy.stats import t

from qleak import random
from qleak.metrics import wilson
from qleak.store import open_run

MODEL = "lenet(channels=1, size=28, classes=10, width=12, function='sigmoid', init='wide')"
SIZE = 12


def interval(values):
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return None
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return [mean - t.ppf(0.975, n - 1) * sd / math.sqrt(n), mean + t.ppf(0.975, n - 1) * sd / math.sqrt(n)]


def bits_of(channel):
    return 32.0 if channel == "fp32" else float(channel.partition("bits=")[2].partition(")")[0] or 1) + 0.01


def training(folder, accuracies, epochs=5, status="done", model=MODEL, data="mnist", epsilon=None, **more):
    """A training of each channel in `accuracies`: its final test accuracies, one a seed; None: that seed diverged."""
    plan = {
        "kind": "training", "schema": 1, "model": model, "data": data, "channels": list(accuracies),
        "client": "gradient(batch=64)", "clients": 1, "participation": 1.0, "split": "iid", "epochs": epochs,
        "rule": "sgd(momentum=0.9)", "lr": 0.05, "schedule": "constant", "seeds": 3, "seed": 0,
    }  # fmt: skip
    header = {"kind": "training", "plan_id": "t", "recipe": "train", "plan": plan, "status": "running", "flags": {}}
    with open_run(folder, header) as run:
        rows, summary = [], []
        for channel, finals in accuracies.items():
            shared = {"channel": channel, "bits": bits_of(channel), "epsilon": epsilon}
            for seed, final in enumerate(finals):
                for epoch in range(epochs + 1):
                    lost = final is None and epoch > 1
                    # Towards the final accuracy, half of what is missing an epoch; exact at the last.
                    share = 1 - 0.5**epoch if epoch < epochs else 1.0
                    reached = None if lost else 0.1 + ((final or 0.5) - 0.1) * share
                    rows.append(shared | {
                        "key": f"{channel}-{seed}-{epoch}", "id": "t", "model": model, "data": data, "seed": seed,
                        "epoch": epoch, "round": 100 * epoch, "train_loss": None if lost else 2.3 - 2 * share,
                        "test_loss": None if lost else 2.3 - 1.9 * share, "train_accuracy": reached,
                        "test_accuracy": reached, "cpu_s": 1.0, "status": "diverged" if lost else "ok",
                    })  # fmt: skip
            made = {"round": 1, "epoch": 1, "psnr": 99.0, "test_accuracy": 0.0, "seed": 0, "success": True}
            rows.append(shared | made | {"key": f"audit-{channel}-a", "kind": "audit", "attack": "cells"})
            rows.append(shared | made | {"key": f"audit-{channel}-b", "audit": "dlg"})
            kept = [f for f in finals if f is not None]
            mean = sum(kept) / len(kept) if kept else None
            summary.append(shared | {
                "n": len(finals), "diverged": len(finals) - len(kept), "epoch": epochs, "rounds": 100 * epochs,
                "train_loss": 0.3 if kept else None, "train_loss_ci": None, "test_loss": 0.4 if kept else None,
                "test_loss_ci": [0.38, 0.42] if len(kept) > 1 else None, "train_accuracy": mean,
                "train_accuracy_ci": interval(kept) if kept else None, "test_accuracy": mean,
                "test_accuracy_ci": interval(kept) if kept else None, "uplink_mb": 12.5, "cpu_s": 3.0,
            })  # fmt: skip
        run.append(rows)
        facts = [
            {"channel": c, "bits": bits_of(c), "unbiased": True, "exact": True, "epsilon": None} for c in accuracies
        ]
        run.update(status=status, facts=facts, **({"summary": summary} if status == "done" else {}), **more)
    return folder


def audit(
    folder, psnrs, images=2, restarts=1, controls=True, size=SIZE, status="done", data="mnist", extra=None, **more
):
    """An audit of each channel × attack in `psnrs`: {channel: {attack: mean PSNR of the selected restarts}}.

    Restart r lies 3·r dB below, image i i dB around the mean; controls reach 6 and 7 dB. `extra` goes into the summary.
    """
    attacks = list(dict.fromkeys(a for found in psnrs.values() for a in found))
    plan = {
        "kind": "audit", "schema": 1, "model": MODEL, "data": data, "victims": list(range(images)), "attacks": attacks,
        "channels": list(psnrs), "client": "gradient(batch=1)", "restarts": restarts, "seed": 0, "success": 20.0,
    }  # fmt: skip
    header = {"kind": "audit", "plan_id": "a", "recipe": "leak", "plan": plan, "flags": {}, "papers": ["Zhu 2019."]}
    shape = (3, size, size)
    with open_run(folder, header) as run:
        truth = random.uniform(random.generator("folders"), (images, 1, *shape))
        run.save("victims", {"x": truth, "y": torch.zeros(images, 1, dtype=torch.int64)})
        rows, summary = [], []
        for c, (channel, found) in enumerate(psnrs.items()):
            for attack, mean in found.items():
                for control in ("none", "prior-only", "wrong-gradient") if controls else ("none",):
                    key, mine = f"{c}-{attacks.index(attack)}-{control}", []
                    level = {"none": mean, "prior-only": 6.0, "wrong-gradient": 7.0}[control]
                    n = images * (restarts if control == "none" else 1)
                    x = random.uniform(random.generator("folders", key), (n, 1, *shape))
                    at = torch.arange(25, 625, 25)
                    curve = (1 + 100 * torch.exp(-at / 60.0))[:, None].expand(-1, n)
                    run.save(f"chunk-{key}", {"x": x, "curve": curve, "curve_at": at})
                    for lane in range(n):
                        image, r = lane % images, lane // images
                        psnr = level - 3.0 * r + image - (images - 1) / 2
                        mine.append({
                            "key": f"{key}-{lane}", "channel": channel, "attack": attack, "control": control,
                            "image": image, "seed": r, "status": "finished", "loss": 1.0 + r, "mse": 10 ** (-psnr / 10),
                            "psnr": psnr, "ssim": 0.5, "label_ok": True, "order": 0, "selected": r == 0,
                            "success": control == "none" and psnr >= 20, "closures": 600, "cpu_s": 1.0,
                            "bits": bits_of(channel), "epsilon": None, "chunk": key, "lane": lane,
                        })  # fmt: skip
                    wins, chosen = sum(r["success"] for r in mine), [r for r in mine if r["selected"]]
                    summary.append({
                        "channel": channel, "attack": attack, "control": control, "n": n, "images": images,
                        "psnr_selected": level, "psnr_selected_max": max(r["psnr"] for r in chosen),
                        "psnr_oracle": level + 2, "ssim_selected": 0.5, "recovered": sum(r["success"] for r in chosen),
                        "success_rate": wins / n, "success_ci": list(wilson(wins, n)), "label_accuracy": 1.0,
                        "bits": bits_of(channel), "epsilon": None, "cpu_s": 2.0, **(extra or {}),
                    })  # fmt: skip
                    rows += mine
        run.append(rows)
        run.update(status=status, summary=summary, **more)
    return folder


def study(folder, parts, **more):
    """A study over parts that lie below it: {name: (folder, kind)}."""
    listed = [{"name": n, "folder": str(path.relative_to(folder)), "kind": kind} for n, (path, kind) in parts.items()]
    with open_run(folder, {"kind": "study", "plan_id": "s", "recipe": "frontier", "plan": {}, "flags": {}}) as run:
        run.update(**{"parts": listed, "status": "done"} | more)
    return folder

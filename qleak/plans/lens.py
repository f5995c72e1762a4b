"""The DataLens recipes' common flags, under the names of the published command line, as one plan."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from qleak.catalog import build, catalog
from qleak.check import Expected, did_you_mean
from qleak.plans.levels import levels
from qleak.plans.synthesis import Synthesis

ARMS = {
    "signsgd": "top-k stochastic sign",
    "signsgd_nothresh": "top-k sign, no threshold",
    "signsgd_dept": "top-k sign, data-dependent stop",
    "sign": "sign of every pixel",
    "klevelsgd": "k levels",
    "sketchsgd": "count sketch",
    "l2": "unit length, no compression",
    "random_proj": "random projection, vote",
    "pca": "noised PCA, vote",
    "mean_kernel": "block means, vote",
    "plain": "vote a pixel",
    "non_private": "non-private mean",
}


def aggregator(
    arm: str,
    n: int,
    topk: int,
    stochastic: bool,
    max_grad: float,
    klevel: int,
    columns: int,
    pca_dim: int,
    proj_mat: int,
    step_size: float,
    sigma: float,
    sigma_thresh: float,
    thresh: float,
) -> str:
    """The channel of one arm of `ARMS`, written out, for n teachers."""  # fmt: skip
    join, noise, cut = "total('replace-one')", f"gaussian({sigma})", f"threshold({max(thresh * n, 1e-9)})"
    sign = f"stochastic_sign({max_grad or None})" if stochastic else "sign('none')"
    vote = f"histogram(10, {step_size}), {join}, gnmax({sigma}, {sigma_thresh}, {max(thresh * n, 1e-9)})"
    stages = {
        "signsgd": f"top_k(k={topk}), {sign}, {join}, {noise}, {cut}",
        "signsgd_nothresh": f"top_k(k={topk}), {sign}, {join}, {noise}, mean({topk})",
        "signsgd_dept": f"top_k(k={topk}), {sign}, {join}, {noise}, {cut}",
        "sign": f"{sign}, {join}, {noise}, {cut}",
        "klevelsgd": f"klevel({klevel}, {max_grad or 1e-3}), {join}, {noise}, {cut}",
        "sketchsgd": f"unit(), count_sketch({columns}, k={topk}), {join}, {noise}",
        "l2": f"unit(), {join}, {noise}",
        "random_proj": f"project({pca_dim}, blocks={proj_mat}), {vote}",
        "pca": vote,
        "mean_kernel": f"block_mean(8), {vote}",
        "plain": vote,
        "non_private": f"{join}, mean({n})",
    }
    if arm not in stages:
        raise Expected(f"Unknown aggregator {arm!r}.{did_you_mean(arm, ARMS)} Known: {', '.join(ARMS)}.")
    return f"chain({stages[arm]})"


def lens(
    dataset: str = "mnist",
    aggregate: str = "signsgd,l2,non_private",
    size: int = 8,
    teachers_batch: int = 40,
    batch_teachers: int = 100,
    batch_size: int = 10,
    d_step: int = 2,
    g_step: int = 1,
    pretrain_teacher: int = 10,
    learning_rate: float = 1e-3,
    maker_rate: float = 2e-3,
    beta1: float = 0.5,
    epoch: int = 50,
    steps: int = 50,
    train_size: int = 0,
    max_eps: str = "1",
    delta: float = 1e-5,
    accounting: str = "exact",
    orders: int = 200,
    topk: int = 5,
    stochastic: bool = True,
    max_grad: float = 1e-3,
    klevel: int = 4,
    columns: int = 100,
    thresh: float = 0.1,
    sigma: float = 0.0,
    sigma_thresh: float = 0.0,
    step_size: float = 1e-3,
    pca_dim: int = 10,
    pca_sigma: float = 100.0,
    proj_mat: int = 1,
    increasing_dim: bool = False,
    critic: str = "linear_critic",
    maker: str = "mlp_maker",
    z_dim: int = 32,
    tanh: bool = False,
    wgan: bool = False,
    simple_gan: bool = False,
    shuffle: bool = True,
    random_label: bool = False,
    labels: str = "balanced",
    pretrain: str = "",
    pretrain_share: float = 0.3,
    ae: bool = False,
    train_ae: str = "",
    finetune_ae: int = 0,
    hid_dim: int = 32,
    loss: str = "mse",
    classifiers: str = "mlp_classifier",
    samples: int = 10_000,
    limit: int = 0,
    test: int = 0,
    seeds: int = 5,
    eval_every: int = 25,
    save_epoch: int = 10,
    save_vote: bool = False,
    non_release: bool = False,
    files: int = 10,
    full: bool = False,
) -> Synthesis:
    """The plan.

    Args:
        dataset: private records: mnist, fashion_mnist, celeba-gender, celeba-hair, places365, or any other set.
        aggregate: arms separated by commas: signsgd signsgd_nothresh signsgd_dept sign klevelsgd sketchsgd l2
            random_proj pca mean_kernel plain non_private.
        size: images are averaged down to size × size pixels; 0 for the set's own.
        teachers_batch: sets of teachers.
        batch_teachers: teachers of a set; their product is the number of teachers.
        batch_size: images of a step, and of a teacher's minibatch.
        d_step: discriminator steps before a vote.
        g_step: votes after them.
        pretrain_teacher: discriminator steps in the first epoch.
        learning_rate: of teachers.
        maker_rate: of the generator; 0 for learning_rate.
        beta1: Adam's first decay.
        epoch: passes over the teachers' minibatches, at most.
        steps: at most so many in all; 0 for every epoch's.
        train_size: at most so many minibatches an epoch; 0 for all.
        max_eps: budgets, separated by commas; every arm runs at each.
        delta: their δ.
        accounting: exact, or original (the published rule).
        orders: of the published accountant.
        topk: coordinates a teacher votes on.
        stochastic: signs by a coin; else plain signs.
        max_grad: cap b of the coin, and of the k-level range; 0 for none.
        klevel: levels of klevelsgd.
        columns: columns of the sketch.
        thresh: a direction needs this share of all teachers, net.
        sigma: noise on the sum of votes; 0: as much as spends max_eps in all steps.
        sigma_thresh: noise of the vote's test (random_proj, pca, mean_kernel, plain); 0 for sigma.
        step_size: reach of the vote's ten bins.
        pca_dim: directions of random_proj and pca.
        pca_sigma: noise on the covariance, records of length 1.
        proj_mat: blocks of the random projection.
        increasing_dim: directions are added one a step (random_proj, pca).
        critic: discriminator of the teachers.
        maker: generator.
        z_dim: length of its noise.
        tanh: its output is (1 + tanh)/2.
        wgan: Wasserstein critics with clipped weights.
        simple_gan: small multilayer perceptrons with the label beside the image, for both.
        shuffle: records are dealt by a permutation of indices; else in slices.
        random_label: teachers learn with random labels, a control.
        labels: of the common images, uniform or balanced.
        pretrain: a synthesizer whose samples the generator begins from, such as class_means, charged.
        pretrain_share: its share of the budget (of μ²).
        ae: synthesise codes of an autoencoder of public images.
        train_ae: the public set it is trained on; fashion_mnist where that is not the private one.
        finetune_ae: its epochs on private records; no ε then.
        hid_dim: length of a code.
        loss: of the autoencoder, mse or bce.
        classifiers: judges separated by ";".
        samples: synthetic images a judge learns from.
        limit: private records; 0 for all.
        test: test images; 0 for all.
        seeds: syntheses per arm.
        eval_every: steps between measurements; 0 for the end alone.
        save_epoch: steps between checkpoints.
        save_vote: write the votes' statistics, which are not private; refused without --non-release.
        non_release: nothing of this run will be released.
        files: sample files of 10,000 images that each arm writes.
        full: the published size: 28×28 (64×64 for colour), DCGANs, 4,000 teachers or more, for a GPU.
    """
    given = dict(locals())
    o = given | (_full(dataset) if full else {})
    n = o["teachers_batch"] * o["batch_teachers"]
    names = [a.strip() for a in o["aggregate"].split(",")]
    unknown = [a for a in names if a not in ARMS]
    if unknown:
        raise Expected(f"Unknown aggregator {unknown[0]!r}.{did_you_mean(unknown[0], ARMS)} Known: {', '.join(ARMS)}.")
    methods = [build("synthesizers", _method(a, o, n)) for a in names]
    return Synthesis(
        data=o["dataset"], methods=tuple(methods), names=tuple(ARMS[a] for a in names),
        classifiers=tuple(build("classifiers", c) for c in o["classifiers"].split(";")), size=o["size"], limit=o["limit"],
        test_limit=o["test"], epsilons=levels(o["max_eps"], "max_eps"), delta=o["delta"], samples=o["samples"],
        eval_every=o["eval_every"], save_every=o["save_epoch"], seeds=o["seeds"], files=o["files"],
        statistics=o["save_vote"], non_release=o["non_release"],
    )  # fmt: skip


def like(**preset: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a recipe `fn(**flags)` the flags of `lens`, with other defaults."""

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(lens, eval_str=True)
        changed = [p.replace(default=preset.get(name, p.default)) for name, p in own.parameters.items()]
        defaults = {p.name: p.default for p in changed}

        @functools.wraps(fn)
        def recipe(**flags: Any) -> Any:
            return fn(**(defaults | flags))

        recipe.__signature__ = own.replace(parameters=changed)  # type: ignore[attr-defined]
        recipe.__doc__ = lens.__doc__
        return recipe

    return wrap


def _method(arm: str, o: dict[str, Any], n: int) -> str:
    """The synthesizer of one arm, written out."""
    sigma = o["sigma"] or 100.0
    channel = aggregator(
        arm, n, o["topk"], o["stochastic"], o["max_grad"], o["klevel"], o["columns"], o["pca_dim"], o["proj_mat"],
        o["step_size"], sigma, o["sigma_thresh"] or sigma, o["thresh"],
    )  # fmt: skip
    proj = {"pca": "pca"}.get(arm, "random" if arm == "random_proj" and o["increasing_dim"] else "")
    if proj == "random":
        channel = channel.replace(f"project({o['pca_dim']}, blocks={o['proj_mat']}), ", "")
    own = inspect.signature(catalog("synthesizers")["datalens"]).parameters
    values = {k: o[k] for k in own if k in o and k not in ("critic", "maker", "pretrain")}  # those are written as calls
    values |= {"accounting": "data-dependent" if arm == "signsgd_dept" else o["accounting"], "proj": proj}
    values |= {"increasing_dim": o["increasing_dim"] and bool(proj)}
    values |= {"calibrate": not o["sigma"] and arm != "non_private"}
    if o["wgan"]:
        values |= {"learning_rate": 5e-5}  # as published: the flag forces it
    critic, maker = _nets(o)
    parts = f"critic={critic}, maker={maker}, channel={channel}"
    parts += f", pretrain={o['pretrain']}" if o["pretrain"] else ""
    text = f"datalens({parts}, {', '.join(f'{k}={v!r}' for k, v in values.items())})"
    if not o["ae"]:
        return text
    public = o["train_ae"] or ("mnist" if o["dataset"] == "fashion_mnist" else "fashion_mnist")
    return f"latent({text}, public={public!r}, hid_dim={o['hid_dim']}, loss={o['loss']!r}, finetune={o['finetune_ae']})"


def _nets(o: dict[str, Any]) -> tuple[str, str]:
    """Discriminator and generator, written out."""
    if o["simple_gan"]:
        return "simple_critic()", f"simple_maker(z_dim={o['z_dim']})"
    critic = f"{o['critic']}()" if "(" not in o["critic"] else o["critic"]
    if o["wgan"]:
        critic = "dcgan_critic(wgan=True)"
    maker = o["maker"] if "(" in o["maker"] else f"{o['maker']}(z_dim={o['z_dim']})"
    if o["tanh"]:
        maker = f"dcgan_maker(z_dim={o['z_dim']}, tanh=True)"
    return critic, maker


def _full(dataset: str) -> dict[str, Any]:
    """The published commands at ε = 1: networks, teachers, k, σ, threshold, cap."""
    common = {"critic": "dcgan_critic", "maker": "dcgan_maker", "maker_rate": 0.0, "labels": "uniform", "epoch": 300, "steps": 0,
              "batch_size": 30, "max_grad": 1e-5, "samples": 100_000, "classifiers": "cnn_classifier", "eval_every": 0}  # fmt: skip
    if "celeba" in dataset or "places" in dataset:  # none is published for Places365: CelebA's stand in
        width, thresh = (60, 0.85) if "gender" in dataset else (80, 0.9)
        return common | {"size": 64, "z_dim": 100, "teachers_batch": 100, "batch_teachers": width, "topk": 700,
                         "sigma": 9000.0, "thresh": thresh, "pretrain_teacher": 30}  # fmt: skip
    return common | {"size": 28, "z_dim": 50, "teachers_batch": 80, "batch_teachers": 50, "topk": 200, "sigma": 5000.0,
                     "thresh": 0.9 if dataset == "fashion_mnist" else 0.7}  # fmt: skip

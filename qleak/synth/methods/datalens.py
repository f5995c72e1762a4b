"""DataLens: teachers vote on the direction in which a generator's images should move; the noised vote trains it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import one_hot

from qleak.catalog import factory
from qleak.channels import Channel, chain, gaussian, stochastic_sign, threshold, top_k, total
from qleak.check import at_least, between, one_of, positive, whole
from qleak.synth import budgets, canary, loop, makers, votes_kept
from qleak.synth.critics import dcgan_critic
from qleak.synth.loop import Options, State
from qleak.types import Critic, Maker, Public, Synthesizer, Tree

PAPERS = (
    "Wang, Wu, Long, Rimanic, Zhang, Li, 'DataLens: Scalable Privacy Preserving Training via Gradient Compression and "
    "Aggregation' (CCS 2021)",
)


@factory
def datalens(
    critic: Critic | None = None,
    maker: Maker | None = None,
    channel: Channel | None = None,
    teachers_batch: int = 80,
    batch_teachers: int = 50,
    batch_size: int = 30,
    d_step: int = 2,
    g_step: int = 1,
    pretrain_teacher: int = 10,
    learning_rate: float = 1e-3,
    maker_rate: float = 0.0,
    beta1: float = 0.5,
    epoch: int = 300,
    steps: int = 0,
    train_size: int = 0,
    shuffle: bool = True,
    random_label: bool = False,
    labels: str = "uniform",
    accounting: str = "exact",
    orders: int = 200,
    calibrate: bool = False,
    proj: str = "",
    pca_dim: int = 10,
    pca_sigma: float = 5000.0,
    increasing_dim: bool = False,
    pretrain: Synthesizer | None = None,
    pretrain_share: float = 0.3,
    pretrain_steps: int = 200,
    moments: str = "own",
    dealing: str = "index",
) -> Synthesizer:
    """The loop of DataLens over any channel, with the published code's parameters under their names.

    N = teachers_batch · batch_teachers teachers hold ⌊n/N⌋ records each. A step: all take `d_step` Adam steps on a minibatch
    of B = min(batch_size, ⌊n/N⌋) records against images of the current generator (`pretrain_teacher` steps in the first
    epoch); then, `g_step` times, each sends v_i = −∂/∂X of its generator loss at B common images X = G(z, y), every image
    goes through `channel` by itself, and the generator takes an Adam step up ⟨G(z, y), a⟩ along what is released.

    The guarantee is for replacing one of n records: a record belongs to one teacher by its index and touches that teacher's
    weights and moments alone, so what it can change of one image's sum is the channel's sensitivity, and B · g_step
    Gaussian releases a step compose exactly. Generator, samples and all that is made of them are post-processing.

    Args:
        critic: the teachers' discriminator; None for `dcgan_critic()`.
        maker: the generator; None for `dcgan_maker()`.
        channel: from one teacher's row to what is released, `total("replace-one")` over teachers in it; None for the
            published top-k stochastic signs at ε = 1: k = 200, cap 1e-5, σ = 5000, threshold 0.7·N.
        teachers_batch: sets of teachers.
        batch_teachers: teachers of a set; all sets begin with the same weights.
        batch_size: B, and the size of a teacher's minibatch.
        d_step: discriminator steps before a vote.
        g_step: votes after them.
        pretrain_teacher: discriminator steps in place of `d_step` in the first epoch.
        learning_rate: of teachers.
        maker_rate: of the generator; 0 for `learning_rate`.
        beta1: Adam's first decay, for both.
        epoch: passes over the teachers' minibatches, at most.
        steps: at most so many steps in all; 0 for every epoch's.
        train_size: at most so many minibatches an epoch; 0 for all.
        shuffle: records are dealt by a permutation of indices; otherwise in contiguous slices.
        random_label: teachers learn with labels drawn at random, a control.
        labels: of the common images, "uniform" at random or "balanced", each class in turn.
        accounting: what stops: the "exact" composition, "original" (the published rule, looser) or "data-dependent" (the
            published `signsgd_dept`: no guarantee).
        orders: of the published accountant: 1.1, 2, 3, … orders − 1.
        calibrate: the channel's Gaussian noise follows from ε, so that all steps together spend exactly the budget.
        proj: rows are sent in a basis of `pca_dim` directions, "pca" (of the noised covariance, charged) or "random".
        pca_dim: its directions.
        pca_sigma: noise on the covariance of the records, each of length 1.
        increasing_dim: step t uses the first t + 1 directions alone.
        pretrain: a synthesizer whose samples the generator learns to make first, charged; None to begin from noise. (The
            published flag loads weights of unknown provenance.)
        pretrain_share: its share of the budget, of μ².
        pretrain_steps: Adam steps on ‖G(z, y) − x‖².
        moments: "own", or "shared": sets share Adam's moments, as in the published code; no guarantee.
        dealing: "index", or "wrapped": dealt by class, as in the published code; no guarantee.

    Raises:
        Expected: an argument out of range, a channel that does not sum teachers once; when the budget is settled, fewer
            records than teachers, or a step that costs more than the budget.
    """
    given = dict(locals())  # the options are these parameters, by their names
    counts = {
        "teachers_batch": teachers_batch,
        "batch_teachers": batch_teachers,
        "batch_size": batch_size,
        "epoch": epoch,
    }
    counts |= {
        "d_step": d_step,
        "g_step": g_step,
        "pretrain_teacher": pretrain_teacher,
        "pca_dim": pca_dim,
        "pretrain_steps": pretrain_steps,
    }
    whole(**counts, orders=orders, train_size=train_size, steps=steps)
    at_least(1, **counts)
    at_least(0, train_size=train_size, steps=steps, maker_rate=maker_rate)
    at_least(3, orders=orders)
    positive(learning_rate=learning_rate, pca_sigma=pca_sigma)
    between(0, 1 - 1e-9, beta1=beta1)
    between(1e-9, 1 - 1e-9, pretrain_share=pretrain_share)
    one_of(["uniform", "balanced"], labels=labels)
    one_of(["exact", "original", "data-dependent"], accounting=accounting)
    one_of(["", "pca", "random"], proj=proj)
    one_of(["own", "shared"], moments=moments)
    one_of(["index", "wrapped"], dealing=dealing)
    default = (top_k(k=200), stochastic_sign(1e-5), total("replace-one"), gaussian(5000.0), threshold(2800.0))
    channel = channel or chain(*default)
    budgets.one_release(channel)
    given |= {"critic": critic or dcgan_critic(), "maker": maker or makers.dcgan_maker(), "channel": channel}
    options = Options(**given)

    def sample(public: Public, released: Tree, y: Tensor, seed: int) -> Tensor:
        z = makers.noise(options.maker, len(y), seed, "z").to(y.device)
        return options.maker.apply(released, z, one_hot(y, public.classes).to(z)).detach()

    def statistics(public: Public, state: State) -> dict[str, Any]:
        return votes_kept.statistics(options, public, state)

    return Synthesizer(
        spend=lambda public, target, delta: loop.spend(options, public, target, delta),
        init=lambda data, spend, seed: loop.begin(options, data, spend, seed),
        step=lambda data, spend, state, t: loop.advance(options, data, spend, state, t),
        released=lambda state: state.maker,
        sample=sample,
        unsound="; ".join(_faults(options)),
        papers=PAPERS,
        statistics=statistics,
        canary=lambda data, spend, seed, kind: canary.witness(options, data, spend, seed, kind)._asdict(),
    )


def _faults(o: Options) -> list[str]:
    """Why a setting earns no ε."""
    found = [o.pretrain.unsound] if o.pretrain and o.pretrain.unsound else []
    if o.accounting == "data-dependent":
        found.append(
            "it stops by a data-dependent bound, which is itself a function of the records, for one arg max where a vector is released"
        )
    if o.moments == "shared":
        found.append(f"Adam's moments are shared by {o.teachers_batch} sets, so one record reaches a teacher in each")
    if o.dealing == "wrapped":
        found.append("records are dealt by class, so some stand in two teachers and one record moves others")
    return found

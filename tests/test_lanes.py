"""Law 1: a lane computes the same alone and in a crowd, and a plan the same twice."""

from dataclasses import replace

import pytest
import torch

from qleak import engine, jobs, random, tree
from qleak.attacks import cells, closed_form, dlg, idlg, refine
from qleak.attacks.drive import drive, lanes_at
from qleak.catalog import build
from qleak.channels import chain, identity, uniform
from qleak.client import View, gradient
from qleak.plans import Audit, Chunk, Lane
from qleak.store import open_run

MODEL = build("models", "lenet(channels=1, size=8, classes=4, width=3)")
STEPS = 20


def view_of(channel, lanes=3, model=MODEL, dtype=torch.float64):
    """One message per lane, each of an image of its own."""
    params = tree.to(model.init(random.generator(0, "params"))[0], dtype)
    client = gradient()
    sent = []
    for i in range(lanes):
        x = random.uniform(random.generator("image", i), (1, *model.shape)).to(dtype)
        update = client.update(model, params, {}, x, torch.tensor([i % model.classes]))
        noise = channel.draw(random.generator("channel", i), params, ())
        sent.append(channel.send(channel.knobs(), update, noise, channel.init(params), params)[0][-1])
    return View(model, params, {}, channel, client, tree.nested_map(lambda *t: torch.stack(t), *sent))


def begin(attack, view, seeds):
    dtype = next(iter(view.params.values())).dtype
    return tree.to(tree.stack([attack.draw(random.generator("start", s), view) for s in seeds]), dtype)


def trace(attack, view, start, steps=STEPS):
    """The image iterates of every lane `[lane step …]`, and their losses."""
    state, seen, losses = attack.init(view, start), [], []
    for _ in range(steps):
        state, info = attack.step(view, state)
        seen.append(state.x.clone())
        losses.append(info.loss.clone())
    return torch.stack(seen, 1), torch.stack(losses, 1)


def distance(attack, view, seeds=(7, 8, 9)) -> float:
    """How far lane i of a crowd is from the same lane alone, over the first steps."""
    start = begin(attack, view, seeds)
    crowd, losses = trace(attack, view, start)
    worst = 0.0
    for i in range(len(seeds)):
        one = torch.tensor([i])
        alone, loss = trace(attack, view.at(one), begin(attack, view.at(one), seeds[i : i + 1]))
        worst = max(worst, float((crowd[i] - alone[0]).abs().max()), float((losses[i] - loss[0]).abs().max()))
    return worst


# --- draws -----------------------------------------------------------------------------------------


def test_draws_of_a_path_do_not_depend_on_other_draws():
    wanted = random.normal(random.generator(0, "victim", 3), (5,))
    for other in range(4):
        random.uniform(random.generator(0, "victim", other), (100,))
    assert torch.equal(random.normal(random.generator(0, "victim", 3), (5,)), wanted)
    assert not torch.equal(random.normal(random.generator(0, "victim", 4), (5,)), wanted)
    assert not torch.equal(random.normal(random.generator(0, "victim", "3"), (5,)), wanted)
    assert not torch.equal(random.normal(random.generator(1, "victim", 3), (5,)), wanted)


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    for draw in random.DRAWS.values():
        draw(random.generator(0), (3,))
    random.permutation(random.generator(0), 5)
    random.integers(random.generator(0), 5, (3,))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_shared_generator_is_caught():
    """The broken variant: one generator for all, so that a draw depends on those before it."""
    shared = random.generator(0)
    first = random.normal(shared, (5,))
    assert not torch.equal(random.normal(shared, (5,)), first)


def plan_of(attack, **changes):
    base = Audit(
        MODEL,
        "none",
        victims=(0, 1, 2),
        channels=(identity(), chain(uniform(levels=16))),
        attacks=(attack,),
        restarts=3,
    )
    return replace(base, **changes)


def starts_agree(attack) -> bool:
    """`jobs.starts` of a crowd against those of every lane alone, bitwise."""
    plan, view = plan_of(attack), view_of(identity())
    lanes = tuple(Lane(v, r, "none") for v in range(3) for r in range(3))
    crowd = jobs.starts(plan, Chunk("a", 0, 0, True, lanes), view)
    mixed = jobs.starts(plan, Chunk("b", 1, 0, True, lanes[::-1]), view)
    for i, lane in enumerate(lanes):
        alone = jobs.starts(plan, Chunk("c", 0, 0, True, (lane,)), view)
        if not all(torch.equal(crowd[k][i], alone[k][0]) for k in alone):
            return False
        if not all(torch.equal(mixed[k][len(lanes) - 1 - i], alone[k][0]) for k in alone):
            return False
    return True


@pytest.mark.parametrize("attack", [dlg(), idlg(), cells(), closed_form()], ids=lambda a: a.spec.split("(")[0])
def test_starts_are_bitwise_the_same_alone_and_in_a_crowd(attack):
    assert starts_agree(attack)


def test_restarts_and_victims_start_differently():
    view, plan = view_of(identity()), plan_of(dlg())
    lanes = tuple(Lane(v, r, "none") for v in range(3) for r in range(3))
    x = jobs.starts(plan, Chunk("a", 0, 0, True, lanes), view)["x"]
    assert len({tuple(row.flatten().tolist()) for row in x}) == len(lanes)


def test_a_start_from_the_global_generator_is_caught():
    honest = dlg()

    def draw(gen, view):
        return {k: torch.randn(v.shape) for k, v in honest.draw(gen, view).items()}  # noqa: TID251

    assert not starts_agree(replace(honest, draw=draw))


# --- lanes -----------------------------------------------------------------------------------------

CASES = [
    ("dlg", dlg(outer=1), identity()),
    ("idlg", idlg(outer=1), identity()),
    *(
        (
            f"cells-{objective}-{name}-{route}",
            cells(stages=1, steps=12, last=8, objective=objective, route=route),
            channel,
        )
        for objective in ("cells", "l2")
        for name, channel in (("identity", identity()), ("uniform16", chain(uniform(levels=16))))
        for route in ("structured", "double")
    ),
    ("cells-inferred", cells(stages=1, steps=12, last=8, labels="inferred"), chain(uniform(levels=16))),
    ("cells-adam", cells(stages=1, steps=12, last=8, optimizer="adam"), identity()),
    ("refine", refine(stages=1, steps=12, last=8), chain(uniform(levels=16))),
    ("dlg-without-layers", dlg(outer=1), None),
]


@pytest.mark.parametrize(("attack", "channel"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_lane_computes_the_same_alone_and_in_a_crowd(attack, channel):
    model = MODEL if channel is not None else replace(MODEL, layers=None)  # without layers: the vmapped route
    assert distance(attack, view_of(channel or identity(), model=model)) <= 1e-9


def couples(attack):
    """The broken variant: a step that subtracts the mean over lanes, as a batch statistic would."""

    def step(view, state):
        state, info = attack.step(view, state)
        return state._replace(x=state.x - 1e-6 * state.x.mean(0, keepdim=True)), info

    return replace(attack, step=step)


def noisy(attack):
    """The broken variant: a draw inside the step, from the global generator."""

    def step(view, state):
        state, info = attack.step(view, state)
        return state._replace(x=state.x + 1e-6 * torch.randn(state.x.shape)), info  # noqa: TID251

    return replace(attack, step=step)


def crowded(attack):
    """The broken variant: the step length depends on how many lanes there are."""

    def step(view, state):
        state, info = attack.step(view, state)
        return state._replace(x=state.x * (1 + 1e-6 * len(state.x))), info

    return replace(attack, step=step)


@pytest.mark.parametrize("broken", [couples, noisy, crowded])
def test_a_step_that_looks_beside_itself_is_caught(broken):
    assert distance(broken(dlg(outer=1)), view_of(identity())) > 1e-9


def test_draws_inside_vmap_are_refused():
    """Every `vmap` runs with randomness="error", so that a forgotten draw cannot pass unseen."""
    stray = replace(
        MODEL,
        layers=None,
        apply=lambda p, b, x: MODEL.apply(p, b, x + torch.randn_like(x)),  # noqa: TID251
    )
    view = view_of(identity())._replace(model=stray)
    attack = dlg(outer=1)
    with pytest.raises(RuntimeError, match=r"random|vmap"):
        attack.step(view, attack.init(view, begin(attack, view, (1, 2, 3))))


def test_lanes_that_leave_do_not_disturb_the_rest():
    """Compaction: with patience lanes end at different times; each ends as it does alone."""
    attack = dlg(outer=5, patience=15)
    view = view_of(identity(), lanes=4)
    *_, (guess, status, closures) = drive(attack, view, begin(attack, view, range(4)), every=5)
    for i in range(4):
        one = torch.tensor([i])
        *_, (alone, alone_status, alone_closures) = drive(
            attack, view.at(one), begin(attack, view.at(one), [i]), every=5
        )
        assert (int(status[i]), int(closures[i])) == (int(alone_status[0]), int(alone_closures[0]))
        if int(closures[i]) <= STEPS:
            torch.testing.assert_close(guess.x[i], alone.x[0], rtol=0, atol=1e-9)


def test_a_state_can_be_cut_into_lanes():
    attack, view = cells(stages=1, steps=5, last=5), view_of(chain(uniform(levels=16)))
    state = attack.init(view, begin(attack, view, (1, 2, 3)))
    leaves = [v for v in tree.flatten(state).values() if v.ndim]
    assert all(len(v) == 3 for v in leaves)
    kept = [v for v in tree.flatten(lanes_at(state, torch.tensor([2]))).values() if v.ndim]
    assert all(torch.equal(a[0], b[2]) for a, b in zip(kept, leaves, strict=True))


# --- plans -----------------------------------------------------------------------------------------

TINY = Audit(
    build("models", "lenet(channels=1, size=28, classes=10, width=2)"),
    "mnist5k",
    victims=(0, 1),
    channels=(identity(), chain(uniform(levels=16))),
    attacks=(cells(stages=1, steps=5, last=5), dlg(outer=1, inner=5)),
    restarts=2,
    chunk=3,
)


def run(plan, folder, **options):
    with open_run(folder, {"kind": plan.kind, "plan_id": plan.id}) as store:
        for _ in engine.run(plan, store, **options):
            pass
        rows = {r["key"]: {k: v for k, v in r.items() if k != "cpu_s"} for r in store.rows()}
        tensors = {c.key: store.load(f"chunk-{c.key}") for c in plan.chunks() if store.has(f"chunk-{c.key}")}
        return rows, tensors, store.header["summary"]


def test_the_same_plan_twice_is_bitwise_the_same(tmp_path):
    rows, tensors, summary = run(TINY, tmp_path / "a")
    again, same, second = run(TINY, tmp_path / "b")
    assert rows == again
    assert all(torch.equal(tensors[c][k], same[c][k]) for c in tensors for k in tensors[c] if k != "cpu_s")
    assert [{**s, "cpu_s": 0} for s in summary] == [{**s, "cpu_s": 0} for s in second]
    other, *_ = run(replace(TINY, seed=1), tmp_path / "c")
    assert rows != other


@pytest.mark.slow
def test_worker_processes_change_no_number(tmp_path):
    rows, tensors, summary = run(TINY, tmp_path / "one")
    spread, same, second = run(TINY, tmp_path / "two", workers=2)
    assert rows == spread
    assert all(torch.equal(tensors[c][k], same[c][k]) for c in tensors for k in tensors[c] if k != "cpu_s")
    assert [{**s, "cpu_s": 0} for s in summary] == [{**s, "cpu_s": 0} for s in second]


def test_the_chunk_plan_belongs_to_the_id():
    assert replace(TINY, chunk=4).id != TINY.id
    assert replace(TINY).id == TINY.id
    lanes = [(c.channel, c.attack, lane) for c in TINY.chunks() for lane in c.lanes]
    assert len(lanes) == len(set(lanes)) == 2 * 2 * (4 + 2 + 2)
    assert all(len(c.lanes) <= TINY.chunk for c in TINY.chunks())

"""What no attacker can beat: the bounds equal closed forms, efficient estimators attain them, and cheats are cheats."""

import math

import pytest
import torch
from tiers import sizes
from torch.func import jacrev

from qleak import random, tree
from qleak.bounds import Setting, average, bound_of, dp, fitted, identifiability, natural, rate, sound
from qleak.bounds.cramer_rao import cramer_rao, local, psnr_of, van_trees
from qleak.bounds.fisher import fisher
from qleak.bounds.information import information
from qleak.bounds.jacobian import gram, jacobian, of_function, pull, select, update_of
from qleak.bounds.prior import dct_basis
from qleak.catalog import build
from qleak.check import Expected
from qleak.client import crowd, gradient
from qleak.models import deep_mlp, lenet


def normal(*path, shape):
    return random.normal(random.generator("bounds", *path), shape).double()


@pytest.fixture(scope="module")
def small():
    """A small LeNet, its weights, one image and its label."""
    model = lenet(channels=1, size=8, width=3, classes=4)
    params, buffers = model.init(random.generator("net"))
    x = random.uniform(random.generator("image"), (1, 1, 8, 8))
    return Setting(gradient(), model, params, buffers), x, torch.tensor([2])


def dense(setting, x, y, front=lambda g: g):
    """J by one reverse pass a row, in the order of the tensors."""
    update = update_of(setting.client, setting.model, tree.cast(setting.params, torch.float64), setting.buffers, y)
    parts = jacrev(lambda x: front(update(x)))(x.double())
    return {k: v.flatten(-x.ndim).reshape(-1, x.numel()) for k, v in parts.items()}


# --- the Jacobian ---


@pytest.mark.parametrize("memory", [1e9, 1e5])
def test_gram_is_that_of_the_whole_jacobian(small, memory):
    setting, x, y = small
    jac, whole = jacobian(*setting, x, y, memory=memory, block=17), dense(setting, x, y)
    weights = {k: normal("w", k, shape=v.shape).square() for k, v in setting.params.items()}
    expected = sum(j.T @ (weights[k].reshape(-1, 1) * j) for k, j in whole.items())
    assert torch.allclose(gram(jac, weights), expected, rtol=1e-9, atol=1e-12)
    g = {k: normal("g", k, shape=v.shape) for k, v in setting.params.items()}
    pulled = sum(j.T @ (weights[k] * g[k]).reshape(-1) for k, j in whole.items())
    assert torch.allclose(pull(jac, weights, g), pulled, rtol=1e-9, atol=1e-12)
    places = {k: torch.tensor([0, v.numel() - 1]) for k, v in setting.params.items()}
    assert torch.allclose(select(jac, places), torch.cat([whole[k][places[k]] for k in whole]), atol=1e-12)


def test_two_images_in_one_gradient(small):
    setting, x, _ = small
    setting = setting._replace(client=gradient(batch=2))
    pair, y = torch.cat([x, 1 - x]), torch.tensor([2, 0])
    jac, whole = jacobian(*setting, pair, y), dense(setting, pair, y)
    ones = dict.fromkeys(setting.params, torch.ones(()))
    assert torch.allclose(gram(jac, ones), sum(j.T @ j for j in whole.values()), atol=1e-12)


def test_one_layer_net_has_the_textbook_information():
    """g = (δxᵀ, δ), δ = softmax(Wx + b) − y: JᵀJ = |δ|²·1 + (1 + |x|²)DᵀD + (Dᵀδ xᵀ + …), D = (diag p − ppᵀ)W."""
    model = deep_mlp(size=5, classes=4, depth=0)
    params, buffers = model.init(random.generator("layer"))
    x, y = random.uniform(random.generator("x"), (1, 1, 5, 5)), torch.tensor([1])
    w, b, flat = params["fc1.weight"].double(), params["fc1.bias"].double(), x.double().flatten()
    p = torch.softmax(w @ flat + b, 0)
    delta = p - torch.eye(4).double()[1]
    d = (torch.diag(p) - torch.outer(p, p)) @ w
    cross = torch.outer(d.T @ delta, flat)
    expected = delta.square().sum() * torch.eye(25) + (1 + flat.square().sum()) * d.T @ d + cross + cross.T
    jac = jacobian(gradient(), model, params, buffers, x, y)
    assert torch.allclose(gram(jac, dict.fromkeys(params, torch.ones(()))), expected, atol=1e-12)
    prior = natural((1, 5, 5))
    setting, channel = (
        Setting(gradient(), model, params, buffers),
        build("channels", "chain(gaussian(0.1, unbounded=True))"),
    )
    found = {b.kind: b for b in bound_of(setting, channel, x, y, prior, jac=jac, kinds=("cramer-rao", "local"))}
    assert found["cramer-rao"].mse == pytest.approx(float((0.01 * expected.inverse()).diagonal().mean()))
    posterior = (100 * expected + prior.precision()).inverse()
    assert torch.allclose(found["local"].map.flatten(), posterior.diagonal())
    assert found["cramer-rao"].rigorous and not found["local"].rigorous


# --- attained, and not beaten ---

ROWS, PIXELS, SIGMA, TRIES = 40, 16, 0.3, 4000


@pytest.fixture(scope="module")
def linear():
    """y = Ax + σz with x of a Gaussian prior: draws of x and y, F, and the prior."""
    a = normal("a", shape=(ROWS, PIXELS)) * torch.logspace(0, -1.5, PIXELS).double()
    prior = natural((1, 4, 4))
    x = prior.draw(random.generator("x"), TRIES).flatten(1)
    y = x @ a.T + SIGMA * normal("z", shape=(TRIES, ROWS))
    jac = of_function(lambda x: {"y": a @ x.flatten()}, torch.zeros(1, 1, 4, 4).double())
    info = gram(jac, {"y": torch.tensor(1 / SIGMA**2)})
    assert torch.allclose(info, a.T @ a / SIGMA**2)
    return a, prior, x, y, info


def posterior_mean(a, prior, y):
    gain = (a.T @ a / SIGMA**2 + prior.precision()).inverse() @ a.T / SIGMA**2
    return prior.mean + (y - prior.mean @ a.T) @ gain.T


def test_least_squares_attains_cramer_rao_and_shrinkage_beats_it_by_bias(linear):
    a, prior, x, y, info = linear
    bound = cramer_rao(info)
    guess = y @ torch.linalg.pinv(a).T
    assert float((guess - x).square().mean()) == pytest.approx(bound.mse, rel=0.05)
    per_pixel = (guess - x).square().mean(0)
    assert torch.allclose(per_pixel, bound.map, rtol=0.15)
    shrunk = posterior_mean(a, prior, y)
    assert float((shrunk - x).square().mean()) < 0.5 * bound.mse
    # The assumption it breaks: at a fixed image its mean is not that image.
    fixed = x[:1] + 0 * x
    again = posterior_mean(a, prior, fixed @ a.T + SIGMA * normal("again", shape=(TRIES, ROWS)))
    bias = (again.mean(0) - x[0]).square().mean()
    assert float(bias) > 20 * float((again.var(0) / TRIES).mean())


def test_posterior_mean_attains_van_trees_and_only_cheats_beat_it(linear):
    a, prior, x, y, info = linear
    bound = van_trees([info, info, info], prior)
    assert bound.mc_error == pytest.approx(0, abs=1e-12) and bound.mse == pytest.approx(local(info, prior).mse)
    error = float((posterior_mean(a, prior, y) - x).square().mean())
    assert error == pytest.approx(bound.mse, rel=0.05)
    least_squares = float((y @ torch.linalg.pinv(a).T - x).square().mean())
    assert least_squares > bound.mse
    # Told part of the truth (the noise): not a function of the message.
    told = (posterior_mean(a, prior, y) + x) / 2
    assert float((told - x).square().mean()) < 0.5 * bound.mse
    # Images of another law than the prior says: nearer to the mean than it allows for.
    narrow = prior._replace(values=prior.values / 25)
    tame = narrow.draw(random.generator("tame"), TRIES).flatten(1)
    seen = tame @ a.T + SIGMA * normal("seen", shape=(TRIES, ROWS))
    assert float((posterior_mean(a, narrow, seen) - tame).square().mean()) < 0.7 * bound.mse


def test_known_numbers_take_their_directions_out(linear):
    _, prior, _, _, info = linear
    exact = normal("known", shape=(3, PIXELS))
    limit = local(info + 1e9 * exact.T @ exact, prior)
    assert local(info, prior, exact).mse == pytest.approx(limit.mse, rel=1e-4)
    assert limit.mse < local(info, prior).mse


def test_nonlinear_updates_of_prior_images_obey_van_trees():
    """y = tanh(3x)+σz for one pixel: the exact posterior mean, by quadrature, does not beat it; and nearly attains it."""
    prior = natural((1, 1, 1), std=0.3)
    sigma = 0.2
    x = prior.draw(random.generator("x"), 2000).flatten()
    y = torch.tanh(3 * x) + sigma * normal("z", shape=(2000,))
    grid = torch.linspace(-1.5, 2.5, 2001, dtype=torch.float64)
    log = -(y[:, None] - torch.tanh(3 * grid)).square() / (2 * sigma**2) - (grid - 0.5).square() / (2 * 0.09)
    guess = (torch.softmax(log, 1) * grid).sum(1)
    error, spread = float((guess - x).square().mean()), float((guess - x).square().std()) / 2000**0.5
    draws = prior.draw(random.generator("draws"), 500).flatten()
    bound = van_trees([(3 / torch.cosh(3 * v).square() / sigma).square().reshape(1, 1) for v in draws], prior)
    assert bound.mse < error + 3 * spread and 0 < bound.mc_error < 0.1 * bound.mse
    # The local form is no bound on average: where the slope is steep it is far above, where flat below.
    assert min(local((3 / torch.cosh(3 * v).square() / sigma).square().reshape(1, 1), prior).mse for v in draws) < error


def test_jackknife_takes_out_the_bias_of_few_draws():
    prior = natural((1, 1, 1), std=1.0)
    gen = random.generator("few")
    means, naive = [], []
    for _ in range(300):
        draws = [random.normal(gen, (1, 1)).square().double() for _ in range(8)]
        means.append(van_trees(draws, prior).mse)
        naive.append(local(sum(draws) / 8, prior).mse)
    truth = 1 / (1 + 1)
    assert abs(sum(means) / 300 - truth) < abs(sum(naive) / 300 - truth) / 2


# --- what a message tells ---


@pytest.mark.parametrize(
    "spec", ["gaussian(0.1, unbounded=True)", "laplace(scale=0.1, unbounded=True)", "stochastic(levels=5)"]
)
def test_information_is_the_mean_square_score(spec):
    """W_i = E (∂/∂g_i ln P(message))², by the channel's own likelihood over many draws."""
    channel, n, tries = build("channels", f"chain({spec})"), 10, 20_000
    g = {
        "w": torch.tensor([0, 1, 0.03, 0.07, 0.3, 0.4, 0.62, 0.7, 0.9, 0.95], dtype=torch.float64) + 0.5
    }  # the ends first
    knobs = channel.knobs(torch.float64)
    shape = {"w": g["w"].expand(tries, n)}
    noise = channel.draw(random.generator("send", spec), shape)

    def score(noise):
        message = channel.send(knobs, g, noise, channel.init(g), g)[0][-1]
        return torch.func.grad(lambda v: channel.misfit(knobs, message, {"w": v}, g))(g["w"])

    scores = torch.func.vmap(score)(noise)
    message = channel.send(knobs, g, channel.draw(random.generator(0), g), channel.init(g), g)[0][-1]
    info = information(channel, g, g, message)
    found = info.weights.get("w", info.weights.get(""))
    inside = slice(2, None)
    assert torch.allclose(scores.square().mean(0)[inside], found.expand(n)[inside], rtol=0.1)
    assert info.known["w"].tolist() == [0, 1] if "stochastic" in spec else not info.known


def test_stochastic_sign_tells_what_its_coin_tells():
    channel = build("channels", "chain(stochastic_sign(cap=0.5))")
    g = {"w": torch.tensor([0.9, 0.2, -0.3, 0.0, 0.1])}
    message = channel.send(channel.knobs(), g, channel.draw(random.generator(0), g), channel.init(g), g)[0][-1]
    w = information(channel, g, g, message).weights["w"]
    assert torch.allclose(w[[1, 2, 4]], 1 / (0.25 - g["w"][[1, 2, 4]].double().square()))
    assert w[0] == 0  # beyond the cap: certain


@pytest.mark.parametrize(
    "spec", ["clip_l2(0.05)", "clip_l2(50.0)", "clip_l1(0.5)", "clip_layers(0.05)", "automatic(1.0)", "unit()"]
)
def test_clipping_goes_through_the_clip(small, spec):
    setting, x, y = small
    channel = build("channels", f"chain({spec}, gaussian(0.1, unbounded=True))")
    info = information(channel, setting.params, setting.params)
    assert info.shrink is not None and info.front is None
    stage = channel.stages[0]
    knobs = {k: torch.tensor(v).double() for k, v in stage.knobs.items()}
    whole = dense(setting, x, y, lambda g: stage.send(knobs, g, {}, ())[0])
    found = fisher(jacobian(*setting, x, y), info).matrix
    expected = 100 * sum(j.T @ j for j in whole.values())
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))


def test_linear_stages_and_joins_in_front(small):
    setting, x, y = small
    channel = build("channels", "chain(project(10), gaussian(0.1, unbounded=True))")
    rows = update_of(*setting, y)(x)
    info = information(channel, rows, setting.params)
    jac = jacobian(*setting, x, y, info.front)
    assert sum(v.numel() for v in jac.value.values()) <= 10 * len(setting.params)
    few = fisher(jac, info).matrix
    assert int(torch.linalg.matrix_rank(few)) < x.numel()
    assert math.isinf(cramer_rao(few).mse)
    two = setting._replace(client=crowd(gradient(), clients=2))
    pair, labels = torch.cat([x, 1 - x]), torch.tensor([2, 0])
    summed = build("channels", "chain(total(), gaussian(0.1, unbounded=True))")
    info = information(summed, update_of(*two, labels)(pair), setting.params)
    joint = fisher(jacobian(*two, pair, labels, info.front), info).matrix
    first = dense(setting, x, y)
    assert torch.allclose(joint[:64, :64], 100 * sum(j.T @ j for j in first.values()), atol=1e-8)


def test_noise_bounds_what_follows_it(small):
    """A code behind the noise loses information; the bound is that of the noise alone."""
    setting, x, y = small
    prior = natural((1, 8, 8))
    specs = ("gaussian(0.1, unbounded=True)", "gaussian(0.1, unbounded=True), uniform(levels=4)")
    found = [bound_of(setting, build("channels", f"chain({s})"), x, y, prior, kinds=("local",))[0] for s in specs]
    assert found[0].mse == found[1].mse and "no loss" in found[1].assumptions
    twice = build("channels", "chain(gaussian(0.3, unbounded=True), gaussian(0.4, unbounded=True))")
    assert float(information(twice, setting.params, setting.params).weights[""]) == pytest.approx(4.0)


def message_of(channel, setting, x, y):
    rows = update_of(*setting, y)(x)
    noise = channel.draw(random.generator("message"), setting.params)
    return channel.send(channel.knobs(), rows, noise, channel.init(setting.params), setting.params)[0][-1]


def test_finer_codes_bound_less(small):
    setting, x, y = small
    prior = natural((1, 8, 8))
    jac = jacobian(*setting, x, y)
    for name in ("uniform", "stochastic", "top_k(ratio=0.5), uniform"):
        psnrs = []
        for levels in (4, 16, 256):
            channel = build("channels", f"chain({name}(levels={levels}))")
            (b,) = bound_of(setting, channel, x, y, prior, message_of(channel, setting, x, y), ("local",), jac)
            psnrs.append(b.psnr)
        assert psnrs == sorted(psnrs) and psnrs[0] < psnrs[-1] - 10, name


def test_where_nothing_is_known_it_says_why(small):
    setting, x, y = small
    prior = natural((1, 8, 8))
    channel = build("channels", "chain(sign())")
    kinds = ("cramer-rao", "local", "rate", "dp-unbiased", "dp-reconstruction")
    bounds = {b.kind: b for b in bound_of(setting, channel, x, y, prior, message_of(channel, setting, x, y), kinds)}
    assert "without an end" in bounds["local"].why and math.isinf(bounds["local"].psnr)
    assert "no ε" in bounds["dp-unbiased"].why
    assert bounds["rate"].rigorous and sound(list(bounds.values())) is bounds["rate"]
    with pytest.raises(Expected, match="shape"):
        bound_of(setting, channel, x, y, natural((3, 8, 8)))
    with pytest.raises(Expected, match="kind"):
        bound_of(setting, channel, x, y, prior, kinds=("van-trees",))


def test_average_over_the_prior(small):
    setting, _, _ = small
    prior = natural((1, 8, 8))
    weak, strong = (
        average(setting, build("channels", f"chain(gaussian({s}, unbounded=True))"), prior, draws=3)
        for s in (0.1, 0.001)
    )
    assert weak.rigorous and weak.psnr < strong.psnr and weak.mc_error > 0
    assert not average(setting, build("channels", "chain(uniform(levels=16))"), prior, draws=3).rigorous
    pictures = prior.draw(random.generator("public"), 3)
    assert not average(
        setting, build("channels", "chain(gaussian(0.1, unbounded=True))"), prior, images=pictures
    ).rigorous
    assert "end" in average(setting, build("channels", "chain(sign())"), prior, draws=2).why


# --- the prior ---


def test_fitted_prior_has_the_images_moments():
    truth = natural((2, 4, 4))
    images = truth.draw(random.generator("fit"), 20_000)
    found = fitted(images)
    assert torch.allclose(found.covariance(), truth.covariance(), atol=0.01 * float(truth.covariance().max()) * 3)
    assert torch.allclose(found.precision() @ found.covariance(), torch.eye(32).double(), atol=1e-8)
    few = fitted(images[:5])
    assert float(few.values.min()) > 0 and len(few.values) == 32
    basis = dct_basis((2, 4, 4))
    assert torch.allclose(basis.T @ basis, torch.eye(32).double(), atol=1e-12)
    with pytest.raises(Expected):
        fitted(images[:1])


# --- bits ---


def test_rate_distortion_of_gaussians():
    assert rate.distortion(torch.full((8,), 2.0), 16.0) == pytest.approx(2.0 * 2.0**-4)
    assert rate.distortion(torch.tensor([1.0, 0.01]), 1.0) == pytest.approx((0.25 + 0.01) / 2)
    assert rate.distortion(torch.tensor([1.0, 0.01]), 0.0) == pytest.approx(1.01 / 2)
    # The best one-bit quantizer of a Gaussian, 1 − 2/π (Lloyd, Max), is above it.
    assert 1 - 2 / math.pi > rate.distortion(torch.ones(1), 1.0) == pytest.approx(0.25)
    prior = natural((1, 8, 8))
    assert rate.floor(prior, rate.needed(prior, 30.0)) == pytest.approx(1e-3, rel=1e-6)
    with pytest.raises(Expected):
        rate.distortion(torch.ones(2), -1.0)


# --- differential privacy ---


def test_renyi_divergences_of_mechanisms():
    import dp_accounting as events

    assert dp.renyi(events.GaussianDpEvent(2.0)) == pytest.approx(0.25)
    assert dp.renyi(events.SelfComposedDpEvent(events.GaussianDpEvent(2.0), 3)) == pytest.approx(0.75)
    x = torch.linspace(-60, 60, 2_000_001, dtype=torch.float64)
    p, q = torch.exp(-x.abs()) / 2, torch.exp(-(x - 1).abs()) / 2
    numeric = math.log(float((p**3 / q**2).sum() * (x[1] - x[0]))) / 2
    assert dp.renyi(events.LaplaceDpEvent(1.0), 3.0) == pytest.approx(numeric, abs=1e-5)
    assert dp.renyi(events.PoissonSampledDpEvent(0.1, events.GaussianDpEvent(1.0))) is None


def test_unbiased_attacks_on_a_private_number_obey_the_bound():
    """x ∈ [0, 1] behind N(0, σ²): x̂ = y is unbiased with error σ², and the bound is σ²/4 for small privacy loss."""
    for sigma in (0.5, 1.0, 5.0):
        bound = dp.unbiased(1 / sigma**2)
        assert bound <= sigma**2
    assert dp.unbiased(1 / 50**2) == pytest.approx(50**2 / 4, rel=1e-3)
    # A constant guess errs less than any unbiased one may: it is biased.
    assert dp.unbiased(1 / 5**2) > 1 / 12


def test_reconstruction_success_of_the_best_attack_on_candidates():
    """N orthogonal images at distance 1, uniform prior: the best attack's success, simulated, is within every γ."""
    count, sigma, tries = 16, 0.5, 20_000
    y = sigma * normal("noise", shape=(tries, count))
    y[:, 0] += 1 / math.sqrt(2)
    hit = float((y.argmax(1) == 0).double().mean())
    mu = 1 / sigma
    exact = dp.success(-math.log(count), mu=mu)
    by_order = min(dp.success(-math.log(count), epsilon=a * mu**2 / 2, order=a) for a in (1.5, 2, 3, 4, 8))
    assert hit < exact + 0.01 and exact <= by_order + 1e-9
    assert dp.success(-math.log(2), mu=0.0) == pytest.approx(0.5)
    assert dp.success(-1.0, epsilon=0.0) == pytest.approx(math.exp(-1.0))
    with pytest.raises(Expected):
        dp.success(0.0)


def test_blind_guesses_are_no_likelier_than_said():
    prior = natural((1, 2, 2), std=1.0)
    x = prior.draw(random.generator("blind"), 200_000).flatten(1)
    error = (x - prior.mean).square().mean(1)
    for mse in (0.05, 0.2, 0.5):
        assert float((error <= mse).double().mean()) <= math.exp(dp.blind(prior, mse))
    assert dp.blind(prior, 2.0) == 0.0
    assert dp.quantile(-2000.0) == pytest.approx(-63.12, abs=0.05)


def test_no_guess_reaches_the_privacy_psnr():
    """Behind strong privacy the best guess is near the blind one, and rarely above what is said."""
    prior = natural((1, 8, 8))
    levels = [dp.reached(prior, mu) for mu in (0.1, 1.0, 10.0)]
    assert levels == sorted(levels)
    x = prior.draw(random.generator("reach"), 4000).flatten(1)
    mu = 1.0  # the release of x itself, at distance ≤ 1/σ between images: here of ‖x‖ ≤ 1 alone
    unit = x - prior.mean
    unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1.0)
    y = unit + 2 / mu * normal("private", shape=tuple(x.shape))
    guess = prior.mean + 0.05 * y
    psnr = -10 * (guess - x).square().mean(1).log10()
    assert float((psnr > dp.reached(prior, mu)).double().mean()) <= 0.5


def test_private_channels_have_privacy_bounds(small):
    setting, x, y = small
    channel = build("channels", "chain(clip_l2(1.0), gaussian(4.0))")  # μ = 2/4 between any two images
    kinds = ("dp-unbiased", "dp-reconstruction", "local")
    found = {b.kind: b for b in bound_of(setting, channel, x, y, natural((1, 8, 8)), kinds=kinds)}
    assert found["dp-unbiased"].mse == pytest.approx(1 / 4 / math.expm1(0.25))
    assert found["dp-reconstruction"].rigorous and found["local"].psnr < found["dp-reconstruction"].psnr


# --- what a gradient does not see ---


def test_blind_directions_and_the_label_as_nuisance(small):
    setting, x, y = small
    seen = identifiability.spectrum(jacobian(*setting, x, y))
    assert seen.rank == 64 and seen.unseen == 0 and seen.condition > 1
    model = deep_mlp(size=5, classes=4, depth=1, width=3)
    params, buffers = model.init(random.generator("thin"))
    relu = Setting(gradient(), model, params, buffers)
    image = random.uniform(random.generator("x"), (1, 1, 5, 5))
    assert identifiability.spectrum(jacobian(*relu, image, torch.tensor([0]))).rank == 25
    known = gram(jacobian(*setting, x, y), dict.fromkeys(setting.params, torch.ones(())))
    unknown = identifiability.label_unknown(*setting, x, y)
    gain = torch.linalg.eigvalsh(known - unknown)
    assert float(gain.min()) > -1e-9 * float(known.trace()) and float(gain.max()) > 1e-6


def test_a_batch_hides_its_images(small):
    setting, x, y = small
    alone = gram(jacobian(*setting, x, y), dict.fromkeys(setting.params, torch.ones(())))
    pair = setting._replace(client=gradient(batch=2))
    both = torch.cat([x, 1 - x])
    jac = jacobian(*pair, both, torch.tensor([2, 0]))
    joint = identifiability.others_unknown(gram(jac, dict.fromkeys(setting.params, torch.ones(()))), 64, 0)
    # The mean halves what one image moves, and the other image is a nuisance on top.
    assert float(torch.linalg.eigvalsh(alone / 4 - joint).min()) > -1e-9
    assert joint.trace() < 0.999 * alone.trace() / 4


def test_psnr_of_errors():
    assert psnr_of(0.01) == pytest.approx(20.0) and psnr_of(math.inf) == -math.inf and psnr_of(0.0) == math.inf


@sizes("memory", 1e9, 1.5e8)
def test_the_colour_lenet_in_slices(memory):
    """3,072 pixels, 85,000 numbers: JᵀJ·v is what one jvp and one vjp of the whole update say, held or made again."""
    model = lenet()
    params, buffers = model.init(random.generator("colour"))
    x, y = random.uniform(random.generator("x"), (1, 3, 32, 32)), torch.tensor([7])
    setting = Setting(gradient(), model, params, buffers)
    update = update_of(setting.client, model, tree.cast(params, torch.float64), buffers, y)
    v = normal("v", shape=tuple(x.shape))
    moved = torch.func.jvp(update, (x.double(),), (v,))[1]
    expected = torch.func.vjp(update, x.double())[1](moved)[0].flatten()
    found = gram(jacobian(*setting, x, y, memory=memory), dict.fromkeys(params, torch.ones(()))) @ v.flatten()
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))

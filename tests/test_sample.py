"""Samplers and metrics: against exact moments, on several ranks, resumed to the last bit."""

import itertools
import math
import os
import signal
import time

import numpy as np
import pytest
from mpi4py import MPI
from numpy.testing import assert_allclose, assert_array_equal

from helpers import deal, join, make_mesh, real, split
from vmad_lit.contrib.chisquare import MPIVectorSpace
from vmad_lit.contrib.metrics import (
    DiagonalMetric,
    FourierMetric,
    Moments,
    ProductMetric,
    fitting_metric,
    wiener_scale,
)
from vmad_lit.contrib.optimize import Preconditioner, Problem, autosave
from vmad_lit.contrib.sample import (
    HMC,
    NUTS,
    Chain,
    DualAveraging,
    Sampler,
    StateError,
    Table,
    Target,
    first_step,
    leapfrog,
    small_parts,
    windows,
)
from vmad_lit.contrib.vectorspace import FieldSpace, ProductSpace, VectorSpace
from vmad_lit.lib.signals import heed_signals
from vmad_lit.lib.spectra import wavenumbers

COMM, ALONE = MPI.COMM_WORLD, MPI.COMM_SELF
SAMPLERS = HMC(length=2.0), NUTS()
SHORT = HMC(steps=2, jitter=0.6), NUTS(maxdepth=2)
quick = pytest.mark.parametrize("sampler", SHORT, ids=lambda s: type(s).__name__)
named = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)


def quadratic(sigma, vs=None, **options):
    """A normal density of independent components."""
    vs = vs or VectorSpace()
    return Problem(lambda x: 0.5 * vs.dot(x / sigma, x / sigma), lambda x: x / sigma**2, vs=vs, **options)


def banana():
    """x is normal around 1, and y around x^2: so is `straight` of both, around 1 and 0."""
    return Problem(
        lambda v: 0.5 * (v[0] - 1) ** 2 + 0.5 * (v[1] - v[0] ** 2) ** 2,
        lambda v: np.array([v[0] - 1 - 2 * v[0] * (v[1] - v[0] ** 2), v[1] - v[0] ** 2]),
    )


def straight(draws):
    """A banana's draws, with y less x^2. (The variance of y itself has so long a tail that its own error is not known.)"""
    x, y = draws.T
    return np.stack([x, y - x**2], axis=1)


def with_option(sampler, **options):
    return type(sampler)(**{name: getattr(sampler, name) for name in sampler.options()} | options)


def effective(draws):
    """The effective number of draws of a series, by Geyer's initial positive sequence (the tests' own)."""
    x = np.asarray(draws) - np.mean(draws)
    n = len(x)
    spectrum = np.abs(np.fft.rfft(x, 2 * n)) ** 2
    rho = np.fft.irfft(spectrum)[:n] / np.sum(x * x)
    pairs = rho[0 : n - 1 : 2] + rho[1:n:2]
    negative = np.flatnonzero(pairs < 0)
    pairs = pairs[: negative[0] if len(negative) else len(pairs)]
    return n / max(2 * pairs.sum() - 1, 1 / n)


def assert_moments(draws, mean, variance, sigmas=4.5):
    """Whether draws have a mean and a variance, to so many standard errors, from effective numbers of draws."""
    for x, m, v in zip(
        np.reshape(draws, (len(draws), -1)).T, np.ravel(mean), np.ravel(variance), strict=True
    ):
        squares = (x - m) ** 2
        assert abs(np.mean(x) - m) < sigmas * math.sqrt(v / effective(x))
        assert abs(np.mean(squares) - v) < sigmas * np.std(squares) / math.sqrt(effective(squares))
        assert effective(x) > 15


# The integrator


def test_leapfrog_is_reversible_of_second_order_and_keeps_volume():
    target = Target(banana())
    start, p = target(np.array([0.3, -0.2])), np.array([0.7, -1.1])
    end, q = leapfrog(target, start, p, 0.03, 20)
    back, r = leapfrog(target, end, -q, 0.03, 20)
    assert_allclose(back.z, start.z, atol=1e-12)
    assert_allclose(r, -p, atol=1e-12)
    back, r = leapfrog(target, end, q, -0.03, 20)
    assert_allclose([*back.z, *r], [*start.z, *p], atol=1e-12)
    # One step after the other is the same
    place, s = start, p
    for _ in range(20):
        place, s = leapfrog(target, place, s, 0.03)
    assert_allclose([*place.z, *s], [*end.z, *q], rtol=1e-12)
    # The error of the energy at a given time falls with the square of the step
    energy = start.U + target.kinetic(p)
    errors = []
    for steps in 200, 400, 800:
        far, s = leapfrog(target, start, p, 1.0 / steps, steps)
        errors.append(abs(far.U + target.kinetic(s) - energy))
    assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 2, atol=0.05)

    # The Jacobian of the map has the determinant 1
    def flow(v):
        place, s = leapfrog(target, target(v[:2]), v[2:], 0.1, 3)
        return np.array([*place.z, *s])

    v, h = np.array([*start.z, *p]), 1e-6
    jacobian = np.transpose([(flow(v + h * e) - flow(v - h * e)) / (2 * h) for e in np.eye(4)])
    assert abs(np.linalg.det(jacobian) - 1) < 1e-7 and np.linalg.norm(jacobian - np.eye(4)) > 1


def test_gradients_are_those_of_the_density_in_the_samplers_variables():
    root = np.array([[2.0, 0.0], [1.0, 0.5]])
    inverse = np.linalg.inv(root)
    precond = Preconditioner(
        lambda v, direction: root @ v if direction == 1 else inverse.T @ v,
        lambda v, direction: root.T @ v if direction == 1 else inverse @ v,
    )
    problem = banana()
    problem.preconditioner, problem.temperature = precond, 2.0
    target = Target(problem, metric=DiagonalMetric([3.0, 0.2]).prepared(problem.vs, np.zeros(2)))
    place, d, h = target.at(np.array([0.4, 0.9])), np.array([0.3, -0.8]), 1e-5
    assert_allclose(target(place.z).x, place.x)
    assert_allclose(place.U, problem.objective(place.x) / 2)
    slope = (target(place.z + h * d).U - target(place.z - h * d).U) / (2 * h)
    assert_allclose(place.g @ d, slope, rtol=1e-8)
    assert target.gradients == 4


# Moments


@named
def test_a_normal_with_a_large_condition_number(sampler):
    sigma = np.logspace(-1, 1, 4)
    own = dict(warmup=150, seed=1) if isinstance(sampler, NUTS) else dict(warmup=400, seed=3)
    chain = with_option(sampler, **own, draws=300, moments=True).sample(quadratic(sigma), np.ones(4))
    assert_moments(chain.draws["x"], np.zeros(4), sigma**2)
    assert_allclose(chain.mean, chain.draws["x"].mean(axis=0))
    assert_allclose(chain.variance, chain.draws["x"].var(axis=0, ddof=1))
    assert_allclose(chain.metric.scale, sigma, rtol=0.35)
    assert 0.7 < chain.stats["accept"].mean() < 0.97
    assert chain.stats["gradients"].mean() < 20  # without the metric some hundreds would be needed


@named
def test_correlated_components_without_a_metric(sampler):
    covariance = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.3], [0.0, 0.3, 1.0]])
    precision = np.linalg.inv(covariance)
    problem = Problem(lambda x: 0.5 * x @ precision @ x, lambda x: precision @ x)
    chain = with_option(sampler, warmup=60, draws=400, seed=4, metric=None).sample(problem, np.zeros(3))
    assert_moments(chain.draws["x"], np.zeros(3), np.diag(covariance))
    assert_allclose(np.cov(chain.draws["x"].T), covariance, atol=0.25)


def test_a_banana():
    chain = NUTS(warmup=100, draws=500, seed=3, target=0.9).sample(banana(), np.array([1.0, 1.0]))
    assert_moments(straight(chain.draws["x"]), [1, 0], [1, 1])
    assert chain.divergences < 10


def funnel(centred):
    """Neal's funnel: v of variance 9, and five x of variance exp(v); or, not centred, x in units of exp(v/2)."""
    if not centred:
        return Problem(lambda u: 0.5 * u @ u, lambda u: u * 1.0)

    def objective(u):
        return u[0] ** 2 / 18 + 0.5 * np.exp(-u[0]) * (u[1:] @ u[1:]) + 2.5 * u[0]

    def gradient(u):
        squares = np.exp(-u[0]) * (u[1:] @ u[1:])
        return np.array([u[0] / 9 - 0.5 * squares + 2.5, *(np.exp(-u[0]) * u[1:])])

    return Problem(objective, gradient)


def test_the_funnel_is_easy_in_the_right_variables_and_is_found_out_in_the_wrong_ones():
    keep = lambda u: {"v": 3 * u[0], "x": np.exp(1.5 * u[0]) * u[1]}
    chain = NUTS(warmup=40, draws=250, seed=2).sample(funnel(False), np.zeros(6), keep=keep)
    assert_moments(chain.draws["v"], 0, 9)
    assert chain.divergences == 0
    chain = NUTS(warmup=0, draws=60, seed=2, step=0.5, metric=None, divergence=20.0).sample(
        funnel(True), np.array([-6.0, 0, 0, 0, 0, 0])
    )
    assert chain.divergences > 0 and chain.divergences == chain.stats["divergent"].sum()
    assert f"{chain.divergences} of 60 iterations divergent" in chain.message


def wiener(comm, n=6, power=4.0, noise=0.5):
    """White noise z, of which a smoothed map with noise was seen: the problem, the exact mean and variance of modes."""
    pm = make_mesh([n, n, n], comm=comm)
    vs = FieldSpace(comm)

    wavenumber = np.sqrt(sum(ki**2 for ki in wavenumbers(pm.create("complex"))))

    def filtered(x, factor):
        modes = x.r2c()
        modes.value[...] *= factor
        return modes.c2r()

    def smooth(x):
        return filtered(x, np.sqrt(power) * np.exp(-(wavenumber**2)))

    data = smooth(real(pm, 1)) + real(pm, 2) * noise**0.5

    def both(x):
        r = smooth(x) - data
        return vs.dot(x, x) + vs.dot(r, r) / noise, x * 2.0 + smooth(r) * (2 / noise)

    problem = Problem(value_and_gradient=both, vs=vs, temperature=2.0)
    variance = lambda k: 1 / (1 + power * np.exp(-2 * k**2) / noise)
    mean = filtered(smooth(data), variance(wavenumber) / noise)
    return problem, pm, mean, variance


@pytest.mark.serial
@named
def test_a_gaussian_field_has_the_mean_and_variance_of_wieners_filter(sampler):
    problem, pm, mean, variance = wiener(ALONE)
    given = FourierMetric(variance_root(variance), adapt=False) if isinstance(sampler, NUTS) else "auto"
    start, keep = pm.create("real", value=0.0), lambda x: {"a": x[0, 0, 0], "b": x[1, 2, 3]}
    count = 50 if isinstance(sampler, NUTS) else 90
    tuned = with_option(sampler, warmup=30, draws=count, seed=5, moments=True, metric=given)
    chain = tuned.sample(problem, start, keep)
    # All cells have one variance, the mean over all modes
    modes = pm.create("complex", value=1.0)
    modes.value[...] *= np.sqrt(variance(np.sqrt(sum(ki**2 for ki in wavenumbers(modes)))))
    exact = modes.cnorm() / 6**3
    assert_allclose(np.mean(chain.variance), exact, rtol=0.04)
    ratio = np.mean((chain.mean - mean) ** 2) / exact * count
    assert 0.2 < ratio < 3  # one, if the draws were independent
    for name, cell in ("a", (0, 0, 0)), ("b", (1, 2, 3)):
        assert_moments(chain.draws[name], mean[cell], exact)
    if given == "auto":  # the metric has learnt the sizes of the modes
        assert_allclose(chain.metric.variance[1:], variance(chain.metric.shells.k[1:]), rtol=0.5)


def variance_root(variance):
    return lambda k: variance(k) ** 0.5


# Ranks


def fields_and_numbers(comm):
    """A problem of a field, an array that each rank has a part of, and numbers that all have; not normal."""
    pm = make_mesh([4, 4, 4], comm=comm)
    vs = ProductSpace(dict(field=FieldSpace(comm), part=MPIVectorSpace(comm), b=VectorSpace(comm=comm)))
    weights = np.linspace(0.5, 2, 11)
    weights = split(weights) if comm is COMM else weights
    sigma = real(pm, 3) * 0.2 + 1.0

    def objective(x):
        b = x["b"]
        y = 0.5 * vs.dot(x, dict(field=x["field"] * sigma, part=x["part"] * weights, b=b))
        return y + 0.5 * np.sum(b) ** 2 * vs.spaces["field"].dot(x["field"], x["field"]) / 64

    def gradient(x):
        b, f = x["b"], vs.spaces["field"]
        square = f.dot(x["field"], x["field"]) / 64
        field = x["field"] * sigma + x["field"] * (np.sum(b) ** 2 / 64)
        return dict(field=field, part=x["part"] * weights, b=b + np.sum(b) * square)

    problem = Problem(objective, gradient, vs=vs)
    start = dict(field=real(pm, 4), part=weights * 0.3, b=np.array([0.5, -0.2]))
    return problem, start


def everything(x):
    """All numbers of a vector of that problem, the same on all ranks."""
    vs = x["field"].pm.comm
    cells = np.zeros(x["field"].Nmesh)
    cells[x["field"].slices] = x["field"].value
    return np.concatenate([vs.allreduce(cells).ravel(), *vs.allgather(x["part"]), x["b"]])


@quick
@pytest.mark.collective
def test_the_draws_do_not_depend_on_the_number_of_ranks(sampler):
    chains = []
    for comm in COMM, ALONE:
        problem, start = fields_and_numbers(comm)
        short = with_option(sampler, warmup=20, draws=3, seed=7, moments=True)
        chains.append(short.sample(problem, start, keep=lambda x: {"all": everything(x), "b": x["b"]}))
    ours, alone = chains
    assert_allclose(ours.draws["all"], alone.draws["all"], rtol=1e-6, atol=1e-8)
    for name in alone.stats:
        assert_allclose(ours.stats[name], alone.stats[name], rtol=1e-5, atol=1e-7)
    assert ours.gradients == alone.gradients
    assert len({*COMM.allgather(ours.draws["all"].tobytes())}) == 1
    assert_allclose(ours.variance["b"], alone.variance["b"], rtol=1e-5)


@pytest.mark.collective
def test_an_error_on_one_rank_is_one_on_all():
    vs = MPIVectorSpace(COMM)
    last = COMM.rank == COMM.size - 1
    problem = quadratic(1.0, vs)

    def keep(x):
        return {"a": "text" if last else 1.0}

    with pytest.raises(TypeError, match="keep must return a dictionary of numbers"):
        HMC(warmup=0, draws=1).sample(problem, deal(np.ones(5)), keep)
    with pytest.raises(ValueError, match="starting point has components that are not finite"):
        HMC().sample(problem, np.full(2, np.nan if last else 1.0), keep)
    scale = np.full(3, -1.0 if last else 1.0)
    with pytest.raises(ValueError, match="finite and above 0 in each component"):
        HMC(metric=DiagonalMetric(scale)).sample(problem, np.ones(3), keep)
    bad = Problem(lambda x: vs.dot(x, x), lambda x: x * (np.nan if last else 2.0), vs=vs)
    with pytest.raises(
        ValueError, match="the gradient has components that are not finite at the starting point"
    ):
        HMC().sample(bad, np.ones(3), keep)
    with pytest.raises(ValueError, match="say what to keep of each draw"):
        HMC(warmup=0).sample(problem, np.ones(3))


# Resumed


class Killed(Exception):
    pass


@quick
@pytest.mark.collective
def test_a_killed_chain_that_goes_on_is_the_one_that_was_not_killed(sampler, folder):
    problem, start = fields_and_numbers(COMM)
    sampler = with_option(sampler, warmup=20, draws=3, seed=1, thin=2, moments=True)
    whole = sampler.sample(problem, start)
    path = os.path.join(folder, "chain.npz")
    for lives in 1, 9, 40:  # before, in, and after the window of the metric

        def kill(chain, lives=lives):
            if chain.nit == lives + 1 or chain.nit == 24:
                raise Killed

        problem, start = fields_and_numbers(COMM)
        state = Chain.resume(path, problem.vs, like=start)
        with pytest.raises(Killed):
            sampler.sample(problem, start, state=state, monitor=[autosave(path, every=1), kill])
    chain = Chain.load(path, problem.vs, like=start, problem=problem)
    assert chain.nit == 24 and len(chain) == 2 and chain.origin == path
    chain = sampler.sample(problem, state=chain)
    assert chain.nit == whole.nit == 26 and chain.gradients == whole.gradients
    assert list(chain.draws) == ["b"]
    for ours, theirs in (chain.draws, whole.draws), (chain.stats, whole.stats):
        for name in theirs:
            assert_array_equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype
    assert problem.vs.same(chain.x, whole.x) and problem.vs.same(chain.variance, whole.variance)
    longer = with_option(sampler, draws=4).sample(problem, state=chain)
    assert len(longer) == 4 and longer.nit == 28
    assert_array_equal(longer.draws["b"][:3], whole.draws["b"])


def test_what_is_in_a_file_is_checked(tmp_path):
    path, problem = str(tmp_path / "chain.npz"), quadratic(np.ones(3))
    chain = NUTS(warmup=20, draws=5).sample(problem, np.ones(3))
    chain.save(path)
    with pytest.raises(StateError, match="belongs to another chain:\n  sampler.seed: 0 before, 1 now"):
        NUTS(warmup=20, draws=5, seed=1).sample(problem, state=Chain.load(path, problem.vs, np.ones(3)))
    with pytest.raises(StateError, match="sampler.name: 'NUTS' before, 'HMC' now"):
        HMC(warmup=20, draws=5).sample(problem, state=chain)
    other = quadratic(np.full(3, 2.0))
    with pytest.raises(StateError, match="belongs to another problem: the objective at its point was"):
        NUTS(warmup=20, draws=6).sample(other, state=Chain.load(path, problem.vs, np.ones(3)))
    again = NUTS(warmup=20, draws=6).sample(
        other, state=Chain.load(path, problem.vs, np.ones(3)), accept="problem"
    )
    assert len(again) == 6
    with pytest.raises(StateError, match="problem.noise"):
        noisy = quadratic(np.ones(3), identity=dict(noise=2.0))
        Chain.load(path, problem.vs, np.ones(3), noisy)
    with pytest.raises(StateError, match="saved for other arrays"):
        Chain.load(path, problem.vs, np.ones(4))
    from vmad_lit.contrib.optimize import LBFGS, State

    with pytest.raises(StateError, match="is damaged: its header has no history"):
        State.load(path, problem.vs, np.ones(3))
    LBFGS().minimize(problem, np.ones(3)).save(path)
    with pytest.raises(StateError, match="holds no chain, but the state of something else"):
        Chain.load(path, problem.vs, np.ones(3))
    assert Chain.resume(str(tmp_path / "none.npz"), problem.vs, np.ones(3)) is None


def test_numbers_that_are_none_are_kept_through_a_file(tmp_path):
    path, problem = str(tmp_path / "chain.npz"), quadratic(np.ones(2))
    odd = [np.nan, np.inf, -np.inf, 1.5]

    def keep(x):
        return {"odd": np.array(odd), "count": 3, "phase": np.exp(1j * x)}

    chain = HMC(warmup=0, draws=3, step=0.5).sample(problem, np.ones(2), keep)
    chain.save(path)
    again = Chain.load(path, problem.vs, np.ones(2))
    assert_array_equal(again.draws["odd"], [odd] * 3)
    assert again.draws["count"].dtype == chain.draws["count"].dtype and again.draws["phase"].dtype == complex
    assert_array_equal(again.draws["phase"], chain.draws["phase"])
    with pytest.raises(ValueError, match="read-only"):
        chain.draws["odd"][0] = 1
    with pytest.raises(
        ValueError, match=r"row 3 of the chain has no 'count', which the rows before it have$"
    ):
        HMC(warmup=0, draws=4, step=0.5).sample(problem, state=chain, keep=lambda x: {"odd": np.zeros(4)})


@pytest.mark.collective
def test_a_signal_saves_the_chain_and_ends_the_program(folder):
    vs, path = MPIVectorSpace(COMM), os.path.join(folder, "chain.npz")
    sampler = HMC(warmup=4, draws=20, seed=2, length=0.5)
    keep = lambda x: {"square": vs.dot(x, x)}
    start = split(np.linspace(0, 1, 7))

    def send(chain):
        if chain.nit == 9 and COMM.rank == COMM.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)

    with pytest.raises(SystemExit) as ended, heed_signals(COMM):
        chain = sampler.sample(quadratic(1.0, vs), start, keep, [autosave(path, 1000), send])
    assert ended.value.code == 128 + signal.SIGTERM
    assert chain.status == "signal" and chain.nit == 10
    assert chain.message == "stopped by SIGTERM: 6 draws after 4 iterations of warm-up"
    state = Chain.load(path, vs, start)
    assert state.nit == 10
    chain = sampler.sample(quadratic(1.0, vs), state=state, keep=keep)
    assert chain.status == "done" and len(chain) == 20
    assert_array_equal(chain.draws["square"], sampler.sample(quadratic(1.0, vs), start, keep).draws["square"])


# Metrics


def fill(vs, like, sigma, count=60):
    """Draws of independent normal numbers times sigma, a function of the vector."""
    return [sigma(vs.normal(like, 3, ("draws of a test", i))) for i in range(count)]


@pytest.mark.collective
@pytest.mark.parametrize("kind", ["real", "complex", "untransposedcomplex"])
def test_a_metric_in_fourier_space_learns_the_spectrum(kind):
    pm = make_mesh([8, 6, 4])
    vs, like = FieldSpace(COMM), pm.create(kind, value=0.0)
    given = lambda k: 1 / (1 + k)
    metric = FourierMetric(given).prepared(vs, like)
    a, b = vs.normal(like, 1, "a"), vs.normal(like, 1, "b")
    metric.check(vs, a, b)
    assert_allclose(vs.dot(metric.whiten(a), b), vs.dot(a, metric.whiten(b)))
    for w in fill(vs, like, lambda n: metric.unwhiten(n) * 3.0):
        metric.observe(w + a)
    vectors, numbers = metric.memory()
    assert vectors[0][0] == [] and numbers["count"] == 60
    metric.learn()
    assert_allclose(metric.variance, 9, rtol=0.6)
    assert_allclose(np.average(metric.variance, weights=metric.shells.counts), 9, rtol=0.06)
    whitened = metric.whiten(metric.unwhiten(a))
    assert_allclose(vs.norm(whitened - a), 0, atol=1e-10 * vs.norm(a))
    # What was noted can be taken over
    other = FourierMetric(given).prepared(vs, like)
    other.recall([vector for _, vector in vectors], numbers)
    other.learn()
    assert_array_equal(other.variance, metric.variance)
    assert vs.same(other.whiten(b), metric.whiten(b))
    with pytest.raises(ValueError, match="finite and above 0 at each k"):
        FourierMetric(lambda k: -k).prepared(vs, like)
    with pytest.raises(TypeError, match="of fields on a mesh"):
        FourierMetric().prepared(vs, np.ones(3))


@pytest.mark.collective
def test_metrics_of_products():
    problem, start = fields_and_numbers(COMM)
    vs = problem.vs
    metric = ProductMetric(
        dict(field=FourierMetric(adapt=False), b=Preconditioner.diagonal(np.array([2.0, 4.0])))
    )
    metric = metric.prepared(vs, start)
    assert type(metric.parts["part"]) is DiagonalMetric
    a, b = vs.normal(start, 1, "a"), vs.normal(start, 1, "b")
    metric.check(vs, a, b)
    assert_allclose(metric.whiten(a)["b"], a["b"] * [2, 4])
    for w in fill(vs, start, lambda n: dict(n, part=n["part"] * 5.0), count=10):
        metric.observe(w)
    vectors, numbers = metric.memory()
    assert [keys for keys, _ in vectors] == [["part"]] * 3 and list(numbers) == ["part"]
    metric.learn()
    sizes = join(metric.parts["part"].scale)
    assert 2 < np.median(sizes) < 8
    assert type(fitting_metric(vs, start)) is ProductMetric
    with pytest.raises(ValueError, match="the metric has a part 'c', the vectors have"):
        ProductMetric(dict(c=DiagonalMetric())).prepared(vs, start)
    with pytest.raises(TypeError, match="one of vectors of a ProductSpace"):
        ProductMetric().prepared(VectorSpace(), np.ones(2))


def test_moments_are_those_of_numpy():
    vs, rows = VectorSpace(), np.random.default_rng(1).normal(3, 2, size=(20, 4)) * [1, 1e-8, 1e8, 1]
    for factor in 1.0, 1 + 2j:
        moments = Moments(vs)
        with pytest.raises(ValueError, match="two draws or more"):
            _ = moments.variance
        for row in rows * factor:
            moments.add(row)
        assert_allclose(moments.mean, (rows * factor).mean(axis=0))
        real_part = (rows * factor).real.var(axis=0, ddof=1)
        assert_allclose(moments.variance.real, real_part)
        if factor != 1:
            assert_allclose(moments.variance.imag, 4 * real_part)


def test_the_scale_of_wieners_filter():
    k = np.array([0.0, 1.0, 2.0])
    assert_allclose(wiener_scale(lambda k: 1 / k, 0.5)(k), [1, 1 / 3**0.5, 1 / 2**0.5])
    assert_allclose(wiener_scale(lambda k: 1 / k, lambda k: k)(k), [1, 1 / 2**0.5, 1 / 1.25**0.5])


# Tuning


def test_windows_are_those_of_stan():
    assert windows(1000) == (75, [100, 150, 250, 450, 950])
    assert windows(500) == (75, [100, 150, 250, 450])
    assert windows(150) == (75, [100])
    assert windows(100) == (15, [90])
    assert windows(19) == (19, []) and windows(0) == (0, [])
    for warmup in range(20, 3000, 7):
        first, ends = windows(warmup)
        assert 0 < first < ends[0] and ends == sorted(ends) and ends[-1] <= warmup
        assert warmup - ends[-1] == (50 if warmup >= 150 else int(0.1 * warmup))


def test_dual_averaging_finds_what_it_aims_at():
    memory = {}
    averaging = DualAveraging(memory, 0.7)
    averaging.restart(5.0)
    assert averaging.result == pytest.approx(5.0)
    step = 5.0
    for _ in range(500):
        step = averaging.learn(math.exp(-step))
    assert averaging.result == pytest.approx(-math.log(0.7), rel=0.05)
    assert set(memory) == {"centre", "count", "error", "last", "mean", "spread"}


@named
def test_the_acceptance_is_what_was_aimed_at(sampler):
    found = []
    for aim in 0.6, 0.9:
        tuned = with_option(sampler, target=aim, warmup=100, draws=100, seed=2, metric=None)
        chain = tuned.sample(quadratic(np.linspace(0.5, 2, 10)), np.zeros(10))
        found.append(chain.stats["accept"].mean())
        assert aim - 0.1 < found[-1] < aim + 0.2  # above, where a little more would be no stable step
        assert_array_equal(chain.stats["step"], chain.step)
        assert len(np.unique(chain.warmup_stats["step"])) > 80
    assert found[1] > found[0] + 0.05
    fixed = with_option(sampler, step=0.25, warmup=30, draws=2).sample(quadratic(np.ones(2)), np.zeros(2))
    assert_array_equal([*fixed.warmup_stats["step"], fixed.step], 0.25)


def test_a_density_without_end_has_no_step():
    flat = Problem(lambda x: 0.0, lambda x: 0 * x)
    with pytest.raises(ValueError, match=r"no step of the integrator .* it grows to"):
        HMC().sample(flat, np.zeros(2))
    wrong = Problem(lambda x: 1e9 * np.sum(np.abs(x) > 0), lambda x: 0 * x + 1)
    with pytest.raises(ValueError, match=r"it shrinks to"):
        first_step(Target(wrong), Target(wrong)(np.zeros(2)), 1.0, 0)


# Trees


def test_a_tree_does_not_turn_back():
    """In one dimension a trajectory of the harmonic oscillator ends after half a period, in whichever direction."""
    chain = NUTS(warmup=0, draws=150, step=0.1, metric=None).sample(quadratic(np.ones(1)), np.array([1.0]))
    steps = chain.stats["steps"]
    assert np.median(chain.stats["depth"]) >= 4 and steps.max() <= 63
    short = NUTS(warmup=0, draws=50, step=0.01, maxdepth=3, metric=None)
    chain = short.sample(quadratic(np.ones(1)), np.array([1.0]))
    assert set(chain.stats["depth"]) == {3} and set(chain.stats["steps"]) == {7}
    assert set(chain.stats["gradients"]) == {7}


def test_energies_of_draws():
    keep = lambda x: {"U": 0.5 * x @ x}
    for sampler in NUTS(warmup=10, draws=50, seed=1), HMC(warmup=10, draws=50, seed=1):
        chain = sampler.sample(quadratic(np.ones(3)), np.ones(3), keep)
        assert_allclose(chain.stats["lp"], -chain.draws["U"])
        assert (chain.stats["energy"] >= chain.draws["U"]).all()
        assert (chain.stats["gradients"] == chain.stats["steps"]).all()
        assert chain.stats["gradients"].sum() + chain.warmup_stats["gradients"].sum() <= chain.gradients


# Exactly


class Coins(Target):
    """A target whose coins fall as a script says, and which notes how probable that is; the momentum is given."""

    def momentum(self, like, iteration, purpose="momentum"):
        return self.p

    def uniforms(self, iteration, purpose, count):
        return itertools.repeat(self)

    def __lt__(self, chance):
        self.tossed += 1
        if self.tossed > len(self.script):
            self.script.append(chance > 0)
        heads = self.script[self.tossed - 1]
        self.probability *= min(chance, 1.0) if heads else 1.0 - min(chance, 1.0)
        return heads


def outcomes(sampler, problem, place, p, step):
    """Each point where an iteration may end that starts from `place` with the momentum `p`, and how probable it is."""
    target, chain = Coins(problem), Chain(problem.vs, "NUTS", 0, 0)
    target.p, target.script, chain.step = p, [], step
    while True:
        target.tossed, target.probability, chain.place = 0, 1.0, place
        sampler.iterate(target, chain)
        if target.probability > 0:
            yield chain.place.z, target.probability
        while target.script and not target.script[-1]:
            target.script.pop()
        if not target.script:
            return
        target.script[-1] = False


@pytest.mark.parametrize("depth, step, x, p", [(2, 0.6, 0.4, 1.1), (2, 0.9, 1.2, 0.3), (3, 0.65, 0.3, -1.5)])
def test_a_tree_leaves_the_density_exactly_as_it_is(depth, step, x, p):
    """All ways that coins may fall, from each point of a trajectory: as much probability arrives at one as leaves it."""
    problem = Problem(value_and_gradient=lambda x: (np.sum(x**2 / 2 + x**4 / 4), x + x**3))
    sampler, target, reach = NUTS(maxdepth=depth), Target(problem), 2**depth - 1
    points = {0: (target(np.array([x])), np.array([p]))}
    for i in range(reach):
        points[i + 1] = leapfrog(target, *points[i], step)
        points[-i - 1] = leapfrog(target, *points[-i], -step)
    arrives, energy, lengths = 0.0, points[0][0].U + target.kinetic(points[0][1]), set()
    for i, (place, momentum) in points.items():
        total = 0.0
        for z, probability in outcomes(sampler, problem, place, momentum, step):
            total += probability
            weight = math.exp(energy - place.U - target.kinetic(momentum))
            (end,) = [j for j, (there, _) in points.items() if abs(there.z - z).max() < 1e-9] or [None]
            arrives += weight * probability if end == 0 else 0.0
            lengths.add(None if end is None else abs(end - i))
        assert total == pytest.approx(1.0, abs=1e-12)
    assert arrives == pytest.approx(1.0, abs=1e-10) and len(lengths) > 3


def test_a_trajectory_is_accepted_by_a_coin_of_its_own():
    """Of the trajectories of each number of steps as many as their acceptance says; and jitter makes many numbers."""
    sampler = HMC(warmup=0, draws=500, step=1.3, length=5.2, jitter=0.6, metric=None, seed=3)
    stats = sampler.sample(quadratic(np.ones(6)), np.ones(6)).stats
    assert set(stats["steps"]) == {2, 3, 4, 5, 6}
    for steps in set(stats["steps"]):
        chosen = stats["steps"] == steps
        accept, accepted = stats["accept"][chosen], stats["accepted"][chosen]
        sd = math.sqrt(np.sum(accept * (1 - accept)))
        assert sd > 1 and abs(np.sum(accepted) - np.sum(accept)) < 4 * sd
        assert 0.1 < chosen.mean() < 0.35
    fixed = with_option(sampler, draws=20, jitter=0.0).sample(quadratic(np.ones(6)), np.ones(6))
    assert set(fixed.stats["steps"]) == {4}


def test_thinning_keeps_the_last_of_each_few():
    every = HMC(warmup=3, draws=12, step=0.5).sample(quadratic(np.ones(2)), np.ones(2))
    third = HMC(warmup=3, draws=4, step=0.5, thin=3).sample(quadratic(np.ones(2)), np.ones(2))
    assert_array_equal(third.draws["x"], every.draws["x"][2::3])
    assert_array_equal(third.stats["lp"], every.stats["lp"])


@pytest.mark.parametrize("aim", [0.6, 0.8])
def test_the_acceptance_in_many_dimensions_is_what_was_aimed_at(aim):
    found = []
    for seed in range(3):
        start = np.random.default_rng(seed).normal(size=50)
        sampler = HMC(warmup=250, draws=150, target=aim, seed=seed)
        found.append(sampler.sample(quadratic(np.ones(50)), start).stats["accept"].mean())
    assert abs(np.mean(found) - aim) < 0.05


def test_a_search_of_few_steps_does_not_end_with_a_large_one():
    averaging = DualAveraging({}, 0.6)
    averaging.restart(0.5)
    for accept in 0.9, 0.0, 0.3:  # it begins with ten times the step
        averaging.learn(accept)
        assert averaging.result <= 0.5 * (1 + 1e-12)


# How it is called


def test_temperature_and_preconditioner():
    """Two ways to say the same density give the same draws."""
    sampler = NUTS(warmup=30, draws=10, seed=2, metric=None)
    plain = sampler.sample(quadratic(np.ones(3)), np.ones(3))
    hot = quadratic(np.ones(3))
    hot = Problem(lambda x: x @ x, lambda x: 2 * x, temperature=2.0)
    assert_allclose(sampler.sample(hot, np.ones(3)).draws["x"], plain.draws["x"])
    sigma = np.array([0.1, 1.0, 50.0])
    scaled = quadratic(sigma, preconditioner=Preconditioner.diagonal(1 / sigma))
    assert_allclose(sampler.sample(scaled, sigma).draws["x"] / sigma, plain.draws["x"], rtol=1e-8)
    given = with_option(sampler, metric=DiagonalMetric(sigma, adapt=False))
    assert_allclose(given.sample(quadratic(sigma), sigma).draws["x"] / sigma, plain.draws["x"], rtol=1e-8)


def test_several_seeds_make_several_chains():
    chains = HMC(warmup=5, draws=4, seed=[3, 5]).sample(
        quadratic(np.ones(2)), lambda seed: np.full(2, 1.0 * seed)
    )
    assert [chain.seed for chain in chains] == [3, 5]
    one = HMC(warmup=5, draws=4, seed=5).sample(quadratic(np.ones(2)), np.full(2, 5.0))
    assert_array_equal(chains[1].draws["x"], one.draws["x"])
    more = HMC(warmup=5, draws=6, seed=[3, 5]).sample(
        quadratic(np.ones(2)), np.ones(2), state=[chains[0], None]
    )
    assert [len(chain) for chain in more] == [6, 6]
    with pytest.raises(ValueError, match="for each of 2 seeds, got 1"):
        HMC(seed=[1, 2]).sample(quadratic(np.ones(2)), np.ones(2), state=[None])


def test_the_problem_says_what_to_keep():
    problem = quadratic(np.ones(2))
    problem.summary = lambda x: {"first": x[0]}
    chain = HMC(warmup=0, draws=3, step=0.3).sample(problem, np.ones(2))
    assert list(chain.draws) == ["first"] and chain.draws["first"].shape == (3,)
    chain = HMC(warmup=0, draws=3, step=0.3).sample(quadratic(1.0), 2.0)
    assert chain.draws["x"].shape == (3,) and isinstance(chain.x, float)


@pytest.mark.serial
def test_monitors_and_a_bar(capsys):
    seen = []

    def stop(chain):
        seen.append((chain.nit, len(chain)))
        return len(chain) == 2

    chain = HMC(warmup=3, draws=9).sample(quadratic(np.ones(2)), np.ones(2), monitor=stop, progress=True)
    assert seen == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)]
    assert chain.status == "monitor" and repr(chain).endswith(
        "stopped by the monitor: 2 draws after 3 iterations of warm-up>"
    )
    shown = capsys.readouterr().err
    assert "accept=" in shown and "dE=" in shown and f"gradients={chain.gradients}" in shown


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(warmup=-1), "NUTS's warmup must be a whole number, 0 or more, got -1"),
        (dict(seed=[1, 1]), "NUTS's seed must be a whole number, 0 or more, or a list of different ones"),
        (dict(target=1.0), "NUTS's target must be a number between 0 and 1"),
        (dict(maxdepth=0), "NUTS's maxdepth must be a whole number from 1 to 20"),
        (dict(metric="diagonal"), "NUTS's metric must be 'auto', None or a Preconditioner"),
        (dict(step=0), "NUTS's step must be None or a number above 0"),
        (dict(draw=3), "NUTS has no option 'draw': did you mean 'draws'?"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        NUTS(**options)
    assert words in str(caught.value)


def test_bad_starts():
    with pytest.raises(ValueError, match="needs a starting point"):
        NUTS().sample(quadratic(np.ones(2)))
    with pytest.raises(TypeError, match="the starting point is no vector"):
        NUTS().sample(quadratic(np.ones(2)), "start")
    nowhere = Problem(lambda x: math.inf, lambda x: x)
    with pytest.raises(
        ValueError, match="the objective is inf at the starting point, where the density must not be zero"
    ):
        NUTS().sample(nowhere, np.ones(2))
    with pytest.raises(NotImplementedError):
        Sampler().sample(quadratic(np.ones(2)), np.ones(2))


def test_where_the_density_is_no_number_a_trajectory_diverges():
    """A wall at x = 1, beyond which the objective is NaN."""

    def objective(x):
        return 0.5 * x @ x if x[0] < 1 else math.nan

    problem = Problem(objective, lambda x: x * (1.0 if x[0] < 1 else math.nan))
    for sampler in HMC(warmup=0, draws=150, step=0.4), NUTS(warmup=0, draws=150, step=0.4):
        chain = sampler.sample(problem, np.zeros(2))
        assert chain.divergences > 10 and (chain.draws["x"][:, 0] < 1).all()
        assert f"({chain.divergences} where the density is no number)" in chain.message
        assert np.isinf(chain.stats["energy_error"]).sum() == chain.divergences


def test_tables_grow():
    table = Table()
    for i in range(200):
        table.append({"a": i, "b": [i, 2.0 * i]})
    assert_array_equal(table["a"], np.arange(200))
    assert table["b"].shape == (200, 2) and len(table) == 200 and table.keys() == ["a", "b"]


@pytest.mark.parametrize(
    "cells",
    [
        (0, 0.1, 2),
        (np.float32(1), 1 / 3),
        (True, 2, 0.5),
        (1.5, 1j / 3, 2),
        (np.int8(7), 300),
    ],
    ids=str,
)
def test_columns_widen_and_lose_nothing(cells):
    table = Table()
    for _ in range(40):
        for cell in cells:
            table.append({"a": cell, "b": [1.0, cell]})
    expected = list(cells) * 40
    assert table["a"].tolist() == expected and table["b"][:, 1].tolist() == expected


def test_a_chain_that_began_with_whole_numbers_goes_on_with_fractions(tmp_path):
    path, problem, seen = str(tmp_path / "chain.npz"), quadratic(np.ones(2)), [0, 1, 0.5, 1 / 3]
    keep = lambda x: {"seen": seen.pop(0)}
    sampler = HMC(warmup=0, draws=2, step=0.5, metric=None)
    sampler.sample(problem, np.ones(2), keep).save(path)
    chain = with_option(sampler, draws=4).sample(
        problem, state=Chain.load(path, problem.vs, np.ones(2)), keep=keep
    )
    assert chain.draws["seen"].tolist() == [0, 1, 0.5, 1 / 3]


@pytest.mark.parametrize(
    "row, told",
    [
        ({"a": 1.0}, "has no 'b', which the rows before it have$"),
        ({"a": 1.0, "b": [1, 2], "c": 3}, "has 'c', which the rows before it have not$"),
        ({"a": 1.0, "b": [1, 2, 3]}, r"has 'b' of the shape \(3,\), and the rows before it of \(2,\)$"),
        ({"a": 1.0, "b": 2.0}, r"has 'b' of the shape \(\), and the rows before it of \(2,\)$"),
    ],
)
def test_a_row_that_does_not_fit_is_named_and_leaves_no_trace(row, told):
    table = Table()
    for _ in range(2):
        table.append({"a": 0, "b": [1, 2]})
    with pytest.raises(ValueError, match="^row 2 of the chain " + told):
        table.append(row)
    assert len(table) == 2 and table["a"].tolist() == [0, 0] and table["a"].dtype.kind == "i"


def test_parts_of_one_name_are_kept_apart():
    plain = VectorSpace()
    tracer = ProductSpace(dict(b=plain, more=ProductSpace([plain, plain])))
    vs = ProductSpace(dict(galaxies=tracer, quasars=tracer, b=plain))
    start = {
        kind: dict(b=np.float64(i), more=[np.full(2, i + 0.1), np.full(3, i + 0.2)])
        for i, kind in enumerate(vs.spaces)
        if kind != "b"
    }
    start["b"] = np.float64(9)
    problem = Problem(lambda x: 0.5 * vs.dot(x, x), lambda x: vs.copy(x), vs=vs)
    draws = HMC(warmup=0, draws=3, step=0.2, metric=None).sample(problem, start).draws
    kinds = "galaxies", "quasars"
    expected = [f"{kind}.{name}" for kind in kinds for name in ("b", "more.0", "more.1")] + ["b"]
    assert list(draws) == expected
    assert [draws[name].shape for name in expected] == [(3,), (3, 2), (3, 3)] * 2 + [(3,)]
    assert not np.allclose(draws["galaxies.b"], draws["quasars.b"], atol=0.1)
    alike = ProductSpace({"a": ProductSpace(dict(b=plain)), "a.b": plain})
    with pytest.raises(ValueError, match="two parts of the vector have the name 'a.b': say what to keep"):
        small_parts(alike, {"a": dict(b=1.0), "a.b": 2.0})

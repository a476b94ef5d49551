"""Samplers of constant speed: their motion against known solutions, their draws against exact moments, on several ranks, resumed."""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.integrate import solve_ivp

from helpers import deal, make_mesh, real
from test_sample import (
    ALONE,
    COMM,
    assert_moments,
    banana,
    everything,
    fields_and_numbers,
    quadratic,
    straight,
    with_option,
)
from vmad_lit.contrib.chisquare import MPIVectorSpace
from vmad_lit.contrib.optimize import Problem, autosave
from vmad_lit.contrib.sample import (
    MAMS,
    MCLMC,
    SCHEMES,
    Chain,
    Direction,
    Forgetting,
    Spread,
    Target,
    dimension,
    isokinetic,
)
from vmad_lit.contrib.vectorspace import FieldSpace, ProductSpace, VectorSpace

both = pytest.mark.parametrize("sampler", [MCLMC(), MAMS()], ids=lambda s: type(s).__name__)
vs = VectorSpace()


def random(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


def unit(n, seed=1):
    u = random(n, seed=seed)
    return u / np.linalg.norm(u)


# The motion


@pytest.mark.parametrize("n, t", [(2, 0.3), (3, 1.0), (5, 4.0), (40, 60.0)])
def test_a_kick_solves_the_equation_of_motion(n, t):
    u, g = unit(n), random(n, seed=2)

    def motion(_, y):
        v = y[:n]
        return np.append(-(g - v * (v @ g)) / (n - 1), -(v @ g))

    path = solve_ivp(motion, [0, t], np.append(u, 0.0), rtol=1e-11, atol=1e-12).y[:, -1]
    direction = Direction(vs, 3 * u, n)
    change = direction.kick(g, t)
    assert_allclose(direction.scale * direction.w, path[:n], atol=1e-8)
    assert_allclose(change, path[n], rtol=1e-8, atol=1e-9)


def test_kicks_that_are_extreme():
    n = 4
    for u, g, t in (unit(n), random(n) * 1e100, 1e3), (unit(n), unit(n) * 1e3, 1.0), (unit(n), -unit(n), 1e5):
        direction = Direction(vs, u.copy(), n)
        change = direction.kick(g, t)
        assert math.isfinite(change) and abs(change) <= t * np.linalg.norm(g) * (1 + 1e-9)
        assert abs(np.linalg.norm(direction.w) * direction.scale - 1) < 1e-6
    towards = Direction(vs, random(n, seed=3), n)
    change = towards.kick(random(n) * 100, 10.0)
    size = np.linalg.norm(random(n)) * 100
    assert_allclose(towards.scale * towards.w, -random(n) * 100 / size, atol=1e-8)
    assert 0.9 * 10 * size < change < 10 * size
    still = Direction(vs, unit(n), n)
    assert still.kick(np.zeros(n), 1.0) == 0.0 and still.kick(np.full(n, np.nan), 1.0) == math.inf
    assert_array_equal(still.scale * still.w, unit(n) * still.scale)


def test_a_kick_changes_the_volume_of_directions_by_the_kinetic_energy():
    """The Jacobian of the map of the sphere, by differences, is exp(-change): why MAMS needs nothing else."""
    n, g, t = 4, random(4, seed=5) * 3, 1.3
    u = unit(n)

    def kicked(v):
        direction = Direction(vs, v.copy(), n)
        change = direction.kick(g, t)
        return direction.scale * direction.w, change

    def tangents(at):
        return np.linalg.svd(at[None])[2][1:]

    end, change = kicked(u)
    columns = []
    for tangent in tangents(u):
        a, b = (kicked((u + s * tangent) / np.linalg.norm(u + s * tangent))[0] for s in (1e-5, -1e-5))
        columns.append(tangents(end) @ (a - b) / 2e-5)
    assert_allclose(abs(np.linalg.det(columns)), math.exp(-change), rtol=1e-7)


def test_many_kicks_and_refreshments_keep_the_length():
    for dtype, rtol in ("f8", 1e-12), ("f4", 1e-5):
        n = 300
        direction = Direction(vs, random(n).astype(dtype), n)
        for i in range(200):
            direction.kick((random(n, seed=i) * 30).astype(dtype), 20.0)
            direction.refresh(random(n, seed=-i % 977).astype(dtype), 2.0)
            assert direction.w.dtype == dtype and 1e-6 < direction.scale < 1e6
        assert_allclose(np.linalg.norm(direction.w.astype("f8")) * direction.scale, 1.0, rtol=rtol)
    before = direction.scale * direction.w
    direction.refresh(random(n, seed=3).astype("f4"), 0.0)
    assert_allclose(direction.scale * direction.w, before, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_is_reversible_and_its_error_is_of_third_order(scheme):
    n = 30
    target = Target(Problem(value_and_gradient=lambda x: (np.sum(x**4) / 4 + x @ x, x**3 + 2 * x)))
    start, means = target.at(random(n)), []
    for step in 0.2, 0.1, 0.05:
        errors = []
        for seed in range(15):
            u = Direction(vs, unit(n, seed=seed), n)
            there, error = isokinetic(target, start, u, step, scheme)
            u.scale *= -1
            back, other = isokinetic(target, there, u, step, scheme)
            assert_allclose(back.z, start.z, atol=1e-13)
            assert_allclose(-u.scale * u.w, unit(n, seed=seed), atol=1e-13)
            assert abs(error + other) < 1e-11
            errors.append(error)
        means.append(np.linalg.norm(errors))
    assert 7 < means[0] / means[1] < 10 and 7.5 < means[1] / means[2] < 9


def test_minimal_norm_beats_two_steps_of_verlet():
    target = Target(quadratic(np.geomspace(0.3, 3, 50)))
    start, errors = target.at(random(50)), {}
    for scheme, steps in ("minimal norm", 1), ("verlet", 2):
        squares = []
        for seed in range(40):
            u, place, error = Direction(vs, unit(50, seed=seed), 50), start, 0.0
            for _ in range(steps):
                place, change = isokinetic(target, place, u, 2.0 / steps, scheme)
                error += change
            squares.append(error**2)
        errors[scheme] = np.mean(squares)
    assert errors["minimal norm"] < errors["verlet"] / 10


def test_a_direction_is_forgotten_as_fast_as_the_length_says():
    """Where no force acts, a step leaves exp(-step / length) of the direction; after a divergence it is another one."""
    n, seen = 4000, []

    def edge(x):
        return (0.0 if abs(x[0]) < 1.5 else math.nan), np.zeros(n)

    def look(chain):
        seen.append(chain.vectors["direction"][0] * chain.numbers["scale"])

    sampler = MCLMC(warmup=0, draws=40, step=40.0, length=80.0, metric=None, seed=1)
    chain = sampler.sample(Problem(value_and_gradient=edge), np.zeros(n), lambda x: dict(a=x[0]), look)
    left = np.array([a @ b for a, b in zip(seen[:-1], seen[1:])])
    divergent = chain.stats["divergent"][1:].astype(bool)
    assert 3 < divergent.sum() < 37
    assert_allclose(left[~divergent], math.exp(-0.5), atol=0.07)
    assert_allclose(left[divergent], 0, atol=0.07)
    assert_allclose([u @ u for u in seen], 1)


# Dimensions


@pytest.mark.collective
def test_the_dimension_is_that_of_the_whole_vector():
    pm = make_mesh([4, 3, 2], comm=COMM)
    spaces = dict(
        field=FieldSpace(COMM), modes=FieldSpace(COMM), part=MPIVectorSpace(COMM), b=VectorSpace(comm=COMM)
    )
    x = dict(field=real(pm, 1), modes=real(pm, 1).r2c(), part=deal(np.ones(7)), b=np.zeros((2, 3)))
    space = ProductSpace(spaces)
    assert [dimension(spaces[name], x[name]) for name in x] == [24, 24, 7, 6]
    assert dimension(space, x) == 61
    assert dimension(VectorSpace(), np.zeros(3, "c16")) == 6 and dimension(VectorSpace(), 0.5) == 1
    square = [space.dot(noise, noise) for noise in (space.normal(x, seed, "test") for seed in range(60))]
    assert abs(np.mean(square) - 61) < 6 * math.sqrt(2 * 61 / 60)


# Draws


def test_a_normal_of_many_dimensions_and_the_bias_that_was_asked_for():
    sigma, biases = np.geomspace(0.1, 10, 1000), []
    for goal in 5e-3, 5e-4, 2e-5:
        sampler = MCLMC(warmup=300, draws=350, seed=3, energy_variance=goal, metric=None)
        chain = sampler.sample(
            quadratic(sigma**0.5), sigma**0.5 * random(1000), lambda x: dict(r=x * x / sigma)
        )
        variance = np.mean(chain.stats["energy_error"] ** 2) / 1000
        assert goal / 2 < variance < goal * 2.5
        assert chain.gradients == 2 * 650 + 1 and chain.divergences == 0
        assert 30 < chain.stats["length"][-1] < 200
        biases.append(1 - chain.draws["r"].mean())
    assert biases[0] > 0.025 and 0.005 < biases[1] < 0.025 and abs(biases[2]) < 0.01


def test_a_metric_that_learns_makes_the_normal_round():
    sigma = np.geomspace(0.3, 3, 200)
    sampler = MCLMC(warmup=700, draws=300, seed=1)
    chain = sampler.sample(quadratic(sigma), sigma * random(200), lambda x: dict(r=(x / sigma) ** 2))
    assert abs(chain.draws["r"].mean() - 0.98) < 0.025
    assert_allclose(chain.metric.scale, sigma, rtol=0.5)
    assert 0.8 < chain.step / 200**0.5 < 1.6 and 0.4 < chain.stats["length"][-1] / 200**0.5 < 2


def test_mams_has_no_bias():
    sigma = np.geomspace(0.3, 3, 30)
    chain = MAMS(warmup=200, draws=300, seed=1).sample(quadratic(sigma), sigma * 3)
    assert_moments(chain.draws["x"], np.zeros(30), sigma**2)
    assert 0.83 < chain.stats["accept"].mean() < 0.98
    assert {0, 1} == set(chain.stats["accepted"].astype(int))
    steps, mean = chain.stats["steps"], chain.stats["length"][-1] / chain.step
    assert steps.min() == 1 and steps.max() <= math.ceil(2 * mean - 1)
    assert_allclose(steps.mean(), mean, rtol=0.2)
    assert chain.stats["gradients"].sum() == 2 * steps.sum()


def test_bananas():
    """Pairs of x, normal around 1, and y around x^2."""
    chain = MAMS(warmup=100, draws=500, seed=2, length=4.0).sample(banana(), np.ones(2))
    assert_moments(straight(chain.draws["x"]), [1, 0], [1, 1])

    def fifty(v):
        x, y = v
        r = y - x**2
        return 0.5 * np.sum((x - 1) ** 2 + r**2), np.array([x - 1 - 2 * x * r, r])

    problem = Problem(value_and_gradient=fifty)
    chain = MCLMC(warmup=400, draws=500, seed=2, energy_variance=1e-4).sample(problem, np.ones((2, 50)))
    x, y = chain.draws["x"].transpose(1, 0, 2)
    r = y - x**2
    assert abs(x.mean() - 1) < 0.12 and abs(r.mean()) < 0.12
    assert abs(x.var() - 1) < 0.15 and abs(r.var() - 1) < 0.15


def test_options_that_are_given_are_kept():
    problem = quadratic(np.ones(50))
    chain = MCLMC(warmup=30, draws=5, step=2.0, length=7.0).sample(problem, random(50))
    assert chain.step == 2.0 and set(chain.stats["length"]) == {7.0}
    chain = MCLMC(warmup=30, draws=5, step=2.0).sample(problem, random(50))
    assert chain.step == 2.0 and chain.stats["length"][-1] != chain.warmup_stats["length"][0]
    chain = MAMS(warmup=30, draws=5, length=9.0).sample(problem, random(50))
    assert set(chain.stats["length"]) == {9.0} and len(set(chain.warmup_stats["step"])) > 10
    for warmup in 0, 1, 2, 3, 5:  # no warm-up is too short to run
        for sampler in MCLMC(warmup=warmup, draws=3), MAMS(warmup=warmup, draws=3):
            chain = sampler.sample(problem, random(50))
            assert len(chain) == 3 and np.isfinite(chain.draws["x"]).all() and chain.step > 0


@both
def test_where_the_density_is_no_number_a_step_is_undone(sampler):
    def ball(x):
        return (0.5 * x @ x, x) if x @ x < 4 else (math.nan, x * math.nan)

    sampler = with_option(sampler, warmup=0, draws=200, step=1.0, length=3.0, metric=None)
    chain = sampler.sample(Problem(value_and_gradient=ball), np.ones(3))
    x, undone = chain.draws["x"], chain.stats["divergent"]
    assert 5 < chain.divergences < 195 and np.all(np.sum(x**2, axis=1) < 4)
    same = np.all(x[1:] == x[:-1], axis=1)
    assert np.all(same[undone[1:]]) and np.all(np.isinf(chain.stats["energy_error"][undone]))
    assert "divergent" in chain.message


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(step=-1.0), "MCLMC's step must be None or a finite number above 0, got -1.0"),
        (dict(length=0), "MCLMC's length must be None or a number above 0, got 0"),
        (dict(scheme="euler"), "MCLMC's scheme must be one of 'verlet', 'minimal norm', got 'euler'"),
        (dict(energy_variance=0), "MCLMC's energy_variance must be a number above 0, got 0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        MCLMC(**options).sample(quadratic(1.0), np.ones(3))


def test_one_dimension_is_not_enough():
    with pytest.raises(ValueError, match="space of two dimensions or more, this one has 1"):
        MAMS().sample(quadratic(1.0), np.ones(1))


# What the warm-up measures


def looks(series, window=None):
    """A chain that visits the rows of an array, with what a spread and a forgetting make of it."""
    chain = SimpleNamespace(vs=vs, numbers={}, vectors={}, place=SimpleNamespace(z=series[0]))
    spread, forgetting = Spread(chain), Forgetting(chain)
    spread.restart()
    forgetting.restart(len(series), series.shape[1])
    for i, z in enumerate(series):
        chain.place = SimpleNamespace(z=z)
        spread.see(1.0 + i % 2)
        forgetting.see()
    return chain, spread, forgetting


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_the_autocorrelation_time_of_a_chain_of_known_memory(memory):
    noise = random(600, 50)
    series = [noise[0]]
    for row in noise[1:]:
        series.append(memory * series[-1] + math.sqrt(1 - memory**2) * row)
    series = np.array(series) + 100.0
    chain, spread, forgetting = looks(series)
    weights = 1.0 + np.arange(600) % 2
    mean = np.average(series, axis=0, weights=weights)
    assert_allclose(
        spread.variance, np.average((series - mean) ** 2, axis=0, weights=weights).sum(), rtol=1e-9
    )
    assert_allclose(chain.vectors["mean"][0], mean)
    assert_allclose(forgetting.time(spread.variance), (1 + memory) / (1 - memory), rtol=0.2)
    assert "anchors" not in chain.vectors and "forgetting" not in chain.numbers


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_a_short_look_back_has_all_its_anchors(window):
    chain, spread, forgetting = looks(random(window, 4))
    memory = chain.numbers["forgetting"]
    assert len(chain.vectors["anchors"]) == memory["anchors"]
    assert (memory["anchors"] - 1) * memory["gap"] + len(memory["squares"]) <= window
    assert forgetting.time(spread.variance) >= 1


# On ranks, and resumed


@both
@pytest.mark.collective
def test_the_draws_do_not_depend_on_the_number_of_ranks(sampler):
    chains = []
    for comm in COMM, ALONE:
        problem, start = fields_and_numbers(comm)
        short = with_option(sampler, warmup=20, draws=3, seed=7)
        chains.append(short.sample(problem, start, keep=lambda x: {"all": everything(x)}))
    ours, alone = chains
    assert_allclose(ours.draws["all"], alone.draws["all"], rtol=1e-6, atol=1e-8)
    for name in alone.stats:
        assert_allclose(ours.stats[name], alone.stats[name], rtol=1e-5, atol=1e-6)
    assert ours.gradients == alone.gradients and ours.numbers["n"] == 64 + 11 + 2
    assert len({*COMM.allgather(ours.draws["all"].tobytes())}) == 1


class Killed(Exception):
    pass


@both
@pytest.mark.collective
def test_a_killed_chain_that_goes_on_is_the_one_that_was_not_killed(sampler, folder):
    problem, start = fields_and_numbers(COMM)
    sampler = with_option(sampler, warmup=20, draws=3, seed=1, thin=2)
    whole = sampler.sample(problem, start)
    path = os.path.join(folder, "chain.npz")
    for lives in 2, 8, 13, 17, 22:  # in each part of the warm-up, and after it

        def kill(chain, lives=lives):
            if chain.nit == lives:
                raise Killed

        problem, start = fields_and_numbers(COMM)
        state = Chain.resume(path, problem.vs, like=start)
        with pytest.raises(Killed):
            sampler.sample(problem, start, state=state, monitor=[autosave(path, every=1), kill])
    chain = sampler.sample(problem, state=Chain.load(path, problem.vs, like=start, problem=problem))
    assert chain.nit == whole.nit == 26 and chain.gradients == whole.gradients
    for ours, theirs in (
        (chain.draws, whole.draws),
        (chain.stats, whole.stats),
        (chain.warmup_stats, whole.warmup_stats),
    ):
        for name in theirs:
            assert_array_equal(ours[name], theirs[name])
    assert problem.vs.same(chain.x, whole.x)

"""L-BFGS in a box: against SciPy and the conditions of Karush, Kuhn and Tucker, on several ranks, resumed."""

import os

import numpy as np
import pytest
import scipy.optimize
from mpi4py import MPI
from numpy.testing import assert_allclose, assert_array_equal

from helpers import make_mesh, real, split
from vmad_lit.contrib.chisquare import MPIVectorSpace
from vmad_lit.contrib.optimize import (
    LBFGS,
    Backtracking,
    BoundedLBFGS,
    BoundedLine,
    Box,
    Preconditioner,
    Problem,
    State,
    StateError,
    StrongWolfe,
    WeakWolfe,
)
from vmad_lit.contrib.vectorspace import FieldSpace, ProductSpace, VectorSpace

COMM = MPI.COMM_WORLD


def quadratic(n, condition, seed):
    """A convex quadratic in a box that holds about half of its unknowns."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    H, c = Q * np.geomspace(1, condition, n) @ Q.T, 2 * rng.normal(size=n)
    lower = np.where(rng.random(n) < 0.6, -1.0, -np.inf)
    upper = np.where(rng.random(n) < 0.6, 0.5, np.inf)
    return H, c, lower, upper


def exact(H, c, lower, upper, x):
    """The solution for the active set of x, by elimination, and the multipliers."""
    held = (x == lower) | (x == upper)
    solution = x.copy()
    free = ~held
    right = H[free] @ c - H[np.ix_(free, held)] @ x[held]
    solution[free] = np.linalg.solve(H[np.ix_(free, free)], right)
    return solution, H @ (solution - c)


@pytest.mark.parametrize("linesearch", [None, StrongWolfe(), Backtracking()])
@pytest.mark.parametrize("n, condition", [(1, 1.0), (8, 1e2), (40, 1e3)])
def test_quadratics_reach_the_exact_point(n, condition, linesearch):
    for seed in range(2):
        H, c, lower, upper = quadratic(n, condition, seed)
        count = [0]

        def both(x, H=H, c=c, count=count):
            count[0] += 1
            return 0.5 * (x - c) @ H @ (x - c), H @ (x - c)

        start = np.clip(np.zeros(n), lower, upper)
        options = {} if linesearch is None else dict(linesearch=linesearch)
        optimizer = BoundedLBFGS(lower=lower, upper=upper, gtol=1e-9, maxiter=1000, **options)
        state = optimizer.minimize(Problem(value_and_gradient=both), start)
        assert state.status in ("converged", "rounding")
        solution, g = exact(H, c, lower, upper, state.x)
        assert_allclose(state.x, solution, atol=1e-6)
        # The conditions of Karush, Kuhn and Tucker
        assert np.all((lower <= solution) & (solution <= upper))
        assert np.all(g[state.x == lower] >= -1e-9) and np.all(g[state.x == upper] <= 1e-9)
        if linesearch is None:
            ours, count[0] = count[0], 0
            bounds = list(zip(lower, upper, strict=True))
            scipy.optimize.minimize(
                both, start, jac=True, method="L-BFGS-B", bounds=bounds, options=dict(ftol=0, gtol=1e-7)
            )
            assert ours <= 1.6 * count[0] + 10


@pytest.mark.collective
@pytest.mark.parametrize("seed", [0])
def test_quadratics_that_are_spread_over_ranks(seed):
    """Against SciPy, and exactly, with rows dealt out unevenly, and none on some ranks."""
    H, c, lower, upper = quadratic(13, 50.0, seed)
    vs, mine = MPIVectorSpace(COMM), split(np.arange(13))
    order = np.concatenate(COMM.allgather(mine))

    def both(x):
        whole = np.empty(13)
        whole[order] = np.concatenate(COMM.allgather(x))
        return 0.5 * (whole - c) @ H @ (whole - c), (H @ (whole - c))[mine]

    problem = Problem(value_and_gradient=both, vs=vs)
    start = np.clip(np.zeros(13), lower, upper)
    state = BoundedLBFGS(lower=lower[mine], upper=upper[mine], gtol=1e-8).minimize(problem, start[mine])
    x = np.empty(13)
    x[order] = np.concatenate(COMM.allgather(state.x))
    solution, g = exact(H, c, lower, upper, x)
    assert_allclose(x, solution, atol=1e-6)
    assert np.all(g[x == lower] >= -1e-9) and np.all(g[x == upper] <= 1e-9)
    result = scipy.optimize.minimize(
        lambda x: (0.5 * (x - c) @ H @ (x - c), H @ (x - c)),
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(lower, upper, strict=True)),
        options=dict(ftol=0, gtol=1e-8),
    )
    assert_allclose(x, result.x, atol=1e-5)


def test_it_is_as_fast_as_scipy_where_valleys_bend():
    ours = theirs = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        n = 20
        lower = np.where(rng.random(n) < 0.5, rng.uniform(-3, 1.5, n), -np.inf)
        upper = np.where(rng.random(n) < 0.5, np.maximum(lower, -3) + rng.uniform(0, 3, n), np.inf)
        start = np.clip(rng.normal(size=n), lower, upper)
        problem = Problem(scipy.optimize.rosen, scipy.optimize.rosen_der)
        state = BoundedLBFGS(lower=lower, upper=upper, gtol=1e-9, maxiter=1000).minimize(problem, start)
        assert np.all((lower <= state.x) & (state.x <= upper))
        result = scipy.optimize.minimize(
            scipy.optimize.rosen,
            start,
            jac=scipy.optimize.rosen_der,
            method="L-BFGS-B",
            bounds=list(zip(lower, upper, strict=True)),
            options=dict(ftol=0, gtol=1e-7),
        )
        assert state.y <= result.fun + 1e-9 * abs(result.fun)
        ours, theirs = ours + state.gev, theirs + result.nfev
    assert ours <= 1.1 * theirs


def test_the_end_is_superlinear():
    """When the active set stands, the steps are those of L-BFGS without the unknowns that are held."""
    H, c, lower, upper = quadratic(12, 30.0, 3)
    problem = Problem(lambda x: 0.5 * (x - c) @ H @ (x - c), lambda x: H @ (x - c))
    held = []
    BoundedLBFGS(lower=lower, upper=upper, m=30, gtol=1e-11).minimize(
        problem,
        np.clip(np.zeros(12), lower, upper),
        monitor=lambda state: held.append(((state.x == lower) | (state.x == upper), state.projected)),
    )
    settled = next(i for i, (mask, _) in enumerate(held) if all(np.all(mask == m) for m, _ in held[i:]))
    norms = np.array([norm for _, norm in held[settled:]])
    ratios = norms[1:] / norms[:-1]
    assert len(norms) <= 20 and ratios[-2:].min() < 0.02


def test_without_bounds_it_is_lbfgs():
    start = np.tile([-1.2, 1.0], 3)
    problem = Problem(scipy.optimize.rosen, scipy.optimize.rosen_der)
    a = LBFGS().minimize(problem, start)
    b = BoundedLBFGS(linesearch=StrongWolfe()).minimize(problem, start)
    assert_array_equal(a.x, b.x)
    assert a.gev == b.gev


def parts(comm=COMM):
    """A problem of a field, an array that is spread unevenly, and replicated numbers; with bounds on parts of each."""
    pm = make_mesh((4, 4), comm)
    field, scale = real(pm, 3), np.linspace(0.5, 2.0, 10)
    mine = slice(
        [0, 7, 7, 10, 10][comm.rank],
        [10 if comm.size == 1 else 7, 7 if comm.size > 2 else 10, 10, 10][comm.rank],
    )  # uneven, and empty
    h = scale[mine]
    target = np.linspace(-2, 2, 10)[mine]
    vs = ProductSpace(
        dict(
            field=MPIVectorSpace(pm.comm),
            spread=MPIVectorSpace(pm.comm),
            b=VectorSpace(comm=pm.comm),
            free=VectorSpace(comm=pm.comm),
        )
    )

    def both(v):
        df, ds = v["field"] - field, v["spread"] - target
        mean = v["field"].cmean() - v["b"]
        y = 0.5 * vs.spaces["field"].dot(df, df) + 0.5 * vs.spaces["spread"].dot(ds, h * ds)
        y += 8 * mean**2 + 0.5 * (v["b"] - 1.0) ** 2 + 0.5 * float(np.sum((v["free"] - v["b"]) ** 2))
        g = dict(
            field=df + mean,
            spread=h * ds,
            b=-16 * mean + (v["b"] - 1.0) - float(np.sum(v["free"] - v["b"])),
            free=v["free"] - v["b"],
        )
        return y, g

    start = dict(field=pm.create(type="real", value=0.25), spread=np.zeros(len(h)), b=0.1, free=np.zeros(2))
    cap = pm.create(type="real", value=0.5)
    lower = dict(field=0.0, spread=-1.5 + np.zeros(len(h)), b=0.05)
    upper = dict(field=cap, spread=1.0, b=0.6)
    return Problem(value_and_gradient=both, vs=vs), start, lower, upper


def numbers(comm, x):
    """All numbers of such a vector, in one order on any number of ranks."""
    field = np.concatenate(comm.allgather(np.ravel(x["field"].value)))
    return np.concatenate([field, np.concatenate(comm.allgather(x["spread"])), [x["b"]], x["free"]])


@pytest.mark.collective
@pytest.mark.parametrize("whiten", [False, True])
def test_parts_of_a_product_on_any_number_of_ranks(whiten):
    problem, start, lower, upper = parts()
    alone, start1, lower1, upper1 = parts(MPI.COMM_SELF)
    if whiten:  # stretches what is bounded, and mixes what is not
        M = np.array([[1.0, 0.5], [0.0, 2.0]])

        def move(A, factor):
            return lambda v, direction: {
                "field": v["field"] * factor(direction),
                "spread": v["spread"] * factor(direction),
                "b": v["b"] / factor(direction),
                "free": A(direction) @ v["free"],
            }

        problem.preconditioner = alone.preconditioner = Preconditioner(
            Pvp=move(lambda d: M if d == 1 else np.linalg.inv(M).T, lambda d: 3.0**d),
            vPp=move(lambda d: M.T if d == 1 else np.linalg.inv(M), lambda d: 3.0**d),
        )
    state = BoundedLBFGS(lower=lower, upper=upper, gtol=1e-6).minimize(problem, start)
    reference = BoundedLBFGS(lower=lower1, upper=upper1, gtol=1e-6).minimize(alone, start1)
    assert state.status in ("converged", "rounding")
    x, g = numbers(COMM, state.x), numbers(COMM, state.g)
    assert_allclose(x, numbers(MPI.COMM_SELF, reference.x), atol=1e-4)
    low = np.concatenate([np.zeros(16), np.full(10, -1.5), [0.05], [-np.inf] * 2])
    high = np.concatenate([np.full(16, 0.5), np.full(10, 1.0), [0.6], [np.inf] * 2])
    assert np.all((low <= x) & (x <= high)) and np.sum(x == low) > 2 and np.sum(x == high) > 2
    assert_allclose(g[(x > low) & (x < high)], 0, atol=1e-4)
    assert np.all(g[x == low] > 0) and np.all(g[x == high] < 0)


@pytest.mark.collective
def test_saved_and_resumed_is_the_same_as_uninterrupted(folder):
    problem, start, lower, upper = parts()
    path = os.path.join(folder, "bounded.npz")
    options = dict(lower=lower, upper=upper, gtol=1e-4)
    whole = BoundedLBFGS(**options).minimize(problem, start)
    BoundedLBFGS(**options, maxiter=4).minimize(problem, start).save(path)
    state = State.load(path, problem.vs, start, problem)
    again = BoundedLBFGS(**options).minimize(problem, state=state)
    assert again.nit == whole.nit and again.history["projected"][-1] == whole.history["projected"][-1]
    assert_array_equal(numbers(COMM, again.x), numbers(COMM, whole.x))
    # Other bounds are another minimisation
    other = BoundedLBFGS(lower=lower, upper=dict(upper, spread=2.0), gtol=1e-3)
    with pytest.raises(StateError, match="upper"):
        other.minimize(problem, state=State.load(path, problem.vs, start, problem))
    assert other.minimize(problem, state=State.load(path, problem.vs, start), accept="optimiser").nit > 4
    tight = BoundedLBFGS(lower=lower, upper=dict(upper, b=0.06))
    with pytest.raises(ValueError, match="the point of the state is outside"):
        tight.minimize(problem, state=State.load(path, problem.vs, start), accept="optimiser")
    # From a method without bounds in the same program
    free = LBFGS(maxiter=0).minimize(problem, start)
    assert free.projected is None
    assert_allclose(
        numbers(COMM, BoundedLBFGS(**options).minimize(problem, state=free).x),
        numbers(COMM, whole.x),
        atol=1e-6,
    )


@pytest.mark.collective
def test_what_is_wrong_on_one_rank_is_told_on_all():
    last, n = COMM.rank == COMM.size - 1, 3
    vs = MPIVectorSpace(COMM)
    problem = Problem(lambda x: vs.dot(x, x), lambda x: 2 * x, vs=vs)

    def refused(words, error=ValueError, start=0.0, lower=None, upper=None):
        with pytest.raises(error, match=words):
            BoundedLBFGS(lower=lower, upper=upper).minimize(problem, np.full(n, start))

    bad = np.zeros(n)
    bad[1] = np.nan if last else 0
    refused("lower has 1 NaN", lower=bad)
    refused(
        "leave nothing to 1 of 3",
        lower=np.where(np.arange(n) == last + 0, 2.0 if last else 0.0, 0.0),
        upper=1.0,
    )
    refused(
        "outside of the bounds in 1 of",
        start=1.0,
        upper=np.where(np.arange(n) == 2, 0.5 if last else 2.0, 2.0),
    )
    refused("must have the shape", lower=np.zeros(n + last))
    refused("lower leaves nothing", lower=float("nan"))
    refused("upper leaves nothing", upper=-np.inf)
    refused("real numbers", TypeError, lower="zero")
    refused("real numbers", TypeError, lower=np.zeros(n) * 1j)


def test_bounds_of_what_is_not_there():
    vs = ProductSpace([VectorSpace(), VectorSpace()])
    problem = Problem(lambda v: v[0] ** 2 + abs(v[1]) ** 2, lambda v: [2 * v[0], 2 * v[1]], vs=vs)
    assert BoundedLBFGS(lower=[0.5, None]).minimize(problem, [1.0, 2.0 + 1j]).x[0] == 0.5
    for lower, words in (
        ([0, 0], "real unknowns"),
        ({2: 0}, "no such component"),
        (np.zeros(2), "by component"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            BoundedLBFGS(lower=lower).minimize(problem, [1.0, 2.0 + 1j])


def test_preconditioners_that_mix_what_is_bounded_are_refused():
    mix = np.array([[1.0, 0.5], [0.5, 1.0]])
    problem = Problem(lambda x: float(x @ x), lambda x: 2 * x)
    for P in mix, np.diag([1.0, -1.0]):
        inverse = np.linalg.inv(P)
        problem.preconditioner = Preconditioner.symmetric(lambda v, P=P: P @ v, lambda v, P=inverse: P @ v)
        with pytest.raises(ValueError, match="preconditioner only if"):
            BoundedLBFGS(lower=0.0).minimize(problem, np.ones(2))
        assert BoundedLBFGS().minimize(problem, np.ones(2)).converged


def test_the_user_never_sees_a_number_outside():
    """Not by rounding either: the walls of whitened variables are not quite those of the user's."""
    rng, seen = np.random.default_rng(5), []
    factor, lower = rng.uniform(0.1, 2, 100), rng.uniform(0, 1, 100)
    assert np.any(lower * factor / factor < lower)

    def both(x):
        seen.append(x.copy())
        return float(np.sum((x + 2) ** 2)), 2 * (x + 2)

    problem = Problem(value_and_gradient=both, preconditioner=Preconditioner.diagonal(factor))
    state = BoundedLBFGS(lower=lower).minimize(problem, lower + 1)
    assert_allclose(state.x, lower, rtol=1e-14)
    assert np.all(np.array(seen) >= lower)


def path_of(seed, n=6):
    """A path in a box from a random point, along a direction that begins downhill, and the objective along it."""
    rng = np.random.default_rng(seed)
    H, c, _, _ = quadratic(n, 20.0, seed)
    problem = Problem(lambda x: 0.5 * (x - c) @ H @ (x - c), lambda x: H @ (x - c))
    state = State(problem.vs, None)
    state.x = state.Px = rng.uniform(-1, 1, n)
    state.y, state.Pg = problem.objective(state.x), problem.gradient(state.x)
    box = Box(problem.vs, -1.0, 1.0, state.x)
    return BoundedLine(problem, state, -state.Pg * rng.uniform(0.5, 2, n), box, box)


def test_the_slope_of_a_path_counts_what_moves():
    for seed in range(20):
        path = path_of(seed)
        kinks = np.sort((np.sign(path.direction) - path.Px) / path.direction)
        for t in (kinks[1:] + kinks[:-1]) / 2:
            slope = (path(t + 1e-7).y - path(t - 1e-7).y) / 2e-7
            assert_allclose(path(t).slope, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [1e-4, 0.1, 1.0, 30.0])
def test_steps_along_paths_are_neither_too_long_nor_too_short(t):
    search = WeakWolfe()
    for seed in range(20):
        path = path_of(seed)
        trial = search(path, t)
        assert trial.y <= path.start.y + 1e-4 * path.gradient @ (trial.point.x - path.Px)
        assert trial.slope >= 0.9 * path.start.slope
        assert_allclose(path.length(trial), np.linalg.norm(trial.point.x - path.Px))


def test_a_fall_is_compared_with_what_the_way_has_promised():
    path = path_of(0)
    far = path(50.0)
    promised = path.gradient @ (far.point.x - path.Px)
    for share, enough in (0.5, False), (1.5, True):
        far.y = path.start.y + share * 0.1 * promised
        assert path.falls_enough(far, 0.1) == enough


def test_a_memory_that_says_nothing_of_the_free_components_is_forgotten():
    optimizer, vs = BoundedLBFGS(lower=0.0), VectorSpace()
    state = State(vs, "BoundedLBFGS")
    optimizer.forget(state)
    state.Pg = np.array([1.0, -1.0])
    optimizer.learn(vs, state, np.array([1.0, 0.0]), np.array([2.0, 0.5]))
    assert (
        len(optimizer.reduced(vs, state, [np.array([True, False])]).vectors["S"])
        == 1
        == len(state.vectors["S"])
    )
    assert not optimizer.reduced(vs, state, [np.array([False, True])]).vectors["S"] and not state.vectors["S"]


def test_a_state_knows_finite_bounds_beside_infinite_ones(folder):
    path, lower = os.path.join(folder, "state.npz"), np.where(np.arange(20) < 10, -np.inf, 0.0)
    problem = Problem(lambda x: float((x - 1) @ (x - 1)), lambda x: 2 * (x - 1))
    BoundedLBFGS(lower=lower, maxiter=0).minimize(problem, np.full(20, 5.0)).save(path)
    other = np.where(np.arange(20) == 15, 0.5, lower)
    with pytest.raises(StateError, match="optimiser.lower"):
        BoundedLBFGS(lower=other).minimize(problem, state=State.load(path, VectorSpace(), np.ones(20)))
    assert (
        BoundedLBFGS(lower=lower)
        .minimize(problem, state=State.load(path, VectorSpace(), np.ones(20)))
        .converged
    )


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_type_of_the_unknowns_is_kept(dtype):
    problem = Problem(lambda x: np.sum((x - 2) ** 2), lambda x: 2 * (x - 2))
    state = BoundedLBFGS(upper=0.3).minimize(problem, np.zeros(4, dtype))
    assert state.x.dtype == dtype and np.all(state.x == np.array(0.3, dtype))

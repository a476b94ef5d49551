"""Optimisers over vector spaces: against SciPy and analytic solutions, on several ranks, resumed."""

import gc
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import rosen, rosen_der, rosen_hess_prod

from helpers import examples, run_python, split
from vmad_lit.contrib.optimize import (
    EPS,
    LBFGS,
    Backtracking,
    GradientDescent,
    Line,
    Point,
    Preconditioner,
    Problem,
    State,
    StateError,
    StrongWolfe,
    TrustRegionCG,
    autosave,
    cubic_minimum,
    scipy_minimize,
)
from vmad_lit.contrib.vectorspace import FieldSpace, ProductSpace, VectorSpace, real_inner_product

COMM = MPI.COMM_WORLD
quick = settings(max_examples=examples(40), derandomize=True, suppress_health_check=list(HealthCheck))
OPTIMIZERS = [
    LBFGS(gtol=1e-9, maxiter=2000),
    TrustRegionCG(gtol=1e-9, maxiter=2000),
    GradientDescent(gtol=1e-8),
]


def distributed(comm=COMM):
    return VectorSpace(dot=lambda a, b: comm.allreduce(real_inner_product(a, b)), comm=comm)


def beale(v):
    x, y = v
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def beale_der(v):
    x, y = v
    a, b, c = 1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3
    return np.array(
        [
            2 * a * (y - 1) + 2 * b * (y**2 - 1) + 2 * c * (y**3 - 1),
            2 * a * x + 4 * b * x * y + 6 * c * x * y**2,
        ]
    )


def beale_hessian(v, d, h=1e-6):
    return (beale_der(v + h * d) - beale_der(v - h * d)) / (2 * h)


def quadratic(n, condition, seed, whiten=False):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    A = (q * np.logspace(0, math.log10(condition), n)) @ q.T
    A = (A + A.T) / 2
    truth = rng.normal(size=n)
    precond = None
    if whiten:  # a square root of A that is not symmetric: the transposes matter
        root = np.linalg.cholesky(A).T
        inverse = np.linalg.inv(root)
        precond = Preconditioner(
            lambda v, direction: root @ v if direction == 1 else inverse.T @ v,
            lambda v, direction: root.T @ v if direction == 1 else inverse @ v,
        )
    return truth, Problem(
        lambda x: 0.5 * (x - truth) @ A @ (x - truth),
        lambda x: A @ (x - truth),
        lambda x, v: A @ v,
        preconditioner=precond,
    )


# vector spaces


def test_addmul_follows_the_reference():
    vs, a, b = VectorSpace(), np.array([1.0, 2.0]), np.array([3.0, 4.0])
    assert_array_equal(vs.addmul(a, b, 2), a + 2 * b)
    assert_array_equal(vs.addmul(a, b, 2, -1), a + b / 2)
    assert_array_equal(vs.addmul(0, b, 2, 3), b * 8)
    assert_array_equal(vs.axpy(2, a, b), b + 2 * a)
    assert_array_equal(vs.zeros_like(np.array([np.nan, np.inf])), 0)
    assert vs.addmul(np.float32(1) * a.astype("f4"), b.astype("f4"), np.float64(2)).dtype == np.float32
    copy = vs.copy(a)
    copy[0] = 7
    assert a[0] == 1


@pytest.mark.parametrize("shape", [(7,), (3, 5), (200, 300), (2, 100, 500), (0, 3), (70000,)])
@pytest.mark.parametrize("dtype", ["f8", "f4", "c16"])
def test_long_and_strided_arrays_go_through_in_slabs(shape, dtype):
    rng = np.random.default_rng(1)
    factor = 1 - 2j if dtype == "c16" else 1
    wide = [(rng.normal(size=shape[:-1] + (shape[-1] + 2,)) * factor).astype(dtype) for _ in range(2)]
    a, b = (w[..., 1:-1] for w in wide)
    vs = VectorSpace()
    rtol = 1e-5 if dtype == "f4" else 1e-12
    assert_allclose(vs.dot(a, b), np.sum((a.conj() * b).real, dtype="f8"), rtol=rtol, atol=rtol * a.size)
    before = a.copy()
    assert_allclose(vs.addmul(a, b, -0.3), a - np.asarray(0.3, dtype) * b, rtol=rtol, atol=rtol)
    assert_array_equal(a, before)
    assert vs.accumulate(a, b, 2.0) is a
    assert_allclose(a, before + 2 * b, rtol=rtol, atol=rtol)
    whole = vs.accumulate(np.ones(3), np.ones(3) * 1j, 2.0)  # not of one type: the result is a new array
    assert_array_equal(whole, 1 + 2j)


def test_an_addmul_of_one_s_own_is_used_everywhere():
    def wrapped(a, b, c, p=1):
        return (a + b * c**p) % 1.0

    class Circle(VectorSpace):
        def addmul(self, a, b, c, p=1):
            return wrapped(a, b, c, p)

    x = np.full(3, 0.75)
    for vs in (VectorSpace(addmul=wrapped), Circle()):
        assert_array_equal(vs.accumulate(x, x, 1.0), 0.5)
        assert_array_equal(vs.axpy(1.0, x, x), 0.5)
    assert_array_equal(x, 0.75)


def test_inner_product_is_real_wide_and_checked():
    z = np.array([1 + 2j, 3 - 1j])
    assert VectorSpace().dot(z, z * 1j) == 0
    assert VectorSpace().dot(z, z) == 15
    ones = np.full(3 * 10**6, np.float32(0.1))
    assert abs(VectorSpace().dot(ones, ones) / (3e6 * float(np.float32(0.1)) ** 2) - 1) < 1e-11
    with pytest.raises(ValueError, match="one shape"):
        VectorSpace().dot(np.ones(3), np.ones((3, 1)))


def test_same_sees_values_shapes_and_types():
    vs = VectorSpace()
    assert vs.same(np.ones(3), np.ones(3))
    assert not vs.same(np.ones(3), np.ones(1))
    assert not vs.same(np.ones(3), np.array([1, 1, 1 + 1e-15]))
    assert not vs.same(np.array([np.nan]), np.array([np.nan]))
    tree = ProductSpace()
    assert tree.same({"a": np.ones(2), "b": 1.0}, {"a": np.ones(2), "b": 1.0})
    assert not tree.same({"a": np.ones(2)}, {"b": np.ones(2)})
    assert not tree.same([np.ones(2)], [np.ones(2), np.ones(2)])
    assert not tree.same([np.ones(2)], (np.ones(2),))


@pytest.mark.parametrize(
    "like",
    [
        3.5,
        np.arange(6.0).reshape(2, 3),
        {"a": np.arange(3.0), "b": [np.ones(2) * 1j, 2.0]},
        (np.zeros((0, 2)), 1.0),
    ],
)
def test_arrays_there_and_back(like):
    vs = (
        ProductSpace({"a": VectorSpace(), "b": ProductSpace()})
        if isinstance(like, dict)
        else ProductSpace()
        if isinstance(like, tuple)
        else VectorSpace()
    )
    back = vs.from_arrays(vs.to_arrays(like), like)
    assert type(back) is type(like)
    assert vs.same(back, like)


def test_product_space_names_what_does_not_fit():
    vs = ProductSpace({"a": VectorSpace()})
    with pytest.raises(ValueError, match="no space is known for component 'b'"):
        vs.dot({"b": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="differ in their components"):
        vs.dot({"a": 1.0}, {"a": 1.0, "b": 1.0})
    with pytest.raises(TypeError, match="dictionary, list or tuple"):
        vs.dot(np.ones(2), np.ones(2))


@pytest.mark.collective
def test_the_distributed_part_is_summed_and_the_universal_part_is_not():
    vs = ProductSpace({"field": distributed(), "bias": VectorSpace()})
    v = {"field": np.ones(COMM.rank + 1), "bias": 2.0}
    assert vs.dot(v, v) == COMM.size * (COMM.size + 1) / 2 + 4
    assert vs.comm is COMM


@pytest.mark.collective
def test_agree():
    vs = distributed()
    assert vs.replicate(np.array(2)) == 2.0
    assert vs.replicate(1 + 1e-15 * COMM.rank) == 1.0
    assert math.isnan(vs.replicate(math.nan))
    for bad in (np.ones(2), 1j, "x", None):
        with pytest.raises(TypeError, match="one real number"):
            vs.replicate(bad)
    if COMM.size > 1:
        with pytest.raises(ValueError, match="differs between ranks"):
            vs.replicate(COMM.rank)
    assert vs.any(COMM.rank == COMM.size - 1)
    assert not vs.any(False)


# convergence


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_rosenbrock_and_beale(optimizer):
    for f, g, H, x0, answer in [
        (rosen, rosen_der, rosen_hess_prod, [-1.2, 1.0], [1, 1]),
        (rosen, rosen_der, rosen_hess_prod, [-1.2, 1.0, -1.2, 1.0, 0.5], [1] * 5),
        (beale, beale_der, beale_hessian, [1.0, 1.0], [3, 0.5]),
    ]:
        problem = Problem(f, g, H)
        state = optimizer.minimize(problem, np.array(x0))
        assert state.converged, state
        assert_allclose(state.x, answer, atol=2e-4 if isinstance(optimizer, GradientDescent) else 1e-6)
        assert (state.fev, state.gev, state.hev) == (problem.fev, problem.gev, problem.hev)
        assert len(state.history) == state.nit + 1
        assert state.y == state["y"] == f(state.x)
        assert_array_equal(state.g, g(state.x))


@quick
@given(
    n=st.integers(1, 12),
    exponent=st.floats(0, 4),
    seed=st.integers(0, 10**6),
    kind=st.integers(0, 2),
    whiten=st.booleans(),
    start=st.floats(-1e3, 1e3),
)
def test_quadratics_are_solved(n, exponent, seed, kind, whiten, start):
    truth, problem = quadratic(n, 10**exponent, seed, whiten)
    state = OPTIMIZERS[kind].minimize(problem, np.full(n, start))
    assert state.converged, state
    assert np.linalg.norm(state.x - truth) <= 1e-3 * (1 + abs(start))
    if whiten and kind < 2:
        assert state.nit <= 8  # in whitened variables the quadratic is a sphere


def test_lbfgs_is_a_match_for_scipy():
    x0 = np.tile([-1.2, 1.0], 20)
    ours = LBFGS(gtol=1e-9, maxiter=1000).minimize(Problem(rosen, rosen_der), x0)
    theirs = scipy.optimize.minimize(
        rosen,
        x0,
        jac=rosen_der,
        method="L-BFGS-B",
        options=dict(gtol=1e-9 * ours.Pgnorm0, ftol=0, maxiter=2000),
    )
    assert ours.converged
    assert ours.fev <= 1.3 * theirs.nfev
    assert_allclose(ours.x, theirs.x, atol=1e-5)


def test_trust_region_passes_negative_curvature():
    # a saddle at the origin; the minima are at (0, +-1)
    def f(v):
        return v[0] ** 2 + (v[1] ** 2 - 1) ** 2

    def g(v):
        return np.array([2 * v[0], 4 * v[1] * (v[1] ** 2 - 1)])

    def H(v, d):
        return np.array([2 * d[0], (12 * v[1] ** 2 - 4) * d[1]])

    state = TrustRegionCG(gtol=1e-10).minimize(Problem(f, g, H), np.array([1.0, 1e-3]))
    assert_allclose(state.x, [0, 1], atol=1e-7)


def test_steihaug_against_the_exact_solution():
    truth, problem = quadratic(6, 100, 3)
    optimizer, x = TrustRegionCG(cg_rtol=1e-12), np.ones(6)
    g = problem.gradient(x)

    def hvp(v):
        return problem.hessian_vector_product(x, v)

    p, r, surface = optimizer.solve(problem.vs, hvp, g, math.inf, 1e-12)
    assert_allclose(x + p, truth, atol=1e-8)
    assert_allclose(r, g + hvp(p), atol=1e-10)
    assert not surface
    for radius in (1e-3, 0.5):
        p, r, surface = optimizer.solve(problem.vs, hvp, g, radius, 1e-12)
        assert surface
        assert_allclose(np.linalg.norm(p), radius, rtol=1e-12)
        assert_allclose(r, g + hvp(p), atol=1e-10)


def test_complex_unknowns_are_pairs_of_reals():
    data = np.array([1 + 2j, -3j, 0.5])
    weight = np.array([1.0, 10.0, 100.0])
    problem = Problem(
        lambda z: float(np.sum(weight * abs(z - data) ** 2)),
        lambda z: 2 * weight * (z - data),
        lambda z, v: 2 * weight * v,
    )
    for optimizer in OPTIMIZERS:
        assert_allclose(optimizer.minimize(problem, np.zeros(3, complex)).x, data, atol=1e-6)
    assert_allclose(scipy_minimize(problem, np.zeros(3, complex)).x, data, atol=1e-4)


def test_float32_stays_float32():
    target = np.linspace(-1, 1, 50, dtype="f4")
    problem = Problem(lambda x: float(np.sum((x - target).astype("f8") ** 2)), lambda x: 2 * (x - target))
    state = LBFGS(gtol=1e-5).minimize(problem, np.zeros(50, "f4"))
    assert state.x.dtype == np.float32 and state.converged
    assert_allclose(state.x, target, atol=1e-4)


def test_memory_is_limited_and_has_only_pairs_of_positive_curvature():
    optimizer = LBFGS(m=3, maxiter=8)
    state = optimizer.minimize(Problem(rosen, rosen_der), np.tile([-1.2, 1.0], 3))
    S, R = state.vectors["S"], state.vectors["R"]
    assert len(S) == len(R) == len(state.numbers["rho"]) == 3
    assert all(s @ r > 0 for s, r in zip(S, R, strict=True))
    assert_allclose(state.numbers["rho"], [1 / (s @ r) for s, r in zip(S, R, strict=True)])
    # a step along which the gradient falls short
    problem = Problem(lambda x: -float(x @ x), lambda x: -2 * x)
    optimizer.remember(problem.vs, state, Point(problem, Px=state.Px + 1))
    assert np.all(state.vectors["S"][-1] == S[-1])


def test_two_loops_apply_the_bfgs_matrix():
    optimizer = LBFGS(m=4, maxiter=9)
    state = optimizer.minimize(Problem(rosen, rosen_der), np.tile([-1.2, 1.0], 3))
    B = state.numbers["gamma"] * np.eye(6)
    for s, r in zip(state.vectors["S"], state.vectors["R"], strict=True):
        V = np.eye(6) - np.outer(r, s) / (r @ s)
        B = V.T @ B @ V + np.outer(s, s) / (r @ s)
    assert_allclose(optimizer.direction(VectorSpace(), state), -B @ state.g, rtol=1e-9)
    assert_allclose(B @ state.vectors["R"][-1], state.vectors["S"][-1], rtol=1e-9)


def test_trust_region_grows_and_shrinks():
    c = np.array([1.0, 3.0])
    problem = Problem(lambda x: 0.5 * float(x @ (c * x)), lambda x: c * x, lambda x, v: c * v)
    state = TrustRegionCG(radius=1e-2, maxiter=5).minimize(problem, np.array([10.0, 1.0]))
    assert_allclose(state.numbers["radius"], 1e-2 * 2**5)
    state = TrustRegionCG(radius=1e-2, maxradius=0.05, maxiter=5).minimize(problem, np.array([10.0, 1.0]))
    assert_allclose(state.numbers["radius"], 0.05)
    wrong = Problem(rosen, rosen_der, lambda x, v: 1e-3 * v)
    state = TrustRegionCG(radius=10.0, maxiter=1).minimize(wrong, np.array([-1.2, 1.0]))
    assert state.step == 0 and state.numbers["radius"] < 10 and state.y == state.history["y"][0]


def test_a_wrong_hessian_ends_in_a_small_region():
    problem = Problem(rosen, lambda x: -rosen_der(x), rosen_hess_prod)
    state = TrustRegionCG().minimize(problem, np.array([-1.2, 1.0]))
    assert not state.converged and ("gradient" in state.message or "maxiter" in state.message)
    assert np.all(state.x == [-1.2, 1.0])


def test_gradient_descent_may_climb_within_its_window_only():
    c = np.logspace(0, 3, 20)
    problem = Problem(lambda x: 0.5 * float(x @ (c * x)), lambda x: c * x)
    free = GradientDescent().minimize(problem, np.ones(20)).history["y"]
    monotonic = GradientDescent(window=1).minimize(problem, np.ones(20)).history["y"]
    plain = GradientDescent(barzilai_borwein=False).minimize(problem, np.ones(20)).history["y"]
    assert np.any(np.diff(free) > 0) and len(free) < len(plain)
    assert all(free[i] < free[max(0, i - 10) : i].max() for i in range(1, len(free)))
    assert np.all(np.diff(monotonic) < 0)


# line searches


@quick
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_cubic_minimum(a, b, c, d):
    """The minimum of a t^3 + b t^2 + c t + d from its values and slopes at 0 and 1."""
    found = cubic_minimum(d, c, a + b + c + d, 3 * a + 2 * b + c)
    square = b * b - 3 * a * c
    if abs(a) > 1e-3 and square > 1e-3:
        exact = (-b + math.sqrt(square)) / (3 * a)
        assert math.isclose(found, exact, rel_tol=1e-6, abs_tol=1e-6)


@quick
@given(
    seed=st.integers(0, 10**6),
    c2=st.sampled_from([0.1, 0.5, 0.9]),
    t=st.floats(1e-4, 1e4),
    n=st.integers(2, 6),
)
def test_accepted_steps_satisfy_the_wolfe_conditions(seed, c2, t, n):
    x = np.random.default_rng(seed).normal(size=n) * 2
    problem, search = Problem(rosen, rosen_der), StrongWolfe(c1=1e-4, c2=c2)
    y, g = problem.value_and_gradient(x)
    direction = -g / np.linalg.norm(g)
    slope = float(direction @ g)
    trial = search(Line(problem, x, y, direction, slope), t)
    assert trial is not None
    assert_array_equal(trial.point.x, x + trial.t * direction)
    assert trial.y <= y + 1e-4 * trial.t * slope + 4 * EPS * abs(y)
    assert abs(rosen_der(trial.point.x) @ direction) <= c2 * abs(slope)


@pytest.mark.parametrize("c2", [0.1, 0.9])
def test_every_step_of_lbfgs_satisfies_them(c2):
    steps = []

    class Watched(StrongWolfe):
        def __call__(self, line, t):
            trial = super().__call__(line, t)
            steps.append((line.start.y, line.start.slope, trial.t, trial.y, trial.slope))
            return trial

    state = LBFGS(linesearch=Watched(c2=c2)).minimize(Problem(rosen, rosen_der), np.tile([-1.2, 1.0], 5))
    assert state.converged and len(steps) == state.nit
    for y0, slope0, t, y, slope in steps:
        assert y <= y0 + 1e-4 * t * slope0 + 4 * EPS * abs(y0)
        assert abs(slope) <= c2 * abs(slope0)


@quick
@given(seed=st.integers(0, 10**6), t=st.floats(1e-3, 1e3))
def test_backtracking_satisfies_armijo(seed, t):
    x = np.random.default_rng(seed).normal(size=4) * 2
    y, g = rosen(x), rosen_der(x)
    trial = Backtracking()(Line(Problem(rosen, rosen_der), x, y, -g, -float(g @ g)), t)
    assert 0 < trial.t <= t
    assert trial.y <= y - 1e-4 * trial.t * float(g @ g)


def test_bad_wolfe_constants():
    with pytest.raises(ValueError, match="0 < c1 < c2 < 1"):
        StrongWolfe(c1=0.9, c2=0.1)


# not a number


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("beyond", [math.nan, math.inf])
def test_walks_back_from_where_there_is_no_value(optimizer, beyond):
    def f(x):
        return float(np.sum(x - np.log(x))) if np.all(x > 0) else beyond

    seen = []
    problem = Problem(lambda x: seen.append(f(x)) or f(x), lambda x: 1 - 1 / x, lambda x, v: v / x**2)
    state = optimizer.minimize(problem, np.array([30.0, 0.01, 3.0]))
    assert state.converged
    assert_allclose(state.x, 1, atol=1e-5)
    if not isinstance(optimizer, TrustRegionCG):
        assert not all(np.isfinite(seen))  # the test is about something


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_says_what_is_not_finite_at_the_start(optimizer):
    with pytest.raises(ValueError, match="the objective is nan at the starting point"):
        optimizer.minimize(Problem(lambda x: np.nan, lambda x: x, lambda x, v: v), np.ones(2))
    with pytest.raises(ValueError, match="the gradient has components that are not finite"):
        optimizer.minimize(Problem(lambda x: 1.0, lambda x: x * np.inf, lambda x, v: v), np.ones(2))


def test_wrong_gradient_is_reported_not_believed():
    state = LBFGS().minimize(Problem(rosen, lambda x: -rosen_der(x)), np.array([-1.2, 1.0]))
    assert not state.converged and "gradient" in state.message
    state = GradientDescent().minimize(Problem(rosen, lambda x: -rosen_der(x)), np.array([-1.2, 1.0]))
    assert not state.converged and "gradient" in state.message


def test_missing_parts_are_named():
    with pytest.raises(ValueError, match="needs an objective"):
        Problem(gradient=lambda x: x)
    with pytest.raises(ValueError, match="no gradient"):
        LBFGS().minimize(Problem(rosen), np.ones(2) * 3)
    with pytest.raises(ValueError, match="no hessian_vector_product"):
        TrustRegionCG().minimize(Problem(rosen, rosen_der), np.ones(2) * 3)
    with pytest.raises(ValueError, match="starting point"):
        LBFGS().minimize(Problem(rosen, rosen_der))
    with pytest.raises(TypeError, match="has no option 'memory'"):
        LBFGS(memory=3)


def test_already_at_the_minimum():
    for optimizer in OPTIMIZERS:
        state = optimizer.minimize(Problem(rosen, rosen_der, rosen_hess_prod), np.ones(3))
        assert state.converged and state.nit == 0


def test_rounding_ends_the_search_and_is_told_as_such():
    for optimizer in (LBFGS(gtol=0), TrustRegionCG(gtol=0), GradientDescent(gtol=0)):
        problem = Problem(
            lambda x: 1e3 + float(np.sum((x - 2) ** 2 * np.arange(1, 5))),
            lambda x: 2 * (x - 2) * np.arange(1, 5) + 1e-9,
            lambda x, v: 2 * v * np.arange(1, 5),
        )
        state = optimizer.minimize(problem, np.zeros(4))
        assert state.status == "rounding" and not state.converged and "rounding" in state.message, state
        assert_allclose(state.x, 2, atol=1e-5)


# problems


def test_one_evaluation_a_point_and_none_stale():
    problem = Problem(rosen, rosen_der)
    x = np.array([0.5, 0.5])
    for _ in range(3):
        assert problem.f(x) == rosen(x)
        assert_array_equal(problem.g(x), rosen_der(x))
    assert (problem.fev, problem.gev) == (1, 1)
    x -= 0.1  # changed in place: a new point in the same object
    assert problem.f(x) == rosen(x)
    assert_array_equal(problem.g(x.copy()), rosen_der(x))
    assert (problem.fev, problem.gev) == (2, 2)


def test_combined_evaluation_is_shared():
    calls = []

    def both(x):
        calls.append(x)
        return rosen(x), rosen_der(x)

    problem = Problem(value_and_gradient=both)
    state = LBFGS().minimize(problem, np.array([-1.2, 1.0]))
    assert state.converged
    assert len(calls) == state.fev == state.gev == problem.fev


def test_a_gradient_in_a_reused_buffer():
    buffer = np.empty(4)

    def gradient(x):
        buffer[...] = rosen_der(x)
        return buffer

    x0 = np.tile([-1.2, 1.0], 2)
    assert_array_equal(
        LBFGS().minimize(Problem(rosen, gradient), x0).x, LBFGS().minimize(Problem(rosen, rosen_der), x0).x
    )


def test_wrong_preconditioners_are_found():
    root = np.array([[2.0, 1.0], [0.0, 1.0]])
    inverse = np.linalg.inv(root)
    not_inverse = Preconditioner.symmetric(lambda v: 2 * v, lambda v: v / 3)
    not_transposed = Preconditioner(
        lambda v, direction: root @ v if direction == 1 else inverse @ v,
        lambda v, direction: root @ v if direction == 1 else inverse @ v,
    )
    for bad, words in ((not_inverse, "not inverses"), (not_transposed, "not the inverse transpose")):
        with pytest.raises(ValueError, match=words):
            LBFGS().minimize(Problem(rosen, rosen_der, preconditioner=bad), np.array([-1.2, 1.0]))


@pytest.mark.collective
def test_monitors():
    seen = []
    state = LBFGS().minimize(
        Problem(rosen, rosen_der),
        np.array([-1.2, 1.0]),
        monitor=[
            lambda s: seen.append((s.nit, s["y"], s.x)),
            lambda s: s.y,
            lambda s: s.nit == 7 and COMM.rank == COMM.size - 1,
        ],
    )
    if COMM.size == 1:
        assert state.message == "stopped by the monitor" and not state.converged and state.nit == 7
        assert [nit for nit, _, _ in seen] == list(range(8))
        assert_array_equal([rosen(x) for _, _, x in seen], state.history["y"])
    seen = []
    state = LBFGS().minimize(
        Problem(rosen, rosen_der, vs=VectorSpace(comm=COMM)),
        np.array([-1.2, 1.0]),
        monitor=lambda s: s.nit == 3 and COMM.rank == COMM.size - 1,
    )
    assert state.nit == 3


def test_options_can_be_set_at_any_time():
    optimizer = LBFGS(maxiter=3)
    problem, x0 = Problem(rosen, rosen_der), np.array([-1.2, 1.0])
    state = optimizer.minimize(problem, x0)
    assert state.nit == 3 and not state.converged and "maxiter = 3" in state.message
    optimizer.__dict__.update(maxiter=100, m=3)
    assert optimizer.minimize(problem, x0).converged
    assert "m=3" in repr(optimizer)
    assert optimizer.minimize(problem, state).converged  # a state may take the place of x0


def test_tolerances():
    problem, x0 = Problem(rosen, rosen_der), np.tile([-1.2, 1.0], 5)
    assert "objective fell" in LBFGS(gtol=0, ftol=1e-3).minimize(problem, x0).message
    assert "x moved" in LBFGS(gtol=0, xtol=1e-2).minimize(problem, x0).message
    state = LBFGS(gtol=0, gatol=1.0).minimize(problem, x0)
    assert state.converged and state.gnorm <= 1 and state.history["gnorm"][-2] > 1


def test_table_and_representations():
    state = LBFGS(maxiter=4).minimize(Problem(rosen, rosen_der), np.array([-1.2, 1.0]))
    lines = str(state.history).splitlines()
    assert len(lines) == 6 and len(set(map(len, lines))) == 1 and lines[0].split()[:2] == ["nit", "y"]
    assert state.history._repr_html_().count("<tr>") == 6
    assert "nit=4" in repr(state) and "not started" in repr(State(VectorSpace(), "LBFGS"))
    assert "y" in state and "nonsense" not in state
    with pytest.raises(KeyError):
        state["nonsense"]


@pytest.mark.collective
def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    LBFGS().minimize(Problem(rosen, rosen_der), np.array([-1.2, 1.0]), progress=True)
    assert ("it" in capsys.readouterr().err) == (COMM.rank == 0)


@pytest.mark.parametrize("method", ["L-BFGS-B", "CG", "BFGS", "Newton-CG", "trust-ncg"])
def test_scipy_minimize(method):
    vs = ProductSpace()
    target = {"a": np.array([[1.0, 2.0]]), "b": (3.0, np.array([1 - 1j]))}

    def diff(v):
        return vs.addmul(v, target, -1)

    problem = Problem(
        lambda v: vs.dot(diff(v), diff(v)),
        lambda v: vs.scale(2, diff(v)),
        lambda v, d: vs.scale(2, d),
        vs=ProductSpace({"a": VectorSpace(), "b": ProductSpace()}),
    )
    vs.spaces = problem.vs.spaces
    x0 = {"a": np.zeros((1, 2)), "b": (0.0, np.zeros(1, complex))}
    result = scipy_minimize(problem, x0, method=method, tol=1e-8)
    assert result.success and isinstance(result.x["b"], tuple)
    assert vs.norm(diff(result.x)) < 1e-5
    assert problem.hev > 0 or method not in ("Newton-CG", "trust-ncg")


# saving


@pytest.mark.collective
@pytest.mark.parametrize(
    "optimizer", [LBFGS(m=4), TrustRegionCG(), GradientDescent(gtol=1e-4)], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("whiten", [False, True])
def test_resumed_equals_uninterrupted(optimizer, whiten, folder):
    precond = Preconditioner.diagonal(np.linspace(1, 3, 6)) if whiten else None

    def make():
        return Problem(rosen, rosen_der, rosen_hess_prod, preconditioner=precond)

    path, x0 = os.path.join(folder, f"{COMM.rank}.npz"), np.tile([-1.2, 1.0], 3)
    whole = optimizer.minimize(make(), x0)

    class Killed(Exception):
        pass

    def kill(state):
        if state.nit == 12:
            raise Killed

    with pytest.raises(Killed):
        optimizer.minimize(make(), x0, monitor=[autosave(path, every=5), kill])
    saved = State.load(path, VectorSpace(), like=x0)
    assert saved.nit == 10
    resumed = optimizer.minimize(make(), state=saved)
    assert_array_equal(resumed.x, whole.x)
    assert (resumed.nit, resumed.fev, resumed.gev, resumed.hev, resumed.y) == (
        whole.nit,
        whole.fev,
        whole.gev,
        whole.hev,
        whole.y,
    )
    assert_array_equal(resumed.history["y"], whole.history["y"])
    assert os.path.exists(path) and not os.path.exists(path + ".tmp")


@pytest.mark.collective
def test_resume_when_there_is_nothing_yet(folder):
    vs = distributed()
    path = os.path.join(folder, "state.npz")
    assert State.resume(path, vs, np.zeros(1)) is None
    problem = Problem(lambda x: vs.dot(x, x), lambda x: 2 * x, vs=vs)
    state = State.resume(path, vs, np.zeros(3))
    state = LBFGS().minimize(problem, np.ones(3), state=state, monitor=autosave(path, 1))
    again = State.resume(path, vs, np.zeros(3))
    assert again.nit == state.nit
    assert_array_equal(again.x, state.x)
    with pytest.raises(ValueError, match="shape"):
        State.resume(path, vs, np.zeros(4))


@pytest.mark.collective
def test_a_crash_while_saving_leaves_the_old_state(folder, monkeypatch):
    vs = distributed()
    path = os.path.join(folder, "state.npz")
    problem = Problem(lambda x: vs.dot(x**2, x**2), lambda x: 4 * x**3, vs=vs)
    state = LBFGS(maxiter=3).minimize(problem, np.linspace(1.1, 2, COMM.rank + 1))
    state.save(path)
    later = LBFGS(maxiter=6).minimize(problem, state=State.load(path, vs, state.x))

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        if COMM.rank == COMM.size - 1:
            patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="no space left"):
            later.save(path)
    assert State.load(path, vs, state.x).nit == 3
    later.save(path)
    loaded = State.load(path, vs, state.x)
    assert loaded.nit == 6
    assert_array_equal(loaded.x, later.x)
    COMM.Barrier()
    assert sorted(os.listdir(folder))[0] == "state.npz" and len(os.listdir(folder)) == COMM.size


@pytest.mark.collective
def test_files_that_are_not_a_state(folder):
    vs, path = distributed(), os.path.join(folder, "state.npz")
    state = LBFGS(maxiter=2).minimize(Problem(rosen, rosen_der, vs=VectorSpace(comm=COMM)), np.zeros(2))
    state.save(path)
    if COMM.size > 1:
        if COMM.rank == COMM.size - 1:
            (name,) = [n for n in os.listdir(folder) if f".rank{COMM.rank}." in n]
            os.remove(os.path.join(folder, name))
        COMM.Barrier()
        with pytest.raises(StateError, match="cannot be read"):
            State.load(path, vs, np.zeros(2))
    COMM.Barrier()
    if COMM.rank == 0:
        np.savez(path, density=np.zeros(3))
    COMM.Barrier()
    with pytest.raises(ValueError, match="holds no state of a minimisation, but density"):
        State.load(path, vs, np.zeros(2))


@pytest.mark.collective
def test_state_of_another_rank_count(folder):
    path = os.path.join(folder, "state.npz")
    state = LBFGS(maxiter=2).minimize(Problem(rosen, rosen_der), np.zeros(2))
    if COMM.rank == 0:
        state.save(path)
    COMM.Barrier()
    assert State.load(path, VectorSpace(comm=COMM), np.zeros(2)).nit == 2  # the same on all ranks
    if COMM.size > 1:  # a longer vector, of which each rank has a part
        with pytest.raises(StateError, match="the length of x is"):
            State.load(path, distributed(), np.zeros(2))


# several ranks


@pytest.mark.collective
@pytest.mark.parametrize(
    "optimizer",
    [LBFGS(maxiter=30), TrustRegionCG(maxiter=15), GradientDescent(maxiter=12)],
    ids=lambda o: type(o).__name__,
)
def test_same_iterates_on_any_number_of_ranks(optimizer):
    n = 40
    c, truth = np.logspace(0, 2, n), np.sin(np.arange(n))

    def f(x, c, t):
        return float(np.sum(c * (x - t) ** 2 + (x - t) ** 4))

    def g(x, c, t):
        return 2 * c * (x - t) + 4 * (x - t) ** 3

    def H(x, v, c, t):
        return (2 * c + 12 * (x - t) ** 2) * v

    serial = optimizer.minimize(
        Problem(lambda x: f(x, c, truth), lambda x: g(x, c, truth), lambda x, v: H(x, v, c, truth)),
        np.zeros(n),
    )
    a, b, vs = split(c), split(truth), distributed()
    if COMM.size > 1 and COMM.rank == 1:
        assert len(a) == 0
    problem = Problem(
        lambda x: COMM.allreduce(f(x, a, b)), lambda x: g(x, a, b), lambda x, v: H(x, v, a, b), vs=vs
    )
    state = optimizer.minimize(problem, split(np.zeros(n)))
    assert state.nit == serial.nit
    assert_allclose(state.history["y"], serial.history["y"], rtol=1e-6, atol=1e-10)
    assert_allclose(state.x, split(serial.x), atol=1e-6)
    assert len(set(COMM.allgather((state.nit, state.fev, state.y, state.gnorm)))) == 1


@pytest.mark.collective
def test_distributed_state_there_and_back(folder):
    path, vs = os.path.join(folder, "state.npz"), distributed()
    b = split(np.sin(np.arange(30.0)))

    def make():
        return Problem(
            lambda x: COMM.allreduce(float(np.sum((x - b) ** 4 + (x - b) ** 2))),
            lambda x: 4 * (x - b) ** 3 + 2 * (x - b),
            vs=vs,
        )

    whole = LBFGS(gtol=1e-10).minimize(make(), 0 * b)
    LBFGS(maxiter=3).minimize(make(), 0 * b, monitor=autosave(path, 1))
    resumed = LBFGS(gtol=1e-10).minimize(make(), state=State.load(path, vs, b))
    assert_array_equal(resumed.x, whole.x)
    COMM.Barrier()
    assert len(os.listdir(folder)) == COMM.size


@pytest.mark.collective
def test_an_objective_that_is_not_reduced_is_refused():
    if COMM.size == 1:
        pytest.skip("needs two ranks")
    problem = Problem(lambda x: float(np.sum(x**2)), lambda x: 2 * x, vs=distributed())
    with pytest.raises(ValueError, match="differs between ranks"):
        LBFGS().minimize(problem, np.ones(COMM.rank + 1))


@pytest.mark.collective
def test_fields(folder):
    pm_module = pytest.importorskip("pmesh.pm")
    pm = pm_module.ParticleMesh(Nmesh=[4, 4, 4], BoxSize=4.0, comm=COMM)
    vs, path = FieldSpace(pm.comm), os.path.join(folder, "field.npz")
    for kind in ("real", "complex"):
        truth = pm.generate_whitenoise(3, type=kind)

        def diff(x, truth=truth):
            return vs.addmul(x, truth, -1)

        problem = Problem(
            lambda x: vs.dot(diff(x), diff(x)),
            lambda x: vs.scale(2.0, diff(x)),
            lambda x, v: vs.scale(2.0, v),
            vs=vs,
        )
        for optimizer in (LBFGS(), TrustRegionCG(), GradientDescent()):
            state = optimizer.minimize(problem, vs.zeros_like(truth), monitor=autosave(path, 1))
            assert state.converged and type(state.x) is type(truth)
            assert_allclose(state.x.value, truth.value, atol=1e-5)
            loaded = State.load(path, vs, truth)
            assert type(loaded.x) is type(truth)
            assert_array_equal(loaded.x.value, state.x.value)
    assert_allclose(vs.dot(truth, truth), truth.cdot(truth).real)
    with pytest.raises(TypeError, match="two pmesh fields of one kind"):
        vs.dot(truth, truth.c2r())


@pytest.mark.collective
@pytest.mark.parametrize("mesh", [[4, 4, 4], [4, 4, 5], [5, 3, 7], [4, 5]])
def test_the_product_of_complex_fields_is_that_of_the_real_ones(mesh):
    pm = pytest.importorskip("pmesh.pm").ParticleMesh(Nmesh=mesh, BoxSize=4.0, comm=COMM)
    vs, (a, b) = FieldSpace(pm.comm), [pm.generate_whitenoise(seed, type="complex") for seed in (3, 4)]
    real_a, real_b = a.c2r(), b.c2r()
    assert_allclose(vs.dot(real_a.r2c(), real_b.r2c()) * np.prod(mesh), vs.dot(real_a, real_b), rtol=1e-10)


@pytest.mark.serial
def test_a_job_that_is_killed_goes_on_where_it_was(folder):
    script = """
import os, signal, sys
import numpy as np
from scipy.optimize import rosen, rosen_der
from vmad_lit.contrib.optimize import LBFGS, Problem, State, autosave
path, last = sys.argv[1], int(sys.argv[2])
def kill(state):
    if state.nit == last:
        os.kill(os.getpid(), signal.SIGKILL)
problem, x0 = Problem(rosen, rosen_der), np.tile([-1.2, 1.0], 5)
state = LBFGS().minimize(problem, x0, state=State.resume(path, problem.vs, x0), monitor=[autosave(path, 1), kill])
print(state.nit, state.fev, state.x.tobytes().hex())
"""

    def run(name, last):
        return run_python(script, os.path.join(folder, name), last)

    whole = run("whole.npz", -1)
    assert whole.returncode == 0, whole.stderr
    assert run("killed.npz", 7).returncode == -9
    assert run("killed.npz", 23).returncode == -9
    assert run("killed.npz", -1).stdout == whole.stdout


@pytest.mark.parametrize("units, status", [(150, "rounding"), (250, "failed")])
def test_a_failed_search_ends_in_rounding_where_the_fall_to_expect_is_lost_in_it(units, status):
    """Half of the slope is what a quadratic function falls at most; 100 units of rounding are lost."""
    for kind, share in (LBFGS, 1.0), (GradientDescent, 0.5):  # which is content with the whole slope
        g = np.array([math.sqrt(units * share * EPS)])
        problem = Problem(lambda x: 1.0 + g @ x, lambda x: g)
        state = kind(linesearch=lambda line, first: None, gtol=0.0).minimize(problem, np.zeros(1))
        assert state.nit == 0 and state.status == status and not state.converged
        assert {"rounding": "rounding", "failed": "line search failed"}[status] in state.message


def test_a_step_that_ends_on_the_surface_of_the_region_is_on_the_surface():
    g, inside = (
        np.array([3.0, 4.0]),
        lambda radius: TrustRegionCG().solve(VectorSpace(), lambda d: d, g, radius, 1e-3),
    )
    for radius, surface in (5.0, True), (4.0, True), (6.0, False):
        p, r, on = inside(radius)
        assert on is surface
        assert_allclose(p, -g * min(radius / 5, 1))
        assert_allclose(r, g + p, atol=1e-14)


def test_the_first_region():
    """Ten steps of steepest descent where the objective is convex; else to the zero of a parabola."""
    problem, g = Problem(lambda x: 0.0), np.array([3.0, 4.0])
    for y, curvature, radius in (
        (1.0, 2.0, 25.0),
        (10.0, 0.0, 4.0),
        (-10.0, -1.0, 4.0),
        (0.0, -1.0, 7e-8),
        (1e3, -1.0, 50.0),
        (1.0, 0.1, 50.0),
        (10.0, math.nan, 4.0),
    ):
        state = SimpleNamespace(Pg=g, Pgnorm=5.0, Px=np.array([0.0, 7.0]), Py=y)
        first = TrustRegionCG(maxradius=50.0).first_radius(problem, lambda d: curvature * d, state)
        assert first == pytest.approx(radius)
    assert TrustRegionCG(radius=3.0).first_radius(problem, None, state) == 3.0


def test_a_minimisation_that_goes_on_has_not_converged():
    problem, told = Problem(rosen, rosen_der), []
    state = LBFGS(gtol=1e-2).minimize(problem, np.array([-1.2, 1.0]))
    assert state.converged
    state = LBFGS(gtol=1e-8).minimize(
        problem, state, monitor=lambda state: told.append((state.converged, state.message))
    )
    assert state.converged and len(told) > 1 and set(told[:-1]) == {(False, "")}


def test_scipy_gets_the_hessian():
    x0 = np.array([-1.2, 1.0, 0.5])
    ours = scipy_minimize(Problem(rosen, rosen_der, rosen_hess_prod), x0, method="Newton-CG")
    want = scipy.optimize.minimize(rosen, x0, method="Newton-CG", jac=rosen_der, hessp=rosen_hess_prod)
    assert (ours.nit, ours.nhev) == (want.nit, want.nhev)
    assert_allclose(ours.x, want.x, rtol=1e-12)


@pytest.mark.collective
def test_the_progress_bar_shows_objective_and_gradient(capsys):
    pytest.importorskip("tqdm")
    LBFGS(maxiter=3).minimize(
        Problem(lambda x: 7.25 + 0 * x[0], lambda x: np.array([0.0])), np.array([1.0]), progress=True
    )
    assert ("y=7.25 |g|=0" in capsys.readouterr().err) == (COMM.rank == 0)


# scales


SCALED = [
    (rosen, rosen_der, rosen_hess_prod, [-1.2, 1.0]),
    (lambda x: 0.5 * x @ (x - 6), lambda x: x - 3.0, lambda x, v: v, [0.0, 0.0, 0.0]),
    (
        lambda x: 1e3 + float(np.sum((x - 2) ** 4 + (x - 2) ** 2)),
        lambda x: 4 * (x - 2) ** 3 + 2 * (x - 2),
        lambda x, v: 12 * (x - 2) ** 2 * v + 2 * v,
        [5.0],
    ),
]


def scaled(f, g, H, height, width):
    """The problem with the objective multiplied by `height` and the variables by `width`."""
    return Problem(
        lambda x: height * f(x / width),
        lambda x: height * (g(x / width) / width),
        lambda x, v: height * (H(x / width, v / width) / width),
    )


@pytest.mark.parametrize(
    "optimizer", [LBFGS(), TrustRegionCG(), GradientDescent()], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("width", [1e-12, 1.0, 1e12])
def test_in_any_units_the_way_is_as_short_and_the_end_as_good_as_for_scipy(optimizer, width):
    for f, g, H, x0 in SCALED:
        x0 = np.array(x0)
        want = scipy.optimize.minimize(f, x0, jac=g, options=dict(gtol=1e-8))
        usual = optimizer.minimize(Problem(f, g, H), x0)
        for height in (1e-280, 1e-150, 1e-30, 1e30, 1e150, 1e270):
            state = optimizer.minimize(scaled(f, g, H, height, width), x0 * width)
            assert state.converged, (height, state)
            assert_allclose(state.x / width, want.x, atol=1e-3)
            assert np.linalg.norm(g(state.x / width)) <= 1.01e-6 * np.linalg.norm(g(x0))
            assert state.nit <= 3 * usual.nit + 5


@pytest.mark.parametrize(
    "optimizer", [LBFGS(), TrustRegionCG(), GradientDescent()], ids=lambda o: type(o).__name__
)
def test_a_power_of_two_changes_nothing(optimizer):
    for f, g, H, x0 in SCALED:
        usual = optimizer.minimize(Problem(f, g, H), np.array(x0))
        for power in (-900, -10, 10, 900):
            state = optimizer.minimize(scaled(f, g, H, 2.0**power, 1.0), np.array(x0))
            assert_array_equal(state.x, usual.x)
            assert_array_equal(state.history["y"], usual.history["y"] * 2.0**power)


def test_the_end_is_not_the_beginning():
    problem = Problem(lambda x: 1e-30 * float(((x - 3) ** 2).sum()), lambda x: 2e-30 * (x - 3))
    for optimizer in LBFGS(), GradientDescent():
        state = optimizer.minimize(problem, np.zeros(2))
        assert state.status == "converged" and state.nit > 0
        assert_allclose(state.x, 3)


def test_lengths_whose_squares_are_no_numbers():
    vs, v = VectorSpace(), np.array([3.0, -4.0])
    for size in (0.0, 1e-320, 1e-300, 1e-160, 1.0, 1e150, 1e200, 1e307):
        assert_allclose(vs.norm(v * size), 5 * size, rtol=1e-3 if size < 1e-310 else 1e-14)
        assert_allclose(ProductSpace().norm([v[0] * size, v[1:] * size]), 5 * size, rtol=1e-3)
    assert vs.norm(np.zeros(3, "f4")) == 0 and vs.norm(np.array([1e-30], "f4")) == pytest.approx(1e-30)
    assert vs.norm(np.array([np.inf, 1.0])) == np.inf and math.isnan(vs.norm(np.array([np.nan, 1.0])))
    assert not VectorSpace().same(1e-200, 2e-200)
    with pytest.raises(ValueError, match="with itself is negative"):
        VectorSpace(dot=lambda a, b: -1.0).norm(v)


def test_the_end_in_rounding_goes_by_the_type_of_the_objective():
    target = np.linspace(1, 2, 50)
    problem = Problem(lambda x: np.float32(7 + np.sum((x - target) ** 2)), lambda x: 2 * (x - target) + 1e-6)
    state = LBFGS(gtol=0.0).minimize(problem, np.zeros(50))
    assert state.status == "rounding" and problem.eps == np.finfo("f4").eps
    assert_allclose(state.x, target, atol=1e-3)


# at the door


@pytest.mark.parametrize(
    "x0",
    [
        [0, 5],
        (0.0, 5.0),
        np.array([0, 5]),
        np.array([0, 5], "f2"),
        np.array([0, 5], "i1"),
        [np.float32(0), 5],
    ],
    ids=repr,
)
def test_lists_and_whole_numbers_are_starting_points(x0):
    state = LBFGS().minimize(Problem(lambda x: float(np.sum((x - 2.5) ** 2)), lambda x: 2 * (x - 2.5)), x0)
    assert state.x.dtype == float and state.converged
    assert_allclose(state.x, 2.5)


@pytest.mark.parametrize(
    "x0, words",
    [
        (np.ma.masked_array([1.0, 2.0], [0, 1]), "MaskedArray"),
        ([1.0, np.nan], "not finite"),
        ([np.inf], "not finite"),
        ([[1.0, 2.0], [3.0]], "rows differ in length"),
        ("ab", "got str"),
        (True, "got bool"),
        ([True], "of dtype bool"),
        (np.array(["a"]), "of dtype <U1"),
        ({"a": 1.0}, "ProductSpace"),
        (SimpleNamespace(unit="kpc", value=1.0), "a quantity with a unit"),
    ],
)
def test_what_is_no_starting_point_is_refused(x0, words):
    problem = Problem(lambda x: float(np.sum(x**2)), lambda x: 2 * x)
    for minimize in LBFGS().minimize, scipy_minimize:
        with pytest.raises((TypeError, ValueError), match=words):
            minimize(problem, x0)


@pytest.mark.parametrize(
    "slope, words",
    [
        (np.ones(3), r"expected the shape \(2,\), got \(3,\)"),
        (np.ones((2, 1)), r"got \(2, 1\)"),
        ([1.0], r"got \(1,\)"),
        (1.0, r"got \(\)"),
        (None, "got NoneType"),
        (np.ones(2) * 1j, "expected real numbers"),
        (np.ma.masked_array([1.0, 2.0], [0, 1]), "MaskedArray"),
    ],
)
def test_a_gradient_is_like_its_point(slope, words):
    for problem in (
        Problem(lambda x: float(np.sum(x**2)), lambda x: slope),
        Problem(value_and_gradient=lambda x: (float(np.sum(x**2)), slope)),
    ):
        with pytest.raises((TypeError, ValueError), match="the gradient must be a vector like x: .*" + words):
            LBFGS().minimize(problem, np.ones(2))


@pytest.mark.parametrize(
    "value", [1j, np.ones(2), None, "x", np.ma.masked, SimpleNamespace(unit="s", real=1.0)]
)
def test_an_objective_is_one_real_number(value):
    with pytest.raises(TypeError, match="an objective must return one real number, got"):
        LBFGS().minimize(Problem(lambda x: value, lambda x: x), np.ones(2))


@pytest.mark.parametrize(
    "kind, name, values",
    [
        (LBFGS, "maxiter", [-1, 2.5, "5", None, True, math.nan]),
        (LBFGS, "gtol", [-1e-3, 1.0, math.nan, math.inf, "small", None]),
        (LBFGS, "gatol", [-1.0, math.inf, math.nan]),
        (GradientDescent, "ftol", [-1.0, 1.0]),
        (GradientDescent, "xtol", [-1.0, 1.0]),
        (LBFGS, "m", [0, -1, 2.5]),
        (LBFGS, "curvature", [-1, 1, math.nan]),
        (LBFGS, "linesearch", [None, "wolfe"]),
        (TrustRegionCG, "radius", [0, -1.0, math.nan]),
        (TrustRegionCG, "maxradius", [0.0, None]),
        (TrustRegionCG, "eta", [-0.1, 0.25, 1.0]),
        (TrustRegionCG, "cg_maxiter", [0, -3, 1.5]),
        (TrustRegionCG, "cg_rtol", [1.0, -1.0, math.nan]),
        (GradientDescent, "window", [0, 1.5]),
        (GradientDescent, "barzilai_borwein", ["no", 1]),
        (Backtracking, "maxiter", [0]),
        (Backtracking, "c1", [0.0, 1.0, math.nan]),
        (Backtracking, "shrink", [0.0, 1.0]),
        (StrongWolfe, "maxiter", [0, 1.5]),
    ],
)
def test_options_out_of_range_are_refused_whenever_they_are_set(kind, name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            kind(**{name: value})
        if kind in (LBFGS, TrustRegionCG, GradientDescent):
            optimizer = kind()
            vars(optimizer)[name] = value
            with pytest.raises(ValueError, match=name):
                optimizer.minimize(Problem(rosen, rosen_der, rosen_hess_prod), np.zeros(2))


def test_options_of_the_reference_and_slips_of_the_pen():
    with pytest.raises(TypeError, match="no option 'maxitr': did you mean 'maxiter'"):
        LBFGS(maxitr=3)
    for kind, name in (
        (LBFGS, "conviter"),
        (LBFGS, "linesearchiter"),
        (GradientDescent, "rate"),
        (TrustRegionCG, "initradius"),
        (TrustRegionCG, "minradius"),
        (TrustRegionCG, "cg_monitor"),
        (LBFGS, "atol"),
        (LBFGS, "rtol"),
    ):
        with pytest.raises(TypeError, match=f"no option '{name}': ") as error:
            kind(**{name: 1.0})
        assert "did you mean" not in str(error.value)
    optimizer = LBFGS()
    optimizer.maxiters = 7
    with pytest.raises(TypeError, match="did you mean 'maxiter'"):
        optimizer.minimize(Problem(rosen, rosen_der), np.zeros(2))
    with pytest.raises(TypeError, match="vs must be a VectorSpace"):
        Problem(rosen, rosen_der, vs=np.dot)


@pytest.mark.parametrize(
    "dot",
    [
        lambda a, b: np.float32(np.sum(a * b)),
        lambda a, b: np.array(np.vdot(a, b)),
        lambda a, b: np.array([np.vdot(a, b)]),
        lambda a, b: np.longdouble(np.vdot(a, b)),
        lambda a, b: complex(np.vdot(a, b)),
    ],
)
def test_a_state_is_saved_whatever_type_the_inner_product_has(dot, folder):
    vs, path = VectorSpace(dot=dot), os.path.join(folder, "state.npz")
    for optimizer in LBFGS(maxiter=3), TrustRegionCG(maxiter=3), GradientDescent(maxiter=3):
        state = optimizer.minimize(Problem(rosen, rosen_der, rosen_hess_prod, vs=vs), [-1.2, 1.0])
        state.numbers["of a user"] = np.arange(3)
        state.save(path)
        loaded = State.load(path, vs, state.x)
        assert loaded.numbers["of a user"] == [0, 1, 2] and loaded.status == state.status == "maxiter"
        assert loaded.gnorm == state.gnorm and type(state.gnorm) is float
    state.numbers["of a user"] = object()
    with pytest.raises(TypeError, match="numbers and lists of numbers"):
        state.save(path)
    with pytest.raises(TypeError, match="an inner product must be one real number, got"):
        VectorSpace(dot=lambda a, b: a * b).norm(np.ones(2))


@pytest.mark.collective
def test_what_is_wrong_on_one_rank_is_raised_on_all_and_names_it(folder):
    last, vs = COMM.size - 1, distributed()
    name = f"on rank {last}: " if COMM.size > 1 else ""

    def problem(objective=lambda x: vs.dot(x, x), gradient=lambda x: 2 * x):
        return Problem(objective, gradient, vs=vs)

    def bad(value, good):
        return value if COMM.rank == last else good

    x0 = np.ones(COMM.rank + 2)
    with pytest.raises(TypeError, match=name + "the starting point x0 is no vector"):
        LBFGS().minimize(problem(), bad("x", x0))
    with pytest.raises(ValueError, match="x0 has components that are not finite"):
        LBFGS().minimize(problem(), bad(x0 * np.nan, x0))
    with pytest.raises(ValueError, match=name + "the gradient must be a vector like x"):
        LBFGS().minimize(problem(gradient=lambda x: bad(x[1:], x)), x0)
    with pytest.raises(TypeError, match=name + "an objective must return one real number"):
        LBFGS().minimize(problem(objective=lambda x: bad(None, vs.dot(x, x))), x0)
    state = LBFGS(maxiter=1).minimize(problem(), x0)
    if COMM.rank == 0:
        state.numbers["of a user"] = object()
    with pytest.raises((TypeError, OSError)):
        state.save(os.path.join(folder, "state.npz"))


@pytest.mark.collective
def test_extreme_units_on_several_ranks():
    vs, target = distributed(), split(np.linspace(1, 2, 5))
    for height in (1e-280, 1e280):
        problem = Problem(
            lambda x, height=height: height * vs.dot(x - target, x - target),
            lambda x, height=height: 2 * height * (x - target),
            lambda x, v, height=height: 2 * height * v,
            vs=vs,
        )
        for optimizer in LBFGS(), TrustRegionCG(), GradientDescent():
            state = optimizer.minimize(problem, 0 * target)
            assert state.converged and len(set(COMM.allgather((state.status, state.nit, state.y)))) == 1
            assert_allclose(state.x, target, rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer", [LBFGS(maxiter=6), GradientDescent(maxiter=6)], ids=lambda o: type(o).__name__
)
def test_lines_are_freed_when_they_are_done(optimizer):
    """A line holds vectors; where it is part of a circle it waits for the garbage collector, which counts no bytes."""
    gc.collect()
    gc.disable()
    try:
        optimizer.minimize(Problem(lambda x: float(np.sum(x**4)), lambda x: 4 * x**3), np.arange(1.0, 5.0))
        left = sum(type(found) is Line for found in gc.get_objects())
    finally:
        gc.enable()
    assert left == 0

"""Chi-square problems: gradients, Gauss-Newton products, one forward run a point; inversions in epochs."""

import gc
import os
import weakref

import numpy as np
import pytest
from mpi4py import MPI
from numpy.testing import assert_allclose, assert_array_equal

from helpers import join, split
from vmad_lit import Builder, autooperator, operator
from vmad_lit.contrib.chisquare import (
    Epoch,
    EpochScheduler,
    MAPInversion,
    MPIChiSquareOperator,
    MPIChiSquareProblem,
    MPIVectorSpace,
)
from vmad_lit.contrib.optimize import LBFGS, GradientDescent, State, TrustRegionCG, autosave
from vmad_lit.contrib.vectorspace import VectorSpace
from vmad_lit.lib import mpi

pytestmark = pytest.mark.collective

COMM = MPI.COMM_WORLD
N = 12
RNG = np.random.default_rng(7)
A = RNG.normal(size=(N, N)) / 3
DATA = RNG.normal(size=N)
POINT = RNG.normal(size=N)


@operator
class mix:
    """A times the vector that is spread over the ranks: a partitioned linear operator."""

    ain, aout = "x", "y"

    def apl(node, x):
        return split(A @ join(x))

    def vjp(node, _y):
        return split(A.T @ join(_y))


@operator
class curvature:
    ain, aout = "x", "y"

    def apl(node, x):
        return np.sinh(x)

    def vjp(node, _y, x):
        return np.cosh(x) * _y

    def jvp(node, x_, x):
        return np.cosh(x) * x_


@autooperator("s -> f, s1")
def forward(s):
    return curvature(mix(s) + s * s * 0.1), s


@autooperator("f, s1 -> r")
def misfit(f, s1):
    return (f - split(DATA)) * 3.0


@autooperator("f, s1 -> r")
def prior(f, s1):
    return s1 * 0.5


def make(**options):
    return MPIChiSquareProblem(COMM, forward, [misfit, prior], **options)


def exact_residuals(s):
    return np.concatenate([3 * (np.sinh(A @ s + 0.1 * s * s) - DATA), 0.5 * s])


def exact_jacobian(s):
    inner = A @ s + 0.1 * s * s
    return np.concatenate([3 * np.cosh(inner)[:, None] * (A + np.diag(0.2 * s)), 0.5 * np.eye(N)])


# the operator and the space


def test_operator_sums_over_all_ranks():
    model = MPIChiSquareOperator.build(comm=COMM)
    x = np.arange(COMM.rank + 2.0)
    expected = COMM.allreduce(float(np.sum(x * x)))
    y, [_x] = model.compute_with_vjp(init=dict(x=x), v=dict(_y=2.0))
    assert_allclose(y, [expected])
    assert_allclose(_x, 4 * x)
    y, y_ = model.compute_with_jvp("y", init=dict(x=x), v=dict(x_=np.ones_like(x)))
    assert_allclose(y_, COMM.allreduce(2 * np.sum(x)))


def test_operator_of_complex_residuals():
    model = MPIChiSquareOperator.build(comm=COMM)
    x = np.array([1 + 2j, -3j])
    y, [_x] = model.compute_with_vjp(init=dict(x=x), v=dict(_y=1.0))
    assert_allclose(y, [14 * COMM.size])
    assert_allclose(_x, 2 * x)  # dy = Re(conj(_x) dx)
    _, y_ = model.compute_with_jvp("y", init=dict(x=x), v=dict(x_=np.array([1j, 1.0])))
    assert_allclose(y_, 2 * 2.0 * COMM.size)
    assert_allclose(model.compute_with_hvp("y", dict(x=x), dict(x_=np.array([1j, 1.0])))[2], [[2j, 2.0]])


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_operator_of_fields(kind):
    pm = pytest.importorskip("pmesh.pm").ParticleMesh(Nmesh=[4, 4, 4], BoxSize=1.0, comm=COMM)
    x, dx = pm.generate_whitenoise(3, type=kind), pm.generate_whitenoise(4, type=kind)
    model = MPIChiSquareOperator.build(comm=COMM)
    y, [_x] = model.compute_with_vjp(init=dict(x=x), v=dict(_y=1.0))
    assert_allclose(y, [x.cdot(x).real])
    assert type(_x) is type(x)
    assert_allclose(_x.value, 2 * x.value)
    _, y_ = model.compute_with_jvp("y", init=dict(x=x), v=dict(x_=dx))
    assert_allclose(y_, 2 * x.cdot(dx).real)
    _, _, [product] = model.compute_with_hvp("y", init=dict(x=x), v=dict(x_=dx))
    assert_allclose(product.value, 2 * dx.value)
    vs = MPIVectorSpace(COMM)
    assert_allclose(vs.dot(x, dx), x.cdot(dx).real)
    assert type(vs.from_arrays(vs.to_arrays(x), x)) is type(x)


def test_vector_space():
    vs = MPIVectorSpace(COMM)
    x = split(np.arange(10.0))
    assert vs.dot(x, x) == 285
    assert_array_equal(vs.addmul(x, x, 2, 2), 5 * x)
    assert_array_equal(vs.from_arrays(vs.to_arrays(x), x), x)
    assert vs.same(x, x.copy()) and not vs.same(x, x + (COMM.rank == 0) * (len(x) > 0))


# the problem


def test_objective_gradient_and_product_are_exact():
    problem, s = make(), split(POINT)
    r, J = exact_residuals(POINT), exact_jacobian(POINT)
    assert_allclose(problem.objective(s), r @ r, rtol=1e-12)
    assert_allclose(join(problem.gradient(s)), 2 * J.T @ r, rtol=1e-10)
    for v in np.eye(N)[[0, 5, 11]]:
        product = join(problem.hessian_vector_product(s, split(v)))
        assert_allclose(product, 2 * J.T @ (J @ v), rtol=1e-9, atol=1e-12)
    assert_allclose(problem.chisquares(s), [r[:N] @ r[:N], r[N:] @ r[N:]])
    assert_allclose(join(problem.residual_values(s)[0]), r[:N])
    assert problem.forwards == 1


def test_gradient_passes_the_taylor_test():
    problem, s, v = make(), split(POINT), split(np.cos(np.arange(N)))
    y, slope = problem.objective(s), problem.vs.dot(problem.gradient(s), v)
    rest = [abs(problem.objective(s + h * v) - y - h * slope) for h in (1e-2, 5e-3, 2.5e-3)]
    assert_allclose([rest[0] / rest[1], rest[1] / rest[2]], 4, rtol=0.05)


def test_product_is_symmetric_and_never_negative():
    problem, s = make(), split(POINT)
    dot = problem.vs.dot
    u, v = split(np.sin(np.arange(N))), split(np.cos(np.arange(N)))
    Hu, Hv = problem.Hvp(s, u), problem.Hvp(s, v)
    assert_allclose(dot(u, Hv), dot(Hu, v), rtol=1e-12)
    assert dot(v, Hv) > 0
    assert problem.forwards == 1  # a product at a point where nothing was asked before


def test_one_forward_run_a_point_whatever_is_asked_first():
    s, v = split(POINT), split(np.ones(N))
    for first in ("objective", "gradient", "product"):
        problem = make()
        asked = dict(
            objective=lambda p=problem: p.objective(s),
            gradient=lambda p=problem: p.gradient(s),
            product=lambda p=problem: p.Hvp(s, v),
        )
        asked[first]()
        for ask in asked.values():
            ask()
            ask()
        assert problem.forwards == problem.fev == 1 and problem.gev == 1 and problem.hev >= 2


@pytest.mark.parametrize("ask", ["objective", "value_and_gradient", "product"])
def test_a_problem_that_nobody_holds_is_gone(ask):
    """The one of the last epoch would lie beside that of the next, with its tape, until the garbage is collected."""
    s, v = split(POINT), split(np.ones(N))
    gc.collect()
    gc.disable()
    try:
        problem = make()
        problem.Hvp(s, v) if ask == "product" else getattr(problem, ask)(s)
        left = weakref.ref(problem)
        del problem
        assert left() is None
    finally:
        gc.enable()


def test_another_point_is_another_run_also_in_the_same_array():
    problem, s, v = make(), split(POINT).copy(), split(np.ones(N))
    first = problem.Hvp(s, v)
    s *= 1.1
    J = exact_jacobian(1.1 * POINT)
    assert_allclose(join(problem.Hvp(s, v)), 2 * J.T @ (J @ np.ones(N)), rtol=1e-9, atol=1e-12)
    assert problem.forwards == 2
    s /= 1.1
    s[:] = split(POINT)
    assert_allclose(problem.Hvp(s, v), first, rtol=1e-12)
    assert problem.forwards == 3


def test_the_tape_is_not_spoilt_by_changes_in_place():
    problem, s = make(), split(POINT).copy()
    problem.objective(s)
    kept = s.copy()
    s[...] = 0
    r, J = exact_residuals(POINT), exact_jacobian(POINT)
    assert_allclose(join(problem.gradient(kept)), 2 * J.T @ r, rtol=1e-10)
    assert problem.forwards == 1


@pytest.mark.parametrize(
    "optimizer",
    [LBFGS(gtol=1e-7), TrustRegionCG(gtol=1e-7), GradientDescent(gtol=1e-4)],
    ids=lambda o: type(o).__name__,
)
def test_same_minimum_on_any_number_of_ranks(optimizer):
    import scipy.optimize

    exact = scipy.optimize.least_squares(
        exact_residuals, 0.1 * np.ones(N), exact_jacobian, gtol=1e-14, xtol=1e-14, ftol=1e-15
    )
    problem = make()
    state = optimizer.minimize(problem, split(0.1 * np.ones(N)))
    assert state.converged, state
    assert_allclose(join(state.x), exact.x, atol=1e-2 if isinstance(optimizer, GradientDescent) else 1e-4)
    assert_allclose(state.y, 2 * exact.cost, rtol=1e-4)
    assert problem.forwards <= problem.fev + problem.hev // 2


def test_saved_and_resumed(folder):
    path, s = os.path.join(folder, "fit.npz"), split(0.1 * np.ones(N))
    whole = LBFGS(maxiter=9).minimize(make(), s)
    LBFGS(maxiter=4).minimize(make(), s, monitor=autosave(path, 2))
    problem = make()
    resumed = LBFGS(maxiter=9).minimize(problem, state=State.resume(path, problem.vs, s))
    assert_array_equal(resumed.x, whole.x)


def test_universal_unknowns():
    @autooperator("x -> y")
    def line(x):
        return mpi.allbcast(x, COMM) * split(np.arange(1.0, 11.0))

    @autooperator("y -> r")
    def residual(y):
        return y - split(3 * np.arange(1.0, 11.0))

    problem = MPIChiSquareProblem(COMM, line, [residual], vectorspace=VectorSpace(comm=COMM))
    state = LBFGS(gtol=1e-10).minimize(problem, 0.5)
    assert_allclose(state.x, 3)
    assert_allclose(problem.gradient(1.0), -4 * 385)
    assert_allclose(problem.Hvp(1.0, 1.0), 2 * 385)


def test_forward_operator_with_one_output_and_constant_residual():
    @autooperator("x -> y")
    def double(x):
        return x * 2.0

    @autooperator("y -> r")
    def residual(y):
        return y - 1.0

    problem = MPIChiSquareProblem(COMM, double, [residual])
    x = split(np.zeros(5))
    assert_allclose(join(LBFGS().minimize(problem, x).x), 0.5)
    with pytest.raises(ValueError, match="at least one residual"):
        MPIChiSquareProblem(COMM, double, [])


def test_gauss_newton_agrees_with_the_model_s_own():
    """The cached product is what compute_with_gnDp gives, residual by residual."""
    problem, s, v = make(), split(POINT), split(np.cos(np.arange(N)))
    total = 0
    for residual in (misfit, prior):
        with Builder() as m:
            m.output(y=residual(*forward(m.input("x"))))
        _, [product] = m.compute_with_gnDp("y", init=dict(x=s), v=dict(x_=v))
        total = total + product
    assert_allclose(problem.Hvp(s, v), 2 * total, rtol=1e-10, atol=1e-12)


# epochs


@pytest.mark.serial
def test_scheduler():
    schedule = EpochScheduler()
    assert schedule.min_nepochs == 1 and schedule.get_args(5) == {}
    schedule("a", [1, 2, 3])
    schedule.schedule("b", {1: "x", 4: "y"})
    schedule("c", 7)
    schedule("a", {3: 9})
    assert schedule.min_nepochs == 5
    assert schedule.get_args(0) == dict(a=1, c=7)
    assert schedule.get_args(2) == dict(a=3, b="x", c=7)
    assert schedule.get_args(9) == dict(a=9, b="y", c=7)
    for bad in (-1, "a", 0.5):
        with pytest.raises(ValueError, match="counted 0, 1, 2"):
            schedule("a", {bad: 1})


class Shifted(MAPInversion):
    """Fit s to d, with a weight that is scheduled."""

    def problem_factory(self, d, weight, wish=0.0):
        @autooperator("f -> r")
        def residual(f):
            return (f - d) * weight

        @autooperator("f -> r")
        def wished(f):
            return f - wish

        return MPIChiSquareProblem(COMM, self.ForwardOperator, [residual, wished])


@autooperator("s -> f")
def identity(s):
    return s * 1.0


def inversion(**options):
    made = Shifted(LBFGS(gtol=1e-10, **options), identity)
    made.schedule_problem("weight", [0.0, 1.0, 2.0])
    made.schedule_problem("wish", 1.0)
    made.schedule_optimizer("maxiter", {0: 20, 2: 50})
    return made


def test_inversion_runs_its_epochs():
    d, s0 = split(np.arange(6.0)), split(np.zeros(6))
    made, epochs, iterations = inversion(m=5), [], []
    s1 = made.apply(
        d,
        s0,
        monitor_epoch=lambda e: epochs.append(repr(e)),
        monitor_progress=lambda state: iterations.append(made.optimizer.maxiter),
    )
    assert_allclose(s1, (4 * d + 1) / 5, atol=1e-8)
    assert epochs == ["Epoch 0 / 3", "Epoch 1 / 3", "Epoch 2 / 3"] and made.nepochs == 3
    assert set(iterations) == {20, 50}
    for before, after, epoch in zip(made.states, made.states[1:], (1, 2), strict=False):
        assert_allclose(after.history["y"][0], made.get_problem(d, epoch).objective(before.x))
    assert_allclose(made.states[0].x, 1 + 0 * d, atol=1e-8)
    assert_allclose(made.states[1].x, (d + 1) / 2, atol=1e-8)
    assert made.optimizer.maxiter == LBFGS.maxiter and made.optimizer.m == 5  # as it was before
    assert_allclose(made.apply(d, s0, epochs=[1]), (d + 1) / 2, atol=1e-8)
    assert made.get_problem(d, 2).forwards == 0
    assert (Epoch(1, 2).epoch, Epoch(1, 2).nepochs) == (1, 2)


def test_create_like():
    made = inversion()
    made.extra = "kept"
    copy = Shifted.create_like(made)
    copy.schedule_problem("weight", {1: 5.0})
    assert made.schedule_problem.get_args(1)["weight"] == 1.0
    assert copy.extra == "kept" and copy.optimizer is made.optimizer and copy.ForwardOperator is identity
    last = Shifted.create_like(made, epochs=[0, 2])
    assert last.nepochs == 2
    assert last.schedule_problem.get_args(1) == dict(weight=2.0, wish=1.0)
    assert last.schedule_optimizer.get_args(1) == dict(maxiter=50)
    d = split(np.arange(6.0))
    assert_allclose(last.apply(d, 0 * d), (4 * d + 1) / 5, atol=1e-8)


def test_mistakes_in_an_inversion_are_named():
    d = split(np.arange(6.0))
    with pytest.raises(NotImplementedError, match="must define problem_factory"):
        MAPInversion(LBFGS(), identity).apply(d, d)
    made = inversion()
    made.schedule_optimizer("max_iter", 3)
    with pytest.raises(ValueError, match="no option 'max_iter'"):
        made.apply(d, d)
    assert made.optimizer.maxiter == LBFGS.maxiter


def test_any_optimizer_will_do():
    class Fixed:
        rate = 0.1

        def minimize(self, problem, x0, monitor=None):
            for _ in range(60):
                x0 = x0 - self.rate * problem.gradient(x0)
            return dict(x=x0)

    made = Shifted(Fixed(), identity)
    made.schedule_problem("weight", 1.0)
    made.schedule_optimizer("rate", [0.2, 0.1])
    d = split(np.arange(6.0))
    assert_allclose(made.apply(d, 0 * d), d / 2, atol=1e-6)


# fields


@pytest.mark.parametrize("unknowns", ["real", "complex"])
def test_fields_are_fitted(unknowns):
    """A field, given as values or as modes, smoothed and squared, from noiseless data."""
    fastpm = pytest.importorskip("vmad_lit.lib.fastpm")
    pm = fastpm.ParticleMesh(Nmesh=[5, 4, 5], BoxSize=6.0, comm=COMM)

    @autooperator("s -> f")
    def smooth(s):
        modes = fastpm.r2c(s) if unknowns == "real" else s
        modes = fastpm.apply_transfer(modes, lambda k: np.exp(-0.1 * sum(ki**2 for ki in k)))
        f = fastpm.c2r(modes)
        return f + f * f * 0.1

    truth = pm.generate_whitenoise(11, type=unknowns, unitary=True)
    data = smooth.build().compute("f", init=dict(s=truth))

    @autooperator("f -> r")
    def residual(f):
        return f - data

    problem = MPIChiSquareProblem(COMM, smooth, [residual])
    vs = problem.vs
    s, v, u = [pm.generate_whitenoise(seed, type=unknowns, unitary=True) for seed in (1, 2, 3)]
    s = vs.addmul(truth, s, 0.1)
    y, slope = problem.objective(s), vs.dot(problem.gradient(s), v)
    rest = [abs(problem.objective(vs.addmul(s, v, h)) - y - h * slope) for h in (1e-3, 5e-4)]
    assert_allclose(rest[0] / rest[1], 4, rtol=0.02)
    Hu, Hv = problem.Hvp(s, u), problem.Hvp(s, v)
    assert_allclose(vs.dot(u, Hv), vs.dot(Hu, v), rtol=1e-8)
    [jv] = problem._tape_at(s).get_jvp().compute(["r0_"], init=dict(x_=v))
    assert_allclose(vs.dot(v, Hv), 2 * jv.cdot(jv), rtol=1e-8)
    for optimizer in (LBFGS(maxiter=15, gtol=1e-5), TrustRegionCG(maxiter=4, cg_maxiter=10)):
        assert optimizer.minimize(problem, s).y < 0.02 * y

"""Doors to other libraries: black boxes, JAX, PyTorch and SciPy, on any number of ranks."""

import sys
import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose

pytest.importorskip("pmesh")

from mpi4py import MPI  # noqa: E402

from vmad_lit import Builder, autooperator  # noqa: E402
from vmad_lit.contrib.chisquare import MPIVectorSpace  # noqa: E402
from vmad_lit.contrib.optimize import FlatProblem, LBFGS, Preconditioner, Problem, scipy_minimize  # noqa: E402
from vmad_lit.contrib.vectorspace import FieldSpace, ProductSpace, VectorSpace  # noqa: E402
from vmad_lit.core.error import BadArgument, MissingExtra, PlacementError  # noqa: E402
from vmad_lit.interop import NotSmooth, black_box, from_jax, from_torch, to_jax, to_scipy, to_torch  # noqa: E402
from vmad_lit.lib import fastpm, linalg, mpi, unary  # noqa: E402
from vmad_lit.testing import check, check_rank_invariance  # noqa: E402

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None
try:
    import torch
except ImportError:
    torch = None

needs_jax = pytest.mark.skipif(jax is None, reason="JAX is not installed")
needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed")
COMM = MPI.COMM_WORLD


# Black boxes


def mixed(x, y, n=2):
    return x**n * y.sum(), np.sin(y) * (1 + 1j * x)


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("dtype", ["f8", "f4"])
def test_a_black_box(order, dtype):
    x, y = np.dtype(dtype).type(1.3), np.array([0.4, -1.2], dtype)
    check(black_box(mixed, "x, y -> a, b", order=order), x, y, 3, truth=mixed)


def test_a_black_box_of_complex_numbers_and_of_whole_ones():
    check(black_box(mixed, "x, y -> a, b"), 2, np.array([0.4 + 1j, -1.2]))
    report = check(black_box(lambda x: x @ x.conj()), np.array([1 + 2j, 3.0]))
    assert report.value == 14 and report.second is None


def test_functions_that_take_arguments_by_position():
    assert check(black_box(np.hypot), np.array([3.0, 1.0]), 4.0, truth=np.hypot).second is None
    if jax is not None:
        check(from_jax(jnp.hypot), 3.0, 4.0, truth=5.0)


def derivative(f, x, **v):
    with Builder() as m:
        m.output(y=f(m.input("x")))
    return m.compute_with_vjp(dict(x=x), v or dict(_y=1.0))[1][0]


def test_the_jacobian_of_the_latest_point_is_kept():
    calls = []
    op = black_box(lambda x: calls.append(1) or x**2)
    with Builder() as m:
        m.output(y=op(m.input("x")))
    x = np.array([1.0, 2.0])
    _, tape = m.compute("y", dict(x=x), return_tape=True)
    for _ in range(3):
        assert_allclose(tape.get_vjp().compute("_x", dict(_y=np.ones(2))), 2 * x, rtol=1e-9)
        tape.get_jvp().compute("y_", dict(x_=x))
    assert len(calls) == 1 + 2 + 4 * 2
    x[0] = 5.0
    assert_allclose(m.compute_with_vjp(dict(x=x), dict(_y=np.ones(2)))[1][0], [10, 4], rtol=1e-9)


def test_what_is_not_smooth_is_told():
    with pytest.warns(NotSmooth, match="with respect to number 0 of its arguments differs by"):
        derivative(black_box(lambda x: abs(x - 1.0000001)), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        derivative(black_box(lambda x: 0 * x + 3.0), 1.0)
        derivative(black_box(lambda x: x * np.zeros(0)), 1.0, _y=np.zeros(0))
        rough = black_box(lambda x: np.round(np.exp(x), 7), accuracy=1e-7)
        assert_allclose(derivative(rough, 1.0), np.e, rtol=1e-4)


def test_what_is_no_function_is_told():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="returns other results for the same arguments, by"):
        derivative(black_box(lambda x: x + rng.normal()), 1.0)
    with pytest.raises(TypeError, match="has to return numbers for y, and returned object"):
        derivative(black_box(lambda x: None), 1.0)
    with pytest.raises(TypeError, match=r"has to return numbers for a, b, and returned float64\[2\]"):
        derivative(black_box(lambda x: np.array([x, x]) if x else 0, "x -> a, b"), 1.0)
    with pytest.raises(BadArgument, match="mixed has no parameter 'z'; it has x, y, n"):
        black_box(mixed, "x, z -> a")
    with pytest.raises(BadArgument, match="a signature looks like"):
        black_box(mixed, "x, y")
    with pytest.raises(BadArgument, match="wrap it into a def"):
        black_box(dict)
    with pytest.raises(ValueError, match="order must be"):
        black_box(mixed, order=3)
    with pytest.raises(ValueError, match="accuracy"):
        black_box(mixed, accuracy=-1)
    with pytest.raises(ValueError, match="cannot be dealt out"):
        black_box(mixed, comm=MPI.COMM_SELF, collective=True)


def test_steps_that_are_lost_in_rounding_are_told():
    frequency = np.array([1.0, 1420.4], "f4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for order, x, number in (2, frequency, 1), (4, frequency, 1), (2, np.array(3 + 1420.4j, "c8"), 1):
            box = black_box(lambda x: 2 * x, order=order, scale=0.01)
            with pytest.raises(
                ValueError, match=rf"for number {number} of the arguments of .* is lost in rounding"
            ):
                derivative(box, x, _y=np.ones_like(x))
            assert_allclose(derivative(box, x.astype("c16"), _y=np.ones(x.shape)), 2)
            fine = black_box(lambda x: 2 * x, order=order, scale=1.0)
            assert_allclose(derivative(fine, x, _y=np.ones_like(x)), 2, rtol=1e-6)
        with pytest.raises(ValueError, match="the numbers of its type are 4.9e-324 apart"):
            derivative(black_box(lambda x: 2 * x), 5e-324)


@pytest.mark.collective
def test_the_calls_of_a_black_box_are_dealt_out():
    calls, p = [], np.array([2.0, -1.5, 0.1, 1.0])

    def f(p):
        calls.append(1)
        return p[0] * np.arange(1.0, 9.0) ** p[1] + np.cos(p[2:]).sum()

    check(black_box(f, comm=COMM), p, truth=f)
    calls.clear()
    derivative(black_box(f, comm=COMM), p, _y=np.ones(8))
    mine = len(range(COMM.rank, 4, COMM.size))
    assert len(calls) == 3 + 4 * mine

    def fails(p):
        if COMM.rank == COMM.size - 1 and p[-1] != 1:
            raise ZeroDivisionError("only here")
        return p

    with pytest.raises(ZeroDivisionError, match="only here"):
        derivative(black_box(fails, comm=COMM), np.ones(2 * COMM.size), _y=np.ones(2 * COMM.size))


@pytest.mark.collective
def test_a_black_box_that_communicates():
    mine = np.arange(1.0, 8.0)[COMM.rank :: COMM.size]

    def total(p):
        return np.array([COMM.allreduce(np.sum(mine**p)), p])

    check(black_box(total, collective=True), 1.7, truth=lambda p: [np.sum(np.arange(1.0, 8.0) ** p), p])
    with Builder() as m:
        m.output(y=black_box(total)(m.input("x", placement="partitioned", comm=COMM)))
    if COMM.size > 1:
        with pytest.raises(PlacementError, match="'p' is spread over ranks"):
            m.compute("y", dict(x=1.0))
    else:
        m.compute("y", dict(x=1.0))


# Functions of JAX


def network(theta, x):
    return jnp.sin(x[..., None] * theta["a"] + theta["b"]) @ theta["c"]


def parameters(dtype="f8", n=3):
    rng = np.random.default_rng(7)
    return {name: rng.normal(size=n).astype(dtype) for name in "cab"}


@needs_jax
@pytest.mark.parametrize("dtype", ["f4", "c16"])
def test_from_jax(dtype):
    def f(x, y, n=2, w=None):
        return x**n * y.sum(), {"f": jnp.sin, "c": lambda y: y * y.conj()}[y.dtype.kind](y) * (1 + 1j * x) * w

    w, y = (
        np.array([1.0, 2.0], "f4"),
        np.array([0.4, -1.2]).astype(dtype) * (1 if dtype[0] == "f" else 1 + 2j),
    )
    op = from_jax(f, "x, y -> a, b")
    assert repr(op) == "operator f(x, y, n, w -> a, b)"
    report = check(op, y.real.dtype.type(1.3), y, 3, w)
    assert report.second is not None and report.value[1].dtype == np.result_type(dtype, "c8")
    assert not jax.config.jax_enable_x64


@needs_jax
def test_a_function_of_jax_with_a_tree_of_parameters():
    theta, x = parameters("f4"), np.array([[0.3, -1.0], [2.0, 0.1]])
    flat = from_jax(network, like=dict(theta=theta))
    p = flat.flatten(theta)
    assert p.dtype == np.float32 and p.shape == (9,)
    assert all(np.array_equal(theta[k], v) for k, v in flat.unflatten(p).items())
    check(flat, p.astype("f8"), x)
    named = from_jax(network, like=dict(theta=theta), parameters="named")
    assert list(named.ain) == ["theta_a", "theta_b", "theta_c", "x"]
    values = named.flatten(theta)
    assert_allclose(
        named.prototype.apl(None, *values.values(), x)["y"], flat.prototype.apl(None, p, x)["y"], rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"'theta' has to be 9 numbers, not of shape \(8,\)"):
        flat.prototype.apl(None, p[1:], x)
    with pytest.raises(ValueError, match="holds arrays of shapes"):
        flat.flatten(parameters(n=4))
    with pytest.raises(BadArgument, match="no argument 'tehta'; did you mean 'theta'"):
        from_jax(network, like=dict(tehta=theta))


@needs_jax
def test_a_function_of_jax_without_forward_derivatives():
    @jax.custom_vjp
    def g(x):
        return jnp.sin(x)

    g.defvjp(lambda x: (jnp.sin(x), x), lambda x, c: (c * jnp.cos(x),))
    assert check(from_jax(lambda x: g(x) * x), np.array([0.3, 0.5])).second is not None


@needs_jax
def test_results_share_memory_with_nobody():
    x = np.ones(100000)
    with Builder() as m:
        m.output(y=from_jax(lambda x: x)(m.input("x")))
    y = m.compute("y", dict(x=x))
    x[:] = 2
    assert np.all(y == 1)


@needs_jax
def test_bytes_in_another_order(double):
    x, k = np.array([0.3, 0.5], ">f8"), np.array([1.0, 2.0], ">f4")
    check(from_jax(lambda x, k: jnp.sin(x) * k, "x -> y"), x, k, truth=np.sin(x) * k)
    f = to_jax(ours(), dict(x=x, y=1.0))
    assert_allclose(jax.grad(lambda x, y: f(x, y)[0])(jnp.asarray(x.astype("f8")), 1.0), 2 * x)
    assert_allclose(f(x, 1.0)[0], np.sum(x * x))


@needs_jax
def test_an_example_of_small_whole_numbers(double):
    """NumPy takes the sine of a byte in half precision."""
    f = to_jax(ours(), dict(x=np.arange(1, 4, dtype="u1"), y=1.0))
    assert_allclose(f(jnp.arange(3.0), 0.7)[1], np.sin(np.arange(3.0)) * 0.7, rtol=1e-15)


@needs_jax
def test_what_jax_cannot_do_is_told():
    long = np.ones(2, "g")
    if long.dtype.itemsize > 8:
        with pytest.raises(
            TypeError, match="JAX has no numbers of more than double precision, and .* is given"
        ):
            from_jax(lambda x: x).prototype.apl(None, long)
        with pytest.raises(TypeError, match="JAX has no numbers of more than double precision"):
            to_jax(ours(), dict(x=long, y=1.0))
    with pytest.raises(TypeError, match="has to return arrays for a, b, and returned"):
        from_jax(lambda x: x, "x -> a, b").prototype.apl(None, 1.0)
    with pytest.raises(TypeError, match="is neither an array nor hashable"):
        from_jax(lambda x, w=None: x * w["a"], "x -> y").prototype.apl(None, 1.0, {"a": 1.0})
    with pytest.raises(TypeError, match="'x' of .* has to be a number, an array or a field, not a str"):
        from_jax(lambda x: x).prototype.apl(None, "abc")


def mesh(n=6, dtype="f8", comm=COMM):
    return fastpm.ParticleMesh([n, n, n], BoxSize=1.0, comm=comm, dtype=dtype)


@needs_jax
@pytest.mark.collective
def test_a_network_between_fields():
    """Slabs are uneven on two ranks, and one of them is empty on three."""
    op, pm = from_jax(network, like=dict(theta=parameters())), mesh(2 if COMM.size == 3 else 5)
    delta = pm.generate_whitenoise(3, type="real")
    report = check(op, op.flatten(parameters()), delta, comm=COMM, replicated="theta")
    assert report.second is not None and type(report.value) is type(delta)


@needs_jax
@pytest.mark.collective
def test_numbers_and_modes_beside_a_field():
    """The gradient with respect to a number is that of all ranks; half-stored modes count twice."""

    def gradients(comm):
        pm = mesh(4, comm=comm)
        modes = pm.generate_whitenoise(3, type="complex")
        k = np.sqrt(sum(k**2 for k in modes.x))
        with Builder() as m:
            x, a = m.input("x", "a")
            y = from_jax(lambda x, a, k: x * jnp.exp(-a * k), "x, a -> y")(x, a, k)
            m.output(y=fastpm.to_scalar(fastpm.c2r(y)))
        [y], [_x, _a] = m.compute_with_vjp(dict(x=modes, a=0.1), dict(_y=1.0))
        steps = [m.compute("y", dict(x=modes, a=a)) for a in (0.1001, 0.0999)]
        assert_allclose(_a, (steps[0] - steps[1]) / 0.0002, rtol=1e-5)
        return y, _a, _x.cdot(modes).real

    check_rank_invariance(gradients, COMM)


@needs_jax
@pytest.mark.collective
def test_what_mixes_points_is_refused():
    x = mesh(4).generate_whitenoise(3, type="real")
    for f, words in (
        (lambda x: x - x.mean(), "depends on other points"),
        (lambda x: x.sum(), "a number for each point"),
    ):
        with Builder() as m:
            m.output(y=from_jax(f)(m.input("x")))
        with pytest.raises(ValueError, match=words):
            m.compute("y", dict(x=x))


@needs_jax
@pytest.mark.collective
def test_a_network_inside_a_simulation_learns():
    """Lagrangian weights of particles: the gradient passes the painting, and is the same on any number of ranks."""

    def fit(comm):
        pm = fastpm.ParticleMesh([8] * 3, BoxSize=8.0, comm=comm, dtype="f8")
        q = pm.generate_uniform_particle_grid(shift=0.5)
        modes = 0.3 * pm.generate_whitenoise(1, type="complex")
        op = from_jax(network, like=dict(theta=parameters()))
        with Builder() as m:
            theta, k = m.input("theta", "k")
            delta = fastpm.readout(fastpm.c2r(k), q, fastpm.decompose(q, pm), "cic")
            x = q + fastpm.lpt1(k, q, pm)
            rho = fastpm.paint(x, op(theta, delta), fastpm.decompose(x, pm), pm)
            m.output(rho=rho, y=fastpm.to_scalar(rho - m.input("data")))
        truth = m.compute("rho", dict(theta=op.flatten(parameters()), k=modes))

        def both(theta):
            [y], [_theta, *_] = m.compute_with_vjp(dict(theta=theta, k=modes, data=truth), dict(_y=1.0))
            return y, _theta

        state = LBFGS(maxiter=5).minimize(
            Problem(value_and_gradient=both, vs=VectorSpace(comm=comm)), np.full(9, 0.3)
        )
        assert state.y < 0.25 * state.history[0]["y"]
        return [state.x, both(np.full(9, 0.3))[1]]

    if COMM.size > 1:
        check_rank_invariance(fit, COMM, rtol=1e-6)
    else:
        fit(COMM)


# Our models, for others


def rosenbrock(preconditioner=None):
    from scipy.optimize import rosen, rosen_der, rosen_hess_prod

    return Problem(rosen, rosen_der, rosen_hess_prod, preconditioner=preconditioner)


def spread():
    """A quadratic problem with replicated and partitioned unknowns, and where its minimum is."""
    pm = mesh(4)
    spaces = dict(a=VectorSpace(comm=COMM), s=FieldSpace(COMM), r=MPIVectorSpace(COMM))
    vs = ProductSpace(spaces)
    mine = np.arange(7.0)[COMM.rank :: COMM.size]
    target = dict(a=np.array([1.0, 2.0]), s=pm.generate_whitenoise(3, type="real"), r=mine)
    problem = Problem(
        lambda v: vs.dot(vs.addmul(v, target, -1), vs.addmul(v, target, -1)),
        lambda v: vs.scale(2, vs.addmul(v, target, -1)),
        lambda v, d: vs.scale(2, d),
        vs=vs,
    )
    return problem, target


@pytest.mark.collective
def test_a_flat_problem_on_ranks():
    problem, target = spread()
    vs, start = problem.vs, problem.vs.scale(0.5, target)
    flat = to_scipy(problem, start)
    assert len({a.tobytes() for a in COMM.allgather(flat.x0)}) == 1 and flat.x0.shape == (2 + 64 + 7,)
    assert vs.same(flat.unflatten(flat.x0), start)
    assert_allclose(flat.fun(flat.x0), 0.25 * vs.dot(target, target))
    assert_allclose(flat.jac(flat.x0), -2 * flat.x0)
    assert_allclose(flat.hessp(flat.x0, flat.x0), 2 * flat.x0)
    for method in "L-BFGS-B", "trust-ncg":
        found = scipy_minimize(problem, start, method=method)
        assert vs.norm(vs.addmul(found.x, target, -1)) < 1e-6
    own = FlatProblem(problem, start, gather=False)
    assert own.x0.size == sum(array.size for array in vs.to_arrays(start))
    assert vs.same(own.unflatten(own.x0), start)


@pytest.mark.collective
def test_another_inner_product_is_refused():
    pm = mesh(4)
    modes = pm.generate_whitenoise(3, type="complex")
    problem = Problem(lambda s: s.cnorm(), lambda s: s * 2.0, vs=FieldSpace(COMM))
    with pytest.raises(ValueError, match="half-stored complex fields"):
        to_scipy(problem, modes)
    with pytest.raises(ValueError, match="expected a flat array of 3 numbers"):
        to_scipy(rosenbrock(), np.ones(3)).fun(np.ones(2))


@pytest.fixture
def double():
    """JAX in double precision."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def ours():
    with Builder() as m:
        x, y = m.input("x", "y")
        m.output(a=linalg.sum(x * x * y), b=unary.sin(x) * y)
    return m


def theirs(x, y):
    return jnp.sum(x * x * y), jnp.sin(x) * y


@needs_jax
def test_to_jax(double):
    X, Y = jnp.array([0.1, 0.2, 0.3]), jnp.array(0.7)
    f = to_jax(ours(), dict(x=np.ones(3), y=1.0))

    def loss(f, x, y):
        a, b = f(x, y=y)
        return a**2 + jnp.sum(jnp.cos(b))

    for derivative in jax.value_and_grad(loss, (1, 2)), jax.jacrev(jax.jacrev(loss, (1, 2)), (1, 2)):
        got, expected = (jax.jit(derivative, static_argnums=0)(g, X, Y) for g in (f, theirs))
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-12, atol=1e-14), got, expected)
    stacked = jax.vmap(f, (0, None))(jnp.stack([X, 2 * X]), Y)[1]
    assert_allclose(stacked[1], np.sin(2 * X) * Y)
    with pytest.raises(
        ValueError, match=r"'x' has the shape \(3,\) in the example that was given, and not \(2,\)"
    ):
        f(X[1:], Y)
    with pytest.raises(BadArgument, match="there is no input 'z'"):
        f(X, z=Y)
    with pytest.raises(BadArgument, match="expected one array for each of x, y"):
        f(X)
    with pytest.raises(BadArgument, match="an example is needed for 'y'"):
        to_jax(ours(), dict(x=np.ones(3)))
    only = to_jax(ours(), dict(x=np.ones(3), y=0.7), inputs="x", outputs="a")
    assert_allclose(only(X), theirs(X, Y)[0])


@needs_jax
def test_the_tape_of_a_value_serves_its_gradient(double):
    calls = []
    with Builder() as m:
        x = m.input("x")
        m.output(y=linalg.sum(x.eval(lambda x: calls.append(1) or x) * 0.0 + x * x))
    f = to_jax(m, dict(x=np.ones(3)))
    calls.clear()
    jax.value_and_grad(f)(jnp.arange(3.0))
    assert len(calls) == 1


def counted(door, comm=None, **options):
    """A cubic through a door, a list of what its host is asked for and of runs, and an input: on ranks the modes of a field."""
    with Builder() as m:
        x = m.input("x")
        if comm is None:
            m.output(y=linalg.sum(x * x * x))
        else:
            field = fastpm.c2r(x)
            m.output(y=fastpm.to_scalar(field + field * field))
    start = np.ones(3) if comm is None else mesh(4, comm=comm).generate_whitenoise(3, type="complex")
    f, asked = door(m, dict(x=start), **options), []

    def note(function, name):
        return lambda *args, **kwargs: asked.append(name or args[0]) or function(*args, **kwargs)

    host = f.host
    host.ask, host.value, host.forward = (
        note(host.ask, ""),
        note(host.value, "run"),
        note(host.forward, "run"),
    )
    return f, asked, start


def calls_that_wait(jaxpr):
    """For each call of a host in a program of JAX whether it depends on one before."""
    found, depends = [], set()
    for eqn in jaxpr.eqns:
        late, calls = (
            any(v in depends for v in eqn.invars if not hasattr(v, "val")),
            eqn.primitive.name in CALLS,
        )
        found += [late] if calls else []
        depends.update(eqn.outvars if late or calls else ())
    return found


CALLS = "pure_callback", "custom_vjp_call"


@needs_jax
def test_derivatives_wait_for_their_run(double):
    f, *_ = counted(to_jax)
    for program, n in (
        (jax.grad(f), 2),
        (jax.value_and_grad(f), 2),
        (lambda x: jax.vjp(jax.grad(f), x)[1](x), 4),
    ):
        assert calls_that_wait(jax.make_jaxpr(program)(jnp.ones(3)).jaxpr) == [False] + [True] * (n - 1)


@needs_jax
def test_one_run_and_one_pull_for_each_point(double):
    f, asked, _ = counted(to_jax)
    x, stack = jnp.arange(1.0, 4.0), jnp.arange(12.0).reshape(4, 3)
    gradient, jit = jax.grad(f), jax.jit
    cases = {
        "gradient": (gradient, x, 3 * x**2, 1),
        "compiled": (jit(lambda x: jax.value_and_grad(f)(x)[1]), x, 3 * x**2, 1),
        "sum": (jit(jax.grad(lambda x: f(x) + f(2 * x))), x, 27 * x**2, 2),
        "map": (lambda c: jax.lax.map(gradient, c), stack, 3 * stack**2, 4),
        "vmap": (jax.vmap(gradient), stack, 3 * stack**2, 4),
        "gradient of map": (jit(jax.grad(lambda c: jax.lax.map(f, c).sum())), stack, 3 * stack**2, 4),
        "gradient of vmap": (jit(jax.grad(lambda c: jax.vmap(f)(c).sum())), stack, 3 * stack**2, 4),
        "Hessian": (jit(jax.jacrev(jax.jacrev(f))), x, jnp.diag(6 * x), 1),
    }
    for name, (program, at, truth, points) in cases.items():
        asked.clear()
        assert_allclose(program(at), truth, rtol=1e-12, err_msg=name)
        assert [asked.count(kind) for kind in ("run", "forward", "pull")] == [points] * 3, (name, asked)


@needs_jax
def test_what_was_given_up_is_run_again(double):
    f, asked, _ = counted(to_jax, tapes=2)
    stack = jnp.arange(12.0).reshape(4, 3)
    assert_allclose(jax.vmap(jax.grad(f))(stack), 3 * stack**2)
    assert asked.count("run") == 4 + 3 and len(f.host.runs) <= 2
    pulls = [jax.vjp(f, x)[1] for x in stack]
    for pull, x in zip(pulls, stack):
        assert_allclose(pull(jnp.array(1.0))[0], 3 * x**2)
    assert len(f.host.runs) <= 2
    with pytest.raises(ValueError, match="tapes must be a whole number of at least 1, not 0"):
        to_jax(ours(), dict(x=np.ones(3), y=1.0), tapes=0)


@needs_jax
@pytest.mark.collective
def test_ranks_take_the_same_turns(double):
    """Though the points may differ on other ranks only."""
    f, asked, modes = counted(to_jax, COMM, tapes=1)
    x = jnp.asarray(modes.value)
    gradient = jax.jit(jax.grad(f))
    single = [gradient(a * x) for a in (1.0, 2.0, 3.0)]
    asked.clear()
    scales = jnp.array([1.0, 2.0, 3.0])
    gradients = jax.jit(jax.vmap(jax.grad(f)))(scales[:, None, None, None] * x)
    assert_allclose(gradients, np.array(single), rtol=1e-12)
    assert asked.count("pull") == 3 and asked.count("run") == 3 + 3
    both = jax.jit(jax.grad(lambda x: f(x) + f(2 * x)))(x)
    assert_allclose(both, single[0] + 2 * single[1], rtol=1e-12)
    mapped = jax.jit(lambda s: jax.lax.map(lambda a: jax.grad(f)(a * x), s))(scales)
    assert_allclose(mapped, np.array(single), rtol=1e-12)
    # Without numbers of runs, at points that are one for all ranks but the first
    host = f.host
    host.ask("forward", [modes.value * (1 + (COMM.rank == 0))])
    assert_allclose(host.ask("pull", [modes.value], [1.0])[0], np.conj(single[0]), rtol=1e-12)


@needs_jax
@pytest.mark.collective
def test_a_problem_runs_once_for_each_point(double):
    problem, target = spread()
    f = to_jax(problem, problem.vs.scale(0.5, target))
    z = jnp.asarray(f.flat.x0)
    runs = problem.fev, problem.gev
    gradient = jax.jit(jax.grad(lambda z: f(z) + f(3 * z)))(z)
    assert_allclose(gradient, 2 * (z - 2 * f.flat.x0) + 6 * (3 * z - 2 * f.flat.x0))
    assert (problem.fev, problem.gev) == (runs[0] + 2, runs[1] + 2)


@needs_jax
@pytest.mark.collective
def test_other_turns_on_one_rank_are_told(double):
    if COMM.size == 1:
        pytest.skip("needs two ranks")
    f, asked, modes = counted(to_jax, COMM)
    x = [modes.value]
    f.host.ask("forward", x)
    with pytest.raises(Exception, match="ranks are at different places"):
        if COMM.rank == 0:
            f.host.ask("forward", x)
        else:
            f.host.ask("pull", x, [1.0])


@needs_jax
def test_round_trips(double):
    f = from_jax(to_jax(ours(), dict(x=np.ones(3), y=1.0)), "x, y -> a, b")
    assert check(f, np.array([0.1, 0.2, 0.3]), 0.7).second is not None
    g = to_jax(from_jax(theirs, "x, y -> a, b"), dict(x=np.ones(3), y=1.0))
    X, Y = jnp.array([0.1, 0.2, 0.3]), jnp.array(0.7)
    loss = lambda f: lambda x: sum(jnp.sum(part**3) for part in f(x, Y))
    assert_allclose(jax.jit(jax.grad(loss(g)))(X), jax.jit(jax.grad(loss(theirs)))(X), rtol=1e-12)


@needs_jax
def test_complex_models(double):
    with Builder() as m:
        x = m.input("x")
        m.output(y=x * x * linalg.conj(x) + x * 2.0)
    f, g = to_jax(m, dict(x=np.ones(2, complex))), lambda x: x * x * x.conj() + 2 * x
    x = jnp.array([1 + 2j, 0.3 - 0.1j])
    loss = lambda f: lambda x: jnp.sum(abs(f(x)) ** 2 + (f(x) ** 2).real)
    assert_allclose(jax.jit(jax.grad(loss(f)))(x), jax.jit(jax.grad(loss(g)))(x), rtol=1e-12)
    check(from_jax(f, "x -> y"), np.array(x))


@needs_jax
def test_a_problem_for_jax(double):
    problem = rosenbrock(Preconditioner.diagonal(np.array([1.0, 2.0, 4.0])))
    f = to_jax(problem, np.array([-1.0, 1.0, 2.0]))
    z = jnp.asarray(f.flat.x0)
    assert_allclose(z, [-1, 2, 8])
    assert_allclose(f(z), problem.objective(np.array([-1.0, 1.0, 2.0])))
    hessian = jax.jit(jax.jacrev(jax.jacrev(f)))(z)
    assert_allclose(hessian[0, 0], 2 + 1200 - 400)
    assert_allclose(hessian, hessian.T)
    assert_allclose(f.flat.solution(z), [-1, 1, 2])


@needs_jax
def test_single_precision_is_told():
    with pytest.warns(UserWarning, match="JAX rounds to single precision"):
        f = to_jax(ours(), dict(x=np.ones(3), y=1.0))
    _x, _y = jax.grad(lambda x, y: f(x, y)[0], (0, 1))(jnp.ones(3), jnp.array(2.0))
    assert _x.dtype == np.float32 and np.all(_x == 4) and _y == 3


@needs_jax
@pytest.mark.collective
def test_a_model_with_fields_for_jax(double):
    pm = mesh(4)
    modes = pm.generate_whitenoise(3, type="complex")
    with Builder() as m:
        x, b = m.input("x"), m.input("b", placement="replicated", comm=COMM)
        delta = fastpm.c2r(x)
        m.output(y=fastpm.to_scalar(delta * mpi.allbcast(b, COMM) + delta * delta))
    f = to_jax(m, dict(x=modes, b=1.5))
    y, (_x, _b) = jax.value_and_grad(f, (0, 1))(jnp.asarray(modes.value), jnp.array(1.5))
    [truth], [_modes, _truth] = m.compute_with_vjp(dict(x=modes, b=1.5), dict(_y=1.0))
    assert_allclose(y, truth)
    assert_allclose(_b, _truth)
    weights = fastpm.mode_weights(modes)
    assert_allclose(np.conj(_x), _modes.value * weights)


@needs_jax
@pytest.mark.collective
def test_an_optimiser_of_optax_drives_a_problem_on_ranks(double):
    optax = pytest.importorskip("optax")
    problem, target = spread()
    vs = problem.vs
    for gather in True, False:
        f = to_jax(problem, vs.scale(0.5, target), gather=gather)
        z, rule = jnp.asarray(f.flat.x0), optax.sgd(0.45)
        state, gradient = rule.init(z), jax.jit(jax.grad(f))
        for _ in range(12):
            change, state = rule.update(gradient(z), state)
            z = optax.apply_updates(z, change)
        assert vs.norm(vs.addmul(f.flat.solution(z), target, -1)) < 1e-5


@pytest.mark.parametrize(
    "door, package",
    [
        (lambda: from_jax(lambda x: x), "jax"),
        (lambda: to_jax(ours(), dict(x=1.0, y=1.0)), "jax"),
        (lambda: from_torch(lambda x: x), "torch"),
        (lambda: to_torch(ours(), dict(x=1.0, y=1.0)), "torch"),
    ],
)
def test_without_the_library(door, package, monkeypatch):
    for name in [name for name in sys.modules if name == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=f"{package} is needed for .* and is not installed: pip install"):
        door()


def test_what_is_no_model_is_told():
    if jax is not None:
        with pytest.raises(TypeError, match="expected a model, an operator or a problem"):
            to_jax(lambda x: x, dict(x=1.0))
        with pytest.raises(TypeError, match="must be a dictionary by name"):
            to_jax(ours(), np.ones(3))


# PyTorch


def test_only_a_tree_can_be_packed():
    assert "flatten()" not in from_torch.__doc__ and "flatten()" not in from_jax.__doc__


@needs_torch
@pytest.mark.parametrize("form", ["flat", "named", None])
def test_from_torch(form):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))

        def forward(self, x, power=1):
            return self.net(x[..., None])[..., 0] ** power

    net, x = Net(), np.array([[0.3, -1.0], [2.0, 0.1]])
    op = from_torch(net, parameters=form)
    assert list(op.ain)[-1] == "x" and len(op.ain) == {"flat": 2, "named": 5, None: 1}[form]
    given = {}
    if form:
        packed = op.flatten(dict(net.named_parameters()))
        given = dict(parameters=packed) if form == "flat" else packed
        assert all(v.dtype == np.float32 for v in given.values())
        assert set(op.unflatten(packed)) == set(dict(net.named_parameters()))
        with pytest.raises(TypeError, match="'tree'"):
            op.flatten()
    report = check(op, **{name: v.astype("f8") for name, v in given.items()}, x=x, power=2)
    with torch.no_grad():
        assert_allclose(report.value, net(torch.tensor(x, dtype=torch.float32), 2), rtol=1e-5)
    single = op.prototype.apl(None, *given.values(), x.astype("f4"), 2)["y"]
    assert single.dtype == np.float32 and report.value.dtype == np.float64


@needs_torch
def test_functions_of_tensors():
    f = from_torch(lambda x, y: (torch.sin(x) * y, (x * x.conj()).sum() * y), "x, y -> a, b")
    assert check(f, np.array([1 + 2j, 0.3])[::-1], 0.4).second is not None
    x = np.ones(4)
    y = from_torch(lambda x: x).prototype.apl(None, x)["y"]
    assert not np.may_share_memory(x, y)
    with pytest.raises(TypeError, match="has to return arrays for y, and returned NoneType"):
        from_torch(lambda x: None).prototype.apl(None, x)


@needs_torch
def test_to_torch_and_back():
    f = to_torch(ours(), dict(x=np.ones(3), y=1.0))
    x = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    y = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x, y)) and torch.autograd.gradgradcheck(f, (x, y))
    square = lambda x: f(x, y)[0] ** 2
    for hessian in torch.func.hessian(square)(x), torch.autograd.functional.hessian(square, x):
        assert_allclose(hessian.detach(), torch.func.hessian(lambda x: ((x * x * y).sum()) ** 2)(x).detach())
    assert check(from_torch(f, "x, y -> a, b"), np.array([0.1, 0.2, 0.3]), 0.7).second is not None
    g = to_torch(from_torch(lambda x, y: torch.sin(x) * y, "x, y -> b"), dict(x=np.ones(3), y=1.0))
    assert torch.autograd.gradcheck(g, (x, y))


@needs_torch
def test_one_run_of_tensors_for_each_point():
    f, asked, _ = counted(to_torch)
    x = torch.arange(1.0, 4.0, dtype=torch.float64)
    stack = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    func = torch.func

    def backward(f, x):
        x = x.clone().requires_grad_()
        f(x).backward()
        return x.grad

    cases = {
        "backward": (lambda: backward(f, x), 3 * x**2, 1),
        "sum": (lambda: backward(lambda x: f(x) + f(2 * x), x), 27 * x**2, 2),
        "grad": (lambda: func.grad(f)(x), 3 * x**2, 1),
        "grad of a sum": (lambda: func.grad(lambda x: f(x) + f(2 * x))(x), 27 * x**2, 2),
        "vmap": (lambda: func.vmap(func.grad(f))(stack), 3 * stack**2, 4),
        "gradient of vmap": (lambda: backward(lambda c: func.vmap(f)(c).sum(), stack), 3 * stack**2, 4),
        "forward": (lambda: func.jvp(f, (x,), (x,))[1], (3 * x**3).sum(), 1),
        "Hessian": (lambda: func.hessian(f)(x), torch.diag(6 * x), 1),
        "Hessians": (lambda: func.vmap(func.hessian(f))(stack), torch.diag_embed(6 * stack), 4),
        "reverse twice": (lambda: func.jacrev(func.jacrev(f))(x), torch.diag(6 * x), 1),
    }
    for name, (program, truth, points) in cases.items():
        asked.clear()
        assert_allclose(program(), truth, rtol=1e-12, err_msg=name)
        assert asked.count("run") == points, (name, asked)
    asked.clear()
    f(x)
    with torch.no_grad():
        f(x.requires_grad_())
    assert asked.count("value") == 2


@needs_torch
@pytest.mark.collective
def test_torch_on_ranks():
    problem, target = spread()
    f = to_torch(problem, problem.vs.scale(0.5, target))
    z = torch.tensor(f.flat.x0, requires_grad=True)
    rule = torch.optim.SGD([z], lr=0.3)
    for _ in range(20):
        rule.zero_grad()
        f(z).backward()
        rule.step()
    distance = problem.vs.addmul(f.flat.solution(z.detach()), target, -1)
    assert problem.vs.norm(distance) < 1e-5

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.tensor([0.3, 0.1]))

        def forward(self, x):
            return torch.tanh(x * self.slope[0] + self.slope[1])

    op = from_torch(Net())
    x = mesh(4).generate_whitenoise(3, type="real")
    check(op, np.array([0.3, 0.1]), x, comm=COMM, replicated="parameters")

"""Laplace's approximation against dense matrices and the Wiener filter, on any number of ranks."""

import os

import numpy as np
import pytest

pytest.importorskip("mpi4py")

from mpi4py import MPI  # noqa: E402

from vmad_lit.contrib import laplace  # noqa: E402
from vmad_lit.contrib.chisquare import MPIVectorSpace  # noqa: E402
from vmad_lit.contrib.optimize import LBFGS, Problem, State, identity  # noqa: E402
from vmad_lit.contrib.sample import HMC, Chain  # noqa: E402
from vmad_lit.contrib.vectorspace import ProductSpace, VectorSpace  # noqa: E402
from vmad_lit.lib.shards import StateError  # noqa: E402

pytestmark = pytest.mark.collective

comm = MPI.COMM_WORLD
N = 9  # unknowns that are dealt out: with four ranks and two numbers, one of them has none


class Dense:
    """A normal density with a known covariance: `s`, spread over the ranks, and `t`, which all ranks hold."""

    def __init__(self, curvature=None, offset=0.0, temperature=2.0, shared=2):
        self.shared, self.n = shared, N + shared
        draw = np.random.default_rng(3)
        rows = draw.normal(size=(6, self.n)) * np.array([9.0, 5, 3, 1, 0.3, 0.1])[:, None]
        self.A = rows.T @ rows if curvature is None else curvature
        self.centre = draw.normal(size=self.n) + offset
        self.mine = np.array_split(np.arange(N), comm.size)[comm.rank]
        self.vs = ProductSpace(dict(s=MPIVectorSpace(comm), t=VectorSpace(comm=comm)))
        H = np.eye(self.n) + self.A
        self.covariance = np.linalg.inv(H)
        self.problem = Problem(
            lambda x: (
                0.5 * temperature * (self.whole(x) - self.centre) @ H @ (self.whole(x) - self.centre) + 7.0
            ),
            lambda x: self.part(temperature * H @ (self.whole(x) - self.centre)),
            lambda x, v: self.part(temperature * H @ self.whole(v)),
            vs=self.vs,
            temperature=temperature,
            identity=dict(A=self.A),
        )

    def part(self, whole):
        return dict(s=whole[:N][self.mine].copy(), t=whole[N:].copy())

    def whole(self, x):
        return np.concatenate([*comm.allgather(x["s"]), x["t"]])

    def unit(self, i):
        return self.part(np.eye(self.n)[i])


@pytest.fixture(scope="module")
def dense():
    return Dense()


@pytest.fixture(scope="module")
def full(dense):
    return laplace.approximate(dense.problem, dense.part(dense.centre), rank=6, oversampling=2)


def test_eigenvalues_are_those_of_the_dense_matrix(dense, full):
    expected = np.linalg.eigvalsh(dense.A)[::-1][:6]
    np.testing.assert_allclose(full.eigenvalues, expected, rtol=1e-9)
    vectors = np.array([dense.whole(vector) for vector in full.vectors])
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(vectors @ dense.A @ vectors.T, np.diag(expected), atol=1e-8)


def test_covariance_precision_and_variance(dense, full):
    units = [dense.unit(i) for i in range(dense.n)]
    matrix = full.covariance(*units)
    np.testing.assert_allclose(matrix, dense.covariance, atol=1e-10)
    np.testing.assert_allclose(dense.whole(full.variance), np.diag(dense.covariance), atol=1e-10)
    np.testing.assert_allclose(dense.whole(full.errors) ** 2, np.diag(dense.covariance), atol=1e-10)
    np.testing.assert_allclose(full.marginal("t"), dense.covariance[N:, N:], atol=1e-10)
    there = full.precision_product(full.covariance_product(units[3]))
    np.testing.assert_allclose(dense.whole(there), np.eye(dense.n)[3], atol=1e-9)


def test_samples_are_the_square_root_of_the_covariance_times_white_noise(dense, full):
    values, vectors = np.linalg.eigh(dense.covariance)
    root = (vectors * values**0.5) @ vectors.T
    for number in range(3):
        noise = dense.whole(dense.vs.normal(full.x, 5, ("laplace", number)))
        expected = dense.centre + root @ noise
        np.testing.assert_allclose(dense.whole(full.sample(5, number)), expected, atol=1e-9)
    assert not np.allclose(dense.whole(full.sample(5)), dense.whole(full.sample(6)))


def test_the_metric_makes_the_posterior_white(dense, full):
    metric, v = full.metric, dense.unit(2)
    product = dense.problem.hessian_vector_product(full.x, metric.unwhiten(v))
    white = dense.whole(metric.whiten_gradient(product)) / dense.problem.temperature
    np.testing.assert_allclose(white, np.eye(dense.n)[2], atol=1e-8)
    metric.check(dense.vs, v, v)


def test_draws_of_what_is_wanted(dense, full):
    draws = full.draws(100, seed=2, keep=lambda x: dict(t=x["t"], first=float(dense.whole(x)[0])))
    assert draws["t"].shape == (100, 2) and draws["first"].shape == (100,)
    spread = np.cov(draws["t"].T)
    np.testing.assert_allclose(spread, dense.covariance[N:, N:], atol=6 * 1.5 / 10)
    np.testing.assert_array_equal(draws["t"][7], full.sample(2, 7)["t"])
    with pytest.raises(ValueError, match="keep"):
        full.draws(2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_evidence_and_distance_to_the_minimum(temperature):
    dense = Dense(temperature=temperature)
    away = dense.centre + 0.1
    found = laplace.approximate(dense.problem, dense.part(away), rank=6)
    H = np.eye(dense.n) + dense.A
    step = away - dense.centre
    np.testing.assert_allclose(found.decrement, np.sqrt(step @ H @ step), rtol=1e-9)
    expected = -(0.5 * step @ H @ step + 7.0 / temperature) - 0.5 * np.linalg.slogdet(H)[1]
    np.testing.assert_allclose(found.log_evidence, expected, rtol=1e-9)


def test_what_a_low_rank_leaves_out(dense):
    low = laplace.approximate(dense.problem, dense.part(dense.centre), rank=2, oversampling=6)
    np.testing.assert_allclose(low.eigenvalues, np.linalg.eigvalsh(dense.A)[::-1][:2], rtol=1e-6)
    # Never too small, and exact by conjugate gradients
    exact = np.diag(dense.covariance)
    assert (dense.whole(low.variance) >= exact - 1e-9).all()
    assert np.abs(dense.whole(low.variance) - exact).max() > 0.1
    np.testing.assert_allclose(low.marginal("t", exact=True), dense.covariance[N:, N:], atol=1e-7)
    assert np.abs(low.marginal("t") - dense.covariance[N:, N:]).max() > 1e-3
    # Estimates that know how good they are
    variance, error = low.estimate_variance(probes=24, seed=1, rtol=1e-6)
    away = (dense.whole(variance) - exact) / (dense.whole(error) + 1e-12)
    assert np.abs(away).max() < 5 and dense.whole(error).max() < 0.3
    H = np.eye(dense.n) + dense.A
    estimate, error = low.estimate_log_evidence(probes=24, seed=1)
    truth = -low.value - 0.5 * np.linalg.slogdet(H)[1]
    assert abs(estimate - truth) < 4 * error < 4.0 and low.log_evidence > truth + 0.5


def test_powers_sharpen_the_vectors():
    spectrum = 40.0 / np.arange(1, 12) ** 1.0
    turn = np.linalg.qr(np.random.default_rng(8).normal(size=(11, 11)))[0]
    dense = Dense((turn * spectrum) @ turn.T)
    errors = []
    for powers in 0, 1, 3:
        found = laplace.approximate(
            dense.problem, dense.part(dense.centre), rank=3, oversampling=1, powers=powers
        )
        assert (found.eigenvalues <= spectrum[:3] * (1 + 1e-12)).all()
        errors.append(np.abs(found.eigenvalues / spectrum[:3] - 1).max())
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


def test_data_that_say_nothing():
    nothing = Dense(np.zeros((N + 2, N + 2)))
    found = laplace.approximate(nothing.problem, nothing.part(nothing.centre), rank=4)
    assert found.eigenvalues.shape == (0,) and found.vectors == []
    np.testing.assert_array_equal(nothing.whole(found.variance), 1.0)
    assert "none" in repr(found)


@pytest.mark.parametrize("at", [1, 9, 19])
def test_a_killed_and_resumed_one_is_the_same_bit_by_bit(dense, full, at, tmp_path):
    path = comm.bcast(str(tmp_path / "laplace.npz"))
    start = dense.part(dense.centre)
    assert laplace.Laplace.resume(path, dense.vs, start) is None
    stopped = laplace.approximate(
        dense.problem, start, rank=6, oversampling=2, monitor=lambda state: state.products == at
    )
    assert stopped.status == "monitor" and stopped.products == at and f"{at} of" in repr(stopped)
    with pytest.raises(ValueError, match="not complete"):
        stopped.sample(1)
    stopped.save(path)
    again = laplace.Laplace.resume(path, dense.vs, start, dense.problem)
    done = laplace.approximate(dense.problem, state=again)
    assert done.status == "complete" and done.products == full.products
    np.testing.assert_array_equal(done.eigenvalues, full.eigenvalues)
    for a, b in zip(done.vectors, full.vectors, strict=True):
        assert dense.vs.same(a, b)
    done.save(path)
    back = laplace.Laplace.load(path, dense.vs, start)
    assert dense.vs.same(back.sample(3), full.sample(3)) and back.log_evidence == full.log_evidence
    with pytest.raises(ValueError, match="load the approximation with its problem"):
        back.solve(start)
    assert laplace.approximate(dense.problem, state=back).products == full.products


def test_another_problem_is_refused(dense, full, tmp_path):
    path = comm.bcast(str(tmp_path / "laplace.npz"))
    full.save(path)
    other = Dense(2 * dense.A)
    with pytest.raises(StateError, match="problem.A"):
        laplace.Laplace.load(path, dense.vs, full.x, other.problem)
    laplace.Laplace.load(path, dense.vs, full.x, other.problem, accept=["problem.A"])
    with pytest.raises(StateError, match="another problem"):
        laplace.approximate(other.problem, state=full)


def test_states_chains_and_approximations_know_a_problem_by_one_identity(dense, tmp_path):
    """What is saved of a problem is refused for another one by the same words, and looked for in the same way."""
    path, start = comm.bcast(str(tmp_path)), dense.part(0 * dense.centre)
    made = {
        State: LBFGS(maxiter=2).minimize(dense.problem, start),
        Chain: HMC(warmup=0, draws=1, step=0.1, metric=None).sample(dense.problem, start),
        laplace.Laplace: laplace.approximate(dense.problem, start, rank=1, oversampling=0, powers=0),
    }
    known, other = identity(dense.problem), Dense(offset=1.0).problem
    assert set(known) == {"problem", "versions"} and "numpy" in known["versions"]
    other.identity = dict(A=2 * dense.A)
    told = set()
    for kind, thing in made.items():
        assert {name: thing.fingerprint[name] for name in known} == known
        file = os.path.join(path, f"{kind.__name__}.npz")
        assert kind.resume(file, dense.vs, start) is None
        thing.save(file)
        assert type(kind.resume(file, dense.vs, start, dense.problem)) is kind
        with pytest.raises(StateError) as refused:
            kind.resume(file, dense.vs, start, other)
        told.add("\n".join(line for line in str(refused.value).splitlines() if line.startswith("  problem")))
    assert len(told) == 1 and "problem.A" in told.pop()


def test_a_file_that_is_something_else(dense, tmp_path):
    from vmad_lit.contrib.optimize import LBFGS

    path = comm.bcast(str(tmp_path / "state.npz"))
    LBFGS(maxiter=1).minimize(dense.problem, dense.part(dense.centre + 1)).save(path)
    with pytest.raises(StateError, match="holds no Laplace"):
        laplace.Laplace.load(path, dense.vs, dense.part(dense.centre))


def test_errors_say_what_is_wrong(dense):
    start = dense.part(dense.centre)
    with pytest.raises(ValueError, match="rank must be a whole number, 1 or more"):
        laplace.approximate(dense.problem, start, rank=0)
    with pytest.raises(ValueError, match="needs a point"):
        laplace.approximate(dense.problem)
    saddle = Dense(np.diag([-3.0] + [1.0] * (N + 1)))
    with pytest.raises(ValueError, match="maximum in some direction"):
        laplace.approximate(saddle.problem, saddle.part(saddle.centre), rank=N + 2)
    found = laplace.approximate(dense.problem, start, rank=2)
    with pytest.raises(ValueError, match="no component 'q'"):
        found.marginal("q")
    with pytest.raises(ValueError, match="probes must be"):
        found.estimate_variance(probes=1)
    flat = Problem(lambda x: 0.0, lambda x: x * 0, vs=VectorSpace())
    with pytest.raises(ValueError, match="hessian_vector_product"):
        laplace.approximate(flat, np.ones(3))


def test_the_wiener_filter_on_a_mesh():
    """A Gaussian field under noise: all eigenvalues and the variance are known."""
    pytest.importorskip("pmesh")
    from vmad_lit.contrib import cosmo4d
    from vmad_lit.contrib.optimize import TrustRegionCG
    from vmad_lit.lib.cosmology import LinearPower, Planck15
    from vmad_lit.lib.fastpm import ParticleMesh

    pm = ParticleMesh(Nmesh=[4] * 3, BoxSize=40.0, comm=comm, dtype="f8")
    power, q = LinearPower(Planck15), pm.generate_uniform_particle_grid(shift=0.5)
    forward = cosmo4d.WhiteNoiseOperator.bind(power=power, q=q, stages=[], cosmology=Planck15, pm=pm)
    data = cosmo4d.Data.synthetic(pm, forward, sigma=0.5, seed=2)
    problem = cosmo4d.reconstruction_problem(forward, data)
    best = TrustRegionCG(gtol=1e-10).minimize(problem, pm.create(type="real", value=0)).x
    k = 2 * np.pi / 40.0 * np.array(np.meshgrid(*[[0, 1, -2, -1]] * 3, indexing="ij"))
    k = np.sqrt((k**2).sum(axis=0)).ravel()
    P = np.where(k > 0, power(np.maximum(k, 1e-3)), 0.0)
    expected = np.sort(P * 4.0**3 / 40.0**3 / 0.5**2)[::-1]
    found = laplace.approximate(problem, best, rank=63, oversampling=1, powers=0)
    np.testing.assert_allclose(found.eigenvalues, expected[:63], rtol=1e-7)
    assert found.decrement < 1e-6
    np.testing.assert_allclose(found.variance.value, np.mean(1 / (1 + expected)), rtol=1e-9)


def test_a_nonlinear_model_against_its_dense_matrix():
    pytest.importorskip("pmesh")
    from vmad_lit.contrib import cosmo4d
    from vmad_lit.lib.cosmology import LinearPower, Planck15
    from vmad_lit.lib.fastpm import ParticleMesh

    pm = ParticleMesh(Nmesh=[4] * 3, BoxSize=16.0, comm=comm, dtype="f8")
    q = pm.generate_uniform_particle_grid(shift=0.5)
    forward = cosmo4d.WhiteNoiseOperator.bind(
        power=LinearPower(Planck15), q=q, stages=[1.0], cosmology=Planck15, pm=pm
    )
    data = cosmo4d.Data.synthetic(pm, forward, sigma=0.5, seed=2)
    problem, x = cosmo4d.reconstruction_problem(forward, data), cosmo4d.white_noise(pm, 2)
    rows = []
    for i in range(64):
        column, row = np.zeros((4, 4, 4)), np.zeros((4, 4, 4))
        column.flat[i] = 1.0
        unit = pm.create(type="real", value=0)
        unit.value[...] = column[unit.slices]
        row[unit.slices] = laplace.curvature(problem, x, unit).value
        rows.append(comm.allreduce(row).ravel())
    expected = np.linalg.eigvalsh(np.array(rows))[::-1]
    found = laplace.approximate(problem, x, rank=4, oversampling=8, powers=1)
    np.testing.assert_allclose(found.eigenvalues, expected[:4], rtol=1e-2)


def test_complex_vectors():
    """Samples are right, a variance of components is refused."""
    vs = MPIVectorSpace(comm)
    H = Problem(lambda x: 0.5 * vs.dot(x, x), lambda x: x, lambda x, v: 1.0 * v, vs=vs)
    found = laplace.approximate(H, np.zeros(4, complex), rank=2)
    assert found.sample(1).dtype == complex
    with pytest.raises(TypeError, match="complex"):
        found.errors  # noqa: B018


def test_a_signal_stops_it(dense):
    class Asked:
        name, signum = "SIGTERM", 15

        def agree(self, comm=None, wish=False):
            return True

    found = laplace.approximate(dense.problem, dense.part(dense.centre), rank=2, interrupt=Asked())
    assert found.status == "signal" and found.products == 1 and "SIGTERM" in found.message


def test_a_progress_bar_counts_products(dense, capsys):
    pytest.importorskip("tqdm")
    laplace.approximate(dense.problem, dense.part(dense.centre), rank=2, oversampling=1, progress=True)
    shown = capsys.readouterr().err
    assert ("9/9" in shown) == (comm.rank == 0)


@pytest.mark.parametrize("conditioned", [False, True])
def test_a_few_numbers_without_vectors_and_what_is_missing(dense, conditioned):
    """The variances lie between the bounds, however early the work ends, and the covariance is that of the dense matrix."""
    problem, vs, exact = dense.problem, dense.vs, dense.covariance[N:, N:]
    x = dense.part(dense.centre + 0.2)
    diagonal = dense.part(1 / (1 + np.diag(dense.A)))
    by_number = lambda v: laplace.by_components(vs, np.multiply, v, diagonal)  # noqa: E731
    work = []
    for rtol in 1.0, 0.1, 1e-10:
        found = laplace.marginal_of(problem, x, ["t"], rtol, precondition=by_number if conditioned else None)
        least = np.diag(found.covariance)
        assert (least <= np.diag(exact) * (1 + 1e-9)).all()
        assert (least + found.missing >= np.diag(exact) * (1 - 1e-9)).all()
        assert (found.missing <= rtol * least).all()
        work.append(found.products)
    assert work == sorted(work) and work[0] < work[-1] and found.products <= 2 * (N + 6)
    np.testing.assert_allclose(found.covariance, exact, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.shift, -0.2, rtol=1e-5)


def test_solving_ends_where_it_should(monkeypatch):
    """The last product that is allowed counts, one fewer does not do, and a direction with a maximum is told."""
    products, curvature = [], laplace.curvature
    monkeypatch.setattr(laplace, "curvature", lambda *args: products.append(1) or curvature(*args))
    A = np.diag([300.0, 200.0, *np.linspace(1, 2, N)])
    round_one = Dense(A)
    zero, v = round_one.part(np.zeros(N + 2)), round_one.part(np.linspace(-1, 1, N + 2))
    low = laplace.approximate(round_one.problem, zero, rank=2, oversampling=0, powers=3)
    products.clear()
    low.solve(v, 1e-6)
    needed = len(products) - 1  # one was for the residual of the start
    assert 1 < needed < 20
    low.solve(v, 1e-6, needed)
    with pytest.raises(RuntimeError, match=f"within {needed - 1} iterations"):
        low.solve(v, 1e-6, needed - 1)
    A[-1, -1] = -5.0
    hollow = Dense(A)
    low = laplace.approximate(hollow.problem, zero, rank=2, oversampling=0, powers=3)
    with pytest.raises(ValueError, match="not convex at x .the curvature along a direction is -"):
        low.solve(v)


def test_a_few_numbers_say_what_is_wrong(dense):
    problem, x = dense.problem, dense.part(dense.centre)
    with pytest.raises(ValueError, match="no component 'u'"):
        laplace.marginal_of(problem, x, ["u"])
    hollow = Dense(curvature=-2.0 * np.eye(N + 2))
    with pytest.raises(ValueError, match="not convex at x"):
        laplace.marginal_of(hollow.problem, x, ["t"])

    class Interrupt:
        name = "SIGTERM"

        def agree(self, comm):
            return True

    early = laplace.marginal_of(problem, x, ["t"], interrupt=Interrupt())
    assert early.products == 0 and (np.diag(early.covariance) == 0).all() and (early.missing == 1).all()

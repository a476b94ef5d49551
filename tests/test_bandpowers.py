"""Band powers: against the matrices of a linear model, on any number of ranks, and after a kill."""

import json
import os
import signal

import numpy as np
import pytest

pytest.importorskip("pmesh")

from mpi4py import MPI  # noqa: E402

from vmad_lit.contrib import cosmo4d  # noqa: E402
from vmad_lit.contrib.bandpowers import (  # noqa: E402
    BandPowers,
    Bands,
    DensityExperiment,
    Experiment,
    Measurement,
    linear_theory,
)
from vmad_lit.contrib.optimize import LBFGS, StateError  # noqa: E402
from vmad_lit.lib.cosmology import LinearPower, Planck15  # noqa: E402
from vmad_lit.lib import fastpm  # noqa: E402
from vmad_lit.lib.fastpm import ParticleMesh  # noqa: E402
from vmad_lit.lib.mpi import on_root  # noqa: E402
from vmad_lit.lib.signals import heed_signals  # noqa: E402

collective = pytest.mark.collective

comm = MPI.COMM_WORLD
power = LinearPower(Planck15)
EDGES = [0.02, 0.05, 0.08, 0.12]
EXACT = LBFGS(gtol=1e-7, maxiter=100)


def mesh(comm=comm):
    return ParticleMesh(Nmesh=[8] * 3, BoxSize=200.0, comm=comm, dtype="f8")


def operators(pm, stages=()):
    q = pm.generate_uniform_particle_grid(shift=0.5)
    return lambda P: cosmo4d.WhiteNoiseOperator.bind(
        power=P, q=q, stages=list(stages), cosmology=Planck15, pm=pm
    )


def gathered(field):
    """The whole mesh as a flat array, on every rank."""
    whole = np.zeros(tuple(map(int, field.Nmesh)))
    whole[field.slices] = field.value
    return field.pm.comm.allreduce(whole).ravel()


def scattered(pm, whole):
    field = pm.create(type="real", value=0)
    field.value[...] = whole.reshape(8, 8, 8)[field.slices]
    return field


def noise_map(pm):
    """The standard deviation of the noise in each cell: half of the box is seen badly."""
    field = pm.create(type="real", value=0.5)
    field.value[np.broadcast_to(field.i[0] < 4, field.shape)] = 5.0
    return field


def uneven(pm):
    """A linear experiment with noise that differs from cell to cell."""
    forward, sigma = operators(pm)(power), noise_map(pm)

    def simulate(white, seed):
        clean = forward.build().compute("fs", init=dict(x=white))
        return clean + cosmo4d.white_noise(pm, seed, purpose="noise of a test") * sigma

    def problem(data):
        invN = pm.create(type="real", value=sigma.value**-2)
        residual = cosmo4d.NLResidualOperator.bind(d=data, invN=invN)
        return cosmo4d.ChiSquareProblem(pm.comm, forward, [residual, cosmo4d.WhitePriorOperator])

    return Experiment(pm, power, simulate, problem, identity=dict(sigma=sigma))


class Matrices:
    """The same in plain NumPy: covariances of 512 cells, without a transform or a mesh."""

    def __init__(self, sigma):
        i = np.indices((8, 8, 8)).reshape(3, -1).T
        waves = (i + 4) % 8 - 4
        k = 2 * np.pi / 200.0 * np.sqrt((waves**2).sum(axis=1))
        F = np.exp(2j * np.pi / 8 * (i @ waves.T)) / 512**0.5  # cells, modes
        size = 512 / 200.0**3 * np.where(k > 0, power(np.where(k > 0, k, 1.0)), 0.0)
        which = np.digitize(k, EDGES) - 1

        def between(weights):
            return ((F * weights) @ F.conj().T).real

        self.root = between(size**0.5)
        self.projectors = [between(1.0 * (which == b)) for b in range(3)]
        self.bands = [between(size * (which == b)) for b in range(3)]
        self.inverse = np.linalg.inv(between(size) + np.diag(sigma**2))
        self.counts = np.bincount(which[(which >= 0) & (which < 3)])

    def energies(self, d):
        """Half the quadratic forms of data (..., 512)."""
        v = d @ self.inverse
        return np.stack([0.5 * ((v @ C) * v).sum(axis=-1) for C in self.bands], axis=-1)

    def fisher(self):
        X = [self.inverse @ C for C in self.bands]
        return 0.5 * np.array([[(a * b.T).sum() for b in X] for a in X])

    def mean(self):
        return 0.5 * np.array([np.trace(self.inverse @ C) for C in self.bands])


@collective
def test_energies_of_the_map_are_the_quadratic_estimator_of_matrices():
    pm = mesh()
    method = BandPowers(uneven(pm), EDGES, EXACT)
    exact = Matrices(gathered(noise_map(pm)))
    np.testing.assert_array_equal(method.bands.counts, exact.counts)
    white = cosmo4d.white_noise(pm, 3)
    for change in ([0, 0, 0], [0.5, 0, -0.3]):
        data = method.experiment.simulate(method.bands.amplify(white, change), 3)
        found = method.energies(method.maximum(data))
        np.testing.assert_allclose(found, exact.energies(gathered(data) - 1.0), rtol=1e-5)


@pytest.mark.serial
def test_what_is_kept_of_simulations_is_what_matrices_say():
    pm = mesh(MPI.COMM_SELF)
    method, kept = BandPowers(uneven(pm), EDGES, EXACT), []
    exact, simulate = Matrices(gathered(noise_map(pm))), method.experiment.simulate

    def keep(white, seed):
        kept.append(simulate(white, seed))
        return kept[-1]

    method.experiment.simulate = keep
    c = method.calibrate(nsim=5, ninject=2, seed=5)
    energies = exact.energies(np.array([gathered(d) for d in kept]) - 1.0)
    # the two with injections, of opposite sign, come before the three without
    np.testing.assert_allclose(c.found, energies[[0, 4, 8, 9, 10]], rtol=1e-5)
    np.testing.assert_allclose(c.injected[0].T, (energies[1:4] - energies[0]) / 0.2, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(c.injected[1].T, (energies[5:8] - energies[4]) / -0.2, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(c.matrix, c.injected.mean(axis=0) / c.truth[:2].mean(axis=0))


def drawn(exact, sigma, n, seed, spectrum=np.ones(3)):
    """Data of n universes with amplitudes `spectrum` of the bands, and their realised amplitudes; without the package."""
    rng = np.random.default_rng(seed)
    white, noise = rng.normal(size=(2, n, 512))
    bands = [white @ projector for projector in exact.projectors]
    d = white @ exact.root + noise * sigma
    for part, amplitude in zip(bands, np.broadcast_to(spectrum, (n, 3)).T):
        d = d + (amplitude[:, None] ** 0.5 - 1) * (part @ exact.root)
    realised = np.stack([(w**2).sum(axis=1) / m for w, m in zip(bands, exact.counts)], axis=-1)
    return d, spectrum * realised


@pytest.mark.serial
def test_bias_response_and_errors_are_those_of_matrices_and_the_estimate_is_unbiased():
    pm = mesh(MPI.COMM_SELF)
    sigma = gathered(noise_map(pm))
    method, exact = BandPowers(uneven(pm), EDGES), Matrices(sigma)
    F = exact.fisher()
    n, step = 300, 0.2 * (-1.0) ** np.arange(300)[:, None]
    truth, rows = drawn(exact, sigma, n, 1)[1], {}
    for j in range(-1, 3):  # the same universes, with power injected into band j
        d, _ = drawn(exact, sigma, n, 1, 1 + step * (np.arange(3) == j))
        for i, found in enumerate(exact.energies(d)):
            name = f"{i}" if j < 0 else f"{i}, injected {j}"
            rows[name] = dict(truth=truth[i], found=found, status="converged")
    c = method.calibration = method._evaluate(rows, n, 150)
    size = np.sqrt(np.outer(np.diag(F), np.diag(F)))
    assert abs(F / size - np.eye(3)).max() > 0.1  # the bands are mixed
    np.testing.assert_allclose(c.matrix / size, F / size, atol=0.03)
    best = np.linalg.inv(F)
    errors = np.diag(best) ** 0.5
    np.testing.assert_allclose(c.bias / errors, (best @ exact.mean() - 1) / errors, atol=0.15)
    scale = np.outer(errors, errors)
    np.testing.assert_allclose(c.covariance(exact.counts) / scale, best / scale, atol=0.1)
    # other universes, of the same spectrum and of another one
    for spectrum in (np.ones(3), np.array([1.5, 0.8, 1.2])):
        d, realised = drawn(exact, sigma, 500, 2, spectrum)
        m = [method.measure(e) for e in exact.energies(d)]
        apart = np.array([x.power for x in m]) / m[0].fiducial - realised
        assert (abs(apart.mean(axis=0)) < 0.2 * errors).all(), apart.mean(axis=0) / errors
        chisquare = np.mean([x.chisquare(spectrum) for x in m]) / 3
        assert abs(chisquare - 1) < (0.15 if spectrum.std() == 0 else 0.5), chisquare
    assert abs(np.mean([x.chisquare(np.ones(3)) for x in m]) / 3 - chisquare) > 0.2


@collective
def test_linear_theory_makes_the_hessian_round():
    pm = mesh()
    problem = DensityExperiment(pm, operators(pm), power, 0.5).problem(cosmo4d.white_noise(pm, 1) + 1.0)
    v = cosmo4d.white_noise(pm, 2)
    P = problem.preconditioner
    P.check(problem.vs, v, v)
    product = P.whiten_gradient(problem.hessian_vector_product(v, P.unwhiten(v)))
    np.testing.assert_allclose(product.value, 2 * v.value, atol=1e-9)
    assert problem.preconditioner is not None and linear_theory(pm, power, 1.0) is not None


@collective
def test_bands_and_white_noise():
    pm = mesh()
    bands = Bands(pm, EDGES, power, parts=1)
    white = cosmo4d.white_noise(pm, 1)
    energies = bands.energies(white)
    assert (abs(2 * energies / bands.counts - 1) < 5 * (2 / bands.counts) ** 0.5).all()
    louder = bands.energies(bands.amplify(white, [0.5, 0.0, -0.25]))
    np.testing.assert_allclose(louder / energies, [1.5, 1, 0.75])
    again = bands.recolour(bands.recolour(white, lambda k: power(k) * (1 + k)), lambda k: power(k) / (1 + k))
    np.testing.assert_allclose(again.value, white.value, atol=1e-10)
    quadruple = bands.recolour(white, lambda k: 4 * power(k))
    np.testing.assert_allclose(bands.energies(quadruple), 4 * energies)
    np.testing.assert_allclose(bands.average(lambda k: 3 * power(k), power), 3)
    assert len(bands) == 3 and len(Bands(pm, [0.03, 0.12], power, parts=2).k) == 2


@collective
@pytest.mark.parametrize(
    "edges, parts, words",
    [
        ([0.0, 0.1], 1, "positive"),
        ([0.1, 0.05], 1, "increasing"),
        ([0.1], 1, "at least two"),
        ([0.05, 0.051, 0.1], 1, "band 0, 0.05 to 0.051 h/Mpc, has no modes on this mesh"),
        ([0.05, 0.1, 0.3, 0.4], 1, "band 2, 0.3 to 0.4 .* end at 0.21"),
        ([0.03, 0.05], 20, "a part of band 0"),
        ([0.03, 0.05], 0, "parts must be a whole number of at least 1"),
        ("wide", 1, "edges"),
    ],
)
def test_bad_bands_are_told(edges, parts, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Bands(mesh(), edges, power, parts)


@collective
def test_other_mistakes_are_told():
    pm = mesh()
    with pytest.raises(ValueError, match="fiducial power must be above 0"):
        Bands(pm, EDGES, lambda k: np.where(k > 0.07, 0.0, 1.0))
    with pytest.raises(ValueError, match="sigma must be positive"):
        DensityExperiment(pm, operators(pm), power, -1.0)
    experiment = DensityExperiment(pm, operators(pm), power, 0.5)
    with pytest.raises(TypeError, match="must be an Experiment"):
        BandPowers(operators(pm), EDGES)
    with pytest.raises(TypeError, match="must be an Optimizer"):
        BandPowers(experiment, EDGES, LBFGS)
    with pytest.raises(ValueError, match="step must be positive, below 1"):
        BandPowers(experiment, EDGES, step=1.5)
    method = BandPowers(experiment, EDGES)
    with pytest.raises(ValueError, match="call calibrate"):
        method.estimate(cosmo4d.white_noise(pm, 1))
    with pytest.raises(ValueError, match="call calibrate"):
        method.measure([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="nsim must be a whole number of at least 5"):
        method.calibrate(nsim=2)
    with pytest.raises(ValueError, match="ninject"):
        method.calibrate(nsim=6, ninject=7)


def quick(comm, stages=(), maxiter=2, **options):
    pm = mesh(comm)
    experiment = DensityExperiment(pm, operators(pm, stages), power, 0.5)
    return BandPowers(experiment, [0.02, 0.06, 0.12], LBFGS(maxiter=maxiter, gtol=0.0), **options)


@collective
def test_the_same_on_any_number_of_ranks_and_for_parts_of_bands():
    results = []
    for c in (comm, MPI.COMM_SELF):
        method = quick(c, [1.0], 2, parts=2)
        method.calibrate(nsim=4, ninject=1, seed=3)
        data, realised = method.mock(7)
        results.append((method.estimate(data), realised))
    (m, realised), (alone, other) = results
    np.testing.assert_allclose(realised, other, rtol=1e-9)
    for name, value in vars(m).items():
        np.testing.assert_allclose(value, getattr(alone, name), rtol=1e-4, atol=1e-6, err_msg=name)
    assert comm.bcast(m.power.tobytes()) == m.power.tobytes()
    # To more power in a whole band each estimate answers with just that, to that in a part with a share.
    np.testing.assert_allclose(m.windows.reshape(2, 2, 2).sum(axis=2), np.eye(2), atol=1e-9)
    np.testing.assert_allclose(m.expected(np.ones(4)), m.fiducial)
    assert m.windows.min() > -0.5 and m.windows[0, :2].min() > 0


@collective
def test_a_killed_calibration_goes_on(tmp_path):
    path = os.path.join(on_root(comm, lambda: str(tmp_path)), "simulations.json")
    whole = quick(comm).calibrate(nsim=5, ninject=1, seed=3)
    method, calls = quick(comm), []

    def end(done, total):
        calls.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.calibrate(nsim=4, ninject=1, seed=3, path=path, monitor=end)
    assert calls == [(1, 6), (2, 6), (3, 6)] and method.calibration is None
    method.maximum, counted = lambda data, maximum=method.maximum: counted.append(1) or maximum(data), []
    again = method.calibrate(nsim=4, ninject=1, seed=3, path=path)
    assert len(counted) == 3
    more = method.calibrate(nsim=5, ninject=1, seed=3, path=path)
    assert len(counted) == 4
    np.testing.assert_array_equal(more.found, whole.found)
    np.testing.assert_array_equal(more.matrix, whole.matrix)
    np.testing.assert_array_equal(again.found, whole.found[:4])
    with pytest.raises(StateError, match="holds other simulations:\n  seed: 3 before, 4 now"):
        method.calibrate(nsim=4, ninject=1, seed=4, path=path)
    with pytest.raises(StateError, match="optimizer.maxiter: 2 before, 5 now"):
        BandPowers(method.experiment, [0.02, 0.06, 0.12], LBFGS(maxiter=5, gtol=0.0)).calibrate(5, 1, 3, path)


@collective
def test_a_signal_ends_a_calibration_between_maps(tmp_path):
    path = os.path.join(on_root(comm, lambda: str(tmp_path)), "simulations.json")
    method = quick(comm)

    def tell(done, total):
        if done == 2 and comm.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with heed_signals(comm, leave=False) as interrupt:
        assert method.calibrate(nsim=4, ninject=1, seed=3, path=path, monitor=tell) is None
    assert interrupt.name == "SIGTERM" and method.calibration is None
    with open(path) as file:
        assert 2 <= len(json.load(file)["simulations"]) < 6
    comm.Barrier()
    on_root(comm, lambda: open(path, "w").close())
    with pytest.raises(StateError, match="is no file of simulations"):
        method.calibrate(nsim=4, ninject=1, seed=3, path=path)


@collective
def test_a_posterior_with_another_parameter():
    posterior = pytest.importorskip("vmad_lit.contrib.posterior")
    priors = pytest.importorskip("vmad_lit.contrib.priors")
    likelihoods = pytest.importorskip("vmad_lit.contrib.likelihoods")
    pm = mesh()

    def forward(modes, b1):
        return fastpm.c2r(modes) * b1 + 1.0

    about = dict(modes=priors.GaussianField(pm, power), b1=priors.Normal(1.0, 0.01))
    data = likelihoods.Gaussian(pm.create(type="real", value=1.0), sigma=0.5)
    experiment = Experiment.of_posterior(posterior.Posterior(about, forward, data, comm), "modes")
    method = BandPowers(experiment, [0.02, 0.06, 0.1], LBFGS(gtol=1e-4))
    c = method.calibrate(nsim=4, ninject=1)
    known = BandPowers(DensityExperiment(pm, operators(pm), power, 0.5), [0.02, 0.06, 0.1], EXACT)
    np.testing.assert_allclose(c.matrix, known.calibrate(nsim=4, ninject=1).matrix, rtol=0.15, atol=1.0)
    data, realised = method.mock(3)
    m = method.estimate(data)
    assert (abs(m.power - realised) < 4 * m.sigma).all()
    with pytest.raises(ValueError, match="not 'b1'; there are modes, b1"):
        Experiment.of_posterior(
            posterior.Posterior(about, forward, likelihoods.Gaussian(data, sigma=1.0), comm), "b1"
        )


def made_up():
    rng = np.random.default_rng(4)
    A = rng.normal(size=(3, 3)) * 0.3 + np.eye(3)
    fiducial = np.array([9.0, 5.0, 2.0])
    return Measurement(
        k=np.array([0.03, 0.06, 0.1]),
        power=np.array([10.0, 5.0, 1.5]),
        fiducial=fiducial,
        counts=np.array([18.0, 62.0, 170.0]),
        covariance=A @ A.T,
        windows=np.eye(3),
        noise_bias=np.array([-1.0, -2.0, -1.0]),
        fisher=np.linalg.inv(A @ A.T),
        nsim=7,
    )


def test_mixtures_of_bands_without_correlation():
    m = made_up()
    mixed = m.decorrelated()
    off = mixed.covariance - np.diag(np.diag(mixed.covariance))
    np.testing.assert_allclose(off, 0, atol=1e-12)
    np.testing.assert_allclose(mixed.windows.sum(axis=1), 1)
    np.testing.assert_allclose(np.linalg.inv(mixed.fisher), mixed.covariance, rtol=1e-9, atol=1e-12)
    model = np.array([1.1, 0.9, 1.2])
    np.testing.assert_allclose(mixed.chisquare(model), m.chisquare(model))
    np.testing.assert_allclose(mixed.expected(np.ones(3)), m.fiducial)


def test_results_are_saved_and_a_better_fiducial_spectrum_is_made_of_them(tmp_path):
    m, path = made_up(), os.path.join(tmp_path, "result.json")
    m.save(path)
    again = Measurement.load(path)
    for name, value in vars(m).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    np.testing.assert_allclose(m.spectrum(lambda k: 2.0 + 0 * k)(m.k), 2 * m.power / m.fiducial)
    with open(path, "w") as file:
        file.write("{}")
    with pytest.raises(StateError, match="is no file of measured band powers"):
        Measurement.load(path)

"""Problems from models, likelihoods, forward models and the posterior, on any number of ranks."""

import functools

import numpy as np
import pytest
import scipy.stats as scipy_stats
from mpi4py import MPI
from numpy.testing import assert_allclose, assert_array_equal

from helpers import COMM, join, make_mesh, modes, real, soaking, split, whole
from vmad_lit import Builder, operator
from vmad_lit.contrib import priors
from vmad_lit.contrib.chisquare import MPIVectorSpace, local_squares
from vmad_lit.contrib.cosmo4d import WhiteNoiseOperator
from vmad_lit.contrib.forward import Density
from vmad_lit.contrib.likelihoods import Gaussian, LogDensity, LogNormalNoise, Poisson, Smoothed
from vmad_lit.contrib.optimize import LBFGS, Problem, State, TrustRegionCG
from vmad_lit.contrib.posterior import Posterior
from vmad_lit.contrib.sample import HMC, MAMS, MCLMC, NUTS
from vmad_lit.contrib.priors import (
    CorrelatedNormal,
    GaussianField,
    LinearField,
    Normal,
    TruncatedNormal,
    Uniform,
    WhiteField,
)
from vmad_lit.contrib.vectorspace import ProductSpace, VectorSpace
from vmad_lit.core.error import PlacementError
from vmad_lit.lib import fastpm, mpi, unary
from vmad_lit.lib.cosmology import Cosmology, LinearPower, OutOfDomain, Planck15
from vmad_lit.lib.fingerprint import differences, fingerprint

pytestmark = pytest.mark.collective

CUBE = [8, 8, 8]
TIMES = np.linspace(0.0, 2.0, 9)


# Proofs


def prove(problem, x, v, h=1e-5, rtol=1e-6, second=True):
    """The gradient is that of the objective, and the exact product that of the gradient, along v."""
    gradient = problem.gradient(x)
    product = problem.exact_product(x, v) if second else None
    ahead, behind = (problem.vs.addmul(x, v, t) for t in (h, -h))
    rise, bend = problem.objective(ahead), problem.gradient(ahead) if second else None
    fall = problem.objective(behind)
    scale = problem.vs.norm(gradient) * problem.vs.norm(v)
    assert abs(problem.vs.inner(gradient, v) - (rise - fall) / (2 * h)) < rtol * scale
    if second:
        change = problem.vs.addmul(bend, problem.gradient(behind), -1)
        wrong = problem.vs.addmul(problem.vs.scale(0.5 / h, change), product, -1)
        assert problem.vs.norm(wrong) < 10 * rtol * problem.vs.norm(product)


# Problems from models


def two_inputs():
    """(x - 1)^2 + 100 (y - x^2)^2 and its residuals, of two numbers that all ranks have."""
    with Builder() as m:
        x, y = m.input("x", "y", placement="replicated", comm=COMM)
        a, b = x - 1.0, (y - x * x) * 10.0
        m.output(chi2=a * a + b * b, a=a, b=b)
    return m


def test_a_problem_of_several_inputs():
    problem = Problem.from_model(two_inputs(), "chi2", residuals=["a", "b"])
    assert isinstance(problem.vs, ProductSpace) and problem.temperature == 2
    state = TrustRegionCG(gtol=1e-10).minimize(problem, dict(x=-1.0, y=2.0))
    assert_allclose([state.x["x"], state.x["y"]], 1.0, atol=1e-8)
    at, v = dict(x=-1.0, y=2.0), dict(x=1.0, y=0.5)
    before = problem.forwards
    gradient = problem.gradient(at)
    assert_allclose([gradient["x"], gradient["y"]], [2 * -2 + 400 * 1, 200])
    J = np.array([[1.0, 0.0], [20.0, 10.0]])
    product, exact = problem.gauss_newton_product(at, v), problem.exact_product(at, v)
    assert_allclose([product["x"], product["y"]], 2 * J.T @ J @ [1.0, 0.5])
    H = np.array([[2 - 400 * 2 + 1200, 400], [400, 200]])
    assert_allclose([exact["x"], exact["y"]], H @ [1.0, 0.5])
    assert problem.forwards == before + 1


def test_a_problem_of_one_input_and_given_values():
    problem = Problem.from_model(two_inputs(), "chi2", "x", given=dict(y=4.0))
    assert type(problem.vs) is VectorSpace and problem.temperature == 1
    assert problem.gradient(2.0) == 2.0 and problem.objective(2.0) == 1.0
    assert problem.hessian_vector_product(2.0, 1.0) == 2 - 400 * 4 + 1200 * 4
    with pytest.raises(ValueError, match="name the outputs"):
        problem.gauss_newton_product(2.0, 1.0)
    other = Problem.from_model(two_inputs(), "chi2", "x", given=dict(y=5.0))
    prints = [fingerprint(p.ingredients(), COMM) for p in (problem, other)]
    assert list(differences(*prints)) == ["given.y"]


def test_the_space_follows_from_the_placement():
    with Builder() as m:
        x = m.input("x", placement="partitioned", comm=COMM)
        c = m.input("c", placement="replicated", comm=COMM)
        k = m.input("k")
        field = fastpm.c2r(k)
        total = mpi.allreduce(local_squares(x * c), COMM) + mpi.allreduce(local_squares(field), COMM)
        m.output(y=total)
    pm = make_mesh(CUBE)
    problem = Problem.from_model(m, "y")
    assert [type(problem.vs.spaces[name]) for name in "xck"] == [MPIVectorSpace, VectorSpace, MPIVectorSpace]
    at = dict(x=split(TIMES), c=2.0, k=modes(pm))
    assert_allclose(problem.gradient(at)["c"], 4 * TIMES @ TIMES)
    assert_allclose(join(problem.gradient(at)["x"]), 8 * TIMES)
    prove(problem, at, dict(x=split(TIMES**2), c=1.0, k=modes(pm, 2)))


def test_an_unknown_place_is_told():
    with Builder() as m:
        m.output(y=mpi.allreduce(local_squares(m.input("x")), COMM))
    if COMM.size == 1:
        assert Problem.from_model(m, "y").gradient(np.ones(3)).tolist() == [2, 2, 2]
    else:
        with pytest.raises(ValueError, match="where the input 'x' lives on many ranks is not known"):
            Problem.from_model(m, "y")


# Priors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda pm: GaussianField(pm, 3.0), "power"),
        (lambda pm: GaussianField(pm, 3.0, "a"), "function of a"),
        (lambda pm: LinearField(pm, depends="sigma_8"), "did you mean 'sigma8'"),
    ],
)
def test_priors_of_fields_that_cannot_be(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(make_mesh(CUBE))


def test_gaussian_field_of_given_and_of_free_power():
    pm = make_mesh(CUBE)
    fixed, free = GaussianField(pm, LinearPower(Planck15)), LinearField(pm, depends="Om0, sigma8")
    data = Gaussian(real(pm), 1.0)
    values = dict(Om0=Planck15.Om0, sigma8=Planck15.sigma8)
    a = Posterior(dict(delta=fixed), lambda delta: fastpm.c2r(delta), data)
    b = Posterior(
        dict(delta=free, Om0=Normal(0.3, 0.1), sigma8=Normal(0.8, 0.1)), lambda delta: fastpm.c2r(delta), data
    )
    z = a.draw(3)
    w = b.latents(dict(values, delta=a.values(z)["delta"]))
    assert_allclose(b.values(w)["delta"].value, a.values(z)["delta"].value, atol=1e-9)
    mean = real(pm, 1) * 0 + z["delta"].csum() / pm.Nmesh.prod()  # a mode without power has no latent
    assert_allclose(w["delta"].value, (z["delta"] - mean).value, atol=1e-9)
    assert_allclose(b.values(w)["sigma8"], Planck15.sigma8)
    prove(b, w, b.draw(4))
    power = a.summary(z)["delta_power"]
    assert power.shape == a.priors["delta"].shells.k.shape


def test_values_of_the_latents_of_values_are_these_values_but_for_the_mean():
    """One behaviour for powers of all kinds: the mean of the field is zero, and is no latent's."""
    pm, flat = make_mesh(CUBE), Planck15.replace(n_s=0.0)
    field = real(pm, 3) + 2.0
    for prior in (
        GaussianField(pm, lambda k: 3.0 + 0 * k),  # a power that is positive at k = 0
        GaussianField(pm, lambda k: 1 / k),  # or infinite there
        LinearField(pm, flat),
        LinearField(pm, flat, depends="Om0"),
        LinearField(pm, depends="Om0 sigma8"),
    ):
        listed = {name: Normal(0.5, 0.1) for name in prior.depends}
        posterior = Posterior(dict(listed, delta=prior), lambda delta: fastpm.c2r(delta), Gaussian(field))
        values = dict(Om0=0.3, sigma8=0.8, delta=field.r2c())
        latents = posterior.latents(values)
        assert abs(latents["delta"].csum()) < 1e-9
        again = posterior.values(latents)["delta"].c2r()
        assert_allclose((again - field).value, -field.cmean(), rtol=1e-6)
        shifted = posterior.values(dict(latents, delta=latents["delta"] + 1.0))["delta"].c2r()
        assert_allclose(shifted.value, again.value, atol=1e-6)


# Likelihoods


def log_of(likelihood, prediction, **values):
    """The logarithm of a likelihood for a prediction that does not depend on the parameter, and for parameters."""

    where = "replicated" if likelihood.comm is None else "partitioned"

    def forward(x):
        return mpi.place(prediction, where, COMM) + x * 0.0

    pool = dict(x=Normal(), **{name: Normal() for name in values})
    posterior = Posterior(pool, forward, likelihood, comm=COMM)
    return posterior.log_likelihood(posterior.latents(dict(values, x=0.0)))


VALUES = np.array([0.4, 1.7, 2.2, 0.9])
AT = np.array([0.5, 1.5, 2.0, 1.2])


@pytest.mark.parametrize("spread", [False, True])
def test_likelihoods_of_arrays_against_scipy(spread):
    part, comm = (split, COMM) if spread else (lambda x: x, None)
    sigma, mask = np.array([0.5, 1.0, 2.0, 1.0]), np.array([1, 1, 0, 1])
    gaussian = scipy_stats.norm.logpdf(VALUES, AT, sigma)
    assert_allclose(log_of(Gaussian(part(VALUES), part(sigma), comm=comm), part(AT)), gaussian.sum())
    hidden = np.where(mask, VALUES, np.nan)
    seen = gaussian[mask == 1].sum()
    assert_allclose(log_of(Gaussian(part(hidden), part(sigma), part(mask), comm=comm), part(AT)), seen)
    infinite = np.where(mask, sigma, np.inf)
    assert_allclose(log_of(Gaussian(part(VALUES), part(infinite), comm=comm), part(AT)), seen)
    logs = scipy_stats.lognorm.logpdf(VALUES, 0.3, scale=AT)
    assert_allclose(log_of(LogNormalNoise(part(VALUES), 0.3, comm=comm), part(AT)), logs.sum())
    counts, mean = np.array([0, 3, 2, 1]), np.array([1.0, 2.0, 1.5, 0.5])
    poisson = scipy_stats.poisson.logpmf(counts, AT * mean)
    assert_allclose(log_of(Poisson(part(counts), part(mean), comm=comm), part(AT)), poisson.sum())
    free = scipy_stats.norm.logpdf(VALUES, AT, 0.7 * sigma)
    amplitude = Gaussian(part(VALUES), part(sigma), amplitude="n", comm=comm)
    assert_allclose(log_of(amplitude, part(AT), n=0.7), free.sum())
    assert Gaussian(VALUES).is_sum_of_squares and not amplitude.is_sum_of_squares
    assert not Poisson(counts).is_sum_of_squares


def test_coloured_noise_is_a_normal_with_that_covariance():
    pm = make_mesh([4, 6])
    power = lambda k: 3.0 / (1.0 + k**2)
    posterior = Posterior(dict(x=Normal()), lambda x: real(pm, 2) * x, Gaussian(real(pm), power=power))
    found = posterior.log_likelihood(dict(x=0.5))
    alone = make_mesh([4, 6], MPI.COMM_SELF)
    axes = [2 * np.pi * np.fft.fftfreq(n, L / n) for n, L in zip((4, 6), alone.BoxSize)]
    k = np.sqrt((np.array(np.meshgrid(*axes, indexing="ij")) ** 2).sum(axis=0))
    F = np.fft.fftn(np.eye(24).reshape(24, 4, 6), axes=(1, 2)).reshape(24, 24) / np.sqrt(24)
    covariance = (F.conj().T @ np.diag(np.ravel(power(k)) * 24 / alone.BoxSize.prod()) @ F).real
    law = scipy_stats.multivariate_normal(np.ravel(whole(alone, 2)) * 0.5, covariance)
    assert_allclose(found, law.logpdf(np.ravel(whole(alone, 1))))


def everything(comm=COMM, dtype="f8"):
    """A posterior with one of each: fields, replicated and partitioned parameters, all likelihoods."""
    pm = make_mesh(CUBE, comm, dtype)
    own = (lambda x: split(x)) if comm is COMM else (lambda x: x)
    mask = pm.create("real", value=1.0)
    mask.value[...] = (np.arange(512).reshape(CUBE) % 5 > 0)[mask.slices]
    noise = pm.create("real", value=0.3)
    hidden = real(pm, 4) + 1.0
    hidden.value[mask.value == 0] = np.nan
    counts = pm.create("real", value=0.0)
    counts.value[...] = (np.arange(512).reshape(CUBE) % 4)[counts.slices]

    def forward(delta, b, c, w, t):
        density = fastpm.c2r(delta) * b * 0.1
        return dict(density=density + 1.0, positive=unary.exp(density), both=c * b, lamps=w * t * t)

    listed = dict(
        delta=LinearField(pm, depends="sigma8, Om0"),
        Om0=TruncatedNormal(0.3, 0.05, 0.1, 0.5),
        sigma8=priors.LogNormal(-0.2, 0.1),
        mu=Normal(1, 0.1),
        b=Normal("mu", 0.3),
        n=Uniform(0.5, 2),
        c=CorrelatedNormal([1, 2], [[1, 0.5], [0.5, 2]]),
        t=Normal([1.0]),
        w=Normal(np.zeros(len(own(TIMES))), partitioned=True),
    )
    data = dict(
        density=[
            Gaussian(hidden, noise, mask, amplitude="n"),
            Poisson(counts, mean=2.0, mask=mask, floor=0.1),
            Smoothed(hidden, 0.3, mask, scale=2.0),
            Gaussian(real(pm, 5), power=lambda k: 30.0 + 0 * k),
        ],
        positive=[
            LogNormalNoise(counts + 1.0, sigma="n"),
            LogDensity(hidden, 0.3, mask),
            Poisson(counts, mean="n"),
        ],
        both=[Gaussian(np.array([1.0, 2.0]), 0.1), Poisson(np.array([1, 2]), mean=5.0, floor=0.2)],
        lamps=Gaussian(own(TIMES), 0.5, comm=None if comm.size == 1 else comm),
    )
    return Posterior(listed, forward, data, comm=comm)


@functools.cache
def both():
    return everything(), everything(MPI.COMM_SELF)


def test_derivatives_of_everything():
    posterior, _ = both()
    z = posterior.draw(5)
    before = posterior.forwards
    product = posterior.gauss_newton_product(z, posterior.draw(6))
    posterior.gradient(z), posterior.objective(z)
    assert posterior.forwards == before + 1
    assert posterior.vs.dot(product, posterior.draw(6)) > 0
    other = posterior.draw(7)
    left, right = (
        posterior.vs.dot(product, other),
        posterior.vs.dot(posterior.gauss_newton_product(z, other), posterior.draw(6)),
    )
    assert_allclose(left, right)
    prove(posterior, z, posterior.draw(8))


def test_the_same_on_any_number_of_ranks():
    posterior, alone = both()
    z, w = posterior.draw(5), alone.draw(5)
    assert posterior.size == alone.size == 512 + 7 + 9 + 1
    for name in "Om0", "b", "c":
        assert_array_equal(z[name], w[name])
    assert_array_equal(join(z["w"]), w["w"])
    assert_array_equal(z["delta"].value, w["delta"].value[z["delta"].slices])
    assert_allclose(posterior.objective(z), alone.objective(w))
    g, h = posterior.gradient(z), alone.gradient(w)
    for name in "Om0", "sigma8", "mu", "b", "n", "c", "t":
        assert_allclose(g[name], h[name], rtol=1e-9, atol=1e-9)
        assert len({np.asarray(x).tobytes() for x in COMM.allgather(g[name])}) == 1
    assert_allclose(join(g["w"]), h["w"])
    assert_allclose(g["delta"].value, h["delta"].value[g["delta"].slices], atol=1e-9)
    assert_allclose(posterior.log_likelihood(z), alone.log_likelihood(w))
    assert_allclose(posterior.log_prior(z), alone.log_prior(w))
    mine, theirs = posterior.summary(z), alone.summary(w)
    assert set(mine) == set(theirs) == {*posterior.priors, "delta_power"} - {"delta", "w"}
    for name in mine:
        assert_allclose(mine[name], theirs[name])


def test_simulated_data_are_the_same_on_any_number_of_ranks():
    posterior, alone = both()
    (z, data), (_, expected) = posterior.simulate(3), alone.simulate(3)
    for name in "density", "positive":
        for mine, whole_field in zip(data[name], expected[name], strict=True):
            assert_allclose(mine.value, whole_field.value[mine.slices], atol=1e-9)
    assert_allclose(join(data["lamps"]), expected["lamps"])
    assert_allclose(data["both"][1], expected["both"][1])
    new = posterior.with_data(data)
    assert new.objective(z) < posterior.objective(z)
    unchanged = posterior._map(lambda name, likelihood: likelihood.data)
    prints = [fingerprint(p.ingredients(), COMM) for p in (posterior, posterior.with_data(unchanged), new)]
    assert not differences(*prints[:2])
    changed = differences(prints[0], prints[2])
    assert changed and all(name.startswith("likelihoods") for name in changed)


def test_simulated_data_have_the_noise_that_was_asked_for():
    pm = make_mesh([16, 16, 16])
    one = pm.create("real", value=1.0)
    cases = dict(
        gaussian=(Gaussian(one, 0.5), 2.0, 0.5),
        counts=(Poisson(one, mean=3.0), 6.0, 6**0.5),
        few=(Poisson(one, mean=0.05), 0.1, 0.1**0.5),
        many=(Poisson(one, mean=5e11), 1e12, 1e6),
        coloured=(Gaussian(one, power=lambda k: 0.25 * pm.BoxSize.prod() / 4096 + 0 * k), 2.0, 0.5),
    )
    for likelihood, mean, sd in cases.values():
        posterior = Posterior(dict(x=Normal()), lambda x: one * 2.0 + x * 0.0, likelihood)
        _, data = posterior.simulate(1)
        found = data.csum() / 4096
        spread = np.sqrt((data - found).cnorm() / 4096)
        assert abs(found - mean) < 5 * sd / 64 and abs(spread / sd - 1) < 0.1
    counts = cases["counts"][0].draw(one * 2.0, lambda x: x, 1, "a").value
    assert (counts == np.round(counts)).all() and counts.min(initial=0) >= 0


def test_what_is_masked_does_not_matter_and_hears_nothing():
    pm = make_mesh(CUBE)
    mask = pm.create("real", value=1.0)
    mask.value[...] = (np.arange(512).reshape(CUBE) % 3 > 0)[mask.slices]
    hole = mask.value == 0
    answers = []
    for value in np.nan, np.inf, 7.0:
        data, strange = pm.create("real", value=2.0), pm.create("real", value=1.0)
        data.value[hole] = strange.value[hole] = value
        kinds = [kind(data, 0.5, mask) for kind in (Gaussian, Poisson, LogNormalNoise, LogDensity, Smoothed)]
        posterior = Posterior(dict(x=WhiteField(pm)), lambda x: dict(y=unary.exp(x) * strange), dict(y=kinds))
        z = posterior.draw(2)
        gradient, product = posterior.gradient(z)["x"], posterior.gauss_newton_product(z, z)["x"]
        exact = posterior.exact_product(z, z)["x"]
        answers.append(posterior.objective(z))
        for vector in gradient, product, exact:
            assert_array_equal(
                vector.value[hole], z["x"].value[hole] if np.isfinite(value) else vector.value[hole]
            )
        assert np.isfinite(gradient.value[~hole]).all() and np.isfinite(exact.value[~hole]).all()
        assert abs(gradient.value - z["x"].value)[~hole].min(initial=1) > 0
    assert np.isfinite(answers[0]) and answers[0] == answers[1] == answers[2]


def test_counts_of_parts_are_those_of_the_whole():
    rate = np.linspace(0.0, 5.0, 11)
    whole_counts = Poisson(np.zeros(11), 2.0).draw(rate, lambda x: x, 3, "a")
    parts = Poisson(split(np.zeros(11)), 2.0, comm=COMM).draw(split(rate), lambda x: x, 3, "a")
    assert_array_equal(join(parts), whole_counts)
    assert whole_counts[0] == 0 and whole_counts.max() > 3
    with pytest.raises(ValueError, match="rates of counts"):
        Poisson(split(np.zeros(11)), comm=COMM).draw(split(rate - 1.0), lambda x: x, 3, "a")


def bad_field(pm, value):
    """A field of which one cell, on the last rank that has any, is bad."""
    field = pm.create("real", value=1.0)
    owner = max(rank for rank, n in enumerate(COMM.allgather(field.value.size)) if n)
    if COMM.rank == owner:
        field.value.flat[0] = value
    return field


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda one, bad: Gaussian(bad(np.nan)), "finite where the mask is 1"),
        (lambda one, bad: Gaussian(one, bad(-0.5)), "sigma must be .*positive"),
        (lambda one, bad: Gaussian(one, bad(0.0)), "sigma must be .*positive"),
        (lambda one, bad: Gaussian(one, 1.0, bad(0.5)), "a mask is 1 where"),
        (lambda one, bad: Gaussian(one, np.ones(3)), "sigma must be of the shape"),
        (lambda one, bad: Gaussian(one, 1.0, one, power=lambda k: k), "without a mask"),
        (lambda one, bad: Gaussian(one, "n", amplitude="m"), "no amplitude besides"),
        (lambda one, bad: Poisson(bad(0.5)), "whole numbers"),
        (lambda one, bad: Poisson(bad(-1.0)), "whole numbers"),
        (lambda one, bad: Poisson(one, bad(0.0)), "counts where the mean is 0"),
        (lambda one, bad: LogNormalNoise(bad(0.0)), "must be positive"),
        (lambda one, bad: Smoothed(np.ones(3)), "a field"),
        (lambda one, bad: Gaussian(one * 1j if False else np.array(["a"])), "real numbers"),
    ],
)
def test_bad_data_are_told_on_all_ranks(make, message):
    pm = make_mesh(CUBE)
    with pytest.raises((ValueError, TypeError), match=message):
        make(pm.create("real", value=1.0), functools.partial(bad_field, pm))


def test_a_prediction_on_another_mesh_is_told_on_all_ranks():
    data = Gaussian(real(make_mesh(CUBE)), 1.0)
    small = make_mesh([4, 4, 4])
    posterior = Posterior(dict(x=WhiteField(small)), lambda x: x * 1.0, data)
    with pytest.raises(ValueError, match="mesh"):
        posterior.objective(posterior.zeros())
    posterior = Posterior(dict(x=Normal([0, 0])), None, dict(x=Gaussian(np.zeros(3))))
    with pytest.raises(ValueError, match=r"of the shape \(2,\), and the data are of the shape \(3,\)"):
        posterior.objective(posterior.zeros())


# The posterior as a whole


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: Posterior({}, None, d), "at least one prior"),
        (lambda d: Posterior(dict(x=1.0), None, d), "must be a Prior"),
        (lambda d: Posterior(dict(x_=Normal()), None, d), "no name for a parameter"),
        (lambda d: Posterior(dict(x=Normal("y")), None, d), "'x' depends on 'y'"),
        (lambda d: Posterior(dict(x=Normal("y"), y=Normal("x")), None, dict(x=d)), "depend on each other"),
        (lambda d: Posterior(dict(bias=Normal()), lambda bia: bia, d), "needs 'bia'.*did you mean 'bias'"),
        (lambda d: Posterior(dict(x=Normal()), None, dict(xx=d)), "no result 'xx'.*did you mean 'x'"),
        (lambda d: Posterior(dict(x=Normal()), None, dict(x=3.0)), "a likelihood was expected"),
        (lambda d: Posterior(dict(x=Normal()), lambda x: 1.0, d), "must return a symbol"),
        (lambda d: Posterior(dict(x=Normal()), 3, d), "function of symbols"),
        (
            lambda d: Posterior(dict(x=Normal()), lambda x: dict(x=x), dict(x=d)),
            "has the name of a parameter",
        ),
        (
            lambda d: Posterior(dict(x=Normal()), None, dict(x=Gaussian(np.zeros(1), "noise"))),
            "no parameter or result 'noise'",
        ),
        (lambda d: Posterior(dict(x=Normal()), None, dict(x=d)).latents({}), "values are needed of all"),
    ],
)
def test_what_is_no_posterior(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(Gaussian(np.zeros(())))


@pytest.mark.skipif(COMM.size == 1, reason="needs several ranks")
def test_ranks_that_differ_are_told():
    with pytest.raises(ValueError):
        Posterior(dict(x=Normal()), None, dict(x=Gaussian(np.array(float(COMM.rank)))))
    with pytest.raises(PlacementError, match="mpi.place"):
        posterior = Posterior(dict(x=Normal()), lambda x: x * split(TIMES), Gaussian(split(TIMES), comm=COMM))
        posterior.objective(posterior.zeros())


def line(spread):
    """A straight line through data: a and b normal, the noise known. The exact posterior is normal."""
    part, comm = (split, COMM) if spread else (lambda x: x, None)
    data = part(1.0 + 2.0 * TIMES + 0.1 * np.cos(7 * TIMES))
    where = "partitioned" if spread else "replicated"

    def forward(a, b):
        return a + b * mpi.place(part(TIMES), where, COMM)

    return Posterior(
        dict(a=Normal(0.5, 2.0), b=Normal(0.0, 3.0)), forward, Gaussian(data, 0.2, comm=comm), comm=COMM
    )


@pytest.mark.parametrize("spread", [False, True])
def test_a_conjugate_model_has_its_exact_posterior(spread):
    posterior = line(spread)
    design = np.stack([np.ones(9), TIMES], axis=1)
    data = 1.0 + 2.0 * TIMES + 0.1 * np.cos(7 * TIMES)
    precision = design.T @ design / 0.04 + np.diag([1 / 4, 1 / 9])
    mean = np.linalg.solve(precision, design.T @ data / 0.04 + [0.5 / 4, 0.0])
    state = TrustRegionCG(gtol=1e-12).minimize(posterior, posterior.zeros())
    found = posterior.values(state.x)
    assert_allclose([found["a"], found["b"]], mean, rtol=1e-9)
    scale = np.array([2.0, 3.0])
    for product in posterior.gauss_newton_product, posterior.exact_product:
        H = np.array([list(product(state.x, dict(a=a, b=b)).values()) for a, b in np.eye(2)])
        assert_allclose(np.diag(1 / scale) @ H @ np.diag(1 / scale), precision, rtol=1e-9)
    evidence = scipy_stats.multivariate_normal(
        design @ [0.5, 0.0], design @ np.diag([4, 9]) @ design.T + 0.04 * np.eye(9)
    ).logpdf(data)
    laplace = (
        posterior.log_likelihood(state.x)
        + posterior.log_prior(state.x)
        + np.log(2 * np.pi)
        - 0.5 * np.linalg.slogdet(H)[1]
    )
    assert_allclose(laplace, evidence)


def test_the_gradient_is_that_of_a_formula():
    """Counts with a rate exp(a + b t), in NumPy."""
    counts = np.array([1, 0, 2, 3, 2, 5, 4, 9, 12])
    posterior = Posterior(
        dict(a=Normal(0, 2), b=Uniform(-3, 3)),
        lambda a, b: unary.exp(a + b * mpi.place(TIMES, "replicated", COMM)),
        Poisson(counts),
        comm=COMM,
    )

    def formula(z):
        a, b = 2 * z[0], -3 + 6 * scipy_stats.norm.cdf(z[1])
        return 0.5 * z @ z - scipy_stats.poisson.logpmf(counts, np.exp(a + b * TIMES)).sum()

    z, h = np.array([0.1, 0.3]), 1e-6
    found = posterior.gradient(dict(a=z[0], b=z[1]))
    expected = [(formula(z + h * e) - formula(z - h * e)) / (2 * h) for e in np.eye(2)]
    assert_allclose([found["a"], found["b"]], expected, rtol=1e-6)
    at = dict(a=z[0], b=z[1])
    assert_allclose(-posterior.log_likelihood(at) + 0.5 * z @ z, formula(z))
    prove(posterior, at, dict(a=1.0, b=-0.5))
    rate = np.exp(0.2 + posterior.values(at)["b"] * TIMES)
    J = np.stack([2 * rate, rate * TIMES * 6 * scipy_stats.norm.pdf(0.3)])
    fisher = J @ np.diag(1 / rate) @ J.T + np.eye(2)
    H = np.array([list(posterior.gauss_newton_product(at, dict(a=a, b=b)).values()) for a, b in np.eye(2)])
    assert_allclose(H, fisher)


def test_a_density_that_cannot_be_computed_is_zero():
    posterior = Posterior(dict(x=Normal()), None, dict(x=Poisson(np.array(2))))
    assert posterior.objective(dict(x=-1.0)) == np.inf
    posterior = Posterior(dict(x=Normal(), n=Normal()), None, dict(x=Gaussian(np.array(2.0), "n")))
    assert posterior.objective(dict(x=0.0, n=-1.0)) == np.inf


def test_autooperators_serve():
    pm = make_mesh(CUBE)
    q = pm.generate_uniform_particle_grid(shift=0.5)
    power = LinearPower(Planck15)
    forward = WhiteNoiseOperator.bind(power=power, q=q, stages=[1.0], cosmology=Planck15, pm=pm)
    data = real(pm)
    one = Posterior(dict(x=WhiteField(pm)), forward, dict(fs=Gaussian(data, 2.0)))
    two = Posterior(dict(delta=LinearField(pm)), Density(pm, [1.0]), dict(density=Gaussian(data, 2.0)))
    z = one.draw(1)
    assert_allclose(one.objective(z), two.objective(dict(delta=z["x"])))
    assert set(one.predict(z)) == {"s", "fs"}
    assert_allclose(one.predict(z)["fs"].value, two.predict(dict(delta=z["x"]))["density"].value)


def test_states_are_saved_and_resumed(tmp_path):
    posterior, path = line(True), str(COMM.bcast(str(tmp_path))) + "/state"
    optimizer = LBFGS(gtol=1e-10)
    state = optimizer.minimize(posterior, posterior.zeros())
    state.save(path)
    again = State.load(path, posterior.vs, posterior.zeros(), posterior)
    assert again.x == state.x


def test_words():
    posterior, _ = both()
    (words,) = set(COMM.allgather(repr(posterior)))
    lines = words.splitlines()
    assert lines[0] == "Posterior of 529 latents" and len(lines) == 1 + 9 + 10
    assert "  b        ~ Normal(mean='mu', sd=0.3)" in lines
    assert any("Gaussian of 409 data (sigma=field" in line for line in lines)


# Forward models

MODELS = {
    "linear": dict(bias="eulerian", los=2),
    "perturbation theory": dict(stages=[1.0], bias="lagrangian", los=0),
    "all terms": dict(stages=[1.0], bias="lagrangian", terms=("b1", "b2", "bs2", "bnabla2")),
    "steps": dict(stages=[0.4, 1.0], bias="eulerian", observer=[-20.0, 3.0, 5.0]),
}


@pytest.mark.parametrize("name", MODELS if COMM.size == 1 or soaking() else ["perturbation theory"])
def test_forward_models(name):
    pm = make_mesh(CUBE)
    selection = pm.create("real", value=0.8)
    forward = Density(pm, depends="Om0", selection=selection, **MODELS[name])
    listed = dict(
        delta=LinearField(pm, depends="Om0 sigma8"),
        Om0=TruncatedNormal(0.3, 0.05, 0.1, 0.6),
        sigma8=priors.LogNormal(-1.0, 0.1),
    )
    listed |= {term: Normal(1.0 if term == "b1" else 0.0, 0.2) for term in forward.terms}
    posterior = Posterior(listed, forward, dict(density=Poisson(selection * 0 + 1.0, mean=3.0, floor=0.1)))
    prove(posterior, posterior.draw(5), posterior.draw(8), rtol=1e-5, second=COMM.size == 1)
    found = posterior.predict(posterior.zeros())["density"]
    assert_allclose(found.value, 0.8, rtol=1e-6)  # no modes, no structure


def test_a_free_cosmology_at_its_own_values_changes_nothing():
    pm = make_mesh(CUBE)
    options = dict(stages=[0.5], bias="eulerian", los=1)
    z = dict(delta=WhiteField(pm).space(COMM).normal(WhiteField(pm).zeros(), 1), b1=0.0)
    data = dict(density=Gaussian(real(pm)))
    fixed = Posterior(dict(delta=LinearField(pm), b1=Normal(2, 1)), Density(pm, **options), data)
    listed = dict(delta=LinearField(pm), b1=Normal(2, 1), Om0=Normal(Planck15.Om0, 0.1))
    free = Posterior(listed, Density(pm, depends="Om0", **options), data)
    found = free.predict(dict(z, Om0=0.0))["density"]
    assert_allclose(found.value, fixed.predict(z)["density"].value, atol=1e-8)
    assert (
        abs(free.predict(dict(z, Om0=1.0))["density"] - found).value.max(initial=0) > 1e-3
        or not found.value.size
    )


def test_linear_theory_in_redshift_space_is_that_of_kaiser():
    pm = make_mesh(CUBE)
    posterior = Posterior(
        dict(delta=LinearField(pm), b1=Normal()),
        Density(pm, bias="eulerian", los=1),
        dict(density=Gaussian(real(pm))),
    )
    z = posterior.draw(1)
    delta, found = posterior.values(z)["delta"], posterior.predict(z)["density"]
    k = delta.x
    k2 = sum(ki**2 for ki in k)
    mu2 = k[1] ** 2 / np.where(k2 == 0, 1, k2)
    f = float(Planck15.background(a=np.array([1.0])).f1(1.0))
    expected = delta * 1.0
    expected.value[...] = delta.value * (z["b1"] + f * mu2)
    assert_allclose(found.value, 1 + expected.c2r().value, atol=1e-9)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(depends="Om"), "did you mean 'Om0'"),
        (dict(bias="linear"), "bias"),
        (dict(bias="lagrangian"), "give stages"),
        (dict(bias="none", terms=("b1",)), "other ones"),
        (dict(stages=[1.0], bias="lagrangian", terms=("b3",)), "terms must be some of"),
        (dict(stages=[1.0], los=1, observer=[0, 0, 0]), "either los or observer"),
        (dict(observer=[0, 0, 0]), "needs a line of sight"),
        (dict(selection=3.0), "expected a real field"),
    ],
)
def test_forward_models_that_cannot_be(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Density(make_mesh(CUBE), **options)


# Out of the domain


def dark(mean=0.3, sd=0.15, **more):
    """Of Om0, by the expansion rate at redshift one of which little is known, and of a field that knows nothing of it."""
    pm = make_mesh([4, 4, 4])

    def forward(Om0, delta):
        return dict(rate=Cosmology(Om0=Om0).efunc(1.0), density=delta * 1.0)

    data = dict(rate=Gaussian(np.array(1.0), sigma=1.0), density=Gaussian(real(pm), 2.0))
    return Posterior(dict(Om0=Normal(mean, sd), delta=WhiteField(pm)), forward, data, **more)


def test_a_parameter_beyond_its_limits_has_no_density():
    problem = dark()
    z, v = problem.draw(1), problem.draw(2)
    for Om0 in -2.5, 500.0, np.inf:
        outside = dict(z, Om0=Om0)
        assert problem.objective(outside) == np.inf
        assert np.isnan(problem.gradient(outside)["Om0"])
        assert np.isnan(problem.gradient(outside)["delta"].value).all()
        with pytest.raises(
            ValueError, match="where the density is zero: the .* 'rate' .* Om0 must be|Om0' is not finite"
        ):
            problem.gauss_newton_product(outside, v)
    assert problem.log_likelihood(dict(z, Om0=-2.5)) == -np.inf
    assert np.isfinite(problem.objective(z))
    prove(problem, z, v)
    # The gradient may be asked for first, or with the objective
    assert np.isnan(dark().gradient(outside)["Om0"])
    y, slope = problem.value_and_gradient(outside)
    assert y == np.inf and np.isnan(slope["Om0"]) and np.isnan(slope["delta"].value).all()
    assert np.isfinite(problem.value_and_gradient(z)[1]["Om0"])
    # A cosmology of a field may have less matter than baryons
    pm = make_mesh(CUBE)
    free = dict(delta=LinearField(pm, depends="Om0"), Om0=Normal(0.3, 0.1))
    field = Posterior(free, lambda delta: fastpm.c2r(delta), Gaussian(real(pm), 1.0))
    assert field.objective(dict(field.zeros(), Om0=-2.7)) == np.inf
    told = "the parameter 'delta' has no value: the wiggles need baryons, 0 < Ob0 < Om0"
    assert field.explain(dict(field.zeros(), Om0=-2.7)).startswith(told)


WALKERS = [
    HMC(step=0.6, length=2.0, draws=60),
    NUTS(step=0.6, maxdepth=3, draws=40),
    MCLMC(step=3.0, length=20.0, draws=120),
    MAMS(step=3.0, length=9.0, draws=50),
]


@pytest.mark.parametrize(
    "sampler", WALKERS if COMM.size == 1 or soaking() else WALKERS[:1], ids=lambda s: type(s).__name__
)
def test_a_trajectory_that_leaves_the_domain_is_rejected(sampler):
    sampler.warmup, sampler.metric, sampler.seed = 0, None, 4
    problem = dark(0.15, 0.15)
    chain = sampler.sample(problem, problem.zeros())
    Om0, left = chain.draws["Om0"], np.isinf(chain.stats["energy_error"])
    assert 3 < left.sum() < 40 and left[chain.stats["divergent"]].all()
    assert (Om0 > 0).all() and len(np.unique(Om0)) > 12
    assert f"({left.sum()} where the density is no number)" in chain.message


def test_a_warm_up_at_the_edge_of_the_domain():
    problem = dark(0.1, 0.04)
    for sampler in NUTS(warmup=15, draws=5, maxdepth=3), MCLMC(warmup=30, draws=5):
        chain = sampler.sample(problem, dict(problem.zeros(), Om0=-2.4))
        assert len(chain) == 5 and (chain.draws["Om0"] > 0).all()


def test_a_line_search_that_leaves_the_domain_steps_back():
    problem = Posterior(
        dict(Om0=Normal(0.3, 0.2)),
        lambda Om0: Cosmology(Om0=Om0).efunc(1.0),
        Gaussian(np.array(0.5), sigma=0.01),
        comm=COMM,
    )
    values = []

    def watched(x, forward=problem._objective):
        values.append(forward(x))
        return values[-1]

    problem._objective = watched
    state = LBFGS(maxiter=15).minimize(problem, problem.zeros())
    assert np.isinf(values).any() and np.isfinite(state.history["y"]).all()
    assert 0 < problem.values(state.x)["Om0"] < 0.01
    state = TrustRegionCG(maxiter=15).minimize(problem, problem.zeros())
    assert 0 < problem.values(state.x)["Om0"] < 0.1


@operator
class mistaken:
    """An operator of somebody who has made a mistake."""

    ain, aout = "x", "y"
    placements = staticmethod(lambda site: site.given["x"])

    def apl(node, x):
        raise ValueError("shapes (3,) and (2,) do not fit")

    def vjp(node, _y):
        return dict(_x=_y)

    def jvp(node, x_):
        return dict(y_=x_)


def test_mistakes_are_no_densities_of_zero():
    for forward, words in (
        (lambda x: mistaken(x * 1.0), "do not fit"),
        (lambda x: Cosmology(Om0=x).efunc(1.0), "must be one number"),
    ):
        shape = () if "fit" in words else 3
        problem = Posterior(dict(x=Normal(0.3, 0.1, shape)), forward, Gaussian(np.array(1.0)), comm=COMM)
        with pytest.raises((ValueError, TypeError), match=words):
            problem.objective(problem.zeros())
    with pytest.raises(OutOfDomain):
        dark().predict(dict(dark().zeros(), Om0=-2.5))  # what a user asks for is answered


def test_a_start_without_a_density_is_told_by_its_part():
    pm = make_mesh([4, 4, 4])
    mask = pm.create("real", value=1.0)

    def forward(b, delta):
        return dict(rate=unary.log(b) + 1.0, density=delta * b)

    data = dict(
        rate=Gaussian(np.array(1.0)),
        density=[Gaussian(real(pm), 2.0, mask), Poisson(mask, mean=2.0), LogDensity(mask, 1.0, mask)],
    )
    problem = Posterior(dict(b=Normal(1, 1), delta=WhiteField(pm)), forward, data)
    z = dict(problem.zeros(), delta=mask * 1.0)
    assert problem.explain(z) == "" and np.isfinite(problem.objective(z))
    one = pm.create("real", value=1.0)
    if COMM.rank == COMM.allreduce(COMM.rank if one.value.size else -1, op=MPI.MAX):
        one.value[0, 0, 0] = -1.0
    cases = [
        (dict(z, b=-3.0), r"the result 'rate' of the forward model is not finite"),
        (dict(z, delta=one), r"the likelihood of 'density', Poisson of 64 data .* is not finite"),
    ]
    for start, words in cases:
        for run in LBFGS().minimize, HMC(warmup=0, draws=1).sample, MCLMC(warmup=0, draws=1).sample:
            with pytest.raises(ValueError, match=f"the objective is inf at the starting point.*{words}"):
                run(problem, start)
    large = Posterior(dict(b=priors.LogNormal(0, 1)), lambda b: b * 1.0, Gaussian(np.array(1.0)), comm=COMM)
    with pytest.raises(ValueError, match="the parameter 'b' is not finite"):
        LBFGS().minimize(large, dict(b=1e5))
    # A problem that knows nothing of its parts says nothing of them
    with pytest.raises(ValueError, match="the objective is nan at the starting point x0; choose another x0"):
        LBFGS().minimize(Problem(lambda x: np.nan, lambda x: x), 1.0)

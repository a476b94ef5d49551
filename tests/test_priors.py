"""Priors of numbers, and mistakes in the names of a problem: what needs no other ranks."""

import numpy as np
import pytest
import scipy.stats as scipy_stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from helpers import examples
from vmad_lit import Builder, testing
from vmad_lit.contrib.likelihoods import poisson_loss, twice_root
from vmad_lit.contrib.optimize import Problem
from vmad_lit.contrib.priors import (
    correlated,
    CorrelatedNormal,
    LogNormal,
    Normal,
    TruncatedNormal,
    Uniform,
    WhiteField,
)
from vmad_lit.core.error import UnexpectedOutput


def two_inputs():
    with Builder() as m:
        x, y = m.input("x", "y")
        m.output(chi2=x * x + y * y, a=x, b=y)
    return m


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(objective="chi"), "did you mean 'chi2'"),
        (dict(residuals="c"), "no output 'c'"),
        (dict(x="xx"), "did you mean 'x'"),
        (dict(x="x"), "no value is given for the inputs y"),
        (dict(given=dict(x=1.0, y=1.0)), "no input to vary"),
        (dict(x=np.ones(3)), r"x must be a name, or a list of names, not a value \(ndarray\)"),
        (dict(x=3.0), "x must be a name"),
        (dict(residuals=np.zeros((2, 2))), "residuals must be a name"),
    ],
)
def test_mistakes_in_the_names(options, message):
    options = dict(objective="chi2") | options
    with pytest.raises((TypeError, ValueError, UnexpectedOutput), match=message):
        Problem.from_model(two_inputs(), options.pop("objective"), **options)


bounded = st.floats(-3, 3)
positive = st.floats(0.1, 3)
NUMBERS = {
    "normal": (lambda a, s, w: Normal(a, s), lambda a, s, w: scipy_stats.norm(a, s)),
    "log-normal": (
        lambda a, s, w: LogNormal(a, s),
        lambda a, s, w: scipy_stats.lognorm(s, scale=np.exp(a)),
    ),
    "uniform": (lambda a, s, w: Uniform(a, a + w), lambda a, s, w: scipy_stats.uniform(a, w)),
    "truncated": (
        lambda a, s, w: TruncatedNormal(a, s, a - 2 * w, a + w * s),
        lambda a, s, w: scipy_stats.truncnorm(-2 * w / s, w, a, s),
    ),
    "tail": (
        lambda a, s, w: TruncatedNormal(a, s, a + 8 * s, np.inf),
        lambda a, s, w: scipy_stats.truncnorm(8, np.inf, a, s),
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
@settings(max_examples=examples(10))
@given(a=bounded, s=positive, w=positive, z=st.lists(st.floats(-4, 4), min_size=1, max_size=4))
def test_priors_of_numbers(name, a, s, w, z):
    prior, law = (make(a, s, w) for make in NUMBERS[name])
    z = np.array(z)
    x = prior.value(z)
    assert_allclose(law.cdf(x), scipy_stats.norm.cdf(z), rtol=1e-7, atol=1e-12)
    assert_allclose(prior.log_density(x), law.logpdf(x), rtol=1e-7, atol=1e-7)
    assert_allclose(prior.inverse(x), z, atol=1e-6)
    h = 1e-4
    slope = (prior.value(z + h) - prior.value(z - h)) / (2 * h)
    assert_allclose(prior.slope(z), slope, rtol=1e-6, atol=1e-7)
    assert_allclose(prior.bend(z), (prior.slope(z + h) - prior.slope(z - h)) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "prior",
    [
        Normal(1, [1, 2]),
        LogNormal([0, 1]),
        Uniform([0, 0], 3),
        TruncatedNormal([0, 1], 1, -1),
        CorrelatedNormal([1, 2], [[2, 1], [1, 1]]),
    ],
    ids=repr,
)
def test_maps_of_priors_have_two_derivatives(prior):
    with Builder() as m:
        m.output(y=prior.express(m.input("z"), {}, None))
    z = np.array([0.3, -1.2])
    testing.check(m, z=z)
    y = m.compute("y", dict(z=z))
    assert_allclose(prior.latent(y, {}), z, atol=1e-12)
    jacobian = np.array([m.compute_with_jvp("y", dict(z=z), dict(z_=e))[1] for e in np.eye(2)])
    density = -0.5 * z @ z - np.log(2 * np.pi) - np.linalg.slogdet(jacobian)[1]
    assert_allclose(np.sum(prior.log_density(y)), density)


def test_tails_are_finite_and_go_the_right_way():
    for prior in (
        Uniform(-1, 3),
        TruncatedNormal(0, 1, -1, 2),
        TruncatedNormal(0, 1, 30, 31),
        TruncatedNormal(0, 1, high=-20),
    ):
        z = np.array([-37.0, -10, -8, 0, 8, 10, 37])
        x = prior.value(z)
        assert np.isfinite(x).all() and (np.diff(x) >= 0).all()
        assert (prior.slope(z) >= 0).all() and np.isfinite(prior.bend(z)).all()
        inner = np.array([-5.0, -3, 3, 5])
        assert_allclose(prior.inverse(prior.value(inner)), inner, rtol=1e-7)
    far = TruncatedNormal(0, 1, 45)  # where the upper tail is less than the smallest number
    assert_allclose(far.value(0.0) - 45, np.log(2) / 45, rtol=1e-3)
    assert_allclose(far.log_density(45.001), np.log(45) - 0.045, rtol=1e-3)
    assert Uniform(0, 1).value(-30.0) > 0  # and not 0, although 1 - 1e-198 is 1
    assert TruncatedNormal(0, 1, 8).log_density(7.9) == -np.inf


def test_correlated_numbers():
    mean, covariance = [1.0, -2.0, 0.0], np.array([[2.0, 0.5, 0.1], [0.5, 1.0, 0.0], [0.1, 0.0, 3.0]])
    prior, x = CorrelatedNormal(mean, covariance), np.array([0.3, 0.1, 1.0])
    assert_allclose(prior.log_density(x), scipy_stats.multivariate_normal(mean, covariance).logpdf(x))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Normal(0, 0), "sd must be positive and finite"),
        (lambda: Normal(np.nan, 1), "mean must be finite"),
        (lambda: Normal([0, 1], 1, shape=3), "do not fit|broadcast"),
        (lambda: Uniform(2, 1), "low must be below high"),
        (lambda: TruncatedNormal(0, 1, 3, 3), "low must be below high"),
        (lambda: Uniform(0, 1).latent(2.0, {}), "between its bounds"),
        (lambda: LogNormal().latent(-1.0, {}), "must be positive"),
        (lambda: Normal().latent([1.0, 2.0], {}), r"shape \(\)"),
        (lambda: CorrelatedNormal([0, 0], [[1, 2], [2, 1]]), "eigenvalue -1"),
        (lambda: CorrelatedNormal([0, 0], [[1, 2], [0, 1]]), "symmetric"),
        (lambda: WhiteField(8), "ParticleMesh"),
    ],
)
def test_priors_that_cannot_be(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_derivatives_of_operators_of_priors_and_likelihoods():
    rng = np.random.default_rng(4)
    testing.check(correlated, rng.normal(size=3), rng.normal(size=(4, 3)))
    rate, seen = rng.uniform(0.5, 3, 6), np.array([1, 1, 0, 1, 1, 1], "?")
    testing.check(poisson_loss, rate, rng.poisson(rate).astype("f8"), seen)
    testing.check(twice_root, rate, seen)

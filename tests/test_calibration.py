"""Simulation-based calibration of exact, and of wrong, samplers."""

import numpy as np
import pytest

from vmad_lit.contrib.calibration import Calibration, calibrate, plot_ranks


class Conjugate:
    """A number with a normal prior, measured with normal noise: the posterior is known."""

    def __init__(self, data=0.0, sigma=0.5):
        self.data, self.sigma = data, sigma

    def simulate(self, seed):
        z, n = np.random.default_rng(seed).normal(size=2)
        return z, z + self.sigma * n

    def with_data(self, data):
        return type(self)(data, self.sigma)

    def summary(self, z):
        return dict(z=z, two=np.array([z, -z]))

    def draw(self, seed, widen=1.0, shift=0.0, number=40):
        precision = 1 + self.sigma**-2
        mean = self.data * self.sigma**-2 / precision + shift
        z = mean + widen * precision**-0.5 * np.random.default_rng([seed, 1]).normal(size=number)
        return dict(z=z, two=np.stack([z, -z], axis=1))


def test_an_exact_sampler_is_uniform():
    found = calibrate(Conjugate(), lambda p, seed: p.draw(seed), simulations=400, levels=39)
    assert len(found) == 400 and found.ranks["two"].shape == (400, 2)
    assert found.ranks["z"].min() >= 0 and found.ranks["z"].max() == 39
    np.testing.assert_array_equal(found.ranks["two"][:, 1], 39 - found.ranks["z"])
    assert found.pvalue() > 0.01
    counts, expected = found.histogram("z", 8)
    assert counts.sum() == 400 and np.all(expected == 50)


@pytest.mark.parametrize("fault", [dict(widen=0.7), dict(widen=1.4), dict(shift=0.15)], ids=str)
def test_a_wrong_sampler_is_found_out(fault):
    found = calibrate(Conjugate(), lambda p, seed: p.draw(seed, **fault), simulations=400, levels=39)
    assert found.pvalue() < 1e-3


def test_uniform_ranks_have_uniform_pvalues():
    draw = np.random.default_rng(1)
    ranks = draw.integers(0, 20, size=(300, 500))
    p = Calibration(19, dict(x=ranks)).pvalues(bins=10)["x"]
    assert p.shape == (500,) and abs(p.mean() - 0.5) < 0.05 and abs((p < 0.1).mean() - 0.1) < 0.04


def test_shifts_of_uniform_ranks_are_standard_normal_and_have_the_sign_of_the_truth():
    ranks = np.random.default_rng(2).integers(0, 20, size=(300, 2000))
    shifts = Calibration(19, dict(x=ranks)).shifts()["x"]
    assert shifts.shape == (2000,) and abs(shifts.mean()) < 0.1 and abs(shifts.std() - 1) < 0.06
    low = calibrate(
        Conjugate(), lambda p, seed: p.draw(seed, shift=-0.1), simulations=400, levels=39
    ).shifts()
    assert low["z"] > 2.5 and low["two"][0] > 2.5 and low["two"][1] < -2.5


def test_it_goes_on_where_it_was():
    whole = calibrate(Conjugate(), lambda p, seed: p.draw(seed), simulations=9, levels=5)
    part = calibrate(Conjugate(), lambda p, seed: p.draw(seed), 9, 5, monitor=lambda found: len(found) == 4)
    assert len(part) == 4 and "by 4 simulations" in repr(part)
    part = calibrate(Conjugate(), lambda p, seed: p.draw(seed), 9, 5, state=part)
    np.testing.assert_array_equal(part.ranks["z"], whole.ranks["z"])


def test_equal_values_are_shuffled():
    found = Calibration(4)
    for _ in range(200):
        found.add(dict(n=1), dict(n=np.ones(4)))
    assert np.bincount(found.ranks["n"]).min() > 20


def test_errors():
    with pytest.raises(ValueError, match="need as many draws"):
        Calibration(9).add(dict(a=1.0), dict(a=np.ones(4)))
    with pytest.raises(ValueError, match="levels must be"):
        Calibration(0)
    with pytest.raises(ValueError, match="no draws of 'b'"):
        Calibration(2).add(dict(b=1.0), dict(a=np.ones(4)))


def test_a_picture():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = calibrate(Conjugate(), lambda p, seed: p.draw(seed), simulations=50, levels=9)
    ax = plot_ranks(found, "two", bins=5, ax=plt.figure().gca())
    assert sum(bar.get_height() for bar in ax.patches) == 100
    plt.close("all")

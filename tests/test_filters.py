"""Filters with parameters: values, derivatives of first and second order, on any number of ranks."""

import numpy as np
import pytest
from mpi4py import MPI
from numpy.testing import assert_allclose

from helpers import make_mesh, modes, prove, real
from vmad_lit import Builder
from vmad_lit.lib import fastpm, linalg
from vmad_lit.lib.filters import WaveVector, filter, from_modes, mode_labels, moduli, multiply_modes, to_modes
from vmad_lit.lib.mesh import wavenumbers

COMM = MPI.COMM_WORLD
KINDS = [([5, 4], modes), ([4, 6, 5], real), ([8], real)]
if COMM.size > 1:  # pmesh transforms lines on one rank only
    del KINDS[2]


def run(build, **init):
    with Builder() as m:
        symbols = {name: m.input(name) for name in init}
        m.output(y=build(**symbols))
    return m.compute("y", init=init)


def power_law(k, A, n):
    return A * (0.1 + k) ** n


def squashed(k, b, f):
    return (b + f * k.cosine(0) ** 2) * np.exp(-0.1 * k.modulus**2)


@pytest.mark.collective
@pytest.mark.parametrize("nmesh, kind", KINDS)
class TestFilters:
    def test_values(self, nmesh, kind):
        pm = make_mesh(nmesh)
        x = kind(pm)
        k = wavenumbers(modes(pm))
        norm, cosine = k.normp(2) ** 0.5, k[0] / np.maximum(k.normp(2), 1e-30) ** 0.5
        for isotropic, factors in (
            (True, 2.0 * (0.1 + norm) ** -0.5),
            (False, (1.5 + 0.5 * cosine**2) * np.exp(-0.1 * norm**2)),
        ):
            expected = modes(pm)
            expected.value[...] *= factors
            expected = expected.c2r() if kind is real else expected
            f, params = (power_law, (2.0, -0.5)) if isotropic else (squashed, (1.5, 0.5))
            y = run(
                lambda x, a, b, f=f, i=isotropic: filter(x, f, a, b, isotropic=i),
                x=x,
                a=params[0],
                b=params[1],
            )
            assert type(y) is type(x)
            assert_allclose(y.value, expected.value, atol=1e-12)
            constant = run(lambda x, f=f, p=params, i=isotropic: filter(x, f, *p, isotropic=i), x=x)
            assert_allclose(constant.value, y.value, atol=1e-13)

    @pytest.mark.parametrize("isotropic", [True, False])
    def test_derivatives(self, nmesh, kind, isotropic):
        pm = make_mesh(nmesh)
        f = power_law if isotropic else squashed
        inputs = dict(x=kind(pm), a=1.3, b=0.7)
        tangents = dict(x=kind(pm, 2), a=0.4, b=-0.8)
        model = lambda x, a, b: filter(x, f, a, b, isotropic=isotropic)
        assert prove(model, inputs, tangents, replicated=["a", "b"])
        of_number = lambda x, a, b: linalg.to_scalar(model(x, a, b))
        assert prove(of_number, inputs, tangents, replicated=["a", "b"])


@pytest.mark.collective
def test_arrays_of_parameters_and_the_mean():
    pm = make_mesh([5, 4])
    hat = lambda k, a, n: linalg.sum(
        linalg.stack([linalg.take(a, i, axis=0) * k ** (i + n) for i in range(3)]), axis=0
    )
    model = lambda x, a, n, mean: filter(x, hat, a, n, mean=mean)
    inputs = dict(x=real(pm), a=np.array([1.0, 0.5, -0.2]), n=-1.5, mean=2.0)
    tangents = dict(x=real(pm, 2), a=np.array([0.3, -1.0, 0.2]), n=0.4, mean=-1.0)
    assert prove(model, inputs, tangents, replicated=["a", "n", "mean"])
    y = run(model, **inputs)
    assert_allclose(y.cmean(), 2.0 * inputs["x"].cmean())


@pytest.mark.collective
def test_complex_factors_of_each_mode():
    pm = make_mesh([5, 4, 3])
    shift = lambda x, s, t: filter(
        x, lambda k, s, t: np.exp(-1j * (k[0] * s + k[-1] * t)), s, t, isotropic=False
    )
    inputs, tangents = dict(x=modes(pm), s=0.3, t=-0.2), dict(x=modes(pm, 2), s=1.0, t=0.5)
    assert prove(shift, inputs, tangents, replicated=["s", "t"])
    factor = np.random.default_rng([1, COMM.rank]).normal(size=(2, *modes(pm).shape))
    inputs = dict(x=modes(pm), factor=factor[0] + 1j * factor[1])
    tangents = dict(x=modes(pm, 2), factor=factor[1] - 1j * factor[0])
    assert prove(multiply_modes, inputs, tangents)
    inputs["factor"], tangents["factor"] = factor[0][:, :1], factor[1][:, :1]
    assert prove(multiply_modes, inputs, tangents)


@pytest.mark.collective
def test_a_function_without_k_is_a_number():
    x = real(make_mesh([4, 6]))
    for isotropic in True, False:
        y = run(lambda x, b, i=isotropic: filter(x, lambda k, b: b, b, isotropic=i), x=x, b=1.5)
        assert_allclose(y.value, 1.5 * x.value, atol=1e-12)
    _, [g] = gradient(lambda x, b: linalg.to_scalar(filter(x, lambda k, b: b, b, isotropic=False)), x, b=1.5)
    assert_allclose(g, 3.0 * x.cnorm())


def gradient(build, x, **params):
    with Builder() as m:
        m.output(y=build(x, *(m.input(name) for name in params)))
    [y], grads = m.compute_with_vjp(init=params, v=dict(_y=1.0))
    return y, grads


@pytest.mark.collective
def test_the_gradient_is_the_same_on_any_number_of_ranks():
    for isotropic, f in (True, power_law), (False, squashed):
        found = [
            gradient(
                lambda x, a, b, f=f, i=isotropic: linalg.to_scalar(filter(x, f, a, b, isotropic=i)),
                real(make_mesh([4, 6, 5], comm)),
                a=1.3,
                b=0.7,
            )
            for comm in (COMM, MPI.COMM_SELF)
        ]
        assert_allclose(found[0][0], found[1][0])
        assert_allclose(found[0][1], found[1][1])


@pytest.mark.collective
def test_single_precision_is_kept():
    x = real(make_mesh([4, 6], dtype="f4"))
    for isotropic, f in (True, power_law), (False, squashed):
        y = run(lambda x, a, b, f=f, i=isotropic: filter(x, f, a, b, isotropic=i), x=x, a=1.3, b=0.7)
        assert y.value.dtype == "f4"


@pytest.mark.collective
def test_parts_of_a_filter():
    pm = make_mesh([4, 6])
    k = run(lambda x: moduli(x, zero=False), x=real(pm))
    assert_allclose(k, fastpm.find_wavenumbers(pm))
    for which in "modulus", "cosine":
        assert run(lambda x, w=which: mode_labels(x, w, 1), x=modes(pm)).shape == modes(pm).shape
    assert prove(to_modes, dict(x=real(pm)), dict(x=real(pm, 2)))
    assert prove(to_modes, dict(x=modes(pm)), dict(x=modes(pm, 2)))
    assert prove(lambda x: from_modes(x, real(pm)), dict(x=modes(pm)), dict(x=modes(pm, 2)))


@pytest.mark.collective
def test_mistakes():
    x = real(make_mesh([4, 6]))
    with pytest.raises(TypeError, match="a filter is a function"):
        run(lambda x: filter(x, 3.0), x=x)
    with pytest.raises(TypeError, match="give no mean"):
        run(lambda x: filter(x, squashed, 1.0, 1.0, isotropic=False, mean=0.0), x=x)
    with pytest.raises(TypeError, match="not iterable"):
        list(WaveVector(None))
    with pytest.raises(Exception, match="no component 2"):
        run(lambda x: filter(x, lambda k: k[2], isotropic=False), x=x)
    with pytest.raises(Exception, match="broadcast"):
        run(lambda x: filter(x, lambda k: k.eval(lambda k: k[:3])), x=x)

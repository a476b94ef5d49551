"""Exact second derivatives: against central differences of gradients, in models of all forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples
from vmad_lit import Builder, ListPlaceholder, autooperator, operator
from vmad_lit.core.error import BadArgument, BrokenPrimitive
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.registry import overloaded


@operator
class cube:
    ain, aout = "x", "y"

    def apl(node, x):
        return x**3

    def vjp(node, _y, x):
        return dict(_x=_y * np.conj(3 * x**2))

    def jvp(node, x_, x):
        return dict(y_=x_ * 3 * x**2)

    def hvp(node, _y, x_, x):
        return dict(_x_=_y * np.conj(6 * x * x_))


@operator
class product:
    ain, aout = ("x1", "x2"), "y"

    def apl(node, x1, x2):
        return x1 * x2

    def vjp(node, _y, x1, x2):
        return dict(_x1=_y * np.conj(x2), _x2=_y * np.conj(x1) if node.needs("x2") else ZeroGradient)

    def jvp(node, x1_, x2_, x1, x2):
        return x1_ * x2 + x1 * x2_

    def hvp(node, _y, x1_, x2_):
        return dict(_x1_=_y * np.conj(x2_), _x2_=_y * np.conj(x1_) if node.needs("x2") else ZeroGradient)


@operator
class double:  # linear, without a jvp
    ain, aout = "x", "y"

    def apl(node, x):
        return 2 * x

    def vjp(node, _y):
        return 2 * _y


@operator
class norm2:
    ain, aout = "x", "y"

    def apl(node, x):
        return float(np.sum(np.real(np.conj(x) * x)))

    def vjp(node, _y, x):
        return 2 * _y * x

    def jvp(node, x_, x):
        return 2 * float(np.sum(np.real(np.conj(x) * x_)))

    def hvp(node, _y, x_):
        return 2 * _y * x_


@operator
class powers:
    """From a list of values to the lists of their squares and of nothing else."""

    ain, aout = "xs", "ys"

    def apl(node, xs):
        return dict(ys=[x * x for x in xs])

    def vjp(node, _ys, xs):
        return dict(_xs=[2 * _y * np.conj(x) for _y, x in zip(_ys, xs)])

    def jvp(node, xs_, xs):
        return dict(ys_=[2 * x * x_ for x, x_ in zip(xs, xs_)])

    def hvp(node, _ys, xs_):
        return dict(_xs_=[2 * _y * np.conj(x_) for _y, x_ in zip(_ys, xs_)])


@operator
class secretive:
    ain, aout = "x", "y"

    def apl(node, x):
        return np.sin(x)

    def vjp(node, _y, x):
        return _y * np.cos(x)

    def jvp(node, x_, x):
        return x_ * np.cos(x)


@autooperator("x, y -> z")
def inner(x, y, n):
    for i in range(n):
        x = product(x, cube(y))
    return x


@overloaded
class chosen:
    ain, aout = "x", "y"

    def apl(node, x):
        return x**3

    vjp, jvp, hvp = cube.prototype.vjp, cube.prototype.jvp, cube.prototype.hvp


@chosen.register
@operator
class chosen_of_float(secretive.prototype):
    ain = {"x": "float"}


def check(m, vout, init, v, cotangents=None):
    """Compare with central differences of gradients, and the gradient with that of the reverse sweep."""
    v = {name + "_": v[name] for name in v}
    given = dict(cotangents or {"_" + name: 1.0 for name in [vout]})
    out, gradient, product = m.compute_with_hvp(vout, init, {**v, **(cotangents or {})}, return_dict=True)
    h = 1e-5

    def gradient_at(sign):
        moved = {name: x + sign * h * v.get(name + "_", 0) for name, x in init.items()}
        return m.compute_with_vjp(moved, given, return_dict=True)[1]

    right, left = gradient_at(1), gradient_at(-1)
    reverse = m.compute_with_vjp(init, given, return_dict=True)[1]
    for name in init:
        np.testing.assert_allclose(gradient["_" + name], reverse["_" + name], rtol=1e-13)
        difference = (right["_" + name] - left["_" + name]) / (2 * h)
        np.testing.assert_allclose(product[f"_{name}_"], difference, rtol=1e-7, atol=1e-7)


def values(seed, complex):
    rng = np.random.default_rng(seed)
    x, y, v, w = rng.uniform(0.5, 1.5, (4, 5))
    if complex:
        x, y, v, w = (z + 1j * rng.uniform(-0.5, 0.5, 5) for z in (x, y, v, w))
    return dict(x=x, y=y), dict(x=v, y=w)


def straight(x, y):
    z = product(cube(x), double(y))
    return product(z, product(z, x))


def nested(x, y):
    return product(inner(x, y, n=2), inner(y, cube(x), n=1))


def forgetful(x, y):
    return inner.forgetful(x, double(y), n=3)


def with_lists(x, y):
    a, b = powers([x, product(x, y)], ys=ListPlaceholder(2))
    (c,) = powers([product(a, y)], ys=ListPlaceholder(1))
    return product(c, b)


def with_constants(x, y):
    return product(product(x, np.arange(5.0)), product(y, 3.0))


def by_choice(x, y):
    return product(chosen(x), chosen(product(x, y)))


MODELS = [straight, nested, forgetful, with_lists, with_constants, by_choice]


@pytest.mark.parametrize("formula", MODELS)
@settings(max_examples=examples(10))
@given(seed=st.integers(0, 1000), complex=st.booleans())
def test_models(formula, seed, complex):
    with Builder() as m:
        x, y = m.input("x", "y")
        m.output(L=norm2(formula(x, y)))
    check(m, "L", *values(seed, complex))


@pytest.mark.parametrize("formula", MODELS)
def test_symmetry(formula):
    with Builder() as m:
        x, y = m.input("x", "y")
        m.output(L=norm2(formula(x, y)))
    init, u = values(1, False)
    _, v = values(2, False)

    def times(v):
        return m.compute_with_hvp("L", init, {name + "_": v[name] for name in v}, return_dict=True)[2]

    a = sum(np.vdot(u[name], times(v)[f"_{name}_"]) for name in u)
    b = sum(np.vdot(v[name], times(u)[f"_{name}_"]) for name in u)
    assert a == pytest.approx(b, rel=1e-12)


def test_several_outputs_and_cotangents():
    with Builder() as m:
        x, y = m.input("x", "y")
        m.output(p=nested(x, y), q=product(x, x), r=x, c=3.0)
    init, v = values(3, True)
    w = dict(_p=np.arange(5) + 1j, _q=np.ones(5) * 1j, _r=np.ones(5), _c=1.0)
    check(m, ["p", "q", "r", "c"], init, v, w)


def test_list_output():
    with Builder() as m:
        x = m.input("x")
        m.output(ys=[cube(x), product(x, x)])
    [_, _], [gradient], [change] = m.compute_with_hvp("ys", dict(x=2.0), dict(x_=1.0, _ys=[1.0, 10.0]))
    assert (gradient, change) == (12 + 40, 12 + 20)


def test_precomputed():
    fixed = inner.precompute(x=2.0, y=3.0, n=1)
    with Builder() as m:
        x, y = m.input("x", "y")
        m.output(z=fixed(x, y))
    # z = x y^3 at the values of the tape: H = [[0, 3 y^2], [3 y^2, 6 x y]]
    _, gradient, change = m.compute_with_hvp("z", dict(x=2.0, y=3.0), dict(x_=1.0, y_=10.0))
    assert gradient == [27.0, 54.0] and change == [270.0, 27.0 + 360.0]


def test_without_curvature_nothing_is_called():
    with Builder() as m:
        x = m.input("x")
        m.output(y=double(double(x)))
    _, tape = m.compute(["y"], dict(x=1.0), return_tape=True)
    assert not any(node.primitive.kind == "hvp" for node in tape.get_hvp())
    assert m.compute_with_hvp("y", dict(x=1.0), dict(x_=1.0)) == (4.0, [4.0], [ZeroGradient])


def test_zero_at_run_time_is_not_passed_on():
    calls = []

    @operator
    class watched(cube.prototype):
        def hvp(node, _y, x_, x):
            calls.append((_y, x_))
            return _y * 6 * x * x_

    with Builder() as m:
        x, y = m.input("x", "y")
        m.output(a=watched(x), b=watched(y))
    init = dict(x=1.0, y=2.0)
    assert m.compute_with_hvp(["a", "b"], init, dict(x_=1.0))[2] == [6.0, ZeroGradient]
    assert m.compute_with_hvp(["a", "b"], init, dict(x_=1.0, y_=1.0, _a=0))[2] == [ZeroGradient, 12.0]
    assert calls == [(1.0, 1.0), (1.0, 1.0)]


def test_collective_operators_are_called_for_zeros_too():
    calls = []

    @operator
    class together(cube.prototype):
        collective = True

        def vjp(node, _y, x):
            return dict(_x=_y * 3 * x**2)

        def hvp(node, _y, x_, x):
            calls.append((_y, x_))
            return dict(_x_=_y * 6 * x * x_)

    with Builder() as m:
        m.output(a=together(m.input("x")))
    assert m.compute_with_hvp("a", dict(x=1.0), dict(x_=0))[2] == [ZeroGradient]
    assert calls == [(1.0, ZeroGradient)]


@pytest.mark.parametrize("formula", [secretive, lambda x: inner(x, secretive(x), n=1), chosen])
def test_an_operator_that_does_not_tell(formula):
    with Builder() as m:
        m.output(y=formula(m.input("x")))
    init, v = dict(x=1.0), dict(x_=1.0)
    with pytest.raises(BrokenPrimitive, match=r"has no hvp.*test_second_order\.py:\d+.*compute_with_gnDp"):
        m.compute_with_hvp("y", init, v)
    m.compute_with_gnDp("y", init, v)


def test_bad_input():
    with Builder() as m:
        m.output(y=cube(m.input("x")))
    x = np.ones(3)
    with pytest.raises(
        BadArgument, match="'y' is ndarray float64.3., not a real number; give its cotangent '_y'"
    ):
        m.compute_with_hvp("y", dict(x=x), dict(x_=x))
    with pytest.raises(BadArgument, match="'_y' is ndarray"):
        m.compute_with_hvp("y", dict(x=x), dict(x_=x, _y=np.ones(4)))
    with pytest.raises(BadArgument, match="'x_' is ndarray"):
        m.compute_with_hvp("y", dict(x=x), dict(x_=np.ones(4), _y=x))
    with pytest.raises(BadArgument, match="'z_' is no tangent of an input"):
        m.compute_with_hvp("y", dict(x=1.0), dict(z_=1.0))


def test_the_model_is_derived_once():
    with Builder() as m:
        x, y = m.input("x", "y")
        m.output(L=norm2(nested(x, y)))
    init, v = values(5, False)
    tapes = [m.compute(["L"], init, return_tape=True)[1] for _ in range(2)]
    first, second = (tape.get_hvp() for tape in tapes)
    assert list(first) == list(second) and first._plans is second._plans

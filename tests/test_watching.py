"""Derivatives by hand that have another shape than their values: summed or repeated where broadcasting explains it, refused otherwise."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples
from vmad_lit import Builder, ListPlaceholder, autooperator, operator
from vmad_lit.core.error import ExecutionError
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.registry import overloaded
from vmad_lit.lib import linalg, unary
from vmad_lit.testing import check, inner

K = np.arange(1.0, 4.0)


class Scaled:
    """A product, by someone who thinks of arrays of one shape."""

    ain, aout = "a", "y"

    def apl(node, a, k):
        return dict(y=a * k)

    def vjp(node, _y, k):
        return dict(_a=_y * k)


scaled = operator(Scaled)


@operator
class product:
    """The same with two arguments, and all derivatives."""

    ain, aout = "a, b", "y"

    def apl(node, a, b):
        return a * b

    def vjp(node, _y, a, b):
        return dict(_a=_y * b, _b=_y * a)

    def jvp(node, a_, b_, a, b):
        return a_ * b + b_ * a

    def hvp(node, _y, a_, b_):
        return dict(_a_=_y * b_, _b_=_y * a_)


@operator
class total:
    """The sum of two values, whose tangents come alone."""

    ain, aout = "a, b", "y"

    def apl(node, a, b):
        return a + b

    def vjp(node, _y):
        return dict(_a=_y, _b=_y)

    def jvp(node, a_, b_):
        return a_ if b_ is ZeroGradient else b_ if a_ is ZeroGradient else a_ + b_

    hvp = ZeroGradient


def model(function, *names):
    with Builder() as m:
        m.output(y=function(*m.input(*names)) if len(names) > 1 else function(m.input(*names)))
    return m


def test_a_number_beside_an_array():
    m = model(lambda a: scaled(a, K) + a * K, "a")
    (_a,) = m.compute_with_vjp(dict(a=2.0), dict(_y=np.ones(3)))[1]
    assert _a == 12.0 and np.shape(_a) == ()


@pytest.mark.parametrize("a", [2, 2.0, np.float32(2), np.array(2.0), 2.0 + 1j])
@pytest.mark.parametrize("k", [K, K[:, None], np.ones((0,)), 3.0, np.array([3.0])])
def test_numbers_of_all_types(a, k):
    (_a,) = model(lambda a: scaled(a, k), "a").compute_with_vjp(dict(a=a), dict(_y=1.0))[1]
    assert np.shape(_a) == () and np.isclose(_a, np.sum(k))


SHAPES = [(), (1,), (3,), (2, 3), (2, 1), (1, 3), (1, 1), (4, 1, 3), (0,), (2, 0)]


def go_together(*shapes):
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("first, second", [(a, b) for a in SHAPES for b in SHAPES if go_together(a, b)])
@pytest.mark.parametrize("op, ours", [(product, lambda a, b: a * b), (total, lambda a, b: a + b)])
def test_all_derivatives_are_those_of_our_own_operators(op, ours, first, second):
    rng = np.random.default_rng(5)
    a, b, a_, b_ = (rng.normal(size=shape) for shape in (first, second, first, second))
    init = dict(a=a, b=b)
    results = []
    for function in op, ours:
        m = model(lambda a, b: function(a * 1.0, b * 1.0), "a", "b")
        y, gradient = m.compute_with_vjp(init, dict(_y=1.0))
        tangents = [
            m.compute_with_jvp("y", init, v)[1] for v in (dict(a_=a_), dict(b_=b_), dict(a_=a_, b_=b_))
        ]
        _, _, second_order = m.compute_with_hvp("y", init, dict(a_=a_, b_=b_, _y=np.ones(np.shape(y[0]))))
        results.append([*gradient, *tangents, *second_order])
    for got, expected in zip(*results):
        if expected is ZeroGradient or got is ZeroGradient:
            assert not np.any(np.asarray(got)) and not np.any(np.asarray(expected))
        else:
            assert np.shape(got) == np.shape(expected)
            np.testing.assert_allclose(got, expected)


@given(st.data())
@settings(max_examples=examples(50))
def test_pushing_and_pulling_agree_whatever_is_repeated(data):
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3).map(tuple))

    def part():
        n = data.draw(st.integers(0, len(shape)))
        return tuple(data.draw(st.sampled_from([1, size])) for size in shape[n:])

    shapes, rng = [part(), part()], np.random.default_rng(data.draw(st.integers(0, 99)))
    a, b, a_, b_ = (rng.normal(size=s) for s in shapes + shapes)
    m = model(lambda a, b: product(total(a, b), b), "a", "b")
    y, y_ = m.compute_with_jvp("y", dict(a=a, b=b), dict(a_=a_, b_=b_))
    _y = rng.normal(size=np.shape(y))
    _, (_a, _b) = m.compute_with_vjp(dict(a=a, b=b), dict(_y=_y))
    assert np.shape(_a) == np.shape(a) and np.shape(_b) == np.shape(b) and np.shape(y_) == np.shape(y)
    np.testing.assert_allclose(inner(_y, y_), inner(_a, a_) + inner(_b, b_), atol=1e-12)


def test_values_in_the_middle_of_a_model():
    """Where the value is known neither from outside nor from the tape."""
    for lead in (lambda a: a * 3.0), (lambda a: scaled(a, 3.0)), unary.exp:
        for k in K, K[:, None]:
            x = np.ones((1, 3))
            for a in (2.0, x) if k is K else (2.0, x):
                ours = model(lambda a: linalg.sum(unary.sin(lead(a) * k)), "a")
                hand = model(lambda a: linalg.sum(unary.sin(scaled(lead(a), k))), "a")
                expected, got = (m.compute_with_vjp(dict(a=a), dict(_y=1.0))[1][0] for m in (ours, hand))
                assert np.shape(got) == np.shape(a)
                np.testing.assert_allclose(got, expected)


def test_inside_of_other_operators():
    @autooperator("a -> y")
    def inside(a):
        return scaled(a, K)

    @overloaded
    class chosen(Scaled):
        pass

    for op in inside, inside.forgetful, (lambda a: chosen(a, K)):
        m = model(lambda a: op(a * 1.0), "a")
        assert m.compute_with_vjp(dict(a=2.0), dict(_y=np.ones(3)))[1] == [6.0]


def test_a_type_that_is_added_later_is_looked_at_too():
    from vmad_lit.core.stdlib.operators import add

    @overloaded
    class chosen:
        ain, aout, trusted = "a", "y", True

        def apl(node, a, k):
            return dict(y=a * k)

        def vjp(node, _y, k):
            return dict(_a=np.sum(_y * k))

    m = model(lambda a: chosen(a, K), "a")
    assert m.compute_with_vjp(dict(a=2.0), dict(_y=np.ones(3)))[1] == [6.0]
    chosen.register(scaled, a="float")
    m = model(lambda a: chosen(a, K), "a")
    assert m.compute_with_vjp(dict(a=2.0), dict(_y=np.ones(3)))[1] == [6.0]
    assert add.trusted and not scaled.trusted and not chosen.trusted


def test_lists():
    @operator
    class parts:
        """Each item times its own array."""

        ain, aout = "a", "y"

        def apl(node, a, k):
            return dict(y=[item * factor for item, factor in zip(a, k)])

        def vjp(node, _y, k):
            return dict(_a=[g * factor for g, factor in zip(_y, k)])

        def jvp(node, a_, k):
            return dict(y_=[t if t is ZeroGradient else 1.0 * t for t in a_])

    with Builder() as m:
        a, b = m.input("a", "b")
        first, second = parts([a, b], [K, K[:, None]], y=ListPlaceholder(2))
        m.output(y=first, z=second)
    init = dict(a=2.0, b=np.ones(3))
    _, (_a, _b) = m.compute_with_vjp(init, dict(_y=1.0, _z=1.0))
    assert _a == 6.0
    np.testing.assert_array_equal(_b, np.full(3, 6.0))
    y_, z_ = m.compute_with_jvp(["y", "z"], init, dict(a_=1.0, b_=np.ones(3)))[1]
    assert y_.shape == (3,) and z_.shape == (3, 3)


@pytest.mark.parametrize(
    "a, cotangent, looks",
    [
        (np.ones(3), np.ones(2), r"ndarray float64\[2\]"),
        (np.ones(3), np.ones((3, 1)), r"ndarray float64\[3, 1\]"),
        (np.ones((1, 3)), np.ones(3), r"ndarray float64\[3\]"),
        (np.ones(3), 2.0, "2.0"),
        (np.ones((2, 3)), np.ones(3), r"ndarray float64\[3\]"),
        (np.ones(3), [1.0, 2.0], "list of 2"),
        (np.ones(3), [[1.0], 2.0], "list of 2"),
        (np.ones(0), 3.0, "3.0"),
        ([np.ones(3), 1.0], [np.ones(2), 1.0], "list of 2"),
        ([1.0, 2.0], [1.0], "list of 1"),
        ([1.0, 2.0], 3.0, "3.0"),
    ],
)
def test_what_broadcasting_does_not_explain(a, cotangent, looks):
    @operator
    class wrong:
        ain, aout = "a", "y"

        def apl(node, a):
            return dict(y=1.0)

        def vjp(node, _y):
            return dict(_a=cotangent)

    m = model(wrong, "a")
    with pytest.raises(ExecutionError) as caught:
        m.compute_with_vjp(dict(a=a), dict(_y=1.0))
    place = rf"vjp of operator wrong, declared at {re.escape(__file__)}:\d+"
    assert re.match(rf"{place}, returned '_a' as {looks}, which does not fit 'a', ", str(caught.value))
    assert f"built at {__file__}" in caught.value.__notes__[0]


@pytest.mark.parametrize("tangent", [np.ones(2), np.ones((2, 3)), np.ones((3, 1)), [1.0, 2.0]])
def test_a_tangent_that_does_not_fit(tangent):
    @operator
    class wrong(Scaled):
        def jvp(node, a_):
            return dict(y_=tangent)

    with pytest.raises(
        ExecutionError, match=r"returned 'y_' as .*, which does not fit 'y', an array of shape \[3\]"
    ):
        model(lambda a: wrong(a, K), "a").compute_with_jvp("y", dict(a=2.0), dict(a_=1.0))


def test_what_fits_is_left_alone():
    """Also zeros, numbers for numbers, and what we know nothing about."""

    class Thing:
        pass

    thing = Thing()
    for a, g, expected in (
        (np.ones(3), 0, ZeroGradient),
        (np.ones(3), np.float32(0.0), ZeroGradient),
        (2.0, 0.0, 0.0),
        (thing, 3.0, 3.0),
        (thing, thing, thing),
    ):

        @operator
        class given:
            ain, aout = "a", "y"

            def apl(node, a):
                return dict(y=1.0)

            def vjp(node, _y):
                return dict(_a=g)

        (_a,) = model(given, "a").compute_with_vjp(dict(a=a), dict(_y=1.0))[1]
        assert _a is expected or _a == expected


def test_a_list_for_an_array_is_made_one():
    @operator
    class rows:
        ain, aout = "a", "y"

        def apl(node, a):
            return dict(y=float(np.sum(a)))

        def vjp(node, _y):
            return dict(_a=[[_y, _y, _y], [_y, _y, _y]])

    (_a,) = model(lambda a: rows(a * 2.0), "a").compute_with_vjp(dict(a=np.ones((2, 3))), dict(_y=1.0))[1]
    np.testing.assert_array_equal(_a, np.full((2, 3), 2.0))


def test_numbers_in_arrays_of_objects_are_numbers():
    @operator
    class rows:
        ain, aout = "a", "y"

        def apl(node, a):
            return dict(y=2.0 * a)

        def vjp(node, _y):
            return dict(_a=[2.0 * np.asarray(row, dtype=object) for row in _y])

    (_a,) = model(rows, "a").compute_with_vjp(dict(a=np.ones((2, 3))), dict(_y=1.0))[1]
    assert _a.dtype == "f8"
    np.testing.assert_array_equal(_a, np.full((2, 3), 2.0))


def test_our_own_operators_return_arrays_for_arrays():
    """The rows of an array may be joined like the items of a list."""
    x = np.arange(6.0).reshape(2, 3)
    for join in linalg.stack, linalg.concatenate:
        m = model(
            lambda a: linalg.sum(linalg.take(join(linalg.take(a, [1, 0], axis=0)), [0, 1], axis=0)), "a"
        )
        (_a,) = m.compute_with_vjp(dict(a=x), dict(_y=1.0))[1]
        assert type(_a) is np.ndarray and _a.shape == x.shape
        check(lambda a: join(a), x)


def test_a_second_gradient_of_the_same_tape():
    m = model(lambda a: scaled(a, K), "a")
    _, tape = m.compute("y", dict(a=2.0), return_tape=True)
    for _y in np.ones(3), K:
        assert tape.get_vjp().compute("_a", dict(_y=_y)) == np.sum(_y * K)


@pytest.mark.collective
def test_numbers_beside_fields():
    pytest.importorskip("pmesh")
    from vmad_lit.lib import fastpm

    @operator
    class scaled(Scaled):
        def vjp(node, _y, k):
            return dict(_a=_y * np.conj(k))

    pm = fastpm.ParticleMesh(Nmesh=[4, 6, 5], BoxSize=1.0)
    for kind in "real", "complex":
        k = pm.generate_whitenoise(4, type=kind)
        ours, hand = (
            model(lambda a: fastpm.to_scalar(op(a, k)), "a")
            for op in (lambda a, k: a * k, lambda a, k: scaled(a, k))
        )
        expected, got = (m.compute_with_vjp(dict(a=2.0), dict(_y=1.0)) for m in (ours, hand))
        np.testing.assert_allclose(got, expected)
        np.testing.assert_allclose(got[1][0], got[0][0])  # of (a k)^2 at a = 2

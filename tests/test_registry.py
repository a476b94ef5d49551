"""Patterns, and operators that choose."""

import collections.abc

import numpy as np
import pytest

from vmad_lit import Builder, autooperator, operator
from vmad_lit.core.error import BadArgument, BrokenPrimitive
from vmad_lit.core.registry import Registry, overloaded, specificity
from vmad_lit.testing import check


class Base(np.ndarray):
    pass


class Derived(Base):
    pass


def test_specificity():
    x = np.zeros(2).view(Derived)
    order = [Derived, Base, np.ndarray, "Derived*", "Deriv??", "D*", "*"]
    scores = [specificity(pattern, x) for pattern in order]
    assert scores == sorted(scores) and len(set(scores)) == len(scores)
    assert specificity("Derived", x) == specificity(Derived, x)
    assert specificity("Base", x) == specificity(Base, x)
    assert specificity("[AD]erived", x) and specificity("derived", x) is None and specificity(list, x) is None
    assert specificity(collections.abc.Sequence, [1]) is not None


def test_the_latest_of_equals_wins():
    r = Registry()
    for name in "first", "second":
        r.register(name, dict(x=int), name="f")
    assert r.match("f", dict(x=1)) == "second"
    assert [entry.operator for entry in r.match_all("f", dict(x=1))] == ["second", "first"]
    assert r.match_all("g", dict(x=1)) == []
    with pytest.raises(KeyError, match="x: str"):
        r.match("f", dict(x="1"))


@overloaded
class scale:
    ain, aout = "x", "y"

    def apl(node, x, factor=2.0):
        return x * factor

    def vjp(node, _y, factor):
        return _y * factor


@scale.register
@operator
class scale_derived:
    """A nonlinear one, with a record of its own and without the hyper-parameter."""

    ain, aout = {"x": Derived}, "y"

    def apl(node, x):
        return x * x

    def rcd(node, x, y):
        return dict(slope=2 * x)

    def vjp(node, _y, slope):
        return _y * slope

    def jvp(node, x_, slope):
        return x_ * slope


@scale.register(x="Base")
@autooperator("x -> y")
def scale_base(x):
    return x * 3.0


def test_overloaded():
    x = np.arange(1.0, 4.0)
    check(scale, x, truth=2 * x)
    check(scale, x, 5.0, truth=5 * x)
    check(scale, x.view(Derived), truth=x * x)
    check(scale, x.view(Base), truth=3 * x)


def test_one_model_many_types_and_one_tape_each():
    with Builder() as m:
        m.output(y=scale(scale(m.input("x"))))
    x = np.arange(1.0, 4.0)
    tapes = [m.compute("y", dict(x=x.view(cls)), return_tape=True)[1] for cls in (np.ndarray, Derived)]
    slopes = [tape.get_vjp().compute("_x", dict(_y=np.ones(3))) for tape in tapes]
    np.testing.assert_array_equal(slopes, [4 * np.ones(3), 4 * x**3])


def test_an_argument_that_the_choice_does_not_take():
    with Builder() as m:
        m.output(y=scale(m.input("x"), factor=5.0))
    with pytest.raises(BadArgument, match="scale of a Derived takes no argument 'factor'"):
        m.compute("y", dict(x=np.zeros(2).view(Derived)))


def test_no_vjp():
    @overloaded
    class f:
        ain, aout = "x", "y"

        def apl(node, x):
            return x

    with Builder() as m:
        m.output(y=f(m.input("x")))
    with pytest.raises(BrokenPrimitive, match="no vjp.*test_registry.py"):
        m.compute_with_vjp(dict(x=1.0), dict(_y=1.0))


def test_the_bare_functions_work_without_a_node():
    assert scale.apl.impl(None, x=2.0, factor=3.0) == 6.0
    assert scale.vjp.impl(None, _y=2.0, factor=3.0) == 6.0


def test_a_collective_choice_is_called_also_for_zeros():
    called = []

    @overloaded
    class f:
        ain, aout = "x", "y"

        def apl(node, x):
            return x

        def vjp(node, _y):
            called.append("default")
            return _y

    @f.register(x=float)
    @operator
    class g(f.prototype):
        collective = True

        def vjp(node, _y):
            called.append("collective")
            return _y

    with Builder() as m:
        m.output(y=f(m.input("x")))
    for x in np.ones(2), 1.0:
        m.compute_with_vjp(dict(x=x), dict(_y=0))
    assert called == ["collective"]

"""Operators that are wrongly written: each fault is told in words, with the place of the operator, at the declaration or the first run."""

# ruff: noqa: F811  (the operators of a test all have the same name)

import re

import numpy as np
import pytest

from vmad_lit import Builder, ListPlaceholder, autooperator, operator
from vmad_lit.core.error import BadArgument, BrokenPrimitive, ExecutionError
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.registry import overloaded
from vmad_lit.lib import linalg, unary
from vmad_lit.testing import check


class Scaled:
    """A right one."""

    ain, aout = "a", "y"

    def apl(node, a, k=2.0):
        return dict(y=a * k)

    def vjp(node, _y, k):
        return dict(_a=_y * k)


def line_of(prototype):
    return rf"operator {prototype.__name__}, declared at {re.escape(__file__)}:\d+"


def refused(message):
    """A class decorator: the declaration is refused, with a message about this file."""

    def decorate(prototype):
        for declare in operator, overloaded:
            with pytest.raises(BrokenPrimitive, match=line_of(prototype) + ".*" + message) as caught:
                declare(prototype)
            line = int(re.search(r"\.py:(\d+)", str(caught.value))[1])
            assert (
                open(__file__).read().splitlines()[line - 1].strip().startswith(f"class {prototype.__name__}")
            )

    return decorate


# -- At the declaration --------------------------------------------------------------------------------------------------


def test_a_class_without_its_names_or_its_function():
    @refused("'ain' is missing")
    class f:
        aout = "y"

        def apl(node, a):
            return a

    @refused("'aout' is missing")
    class f:
        ain = "a"

        def apl(node, a):
            return a

    @refused("'apl' is missing")
    class f:
        ain, aout = "a", "y"

        def vjp(node, _y):
            return _y


@pytest.mark.parametrize("wrong", ["alp", "Apl", "apl_", "pal"])
def test_a_misspelt_apl(wrong):
    prototype = type("f", (), dict(ain="a", aout="y", **{wrong: lambda node, a: a}))
    with pytest.raises(BrokenPrimitive, match=f"'{wrong}' means nothing here; did you mean 'apl'"):
        operator(prototype)


@pytest.mark.parametrize(
    "wrong, meant",
    [
        ("vpj", "vjp"),
        ("jpv", "jvp"),
        ("VJP", "vjp"),
        ("phv", "hvp"),
        ("rdc", "rcd"),
        ("colective", "collective"),
    ]
    + [("in_place", "inplace"), ("placement", "placements"), ("Fresh", "fresh")],
)
def test_misspelt_attributes(wrong, meant):
    class f:
        ain, aout = "a", "y"

        def apl(node, a):
            return a

    setattr(f, wrong, lambda node, _y: _y)
    with pytest.raises(
        BrokenPrimitive,
        match=rf"{line_of(f)}: '{wrong}' means nothing here; did you mean '({meant}|vjp)'",
    ):
        operator(f)


def test_attributes_of_ones_own_are_welcome():
    class f(Scaled):
        version, order, helper, lap, max_iter = 3, 2, staticmethod(np.sin), len, 10

        def kernel(node, x):
            return x

    check(operator(f), np.ones(3))


@pytest.mark.parametrize("spec", ["a b", ["a", 3], [3], {"a-b": "*"}, "1a"])
def test_what_is_no_name(spec):
    with pytest.raises(BrokenPrimitive, match="is no name; several names are separated by commas"):
        operator(type("f", (Scaled,), dict(ain=spec)))
    with pytest.raises(BrokenPrimitive, match="is no name"):
        operator(type("f", (Scaled,), dict(aout=spec)))


@pytest.mark.parametrize("what", [3, "f", lambda node, a: a, np.sin])
def test_what_is_no_class(what):
    with pytest.raises(BadArgument, match="an operator is declared by a class"):
        operator(what)


def test_a_forgotten_node():
    @refused(r"the first parameter of apl\(a, k\) has to be the node, as in apl\(node, ...\)")
    class f(Scaled):
        def apl(a, k):
            return a * k

    @refused(r"the first parameter of apl\(\) has to be the node")
    class f(Scaled):
        def apl():
            return 1.0

    @refused(r"the first parameter of apl\(self, node, a, k\) has to be the node")
    class f(Scaled):
        def apl(self, node, a, k):
            return a * k

    @refused(r"the first parameter of vjp\(_y, k\) has to be the node")
    class f(Scaled):
        def vjp(_y, k):
            return _y * k

    @refused(r"the first parameter of vjp\(k, _y\) has to be the node")
    class f(Scaled):
        def vjp(k, _y):
            return _y * k

    @refused(r"the first parameter of jvp\(a_, k\) has to be the node")
    class f(Scaled):
        def jvp(a_, k):
            return a_ * k

    @refused(r"the first parameter of hvp\(_y, a_\) has to be the node")
    class f(Scaled):
        def hvp(_y, a_):
            return ZeroGradient

    @refused(r"the first parameter of rcd\(a, k, y\) has to be the node")
    class f(Scaled):
        def rcd(a, k, y):
            return dict(k=k)


def test_a_forgotten_node_that_cannot_be_told_at_once():
    class f(Scaled):
        def apl(k, a):
            return a * k

        def vjp(node, _y):
            return _y

    with (
        Builder() as m,
        pytest.raises(BadArgument, match="takes 1 arguments .*, got 2; the first parameter .* is the node"),
    ):
        operator(f)(2.0, m.input("a"))


def test_the_node_may_have_another_name_and_functions_may_be_static():
    class f(Scaled):
        @staticmethod
        def apl(self, a, k=2.0):
            return a * k

        def vjp(_, _y, **kept):
            return _y * kept["k"]

    with Builder() as m:
        m.output(y=operator(f)(m.input("a")))
    assert m.compute("y", dict(a=3.0)) == 6.0


def test_names_that_are_no_parameters():
    @refused(r"apl\(node, a, k\) has no parameter for 'b'")
    class f(Scaled):
        ain = "a, b"

        def apl(node, a, k):
            return a * k

    @refused(r"apl\(node, mass\) has no parameter for 'mas'; did you mean 'mass'")
    class f(Scaled):
        ain = "mas"

        def apl(node, mass):
            return mass

    @refused(r"rcd\(node, a\) has no parameter for 'k'")
    class f(Scaled):
        def rcd(node, a):
            return dict(k=2.0)


def test_a_derivative_that_takes_no_cotangent_or_tangent():
    @refused(r"vjp\(node, y, k\) takes none of '_y'.*did you mean '_y'")
    class f(Scaled):
        def vjp(node, y, k):
            return dict(_a=y * k)

    @refused(r"vjp\(node, _z, k\) takes none of '_y'")
    class f(Scaled):
        def vjp(node, _z, k):
            return dict(_a=_z * k)

    @refused(r"vjp\(node, y_, k\) takes none of '_y'")
    class f(Scaled):
        def vjp(node, y_, k):
            return dict(_a=y_ * k)

    @refused(r"jvp\(node, a, k\) takes none of 'a_'")
    class f(Scaled):
        def jvp(node, a, k):
            return dict(y_=a * k)

    @refused(r"hvp\(node, _y, a\) takes none of 'a_'")
    class f(Scaled):
        def hvp(node, _y, a):
            return dict(_a_=_y * a)


def test_derivatives_that_are_zero_need_no_cotangent():
    @operator
    class length:
        ain, aout = "x", "y"

        def apl(node, x):
            return dict(y=len(x), n=len(x))

        def vjp(node, n):
            return ZeroGradient

        def jvp(node):
            return ZeroGradient

    with Builder() as m:
        m.output(y=length(m.input("x")))
    assert m.compute_with_vjp(dict(x=np.ones(3)), dict(_y=1.0))[1] == [ZeroGradient]


def test_generators():
    @refused("apl yields its results")
    class f(Scaled):
        def apl(node, a, k):
            yield a * k

    @refused("vjp yields its results")
    class f(Scaled):
        def vjp(node, _y, k):
            yield _y * k

    @refused("apl yields its results or waits")
    class f(Scaled):
        async def apl(node, a, k):
            return a * k


@pytest.mark.parametrize("kind", ["apl", "vjp", "jvp", "rcd"])
@pytest.mark.parametrize("what", [None, 3, "x"])
def test_what_is_no_function(kind, what):
    with pytest.raises(BrokenPrimitive, match=f"{kind} is {what!r}, and has to be a function"):
        operator(type("f", (Scaled,), {kind: what}))


def test_an_autooperator_without_main():
    with pytest.raises(BrokenPrimitive, match="'Main' means nothing here; did you mean 'main'"):

        @autooperator
        class f:
            ain, aout = "a", "y"

            def Main(self, a):
                return a


# -- At the first run ----------------------------------------------------------------------------------------------------


def run(prototype, a=None, _y=None, **places):
    """Value, gradient and tangent of a model with one such operator."""
    a = np.array([1.0, 2.0, 3.0]) if a is None else a
    with Builder() as m:
        m.output(y=operator(prototype)(m.input("a"), **places))
    _, tape = m.compute("y", dict(a=a), return_tape=True)
    tape.get_jvp().compute("y_", dict(a_=1.0))
    return tape.get_vjp().compute("_a", dict(_y=1.0 if _y is None else _y))


def told(message):
    """A class decorator: the first run is refused."""

    def decorate(prototype):
        with pytest.raises((ExecutionError, BrokenPrimitive), match=message) as caught:
            run(prototype)
        assert re.search(line_of(prototype), str(caught.value))
        assert any("built at" in note for note in caught.value.__notes__)

    return decorate


def test_a_forgotten_return():
    @told("apl of .*returned nothing; is a 'return' missing")
    class f(Scaled):
        def apl(node, a, k=2.0):
            dict(y=a * k)

    @told("vjp of .*returned nothing; is a 'return' missing")
    class f(Scaled):
        def vjp(node, _y, k):
            dict(_a=_y * k)

    @told("jvp of .*returned nothing; is a 'return' missing")
    class f(Scaled):
        def jvp(node, a_, k):
            dict(y_=a_ * k)


def test_an_operator_without_results_returns_nothing():
    seen = []

    @operator
    class look:
        ain, aout = "a", ""

        def apl(node, a):
            seen.append(a)

    with Builder() as m:
        a = m.input("a")
        look(a)
        m.output(y=a)
    assert m.compute("y", dict(a=3.0)) == 3.0 and seen == [3.0]


def test_none_is_a_value_if_it_is_said_so():
    @operator
    class f(Scaled):
        def apl(node, a, k=2.0):
            return dict(y=None)

    with Builder() as m:
        m.output(y=f(m.input("a")))
    assert m.compute("y", dict(a=3.0)) is None


def test_what_no_function_returns():
    @told("apl of .*returned 'y' as generator, which is no value")
    class f(Scaled):
        def apl(node, a, k=2.0):
            return (x * k for x in a)

    @told("apl of .*returned a tuple that holds a dict; is there a comma behind it")
    class f(Scaled):
        def apl(node, a, k=2.0):
            return (dict(y=a * k),)

    @told("vjp of .*returned '_a' as NoneType, which is no value")
    class f(Scaled):
        def vjp(node, _y, k):
            return dict(_a=None)

    @told("vjp of .*returned '_a' as set, which is no value")
    class f(Scaled):
        def vjp(node, _y, k):
            return {"_a"}

    @told("jvp of .*returned 'y_' as type, which is no value")
    class f(Scaled):
        def jvp(node, a_, k):
            return dict

    @told(r"returned a dict with \['z'\], and is declared to return \['y'\]")
    class f(Scaled):
        def apl(node, a, k=2.0):
            return dict(z=a * k)

    @told(r"returned a dict with \['a'\], and is declared to return \['_a'\]")
    class f(Scaled):
        def vjp(node, _y, k):
            return dict(a=_y * k)

    @told(r"returned a dict with \['_y'\], and is declared to return \['y_'\]")
    class f(Scaled):
        def jvp(node, a_, k):
            return dict(_y=a_ * k)


def test_a_tuple_for_several_results():
    class f(Scaled):
        aout = "y, z"

        def apl(node, a):
            return a, a

        def vjp(node, _y, _z):
            return _y

    with Builder() as m:
        m.output(y=operator(f)(m.input("a"))[0])
    with pytest.raises(
        ExecutionError, match=r"type tuple, and is declared to return \['y', 'z'\].*" + line_of(f)
    ):
        m.compute("y", dict(a=1.0))


def test_any_kind_of_dict_will_do():
    from collections import OrderedDict

    class f(Scaled):
        def apl(node, a, k=2.0):
            return OrderedDict(y=a * k)

        def vjp(node, _y, k):
            return OrderedDict(_a=_y * k)

    np.testing.assert_array_equal(run(f), np.full(3, 2.0))


def test_a_name_that_nobody_records_is_an_error_for_who_takes_it():
    class f(Scaled):
        def jvp(node, a_, k, q):
            return dict(y_=a_ * q)

    with Builder() as m:
        m.output(y=operator(f)(m.input("a")))
    assert m.compute_with_vjp(dict(a=3.0), dict(_y=1.0)) == ([6.0], [2.0])
    with pytest.raises(BrokenPrimitive, match=line_of(f) + ": jvp takes 'q', which has not been recorded"):
        m.compute_with_jvp("y", dict(a=3.0), dict(a_=1.0))


def test_a_vjp_may_leave_out_what_nobody_wants():
    class f(Scaled):
        ain = "a, b"

        def apl(node, a, b):
            return a * b

        def vjp(node, _y, b):
            return dict(_a=_y * b)

        def jvp(node, a_, b):
            return dict(y_=a_ * b)

    with Builder() as m:
        m.output(y=operator(f)(m.input("a"), 3.0), z=operator(f)(m.input("b"), m.input("c")))
    init = dict(a=2.0, b=5.0, c=7.0)
    assert m.compute_with_vjp(dict(a=2.0), dict(_y=1.0))[1] == [3.0]
    _, tape = m.compute("z", init, return_tape=True)
    assert tape.get_vjp().compute("_b", dict(_z=1.0, _y=0.0)) == 7.0
    with pytest.raises(ExecutionError, match=r"returned a dict with \['_a'\]"):
        tape.get_vjp().compute("_c", dict(_z=1.0, _y=0.0))


@pytest.mark.parametrize("n, got", [(1, 2), (3, 2), (2, 0)])
def test_a_list_of_another_length_than_was_said(n, got):
    class halves(Scaled):
        def apl(node, a):
            return dict(y=[a[0], a[1]][:got])

        def vjp(node, _y):
            return dict(_a=np.array(_y))

    with Builder() as m:
        m.output(y=operator(halves)(m.input("a"), y=ListPlaceholder(n)))
    with pytest.raises(
        ExecutionError, match=f"a list of {n} was to be returned.*and one of {got} was"
    ) as caught:
        m.compute("y", dict(a=np.ones(2)))
    assert "built at" in caught.value.__notes__[0]


def test_a_number_where_a_list_was_said():
    with Builder() as m:
        m.output(y=operator(Scaled)(m.input("a"), y=ListPlaceholder(2)))
    with pytest.raises(ExecutionError, match="a list of 2 was to be returned, and 4.0 was"):
        m.compute("y", dict(a=2.0))


def test_functions_that_change_what_they_are_given():
    @told("apl of .*changes its argument 'a' in place.*'a.copy\\(\\)'")
    class f(Scaled):
        def apl(node, a, k=2.0):
            a *= k
            return dict(y=a)

    @told("apl of .*changes its argument 'a' in place")
    class f(Scaled):
        def apl(node, a, k=2.0):
            a[1:] = 0.0
            return dict(y=2 * a)

    @told("vjp of .*changes its argument '_y' in place")
    class f(Scaled):
        def vjp(node, _y, k):
            _y *= k
            return dict(_a=_y)

    @told("vjp of .*changes its argument 'a' in place")
    class f(Scaled):
        def vjp(node, _y, a):
            a[...] = 2.0
            return dict(_a=_y * a)

    @told("jvp of .*changes its argument 'a_' in place")
    class f(Scaled):
        def jvp(node, a_, k):
            a_ *= k
            return dict(y_=a_)


def test_lists_may_be_filled_and_scratch_space_be_used():
    """What programs of the reference do with a list that they pass on, and with a hyper-parameter."""
    scratch = np.zeros(3)

    @operator
    class put:
        ain, aout = "x, elem", "y"

        def apl(node, x, elem, i):
            x[i] = elem
            return dict(y=x)

        def vjp(node, _y, i):
            return dict(_x=[0.0 if j == i else g for j, g in enumerate(_y)], _elem=_y[i])

        def jvp(node, x_, elem_, i):
            return dict(y_=[elem_ if j == i else x_[j] for j in range(3)])

    class f(Scaled):
        def apl(node, a, k=scratch):
            return dict(y=np.multiply(a, 2.0, out=k).copy())

        def vjp(node, _y):
            return 2 * _y

        def jvp(node, a_):
            return 2 * a_

    np.testing.assert_array_equal(run(f), np.full(3, 2.0))
    with Builder() as m:
        m.output(y=put(m.input("x"), m.input("e"), 1))
    y, [_x, _e] = m.compute_with_vjp(dict(x=[1.0, 2.0, 3.0], e=5.0), dict(_y=[1.0, 1.0, 1.0]))
    assert y == [[1.0, 5.0, 3.0]] and _x == [1.0, 0.0, 1.0] and _e == 1.0


class put:
    """Stores a row in the array that it is given, and passes that on; as published programs do."""

    ain, aout = "x, row", "y"

    def apl(node, x, row):
        x[1] = row
        return dict(y=x)

    def vjp(node, _y):
        _x = _y.copy()
        _x[1] = 0.0
        return dict(_x=_x, _row=_y[1])

    def jvp(node, x_, row_):
        y_ = np.zeros((2, 3)) if x_ is ZeroGradient else x_.copy()
        y_[1] = row_
        return y_


X = np.arange(6.0).reshape(2, 3)


def test_what_nobody_needs_may_be_changed():
    op = operator(put)
    with Builder() as m:
        x, row = m.input("x", "row")
        m.output(y=op(x * 1.0, row * 1.0) * 2.0)
    (y,), (_x, _row) = m.compute_with_vjp(dict(x=X, row=np.ones(3)), dict(_y=1.0))
    np.testing.assert_array_equal(y, [[0.0, 2.0, 4.0], [2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(_x, [[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(_row, [2.0, 2.0, 2.0])
    np.testing.assert_array_equal(X, np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    "before, after",
    [
        (lambda x: x, lambda x, y: y),  # an input
        (lambda x: x * 1.0, lambda x, y: x + y),  # of which another node takes the value
        (lambda x: x * 1.0, lambda x, y: [x, y]),  # an output
        (unary.exp, lambda x, y: y),  # on the tape of another node
        (lambda x: linalg.reshape(x, (2, 3)), lambda x, y: y),  # a view
        (lambda x: X.copy(), lambda x, y: y + x),  # a constant
        (
            operator(type("same", (Scaled,), dict(apl=lambda node, a: a, vjp=lambda node, _y: _y))),
            lambda x, y: y,
        ),
    ],
)
def test_what_others_need_must_not_be_changed(before, after):
    with Builder() as m:
        x, row = m.input("x", "row")
        first = before(x)
        m.output(y=after(first, operator(put)(first, row)))
    with pytest.raises(ExecutionError, match="changes its argument 'x' in place, which others need"):
        m.compute("y", dict(x=X.copy(), row=np.ones(3)), return_tape=True)


def test_operators_that_are_trusted_are_not_looked_at():
    class f(Scaled):
        trusted = True

        def apl(node, a, k=2.0):
            return None

    with Builder() as m:
        m.output(y=operator(f)(m.input("a")))
    assert m.compute("y", dict(a=1.0)) is None


def test_operators_chosen_by_type_are_looked_at():
    @overloaded
    class f(Scaled):
        pass

    @f.register(a=np.ndarray)
    @operator
    class of_arrays(Scaled):
        def vjp(node, _y, k):
            _y * k

    with Builder() as m:
        m.output(y=f(m.input("a")))
    assert m.compute_with_vjp(dict(a=1.0), dict(_y=1.0))[1] == [2.0]
    with pytest.raises(ExecutionError, match="vjp of operator of_arrays, .*returned nothing"):
        m.compute_with_vjp(dict(a=np.ones(2)), dict(_y=1.0))

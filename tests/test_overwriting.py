"""Operators overwrite what only they have, and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from helpers import examples
from vmad_lit import Builder, ListPlaceholder, autooperator, operator
from vmad_lit.core import ownership
from vmad_lit.core.chain import checkpoint
from vmad_lit.core.model import Model
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.testing import check, check_ownership

SEEN: list[tuple[str, bool]] = []


def place(node, name, x):
    """The array itself, if it may be overwritten, or a new one."""
    SEEN.append((name, node.owns(name)))
    return x if node.owns(name) else np.empty_like(x)


@operator
class double:
    """2 x + 1, in place where that is allowed."""

    ain = "x"
    aout = "y"
    fresh = True
    inplace = "x", "_y"

    def apl(node, x):
        y = place(node, "x", x)
        np.multiply(x, 2.0, out=y)
        y += 1.0
        return dict(y=y)

    def vjp(node, _y):
        return dict(_x=np.multiply(_y, 2.0, out=place(node, "_y", _y)))

    def jvp(node, x_):
        return dict(y_=2.0 * x_)

    hvp = ZeroGradient


@operator
class same:
    """x itself: the result is nobody's own."""

    ain = "x"
    aout = "y"

    def apl(node, x):
        return dict(y=x)

    def vjp(node, _y):
        return dict(_x=_y)


@autooperator("x -> y")
def twice(x):
    return double(double(x))


@autooperator("x -> y")
def around(x):
    return twice(x)


def model(*steps):
    with Builder() as m:
        y = m.input("x")
        for step in steps:
            y = step(y)
        m.output(y=y)
    return m


def owned(task):
    SEEN.clear()
    result = task()
    return result, [own for _, own in SEEN]


X = np.arange(3.0)


def test_results_of_such_operators_are_overwritten():
    x = X.copy()
    y, own = owned(lambda: model(double, double, double).compute("y", dict(x=x)))
    assert own == [False, True, True]
    assert_array_equal(y, 8 * X + 7)
    assert_array_equal(x, X)


def test_cotangents_are_overwritten_but_those_of_the_caller():
    x, _y = X.copy(), np.ones(3)
    (_, [_x]), own = owned(lambda: model(double, double).compute_with_vjp(dict(x=x), dict(_y=_y)))
    assert own == [False, True, False, True]
    assert_array_equal(_x, [4, 4, 4])
    assert_array_equal(_y, np.ones(3))
    assert_array_equal(x, X)


@pytest.mark.parametrize("steps", [(double, same, double), (same, double)])
def test_what_somebody_else_may_have_is_not(steps):
    x = X.copy()
    m = model(*steps)
    _, own = owned(lambda: m.compute("y", dict(x=x)))
    assert not any(own)
    assert_array_equal(x, X)


def test_what_is_used_again_is_not():
    with Builder() as m:
        x = m.input("x")
        y = double(x)
        z = double(y)
        m.output(y=y, z=z, w=double(z) + z)
    (y, z, w), own = owned(lambda: m.compute(["y", "z", "w"], dict(x=X.copy())))
    assert not any(own)
    for got, expected in zip((y, z, w), (2 * X + 1, 4 * X + 3, 12 * X + 10)):
        assert_array_equal(got, expected)
    assert owned(lambda: m.compute("z", dict(x=X.copy())))[1] == [False, True]


def test_an_argument_twice_is_not():
    @operator
    class plus:
        ain = "a", "b"
        aout = "y"
        fresh = True
        inplace = "a", "b"

        def apl(node, a, b):
            SEEN.append(("a", node.owns("a")))
            return dict(y=a + b)

        def vjp(node, _y):
            return dict(_a=_y.copy(), _b=_y.copy())

    with Builder() as m:
        y = double(m.input("x"))
        m.output(y=plus(y, y))
    assert owned(lambda: m.compute("y", dict(x=X)))[1] == [False, False]


def test_an_argument_that_is_in_a_list_too_is_not():
    @operator
    class plus_all:
        ain = "a", "xs"
        aout = "y"
        fresh = True
        inplace = ("a",)

        def apl(node, a, xs):
            SEEN.append(("a", node.owns("a")))
            a = np.multiply(a, 10.0, out=a if node.owns("a") else None)
            return dict(y=a + sum(xs))

    with Builder() as m:
        x = m.input("x")
        y, z = double(x), double(x)
        m.output(y=plus_all(y, [z, y]), z=plus_all(z, [y]))
    (y, z), own = owned(lambda: m.compute(["y", "z"], dict(x=X)))
    assert own == [False] * 4
    assert_array_equal(y, 12 * (2 * X + 1))
    assert_array_equal(z, 11 * (2 * X + 1))
    # Without the second use one of them is given away
    assert owned(lambda: m.compute("z", dict(x=X)))[1] == [False, False, True]


def test_an_output_twice_is_nobodys_own():
    @autooperator("x -> y, ys")
    def both(x):
        y = double(x)
        return y, [y]

    with Builder() as m:
        y, ys = both(m.input("x"), ys=ListPlaceholder(1))
        m.output(y=double(y), ys=ys)
    (y, ys), own = owned(lambda: m.compute(["y", "ys"], dict(x=X)))
    assert own == [False, False]
    assert_array_equal(ys[0], 2 * X + 1)
    assert_array_equal(y, 4 * X + 3)


def test_an_output_that_is_recorded_is_nobodys_own():
    @operator
    class grow:
        ain = "x"
        aout = "y"
        fresh = True

        def apl(node, x):
            return dict(y=np.exp(x))

        def vjp(node, _y, y):
            return dict(_x=_y * y)

    @autooperator("x -> y")
    def inner(x):
        return grow(x)

    for step in grow, inner, double:
        m = model(step, double)
        (_, [_x]), own = owned(lambda: m.compute_with_vjp(dict(x=X), dict(_y=np.ones(3))))
        assert_array_equal(_x, 4 if step is double else 2 * np.exp(X))
        assert own[:2] == ([False, True] if step is double else [False, False])
        # Without a tape it is given away
        assert owned(lambda: m.compute("y", dict(x=X)))[1][-1] is True


def test_through_autooperators():
    x = X.copy()
    m = model(double, twice, around)
    y, own = owned(lambda: m.compute("y", dict(x=x)))
    assert own == [False, True, True, True, True]
    assert_array_equal(y, 32 * X + 31)
    (_, [_x]), own = owned(lambda: m.compute_with_vjp(dict(x=x), dict(_y=np.ones(3))))
    assert own[5:] == [False, True, True, True, True]
    assert_array_equal(_x, np.full(3, 32.0))
    assert_array_equal(x, X)


def test_sums_hand_cotangents_on():
    m = model(double, lambda y: y + np.ones(3), double)
    (_, [_x]), own = owned(lambda: m.compute_with_vjp(dict(x=X), dict(_y=np.ones(3))))
    assert own == [False, False, False, True]
    assert_array_equal(_x, np.full(3, 4.0))


def test_sums_hand_on_what_is_not_theirs():
    """The cotangent of the caller goes through a sum as it is, and is the caller's on the other side, too."""
    _y = np.ones(3)
    m = model(double, lambda y: y + np.ones(3))
    (_, [_x]), own = owned(lambda: m.compute_with_vjp(dict(x=X), dict(_y=_y)))
    assert own == [False, False]
    assert_array_equal(_x, np.full(3, 2.0))
    assert_array_equal(_y, np.ones(3))


def test_not_while_somebody_watches():
    _, own = owned(lambda: model(double, double).compute("y", dict(x=X), monitor=lambda *args: None))
    assert own == [False, False]


def test_a_tape_is_as_it_was():
    """A tape serves many sweeps with the same result; a private one, in its last sweep, gives away what it has."""

    @operator
    class keeps:
        ain = "x"
        aout = "y"
        inplace = ("x",)

        def apl(node, x):
            return dict(y=x * x)

        def rcd(node, x, y):
            return dict(x=x.copy())

        def vjp(node, _y, x):
            return dict(_x=np.multiply(2 * _y, x, out=place(node, "x", x)))

        def jvp(node, x_, x):
            return dict(y_=2 * x * x_)

    m, x = model(keeps), X + 1
    _, tape = m.compute("y", dict(x=x), return_tape=True)
    for _ in range(3):
        _x, own = owned(lambda: tape.get_vjp().compute("_x", dict(_y=np.ones(3))))
        assert own == [False]
        assert_array_equal(_x, 2 * x)
    (_, [_x]), own = owned(lambda: m.compute_with_vjp(dict(x=x), dict(_y=np.ones(3))))
    assert own == [True]
    assert_array_equal(_x, 2 * x)
    assert_array_equal(x, X + 1)


def test_only_the_last_to_read_a_record_may_overwrite_it():
    @operator
    class keeps:
        ain = "x"
        aout = "y"
        inplace = ("x",)

        def apl(node, x):
            return dict(y=x**3)

        def rcd(node, x, y):
            return dict(x=x.copy())

        def vjp(node, _y, x):
            return dict(_x=np.multiply(3 * _y * x, x, out=place(node, "x", x)))

        def jvp(node, x_, x):
            return dict(y_=3 * x**2 * x_)

        def hvp(node, _y, x_, x):
            return dict(_x_=6 * x * x_ * _y)

    m, x = model(keeps, keeps), X + 1
    (_, [_x], [product]), own = owned(
        lambda: m.compute_with_hvp("y", dict(x=x), dict(x_=np.ones(3), _y=np.ones(3)))
    )
    assert not any(own) and len(own) == 3  # no change of a cotangent arrives at the last of them
    np.testing.assert_allclose(_x, 9 * x**8)
    np.testing.assert_allclose(product, 72 * x**7)
    (_, [product]), own = owned(lambda: m.compute_with_gnDp("y", dict(x=x), dict(x_=np.ones(3))))
    assert own == [True, True]
    np.testing.assert_allclose(product, (9 * x**8) ** 2)


@pytest.mark.parametrize(
    "options",
    [dict(ram=1), dict(ram=2), dict(ram=0, disk=3), dict(ram=5), dict(schedule="two-level", period=2)],
    ids=str,
)
def test_chains(options):
    chain, x = checkpoint(twice, n=5, **options), X.copy()
    m, plain = model(chain), model(*[twice] * 5)
    y, own = owned(lambda: m.compute("y", dict(x=x)))
    assert own == [False] + 9 * [True]
    assert_array_equal(y, plain.compute("y", dict(x=x)))
    (y, [_x]), own = owned(lambda: m.compute_with_vjp(dict(x=x), dict(_y=np.ones(3))))
    assert any(own)
    assert_array_equal(_x, plain.compute_with_vjp(dict(x=x), dict(_y=np.ones(3)))[1][0])
    # A tape of a chain can be swept again
    _, tape = m.compute("y", dict(x=x), return_tape=True)
    for _ in range(3):
        assert_array_equal(tape.get_vjp().compute("_x", dict(_y=np.ones(3))), _x)
    assert_array_equal(x, X)


@pytest.mark.parametrize(
    "options, first",
    [(dict(ram=0, disk=5), True), (dict(ram=1), False), (dict(schedule="tapes"), False)],
    ids=str,
)
def test_a_chain_in_a_graph(options, first):
    """A chain overwrites the state that it is given once that is on disk, and gives away the cotangents of the first state."""
    chain, x = checkpoint(twice, n=3, **options), X.copy()
    m, plain = model(double, chain, double), model(double, *[twice] * 3, double)
    ([y], [_x]), own = owned(lambda: m.compute_with_vjp(dict(x=x), dict(_y=np.ones(3))))
    assert own[:2] == [False, first]
    assert own[-1] is True
    assert_array_equal(y, plain.compute("y", dict(x=x)))
    assert_array_equal(_x, plain.compute_with_vjp(dict(x=x), dict(_y=np.ones(3)))[1][0])
    # A tape can be swept again, and its cotangents are not those of the first sweep
    _, tape = m.compute("y", dict(x=x), return_tape=True)
    for _ in range(3):
        _y = np.ones(3)
        assert_array_equal(tape.get_vjp().compute("_x", dict(_y=_y)), _x)
        assert_array_equal(_y, np.ones(3))
    assert_array_equal(x, X)


@autooperator("x -> y")
def pass_on(x):
    return same(x)


CHAINS = [
    checkpoint(step, n=n, **options)
    for step in (twice, pass_on)
    for n, options in (
        (1, dict(ram=1)),
        (3, dict(ram=1)),
        (3, dict(ram=0, disk=3)),
        (2, dict(schedule="tapes")),
    )
]


@settings(max_examples=examples(200))
@given(
    st.lists(
        st.tuples(st.sampled_from([double, same, twice, around, *CHAINS]), st.integers(0, 9)),
        min_size=1,
        max_size=8,
    ),
    st.sets(st.integers(0, 8), min_size=1),
    st.integers(0, 3),
)
def test_any_graph(calls, wanted, seed):
    """Whatever is made of what: outputs, cotangents and what was given are those of operators that never overwrite."""
    with Builder() as m:
        values = [m.input("x")]
        for step, source in calls:
            values.append(step(values[source % len(values)]))
        names = [f"y{i}" for i in sorted(wanted) if i < len(values)] or ["y0"]
        m.output(**{name: values[int(name[1:])] for name in names})
    x = np.random.default_rng(seed).normal(size=4)
    cotangents = {"_" + name: np.random.default_rng(seed + i).normal(size=4) for i, name in enumerate(names)}
    given_ = {name: c.copy() for name, c in cotangents.items()}
    results = []
    find = ownership.find_donated
    for function in find, lambda *args: ():
        ownership.find_donated = function
        try:
            m._plans.clear()
            out, pulled = m.compute_with_vjp(dict(x=x.copy()), cotangents)
            results.append([*out, *pulled, *m.compute(names, dict(x=x.copy()))])
        finally:
            ownership.find_donated = find
        for name, c in cotangents.items():
            assert_array_equal(c, given_[name])
    for a, b in zip(*results):
        assert_array_equal(a, b)


# What `check_ownership` finds. Each operator declares something and breaks it in one way.

SHELF = np.ones(3)


class Square:
    """x ** 2, without a promise."""

    ain = "x"
    aout = "y"

    def apl(node, x):
        return dict(y=x * x)

    def rcd(node, x, y):
        return dict(x=x)

    def vjp(node, _y, x):
        return dict(_x=2 * x * _y)

    def jvp(node, x_, x):
        return dict(y_=2 * x * x_)


class KeepsItsPromises(Square):
    fresh = True
    inplace = "x", "_y"

    def apl(node, x):
        return dict(y=np.multiply(x, x, out=x if node.owns("x") else None))

    def rcd(node, x, y):
        return dict(x=np.sqrt(y))

    def vjp(node, _y, x):
        x = np.multiply(x, 2, out=x if node.owns("x") else None)
        return dict(_x=np.multiply(x, _y, out=_y if node.owns("_y") else None))


class RecordsItsResult(Square):
    fresh = True

    def rcd(node, x, y):
        return dict(x=x, root=y)


class ReturnsItsRecord(Square):
    fresh = True

    def rcd(node, x, y):
        return dict(x=2 * x)

    def vjp(node, _y, x):
        x *= _y
        return dict(_x=x)


class ReturnsAConstant(Square):
    """The result is kept by the operator, which returns the same array every time."""

    fresh = True

    def apl(node, x):
        return dict(y=np.multiply(x, x, out=SHELF))


class ReturnsWhatItGot(Square):
    """The cotangent is the one that came in, where it would be the same."""

    fresh = True
    ain = "x"

    def apl(node, x):
        return dict(y=x + 0.0)

    def rcd(node, x, y):
        return dict()

    def vjp(node, _y):
        return dict(_x=_y)

    def jvp(node, x_):
        return dict(y_=x_)


class HandsOn(ReturnsWhatItGot):
    fresh = False
    alias = True


class HandsOnAnotherArray(Square):
    alias = True

    def rcd(node, x, y):
        return dict(x=2 * x)

    def vjp(node, _y, x):
        x *= _y
        return dict(_x=x)


class OverwritesTooEarly(KeepsItsPromises):
    def apl(node, x):
        y = x if node.owns("x") else np.empty_like(x)
        y[0] = x[0] ** 2
        y[1:] = x[1:] ** 2 + (x[0] - x[0])  # right, and so is this:
        y[1:] += 0.5 * (np.sqrt(y[0]) - abs(x[0]))  # which is zero only as long as x is what it was
        return dict(y=y)


class OverwritesItsCotangent(KeepsItsPromises):
    def vjp(node, _y, x):
        if node.owns("_y"):
            _y *= 2
        return dict(_x=2 * x * _y)


class RecordsNoCopy(KeepsItsPromises):
    def rcd(node, x, y):
        return dict(x=x)


class RecordsWhatItOverwrote(KeepsItsPromises):
    """The record is made after the application."""

    def rcd(node, x, y):
        return dict(x=x.copy())


class DoesNotAsk(Square):
    inplace = ("_y",)

    def vjp(node, _y, x):
        _y *= 2 * x
        return dict(_x=_y)


class SharesBetweenResults(Square):
    fresh = True
    aout = "y", "z"

    def apl(node, x):
        return dict(y=x * x, z=x * x)

    def rcd(node, x, y, z):
        return dict(x=x)

    def vjp(node, _y, _z, x):
        return dict(_x=2 * x * (_y + _z))

    def jvp(node, x_, x):
        return dict(y_=2 * x * x_, z_=2 * x * x_)


class ReturnsTheSameTwice(SharesBetweenResults):
    def apl(node, x):
        y = x * x
        return dict(y=y, z=y)


WRONG = [
    (
        RecordsItsResult,
        "'y' of RecordsItsResult is declared to be fresh, and shares memory with 'root' of the record",
    ),
    (
        ReturnsItsRecord,
        "'_x' of ReturnsItsRecord-vjp is declared to be fresh, and shares memory with 'x' of the record",
    ),
    (ReturnsAConstant, "shares memory with what another run got"),
    (
        ReturnsWhatItGot,
        "'_x' of ReturnsWhatItGot-vjp is declared to be fresh, and shares memory with the argument '_y'",
    ),
    (HandsOnAnotherArray, "declared to be an alias of a cotangent, and shares memory with 'x' of the record"),
    (OverwritesTooEarly, "the result 'y' is another one when arrays are given away"),
    (OverwritesItsCotangent, "the cotangent '_x' is another one when arrays are given away"),
    (RecordsWhatItOverwrote, "the cotangent '_x' is another one when arrays are given away"),
    (RecordsNoCopy, "changed one of its inputs in place"),
    (DoesNotAsk, "vjp of operator DoesNotAsk, declared at .*, changes its argument '_y' in place"),
    (
        ReturnsTheSameTwice,
        "the result 'z' of ReturnsTheSameTwice is declared to be fresh, and shares memory with the result 'y'",
    ),
]


@pytest.mark.parametrize("prototype, message", WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_promise_is_found(prototype, message):
    op, x = operator(prototype), np.array([0.5, 2.0, 3.0])
    with pytest.raises(AssertionError, match=message):
        check_ownership(op, x)
    with pytest.raises(AssertionError):
        check(op, x)


@pytest.mark.parametrize(
    "prototype", [Square, KeepsItsPromises, HandsOn, SharesBetweenResults], ids=lambda p: p.__name__
)
def test_promises_that_are_kept(prototype):
    op, x = operator(prototype), np.array([0.5, 2.0, 3.0])
    check(op, x)
    check_ownership(lambda x: op(x), x)


@pytest.mark.parametrize(
    "step, message",
    [(p, message) for p, message in WRONG if p is not DoesNotAsk],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_promise_is_found_inside_of_a_model(step, message):
    """Whatever stands around the operator, also an autooperator, and although the message may be another one."""
    broken = operator(step)

    @autooperator("x -> y")
    def inner(x):
        y = broken(double(x))
        return y[0] + 2.0 * y[1] if isinstance(y, list) else y

    check_ownership(lambda x: double(twice(x)), np.ones(3))
    with pytest.raises(AssertionError):
        check_ownership(lambda x: double(inner(x)), np.array([0.5, 2.0, 3.0]))


def test_the_onlooker_leaves():
    runner = Model.runner
    with pytest.raises(AssertionError):
        check_ownership(operator(ReturnsWhatItGot), np.ones(3))
    assert Model.runner is runner


@autooperator("x -> y")
def bent(x):
    y = double(x)
    return double(y * y * 0.125)


@pytest.mark.parametrize(
    "options", [dict(ram=2), dict(ram=3), dict(ram=1, disk=2), dict(schedule="two-level", period=2)], ids=str
)
def test_states_that_a_chain_keeps_in_memory_are_not_overwritten(options):
    """Its first operator may overwrite the state, and the slopes are those of the state that was."""
    chain, x = checkpoint(bent, n=6, **options), np.linspace(0.1, 0.4, 3)
    m, plain = model(chain), model(*[bent] * 6)
    (_, [_x]), own = owned(lambda: m.compute_with_vjp(dict(x=x.copy()), dict(_y=np.ones(3))))
    assert True in own and False in own
    assert_array_equal(_x, plain.compute_with_vjp(dict(x=x), dict(_y=np.ones(3)))[1][0])

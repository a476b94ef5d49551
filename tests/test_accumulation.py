"""Cotangents are summed in place where nobody else holds the array, and nowhere else."""

import tracemalloc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples
from vmad_lit import Builder, operator
from vmad_lit.core import autodiff, valuetypes
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.stdlib import add
from vmad_lit.core.valuetypes import value_type


@pytest.fixture(autouse=True, scope="module")
def no_array_is_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(valuetypes, "SMALL", 0)
        yield


KEPT = {}  # arrays that operators hold on to, by name


def kept(name, value):
    """The same array each time it is asked for."""
    return KEPT.setdefault(name, np.array(value))


class one_to_one:
    ain, aout = "x", "y"

    def apl(node, x):
        return np.array(x)

    def jvp(node, x_):
        return x_


@operator
class same(one_to_one):
    """Its vjp returns its own argument."""

    def vjp(node, _y):
        return _y


@operator
class view(one_to_one):
    """Its vjp returns a view of its argument."""

    def vjp(node, _y):
        return _y[::1]


@operator
class frozen(one_to_one):
    """Its vjp returns an array that cannot be written to."""

    def vjp(node, _y):
        out = _y.copy()
        out.flags.writeable = False
        return out


@operator
class spread(one_to_one):
    """Its vjp returns an array of which all elements are one."""

    def apl(node, x):
        return np.full(x.shape, x.sum())

    def vjp(node, _y):
        return np.broadcast_to(_y.sum(), _y.shape)

    def jvp(node, x_):
        return np.full(np.shape(x_), np.sum(x_))


@operator
class cached(one_to_one):
    """Its derivative is the constant array 1, 2, ..., always the same object."""

    def vjp(node, _y):
        return kept("ramp", np.arange(1.0, 1.0 + len(_y)))


@operator
class nothing(one_to_one):
    """Its derivative is zero."""

    def apl(node, x):
        return 0.0 * x

    def vjp(node, _y):
        return ZeroGradient


@operator
class single(one_to_one):
    """Its cotangent has less precision than its value."""

    def vjp(node, _y):
        return _y.astype("f4")


@operator
class shared:
    """One array for both inputs."""

    ain, aout = ("x1", "x2"), "y"

    def apl(node, x1, x2):
        return x1 + x2

    def vjp(node, _y):
        out = 2 * _y
        return dict(_x1=out, _x2=out)

    def jvp(node, x1_, x2_):
        return 2 * (x1_ + x2_)


OPERATORS = {op.__name__: op for op in (same, view, frozen, spread, cached, nothing, single)}
PARTIAL = dict(
    same=lambda g: g,
    view=lambda g: g,
    frozen=lambda g: g,
    spread=lambda g: np.full(g.shape, g.sum()),
    cached=lambda g: np.arange(1.0, 1.0 + len(g)),
    nothing=lambda g: 0 * g,
    single=lambda g: g.astype("f4").astype("f8"),
    shared=lambda g: 4 * g,
)


def build(names):
    with Builder() as m:
        x = m.input("x")
        m.output(
            **{
                f"y{i}": shared(x, x) if name == "shared" else OPERATORS[name](x)
                for i, name in enumerate(names)
            },
            x=x,
        )
    return m


@given(
    names=st.lists(st.sampled_from(sorted(PARTIAL)), min_size=1, max_size=8),
    seed=st.integers(0, 100),
)
@settings(max_examples=examples(200))
def test_nobody_else_is_written_to(names, seed):
    KEPT.clear()
    rng = np.random.default_rng(seed)
    m = build(names)
    x = rng.normal(size=3)
    cotangents = {f"_y{i}": rng.normal(size=3) for i in range(len(names))} | dict(_x=rng.normal(size=3))
    before = {name: value.copy() for name, value in cotangents.items()}
    expected = before["_x"] + sum(PARTIAL[name](before[f"_y{i}"]) for i, name in enumerate(names))
    ramp = kept("ramp", np.arange(1.0, 4.0)).copy()
    out, tape = m.compute([f"y{i}" for i in range(len(names))], dict(x=x), return_tape=True)
    vjp = tape.get_vjp()
    one = vjp.compute("_x", cotangents)
    first = one.copy()
    np.testing.assert_allclose(first, expected, rtol=1e-6, atol=1e-6)
    two = vjp.compute("_x", cotangents)  # a tape may be swept again
    np.testing.assert_array_equal(two, first)
    np.testing.assert_array_equal(one, first)  # what was returned stays
    for name, value in cotangents.items():
        np.testing.assert_array_equal(value, before[name])
    np.testing.assert_array_equal(kept("ramp", ramp), ramp)


def fan(n, *, size=4):
    with Builder() as m:
        x = m.input("x")
        m.output(y=sum((same(x) for i in range(n - 1)), same(x)))
    return m, dict(x=np.ones(size)), dict(_y=np.ones(size))


def test_a_monitor_keeps_what_it_saw():
    m, init, v = fan(6)
    _, tape = m.compute("y", init, return_tape=True)
    vjp, seen = tape.get_vjp(), []
    plan = vjp._plan(("_x",), record=False, reuse=False)

    def monitor(node, inputs, outputs, context):
        if node.primitive.name == "accumulate":
            seen.append(context._values[plan._slots[outputs["y"]]])

    vjp.compute("_x", v, monitor=monitor)
    assert [total[0] for total in seen] == [2, 3, 4, 5, 6]


def test_a_recorded_sweep_and_added_outputs():
    m, init, v = fan(4)
    _, tape = m.compute("y", init, return_tape=True)
    vjp = tape.get_vjp()
    sums = [node.varout["y"] for node in vjp if node.primitive.name == "accumulate"]
    names = {f"sum{i}": symbol for i, symbol in enumerate(sums)}
    tape.plan.derived["vjp"].output(**names)
    assert [total[0] for total in vjp.compute(list(names), v)] == [2, 3, 4]
    (total, *_), _ = vjp.compute([*names], v, return_tape=True)
    assert total[0] == 2


def test_a_sum_is_not_kept_longer_than_it_is_needed():
    """Not by the slot either in which it grows."""
    alive = []

    class Tracked(np.ndarray):
        """An array that can be referred to weakly."""

    def watch(name):
        @operator
        class watched(one_to_one):
            def vjp(node, _y):
                alive.append([ref() is not None for ref in refs])
                refs.append(weakref.ref(_y))
                return np.array(_y).view(Tracked)

        watched.__name__ = name
        return watched

    refs = []
    with Builder() as m:
        x = watch("before")(watch("after")(m.input("x")))
        m.output(y=sum((same(x) * 2.0 for i in range(4)), same(x)))
    (y,), (_x,) = m.compute_with_vjp(dict(x=np.ones(3)), dict(_y=np.ones(3)))
    np.testing.assert_array_equal(_x, np.full(3, 9.0))
    assert alive == [[], [False]]


def test_wider_cotangents_widen_the_sum():
    """No precision, shape or imaginary part is lost by adding in place."""
    wide = [np.ones(2, "f4"), np.ones(2, "f4"), np.full(2, 1e-9), np.full(2, 1j), 2.0, np.ones((3, 2))]

    def total():
        own, a = None, ZeroGradient
        for b in wide:
            a, own = autodiff.add_cotangents(a, b, own)
        return a

    np.testing.assert_array_equal(total(), sum(wide))
    assert total().dtype == np.result_type(*wide)
    np.testing.assert_array_equal(wide[0], 1)


@pytest.mark.parametrize("zero", [None, 0, 1, 2])
def test_lists_are_added_item_by_item(zero):
    parts = [[np.full(2, 10.0**i), np.full(3, 2 * 10.0**i)] for i in range(3)]
    if zero is not None:
        parts[zero] = ZeroGradient if zero == 1 else [ZeroGradient, parts[zero][1]]
    expected = [
        sum(p[k] for p in parts if p is not ZeroGradient and p[k] is not ZeroGradient) for k in (0, 1)
    ]
    own, a = None, ZeroGradient
    for b in [*parts, *parts]:
        a, own = autodiff.add_cotangents(a, b, own)
    for got, single in zip(a, expected):
        np.testing.assert_array_equal(got, 2 * single)
    for i, part in enumerate(parts):
        if part is not ZeroGradient:
            np.testing.assert_array_equal(part[1], np.full(3, 2 * 10.0**i))
    with pytest.raises(ValueError, match="zip"):
        autodiff.add_cotangents([1.0], [1.0, 2.0], None)


@operator
class norm_of_list:
    """sum of squares of the arrays in a list, given as one value."""

    ain, aout = "xs", "y"

    def apl(node, xs):
        return sum(np.sum(x**2) for x in xs)

    def vjp(node, _y, xs):
        return dict(_xs=[2 * _y * x for x in xs])

    def jvp(node, xs_, xs):
        return sum(np.sum(2 * x * x_) for x, x_ in zip(xs, xs_))


def test_a_value_that_is_a_list():
    with Builder() as m:
        xs = m.input("xs")
        m.output(y=norm_of_list(xs) + norm_of_list(xs) + norm_of_list(xs))
    _, [_xs] = m.compute_with_vjp(dict(xs=[np.ones(2), np.ones(3)]), dict(_y=1.0))
    assert len(_xs) == 2 and _xs[0].tolist() == [6, 6] and _xs[1].tolist() == [6, 6, 6]


class Unit:
    """A value for which + is all there is."""

    def __init__(self, n):
        self.n = n

    def __add__(self, other):
        return Unit(self.n + other.n)


def test_other_types_only_need_a_sum():
    @operator
    class double:
        ain, aout = "x", "y"

        def apl(node, x):
            return Unit(2 * x.n)

        def vjp(node, _y):
            return Unit(2 * _y.n)

    with Builder() as m:
        x = m.input("x")
        m.output(**{f"y{i}": double(x) for i in range(4)})
    _, [_x] = m.compute_with_vjp(dict(x=Unit(1)), {f"_y{i}": Unit(1) for i in range(4)})
    assert _x.n == 8


def peak_of(function):
    """The peak of the memory that a call takes, in bytes."""
    function()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@operator
class tenfold(one_to_one):
    def apl(node, x):
        return 10.0 * x

    def vjp(node, _y):
        return 10.0 * _y


@pytest.mark.parametrize("n", [10, 100])
def test_memory_of_a_fan(n):
    """However often a large array is used, its cotangent takes the total and one part."""
    size = 100_000
    with Builder() as m:
        x = m.input("x")
        m.output(**{f"y{i}": tenfold(x) for i in range(n)})
    init = dict(x=np.ones(size))
    out, tape = m.compute([f"y{i}" for i in range(n)], init, return_tape=True)
    vjp, one = tape.get_vjp(), np.ones(size)
    v = {f"_y{i}": one for i in range(n)}
    arrays = peak_of(lambda: vjp.compute("_x", v)) / (8 * size)
    assert arrays < 3.2  # two parts and their sum, at the first sum


def test_a_large_sum_is_made_in_one_array(monkeypatch):
    """Of a hundred uses, one sum is a new array."""
    made = []
    arrays = value_type(np.ones(1))
    plain = arrays.add_in_place
    monkeypatch.setattr(arrays, "add_in_place", lambda a, b: plain(a, b) and not made.append(id(a)))
    m, init, v = fan(100)
    m.compute_with_vjp(init, v)
    assert len(made) == 98 and len(set(made)) == 1


def test_literal_operands_and_inputs_stay():
    a = np.arange(4.0)
    with Builder() as m:
        x = m.input("x")
        y = x
        for i in range(5):
            y = add(y, x)
        m.output(y=y, z=x * a)
    x = np.ones(4)
    (y, z), [_x] = m.compute_with_vjp(dict(x=x), dict(_y=x, _z=a))
    np.testing.assert_array_equal(_x, 6 + a**2)
    np.testing.assert_array_equal(x, 1)
    np.testing.assert_array_equal(a, np.arange(4.0))

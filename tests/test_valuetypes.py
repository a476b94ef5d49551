"""Types of values: how they are found, and values of types of our own in models, gradients, chains and tests of derivatives."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.mixins import NDArrayOperatorsMixin

from vmad_lit import Builder, autooperator, operator
from vmad_lit.core import store, valuetypes
from vmad_lit.core.autodiff import add_cotangents
from vmad_lit.core.chain import checkpoint
from vmad_lit.core.error import BadArgument
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.store import keep_on_disk_by
from vmad_lit.core.valuetypes import (
    Arrays,
    ValueType,
    by_parts,
    conform,
    form_of,
    nbytes_of,
    register,
    value_type,
)
from vmad_lit.testing import check, inner, items_of, same

schedules = pytest.importorskip("checkpoint_schedules")


@pytest.fixture(autouse=True)
def types_are_forgotten():
    """What a test registers is gone after it."""
    yield
    known = valuetypes.VALUE_TYPES.registered
    for cls in [cls for cls in known if cls.__module__ == __name__]:
        del known[cls]
    valuetypes.VALUE_TYPES.clear()
    valuetypes.PLAIN.clear()


# -- The registry ------------------------------------------------------------------------------------------------------


def test_a_type_is_found_by_the_first_base_that_is_registered():
    class Base:
        pass

    class Derived(Base):
        pass

    assert type(value_type(Derived())) is ValueType

    @register(Base)
    class OfBase(ValueType):
        pass

    assert type(value_type(Derived())) is OfBase  # although it was asked for before

    @register(Derived)
    class OfDerived(OfBase):
        pass

    assert type(value_type(Derived())) is OfDerived and type(value_type(Base())) is OfBase


def test_types_of_numpy_are_arrays():
    for x in (
        np.ones(2),
        np.float32(1),
        np.float64(1),
        np.ma.masked_array([1.0]),
        np.ones(1).view(np.recarray),
    ):
        assert isinstance(value_type(x), Arrays)
    for x in 1.0, 1, True, 1j, None, "text", ZeroGradient:
        assert type(value_type(x)) is ValueType


def test_sums_are_made_in_the_way_of_the_type_that_holds():
    class Number:
        def __init__(self, n):
            self.n = n

        def __add__(self, other):
            return Number(self.n + other.n)

    def total():
        (y,), (_x,) = summing.compute_with_vjp(dict(x=Number(1)), dict(_y=Number(1)))
        return y.n, _x.n

    with Builder() as summing:
        x = summing.input("x")
        summing.output(y=x + x)
    assert total() == (2, 2)

    @register(Number)
    class Shouting(ValueType):
        def add(self, a, b):
            return Number(100 + a.n + b.n)

    assert total() == (102, 102)


def test_only_sums_are_changed_in_place():
    changed = []

    class Number:
        def __init__(self, n):
            self.n = n

        def __add__(self, other):
            return Number(self.n + other.n)

    @register(Number)
    class InPlace(ValueType):
        def add_in_place(self, total, part):
            changed.append(total)
            total.n += part.n
            return True

    numbers = [Number(i) for i in range(5)]
    total, own = ZeroGradient, None
    for number in numbers:
        total, own = add_cotangents(total, number, own)
    assert total.n == 10 and [number.n for number in numbers] == [0, 1, 2, 3, 4]
    assert len(changed) == 3 and all(number is total for number in changed)


def test_lists_are_summed_by_items_and_joined_by_the_operator():
    lists = value_type([])
    assert lists.add([1.0, [2.0, ZeroGradient]], [10.0, [20.0, 30.0]]) == [11.0, [22.0, 30.0]]
    assert value_type(()) is lists
    with Builder() as m:
        m.output(y=m.input("x") + m.input("z"))
    assert m.compute("y", dict(x=[1.0], z=[2.0])) == [1.0, 2.0]


@pytest.mark.serial
def test_fields_are_known_without_being_asked_for():
    """A program that gets its mesh from pmesh finds sums over all cells, although it imports nothing else of ours."""
    pytest.importorskip("pmesh")
    program = """
        import sys
        from pmesh.pm import ParticleMesh
        from vmad_lit import Builder

        assert "vmad_lit.lib.mesh" not in sys.modules
        with Builder() as m:
            b, x = m.input("b", "x")
            m.output(y=b * x)
        x = ParticleMesh([4, 4, 4], 1.0, dtype="f8").create(type="complex", value=1.0)
        print(m.compute_with_vjp(dict(b=2.0, x=x), dict(_y=x))[1][0])
        assert "vmad_lit.lib.mesh" in sys.modules
    """
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 64.0  # all modes, not the 48 that are stored


# -- Values with several parts -----------------------------------------------------------------------------------------


class State:
    """The state of an ocean: two arrays and a number, and something that is no number; no arithmetic."""

    def __init__(self, heat, salt, level, where):
        self.heat, self.salt, self.level, self.where = heat, salt, level, where


class States(ValueType):
    def take_apart(self, x):
        where = x.where
        return lambda parts: State(*parts, where), [x.heat, x.salt, x.level]

    def add(self, a, b):
        return by_parts(lambda p, q: p + q, a, b)


class stir:
    ain, aout = "x", "y"

    def apl(node, x):
        return State(np.sin(x.heat) + x.level, x.salt * x.salt, x.level * 0.5, x.where)

    def vjp(node, _y, x):
        return State(
            np.cos(x.heat) * _y.heat, 2 * x.salt * _y.salt, float(np.sum(_y.heat)) + 0.5 * _y.level, x.where
        )

    def jvp(node, x_, x):
        return State(np.cos(x.heat) * x_.heat + x_.level, 2 * x.salt * x_.salt, 0.5 * x_.level, x.where)


class wrong(stir):
    def vjp(node, _y, x):
        return State(np.cos(x.heat) * _y.heat, 2 * x.salt * _y.salt, 0.5 * _y.level, x.where)


class here:
    """What a state is at; it cannot be pickled."""

    def __reduce__(self):
        raise TypeError("no pickling")


def state():
    register(State)(States)
    return State(np.linspace(0.1, 1.0, 4), np.linspace(1.0, 2.0, 6).reshape(2, 3), 0.3, here())


def test_derivatives_of_values_with_parts_are_proved():
    check(operator(stir), state())
    with pytest.raises(AssertionError, match="wrong: jvp and vjp disagree"):
        check(operator(wrong), state())


def test_a_derivative_must_have_the_parts_of_the_value():
    class short(stir):
        def vjp(node, _y, x):
            return State(np.cos(x.heat) * _y.heat, 2 * x.salt[0] * _y.salt[0], 0.0, x.where)

    class array(stir):
        def vjp(node, _y, x):
            return np.cos(x.heat) * _y.heat

    with pytest.raises(
        AssertionError, match="returned '_x' as State, which does not fit 'x', a value that is State"
    ):
        check(operator(short), state())
    with pytest.raises(AssertionError, match="is a ndarray, expected a State"):
        check(operator(array), state())


def test_a_chain_of_such_states_on_disk():
    x, op = state(), operator(stir)

    @autooperator("x -> y")
    def step(x):
        return op(x)

    def on_tape(x):
        for i in range(7):
            x = step(x)
        return x

    def gradient(chain):
        with Builder() as m:
            m.output(y=chain(m.input("x")))
        return m.compute_with_vjp(dict(x=x), dict(_y=x))[1][0]

    expected = gradient(on_tape)
    for policy in dict(ram=0, disk=3), dict(schedule="disk"):
        got = gradient(checkpoint(step, 7, **policy))
        assert same(got, expected) and got.where is x.where
    assert not same(expected, x)


def test_cotangents_that_do_not_fit_are_refused():
    x = state()
    with Builder() as m:
        m.output(y=operator(stir)(m.input("x")))
    for _y, looks in (
        (State(x.heat, x.salt[0], 0.0, None), r"State \[\(4,\), \(3,\), \(\)\]"),
        (1.0, "1.0"),
        (x.heat, r"ndarray float64\[4\]"),
    ):
        with pytest.raises(
            BadArgument,
            match=rf"'_y' is {looks}, and belongs to a value that is State \[\(4,\), \(2, 3\), \(\)\]",
        ):
            m.compute_with_vjp(dict(x=x), dict(_y=_y))


@pytest.mark.parametrize(
    "value, given, expected",
    [
        (np.ones(3), [1, 2.5, 3], np.array([1, 2.5, 3])),
        (np.ones((2, 3)), [(1, 2, 3), [4, 5, 6]], np.arange(1.0, 7.0).reshape(2, 3)),
        (np.ones(3), np.array([2.0]), np.full(3, 2.0)),
        (np.ones(3), np.float32(2.0), np.full(3, 2.0)),
        (np.ones(3, "f4"), 2, np.full(3, 2.0, "f4")),
        (np.arange(3), np.uint8([1, 2, 3]), np.array([1.0, 2.0, 3.0])),
        (np.ones(0), [], np.ones(0)),
        (2.0, np.array([3.0]), 3.0),
        (2.0, [[3]], 3),
        (2.0, np.array(3.0), 3.0),
        (2.0, np.uint8(3), 3.0),
        (2j, [1 + 2j], 1 + 2j),
        ([1.0, 2.0], 3.0, [3.0, 3.0]),
        ([1.0, [2.0, 3.0]], np.array([4.0]), [4.0, [4.0, 4.0]]),
        ([1.0, np.ones(2)], 3.0, [3.0, np.full(2, 3.0)]),
        (
            [np.ones(2), np.ones(2)],
            np.arange(4.0).reshape(2, 2),
            [np.array([0.0, 1.0]), np.array([2.0, 3.0])],
        ),
        ([1.0, 2.0], np.array([3.0, 4.0]), [3.0, 4.0]),
        ((1.0, 2.0), (3, 4), [3, 4]),
    ],
    ids=repr,
)
def test_derivatives_are_converted_as_numpy_would(value, given, expected):
    taken = conform("_y", given, form_of(value))
    assert same(taken, expected)
    dtypes = [np.asarray(item).dtype.kind for item in items_of(taken)]
    assert "u" not in dtypes and isinstance(taken, (type(expected), int, float, complex))
    with Builder() as m:
        m.output(y=1.0 * m.input("x"))
    if not isinstance(value, (list, tuple)):
        _, (_x,) = m.compute_with_vjp(dict(x=value), dict(_y=given))
        y_ = m.compute_with_jvp("y", dict(x=value), dict(x_=given))[1]
        assert same(_x, expected) and same(y_, expected)


@pytest.mark.parametrize(
    "value, given",
    [
        (np.ones(3), [1.0, 2.0]),
        (np.ones(3), [1.0, [2.0], 3.0]),
        (np.ones(3), [[1.0, 2.0, 3.0]]),
        (np.ones(3), np.ones((3, 1))),
        (np.ones(3), ["a", "b", "c"]),
        (np.ones(3), np.array(["a", "b", "c"])),
        (np.ones(3), [None, 1.0, 2.0]),
        (np.ones(3), None),
        (np.ones(3), "1"),
        (2.0, np.ones(2)),
        (2.0, []),
        (2.0, "3"),
        (2.0, np.array(["3"])),
        ([1.0, 2.0], [1.0]),
        ([1.0, 2.0], np.ones(3)),
        ([1.0, np.ones(2)], np.ones((2, 3))),
        ([1.0, 2.0], None),
    ],
    ids=repr,
)
def test_what_numpy_would_not_convert_is_refused(value, given):
    with pytest.raises(BadArgument, match="'_y.* belongs to a "):
        conform("_y", given, form_of(value))


@pytest.mark.collective
def test_numbers_and_arrays_that_stand_for_fields():
    pytest.importorskip("pmesh")
    from vmad_lit.lib import fastpm

    pm = fastpm.ParticleMesh(Nmesh=[4, 6, 4], BoxSize=1.0)
    x = pm.generate_whitenoise(4, type="real")
    with Builder() as m:
        m.output(y=fastpm.c2r(fastpm.r2c(m.input("x"))) * 2.0)
    for given in 3.0, [3.0], np.array([3.0]), np.full(x.shape, 3.0):
        _, (_x,) = m.compute_with_vjp(dict(x=x), dict(_y=given))
        y_ = m.compute_with_jvp("y", dict(x=x), dict(x_=given))[1]
        for field in _x, y_:
            assert type(field) is type(x)
            np.testing.assert_allclose(field.value, np.full(x.shape, 6.0))
    with pytest.raises(BadArgument, match="'_y'.* belongs to a value that is RealField"):
        m.compute_with_vjp(dict(x=x), dict(_y=np.ones((7, 7))))


def test_the_algebra_of_parts():
    x = state()
    values = value_type(x)
    rng = np.random.default_rng(1)
    v = values.random_like(x, rng)
    assert [np.shape(part) for part in items_of(v)] == [(4,), (2, 3), ()] and v.where is x.where
    np.testing.assert_allclose(inner(x, v), x.heat @ v.heat + np.sum(x.salt * v.salt) + x.level * v.level)
    moved = values.step(x, 0.5, v)
    np.testing.assert_allclose(moved.salt, x.salt + 0.5 * v.salt)
    zero = values.zeros_like(x)
    assert inner(zero, zero) == 0.0 and form_of(zero).shape == form_of(x).shape
    copy = values.copy(x)
    copy.heat[0] = 7.0
    assert x.heat[0] == 0.1 and same(values.copy(x), x) and not same(copy, x)
    assert nbytes_of(x, {}) == 8 * (4 + 6) and nbytes_of([x, x, x.heat], {}) == 8 * (4 + 6)
    assert values.varies(x) and not values.varies(State(x.heat, "text", 1.0, None))
    assert [a.shape for a in values.gather(x)] == [(4,), (2, 3), ()]


@pytest.mark.parametrize(
    "x", [2.0, 3, 2j, np.float32(2), np.arange(3), np.ones((2, 1), "c8"), [1.0, [np.ones(2), 1j]]], ids=repr
)
def test_the_algebra_of_known_types(x):
    values = value_type(x)
    zero = values.zeros_like(x)
    assert inner(zero, zero) == 0.0
    assert [np.shape(p) for p in items_of(zero)] == [np.shape(p) for p in items_of(x)]
    assert [np.asarray(p).dtype for p in items_of(zero)] == [np.asarray(p).dtype for p in items_of(x)]
    assert same(values.step(zero, 1.0, x), x)
    assert values.varies(x) and same(values.copy(x), x)
    v, w = (values.random_like(x, np.random.default_rng(3)) for i in range(2))
    assert same(v, w) and inner(v, v) > 0
    assert [np.iscomplexobj(p) for p in items_of(v)] == [np.iscomplexobj(p) for p in items_of(x)]


# -- Values that know their weights, next to numbers and arrays ---------------------------------------------------------


class Cells(NDArrayOperatorsMixin):
    """Numbers on cells of different volumes; on many ranks each has some of the cells."""

    def __init__(self, numbers, volumes, comm=None):
        self.numbers, self.volumes, self.comm = numbers, volumes, comm

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        numbers = [x.numbers if isinstance(x, Cells) else x for x in inputs]
        return Cells(getattr(ufunc, method)(*numbers, **options), self.volumes, self.comm)


class ValuesOnCells(ValueType):
    def take_apart(self, x):
        volumes, comm = x.volumes, x.comm
        return lambda parts: Cells(*parts, volumes, comm), [x.numbers]

    def weighted_parts(self, x):
        return [x.volumes * x.numbers]


@operator
class integral:
    ain, aout = "x", "y"
    collective = True

    def apl(node, x):
        return dict(y=summed(x))

    def rcd(node, x, y):
        return dict(like=x * 0.0)

    def vjp(node, _y, like):
        return dict(_x=ZeroGradient if _y is ZeroGradient else like + _y)

    def jvp(node, x_, like):
        return dict(y_=summed(like + x_))


def summed(x):
    total = np.sum(x.volumes * x.numbers).item()
    return total if x.comm is None else x.comm.allreduce(total)


def cells(comm=None, dtype="f8"):
    register(Cells)(ValuesOnCells)
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    n = 12
    rng = np.random.default_rng(5)
    numbers, volumes = rng.uniform(0.2, 0.8, n).astype(dtype), rng.uniform(0.5, 2.0, n).astype(dtype)
    mine = slice(n * rank // size, n * (rank + 1) // size)
    return Cells(numbers[mine], volumes[mine], comm)


@pytest.mark.parametrize("dtype", ["f8", "f4"])
def test_numbers_next_to_weighted_values(dtype):
    x = cells(dtype=dtype)
    check(lambda x, b: integral(b * x + x / b - x * x + (x - b)), x, np.array(2.0, dtype))
    check(lambda x, b: integral(x**b + abs(b * x)), x, np.array(1.7, dtype))
    with Builder() as m:
        a, b = m.input("a", "b")
        m.output(y=a**b)
    _, (_a, _b) = m.compute_with_vjp(dict(a=x * 0.0, b=2.0), dict(_y=x))
    assert _b == 0.0 and not _a.numbers.any()


def test_complex_numbers_next_to_weighted_values():
    x = cells()
    z = x * (1 + 2j) + 0.3j
    for model in (lambda x, b: integral(b * x), lambda x, b: integral(x * x / b)):
        for a, b in (z, 2.0 + 1j), (x, 2.0 + 1j), (z, 2.0):
            check(model, a, b)


def test_arrays_next_to_weighted_values():
    x, b = cells(), np.linspace(1.0, 2.0, 12)
    check(lambda x, b: integral(x * b + b / x), x, b)
    check(lambda x, b: integral(x * b), x * 1j, b)
    for g in value_type(x).add(x, x), x:
        with Builder() as m:
            a, c = m.input("a", "c")
            m.output(y=a * c)
        with pytest.raises(ValueError, match=r"not Cells \(12,\) and an array \(1,\)"):
            m.compute_with_vjp(dict(a=x, c=np.ones(1)), dict(_y=g))


@pytest.mark.collective
def test_values_on_many_ranks():
    MPI = pytest.importorskip("mpi4py.MPI")
    from vmad_lit.testing import check_rank_invariance

    def model(x, b):
        return integral(b * x + x / b - x * x)

    def gradient(comm):
        with Builder() as m:
            m.output(y=model(*m.input("x", "b")))
        x = cells(comm)
        (y,), (_x, _b) = m.compute_with_vjp(dict(x=x, b=2.0), dict(_y=1.0))
        return [y, _b, comm.allreduce(float(np.sum(_x.numbers * x.volumes)))]

    comm = MPI.COMM_WORLD
    x = cells(comm)
    check(model, x, 2.0)
    noise = value_type(x).random_like(x, np.random.default_rng(1))
    assert len(set(comm.allgather(noise.numbers[0]))) == comm.size
    check_rank_invariance(gradient)


@pytest.mark.collective
def test_fields_next_to_complex_numbers_and_arrays():
    pytest.importorskip("pmesh")
    from vmad_lit.lib import fastpm, linalg

    pm = fastpm.ParticleMesh(Nmesh=[4, 6, 5], BoxSize=1.0, dtype="f8")
    c = pm.generate_whitenoise(4, type="complex", mean=20.0)
    check(lambda b, c: linalg.dot(b * c, c * (1 + 1j)), 2.0 + 1j, c)
    b = np.random.default_rng(1 + pm.comm.rank).uniform(1.0, 2.0, c.shape)
    check(lambda b, c: linalg.dot(b * c, c * (1 + 1j)), b, c, comm=pm.comm)


# -- The disk alone ----------------------------------------------------------------------------------------------------


def test_a_function_for_the_disk_changes_nothing_else():
    class Opaque:
        def __init__(self, x):
            self.x = x

    @keep_on_disk_by(Opaque)
    def take_apart(value):
        return Opaque, value.x

    values = value_type(Opaque(1.0))
    assert values.to_disk(Opaque(1.0)) == (Opaque, 1.0)
    assert values.take_apart(Opaque(1.0)) is None and form_of(Opaque(1.0)).shape is None
    assert type(value_type(object())) is ValueType and value_type(object()).to_disk(object()) is None


def test_names_of_chains_stay_where_they_were():
    from vmad_lit.core import chain, checkpoint as old, schedules, store

    assert old.checkpoint is chain.checkpoint and old.keep_on_disk_by is store.keep_on_disk_by
    assert old.SCHEDULES is schedules.SCHEDULES and old.Disk is store.Disk and old.Chain is chain.Chain


def test_tuples_come_back_from_disk_as_they_were():
    class Pair(tuple):
        pass

    Pair.__qualname__ = "Pair"
    globals()["Pair"] = Pair  # where pickle looks for it
    try:
        back = store.OnDisk(store.Disk(None, None), [Pair([1.0, np.ones(2)]), (2.0,), [3.0]]).get()
    finally:
        del globals()["Pair"]
    assert [type(x) for x in back] == [Pair, tuple, list] and same(back, [[1.0, np.ones(2)], [2.0], [3.0]])


@pytest.mark.collective
def test_what_is_asked_of_fields():
    MPI = pytest.importorskip("mpi4py.MPI")
    pytest.importorskip("pmesh")
    from vmad_lit.lib import fastpm

    comm = MPI.COMM_WORLD
    pm = fastpm.ParticleMesh(Nmesh=[6, 4, 4], BoxSize=1.0, comm=comm)
    for kind in "real", "complex", "untransposedcomplex":
        x = pm.create(type=kind, value=1.0)
        values, rng = value_type(x), np.random.default_rng(7)
        assert form_of(x).whole == ((6, 4, 4) if kind == "real" else (6, 4, 3))
        v = values.random_like(x, rng)
        zero, copy = values.zeros_like(x), values.copy(x)
        assert type(v) is type(zero) is type(copy) is type(x)
        assert (
            inner(x, x) == 96 and inner(zero, v) == 0 and same(copy, x) and not (x.value.size and same(v, x))
        )
        np.testing.assert_allclose(inner(x, v), np.real(x.cdot(v)))
        (whole,) = values.gather(v)
        assert len({a.tobytes() for a in comm.allgather(whole)}) == 1 and len(np.unique(whole)) > 40
        with Builder() as m:
            m.output(y=m.input("x") * 2.0)
        other = fastpm.ParticleMesh(Nmesh=[6, 3, 4], BoxSize=1.0, comm=comm).create(type=kind, value=1.0)
        with pytest.raises(
            BadArgument, match="'_y' is .*Field.* of .*, and belongs to a value that is .*Field.* of "
        ):
            m.compute_with_vjp(dict(x=x), dict(_y=other))

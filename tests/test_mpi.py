"""The operators between ranks: values, adjoints and tangents, on any number of ranks."""

import numpy as np
import pytest
from mpi4py import MPI

from helpers import join
from vmad_lit import Builder, operator
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.lib import mpi

pytestmark = pytest.mark.collective

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
DTYPES = ["f4", "f8", "c8", "c16"]

# How the inner product of each kind of value is made from the products on the ranks.
REDUCE = {
    "partitioned": lambda a: COMM.allreduce(a),
    "replicated": lambda a: COMM.bcast(a),
    "root": lambda a: COMM.bcast(a),
}


def inner(kind, a, b):
    mine = 0.0
    if a is not None and b is not None and a is not ZeroGradient and b is not ZeroGradient:
        mine = np.sum(np.conj(np.asarray(a, "c16")) * b).real
    return REDUCE[kind](mine)


def noise(kind, shape, dtype="f8", seed=0):
    """A value of a kind: the same on all ranks if replicated, another on each if partitioned, None but on the root."""
    rng = np.random.default_rng([seed, RANK if kind == "partitioned" else 99])
    x = rng.normal(size=shape) + (1j * rng.normal(size=shape) if np.dtype(dtype).kind == "c" else 0)
    x = np.asarray(x, dtype)[()]
    return None if kind == "root" and RANK != 0 else x


def like(kind, y, seed):
    return None if y is None else noise(kind, np.shape(y), np.asarray(y).dtype, seed)


def prove(function, kinds, x, rtol=1e-10):
    """The dot product test of a linear operator; returns its value."""
    with Builder() as m:
        s = m.input("x")
        m.output(y=function(s))
    y = m.compute("y", dict(x=x))
    v = like(kinds[0], x, 1)
    y2, Jv = m.compute_with_jvp("y", dict(x=x), dict(x_=v))
    w = like(kinds[1], y, 2)
    _, [JTw] = m.compute_with_vjp(dict(x=x), dict(_y=w))
    if x is not None and JTw is not ZeroGradient:
        assert np.shape(JTw) == np.shape(x)
        assert np.asarray(JTw).dtype == np.asarray(x).dtype
    if Jv is not None and Jv is not ZeroGradient:
        assert np.shape(Jv) == np.shape(y) and np.asarray(Jv).dtype == np.asarray(y).dtype
    a, b = inner(kinds[1], w, Jv), inner(kinds[0], JTw, v)
    assert a == pytest.approx(b, rel=rtol, abs=rtol)
    assert a != 0
    # zeros on all ranks, and zeros on some
    _, none = m.compute_with_jvp("y", dict(x=x), dict(x_=ZeroGradient))
    assert none is ZeroGradient or none is None or not np.any(none)
    part = v if RANK % 2 == 0 or kinds[0] != "partitioned" else ZeroGradient
    _, Jp = m.compute_with_jvp("y", dict(x=x), dict(x_=part))
    _, Jq = m.compute_with_jvp("y", dict(x=x), dict(x_=v * 0 if part is ZeroGradient else v))
    assert Jp is Jq or np.array_equal(Jp, Jq) or (Jp is ZeroGradient and not np.any(Jq))
    part = w if RANK % 2 == 0 or kinds[1] != "partitioned" else ZeroGradient
    _, [a] = m.compute_with_vjp(dict(x=x), dict(_y=part))
    _, [b] = m.compute_with_vjp(dict(x=x), dict(_y=w * 0 if part is ZeroGradient else w))
    assert a is b or np.array_equal(a, b) or (a is ZeroGradient and not np.any(b))
    return y


def tolerance(dtype):
    return 1e-4 if np.dtype(dtype).char in "fF" else 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 0, 2)])
def test_allreduce(dtype, shape):
    x = noise("partitioned", shape, dtype)
    if 0 in shape:
        with Builder() as m:
            s = m.input("x")
            m.output(y=mpi.allreduce(s, COMM))
        assert m.compute("y", dict(x=x)).shape == shape
        return
    y = prove(lambda s: mpi.allreduce(s, COMM), ("partitioned", "replicated"), x, tolerance(dtype))
    np.testing.assert_allclose(y, sum(COMM.allgather(x)), rtol=tolerance(dtype), atol=tolerance(dtype))


def compute(function, x):
    with Builder() as m:
        s = m.input("x")
        m.output(y=function(s))
    return m.compute("y", dict(x=x))


@pytest.mark.parametrize("x", [1, 2.5, 1j, True, np.int32(3), np.float16(0.5)])
def test_allreduce_of_numbers(x):
    y = compute(lambda s: mpi.allreduce(s, COMM), x)
    assert y == SIZE * x
    if type(x) in (int, float, complex):
        assert type(y) is type(x)


def test_allreduce_of_other_types():
    assert np.array_equal(compute(lambda s: mpi.allreduce(s, COMM), np.array([True, True])), [SIZE, SIZE])
    assert compute(lambda s: mpi.allreduce(s, COMM), 2**80) == SIZE * 2**80
    y = compute(lambda s: mpi.allreduce(s, COMM), np.arange(3.0) if RANK else np.arange(3, dtype="f4"))
    assert np.array_equal(y, SIZE * np.arange(3.0))
    y = compute(lambda s: mpi.allreduce(s, COMM), np.arange(6.0).reshape(2, 3).T[::-1])
    assert np.array_equal(y, SIZE * np.arange(6.0).reshape(2, 3).T[::-1])


@pytest.mark.skipif(SIZE == 1, reason="needs ranks that differ")
@pytest.mark.parametrize(
    "message, build",
    [
        ("number of a rank, from 0 to", lambda x: mpi.bcast(x, COMM, SIZE)),
        ("number of a rank", lambda x: mpi.gather(x, COMM, "first")),
        ("number of rows", lambda x: mpi.halo(x, COMM, -1)),
        ("rank 1: counts", lambda x: mpi.alltoall(x, COMM, None if RANK != 1 else ["a"] * SIZE)),
        (
            "rank 0 sends to 1, which expects nothing",
            lambda x: mpi.sendrecv(x, COMM, (RANK + 1) % SIZE, RANK),
        ),
        (
            "rank 1 expects something from",
            lambda x: mpi.sendrecv(x, COMM, MPI.PROC_NULL, RANK - 1 if RANK else MPI.PROC_NULL),
        ),
        ("sends to 99", lambda x: mpi.sendrecv(x, COMM, 99 if RANK else 0, 0 if not RANK else 99)),
    ],
)
def test_settings_that_are_wrong_fail_everywhere(message, build):
    with Builder() as m:
        m.output(y=build(m.input("x")))
    with pytest.raises(ValueError, match=message):
        m.compute("y", dict(x=np.arange(4.0)))


@pytest.mark.skipif(SIZE == 1, reason="needs ranks that differ")
@pytest.mark.parametrize(
    "message, build, setting",
    [
        ("same 'root', but rank 0 has 0 and rank 1 has 1", mpi.bcast, min(RANK, 1)),
        ("same 'root'", mpi.gather, min(RANK, 1)),
        ("same 'root'", lambda x, comm, root: mpi.scatter(x, comm, root=root), min(RANK, 1)),
        ("same 'width'", mpi.halo, 1 + min(RANK, 1)),
        ("same 'periodic'", lambda x, comm, periodic: mpi.halo(x, comm, 1, periodic), RANK == 0),
    ],
    ids=["bcast", "gather", "scatter", "width", "periodic"],
)
def test_settings_that_differ_fail_everywhere(message, build, setting):
    """By the operator, if they are known when the model runs; else before it runs."""
    with Builder() as m:
        m.output(y=build(m.input("x"), COMM, m.input("setting")))
    with pytest.raises(ValueError, match=message):
        m.compute("y", dict(x=np.arange(4.0), setting=setting))
    with Builder() as m:
        m.output(y=build(m.input("x"), COMM, setting))
    with pytest.raises(ValueError, match="different models.* built at .*test_mpi.py:"):
        m.compute("y", dict(x=np.arange(4.0)))


@pytest.mark.skipif(SIZE == 1, reason="needs ranks that differ")
@pytest.mark.parametrize("bad", [None, "words", [1.0], dict()])
def test_a_sum_of_what_has_none_fails_everywhere(bad):
    with Builder() as m:
        m.output(y=mpi.allreduce(m.input("x"), COMM))
    with pytest.raises(TypeError, match="on rank 1"):
        m.compute("y", dict(x=bad if RANK == 1 else 1.0))


@pytest.mark.skipif(SIZE == 1, reason="needs ranks that differ")
def test_shapes_that_differ_fail_everywhere():
    with pytest.raises(ValueError, match="same shape"):
        compute(lambda s: mpi.allreduce(s, COMM), np.ones(RANK))
    with pytest.raises(ValueError, match="differ in more than their length"):
        compute(lambda s: mpi.allgather(s, COMM), np.ones((2, RANK)))
    with pytest.raises(ValueError, match="do not add up"):
        compute(lambda s: mpi.scatter(s, COMM, counts=[1] * SIZE), np.ones(SIZE + 1) if RANK == 0 else None)
    with pytest.raises(ValueError, match="rank 1: counts"):
        compute(lambda s: mpi.alltoall(s, COMM, counts=[3] * SIZE), np.ones(3 * SIZE if RANK != 1 else 2))


def test_lists_are_refused():
    with pytest.raises(TypeError, match="list"):
        compute(lambda s: mpi.allreduce(s, COMM), [1.0, 2.0])
    with pytest.raises(ValueError, match="halo"):
        compute(lambda s: mpi.halo(s, COMM), 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_allbcast(dtype, shape):
    x = noise("replicated", shape, dtype)
    y = prove(lambda s: mpi.allbcast(s, COMM), ("replicated", "partitioned"), x, tolerance(dtype))
    assert np.array_equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("root", [0])
def test_bcast(dtype, shape, root):
    y = prove(
        lambda s: mpi.bcast(s, COMM, root),
        ("root", "replicated"),
        noise("root", shape, dtype),
        tolerance(dtype),
    )
    assert np.array_equal(y, COMM.bcast(y)) and np.shape(y) == shape


def test_bcast_from_another_root():
    root = SIZE - 1
    x = np.arange(3.0) if RANK == root else None
    with Builder() as m:
        s = m.input("x")
        m.output(y=mpi.bcast(s, COMM, root=root))
    [y], [_x] = m.compute_with_vjp(dict(x=x), dict(_y=np.ones(3)))
    assert np.array_equal(y, np.arange(3.0))
    assert np.array_equal(_x, np.ones(3)) if RANK == root else _x is ZeroGradient
    assert compute(lambda s: mpi.bcast(s, COMM, root), "text" if RANK == root else None) == "text"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (RANK,), (2, 3), (max(2 - RANK, 0), 2)])
def test_gather_and_allgather(dtype, shape):
    x = noise("partitioned", shape, dtype)
    whole = np.concatenate([np.atleast_1d(part) for part in COMM.allgather(x)])
    if whole.size:
        y = prove(lambda s: mpi.gather(s, COMM), ("partitioned", "root"), x, tolerance(dtype))
        assert (y is None) == (RANK != 0)
        assert y is None or np.array_equal(y, whole) and y.dtype == dtype
        y = prove(lambda s: mpi.allgather(s, COMM), ("partitioned", "replicated"), x, tolerance(dtype))
    y = compute(lambda s: mpi.allgather(s, COMM), x)
    assert np.array_equal(y, whole) and y.dtype == dtype


def test_gather_of_objects():
    assert compute(lambda s: mpi.allgather(s, COMM), str(RANK)) == [str(r) for r in range(SIZE)]
    y = compute(lambda s: mpi.gather(s, COMM), {"rank": RANK})
    assert y == ([{"rank": r} for r in range(SIZE)] if RANK == 0 else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [None, list(range(SIZE)), [3] + [0] * (SIZE - 1)])
def test_scatter(dtype, counts):
    n = 2 * SIZE + 1 if counts is None else sum(counts)
    if n == 0:
        pytest.skip("nothing to scatter")
    x = noise("root", (n, 2), dtype)
    y = prove(lambda s: mpi.scatter(s, COMM, counts=counts), ("root", "partitioned"), x, tolerance(dtype))
    whole = join(y)
    assert x is None or np.array_equal(x, whole)
    assert counts is None or len(y) == counts[RANK]


def test_scatter_of_objects():
    y = compute(lambda s: mpi.scatter(s, COMM), [str(r) for r in range(SIZE)] if RANK == 0 else None)
    assert y == str(RANK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["even", "triangle", "empty rank"])
def test_alltoall(dtype, how):
    counts = {
        "even": None,
        "triangle": [RANK + r for r in range(SIZE)],
        "empty rank": [0 if RANK else 1] * SIZE,
    }[how]
    n = SIZE + 1 if counts is None else sum(counts)
    x = noise("partitioned", (n, 2), dtype)
    if COMM.allreduce(n) == 0:
        return
    y = prove(
        lambda s: mpi.alltoall(s, COMM, counts=counts), ("partitioned", "partitioned"), x, tolerance(dtype)
    )
    if counts is not None:
        edges = np.cumsum([0, *counts])
        parts = COMM.alltoall([x[edges[r] : edges[r + 1]] for r in range(SIZE)])
        assert np.array_equal(y, np.concatenate(parts))


def test_alltoall_of_lists():
    with Builder() as m:
        x = [m.input(f"x{r}") for r in range(SIZE)]
        m.output(y=mpi.alltoall(x, COMM))
    init = {f"x{r}": np.full(r + 1, RANK * 10.0 + r) for r in range(SIZE)}
    [y], _x = m.compute_with_vjp(init, dict(_y=[np.full(RANK + 1, 1.0 + r) for r in range(SIZE)]))
    assert [part.tolist() for part in y] == [[r * 10.0 + RANK] * (RANK + 1) for r in range(SIZE)]
    assert [part.tolist() for part in _x] == [[1.0 + RANK] * (r + 1) for r in range(SIZE)]


@pytest.mark.parametrize("without", [[SIZE - 1], range(SIZE)], ids=["one rank", "all"])
def test_alltoall_of_lists_where_nobody_wants_a_result(without):
    """Zero cotangents and tangents of a whole list reach every rank, as one zero for each that was sent."""
    with Builder() as m:
        m.output(y=mpi.alltoall(m.input("x"), COMM))
    _, tape = m.compute("y", dict(x=[np.full(2, 1.0 + r) for r in range(SIZE)]), return_tape=True)
    change = ZeroGradient if RANK in without else [np.full(2, 5.0 + RANK)] * SIZE
    for found in tape.get_vjp().compute("_x", dict(_y=change)), tape.get_jvp().compute("y_", dict(x_=change)):
        parts = [ZeroGradient] * SIZE if found is ZeroGradient else found
        assert [np.max(part + np.zeros(2)) for part in parts] == [
            0 if r in without else 5 + r for r in range(SIZE)
        ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (RANK + 1, 2)])
@pytest.mark.parametrize("offset", [1, -2])
def test_shift(dtype, shape, offset):
    x = noise("partitioned", shape, dtype)
    y = prove(lambda s: mpi.shift(s, COMM, offset), ("partitioned", "partitioned"), x, tolerance(dtype))
    assert np.array_equal(y, COMM.allgather(x)[(RANK - offset) % SIZE])


@pytest.mark.skipif(SIZE == 1, reason="needs neighbours")
def test_sendrecv_with_open_ends():
    dest = RANK + 1 if RANK + 1 < SIZE else MPI.PROC_NULL
    source = RANK - 1 if RANK > 0 else MPI.PROC_NULL
    x = noise("partitioned", (2,))
    y = prove(lambda s: mpi.sendrecv(s, COMM, dest, source), ("partitioned", "partitioned"), x)
    parts = COMM.allgather(x)
    assert np.array_equal(y, parts[RANK - 1] if RANK else np.zeros(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("width", [0, 1, 5])
@pytest.mark.parametrize("counts", [[2] * SIZE, [r % 2 * 3 + (SIZE == 1) for r in range(SIZE)]])
def test_halo(dtype, periodic, width, counts):
    x = noise("partitioned", (counts[RANK], 2), dtype)
    y = prove(
        lambda s: mpi.halo(s, COMM, width, periodic), ("partitioned", "partitioned"), x, tolerance(dtype)
    )
    whole = join(x)
    n, start = len(whole), sum(counts[:RANK])
    index = np.arange(start - width, start + counts[RANK] + width)
    expected = whole[index % n]
    if not periodic:
        expected[(index < 0) | (index >= n)] = 0
    assert np.array_equal(y, expected)


def test_zero_that_only_some_ranks_have():
    """A vjp that finds, at run time and on some ranks, that nothing depends on its input."""

    @operator
    class capricious:
        ain, aout = "x", "y"

        def apl(node, x):
            return x * 1.0

        def vjp(node, _y):
            return dict(_x=ZeroGradient if RANK == 0 else _y)

        def jvp(node, x_):
            return dict(y_=ZeroGradient if RANK == 0 else x_)

    with Builder() as m:
        x = m.input("x")
        m.output(y=mpi.allreduce(capricious(mpi.allbcast(x, COMM)), COMM))
    [y], [_x] = m.compute_with_vjp(dict(x=np.ones(2)), dict(_y=np.ones(2)))
    y_ = m.compute_with_jvp("y", dict(x=np.ones(2)), dict(x_=np.ones(2)))[1]
    assert np.array_equal(y, np.full(2, SIZE))
    if SIZE == 1:
        assert _x is ZeroGradient and y_ is ZeroGradient
    else:
        assert np.array_equal(_x, np.full(2, SIZE - 1)) and np.array_equal(y_, np.full(2, SIZE - 1))


def test_inside_a_forgetful_autooperator():
    from vmad_lit import autooperator

    @autooperator("x -> y")
    def mean(x):
        return mpi.allreduce(mpi.allbcast(x, COMM) * RANK, COMM)

    with Builder() as m:
        x = m.input("x")
        m.output(y=mean.forgetful(x) + mean(x))
    [y], [_x] = m.compute_with_vjp(dict(x=2), dict(_y=1))
    n = sum(range(SIZE))
    assert (y, _x) == (4 * n, 2 * n)


def test_second_derivatives():
    """Of L = sum over ranks of (1 + rank)^2 x^3, where one rank finds at run time that its part of the curvature is zero."""

    @operator
    class cube:
        ain, aout = "x", "y"

        def apl(node, x, c):
            return c * x**3

        def vjp(node, _y, x, c):
            return dict(_x=_y * c * 3 * x**2)

        def jvp(node, x_, x, c):
            return dict(y_=x_ * c * 3 * x**2)

        def hvp(node, _y, x_, x, c):
            return dict(_x_=ZeroGradient if RANK == 1 else _y * c * 6 * x * x_)

    with Builder() as m:
        x = m.input("x")
        m.output(y=mpi.allreduce(cube(mpi.allbcast(x, COMM), (1.0 + RANK) ** 2), COMM))
    x, v, w = np.array([1.0, 2.0]), np.array([1.0, -1.0]), np.array([1.0, 10.0])
    y, [gradient], [product] = m.compute_with_hvp("y", dict(x=x), dict(x_=v, _y=w))
    squares = [(1.0 + rank) ** 2 for rank in range(SIZE)]
    n = sum(squares)
    np.testing.assert_allclose(y, n * x**3)
    np.testing.assert_allclose(gradient, n * w * 3 * x**2)
    np.testing.assert_allclose(product, (n - (squares[1] if SIZE > 1 else 0)) * w * 6 * x * v)


@pytest.mark.parametrize("root", range(SIZE))
def test_any_rank_may_be_the_root(root):
    """What is dealt from a root and joined on it; what other ranks have as its tangent or cotangent is nobody's."""
    counts = [rank + 1 for rank in range(SIZE)]
    rows, zero = np.arange(sum(counts) * 2.0).reshape(-1, 2), 5.0 if RANK != root else ZeroGradient
    start = sum(counts[:RANK])
    mine, on_root = rows[start : start + counts[RANK]], rows if RANK == root else None
    with Builder() as deal:
        x = deal.input("x")
        deal.output(y=mpi.scatter(x, COMM, counts if RANK == root else None, root))
    with Builder() as join:
        x = join.input("x")
        join.output(y=mpi.gather(x, COMM, root))
    elsewhere = [on_root, rows if RANK == root else ZeroGradient]

    [y], [_x] = deal.compute_with_vjp(dict(x=on_root), dict(_y=-mine))
    assert np.array_equal(y, mine)
    assert np.array_equal(_x, -rows) if RANK == root else _x is ZeroGradient
    for x_ in elsewhere:
        assert np.array_equal(deal.compute_with_jvp("y", dict(x=on_root), dict(x_=x_))[1], mine)
    assert deal.compute_with_jvp("y", dict(x=on_root), dict(x_=zero))[1] is ZeroGradient

    for _y in elsewhere:
        [y], [_x] = join.compute_with_vjp(dict(x=mine), dict(_y=_y))
        assert np.array_equal(y, rows) if RANK == root else y is None
        assert np.array_equal(_x, mine)
    assert join.compute_with_vjp(dict(x=mine), dict(_y=zero))[1] == [ZeroGradient]
    y_ = join.compute_with_jvp("y", dict(x=mine), dict(x_=-mine))[1]
    assert np.array_equal(y_, -rows) if RANK == root else y_ is None
    words = compute(lambda s: mpi.gather(s, COMM, root), str(RANK))
    assert words == ([str(rank) for rank in range(SIZE)] if RANK == root else None)
    assert compute(lambda s: mpi.scatter(s, COMM, root=root), words) == str(RANK)

"""The compiled loops over meshes, beside the same sums by NumPy; over ranks they are tested with the force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples

loops = pytest.importorskip("vmad_lit.lib.loops")


def along(x, axis):
    """The four-point difference of a periodic mesh, without its factor."""
    shift = [np.roll(x, -step, axis) for step in (-2, -1, 1, 2)]
    return 8 * (shift[2] - shift[1]) - (shift[3] - shift[0])


def meshes(shape, count, dtype, padded, together, rng):
    """Arrays of a shape with common strides: padded rows, side by side in memory, or plain."""
    if together:
        return list(np.moveaxis(rng.normal(size=(*shape, count)).astype(dtype), -1, 0))
    row = shape[:-1] + (shape[-1] + (2 if padded else 0),)
    return [rng.normal(size=row).astype(dtype)[..., : shape[-1]] for _ in range(count)]


@settings(max_examples=examples(150))
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from(["f4", "f8"]),
    *[st.booleans()] * 4,
    st.integers(0, 99),
)
def test_gradient_and_divergence(shape, dtype, padded, padded_out, together, beside, seed):
    rng, ndim, shape = np.random.default_rng(seed), len(shape), tuple(shape)
    factors, tolerance = (
        rng.normal(size=ndim),
        dict(rtol=1e-4, atol=1e-4) if dtype == "f4" else dict(atol=1e-12),
    )
    x, other = meshes(shape, 2, dtype, padded, False, rng)
    outs = meshes(shape, ndim + beside, dtype, padded_out, together, rng)
    loops.gradient(outs, x, factors, other if beside else None)
    for axis in range(ndim):
        np.testing.assert_allclose(outs[axis], factors[axis] * along(x, axis), **tolerance)
    if beside:
        np.testing.assert_array_equal(outs[-1], other)
    sources = meshes(shape, ndim, dtype, padded_out, together, rng)
    loops.divergence(x, sources, factors)
    np.testing.assert_allclose(
        x, sum(factors[axis] * along(sources[axis], axis) for axis in range(ndim)), **tolerance
    )


@settings(max_examples=examples(60))
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_difference(shape, add, axis, seed):
    rng, shape = np.random.default_rng(seed), tuple(shape)
    axis = min(axis, len(shape) - 1)
    x, y = meshes(shape, 2, "f8", True, False, rng)
    want = -0.3 * along(x, axis) + (y if add else 0)
    loops.difference(y, x, axis, -0.3, add)
    np.testing.assert_allclose(y, want, atol=1e-12)


@settings(max_examples=examples(60))
@given(
    st.lists(st.tuples(st.integers(1, 6), st.floats(0, 1)), min_size=1, max_size=3),
    st.sampled_from(["f4", "f8"]),
    *[st.booleans()] * 2,
    st.integers(0, 99),
)
def test_interpolate(axes, dtype, padded, together, seed):
    shape, shift = zip(*axes)
    rng, tolerance = np.random.default_rng(seed), 1e-5 if dtype == "f4" else 1e-13
    (x, out), (y, back) = (meshes(shape, 2, dtype, padded, both, rng) for both in (together, False))
    loops.interpolate(out, x, shift)
    want = x.astype("f8")
    for axis, s in enumerate(shift):
        want = (1 - s) * want + s * np.roll(want, -1, axis)
    np.testing.assert_allclose(out, want, atol=tolerance)
    loops.interpolate(back, y, shift, back=True)
    np.testing.assert_allclose(np.sum(y * out), np.sum(back * x), atol=100 * tolerance)


def test_nothing_to_do():
    for shape in (0, 3, 4), (3, 0, 4), (3, 4, 0):
        x = np.zeros(shape)
        loops.gradient([x, x, x], x, [1.0] * 3)
        loops.divergence(x, [x, x, x], [1.0] * 3)
        loops.difference(x, x, 0, 1.0)
        loops.interpolate(x, x, [0.5] * 3)


def spoiled(x):
    """What a loop must not be given in the place of an array, by name."""
    read_only = x.copy()
    read_only.flags.writeable = False
    odd = np.frombuffer(bytearray(x.nbytes + 1), "u1")[1:].view(x.dtype).reshape(x.shape)
    return {
        "short": x[:-1].copy(),
        "longer": np.concatenate([x, x]),
        "empty": x[:0],
        "half": x.astype("f2"),
        "integers": x.astype("i8"),
        "complex": x.astype("c16"),
        "objects": x.astype(object),
        "big-endian": x.astype(x.dtype.newbyteorder()),
        "backwards": x[::-1],
        "axes in another order": x.T,
        "odd address": odd,
        "read-only": read_only,
        "bytes": np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
        "broadcast": np.broadcast_to(x[:1], x.shape),
        "masked": np.ma.masked_less(x, 0.5),
        "list": x.tolist(),
        "number": 1.0,
        "none": None,
    }


def entrances():
    """Calls of all loops: the function, its arguments, and the places among them to which it writes."""
    rng = np.random.default_rng(3)

    def new(*shape):
        return rng.random(shape or (5, 4, 3))

    several = [[new(), new(), new()] for _ in range(2)]
    matrix = [[new() for _ in range(6)] for _ in range(2)]
    return {
        "multiply": (loops.multiply, [new(), new(), new()], {0}),
        "add_rows": (loops.add_rows, [new(5, 4), np.array([0, 4, 4]), new(3, 4)], {0}),
        "gradient": (loops.gradient, [several[0], new(), [1.0, 2.0, 3.0], None], {0}),
        "divergence": (loops.divergence, [new(), several[1], [1.0, 2.0, 3.0]], {0}),
        "difference": (loops.difference, [new(), new(), 0, 1.0], {0}),
        "interpolate": (loops.interpolate, [new(), new(), [0.2, 0.5, 0.0]], {0}),
        "second_invariant": (loops.second_invariant, [*matrix, 3, 1.0], set()),
        "second_invariant_vjp": (loops.second_invariant_vjp, [new(), matrix[0], 3, 1.0], {1}),
        "axpy": (loops.axpy, [new(), new(), new(), 2.0], {0}),
        "mix": (loops.mix, [new(), new(), [[1.0, 2.0], [3.0, 4.0]], [new(), new()]], {3}),
    }


READERS = {"read-only", "bytes", "broadcast", "backwards", "axes in another order", "odd address"}


@pytest.mark.parametrize("kind", spoiled(np.ones((5, 4))))
@pytest.mark.parametrize("name", entrances())
def test_no_loop_is_entered_with_what_it_is_not_made_for(name, kind):
    """An error, or NumPy's value; nothing read-only is changed. Without the checks some of these end the process."""
    for place, argument in enumerate(entrances()[name][1]):
        function, arguments, written = entrances()[name]
        several = isinstance(argument, list) and isinstance(argument[-1], np.ndarray)
        if (
            not (several or isinstance(argument, np.ndarray))
            or kind in ("axes in another order",)
            and name == "add_rows"
        ):
            continue
        bad = spoiled(arguments[place][-1] if several else arguments[place])[kind]
        before = np.array(bad, dtype=object)
        arguments[place] = [*arguments[place][:-1], bad] if several else bad
        if name in ("multiply", "add_rows"):
            try:
                done = function(*arguments)
            except (AttributeError, TypeError, IndexError):
                continue
            assert not done or not (
                place in written and kind in ("read-only", "bytes", "broadcast", "masked")
            )
        elif place in written or kind not in READERS:
            with pytest.raises((TypeError, ValueError)):
                function(*arguments)
        else:
            try:
                function(*arguments)
            except ValueError:
                pass
        if place in written and kind in ("read-only", "bytes", "broadcast"):
            assert np.array_equal(before, np.array(bad, dtype=object))


def test_rows_that_there_are_not():
    total, rows = np.zeros((3, 2)), np.ones((2, 2))
    for indices in [0, 3], [-4, 1], [2**40, 0]:
        with pytest.raises(IndexError, match="no row"):
            loops.add_rows(total, np.array(indices), rows)
    assert not total.any()
    assert loops.add_rows(total, np.array([-1, 0], "i4"), rows)
    np.testing.assert_array_equal(total, [[1, 1], [0, 0], [1, 1]])
    strided = np.zeros((3, 4))[:, ::2]
    for bad in (
        (strided, np.array([0, 1]), rows),
        (total, np.array([0.0, 1.0]), rows),
        (total, np.array([[0, 1]]), rows),
    ):
        assert not loops.add_rows(*bad)


def test_domains_that_there_are_not():
    pos, owners, assign = np.ones((3, 2)), (np.array([0, 0, 1]),), np.array([0, 1])
    loops.find_ranks(pos, (1,), (1.0,), owners, assign, 2, 2)
    for bad in (
        (pos, (2,), (1.0,), owners, assign, 2, 2),
        (pos, (1,), (1.0,), (np.array([0, 5]),), assign, 2, 2),
        (pos, (1,), (1.0,), (np.array([], "i8"),), assign, 2, 2),
        (pos, (1,), (1.0,), owners, np.array([0, 7]), 2, 2),
        (pos, (1,), (1.0, 1.0), owners, assign, 2, 2),
        (pos, (1,), (1.0,), owners, assign, 0, 2),
    ):
        with pytest.raises(ValueError):
            loops.find_ranks(*bad)


def test_what_is_read_is_not_what_is_written():
    x = np.arange(24.0)
    early, late = x[:20].reshape(5, 4), x[4:].reshape(5, 4)
    whole = np.ones((5, 4))
    for call in (
        lambda: loops.axpy(early, late, whole, 2.0),
        lambda: loops.mix(early, whole, np.eye(2), [late, whole.copy()]),
        lambda: loops.mix(whole, whole, np.eye(2), [early, late]),
        lambda: loops.difference(early, late, 0, 1.0),
        lambda: loops.gradient([whole, early], early, [1.0, 1.0]),
        lambda: loops.divergence(early, [early, whole], [1.0, 1.0]),
    ):
        with pytest.raises(ValueError, match="share"):
            call()
    np.testing.assert_array_equal(loops.axpy(early, early, whole, 2.0), np.arange(20.0).reshape(5, 4) + 2)
    assert not loops.multiply(early, late, whole)


@pytest.mark.parametrize("support", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_span_is_that_of_the_cells(support, dtype):
    """Beside the cells of each window, one by one."""
    rng = np.random.default_rng(5)
    period, width = 24, 6
    for start in 0, 5, 21:
        x = (start + rng.uniform(-6, 11, size=(300, 2))).astype(dtype) / 2 + rng.integers(-2, 3) * period / 2
        low, high, out = loops.find_span(x, 1, 2.0, start, width, period, support)
        first = np.floor(x[:, 1] * 2.0 + 0.5 * (support % 2)).astype(int) - (support - 1) // 2
        cells = (first[:, None] + np.arange(support) - start) % period
        outside = (cells >= width).any(axis=1)
        assert out == outside.sum()
        held = {*range(period - low, period), *range(width + high)}
        assert set(cells.ravel()) <= held and low + high < period - width


def test_a_position_that_is_none_asks_for_everything():
    x = np.array([[0.5], [np.nan], [np.inf], [1e300]])
    for bad in x[1:]:
        assert loops.find_span(np.array([x[0], bad]), 0, 1.0, 0, 8, 16, 2)[:2] == (16, 16)
    assert loops.find_span(x[:1], 0, 1.0, 0, 8, 16, 2) == (0, 0, 0)
    assert loops.find_span(x[:0], 0, 1.0, 0, 8, 16, 2) == (0, 0, 0)
    with pytest.raises(ValueError, match="one of their axes"):
        loops.find_span(x, 1, 1.0, 0, 8, 16, 2)

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


def halo(x, axis):
    """The planes before the first and behind the last, as another rank would send them."""
    n = x.shape[axis]
    return np.ascontiguousarray(x.take([-2 % n, -1 % n, 0, 1 % n], axis=axis))


@settings(max_examples=examples(150))
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from(["f4", "f8"]),
    *[st.booleans()] * 5,
    st.integers(0, 99),
)
def test_gradient_and_divergence(shape, dtype, padded, padded_out, together, halos, beside, seed):
    rng, ndim, shape = np.random.default_rng(seed), len(shape), tuple(shape)
    factors, tolerance = (
        rng.normal(size=ndim),
        dict(rtol=1e-4, atol=1e-4) if dtype == "f4" else dict(atol=1e-12),
    )
    x, other = meshes(shape, 2, dtype, padded, False, rng)
    outs = meshes(shape, ndim + beside, dtype, padded_out, together, rng)
    around = [halo(x, axis) if halos else None for axis in range(ndim - 1)]
    loops.gradient(outs, x, factors, around, other if beside else None)
    for axis in range(ndim):
        np.testing.assert_allclose(outs[axis], factors[axis] * along(x, axis), **tolerance)
    if beside:
        np.testing.assert_array_equal(outs[-1], other)
    sources = meshes(shape, ndim, dtype, padded_out, together, rng)
    around = [halo(source, axis) if halos else None for axis, source in enumerate(sources[:-1])]
    loops.divergence(x, sources, factors, around)
    np.testing.assert_allclose(
        x, sum(factors[axis] * along(sources[axis], axis) for axis in range(ndim)), **tolerance
    )


@settings(max_examples=examples(60))
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_difference(shape, add, halos, axis, seed):
    rng, shape = np.random.default_rng(seed), tuple(shape)
    axis = min(axis, len(shape) - 1)
    x, y = meshes(shape, 2, "f8", True, False, rng)
    want = -0.3 * along(x, axis) + (y if add else 0)
    loops.difference(y, x, axis, -0.3, halo(x, axis) if halos and axis < len(shape) - 1 else None, add)
    np.testing.assert_allclose(y, want, atol=1e-12)


def test_nothing_to_do():
    for shape in (0, 3, 4), (3, 0, 4), (3, 4, 0):
        x = np.zeros(shape)
        loops.gradient([x, x, x], x, [1.0] * 3, [None] * 2)
        loops.divergence(x, [x, x, x], [1.0] * 3, [None] * 2)
        loops.difference(x, x, 0, 1.0, None)

"""The compiled windows beside pmesh's own, serially and on slabs with ghosts."""

from functools import lru_cache
from types import SimpleNamespace

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from numpy.testing import assert_allclose
from pmesh.pm import ParticleMesh
from pmesh.window import Affine, FindResampler

from helpers import examples, run_python, soaking
from vmad_lit.lib import window

COMM = MPI.COMM_WORLD
BOX = [3.0, 4.0, 5.0]

# The derivative of pmesh's tuned pcs lacks the scale of the mesh; that of its general spline has it.
ORACLE = {"nnb": "nnb", "cic": "cic", "tsc": "tsc", "pcs": "cubic"}

MESHES = {1: [[7], [1], [8]], 2: [[5, 8], [4, 2]], 3: [[4, 3, 5], [2, 4, 4], [7, 7, 7]]}


def particles(pm, seed=0, n=60, edges=True):
    """Positions in general, on cell boundaries and mid-cell, on the edge of the box and far outside."""
    rng = numpy.random.default_rng(seed + 10 * pm.comm.rank)
    pos = rng.uniform(-2, 3, size=(n, pm.ndim)) * pm.BoxSize
    if edges:
        cell = pm.BoxSize / pm.Nmesh
        third = n // 3
        pos[:third] = numpy.round(pos[:third] / cell * 2) / 2 * cell
        pos[0], pos[1], pos[2], pos[3] = 0.0, pm.BoxSize, -pm.BoxSize, pm.BoxSize * (1 - 1e-16)
    return pos, rng


def make(nmesh, comm=MPI.COMM_SELF, dtype="f8", box=None):
    return ParticleMesh(nmesh, BoxSize=BOX[: len(nmesh)] if box is None else box, comm=comm, dtype=dtype)


def field(pm, rng):
    real = pm.create("real")
    real.value[...] = rng.normal(size=real.shape)
    return real


CASES = [(name, nmesh) for ndim in MESHES for nmesh in MESHES[ndim] for name in window.SUPPORT]


@pytest.mark.parametrize("name, nmesh", CASES)
def test_every_function_against_pmesh(name, nmesh):
    check_against_pmesh(make(nmesh), name)


@pytest.mark.collective
@pytest.mark.parametrize("name", window.SUPPORT)
@pytest.mark.parametrize("nmesh", [[4, 3, 5], [2, 4, 4], [5, 8]], ids=str)
def test_slabs_with_ghosts(name, nmesh):
    check_against_pmesh(make(nmesh, COMM), name, edges=COMM.size == 1)


@pytest.mark.collective
@pytest.mark.parametrize("name", window.SUPPORT)
def test_slabs_with_particles_on_boundaries(name):
    """Where positions are exact in units of the mesh, pmesh's ranks agree on cells, and we with them."""
    check_against_pmesh(make([4, 3, 5], COMM, box=[2.0, 6.0, 5.0]), name)


@pytest.mark.collective
@pytest.mark.parametrize("name", window.SUPPORT)
def test_ranks_agree_on_the_cells(name):
    """Particles within a rounding error of cell boundaries, and outside of the box, lose no mass."""
    serial, pm = make([8, 9, 5]), make([8, 9, 5], COMM)
    pos, rng = particles(serial, seed=1, n=600)
    pos *= 1 + 3e-16 * rng.integers(-1, 2, size=pos.shape)
    want = window.paint(serial.create("real", value=0), pos, 1.0, name, serial.affine)
    mine = pos[COMM.rank :: COMM.size]
    got = window.paint(
        pm.create("real", value=0), pm.decompose(mine, smoothing=name).exchange(mine), 1.0, name, pm.affine
    )
    assert_allclose(got.value, want.value[got.slices], atol=1e-12)


@pytest.mark.collective
@pytest.mark.parametrize("name, dtype, postype", [("cic", "f4", "f8"), ("cic", "f4", "f4")])
def test_single_precision(name, dtype, postype):
    check_against_pmesh(make([4, 3, 5], COMM, dtype), name, postype, edges=False)


def check_against_pmesh(pm, name, postype="f8", edges=True):
    """Each rank paints its own part of exchanged particles; compare with pmesh on the same slab."""
    pos, rng = particles(pm, edges=edges)
    oracle = ORACLE[name]
    layout = pm.decompose(pos, smoothing=name)
    x, mass, x_, mass_ = layout.exchange(
        pos, rng.normal(size=60), rng.normal(size=pos.shape), rng.normal(size=60)
    )
    x = x.astype(postype)
    args = dict(window=name, transform=pm.affine)
    tol = dict(rtol=1e-12, atol=1e-12) if pm.dtype == "f8" and postype == "f8" else dict(rtol=2e-5, atol=2e-5)

    got = window.paint(pm.create("real", value=0), x, mass, **args)
    assert_allclose(got.value, pm.paint(x, mass=mass, resampler=name).value, **tol)
    got = window.paint(pm.create("real", value=1), x, 2.0, **args)
    assert_allclose(got.value, 1 + pm.paint(x, mass=2.0, resampler=name).value, **tol)

    for pos_, m_ in ((x_, mass_), (x_, None), (None, mass_)):
        got = window.paint_jvp(pm.create("real", value=0), x, mass, pos_, m_, **args)
        want = pm.paint_jvp(x, mass=mass, v_pos=pos_, v_mass=m_, resampler=oracle)
        assert_allclose(got.value, want.value, **tol)

    fields = [field(pm, rng) for c in range(4)]
    got = window.readout(fields, x, **args)
    want = numpy.stack([f.readout(x, resampler=name) for f in fields], axis=-1)
    assert_allclose(got, want, **tol)
    assert_allclose(window.readout(fields[0], x, **args), want[:, 0], **tol)

    got = window.gradient(fields[0], x, **args)
    slopes = numpy.stack(
        [[f.readout(x, resampler=oracle, gradient=d) for d in range(pm.ndim)] for f in fields]
    )
    assert got.shape == (len(x), pm.ndim)
    assert_allclose(got, slopes[0].T.reshape(got.shape), **tol)

    x_bar, mass_bar = window.paint_vjp(fields[0], x, mass, **args)
    assert_allclose(x_bar, slopes[0].T.reshape(got.shape) * mass[:, None], **tol)
    assert_allclose(mass_bar, want[:, 0], **tol)

    value = rng.normal(size=(len(x), 4))
    out = [pm.create("real", value=0) for f in fields]
    x_bar = window.readout_vjp(fields, x, value, out=out, **args)
    assert_allclose(x_bar, numpy.einsum("cdp,pc->pd", slopes, value), **tol)
    for c in range(4):
        assert_allclose(out[c].value, pm.paint(x, mass=value[:, c], resampler=name).value, **tol)

    got = window.readout_jvp(fields, x, x_, fields[::-1], **args)
    assert_allclose(got, numpy.einsum("cdp,pd->pc", slopes, x_) + want[:, ::-1], **tol)
    got = window.readout_jvp(fields[0], x, x_, **args)
    assert_allclose(got, numpy.einsum("dp,pd->p", slopes[0], x_), **tol)


# Windows, dimensions, and along how many axes the slab lacks cells of the mesh: none, the first one, or more. Each case is
# compiled, so that only a soak has all of them, and else each two of the three meet.
LACKING = dict(nnb=(0, 1, 3), cic=(1, 3, 0), tsc=(0, 3, 1), pcs=(1, 0, 3))
SLABS = [
    (name, ndim, lacking)
    for name in ORACLE
    for ndim in (1, 2, 3)
    for lacking in (0, 1, 3)[: ndim + 1]
    if soaking() or lacking == LACKING[name][ndim - 1]
]


@st.composite
def slabs(draw, cases=SLABS):
    """A local mesh, a geometry of which it is a part, particles in and around it, and a window."""
    name, ndim, lacking = draw(st.sampled_from(cases))
    shape = tuple(draw(st.integers(1, 6)) for d in range(ndim))
    period = [
        draw(st.sampled_from([0, n + draw(st.integers(1, 5))])) if d < lacking else n
        for d, n in enumerate(shape)
    ]
    for d in range(lacking > 1):  # it may also be whole along some, but not along all of the others
        period[d] = draw(st.sampled_from([period[d], shape[d]]))
    transform = Affine(
        ndim,
        scale=[draw(st.sampled_from([0.5, 1.0, 1.75])) for d in range(ndim)],
        translate=[draw(st.integers(-9, 9)) for d in range(ndim)],
        period=period,
    )
    rng = numpy.random.default_rng(draw(st.integers(0, 1 << 30)))
    x = rng.uniform(-3, 9, size=(draw(st.integers(0, 12)), ndim))
    x = (x - transform.translate) / transform.scale
    single = (
        name == "cic" and ndim == 2 and draw(st.booleans())
    )  # each combination of types would be compiled
    return shape, transform, x.astype("f4" if single else "f8"), name, "f4" if single else "f8", rng


def test_slabs_are_of_all_kinds():
    for first, second in ((0, 1), (0, 2), (1, 2)):
        kinds = [list(ORACLE), [1, 2, 3], [0, 1, 3]]
        pairs = {(case[first], case[second]) for case in SLABS}
        assert pairs == {(a, b) for a in kinds[first] for b in kinds[second]} - {(1, 3)}


@settings(max_examples=examples(150))
@given(slabs())
def test_any_slab_against_pmesh(slab):
    """Anywhere in any geometry the particles of a slab do what they do in pmesh's windows."""
    shape, transform, x, name, dtype, rng = slab
    paint, read = FindResampler(name), FindResampler(ORACLE[name])
    args = dict(window=name, transform=transform)
    tol = dict(rtol=1e-9, atol=1e-9) if dtype == "f8" else dict(rtol=1e-4, atol=1e-4)
    mass, mesh = rng.normal(size=len(x)), rng.normal(size=shape).astype(dtype)
    exact = x.astype("f8")
    want = numpy.zeros(shape, dtype)
    paint.paint(want, exact, mass=mass, transform=transform)
    assert_allclose(window.paint(numpy.zeros(shape, dtype), x, mass, **args), want, **tol)
    assert_allclose(window.readout(mesh, x, **args), paint.readout(mesh, exact, transform=transform), **tol)
    slope = numpy.array(
        [read.readout(mesh, exact, diffdir=d, transform=transform) for d in range(len(shape))]
    )
    assert_allclose(window.gradient(mesh, x, **args), slope.T, **tol)


@lru_cache
def derivative(support, order):
    from scipy.interpolate import BSpline

    return BSpline.basis_element(numpy.arange(support + 1) - support / 2, extrapolate=False).derivative(order)


def spline(support, r, order):
    """The B-spline of this support, or a derivative of it, at distances."""
    return numpy.nan_to_num(derivative(support, order)(r) if order < support else numpy.zeros_like(r))


def weights(support, x, shape, transform, derivatives):
    """The derivatives, as many along each axis as said, of the window of each particle by its position, at all
    cells of a slab: (N, n0, ...)."""
    result = numpy.ones((len(x),) + (1,) * len(shape))
    for d, n in enumerate(shape):
        scale, period = transform.scale[d], transform.period[d]
        r = numpy.arange(n) - (x[:, d, None] * scale + transform.translate[d])
        images = numpy.arange(-12, 13) * period if period else numpy.zeros(1)
        along = (
            spline(support, r[..., None] + images, derivatives[d]).sum(axis=-1) * (-scale) ** derivatives[d]
        )
        result = result * along.reshape((len(x),) + (1,) * d + (n,) + (1,) * (len(shape) - d - 1))
    return result


def unit(ndim, *axes):
    return [axes.count(d) for d in range(ndim)]


@settings(max_examples=examples(60))
@given(slabs(), st.data())
def test_second_derivatives_are_those_of_splines(slab, data):
    """Anywhere in any geometry, beside dense sums over all cells, which know of B-splines from elsewhere."""
    shape, transform, x, name, dtype, rng = slab
    support, ndim, N = window.SUPPORT[name], len(shape), len(x)
    args = dict(window=name, transform=transform)
    tol = dict(rtol=1e-9, atol=1e-9) if dtype == "f8" else dict(rtol=1e-4, atol=1e-4)
    # Loops are compiled for each number of meshes up to four; five and six are done in two passes.
    n = (
        data.draw(st.integers(1, 6))
        if soaking()
        else dict(nnb=6, cic=2, tsc=5, pcs=3)[name]
        if ndim == 2
        else 1
    )
    columns = data.draw(st.integers(0, n))
    meshes, meshes_ = rng.normal(size=(2, n) + shape).astype(dtype)
    k, k_, v = rng.normal(size=(N, columns)), rng.normal(size=(N, columns)), rng.normal(size=(N, ndim))
    ones = numpy.concatenate([k, numpy.ones((N, n - columns))], axis=1)
    exact = x.astype("f8")
    slope = numpy.stack([weights(support, exact, shape, transform, unit(ndim, d)) for d in range(ndim)])
    curvature = numpy.array(
        [
            [weights(support, exact, shape, transform, unit(ndim, d, e)) for e in range(ndim)]
            for d in range(ndim)
        ]
    )
    cells = tuple(range(1, ndim + 1))
    want = numpy.zeros((N, ndim))
    for c in range(n):
        for d in range(ndim):
            turned = sum(curvature[d, e] * v[:, e].reshape((N,) + (1,) * ndim) for e in range(ndim))
            want[:, d] += ones[:, c] * (
                (turned * meshes[c]).sum(axis=cells) + (slope[d] * meshes_[c]).sum(axis=cells)
            )
            if c < columns:
                want[:, d] += k_[:, c] * (slope[d] * meshes[c]).sum(axis=cells)
    got = window.weighted_gradient_jvp(list(meshes), x, k, v, list(meshes_), k_ if columns else None, **args)
    assert_allclose(got, want, **tol)
    parts = [
        window.weighted_gradient_jvp(list(meshes), x, k, v, **args),
        window.weighted_gradient_jvp(None, x, k, meshes_=list(meshes_), **args),
    ]
    if columns:
        parts.append(window.weighted_gradient_jvp(list(meshes), x, k, factors_=k_, **args))
    assert_allclose(sum(parts), want, **tol)
    value = rng.normal(size=(N, n))
    out = list(numpy.zeros((n,) + shape, dtype))
    assert window.spread_jvp(out, x, value, v, **args) is out
    moved = sum(slope[d] * v[:, d].reshape((N,) + (1,) * ndim) for d in range(ndim))
    for c in range(n):
        assert_allclose(out[c], numpy.tensordot(value[:, c], moved, 1), **tol)


def test_second_derivatives_with_one_number_for_all():
    rng = numpy.random.default_rng(2)
    pos, meshes, v = (
        rng.uniform(0, 5, size=(40, 2)),
        list(rng.normal(size=(3, 5, 4))),
        rng.normal(size=(40, 2)),
    )
    rows = numpy.full((40, 3), 2.0)
    want = window.weighted_gradient_jvp(meshes, pos, rows, v, meshes[::-1], 3.0 * rows, "pcs")
    assert_allclose(
        window.weighted_gradient_jvp(meshes, pos, 2.0, v, meshes[::-1], 6.0, "pcs"), want, atol=1e-12
    )
    along = window.weighted_gradient_jvp(meshes, pos, rows, numpy.full((40, 2), 0.5), window="pcs")
    assert_allclose(window.weighted_gradient_jvp(meshes, pos, rows, 0.5, window="pcs"), along, atol=1e-12)
    one, all_ = ([numpy.zeros((5, 4)) for mesh in meshes] for i in range(2))
    window.spread_jvp(one, pos, 2.0, v, "pcs")
    window.spread_jvp(all_, pos, rows, v, "pcs")
    assert_allclose(one, all_, atol=1e-12)


def test_second_derivatives_in_any_memory():
    """Interleaved meshes, meshes that do not lie alike, wide positions, on one thread or several."""
    rng = numpy.random.default_rng(3)
    pos, value, v = (
        rng.uniform(-16, 32, size=(20000, 3)),
        rng.normal(size=(20000, 4)),
        rng.normal(size=(20000, 3)),
    )
    vector = rng.normal(size=(16, 8, 8, 4))
    apart = [vector[..., c].copy() for c in range(4)]
    want = window.weighted_gradient_jvp(apart, pos, value, v, window="tsc")
    zeros = lambda: [numpy.zeros((16, 8, 8)) for c in range(4)]
    spread = window.spread_jvp(zeros(), pos, value, v, "tsc")
    for n in 1, 2, 3:
        window.set_threads(n)
        for meshes in list(numpy.moveaxis(vector, -1, 0)), [numpy.asfortranarray(apart[0]), *apart[1:]]:
            wide = numpy.concatenate([pos, pos], axis=1)
            assert_allclose(
                window.weighted_gradient_jvp(meshes, wide, value, v, window="tsc"), want, rtol=0, atol=1e-11
            )
        unlike = [numpy.zeros((16, 8, 8), order="F"), *zeros()[1:]]
        for out in zeros(), list(numpy.moveaxis(numpy.zeros_like(vector), -1, 0)), unlike:
            for mesh, expected in zip(window.spread_jvp(out, pos, value, v, "tsc"), spread):
                assert_allclose(mesh, expected, rtol=0, atol=1e-10)
    window.set_threads(None)


def test_second_derivatives_of_nothing():
    none, mesh = numpy.empty((0, 3)), numpy.ones((4, 4, 4))
    assert window.weighted_gradient_jvp([mesh], none, None, none).shape == (0, 3)
    assert not window.spread_jvp([0 * mesh], none, numpy.empty((0, 1)), none)[0].any()
    pos, empty = numpy.ones((5, 3)), numpy.empty((0, 4, 4))
    assert not window.weighted_gradient_jvp([empty], pos, None, pos, transform=Affine(3, 1.0, 0.0, 4)).any()
    assert (
        window.spread_jvp([empty], pos, numpy.ones((5, 1)), pos, transform=Affine(3, 1.0, 0.0, 4))[0].size
        == 0
    )
    with pytest.raises(ValueError, match="tangent of positions"):
        window.weighted_gradient_jvp([mesh], pos, None, numpy.ones((5, 2)))
    with pytest.raises(ValueError, match="columns of factors"):
        window.weighted_gradient_jvp([mesh], pos, numpy.ones((5, 2)), pos)
    with pytest.raises(ValueError, match="nnb, cic, tsc, pcs"):
        window.weighted_gradient_jvp([mesh], pos, None, pos, window="lanczos2")


def test_several_slopes_in_one_sum():
    """Five and nine meshes do not fit into one pass of the loop, and the passes are summed."""
    rng = numpy.random.default_rng(7)
    pos = rng.uniform(0, 5, size=(40, 3))
    for n in (1, 2, 3, 4, 5, 9):
        meshes = list(rng.normal(size=(n, 5, 5, 5)))
        value = rng.normal(size=(40, n))
        want = sum(window.gradient(mesh, pos) * value[:, c, None] for c, mesh in enumerate(meshes))
        assert_allclose(window.readout_vjp(meshes, pos, value), want, atol=1e-12)
        assert_allclose(window.readout(meshes, pos)[:, -1], window.readout(meshes[-1], pos))


@pytest.mark.parametrize("name", window.SUPPORT)
def test_meshes_that_are_interleaved(name):
    """The components of a vector at a point may be neighbours in memory."""
    rng = numpy.random.default_rng(8)
    pos, value = rng.uniform(0, 5, size=(40, 3)), rng.normal(size=(40, 4))
    vector = rng.normal(size=(5, 4, 6, 4))
    views, apart = list(numpy.moveaxis(vector, -1, 0)), [vector[..., c].copy() for c in range(4)]
    assert_allclose(window.readout(views, pos, name), window.readout(apart, pos, name))
    out, want = numpy.zeros_like(vector), [numpy.zeros((5, 4, 6)) for c in range(4)]
    got = window.readout_vjp(views, pos, value, name, out=list(numpy.moveaxis(out, -1, 0)))
    assert_allclose(got, window.readout_vjp(apart, pos, value, name, out=want))
    assert_allclose(out, numpy.stack(want, axis=-1), atol=1e-14)


@pytest.mark.parametrize("count", [1, 3, 4, 6])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_slopes_are_sums_of_gradients(count, ndim):
    rng = numpy.random.default_rng(count)
    pos, meshes = rng.uniform(-3, 8, size=(40, ndim)), list(rng.normal(size=(count,) + (5, 4, 6)[:ndim]))
    for columns in range(count + 1):
        factors = rng.normal(size=(40, columns))
        ones = numpy.concatenate([factors, numpy.ones((40, count - columns))], axis=1)
        want = sum(window.gradient(mesh, pos, "tsc") * ones[:, c, None] for c, mesh in enumerate(meshes))
        assert_allclose(
            window.weighted_gradient(meshes, pos, factors if columns else None, "tsc"), want, atol=1e-12
        )
    assert_allclose(
        window.weighted_gradient(meshes, pos, 2.0), 2.0 * window.weighted_gradient(meshes, pos), atol=1e-12
    )
    with pytest.raises(ValueError, match="columns of factors"):
        window.weighted_gradient(meshes, pos, numpy.ones((40, count + 1)))
    with pytest.raises(ValueError, match="factors must be"):
        window.weighted_gradient(meshes, pos, numpy.ones((39, count)))


def test_results_fill_what_is_given():
    rng = numpy.random.default_rng(9)
    pos, meshes = rng.uniform(0, 5, size=(40, 3)), list(rng.normal(size=(5, 5, 5, 5)))
    for function, what, shape in (
        (window.readout, meshes, (40, 5)),
        (window.readout, meshes[0], (40,)),
        (window.gradient, meshes[0], (40, 3)),
    ):
        out = numpy.full(shape, numpy.nan)
        assert function(what, pos, out=out) is out
        assert_allclose(out, function(what, pos))
        for bad in (
            numpy.empty(shape, "i4"),
            numpy.empty((41,) + shape[1:]),
            numpy.empty(shape).tolist(),
            numpy.empty((80,) + shape[1:])[::2],
        ):
            with pytest.raises(ValueError, match=r"of float32 or float64 of shape \(40"):
                function(what, pos, out=bad)
    assert not window.gradient(numpy.empty((0, 4)), pos, out=numpy.ones((40, 2))).any()


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_results_are_added_to_what_is_there(count, ndim):
    """`base` plus `factor` times the result, in new memory, in memory that is given, or in that of `base`."""
    rng = numpy.random.default_rng(11)
    pos, value = rng.uniform(-5, 10, size=(40, ndim)), rng.normal(size=(40, count))
    meshes = list(rng.normal(size=(count,) + (5, 4, 6)[:ndim]))
    for find, width in (
        (lambda **to: window.readout(meshes, pos, **to), count),
        (lambda **to: window.weighted_gradient(meshes, pos, value, **to), ndim),
    ):
        base, plain = rng.normal(size=(40, width)), find()
        want = base - 0.7 * plain
        assert_allclose(find(base=base, factor=-0.7), want, rtol=0, atol=1e-13)
        assert_allclose(find(base=base.astype("f4")), base.astype("f4") + plain, rtol=0, atol=1e-13)
        out = numpy.full((40, width), numpy.nan)
        assert find(base=base, factor=-0.7, out=out) is out
        assert_allclose(out, want, rtol=0, atol=1e-13)
        find(base=base, factor=-0.7, out=base)
        assert_allclose(base, want, rtol=0, atol=1e-13)
        with pytest.raises(ValueError, match="base must have the shape"):
            find(base=base[:-1])
    none = numpy.empty((0, 4, 6)[:ndim])
    transform = Affine(ndim, 1.0, 0.0, 4)
    base = rng.normal(size=(40, 2))
    assert (window.readout([none] * 2, pos, transform=transform, base=base, factor=3.0) == base).all()


def test_odd_addresses():
    """Memory that does not begin at a multiple of its items' size."""

    def odd(array):
        memory = numpy.zeros(array.nbytes + 1, "u1")[1:].view(array.dtype).reshape(array.shape)
        memory[...] = array
        assert not memory.flags.aligned
        return memory

    rng = numpy.random.default_rng(10)
    pos, mass, mesh = rng.uniform(0, 5, size=(9, 2)), rng.normal(size=9), rng.normal(size=(5, 5))
    want = window.paint(mesh.copy(), pos, mass)
    assert_allclose(window.paint(odd(mesh), odd(pos), odd(mass)), want)
    assert_allclose(window.readout(odd(mesh), pos), window.readout(mesh, pos))
    still = mass[:1].copy()
    still.flags.writeable = False
    for m in (2.0, still):  # one particle, so that nothing has to be copied
        assert_allclose(window.paint_jvp(numpy.zeros((5, 5)), pos[:1], m, pos[:1]).sum(), 0, atol=1e-14)


@pytest.mark.parametrize("name", ["cic", "pcs"])
def test_the_number_of_threads_does_not_show(name):
    rng = numpy.random.default_rng(4)
    pos = rng.uniform(-40, 40, size=(40000, 3))
    mass = rng.normal(size=len(pos))
    ordered = pos[numpy.argsort(numpy.floor(pos[:, 0]) % 16)]
    for x in (pos, ordered):
        painted, read = [], []
        for n in (1, 2, 3, 4):
            window.set_threads(n)
            mesh = window.paint(numpy.zeros((16, 8, 8)), x, mass, window=name)
            painted.append(mesh)
            read.append(window.readout([mesh] * 4, x, window=name))
        window.set_threads(None)
        for n in range(1, 4):
            assert_allclose(painted[n], painted[0], rtol=0, atol=1e-11)
            assert_allclose(read[n], window.readout([painted[n]] * 4, x, window=name), rtol=0, atol=0)


def test_threads_on_a_slab_that_is_not_periodic():
    """Owners of a local slab: cells outside of it belong to nobody."""

    class Transform:
        scale, translate, period = [1.0, 1.0, 1.0], [-3.0, 0.0, 0.0], [20, 0, 8]

    rng = numpy.random.default_rng(5)
    pos = rng.uniform(-5, 25, size=(20000, 3))
    results = []
    for n in (1, 2, 4):
        window.set_threads(n)
        results.append(window.paint(numpy.zeros((9, 6, 8)), pos, 1.0, "tsc", Transform))
    window.set_threads(None)
    assert results[0].sum() < len(pos)
    for r in results:
        assert_allclose(r, results[0], rtol=0, atol=1e-11)


def test_no_particles_and_no_mesh():
    none = numpy.empty((0, 3))
    mesh = numpy.ones((4, 4, 4))
    assert_allclose(window.paint(mesh.copy(), none), mesh)
    assert window.readout([mesh, mesh], none).shape == (0, 2)
    assert window.gradient(mesh, none).shape == (0, 3)
    assert [len(a) for a in window.paint_vjp(mesh, none)] == [0, 0]

    class Elsewhere:
        scale, translate, period = [1.0] * 3, [0.0] * 3, [4] * 3

    empty = numpy.empty((0, 4, 4))
    assert window.paint(empty, numpy.zeros((2, 3)), transform=Elsewhere).shape == (0, 4, 4)
    assert_allclose(window.readout(empty, numpy.zeros((2, 3)), transform=Elsewhere), 0)


def test_memory_layouts():
    """Strided, reversed, transposed, read-only, big-endian meshes and positions, complex ones, lists."""
    rng = numpy.random.default_rng(6)
    pos = rng.uniform(0, 4, size=(30, 2))
    want = window.paint(numpy.zeros((4, 6)), pos)
    for mesh in (
        numpy.zeros((8, 12))[::2, ::2],
        numpy.zeros((4, 6))[::-1, ::-1],
        numpy.zeros((6, 4)).T,
        numpy.zeros((4, 6), ">f8"),
        numpy.zeros((4, 6), "c16").real,
    ):
        assert_allclose(window.paint(mesh, pos), want)
        mesh.flags.writeable = False
        assert_allclose(window.readout(mesh, pos), window.readout(want, pos))
    for x in (
        pos[:, ::1],
        numpy.asfortranarray(pos),
        pos.astype(">f8"),
        pos.tolist(),
        numpy.concatenate([pos, pos], axis=1),
    ):
        assert_allclose(window.paint(numpy.zeros((4, 6)), x), want)
    still = pos.copy()
    still.flags.writeable = False
    assert_allclose(window.paint(numpy.zeros((4, 6)), still), want)
    integers = numpy.array([[1, 2], [3, 5]])
    assert window.paint(numpy.zeros((4, 6)), integers, 3)[1, 2] == 3
    fields = [numpy.asfortranarray(want), want.astype("f4")]
    assert_allclose(window.readout(fields, pos)[:, 0], window.readout(want, pos))
    out = [numpy.zeros((4, 6), order="F"), numpy.zeros((4, 6))]
    window.readout_vjp(fields, pos, numpy.ones((30, 2)), out=out)
    assert_allclose(out[0], want)
    assert_allclose(out[1], want)


def test_positions_that_are_not_numbers_do_not_reach_beyond_the_mesh():
    pos = numpy.array([[numpy.nan, 1.0], [numpy.inf, 1.0], [1e300, 1.0], [1.0, 1.0]])
    mesh = window.paint(numpy.zeros((4, 4)), pos)
    assert mesh.shape == (4, 4) and numpy.isfinite(mesh[:, 3]).all()


@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf, -numpy.inf, 1e300, -1e18])
@pytest.mark.parametrize("at", [0, 20000, 30000])
def test_threads_share_blocks_with_positions_that_are_not_numbers(bad, at):
    """Such a particle may be anywhere, so that no thread has its block for itself."""
    lattice = numpy.indices((32, 32, 32)).reshape(3, -1).T + 0.25
    lattice[at, 0] = bad
    found = []
    for n in (1, 2):
        window.set_threads(n)
        found.append(window.paint(numpy.zeros((32, 32, 32)), lattice))
    box = window._box(found[0], None)
    edges, mask = window.owners_of_blocks(2, box, lattice.reshape(-1), 3, lattice[:0, 0])
    window.set_threads(None)
    assert_allclose(found[1], found[0], rtol=1e-13)
    assert mask[at // window.BLOCK] == 3 and {1, 2} < set(mask)


def test_errors_say_what_is_wanted():
    mesh = numpy.zeros((4, 4, 4))
    with pytest.raises(ValueError, match=r"\(N, 3\).*\(5, 2\)"):
        window.paint(mesh, numpy.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"mass.*\(5,\).*\(4,\)"):
        window.paint(mesh, numpy.zeros((5, 3)), numpy.ones(4))
    with pytest.raises(ValueError, match="nnb, cic, tsc, pcs.*lanczos"):
        window.paint(mesh, numpy.zeros((5, 3)), window="lanczos3")
    with pytest.raises(TypeError, match="positions must be real"):
        window.paint(mesh, numpy.zeros((5, 3), "c16"))
    with pytest.raises(TypeError, match="floating point"):
        window.paint(mesh.astype("i8"), numpy.zeros((5, 3)))
    with pytest.raises(ValueError, match="1, 2 or 3"):
        window.paint(numpy.zeros((2,) * 4), numpy.zeros((5, 4)))
    with pytest.raises(ValueError, match="threads"):
        window.set_threads(0)


def test_windows_of_pmesh_are_recognised():
    assert [window.support(FindResampler(name)) for name in ("nnb", "cic", "tsc", "pcs")] == [1, 2, 3, 4]
    assert window.support("CIC") == 2
    assert window.support(FindResampler("lanczos2")) is None
    assert window.support(FindResampler("linear")) is None
    assert window.support(FindResampler("cic").resize(4)) is None


def test_importing_the_package_does_not_import_numba():
    code = "import sys, vmad_lit; assert 'numba' not in sys.modules"
    run_python(code, check=True)


def test_without_numba_the_error_names_it():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "try:\n    import vmad_lit.lib.window\n"
        "except ImportError as e:\n    assert 'numba' in str(e)\nelse:\n    raise SystemExit(1)"
    )
    run_python(code, check=True)


def read_only_meshes(tmp_path):
    path = tmp_path / "mesh.npy"
    numpy.save(path, numpy.zeros((4, 4)))
    array = numpy.zeros((4, 4))
    array.flags.writeable = False
    return [
        array,
        numpy.load(path, mmap_mode="r"),
        numpy.frombuffer(bytes(128)).reshape(4, 4),
        numpy.broadcast_to(numpy.zeros(4), (4, 4)),
    ]


def test_what_is_read_only_stays_what_it_is(tmp_path):
    pos = numpy.array([[1.0, 2.0], [0.5, 0.5]])
    for mesh in read_only_meshes(tmp_path):
        for call in (
            lambda: window.paint(mesh, pos),
            lambda: window.paint_jvp(mesh, pos, 1.0, pos),
            lambda: window.readout_vjp(None, pos, numpy.ones(2), out=mesh, need_pos=False),
            lambda: window.spread_jvp([mesh], pos, numpy.ones((2, 1)), pos),
        ):
            with pytest.raises(ValueError, match="read-only"):
                call()
        assert not mesh.any()
        assert numpy.shape(window.readout(mesh, pos)) == (2,)


@pytest.mark.parametrize(
    "mesh", [[[0.0, 0.0]] * 2, numpy.zeros((2, 2), "i8"), numpy.zeros((2, 2), object), None]
)
def test_what_is_no_mesh_is_not_painted(mesh):
    with pytest.raises(TypeError, match="mesh to paint"):
        window.paint(mesh, numpy.ones((1, 2)))


def test_masks_are_not_forgotten():
    mesh, pos = numpy.ones((4, 4)), numpy.ones((2, 2))
    with pytest.raises(TypeError, match="mask"):
        window.readout(numpy.ma.masked_less(mesh, 2.0), pos)
    for call in window.paint, window.readout:
        with pytest.raises(TypeError, match="mask"):
            call(mesh, numpy.ma.masked_less(pos, 2.0))
    with pytest.raises(TypeError, match="mask"):
        window.paint(mesh, pos, numpy.ma.masked_less(numpy.ones(2), 2.0))


def test_as_many_tangents_as_meshes():
    """More tangents than meshes were written beside the result."""
    mesh, pos = numpy.ones((4, 4)), numpy.ones((3, 2))
    for call in (
        lambda: window.readout_jvp([mesh], pos, None, [mesh] * 2),
        lambda: window.readout_jvp([mesh], pos, pos, [mesh] * 3),
        lambda: window.readout_vjp([mesh] * 2, pos, numpy.ones((3, 2)), out=[mesh.copy()]),
        lambda: window.weighted_gradient([mesh], pos, numpy.ones((3, 2))),
    ):
        with pytest.raises(ValueError):
            call()


def test_transforms_that_are_none():
    mesh, pos = numpy.ones((4, 4)), numpy.ones((3, 2))
    good = dict(scale=[1.0, 1.0], translate=[0.0, 0.0], period=[4, 4])
    for bad in (
        dict(scale=[1.0]),
        dict(scale=[1.0, numpy.nan]),
        dict(translate=[0.0] * 3),
        dict(period=[4, -4]),
    ):
        with pytest.raises(ValueError, match="transform|periods"):
            window.readout(mesh, pos, transform=SimpleNamespace(**{**good, **bad}))


def test_what_is_painted_may_lie_in_the_mesh():
    """Positions in the memory of the mesh or of the results are those from before."""
    memory = numpy.linspace(0, 3, 16).reshape(8, 2)
    pos, mesh = memory.copy(), memory.reshape(4, 4)
    want = window.paint(mesh.copy(), pos)
    numpy.testing.assert_array_equal(window.paint(mesh, memory), want)
    pos, other = numpy.random.default_rng(2).uniform(0, 4, (9, 2)), numpy.random.default_rng(3).random((4, 4))
    want = window.weighted_gradient([other], pos)
    numpy.testing.assert_array_equal(window.weighted_gradient([other], pos, out=pos), want)

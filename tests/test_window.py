"""The compiled windows beside pmesh's own, serially and on slabs with ghosts."""
import subprocess
import sys

import numpy
import pytest
from mpi4py import MPI
from numpy.testing import assert_allclose
from pmesh.pm import ParticleMesh
from pmesh.window import FindResampler

from vmad_lit.lib import window

COMM = MPI.COMM_WORLD
BOX = [3.0, 4.0, 5.0]

# The derivative of pmesh's tuned pcs lacks the scale of the mesh; that of its general spline has it.
ORACLE = {'nnb': 'nnb', 'cic': 'cic', 'tsc': 'tsc', 'pcs': 'cubic'}

MESHES = {1: [[7], [1], [8]], 2: [[5, 8], [4, 2]], 3: [[4, 3, 5], [2, 4, 4], [7, 7, 7]]}


def particles(pm, seed=0, n=60, edges=True):
    """Positions in general, on cell boundaries and mid-cell, on the edge of the box and far outside."""
    rng = numpy.random.default_rng(seed + 10 * COMM.rank)
    pos = rng.uniform(-2, 3, size=(n, pm.ndim)) * pm.BoxSize
    if edges:
        cell = pm.BoxSize / pm.Nmesh
        third = n // 3
        pos[:third] = numpy.round(pos[:third] / cell * 2) / 2 * cell
        pos[0], pos[1], pos[2], pos[3] = 0.0, pm.BoxSize, -pm.BoxSize, pm.BoxSize * (1 - 1e-16)
    return pos, rng


def make(nmesh, comm=MPI.COMM_SELF, dtype='f8', box=None):
    return ParticleMesh(nmesh, BoxSize=BOX[:len(nmesh)] if box is None else box, comm=comm, dtype=dtype)


def field(pm, rng):
    real = pm.create('real')
    real.value[...] = rng.normal(size=real.shape)
    return real


CASES = [(name, nmesh) for ndim in MESHES for nmesh in MESHES[ndim] for name in window.SUPPORT]


@pytest.mark.parametrize('name, nmesh', CASES)
def test_every_function_against_pmesh(name, nmesh):
    check_against_pmesh(make(nmesh), name)


@pytest.mark.parametrize('name', window.SUPPORT)
@pytest.mark.parametrize('nmesh', [[4, 3, 5], [2, 4, 4], [5, 8]], ids=str)
def test_slabs_with_ghosts(name, nmesh):
    check_against_pmesh(make(nmesh, COMM), name, edges=COMM.size == 1)


@pytest.mark.parametrize('name', window.SUPPORT)
def test_slabs_with_particles_on_boundaries(name):
    """Where positions are exact in units of the mesh, pmesh's ranks agree on cells, and we with them."""
    check_against_pmesh(make([4, 3, 5], COMM, box=[2.0, 6.0, 5.0]), name)


@pytest.mark.parametrize('name', window.SUPPORT)
def test_ranks_agree_on_the_cells(name):
    """Particles within a rounding error of cell boundaries, and outside of the box, lose no mass."""
    serial, pm = make([8, 9, 5]), make([8, 9, 5], COMM)
    pos, rng = particles(serial, seed=1 - 10 * COMM.rank, n=600)
    pos *= 1 + 3e-16 * rng.integers(-1, 2, size=pos.shape)
    want = window.paint(serial.create('real', value=0), pos, 1.0, name, serial.affine)
    mine = pos[COMM.rank::COMM.size]
    got = window.paint(pm.create('real', value=0), pm.decompose(mine, smoothing=name).exchange(mine),
                       1.0, name, pm.affine)
    assert_allclose(got.value, want.value[got.slices], atol=1e-12)


@pytest.mark.parametrize('name, dtype, postype', [('cic', 'f4', 'f8'), ('cic', 'f4', 'f4')])
def test_single_precision(name, dtype, postype):
    check_against_pmesh(make([4, 3, 5], COMM, dtype), name, postype, edges=False)


def check_against_pmesh(pm, name, postype='f8', edges=True):
    """Each rank paints its own part of exchanged particles; compare with pmesh on the same slab."""
    pos, rng = particles(pm, edges=edges)
    oracle = ORACLE[name]
    layout = pm.decompose(pos, smoothing=name)
    x, mass, x_, mass_ = layout.exchange(pos, rng.normal(size=60), rng.normal(size=pos.shape),
                                         rng.normal(size=60))
    x = x.astype(postype)
    args = dict(window=name, transform=pm.affine)
    tol = dict(rtol=1e-12, atol=1e-12) if pm.dtype == 'f8' and postype == 'f8' else dict(rtol=2e-5, atol=2e-5)

    got = window.paint(pm.create('real', value=0), x, mass, **args)
    assert_allclose(got.value, pm.paint(x, mass=mass, resampler=name).value, **tol)
    got = window.paint(pm.create('real', value=1), x, 2.0, **args)
    assert_allclose(got.value, 1 + pm.paint(x, mass=2.0, resampler=name).value, **tol)

    for pos_, m_ in ((x_, mass_), (x_, None), (None, mass_)):
        got = window.paint_jvp(pm.create('real', value=0), x, mass, pos_, m_, **args)
        want = pm.paint_jvp(x, mass=mass, v_pos=pos_, v_mass=m_, resampler=oracle)
        assert_allclose(got.value, want.value, **tol)

    fields = [field(pm, rng) for c in range(4)]
    got = window.readout(fields, x, **args)
    want = numpy.stack([f.readout(x, resampler=name) for f in fields], axis=-1)
    assert_allclose(got, want, **tol)
    assert_allclose(window.readout(fields[0], x, **args), want[:, 0], **tol)

    got = window.gradient(fields[0], x, **args)
    slopes = numpy.stack([[f.readout(x, resampler=oracle, gradient=d) for d in range(pm.ndim)]
                          for f in fields])
    assert got.shape == (len(x), pm.ndim)
    assert_allclose(got, slopes[0].T.reshape(got.shape), **tol)

    x_bar, mass_bar = window.paint_vjp(fields[0], x, mass, **args)
    assert_allclose(x_bar, slopes[0].T.reshape(got.shape) * mass[:, None], **tol)
    assert_allclose(mass_bar, want[:, 0], **tol)

    value = rng.normal(size=(len(x), 4))
    out = [pm.create('real', value=0) for f in fields]
    x_bar = window.readout_vjp(fields, x, value, out=out, **args)
    assert_allclose(x_bar, numpy.einsum('cdp,pc->pd', slopes, value), **tol)
    for c in range(4):
        assert_allclose(out[c].value, pm.paint(x, mass=value[:, c], resampler=name).value, **tol)

    got = window.readout_jvp(fields, x, x_, fields[::-1], **args)
    assert_allclose(got, numpy.einsum('cdp,pd->pc', slopes, x_) + want[:, ::-1], **tol)
    got = window.readout_jvp(fields[0], x, x_, **args)
    assert_allclose(got, numpy.einsum('dp,pd->p', slopes[0], x_), **tol)


@pytest.mark.parametrize('name', ['cic', 'pcs'])
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
        results.append(window.paint(numpy.zeros((9, 6, 8)), pos, 1.0, 'tsc', Transform))
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
    for mesh in (numpy.zeros((8, 12))[::2, ::2], numpy.zeros((4, 6))[::-1, ::-1], numpy.zeros((6, 4)).T,
                 numpy.zeros((4, 6), '>f8'), numpy.zeros((4, 6), 'c16').real):
        assert_allclose(window.paint(mesh, pos), want)
        mesh.flags.writeable = False
        assert_allclose(window.readout(mesh, pos), window.readout(want, pos))
    for x in (pos[:, ::1], numpy.asfortranarray(pos), pos.astype('>f8'), pos.tolist(),
              numpy.concatenate([pos, pos], axis=1)):
        assert_allclose(window.paint(numpy.zeros((4, 6)), x), want)
    still = pos.copy()
    still.flags.writeable = False
    assert_allclose(window.paint(numpy.zeros((4, 6)), still), want)
    integers = numpy.array([[1, 2], [3, 5]])
    assert window.paint(numpy.zeros((4, 6)), integers, 3)[1, 2] == 3
    fields = [numpy.asfortranarray(want), want.astype('f4')]
    assert_allclose(window.readout(fields, pos)[:, 0], window.readout(want, pos))
    out = [numpy.zeros((4, 6), order='F'), numpy.zeros((4, 6))]
    window.readout_vjp(fields, pos, numpy.ones((30, 2)), out=out)
    assert_allclose(out[0], want)
    assert_allclose(out[1], want)


def test_positions_that_are_not_numbers_do_not_reach_beyond_the_mesh():
    pos = numpy.array([[numpy.nan, 1.0], [numpy.inf, 1.0], [1e300, 1.0], [1.0, 1.0]])
    mesh = window.paint(numpy.zeros((4, 4)), pos)
    assert mesh.shape == (4, 4) and numpy.isfinite(mesh[:, 3]).all()


def test_errors_say_what_is_wanted():
    mesh = numpy.zeros((4, 4, 4))
    with pytest.raises(ValueError, match=r"\(N, 3\).*\(5, 2\)"):
        window.paint(mesh, numpy.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"mass.*\(5,\).*\(4,\)"):
        window.paint(mesh, numpy.zeros((5, 3)), numpy.ones(4))
    with pytest.raises(ValueError, match="nnb, cic, tsc, pcs.*lanczos"):
        window.paint(mesh, numpy.zeros((5, 3)), window='lanczos3')
    with pytest.raises(TypeError, match="positions must be real"):
        window.paint(mesh, numpy.zeros((5, 3), 'c16'))
    with pytest.raises(TypeError, match="floating point"):
        window.paint(mesh.astype('i8'), numpy.zeros((5, 3)))
    with pytest.raises(ValueError, match="1, 2 or 3"):
        window.paint(numpy.zeros((2,) * 4), numpy.zeros((5, 4)))
    with pytest.raises(ValueError, match="threads"):
        window.set_threads(0)


def test_windows_of_pmesh_are_recognised():
    assert [window.support(FindResampler(name)) for name in ('nnb', 'cic', 'tsc', 'pcs')] == [1, 2, 3, 4]
    assert window.support('CIC') == 2
    assert window.support(FindResampler('lanczos2')) is None
    assert window.support(FindResampler('linear')) is None
    assert window.support(FindResampler('cic').resize(4)) is None


def test_threads_follow_the_environment(monkeypatch):
    for name in ('OMP_NUM_THREADS', 'NUMBA_NUM_THREADS'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('NUMBA_NUM_THREADS', '3')
    assert window.get_threads() == 3
    monkeypatch.setenv('OMP_NUM_THREADS', '5,2')
    assert window.get_threads() == 5
    monkeypatch.delenv('OMP_NUM_THREADS')
    monkeypatch.delenv('NUMBA_NUM_THREADS')
    monkeypatch.setenv('MPI_LOCALNRANKS', '1000')
    assert window.get_threads() == 1


def test_importing_the_package_does_not_import_numba():
    code = "import sys, vmad_lit; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True)


def test_without_numba_the_error_names_it():
    code = ("import sys; sys.modules['numba'] = None\n"
            "try:\n    import vmad_lit.lib.window\n"
            "except ImportError as e:\n    assert 'numba' in str(e)\nelse:\n    raise SystemExit(1)")
    subprocess.run([sys.executable, '-c', code], check=True)

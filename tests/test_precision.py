"""Single precision: straight loops beside those for all windows, offsets from a lattice, and what is lost on the way."""

from types import SimpleNamespace

import numpy
import pytest
from mpi4py import MPI
from numpy.testing import assert_allclose
from pmesh.pm import ParticleMesh
from pmesh.window import Affine

from vmad_lit import Builder
from vmad_lit.lib import fastpm, window

TOLERANCE = {"f4": 3e-6, "f8": 1e-13}
SHAPE = (6, 5, 7)
WHOLE = Affine(3, scale=[1.0, 0.5, 2.0], translate=[0, 0, 0], period=SHAPE)
SLAB = Affine(3, scale=[1.0, 0.5, 2.0], translate=[-4, 0, 0], period=(11, 5, 7))


def problem(dtype, n, count=1003, where=(-40, 40)):
    """Meshes that are interleaved, positions in and far outside of them, and something for each particle."""
    rng = numpy.random.default_rng(n)
    block = rng.normal(size=(*SHAPE, n)).astype(dtype)
    pos = rng.uniform(*where, size=(count, 3)).astype(dtype)
    factors, speed = rng.normal(size=(count, n)).astype(dtype), rng.normal(size=(count, 3)).astype(dtype)
    return [block[..., c] for c in range(n)], pos, factors, speed


def calls(meshes, pos, factors, speed, **where):
    """All that the straight loops do, by name."""
    n = len(meshes)

    def spread():
        out = numpy.zeros((*SHAPE, n), meshes[0].dtype)
        window.readout_vjp(None, pos, factors, out=list(numpy.moveaxis(out, -1, 0)), need_pos=False, **where)
        return out

    def push():
        out = numpy.zeros(SHAPE, meshes[0].dtype)
        return window.paint_jvp(out, pos, factors[:, 0], speed, factors[:, -1], **where)

    base = numpy.ascontiguousarray(speed[:, :n] if n <= 3 else numpy.hstack([speed, speed])[:, :n])
    return dict(
        readout=lambda: window.readout(meshes, pos, base=base, factor=0.3, **where),
        weighted=lambda: window.weighted_gradient(meshes, pos, factors, **where),
        some=lambda: window.weighted_gradient(meshes, pos, factors[:, : n - 1] if n > 1 else None, **where),
        based=lambda: window.weighted_gradient(meshes, pos, factors, base=speed, factor=0.3, **where),
        both=lambda: window.paint_vjp(numpy.ascontiguousarray(meshes[0]), pos, factors[:, 0], **where)[1],
        change=lambda: window.readout_jvp(meshes, pos, speed, meshes[::-1], **where),
        spread=spread,
        push=push,
    )


@pytest.mark.parametrize("transform", [WHOLE, SLAB], ids=["whole", "slab"])
@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_straight_loops_do_what_all_loops_do(dtype, n, transform, monkeypatch):
    """In the precision of the particles; with the loops for all windows in double precision as the truth."""
    arguments = problem(dtype, n)
    arguments[1][::50] *= 1e5  # many periods away
    got = {name: call() for name, call in calls(*arguments, transform=transform).items()}
    monkeypatch.setattr(window, "is_straight", lambda *_: False)
    meshes, *others = [numpy.asarray(x, "f8") for x in (numpy.stack(arguments[0], -1), *arguments[1:])]
    exact = calls(list(numpy.moveaxis(meshes, -1, 0)), *others, transform=transform)
    for name, call in exact.items():
        want = call()
        assert got[name].dtype == dtype, name
        assert_allclose(got[name], want, atol=TOLERANCE[dtype] * abs(want).max(), err_msg=name)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_positions_that_are_no_numbers_do_no_harm(dtype):
    """Straight loops write only to their meshes, and what they read is of them, or no number."""
    bad = numpy.array([numpy.nan, numpy.inf, -numpy.inf, 1e30, -1e30, 2.0**31, 2.0**63, 3.5], dtype)
    rng = numpy.random.default_rng(0)
    pos = rng.choice(bad, size=(500, 3))
    guarded = numpy.full((SHAPE[0] + 2, *SHAPE[1:], 3), 7.0, dtype)
    inside = guarded[1:-1]
    meshes = list(numpy.moveaxis(inside, -1, 0))
    value = window.readout(meshes, pos)
    assert (numpy.isnan(value) | (abs(value - 7) < 1e-4)).all()
    assert_allclose(value[(pos == 3.5).all(axis=1)], 7.0, rtol=1e-6)
    window.readout_vjp(None, pos, numpy.ones((500, 3), dtype), out=meshes, need_pos=False)
    assert (guarded[0] == 7).all() and (guarded[-1] == 7).all()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9])
def test_few_particles(count):
    meshes, pos, factors, speed = problem("f4", 3, count)
    for name, call in calls(meshes, pos, factors, speed).items():
        assert numpy.isfinite(call()).all(), name


def test_what_is_given_decides_on_the_precision():
    meshes, pos, factors, speed = problem("f4", 3)
    assert window.readout(meshes[0], pos).dtype == "f4" == window.gradient(meshes[0], pos).dtype
    wide = numpy.empty((len(pos), 3))
    assert window.readout(meshes, pos, out=wide) is wide
    assert_allclose(wide, window.readout(meshes, pos), atol=1e-6)
    assert window.readout([mesh.astype("f8") for mesh in meshes], pos).dtype == "f4"
    with pytest.raises(ValueError, match="float32 or float64"):
        window.readout(meshes, pos, out=numpy.empty((len(pos), 3), "f2"))


@pytest.mark.parametrize("name", ["cic", "tsc"])
def test_offsets_from_a_lattice_lose_no_digits(name):
    """In a box of 4000, positions in single precision are wrong by a ten-thousandth; displacements are not."""
    n, box = 12, 4000.0
    transform = Affine(3, scale=[n / box] * 3, translate=[0] * 3, period=[n] * 3)
    rng = numpy.random.default_rng(5)
    q = rng.uniform(0, box, size=(2000, 3))
    dx = rng.normal(scale=5.0, size=q.shape).astype("f4")
    meshes = list(numpy.moveaxis(rng.normal(size=(n, n, n, 3)), -1, 0))
    speed, factors = rng.normal(size=(2, *q.shape))

    def results(pos, **where):
        where = dict(window=name, transform=transform, **where)
        wide = numpy.empty(q.shape)
        yield window.paint(numpy.zeros([n] * 3), pos, 1.0, **where)
        yield window.paint_jvp(numpy.zeros([n] * 3), pos, 1.0, speed, **where)
        yield window.readout(meshes, pos, out=wide, **where)
        yield window.weighted_gradient(meshes, pos, factors, out=wide.copy(), **where)
        yield window.spread_jvp([numpy.zeros([n] * 3) for _ in range(3)], pos, factors, speed, **where)[0]

    exact, offsets = list(results(q + dx)), list(results(dx, lattice=q))
    for want, got in zip(exact, offsets):
        assert abs(got - want).max() < 2e-6 * abs(want).max()
    whole = next(results((q + dx).astype("f4")))
    assert abs(offsets[0] - exact[0]).max() < 1e-12 < 1e-7 < abs(whole - exact[0]).max()
    with pytest.raises(ValueError, match="lattice must have a row"):
        window.paint(numpy.zeros([n] * 3), dx, lattice=q[1:])


def test_threads_see_displaced_particles():
    """The census adds the lattice, too."""
    rng = numpy.random.default_rng(6)
    n = 32
    q = numpy.stack(numpy.meshgrid(*[numpy.arange(n) + 0.5] * 3, indexing="ij"), -1).reshape(-1, 3)
    dx = rng.normal(scale=0.5, size=q.shape).astype("f4")
    results = []
    for threads in 1, 2, 3:
        window.set_threads(threads)
        try:
            results.append(window.paint(numpy.zeros([n] * 3), dx, lattice=q))
        finally:
            window.set_threads(None)
    assert abs(results[0].sum() - n**3) < 1e-6 * n**3
    for result in results[1:]:
        assert_allclose(result, results[0], atol=1e-12)


@pytest.mark.collective
def test_a_simulation_in_single_precision():
    """Density and gradient of a small simulation beside those in double precision."""
    n, found = 16, {}
    for dtype in "f8", "f4":
        pm = ParticleMesh([n] * 3, BoxSize=4.0 * n, comm=MPI.COMM_WORLD, dtype=dtype)
        q = pm.generate_uniform_particle_grid(shift=0.5).astype(dtype)
        simulation = fastpm.FastPMSimulation([0.1, 0.4, 1.0], SimpleNamespace(Om0=0.3), pm, q=q)
        with Builder() as m:
            wn = m.input("wn")
            dx, p, f = simulation.run(
                fastpm.induce_correlation(fastpm.r2c(wn), lambda k: 1e3 / (1 + 9 * k**2), pm)
            )
            x = dx + q
            rho = fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm)
            m.output(rho=rho, objective=fastpm.to_scalar(rho))
        noise = pm.generate_whitenoise(seed=1, unitary=False, type="real")
        (rho, objective), (_wn,) = m.compute_with_vjp(dict(wn=noise), dict(_rho=0.0, _objective=1.0))
        assert rho.value.dtype == dtype == _wn.value.dtype
        found[dtype] = rho.value.astype("f8"), objective, _wn.value.astype("f8")
    for (single, double), bound in zip(zip(found["f4"], found["f8"]), (1e-4, 1e-6, 2e-3)):
        assert numpy.max(abs(single - double)) < bound * numpy.max(abs(double))

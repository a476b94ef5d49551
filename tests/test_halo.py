"""Halos of a mesh: what is fetched and folded, when a halo is chosen, and that nobody can tell it from ghosts."""

import types

import numpy
import pytest
from mpi4py import MPI
from numpy.testing import assert_allclose

from helpers import deal, join, prove
from vmad_lit import Builder
from vmad_lit.lib import exchange, fastpm, mpi, painting
from vmad_lit.lib.exchange import GhostLayout, HaloLayout
from vmad_lit.lib.fastpm import ParticleMesh
from vmad_lit.lib.halo import find_halo

pytestmark = pytest.mark.collective

COMM = MPI.COMM_WORLD

several = pytest.mark.skipif(COMM.size == 1, reason="needs several ranks")


def processes():
    """How ranks may divide a mesh of three axes: slabs along one axis or the other, and pencils."""
    shapes = [[COMM.size, 1], [1, COMM.size]]
    return shapes + [[a, COMM.size // a] for a in range(2, COMM.size) if COMM.size % a == 0]


@pytest.fixture(params=processes(), ids=str)
def pm(request):
    return ParticleMesh([12, 15, 4], BoxSize=[6.0, 5.0, 4.0], comm=COMM, np=request.param)


@pytest.fixture
def halos(monkeypatch):
    monkeypatch.setattr(exchange, "COST_OF_CELL", 0)


def whole(field):
    """All values of a real field, on all ranks."""
    values = numpy.zeros(field.cshape, field.dtype)
    values[tuple(slice(start, start + n) for start, n in zip(field.start, field.shape))] = field.value
    return COMM.allreduce(values)


def noise(pm, seed=3):
    field = pm.create("real")
    everything = numpy.random.default_rng(seed).normal(size=pm.Nmesh)
    field.value[...] = everything[tuple(slice(a, a + n) for a, n in zip(field.start, field.shape))]
    return field


def indices(around, field):
    """The cells of the whole mesh that an array with a halo is made of, along each axis."""
    return [
        (numpy.arange(n) + start - inside.start) % period
        for n, start, inside, period in zip(around.shape, field.start, around.inside, field.cshape)
    ]


WIDTHS = [(0, 0), (1, 0), (2, 3), (4, 1), (7, 7)]


@pytest.mark.parametrize("low, high", WIDTHS)
class TestFetchAndFold:
    def test_what_is_fetched_is_the_mesh_around(self, pm, low, high):
        around, field = find_halo(pm, [low] * 3, [high] * 3), noise(pm)
        assert_allclose(around.fetch(field), whole(field)[numpy.ix_(*indices(around, field))], rtol=0)

    def test_what_is_folded_is_added_to_its_owners(self, pm, low, high):
        around, field = find_halo(pm, [low] * 3, [high] * 3), pm.create("real", value=0)
        array = numpy.random.default_rng(COMM.rank).normal(size=around.shape)
        expected = numpy.zeros(pm.Nmesh)
        numpy.add.at(expected, numpy.ix_(*indices(around, field)), array)
        assert_allclose(whole(around.fold(array.copy())), COMM.allreduce(expected), atol=1e-14)

    def test_one_is_the_transpose_of_the_other(self, pm, low, high):
        around, field = find_halo(pm, [low] * 3, [high] * 3), noise(pm)
        array = numpy.random.default_rng(COMM.rank).normal(size=around.shape)
        there = COMM.allreduce((around.fetch(field) * array).sum())
        assert_allclose(there, field.cdot(around.fold(array.copy())))

    def test_long_messages_go_in_pieces(self, pm, low, high, monkeypatch):
        around, field = find_halo(pm, [low] * 3, [high] * 3), noise(pm)
        expected = around.fetch(field)
        monkeypatch.setattr(mpi, "LARGEST", 100)
        assert numpy.array_equal(around.fetch(field), expected)


def test_single_precision_stays_single():
    pm = ParticleMesh([12, 6, 4], BoxSize=1.0, comm=COMM, dtype="f4")
    around = find_halo(pm, [2] * 3, [2] * 3)
    array = around.fetch(pm.create("real", value=1))
    assert array.dtype == "f4" and around.fold(array).dtype == "f4"


def test_a_rank_without_planes_has_no_halo():
    pm = ParticleMesh([2, 4, 4], BoxSize=1.0, comm=COMM, np=[COMM.size, 1])
    field = noise(pm)
    around = find_halo(pm, [1] * 3, [1] * 3)
    array = around.fetch(field)
    if field.size:
        assert_allclose(array, whole(field)[numpy.ix_(*indices(around, field))])
    else:
        whole(field)
        assert array.size == 0
    assert_allclose(around.fold(numpy.ones(around.shape)).csum(), COMM.allreduce(array.size))


# Halos or ghosts


def particles(pm, n=60, wander=0.5, dtype="f8"):
    """Particles near this rank's part of the mesh, fewer on later ranks."""
    rng, field = numpy.random.default_rng(7 + COMM.rank), pm.create("real")
    cell = pm.BoxSize / pm.Nmesh
    x = rng.uniform(size=(n // (1 + COMM.rank), pm.ndim)) * field.shape + field.start
    return ((x + rng.normal(scale=wander, size=x.shape)) * cell).astype(dtype)


@several
def test_a_halo_is_chosen_where_it_is_less_work():
    pm = ParticleMesh([32, 32, 32], BoxSize=32.0, comm=COMM)
    near = pm.generate_uniform_particle_grid(shift=0.5)
    assert isinstance(exchange.lay_out(lambda: near, pm)[1], HaloLayout)
    few = near[:3]
    assert isinstance(exchange.lay_out(lambda: few, pm)[1], GhostLayout)
    thin = ParticleMesh([COMM.size, 4, 4], BoxSize=32.0, comm=COMM, np=[COMM.size, 1])
    assert isinstance(exchange.lay_out(lambda: near, thin)[1], GhostLayout)
    assert isinstance(exchange.lay_out(lambda: near, pm, smoothing=2.5)[1], GhostLayout)


@several
def test_a_layout_with_a_halo_finds_its_ghosts_when_asked(pm, halos):
    x = particles(pm)
    layout, ghosts = exchange.lay_out(lambda: x, pm)[1], exchange.make_layout(x, pm, 2)
    assert isinstance(layout, HaloLayout)
    assert numpy.array_equal(layout.exchange(x), ghosts.exchange(x))
    rows = numpy.ones(layout.recvlength)
    assert numpy.array_equal(layout.gather(rows), ghosts.gather(rows))
    for name in "sendlength", "recvlength", "sendcounts", "recvcounts", "indices":
        assert numpy.array_equal(getattr(layout, name), getattr(ghosts, name))
    assert_allclose(pm.paint(x, layout=layout).value, pm.paint(x, layout=ghosts).value)


WINDOWS = ["nnb", "cic", "tsc", "pcs"]


@several
@pytest.mark.parametrize("wander", [0.5, 3.0, 50.0])
@pytest.mark.parametrize("kind, dtype", [*((kind, "f8") for kind in WINDOWS), ("cic", "f4")])
def test_painting_and_reading_agree_with_ghosts(pm, halos, kind, wander, dtype):
    """Also with particles all over the box, on the edges of cells, and outside; and with pmesh on one rank."""
    x = particles(pm, wander=wander, dtype=dtype)
    x[::5] = numpy.round(x[::5] * 2 * pm.Nmesh / pm.BoxSize) / 2 * pm.BoxSize / pm.Nmesh
    mass, field = numpy.linspace(1, 2, len(x)), noise(pm)
    results = []
    support = WINDOWS.index(kind) + 1
    for layout in exchange.lay_out(lambda: x, pm, kind)[1], exchange.make_layout(x, pm, support):
        w = painting.Window(pm, kind, layout)
        here = w.bring(x)
        results.append(
            [
                w.paint(here, w.bring(mass)).value,
                w.bring_back(w.readout([field], here)),
                w.bring_back(w.gradient(field, here)),
                w.paint_jvp(here, w.bring(mass), w.bring(x), w.bring(mass)).value,
            ]
        )
    for with_halo, with_ghosts in zip(*results):
        assert_allclose(with_halo, with_ghosts, rtol=1e-9, atol=1e-9 if dtype == "f8" else 1e-4)


OPERATIONS = {
    "paint": lambda pm, x, y, layout: fastpm.paint(x, y, layout, pm),
    "readout": lambda pm, x, y, layout: fastpm.readout(y, x, layout),
    "readout_all": lambda pm, x, y, layout: fastpm.readout_all([y, y * y], x, layout),
    "difference": lambda pm, x, y, layout: fastpm.readout_neg_gradient(y, x, layout),
    "force": lambda pm, x, y, layout: fastpm.force(x, layout, pm)[0] * y,
}


@several
@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives_with_a_halo(pm, halos, name):
    """First and second derivatives are those that finite differences find."""
    x, tangent = particles(pm, 30), numpy.random.default_rng(COMM.rank).normal(size=particles(pm, 30).shape)
    y, y_ = (
        (numpy.ones(len(x)), numpy.ones(len(x)))
        if name == "paint"
        else (numpy.ones((len(x), 1)), numpy.ones((len(x), 1)))
        if name == "force"
        else (noise(pm), noise(pm, 4))
    )

    def model(x, y):
        return OPERATIONS[name](pm, x, y, fastpm.decompose(x, pm))

    # Away from the edges of cells, where the slopes jump
    cell = pm.BoxSize / pm.Nmesh
    x = (numpy.floor(x / cell) + 0.3 + 0.4 * (x / cell % 1)) * cell
    assert prove(model, dict(x=x, y=y), dict(x=1e-2 * tangent, y=y_))
    assert isinstance(exchange.lay_out(lambda: x, pm)[1], HaloLayout)


@several
def test_a_simulation_is_the_same_with_halos_and_with_ghosts(pm, monkeypatch):
    stages = [0.1, 0.6, 1.0]
    results = []
    for cost in 0, numpy.inf:
        monkeypatch.setattr(exchange, "COST_OF_CELL", cost)
        for options in {}, dict(reversible=True), dict(keep_potential=False):
            simulation = fastpm.FastPMSimulation(stages, types.SimpleNamespace(Om0=0.3), pm, **options)
            with Builder() as m:
                wn = m.input("wn")
                dx, p, f = simulation.run(fastpm.r2c(wn))
                x = dx + simulation.q
                m.output(y=fastpm.to_scalar(fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm)))
            init = dict(wn=noise(pm) * 0.3)
            (y,), (_wn,) = m.compute_with_vjp(init, dict(_y=1.0))
            results.append((y, whole(_wn)))
    for y, _wn in results[1:]:
        assert_allclose(y, results[0][0], rtol=1e-12)
        assert_allclose(_wn, results[0][1], rtol=1e-7, atol=1e-9 * abs(_wn).max())


@several
def test_a_position_that_is_none_is_seen_in_the_mesh(halos):
    """It must not get lost between the ranks."""
    pm = ParticleMesh([16, 8, 8], BoxSize=16.0, comm=COMM, np=[COMM.size, 1])
    x = pm.generate_uniform_particle_grid(shift=0.5).copy()
    if COMM.rank == COMM.size - 1:
        x[3, 0] = numpy.nan
    layout = exchange.lay_out(lambda: x, pm, new=False)[1]
    w = painting.Window(pm, None, layout)
    assert numpy.isnan(w.paint(w.bring(x), 1.0).csum())


def test_shares_of_any_size_are_painted_alike(halos):
    """Ranks without particles, and particles far from their rank."""
    pm = ParticleMesh([16, 9, 8], BoxSize=[16.0, 9.0, 8.0], comm=COMM)
    everything = numpy.random.default_rng(1).uniform(-20, 40, size=(50, 3))
    alone = ParticleMesh([16, 9, 8], BoxSize=[16.0, 9.0, 8.0], comm=MPI.COMM_SELF)
    expected = alone.paint(everything).value
    for share in deal(everything), everything if COMM.rank == 0 else everything[:0]:
        assert len(join(share)) == len(everything)
        layout = exchange.lay_out(lambda share=share: share, pm)[1]
        w = painting.Window(pm, None, layout)
        assert_allclose(whole(w.paint(w.bring(share), 1.0)), expected, atol=1e-12)

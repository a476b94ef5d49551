"""Arguments of the operators of the mesh that differ between ranks, or do not fit the mesh: an error on all."""

import re

import numpy
import pytest
from mpi4py import MPI

from helpers import deal, make_mesh, modes, real
from vmad_lit import Builder
from vmad_lit.contrib import cosmo4d
from vmad_lit.contrib.optimize import LBFGS
from vmad_lit.core import agreement
from vmad_lit.core.error import Disagreement
from vmad_lit.lib import fastpm, linalg, lpt, spectra, tracers
from vmad_lit.lib.cosmology import MatterDominated
from vmad_lit.lib.mpi import allreduce

pytestmark = pytest.mark.collective

COMM = MPI.COMM_WORLD
LAST = COMM.size - 1
BAD = COMM.rank == LAST  # the rank whose argument is bad in these tests


def compute(function, **inputs):
    """The value of a function of symbols."""
    with Builder() as m:
        symbols = [m.input(name) for name in inputs]
        m.output(y=function(*symbols))
    return m.compute("y", inputs)


def particles(pm, n=30, dtype="f8"):
    return deal(numpy.random.default_rng(4).uniform(0, 1, (n, pm.ndim)) * pm.BoxSize).astype(dtype)


def either(good, bad):
    """A good argument on most ranks, a bad one on the last."""
    return bad if BAD else good


@pytest.fixture
def pm():
    return make_mesh([4, 6, 5])


@pytest.mark.parametrize("n", [60, 1, 0])
@pytest.mark.parametrize("resampler", ["cic", "linear"])
def test_empty_parts_have_any_type(pm, n, resampler):
    x = numpy.random.default_rng(5).uniform(0, 8, (n, 3)).astype("f4")
    mass = numpy.arange(n, dtype="f4")
    x, mass = (x, mass) if COMM.rank == 0 else (numpy.zeros((0, 3)), numpy.zeros(0))

    def paint(x, mass):
        layout = fastpm.decompose(x, pm, resampler)
        return linalg.sum(fastpm.paint(x, mass, layout, pm, resampler))

    def there_and_back(mass):
        layout = fastpm.decompose(x, pm)
        return fastpm.gather(fastpm.exchange(mass, layout), layout)

    total = compute(paint, x=x, mass=mass)
    n = COMM.bcast(n)
    assert abs(total - n * (n - 1) / 2) < 1e-6 * (1 + n**2)
    back = compute(there_and_back, mass=mass)
    assert back.dtype == ("f8" if n == 0 and COMM.size > 1 else "f4")
    assert len(back) == len(mass) and (back >= mass).all()


def test_types_that_differ(pm):
    """Values are those of one type on all ranks; derivatives have the type of each rank's own value."""
    x = particles(pm, dtype="f4")
    mixed = x.astype(either("f4", "f8"))

    def paint(x):
        return linalg.sum(fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm) * noise)

    noise = real(pm, 3)
    with Builder() as m:
        symbol = m.input("x")
        m.output(y=paint(symbol))
    for tangent in numpy.ones_like(mixed), mixed:
        y, y_ = m.compute_with_jvp("y", dict(x=mixed), dict(x_=tangent))
        numpy.testing.assert_allclose(y, compute(paint, x=x), rtol=1e-4, atol=1e-4)
        _, (_x,) = m.compute_with_vjp(dict(x=mixed), dict(_y=1.0))
        assert abs(COMM.allreduce(float((_x * tangent).sum())) - y_) < 1e-4 * (1 + abs(y_))


def positions_of(bad):
    return lambda pm, x: dict(x=either(x, bad(x)))


def spoilt(value):
    def spoil(x):
        x = numpy.zeros((3, 3))
        x[1, 2] = value
        return x

    return spoil


BAD_POSITIONS = {
    "shape": lambda x: numpy.zeros((3, 2)),
    "axes": lambda x: numpy.zeros(3),
    "nan": spoilt(numpy.nan),
    "inf": spoilt(-numpy.inf),
    "text": lambda x: numpy.array([["a", "b", "c"]]),
    "complex": lambda x: numpy.zeros((3, 3), dtype="c16"),
    "none": lambda x: None,
    "masked": lambda x: numpy.ma.masked_array(numpy.ones((3, 3)), numpy.eye(3) > 0),
}


def raises_everywhere(function):
    """The message of the error that a function raises on all ranks, which is the same and names the last rank."""
    with pytest.raises((TypeError, ValueError, RuntimeError, ZeroDivisionError)) as caught:
        function()
    message = str(caught.value)
    assert message == COMM.bcast(message)
    assert type(caught.value) is COMM.bcast(type(caught.value))
    assert COMM.size == 1 or f"rank {LAST}" in message, message
    return message


@pytest.mark.parametrize("name", BAD_POSITIONS)
@pytest.mark.parametrize("n", [30, 2])
class TestBadPositions:
    def test_decompose(self, pm, name, n):
        x = either(particles(pm, n), BAD_POSITIONS[name](n))
        raises_everywhere(lambda: compute(lambda s: fastpm.decompose(x, pm), s=1.0))
        raises_everywhere(lambda: compute(lambda s: fastpm.decompose(x, pm, 1.5), s=1.0))

    def test_paint_and_read(self, pm, name, n):
        x, field = either(particles(pm, n), BAD_POSITIONS[name](n)), real(pm)
        raises_everywhere(lambda: compute(lambda x: fastpm.paint(x, 1.0, None, pm), x=x))
        raises_everywhere(lambda: compute(lambda x: fastpm.readout(field, x, None), x=x))
        raises_everywhere(lambda: compute(lambda x: fastpm.readout_all([field], x, None), x=x))
        raises_everywhere(lambda: compute(lambda x: fastpm.readout_neg_gradient(field, x, None), x=x))
        raises_everywhere(lambda: compute(lambda x: fastpm.force(x, None, pm)[0], x=x))

    def test_nbody(self, pm, name, n):
        if name in ("nan", "inf"):
            return  # come out at the end, on all ranks
        q = particles(pm, n)
        dx = either(0 * q, BAD_POSITIONS[name](n))
        factors = numpy.ones(3)
        for step in (
            lambda dx: fastpm.kick_drift(dx, 0 * q, 0.1, 0.1, q, pm)[0],
            lambda dx: fastpm.reversible_leapfrog(dx, 0 * q, factors, q, pm)[0],
        ):
            raises_everywhere(lambda: compute(step, dx=dx))


def masses(n):
    return {
        "longer": numpy.ones(n + 1),
        "columns": numpy.ones((n, 1)),
        "complex": numpy.ones(n, "c8"),
        "text": "3",
    }


@pytest.mark.parametrize("name", masses(0))
def test_bad_masses(pm, name):
    x = particles(pm)
    mass = either(numpy.ones(len(x)), masses(len(x))[name])
    for layout in fastpm.decompose, lambda x, pm: None:
        message = raises_everywhere(
            lambda: compute(lambda mass: fastpm.paint(x, mass, layout(x, pm), pm), mass=mass)
        )
        assert "mass" in message


def test_one_mass_or_many(pm):
    if COMM.size == 1:
        pytest.skip("ranks that differ")
    x = particles(pm)
    raises_everywhere(
        lambda: compute(
            lambda m: fastpm.paint(x, m, fastpm.decompose(x, pm), pm), m=either(numpy.ones(len(x)), 1.0)
        )
    )


@pytest.mark.parametrize("shape", [(1,), (2,)])
def test_rows_for_other_particles(pm, shape):
    """More rows than particles; and rows that are longer on one rank."""
    x = particles(pm)
    good = numpy.ones((len(x), 1))
    for bad in numpy.ones((len(x) + 1, 1)), numpy.ones((len(x),) + shape + (2,)):
        if len(bad) == len(x) and COMM.size == 1:
            continue
        rows = either(good, bad)
        raises_everywhere(lambda: compute(lambda r: fastpm.exchange(r, fastpm.decompose(x, pm)), r=rows))
    layout = compute(lambda s: fastpm.decompose(x, pm), s=1.0)
    good = numpy.ones((layout.recvlength, 1))
    raises_everywhere(lambda: compute(lambda r: fastpm.gather(r, layout), r=either(good, good[None])))


def test_layouts_of_others(pm):
    x = particles(pm)

    def layout(rows, pm=pm, smoothing=None):
        return compute(lambda s: fastpm.decompose(rows, pm, smoothing), s=1.0)

    wrong = {
        "other particles": layout(x if not BAD else numpy.concatenate([x, x[:1], pm.BoxSize[None]])),
        "another mesh": layout(x, either(pm, make_mesh([8, 6, 5]))) if COMM.size == 1 else None,
        "no layout": either(layout(x), 3.0),
    }
    for name, bad in wrong.items():
        if bad is None:
            continue
        raises_everywhere(lambda: compute(lambda x: fastpm.paint(x, 1.0, bad, pm), x=x))
        raises_everywhere(lambda: compute(lambda x: fastpm.readout(real(pm), x, bad), x=x))
        raises_everywhere(lambda: compute(lambda x: fastpm.force(x, bad, pm)[0], x=x))


def everywhere(function, match=None):
    """All ranks do the same wrong thing, and get the same error."""
    with pytest.raises((TypeError, ValueError), match=match):
        function()


def test_layouts_for_others(pm):
    x, other = particles(pm), make_mesh([8, 6, 5])

    def paint(pm, other, smoothing=None, resampler=None):
        def painted(x):
            return fastpm.paint(x, 1.0, fastpm.decompose(x, other, smoothing), pm, resampler)

        return linalg.sum, compute(painted, x=x)

    everywhere(lambda: paint(pm, other), "the layout is of a mesh of 8 x 6 x 5 points")
    everywhere(lambda: paint(pm, fastpm.ParticleMesh([4, 6, 5], BoxSize=7.0)), "the layout is of a mesh")
    everywhere(lambda: paint(pm, pm, "cic", "pcs"), "within 1.0 cells")
    everywhere(lambda: paint(pm, pm, 1.0, "tsc"), "within 1.0 cells")
    everywhere(lambda: paint(pm, pm, -1.0), "smoothing must be")
    for smoothing, resampler in ("pcs", "cic"), ("tsc", "tsc"), (2, "pcs"), (1, "cic"):
        _, field = paint(pm, pm, smoothing, resampler)
        total = COMM.allreduce(len(x))
        numpy.testing.assert_allclose(field.csum(), total)


@pytest.mark.parametrize("name", ["r2c", "c2r", "to_scalar", "cdot", "apply_transfer", "apply_digitized"])
def test_fields_of_another_kind(pm, name):
    """A field of the wrong kind, or none, on one rank."""
    kind, other = (
        (modes(pm), real(pm))
        if name in ("c2r", "apply_transfer", "apply_digitized")
        else (real(pm), modes(pm))
    )
    bins = fastpm.apply_digitized.isotropic_wavenumber([0.0, 1.0, 2.0])
    function = {
        "apply_transfer": lambda x: fastpm.apply_transfer(x, fastpm.fourier_space_laplace),
        "apply_digitized": lambda x: fastpm.apply_digitized(x, numpy.ones(2), bins),
        "cdot": lambda x: fastpm.cdot(x, x),
    }.get(name) or getattr(fastpm, name)
    for bad in other, numpy.ones(3), None:
        if COMM.size == 1 and name in ("to_scalar", "cdot") and bad is other:
            continue
        raises_everywhere(lambda: compute(function, x=either(kind, bad)))


def test_other_arguments(pm):
    """Names, tables and functions that are bad on one rank."""
    x, k, field = particles(pm), modes(pm), real(pm)
    bins = fastpm.apply_digitized.isotropic_wavenumber([0.0, 1.0, 2.0])

    def broken(labels):
        raise ZeroDivisionError("no such transfer")

    def wrong_shape(labels):
        return numpy.ones((2, 3, 4, 5))

    good = fastpm.fourier_space_laplace
    for function in (
        lambda: compute(lambda k: fastpm.apply_transfer(k, either(good, broken)), k=k),
        lambda: compute(lambda k: fastpm.apply_transfer(k, either(good, wrong_shape)), k=k),
        lambda: compute(lambda k: fastpm.apply_transfer(k, good, either("circular", "cubic")), k=k),
        lambda: compute(
            lambda k: fastpm.apply_digitized(k, either(numpy.ones(2), numpy.ones((2, 2))), bins), k=k
        ),
        lambda: compute(
            lambda k: fastpm.apply_digitized(k, numpy.ones(2), bins, "index", either("phase", "?")), k=k
        ),
        lambda: compute(lambda x: fastpm.decompose(x, pm, either("cic", "nothing")), x=x),
        lambda: compute(lambda x: fastpm.decompose(x, pm, either(1.0, numpy.nan)), x=x),
        lambda: compute(lambda x: fastpm.paint(x, 1.0, None, pm, either("cic", "nothing")), x=x),
        lambda: compute(lambda x: fastpm.readout(field, x, None, either(None, 3)), x=x),
    ):
        raises_everywhere(function)


def test_arguments_that_differ(pm):
    if COMM.size == 1:
        pytest.skip("ranks that differ")
    x, k, field = particles(pm), modes(pm), real(pm)
    bins = fastpm.apply_digitized.isotropic_wavenumber([0.0, 1.0, 2.0])
    others = make_mesh([4, 6, 5]), fastpm.ParticleMesh([4, 6, 5], BoxSize=9.0)
    for function in (
        lambda: compute(lambda k: fastpm.apply_digitized(k, numpy.ones(either(2, 3)), bins), k=k),
        lambda: compute(lambda x: fastpm.paint(x, 1.0, None, either(*others)), x=x),
        lambda: compute(lambda x: fastpm.decompose(x, either(*others)), x=x),
        lambda: compute(lambda x: fastpm.paint(x, 1.0, None, pm, either("cic", "tsc")), x=x),
        lambda: compute(lambda x: fastpm.readout_all([field] * either(2, 3), x, None), x=x),
    ):
        assert re.search("differ between ranks|different models", raises_everywhere(function))


@pytest.mark.parametrize("size", [0, -1.0, numpy.inf, numpy.nan, None, [8.0, 8.0], [8.0, 8.0, 0.0], "8", 1j])
def test_boxes_that_there_are_not(size):
    message = raises_everywhere(lambda: fastpm.ParticleMesh([4, 4, 4], BoxSize=either(8.0, size)))
    assert "BoxSize" in message


@pytest.mark.parametrize("points", [[8.9] * 3, 8, [], [0, 4, 4], [-4, 4, 4], [numpy.nan] * 3, None, "888"])
def test_meshes_that_there_are_not(points):
    message = raises_everywhere(lambda: fastpm.ParticleMesh(either([4, 4, 4], points), BoxSize=8.0))
    assert "Nmesh" in message


def test_meshes_that_differ_between_ranks():
    if COMM.size > 1:
        assert "BoxSize" in raises_everywhere(
            lambda: fastpm.ParticleMesh([4, 4, 4], BoxSize=either(8.0, 9.0))
        )
    same = fastpm.ParticleMesh(numpy.array([4.0, 6.0]), BoxSize=[2])
    assert list(same.Nmesh) == [4, 6] and list(same.BoxSize) == [2, 2]


def others_of(pm):
    """Meshes that are not this one: another box, other points, the same for each rank alone."""
    points, box = [int(n) for n in pm.Nmesh], pm.BoxSize
    others = dict(
        box=fastpm.ParticleMesh(points, BoxSize=2 * box), points=fastpm.ParticleMesh([8, 6, 5], BoxSize=box)
    )
    if COMM.size > 1:
        others["ranks"] = fastpm.ParticleMesh(points, BoxSize=box, comm=MPI.COMM_SELF)
    return others


def of_modes(pm):
    """What takes modes beside a mesh, by name."""
    q, pt = pm.generate_uniform_particle_grid(shift=0.5), MatterDominated(0.3)
    shells, stages = spectra.Shells(pm), [0.1, 0.6, 1.0]

    def power(k):
        return numpy.ones_like(k)

    def forward(k):
        return cosmo4d.FastPMOperator(k, q, [], pt, pm)[1]

    return {
        "lpt1": lambda k: fastpm.lpt1(k, q, pm),
        "lpt": lambda k: fastpm.lpt(k, q, pm)[0],
        "lpt2src": lambda k: fastpm.lpt2src(k, pm),
        "firststep": lambda k: fastpm.firststep(k, q, 0.1, pt, pm)[0],
        "nbody": lambda k: fastpm.nbody(k, q, stages, pt, pm)[0],
        "simulation": lambda k: fastpm.FastPMSimulation(stages, pt, pm).run(k)[0],
        "induce_correlation": lambda k: fastpm.induce_correlation(k, power, pm),
        "color_modes": lambda k: fastpm.color_modes(k, numpy.ones(len(fastpm.find_wavenumbers(pm))), pm),
        "power": lambda k: spectra.power(k, shells),
        "cross_power": lambda k: spectra.cross_power(modes(pm), k, shells),
        "correlation": lambda k: spectra.correlation(k, modes(pm), shells),
        "cdot": lambda k: fastpm.cdot(modes(pm), k),
        "lagrangian_fields": lambda k: tracers.lagrangian_fields(k, q, pm),
        "linear theory": forward,
        "prior": lambda k: cosmo4d.PriorOperator(k, k, power, pm),
        "sum": lambda k: k + modes(pm),
    }


@pytest.mark.parametrize("name", of_modes(make_mesh([4, 6, 5])))
def test_modes_of_another_mesh(pm, name):
    function = of_modes(pm)[name]
    compute(function, k=modes(pm))
    compute(function, k=modes(make_mesh([4, 6, 5])))  # one that is the same is as good
    for which, other in others_of(pm).items():
        message = "shared among other ranks" if which == "ranks" else "is of a mesh of|broadcast"
        k = other.create("complex", value=1.0)
        everywhere(lambda: compute(function, k=k), message if name != "sum" else None)
    everywhere(lambda: compute(function, k=real(pm)), "complex|Complex|one kind")


def test_fields_of_another_mesh(pm):
    x, data = real(pm), cosmo4d.Data(real(pm), 1.0)
    q, pt = pm.generate_uniform_particle_grid(shift=0.5), MatterDominated(0.3)
    white = cosmo4d.WhiteNoiseOperator.bind(power=numpy.ones_like, q=q, stages=[], cosmology=pt, pm=pm)
    pairs = {
        "start": lambda y: cosmo4d.reconstruct(white, data, LBFGS(maxiter=1), start=y),
        "data": lambda y: cosmo4d.reconstruct(white, cosmo4d.Data(y, 1.0), LBFGS(maxiter=1)),
        "white noise": lambda y: compute(lambda s: white(s)[1], s=y),
        "residual": lambda y: compute(lambda s: cosmo4d.LNResidualOperator(s, s, y, 1.0), s=abs(x)),
        "cdot": lambda y: compute(lambda s: fastpm.cdot(s, y), s=x),
        "meshes": lambda y: compute(lambda s: fastpm.readout_all([s, y], q, None), s=x),
        "layout": lambda y: compute(lambda s: fastpm.readout(s, q, fastpm.decompose(q, pm)), s=y),
        "shells": lambda y: spectra.Shells(pm).power(x, y),
    }
    for name, call in pairs.items():
        for other in others_of(pm).values():
            everywhere(lambda: call(other.create("real", value=1.0)))
    for call in (
        lambda: spectra.projection(modes(pm)),
        lambda: compute(lambda k: fastpm.readout(k, q, None), k=modes(pm)),
        lambda: compute(lambda k: fastpm.readout_neg_gradient(k, q, None), k=modes(pm)),
        lambda: compute(lambda k: lpt.second_order_source(k), k=modes(pm)),
    ):
        everywhere(call, "expected a real field.*c2r")


def test_a_rank_that_cannot_describe_the_model(monkeypatch):
    """Nobody waits, and on the rank that has failed its own error is the cause."""
    comm = MPI.COMM_WORLD
    if comm.size == 1:
        pytest.skip("needs several ranks")
    with Builder() as m:
        m.output(y=allreduce(m.input("x"), comm))
    original = agreement.door_of

    def door_of(*arguments):
        if comm.rank == 1:
            raise MemoryError("no room")
        return original(*arguments)

    monkeypatch.setattr(agreement, "door_of", door_of)
    told = r"different places: .*rank 1: at the start of Builder.*, which fails: MemoryError: no room "
    with pytest.raises(Disagreement, match=told) as raised:
        m.compute("y", dict(x=1.0))
    assert isinstance(raised.value.__cause__, MemoryError) == (comm.rank == 1)

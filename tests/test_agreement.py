"""Arguments of the operators of the mesh that differ between ranks, or do not fit the mesh: an error on all."""

import numpy
import pytest
from mpi4py import MPI

from helpers import deal, make_mesh, modes, real
from vmad_lit import Builder
from vmad_lit.lib import fastpm, linalg, lpt, mesh, painting, spectra
from vmad_lit.lib.cosmology import MatterDominated

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
}


def raises_everywhere(function):
    """The message of the error that a function raises on all ranks, which is the same and names the last rank."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
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


def everywhere(function, match):
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
        if COMM.size > 1 or function:
            try:
                raises_everywhere(function)
            except ZeroDivisionError:
                assert COMM.size == 1


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
        assert "differ between ranks" in raises_everywhere(function)

"""The operators of the particle mesh: derivatives and rank invariance on 1 to 4 ranks."""

import gc
import weakref
from functools import lru_cache
from itertools import combinations

import numpy
import pytest
from mpi4py import MPI
from numpy.testing import assert_allclose
import pmesh.domain
import pmesh.pm
from pmesh.pm import Field

from helpers import BOX, cotangent, deal, join, make_mesh, modes, prove, real
from vmad_lit import Builder, operator
from vmad_lit.core.error import BrokenPrimitive
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.lib import axpy, exchange, fastpm, force, linalg, loops, lpt, mpi, nbody, painting, transfer
from vmad_lit.lib.fastpm import ParticleMesh
from vmad_lit.lib.mesh import is_zero, on_mesh
from vmad_lit.testing import check_second_order

pytestmark = pytest.mark.collective

COMM = MPI.COMM_WORLD

# uneven, prime, with empty ranks on 3 or 4 ranks, odd and even last axes
MESHES = [[4, 3, 5], [2, 4, 4], [5, 8, 4], [7, 6], [8, 4]]
SERIAL = [[6], [7]]


def without_loops(monkeypatch):
    """As if numba were missing: pmesh's windows and NumPy serve."""
    monkeypatch.setattr(painting, "window", None)
    for module in axpy, exchange, force, lpt, nbody, transfer:
        monkeypatch.setattr(module, "loops", None)


def meshes():
    return MESHES + SERIAL if COMM.size == 1 else MESHES[:4]


def particles(pm, seed=2, n=40):
    """This rank's share of particles, unevenly: the last rank has none if there are three or more."""
    rng = numpy.random.default_rng(seed)
    pos = rng.uniform(-0.5, 1.5, size=(n, pm.ndim)) * pm.BoxSize
    return deal(pos)


def per_particle(seed, *shape, n=40):
    return deal(numpy.random.default_rng(seed).normal(size=(n,) + shape))


@pytest.mark.parametrize("dtype", ["f4", "f8", None])
@pytest.mark.parametrize("nmesh", meshes(), ids=str)
def test_a_lattice_lies_in_memory_particle_by_particle(nmesh, dtype):
    pm, shift = make_mesh(nmesh), [0.5, 0.0, 0.25][: len(nmesh)]
    theirs, numbers = pmesh.pm.ParticleMesh.generate_uniform_particle_grid(pm, shift, return_id=True)
    ours, ids = pm.generate_uniform_particle_grid(shift, dtype, return_id=True)
    assert ours.flags.c_contiguous and not ours.flags.writeable and ours.dtype == numpy.dtype(dtype or "f8")
    numpy.testing.assert_array_equal(ours, theirs.astype(ours.dtype))
    numpy.testing.assert_array_equal(ids, numbers)
    numpy.testing.assert_array_equal(pm.generate_uniform_particle_grid(shift, dtype), ours)


@pytest.mark.parametrize("nmesh", meshes(), ids=str)
class TestFields:
    def test_to_scalar(self, nmesh):
        pm = make_mesh(nmesh)
        assert prove(lambda x: fastpm.to_scalar(x), dict(x=real(pm)), dict(x=real(pm, 2)))
        assert prove(lambda x: fastpm.to_scalar(x), dict(x=modes(pm)), dict(x=modes(pm, 2)))

    def test_cdot(self, nmesh):
        pm = make_mesh(nmesh)
        for kind in real, modes:
            assert prove(
                lambda x1, x2: fastpm.cdot(x1, x2),
                dict(x1=kind(pm), x2=kind(pm, 2)),
                dict(x1=kind(pm, 3), x2=kind(pm, 4)),
            )

    def test_on_mesh(self, nmesh):
        pm = make_mesh(nmesh)
        again = on_mesh.vjp.impl(None, _y=modes(pm))["_x"]
        assert_allclose(again.value, modes(pm).value)
        assert prove(lambda x: fastpm.c2r(on_mesh(x, pm)), dict(x=modes(pm)), dict(x=modes(pm, 2)))
        assert prove(lambda x: on_mesh(x, pm, pmesh.pm.RealField), dict(x=real(pm)), dict(x=real(pm, 2)))

    def test_parseval(self, nmesh):
        pm = make_mesh(nmesh)
        x = real(pm)
        with Builder() as m:
            s = m.input("s")
            m.output(a=fastpm.to_scalar(s), b=fastpm.to_scalar(fastpm.r2c(s)))
        a, b = m.compute(["a", "b"], init=dict(s=x))
        assert_allclose(a, b * pm.Nmesh.prod())

    def test_methods_of_pmesh_count_all_modes(self, nmesh):
        pm = make_mesh(nmesh)
        x, y = real(pm, 1), real(pm, 2)
        N = pm.Nmesh.prod()
        assert_allclose(x.r2c().cdot(y.r2c()).real * N, x.cdot(y), atol=1e-10)
        assert_allclose(x.r2c().cnorm() * N, x.cdot(x))
        assert_allclose(x.r2c().cnorm(metric=lambda k: 2 + 0 * k) * N, 2 * x.cdot(x))
        with pytest.raises(TypeError, match="one kind"):
            x.r2c().cdot(y)
        with Builder() as m:
            s, t = m.input("s", "t")
            m.output(a=linalg.to_scalar(s), c=fastpm.c2r(s * t))
        (a, c), (_s, _t) = m.compute_with_vjp(init=dict(s=x.r2c(), t=2.0), v=dict(_a=0, _c=y))
        assert_allclose(a * N, x.cdot(x))
        assert_allclose(_t, x.cdot(y), atol=1e-10)

    def test_wavenumbers_are_centred(self, nmesh):
        pm = make_mesh(nmesh)
        x = real(pm)
        for k, i, n, length in zip(x.r2c().x, x.r2c().i, pm.Nmesh, pm.BoxSize):
            assert_allclose(k, 2 * numpy.pi * numpy.fft.fftfreq(n, length / n)[i], rtol=1e-12)
        laplacian = fastpm.apply_transfer.apl.impl(None, x.r2c(), lambda k: -k.normp(2))["y"].c2r()
        k = numpy.meshgrid(
            *[2 * numpy.pi * numpy.fft.fftfreq(n, length / n) for n, length in zip(pm.Nmesh, pm.BoxSize)],
            indexing="ij",
        )
        whole = numpy.random.default_rng(1).normal(size=pm.Nmesh)
        expected = numpy.fft.ifftn(-sum(ki**2 for ki in k) * numpy.fft.fftn(whole)).real
        assert_allclose(laplacian.value, expected[x.slices], atol=1e-10)

    def test_transforms(self, nmesh):
        pm = make_mesh(nmesh)
        assert prove(lambda x: fastpm.r2c(x), dict(x=real(pm)), dict(x=real(pm, 2)))
        assert prove(lambda x: fastpm.c2r(x), dict(x=modes(pm)), dict(x=modes(pm, 2)))
        assert prove(lambda x: fastpm.c2r(fastpm.r2c(x)), dict(x=real(pm)), dict(x=real(pm, 2)))

    def test_c2r_of_modes_that_are_not_hermitian(self, nmesh):
        pm = make_mesh(nmesh)
        rng = numpy.random.default_rng([7, COMM.rank])
        x = [pm.create("complex") for i in range(2)]
        for field in x:
            field.value[...] = rng.normal(size=field.shape) + 1j * rng.normal(size=field.shape)
        assert prove(lambda x: fastpm.c2r(x), dict(x=x[0]), dict(x=x[1]))

    def test_untransposed_modes(self, nmesh):
        pm = make_mesh(nmesh)
        x, v = (real(pm, i).cast(type="untransposedcomplex") for i in (1, 2))
        assert prove(lambda x: fastpm.c2r(x), dict(x=x), dict(x=v))
        assert prove(lambda x: fastpm.apply_transfer(x, fastpm.fourier_space_laplace), dict(x=x), dict(x=v))

    def test_as_complex_field(self, nmesh):
        pm = make_mesh(nmesh)
        rng = numpy.random.default_rng([8, COMM.rank])
        shape = pm.create("complex").shape + (2,)
        x, v = rng.normal(size=shape), rng.normal(size=shape)
        assert prove(lambda x: fastpm.as_complex_field(x, pm=pm), dict(x=x), dict(x=v))
        assert prove(lambda x: fastpm.c2r(fastpm.as_complex_field(x, pm=pm)), dict(x=x), dict(x=v))

    @pytest.mark.parametrize("kind", ["wavenumber", "circular", "index"])
    def test_apply_transfer(self, nmesh, kind):
        pm = make_mesh(nmesh)
        x = modes(pm)

        def tf(k):
            return numpy.exp(-sum(abs(ki) for ki in k) / 4) + 1j * k[0] * sum(ki**2 for ki in k)

        assert prove(lambda x: fastpm.apply_transfer(x, tf, kind), dict(x=x), dict(x=modes(pm, 2)))
        with Builder() as m:
            m.output(y=fastpm.apply_transfer(m.input("x"), tf, kind=kind))
        y = m.compute("y", init=dict(x=x))
        if pm.ndim > 1:  # pmesh cannot do it in one dimension
            want = x.apply(lambda k, v: tf(k) * v, kind=kind)
            assert_allclose(y.value, want.value, atol=1e-12)

    def test_kernels_of_gravity(self, nmesh):
        pm = make_mesh(nmesh)
        for order in 0, 1:
            for d in range(pm.ndim):
                tf = fastpm.fourier_space_neg_gradient(d, pm, order)
                assert tf is fastpm.fourier_space_neg_gradient(d, pm, order)
                laplace = fastpm.fourier_space_laplace
                assert prove(
                    lambda x: fastpm.apply_transfer(fastpm.apply_transfer(x, tf), laplace),
                    dict(x=modes(pm)),
                    dict(x=modes(pm, 2)),
                )

    @pytest.mark.parametrize("mode", ["amplitude", "phase"])
    @pytest.mark.parametrize("fixed", [True, False])
    def test_apply_digitized(self, nmesh, mode, fixed):
        pm = make_mesh(nmesh)
        edges = numpy.linspace(0.1, 2.5, 5)
        tf, tf_ = numpy.random.default_rng(3).normal(size=(2, 4))
        digitizer = fastpm.apply_digitized.isotropic_wavenumber(edges)
        if not fixed:
            inner = digitizer

            def digitizer(k):
                ind, conj = inner(k)
                return ind, (k[0] < 0) | conj

        model = lambda x, tf: fastpm.apply_digitized(x, tf, digitizer, "wavenumber", mode)
        assert prove(model, dict(x=modes(pm), tf=tf), dict(x=modes(pm, 2), tf=tf_), replicated=["tf"])
        if mode == "amplitude":
            assert prove(
                model,
                dict(x=modes(pm), tf=tf + 1j * tf_[::-1]),
                dict(x=modes(pm, 2), tf=tf_ - 1j * tf),
                replicated=["tf"],
            )


WINDOWS = ["nnb", "cic", "tsc", "pcs", "lanczos2", "linear"] if COMM.size == 1 else ["cic", "pcs", "lanczos2"]

SMOOTH = {"nnb", "cic", "tsc", "pcs"}  # windows with second derivatives


@pytest.mark.parametrize("resampler", WINDOWS)
@pytest.mark.parametrize("nmesh", meshes(), ids=str)
class TestParticles:
    tol = dict(eps=1e-6, rtol=1e-5)

    def setup(self, nmesh, resampler):
        # pmesh's tables of the Lanczos window and of its derivative agree to some digits only
        self.tol = dict(eps=1e-6, rtol=2e-3 if resampler == "lanczos2" else 1e-5)
        self.resampler = resampler
        pm = make_mesh(nmesh, resampler=resampler)
        return pm, particles(pm)

    def prove(self, function, inputs, tangents, **options):
        """Both first derivatives, and second ones where the window has them."""
        second = prove(function, inputs, tangents, **self.tol, **options)
        assert second == (self.resampler in SMOOTH)

    def test_paint(self, nmesh, resampler):
        pm, x = self.setup(nmesh, resampler)
        layout = fastpm.decompose.apl.impl(None, x=x, pm=pm)["layout"]
        mass = 1 + per_particle(4) ** 2
        self.prove(
            lambda x, mass: fastpm.paint(x, mass, layout, pm),
            dict(x=x, mass=mass),
            dict(x=per_particle(5, pm.ndim), mass=per_particle(6)),
        )
        self.prove(
            lambda x, mass: fastpm.paint(x, mass, fastpm.decompose(x, pm), pm),
            dict(x=x, mass=0.7),
            dict(x=per_particle(5, pm.ndim), mass=0.3),
        )

    def test_readout(self, nmesh, resampler):
        pm, x = self.setup(nmesh, resampler)
        self.prove(
            lambda mesh, x: fastpm.readout(mesh, x, fastpm.decompose(x, pm)),
            dict(mesh=real(pm), x=x),
            dict(mesh=real(pm, 2), x=per_particle(5, pm.ndim)),
        )

    def test_readout_all(self, nmesh, resampler):
        pm, x = self.setup(nmesh, resampler)
        self.prove(
            lambda meshes, x: fastpm.readout_all(meshes, x, fastpm.decompose(x, pm)),
            dict(meshes=[real(pm, i) for i in range(4)], x=x),
            dict(meshes=[real(pm, i + 9) for i in range(4)], x=per_particle(5, pm.ndim)),
        )

    def test_readout_neg_gradient(self, nmesh, resampler):
        pm, x = self.setup(nmesh, resampler)
        self.prove(
            lambda mesh, x: fastpm.readout_neg_gradient(mesh, x, fastpm.decompose(x, pm)),
            dict(mesh=real(pm), x=x),
            dict(mesh=real(pm, 2), x=per_particle(5, pm.ndim)),
        )

    def test_force(self, nmesh, resampler):
        pm, x = self.setup(nmesh, resampler)
        for outputs, pick in ((["f", "p"], slice(0, 2)), (["f"], 0), (["p"], 1)):
            self.prove(
                lambda x: fastpm.force(x, fastpm.decompose(x, pm), pm)[pick],
                dict(x=x),
                dict(x=per_particle(5, pm.ndim)),
                outputs=outputs,
            )

    def test_force_without_differences_or_potential(self, nmesh, resampler):
        pm, x = self.setup(nmesh, resampler)
        for options in dict(order=0), dict(keep_potential=False):
            self.prove(
                lambda x: fastpm.force(x, fastpm.decompose(x, pm), pm, **options),
                dict(x=x),
                dict(x=per_particle(5, pm.ndim)),
                outputs=["f", "p"],
            )

    def test_force_is_the_chain_of_operators(self, nmesh, resampler):
        pm, x = self.setup(nmesh, resampler)
        with Builder() as m:
            s = m.input("x")
            layout = fastpm.decompose(s, pm)
            f, potk = fastpm.force(s, layout, pm)
            xl = fastpm.exchange(s, layout)
            rho = fastpm.paint(xl, 1.0, None, pm) * (pm.Nmesh.prod() / 40)
            p = fastpm.apply_transfer(fastpm.r2c(rho), fastpm.fourier_space_laplace)
            F = [
                fastpm.c2r(fastpm.apply_transfer(p, fastpm.fourier_space_neg_gradient(d, pm)))
                for d in range(pm.ndim)
            ]
            m.output(f=f, g=fastpm.gather(fastpm.readout_all(F, xl, None), layout), potk=potk, p=p)
        f, g, potk, p = m.compute(["f", "g", "potk", "p"], init=dict(x=x))
        assert_allclose(f, g, atol=1e-10)
        assert_allclose(potk.value, p.value, atol=1e-12)

    def test_the_result_does_not_depend_on_the_ranks(self, nmesh, resampler):
        pm, x = self.setup(nmesh, resampler)
        one = make_mesh(pm.Nmesh, MPI.COMM_SELF, resampler=resampler)
        everything = [join(a) for a in (x, 1 + per_particle(4) ** 2)]
        results = []
        for mesh, (pos, mass) in ((pm, (x, 1 + per_particle(4) ** 2)), (one, everything)):
            with Builder() as m:
                s, w = m.input("x", "mass")
                layout = fastpm.decompose(s, mesh)
                f, potk = fastpm.force(s, layout, mesh)
                m.output(rho=fastpm.paint(s, w, layout, mesh), f=f)
            rho, f = m.compute(["rho", "f"], init=dict(x=pos, mass=mass))
            (rho, f), (_x, _m) = m.compute_with_vjp(init=dict(x=pos, mass=mass), v=dict(_rho=rho, _f=f))
            results.append([rho, f, _x, _m])
            if resampler in SMOOTH:
                v = dict(x_=numpy.sin(pos), mass_=numpy.cos(mass), _rho=rho, _f=f)
                results[-1] += m.compute_with_hvp(["rho", "f"], init=dict(x=pos, mass=mass), v=v)[2]
        mine, full = results
        assert_allclose(mine[0].value, full[0].value[mine[0].slices], atol=1e-10)
        for a, b in zip(mine[1:], full[1:]):
            assert_allclose(join(a), b, atol=1e-8)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("nmesh", meshes(), ids=str)
def test_a_particle_for_each_point(nmesh, shift, dtype):
    pm = make_mesh(nmesh)
    q = pm.generate_uniform_particle_grid(shift=shift).astype(dtype)
    found = lpt.find_shift(q, pm)
    assert_allclose(found, shift, atol=1e-6)

    def short(phi):
        return lpt.neg_gradient_rows(lpt.interpolate(phi, found), dtype)

    phi, w = real(pm), cotangent(q, 3).astype(dtype)
    results = []
    for displace in short, lambda phi: fastpm.readout_neg_gradient(phi, q, fastpm.decompose(q, pm)):
        with Builder() as m:
            m.output(dx=displace(m.input("phi")))
        [dx], [_phi] = m.compute_with_vjp(dict(phi=phi), dict(_dx=w))
        results.append((dx, _phi.value))
    for one, other in zip(*results):
        assert one.dtype == other.dtype
        assert_allclose(one, other, atol=1e-13 if dtype == "f8" else 1e-5)
    if dtype == "f8":
        assert prove(short, dict(phi=phi), dict(phi=real(pm, 2)))


@pytest.mark.parametrize("nmesh", [[1, 4, 4], [2, 4, 4], [3, 2, 4]], ids=str)
def test_each_rank_has_a_domain_with_fewer_planes_than_ranks(nmesh):
    pm = ParticleMesh(nmesh, BoxSize=1.0, comm=COMM, np=[COMM.size, 1])
    assert sorted(pm.domain.DomainAssign) == list(range(COMM.size))
    x = numpy.random.default_rng(COMM.rank).random((10 + COMM.rank, 3))
    with Builder() as m:
        layout = fastpm.decompose(m.input("x"), pm)
        m.output(rho=fastpm.paint(x, 1.0, layout, pm))
    assert_allclose(m.compute("rho", dict(x=x)).csum(), COMM.allreduce(len(x)))


def test_what_is_no_particle_for_each_point():
    pm = make_mesh([4, 6, 5])
    q, h = pm.generate_uniform_particle_grid(shift=0.5), pm.BoxSize / pm.Nmesh
    last = q.copy()
    last[-1:] += 1e-6 * h
    others = dict(fewer=q[1:], last=last, order=q[::-1], behind=q + h, before=q - h, other=q * 1.01)
    for name, other in others.items():
        assert lpt.find_shift(other, pm) is None, name
    if COMM.size > 1:  # one rank is enough
        assert lpt.find_shift(last if COMM.rank == 0 else q, pm) is None
        assert lpt.find_shift(q + 0.1 * h * (COMM.rank == 0), pm) is None
    assert lpt.find_shift(q, make_mesh([4, 6, 5], resampler="tsc")) is None


@pytest.mark.parametrize("nmesh", [n for n in meshes() if len(n) > 1], ids=str)
def test_second_order_source(nmesh):
    pm = make_mesh(nmesh)
    assert prove(lambda p: fastpm.second_order_source(p), dict(p=real(pm)), dict(p=real(pm, 2)))
    rhok = real(pm).r2c()
    rhok[(abs(rhok.i[0]) + sum(abs(i) for i in rhok.i[1:])) == 0] = 0
    source = fastpm.lpt2src.build(pm=pm).compute("rho_lpt2", dict(rhok=rhok))
    potential = rhok.apply(lambda k, v: v * fastpm.fourier_space_laplace(k))

    def second(i, j):
        return potential.apply(lambda k, v: v * fastpm.fourier_space_second_derivative(i, j, pm)(k)).c2r()

    expected = 0
    for j in range(pm.ndim):
        for i in range(j):
            expected = expected + (second(i, i) * second(j, j) - second(i, j) ** 2) * (3 / 7)
    assert_allclose(
        source.value, expected.value, atol=1e-10 * max(COMM.allgather(abs(expected.value).max(initial=0)))
    )


@pytest.mark.parametrize("nmesh", meshes(), ids=str)
def test_exchange_and_gather(nmesh):
    pm = make_mesh(nmesh)
    x = particles(pm)
    layout = fastpm.decompose.apl.impl(None, x=x, pm=pm)["layout"]
    for shape in (), (pm.ndim,), (2, 2):
        data, v = per_particle(4, *shape), per_particle(5, *shape)
        assert prove(lambda x: fastpm.exchange(x, layout), dict(x=data), dict(x=v))
        assert prove(lambda x: fastpm.gather(fastpm.exchange(x, layout), layout), dict(x=data), dict(x=v))
        assert prove(lambda x: fastpm.exchange(x, layout), dict(x=data + 1j * v), dict(x=v - 1j * data))
        rng = numpy.random.default_rng([3, COMM.rank])
        ghosts, v = rng.normal(size=(2, layout.recvlength) + shape)
        assert prove(lambda x: fastpm.gather(x, layout), dict(x=ghosts), dict(x=v))
        assert prove(lambda x: fastpm.gather(x, layout), dict(x=ghosts + 1j * v), dict(x=v - 1j * ghosts))


@pytest.mark.parametrize("resampler", ["cic", "lanczos2"])
def test_single_precision(resampler):
    pm = make_mesh([4, 6, 8], dtype="f4", resampler=resampler)
    double = make_mesh([4, 6, 8], resampler=resampler)
    x = particles(pm)
    results = []
    for mesh, pos in ((pm, x.astype("f4")), (double, x)):
        with Builder() as m:
            s = m.input("x")
            layout = fastpm.decompose(s, mesh)
            f, potk = fastpm.force(s, layout, mesh)
            rho = fastpm.paint(s, 1.0, layout, mesh)
            v = fastpm.readout(fastpm.c2r(fastpm.r2c(rho)), s, layout)
            m.output(f=f, v=v, rho=rho)
        f, v, rho = m.compute(["f", "v", "rho"], init=dict(x=pos))
        _, (_x,) = m.compute_with_vjp(init=dict(x=pos), v=dict(_f=f, _v=v, _rho=rho))
        results.append((f, v, rho.value, _x))
    assert rho.dtype == "f8" and results[0][2].dtype == "f4"
    assert results[0][3].dtype == "f4" and results[0][0].dtype == "f4"
    for a, b in zip(*results):
        assert_allclose(a, b, atol=2e-4 * max(abs(b).max(initial=0), 1))


def objective(pm, mesh, x, mass):
    """A number made by all operators between particles and meshes."""
    layout = fastpm.decompose(x, pm)
    f, potk = fastpm.force(x, layout, pm)
    rho = fastpm.paint(x, mass, layout, pm)
    values = [
        fastpm.readout(mesh, x, layout),
        fastpm.readout_all([rho, mesh], x, layout),
        fastpm.readout_neg_gradient(mesh, x, layout),
        f,
    ]
    y = fastpm.cdot(rho, fastpm.c2r(potk))
    for value in values:
        y = y + fastpm.to_scalar(
            fastpm.paint(
                x, linalg.sum(value * value, axis=-1) if value is not values[0] else value * value, layout, pm
            )
        )
    return y


@pytest.mark.parametrize(
    "nmesh, resampler", [([5, 8, 4], "cic"), ([2, 4, 6], "tsc"), ([7, 6], "pcs")], ids=str
)
def test_the_hessian_of_a_number(nmesh, resampler):
    """Symmetric, and the derivative of the gradient to second order in the step; also if a rank has no particles."""
    pm = make_mesh(nmesh, resampler=resampler)
    x, mass = particles(pm), 1 + per_particle(4) ** 2
    steps = (1e-5, 5e-6, 2.5e-6) if resampler != "pcs" else (1e-3, 5e-4, 2.5e-4, 1.25e-4)

    def function(mesh, x, mass):
        return objective(pm, mesh, x, mass)

    rates = check_second_order(function, real(pm), x, mass, comm=COMM, steps=steps)
    assert 1.8 < rates[-1] < 2.2


def test_the_hessian_in_single_precision():
    results = []
    for dtype in "f4", "f8":
        pm = make_mesh([4, 6, 8], dtype=dtype, resampler="tsc")
        x, mass, v, u = (
            a.astype(dtype)
            for a in (particles(pm), 1 + per_particle(4) ** 2, per_particle(5, 3), per_particle(6))
        )
        with Builder() as m:
            m.output(y=objective(pm, *m.input("mesh", "x", "mass")))
        given = dict(mesh_=real(pm, 2), x_=v, mass_=u)
        results.append(m.compute_with_hvp("y", dict(mesh=real(pm), x=x, mass=mass), given)[2])
    for a, b in zip(*results):
        a, b = getattr(a, "value", a), getattr(b, "value", b)
        assert a.dtype == "f4" and b.dtype == "f8"
        assert_allclose(a, b, atol=1e-3 * max(COMM.allgather(abs(b).max(initial=0))))


def test_windows_without_second_derivatives(monkeypatch):
    def run(resampler):
        pm = make_mesh([8, 12, 8], resampler=resampler)
        with Builder() as m:
            x = m.input("x")
            m.output(y=fastpm.to_scalar(fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm)))
        init, v = dict(x=particles(pm)), dict(x_=per_particle(4, 3))
        m.compute_with_gnDp("y", init, v)
        return m.compute_with_hvp("y", init, v)

    run("cic")
    with pytest.raises(
        BrokenPrimitive, match="lanczos2 of pmesh has no hvp.*nnb, cic, tsc or pcs.*compute_with_gnDp"
    ):
        run("lanczos2")
    without_loops(monkeypatch)
    with pytest.raises(BrokenPrimitive, match="no hvp.*numba"):
        run("cic")


def test_complex_meshes():
    """Meshes of complex numbers are transformed too; particles see their real part."""
    pm = ParticleMesh([4, 6, 8], BoxSize=BOX, comm=COMM, dtype="c16")
    x, v = (modes(pm, i) for i in (1, 2))
    assert not x.compressed
    assert prove(lambda x: fastpm.to_scalar(x), dict(x=x), dict(x=v))
    pos = particles(pm)
    with Builder() as m:
        s = m.input("x")
        layout = fastpm.decompose(s, pm)
        m.output(y=fastpm.paint(s, 1.0, layout, pm))
    y = m.compute("y", init=dict(x=pos))
    assert_allclose(y.csum(), 40)


def test_integers_are_converted():
    pm = make_mesh([8, 6, 10])
    integers = particles(pm).astype("i8")

    def run(x, mass):
        with Builder() as m:
            s = m.input("x")
            m.output(y=fastpm.paint(s, mass, fastpm.decompose(s, pm), pm))
        return m.compute("y", init=dict(x=x)).value

    assert_allclose(run(integers, 2), run(integers.astype("f8"), 2.0))
    assert_allclose(run(integers, numpy.full(len(integers), 2)), run(integers.astype("f8"), 2.0))


def test_errors_name_what_was_expected():
    pm = make_mesh([4, 6, 8])

    def run(operator, *args, **kwargs):
        return operator.apl.impl(None, *args, **kwargs)

    for x in (numpy.zeros((5, 2)), numpy.zeros(15), numpy.zeros((5, 4))):
        with pytest.raises(ValueError, match=r"\(N, 3\)"):
            run(fastpm.decompose, x, pm)
        with pytest.raises(ValueError, match=r"\(N, 3\)"):
            run(fastpm.paint, x, 1.0, None, pm)
        with pytest.raises(ValueError, match=r"\(N, 3\)"):
            run(fastpm.readout, real(pm), x, None)
    with pytest.raises(TypeError, match="real"):
        run(fastpm.decompose, numpy.zeros((5, 3), "c16"), pm)
    with pytest.raises(TypeError, match="masses"):
        run(fastpm.paint, numpy.zeros((5, 3)), "a", None, pm)
    with pytest.raises(ValueError, match="order"):
        fastpm.fourier_space_neg_gradient(0, pm, 2)
    with pytest.raises(ValueError, match="axis"):
        fastpm.fourier_space_neg_gradient(3, pm)
    with pytest.raises(TypeError, match="RealField; use r2c"):
        run(fastpm.apply_transfer, real(pm), fastpm.fourier_space_laplace)
    with pytest.raises(ValueError, match="kind"):
        run(fastpm.apply_transfer, modes(pm), fastpm.fourier_space_laplace, "wavelength")
    with pytest.raises(ValueError, match="mode"):
        digitizer = fastpm.apply_digitized.isotropic_wavenumber([0, 1])
        run(fastpm.apply_digitized, modes(pm), numpy.ones(1), digitizer, mode="angle")
    with pytest.raises(TypeError, match="one kind"):
        run(fastpm.cdot, real(pm), modes(pm))
    with pytest.raises(ValueError, match="shape"):
        run(fastpm.as_complex_field, numpy.zeros((2, 2)), pm)


@pytest.mark.serial
def test_one_rank_needs_no_exchange():
    pm = make_mesh([4, 6, 8], MPI.COMM_SELF)
    x = numpy.zeros((5, 3))
    layout = fastpm.decompose.apl.impl(None, x=x, pm=pm)["layout"]
    assert layout.exchange(x) is x and layout.gather(x) is x
    a, b = layout.exchange(x, x[:, 0])
    assert a is x
    assert_allclose(pm.paint(x, layout=layout).value, pm.paint(x).value)
    assert_allclose(pm.create("real", value=2).readout(x, layout=layout), 2)
    with pytest.raises(ValueError, match="5 particles"):
        layout.exchange(x[:2])


def test_a_function_that_changes_is_not_kept():
    pm = make_mesh([4, 6, 8])
    strength = [1.0]
    with Builder() as m:
        m.output(y=fastpm.apply_transfer(m.input("x"), lambda k: strength[0] + 0 * k[0]))
    x = modes(pm)
    m.compute("y", init=dict(x=x))
    strength[0] = 3.0
    assert_allclose(m.compute("y", init=dict(x=x)).value, 3 * x.value)


def test_what_is_kept_goes_with_the_mesh():
    pm = make_mesh([4, 6, 8])
    fastpm.apply_transfer.apl.impl(None, modes(pm), fastpm.fourier_space_neg_gradient(0, pm))
    fastpm.apply_transfer.apl.impl(None, modes(pm), fastpm.fourier_space_laplace)
    ref = weakref.ref(pm)
    del pm
    gc.collect()
    assert ref() is None


def test_pmesh_serves_where_numba_is_missing(monkeypatch):
    pm = make_mesh([8, 12, 8], resampler="pcs")
    x = particles(pm)

    def run():
        with Builder() as m:
            s = m.input("x")
            layout = fastpm.decompose(s, pm)
            f, potk = fastpm.force(s, layout, pm)
            m.output(f=f, rho=fastpm.paint(s, 2.0, layout, pm))
        (f, rho), (_x,) = m.compute_with_vjp(init=dict(x=x), v=dict(_f=per_particle(3, 3), _rho=real(pm)))
        (f, rho), (f_, rho_) = m.compute_with_jvp(["f", "rho"], init=dict(x=x), v=dict(x_=per_particle(4, 3)))
        return f, rho.value, _x, f_, rho_.value

    compiled = run()
    without_loops(monkeypatch)
    for a, b in zip(compiled, run()):
        assert_allclose(a, b, atol=1e-9)


def test_readout_at_constant_positions_keeps_no_mesh():
    pm = make_mesh([4, 6, 8])
    q = particles(pm)
    layout = fastpm.decompose.apl.impl(None, x=q, pm=pm)["layout"]
    with Builder() as m:
        m.output(y=fastpm.readout(m.input("x"), q, layout))
    y, tape = m.compute("y", init=dict(x=real(pm)), return_tape=True)
    for record in tape:
        assert not any(isinstance(v, Field) for v in record.impl_kwargs.values())


# The treacherous zero: derivatives that some ranks know to be zero, at run time, and others do not.

ZEROS = {"replicated": lambda v: ZeroGradient, "dense": lambda v: v * 0}


@operator
class capricious:
    """The identity, of which the ranks `silent` find at run time that one of its derivatives, `sweep`, is zero."""

    ain = {"x": "*"}
    aout = {"y": "*"}

    def apl(node, x, sweep, silent, zero):
        return dict(y=x)

    def vjp(node, _y, sweep, silent, zero):
        return dict(_x=ZEROS[zero](_y) if sweep == "vjp" and COMM.rank in silent else _y)

    def jvp(node, x_, sweep, silent, zero):
        return dict(y_=ZEROS[zero](x_) if sweep == "jvp" and COMM.rank in silent else x_)

    hvp = ZeroGradient


COMMUNICATING = [
    "to_scalar",
    "to_scalar of modes",
    "cdot",
    "as_complex_field",
    "r2c",
    "c2r",
    "apply_transfer",
    "apply_digitized",
    "decompose",
    "exchange",
    "exchange of complex numbers",
    "gather",
    "paint",
    "paint one mass",
    "paint without a layout",
    "readout",
    "readout_all",
    "readout_neg_gradient",
    "force",
    "force in single precision",
]


@lru_cache
def communicating():
    """Operators whose derivatives communicate, and neighbours of theirs: (function, inputs, tangents) by name."""
    pm = make_mesh([5, 8, 4])
    x, x_, mass, mass_ = particles(pm), per_particle(5, 3), 1 + per_particle(4) ** 2, per_particle(6)
    layout = fastpm.decompose.apl.impl(None, x=x, pm=pm)["layout"]
    ghosts, ghosts_ = numpy.random.default_rng([3, COMM.rank]).normal(size=(2, layout.recvlength, 2))
    fields = [real(pm, i) for i in range(1, 7)]
    numbers, numbers_ = (numpy.stack([k.real, k.imag], axis=-1) for k in (modes(pm, 1), modes(pm, 2)))
    tf, tf_ = numpy.random.default_rng(3).normal(size=(2, 4))
    digitizer = fastpm.apply_digitized.isotropic_wavenumber(numpy.linspace(0.1, 2.5, 5))
    two = dict(x1=fields[0], x2=fields[1]), dict(x1=fields[2], x2=fields[3])
    cases = {
        "to_scalar": (fastpm.to_scalar, dict(x=fields[0]), dict(x=fields[1])),
        "to_scalar of modes": (fastpm.to_scalar, dict(x=modes(pm)), dict(x=modes(pm, 2))),
        "cdot": (fastpm.cdot, *two),
        "as_complex_field": (lambda x: fastpm.as_complex_field(x, pm=pm), dict(x=numbers), dict(x=numbers_)),
        "r2c": (fastpm.r2c, dict(x=fields[0]), dict(x=fields[1])),
        "c2r": (fastpm.c2r, dict(x=modes(pm)), dict(x=modes(pm, 2))),
        "apply_transfer": (
            lambda x: fastpm.apply_transfer(x, fastpm.fourier_space_laplace),
            dict(x=modes(pm)),
            dict(x=modes(pm, 2)),
        ),
        "apply_digitized": (
            lambda x, tf: fastpm.apply_digitized(x, tf, digitizer),
            dict(x=modes(pm), tf=tf),
            dict(x=modes(pm, 2), tf=tf_),
        ),
        "decompose": (lambda x: fastpm.exchange(x, fastpm.decompose(x, pm)), dict(x=x), dict(x=x_)),
        "exchange": (lambda x: fastpm.exchange(x, layout), dict(x=x), dict(x=x_)),
        "exchange of complex numbers": (
            lambda x: fastpm.exchange(x, layout),
            dict(x=x + 1j * x_),
            dict(x=x_ - 2j * x),
        ),
        "gather": (lambda x: fastpm.gather(x, layout), dict(x=ghosts), dict(x=ghosts_)),
        "paint": (
            lambda x, mass: fastpm.paint(x, mass, layout, pm),
            dict(x=x, mass=mass),
            dict(x=x_, mass=mass_),
        ),
        "paint one mass": (
            lambda x, mass: fastpm.paint(x, mass, layout, pm),
            dict(x=x, mass=2.0),
            dict(x=x_, mass=0.5),
        ),
        "paint without a layout": (
            lambda x, mass: fastpm.paint(x, mass, None, pm),
            dict(x=x, mass=2.0),
            dict(x=x_, mass=0.5),
        ),
        "readout": (
            lambda mesh, x: fastpm.readout(mesh, x, layout),
            dict(mesh=fields[0], x=x),
            dict(mesh=fields[1], x=x_),
        ),
        "readout_all": (
            lambda a, b, x: fastpm.readout_all([a, b], x, layout),
            dict(a=fields[0], b=fields[1], x=x),
            dict(a=fields[2], b=fields[3], x=x_),
        ),
        "readout_neg_gradient": (
            lambda mesh, x: fastpm.readout_neg_gradient(mesh, x, layout),
            dict(mesh=fields[0], x=x),
            dict(mesh=fields[1], x=x_),
        ),
        "force": (lambda x: fastpm.force(x, layout, pm), dict(x=x), dict(x=x_)),
        "force in single precision": (
            lambda x: fastpm.force(x, layout, pm),
            dict(x=x.astype("f4")),
            dict(x=x_.astype("f4")),
        ),
    }
    assert list(cases) == COMMUNICATING
    return cases


def some_of(names):
    """All subsets of names but the empty one."""
    return [subset for n in range(1, len(names) + 1) for subset in combinations(names, n)]


SILENT = {"rank 0": {0}, "the others": set(range(1, COMM.size)), "all": set(range(COMM.size))}


@pytest.mark.timeout(100)
@pytest.mark.parametrize("silent", SILENT.values(), ids=list(SILENT))
@pytest.mark.parametrize("name", COMMUNICATING)
class TestZerosOfSomeRanks:
    """The sweeps go through, and give what they give for zeros that all ranks spell out."""

    def sweep(self, sweep, name, silent, zero, chosen, second=False):
        function, inputs, tangents = communicating()[name]
        with Builder() as m:

            def pass_on(symbol, label):
                return capricious(symbol, sweep, silent, zero) if label in chosen else symbol

            symbols = {label: pass_on(m.input(label), label) for label in inputs}
            results = function(**symbols)
            labels = ["y0", "y1"] if isinstance(results, list) else ["y0"]
            results = results if isinstance(results, list) else [results]
            m.output(**{label: pass_on(result, label) for label, result in zip(labels, results)})
        values = m.compute(labels, init=inputs)
        pushed = {k + "_": v for k, v in tangents.items()}
        v = {"_" + label: cotangent(value, 50 + i) for i, (label, value) in enumerate(zip(labels, values))}
        if second:
            return m.compute_with_hvp(labels, init=inputs, v={**pushed, **v})[2]
        if sweep == "jvp":
            return m.compute_with_jvp(labels, init=inputs, v=pushed)[1]
        return m.compute_with_vjp(init=inputs, v=v)[1]

    def compare(self, sweep, name, silent, chosen, second=False):
        mine, want = (self.sweep(sweep, name, silent, zero, chosen, second) for zero in ZEROS)
        for a, b in zip(mine, want):
            difference = numpy.asarray(getattr(a, "value", a)) - numpy.asarray(getattr(b, "value", b))
            assert_allclose(difference, 0, atol=1e-5 if "single" in name else 1e-12)
        # What the other ranks have to say arrives somewhere
        heard = COMM.allreduce(
            sum(float(abs(numpy.asarray(getattr(a, "value", a), "c16")).sum()) for a in mine)
        )
        assert heard > 0 or len(silent) == COMM.size or second
        return mine

    def test_tangents(self, name, silent):
        inputs = communicating()[name][1]
        for chosen in some_of(list(inputs)):
            results = self.compare("jvp", name, silent, chosen)
            if len(chosen) == len(inputs) and len(silent) == COMM.size:
                assert all(is_zero(result) for result in results)

    def test_cotangents(self, name, silent):
        outputs = ["y0", "y1"] if name.startswith("force") else ["y0"]
        for chosen in some_of(outputs):
            results = self.compare("vjp", name, silent, chosen)
            if len(chosen) == len(outputs) and len(silent) == COMM.size:
                assert all(is_zero(result) for result in results)

    def test_changes_of_cotangents(self, name, silent):
        inputs, outputs = communicating()[name][1], ["y0", "y1"] if name.startswith("force") else ["y0"]
        for sweep, names in ("jvp", list(inputs)), ("vjp", outputs):
            for chosen in some_of(names):
                results = self.compare(sweep, name, silent, chosen, second=True)
                if len(chosen) == len(names) and len(silent) == COMM.size:
                    assert all(is_zero(result) for result in results)


@pytest.mark.parametrize("nmesh", [[8, 6, 4], [3, 2, 5], [2, 3], [7, 5], [1, 4, 4]], ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_ranks_of_particles_are_those_that_numpy_finds(nmesh, dtype, monkeypatch):
    """The loop that finds the ranks, beside passes over all particles; also outside of the box and on its edges."""
    pm = ParticleMesh(nmesh, BoxSize=numpy.arange(1.0, len(nmesh) + 1), comm=COMM)
    rng = numpy.random.default_rng(COMM.rank)
    x = rng.uniform(-2, 3, size=(40 + COMM.rank, len(nmesh))) * pm.BoxSize
    x[:20] = numpy.round(x[:20] * pm.Nmesh / pm.BoxSize * 2) / 2 * pm.BoxSize / pm.Nmesh
    for count in 0, len(x):
        for support in range(1, 7):
            layouts = []
            for which in loops, None:
                monkeypatch.setattr(exchange, "loops", which)
                layouts.append(exchange.make_layout(x[:count].astype(dtype), pm, support))
            found, want = layouts
            assert numpy.array_equal(found.sendcounts, want.sendcounts)
            assert numpy.array_equal(found.indices, want.indices)


@pytest.mark.parametrize("dtype", ["f4", "f8", "c8", "c16", "i4", "?"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_rows_of_any_kind_travel(dtype, shape):
    """There and back, each row comes multiplied by the number of its copies."""
    pm = ParticleMesh([8, 6, 4], BoxSize=1.0, comm=COMM)
    rng = numpy.random.default_rng(COMM.rank)
    x = rng.uniform(size=(30 + 5 * COMM.rank, 3))
    layout = exchange.make_layout(x, pm, 4)
    data = rng.integers(0, 2 if dtype == "?" else 50, size=(len(x),) + shape).astype(dtype)
    copies = layout.gather(layout.exchange(numpy.ones(len(x)))).reshape((-1,) + (1,) * len(shape))
    back = layout.gather(layout.exchange(data))
    assert back.dtype == data.dtype and back.shape == data.shape
    assert_allclose(back, data * copies if dtype != "?" else data)
    positions = layout.exchange(x)
    assert len(positions) == layout.recvlength
    out = numpy.empty_like(data)
    assert layout.gather(layout.exchange(data), out=out) is out
    assert_allclose(out, back)


@pytest.mark.parametrize("dtype", ["f8", "c16", "c8"])
def test_rows_come_back_by_a_layout_of_pmesh(dtype):
    """Real and complex: as many times as a row was sent."""
    pm = pmesh.pm.ParticleMesh([8, 6, 4], BoxSize=1.0, comm=COMM)
    rng = numpy.random.default_rng(COMM.rank)
    x = rng.uniform(size=(30 + 5 * COMM.rank, 3))
    layout = pm.decompose(x, smoothing=1.0)
    assert isinstance(layout, pmesh.domain.Layout)
    for shape in (), (2,):
        data = (
            rng.normal(size=(len(x), *shape, 2)).view("c16")[..., 0].astype(dtype)
            if dtype != "f8"
            else rng.normal(size=(len(x), *shape))
        )
        copies = layout.gather(layout.exchange(numpy.ones(len(x)))).reshape((-1,) + (1,) * len(shape))
        back = exchange.gather_rows(layout, exchange.exchange_rows(layout, data))
        assert back.dtype == data.dtype
        assert_allclose(back, data * copies, rtol=1e-6)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_weights_that_a_user_puts_in_by_hand_are_not_counted_twice(mesh, by_hand, bare):
    """The slope with respect to a number that reaches a field as an array, by finite differences."""

    @operator
    class weighed:
        ain, aout = {"x": "ComplexField"}, {"y": "ComplexField"}

        def apl(node, x):
            return dict(y=x.copy())

        def vjp(node, _y):
            _x = _y.copy()
            twice = numpy.broadcast_to((2 * _y.i[-1]) % _y.Nmesh[-1] != 0, _y.shape)
            if by_hand:
                _x.value[twice] += numpy.conj(_y.value[twice])
            return _x if bare else dict(_x=_x)

    pm = make_mesh(mesh)
    noise, weight = modes(pm, 3), real(pm, 4)
    scale = noise.apply(lambda k, v: 1 / (1 + k.normp(2)))
    with Builder() as m:
        filtered = scale * linalg.broadcast_to(mpi.allbcast(m.input("s"), COMM), scale.shape)
        m.output(y=fastpm.c2r(noise * weighed(filtered)))
    _, [slope] = m.compute_with_vjp(dict(s=0.7), dict(_y=weight))
    up, down = (m.compute("y", dict(s=s)).value for s in (1.7, -0.3))
    assert_allclose(slope, COMM.allreduce(numpy.sum((up - down) / 2 * weight.value)), rtol=1e-9)

"""Spectra, maps, redshift space and bias: against the full complex transform, theory and finite differences, on 1 to 4 ranks."""

import numpy as np
import pytest

pytest.importorskip("mpi4py")
pytest.importorskip("pmesh")

from mpi4py import MPI
from scipy.special import eval_legendre

from helpers import deal, make_mesh, modes, whole
from vmad_lit import Builder
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.lib import fastpm, spectra, tracers
from vmad_lit.lib.cosmology import MatterDominated
from vmad_lit.lib.fastpm import ParticleMesh
from vmad_lit.lib.spectra import Shells
from vmad_lit.testing import check, check_rank_invariance

pytestmark = pytest.mark.collective

COMM = MPI.COMM_WORLD
# uneven, prime, thin (empty ranks), odd and even last axes, planes and lines
MESHES = [[4, 3, 5], [2, 4, 4], [5, 8, 4], [7, 5, 11], [7, 6], [8, 4]] + [[6], [7]] * (COMM.size == 1)
SOLIDS = [n for n in MESHES if len(n) == 3]


def reference(pm, a, b, edges, poles=(0,), los=None):
    """The estimator on all modes of the whole mesh, by NumPy; with the mean k and the number of modes."""
    los = np.eye(pm.ndim)[-1] if los is None else np.asarray(los) / np.linalg.norm(los)
    A, B = (np.fft.fftn(x) / x.size for x in (a, b))
    k = np.meshgrid(
        *[2 * np.pi * np.fft.fftfreq(n, L / n) for n, L in zip(pm.Nmesh, pm.BoxSize)], indexing="ij"
    )
    modulus = np.sqrt(sum(ki**2 for ki in k))
    mu = sum(ki * n for ki, n in zip(k, los)) / np.where(modulus > 0, modulus, 1)
    power = (A * B.conj()).real * np.prod(pm.BoxSize)
    means, counts, spectrum = [], [], []
    for low, high in zip(edges[:-1], edges[1:]):
        inside = (low <= modulus) & (modulus < high)
        if inside.any():
            counts.append(inside.sum())
            means.append(modulus[inside].mean())
            legendre = [(2 * l + 1) * eval_legendre(l, mu) * ((modulus > 0) | (l == 0)) for l in poles]
            spectrum.append([(g * power)[inside].mean() for g in legendre])
    return np.array(means), np.array(counts), np.array(spectrum).T


@pytest.mark.parametrize("nmesh", MESHES, ids=str)
@pytest.mark.parametrize("dtype", ["f8", "f4"])
@pytest.mark.parametrize("edges", ["default", "with the mean", "partly empty"])
def test_against_the_full_transform(nmesh, dtype, edges):
    pm = make_mesh(nmesh, dtype=dtype)
    edges = dict(default=None).get(
        edges, np.array([-1, 0.7, 1.9]) if edges == "with the mean" else np.linspace(0.1, 5, 40)
    )
    shells = Shells(pm, edges)
    a, b = whole(pm, 1), whole(pm, 2)
    if edges is None:
        assert shells.edges[0] == pytest.approx(np.pi / pm.BoxSize.min())
        rest = np.pi * (pm.Nmesh / pm.BoxSize).min() - shells.edges[-1]
        assert len(shells.edges) == 2 or 0 <= rest + 1e-9 < 2 * np.pi / pm.BoxSize.min()
    k, counts, [cross] = reference(pm, a, b, shells.edges)
    _, _, [power] = reference(pm, a, a, shells.edges)
    tolerance = dict(rtol=1e-10 if dtype == "f8" else 1e-4, atol=1e-9 if dtype == "f8" else 1e-5)
    np.testing.assert_allclose(shells.k, k, rtol=1e-12)
    np.testing.assert_array_equal(shells.counts, counts)
    np.testing.assert_allclose(shells.power(modes(pm, 1), modes(pm, 2)), cross, **tolerance)
    np.testing.assert_allclose(shells.power(modes(pm, 1)), power, **tolerance)
    np.testing.assert_allclose(shells.power(modes(pm, 1).c2r()), power, **tolerance)


@pytest.mark.parametrize("nmesh", SOLIDS, ids=str)
@pytest.mark.parametrize("los", [0, 1, None, [1.0, -2.0, 0.5]], ids=str)
def test_multipoles_against_the_full_transform(nmesh, los):
    pm = make_mesh(nmesh)
    edges = np.array([-1.0, 0.9, 1.5, 2.5])
    if np.ndim(
        los
    ):  # the sign of a Nyquist frequency is nobody's, and so is its angle to an oblique direction
        edges = edges[edges < np.pi * (pm.Nmesh / pm.BoxSize).min()]
        if len(edges) < 2:
            pytest.skip("no shell below the Nyquist frequency")
    direction = np.eye(3)[los] if np.ndim(los) == 0 and los is not None else los
    shells = Shells(pm, edges, poles=[0, 2, 4], los=los)
    _, _, expected = reference(pm, whole(pm, 1), whole(pm, 2), edges, (0, 2, 4), direction)
    np.testing.assert_allclose(shells.power(modes(pm, 1), modes(pm, 2)), expected, rtol=1e-10, atol=1e-9)
    second = Shells(pm, edges, poles=2, los=los).power(modes(pm, 1), modes(pm, 2))
    np.testing.assert_allclose(second, expected[1], rtol=1e-10, atol=1e-9)


def kinds(pm):
    yield Shells(pm)
    if pm.ndim == 3:
        yield Shells(pm, edges=[-1, 0.5, 1.5, 3.0, 3.01, 9.0], poles=[0, 2], los=[1, 2, 3], window="cic")


@pytest.mark.parametrize("nmesh", MESHES, ids=str)
def test_operators(nmesh):
    pm = make_mesh(nmesh)
    x, y = modes(pm, 1), modes(pm, 2)
    for shells in kinds(pm):
        options = dict(comm=COMM, replicated="P")
        check(spectra.power, x, shells, truth=shells.power(x), **options)
        check(spectra.power, x, shells, 0.3, truth=shells.power(x, shot_noise=0.3), **options)
        check(spectra.cross_power, x, y, shells, truth=shells.power(x, y), **options)
        check(
            lambda x: spectra.cross_power(x, x, shells), x, truth=shells.power(x), comm=COMM, replicated="y"
        )
    shells = Shells(pm)
    x, y = x + y * 0.5, y + x * 0.5
    r, t = shells.compare(x, y)
    assert (abs(r) <= 1 + 1e-12).all()
    check(spectra.correlation, x, y, shells, truth=r, comm=COMM, replicated="r")
    check(spectra.transfer, x, y, shells, truth=t, comm=COMM, replicated="t")


@pytest.mark.parametrize("nmesh", MESHES, ids=str)
@pytest.mark.parametrize("literal", ["x1", "x2", None])
def test_second_derivatives(nmesh, literal):
    """The product with the Hessian is the difference of gradients, which is exact for a quadratic function."""
    pm = make_mesh(nmesh)
    for shells in kinds(pm):
        rng, shape = np.random.default_rng(5), np.shape(shells.power(modes(pm)))
        cotangents = dict(_P=rng.normal(size=shape), _Q=rng.normal(size=shape))
        with Builder() as m:
            x = m.input("x")
            first, second = (modes(pm, 7) if literal == name else x for name in ("x1", "x2"))
            m.output(P=spectra.cross_power(first, second, shells), Q=spectra.power(x, shells))

        def gradient(x):
            return m.compute_with_vjp(dict(x=x), cotangents)[1][0]

        x, v = modes(pm, 3), modes(pm, 4)
        _, [g], [product] = m.compute_with_hvp(["P", "Q"], dict(x=x), dict(x_=v, **cotangents))
        expected = (gradient(x + v).value - gradient(x - v).value) / 2
        np.testing.assert_allclose(
            g.value, gradient(x).value, atol=1e-12 * COMM.allreduce(abs(g.value).max(initial=0), MPI.MAX)
        )
        np.testing.assert_allclose(
            product.value, expected, atol=1e-10 * COMM.allreduce(abs(expected).max(initial=0), MPI.MAX)
        )


def test_zeros_on_some_ranks():
    """A tangent that is zero on some ranks joins the sum; one that is zero on all of them makes a zero."""
    pm = make_mesh([5, 8, 4])
    shells, x, y = Shells(pm), modes(pm, 1), modes(pm, 2)
    jvp = spectra.cross_power.jvp.impl
    here = y if COMM.rank == 0 else ZeroGradient
    P_ = jvp(None, x1_=here, x2_=ZeroGradient, x1=x, x2=y, shells=shells)["P_"]
    masked = y.copy()
    if COMM.rank:
        masked.value[...] = 0
    np.testing.assert_allclose(P_, shells.power(y, masked), atol=1e-12)
    assert not jvp(None, x1_=ZeroGradient, x2_=ZeroGradient, x1=x, x2=y, shells=shells)["P_"].any()
    for vjp in spectra.cross_power.vjp.impl, spectra.power.vjp.impl:
        names = dict(x1=x, x2=y) if vjp is spectra.cross_power.vjp.impl else dict(x=x)
        assert all(_x is ZeroGradient for _x in vjp(None, _P=ZeroGradient, shells=shells, **names).values())


def test_rank_invariance():
    def run(comm):
        pm = make_mesh([7, 5, 11], comm)
        with Builder() as m:
            x = m.input("x")
            m.output(P=spectra.power(x, Shells(pm, poles=[0, 2], window="tsc")))
        P, [gradient] = m.compute_with_vjp(dict(x=modes(pm)), dict(_P=1.0))
        return [*P, gradient.c2r()]

    check_rank_invariance(run)


def test_single_precision_sums_in_double():
    single, double = make_mesh([16, 16, 16], dtype="f4"), make_mesh([16, 16, 16])
    a, b = (Shells(pm).power(modes(pm)) for pm in (single, double))
    assert a.dtype == np.float64
    np.testing.assert_allclose(a, b, rtol=2e-6)
    check(spectra.power, modes(single), Shells(single), comm=COMM, replicated="P")
    constant = single.create("complex", value=1.0)  # a sum of equal numbers, exact in double precision
    assert np.ptp(Shells(single).power(constant)) < 1e-12 * single.BoxSize.prod()


def test_gaussian_field():
    """The scatter of the measured power about the true one is that of chi-square with as many degrees of freedom as modes."""
    pm = ParticleMesh([24] * 3, BoxSize=100.0, comm=COMM)
    shells = Shells(pm)
    deviates = []
    for seed in range(6):
        noise = pm.generate_whitenoise(seed=seed, unitary=False, type="complex")
        field = fastpm.induce_correlation.build(powerspectrum=lambda k: 100 / (0.1 + k**2), pm=pm).compute(
            "c", dict(wnk=noise)
        )
        k, w = sum(ki**2 for ki in field.x) ** 0.5, fastpm.mode_weights(field)
        index = np.searchsorted(shells.edges, k, side="right") - 1
        true = [
            COMM.allreduce(float((w * (index == i) * 100 / (0.1 + k**2)).sum())) for i in range(len(shells.k))
        ] / shells.counts
        deviates.append((shells.power(field) / true - 1) / np.sqrt(2 / shells.counts))
    deviates = np.array(deviates)
    assert abs(deviates.mean()) < 4 / np.sqrt(deviates.size)
    assert 0.75 < deviates.std() < 1.3


def test_kaiser():
    """For modes (1 + f mu^2) delta the multipoles of each shell are known exactly from its own directions."""
    pm = ParticleMesh([32] * 3, BoxSize=100.0, comm=COMM)
    f, edges = 0.7, [0.3, 1.0]
    delta = pm.create("complex", value=1.0)  # of the same power everywhere
    k2 = sum(k**2 for k in delta.x)
    delta.value[...] *= 1 + f * np.divide(delta.x[0] ** 2, k2, out=np.zeros(k2.shape), where=k2 > 0)
    P = Shells(pm, edges, poles=[0, 2, 4], los=0).power(delta) / pm.BoxSize.prod()
    kaiser = [1 + 2 * f / 3 + f**2 / 5, 4 * f / 3 + 4 * f**2 / 7, 8 * f**2 / 35]
    np.testing.assert_allclose(P, np.transpose([kaiser]), atol=0.03)


@pytest.mark.parametrize("window", ["nnb", "cic", "tsc", "pcs"])
def test_windows(window):
    """A plane wave of particles' mass is damped as the window says, and random particles have their shot noise and no more."""
    pm = ParticleMesh([16] * 3, BoxSize=50.0, comm=COMM, resampler=window)
    field = pm.create("complex")
    k = spectra.wavenumbers(field)
    aliases = range(-400, 401)
    p = spectra._ORDERS[window]
    brute = 1.0
    for ki in k:
        theta = ki * 50.0 / 16 / 2
        brute = brute * sum(np.sinc(theta / np.pi + n) ** (2 * p) for n in aliases)
    np.testing.assert_allclose(
        spectra.aliased_window_squared(k, field, window), brute, rtol=3e-3 if p == 1 else 1e-7
    )

    n = 20000
    x = np.random.default_rng(3).uniform(0, 50, size=(n, 3))[COMM.rank :: COMM.size]
    rho = pm.paint(x, layout=pm.decompose(x)) * (pm.Nmesh.prod() / n)
    noise = spectra.shot_noise(np.ones(len(x)), pm)
    assert noise == pytest.approx(50.0**3 / n)
    shells = Shells(pm, window=window)
    rest = shells.power(rho, shot_noise=noise) / noise
    scatter = np.sqrt(2 / shells.counts) * shells.noise
    assert (abs(rest) < 5 * scatter).all()
    if window != "nnb":  # the noise of a mesh is not flat, except for the nearest neighbour's
        rest = Shells(pm).power(rho, shot_noise=noise) / noise
        assert rest[-1] < -5 * np.sqrt(2 / shells.counts[-1])


def test_window_of_a_wave():
    """The power of a long wave sampled by many particles comes out right only after the division."""
    pm = ParticleMesh([8] * 3, BoxSize=8.0, comm=COMM, resampler="tsc")
    fine = ParticleMesh([64, 8, 8], BoxSize=8.0, comm=COMM)
    q = fine.generate_uniform_particle_grid(shift=0.5)
    wave = 0.1 * np.cos(2 * 2 * np.pi / 8 * q[:, 0])
    delta = pm.paint(q, mass=1 + wave, layout=pm.decompose(q)) * (1 / 8) - 1.0
    edges = 2 * np.pi / 8 * np.array([1.99, 2.01])
    raw, true = (Shells(pm, edges, window=w) for w in (None, "tsc"))
    expected = 8.0**3 * 2 * 0.05**2 / raw.counts[0]
    assert true.power(delta)[0] == pytest.approx(expected, rel=1e-3)
    assert raw.power(delta)[0] < 0.7 * expected


def test_shot_noise_of_unequal_masses():
    pm = make_mesh([4, 3, 5])
    mass = np.random.default_rng(1).uniform(size=30)
    mine = mass[COMM.rank :: COMM.size]
    assert spectra.shot_noise(mine, pm) == pytest.approx(
        pm.BoxSize.prod() * (mass**2).sum() / mass.sum() ** 2
    )
    with pytest.raises(ValueError, match="positive"):
        spectra.shot_noise(np.zeros(0), pm)


def test_bad_shells():
    pm, plane = make_mesh([4, 3, 5]), make_mesh([7, 6])
    for edges in [1.0], 3.0, [1.0, 1.0], [[1.0, 2.0]]:
        with pytest.raises(ValueError, match="increasing"):
            Shells(pm, edges)
    with pytest.raises(ValueError, match="even"):
        Shells(pm, poles=[0, 1])
    with pytest.raises(ValueError, match="three dimensions"):
        Shells(plane, poles=2)
    for los in [0, 0, 0], [1, 0]:
        with pytest.raises(ValueError, match="line of sight"):
            Shells(pm, los=los)
    with pytest.raises(ValueError, match="nnb, nearest, cic, tsc, pcs"):
        Shells(pm, window="lanczos2")
    with pytest.raises(TypeError, match="r2c first"):
        spectra.power.apl.impl(None, modes(pm).c2r(), Shells(pm))
    with pytest.raises(TypeError, match="r2c first"):
        spectra.cross_power.apl.impl(None, modes(pm), modes(pm).c2r(), Shells(pm))
    with pytest.raises(ValueError, match="of 5 x 8 x 4 points"):
        Shells(pm).power(modes(make_mesh([5, 8, 4])))


@pytest.mark.parametrize("nmesh", [n for n in MESHES if len(n) > 1], ids=str)
@pytest.mark.parametrize("dtype", ["f8", "f4"])
def test_projection(nmesh, dtype):
    pm = make_mesh(nmesh, dtype=dtype)
    values = whole(pm).astype(dtype)
    field = pm.create("real")
    field.value[...] = values[field.slices]
    for axis in range(-pm.ndim, pm.ndim):
        n = nmesh[axis]
        for start, thickness in (0, None), (0, 1), (n - 1, 2), (-1, n), (1, 1):
            planes = (start + np.arange(n if thickness is None else min(thickness, n))) % n
            expected = values.take(planes, axis=axis).mean(axis=axis, dtype="f8")
            image = spectra.projection(field, axis, start, None if thickness is None else len(planes))
            np.testing.assert_allclose(image, expected, atol=1e-13)
        root = COMM.size - 1
        image = spectra.projection(field, axis, root=root)
        assert (image is None) == (COMM.rank != root)
        if image is not None:
            np.testing.assert_allclose(image, values.mean(axis=axis, dtype="f8"), atol=1e-13)
    with pytest.raises(ValueError, match="no axis 7"):
        spectra.projection(field, 7)
    with pytest.raises(ValueError, match="thickness"):
        spectra.projection(field, 0, thickness=0)


# -- Redshift space and bias -------------------------------------------------------------------------------------


def vectors(seed, ndim, n=24):
    return deal(np.random.default_rng(seed).uniform(0.5, 7, size=(n, ndim)))


SIGHTS = [dict(los=0), dict(los=[1.0, -2.0, 3.0]), dict(observer=[0.3, -4.0, 2.0])]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["f8", "f4"])
@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_redshift_space(ndim, dtype, sight):
    sight = {name: value[:ndim] if np.ndim(value) else value for name, value in sight.items()}
    x, p = vectors(1, ndim).astype(dtype), vectors(2, ndim).astype(dtype)
    n = (
        np.eye(ndim)[0]
        if sight.get("los") == 0
        else np.asarray(sight.get("los", x - sight.get("observer", 0)))
    )
    n = n / np.linalg.norm(n, axis=-1, keepdims=True)
    truth = x + 0.7 * (p * n).sum(axis=1, keepdims=True) * n
    check(
        lambda x, p, factor: tracers.redshift_space(x, p, factor, COMM, **sight),
        x,
        p,
        0.7,
        comm=COMM,
        truth=truth,
    )
    for fixed in "x", "v":
        if ndim > 1 or "los" in sight:  # on a line, the derivative by the position is zero to rounding
            check(
                tracers.along_sight,
                x,
                p,
                comm=COMM,
                constant=fixed,
                allow_zero=fixed == "v" and "los" in sight,
                **sight,
            )


def test_plain_numbers():
    for b in 1.5, np.array([1.0, -2.0]):
        check(tracers.plain_numbers, b, "b", np.shape(b), comm=COMM)


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_second_derivatives_of_redshift_space(sight):
    x, v, w = vectors(1, 3), vectors(2, 3), vectors(3, 3)
    with Builder() as m:
        position, vector = m.input("x", "v")
        m.output(y=tracers.along_sight(position, vector, **sight))
    dx, dv = vectors(4, 3), vectors(5, 3)
    h = 1e-5
    for tangents in dict(x_=dx, v_=dv), dict(x_=dx), dict(v_=dv):

        def gradients(t):
            at = dict(x=x + t * tangents.get("x_", 0), v=v + t * tangents.get("v_", 0))
            return m.compute_with_vjp(at, dict(_y=w))[1]

        _, _, products = m.compute_with_hvp(["y"], dict(x=x, v=v), dict(_y=w, **tangents))
        for product, plus, minus in zip(products, gradients(h), gradients(-h)):
            expected = 0 * x if plus is ZeroGradient else (plus - minus) / (2 * h)
            np.testing.assert_allclose(0 * x if product is ZeroGradient else product, expected, atol=1e-7)


@pytest.mark.serial
def test_an_observer_sees_nothing_of_herself():
    x = np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 3.0]])
    p = np.ones((2, 3))
    s = tracers.along_sight.apl.impl(None, x, p, observer=[1, 2, 3])["y"]
    np.testing.assert_array_equal(s, [[0, 0, 0], [1, 0, 0]])
    for options in {}, dict(los=0, observer=[0, 0, 0]), dict(los=[0, 0, 0]), dict(los=[1, 0]):
        with pytest.raises(ValueError, match="los"):
            tracers.along_sight.apl.impl(None, x, p, **options)


def test_momenta_are_those_of_linear_theory():
    """In the Zel'dovich motion the displacement in redshift space is f D along the line of sight, and v is a dx/dt."""
    pt, a = MatterDominated(0.3), 0.6
    psi = vectors(1, 3)
    p = pt.Gf(a) * psi
    shift = tracers.along_sight.apl.impl(None, psi, p, los=2)["y"] * tracers.redshift_factor(pt, a)
    np.testing.assert_allclose(shift[:, 2], pt.f1(a) * pt.D1(a) * psi[:, 2], rtol=1e-10)
    assert not shift[:, :2].any()
    h = 1e-5
    dx_da = (pt.D1(a + h) - pt.D1(a - h)) / (2 * h) * psi
    np.testing.assert_allclose(tracers.velocity(p, a), a * dx_da * a * 100 * pt.E(a), rtol=1e-5)


def test_kaiser_in_a_simulation():
    """Small Zel'dovich displacements, painted in redshift space, have the modes (1 + f mu^2) delta."""
    pm = ParticleMesh([16] * 3, BoxSize=100.0, comm=COMM)
    pt = MatterDominated(0.3, a=[0.8, 1.0])
    q = pm.generate_uniform_particle_grid(shift=0.0)
    power = lambda k: 1e-4 * np.exp(-((k / 0.15) ** 2))
    with Builder() as m:
        rhok = fastpm.induce_correlation(m.input("wnk"), power, pm)
        dx, p = fastpm.firststep(rhok, q, 1.0, pt, pm)
        s = tracers.redshift_space(q + dx, p, tracers.redshift_factor(pt, 1.0), COMM, los=0)
        m.output(real=tracers.density(q + dx, 1.0, q, pm), redshift=tracers.density(s, 1.0, q, pm))
    noise = pm.generate_whitenoise(seed=3, unitary=False, type="complex")
    real, redshift = (field.r2c() for field in m.compute(["real", "redshift"], dict(wnk=noise)))
    k2 = sum(k**2 for k in real.x)
    mu2 = np.divide(real.x[0] ** 2, k2, out=np.zeros(k2.shape), where=k2 > 0)
    kaiser = real.copy()
    kaiser.value[...] *= 1 + pt.f1(1.0) * mu2
    shells = Shells(pm, np.array([0.5, 2.5]) * 2 * np.pi / 100, poles=[0, 2, 4], los=0)
    np.testing.assert_allclose(shells.power(redshift), shells.power(kaiser), rtol=0.02)
    assert shells.power(redshift)[0] > 1.3 * shells.power(real)[0]


@pytest.mark.parametrize("nmesh", MESHES, ids=str)
def test_lagrangian_fields(nmesh):
    """At the points of the mesh the fields are those that NumPy's transform makes of the whole field."""
    pm = make_mesh(nmesh)
    q = pm.generate_uniform_particle_grid(shift=0.0)
    fields = tracers.lagrangian_fields.build(q=q, pm=pm).compute("fields", dict(rhok=modes(pm)))
    values = whole(pm)
    k = np.meshgrid(
        *[2 * np.pi * np.fft.fftfreq(n, L / n) for n, L in zip(pm.Nmesh, pm.BoxSize)], indexing="ij"
    )
    k2 = sum(ki**2 for ki in k)
    transform = lambda tf: np.fft.ifftn(np.fft.fftn(values) * tf).real
    s2 = -(values**2) / pm.ndim
    for i in range(pm.ndim):
        for j in range(pm.ndim):
            nyquist = [abs(k[d]) > np.pi * (pm.Nmesh[d] - 0.01) / pm.BoxSize[d] for d in (i, j)]
            tf = k[i] * k[j] / np.where(k2 > 0, k2, 1) * ((i == j) | ~(nyquist[0] | nyquist[1]))
            s2 = s2 + transform(tf) ** 2
    expected = [values, values**2 - np.mean(values**2), s2 - s2.mean(), transform(-k2)]
    at = tuple((np.round(q / (pm.BoxSize / pm.Nmesh)).astype(int) % pm.Nmesh).T)
    for column, mesh in zip(fields.T, expected):
        np.testing.assert_allclose(column, mesh[at], atol=1e-10)


@pytest.mark.parametrize("nmesh", MESHES[:3], ids=str)
def test_bias_is_differentiable(nmesh):
    pm = make_mesh(nmesh)
    q = pm.generate_uniform_particle_grid(shift=0.5)
    b = np.array([0.8, -0.3, 0.4, 0.05])

    def model(rhok, b, dx):
        w = tracers.lagrangian_weights(rhok, b, q, pm)
        return tracers.density(dx + q, w, q, pm)

    # the number of particles on a rank is its own, so the Taylor test looks at the field alone
    dx = np.sin(q)
    check(
        model,
        modes(pm) * 0.3,
        b,
        dx,
        comm=COMM,
        replicated="b",
        steps=1e-2 * 0.25 ** np.arange(4),
        constant="dx",
    )
    check(tracers.eulerian_bias, modes(pm).c2r(), 1.7, comm=COMM, truth=(modes(pm).c2r() - 1.0) * 1.7 + 1.0)
    with pytest.raises(ValueError, match="terms must be some of"):
        tracers.lagrangian_fields.build(q=q, pm=pm, terms=["b1", "b3"])


def test_large_scale_bias():
    """Tracers carried along have the linear bias 1 + b1 on large scales; an Eulerian one has b."""
    pm = ParticleMesh([32] * 3, BoxSize=800.0, comm=COMM)
    pt = MatterDominated(0.3, a=[1.0])
    q = pm.generate_uniform_particle_grid(shift=0.0)
    with Builder() as m:
        rhok = fastpm.induce_correlation(m.input("wnk"), lambda k: 0.1 * np.exp(-((k / 0.02) ** 2)), pm)
        dx, p = fastpm.firststep(rhok, q, 1.0, pt, pm)
        matter = tracers.density(q + dx, 1.0, q, pm)
        w = tracers.lagrangian_weights(rhok, np.array([0.7, 0.2]), q, pm, terms=["b1", "b2"])
        m.output(
            matter=matter,
            lagrangian=tracers.density(q + dx, w, q, pm),
            eulerian=tracers.eulerian_bias(matter, 1.7),
        )
    noise = pm.generate_whitenoise(seed=3, unitary=False, type="complex")
    matter, *biased = m.compute(["matter", "lagrangian", "eulerian"], dict(wnk=noise))
    shells = Shells(pm, np.array([0.5, 1.1]) * 2 * np.pi / 800)
    for tracer, rtol in zip(biased, (0.01, 1e-10)):
        r, t = shells.compare(tracer, matter)
        np.testing.assert_allclose(t, 1.7, rtol=rtol)
        assert tracer.csum() == pytest.approx(32**3, rel=1e-3 if rtol > 1e-3 else 1e-12)


# -- Particle loads and precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lattice", [[3, 4, 4], [4, 6, 5], [7, 9, 6]], ids=str)
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_particle_loads(lattice, B, shift):
    """A lattice coarser or finer than the mesh, anywhere in its cells: the mean density is one, and derivatives hold."""
    pm = ParticleMesh([4, 6, 5], BoxSize=[8.0, 12.0, 10.0], comm=COMM)
    q = pm.reshape(lattice).generate_uniform_particle_grid(shift=shift)
    sim = fastpm.FastPMSimulation([0.3, 1.0], MatterDominated(0.3), pm, B=B, q=q)

    def model(rhok):
        dx, p, f = sim.run(rhok)
        return tracers.density(q + dx, 1.0, q, pm)

    report = check(model, modes(pm) * 0.2, comm=COMM, steps=2e-3 * 0.25 ** np.arange(4))
    assert report.value.csum() == pytest.approx(4 * 6 * 5)


def test_any_load_grows_alike():
    """On large scales, the same universe with any number of particles, and it is the same on any number of ranks."""
    noise = lambda pm: pm.generate_whitenoise(seed=2, unitary=False, type="complex")

    def run(comm, lattice, shift, B):
        pm = ParticleMesh([16] * 3, BoxSize=500.0, comm=comm)
        q = pm.reshape(lattice).generate_uniform_particle_grid(shift=shift)
        sim = fastpm.FastPMSimulation([0.1, 0.4, 1.0], MatterDominated(0.3), pm, B=B, q=q)
        with Builder() as m:
            rhok = m.input("rhok")
            dx, p, f = sim.run(rhok)
            m.output(rho=tracers.density(q + dx, 1.0, q, pm))
        linear = fastpm.induce_correlation.build(
            powerspectrum=lambda k: 10 * np.exp(-((k / 0.03) ** 2)), pm=pm
        )
        linear = linear.compute("c", dict(wnk=noise(pm)))
        rho = m.compute("rho", dict(rhok=linear))
        shells = Shells(pm, np.array([0.5, 1.1]) * 2 * np.pi / 500)
        return shells.compare(rho, linear)

    for lattice, shift, B in (
        ([16] * 3, 0.5, 1),
        ([16] * 3, 0.1, 2),
        ([12] * 3, 0.5, 2),
        ([24, 20, 22], 0.25, 1),
    ):
        r, t = run(COMM, lattice, shift, B)
        np.testing.assert_allclose(r, 1, atol=0.02)
        np.testing.assert_allclose(t, 1, atol=0.06)
        np.testing.assert_allclose(run(MPI.COMM_SELF, lattice, shift, B), [r, t], rtol=1e-8)


def test_sums_of_single_precision_are_in_double():
    pm = make_mesh([16, 16, 16], dtype="f4")
    x = pm.create("real", value=1.0 + 2.0**-20)
    n = 16**3
    exact = float(x.value.flat[0]) if x.value.size else 1.0 + 2.0**-20
    assert x.csum() == n * exact
    assert x.cdot(x) == n * float(np.float32(exact) * np.float32(exact))
    modes = x.r2c()
    assert modes.cnorm() == pytest.approx(exact**2, rel=1e-6)
    for number in x.csum(), x.cdot(x), modes.cnorm(), modes.cdot(modes):
        assert type(number) in (float, complex)
    assert (x * x.csum()).value.dtype == np.float32


def test_simulation_in_single_precision():
    """Modes, positions and the gradient to the digits that single precision has; numbers that are sums have more."""
    results = []
    for dtype, positions in (("f8", "f8"), ("f4", "f8"), ("f4", "f4")):
        pm = ParticleMesh([8] * 3, BoxSize=40.0, comm=COMM, dtype=dtype)
        q = pm.generate_uniform_particle_grid(shift=0.5).astype(positions)
        sim = fastpm.FastPMSimulation([0.1, 0.5, 1.0], MatterDominated(0.3), pm, q=q)
        with Builder() as m:
            rhok = m.input("rhok")
            dx, p, f = sim.run(rhok)
            rho = tracers.density(q + dx, 1.0, q, pm)
            m.output(dx=dx, P=spectra.power(fastpm.r2c(rho), Shells(pm)), chi2=fastpm.to_scalar(rho))
        x = modes(ParticleMesh([8] * 3, BoxSize=40.0, comm=COMM)) * 0.5
        x = pm.create("complex", value=x.value.astype(pm.create("complex").value.dtype))
        (dx, P, chi2), [g] = m.compute_with_vjp(dict(rhok=x), dict(_dx=0, _P=0, _chi2=1.0))
        assert (
            dx.dtype == positions
            and g.value.dtype == x.value.dtype
            and P.dtype == "f8"
            and type(chi2) is float
        )
        results.append((dx, P, chi2, g.value))
    for other in results[1:]:
        for a, b, tolerance in zip(results[0], other, (1e-5, 1e-4, 1e-6, 1e-3)):
            np.testing.assert_allclose(b, a, atol=tolerance * np.max(np.abs(a), initial=0), rtol=tolerance)

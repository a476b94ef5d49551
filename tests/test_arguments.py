"""Arguments at the door: what cannot be meant is refused by name, by all public functions and on all ranks."""

import inspect
from fractions import Fraction

import numpy as np
import pytest

from vmad_lit import Builder
from vmad_lit.core.arguments import one_of, plain_array, positive, real_array, real_number, whole_number

NAN, INF = float("nan"), float("inf")


class Quantity(np.ndarray):
    """An array with a unit, as of astropy."""

    unit = "kpc"


def with_unit(x):
    return np.asarray(x, "f8").view(Quantity)


MASKED = np.ma.masked_array([1.0, 2.0, 3.0], [False, True, False])
NO_NUMBERS = [
    NAN,
    INF,
    -INF,
    None,
    "1",
    True,
    1j,
    [1.0, 2.0],
    [],
    object(),
    MASKED,
    np.ma.masked,
    with_unit(0.5),
]
NOT_POSITIVE = [*NO_NUMBERS, 0, 0.0, -1, -1e-300]
NOT_WHOLE = [*NO_NUMBERS, 0.5, 1.0, np.float64(2), Fraction(1, 2)]


def test_numbers():
    for x in 2, 2.0, np.float32(2), np.float16(2), np.array(2), Fraction(2):
        assert real_number("x", x) == positive("x", x) == 2 and type(positive("x", x)) is float
    for bad in NO_NUMBERS:
        with pytest.raises((TypeError, ValueError), match="^x "):
            real_number("x", bad)
    for bad in NOT_POSITIVE:
        with pytest.raises((TypeError, ValueError), match="^x "):
            positive("x", bad)
    with pytest.raises(ValueError, match="x must be between 0 and 1 and finite, not 1.5"):
        real_number("x", 1.5, least=0, most=1)
    with pytest.raises(ValueError, match="x must be above -1 and finite, not -1"):
        real_number("x", -1, above=-1)
    with pytest.raises(ValueError, match="x must be below 3 and finite"):
        real_number("x", 3, below=3)


def test_whole_numbers():
    for x in 3, np.int8(3), np.uint64(3), np.array(3):
        assert whole_number("n", x, least=3) == 3 and type(whole_number("n", x)) is int
    assert whole_number("n", 10**40) == 10**40
    for bad in NOT_WHOLE:
        with pytest.raises((TypeError, ValueError), match="n must be a whole number"):
            whole_number("n", bad)
    for least, most in (4, None), (0, 2):
        with pytest.raises(ValueError, match=f"a whole number (of at least|from) {least}"):
            whole_number("n", 3, least, most)


def test_arrays():
    for x in [1, 2], (1.0, 2.0), np.array([1, 2], "f2"), np.ma.masked_array([1, 2]), np.array([1, 2], object):
        assert real_array("x", x, shape=(None,)).tolist() == [1, 2]
    assert (
        real_array("x", np.zeros(2, "f4")).dtype == "f4" and real_array("x", np.zeros(2, "f2")).dtype == "f8"
    )
    x = np.ones((2, 3))
    assert real_array("x", x, shape=(None, 3)) is x and plain_array("x", x) is x
    assert real_array("x", [INF], infinite=True) == INF
    for bad in [[NAN]], [[1, INF]], [["a"]], [[None]], [[1j]], MASKED, with_unit([[1.0]]), [[]], 1.0, [1.0]:
        with pytest.raises((TypeError, ValueError), match="^x "):
            real_array("x", bad, shape=(None, 1))
    with pytest.raises(ValueError, match="x must be one of a, b, None, not 'c'"):
        one_of("x", "c", ("a", "b", None))
    assert one_of("x", None, ("a", None)) is None


# Of every function below, each argument in turn is replaced by something bad.


def mesh():
    from mpi4py import MPI
    from vmad_lit.lib.fastpm import ParticleMesh

    return ParticleMesh([4] * 3, BoxSize=4.0, comm=MPI.COMM_WORLD)


def run(operator, **hyper):
    """A function that runs an operator of symbols; `hyper` are the arguments that are none."""

    def function(**arguments):
        with Builder() as m:
            inputs = {name: m.input(name) for name in arguments if name not in hyper}
            y = operator(**inputs, **{name: arguments.get(name, hyper[name]) for name in hyper})
            m.output(y=y[0] if isinstance(y, (list, tuple)) else y)
        return m.compute("y", init={name: arguments[name] for name in inputs})

    return function


def cosmological_functions():
    from vmad_lit.lib import cosmology as K

    planck, background = K.Planck15, K.MatterDominated(0.3)
    parameters = dict(Om0=0.3, h=0.7, Ob0=0.05, n_s=0.96, sigma8=0.8, T_cmb=2.7, Ok0=0.0)
    yield K.Cosmology, parameters, NO_NUMBERS + [70, -70]
    yield K.MatterDominated, dict(Omega0_m=0.3, Omega0_k=0.0, a_normalize=1.0), [*NO_NUMBERS, -70]
    for name in "efunc efunc_prime E Hfac Om D1 D2 f1 f2 Gp gp Gf gf Gp2 gp2 Gf2 gf2".split():
        yield getattr(background, name), dict(a=0.5), [NAN, -1, 0, None, "x", 1j, with_unit(1.0), MASKED]
    for name in "E D1 D2".split():
        yield lambda order, f=getattr(background, name): f(0.5, order), dict(order=1), NOT_WHOLE + [3, -1]
    for name in "", "transverse_":
        yield getattr(planck, f"comoving_{name}distance"), dict(z=1.0), [NAN, -1, None, "x", 1j, MASKED]
    for name in "efunc", "luminosity_distance", "angular_diameter_distance":
        yield getattr(planck, name), dict(z=1.0), [NAN, -1, None, "x", 1j, with_unit(1.0), MASKED]
    yield lambda z: K.LinearPower(planck, z), dict(z=0.0), [*NO_NUMBERS, -1]
    yield lambda cosmology: K.LinearPower(cosmology), dict(cosmology=planck), [NAN, None, 0.3, "Planck15"]
    yield (
        lambda transfer: K.LinearPower(planck, 0, transfer),
        dict(transfer="NoWiggle"),
        [None, 1, "nowiggle"],
    )
    yield K.LinearPower(planck), dict(k=0.1), [NAN, INF, -1, None, "x", 1j, with_unit(1.0), MASKED]
    yield K.LinearPower(planck).sigma_r, dict(r=8.0), NOT_POSITIVE
    k = np.geomspace(0.01, 1, 9)
    yield (
        lambda k, P: K.LinearPower.from_table(planck, k, P),
        dict(k=k, P=1 / k),
        [*NO_NUMBERS, -k, k * NAN, k[1:]],
    )
    for function in K.eisenstein_hu, K.eisenstein_hu_nowiggle:
        numbers = [NAN, INF, -1, "1", None, with_unit(0.01), MASKED, np.float16(0.5)]
        few = {name: parameters[name] for name in ("Om0", "h", "Ob0", "T_cmb")}
        yield lambda f=function, **few: f(0.1, **few), few, [*numbers, 70]
        yield (
            lambda k, f=function, few=few: f(k, **few),
            dict(k=0.1),
            [NAN, -1, None, "x", MASKED, with_unit(1.0)],
        )
    for function in K.linear_growth, K.second_order_growth:
        yield function, dict(a=0.5, Om0=0.3, Ode0=0.7, Ok0=0.0), [NAN, "x", None, -70, MASKED, with_unit(0.5)]
    for operator, arguments in [
        (K.growth, dict(a=0.5)),
        (K.expansion_rate, dict(a=0.5)),
        (K.kick_factor, dict(ai=0.1, ac=0.2, af=0.3)),
        (K.drift_factor, dict(ai=0.1, ac=0.2, af=0.3)),
        (K.step_factors, dict(stages=[0.1, 0.5])),
        (K.start_factors, dict(a=0.5)),
    ]:
        arguments = dict(Ok0=0.0, **arguments)
        yield (
            run(operator, **arguments),
            dict(Om0=0.3, **arguments),
            [NAN, INF, -70, None, "x", MASKED, with_unit(1.0)],
        )
    hyper = dict(k=0.1, z=0.0, T_cmb=2.7, Ok0=0.0)
    power = dict(parameters, **hyper)
    yield run(K.linear_power, **hyper), power, [NAN, INF, -70, None, "x", MASKED, with_unit(1.0)]


@pytest.mark.serial
@pytest.mark.parametrize(
    "case", list(cosmological_functions()), ids=lambda case: getattr(case[0], "__qualname__", "power")
)
def test_cosmology(case):
    is_refused(*case)


def is_refused(function, good, bad):
    """Whether a function takes good arguments, and refuses each bad one with a message that tells what is wrong."""
    function(**good)
    for name in good:
        for value in bad:
            with pytest.raises(
                (TypeError, ValueError), match=f"{name}|must|needs|expected|forgotten|go together"
            ):
                function(**{**good, name: value})
                pytest.fail(f"{name} = {value!r} was taken")


@pytest.mark.collective
def test_spectra():
    from vmad_lit.lib import spectra as S

    pm = mesh()
    real = pm.generate_whitenoise(1, type="real")
    is_refused(
        lambda edges: S.Shells(pm, edges),
        dict(edges=[0.5, 3.0]),
        [[1, NAN], [2, 1], 1.0, ["a", "b"], [1j, 2]],
    )
    is_refused(
        lambda poles: S.Shells(pm, poles=poles),
        dict(poles=2),
        [NAN, 1, -2, 2.0, None, "2", [], [0, 1.0], True],
    )
    no_direction = [
        NAN,
        1.0,
        3,
        -4,
        "z",
        True,
        [0, 0, 0],
        [1, 0],
        [NAN, 0, 1],
        [0, 0, 1j],
        with_unit([0, 0, 1]),
        MASKED,
    ]
    is_refused(lambda los: S.Shells(pm, los=los), dict(los=2), no_direction)
    is_refused(lambda window: S.Shells(pm, window=window), dict(window="cic"), ["CIC", "", 1, True, NAN])
    is_refused(S.Shells, dict(pm=pm), [None, 1, "x"])
    shells = S.Shells(pm)
    is_refused(lambda shot_noise: shells.power(real, None, shot_noise), dict(shot_noise=1.0), NO_NUMBERS)
    is_refused(
        lambda shot_noise: shells.power(real, real, shot_noise), dict(shot_noise=0.0), [*NO_NUMBERS, 1.0]
    )
    is_refused(lambda a: shells.power(a), dict(a=real), [None, 1.0, real.value])
    is_refused(
        lambda mass: S.shot_noise(mass, pm),
        dict(mass=[1.0, 2.0]),
        [1.0, [1, NAN], MASKED, [[1]], ["a"], [1j]],
    )
    place = dict(axis=2, start=0, thickness=2, root=0)
    is_refused(lambda **place: S.projection(real, **place), place, [*NOT_WHOLE[:3], *NOT_WHOLE[4:]])
    is_refused(lambda axis: S.projection(real, axis), dict(axis=0), [3, -4, None])
    is_refused(lambda thickness: S.projection(real, 0, 0, thickness), dict(thickness=1), [0, -1, 5])
    is_refused(lambda field: S.projection(field), dict(field=real), [None, 1.0, real.value, real.r2c()])
    np.testing.assert_allclose(S.unit_vector("los", [3e300, 0, 4e300], 3), [0.6, 0, 0.8])


@pytest.mark.collective
def test_tracers():
    from vmad_lit.lib import tracers as T
    from vmad_lit.lib.cosmology import Planck15

    pm = mesh()
    q = pm.generate_uniform_particle_grid(shift=0.5)
    rhok, v = pm.generate_whitenoise(1, type="complex"), q * 0.1
    no_direction = [
        NAN,
        1.0,
        3,
        "z",
        True,
        [0, 0, 0],
        [1, 0],
        [NAN, 0, 1],
        [0, 0, 1j],
        with_unit([0, 0, 1]),
        MASKED,
    ]
    sight = run(T.along_sight, los=None, observer=None)
    is_refused(lambda los: sight(x=q, v=v, los=los), dict(los=2), no_direction)
    no_place = [NAN, 1.0, "x", [1, 0], [NAN, 0, 1], [0, 0, 1j], with_unit([0, 0, 1.0]), MASKED]
    is_refused(lambda observer: sight(x=q, v=v, observer=observer), dict(observer=[9, 9, 9]), no_place)
    no_vectors = [
        None,
        1.0,
        "x",
        True,
        q * 1j,
        q.ravel(),
        with_unit(q),
        np.ma.masked_array(q, q < 1),
        q.astype(object),
    ]
    no_vectors = no_vectors if len(q) else no_vectors[:4]  # the others are no mistake where there are none
    is_refused(lambda x, v: sight(x=x, v=v, los=2), dict(x=q, v=v), no_vectors)
    if len(q):
        is_refused(lambda v: sight(x=q, v=v, los=2), dict(v=v), [q[:1], q[1:], q[:, :2]])
    space = run(T.redshift_space, comm=pm.comm, los=2)
    is_refused(lambda factor: space(x=q, p=v, factor=factor), dict(factor=1.0), NO_NUMBERS)
    is_refused(lambda a: T.velocity(v, a), dict(a=0.5), NOT_POSITIVE)
    is_refused(lambda a: T.redshift_factor(Planck15.background(), a), dict(a=0.5), NOT_POSITIVE)
    is_refused(
        lambda q: run(T.density, q=q, pm=pm)(x=v, mass=1.0),
        dict(q=q),
        [None, 1.0, "x", q[0:0, 0], with_unit(q)],
    )
    with pytest.raises(ValueError, match="needs particles"):
        run(T.density, q=q[:0], pm=pm)(x=v, mass=1.0)
    b = dict(b=[1.0, 2.0, 3.0, 4.0])
    bad = [*NO_NUMBERS, [2.0], 2.0, [1, 2, 3, NAN], [[1, 2, 3, 4]]]
    is_refused(lambda b: run(T.lagrangian_weights, q=q, pm=pm, b=b)(rhok=rhok), b, bad)
    is_refused(lambda b: run(T.lagrangian_weights, q=q, pm=pm)(rhok=rhok, b=b), b, bad)
    is_refused(
        lambda terms: run(T.lagrangian_fields, q=q, pm=pm, terms=terms)(rhok=rhok),
        dict(terms=["b1"]),
        ["b1", [], 1, [1]],
    )
    is_refused(
        lambda q: run(T.lagrangian_fields, q=q, pm=pm)(rhok=rhok), dict(q=q), [None, 1.0, q[:, :2], q + 1j]
    )
    is_refused(lambda b: run(T.eulerian_bias)(rho=rhok.c2r(), b=b), dict(b=1.5), NO_NUMBERS)
    is_refused(T.tidal_transfer, dict(i=0, j=1), [NAN, -1, 1.5, None, "x"])


@pytest.mark.serial
def test_along_sight_of_whole_numbers():
    """Positions that are whole numbers are as good as others; so are momenta."""
    from vmad_lit.lib.tracers import along_sight

    x, v = np.array([[1, 2, 2], [3, 0, 4]]), np.array([[1, 0, 0], [0, 0, 5]])
    for dtype in "i8", "u1", "f2", "f4", "f8":
        for sight in dict(los=[1, 1, 0]), dict(observer=[0, 0, 0]):
            y = run(along_sight, **sight)(x=x.astype(dtype), v=v.astype(dtype), **sight)
            expected = run(along_sight, **sight)(x=x.astype("f8"), v=v.astype("f8"), **sight)
            np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(y, [[1 / 9, 2 / 9, 2 / 9], [2.4, 0, 3.2]])


@pytest.mark.collective
def test_catalogues(tmp_path):
    pytest.importorskip("h5py")
    from vmad_lit.lib import catalogue
    from vmad_lit.lib.cosmology import Planck15
    from vmad_lit.lib.fastpm import FastPMSimulation

    pm = mesh()
    path, q = pm.comm.bcast(str(tmp_path / "a.h5")), pm.generate_uniform_particle_grid(shift=0.5)
    real = pm.generate_whitenoise(1, type="real")

    def save(name="x", column=q, field=real, dtype="f4"):
        catalogue.save(path, pm.comm, {name: column}, {"f": field}, dtype=dtype)

    is_refused(lambda name: save(name), dict(name="x"), ["", "a/b", 1, "."])
    bad = [None, 1.0, "x", q * 1j, with_unit(q), q.astype("S3")]
    is_refused(
        lambda column: save(column=column),
        dict(column=q),
        [*bad, np.ma.masked_array(q, q < 1)],
    )
    is_refused(lambda field: save(field=field), dict(field=real), [None, 1.0, real.value, real.r2c()])
    is_refused(lambda dtype: save(dtype=dtype), dict(dtype="f8"), ["f2", "i4", "c8", "S3"])
    save(column=np.full(500, 300.0, "f2"), dtype=None)
    columns, _ = catalogue.load(path, pm.comm)
    assert columns["x"].mean() == 300  # in half precision the sum is beyond the largest number
    save()
    is_refused(lambda names: catalogue.load(path, pm.comm, names), dict(names=["x"]), ["x"])
    cells = dict(q=np.ones((2, 3)), Nmesh=[4, 4, 4], BoxSize=4.0)
    for name, bad in dict(
        q=[NAN, np.full((2, 3), NAN), np.ones((2, 2)), with_unit(cells["q"]), np.ones((2, 3)) * 1j]
    ).items():
        is_refused(lambda q: catalogue.lattice_ids(**{**cells, "q": q}), {name: cells[name]}, bad)
    is_refused(
        lambda Nmesh: catalogue.lattice_ids(**{**cells, "Nmesh": Nmesh}),
        dict(Nmesh=[4] * 3),
        [[4, 4], [4, 4, 0], [4.0] * 3],
    )
    is_refused(
        lambda BoxSize: catalogue.lattice_ids(**{**cells, "BoxSize": BoxSize}),
        dict(BoxSize=[4.0] * 3),
        [*NOT_POSITIVE],
    )
    is_refused(
        lambda ids: catalogue.chosen(ids, 0.5), dict(ids=[1, 2]), [[-1], [0.5], NAN, None, "x", MASKED]
    )
    is_refused(lambda fraction: catalogue.chosen([1], fraction), dict(fraction=0.5), [*NO_NUMBERS, -0.1, 1.1])
    is_refused(lambda seed: catalogue.chosen([1], 0.5, seed), dict(seed=2**99), [*NOT_WHOLE, -1])
    sim = FastPMSimulation([0.1, 1.0], Planck15, pm)

    def snapshot(dx=q * 0, p=q * 0, a=1.0, fraction=0.5, dtype="f4"):
        catalogue.save_snapshot(path, sim, dx, p, a, None, fraction, dtype)

    bad = [None, "x", 1.0, q * 1j, with_unit(q), q[:, :2]]
    is_refused(lambda **rows: snapshot(**rows), dict(dx=q, p=q), [*bad, q * NAN, q[1:]])
    is_refused(lambda a: snapshot(a=a), dict(a=0.5), [bad for bad in NOT_POSITIVE if bad is not None])
    is_refused(lambda dtype: snapshot(dtype=dtype), dict(dtype="f8"), ["f2", "i4"])
    if pm.comm.size > 1:
        with pytest.raises(ValueError, match="dx must be finite"):
            snapshot(dx=q * (NAN if pm.comm.rank == 1 else 0))


@pytest.mark.collective
def test_reconstructions(tmp_path):
    from vmad_lit.contrib import cosmo4d as C
    from vmad_lit.contrib.optimize import LBFGS
    from vmad_lit.lib.cosmology import LinearPower, Planck15

    pm = mesh()
    folder, q = pm.comm.bcast(str(tmp_path)), pm.generate_uniform_particle_grid(shift=0.5)
    white = C.white_noise(pm, 1)
    d = white * 0.01 + 1.0

    def forward(stages=(0.1, 1.0), power=LinearPower(Planck15), q=q):
        model = C.WhiteNoiseOperator.bind(power=power, q=q, stages=stages, cosmology=Planck15, pm=pm)
        return model.build().compute("fs", dict(x=white))

    bad = [
        NAN,
        0,
        -1,
        2.0,
        [1.0, 0.1],
        [0.1, 0.1],
        [0, 1],
        [0.1, 2],
        [0.1, NAN],
        "ab",
        [[0.1, 1]],
        with_unit([0.1, 1]),
    ]
    is_refused(lambda stages: forward(stages), dict(stages=[0.5]), [*bad, MASKED, None])
    is_refused(
        lambda power: forward(power=power),
        dict(power=lambda k: k),
        [
            None,
            1,
            "x",
            lambda k: -k,
            lambda k: k * NAN,
            lambda k: k * INF,
            lambda k: np.ones(3),
            lambda k: 1j * k,
        ],
    )
    bad = [None, 1.0, "x", q[:, :2], q * 1j, with_unit(q)]
    is_refused(lambda q: forward(q=q), dict(q=q), [*bad, q * NAN, np.ma.masked_array(q, q < 1)])
    values = dict(s=white, fs=d)

    def residual(operator, **options):
        return operator.build(d=d, **options).compute("y", values)

    bad = [*[x for x in NO_NUMBERS if not isinstance(x, list)], -1]
    is_refused(lambda invN: residual(C.NLResidualOperator, invN=invN), dict(invN=1.0), bad)
    smoothed = C.SmoothedNLResidualOperator
    is_refused(lambda scale: residual(smoothed, invN=1.0, scale=scale), dict(scale=1.0), [*NO_NUMBERS, -1])
    is_refused(
        lambda floor: residual(C.LNResidualOperator, invN=1.0, floor=floor), dict(floor=0.1), NOT_POSITIVE
    )
    is_refused(lambda sigma: C.Data(d, sigma), dict(sigma=0.5), NOT_POSITIVE)
    is_refused(lambda d: C.Data(d, 1.0), dict(d=d), [None, 1.0, d.value, d.r2c()])
    data = C.Data(d, 1.0)
    operator = C.WhiteNoiseOperator.bind(
        power=LinearPower(Planck15), q=q, stages=[], cosmology=Planck15, pm=pm
    )
    is_refused(lambda sigma: C.Data.synthetic(pm, operator, sigma, 1), dict(sigma=0.5), NOT_POSITIVE)
    is_refused(lambda seed: C.Data.synthetic(pm, operator, 0.5, seed), dict(seed=1), [*NOT_WHOLE, -1])
    optimizer = LBFGS(maxiter=1)
    is_refused(
        lambda smoothing: C.reconstruct(operator, data, optimizer, smoothing=smoothing),
        dict(smoothing=1.0),
        [*NO_NUMBERS, -1],
    )

    # What is in files
    def load(values):
        if pm.comm.rank == 0:
            np.save(f"{folder}/field.npy", values)
        pm.comm.Barrier()
        field = C.load_field(f"{folder}/field.npy", pm)
        pm.comm.Barrier()
        return field

    whole = np.arange(64.0).reshape(4, 4, 4)
    bad = [whole * 1j, whole * NAN, whole.astype("S3"), whole[:3]]
    bad[1][:3] = 0  # only one rank has NaN
    is_refused(lambda values: load(values), dict(values=whole), bad)
    for dtype in "f2", "i4", ">f4":
        np.testing.assert_array_equal(load(whole.astype(dtype)).value, whole[d.slices])
    is_refused(
        lambda field: C.save_field(f"{folder}/field.npy", field), dict(field=d), [None, 1.0, d.value, d.r2c()]
    )


@pytest.mark.collective
def test_chisquare_problems():
    from mpi4py import MPI
    from vmad_lit.contrib import chisquare as X
    from vmad_lit.contrib.optimize import LBFGS

    def same(s):
        return s * 1.0

    def problem(comm=MPI.COMM_WORLD, forward=same, residuals=(same,)):
        return X.MPIChiSquareProblem(comm, forward, residuals)

    is_refused(lambda comm: problem(comm), dict(comm=MPI.COMM_WORLD), [None, 1, "x"])
    is_refused(lambda forward: problem(forward=forward), dict(forward=same), [None, 1, "x"])
    is_refused(
        lambda residuals: problem(residuals=residuals), dict(residuals=[same]), [None, 1, "x", [], [1]]
    )
    scheduler = X.EpochScheduler()
    is_refused(lambda epoch: scheduler.schedule("a", {epoch: 1}), dict(epoch=0), [-1, 0.5, "x", True, NAN])
    is_refused(scheduler.get_args, dict(epoch=0), [-1, *NOT_WHOLE])
    is_refused(lambda optimizer: X.MAPInversion(optimizer, same), dict(optimizer=LBFGS()), [None, 1, "LBFGS"])

    class Inversion(X.MAPInversion):
        def problem_factory(self, d):
            return problem(residuals=[lambda s: s - d])

    inversion = Inversion(LBFGS(), same)
    arguments = dict(epochs=[0])
    is_refused(
        lambda epochs: inversion.apply(np.ones(2), np.zeros(2), epochs),
        arguments,
        [[-1], [0.5], ["a"], [True]],
    )


def test_vector_spaces():
    from vmad_lit.contrib import vectorspace as V

    space, v = V.VectorSpace(), np.arange(3.0)
    bad = [None, "x", np.ones(4), np.ones((3, 1)), np.ones(1), 2.0]
    is_refused(
        lambda a, b: space.dot(a, b), dict(a=v, b=v), [*bad, np.ma.masked_array(v, v > 1), with_unit(v)]
    )
    is_refused(lambda a, b: space.addmul(a, b, 2.0), dict(a=v, b=v), bad)
    is_refused(lambda spaces: V.ProductSpace(spaces), dict(spaces=[space]), [1, "x", [space, 1]])
    with pytest.raises(ValueError, match="arrays more"):
        V.ProductSpace().from_arrays([v, v, v], (v, v))


@pytest.mark.serial
def test_seeds_of_the_checks_own_directions():
    """Names with the same letters, ranks and fields of one list have directions of their own."""
    pytest.importorskip("pmesh")
    from vmad_lit.core.valuetypes import rng_of_rank, value_type
    from vmad_lit.testing import Trial

    trial = Trial(lambda ab, ba: ab + ba, (np.ones(9), np.ones(9)), {})
    directions = [trial._direction(name, np.ones(9)) for name in ("ab", "ba", "b", "_ab", "ab_")]
    assert len({tuple(v) for v in directions}) == 5

    class Comm:
        def __init__(self, rank):
            self.rank = rank

    def draw(rank, seed=20, spawn=()):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=spawn))
        return [rng_of_rank(rng, comm).normal() for comm in (Comm(rank), Comm(rank))]

    drawn = [x for rank in (0, 1) for spawn in ((), (0,), (1,)) for x in draw(rank, spawn=spawn)]
    drawn += [*draw(0, 21), *draw(1, 21), np.random.default_rng(20).normal()]
    assert len(set(drawn)) == len(drawn) and draw(1) == draw(1)
    field = mesh().create("real", value=1)
    rng = np.random.default_rng(3)
    a, b = (value_type(field).random_like(field, rng).value for _ in range(2))
    assert not np.allclose(a, b)
    assert inspect.signature(rng_of_rank).parameters.keys() == {"rng", "comm"}

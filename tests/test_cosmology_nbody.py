"""Gradients of an N-body run with respect to cosmological parameters: the whole chain, on all ranks."""

import numpy as np
import pytest
from mpi4py import MPI

from vmad_lit import Builder, autooperator
from vmad_lit.lib import fastpm
from vmad_lit.lib.cosmology import Cosmology, LinearPower, MatterDominated, Planck15, SymbolicBackground
from vmad_lit.lib.mpi import allbcast
from vmad_lit.testing import check, check_dot_product, check_rank_invariance, check_taylor

pytestmark = pytest.mark.collective

COMM = MPI.COMM_WORLD
STAGES = [0.1, 0.4, 1.0]
POINT = dict(Om0=0.31, h=0.68, n_s=0.965, sigma8=0.82)
PARAMETERS = tuple(POINT)


def make_mesh(shape=(8, 6, 10), comm=COMM, dtype="f8", **options):
    return fastpm.ParticleMesh(
        list(shape), BoxSize=[4.0 * n for n in shape], comm=comm, dtype=dtype, **options
    )


def make_noise(pm, seed=1):
    return pm.generate_whitenoise(seed=seed, unitary=False, type="complex")


def simulate(wnk, Om0, h, n_s, sigma8, pm, stages=STAGES, q=None, Ok0=0.0, **options):
    """The final density as a function of the white noise and the parameters."""
    cosmology = Cosmology(Om0=Om0, h=h, n_s=n_s, sigma8=sigma8, Ok0=Ok0)
    sim = fastpm.FastPMSimulation(stages, cosmology, pm, q=q, **options)
    dx, p, f = sim.run(fastpm.induce_correlation(wnk, LinearPower(cosmology), pm))
    x = sim.q + dx
    return fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm), p, f


def objective(wnk, Om0, h, n_s, sigma8, pm, **options):
    """The sum of squares of the final density."""
    return fastpm.to_scalar(simulate(wnk, Om0, h, n_s, sigma8, pm, **options)[0])


def build(function, **options):
    with Builder() as m:
        m.output(y=function(*m.input("wnk", *PARAMETERS), **options))
    return m


def value_and_gradient(comm, **options):
    """The objective and its derivatives with respect to the parameters, and to the noise."""
    pm = make_mesh(comm=comm)
    point = dict(wnk=make_noise(pm), **POINT)
    [chi2], [of_noise, *gradient] = build(objective, pm=pm, **options).compute_with_vjp(point, dict(_y=1.0))
    return chi2, np.array(gradient), of_noise


# -- derivatives of the whole run --------------------------------------------------------------------------


@pytest.mark.serial  # on several ranks by all of them at once, below
@pytest.mark.parametrize("parameter", PARAMETERS)
def test_gradient_by_each_parameter(parameter):
    pm = make_mesh()
    fixed = tuple(name for name in ("wnk", *PARAMETERS) if name != parameter)
    report = check(
        objective, make_noise(pm), **POINT, pm=pm, comm=COMM, replicated=PARAMETERS, constant=fixed
    )
    assert report.second is not None


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(stages=[0.1, 0.3, 0.6, 1.0], ram=2),
        dict(B=2),
        pytest.param(dict(Ok0=-0.05), marks=pytest.mark.serial),
        dict(reversible=True),
        pytest.param(dict(keep_potential=False), marks=pytest.mark.serial),
    ],
    ids=str,
)
def test_gradient_by_all_parameters_and_noise(options):
    pm = make_mesh()
    report = check(objective, make_noise(pm), **POINT, pm=pm, comm=COMM, replicated=PARAMETERS, **options)
    assert report.second is not None


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_gradient_is_that_of_finite_differences(parameter):
    pm = make_mesh()
    noise = make_noise(pm)
    _, gradient, _ = value_and_gradient(COMM)

    def numbers(**changes):
        """The objective by a run with numbers only, which shares no operator of the background."""
        with Builder() as m:
            m.output(y=objective(m.input("wnk"), **{**POINT, **changes}, pm=pm))
        return m.compute("y", dict(wnk=noise))

    up, down = (numbers(**{parameter: POINT[parameter] + step}) for step in (1e-4, -1e-4))
    np.testing.assert_allclose(gradient[PARAMETERS.index(parameter)], (up - down) / 2e-4, rtol=1e-5)


def test_derivatives_of_momenta_and_forces():
    pm = make_mesh()
    for i in (1, 2):
        report = check(
            lambda *args, **kwargs: simulate(*args, **kwargs)[i],
            make_noise(pm),
            **POINT,
            pm=pm,
            comm=COMM,
            replicated=PARAMETERS,
        )
        assert report.second is not None


def test_density_in_both_modes():
    pm = make_mesh((4, 6, 6))
    density = build(lambda *args: simulate(*args, pm=pm)[0])
    init = dict(wnk=make_noise(pm), **POINT)
    check_taylor(density, **init, comm=COMM, replicated=PARAMETERS)
    check_dot_product(density, **init, comm=COMM, replicated=PARAMETERS)


def test_gradient_does_not_depend_on_ranks():
    check_rank_invariance(value_and_gradient)


def test_ranks_without_particles():
    pm = make_mesh((3, 4, 4))  # on four ranks one of them has no plane
    q = pm.generate_uniform_particle_grid(shift=0.5)
    if COMM.size > 1:
        q = COMM.allgather(q)  # and here only the first has particles
        q = np.concatenate(q) if COMM.rank == 0 else np.empty((0, 3))
    report = check(objective, make_noise(pm), **POINT, pm=pm, q=q, comm=COMM, replicated=PARAMETERS)
    assert report.second is not None


def test_some_ranks_have_a_zero_cotangent():
    pm = make_mesh()
    with Builder() as m:
        wnk, Om0 = m.input("wnk", "Om0")
        sim = fastpm.FastPMSimulation(STAGES, Cosmology(Om0=Om0), pm)
        dx, p, f = sim.run(wnk)
        m.output(p=p)
    point = dict(wnk=make_noise(pm), Om0=0.3)
    p = m.compute("p", point)
    w = np.sin(1 + np.arange(p.size)).reshape(p.shape)
    some = w if COMM.rank == 0 else 0  # a number 0, which the engine knows to be zero
    _, [_, of_some] = m.compute_with_vjp(point, dict(_p=some))
    _, [_, of_zeros] = m.compute_with_vjp(point, dict(_p=some * np.ones_like(p)))
    np.testing.assert_allclose(of_some, of_zeros, rtol=1e-12)
    assert of_some != 0 and len(set(COMM.allgather(of_some))) == 1
    _, [_, nothing] = m.compute_with_vjp(point, dict(_p=0))
    assert nothing == 0


# -- symbols and numbers -----------------------------------------------------------------------------------


def test_symbols_give_the_values_of_numbers():
    pm = make_mesh()
    noise = make_noise(pm)
    for Ok0 in (0.0, 0.1):
        with Builder() as m:
            wnk, *parameters = m.input("wnk", *PARAMETERS)
            outs = [simulate(wnk, *parameters, pm=pm, Ok0=Ok0), simulate(wnk, **POINT, pm=pm, Ok0=Ok0)]
            m.output(
                **{f"{name}{i}": y for i, ys in enumerate(outs) for name, y in zip("rpf", ys, strict=True)}
            )
        values = m.compute([name + i for name in "rpf" for i in "01"], dict(wnk=noise, **POINT))
        for ours, theirs in zip(values[::2], values[1::2], strict=True):
            ours, theirs = (getattr(x, "value", x) for x in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def names_of_nodes(model):
    """The names of all operators in a model, also in the models inside of it after a run."""
    for node in model:
        yield node.operator.__name__
        if isinstance(node.cache, tuple) and hasattr(node.cache[1], "_plans"):
            yield from names_of_nodes(node.cache[1])


def test_numbers_make_no_nodes_of_the_background():
    pm = make_mesh()
    of_symbols = {"step_factors", "start_factors", "linear_power", "allbcast", "pick"}
    with Builder() as m:
        m.output(y=objective(m.input("wnk"), **POINT, pm=pm))
    m.compute("y", dict(wnk=make_noise(pm)))
    assert not of_symbols & set(names_of_nodes(m))
    m = build(objective, pm=pm, stages=[0.1, 0.2, 0.3, 0.5, 1.0])
    m.compute("y", dict(wnk=make_noise(pm), **POINT))
    names = list(names_of_nodes(m))
    assert [names.count(name) for name in ("step_factors", "start_factors", "linear_power")] == [1, 1, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda rhok, c, q, pm: fastpm.nbody(rhok, q, STAGES, c, pm)[0],
        lambda rhok, c, q, pm: fastpm.nbody(rhok, q, STAGES, c.background(), pm)[1],
        lambda rhok, c, q, pm: fastpm.firststep(rhok, q, 0.3, c.background(), pm)[1],
        lambda rhok, c, q, pm: fastpm.leapfrog(*fastpm.lpt(rhok, q, pm), q, STAGES, c.background(), pm)[1],
        lambda rhok, c, q, pm: fastpm.leapfrog_step(
            *fastpm.lpt(rhok, q, pm), q, fastpm.StepFactors(c.background(), STAGES, pm), pm, 0
        )[1],
        lambda rhok, c, q, pm: fastpm.FastPMSimulation([0.5], c.background(), pm).run(rhok)[2],
        lambda rhok, c, q, pm: fastpm.FastPMSimulation(STAGES, c, pm).firststep(rhok)[1],
    ],
    ids=["nbody", "background", "firststep", "leapfrog", "step", "one stage", "method"],
)
def test_every_way_to_call(call):
    pm = make_mesh()
    q = pm.generate_uniform_particle_grid(shift=0.5)
    check(
        lambda wnk, Om0: call(wnk, Cosmology(Om0=Om0), q, pm),
        make_noise(pm) * 0.1,
        Om0=0.3,
        comm=COMM,
        replicated="Om0",
    )


def test_anything_with_a_symbol_for_its_density():
    class Universe:
        def __init__(self, Om0):
            self.Om0 = Om0

    pm = make_mesh()
    check(
        lambda wnk, Om0: fastpm.FastPMSimulation(STAGES, Universe(Om0), pm).run(wnk)[0],
        make_noise(pm),
        Om0=0.3,
        comm=COMM,
        replicated="Om0",
    )


def test_factors_of_a_symbol():
    pt, a = MatterDominated(0.3), np.array([0.2, 0.6])
    pm = make_mesh()
    with Builder() as m:
        c = Cosmology(Om0=m.input("Om0"))
        sim = fastpm.FastPMSimulation(STAGES, c, pm)
        bg = c.background()
        m.output(
            K=sim.KickFactor(0.1, 0.2, 0.3),
            D=sim.DriftFactor(0.1, 0.2, 0.3),
            E=bg.E(a),
            D1=bg.D1(a),
            f1=bg.f1(a),
            D2=bg.D2(a),
            f2=bg.f2(a),
        )
    names = "E", "D1", "f1", "D2", "f2"
    K, D, *values = m.compute(["K", "D", *names], dict(Om0=0.3))
    np.testing.assert_allclose(
        [K, D], [fastpm.KickFactor(pt, 0.1, 0.2, 0.3), fastpm.DriftFactor(pt, 0.1, 0.2, 0.3)]
    )
    for name, value in zip(names, values, strict=True):
        np.testing.assert_allclose(value, getattr(pt, name)(a), rtol=1e-13)
    with pytest.raises(ValueError, match="normalised"):
        SymbolicBackground(0.3, a_normalize=0.5)


# -- initial modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 6, 10), (5, 7), (4, 4, 3)], ids=str)
def test_wavenumbers_are_those_of_the_mesh(shape):
    pm = make_mesh(shape)
    k = fastpm.find_wavenumbers(pm)
    vectors = np.meshgrid(*(2 * np.pi * np.fft.fftfreq(n, 4.0) for n in shape), indexing="ij")
    moduli = np.sqrt(sum(v**2 for v in vectors)).ravel()
    expected = np.unique(np.round(moduli[moduli > 0], 9))
    np.testing.assert_allclose(k, expected, rtol=1e-7)
    assert all(np.array_equal(k, other) for other in COMM.allgather(k))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_colored_modes_are_those_of_a_function(dtype):
    pm = make_mesh(dtype=dtype)
    power = LinearPower(Cosmology())
    noise = make_noise(pm)
    with Builder() as m:
        wnk, sigma8 = m.input("wnk", "sigma8")
        m.output(
            ours=fastpm.induce_correlation(wnk, LinearPower(Cosmology(sigma8=sigma8)), pm),
            theirs=fastpm.induce_correlation(wnk, power, pm),
        )
    ours, theirs = m.compute(["ours", "theirs"], dict(wnk=noise, sigma8=0.8))
    assert ours.value.dtype == theirs.value.dtype
    np.testing.assert_allclose(ours.value, theirs.value, rtol=1e-9 if dtype == "f8" else 1e-5)


def test_modes_of_any_differentiable_power():
    pm = make_mesh()
    power = 1 / (1 + fastpm.find_wavenumbers(pm))
    check(fastpm.color_modes, make_noise(pm), power, pm, comm=COMM, replicated="power")


@pytest.mark.parametrize(
    "transfer", ["NoWiggle", lambda k: 1 / (1 + (20 * k) ** 2)], ids=["NoWiggle", "function"]
)
def test_spectra_of_symbols(transfer):
    pm = make_mesh((4, 4, 6))

    def modes(wnk, Om0, h, n_s, sigma8, Ob0):
        cosmology = Cosmology(Om0=Om0, h=h, n_s=n_s, sigma8=sigma8, Ob0=Ob0)
        return fastpm.induce_correlation(wnk, LinearPower(cosmology, z=1.0, transfer=transfer), pm)

    check(modes, make_noise(pm), **POINT, Ob0=0.05, comm=COMM, replicated=(*PARAMETERS, "Ob0"))


# -- the pieces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_advance_and_scale(dtype):
    rng = np.random.default_rng(3 + COMM.rank)
    x, v = rng.normal(size=(2, 5 + COMM.rank, 3)).astype(dtype)
    check(
        lambda x, v, c: fastpm.axpy(x, v, allbcast(c, COMM)),
        x,
        v,
        0.7,
        comm=COMM,
        replicated="c",
        truth=x + np.dtype(dtype).type(0.7) * v,
    )
    check(lambda v, c: fastpm.scale(v, allbcast(c, COMM)), v, 0.7, comm=COMM, replicated="c")
    check(fastpm.pick, np.arange(6.0).reshape(2, 3), 4, truth=4.0)


@pytest.mark.parametrize("dtype", ["f4", "f8", "mixed"])
def test_leap(dtype):
    """A kick and a drift by the force, as an operator and as three, with derivatives by all that goes in."""
    pm = make_mesh(dtype="f4" if dtype == "f4" else "f8", resampler="pcs")
    q = pm.generate_uniform_particle_grid(shift=0.5).astype(pm.dtype)
    rng = np.random.default_rng(4 + COMM.rank)
    dx, p = rng.normal(size=(2, *q.shape)).astype(pm.dtype)
    if dtype == "mixed":
        p = np.asfortranarray(p)
    with Builder() as m:
        dx_i, p_i, kick, drift = m.input("dx_i", "p_i", "kick", "drift")
        f, _ = fastpm.gravity(dx_i, q, pm)
        after = fastpm.axpy(p_i, f, kick)
        m.output(dx=fastpm.axpy(dx_i, after, drift), p=after)
    init = dict(dx_i=dx, p_i=p, kick=0.7, drift=-0.3)
    expected = m.compute(["dx", "p"], init)
    for i, name in enumerate(("dx", "p")):
        check(
            lambda dx_i, p_i, kick, drift: fastpm.kick_drift(
                dx_i, p_i, *(allbcast(c, COMM) for c in (kick, drift)), q, pm
            )[i],
            *init.values(),
            comm=COMM,
            replicated=("kick", "drift"),
            truth=expected[i],
        )


@pytest.mark.parametrize("keep_potential", [True, False])
def test_both_results_of_a_leap_at_once(keep_potential):
    pm = make_mesh()
    q = pm.generate_uniform_particle_grid(shift=0.5)
    rng = np.random.default_rng(5 + COMM.rank)
    dx, p, _dx, _p = rng.normal(size=(4, *q.shape))
    init, cotangents = dict(dx_i=dx, p_i=p), dict(_dx=_dx, _p=_p)
    results = []
    for one in True, False:
        with Builder() as m:
            dx_i, p_i = m.input("dx_i", "p_i")
            if one:
                out = fastpm.kick_drift(dx_i, p_i, 0.7, -0.3, q, pm, keep_potential)
            else:
                f, _ = fastpm.gravity(dx_i, q, pm)
                after = fastpm.axpy(p_i, f, 0.7)
                out = fastpm.axpy(dx_i, after, -0.3), after
            m.output(**dict(zip(("dx", "p"), out)))
        results.append(
            [
                *m.compute_with_vjp(init, cotangents),
                *m.compute_with_jvp(["dx", "p"], init, dict(dx_i_=_dx, p_i_=_p)),
            ]
        )
    for got, expected in zip(*results):
        for a, b in zip(got, expected):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    # What was given is as it was
    again = np.random.default_rng(5 + COMM.rank).normal(size=(4, *q.shape))
    for a, b in zip((dx, p, _dx, _p), again):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["f4", "f8", "mixed"])
def test_superpose(dtype):
    rng = np.random.default_rng(6 + COMM.rank)
    dx1, dx2 = rng.normal(size=(2, 5 + COMM.rank, 3)).astype("f8" if dtype == "mixed" else dtype)
    if dtype == "mixed":
        dx2 = np.asfortranarray(dx2)
    c = dict(D1=0.7, D2=-0.3, Gf1=1.2, Gf2=0.4)
    truth = [c["D1"] * dx1 + c["D2"] * dx2, c["Gf1"] * dx1 + c["Gf2"] * dx2]
    for i in 0, 1:
        check(
            lambda dx1, dx2, *c: fastpm.superpose(dx1, dx2, *(allbcast(x, COMM) for x in c))[i],
            dx1,
            dx2,
            *c.values(),
            comm=COMM,
            replicated=("c",),
            truth=truth[i],
        )
        check(
            lambda dx1, dx2: fastpm.superpose(dx1, dx2, *c.values())[i], dx1, dx2, comm=COMM, truth=truth[i]
        )


def test_coefficients_in_turn():
    """Kick, drift and kick of successive steps, with the kicks at a stage taken as one; as numbers and as symbols."""
    pt = Planck15.background(a=np.array([0.2, 0.3, 0.5, 1.0]))
    stages = [0.2, 0.5, 0.9, 1.0]
    a, b, c = (fastpm.factors_of_step(pt, *ends) for ends in zip(stages[:-1], stages[1:]))
    steps = fastpm.StepFactors(pt, stages, make_mesh())
    np.testing.assert_allclose(
        steps.factors, [a[0], a[1], a[2] + b[0], b[1], b[2] + c[0], c[1], c[2]], rtol=1e-14
    )
    assert steps.n == 3 and steps.kick(1) == steps.factors[2] and steps.drift(1) == steps.factors[3]
    with Builder() as m:
        symbolic = fastpm.StepFactors(SymbolicBackground(m.input("Om0")), stages, make_mesh())
        m.output(factors=symbolic.factors, kick=symbolic.kick(2))
    exact = fastpm.StepFactors(MatterDominated(0.3), stages, make_mesh()).factors
    factors, kick = m.compute(["factors", "kick"], dict(Om0=0.3))
    np.testing.assert_allclose(factors, exact, rtol=1e-6)
    assert kick == factors[4]


def test_the_run_stays_in_single_precision():
    pm = make_mesh(dtype="f4")
    q = pm.generate_uniform_particle_grid(shift=0.5).astype("f4")
    with Builder() as m:
        rho, p, f = simulate(*m.input("wnk", *PARAMETERS), pm=pm, q=q)
        m.output(p=p, f=f, chi2=fastpm.to_scalar(rho))
    point = dict(wnk=make_noise(pm), **POINT)
    p, f = m.compute(["p", "f"], point)
    assert p.dtype == f.dtype == "f4"
    _, [_, *gradient] = m.compute_with_vjp(point, dict(_chi2=1.0))
    noise = fastpm.ParticleMesh.create(make_mesh(), type="complex", value=point["wnk"].value.astype("c16"))
    with Builder() as m:
        m.output(chi2=objective(*m.input("wnk", *PARAMETERS), pm=make_mesh()))
    _, [_, *exact] = m.compute_with_vjp(dict(wnk=noise, **POINT), dict(_chi2=1.0))
    np.testing.assert_allclose(gradient, exact, rtol=1e-3)


# -- objects that hold symbols -----------------------------------------------------------------------------


class Pair:
    __symbols__ = "first", "second"

    def __init__(self, first, second):
        self.first, self.second = first, second


@autooperator("x -> y")
def combine(x, pair, scale=1.0):
    return x * pair.first + pair.second * scale


@autooperator("x -> y")
def nested(x, pair):
    return combine(x, pair.first) * combine(x, pair.first, scale=2.0) + pair.second


@pytest.mark.serial
def test_symbols_in_nested_objects():
    def function(x, a, b, c):
        return nested(x, Pair(Pair(a, b), c))

    check(function, 2.0, 3.0, 0.5, 1.5, truth=lambda x, a, b, c: (x * a + b) * (x * a + 2 * b) + c)
    check(lambda x, b: combine(x, Pair(3.0, b), scale=2.0), 2.0, 5.0, truth=16.0)
    check(lambda x: combine(x, Pair(3.0, 5.0)), 2.0, truth=11.0)


@pytest.mark.serial
def test_the_object_of_the_caller_is_left_alone():
    with Builder() as m:
        x, a = m.input("x", "a")
        pair = Pair(a, 2.0)
        m.output(y=combine(x, pair), z=combine.forgetful(x, pair))
    assert [node.operator._keeps_tape for node in m] == [True, False]
    for _ in range(2):
        assert m.compute(["y", "z"], dict(x=3.0, a=5.0)) == [17.0, 17.0]
    assert pair.first is a and pair.second == 2.0
    _, gradient = m.compute_with_vjp(dict(x=3.0, a=5.0), dict(_y=1.0, _z=1.0))
    assert gradient == [10.0, 6.0]


@pytest.mark.serial
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: Cosmology(T_cmb=s), "T_cmb"),
        (lambda s: Cosmology(Ok0=s), "Ok0"),
        (lambda s: LinearPower.from_table(Cosmology(n_s=s), [1, 2, 3, 4], [1, 2, 3, 4]), "table"),
    ],
)
def test_where_symbols_cannot_be(make, message):
    with Builder() as m, pytest.raises(TypeError, match=message):
        make(m.input("s"))


@pytest.mark.serial
def test_distances_of_a_symbol():
    names = (
        "efunc",
        "comoving_distance",
        "comoving_transverse_distance",
        "angular_diameter_distance",
        "luminosity_distance",
    )
    for Ok0 in (0.0, 0.1, -0.1):
        for name in names:
            check(
                lambda Om0, name=name, Ok0=Ok0: getattr(Cosmology(Om0=Om0, Ok0=Ok0), name)(
                    np.array([0.5, 2.0])
                ),
                0.3,
                truth=getattr(Cosmology(Om0=0.3, Ok0=Ok0), name)(np.array([0.5, 2.0])),
            )

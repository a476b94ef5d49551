"""Perturbation theory and FastPM: oracles, conservation laws, derivatives, and independence of the number of ranks."""

import numpy as np
import pytest

pytest.importorskip("mpi4py")
pytest.importorskip("pmesh")

from mpi4py import MPI

from helpers import join
from vmad_lit import Builder
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.lib import fastpm, force, lpt
from vmad_lit.lib.cosmology import Cosmology, MatterDominated
from vmad_lit.lib.fastpm import FastPMSimulation, ParticleMesh
from vmad_lit.lib.mpi import allbcast
from vmad_lit.testing import check_dot_product, check_second_order, check_taylor

pytestmark = pytest.mark.collective

COMM = MPI.COMM_WORLD
PT = MatterDominated(0.3)
STAGES = [0.1, 0.4, 1.0]


def power(k):
    return 30.0 / (0.1 + k**2)


def noise(pm, seed=1):
    if pm.ndim == 1:  # pmesh makes none
        values = np.random.default_rng(seed).normal(size=pm.Nmesh)
        return pm.create("real", value=values).r2c() * pm.Nmesh.prod() ** 0.5
    return pm.generate_whitenoise(seed=seed, unitary=False, type="complex")


def total(a, b):
    return COMM.allreduce(float(np.sum(a * b)))


def inner(a, b):
    """The inner product of fields; pmesh's own miscounts modes if the last axis is odd."""
    return fastpm.cdot.apl.impl(None, a, b)["y"]


def build(pm, B=1, stages=STAGES, q=None):
    """A simulation as a model: from white noise to displacements, momenta, forces, the density and a number."""
    sim = FastPMSimulation(stages, PT, pm, B=B, q=q)
    with Builder() as m:
        wnk = m.input("wnk")
        dx, p, f = sim.run(fastpm.induce_correlation(wnk, power, pm))
        x = sim.q + dx
        rho = fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm)
        m.output(dx=dx, p=p, f=f, rho=rho, chi2=fastpm.to_scalar(rho - 1.0))
    return sim, m


CASES = {
    "cube": dict(Nmesh=[8, 8, 8], BoxSize=16.0),
    "uneven": dict(Nmesh=[6, 10, 7], BoxSize=[12.0, 20.0, 14.0]),
    "tsc": dict(Nmesh=[8, 8, 8], BoxSize=16.0, resampler="tsc"),
    "plane": dict(Nmesh=[12, 10], BoxSize=[24.0, 20.0]),
    "fine force": dict(Nmesh=[6, 6, 6], BoxSize=12.0, B=2),
    "line": dict(Nmesh=[16], BoxSize=32.0),
}


def make(case, comm=COMM, dtype="f8"):
    options = dict(CASES[case])
    B = options.pop("B", 1)
    if len(options["Nmesh"]) == 1 and comm.size > 1:
        pytest.skip("pmesh does not divide a mesh of one dimension")
    return ParticleMesh(comm=comm, dtype=dtype, **options), B


@pytest.mark.parametrize("case", CASES)
def test_dot_product(case):
    pm, B = make(case)
    sim, m = build(pm, B)
    v = noise(pm, 2)
    w = {name: np.sin((i + 1) * sim.q) for i, name in enumerate(["dx", "p", "f"])}
    outs, tangents = m.compute_with_jvp(["dx", "p", "f"], dict(wnk=noise(pm)), dict(wnk_=v))
    _, [_wnk] = m.compute_with_vjp(dict(wnk=noise(pm)), {"_" + name: value for name, value in w.items()})
    left = sum(total(w[name], tangent) for name, tangent in zip(["dx", "p", "f"], tangents))
    assert left == pytest.approx(inner(_wnk, v), rel=1e-9)
    assert abs(left) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_taylor(case):
    pm, B = make(case)
    sim, m = build(pm, B)
    x, v = noise(pm), noise(pm, 2)
    [chi2], [gradient] = m.compute_with_vjp(dict(wnk=x), dict(_chi2=1.0))
    slope = inner(gradient, v)
    h = 1e-3
    plus, minus = (m.compute("chi2", dict(wnk=x + v * s)) for s in (h, -h))
    assert (plus - minus) / (2 * h) == pytest.approx(slope, rel=2e-3, abs=1e-2 * abs(chi2))
    assert abs(slope) > 1e-3 * abs(chi2)


@pytest.mark.parametrize("case", CASES)
def test_hessian(case):
    """The product of the Hessian with a vector is the derivative of the gradient, and the Hessian is symmetric."""
    pm, B = make(case)
    sim, m = build(pm, B)

    def chi2(wnk):
        dx, p, f = sim.run(fastpm.induce_correlation(wnk, power, pm))
        x = sim.q + dx
        return fastpm.to_scalar(fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm) - 1.0)

    assert check_second_order(chi2, noise(pm), comm=COMM, steps=(1e-6, 5e-7, 2.5e-7))[-1] > 1.9
    x, v, w = (
        noise(pm),
        noise(pm, 2),
        {name: np.sin((i + 1) * sim.q) for i, name in enumerate(["_dx", "_p", "_f"])},
    )
    step = 1e-6
    for outs, given in (["chi2"], {}), (["dx", "p", "f"], w):
        _, _, [product] = m.compute_with_hvp(outs, dict(wnk=x), dict(wnk_=v, **given))
        there, back = (
            m.compute_with_vjp(dict(wnk=x + v * h), given or dict(_chi2=1.0))[1][0].value
            for h in (step, -step)
        )
        size = max(COMM.allgather(abs(product.value).max(initial=0)))
        assert size > 0
        np.testing.assert_allclose(product.value, (there - back) / (2 * step), atol=1e-5 * size)


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks(case):
    """The particles of this rank move as they do in a run on a single rank, and so does the gradient."""
    pm, B = make(case)
    alone, _ = make(case, MPI.COMM_SELF)
    sim, m = build(pm, B)
    serial, reference = build(alone, B, q=join(sim.q))
    names = ["dx", "p", "f"]
    results = m.compute(names, dict(wnk=noise(pm)))
    expected = reference.compute(names, dict(wnk=noise(alone)))
    start = sum(COMM.allgather(len(sim.q))[: COMM.rank])
    mine = slice(start, start + len(sim.q))
    for name, a, b in zip(names, results, expected):
        np.testing.assert_allclose(a, b[mine], atol=1e-10 * abs(b).max(), err_msg=name)
    _, [gradient] = m.compute_with_vjp(dict(wnk=noise(pm)), dict(_chi2=1.0))
    _, [expected] = reference.compute_with_vjp(dict(wnk=noise(alone)), dict(_chi2=1.0))
    gradient, expected = gradient.c2r(), expected.c2r()
    np.testing.assert_allclose(
        gradient.value, expected.value[pm.create("real").slices], atol=1e-9 * abs(expected.value).max()
    )
    product = m.compute_with_hvp("chi2", dict(wnk=noise(pm)), dict(wnk_=noise(pm, 2)))[2][0].c2r()
    expected = reference.compute_with_hvp("chi2", dict(wnk=noise(alone)), dict(wnk_=noise(alone, 2)))[2][
        0
    ].c2r()
    np.testing.assert_allclose(
        product.value, expected.value[pm.create("real").slices], atol=1e-8 * abs(expected.value).max()
    )


def test_conservation():
    pm, _ = make("uneven")
    sim, m = build(pm)
    p, f, rho = m.compute(["p", "f", "rho"], dict(wnk=noise(pm)))
    for vector in p, f:
        size = COMM.allreduce(np.abs(vector).sum(axis=0))
        assert (abs(COMM.allreduce(vector.sum(axis=0))) < 1e-12 * size).all()
    assert rho.csum() == pytest.approx(6 * 10 * 7)


def test_single_precision():
    pm, _ = make("cube", dtype="f4")
    double, _ = make("cube")
    q = double.generate_uniform_particle_grid(shift=0.5)
    _, m = build(pm, q=q.astype("f4"))
    _, reference = build(double, q=q)
    modes = noise(double)
    single = pm.create("complex", value=modes.value.astype("c8"))
    a = m.compute(["dx", "p", "f"], dict(wnk=single))
    b = reference.compute(["dx", "p", "f"], dict(wnk=modes))
    for x, y in zip(a, b):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, y, atol=2e-5 * abs(y).max())
    _, [gradient] = m.compute_with_vjp(dict(wnk=single), dict(_chi2=1.0))
    _, [expected] = reference.compute_with_vjp(dict(wnk=modes), dict(_chi2=1.0))
    assert gradient.value.dtype == np.complex64
    np.testing.assert_allclose(gradient.value, expected.value, atol=2e-3 * abs(expected.value).max())


@pytest.mark.parametrize("steps", [1, 4])
def test_long_waves_grow_as_in_linear_theory(steps):
    """Also in one step, since FastPM's factors hold the Zel'dovich motion exactly."""
    pm = ParticleMesh([32] * 3, BoxSize=1000.0, comm=COMM)
    stages = np.linspace(0.1, 1.0, steps + 1)
    sim = FastPMSimulation(stages, PT, pm, B=2)
    with Builder() as m:
        rhok = m.input("rhok")
        modes = []
        for dx in sim.firststep(rhok)[0], sim.run(rhok)[0]:
            x = sim.q + dx
            modes.append(fastpm.r2c(fastpm.paint(x, 1.0, fastpm.decompose(x, pm), pm)))
        m.output(first=modes[0], final=modes[1])
    small = noise(pm) * 1e-3
    first, final = m.compute(["first", "final"], dict(rhok=small))
    k2 = sum(k**2 for k in first.x)
    long = (k2 > 0) & (k2 < (1.1 * 2 * np.pi / 1000.0) ** 2)
    above, below = total((final.value * first.value.conj()).real, long), total(abs(first.value) ** 2, long)
    assert above / below == pytest.approx(PT.D1(1.0) / PT.D1(0.1), rel=0.01)


@pytest.mark.parametrize(
    "options",
    [dict(ram=1), dict(ram=2), dict(keep_potential=False), dict(ram=2, keep_potential=False)],
    ids=str,
)
def test_few_states_give_the_same_gradient(options):
    pm, _ = make("uneven")
    stages = np.linspace(0.1, 1.0, 6)
    w = None
    results = []
    for policy in {}, options:
        sim = FastPMSimulation(stages, PT, pm, **policy)
        w = np.sin(sim.q)
        model = sim.run.build()
        outs, [_rhok] = model.compute_with_vjp(dict(rhok=noise(pm)), dict(_dx=w, _p=w, _f=w))
        _, tangents = model.compute_with_jvp(["dx", "p", "f"], dict(rhok=noise(pm)), dict(rhok_=noise(pm, 2)))
        v = dict(rhok_=noise(pm, 2), _dx=w, _p=w, _f=w)
        _, _, [product] = model.compute_with_hvp(["dx", "p", "f"], dict(rhok=noise(pm)), v)
        results.append([*outs, *tangents, _rhok.value, product.value])
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, atol=1e-12 * max(COMM.allgather(abs(a).max(initial=0))))


@pytest.mark.parametrize("case", CASES)
def test_steps_undone_give_the_same_gradient(case):
    pm, B = make(case)
    results = []
    for reversible in False, True:
        sim = FastPMSimulation(np.linspace(0.1, 1.0, 5), PT, pm, B=B, reversible=reversible)
        w = {f"_{name}": np.sin((i + 1) * sim.q) for i, name in enumerate(["dx", "p", "f"])}
        model = sim.run.build()
        outs, [_rhok] = model.compute_with_vjp(dict(rhok=noise(pm)), w)
        _, tangents = model.compute_with_jvp(["dx", "p", "f"], dict(rhok=noise(pm)), dict(rhok_=noise(pm, 2)))
        _, _, [product] = model.compute_with_hvp(
            ["dx", "p", "f"], dict(rhok=noise(pm)), dict(rhok_=noise(pm, 2), **w)
        )
        results.append([*outs, *tangents, product.value, _rhok.value])
    for a, b in zip(*results):
        assert abs(a).max(initial=0) > 0 or not a.size
        np.testing.assert_allclose(a, b, atol=1e-8 * max(COMM.allgather(abs(a).max(initial=0))))
    left = sum(total(a, b) for a, b in zip(w.values(), tangents))
    assert left == pytest.approx(inner(_rhok, noise(pm, 2)), rel=1e-8)


@pytest.mark.parametrize("dtype", ["f8", "f4"])
def test_reversible_leapfrog(dtype):
    """With respect to displacements, momenta and coefficients; the coefficients as each rank uses them."""
    pm, _ = make("uneven", dtype=dtype)
    q = pm.generate_uniform_particle_grid(shift=0.5).astype(dtype)
    dx_i, p_i = np.random.default_rng(COMM.rank).normal(size=(2,) + q.shape).astype(dtype)
    factors = np.array([0.1, 0.3, 0.45, -0.2, 0.15])
    arguments = fastpm.reversible_leapfrog, dx_i, p_i, factors
    check_dot_product(*arguments, q=q, pm=pm, comm=COMM, rtol=None if dtype == "f8" else 2e-4)
    if dtype == "f8":
        check_taylor(*arguments, q=q, pm=pm, comm=COMM, steps=(4e-5, 2e-5, 1e-5))


@pytest.mark.parametrize("resampler, steps", [("cic", (4e-5, 2e-5, 1e-5)), ("pcs", (4e-3, 2e-3, 1e-3))])
def test_reversible_leapfrog_to_second_order(resampler, steps):
    pm = ParticleMesh([6, 10, 7], BoxSize=[12.0, 20.0, 14.0], comm=COMM, resampler=resampler)
    q = pm.generate_uniform_particle_grid(shift=0.5)
    dx_i, p_i = np.random.default_rng(COMM.rank).normal(size=(2,) + q.shape)

    def leapfrog(dx_i, p_i, factors):
        return fastpm.reversible_leapfrog(dx_i, p_i, allbcast(factors, COMM), q, pm)

    for factors in np.array([0.3]), np.array([0.1, 0.3, 0.45, -0.2, 0.15]):
        assert (
            check_second_order(leapfrog, dx_i, p_i, factors, comm=COMM, replicated="factors", steps=steps)[-1]
            > 1.9
        )


def test_second_order_of_steps_undone_in_single_precision():
    results = []
    for dtype in "f4", "f8":
        pm, _ = make("tsc", dtype=dtype)
        q = pm.generate_uniform_particle_grid(shift=0.5).astype(dtype)
        arrays = np.random.default_rng(COMM.rank).normal(size=(5,) + q.shape).astype(dtype)
        with Builder() as m:
            dx, p, f = fastpm.reversible_leapfrog(
                *m.input("dx_i", "p_i"), np.array([0.1, 0.3, 0.45, -0.2, 0.15]), q, pm
            )
            m.output(dx=dx)
        v = dict(zip(("dx_i_", "p_i_", "_dx"), arrays[2:]))
        results.append(m.compute_with_hvp(["dx"], dict(dx_i=arrays[0], p_i=arrays[1]), v)[2])
    for a, b in zip(*results):
        assert a.dtype == "f4" and b.dtype == "f8"
        np.testing.assert_allclose(a, b, atol=1e-3 * max(COMM.allgather(abs(b).max(initial=0))))


@pytest.mark.parametrize("order", [0, 1])
def test_a_force_that_keeps_positions_only(order):
    """The same derivatives, and a tape without the potential."""
    pm, _ = make("uneven")
    q = pm.generate_uniform_particle_grid(shift=0.5)
    x, x_, _f = q + np.random.default_rng(COMM.rank).normal(size=(3,) + q.shape)
    results, sizes = [], []
    for keep in True, False:
        with Builder() as m:
            pos = m.input("x")
            m.output(f=fastpm.force(pos, fastpm.decompose(pos, pm), pm, order=order, keep_potential=keep)[0])
        f, tape = m.compute("f", dict(x=x), return_tape=True)
        pulled, pushed = tape.get_vjp().compute("_x", dict(_f=_f)), tape.get_jvp().compute("f_", dict(x_=x_))
        product = tape.get_hvp().compute("_x_", dict(_f=_f, x_=x_))
        results.append([f, pulled, pushed, product])
        sizes.append(COMM.allreduce(tape.nbytes))
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert sizes[0] - sizes[1] >= 8 * pm.Nmesh.prod()


@pytest.mark.parametrize("given", ["dx", "p", "f", "dx p f"])
def test_a_cotangent_that_is_zero_on_some_ranks_only(given):
    """The others' cotangents pass through the same meshes: it must be as if the zero had been spelled out."""
    pm, _ = make("uneven")
    q = pm.generate_uniform_particle_grid(shift=0.5)
    dx_i, p_i, w = np.random.default_rng(COMM.rank).normal(size=(3,) + q.shape)
    with Builder() as m:
        dx, p, f = fastpm.reversible_leapfrog(
            *m.input("dx_i", "p_i"), np.array([0.1, 0.3, 0.45, -0.2, 0.15]), q, pm
        )
        m.output(dx=dx, p=p, f=f)
    results = []
    for zero in ZeroGradient, 0 * w:
        cotangents = dict(_dx=w, _p=w, _f=w)
        if COMM.rank == 0:
            cotangents.update({f"_{name}": zero for name in given.split()})
        _, pulled = m.compute_with_vjp(dict(dx_i=dx_i, p_i=p_i), cotangents)
        results.append(pulled)
        for silent in [], ["p_i_"], ["dx_i_", "p_i_"]:
            v = {
                name: zero if name in silent and COMM.rank == 0 else x(q)
                for name, x in dict(dx_i_=np.sin, p_i_=np.cos).items()
            }
            results[-1] += m.compute_with_hvp(
                ["dx", "p", "f"], dict(dx_i=dx_i, p_i=p_i), {**v, **cotangents}
            )[2]
    for a, b in zip(*results):
        assert COMM.size == 1 or COMM.allreduce(float(np.sum(abs(b)))) > 0
        a, b = (0 * w if value is ZeroGradient else value for value in (a, b))
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_nothing_but_the_end_is_kept():
    """What a reversible run records does not grow with the number of steps."""
    pm, _ = make("uneven")
    sizes = []
    for steps in 2, 9:
        sim = FastPMSimulation(np.linspace(0.1, 1.0, steps + 1), PT, pm, reversible=True)
        _, tape = sim.run.build().compute(["dx"], dict(rhok=noise(pm)), return_tape=True)
        sizes.append(held(tape))
    assert sizes[1] - sizes[0] <= 3 * 8 * 7  # the coefficients


def held(tape):
    """The bytes of the arrays and fields on a tape, also of inner ones."""
    return sum(
        held(value) if hasattr(value, "plan") else getattr(getattr(value, "value", value), "nbytes", 0)
        for record in tape
        for value in record.impl_kwargs.values()
    )


def test_either_states_or_steps_undone():
    pm, _ = make("uneven")
    with pytest.raises(ValueError, match="not both"):
        fastpm.leapfrog.build(q=None, stages=STAGES, pt=PT, pm=pm, ram=1, reversible=True)


def test_nbody_and_the_class_agree():
    pm, _ = make("uneven")
    sim, m = build(pm)
    rhok = noise(pm) * 0.5
    one = sim.run.build().compute(["dx", "p", "f"], dict(rhok=rhok))
    two = fastpm.nbody.build(q=sim.q, stages=STAGES, cosmology=PT, pm=pm).compute(
        ["dx", "p", "f"], dict(rhok=rhok)
    )
    for a, b in zip(one, two):
        assert np.array_equal(a, b)
    f, potk = sim.gravity.build().compute(["f", "potk"], dict(dx=one[0]))
    np.testing.assert_allclose(f * 1.5 * PT.Om0, one[2], atol=1e-13 * abs(one[2]).max())
    expected = potk.apply(lambda k, v: v * fastpm.fourier_space_neg_gradient(1, pm, order=1)(k)).c2r()
    x = sim.q + one[0]
    np.testing.assert_allclose(
        expected.readout(x, layout=pm.decompose(x)), f[:, 1], atol=1e-11 * max(abs(f).max(), 1)
    )


def test_potential_is_differentiable():
    pm, _ = make("uneven")
    sim = FastPMSimulation(STAGES, PT, pm)
    model = sim.gravity.build()
    dx, v = np.sin(sim.q), np.cos(2 * sim.q)
    w = noise(pm, 3)
    _, [potk_] = model.compute_with_jvp(["potk"], dict(dx=dx), dict(dx_=v))
    _, [_dx] = model.compute_with_vjp(dict(dx=dx), dict(_potk=w))
    assert total(_dx, v) == pytest.approx(inner(w, potk_), rel=1e-9)


def test_backgrounds():
    cosmology = Cosmology(Om0=0.3)
    pm, _ = make("cube")
    assert FastPMSimulation(STAGES, PT, pm).pt is PT
    for given in (cosmology, type("Astropy", (), dict(Om0=0.3))):
        pt = FastPMSimulation(STAGES, given, pm).pt
        assert pt.D1(0.5) == pytest.approx(PT.D1(0.5), rel=1e-12)
    assert FastPMSimulation([1.0], PT, pm).run.build().compute("dx", dict(rhok=noise(pm))).shape[1] == 3


def test_bad_input():
    pm, _ = make("cube")
    with pytest.raises(ValueError, match="positive scale factors"):
        FastPMSimulation([0.0, 1.0], PT, pm)
    with pytest.raises(ValueError, match="positive scale factors"):
        FastPMSimulation([[0.1, 1.0]], PT, pm)
    with pytest.raises(ValueError, match="whole numbers"):
        FastPMSimulation(STAGES, PT, pm, B=1.2)
    with pytest.raises(ValueError, match="whole numbers"):
        FastPMSimulation(STAGES, PT, pm, B=0)


def test_zero_power_at_k0():
    """A spectrum that diverges at k = 0 leaves the mean zero and everything else finite."""
    pm, _ = make("cube")
    c = fastpm.induce_correlation.build(powerspectrum=lambda k: k**-2.0, pm=pm).compute(
        "c", dict(wnk=noise(pm))
    )
    assert np.isfinite(c.value).all() and abs(c.cmean() if hasattr(c, "cmean") else 0) < 1e-12


@pytest.mark.serial
def test_second_order_on_a_line_is_zero():
    pm = ParticleMesh([16], BoxSize=8.0, comm=MPI.COMM_SELF)
    source = fastpm.lpt2src.build(pm=pm).compute("rho_lpt2", dict(rhok=noise(pm)))
    assert not source.value.any()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_lpt_is_a_quadratic_function(dtype):
    """Doubling the density doubles the first order and quadruples the second."""
    pm, _ = make("uneven", dtype=dtype)
    model = fastpm.lpt.build(q=pm.generate_uniform_particle_grid(shift=0.5).astype(dtype), pm=pm)
    x = noise(pm)
    one, two = (model.compute(["dx1", "dx2"], dict(rhok=x * c)) for c in (1.0, 2.0))
    rtol = 1e-4 if dtype == "f4" else 1e-10
    for order in (0, 1):
        np.testing.assert_allclose(
            two[order], one[order] * 2.0 ** (order + 1), atol=rtol * abs(two[order]).max()
        )


@pytest.mark.parametrize("shape", ["uneven", "cube"])
def test_second_order_by_transforms_is_that_by_differences(shape, monkeypatch):
    """Without compiled loops, or where the last axis is divided, the same differences are taken in Fourier space."""
    pm, _ = make(shape)
    found = []
    for whole in True, False:
        if not whole:
            for module in force, lpt:
                monkeypatch.setattr(module, "differences_serve", lambda pm, order: False)
        with Builder() as m:
            m.output(source=fastpm.lpt2src(m.input("rhok"), pm))
        x, v, w = noise(pm, 1), noise(pm, 2), noise(pm, 3).c2r()
        (source,), (_x,) = m.compute_with_vjp(dict(rhok=x), dict(_source=w))
        _, source_ = m.compute_with_jvp("source", dict(rhok=x), dict(rhok_=v))
        found.append([source, source_, _x])
    assert abs(found[0][0].value).max() > 0
    for one, other in zip(*found):
        scale = COMM.allreduce(abs(one.value).max(initial=0.0), op=MPI.MAX)
        np.testing.assert_allclose(other.value, one.value, atol=1e-10 * scale)

"""Where values live on many ranks, and the sums over ranks that follow from it."""

import numpy as np
import pytest
from mpi4py import MPI

from helpers import examples
from vmad_lit import Builder, autooperator, operator
from vmad_lit.core.chain import checkpoint
from vmad_lit.core.error import BadArgument, PlacementError
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.placement import PlacesOnRanks
from vmad_lit.lib import fastpm, linalg, mpi

comm = MPI.COMM_WORLD
alone = comm.size == 1

pytestmark = pytest.mark.collective


def rows(n=None):
    """This rank's part of the numbers 1, 2, 3, ..: none on rank 0 of several, two on rank 1, four on rank 2."""
    counts = [3] if alone else [2 * rank for rank in range(comm.size)]
    start = sum(counts[: comm.rank])
    return 1.0 + np.arange(start, start + counts[comm.rank]), 1.0 + np.arange(sum(counts))


def field(seed=3, kind="real"):
    pm = fastpm.ParticleMesh(Nmesh=[4, 4, 4], BoxSize=4.0, comm=comm)
    return pm.generate_whitenoise(seed, type=kind)


def gradient(build, outputs=("y",), **values):
    with Builder() as m:
        build(m)
    out, grads = m.compute_with_vjp(values, {f"_{name}": 1.0 for name in outputs})
    return out[0], grads


def test_a_sum_of_a_field_is_not_summed_again():
    x = field()
    with Builder() as m:
        r = m.input("x")
        m.output(y=mpi.allreduce(linalg.sum(r * r), comm), z=mpi.allreduce(fastpm.to_scalar(r), comm))
    (y, z), (_x,) = m.compute_with_vjp(dict(x=x), dict(_y=1.0, _z=1.0))
    assert np.isclose(y, x.cnorm()) and np.isclose(z, x.cnorm())
    assert np.allclose(_x, 4 * x.value)
    _, y_ = m.compute_with_jvp("y", dict(x=x), dict(x_=x))
    assert np.isclose(y_, 2 * x.cnorm())


@pytest.mark.parametrize("through", ["nothing", "allbcast", "allbcast twice", "place"])
@pytest.mark.parametrize("declared", [None, "replicated"])
def test_a_number_beside_a_field_is_summed_once(through, declared):
    x = field()
    bring = {
        "nothing": lambda b: b,
        "allbcast": lambda b: mpi.allbcast(b, comm),
        "allbcast twice": lambda b: mpi.allbcast(mpi.allbcast(b, comm), comm),
        "place": lambda b: mpi.place(b, "partitioned", comm),
    }[through]
    if through == "place" and declared is None:
        pytest.skip("of a value of which nothing is known each rank may have its own")

    def build(m):
        r, b = m.input("x"), m.input("b", placement=declared)
        c = bring(b)
        m.output(y=linalg.sum(r * c + c**2 * r - c) + fastpm.to_scalar(r / c))

    y, (_x, _b) = gradient(build, x=x, b=2.0)
    total, square = x.csum(), x.cnorm()
    assert np.isclose(y, 6 * total - 2 * x.csize + square / 4)
    assert np.isclose(_b, 5 * total - x.csize - square / 4)


@pytest.mark.parametrize("through_allbcast", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_a_number_beside_a_partitioned_array_is_summed_once(through_allbcast, constant):
    t, everything = rows()

    def build(m):
        a = m.input("a", placement="replicated")
        if constant:
            s = mpi.place(t, "partitioned", comm)
        else:
            s = m.input("t", placement="partitioned")
        b = mpi.allbcast(a, comm) if through_allbcast else a
        m.output(y=mpi.allreduce(linalg.sum((b * s - 1) ** 2), comm))

    given = dict(a=3.0) if constant else dict(a=3.0, t=t)
    y, (_a, *_) = gradient(build, **given)
    assert np.isclose(y, ((3 * everything - 1) ** 2).sum())
    assert np.isclose(_a, (2 * (3 * everything - 1) * everything).sum())
    assert len(set(comm.allgather(float(_a)))) == 1


def test_arrays_are_summed_once_for_all_uses():
    t, everything = rows()
    with Builder() as m:
        p = m.input("p", placement="replicated")
        s = m.input("t", placement="partitioned")
        line = linalg.take(p, 0) + linalg.take(p, 1) * s + linalg.take(p, 0) * s**2
        m.output(y=mpi.allreduce(linalg.sum(line**2), comm))
    tape = m.compute("y", dict(p=np.array([1.0, 2.0]), t=t), return_tape=True)[1]
    vjp = tape.get_vjp()
    assert alone or sum(node.operator is mpi.sum_of_shares for node in vjp) == 3
    _p = vjp.compute("_p", dict(_y=1.0))
    e = everything
    r = 1 + 2 * e + e**2
    assert np.allclose(_p, [(2 * r * (1 + e**2)).sum(), (2 * r * e).sum()])


def test_second_derivatives_are_summed_too():
    t, everything = rows()
    with Builder() as m:
        a, s = m.input("a", placement="replicated"), m.input("t", placement="partitioned")
        m.output(y=mpi.allreduce(linalg.sum((a * s) ** 3), comm))
    y, (_a, _), (_a_, _) = m.compute_with_hvp("y", dict(a=2.0, t=t), dict(a_=1.0))
    assert np.isclose(_a, 12 * (everything**3).sum()) and np.isclose(_a_, 12 * (everything**3).sum())


def test_operators_of_the_user_are_element_by_element():
    @operator
    class fma:
        ain, aout = "a, x, b", "y"

        def apl(node, a, x, b):
            return a * x + b

        def vjp(node, _y, a, x):
            return dict(_a=(_y * x).sum(), _x=_y * a, _b=_y.sum())

    t, everything = rows()

    def build(m):
        a, b = m.input("a", "b", placement="replicated")
        s = m.input("t", placement="partitioned")
        m.output(y=mpi.allreduce(linalg.sum(fma(a, s, b) ** 2), comm))

    y, (_a, _b, _) = gradient(build, a=2.0, b=1.0, t=t)
    r = 2 * everything + 1
    assert np.isclose(_a, (2 * r * everything).sum()) and np.isclose(_b, (2 * r).sum())


def test_types_that_an_operator_declares_may_be_wrong():
    """Programs of the reference system declare fields and return arrays."""

    @operator
    class masked:
        ain, aout = {"x": "RealField"}, {"y": "RealField"}

        def apl(node, x, mask):
            return x.value[mask]

        def vjp(node, _y, x, mask):
            _x = x.pm.create(type="real", value=0)
            _x.value[mask] = _y
            return dict(_x=_x)

    x = field()
    mask = x.value > 0

    def build(m):
        m.output(y=mpi.allreduce(linalg.sum(linalg.absolute(masked(m.input("x"), mask)) ** 2), comm))

    y, (_x,) = gradient(build, x=x)
    assert np.isclose(y, comm.allreduce((x.value[mask] ** 2).sum()))
    assert np.allclose(_x, 2 * x.value * mask)


def test_masses_and_tables_are_summed_once():
    x = field()
    pm = x.pm
    q = np.random.default_rng(comm.rank).uniform(0, 4, (5 if comm.rank else 0, 3))

    def weigh(through):
        def build(m):
            mass, s = m.input("mass"), m.input("q")
            w = through(mass)
            m.output(y=fastpm.to_scalar(fastpm.paint(s, w, fastpm.decompose(s, pm), pm)))

        return gradient(build, mass=2.0, q=q)

    y, (_mass, _) = weigh(lambda w: w)
    assert np.isclose(_mass, y)
    assert np.isclose(weigh(lambda w: mpi.allbcast(w, comm))[1][0], y)

    def filtered(through):
        def build(m):
            tf, s = m.input("tf"), m.input("x")
            digitizer = fastpm.apply_digitized.isotropic_wavenumber([0.0, 1.0, 10.0])
            m.output(y=fastpm.to_scalar(fastpm.apply_digitized(fastpm.r2c(s), through(tf), digitizer)))

        return gradient(build, tf=np.array([1.0, 2.0]), x=x)[1][0]

    assert np.allclose(filtered(lambda tf: tf), filtered(lambda tf: mpi.allbcast(tf, comm)))


def test_models_inside_know_where_their_inputs_live():
    t, everything = rows()

    @autooperator("a, s -> y")
    def residual(a, s):
        return a * s - 1

    @autooperator("x, b -> y")
    def biased(x, b):
        return x * mpi.allbcast(b, comm)

    def build(m):
        a = m.input("a", placement="replicated")
        s = m.input("t", placement="partitioned")
        m.output(y=mpi.allreduce(linalg.sum(residual(a, s) ** 2), comm))

    y, (_a, _) = gradient(build, a=3.0, t=t)
    assert np.isclose(_a, (2 * (3 * everything - 1) * everything).sum())

    x = field()
    for bring in (lambda b: b), (lambda b: mpi.allbcast(b, comm)):

        def build(m):
            r, b = m.input("x", "b")
            m.output(y=fastpm.to_scalar(biased(r, bring(b))))

        y, (_, _b) = gradient(build, x=x, b=3.0)
        assert np.isclose(_b, 2 * y / 3)


def test_moving_values_from_place_to_place():
    """Adjoints of replicated values that are gathered, dealt out or sent around are sums over ranks."""
    a = np.array([1.0, 2.0])
    n = comm.size

    def pulled(build):
        with Builder() as m:
            s = m.input("a", placement="replicated")
            m.output(y=build(s))
        return m.compute_with_vjp(dict(a=a), dict(_y=1.0))[1][0]

    weights = np.arange(1.0, 2 * n + 1)
    by_rank = weights.reshape(n, 2).sum(axis=0)
    everywhere = pulled(lambda s: linalg.sum(mpi.allgather(s, comm) * mpi.place(weights, "replicated", comm)))
    assert np.allclose(everywhere, by_rank)
    sent = pulled(lambda s: mpi.allreduce(linalg.sum(mpi.shift(s, comm) * (comm.rank + 1.0)), comm))
    assert np.allclose(sent, n * (n + 1) / 2)
    to_all = pulled(lambda s: linalg.sum(mpi.bcast(s, comm) * 2.0))
    assert np.allclose(to_all, 2.0)
    dealt = pulled(lambda s: mpi.allreduce(linalg.sum(mpi.scatter(s, comm) ** 2), comm))
    assert np.allclose(dealt, 2 * a)


def refused(build, match, **values):
    with Builder() as m:
        build(m)
    if alone:
        m.compute("y", values)
        return
    with pytest.raises(PlacementError, match=match) as caught:
        m.compute("y", values)
    assert "test_placement.py:" in str(caught.value)


def test_what_cannot_be_meant():
    t, _ = rows()

    def summand(m):
        s = m.input("t", placement="partitioned")
        m.output(y=linalg.sum(s * 2.0))

    refused(summand, "own summand of the output 'y'", t=t)

    def root_of_a_summand(m):
        s = m.input("t", placement="partitioned")
        m.output(y=linalg.sum(s**2) ** 0.5)

    refused(root_of_a_summand, "own summand", t=t)

    def own_norm(m):
        s = m.input("t", placement="partitioned")
        m.output(y=s / (1 + linalg.sum(s)))

    refused(own_norm, "meets a value of which each rank has a part", t=t)

    def root_only(m):
        s = m.input("t", placement="partitioned")
        m.output(y=mpi.gather(s, comm) * 2.0)

    refused(root_only, "lives on the root only", t=t)

    def sum_on_the_root(m):
        s = m.input("t", placement="partitioned")
        m.output(y=mpi.allreduce(mpi.gather(s, comm), comm))

    refused(sum_on_the_root, "lives on the root only", t=t)

    def spread_summand(m):
        s = m.input("t", placement="partitioned")
        m.output(y=mpi.allreduce(mpi.allbcast(linalg.sum(s), comm), comm))

    refused(spread_summand, "each rank has only a summand of 'x'", t=t)


def test_a_declared_input_that_meets_the_unknown():
    t, everything = rows()

    def unknown(m):
        a = m.input("a", placement="replicated")
        m.output(y=mpi.allreduce(linalg.sum(a**2 * t), comm))

    refused(unknown, "meets 'x2', of which nothing is known", a=2.0)
    for kind, factor, constant in (
        ("replicated", 1, np.array([1.0, 2.0])),
        ("partitioned", comm.size, np.ones(2)),
    ):

        def known(m):
            a = m.input("a", placement="replicated")
            m.output(y=mpi.allreduce(linalg.sum(a**2 * mpi.place(constant, kind, comm)), comm))

        y, (_a,) = gradient(known, a=2.0)
        assert y == 4 * factor * constant.sum() and _a == 4 * factor * constant.sum()


def test_each_rank_may_mean_its_own():
    t, _ = rows()
    with Builder() as m:
        s = m.input("t", placement="partitioned")
        m.output(
            y=s / (1 + mpi.place(linalg.sum(s), "partitioned", comm)),
            n=mpi.place(linalg.sum(s), "partitioned", comm),
        )
    assert np.allclose(m.compute("y", dict(t=t)), t / (1 + t.sum()))
    assert m.compute("n", dict(t=t)) == t.sum()


def test_one_rank_of_several_communicators():
    """A field of each rank on its own has a sum of each rank's own."""
    pm = fastpm.ParticleMesh(Nmesh=[4, 4, 4], BoxSize=4.0, comm=MPI.COMM_SELF)
    x = pm.create(type="real", value=1.0 + comm.rank)
    with Builder() as m:
        r = m.input("x")
        m.output(y=mpi.allreduce(linalg.sum(r), comm))
    y, (_x,) = m.compute_with_vjp(dict(x=x), dict(_y=1.0))
    assert np.isclose(y[0], 64 * comm.size * (comm.size + 1) / 2) and np.allclose(_x, 1.0)


@pytest.mark.skipif(alone, reason="needs ranks that differ")
@pytest.mark.parametrize("bad", [np.ma.masked_array([1.0, 2.0], [True, False]), np.array(["one", "two"])])
def test_what_one_rank_refuses_all_refuse(bad):
    with Builder() as m:
        m.output(y=mpi.allreduce(linalg.sum(m.input("x") ** 2), comm))
    good, last = np.ones(2), comm.size - 1
    x = bad if comm.rank == last else good
    for compute in (
        lambda: m.compute("y", dict(x=x)),
        lambda: m.compute_with_vjp(dict(x=x), dict(_y=1.0)),
        lambda: m.compute_with_jvp("y", dict(x=good), dict(x_=x)),
        lambda: m.compute_with_vjp(dict(x=good), dict(_y=np.ones(3) if comm.rank == last else 1.0)),
    ):
        with pytest.raises(BadArgument, match=f"rank {last}: '"):
            compute()
    assert m.compute("y", dict(x=good)) == 2 * comm.size


def test_a_value_that_is_not_what_it_is_taken_for():
    with Builder() as m:
        a = mpi.place(m.input("a"), "replicated", comm)
        m.output(y=mpi.allreduce(a * 2.0, comm))
    assert m.compute("y", dict(a=3.0)) == 6.0
    if not alone:
        with pytest.raises(ValueError, match="taken for replicated"):
            m.compute("y", dict(a=3.0 + comm.rank))


def test_what_is_not_known_is_summed_as_ever():
    with Builder() as m:
        a, b = m.input("a", "b")
        m.output(y=mpi.allreduce(a, comm), z=mpi.allreduce(mpi.allbcast(b, comm) * (comm.rank + 1), comm))
    n = comm.size
    (y, z), (_a, _b) = m.compute_with_vjp(dict(a=2.0, b=2.0), dict(_y=1.0, _z=1.0))
    assert y == 2.0 * n and z == n * (n + 1) and _a == 1 and _b == n * (n + 1) / 2


def test_a_program_implies_that_an_input_is_replicated():
    t, everything = rows()

    def build(m):
        a = m.input("a")
        s = mpi.place(t, "partitioned", comm)
        m.output(y=mpi.allreduce(linalg.sum(mpi.allbcast(a, comm) * s + a**2 * s), comm))

    y, (_a,) = gradient(build, a=2.0)
    assert np.isclose(y, 6 * everything.sum()) and np.isclose(_a, 5 * everything.sum())


TRANSFERS = {
    "exp": lambda s, k: linalg.exp(linalg.broadcast_to(s, k.shape) * -k),
    "power": lambda s, k: (k + 1.0) ** s,
    "sum": lambda s, k: linalg.exp(-(s**2) * k) + s,
    "allbcast": lambda s, k: mpi.allbcast(s, comm) * k,
    "number": lambda s, k: s * 2.0,
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_an_array_beside_a_field_is_in_parts(name):
    """Filters of modes that are made of a number and this rank's wavenumbers."""

    def slope(on):
        modes = fastpm.ParticleMesh([4, 4, 4], BoxSize=4.0, comm=on).generate_whitenoise(3, type="real").r2c()
        k = np.sqrt(sum(i**2 for i in modes.x))
        with Builder() as m:
            s = m.input("s")
            m.output(y=fastpm.to_scalar(fastpm.c2r(modes * TRANSFERS[name](s, k))))
        (y,), (_s,) = m.compute_with_vjp(dict(s=0.7), dict(_y=1.0))
        above, below = (m.compute("y", dict(s=0.7 + h)) for h in (1e-6, -1e-6))
        return [float(y), float(_s), (above - below) / 2e-6]

    y, _s, difference = slope(comm)
    assert np.isclose(_s, difference, rtol=1e-6)
    if name != "allbcast":
        np.testing.assert_allclose([y, _s], slope(MPI.COMM_SELF)[:2], rtol=1e-10)


def test_a_number_beside_a_field_is_replicated_at_its_other_uses():
    x, (t, everything) = field(), rows()

    def build(m):
        a, r = m.input("a", "x")
        s = mpi.place(t, "partitioned", comm)
        m.output(y=mpi.allreduce(linalg.sum(a**2 * s), comm) + linalg.sum(r * a))

    y, (_a, _x) = gradient(build, a=2.0, x=x)
    assert np.isclose(_a, 4 * everything.sum() + x.csum())


@pytest.mark.parametrize("declared", [None, "replicated"])
@pytest.mark.parametrize("through_allbcast", [False, True])
@pytest.mark.parametrize("kind", ["plain", "forgetful", "chain"])
def test_models_inside_make_the_same_of_any_number_of_ranks(kind, through_allbcast, declared):
    def derivatives(on):
        x = fastpm.ParticleMesh([4, 4, 4], BoxSize=4.0, comm=on).generate_whitenoise(3, type="real") * 0.1

        @autooperator("x, a -> y")
        def step(x, a):
            return linalg.tanh(
                x * (mpi.allreduce(linalg.sum(x * x), on) * 0.1 + a) + a * mpi.allbcast(a, on) * x
            )

        inside = dict(plain=step, forgetful=step.forgetful, chain=checkpoint(step, 3, ram=2))[kind]
        with Builder() as m:
            s, a = m.input("x"), m.input("a", placement=declared, comm=on)
            b = mpi.allbcast(a, on) if through_allbcast else a
            m.output(y=mpi.allreduce(fastpm.to_scalar(inside(s, b)), on))
        (y,), (_x, _a) = m.compute_with_vjp(dict(x=x, a=0.7), dict(_y=1.0))
        _, _, (_x_, _a_) = m.compute_with_hvp("y", dict(x=x, a=0.7), dict(a_=1.0, x_=x))
        return [float(v) for v in (y, _a, _x.cdot(x), _a_, _x_.cdot(x))]

    np.testing.assert_allclose(derivatives(comm), derivatives(MPI.COMM_SELF), rtol=1e-10)


def test_print_shows_placements():
    with Builder() as m:
        a, s = m.input("a", placement="replicated"), m.input("t", placement="partitioned")
        m.output(y=mpi.allreduce(linalg.sum(a * s), comm))
    text = str(m)
    assert "a: replicated" in text and "t: partitioned" in text
    assert "mul-0.y: partitioned" in text and ": partial" in text and "allreduce-2.y: replicated" in text
    assert "test_placement.py:" in text


def test_a_placement_that_there_is_not():
    assert comm.size  # the error is the same on all ranks
    with Builder() as m, pytest.raises(BadArgument, match="did you mean 'partitioned'"):
        m.input("x", placement="partitoned")


def test_where_fields_and_particles_live():
    x = field()
    with Builder() as m:
        r = m.input("x", placement="partitioned")
        modes = fastpm.r2c(r)
        q = mpi.place(x.pm.generate_uniform_particle_grid(shift=0.0), "partitioned", comm)
        layout = fastpm.decompose(q, x.pm)
        values = fastpm.readout(fastpm.c2r(modes), q, layout)
        m.output(
            modes=modes, values=values, power=fastpm.to_scalar(modes), n=linalg.sum(values), shifted=r + 1.0
        )
    of = PlacesOnRanks(m, list(m)).of
    found = {name: str(of[symbol]) for name, symbol in m._outputs.items()}
    assert found == dict(
        modes="partitioned", values="partitioned", power="replicated", n="partial", shifted="partitioned"
    )


def random_program(rng, on):
    """A program of numbers, fields and partitioned arrays, with numbers sent through allbcast, or not, here and there.

    Values stay of order one. The same generator gives the same program on any communicator.
    """
    pm = fastpm.ParticleMesh(Nmesh=[4, 4, 4], BoxSize=4.0, comm=on)
    fields = [pm.generate_whitenoise(seed, type="real") * 0.1 for seed in rng.integers(1, 100, 2)]
    q = np.random.default_rng(7).uniform(0, 4, (9, 3))[on.rank :: on.size]
    with Builder() as m:
        numbers = list(m.input("a", "b", placement="replicated", comm=on))
        waves = list(m.input("f", "g"))
        arrays = [fastpm.readout(waves[0], q, fastpm.decompose(q, pm))]

        def pick(among):
            return among[rng.integers(len(among))]

        def number():
            b = pick(numbers)
            return mpi.allbcast(b, on) if rng.integers(3) == 0 else b

        for _ in range(rng.integers(2, 7)):
            choice = rng.integers(7)
            if choice == 0:
                waves.append(linalg.sin(pick(waves) * number()))
            elif choice == 1:
                waves.append(pick(waves) * pick(waves) + number())
            elif choice == 2:
                arrays.append(linalg.cos(pick(arrays) * number() - number()))
            elif choice == 3:
                numbers.append(linalg.tanh(linalg.sum(pick(waves)) * 0.1))
            elif choice == 4:
                numbers.append(linalg.tanh(mpi.allreduce(linalg.sum(pick(arrays) * 0.1), on)))
            elif choice == 5:
                numbers.append(linalg.tanh(pick(numbers) * pick(numbers) + 0.5))
            else:
                numbers.append(linalg.sin(mpi.allreduce(fastpm.to_scalar(pick(waves)) * 0.01, on)))
        total = linalg.sum(waves[-1]) + mpi.allreduce(linalg.sum(arrays[-1] ** 2), on)
        m.output(y=total + mpi.allreduce(pick(numbers), on) * numbers[-1])
    init = dict(a=0.7, b=-0.4, f=fields[0], g=fields[1])
    (y,), (_a, _b, _f, _g) = m.compute_with_vjp(init, dict(_y=1.0))
    y_ = m.compute_with_jvp("y", init, dict(a_=0.3, b_=0.2, f_=fields[1], g_=fields[0]))[1]
    slopes = [0.0 if g is ZeroGradient else g.cdot(h) for g in (_f, _g) for h in fields]
    return [float(v) for v in (y, _a, _b, y_, *slopes)]


@pytest.mark.parametrize("seed", range(examples(12)))
def test_random_programs_do_not_know_how_many_they_are(seed):
    found = random_program(np.random.default_rng(seed), comm)
    expected = random_program(np.random.default_rng(seed), MPI.COMM_SELF)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert len(set(map(tuple, comm.allgather(found)))) == 1

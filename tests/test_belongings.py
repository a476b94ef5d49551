"""What goes into a model, and what comes out, belongs to the caller; what it means is what he meant."""

import copy
import itertools
import pickle
from fractions import Fraction

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from vmad_lit import Builder, autooperator, operator
from vmad_lit.core import handover
from vmad_lit.core.chain import checkpoint
from vmad_lit.core.doors import admit
from vmad_lit.core.error import BadArgument
from vmad_lit.core.valuetypes import ValueType, register
from vmad_lit.lib import linalg
from vmad_lit.testing import check, check_recomputation

V = np.array([1.0, 2.0, 4.0])
KEPT = np.array([3.0, 5.0, 7.0])


@operator
class keeper:
    """Hands out what it keeps itself, in both directions."""

    ain, aout = "x", "y"

    def apl(node, x):
        return KEPT

    def vjp(node, _y):
        return KEPT

    def jvp(node, x_):
        return KEPT


@autooperator("x -> y")
def exponential(x):
    return linalg.exp(x)


REPLAY = exponential.precompute(x=V)

MODELS = {
    "the input": lambda a, b: a,
    "a view of the input": lambda a, b: linalg.reshape(a, (3, 1)),
    "a part of the input": lambda a, b: linalg.getitem(a, slice(1, None)),
    "what is recorded": lambda a, b: linalg.exp(a),
    "a view of what is recorded": lambda a, b: linalg.transpose(linalg.exp(a), None),
    "a sum": lambda a, b: a + b,
    "a difference": lambda a, b: a - b,
    "a number away": lambda a, b: a + 1.0,
    "repeated": lambda a, b: linalg.broadcast_to(a, (2, 3)),
    "summed": lambda a, b: linalg.sum(a),
    "a constant": lambda a, b: KEPT,
    "a list": lambda a, b: [a, b, a],
    "what an operator keeps": lambda a, b: keeper(a),
    "what a function returns": lambda a, b: a.eval(lambda x: x[::-1]),
    "from a model": lambda a, b: exponential(a),
    "from one that forgets": lambda a, b: exponential.forgetful(a),
    "from a chain": lambda a, b: checkpoint(exponential, 2, ram=1)(a),
    "from a tape that is replayed": lambda a, b: REPLAY(a),
}


def arrays_in(value):
    items = value if isinstance(value, (list, tuple)) else [value]
    return [x for item in items for x in (arrays_in(item) if isinstance(item, (list, tuple)) else [item])]


def ones_like(value):
    return [ones_like(item) for item in value] if isinstance(value, list) else np.ones_like(value)


def assert_own(results, *others, writeable=True):
    """No two of the results share memory, nor with the others; or else they cannot be written to."""
    results = [x for x in arrays_in(results) if isinstance(x, np.ndarray)]
    others = [x for x in arrays_in(list(others)) if isinstance(x, np.ndarray)]
    for x, y in [*itertools.combinations(results, 2), *itertools.product(results, others)]:
        if np.shares_memory(x, y):
            assert not writeable and not x.flags.writeable
    assert not writeable or all(x.flags.writeable for x in results)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_results_belong_to_the_caller(name, copies):
    v = V.copy()
    with Builder() as m:
        a, b = m.input("a", "b")
        y = MODELS[name](a, b)
        m.output(y=y, z=y)
    init = dict(a=v, b=v)
    own = [v, KEPT]
    results = m.compute(["y", "z", "y"], init, copy=copies)
    assert_own(results, *own, writeable=copies)
    out, tape = m.compute(["y", "z"], init, return_tape=True, copy=copies)
    assert_own(out, *own, *arrays_of(tape), writeable=copies)
    assert not any(np.shares_memory(x, v) for x in arrays_of(tape))
    seed = ones_like(out[0])
    for _ in range(2):
        gradient = tape.get_vjp().compute(["_a", "_b"], dict(_y=seed, _z=seed), copy=copies)
        assert_own(gradient, *own, seed, *arrays_of(tape), writeable=copies)
    tangents = tape.get_jvp().compute(["y_", "z_"], dict(a_=v, b_=v), copy=copies)
    assert_own(tangents, *own, *arrays_of(tape), writeable=copies)
    assert_own(m.compute_with_vjp(init, dict(_y=seed, _z=seed), copy=copies), *own, seed, writeable=copies)
    assert_own(m.compute_with_jvp(["y", "z"], init, dict(a_=v, b_=v), copy=copies), *own, writeable=copies)
    assert_own(m.compute_with_gnDp(["y", "z"], init, dict(a_=v, b_=v), copy=copies), *own, writeable=copies)
    assert_array_equal(v, V)
    assert_array_equal(KEPT, [3.0, 5.0, 7.0])


def arrays_of(tape):
    return [
        x for record in tape.held() for x in arrays_in(list(record.values())) if isinstance(x, np.ndarray)
    ]


def test_second_derivatives_belong_to_the_caller():
    with Builder() as m:
        a = m.input("a")
        m.output(y=a * a)
    seed, v = np.ones(3), V.copy()
    results = m.compute_with_hvp("y", dict(a=v), dict(a_=seed, _y=seed))
    assert_own([results[0], *results[1], *results[2]], v, seed)


def test_results_may_be_changed_in_place():
    with Builder() as m:
        a = m.input("a")
        m.output(y=linalg.exp(a))
    v = V.copy()
    y, tape = m.compute("y", dict(a=v), return_tape=True)
    y *= 0
    v *= 0
    assert_allclose(tape.get_vjp().compute("_a", dict(_y=np.ones(3))), np.exp(V))
    with Builder() as m:
        a, b = m.input("a", "b")
        m.output(y=a + b)
    seed = np.ones(3)
    _, gradient = m.compute_with_vjp(dict(a=V, b=V), dict(_y=seed))
    for part in gradient:
        part *= 0.5
    assert_array_equal(gradient, [[0.5] * 3] * 2)
    assert_array_equal(seed, 1)
    _, gradient = m.compute_with_vjp(dict(a=V, b=V), dict(_y=seed), copy=False)
    with pytest.raises(ValueError, match="read-only"):
        gradient[0] *= 0.5


def test_new_arrays_are_handed_over_as_they_are(monkeypatch):
    copied = []
    monkeypatch.setattr(handover, "duplicate", lambda x: copied.append(x) or np.array(x))
    with Builder() as m:
        a = m.input("a")
        b = linalg.exp(a)
        m.output(y=linalg.sum(b * b), b=b, c=linalg.reshape(b * 2.0, (3, 1)))
    m.compute(["y", "b", "c"], dict(a=V))
    m.compute_with_vjp(dict(a=V), dict(_y=1.0, _b=np.ones(3)))
    m.compute_with_jvp(["y", "b"], dict(a=V), dict(a_=V))
    assert copied == []


@pytest.mark.parametrize("owner", [bytearray(24), memoryview(bytearray(24))])
def test_memory_that_others_may_have_is_copied(owner):
    with Builder() as m:
        a = m.input("a")
        m.output(y=a.eval(lambda x: np.frombuffer(owner)))
    m.compute("y", dict(a=V))[:] = 1.0
    assert_array_equal(np.frombuffer(owner), 0)


class Pair:
    def __init__(self, x, y):
        self.x, self.y, self.again = x, y, x

    def __mul__(self, other):
        return Pair(self.x * other, self.y * other)

    def __add__(self, other):
        return Pair(self.x + other.x, self.y + other.y)


@register(Pair)
class Pairs(ValueType):
    def take_apart(self, x):
        return lambda parts: Pair(*parts), [x.x, x.y]


def test_values_with_parts_belong_to_the_caller():
    pair = Pair(V.copy(), V.copy())
    with Builder() as m:
        a = m.input("a")
        b = a * 2.0
        m.output(a=a, b=b, c=b, x=b.eval(lambda b: b.x))
    for copies in True, False:
        a, b, c, x = m.compute(["a", "b", "c", "x"], dict(a=pair), copy=copies)
        assert_own([p for y in (a, b, c) for p in (y.x, y.y)] + [x], pair.x, pair.y, writeable=copies)
        assert_array_equal([a.y, b.y / 2, c.x / 2, x / 2], [V] * 4)


# What is changed behind a model's back


def test_a_hyper_parameter_that_was_changed_is_seen_by_the_next_run():
    class Settings:
        n = 1

    @autooperator("x -> y")
    def scale(x, k):
        return x * float(np.sum(k.n if isinstance(k, Settings) else k[0]))

    def change(k):
        k *= 2

    settings = Settings()
    settings.n = 1
    for k, changed in (np.ones(2), change), ([1.0], lambda k: k.__setitem__(0, 2.0)), (settings, double):
        for fixed in True, False:
            with Builder() as m:
                x = m.input("x")
                m.output(y=scale(x, k if fixed else m.input("k")))
            before = m.compute("y", dict(x=1.0, k=k))
            changed(k)
            after = m.compute("y", dict(x=1.0, k=k))
            if type(k) is not list or not fixed:
                assert after == (2 * before if type(k) is not list else 2.0)


def double(settings):
    settings.n *= 2


@operator
class weighted:
    ain, aout = "x", "y"

    def apl(node, x, k):
        return x * k

    def vjp(node, _y, k):
        return _y * k


@autooperator("x -> y")
def weigh(x, k):
    return weighted(x, k)


CONSTANT = np.ones(3)


@autooperator("x -> y")
def weigh_by_a_constant(x, k):
    return weighted(x, CONSTANT) * k[0]


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(
    "operator",
    [weighted, weigh, weigh.forgetful, weigh_by_a_constant, checkpoint(weigh, 2, ram=1), linalg.multiply],
    ids=str,
)
def test_what_is_on_a_tape_is_seen_or_refused_if_it_changes(operator, fixed):
    k = np.ones(3)
    with Builder() as m:
        x = m.input("x")
        m.output(y=operator(x, k if fixed else m.input("k")))
    for changes in False, True:
        _, tape = m.compute("y", dict(x=V, k=k), return_tape=True)
        if changes:
            k *= 2
            CONSTANT[...] = 2
        try:
            gradient = tape.get_vjp().compute("_x", dict(_y=np.ones(3)))
        except BadArgument as error:
            assert changes and "changed in place" in str(error)
        else:
            assert not (changes and fixed)
            assert_array_equal(gradient, 1)
        finally:
            CONSTANT[...] = 1
            k[...] = 1


def test_models_are_made_of_copies_of_their_hyper_parameters():
    k = np.ones(3)
    bound, model = weigh.bind(k=k), weigh.build(k=k)
    k *= 2
    with Builder() as m:
        x = m.input("x")
        m.output(y=bound(x))
    assert_array_equal([m.compute("y", dict(x=V)), model.compute("y", dict(x=V))], [V, V])


def test_large_hyper_parameters_are_not_copied_and_compared_in_parts(monkeypatch):
    copied = []
    monkeypatch.setattr(handover, "duplicate", lambda x: copied.append(x) or np.array(x))

    @autooperator("x -> y")
    def scale(x, k):
        return x * float(k[0])

    k = np.ones(2**18)
    with Builder() as m:
        m.output(y=scale(m.input("x"), k))
    assert m.compute("y", dict(x=1.0)) == 1.0
    k *= 2
    assert m.compute("y", dict(x=1.0)) == 2.0 and not copied


# Random numbers


@operator
class jitter:
    """Multiplies and shifts by random numbers, and draws the former again for its derivatives."""

    ain, aout = "x", "y"

    def apl(node, x):
        return x * node.rng.normal(size=3) + node.rng.normal(size=3)

    def vjp(node, _y):
        return _y * node.rng.normal(size=3)

    def jvp(node, x_):
        return x_ * node.rng.normal(size=3)

    def hvp(node, _y, x_):
        return 0


class Unlike:
    draw = np.random.default_rng(3).normal


@operator
class unlike:
    """Draws from elsewhere."""

    ain, aout = "x", "y"

    def apl(node, x):
        r = Unlike.draw(size=3)
        return dict(y=x * r, r=r)

    def vjp(node, _y, r):
        return _y * r


def step_of(op):
    @autooperator("x -> y")
    def step(x):
        return op(op(x) * x)

    return step


def chain_of(make):
    with Builder() as m:
        m.output(y=make(m.input("x")))
    return m


AGAIN = dict(ram=1), dict(ram=1, disk=1), dict(schedule="disk")


def test_random_numbers_come_back():
    step = step_of(jitter)
    models = (
        [chain_of(step), chain_of(step.forgetful)],
        [chain_of(checkpoint(step, 4, **policy)) for policy in (dict(schedule="tapes"), *AGAIN)],
    )
    for first, *others in models:
        check(first, dict(x=V))
        [y], [gradient] = first.compute_with_vjp(dict(x=V), dict(_y=V))
        for m in others:
            with check_recomputation():
                again, [same] = m.compute_with_vjp(dict(x=V), dict(_y=V))
            assert_array_equal(again[0], y)
            assert_array_equal(same, gradient)
        first.seed = 2**70
        assert not np.any(first.compute("y", dict(x=V)) == y)


def test_nodes_steps_runs_and_guests_have_their_own_random_numbers():
    seen = []

    @operator
    class draw:
        ain, aout = "x", "y"

        def apl(node, x):
            seen.extend([node.rng.integers(2**62), node.rng.integers(2**62)])
            return x

        def vjp(node, _y):
            return _y

    inner = chain_of(lambda x: draw(x))
    twice = autooperator("x -> y")(lambda x: draw(draw(x)))
    m = chain_of(
        lambda x: checkpoint(twice, 3, ram=1)(twice(twice(draw(x.eval(lambda x: guests(inner, x))))))
    )
    m.compute("y", dict(x=1.0))
    first = list(seen)
    assert len(set(first)) == len(first) == 2 * (2 + 1 + 4 + 6)
    m.compute("y", dict(x=1.0))
    assert seen[len(first) :] == first


def guests(model, x):
    return model.compute("y", dict(x=model.compute("y", dict(x=x))))


@pytest.mark.parametrize("seed", [-1, 1.5, "one", None])
def test_a_seed_is_a_whole_number(seed):
    m = chain_of(lambda x: jitter(x))
    m.seed = seed
    with pytest.raises(BadArgument, match="not negative"):
        m.compute("y", dict(x=V))


@pytest.mark.parametrize(
    "again", [step_of(unlike).forgetful, *(checkpoint(step_of(unlike), 4, **p) for p in AGAIN)]
)
def test_an_operator_that_does_something_else_is_told(again):
    with pytest.raises(AssertionError, match=r"unlike-0, built at .*test_belongings.py:\d+, is not the same"):
        with check_recomputation():
            chain_of(again).compute_with_vjp(dict(x=V), dict(_y=V))


# Copies


@operator
class cube:
    ain, aout = "x", "y"

    def apl(node, x, k=2.0):
        return k * x**3

    def vjp(node, _y, x, k):
        return 3 * k * x * x * _y

    def jvp(node, x_, x, k):
        return 3 * k * x * x * x_


@autooperator("x, y -> z")
def rounds(x, y, n=2):
    for _ in range(n):
        x = linalg.exp(-x) * y + cube(x, 1.5)
    return x


@autooperator("x -> z")
def wave(x, i, k):
    return linalg.sin(x) * k + float(i)


COPIED = {
    "arithmetic": lambda x, y: linalg.exp(x) * y + 2.0 * x - x / 3.0,
    "a constant": lambda x, y: x * np.arange(3.0) + y,
    "a list": lambda x, y: linalg.stack([x, y, x * y], 0),
    "an attribute": lambda x, y: x.eval(np.sin) + y,
    "a model": lambda x, y: rounds(x, y, 3),
    "one that forgets": lambda x, y: rounds.forgetful(x, y),
    "one that is bound": lambda x, y: rounds.bind(n=2)(x, y),
    "one that replays": lambda x, y: rounds.precompute(x=V / 10, y=V)(x, y),
    "a chain": lambda x, y: checkpoint(wave, 3, ram=1)(x, k=2.0) * y,
    "a chain on disk": lambda x, y: checkpoint(wave, 3, ram=1, disk=1)(x, k=2.0) * y,
    "a hyper-parameter at run time": lambda x, y: wave(x, 1, y),
    "random numbers": lambda x, y: jitter(x) * y,
}
HOW = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", COPIED)
def test_copies_are_whole(name, how):
    copied, init = HOW[how], dict(x=V / 10, y=V)
    with Builder() as m:
        x, y = m.input("x", "y")
        m.output(z=COPIED[name](x, y))
    m.seed = 5

    def values(m):
        z = m.compute("z", init)
        _, gradient = m.compute_with_vjp(init, dict(_z=np.ones_like(z)))
        return [z, *gradient, m.compute_with_jvp("z", init, dict(x_=V))[1]]

    other = copied(m)
    assert other is not m and type(other) is type(m)
    assert repr(other) == repr(m) and list(map(repr, other)) == list(map(repr, m))
    for before, after in zip(values(m), values(other), strict=True):
        assert_array_equal(before, after)
    z, tape = m.compute("z", init, return_tape=True)
    for sweep in tape.get_vjp(), copied(tape).get_vjp(), copied(tape.get_vjp()):
        gradient = sweep.compute(["_x", "_y"], dict(_z=np.ones_like(z)))
        assert_array_equal(gradient[0], values(m)[1])
    other.output(w=other._inputs["x"] * 2.0)
    assert_array_equal(other.compute("w", init), V / 5)
    assert len(m) == len(other) - 1 and "w" not in m._outputs


def test_copies_are_independent():
    k = np.ones(3)
    with Builder() as m:
        x = m.input("x")
        m.output(y=x * k)
    other = copy.deepcopy(m)
    _, tape = m.compute("y", dict(x=V), return_tape=True)
    twin = copy.deepcopy(tape)
    k *= 2
    assert_array_equal(other.compute("y", dict(x=V)), V)
    assert_array_equal(twin.get_vjp().compute("_x", dict(_y=V)), V)


def test_a_copied_symbol_has_a_model():
    with Builder() as m:
        x = m.input("x")
        y = linalg.exp(x)
    assert copy.copy(y) is y
    for symbol in copy.deepcopy(y), copy.deepcopy([y, y])[1], copy.deepcopy(dict(y=y))["y"]:
        other = symbol._model
        other.output(z=symbol + 1.0)
        assert_allclose(other.compute("z", dict(x=V)), np.exp(V) + 1)
    assert len(m) == 1


def test_what_cannot_be_pickled_is_named():
    @operator
    class inside:
        ain, aout = "x", "y"

        def apl(node, x):
            return x

    for use in lambda x: x.eval(lambda x: x), lambda x: inside(x), lambda x: cube(x, k=open(__file__)):
        m = chain_of(use)
        with pytest.raises(pickle.PicklingError, match=r"test_belongings.py:\d+|<locals>.inside.*top level"):
            pickle.dumps(m)
        copy.deepcopy(m)


# At the door


class Quantity(np.ndarray):
    unit = "kpc"


class Bare(np.ndarray):
    unit = ""


class Magnitude:
    def __init__(self, magnitude, units):
        self.magnitude, self.units = magnitude, units


class Series:
    iloc = None


REFUSED = {
    "masked": np.ma.masked_array(V, [0, 1, 0]),
    "kpc": V.view(Quantity),
    "Mpc": Magnitude(V, "Mpc"),
    "matrix": V.view(np.matrix),
    "pandas": Series(),
    "object": np.array([1, None]),
    "datetime64": np.array(["2020-01-01"], "M8[D]"),
    "<U1": np.array(["a"]),
    "'a'": np.zeros(2, [("a", "f8")]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_lose_its_meaning_is_refused_by_name(what):
    value = REFUSED[what]
    with Builder() as m:
        x = m.input("x")
        m.output(y=x * 1.0)
    for run in (
        lambda: m.compute("y", dict(x=value)),
        lambda: m.compute_with_vjp(dict(x=value), dict(_y=V)),
        lambda: m.compute_with_vjp(dict(x=V), dict(_y=value)),
        lambda: m.compute_with_jvp("y", dict(x=V), dict(x_=value)),
        lambda: m.compute_with_gnDp("y", dict(x=V), dict(x_=value)),
        lambda: m.compute("y", dict(x=[1.0, value])),
        lambda: linalg.multiply(x, value),
        lambda: linalg.stack([x, value], 0),
    ):
        with pytest.raises(BadArgument, match=f"'_?x?_?y?.*' is .*{what}"):
            run()


def test_what_has_one_meaning_is_converted():
    half = np.full(1000, 300, "f2")
    m = chain_of(linalg.mean)
    assert_allclose(m.compute_with_vjp(dict(x=half), dict(_y=1.0))[0], 300)
    assert admit("x", half).dtype == admit("x", np.float16(2)).dtype == np.float32
    assert admit("x", Fraction(1, 2)) == 0.5 and type(admit("x", Fraction(1, 2))) is float
    assert_array_equal(admit("x", Magnitude(V, "dimensionless")), V)
    assert type(admit("x", V.view(Bare))) is np.ndarray
    assert admit("x", V) is V


def test_a_hyper_parameter_may_be_anything():
    table = np.ma.masked_array(V, [0, 1, 0])

    @operator
    class fill:
        ain, aout = "x", "y"

        def apl(node, x, table):
            return x * table.filled(0.0)

        def vjp(node, _y, table):
            return _y * table.filled(0.0)

    with Builder() as m:
        x = m.input("x")
        m.output(y=fill(x, m.input("table")) + fill(x, table))
    assert_array_equal(m.compute("y", dict(x=V, table=table)), [2.0, 0.0, 32.0])


# On ranks


@pytest.mark.collective
def test_ranks_draw_together_or_apart():
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    drawn = []

    @operator
    class draw:
        ain, aout = "x", "y"

        def apl(node, x):
            drawn[:] = [node.rng.integers(2**62), node.rng_of(comm).integers(2**62)]
            return x

        def vjp(node, _y):
            return _y

    m = chain_of(lambda x: draw(x))
    m.compute("y", dict(x=1.0))
    first = list(drawn)
    together, apart = zip(*comm.allgather(drawn))
    assert len(set(together)) == 1 and len({*together, *apart}) == 1 + comm.size
    m.compute_with_vjp(dict(x=1.0), dict(_y=1.0))
    assert drawn == first


@pytest.mark.collective
def test_one_rank_that_does_something_else_is_told_on_all():
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    calls = []

    @autooperator("x -> y")
    def step(x):
        return (
            x.eval(lambda x: (calls.append(x), x * (len(calls) if comm.rank == comm.size - 1 else 1))[1]) + x
        )

    who = "" if comm.size == 1 else f"on rank {comm.size - 1}: "
    with pytest.raises(AssertionError, match=f"^{who}eval-0, built at"):
        with check_recomputation(comm):
            chain_of(step.forgetful).compute_with_vjp(dict(x=V), dict(_y=V))


@pytest.mark.collective
def test_fields_and_what_ranks_exchange_belong_to_the_caller():
    pytest.importorskip("pmesh")
    from mpi4py import MPI

    from vmad_lit.lib import fastpm, mpi

    comm = MPI.COMM_WORLD
    pm = fastpm.ParticleMesh([4, 4, 4], BoxSize=1.0, comm=comm)
    field, part = pm.generate_whitenoise(3, type="real"), np.ones(comm.rank)
    with Builder() as m:
        a, x = m.input("a", "x")
        b = fastpm.c2r(fastpm.r2c(a) * 2.0)
        m.output(a=a, b=b, c=b, d=b + a, x=mpi.allbcast(x, comm), y=mpi.allgather(x, comm))
    for copies in True, False:
        out, tape = m.compute(["a", "b", "c", "d", "x", "y"], dict(a=field, x=part), True, copy=copies)
        fields = [y.value for y in out[:4]]
        assert_own([*fields, *out[4:]], field.value, part, writeable=copies)
        seed = pm.generate_whitenoise(4, type="real")
        pulled = tape.get_vjp().compute("_a", dict(_a=seed, _b=seed, _c=seed, _d=seed), copy=copies)
        assert_own([pulled.value], seed.value, writeable=copies)
        _, [pulled] = m.compute_with_vjp(dict(a=field), dict(_a=seed), copy=copies)
        assert_own([pulled.value], seed.value, writeable=copies)
    twin = copy.deepcopy(m)
    assert_array_equal(twin.compute("b", dict(a=field)).value, m.compute("b", dict(a=field)).value)

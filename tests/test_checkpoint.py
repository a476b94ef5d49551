"""Chains with checkpoints: the same derivatives as without, with the memory that was asked for."""

import contextlib
import errno
import gc
import os
import resource
import signal
import subprocess
import textwrap
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples, run_python
from vmad_lit import Builder, autooperator, operator
from vmad_lit.core import chain as chains, store
from vmad_lit.core.chain import checkpoint
from vmad_lit.core.error import BadArgument, BrokenPrimitive
from vmad_lit.core.operator import ZeroGradient

schedules = pytest.importorskip("checkpoint_schedules")
linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks /proc for open files")


# -- StepFactors with all derivatives ------------------------------------------------------------------------------


@operator
class turn:
    """From (x, p) to new ones; of second order, smooth, and not symmetric in anything."""

    ain, aout = ("x", "p", "k"), ("y", "q")

    def apl(node, x, p, k, dt):
        return dict(y=x + dt * p, q=p - dt * k * np.sin(x))

    def vjp(node, _y, _q, x, k, dt):
        return dict(_x=_y - dt * k * np.cos(x) * _q, _p=dt * _y + _q, _k=-dt * np.sin(x) * _q)

    def jvp(node, x_, p_, k_, x, k, dt):
        return dict(y_=x_ + dt * p_, q_=p_ - dt * (k_ * np.sin(x) + k * np.cos(x) * x_))

    def hvp(node, _y, _q, x_, k_, x, k, dt):
        return dict(
            _x_=-dt * _q * (k_ * np.cos(x) - k * np.sin(x) * x_),
            _p_=ZeroGradient,
            _k_=-dt * np.cos(x) * x_ * _q,
        )


@operator
class norm2:
    ain, aout = "x", "y"

    def apl(node, x):
        return float(np.sum(x * x))

    def vjp(node, _y, x):
        return 2 * _y * x

    def jvp(node, x_, x):
        return float(np.sum(2 * x * x_)) if x_ is not ZeroGradient else 0.0

    def hvp(node, _y, x_):
        return 2 * _y * x_


@autooperator("x, p, k -> x1, p1")
def kick_drift(x, p, k, i, dt=0.1):
    x, p = turn(x, p, k, dt=dt * (1 + 0.1 * i))
    return turn(x, p, k, dt=dt)


def plain(n):
    def chain(x, p, k):
        for i in range(n):
            x, p = kick_drift(x, p, k, i=i)
        return x, p

    return chain


def model(chain):
    with Builder() as m:
        x, p, k = m.input("x", "p", "k")
        x, p = chain(x, p, k)
        m.output(x=x, p=p, L=norm2(x))
    return m


INIT = dict(x=np.array([1.0, 2.0]), p=np.array([0.0, -1.0]), k=np.array([1.5, 0.5]))
DIRECTION = dict(x_=np.array([1.0, -1.0]), p_=np.array([2.0, 0.5]), k_=np.array([0.5, 2.0]))
COTANGENTS = dict(_x=np.array([1.0, -1.0]), _p=np.array([0.5, 2.0]))
ALL_COTANGENTS = {**COTANGENTS, "_L": 1.0}


def assert_same(a, b):
    """Equal to the last bit, in lists of lists of arrays."""
    assert type(a) is type(b)
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for p, q in zip(a, b):
            assert_same(p, q)
    else:
        np.testing.assert_array_equal(a, b)


def assert_same_derivatives(m, n):
    """All that the model of a chain computes, beside what the full tape gives."""
    full = model(plain(n))
    assert_same(m.compute(["x", "p"], INIT), full.compute(["x", "p"], INIT))
    assert_same(m.compute_with_vjp(INIT, COTANGENTS), full.compute_with_vjp(INIT, COTANGENTS))
    some = dict(x_=DIRECTION["x_"])
    for v in some, DIRECTION:
        assert_same(m.compute_with_jvp(["x", "p"], INIT, v), full.compute_with_jvp(["x", "p"], INIT, v))
        assert_same(m.compute_with_gnDp(["x", "p"], INIT, v), full.compute_with_gnDp(["x", "p"], INIT, v))
        a, b = (each.compute_with_hvp(["x", "p"], INIT, {**v, **COTANGENTS}) for each in (m, full))
        assert_same(a[:2], b[:2])
        for p, q in zip(a[2], b[2]):
            np.testing.assert_allclose(p, q, rtol=1e-12, atol=1e-14)


@st.composite
def policies(draw):
    """The arguments of `checkpoint` for any schedule."""
    name = draw(
        st.sampled_from(
            [
                "multistage",
                "revolve",
                "two-level",
                "disk",
                "disk-revolve",
                "periodic-disk-revolve",
                "h-revolve",
                "mixed",
                "tapes",
            ]
        )
    )
    at_least_one = st.integers(1, 5)
    costs = st.none() | st.just(dict(forward=2, write=5))
    taken = {
        "multistage": dict(ram=st.integers(0, 5), disk=st.integers(0, 3)),
        "revolve": dict(ram=at_least_one),
        "two-level": dict(ram=st.none() | st.integers(0, 5), period=at_least_one),
        "disk-revolve": dict(ram=at_least_one, costs=costs),
        "periodic-disk-revolve": dict(ram=at_least_one, costs=costs),
        "h-revolve": dict(ram=at_least_one, disk=st.integers(0, 3), costs=costs),
        "mixed": {draw(st.sampled_from(["ram", "disk"])): at_least_one},
    }
    policy = {key: draw(value) for key, value in taken.get(name, {}).items()}
    if name == "multistage" and policy["ram"] + policy["disk"] == 0:
        policy["ram"] = 1
    return dict(schedule=name, **policy)


@given(n=st.integers(1, 14), policy=policies())
@settings(max_examples=examples(60))
def test_any_schedule_gives_the_same_derivatives(n, policy):
    assert_same_derivatives(model(checkpoint(kick_drift, n, **policy)), n)


@pytest.mark.parametrize(
    "name",
    [
        "Revolve",
        "DiskRevolve",
        "HRevolve",
        "SingleMemoryStorageSchedule",
        "SingleDiskStorageSchedule",
        "TwoLevelCheckpointSchedule",
        "MixedCheckpointSchedule",
    ],
)
def test_schedules_of_the_library(name):
    make = {
        "Revolve": lambda n: schedules.Revolve(n, 2),
        "DiskRevolve": lambda n: schedules.DiskRevolve(n, 2),
        "HRevolve": lambda n: schedules.HRevolve(n, 2, 3),
        "SingleMemoryStorageSchedule": lambda n: schedules.SingleMemoryStorageSchedule(),
        "SingleDiskStorageSchedule": lambda n: schedules.SingleDiskStorageSchedule(move_data=True),
        "TwoLevelCheckpointSchedule": lambda n: schedules.TwoLevelCheckpointSchedule(3, 2),
        "MixedCheckpointSchedule": lambda n: schedules.MixedCheckpointSchedule(
            n, 3, storage=schedules.StorageType.DISK
        ),
    }[name]
    assert_same_derivatives(model(checkpoint(kick_drift, 9, schedule=make)), 9)


class Handmade(schedules.CheckpointSchedule):
    """A schedule from a list of actions."""

    def __init__(self, n, actions):
        super().__init__(n)
        self._actions = actions

    def _iterator(self):
        yield from self._actions

    def is_exhausted(self):
        return True

    def uses_storage_type(self, storage_type):
        return True


def handmade(*actions):
    return lambda n: Handmade(n, actions)


def test_the_same_state_in_two_places():
    from checkpoint_schedules import Copy, EndForward, EndReverse, Forward, Move, Reverse, StorageType

    RAM, DISK, WORK, NONE = (StorageType[name] for name in ("RAM", "DISK", "WORK", "NONE"))
    make = handmade(
        Forward(0, 2, True, False, DISK),
        Forward(2, 3, False, True, WORK),
        EndForward(),
        Reverse(3, 2, True),
        Copy(0, DISK, RAM),
        Copy(0, RAM, WORK),
        Forward(0, 1, False, False, WORK),
        Forward(1, 2, False, True, WORK),
        Reverse(2, 1, True),
        Move(0, RAM, NONE),
        Copy(0, DISK, WORK),
        Forward(0, 1, False, True, WORK),
        Move(0, DISK, NONE),
        Reverse(1, 0, True),
        EndReverse(),
    )
    assert_same_derivatives(model(checkpoint(kick_drift, 3, schedule=make)), 3)


def test_schedules_that_do_not_fit():
    from checkpoint_schedules import Copy, EndForward, EndReverse, Forward, Reverse, StorageType

    WORK, RAM = StorageType.WORK, StorageType.RAM
    end = Forward(2, 3, False, True, WORK), EndForward(), Reverse(3, 2, True)
    for actions, what in [
        (
            (Forward(1, 3, False, True, WORK), EndForward(), EndReverse()),
            "goes on at step 1, but the chain is at step 0",
        ),
        (
            (Forward(0, 2, False, True, WORK), EndForward(), EndReverse()),
            "goes on at step 3, but the chain is at step 2",
        ),
        ((Forward(0, 2, True, False, RAM), *end, EndReverse()), "leaves 2 of 3 steps unswept"),
        (
            (Forward(0, 2, True, False, RAM), *end, Copy(1, RAM, WORK), EndReverse()),
            "did not keep, of step 1",
        ),
        (
            (Forward(0, 2, True, False, RAM), *end, Copy(0, RAM, WORK), Reverse(2, 1, True), EndReverse()),
            "goes on at step 1",
        ),
    ]:
        m = model(checkpoint(kick_drift, 3, schedule=handmade(*actions)))
        with pytest.raises(BadArgument, match=what):
            m.compute_with_vjp(INIT, COTANGENTS)


def test_without_a_reverse_sweep():
    m, full = model(checkpoint(kick_drift, 4, schedule="none")), model(plain(4))
    assert_same(m.compute_with_jvp("x", INIT, DIRECTION), full.compute_with_jvp("x", INIT, DIRECTION))
    with pytest.raises(BrokenPrimitive, match="kick_drift_chain.*keeps nothing"):
        m.compute_with_vjp(INIT, COTANGENTS)


# -- Second derivatives ----------------------------------------------------------------------------------------


@given(n=st.integers(1, 9), policy=policies(), seed=st.integers(0, 100))
@settings(max_examples=examples(20))
def test_the_hessian_is_the_change_of_the_gradient(n, policy, seed):
    m = model(checkpoint(kick_drift, n, **policy))
    rng = np.random.default_rng(seed)
    init, v = ({name: rng.normal(size=3) for name in "xpk"} for _ in range(2))

    def gradient(h):
        moved = {name: init[name] + h * v[name] for name in init}
        return np.concatenate(m.compute_with_vjp(moved, dict(_L=1.0))[1])

    _, g, Hv = m.compute_with_hvp("L", init, {name + "_": v[name] for name in v})
    g, Hv = np.concatenate(g), np.concatenate(Hv)
    np.testing.assert_array_equal(g, gradient(0.0))
    rests = [np.linalg.norm(gradient(h) - g - h * Hv) for h in (1e-2, 5e-3)]
    assert rests[1] < 1e-12 or rests[0] / rests[1] > 3.0  # second order in h


def test_forgetful_steps_have_second_derivatives():
    def chain(x, p, k):
        for i in range(5):
            x, p = kick_drift.forgetful(x, p, k, i=i)
        return x, p

    a, b = (model(each).compute_with_hvp("L", INIT, DIRECTION) for each in (chain, plain(5)))
    for p, q in zip(a[2], b[2]):
        np.testing.assert_allclose(p, q, rtol=1e-13)


def test_an_operator_without_second_derivative_is_named():
    @operator
    class secretive:
        ain, aout = "x", "y"

        def apl(node, x):
            return x * x

        def vjp(node, _y, x):
            return 2 * x * _y

        def jvp(node, x_, x):
            return 2 * x * x_

    @autooperator("x -> y")
    def step(x):
        return secretive(x)

    with Builder() as m:
        m.output(y=checkpoint(step, 3, ram=1)(m.input("x")))
    with pytest.raises(BrokenPrimitive, match="secretive has no hvp"):
        m.compute_with_hvp("y", dict(x=1.1), dict(x_=1.0))
    m.compute_with_gnDp("y", dict(x=1.1), dict(x_=1.0))


# -- Chains in company -----------------------------------------------------------------------------------------


@given(inner=policies(), outer=policies())
@settings(max_examples=examples(15))
def test_a_chain_of_chains(inner, outer):
    chain = checkpoint(kick_drift, 3, **inner)

    @autooperator("x, p, k -> x1, p1")
    def several(x, p, k):
        return chain(x, p, k)

    def full(x, p, k):
        for j in range(4):
            x, p = plain(3)(x, p, k)
        return x, p

    a, b = model(checkpoint(several, 4, **outer)), model(full)
    for v in dict(_L=1.0), COTANGENTS:
        x, y = (m.compute_with_vjp(INIT, v)[1] for m in (a, b))
        for p, q in zip(x, y):  # sums over steps are made in another order
            np.testing.assert_allclose(p, q, rtol=1e-13)
    for p, q in zip(*(m.compute_with_hvp("L", INIT, DIRECTION)[2] for m in (a, b))):
        np.testing.assert_allclose(p, q, rtol=1e-12)
    assert_same(*(m.compute_with_jvp("x", INIT, DIRECTION) for m in (a, b)))


@pytest.mark.parametrize("variant", [lambda f: f, lambda f: f.forgetful, lambda f: f.bind()])
def test_a_chain_in_an_autooperator_and_twice(variant):
    chain = checkpoint(kick_drift, 4, ram=2)

    @autooperator("x, p, k -> x1, p1")
    def outer(x, p, k):
        x, p = chain(x, p, k)
        return chain(x, p, k)

    def full(x, p, k):
        return plain(4)(*plain(4)(x, p, k), k)

    a, b = model(variant(outer)), model(full)
    for p, q in zip(*(m.compute_with_vjp(INIT, COTANGENTS)[1] for m in (a, b))):
        np.testing.assert_allclose(p, q, rtol=1e-14)
    for p, q in zip(*(m.compute_with_hvp("L", INIT, DIRECTION)[2] for m in (a, b))):
        np.testing.assert_allclose(p, q, rtol=1e-12)


def test_models_of_steps_are_built_once():
    built = []

    @autooperator("x -> y")
    def step(x, i, c):
        built.append(i)
        return c * x

    chain = checkpoint(step, 5, ram=2)
    with Builder() as m:
        m.output(y=chain(chain(m.input("x"), c=2.0), c=2.0))
    for repeat in range(3):
        assert m.compute_with_vjp(dict(x=1.0), dict(_y=1.0)) == ([2.0**10], [2.0**10])
    assert sorted(built) == list(range(5))


def test_a_step_may_be_a_method():
    class Spring:
        k = 2.0

        @autooperator("x -> y")
        def step(self, x, i, dt=0.5):
            return x * (1.0 - self.k * dt * (i + 1) / 10)

    chain = checkpoint(Spring().step, 3, ram=1)
    with Builder() as m:
        m.output(y=chain(m.input("x"), dt=1.0))
    assert m.compute_with_vjp(dict(x=1.0), dict(_y=1.0))[1] == [pytest.approx(0.8 * 0.6 * 0.4)]


@given(policy=policies())
@settings(max_examples=examples(20))
def test_a_tape_may_be_swept_again(policy):
    m = model(checkpoint(kick_drift, 7, **policy))
    _, tape = m.compute(["x", "p"], INIT, return_tape=True)
    full = model(plain(7)).compute(["x", "p"], INIT, return_tape=True)[1]
    names = ["_x", "_p", "_k"]
    for factor in 1.0, 2.0, -1.0:
        v = {name: factor * value for name, value in ALL_COTANGENTS.items()}
        assert_same(tape.get_vjp().compute(names, v), full.get_vjp().compute(names, v))
        assert_same(
            tape.get_jvp().compute(["x_", "p_"], DIRECTION), full.get_jvp().compute(["x_", "p_"], DIRECTION)
        )


def test_ragged_values_and_lists_of_parameters():
    @operator
    class mix:
        ain, aout = ("xs", "ks"), "ys"

        def apl(node, xs, ks):
            return dict(ys=[x * k for x, k in zip(xs, ks)])

        def vjp(node, _ys, xs, ks):
            return dict(_xs=[_y * k for _y, k in zip(_ys, ks)], _ks=[_y * x for _y, x in zip(_ys, xs)])

        def jvp(node, xs_, ks_, xs, ks):
            return dict(ys_=[x_ * k + x * k_ for x_, k_, x, k in zip(xs_, ks_, xs, ks)])

    @autooperator("xs, ks -> ys")
    def step(xs, ks):
        return mix(mix(xs, ks), ks)

    xs = [np.arange(3.0), np.ones((2, 2)), np.zeros(0), np.asfortranarray(np.ones((3, 2))), 2.0]
    ks = [np.full(np.shape(x), 1.1) for x in xs]

    def full(xs, ks):
        for _ in range(6):
            xs = step(xs, ks)
        return xs

    def derivatives(chain):
        with Builder() as m:
            x, *k = m.input("x", *(f"k{j}" for j in range(5)))
            m.output(z=chain(x, k))
        init = dict(x=xs, **{f"k{j}": ks[j] for j in range(5)})
        return m.compute_with_vjp(init, dict(_z=xs)), m.compute_with_jvp("z", init, dict(k0_=ks[0], x_=xs))

    expected = derivatives(full)
    for policy in (
        dict(ram=2),
        dict(ram=1, disk=2),
        dict(schedule="disk"),
        dict(schedule="two-level", period=2),
    ):
        assert_same(derivatives(checkpoint(step, 6, **policy)), expected)


# -- Memory ------------------------------------------------------------------------------------------------------


class Census:
    """Counts the values that are alive."""

    def __init__(self):
        self.alive, self.peak, self.runs = set(), 0, 0

    def value(self, number):
        value = Value(number)
        self.alive.add(id(value))
        weakref.finalize(value, self.alive.discard, id(value))
        self.peak = max(self.peak, len(self.alive))
        return value


class Value:
    def __init__(self, number):
        self.number = number


def census_of(n, **policy):
    """Gradients of a chain of `n` steps: the peak number of values, and how often steps were run."""
    census = Census()

    @operator
    class axpy:
        ain, aout = "x", "y"

        def apl(node, x):
            census.runs += 1
            return census.value(x.number * 1.5)

        def vjp(node, _y, x):
            return Value(_y.number * 1.5)

        def jvp(node, x_, x):
            return Value(x_.number * 1.5)

    @autooperator("x -> y")
    def step(x):
        return axpy(x)

    with Builder() as m:
        m.output(y=checkpoint(step, n, **policy)(m.input("x")))
    _, [_x] = m.compute_with_vjp(dict(x=Value(1.0)), dict(_y=Value(1.0)))
    assert _x.number == pytest.approx(1.5**n)
    gc.collect()
    before, census.runs, census.peak = len(census.alive), 0, 0
    m.compute_with_vjp(dict(x=Value(1.0)), dict(_y=Value(1.0)))
    return census.peak - before, census.runs


WORKING = 3  # the output of the run, and a step's input and result


@pytest.mark.parametrize("n", [1, 2, 10, 60])
@pytest.mark.parametrize("ram", [1, 2, 5, 20])
def test_the_peak_is_what_was_asked_for(n, ram):
    peak, runs = census_of(n, ram=ram)
    assert peak <= min(ram, n - 1) + WORKING
    assert runs == schedules.optimal_steps_binomial(n, min(ram, n - 1)) if n > 1 else runs == 1
    for policy in (
        dict(schedule="revolve", ram=ram),
        dict(schedule="two-level", ram=ram, period=10),
        dict(schedule="disk-revolve", ram=ram),
        dict(schedule="periodic-disk-revolve", ram=ram),
        dict(schedule="h-revolve", ram=ram, disk=2),
        dict(ram=ram, disk=3),
    ):
        assert census_of(n, **policy)[0] <= min(ram, n - 1) + WORKING, policy
    assert census_of(n, schedule="mixed", ram=ram)[0] <= min(ram, n - 1) + WORKING + 1
    assert census_of(n, schedule="tapes")[1] == n
    assert census_of(n, schedule="disk")[0] <= WORKING
    assert census_of(n, schedule="disk")[1] == 2 * n


def test_the_peak_does_not_grow_with_the_chain():
    peaks = {n: census_of(n, ram=4)[0] for n in (10, 40, 160)}
    assert len(set(peaks.values())) == 1, peaks
    assert census_of(160, ram=20)[0] > peaks[160]


# -- States on disk ----------------------------------------------------------------------------------------------


def open_files():
    """What this process has open in folders, also without a name."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


@linux
@pytest.mark.parametrize(
    "policy", [dict(ram=1, disk=20), dict(schedule="disk"), dict(schedule="two-level", period=2)]
)
def test_one_file_without_a_name(tmp_path, policy):
    folder, n = str(tmp_path), 40
    m = model(checkpoint(kick_drift, n, folder=folder, **policy))
    out, tape = m.compute(["x", "p"], INIT, return_tape=True)
    assert os.listdir(folder) == []
    assert sum(name.startswith(folder) for name in open_files()) == 1
    vjp = tape.get_vjp()
    vjp.compute("_x", ALL_COTANGENTS)
    vjp.compute("_x", ALL_COTANGENTS)
    assert sum(name.startswith(folder) for name in open_files()) == 1
    gc.disable()  # what is not needed goes at once, not when the garbage collector comes by
    try:
        del out, tape, vjp
        assert not any(name.startswith(folder) for name in open_files())
    finally:
        gc.enable()


def test_dropped_states_make_room_for_others(monkeypatch):
    one = store.OnDisk(store.Disk(None, None), (INIT["x"], INIT["p"]))
    disks = []

    class Watched(store.Disk):
        def __init__(self, *args):
            super().__init__(*args)
            disks.append(self)

    monkeypatch.setattr(chains, "Disk", Watched)
    m = model(checkpoint(kick_drift, 50, ram=0, disk=3))
    for _ in range(2):
        m.compute_with_vjp(INIT, COTANGENTS)
    assert all(disk._end <= 3 * sum(one._sizes) + 100 for disk in disks) and len(disks) == 2


@linux
def test_an_exception_in_a_sweep_leaves_nothing_behind(tmp_path):
    fail = False

    @operator
    class fragile:
        ain, aout = "x", "y"

        def apl(node, x):
            return x * 1.5

        def vjp(node, _y, x):
            if fail and _y[0] > 5:
                raise ArithmeticError("in the middle")
            return _y * 1.5

    @autooperator("x -> y")
    def step(x):
        return fragile(x)

    for policy in dict(ram=1, disk=3), dict(schedule="two-level", period=4), dict(schedule="tapes"):
        with Builder() as m:
            m.output(y=checkpoint(step, 12, folder=str(tmp_path), **policy)(m.input("x")))
        _, tape = m.compute("y", dict(x=np.ones(2)), return_tape=True)
        fail = True
        with pytest.raises(ArithmeticError):
            tape.get_vjp().compute("_x", dict(_y=np.ones(2)))
        fail = False
        np.testing.assert_allclose(tape.get_vjp().compute("_x", dict(_y=np.ones(2))), 1.5**12)
        del tape
        gc.collect()
        assert os.listdir(tmp_path) == []
        assert not any(name.startswith(str(tmp_path)) for name in open_files())


PROGRAM = """
    import os, resource, signal, sys
    import numpy as np
    from vmad_lit import Builder, autooperator, operator
    from vmad_lit.core.chain import checkpoint

    folder, size = sys.argv[1], int(sys.argv[2])

    def model(hook, **policy):
        @operator
        class axpy:
            ain, aout = "x", "y"
            def apl(node, x): return x * 0.5
            def vjp(node, _y, x):
                hook()
                return _y * 0.5

        @autooperator("x -> y")
        def step(x):
            return axpy(x)

        with Builder() as m:
            m.output(y=checkpoint(step, 10, folder=folder, **policy)(m.input("x")))
        return lambda: m.compute_with_vjp(dict(x=np.ones(size)), dict(_y=np.ones(size)))
"""


def run_program(text, *arguments):
    return run_python(textwrap.dedent(PROGRAM) + textwrap.dedent(text), *arguments)


def test_a_killed_run_leaves_no_files(tmp_path):
    done = run_program(
        """
        def die():
            sizes = [os.fstat(int(n)).st_size for n in os.listdir("/proc/self/fd")
                     if os.path.realpath(f"/proc/self/fd/{n}").startswith(folder)]
            print(max(sizes), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        model(die, ram=0, disk=4)()
        """,
        tmp_path,
        10_000,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert int(done.stdout) >= 4 * 80_000  # the states were there
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_explained(tmp_path):
    done = run_program(
        """
        gradient = model(lambda: None, ram=0, disk=4)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            gradient()
        except OSError as error:
            print(error.errno, error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        print(gradient()[1][0][0] == 0.5**10)
        """,
        tmp_path,
        10_000,
    )
    assert done.returncode == 0, done.stderr
    message, again = done.stdout.splitlines()
    assert message.startswith(
        f"{errno.EFBIG} [Errno {errno.EFBIG}] a state of 0.0801 MB could not be kept in {tmp_path}, "
    )
    assert (
        "up to 0.16 MB of the same chain already: File too large; choose another folder (folder=" in message
    )
    assert again == "True"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
def test_a_full_file_system(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        m = model(checkpoint(kick_drift, 10, ram=0, disk=5, folder=str(tmp_path)))
        big = {name: np.ones(10_000) for name in INIT}
        with pytest.raises(
            OSError, match="could not be kept in .*No space left on device; choose another folder"
        ) as caught:
            m.compute("x", big, return_tape=True)
        assert caught.value.errno == errno.ENOSPC
        del caught
        gc.collect()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_folders_that_will_not_do(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder, kind in (tmp_path / "missing", FileNotFoundError), (file, NotADirectoryError):
        m = model(checkpoint(kick_drift, 8, ram=0, disk=4, folder=str(folder)))
        with pytest.raises(kind, match=f"could not be kept in {folder}.*choose another folder"):
            m.compute(["x", "p"], INIT, return_tape=True)


def test_a_folder_without_permission(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    done = run_program(
        """
        from checkpoint_schedules import MultistageCheckpointSchedule
        list(MultistageCheckpointSchedule(10, 0, 4))  # some of it is compiled now, while we may read everything
        gradient = model(lambda: None, ram=0, disk=4)
        if os.geteuid() == 0:
            os.setegid(65534); os.seteuid(65534)
        try:
            gradient()
        except PermissionError as error:
            print(error)
        """,
        closed,
        10,
    )
    assert "could not be kept in" in done.stdout and "Permission denied" in done.stdout, (
        done.stdout + done.stderr
    )


def test_what_cannot_be_pickled_is_named():
    @autooperator("x, y -> x1, y1")
    def step(x, y):
        return x.eval(lambda x: x), y.eval(lambda y: y)

    with Builder() as m:
        x, y = checkpoint(step, 3, ram=0, disk=1)(*m.input("x", "y"))
        m.output(x=x, y=y)
    with pytest.raises(TypeError, match="there is function in it.*keep the states in memory"):
        m.compute("y", dict(x=np.ones(2), y=[1.0, lambda: None]), return_tape=True)


def test_values_of_other_types_can_be_kept_on_disk():
    class Opaque:
        def __init__(self, number, where):
            self.number, self.where = number, where

        def __reduce__(self):
            raise TypeError("no pickling")

    @operator
    class axpy:
        ain, aout = "x", "y"

        def apl(node, x):
            return Opaque(x.number * 2, x.where)

        def vjp(node, _y, x):
            return _y * 2 * (x.where is here)

    @autooperator("x -> y")
    def step(x):
        return axpy(x)

    with Builder() as m:
        m.output(y=checkpoint(step, 4, schedule="disk")(m.input("x")))
    here = object()
    with pytest.raises(TypeError, match="Opaque.*no pickling"):
        m.compute_with_vjp(dict(x=Opaque(1, here)), dict(_y=1.0))

    @store.keep_on_disk_by(Opaque)
    def take_apart(value):
        return lambda number: Opaque(number, value.where), value.number

    [y], [_x] = m.compute_with_vjp(dict(x=Opaque(1, here)), dict(_y=1.0))
    assert y.number == 16 and _x == 16


# -- Fields and ranks --------------------------------------------------------------------------------------------


@pytest.mark.collective
@pytest.mark.parametrize(
    "policy",
    [
        dict(ram=2),
        dict(ram=1, disk=2),
        dict(schedule="disk"),
        dict(schedule="two-level", period=3, ram=1),
        dict(schedule="mixed", disk=2),
    ],
)
@pytest.mark.parametrize("kind", ["real", "complex", "untransposedcomplex"])
def test_fields_on_disk(policy, kind):
    pytest.importorskip("pmesh")
    from vmad_lit.lib import fastpm

    pm = fastpm.ParticleMesh(Nmesh=[6, 4, 5], BoxSize=1.0)
    start = pm.generate_whitenoise(seed=3, type="real")
    start = start if kind == "real" else start.r2c(out=pm.create(kind))

    @autooperator("x, k -> y")
    def step(x, k):
        return x * (1.0 + k * x)

    def full(x, k):
        for _ in range(6):
            x = step(x, k)
        return x

    def derivatives(chain):
        with Builder() as m:
            x, k = m.input("x", "k")
            m.output(y=chain(x, k))
        init = dict(x=start, k=0.01)
        _, gradient = m.compute_with_vjp(init, dict(_y=start))
        _, tangent = m.compute_with_jvp("y", init, dict(x_=start))
        assert type(gradient[0]) is type(start) and type(tangent) is type(start)
        return [np.array(gradient[0].value), np.asarray(gradient[1]), np.array(tangent.value)]

    assert_same(derivatives(checkpoint(step, 6, **policy)), derivatives(full))


@pytest.mark.collective
def test_a_simulation_with_states_on_disk():
    pytest.importorskip("pmesh")
    from vmad_lit.lib import fastpm
    from vmad_lit.lib.cosmology import MatterDominated

    pm = fastpm.ParticleMesh(Nmesh=[8, 8, 8], BoxSize=32.0)
    stages = np.linspace(0.2, 1.0, 6).tolist()
    pt = MatterDominated(0.3, a=stages)
    q = pm.generate_uniform_particle_grid(shift=0.0)
    rng = np.random.default_rng(pm.comm.rank)
    x, p = rng.normal(size=(2, *q.shape))
    kwargs = dict(q=q, steps=fastpm.StepFactors(pt, stages, pm), pm=pm)

    def full(x, p):
        for i in range(5):
            x, p = fastpm.leapfrog_step(x, p, i=i, **kwargs)
        return x, p

    def gradient(chain):
        with Builder() as m:
            x_, p_ = chain(*m.input("x", "p"))
            m.output(x=x_, p=p_)
        return m.compute_with_vjp(dict(x=x, p=p), dict(_x=q, _p=x))[1]

    expected = gradient(full)
    for policy in dict(ram=1, disk=2), dict(schedule="disk"):
        chain = checkpoint(fastpm.leapfrog_step, 5, **policy)
        for a, b in zip(gradient(lambda x, p: chain(x, p, **kwargs)), expected):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.collective
@pytest.mark.parametrize("found", [True, False])
def test_a_full_disk_of_one_rank_stops_all(found):
    """The ranks go through collective calls: if only one of them raised, the others would wait for ever."""
    MPI = pytest.importorskip("mpi4py.MPI")
    comm = MPI.COMM_WORLD
    if comm.size == 1:
        pytest.skip("for several ranks")
    from vmad_lit.lib.mpi import allreduce

    class Mesh:
        pass

    mesh = Mesh()
    mesh.comm = comm

    @autooperator("x -> y")
    def step(x, mesh):
        return x * 0.5 + allreduce(x, comm) * 0.0

    with Builder() as m:
        chain = checkpoint(step, 10, ram=0, disk=4, **({} if found else dict(comm=comm)))
        m.output(y=chain(m.input("x"), mesh=mesh if found else None))
    x = np.ones(10_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if comm.rank == comm.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match="could not be kept in .*choose another folder") as caught:
            m.compute_with_vjp(dict(x=x), dict(_y=x))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (f"on rank {comm.size - 1}:" in str(caught.value)) == (comm.size > 1)
    np.testing.assert_array_equal(m.compute_with_vjp(dict(x=x), dict(_y=x))[1][0], 0.5**10)


# -- Arguments ---------------------------------------------------------------------------------------------------


def test_bad_arguments():
    with pytest.raises(BadArgument, match="autooperator"):
        checkpoint(lambda x: x, 3)
    for n in 0, 2.5:
        with pytest.raises(BadArgument, match="at least one step"):
            checkpoint(kick_drift, n)
    with pytest.raises(BadArgument, match="precomputed"):
        checkpoint(kick_drift.precompute(**INIT, i=0), 3)

    @autooperator("x -> y, z")
    def grows(x):
        return x, x

    with pytest.raises(BadArgument, match="next state"):
        checkpoint(grows, 3)


@pytest.mark.parametrize(
    "policy, what",
    [
        (dict(ram=0), "at least one state"),
        (dict(ram=-1), "ram is a number of states, got -1"),
        (dict(disk=1.5), "disk is a number of states, got 1.5"),
        (dict(schedule="two-level", period=-2), "period is a number of steps"),
        (dict(schedule="two-level", period=0), "period must be at least one"),
        (dict(schedule="two-level", ram=3), "needs period"),
        (dict(schedule="revolve"), "needs ram"),
        (dict(schedule="revolve", ram=0), "ram must be at least one"),
        (dict(schedule="disk", ram=3), "no use for ram; it takes no numbers"),
        (dict(schedule="h-revolve", ram=3, disk=2, period=1), "no use for period; it takes ram, disk, costs"),
        (dict(schedule="mixed", ram=3, disk=2), "is all in memory or all on disk"),
        (dict(schedule="mixed"), "is all in memory or all on disk"),
        (dict(schedule="disk-revolve", ram=1, costs=dict(writing=1)), "there is no cost 'writing'.*'write'"),
        (dict(schedule="revolv", ram=1), "there is no schedule 'revolv'; did you mean 'revolve'"),
        (dict(schedule=lambda n: None, ram=1), "has its own numbers, got ram"),
    ],
)
def test_bad_schedules(policy, what):
    with pytest.raises(BadArgument, match=what):
        checkpoint(kick_drift, 10, **policy)

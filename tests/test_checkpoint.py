"""Chains with checkpoints: the same derivatives as without, with the memory that was asked for."""

import gc
import os
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmad_lit import Builder, autooperator, operator
from vmad_lit.core.checkpoint import checkpoint
from vmad_lit.core.error import BadArgument

schedules = pytest.importorskip("checkpoint_schedules")


@autooperator("x, p, k -> x1, p1")
def leap(x, p, k, i, dt=0.1):
    p = p - k * x * dt * (1 + 0.1 * i)
    return x + p * dt, p


def plain(n):
    def chain(x, p, k):
        for i in range(n):
            x, p = leap(x, p, k, i=i)
        return x, p

    return chain


def model(chain):
    with Builder() as m:
        x, p, k = m.input("x", "p", "k")
        x, p = chain(x, p, k)
        m.output(x=x, p=p)
    return m


INIT = dict(x=np.array([1.0, 2.0]), p=np.array([0.0, -1.0]), k=np.array([1.5, 0.5]))


@given(n=st.integers(1, 12), ram=st.integers(0, 5), disk=st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_any_number_of_states_gives_the_same_derivatives(n, ram, disk):
    if ram + disk == 0:
        return
    a, b = model(plain(n)), model(checkpoint(leap, n, ram=ram, disk=disk))
    v = dict(_x=np.array([1.0, -1.0]), _p=np.array([0.5, 2.0]))
    for got, expected in zip(b.compute_with_vjp(INIT, v), a.compute_with_vjp(INIT, v)):
        for g, e in zip(got, expected):
            np.testing.assert_array_equal(g, e)
    v = dict(x_=np.array([1.0, -1.0]), k_=np.array([0.5, 2.0]))
    for got, expected in zip(b.compute_with_jvp(["x", "p"], INIT, v), a.compute_with_jvp(["x", "p"], INIT, v)):
        for g, e in zip(got, expected):
            np.testing.assert_array_equal(g, e)


@pytest.mark.parametrize("name", ["Revolve", "DiskRevolve", "HRevolve", "SingleMemoryStorageSchedule", "MixedCheckpointSchedule"])
def test_other_schedules(name):
    make = {
        "Revolve": lambda n: schedules.Revolve(n, 2),
        "DiskRevolve": lambda n: schedules.DiskRevolve(n, 2),
        "HRevolve": lambda n: schedules.HRevolve(n, 2, 3),
        "SingleMemoryStorageSchedule": lambda n: schedules.SingleMemoryStorageSchedule(),
        "MixedCheckpointSchedule": lambda n: schedules.MixedCheckpointSchedule(n, 3, storage=schedules.StorageType.RAM),
    }[name]
    a, b = model(plain(9)), model(checkpoint(leap, 9, schedule=make))
    v = dict(_x=np.ones(2), _p=np.ones(2))
    for g, e in zip(b.compute_with_vjp(INIT, v)[1], a.compute_with_vjp(INIT, v)[1]):
        np.testing.assert_array_equal(g, e)


def test_the_peak_follows_the_schedule():
    alive, peak = set(), 0

    class Value:
        def __init__(self, number):
            nonlocal peak
            self.number = number
            alive.add(id(self))
            weakref.finalize(self, alive.discard, id(self))
            peak = max(peak, len(alive))

        def __add__(self, other):
            return Value(self.number + other.number)

    @operator
    class advance:
        ain, aout = "x", "y"

        def apl(node, x):
            return Value(x.number * 1.5)

        def vjp(node, _y, x):
            return Value(_y.number * 1.5)

    @autooperator("x -> y")
    def step(x):
        return advance(x)

    def peak_of(n, ram):
        nonlocal peak
        with Builder() as m:
            m.output(y=checkpoint(step, n, ram=ram)(m.input("x")))
        gc.collect()
        peak = len(alive)
        before = peak
        _, [_x] = m.compute_with_vjp(dict(x=Value(1.0)), dict(_y=Value(1.0)))
        assert _x.number == pytest.approx(1.5**n)
        return peak - before

    peaks = {n: peak_of(n, 4) for n in (10, 40, 160)}
    assert peaks[160] <= peaks[40] + 1, peaks
    assert peak_of(160, 20) > peaks[160]


def test_states_on_disk_leave_nothing_behind(tmp_path):
    m = model(checkpoint(leap, 8, ram=1, disk=4, folder=str(tmp_path)))
    out, tape = m.compute(["x", "p"], INIT, return_tape=True)
    assert os.listdir(tmp_path) == []
    del tape


def test_a_full_disk_is_explained(monkeypatch, tmp_path):
    import errno

    from vmad_lit.core import checkpoint as module

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.pickle, "dump", full)
    m = model(checkpoint(leap, 8, ram=0, disk=4, folder=str(tmp_path)))
    with pytest.raises(OSError, match="state of a chain could not be written") as caught:
        m.compute(["x", "p"], INIT, return_tape=True)
    assert caught.value.errno == errno.ENOSPC


def test_what_cannot_be_pickled_is_explained():
    @autooperator("x -> y")
    def step(x):
        return x.eval(lambda x: x)

    with Builder() as m:
        m.output(y=checkpoint(step, 3, ram=0, disk=1)(m.input("x")))
    with pytest.raises(TypeError, match="keep it in memory"):
        m.compute("y", dict(x=lambda: None), return_tape=True)


def test_bad_arguments():
    with pytest.raises(BadArgument, match="autooperator"):
        checkpoint(lambda x: x, 3)
    with pytest.raises(BadArgument, match="at least one step"):
        checkpoint(leap, 0)
    with pytest.raises(BadArgument, match="at least one state"):
        checkpoint(leap, 3, ram=0)

    @autooperator("x -> y, z")
    def grows(x):
        return x, x

    with pytest.raises(BadArgument, match="next state"):
        checkpoint(grows, 3)

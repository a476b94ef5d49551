"""Nodes share the model of an autooperator exactly if its hyper-parameters are the same."""

import gc
import weakref

import numpy as np

from vmad_lit import Builder, autooperator


def make():
    calls = []

    @autooperator("x -> y")
    def scale(x, factor, times=1):
        calls.append((factor, times))
        for _ in range(times):
            x = x * factor
        return x

    return scale, calls


def test_same_numbers_share():
    scale, calls = make()
    with Builder() as m:
        x = m.input("x")
        m.output(y=scale(scale(x, 2.0), factor=2.0) + scale(x, 2, times=2))
    [y], [_x] = m.compute_with_vjp(dict(x=3.0), dict(_y=1.0))
    assert (y, _x) == (24.0, 8.0)
    assert calls == [(2.0, 1), (2, 2)]  # 2 and 2.0 are not the same


def test_objects_share_by_identity_only():
    scale, calls = make()
    one, other = np.array([1.0, 2.0]), np.array([1.0, 2.0])
    with Builder() as m:
        x = m.input("x")
        m.output(y=scale(scale(scale(x, one), other), one))
    [y], [_x] = m.compute_with_vjp(dict(x=1.0), dict(_y=np.ones(2)))
    np.testing.assert_array_equal(y, [1.0, 8.0])
    assert _x == 9.0
    assert len(calls) == 2


def test_hyper_parameters_that_change_between_runs():
    scale, calls = make()
    with Builder() as m:
        x, n = m.input("x", "n")
        m.output(y=scale(x, 3.0, times=n) + scale(x, 3.0, times=1))
    assert m.compute("y", dict(x=1.0, n=1)) == 6.0
    assert m.compute("y", dict(x=1.0, n=2)) == 12.0
    assert m.compute_with_vjp(dict(x=1.0, n=1), dict(_y=1.0))[1][0] == 6.0


def test_shared_models_live_as_long_as_the_model_that_uses_them():
    scale, calls = make()
    for turn in range(2):
        with Builder() as m:
            x = m.input("x")
            m.output(y=scale(x, np.ones(2)))
        for run in range(2):
            m.compute_with_vjp(dict(x=1.0), dict(_y=np.ones(2)))
        (inner,) = m.shared.values()
        inner = weakref.ref(inner)
        del m, x
        gc.collect()
        assert inner() is None
    assert len(calls) == 2


def test_building_does_not_depend_on_the_garbage_collector():
    # Building may be collective: if one rank built a model that another still had, they would wait for ever.
    counts = []
    for collect in False, True:
        scale, calls = make()
        constant = np.ones(2)
        for turn in range(3):
            with Builder() as m:
                x = m.input("x")
                m.output(y=scale(scale(x, constant), constant))
            m.compute_with_vjp(dict(x=1.0), dict(_y=np.ones(2)))
            m = [m]
            m.append(m)  # garbage that only the collector finds
            del m, x
            if collect:
                gc.collect()
        counts.append(len(calls))
    assert counts == [3, 3]


def test_values_known_at_run_time_only_are_not_kept():
    scale, calls = make()
    with Builder() as m:
        x = m.input("x")
        m.output(y=scale(x, x.eval(lambda x: np.ones(2))))
    for run in range(3):
        m.compute("y", dict(x=1.0))
    assert len(calls) == 3 and not m.shared

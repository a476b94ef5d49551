"""A sweep that is the last over its tape drops what it does not need any more; other sweeps leave the tape as it is."""

import weakref

import numpy as np
import pytest

from vmad_lit import Builder, autooperator, operator
from vmad_lit.core.operator import ZeroGradient


class Traced(np.ndarray):
    """An array that can be referred to weakly, and so can those made of it."""


class Watch:
    """Operators that record arrays, and tell in the reverse sweep how many of them are still there."""

    def __init__(self):
        self.made, self.seen = [], []
        watch = self

        class watched:
            ain = {"x": "*"}
            aout = {"y": "*"}

            def apl(node, x):
                return dict(y=x * 1.0, big=watch.array())

            def vjp(node, _y, big):
                watch.seen.append(watch.alive())
                return dict(_x=_y + 0 * big[0])

            def jvp(node, x_, big):
                watch.seen.append(watch.alive())
                return dict(y_=x_ + 0 * big[0])

        @operator
        class keep_extra(watched):
            pass

        @operator
        class keep(watched):
            hvp = ZeroGradient

            def rcd(node, x, y, big):
                return dict(big=big)

        @autooperator("x -> y")
        def inner(x, n):
            for i in range(n):
                x = keep(x)
            return x

        self.keep, self.keep_extra, self.inner = keep, keep_extra, inner

    def array(self):
        big = np.ones(3).view(Traced)
        self.made.append(weakref.ref(big))
        return big

    def alive(self):
        return sum(ref() is not None for ref in self.made)


def build(watch, kind):
    with Builder() as m:
        y = m.input("x")
        if kind == "inner":
            y = watch.inner(watch.inner(y, n=2), n=2)
        else:
            for i in range(4):
                y = getattr(watch, kind)(y)
        m.output(y=y)
    return m


@pytest.mark.parametrize("kind", ["keep", "keep_extra", "inner"])
def test_what_was_recorded_is_dropped_on_the_way(kind):
    watch = Watch()
    m = build(watch, kind)
    for _ in range(2):
        watch.made, watch.seen = [], []
        m.compute_with_vjp(dict(x=1.0), dict(_y=1.0))
        assert watch.seen == [4, 3, 2, 1] and watch.alive() == 0
    watch.made, watch.seen = [], []
    m.compute_with_jvp("y", dict(x=1.0), dict(x_=1.0))
    assert watch.seen == [4, 3, 2, 1] and watch.alive() == 0
    watch.made, watch.seen = [], []
    m.compute_with_gnDp("y", dict(x=1.0), dict(x_=1.0))
    assert watch.seen == [4] * 4 + [4, 3, 2, 1] and watch.alive() == 0


def test_a_monitor_sees_the_last_sweep():
    watch, seen = Watch(), []
    m = build(watch, "keep")
    m.compute_with_vjp(dict(x=1.0), dict(_y=1.0), monitor=lambda node, *others: seen.append(node.name))
    assert seen == [f"keep-{i}" for i in range(4)] + [f"keep-vjp-{i}" for i in range(4)]


def test_second_derivatives():
    watch = Watch()
    with Builder() as m:
        m.output(y=watch.inner(m.input("x"), n=3) ** 3)
    _, gradient, product = m.compute_with_hvp("y", dict(x=2.0), dict(x_=1.0))
    assert (gradient, product) == ([12.0], [12.0]) and watch.alive() == 0


@pytest.mark.parametrize("kind", ["keep", "keep_extra", "inner"])
def test_a_tape_of_ones_own_stays_as_it_is(kind):
    """Also if what it is a tape of was run by the engine for somebody else in between."""
    watch = Watch()
    m = build(watch, kind)
    y, tape = m.compute("y", dict(x=1.0), return_tape=True)
    for _ in range(2):
        assert tape.get_vjp().compute(["_x"], dict(_y=2.0)) == [2.0]
        assert tape.get_jvp().compute(["y_"], dict(x_=3.0)) == [3.0]
        assert tape.compute_jvjp(["_x"], ["y"], dict(x_=1.0)) == [1.0]
        m.compute_with_vjp(dict(x=1.0), dict(_y=1.0))
        assert watch.alive() == 4 and len(repr(tape[0]))


def test_a_precomputed_operator_is_used_again():
    """The tape of `precompute` lives with the operator, and serves every sweep."""
    watch = Watch()
    bound = watch.inner.precompute(x=1.0, n=2)
    with Builder() as m:
        m.output(y=bound(m.input("x")))
    for _ in range(3):
        assert m.compute_with_vjp(dict(x=1.0), dict(_y=2.0))[1] == [2.0]
    assert watch.alive() == 2


def test_errors_name_the_node():
    @operator
    class fail:
        ain = {"x": "*"}
        aout = {"y": "*"}

        def apl(node, x):
            return dict(y=x)

        def vjp(node, _y, x):
            raise ValueError("no way back")

    watch = Watch()
    with Builder() as m:
        m.output(y=watch.keep(fail(watch.keep(m.input("x")))))
    with pytest.raises(ValueError, match="no way back") as caught:
        m.compute_with_vjp(dict(x=1.0), dict(_y=1.0))
    assert "fail" in caught.value.__notes__[0] and "test_last_use.py" in caught.value.__notes__[0]

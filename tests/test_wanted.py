"""What nobody uses is not computed: not in the models inside autooperators, either."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from vmad_lit import Builder, autooperator, operator
from vmad_lit.core.chain import checkpoint

CALLS: list[str] = []


@operator
class cube:
    """x ** 3, which tells under a name when it is called."""

    ain = "x"
    aout = "y"

    def apl(node, x, name):
        CALLS.append(name)
        return x**3

    def vjp(node, _y, x, name):
        CALLS.append("_" + name)
        return 3 * x**2 * _y

    def jvp(node, x_, x, name):
        CALLS.append(name + "_")
        return 3 * x**2 * x_

    def hvp(node, _y, x_, x, name):
        return 6 * x * x_ * _y


@autooperator("x -> a, b")
def both(x):
    shared = cube(x, "shared")
    return cube(shared, "a"), cube(shared, "b")


@autooperator("x -> b, a")
def outer(x):
    a, b = both(x)
    return b, a


def calls(task):
    CALLS.clear()
    task()
    return sorted(set(CALLS))


def model(wanted, inner=outer):
    with Builder() as m:
        x = m.input("x")
        results = dict(zip(inner.aout, inner(x)))
        m.output(y=sum(results[name] * 1.0 for name in wanted))
    return m


@pytest.mark.parametrize("inner", [both, outer, outer.forgetful, both.forgetful])
@pytest.mark.parametrize("wanted", ["a", "b", "ab"])
def test_only_what_is_wanted_runs(inner, wanted):
    m, init = model(wanted, inner), dict(x=1.2)
    run = ["shared", *wanted]
    assert calls(lambda: m.compute("y", init)) == sorted(run)
    assert calls(lambda: m.compute_with_vjp(init, dict(_y=1.0))) == sorted(
        [*run, *("_" + name for name in run)]
    )
    assert calls(lambda: m.compute_with_jvp("y", init, dict(x_=1.0))) == sorted(
        [*run, *(name + "_" for name in run)]
    )
    # The derivatives are right
    n = len(wanted)
    [y], [_x] = m.compute_with_vjp(init, dict(_y=1.0))
    assert_allclose([y, _x], [n * 1.2**9, n * 9 * 1.2**8])
    assert_allclose(m.compute_with_jvp("y", init, dict(x_=2.0))[1], 2 * n * 9 * 1.2**8)
    assert_allclose(m.compute_with_hvp("y", init, dict(x_=1.0))[2], [n * 72 * 1.2**7])
    assert_allclose(m.compute_with_gnDp(["y"], init, dict(x_=1.0))[1], [(n * 9 * 1.2**8) ** 2])


def test_one_model_for_different_outputs():
    with Builder() as m:
        x = m.input("x")
        b, a = outer(x)
        m.output(a=a, b=b)
    for vout in (["a"], ["b"], ["a", "b"], ["a"]):
        assert calls(lambda: m.compute(vout, dict(x=1.1))) == sorted(["shared", *vout])
    assert m.compute(["b", "a"], dict(x=1.1)) == m.compute(["b"], dict(x=1.1)) * 2
    # A tape covers all outputs
    _, tape = m.compute("a", dict(x=1.1), return_tape=True)
    assert_allclose(tape.get_vjp().compute("_x", dict(_a=0.0, _b=1.0)), 9 * 1.1**8)


def test_cotangents_that_nobody_uses():
    @autooperator("x, v -> y")
    def product(x, v):
        return cube(x, "x") * cube(v, "v")

    with Builder() as m:
        x, v = m.input("x", "v")
        m.output(y=product(x, v))
    _, tape = m.compute("y", dict(x=2.0, v=3.0), return_tape=True)
    vjp = tape.get_vjp()
    assert calls(lambda: vjp.compute("_v", dict(_y=1.0))) == ["_v"]
    assert vjp.compute("_v", dict(_y=1.0)) == 8 * 27
    assert vjp.compute(["_x", "_v"], dict(_y=1.0)) == [12 * 27, 8 * 27]


def test_an_operator_may_ask():
    asked = []

    @operator
    class split:
        ain = "x"
        aout = "half", "rest"

        def apl(node, x):
            asked.append([name for name in ("half", "rest") if node.needs(name)])
            return dict(half=x / 2, rest=x / 2 if node.needs("rest") else None)

        def vjp(node, _half, _rest):
            return dict(_x=(_half + _rest) / 2)

        def jvp(node, x_):
            asked.append([name for name in ("half", "rest") if node.needs(name)])
            return dict(half_=x_ / 2, rest_=x_ / 2)

    with Builder() as m:
        x = m.input("x")
        half, rest = split(x)
        m.output(half=half, rest=rest)
    assert m.compute("half", dict(x=3.0)) == 1.5
    assert m.compute_with_vjp(dict(x=3.0), dict(_half=1.0)) == ([1.5], [0.5])
    assert m.compute_with_jvp("half", dict(x=3.0), dict(x_=1.0)) == (1.5, 0.5)
    assert m.compute(["rest", "half"], dict(x=3.0)) == [1.5, 1.5]
    assert asked == [["half"], ["half"], ["half"], ["half"], ["half", "rest"]]


def test_monitors_see_what_runs():
    m, seen = model("a"), []

    def monitor(node, inputs, outputs, context):
        seen.append({name: context[symbol._name] for name, symbol in outputs.items() if symbol in context})

    assert m.compute("y", dict(x=2.0), monitor=monitor) == 2.0**9
    assert seen


def test_chains_are_whole():
    @autooperator("x, v -> x_next, v_next")
    def step(x, v):
        return x + 0.1 * v, v - 0.1 * x**3

    with Builder() as m:
        x, v = m.input("x", "v")
        last, _ = checkpoint(step, n=6, ram=2)(x, v)
        m.output(x=last)
    with Builder() as plain:
        x, v = plain.input("x", "v")
        for _ in range(6):
            x, v = step(x, v)
        plain.output(x=x)
    init = dict(x=np.array([1.0, 2.0]), v=np.array([0.5, -1.0]))
    for a, b in zip(*(each.compute_with_vjp(init, dict(_x=1.0))[1] for each in (m, plain))):
        assert_allclose(a, b, rtol=1e-14)

"""Properties of the engine: random programs, the lifetime of values, lists, fragments, errors, and the amount of work."""

import gc
import pickle
import sys
import weakref

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers import examples
from vmad_lit import Builder, ListPlaceholder, autooperator, operator
from vmad_lit.core import error, execution, stdlib
from vmad_lit.core.model import Model
from vmad_lit.core.execution import Layout, Plan, find_active, find_needed, find_recorded
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.symbol import List, Literal, Symbol
from vmad_lit.lib import linalg
from vmad_lit.testing import check, check_dot_product, check_taylor

quick = settings(max_examples=examples(60), suppress_health_check=list(HealthCheck))


# Operators with lists in them, of several results, with a record of their own, and with hyper-parameters


@operator
class rotate:
    ain = "a", "b"
    aout = "p", "q"

    def apl(node, a, b, angle=0.5):
        c, s = np.cos(angle), np.sin(angle)
        return dict(p=c * a - s * b, q=s * a + c * b, turn=(c, s))

    def vjp(node, _p, _q, turn):
        c, s = turn
        return dict(_a=c * _p + s * _q, _b=c * _q - s * _p)


@operator
class total:
    ain = "x"
    aout = "y"
    trusted = True

    def apl(node, x):
        return sum(x[1:], x[0])

    def rcd(node, x, y):
        return dict(n=len(x))

    def vjp(node, _y, n):
        return dict(_x=[_y] * n)

    def jvp(node, x_):
        y_ = ZeroGradient
        for item in x_:
            y_ = y_ + item
        return y_


@operator
class shares:
    """Thirds of a value, as a list."""

    ain = "x"
    aout = "parts"

    def apl(node, x):
        return dict(parts=[x * w for w in (0.5, 0.3, 0.2)])

    def vjp(node, _parts):
        return sum((g * w for g, w in zip(_parts, (0.5, 0.3, 0.2))), ZeroGradient)

    def jvp(node, x_):
        return dict(parts_=[x_ * w for w in (0.5, 0.3, 0.2)])


def both(op, reference, **places):
    """A function that is an operator on symbols and a plain function on arrays."""

    def call(*args):
        leaves = [leaf for arg in args for leaf in (arg if isinstance(arg, list) else [arg])]
        if any(isinstance(leaf, Symbol) for leaf in leaves):
            return op(*args, **{name: ListPlaceholder(n) for name, n in places.items()})
        return reference(*args)

    return call


ROTATE = both(rotate, lambda a, b: (np.cos(0.5) * a - np.sin(0.5) * b, np.sin(0.5) * a + np.cos(0.5) * b))
TOTAL = both(total, lambda x: sum(x[1:], x[0]))
SHARES = both(shares, lambda x: [x * w for w in (0.5, 0.3, 0.2)], parts=3)
SIN = both(linalg.sin, np.sin)

INSTRUCTIONS = {
    "add": (2, lambda a, b: [a + b]),
    "sub": (2, lambda a, b: [a - b]),
    "mul": (2, lambda a, b: [a * b * 0.5]),
    "constant": (1, lambda a: [1.5 - 0.5 * a]),
    "same": (1, lambda a: [a + a]),
    "sin": (1, lambda a: [SIN(a)]),
    "rotate": (2, lambda a, b: list(ROTATE(a, b))),
    "total": (3, lambda a, b, c: [TOTAL([a, b, c, a])]),
    "shares": (1, lambda a: list(SHARES(a))),
}


@st.composite
def programs(draw, n=12):
    """A straight-line program: a list of (instruction, positions of the operands), and the positions of its outputs."""
    n_values, lines = 2, []
    for _ in range(draw(st.integers(1, n))):
        name = draw(st.sampled_from(sorted(INSTRUCTIONS)))
        arity, _ = INSTRUCTIONS[name]
        lines.append((name, [draw(st.integers(0, n_values - 1)) for _ in range(arity)]))
        n_values += {"rotate": 2, "shares": 3}.get(name, 1)
    outputs = draw(st.lists(st.integers(0, n_values - 1), min_size=1, max_size=3, unique=True))
    return lines, outputs


def run(program, a, b):
    lines, outputs = program
    values = [a, b]
    for name, operands in lines:
        values += INSTRUCTIONS[name][1](*(values[i] for i in operands))
    return [values[i] for i in outputs]


A, B = np.array([0.3, -0.7, 1.1]), np.array([0.9, 0.2, -0.4])


def build(program):
    with Builder() as m:
        a, b = m.input("a", "b")
        m.output(**{f"y{i}": y for i, y in enumerate(run(program, a, b))})
    return m


@quick
@given(programs())
@example(([("rotate", [0, 1]), ("rotate", [3, 2]), ("add", [0, 0]), ("constant", [0])], [4]))
def test_random_programs(program):
    m = build(program)
    vout = list(m._outputs)
    init = dict(a=A, b=B)
    expected = run(program, A, B)
    for got, y in zip(m.compute(vout, init), expected):
        np.testing.assert_allclose(got, y)
    for name, y in zip(vout, expected):  # each output alone
        np.testing.assert_allclose(m.compute(name, init), y)
    m.output(size=m._inputs["a"] * 100.0)  # results that cancel have the rounding errors of what went in
    check_dot_product(m, init, allow_zero=True)
    check_taylor(m, init, allow_zero=True)


@quick
@given(programs(), programs())
def test_nesting_forgetting_and_replaying_give_the_same_gradient(inner, outer):
    @autooperator("a, b -> y")
    def f(a, b):
        return sum(run(inner, a, b)[1:], run(inner, a, b)[0])

    def gradient(op):
        with Builder() as m:
            a, b = m.input("a", "b")
            once = op(a, b)
            m.output(y=linalg.sum(sum(run(outer, once, op(once, b)), 0.0)))
        return m.compute_with_vjp(dict(a=A, b=B), dict(_y=1.0))

    def inline(a, b):
        return f.prototype.main(a, b)

    (y,), g = gradient(inline)
    for op in f, f.forgetful, f.bind(), f.bind().forgetful:
        (y2,), g2 = gradient(op)
        np.testing.assert_allclose(y2, y)
        for p, q in zip(g, g2):
            np.testing.assert_allclose(whole(p), whole(q), rtol=1e-10, atol=1e-12)

    ready = f.precompute(a=A, b=B)
    with Builder() as m:
        m.output(y=ready(*m.input("a", "b")))
    for v in np.eye(3):
        _, g = m.compute_with_vjp(dict(a=A, b=B), dict(_y=v))
        _, g2 = f.build().compute_with_vjp(dict(a=A, b=B), dict(_y=v))
        for p, q in zip(g, g2):
            np.testing.assert_allclose(whole(p), whole(q))


def whole(g):
    return np.broadcast_to(np.asarray(g, dtype=float), (3,))


@quick
@given(programs(30))
def test_a_run_leaves_nothing_behind_for_the_next(program):
    m = build(program)
    vout = list(m._outputs)
    first = m.compute(vout, dict(a=A, b=B))
    m.compute_with_vjp(dict(a=B, b=A), {"_" + name: np.ones(3) for name in vout})
    for p, q in zip(first, m.compute(vout, dict(a=A, b=B))):
        np.testing.assert_array_equal(p, q)


@quick
@given(programs(20), st.integers(0, 1000))
def test_gauss_newton_is_the_product_of_the_two_sweeps(program, seed):
    m = build(program)
    rng = np.random.default_rng(seed)
    v = dict(a_=rng.normal(size=3), b_=rng.normal(size=3))
    init, vout = dict(a=A, b=B), list(m._outputs)
    _, pushed = m.compute_with_jvp(vout, init, v)
    _, pulled = m.compute_with_vjp(init, {"_" + name: y_ for name, y_ in zip(vout, pushed)})
    _, product = m.compute_with_gnDp(vout, init, v)
    for p, q in zip(pulled, product):
        np.testing.assert_allclose(whole(p), whole(q), atol=1e-14)


# The passes of a plan, each alone


def names(nodes):
    return [node.name for node in nodes]


def horner():
    with Builder() as m:
        x, a = m.input("x", "a")
        y = total([x, a]) * x
        p, q = rotate(y, a)
        m.output(y=y, p=p, unused=q * 2.0)
    return m


def test_what_is_needed():
    m = horner()
    x, a, y = m._inputs["x"], m._inputs["a"], m._outputs["y"]
    nodes, last_use = find_needed(m, ["y"])
    assert names(nodes) == ["total-0", "mul-1"]
    assert last_use[a].name == "total-0" and last_use[x].name == "mul-1" and last_use[y] is None
    nodes, last_use = find_needed(m, ["y", "p"])
    assert names(nodes) == ["total-0", "mul-1", "rotate-2"] and last_use[y] is None
    nodes, last_use = find_needed(m, ["y", "p"], results=False)
    assert names(nodes) == ["total-0", "mul-1", "rotate-2"]
    assert last_use[y].name == "rotate-2" and m._outputs["p"] not in last_use


def test_what_is_recorded():
    m = horner()
    nodes, last_use = find_needed(m, ["p"])
    active, active_nodes = find_active(m, nodes)
    assert names(active_nodes) == ["total-0", "mul-1", "rotate-2"]
    recorded = find_recorded(active_nodes, last_use)
    assert [list(symbols) for symbols in recorded.values()] == [[], [], ["angle"]]  # the others have an rcd
    with Builder() as m:
        x = m.input("x")
        m.output(y=grow_and_record(grow_and_record(x)), z=grow_and_record(Literal(1.0)))
    nodes, last_use = find_needed(m, ["y", "z"])
    recorded = find_recorded(find_active(m, nodes)[1], last_use)
    assert [list(symbols) for symbols in recorded.values()] == [["x"], ["x"]]
    assert last_use[x] is None and len(recorded) == 2 and len(nodes) == 3


def test_where_values_are():
    m = chain(grow, 10)
    nodes, last_use = find_needed(m, ["y"])
    for reuse, slots in (True, 1), (False, 11):
        layout = Layout(m, last_use, {}, reuse=reuse)
        layout.place(m._inputs["x"])
        for node in nodes:
            layout.add_node(node)
        assert len(layout.template) == slots and len(layout.steps) == 10 and len(layout.slots) == 11
    with pytest.raises(error.ResolveError, match="no value"):
        Layout(m, last_use, {}).target(Symbol("lost"))


@pytest.fixture
def passes():
    """Sets the passes that plans go through, and the function that makes steps."""
    before, make_step = list(execution.PASSES), Layout.make_step

    def choose(functions, make=make_step):
        execution.PASSES[:] = list(functions)
        Layout.make_step = staticmethod(make)

    yield choose
    choose(before)


@settings(quick, suppress_health_check=[*HealthCheck])
@given(programs(20))
def test_every_pass_may_be_left_out(passes, program):
    """Plans compute the same, to the last bit, with general steps or special ones, and with passes or without."""
    from vmad_lit.core.ownership import find_owners
    from vmad_lit.core.specialise import fastest_step, join_sums

    results = []
    init, v = dict(a=A, b=B), dict(a_=A + 1.0, b_=B - 1.0)
    for functions in [], [find_owners], [join_sums], [find_owners, join_sums]:
        for make in execution.general_step, fastest_step:
            passes(functions, make)
            m = build(program)
            vout = list(m._outputs)
            w = {"_" + name: np.ones(3) * i for i, name in enumerate(vout)}
            out, gradient = m.compute_with_vjp(init, w)
            _, pushed = m.compute_with_jvp(vout, init, v)
            _, product = m.compute_with_gnDp(vout, init, v)
            results.append([*out, *m.compute(vout, init), *gradient, *pushed, *product])
    for other in results[1:]:
        for p, q in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(whole(p), whole(q))


def test_special_steps_are_in_use():
    with Builder() as m:
        x = m.input("x")
        m.output(y=linalg.sin(linalg.sin(total([x, x]))))
    assert [step[0].__name__ for step in m._plan(("y",), False, True).steps] == [
        "pack",
        "execute",
        "call",
        "call",
    ]
    m = chain(linalg.sin, 10)
    assert {step[0].__name__ for step in Plan(m, ["y"], record=True).steps} <= {"call", "call_and_record"}
    _, tape = m.compute("y", dict(x=A), return_tape=True)
    for sweep, vout in (tape.get_vjp(), "_x"), (tape.get_jvp(), "y_"):
        assert {step[0].__name__ for step in sweep._plan((vout,), False, True).steps} == {"differentiate_one"}


def test_a_sweep_with_a_tape_records_no_derivatives():
    """Derivatives have no derivatives in their turn, also those of autooperators and of operators with an rcd."""

    @autooperator("x -> y")
    def square(x):
        return linalg.sin(x * x)

    m, a, b = two()
    m.output(y=square(a) * total([a, b]))
    _, tape = m.compute("y", dict(a=A, b=B), return_tape=True)
    vjp = tape.get_vjp()
    expected = vjp.compute(["_a", "_b"], dict(_y=A))
    again, tape_of_sweep = vjp.compute(["_a", "_b"], dict(_y=A), return_tape=True)
    np.testing.assert_array_equal(again, expected)
    assert all(not record.impl_kwargs for record in tape_of_sweep if record.node.primitive.kind == "vjp")


# The lifetime of values


class Value:
    """A number that counts how many of its kind are alive."""

    alive, most = set(), 0

    def __init__(self, x):
        self.x = x
        Value.alive.add(id(self))
        weakref.finalize(self, Value.alive.discard, id(self))
        Value.most = max(Value.most, len(Value.alive))

    def __add__(self, other):
        return Value(self.x + other.x)


@operator
class grow:
    ain = "x"
    aout = "y"

    def apl(node, x):
        return Value(x.x + 1)

    def vjp(node, _y):
        return Value(_y.x)


@operator
class grow_and_record(grow.prototype):
    def vjp(node, _y, x):
        return Value(_y.x + 0 * x.x)


@operator
class grow_with_rcd(grow.prototype):
    def rcd(node, x, y):
        return dict(nothing=None)

    def vjp(node, _y, nothing):
        return Value(_y.x)


@operator
class join:
    ain = "x"
    aout = "y"

    def apl(node, x):
        return Value(sum(item.x for item in x))

    def vjp(node, _y):
        return dict(_x=[Value(_y.x), Value(_y.x)])


def chain(op, n, listed=False):
    with Builder() as m:
        x = m.input("x")
        for _ in range(n):
            x = join([op(x), x]) if listed else op(x)
        m.output(y=x)
    return m


@pytest.fixture
def counting():
    gc.collect()
    assert not Value.alive
    Value.most = 0
    yield
    gc.collect()
    assert not Value.alive


@pytest.mark.parametrize("listed", [False, True])
def test_values_die_after_their_last_use(counting, listed):
    m = chain(grow, 100, listed)
    y = m.compute("y", dict(x=Value(0)))
    assert Value.most <= 5
    assert len(Value.alive) == 1
    assert listed or y.x == 100


@operator
class repeat:
    ain = "x"
    aout = "y"

    def apl(node, x):
        return Value(x.x)

    def vjp(node, _y):
        return Value(_y.x)


@operator
class fold:
    """A sum of three, whose second derivative is told although it vanishes."""

    ain = "a", "b", "c"
    aout = "y"

    def apl(node, a, b, c):
        return Value(a.x + b.x + c.x)

    def rcd(node, a, b, c, y):
        return dict(name="fold")

    def vjp(node, _y, name):
        return dict(_a=Value(_y.x), _b=Value(_y.x), _c=Value(_y.x))

    def jvp(node, a_, b_, c_, name):
        return Value(sum(item.x for item in (a_, b_, c_) if item is not ZeroGradient))

    def hvp(node, _y, a_, b_, c_, name):
        return dict(_a_=Value(0), _b_=Value(0), _c_=Value(0))


@operator
class count:
    """The identity, which tells how many values are alive."""

    ain = "x"
    aout = "y"
    seen = []

    def apl(node, x):
        count.prototype.seen.append(len(Value.alive))
        return Value(x.x)

    def vjp(node, _y):
        count.prototype.seen.append(len(Value.alive))
        return Value(_y.x)

    def jvp(node, x_):
        count.prototype.seen.append(len(Value.alive))
        return Value(x_.x)

    hvp = ZeroGradient


def test_several_values_may_die_at_once(counting, passes):
    """Also tangents, cotangents and their changes, at nodes with fewer results than arguments; with special steps
    exactly when they do with general ones."""

    def seen(task):
        count.prototype.seen.clear()
        before = len(Value.alive)
        assert task().x == 27
        return [number - before for number in count.prototype.seen]

    def numbers():
        x, v = Value(1), Value(1)
        with Builder() as m:
            y = m.input("x")
            for _ in range(3):
                y = count(fold(repeat(y), repeat(y), repeat(y)))
            m.output(y=y)
        _, tape = m.compute("y", dict(x=x), return_tape=True)
        hvp = tape.get_hvp()
        assert hvp.compute("_x_", dict(_y=v, x_=v)).x == 0
        assert seen(lambda: m.compute("y", dict(x=x))) == [1, 1, 1]
        assert seen(lambda: tape.get_jvp().compute("y_", dict(x_=v))) == [1, 1, 1]
        assert seen(lambda: tape.get_vjp().compute("_x", dict(_y=v))) == [0, 1, 1]  # the first one is ours
        return seen(lambda: hvp.compute(["_x", "_x_"], dict(_y=v, x_=v))[0])

    special = numbers()
    passes(execution.PASSES, execution.general_step)
    assert special == numbers() and len(special) == 2 + 3 + 2  # tangents, cotangents, changes


def test_values_die_while_somebody_watches(counting):
    seen = []
    m = chain(grow, 50)
    m.compute(
        "y", dict(x=Value(0)), monitor=lambda node, ins, outs, context: seen.append(context[ins["x"]._name])
    )
    assert Value.most <= 4
    assert seen == [None] * 50


def test_values_die_while_a_record_is_made(counting):
    m = chain(grow_with_rcd, 100)
    y, tape = m.compute("y", dict(x=Value(0)), return_tape=True)
    assert Value.most <= 4
    assert tape.get_vjp().compute("_x", dict(_y=Value(1))).x == 1


def test_a_tape_holds_what_was_recorded_and_nothing_else(counting):
    for op, n in (grow, 0), (grow_and_record, 50):
        m = chain(op, 50)
        x = Value(0)
        y, tape = m.compute("y", dict(x=x), return_tape=True)
        del x, y
        tape.out.clear()
        gc.collect()
        # the input and the intermediate values, if recorded; the result stays in its slot
        assert n <= len(Value.alive) <= n + 2
        Value.most = len(Value.alive)
        _x = tape.get_vjp().compute("_x", dict(_y=Value(1)))
        assert Value.most <= n + 6
        assert _x.x == 1
        del tape, _x


@pytest.mark.parametrize(
    "step, kept", [(grow, 1), (grow_and_record, 6)], ids=["nothing recorded", "recorded"]
)
def test_tapes_of_inner_models_let_go_of_what_they_gave(counting, step, kept):
    @autooperator("x -> y")
    def twice(x):
        return step(step(x))

    with Builder() as m:
        x = m.input("x")
        for _ in range(3):
            x = twice(x)
        m.output(y=x)
    start = Value(0)
    [y], tape = m.compute(["y"], dict(x=start), return_tape=True)
    gc.collect()
    assert y.x == 6 and len(Value.alive - {id(start)}) == kept
    y, [_x] = m.compute_with_vjp(dict(x=start), dict(_y=Value(1)))
    assert _x.x == 1


def test_forgetting_saves_memory(counting):
    @autooperator("x -> y")
    def stage(x):
        for _ in range(20):
            x = grow_and_record(x)
        return x

    most = {}
    for name, op in dict(kept=stage, forgotten=stage.forgetful, made_again=stage.rematerialise).items():
        m = chain(op, 20)
        Value.most = 0
        _, (_x,) = m.compute_with_vjp(dict(x=Value(0)), dict(_y=Value(1)))
        assert _x.x == 1
        most[name] = Value.most
        del _x, _
    assert most["kept"] >= 400
    assert most["forgotten"] <= 60 and most["made_again"] == most["forgotten"]


def test_a_method_that_rematerialises():
    class Scale:
        @autooperator("x -> y")
        def twice(self, x):
            return x * x

    with Builder() as m:
        m.output(y=Scale().twice.rematerialise(m.input("x")))
    _, tape = m.compute("y", dict(x=3.0), return_tape=True)
    assert "x" in tape[0].impl_kwargs and "tape of the model" not in tape[0].impl_kwargs
    assert tape.get_vjp().compute("_x", dict(_y=1.0)) == 6.0


# Lists


def test_nested_lists():
    @operator
    class weighted:
        ain = "x"
        aout = "y"

        def apl(node, x):
            (a, b), c = x
            return a * 2 + b * 3 + c * 5

        def vjp(node, _y):
            return dict(_x=[[_y * 2, _y * 3], _y * 5])

        def jvp(node, x_):
            (a_, b_), c_ = x_
            return a_ * 2 + b_ * 3 + c_ * 5

    with Builder() as m:
        a, b = m.input("a", "b")
        m.output(y=weighted([(a, b), a]), z=[a, [b, 1.0]])
    y, (_a, _b) = m.compute_with_vjp(dict(a=1.0, b=10.0), dict(_y=1.0))
    assert (y, _a, _b) == ([37.0], 7.0, 3.0)
    assert m.compute("z", dict(a=1.0, b=10.0)) == [1.0, [10.0, 1.0]]
    _, (_a, _b) = m.compute_with_vjp(dict(a=1.0, b=10.0), dict(_z=[2.0, [3.0, 4.0]]))
    assert (_a, _b) == (2.0, 3.0)
    check(weighted, [[np.ones(2), np.ones(2)], np.ones(2)])


def test_a_list_that_is_recorded():
    @operator
    class product:
        ain = "xs"
        aout = "y"

        def apl(node, xs):
            return xs[0] * xs[1]

        def vjp(node, _y, xs):
            return dict(_xs=[_y * xs[1], _y * xs[0]])

        def jvp(node, xs_, xs):
            return xs_[0] * xs[1] + xs[0] * xs_[1]

    check(lambda a, b: product([a * 2.0, b * 3.0]) * a, A, B)
    with Builder() as m:
        a, b = m.input("a", "b")
        m.output(y=product([a, b]))
    y, tape = m.compute("y", dict(a=A, b=B), return_tape=True)
    np.testing.assert_array_equal(tape[0].impl_kwargs["xs"], [A, B])


def test_a_list_as_one_value():
    with Builder() as m:
        x = m.input("x")
        m.output(y=total(x), z=x[1])
    (y,), (_x,) = m.compute_with_vjp(dict(x=[1.0, 2.0, 3.0]), dict(_y=2.0))
    assert y == 6.0 and list(_x) == [2.0, 2.0, 2.0]
    (z,), (_x,) = m.compute_with_vjp(dict(x=[1.0, 2.0, 3.0]), dict(_z=2.0))
    assert z == 2.0 and _x == [0, 2.0, 0]


def test_cotangents_of_a_list_are_added_item_by_item():
    @autooperator("xs -> y")
    def twice(xs):
        return total(xs) + 2.0 * total(xs)

    with Builder() as m:
        a, b = m.input("a", "b")
        m.output(y=twice([a, b * 1.0]))
    _, gradient = m.compute_with_vjp(dict(a=np.ones(2), b=np.ones(2)), dict(_y=np.array([1.0, 10.0])))
    np.testing.assert_array_equal(gradient, [[3.0, 30.0], [3.0, 30.0]])


def test_unused_items_of_a_list_have_zero_cotangents():
    with Builder() as m:
        x = m.input("x")
        parts = shares(x, parts=ListPlaceholder(3))
        m.output(y=parts[1])
    assert m.compute_with_vjp(dict(x=10.0), dict(_y=1.0)) == ([3.0], [0.3])


# Fragments: operators applied to constants before any symbol of a model is seen


def test_fragments_join_the_model_that_they_meet():
    c = linalg.sin(Literal(0.5))
    d = c + linalg.cos(Literal(0.5))
    with Builder() as m:
        x = m.input("x")
        m.output(y=x * d, z=d)
    assert [node.operator.__name__ for node in m] == ["sin", "cos", "add", "mul"]
    assert [node.number for node in m] == [0, 1, 2, 3]
    (y, z), (_x,) = m.compute_with_vjp(dict(x=2.0), dict(_y=1.0, _z=1.0))
    assert np.isclose(y, 2 * (np.sin(0.5) + np.cos(0.5)))
    assert np.isclose(_x, z)


def test_two_fragments():
    c, d = linalg.sin(Literal(0.5)), linalg.cos(Literal(0.5))
    e = c * d
    with Builder() as m:
        m.output(y=m.input("x") + e)
    assert np.isclose(m.compute("y", dict(x=0.0)), np.sin(1.0) / 2)
    with Builder() as other:
        other.input("x")
        with pytest.raises(error.InferError):
            other.output(y=e)


# Errors


def two():
    m = Builder()
    return m, *m.input("a", "b")


def test_kinds_of_errors():
    m, a, b = two()
    with pytest.raises(error.BadArgument, match="rotate.*'angel'; did you mean 'angle'"):
        rotate(a, b, angel=1)
    with pytest.raises(error.BadArgument, match="twice"):
        rotate(a, b, a=a)
    with pytest.raises(error.BadArgument):
        rotate(a, b, 1, 2)
    with pytest.raises(error.MissingArgument, match="'b'"):
        rotate(a)
    with pytest.raises(error.UnpackError):
        c, d = a + b
    with pytest.raises(error.UnpackError):
        c, d = Literal([1, 2])
    with pytest.raises(error.OverwritePrecaution):
        linalg.sin(a, y=b)
    with pytest.raises(error.InferError):
        a + Builder().input("c")
    m.output(y=a)
    with pytest.raises(error.DuplicatedOutput):
        m.output(y=b)
    with pytest.raises(error.UnexpectedOutput, match="did you mean 'y'"):
        m.compute("yy", dict(a=1, b=1))
    with pytest.raises(error.ResolveError, match="'a'"):
        m.compute("y", dict(b=1))
    with pytest.raises(error.BadArgument):
        m.input("a")
    with pytest.raises(error.ModelError):
        bool(a)
    with pytest.raises(TypeError):
        a // b
    for name in "BadArgument UnpackError DuplicatedOutput MissingArgument OverwritePrecaution UnexpectedOutput".split():
        assert issubclass(getattr(error, name), error.ModelError)


def test_broken_operators():
    @operator
    class no_vjp:
        ain, aout = "x", "y"

        def apl(node, x):
            return x

    @operator
    class wrong_names:
        ain, aout = "x", "y"

        def apl(node, x):
            return dict(z=x)

    @operator
    class forgets:
        ain, aout = "x", "y"

        def apl(node, x):
            return x

        def rcd(node, x, y):
            return dict()

        def vjp(node, _y, what):
            return _y

    m, a, b = two()
    m.output(y=no_vjp(a), z=wrong_names(a), w=forgets(a))
    init = dict(a=1.0, b=1.0)
    with pytest.raises(error.BrokenPrimitive, match="no_vjp.*test_engine.py"):
        m.compute_with_vjp(init, dict(_y=1.0))
    assert m.compute_with_jvp("y", init, dict(a_=2.0)) == (1.0, 2.0)
    with pytest.raises(error.ExecutionError, match="wrong_names"):
        m.compute("z", init)
    with pytest.raises(error.BrokenPrimitive, match="what"):
        m.compute_with_vjp(init, dict(_w=1.0))


def test_an_exception_keeps_its_type_and_tells_its_place():
    m, a, b = two()
    m.output(y=linalg.reshape(a * b, (7,)))  # the line that the note names
    line = sys._getframe().f_lineno - 1
    with pytest.raises(ValueError) as caught:
        m.compute("y", dict(a=A, b=B))
    note = "\n".join(caught.value.__notes__)
    assert "reshape" in note and "float64[3]" in note and f"test_engine.py:{line}" in note


def test_zero_gradient_is_one_object():
    assert pickle.loads(pickle.dumps(ZeroGradient)) is ZeroGradient
    a = np.arange(3.0)
    assert (a + ZeroGradient) is a or (a + ZeroGradient == a).all()
    assert a * ZeroGradient is ZeroGradient and ZeroGradient * a is ZeroGradient


# Looking


def test_watchpoints_always_run():
    seen = []
    m, a, b = two()
    c = a * b
    stdlib.watchpoint(c, seen.append)
    stdlib.watchpoint([a, c], seen.append)
    m.output(y=a + 1)
    assert m.compute("y", dict(a=2.0, b=3.0)) == 3.0
    assert seen == [6.0, [2.0, 6.0]]
    m.compute_with_vjp(dict(a=2.0, b=3.0), dict(_y=1.0))
    assert seen == [6.0, [2.0, 6.0]] * 2


def test_monitor_sees_every_node_and_every_living_value():
    m, a, b = two()
    m.output(y=linalg.sin(a * b))
    seen = []

    def monitor(node, inputs, outputs, context):
        seen.append((node.operator.__name__, list(inputs), context[outputs["y"]._name]))

    y = m.compute("y", dict(a=A, b=B), monitor=monitor)
    assert [name for name, _, _ in seen] == ["mul", "sin"]
    np.testing.assert_array_equal(seen[0][2], A * B)
    np.testing.assert_array_equal(seen[1][2], y)


def test_names_and_reprs():
    m, a, b = two()
    m.output(y=linalg.sin(a * b))
    assert repr(m) == "Builder: a, b -> y (2 nodes)"
    assert repr(m[0]).startswith("mul-0(a, b) -> mul-0.y at test_engine.py:")
    _, tape = m.compute("y", dict(a=A, b=B), return_tape=True)
    assert len(tape) == 2 and tape[0].node is m[0]
    assert set(tape[0].impl_kwargs) >= {"x1", "x2"}
    assert "sin" in repr(tape[1]) and "Builder" in repr(tape)
    vjp = tape.get_vjp()
    assert [node.name for node in vjp] == ["sin-vjp-0", "mul-vjp-1"]
    assert "test_engine.py" in repr(vjp[0])
    for graph in m, vjp:
        assert "<table>" in graph._repr_html_()
        assert graph.to_dot().startswith("digraph") and graph.to_dot().rstrip().endswith("}")


# The amount of work


def calls(function):
    """How many Python functions are called."""
    n = 0

    def count(frame, event, arg):
        nonlocal n
        n += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return n


@pytest.mark.parametrize("what", ["build", "plan", "run", "derive", "gradient"])
def test_work_is_linear_in_the_number_of_nodes(what):
    def work(n):
        m = None

        def construct():
            nonlocal m
            with Builder() as m:
                x = m.input("x")
                shared = x * 2.0
                for _ in range(n):
                    x = x * shared + shared
                m.output(y=x)

        def gradient():
            m.compute_with_vjp(dict(x=0.1), dict(_y=1.0))

        if what == "build":
            return calls(construct)
        construct()
        if what == "plan":
            return calls(lambda: m.compute("y", dict(x=0.1)))
        m.compute("y", dict(x=0.1))
        if what == "run":
            return calls(lambda: m.compute("y", dict(x=0.1)))
        if what == "derive":
            return calls(gradient)
        gradient()
        return calls(gradient)

    small, large = work(100), work(200)
    assert large <= 2.1 * small


def test_a_second_gradient_builds_nothing():
    m, a, b = two()
    m.output(y=linalg.sin(a * b))
    gradient = lambda: m.compute_with_vjp(dict(a=A, b=B), dict(_y=A))  # noqa: E731
    gradient()
    plans, (plan,) = dict(m._plans), [p for p in m._plans.values() if p.record]
    derived = dict(plan.derived)
    gradient()
    assert m._plans == plans and plan.derived == derived
    assert all(x is y for x, y in zip(plan.derived.values(), derived.values()))


def test_constants_are_not_differentiated():
    counted = []

    @operator
    class costly:
        ain = "x"
        aout = "y"

        def apl(node, x):
            return x

        def vjp(node, _y):
            counted.append("vjp")
            return _y

        def jvp(node, x_):
            counted.append("jvp")
            return x_

    m, a, b = two()
    m.output(y=costly(Literal(2.0) * 3.0) * a, z=costly(b))
    init = dict(a=1.0, b=1.0)
    assert m.compute_with_vjp(init, dict(_y=1.0)) == ([6.0], [6.0, 0])
    assert m.compute_with_vjp(init, dict(_y=1.0, _z=0))[1] == [6.0, 0]
    assert m.compute_with_jvp("y", init, dict(a_=1.0)) == (6.0, 6.0)
    assert counted == []


def test_models_may_be_built_and_run_alternately():
    m, a, b = two()
    c = a * b
    m.output(y=c)
    assert m.compute("y", dict(a=2.0, b=3.0)) == 6.0
    m.output(z=c * c)
    assert m.compute(["y", "z"], dict(a=2.0, b=3.0)) == [6.0, 36.0]
    assert m.compute_with_vjp(dict(a=2.0, b=3.0), dict(_z=1.0))[1] == [36.0, 24.0]


def test_outputs_that_are_inputs_constants_or_given_twice():
    m, a, b = two()
    m.output(a=a, one=1.0, twice=[a, a])
    assert m.compute(["a", "one", "twice"], dict(a=2.0)) == [2.0, 1.0, [2.0, 2.0]]
    _, (_a,) = m.compute_with_vjp(dict(a=2.0), dict(_a=1.0, _one=5.0, _twice=[1.0, 10.0]))
    assert _a == 12.0


def test_a_list_of_symbols_belongs_to_its_model():
    m, a, b = two()
    assert isinstance(List([a, 1.0])[1], Literal)
    with pytest.raises(error.InferError):
        total([a, Builder().input("c")])


def test_annotations_of_an_autooperator_in_a_module_that_postpones_them():
    source = """
from __future__ import annotations
from vmad_lit import autooperator

@autooperator
def f(x: '*', y: '*', n) -> 'z':
    return x * y * n
"""
    namespace = {}
    exec(compile(source, "<postponed>", "exec"), namespace)
    assert (list(namespace["f"].ain), list(namespace["f"].aout)) == (["x", "y"], ["z"])
    assert namespace["f"].build(n=2).compute("z", dict(x=2.0, y=3.0)) == 12.0


def test_a_model_is_built_with_the_hyper_parameters_that_there_are():
    @autooperator("x -> y")
    def scaled(x, factor, shift=0.0):
        return x * factor + shift

    assert scaled.build(factor=2.0).compute("y", dict(x=3.0)) == 6.0
    with pytest.raises(error.BadArgument, match="scaled has no hyper-parameter 'factr'.*factor"):
        scaled.build(factor=2.0, factr=3.0)
    with pytest.raises(error.ModelError, match="needs the hyper-parameter 'factor'"):
        scaled.build(shift=1.0)
    with pytest.raises(error.ModelError, match="'x' is an input of scaled"):
        scaled.build(factor=2.0, x=1.0)


def test_the_model_of_a_symbol():
    with Builder() as m:
        a = m.input("a")
        y = a * 2.0
    assert Model.get_model(a) is Model.get_model(y) is m and Model.get_model(Symbol("free")) is None
    apart = Symbol("b")
    assert len(Model.get_model(linalg.sin(apart))) == 1

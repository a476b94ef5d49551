"""The engine against the miniature of chapter 1: random programs have the same values, tangents and cotangents on both."""

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import vmad_lit
from helpers import examples
from vmad_lit import tiny
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.lib import linalg

quick = settings(max_examples=examples(100), suppress_health_check=list(HealthCheck))


# Operators that are declared once, for both


class Sin:
    ain, aout = "x", "y"

    def apl(node, x):
        return np.sin(x)

    def vjp(node, _y, x):
        return dict(_x=_y * np.cos(x))

    def jvp(node, x_, x):
        return x_ * np.cos(x)


class Tanh:
    ain, aout = "x", "y"

    def apl(node, x):
        return np.tanh(x)

    def vjp(node, _y, y):  # of the result
        return dict(_x=_y * (1 - y**2))

    def jvp(node, x_, y):
        return x_ * (1 - y**2)


class Power:
    ain, aout = "x", "y"

    def apl(node, x, n=2):  # a hyper-parameter with a default
        return x**n

    def vjp(node, _y, x, n):
        return dict(_x=_y * n * x ** (n - 1))

    def jvp(node, x_, x, n):
        return x_ * n * x ** (n - 1)


class Total:
    ain, aout = "x", "y"

    def apl(node, x):
        return np.sum(x)

    def vjp(node, _y, x):
        return dict(_x=_y * np.ones(np.shape(x)))

    def jvp(node, x_):
        return np.sum(x_)


PLAIN = dict(sin=np.sin, tanh=np.tanh, power=lambda x, n=2: x**n, total=np.sum)
DECLARED = dict(sin=Sin, tanh=Tanh, power=Power, total=Total)
TINY = {name: tiny.operator(declaration) for name, declaration in DECLARED.items()}
REAL = {name: vmad_lit.operator(declaration) for name, declaration in DECLARED.items()}
OURS = dict(
    sin=linalg.sin, tanh=linalg.tanh, power=lambda x, n=2: x**n, total=linalg.sum
)  # the package's own

#: What a program may do: how many values it takes, and what it makes of them with the functions of a library.
INSTRUCTIONS = {
    "add": (2, lambda f, a, b: a + b),
    "sub": (2, lambda f, a, b: a - b),
    "mul": (2, lambda f, a, b: 0.5 * (a * b)),
    "twice": (1, lambda f, a: a + a),
    "square": (1, lambda f, a: 0.3 * a * a),
    "minus": (1, lambda f, a: -a),
    "constants": (1, lambda f, a: 1.5 - a * 0.5),
    "array": (1, lambda f, a: ROW * a),
    "column": (1, lambda f, a: a - COLUMN),
    "sin": (1, lambda f, a: f["sin"](a)),
    "tanh": (1, lambda f, a: f["tanh"](a)),
    "power": (1, lambda f, a: 0.1 * f["power"](a, n=3)),
    "default": (1, lambda f, a: 0.2 * f["power"](a)),
    "total": (1, lambda f, a: 0.2 * f["total"](a)),
}
ROW, COLUMN = np.array([0.5, -1.0, 0.8]), np.array([[0.4], [-0.6]])
INIT = dict(
    number=0.7,
    row=np.array([0.3, -0.7, 1.1]),
    column=np.array([[0.9], [-0.4]]),
    table=np.array([[0.2, 1.2, -0.5], [0.6, -0.8, 0.1]]),
    one=np.array([0.8]),
)


@st.composite
def programs(draw, n=15):
    """A straight-line program: a list of (instruction, positions of the operands), and the positions of its outputs."""
    lines = []
    for line in range(draw(st.integers(1, n))):
        name = draw(st.sampled_from(sorted(INSTRUCTIONS)))
        arity, _ = INSTRUCTIONS[name]
        lines.append((name, [draw(st.integers(0, len(INIT) + line - 1)) for _ in range(arity)]))
    last = len(INIT) + len(lines) - 1
    outputs = draw(st.lists(st.integers(0, last), min_size=1, max_size=3, unique=True))
    return lines, outputs


def run(program, values, functions):
    """The outputs of a program, by name, for numbers or for symbols."""
    lines, outputs = program
    values = list(values)
    for name, operands in lines:
        values.append(INSTRUCTIONS[name][1](functions, *(values[i] for i in operands)))
    return {f"y{i}": values[i] for i in outputs}


def build(builder, program, functions):
    with builder() as m:
        m.output(**run(program, m.input(*INIT), functions))
    return m


def whole(derivative, value):
    """A derivative in the shape of a value; the engine has one zero for all shapes."""
    if derivative is ZeroGradient:
        return np.zeros(np.shape(value))
    assert np.shape(derivative) == np.shape(value)
    return derivative


def assert_same(got, expected, scale, values):
    for g, e, value in zip(got, expected, values, strict=True):
        np.testing.assert_allclose(whole(g, value), whole(e, value), rtol=1e-11, atol=1e-13 * scale)


def largest(tape, cotangent):
    """The largest number in a tape, and in the parts that cotangents are sums of: rounding errors are a part of it."""
    parts = [1.0, *tape.values.values()]
    for node, record in tape:
        if node.varout in cotangent:
            parts += node.call("vjp", {**record, "_y": cotangent[node.varout]}).values()
    return max(float(np.max(np.abs(part))) for part in parts)


def directions(seed, values):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=np.shape(value))[()] for value in values]


@pytest.mark.parametrize("functions", [REAL, OURS], ids=["declared", "ours"])
@quick
@given(program=programs(), seed=st.integers(0, 99))
@example(
    program=([("mul", [0, 0]), ("mul", [5, 0]), ("add", [6, 5])], [7, 5]), seed=0
)  # used again and again
@example(
    program=([("mul", [1, 2]), ("mul", [5, 4]), ("total", [6])], [7]), seed=0
)  # repeated along every axis
@example(program=([("sin", [1])], [2]), seed=0)  # nothing depends on the only node
def test_the_engine_agrees_with_the_miniature(functions, program, seed):
    small, large = build(tiny.Builder, program, TINY), build(vmad_lit.Builder, program, functions)
    vout, plain = list(small.outputs), run(program, INIT.values(), PLAIN)
    outputs = [plain[name] for name in vout]
    v = {"_" + name: g for name, g in zip(vout, directions(seed, outputs))}
    tape = tiny.Tape(small, INIT)
    scale = largest(tape, tiny.reverse_sweep(tape, v))

    # values
    assert_same(small.compute(vout, INIT), outputs, scale, outputs)
    assert_same(large.compute(vout, INIT), outputs, scale, outputs)
    # cotangents
    out, pulled = small.compute_with_vjp(INIT, v)
    expected, engine = large.compute_with_vjp(INIT, v)
    assert_same(expected, out, scale, outputs)
    assert_same(engine, pulled, scale, INIT.values())
    # tangents
    t = {name + "_": x_ for name, x_ in zip(INIT, directions(seed + 100, INIT.values()))}
    out, pushed = small.compute_with_jvp(vout, INIT, t)
    expected, engine = large.compute_with_jvp(vout, INIT, t)
    assert_same(expected, out, scale, outputs)
    assert_same(engine, pushed, scale * largest(tape, {}), outputs)
    # and one against the other
    left = sum(np.sum(v["_" + name] * y_) for name, y_ in zip(vout, pushed))
    right = sum(np.sum(_x * t[name + "_"]) for name, _x in zip(INIT, pulled))
    assert abs(left - right) <= 1e-11 * scale


@settings(quick, max_examples=examples(30))
@given(program=programs(8), seed=st.integers(0, 99))
def test_the_miniature_agrees_with_differences(program, seed):
    """A third opinion, which knows nothing of derivatives: the program in plain NumPy, a step to either side."""
    m = build(tiny.Builder, program, TINY)
    vout, h = list(m.outputs), 1e-5
    t = directions(seed, INIT.values())
    ahead, behind = (run(program, [x + s * x_ for x, x_ in zip(INIT.values(), t)], PLAIN) for s in (h, -h))
    _, pushed = m.compute_with_jvp(vout, INIT, {name + "_": x_ for name, x_ in zip(INIT, t)})
    for name, y_ in zip(vout, pushed):
        difference = (ahead[name] - behind[name]) / (2 * h)
        scale = max(1.0, np.max(np.abs(difference)), np.max(np.abs(ahead[name])))
        np.testing.assert_allclose(y_, difference, atol=1e-6 * scale**2)


def test_what_nothing_depends_on_has_zeros_for_derivatives():
    with tiny.Builder() as m:
        row, number, used = m.input("row", "number", "used")
        m.output(y=2.0 * used)
    init = dict(row=np.ones(3), number=1.0, used=np.ones(2))
    _, [_row, _number, _used] = m.compute_with_vjp(init, dict(_y=np.ones(2)))
    np.testing.assert_array_equal(_row, np.zeros(3))
    assert _number == 0.0 and type(_number) is float
    np.testing.assert_array_equal(_used, 2 * np.ones(2))
    np.testing.assert_array_equal(m.compute_with_jvp("y", init, dict(row_=1.0))[1], np.zeros(2))


def test_a_number_for_a_tangent_moves_all_elements_alike():
    with tiny.Builder() as m:
        x = m.input("x")
        m.output(y=TINY["total"](x))
    y, y_ = m.compute_with_jvp("y", dict(x=np.ones(3)), dict(x_=0.5))
    assert (y, y_) == (3.0, 1.5)


def test_a_cotangent_of_the_caller_is_not_changed():
    with tiny.Builder() as m:
        x = m.input("x")
        m.output(y=x + x + x)
    _y = np.ones(3)
    _, [_x] = m.compute_with_vjp(dict(x=np.ones(3)), dict(_y=_y))
    np.testing.assert_array_equal(_x, 3 * np.ones(3))
    np.testing.assert_array_equal(_y, np.ones(3))


@pytest.mark.parametrize("array", [np.ones(3), np.float64(2.0), np.ones(())])
def test_arrays_leave_arithmetic_to_symbols(array):
    with tiny.Builder() as m:
        x = m.input("x")
        for y in array * x, array + x, array - x, x * array:
            assert isinstance(y, tiny.Symbol)
        with pytest.raises(TypeError):
            np.sin(x)


def mistakes():
    m = tiny.Builder()
    x = m.input("x")
    y = 2.0 * x
    m.output(y=y)
    at = dict(x=np.ones(3))
    other = tiny.Builder().input("z")
    yield TypeError, "no value while", lambda: bool(y)
    yield TypeError, "no value while", lambda: x == 2.0
    yield TypeError, "no value while", lambda: [*x]
    yield TypeError, "symbols of one model", lambda: x + other
    yield TypeError, "symbols of one model", lambda: tiny.mul(2.0, 3.0)
    yield TypeError, "x2", lambda: tiny.mul(x)
    yield LookupError, "with respect to 'n'", lambda: TINY["power"](2.0, n=x)
    yield LookupError, "no value for the input 'x'; known are q", lambda: m.compute("y", dict(q=1.0))
    yield LookupError, "no output 'z'; known are y", lambda: m.compute("z", at)
    yield LookupError, "no cotangent 'y'; known are _y", lambda: m.compute_with_vjp(at, dict(y=1.0))
    yield LookupError, "no tangent '_x'; known are x_", lambda: m.compute_with_jvp("y", at, dict(_x=1.0))
    for shape in (), (2,), (2, 3), (6,), (1,):
        v = dict(_y=np.ones(shape))
        if shape != (2, 3):  # which NumPy would have made of it by repeating
            yield ValueError, "does not fit", lambda v=v: m.compute_with_vjp(at, v)


@pytest.mark.parametrize("kind, message, mistake", list(mistakes()))
def test_mistakes_are_told(kind, message, mistake):
    with pytest.raises(kind, match=message):
        mistake()


def test_a_function_that_asks_for_what_there_is_not():
    @tiny.operator
    class double:
        ain, aout = "x", "y"

        def apl(node, x):
            return 2 * x

        def vjp(node, y_):  # it was meant to be _y
            return dict(_x=2 * y_)

    with tiny.Builder() as m:
        m.output(y=double(m.input("x")))
    with pytest.raises(LookupError, match="no value for the vjp of double: 'y_'; known are x, y, _y"):
        m.compute_with_vjp(dict(x=1.0), dict(_y=1.0))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or '.'}.{alias.name}" for alias in node.names)


def test_the_two_have_nothing_in_common():
    """An oracle that asks the engine is none."""
    package = Path(vmad_lit.__file__).parent
    assert sorted(imports(package / "tiny.py")) == ["inspect", "numpy"]
    users = [
        path for path in package.rglob("*.py") if any("tiny" in name.split(".") for name in imports(path))
    ]
    assert users == []

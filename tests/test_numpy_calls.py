"""What NumPy's and Python's functions do with symbols: every one gives its answer when the model runs, or raises a TypeError."""

import cmath
import math
import operator

import numpy as np
import pytest

from vmad_lit import Builder
from vmad_lit.core.error import ModelError, NoValueYet
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.stdlib.numpy_calls import symbols_in
from vmad_lit.core.symbol import BaseSymbol, List, Literal, Symbol
from vmad_lit.lib import binary, linalg
from vmad_lit.testing import check

special = pytest.importorskip("scipy.special")
X, A = np.array([1.0, 2.0, 4.0]), np.array([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 4.0]])
ROOMS = {"np": np, "np.linalg": np.linalg, "np.fft": np.fft, "np.emath": np.emath, "np.random": np.random, "scipy.special": special,
         "math": math, "cmath": cmath}  # fmt: skip
# They have no answer that could be compared, or are about the symbol, and not about its value
ASIDE = set("info save savez savez_compressed savetxt fromfile set_printoptions seterr seterrcall setbufsize show_config show_runtime load "
            "loadtxt genfromtxt memmap nditer nested_iters frompyfunc vectorize str_ iterable bmat seed set_state get_state set_bit_generator "
            "get_bit_generator test source errstate printoptions ndarray".split())  # fmt: skip
CALLS = {
    "f(s)": lambda f, s: f(s),
    "f(s, s)": lambda f, s: f(s, s),
    "f([s, s])": lambda f, s: f([s, s]),
    "f(x, s)": lambda f, s: f(X + 1, s),
    "f(s, 1)": lambda f, s: f(s, 1),
}


def functions(room):
    for name in sorted(set(dir(room)) - ASIDE):
        f = getattr(room, name)
        if (
            not name.startswith("_")
            and callable(f)
            and not (isinstance(f, type) and issubclass(f, (Exception, np.generic)))
        ):
            yield name, f


def answer(call, f, value):
    """What a function makes of an array, and what it makes of a symbol when the model runs; the error in the place of that if there is one."""
    try:
        truth = call(f, value.copy())
    except Exception as error:
        truth = error
    with Builder() as m:
        symbol = m.input("s")
    try:
        found = call(f, symbol)
    except Exception as error:
        return truth, error
    if (
        isinstance(found, BaseSymbol)
        or isinstance(found, (list, tuple))
        and any(True for _ in symbols_in(found))
    ):
        m.output(y=found)
        try:
            found = m.compute("y", dict(s=value))
        except Exception as error:
            return truth, error
    return truth, found


def same(found, truth):
    found, truth = np.asarray(found), np.asarray(truth)
    if truth.dtype.kind not in "biufc":
        return found.dtype == truth.dtype and str(found) == str(truth)
    return (
        found.shape == truth.shape
        and found.dtype == truth.dtype
        and np.allclose(found, truth, equal_nan=True)
    )


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.filterwarnings("ignore")
def test_every_function_answers_rightly_or_refuses(room):
    wrong, right = [], 0
    for name, f in functions(ROOMS[room]):
        for form, call in CALLS.items():
            truth, found = answer(call, f, X)
            if isinstance(truth, Exception) or isinstance(found, Exception):
                asked = isinstance(f, np.ufunc) or hasattr(f, "_implementation")
                if (
                    not isinstance(truth, Exception)
                    and asked
                    and not isinstance(found, (TypeError, AttributeError, ValueError))
                ):
                    wrong.append(f"{name}: {form} raised {found!r}")
            elif not same(found, truth):
                wrong.append(f"{name}: {form} gave {found!r}, expected {truth!r}")
            else:
                right += 1
    assert not wrong
    assert right > (100 if room == "np" else -1)


@pytest.mark.parametrize("f", [
    np.sin, np.log1p, np.degrees, np.conj, np.fabs, np.sinc, lambda x: np.float64(2.0) * x, lambda x: X - x, lambda x: np.arctan2(X, x), np.square,
    lambda x: np.multiply([1.0, 2.0, 3.0], x), lambda x: np.power(x, 2.5), lambda x: A @ x, lambda x: np.matmul(x, A),
    np.mean, lambda x: np.mean(x, keepdims=True), lambda x: np.sum(x, 0), lambda x: np.sum(x, where=[True, False, True]), np.add.reduce, np.add.accumulate,
    lambda x: np.add.reduceat(x, [0, 1]), np.cumsum, lambda x: np.linalg.norm(x, 3), lambda x: np.linalg.solve(A, x), lambda x: np.dot(A, x),
    lambda x: np.outer(x, [1.0, 2.0]), lambda x: np.linalg.outer(x, X), lambda x: np.einsum("ij,j->i", A, x), lambda x: np.clip(x, 1.5, None), lambda x: np.clip(x, max=[3.0] * 3),
    lambda x: np.reshape(x, (3, 1)), lambda x: np.ravel(x), lambda x: np.transpose(np.reshape(x, (3, 1))), lambda x: np.broadcast_to(x, (2, 3)), np.copy,
    lambda x: np.take(x, [0, 0, 2]), lambda x: np.stack([x, X], axis=-1), lambda x: np.concatenate([X, x]), lambda x: np.where(X > 1.5, x, 0.0),
    lambda x: np.where(x > 1.5, x * x, [0.0, 1.0, 2.0]), lambda x: np.maximum(x, 1.75), lambda x: np.remainder(x, 0.75),
])  # fmt: skip
def test_the_nodes_are_right_in_value_and_derivative(f):
    x = X + 0.1
    check(f, x, truth=f(x))


def test_mean_of_a_symbol():
    with Builder() as m:
        m.output(y=np.mean(m.input("x")))
    [y], [_x] = m.compute_with_vjp(dict(x=X), dict(_y=1.0))
    np.testing.assert_allclose(y, 7 / 3)
    np.testing.assert_allclose(_x, np.full(3, 1 / 3))


@pytest.mark.parametrize("f, words", [
    (lambda s: np.median(s), r"np.median cannot be taken of a symbol.* x.eval\(np.median\)"),
    (lambda s: np.max(s), "linalg.maximum"), (lambda s: np.vstack([s, s]), "linalg.concatenate"), (lambda s: np.linalg.inv(s), "linalg.solve"),
    (lambda s: np.floor(s), "derivative is zero"), (lambda s: special.erf(s), "declare an @operator"), (lambda s: np.fft.fft(s), "r2c and c2r"),
    (lambda s: np.sum(s, out=np.zeros(())), "takes no argument 'out'"), (lambda s: np.sum(s, initial=1.0), "takes no argument 'initial'"),
    (lambda s: np.sin(s, where=X > 1), "takes no argument 'where'"), (lambda s: np.sin(s, dtype="f4"), "takes no argument 'dtype'"),
    (lambda s: operator.iadd(X.copy(), s), "changed in place"), (lambda s: np.multiply.reduce(s), "multiply.reduce"), (lambda s: np.add.outer(s, s), "add.outer"),
    (lambda s: np.add.at(s, 0, 1), "add.at"), (lambda s: np.subtract([s, s], s), "linalg.stack"), (lambda s: np.asarray(s), "is no array"),
    (lambda s: np.array([s, s]), "linalg.stack"), (lambda s: np.mean([s, s]), "linalg.stack"), (lambda s: np.array([s, s], dtype=object), "linalg.stack"), (lambda s: math.sin(s), "is no number"),
    (lambda s: len(s), "no length"), (lambda s: float(s), "is no number"), (lambda s: int(s), "is no number"), (lambda s: complex(s), "is no number"),
    (lambda s: X[s], "is no number|is no array"), (lambda s: range(s), "is no number"), (lambda s: round(s, 2), "cannot be rounded"), (lambda s: divmod(s, 2), "integer quotient"),
    (lambda s: divmod(2, s), "integer quotient"), (lambda s: s // 2, "refused"), (lambda s: X // s, "no derivative"), (lambda s: bool(s), "no truth value"),
    (lambda s: bool(s > 1), "no truth value"), (lambda s: bool(s == s), "no truth value"), (lambda s: sorted([s, s]), "no truth value"), (lambda s: max(s, 2.0), "no truth value"),
    (lambda s: list(s), "cannot be unpacked"), (lambda s: 1.0 in s, "not iterable"), (lambda s: operator.setitem(s, 0, 1.0), "changed in place"),
    (lambda s: operator.delitem(s, 0), "changed in place"), (lambda s: f"{s:.2f}", "format"), (lambda s: "%.2f" % s, "is no number"), (lambda s: s & s, "unsupported"),
    (lambda s: np.ma.masked_array(X, X > 1) + s, ""), (lambda s: s * np.ma.masked_array(X, X > 1), "mask"), (lambda s: s + np.matrix(A), "numpy.matrix"),
])  # fmt: skip
def test_what_is_refused_is_refused_in_words(f, words):
    with Builder() as m:
        s = m.input("s")
    with pytest.raises(TypeError, match=words):
        f(s)
    assert np.all(X == [1, 2, 4])


@pytest.mark.parametrize("make", [
    lambda m: m.input("s"), lambda m: Literal(3.0), lambda m: Literal(X).shape, lambda m: m.input("s") + 1.0
])  # fmt: skip
def test_no_symbol_of_any_kind_pretends(make):
    for f in bool, float, int, len, list, np.asarray, np.median, np.floor, math.sin, round, np.iscomplexobj:
        with pytest.raises(TypeError) as caught:
            f(make(Builder()))
        assert isinstance(caught.value, (ModelError, TypeError))


class Table:
    """What is seen of a table of pandas."""

    __pandas_priority__ = 4000

    def __mul__(self, other):
        if getattr(other, "__pandas_priority__", 0) > self.__pandas_priority__:
            return NotImplemented
        return "a table of symbols"


class Quantity(np.ndarray):
    unit = "kpc"


def test_operands_with_an_arithmetic_of_their_own():
    with Builder() as m:
        s = m.input("s")
    for wrong, words in (
        (Table(), "to_numpy"),
        (X.view(Quantity), "unit"),
        (np.ma.masked_array(X, X > 1), "mask"),
    ):
        for f in operator.mul, operator.sub, operator.pow, operator.truediv:
            with pytest.raises(NoValueYet, match=words):
                f(s, wrong)
        if not isinstance(wrong, np.ma.MaskedArray):
            with pytest.raises(NoValueYet, match=words):
                wrong * s
    hidden = np.empty(2, object)
    hidden[0] = s
    with pytest.raises(NoValueYet, match="linalg.stack"):
        s * hidden
    assert len(m) == 0


def test_equality_does_not_confuse_dicts_sets_and_lists():
    with Builder() as m:
        many = [m.input(f"s{i}") for i in range(200)]
    assert len(set(many)) == 200 and len(dict.fromkeys(many + many)) == 200
    assert all({s: i for i, s in enumerate(many)}[s] == i for i, s in enumerate(many))
    assert many[0] in many and many[7] in List(many) and many[7] not in List(many[:3])
    assert not many[0] == None and many[0] != None  # noqa: E711
    assert many[0] != "s0" and len(m) == 0
    with pytest.raises(TypeError, match="truth value"):
        many[3] in many  # noqa: B015


@pytest.mark.parametrize(
    "name",
    ["equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and", "logical_or"],
)
def test_comparisons(name):
    x, y = np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.0])
    ufunc, compare = getattr(np, name), getattr(operator, dict(
        equal="eq", not_equal="ne", less="lt", less_equal="le", greater="gt", greater_equal="ge").get(name, ""), None)  # fmt: skip
    forms = [ufunc, getattr(binary, name), getattr(linalg, name)] + ([compare] if compare else [])
    for f in forms:
        with Builder() as m:
            a, b = m.input("a", "b")
            m.output(
                y=f(a, b),
                left=f(x, b),
                right=f(a, y),
                number=f(a, 1.0),
                kept=np.where(f(a, b), a * b, -a),
                product=a * f(a, b),
            )
        init = dict(a=x, b=y)
        for out, args in dict(y=(x, y), left=(x, y), right=(x, y), number=(x, 1.0)).items():
            found = m.compute(out, init)
            np.testing.assert_array_equal(found, ufunc(*args))
            assert found.dtype == bool
        _, [_a, _b] = m.compute_with_vjp(init, dict(_kept=np.ones(3)))
        np.testing.assert_array_equal(_a, np.where(ufunc(x, y), y, -1.0))
        np.testing.assert_array_equal(_b, np.where(ufunc(x, y), x, 0.0))
        _, [_a, _b] = m.compute_with_vjp(init, dict(_product=np.ones(3)))
        np.testing.assert_array_equal(_a, ufunc(x, y) * 1.0)
        assert _b is ZeroGradient or not np.any(_b)
        _, y_ = m.compute_with_jvp("product", init, dict(a_=np.ones(3), b_=np.ones(3)))
        np.testing.assert_array_equal(y_, ufunc(x, y) * 1.0)


def test_a_class_of_symbols_with_an_arithmetic_of_its_own():
    class Angle(Symbol):
        def __add__(self, other):
            return (Literal(0.0) + self) % 2.0

        __radd__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = __add__

        def __neg__(self):
            return self + 1.0

    with Builder() as m:
        s = m.input(Angle("s"))
        for f in np.add, np.multiply, np.matmul, operator.add, operator.matmul:
            for result in f(X, s), f(s, X), f(s, s):
                assert result._name.startswith("mod")
        assert np.negative(s)._name.startswith("mod")


def test_sums_and_increments_of_python_build_nodes():
    def f(x):
        y = sum([x, 2.0 * x], 1.0)
        y += x
        return math.prod([y, x])

    check(f, X, truth=lambda x: (4 * x + 1) * x)

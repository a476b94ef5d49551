"""A register of proofs: every operator of the array library, at inputs of all kinds.

Each operator has an entry in `PROOFS`: a function that draws the arguments of a call, and says what NumPy returns for them. The value, both
derivatives, shapes, precision, and that inputs are left alone are checked by `vmad_lit.testing.check`. An operator without an entry fails.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

from helpers import examples
from vmad_lit import Builder, operator
from vmad_lit.core import stdlib
from vmad_lit.core.error import BrokenPrimitive
from vmad_lit.core.operator import Operator, ZeroGradient
from vmad_lit.core.valuetypes import value_type
from vmad_lit.lib import binary, linalg, unary
from vmad_lit.testing import Trial, check, check_second_order

MODULES = {"stdlib": stdlib, "unary": unary, "binary": binary, "linalg": linalg}


def is_comparison(op):
    return isinstance(op, Operator) and issubclass(op.prototype, binary.comparison)


LOOKING = {
    "stdlib.eval",
    "stdlib.watchpoint",
    "stdlib.assert_true",
    "stdlib.assert_isinstance",
    *(f"binary.{name}" for name in binary.__all__ if is_comparison(getattr(binary, name))),
}  # tested below
PROOFS = {}
REAL, COMPLEX = ("f8", "f4"), ("f8", "f4", "c16", "c8")
LAYOUTS = st.sampled_from(["plain", "fortran", "strided", "reversed", "read-only"])


def shapes(smallest=0, ndim=(0, 3)):
    return st.lists(st.integers(smallest, 3), min_size=ndim[0], max_size=ndim[1]).map(tuple)


class Draw:
    """Draws what a proof needs; all arrays of one proof have the same dtype."""

    def __init__(self, data, dtypes):
        self.data = data
        self.dtype = np.dtype(self(st.sampled_from(dtypes), "dtype"))
        self.rng = np.random.default_rng(self(st.integers(0, 99), "seed"))

    def __call__(self, strategy, label=None):
        return self.data.draw(strategy, label=label)

    def array(self, shape, low=-2.0, high=2.0, grid=None):
        """An array of random numbers in some layout in memory; with `grid`, multiples of 1/4 and the offset `grid`."""
        x = self.rng.uniform(low, high, shape)
        if self.dtype.kind == "c":
            x = x + 1j * self.rng.uniform(low, high, shape)
        if grid is not None:
            x = np.round(4 * x) / 4 + grid
        x = np.array(x, self.dtype)
        layout = self(LAYOUTS, "layout")
        if layout == "fortran":
            x = np.array(x, order="F")
        elif layout == "strided" and x.ndim:
            wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
            wide[..., ::2] = x
            x = wide[..., ::2]
        elif layout == "reversed" and x.ndim:
            x = x[::-1].copy()[::-1]
        elif layout == "read-only":
            x.flags.writeable = False
        return x

    def pair(self, low=-2.0, high=2.0, grids=(None, None)):
        """Two operands that broadcast, one of which may be a Python number."""
        both = mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_side=3, max_dims=3)
        x = [
            self.array(shape, low, high, grid)
            for shape, grid in zip(self(both, "shapes").input_shapes, grids)
        ]
        number = self(st.sampled_from([None, 0, 1]), "number")
        if number is not None:
            x[number] = float(np.round(4 * self.rng.uniform(max(low, 0.5), high)) / 4) + (
                grids[number] or 0.0
            )
        return x

    def mask(self, shape):
        """True, or a mask that broadcasts to a shape."""
        mask = self.rng.random(shape[self(st.integers(0, len(shape))) :]) < 0.7
        return self(st.sampled_from([True, mask]), "where")

    def axis(self, ndim, none=True, several=False):
        choices = [st.integers(-ndim, ndim - 1)] if ndim else []
        if none or not ndim:
            choices.append(st.none())
        if several and ndim:
            choices.append(st.sets(st.integers(0, ndim - 1)).map(tuple))
            choices.append(st.sets(st.integers(-ndim, -1), min_size=1).map(tuple))
        return self(st.one_of(choices), "axis")


def proof(name, dtypes=COMPLEX):
    """Enter a proof: a function from a Draw to (arguments, keyword arguments of `check`, expected value)."""

    def enter(function):
        PROOFS[name] = function, dtypes

    return enter


def operators():
    """All operators, and the public functions that build something out of them, by 'module.name'; aliases once."""
    found = {}
    for key, module in MODULES.items():
        for name, op in vars(module).items():
            public = name in module.__all__ and callable(op) and not isinstance(op, type)
            of_field = isinstance(op, Operator) and any(
                "Field" in str(pattern) for pattern in op.ain.values()
            )
            if (isinstance(op, Operator) or public) and not of_field:  # those are in test_field_arithmetic.py
                found.setdefault(id(op), (f"{key}.{name}", op))
    return dict(found.values())


OPERATORS = operators()


def test_every_operator_has_a_proof():
    assert not set(OPERATORS) - set(PROOFS) - LOOKING, "operators without a proof"
    assert not set(PROOFS) - set(OPERATORS), "proofs without an operator"


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - LOOKING))
@settings(max_examples=examples(40), suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_operator(name, data):
    function, dtypes = PROOFS[name]
    args, kwargs, truth = function(Draw(data, dtypes))
    with np.errstate(all="ignore"):
        report = check(OPERATORS[name], *args, truth=truth, allow_zero=True, **kwargs)
    assert report.second is not None, "no second derivative is offered"
    one = not isinstance(truth, (list, tuple))
    for value, expected in zip(
        [report.value] if one else report.value, [truth] if one else truth, strict=True
    ):
        assert np.asarray(value).dtype == np.asarray(expected).dtype


# Element-wise functions of one argument: the expected function, and where it is smooth


def enter_unary(name, f, low=-2.0, high=2.0, dtypes=COMPLEX, grid=None):
    @proof(name, dtypes)
    def _(draw):
        x = draw.array(draw(shapes(), "shape"), low, high, grid)
        return (x,), {}, f(x)


for name, f in {"pos": np.positive, "neg": np.negative, "terminal": np.array}.items():
    enter_unary(f"stdlib.{name}", f)
enter_unary("stdlib.abs", np.abs, grid=0.125)
enter_unary("unary.absolute", np.abs, grid=0.125)
for name in "sin", "cos", "sinh", "cosh", "tanh", "arcsinh", "exp", "expm1", "square", "sinc":
    enter_unary(f"unary.{name}", getattr(np, name), -1.5, 1.5)
for name in "tan", "arcsin", "arccos", "arctan", "arctanh":
    enter_unary(f"unary.{name}", getattr(np, name), -0.7, 0.7)
for name in "log", "log10", "log2", "log1p", "sqrt", "reciprocal":
    enter_unary(f"unary.{name}", getattr(np, name), 0.4, 2.0)
for name in "exp2", "deg2rad", "rad2deg":
    enter_unary(f"unary.{name}", getattr(np, name), dtypes=("f8", "f4") if "2" in name[1:] else COMPLEX)
enter_unary("unary.cbrt", np.cbrt, 0.4, 2.0, REAL)
enter_unary("unary.arccosh", np.arccosh, 1.4, 2.0)

# Element-wise functions of two arguments


def enter_binary(name, f, low=-2.0, high=2.0, dtypes=COMPLEX, grids=(None, None), scale=None):
    @proof(name, dtypes)
    def _(draw):
        x = draw.pair(low, high, grids)
        if scale is not None:  # away from kinks by more than the steps of the Taylor test
            x = [item * scale for item in x]
        return x, {}, f(*x)


for name, f in {"stdlib.add": np.add, "stdlib.sub": np.subtract, "stdlib.mul": np.multiply}.items():
    enter_binary(name, f)
for name in "add", "subtract", "multiply":
    enter_binary(f"binary.{name}", getattr(np, name))
for name in "stdlib.div", "binary.divide":
    enter_binary(name, np.divide, 0.5, 2.0)
for name in "stdlib.pow", "binary.power":
    enter_binary(name, np.power, 0.5, 1.5)
for name in "maximum", "minimum", "fmax", "fmin":
    enter_binary(f"binary.{name}", getattr(np, name), dtypes=REAL, grids=(0.0, 0.125), scale=16)
for name in "hypot", "arctan2", "logaddexp":
    enter_binary(f"binary.{name}", getattr(np, name), 0.4, 2.0, REAL)


@proof("stdlib.mod", REAL)
def _(draw):
    x1, x2 = draw.pair(grids=(0.0, 0.0))
    x2 = 0 * x2 + draw(st.sampled_from([1.5, -0.5]), "modulus")
    x1 = (np.round(x1) + 0.4) * abs(np.ravel(x2)[0] if np.size(x2) else 1.5)
    x1 = float(x1) if not hasattr(x1, "dtype") else x1
    return (x1, x2), {}, x1 % x2


# Shapes


@proof("linalg.broadcast_to")
def _(draw):
    pair = draw(mutually_broadcastable_shapes(num_shapes=1, base_shape=draw(shapes(), "shape")), "shapes")
    shape = pair.result_shape
    x = draw.array(pair.input_shapes[0])
    return (x, shape), {}, np.broadcast_to(x, shape)


@proof("linalg.reshape")
def _(draw):
    shape = draw(shapes(), "shape")
    x = draw.array(shape)
    new = draw(
        st.one_of(
            st.permutations(shape).map(tuple), st.just((x.size,)), st.just(x.size), st.just((1, *shape))
        )
    )
    if x.size:
        new = draw(st.sampled_from([new, -1]))
    order = draw(st.sampled_from("CF"), "order")
    return (x, new, order), {}, np.reshape(x, new, order=order)


@proof("linalg.transpose")
def _(draw):
    x = draw.array(draw(shapes(), "shape"))
    axes = draw(st.permutations(range(x.ndim)), "axes")
    axes = draw(st.sampled_from([None, tuple(axes), [axis - x.ndim for axis in axes]]))
    return (x, axes), {}, np.transpose(x, axes)


@proof("linalg.copy")
def _(draw):
    x = draw.array(draw(shapes(), "shape"))
    return (x,), {}, np.copy(x)


# Pieces


@proof("linalg.take")
def _(draw):
    x = draw.array(draw(shapes(1), "shape"))
    axis = draw.axis(x.ndim)
    n = x.size if axis is None else x.shape[axis]
    mode = draw(st.sampled_from(["raise", "wrap", "clip"]), "mode")
    index = st.integers(-n, n - 1) if mode == "raise" else st.integers(-3 * n, 3 * n)
    i = draw(
        st.one_of(
            index, st.lists(index, max_size=4), st.lists(st.lists(index, min_size=2, max_size=2), max_size=3)
        ),
        "i",
    )
    return (x, i, axis, mode), {}, np.take(x, np.asarray(i, dtype="intp"), axis, mode=mode)


KEYS = st.sampled_from(
    [
        *(
            0,
            -1,
            slice(1, None),
            slice(None, None, -1),
            Ellipsis,
            None,
            [0, 0, 1],
            [],
            np.array([[1, -1], [0, 1]]),
        ),
        *(
            (0, 1),
            (slice(None), 1),
            (Ellipsis, -1),
            (None, 0, None),
            ([1, 1], slice(None, 1)),
            (0, [1, 0, 1]),
            ([0, 1], [1, 1]),
        ),
        np.array([True, False]),
        np.array([[True, False], [True, True]]),
        (np.array([False, True]), 0),
        (np.int64(1), Ellipsis),
    ]
)


@proof("linalg.getitem")
def _(draw):
    x = draw.array((2, 2, *draw(shapes(0, (0, 1)), "shape")))
    key = draw(KEYS, "key")
    try:
        truth = x[key]
    except IndexError:  # of an axis without elements
        assume(False)
    return (x, key), dict(constant="key"), truth


@proof("linalg.item_of")
def _(draw):
    x = [draw.array((3,)), draw.array((2,)), draw.array(())]
    i = draw(st.integers(-3, 2), "key")
    return (x, i), {}, x[i]


@proof("linalg.where")
def _(draw):
    condition, shape1, shape2 = draw(
        mutually_broadcastable_shapes(num_shapes=3, min_side=0, max_side=3), "shapes"
    ).input_shapes
    condition = draw.rng.random(condition) < 0.5
    x1, x2 = draw.array(shape1), draw.array(shape2)
    return (condition, x1, x2), {}, np.where(condition, x1, x2)


@proof("linalg.clip", REAL)
def _(draw):
    x = draw.array(draw(shapes(), "shape"), grid=0.125)
    low, high = draw(
        st.sampled_from([(-1.0, 1.0), (None, 0.0), (0.5, None), (None, None), (np.array(0.0, x.dtype), 1.5)]),
        "limits",
    )
    return (x, low, high), {}, np.clip(x, low, high)


# Joining


def several(draw, shape):
    """A list of arrays of a shape."""
    return [draw.array(shape) for _ in range(draw(st.integers(1, 3), "items"))]


@proof("linalg.stack")
def _(draw):
    x = several(draw, draw(shapes(), "shape"))
    axis = draw(st.integers(-x[0].ndim - 1, x[0].ndim), "axis")
    return (x, axis), {}, np.stack(x, axis)


@proof("linalg.concatenate")
def _(draw):
    shape = draw(shapes(0, (1, 3)), "shape")
    axis = draw.axis(len(shape))
    x = several(draw, shape)
    longer = list(shape)
    longer[axis or 0] += 2
    x.append(draw.array(longer))
    return (x, axis), {}, np.concatenate(x, axis)


# Sums


def accurate(f, x, *args, **kwargs):
    """A function of numbers in double precision, rounded to the precision of `x`."""
    return np.asarray(f(x.astype(np.result_type(x, "f8")), *args, **kwargs)).astype(x.dtype)[()]


@proof("linalg.sum")
def _(draw):
    x = draw.array(draw(shapes(), "shape"))
    axis, keepdims = draw.axis(x.ndim, several=True), draw(st.booleans())
    where = draw.mask(x.shape)
    return (
        (x, axis, None, keepdims, where),
        {},
        accurate(np.sum, x, axis=axis, keepdims=keepdims, where=where),
    )


@proof("linalg.mean")
def _(draw):
    x = draw.array(draw(shapes(1), "shape"))
    axis, keepdims = draw.axis(x.ndim, several=True), draw(st.booleans())
    where = draw.mask(x.shape)
    assume(
        np.all(np.sum(np.broadcast_to(where, x.shape), axis=axis) > 0)
    )  # the mean of nothing is not a number
    return (
        (x, axis, None, keepdims, where),
        {},
        accurate(np.mean, x, axis=axis, keepdims=keepdims, where=where),
    )


@proof("linalg.cumsum")
def _(draw):
    x = draw.array(draw(shapes(), "shape"))
    axis = draw.axis(x.ndim)
    return (x, axis), {}, np.cumsum(x, axis)


@proof("linalg.sumat")
def _(draw):
    x = draw.array(draw(shapes(1, (1, 3)), "shape"))
    axis = draw.axis(x.ndim, none=False)
    at = sorted(draw(st.lists(st.integers(0, x.shape[axis] - 1), min_size=1, max_size=4), "at"))
    return (x, at, axis), {}, np.add.reduceat(x, at, axis)


# Complex numbers


@proof("linalg.unpack_complex")
def _(draw):
    x = draw.array(draw(shapes(), "shape"))
    return (x,), {}, [np.real(x), np.imag(x)]


@proof("linalg.pack_complex", REAL)
def _(draw):
    real, imag = draw.pair()
    return (real, imag), {}, real + imag * 1j


enter_unary("linalg.conj", np.conj)

# Lengths and products


@proof("linalg.to_scalar")
def _(draw):
    x = draw.array(draw(shapes(), "shape"))
    return (x,), {}, accurate(np.sum, abs(x) ** 2)


@proof("linalg.norm")
def _(draw):
    x = draw.array(draw(shapes(1), "shape"), 0.5)
    x = x * draw.rng.choice([-1, 1], x.shape).astype(x.dtype)
    if x.ndim and draw(st.booleans(), "of vectors"):
        axis = draw.axis(x.ndim, none=x.ndim == 1)
        ord = draw(st.sampled_from([None, 1, 2, 3, 2.5, 1.5, np.inf, -np.inf]), "ord")
    else:
        axis, ord = draw.axis(x.ndim, several=True), None
        if x.ndim == 2 and axis is None:
            ord = draw(st.sampled_from([None, "fro"]), "ord")
    if ord in (np.inf, -np.inf):  # the moduli shall differ by more than the steps of the Taylor test
        x = x / abs(x) * draw.rng.permutation(1.0 + np.arange(x.size)).reshape(x.shape).astype(abs(x).dtype)
    keepdims = draw(st.booleans())
    truth = (
        np.linalg.norm(x, ord, axis, keepdims)
        if axis is None or ord
        else np.sum(abs(x) ** 2, axis, keepdims=keepdims) ** 0.5
    )
    return (x, ord, axis, keepdims), {}, truth


@proof("linalg.einsum")
def _(draw):
    sizes = {c: draw(st.integers(0, 3), c) for c in "abcd"}
    wide = draw(st.lists(st.integers(1, 2), max_size=2), "ellipsis")
    terms, x = [], []
    for _ in range(draw(st.integers(1, 3), "operands")):
        term = "".join(draw(st.lists(st.sampled_from("abcd"), max_size=3), "term"))
        shape = [1 if term.count(c) == 1 and draw(st.integers(0, 9)) == 0 else sizes[c] for c in term]
        if wide and draw(st.booleans()):
            at = draw(st.integers(0, len(term)))
            dims = wide[draw(st.integers(0, len(wide))) :]
            term, shape = term[:at] + "..." + term[at:], shape[:at] + dims + shape[at:]
        terms.append(term)
        x.append(draw.array(shape))
    subscripts = ",".join(terms)
    if draw(st.booleans(), "explicit"):
        used = sorted(set(subscripts) - set(",."))
        output = "".join(draw(st.permutations(used)))[: draw(st.integers(0, len(used)))]
        subscripts += " -> " + ("..." if "..." in subscripts else "") + output
    try:
        truth = np.einsum(subscripts, *x)
    except ValueError:  # the axes that are repeated have different lengths, of which one is 1
        assume(False)
    return (subscripts, x), {}, truth


@proof("linalg.matmul")
def _(draw):
    i, j, k = (draw(st.integers(0, 3)) for _ in "ijk")
    x, A = draw.array((i, k)), draw.array((i, j, k))
    return (x, A), {}, np.einsum("ik,ijk->ij", x, A)


@proof("linalg.matrix_product")
def _(draw):
    n = draw(st.integers(0, 3), "n")
    batch1, batch2 = draw(
        mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_side=3, max_dims=2), "batch"
    ).input_shapes
    left = draw(st.sampled_from([(n,), (2, n), (*batch1, 3, n), (*batch1, 0, n)]), "left")
    right = draw(st.sampled_from([(n,), (n, 2), (*batch2, n, 3)]), "right")
    x1, x2 = draw.array(left), draw.array(right)
    return (x1, x2), {}, x1 @ x2


@proof("linalg.dot")
def _(draw):
    n = draw(st.integers(0, 3), "n")
    left = draw(st.sampled_from([(), (n,), (2, n), (3, 2, n)]), "left")
    right = draw(st.sampled_from([(), (n,), (n, 2), (2, n, 3)]), "right")
    x1, x2 = draw.array(left), draw.array(right)
    return (x1, x2), {}, np.dot(x1, x2)


@proof("linalg.solve")
def _(draw):
    n = draw(st.integers(1, 3), "n")
    batch = draw(shapes(0, (0, 2)), "batch")
    A = draw.array((*batch, n, n), -0.5, 0.5) + np.eye(n, dtype=draw.dtype) * 2
    b = draw.array(draw(st.sampled_from([(n,), (n, 2), (*batch, n, 1)]), "right"))
    return (A, b), {}, np.linalg.solve(A, b)


# Operators that look


@pytest.mark.parametrize("name", ["watchpoint", "assert_true", "assert_isinstance"])
def test_looking(name):
    seen = []

    def look(x):
        seen.append(x)
        return True

    with Builder() as m:
        x = m.input("x")
        getattr(stdlib, name)(x, np.ndarray if name == "assert_isinstance" else look)
        m.output(y=2 * x)
    x = np.ones(3)
    (y,), (_x,) = m.compute_with_vjp(dict(x=x), dict(_y=x))
    assert (y == 2).all() and (_x == 2).all() and getattr(stdlib, name).hvp is ZeroGradient
    assert name == "assert_isinstance" or seen[0] is x


def test_eval_has_zero_gradient():
    with Builder() as m:
        x = m.input("x")
        m.output(y=x * x.eval(np.sum) + x.eval("x * 0"))
    x = np.arange(3.0)
    y, y_ = m.compute_with_jvp("y", dict(x=x), dict(x_=np.ones(3)))
    _, (_x,), (_x_,) = m.compute_with_hvp("y", dict(x=x), dict(x_=np.ones(3), _y=np.ones(3)))
    np.testing.assert_array_equal(_x_ + np.zeros(3), 0.0)
    np.testing.assert_array_equal(y, 3 * x)
    np.testing.assert_array_equal(y_, 3 * np.ones(3))
    np.testing.assert_array_equal(_x, 3 * np.ones(3))


# Edges

ELEMENTS = sorted(
    key
    for key in set(OPERATORS) - LOOKING
    if key.startswith(("unary.", "binary."))
    or key
    in (
        "stdlib.abs",
        "stdlib.neg",
        "stdlib.add",
        "stdlib.sub",
        "stdlib.mul",
        "stdlib.div",
        "stdlib.mod",
        "stdlib.pow",
    )
)


def slopes_of_all(op, x):
    """The derivatives of an element-wise operator with respect to each of its arguments, by both sweeps."""
    with Builder() as m:
        m.output(y=op(*[m.input(f"x{i}") for i in range(len(x))]))
    init = {f"x{i}": value for i, value in enumerate(x)}
    y, found = m.compute_with_vjp(init, dict(_y=np.ones(len(x[0]))))
    for i, slope in enumerate(found):
        tangents = {f"x{j}_": np.full(len(x[0]), float(i == j)) for j in range(len(x))}
        np.testing.assert_allclose(m.compute_with_jvp("y", init, tangents)[1], slope)
    return found


def slopes(f, x, v=1.0):
    """The derivative of an element-wise function by both sweeps, which must agree."""
    with Builder() as m:
        m.output(y=f(m.input("x")))
    with np.errstate(all="ignore"):
        (y,), (_x,) = m.compute_with_vjp(dict(x=x), dict(_y=v * np.ones_like(x)))
        _, y_ = m.compute_with_jvp("y", dict(x=x), dict(x_=v * np.ones_like(x)))
    np.testing.assert_array_equal(_x, y_)
    return _x


@pytest.mark.parametrize("exponent", [0, 0.0, 1, 2, 2.0, 3, -1.0, np.array([0.0, 1.0, 2.0])])
def test_powers_of_zero_and_of_negative_numbers(exponent):
    x = np.array([0.0, -1.5, 2.0])
    with np.errstate(all="ignore"):
        expected = np.where(
            np.asarray(exponent) == 0,
            0.0,
            exponent * x ** np.where(np.asarray(exponent) == 0, 1.0, np.asarray(exponent) - 1.0),
        )
    np.testing.assert_allclose(slopes(lambda x: x**exponent, x), expected)


def test_zero_to_a_power_that_varies():
    np.testing.assert_array_equal(slopes(lambda x: 0.0**x, np.array([0.5, 2.0])), 0.0)
    np.testing.assert_array_equal(slopes(lambda x: np.array([0.0, 1.0]) ** x, np.array([2.0, 2.0])), 0.0)


@pytest.mark.parametrize(
    "name", ["sqrt", "cbrt", "log", "log1p", "reciprocal", "arcsin", "arccosh", "arctanh", "log2", "log10"]
)
def test_zero_times_an_infinite_slope_is_zero(name):
    pole = {"log1p": -1.0, "arcsin": 1.0, "arccosh": 1.0, "arctanh": 1.0}.get(name, 0.0)
    assert np.isinf(slopes(getattr(unary, name), np.array([pole]))).all()
    np.testing.assert_array_equal(slopes(getattr(unary, name), np.array([pole]), v=0.0), 0.0)


class Poisoned(Draw):
    """Draws arrays with poles, infinities and what is not a number among their elements."""

    def array(self, shape, *args, **kwargs):
        x = super().array(shape, *args, **kwargs).copy()
        poison = np.array([0.0, -1.0, 1.0, np.inf, -np.inf, np.nan], x.dtype)
        return np.where(self.rng.random(x.shape) < 0.6, self.rng.choice(poison, x.shape), x)


def vanishes(derivatives):
    return all(value is ZeroGradient or np.all(np.equal(value, 0)) for value in derivatives.values())


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - LOOKING))
@settings(max_examples=examples(15), suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_has_no_influence_has_no_derivative(name, data):
    """Zero cotangents and tangents give zeros, whatever the values and the slopes are."""
    function, dtypes = PROOFS[name]
    with np.errstate(all="ignore"):
        try:
            args, kwargs, _ = function(Poisoned(data, dtypes))
            trial = Trial(OPERATORS[name], args, {}, constant=kwargs.get("constant", ()))
        except (np.linalg.LinAlgError, ZeroDivisionError, OverflowError):
            assume(False)
        v, w = trial.tangents(), trial.cotangents()
        v = {
            key: value_type(x).random_like(x, np.random.default_rng(5))
            for key, x in trial.init.items()
            if key in v
        }
        no_v, no_w = ({key: 0 * value for key, value in x.items()} for x in (v, w))
        try:
            zeros = trial.vjp(no_w), trial.jvp(no_v), trial.hvp(no_w, v), trial.hvp(w, no_v)
        except np.linalg.LinAlgError:  # rounding makes a matrix regular, and its adjoint singular
            assume(False)
        assert all(map(vanishes, zeros))


@pytest.mark.parametrize("f", [
    lambda x: x**0.5, lambda x: x**-1.0, lambda x: 1.0 / x, lambda x: x / x, lambda x: x**x, lambda x: np.log(x), lambda x: x * [np.inf, 1.0],
    lambda x: x * np.inf, lambda x: np.inf / x, lambda x: abs(x) ** 0.5, lambda x: linalg.norm(linalg.stack([x, x]), 1.5, 0), lambda x: np.arctan2(x, 0.0 * x),
    lambda x: linalg.hypot(x, x) ** 0.5, lambda x: linalg.sqrt(x) / x, lambda x: linalg.power(x, 0.25), lambda x: linalg.divide(2.0, x), lambda x: x % x,
], ids=range(17))  # fmt: skip
def test_a_mask_hides_a_pole(f):
    """The derivatives of what is masked are those without the masked element."""
    x = np.array([0.0, 4.0])
    with Builder() as m:
        s = m.input("x")
        m.output(y=linalg.where(s > 0, f(s), 0.0))
    with Builder() as only:
        m2 = only.input("x")
        only.output(y=f(linalg.stack([m2, m2]))[1])
    with np.errstate(all="ignore"):
        _, [_x], [_x_] = m.compute_with_hvp("y", dict(x=x), dict(x_=np.array([0.0, 2.0]), _y=np.ones(2)))
        _, y_ = m.compute_with_jvp("y", dict(x=x), dict(x_=np.array([0.0, 2.0])))
        _, [one], [one_] = only.compute_with_hvp("y", dict(x=4.0), dict(x_=2.0, _y=1.0))
    np.testing.assert_allclose(_x, [0.0, one])
    np.testing.assert_allclose(y_, [0.0, 2 * one])
    np.testing.assert_allclose(_x_ + np.zeros(2), [0.0, float(one_)], atol=1e-15)


@pytest.mark.parametrize("f", [
    lambda x, A: linalg.einsum("ij,j->i", [A, x]), lambda x, A: A @ x, lambda x, A: linalg.dot(A, x), lambda x, A: linalg.dot(x, A.transpose()),
    lambda x, A: linalg.einsum("ij,j,j->i", [A, x, np.ones(3)]), lambda x, A: x @ A.transpose(),
], ids=range(6))  # fmt: skip
def test_in_a_sum_of_products_zeros_meet_infinities(f):
    """A row of infinities counts only where its cotangent is not zero, and a column only where something moves."""
    A, x = np.arange(1.0, 7.0).reshape(2, 3), np.ones(3)
    A[0, 1] = np.inf
    with Builder() as m:
        m.output(y=f(m.input("x"), A))
    _, [_x] = m.compute_with_vjp(dict(x=x), dict(_y=np.array([0.0, 2.0])))
    np.testing.assert_array_equal(_x, 2 * A[1])
    _, y_ = m.compute_with_jvp("y", dict(x=x), dict(x_=np.array([1.0, 0.0, 2.0])))
    np.testing.assert_array_equal(y_, A[:, 0] + 2 * A[:, 2])
    _, [_x] = m.compute_with_vjp(dict(x=x), dict(_y=np.array([1.0, 0.0])))
    np.testing.assert_array_equal(_x, A[0])


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "?", "f2"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_derivatives_do_not_wrap_around(name, dtype):
    """Those of small integers are those of the same numbers as floats, whatever the value does."""
    op = OPERATORS[name]
    inside = name.split(".")[1] in ("arcsin", "arccos", "arctanh")
    half = dtype == "f2" or dtype in ("u1", "i1", "u2", "?") and issubclass(op.prototype, unary.result_ufunc)
    x = np.array([0, 1] if inside else [1] if dtype == "?" else [1, 3, 5] if half else [1, 3, 9, 100]).astype(
        dtype
    )
    with np.errstate(all="ignore"):
        try:
            found = slopes_of_all(op, [x] * len(op.ain))
        except TypeError:
            return  # NumPy does not compute it, or the operator refuses integers
        expected = slopes_of_all(op, [x.astype("f8")] * len(op.ain))
    rtol = 2e-2 if half else 1e-5
    for a, b in zip(found, expected):
        assert a.dtype.kind == "f"
        np.testing.assert_allclose(a, b, rtol=rtol)


@pytest.mark.parametrize("name", ["sqrt", "log", "cbrt", "arcsin", "arccosh", "arctanh", "log1p"])
def test_slopes_of_numbers_at_poles(name):
    """Python's numbers divide by zero with an exception, NumPy's with an infinity."""
    pole = {"log1p": -1.0, "arcsin": 1.0, "arccosh": 1.0, "arctanh": 1.0}.get(name, 0.0)
    for f in [getattr(unary, name)] + [lambda x: x**0.5, lambda x: x**0.25 * 1.0] * (pole == 0):
        assert np.isinf(slopes(f, pole)) and slopes(f, pole, v=0.0) == 0


def test_sums_of_half_precision_do_not_overflow_on_the_way():
    x = np.full(1000, 300, "f2")
    with Builder() as m:
        s = m.input("x")
        m.output(mean=linalg.mean(s), norm=linalg.norm(s), square=linalg.to_scalar(s * np.float16(0.01)))
    mean, norm, square = m.compute(["mean", "norm", "square"], dict(x=x))
    assert (mean, mean.dtype) == (
        300,
        "f4",
    ) and norm.dtype == square.dtype == "f4"  # half is computed in single
    np.testing.assert_allclose([norm, square], [300 * 1000**0.5, 9000], rtol=1e-2)
    _, [_x] = m.compute_with_vjp(dict(x=x), dict(_norm=1.0))
    np.testing.assert_allclose(_x, np.full(1000, 1000**-0.5), rtol=1e-2)


def test_kinks():
    zero = np.zeros(1)
    for f in (
        abs,
        unary.absolute,
        unary.sinc,
        lambda x: binary.hypot(x, x),
        lambda x: linalg.norm(x, keepdims=True),
    ):
        assert slopes(f, zero) == 0
    for f in binary.maximum, binary.minimum, binary.fmax, binary.fmin:
        assert slopes(lambda x, f=f: f(x, 0.0), zero) == 0.5
        assert slopes(lambda x, f=f: f(x, x), zero) == 1
    for f in binary.fmax, binary.fmin:
        assert slopes(lambda x, f=f: f(x, np.nan), np.ones(1)) == 1
        assert slopes(lambda x, f=f: f(np.nan, x), np.ones(1)) == 1
    with Builder() as m:
        m.output(y=linalg.norm(m.input("x"), np.inf))
    np.testing.assert_array_equal(
        m.compute_with_vjp(dict(x=np.array([3.0, -3.0, 1.0])), dict(_y=1.0))[1][0], [0.5, -0.5, 0.0]
    )
    assert slopes(lambda x: binary.logaddexp(x, x), np.array([-np.inf])) == 1


@pytest.mark.parametrize("x", [np.arange(1, 4), 2, 2.5, 1 + 2j, np.float32(1.5)], ids=repr)
@pytest.mark.parametrize("name", ["sin", "sqrt", "absolute", "square", "sinc", "exp"])
def test_numbers_and_integers(name, x):
    check(getattr(unary, name), x, truth=getattr(np, name), rtol=1e-4 if isinstance(x, np.float32) else None)


def test_no_negative_starts_of_segments():
    with Builder() as m:
        m.output(y=linalg.sumat(m.input("x"), at=[2, 1]))
    with pytest.raises(ValueError, match="ascending"):
        m.compute("y", dict(x=np.ones(4)))


# Second derivatives at edges, and what is no second derivative


def bends(f, x, v=1.0):
    """The second derivative of an element-wise function, times v."""
    with Builder() as m:
        m.output(y=f(m.input("x")))
    with np.errstate(all="ignore"):
        y = m.compute("y", dict(x=x))
        return m.compute_with_hvp("y", dict(x=x), dict(x_=v * np.ones_like(x), _y=np.ones_like(y)))[2][0]


@pytest.mark.parametrize(
    "exponent", [0, 0.0, 1, 2, 2.0, 3, np.array([0.0, 1.0, 2.0]), np.array([0, 1, 2])], ids=repr
)
def test_bends_of_powers_of_zero_and_of_negative_numbers(exponent):
    x, n = np.array([0.0, -1.5, 2.0]), np.asarray(exponent)
    expected = n * (n - 1) * x ** np.where(n < 2, 0, n - 2)
    np.testing.assert_allclose(bends(lambda x: x**exponent, x), expected)


def test_bends_of_powers_of_both():
    np.testing.assert_array_equal(bends(lambda x: 0.0**x, np.array([0.5, 2.0])), 0.0)
    x = np.array([0.5, 2.0])  # (x**x)'' = x**x ((1 + log x)**2 + 1 / x)
    np.testing.assert_allclose(bends(lambda x: x**x, x), x**x * ((1 + np.log(x)) ** 2 + 1 / x))
    with Builder() as m:
        a, b = m.input("a", "b")
        m.output(y=a**b)
    with np.errstate(all="ignore"):
        _, _, (_a_, _b_) = m.compute_with_hvp("y", dict(a=0.0, b=2.0), dict(a_=1.0, b_=1.0))
    assert (_a_, _b_) == (2.0, 0.0)


def test_bends_at_kinks_and_poles():
    zero = np.zeros(1)
    for f in abs, unary.absolute, lambda x: binary.hypot(x, x), lambda x: linalg.norm(x, keepdims=True):
        assert np.all(bends(f, zero) == 0)
    for f in abs, unary.absolute, lambda x: linalg.norm(x, 3, keepdims=True):
        assert np.all(bends(f, zero + 0j) == 0)
    for f in unary.sqrt, unary.log, unary.cbrt, unary.reciprocal:
        assert np.isinf(bends(f, zero)) and bends(f, zero, v=0.0) == 0
    x = np.array([0.1591, 0.1592])  # to both sides of the point where the series ends
    u = np.pi * x
    expected = -(np.pi**2) * (np.sin(u) / u + 2 * (u * np.cos(u) - np.sin(u)) / u**3)
    np.testing.assert_allclose(bends(unary.sinc, x), expected, rtol=1e-12)
    np.testing.assert_allclose(bends(unary.sinc, np.array([0.0, 1e-9])), -(np.pi**2) / 3)


def test_a_function_without_second_derivative_does_not_offer_one():
    @operator
    class softplus(unary.unary_ufunc):
        f = staticmethod(lambda x: np.log1p(np.exp(x)))
        fprime = staticmethod(lambda x: 1 / (1 + np.exp(-x)))

    @operator
    class other_slope(unary.sin.prototype):
        fprime = staticmethod(lambda x: 2 * np.cos(x))

    assert softplus.hvp is None and other_slope.hvp is None
    assert check(softplus, np.linspace(-1, 1, 5)).second is None
    with pytest.raises(BrokenPrimitive, match="softplus has no hvp"):
        check_second_order(softplus, np.ones(3))


@pytest.mark.parametrize("wrong", ["factor", "flat", "one at a time", "not symmetric"])
def test_a_wrong_second_derivative_is_found(wrong):
    class product:
        ain, aout = ("a", "b"), "y"

        def apl(node, a, b):
            return a * b

        def vjp(node, _y, a, b):
            return dict(_a=_y * b, _b=_y * a * (2 if wrong == "not symmetric" else 1))

        def jvp(node, a_, b_, a, b):
            return a_ * b + a * b_

        def hvp(node, _y, a_, b_):
            if wrong == "one at a time" and (a_ is ZeroGradient or b_ is ZeroGradient):
                return ZeroGradient
            factor = dict([("factor", 1.01), ("not symmetric", 2)]).get(wrong, 1)
            return dict(_a_=_y * b_, _b_=factor * _y * a_)

    if wrong == "flat":
        product.hvp = ZeroGradient
    expected = dict([("one at a time", "one tangent at a time"), ("not symmetric", "not symmetric")]).get(
        wrong, "not the derivative"
    )
    with pytest.raises(AssertionError, match=expected):
        check_second_order(operator(product), np.array([0.5, 1.5]), np.array([1.0, 2.0]))


# Integers, truth values, and lists of numbers


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - LOOKING - {"linalg.item_of", "unary.reciprocal"}))
def test_derivatives_of_integers_are_floats(name):
    """The proof at integers near its points: the value is that of NumPy, and derivatives are no integers."""
    op, i = OPERATORS[name], np.arange(1, 5).reshape(2, 2) + 2 * np.eye(2, dtype=int)
    calls = {
        "linalg.broadcast_to": (i, (3, 2, 2)), "linalg.reshape": (i, -1), "linalg.take": (i, [1, 0], 0), "linalg.where": (i > 2, i, i),
        "linalg.getitem": (i, (slice(None), 0)), "linalg.clip": (i, 2, 4), "linalg.stack": ([i, i],), "linalg.concatenate": ([i, i],),
        "linalg.sumat": (i, [0, 1], 0), "linalg.einsum": ("ij,jk", [i, i]), "linalg.matmul": (i, np.arange(8).reshape(2, 2, 2)),
        "unary.arcsin": (i * 0,), "unary.arccos": (i * 0,), "unary.arctanh": (i * 0,),
    }  # fmt: skip
    two = len(OPERATORS[name].ain) == 2 if isinstance(op, Operator) else False
    trial = Trial(op, calls.get(name, (i, i) if two else (i,)), {})
    assert trial.varied
    for derivatives in (
        trial.jvp(trial.tangents()),
        trial.vjp(trial.cotangents()),
        trial.hvp(trial.cotangents(), trial.tangents()),
    ):
        for value in derivatives.values():
            assert value is ZeroGradient or np.asarray(value).dtype.kind in "fc"


@pytest.mark.parametrize(
    "op",
    [
        stdlib.add,
        stdlib.sub,
        stdlib.mul,
        stdlib.div,
        stdlib.mod,
        stdlib.pow,
        binary.maximum,
        binary.fmin,
        binary.hypot,
        binary.logaddexp,
        linalg.dot,
        linalg.matrix_product,
    ],
    ids=lambda op: op.__name__,
)
def test_lists_of_numbers(op):
    x, numbers = np.array([1.5, 2.5, 0.7]), [1.0, 2.0, 4.0]
    array = np.array(numbers)
    for f, g in (
        (lambda x: op(x, numbers), lambda x: op(x, array)),
        (lambda x: op(numbers, x), lambda x: op(array, x)),
    ):
        of_list, of_array = check(f, x), check(g, x)
        np.testing.assert_array_equal(of_list.value, of_array.value)
        assert of_list.second is not None


def test_solve_with_lists():
    check(
        lambda x: linalg.solve([[2, 1], [1, 3]], x),
        np.array([1.0, 2.0]),
        truth=lambda x: np.linalg.solve([[2, 1], [1, 3]], x),
    )
    check(
        lambda x: linalg.solve(x, [1, 2]),
        np.array([[2.0, 1], [1, 3]]),
        truth=lambda x: np.linalg.solve(x, [1, 2]),
    )
    check(
        lambda x: linalg.clip(x, [0, 1, 2], None),
        np.array([0.5, 0.5, 2.5]),
        truth=lambda x: np.maximum(x, [0, 1, 2]),
    )


@pytest.mark.parametrize("f, message", [
    (lambda x: linalg.take(x, 1.5, 0), "indices are integers, got an array of float64"),
    (lambda x: linalg.take(x, [True, False], 0), "indices are integers, got an array of bool"),
    (lambda x: linalg.reshape(x, (6,), "K"), "the order is 'C' or 'F', got 'K'"),
    (lambda x: linalg.norm(x, 2), "only norms of vectors .* got ord=2 for 2 axes and axis=None"),
    (lambda x: linalg.norm(x, "fro", 0), "the Frobenius norm is of matrices"),
    (lambda x: linalg.norm(x, 0.5, 0), "ord=0.5"),
])  # fmt: skip
def test_what_was_wrong_and_what_was_expected(f, message):
    with Builder() as m:
        m.output(y=f(m.input("x")))
    with pytest.raises((TypeError, ValueError), match=message):
        m.compute("y", dict(x=np.ones((2, 3))))


# Real beside complex, constants in lists, and indices that are symbols

_rng = np.random.default_rng(0)


def real(*shape):
    return _rng.uniform(0.5, 1.5, shape)


def cplx(*shape):
    return real(*shape) + 1j * real(*shape)


@pytest.mark.parametrize(
    "op", [stdlib.add, stdlib.sub, stdlib.mul, stdlib.div, stdlib.pow], ids=lambda op: op.__name__
)
def test_arithmetic_of_real_and_complex(op):
    for pair in (real(3, 1), cplx(4)), (cplx(3, 1), real(4)), (real(3), 1j), (2.0, cplx(3)):
        check(op, *pair)
    check(op, real(3, 1).astype("f4"), cplx(4).astype("c8"))


@pytest.mark.parametrize(
    "subject, args",
    [
        (linalg.pack_complex, (cplx(3), real(3))),
        (linalg.einsum, ("ij,j->i", [real(2, 3), cplx(3)])),
        (linalg.einsum, ("ij,j->i", [cplx(2, 3), real(3)])),
        (linalg.einsum, ("ij,jk->ik", [real(40, 40), cplx(40, 40)])),
        (linalg.einsum, ("abc,cd,d->ab", [real(12, 9, 8), real(8, 7), real(7)])),
        (linalg.einsum, ("ii", real(3, 3))),
        (linalg.stack, ([real(3), cplx(3)],)),
        (linalg.concatenate, ([real(3), cplx(2)],)),
        (linalg.matrix_product, (real(2, 3), cplx(3))),
        (linalg.dot, (cplx(2, 3), real(3))),
        (linalg.where, (np.array([True, False, True]), real(3), cplx(3))),
        (linalg.solve, (real(3, 3) + 2 * np.eye(3), cplx(3))),
        (linalg.solve, (cplx(3, 3) + 2 * np.eye(3), real(3, 2))),
        (linalg.norm, (np.array([3.0, -2.0, 1.0]), np.inf)),
        (lambda x: linalg.einsum("ij,j->i", [np.ones((2, 3)), x]), (real(3),)),
        (lambda x: linalg.stack([x, np.ones(3), 2 * x]), (real(3),)),
        (lambda x: linalg.concatenate([np.zeros(1), x, x]), (cplx(3),)),
        (lambda x: x[x.eval(np.argmax)], (real(5),)),
        (lambda x: x[x.eval(np.argmax) * 0, 1:], (real(1, 5),)),
        (lambda x: np.ones((2, 5)) @ x @ np.ones(2), (real(5, 2),)),
        (lambda x: x @ x, (real(5),)),
    ],
)
def test_mixtures(subject, args):
    check(subject, *args)


def test_one_number_as_the_cotangent_of_an_array():
    with Builder() as m:
        x = m.input("x")
        m.output(
            reshape=linalg.reshape(linalg.transpose(linalg.broadcast_to(x, (3, 2)), (1, 0)), (6,)),
            cumsum=linalg.cumsum(x),
            concatenate=linalg.concatenate([x, x]),
            stack=linalg.stack([x, x]),
            take=linalg.take(x, [0, 0], axis=0),
            einsum=linalg.einsum("i,j->ij", [x, x]),
            product=x @ np.ones((2, 2)),
            dot=linalg.dot(x, np.ones((2, 2))),
            where=linalg.where(np.array([[True], [False]]), x, 0.0),
        )
    for name in m._outputs:
        y = m.compute(name, dict(x=np.ones(2)))
        _, [one] = m.compute_with_vjp(dict(x=np.ones(2)), {"_" + name: 1.0})
        _, [ones] = m.compute_with_vjp(dict(x=np.ones(2)), {"_" + name: np.ones_like(y)})
        np.testing.assert_array_equal(one, ones)


def test_public_names_exist():
    for module in MODULES.values():
        assert [name for name in module.__all__ if not hasattr(module, name)] == []
        assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("number", [2.5, -3, np.float64(0.5), True], ids=repr)
@pytest.mark.parametrize(
    "x", [np.array([1.0, -2.0]), np.array([1.0 + 2.0j, -1.0j]), 1.5, np.float32([1, 2])], ids=repr
)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_next_to_a_number_is_like_next_to_a_value(name, x, number):
    """The operators that are used next to a number have the name, the values and the derivatives of the whole ones."""
    op = getattr(stdlib, name)
    for flip in False, True:
        with Builder() as m:
            s = m.input("x")
            m.output(y=op(number, s) if flip else op(s, number))
        with Builder() as whole:
            s, c = whole.input("x", "c")
            whole.output(y=op(c, s) if flip else op(s, c))
        assert (m[0].operator is op) == (flip and name == "div")
        assert m[0].name == whole[0].name and list(m[0].varin) == list(whole[0].varin)
        v, w = np.ones_like(x) * 0.3, np.ones_like(x) * 0.7
        one = m.compute_with_vjp(dict(x=x), dict(_y=w)), m.compute_with_jvp("y", dict(x=x), dict(x_=v))
        other = (
            whole.compute_with_vjp(dict(x=x, c=number), dict(_y=w)),
            whole.compute_with_jvp("y", dict(x=x, c=number), dict(x_=v)),
        )
        np.testing.assert_array_equal(one[0][1][0], other[0][1][0])
        np.testing.assert_array_equal(one[1], other[1])


def test_a_sum_with_a_number_costs_the_sweeps_nothing():
    with Builder() as m:
        x = m.input("x")
        m.output(y=2.0 * (x + 1.0) - 3.0)
    _, tape = m.compute("y", dict(x=1.0), return_tape=True)
    for sweep in tape.get_vjp(), tape.get_jvp():
        assert len(sweep) == 1
    with Builder() as m:  # an array or a complex number may widen the other operand
        x = m.input("x")
        m.output(y=x * 1j, z=x + np.ones(2))
    assert [node.operator for node in m] == [stdlib.mul, stdlib.add]
    _, [_x] = m.compute_with_vjp(dict(x=1.0), dict(_y=1j, _z=np.ones(2)))
    assert _x == 3


def test_a_curvature_that_is_mere_rounding():
    x = np.random.default_rng(62).uniform(0.5, 2.0, (1, 2)).astype("f4")
    for seed in range(20):
        check(lambda x: linalg.norm(x, 1.5, 0), x, seed=seed)


def test_a_function_of_two_complex_arguments_is_declared_by_its_derivatives():
    """None of the library's is complex: those that could be are arithmetic, which has derivatives of its own."""

    @operator
    class twisted(binary.binary_ufunc):
        f = staticmethod(lambda x1, x2: x1 * np.exp(x2))
        fprime1 = staticmethod(lambda x1, x2: np.exp(x2))
        fprime2 = staticmethod(lambda x1, x2: x1 * np.exp(x2))
        fsecond11 = staticmethod(lambda x1, x2: 0 * x1)
        fsecond12 = staticmethod(lambda x1, x2: np.exp(x2))
        fsecond22 = staticmethod(lambda x1, x2: x1 * np.exp(x2))

    rng = np.random.default_rng(5)
    x1, x2 = rng.normal(size=(2, 4, 2)).view("c16")[..., 0]
    assert check(twisted, x1, x2, truth=x1 * np.exp(x2)).second is not None


ELEMENTWISE = [
    key
    for key, op in OPERATORS.items()
    if key.startswith(("unary.", "binary.")) and hasattr(op.prototype, "f") and key not in LOOKING
]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_operators_tell_the_derivatives_that_they_have(name):
    """Also those that are not used, since the operator has formulas of its own in terms of the result."""
    op, values = OPERATORS[name], dict(x1=np.array([1.5, 2.0]), x2=np.array([1.7, 0.6]))
    if name.startswith("unary."):
        inside = name in ("unary.arcsin", "unary.arccos", "unary.arctanh")
        values = dict(x=np.array([0.3, 0.7]) if inside else values["x1"])
    with Builder() as m:
        m.output(y=op(*[m.input(key) for key in values]))
    told = [
        getattr(op.prototype, kind)(*values.values())
        for kind in (["fprime"] if "x" in values else ["fprime1", "fprime2"])
    ]
    slopes = []
    for key in values:
        tangents = {f"{other}_": np.full(2, float(other == key)) for other in values}
        slopes.append(m.compute_with_jvp("y", values, tangents)[1])
    np.testing.assert_allclose(np.broadcast_arrays(*told, slopes[0])[:-1], slopes, rtol=1e-12)
    _, found = m.compute_with_vjp(values, dict(_y=np.ones(2)))
    np.testing.assert_allclose(found, slopes, rtol=1e-12)

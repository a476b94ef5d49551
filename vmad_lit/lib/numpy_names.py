"""NumPy's functions of symbols: which operators they are. Imported for what it registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from ..core.error import NoValueYet
from ..core.stdlib.numpy_calls import BUILDERS, INSTEAD, Unsupported, answers, by_method, operand, symbols_in
from ..core.symbol import List, Symbol, Value
from . import binary, linalg, unary

for _module in unary, binary:
    for _name in _module.__all__:
        _ufunc = getattr(numpy, _name, None)
        if isinstance(_ufunc, numpy.ufunc) and _ufunc not in BUILDERS:
            answers(_ufunc)(getattr(_module, _name))
answers(numpy.conjugate)(linalg.conj)
answers(numpy.degrees)(unary.rad2deg)
answers(numpy.radians)(unary.deg2rad)
answers(numpy.matmul)(by_method("matmul"))

ABSENT: Any = numpy._NoValue  # NumPy's default of arguments that were not given


def array(x: Value) -> Any:
    """An argument that stands for one array; a list with symbols in it is stacked."""
    if isinstance(x, (list, tuple, List)) and any(True for _ in symbols_in(x)):
        return linalg.stack([array(item) for item in x])
    return operand(x)


def given(x: Any, default: Any) -> Any:
    return default if x is ABSENT else x


@answers(numpy.sum)
def _(
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Unsupported = None,
    keepdims: Any = ABSENT,
    initial: Unsupported = ABSENT,
    where: Any = ABSENT,
) -> Symbol:
    return linalg.sum(array(a), axis, dtype, given(keepdims, False), given(where, True))


@answers(numpy.mean)
def _(
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Unsupported = None,
    keepdims: Any = ABSENT,
    *,
    where: Any = ABSENT,
) -> Symbol:
    return linalg.mean(array(a), axis, dtype, given(keepdims, False), given(where, True))


@answers((numpy.add, "reduce"))
def _(
    a: Any,
    axis: Any = 0,
    dtype: Any = None,
    out: Unsupported = None,
    keepdims: Any = False,
    initial: Unsupported = ABSENT,
    where: Any = True,
) -> Symbol:
    return linalg.sum(array(a), axis, dtype, keepdims, where)


@answers((numpy.add, "accumulate"))
def _(a: Any, axis: Any = 0, dtype: Any = None, out: Unsupported = None) -> Symbol:
    return linalg.cumsum(array(a), axis, dtype)


@answers((numpy.add, "reduceat"))
def _(a: Any, indices: Any, axis: Any = 0, dtype: Unsupported = None, out: Unsupported = None) -> Symbol:
    return linalg.sumat(array(a), indices, axis)


@answers(numpy.cumsum)
def _(a: Any, axis: Any = None, dtype: Any = None, out: Unsupported = None) -> Symbol:
    return linalg.cumsum(array(a), axis, dtype)


@answers(numpy.linalg.norm)
def _(x: Any, ord: Any = None, axis: Any = None, keepdims: Any = False) -> Symbol:
    return linalg.norm(array(x), ord, axis, keepdims)


@answers(numpy.linalg.solve)
def _(a: Any, b: Any) -> Symbol:
    return linalg.solve(array(a), array(b))


@answers(numpy.dot)
def _(a: Any, b: Any, out: Unsupported = None) -> Symbol:
    return linalg.dot(array(a), array(b))


@answers(numpy.linalg.matmul)
def _(x1: Any, x2: Any, /) -> Symbol:
    return linalg.matrix_product(array(x1), array(x2))


@answers(numpy.linalg.outer)
def _(x1: Any, x2: Any, /) -> Symbol:
    return linalg.einsum("i,j->ij", [array(x1), array(x2)])


@answers(numpy.outer)
def _(a: Any, b: Any, out: Unsupported = None) -> Symbol:
    return linalg.einsum("i,j->ij", [linalg.reshape(array(a), -1), linalg.reshape(array(b), -1)])


@answers(numpy.einsum)
def _(*operands: Any, out: Unsupported = None, optimize: Any = False) -> Symbol:
    subscripts, *x = operands
    if not isinstance(subscripts, str):
        raise NoValueYet("np.einsum of symbols takes the subscripts as a str, first")
    return linalg.einsum(subscripts, [array(item) for item in x])


@answers(numpy.where)
def _(condition: Any, x: Any, y: Any, /) -> Symbol:
    return linalg.where(array(condition), array(x), array(y))


@answers(numpy.clip)
def _(
    a: Any,
    a_min: Any = ABSENT,
    a_max: Any = ABSENT,
    out: Unsupported = None,
    *,
    min: Any = ABSENT,
    max: Any = ABSENT,
) -> Any:
    low, high = (given(x, given(y, None)) for x, y in [(a_min, min), (a_max, max)])
    return linalg.clip(array(a), *(x if x is None else array(x) for x in (low, high)))


@answers(numpy.sinc)
def _(x: Any) -> Symbol:
    return unary.sinc(array(x))


@answers(numpy.real)
def _(val: Any) -> Symbol:
    return linalg.unpack_complex(array(val))[0]


@answers(numpy.imag)
def _(val: Any) -> Symbol:
    return linalg.unpack_complex(array(val))[1]


@answers(numpy.reshape)
def _(a: Any, /, shape: Any, order: Any = "C", *, copy: Unsupported = None) -> Symbol:
    return linalg.reshape(array(a), shape, order)


@answers(numpy.ravel)
def _(a: Any, order: Any = "C") -> Symbol:
    return linalg.reshape(array(a), -1, order)


@answers(numpy.transpose)
def _(a: Any, axes: Any = None) -> Symbol:
    return linalg.transpose(array(a), axes)


@answers(numpy.broadcast_to)
def _(array_: Any, shape: Any, subok: Unsupported = False) -> Symbol:
    return linalg.broadcast_to(array(array_), shape)


@answers(numpy.copy)
def _(a: Any, order: Any = "K", subok: Unsupported = False) -> Symbol:
    return linalg.copy(array(a))


@answers(numpy.take)
def _(a: Any, indices: Any, axis: Any = None, out: Unsupported = None, mode: Any = "raise") -> Symbol:
    return linalg.take(array(a), indices, axis, mode)


@answers(numpy.stack)
def _(arrays: Any, axis: Any = 0, out: Unsupported = None, *, dtype: Unsupported = None) -> Symbol:
    return linalg.stack(each(arrays), axis)


@answers(numpy.concatenate)
def _(arrays: Any, /, axis: Any = 0, out: Unsupported = None, *, dtype: Unsupported = None) -> Symbol:
    return linalg.concatenate(each(arrays), axis)


def each(arrays: Any) -> Sequence[Any]:
    """The items of a list of arrays."""
    if not isinstance(arrays, (list, tuple, List)):
        raise NoValueYet("one symbol is no list of arrays; give a list of symbols")
    return [array(item) for item in arrays]


AXES = "write it with linalg.reshape, linalg.transpose or x[index], which need the number of axes"
SUMS = "write it with linalg.sum, linalg.mean, linalg.dot or linalg.einsum"
LARGEST = "linalg.maximum and linalg.minimum compare two values; x[x.eval(np.argmax)] takes the largest element of a vector"
STEP = "its derivative is zero wherever there is one; x.eval(function) computes it without one"
LOOKS = "the shape and dtype of a value are known when the model runs: x.eval(function)"

for _advice, _names in {
    # Advice, and the functions that it is for
    AXES: "expand_dims squeeze swapaxes moveaxis rollaxis flip fliplr flipud rot90 roll atleast_1d atleast_2d atleast_3d tile repeat split array_split matrix_transpose linalg.matrix_transpose",
    "join arrays with linalg.concatenate or linalg.stack": "vstack hstack dstack column_stack block append insert",
    SUMS: "var std prod inner vdot tensordot trace linalg.trace average nansum nanmean linalg.tensordot linalg.vecdot linalg.multi_dot",
    LARGEST: "max min amax amin ptp nanmax nanmin",
    STEP: "sign floor ceil rint trunc round around fix isnan isfinite isinf signbit argmax argmin argsort any all",
    LOOKS: "shape ndim size result_type iscomplexobj isrealobj zeros_like ones_like full_like empty_like",
    "write x1 / x2 between arrays, or linalg.solve for matrices": "linalg.inv linalg.pinv linalg.lstsq linalg.tensorsolve linalg.tensorinv",
    "x1 // x2 has no derivative; linalg.mod is x1 % x2": "floor_divide divmod fmod",
    "give the power to linalg.power": "float_power",
    "use linalg.norm": "linalg.vector_norm linalg.matrix_norm",
    "compare with linalg.equal, and see linalg.logical_and": "array_equal array_equiv isclose allclose logical_not logical_xor",
    "use linalg.logaddexp and linalg.log": "logaddexp2",
    "choose elements with linalg.where": "select choose piecewise extract compress place put copyto putmask",
    "use linalg.cumsum of a slice": "diff ediff1d gradient trapezoid cumulative_sum",
    "the transforms of fields are vmad_lit.lib.fastpm's r2c and c2r": "fft.fft fft.ifft fft.rfft fft.irfft fft.fftn fft.ifftn fft.rfftn fft.irfftn fft.fft2 fft.ifft2 fft.rfft2 fft.irfft2",
}.items():
    for _name in _names.split():
        _owner: Any = numpy
        for _part in _name.split("."):
            _owner = getattr(_owner, _part, None)
        if _owner is not None:
            INSTEAD[_owner] = _advice

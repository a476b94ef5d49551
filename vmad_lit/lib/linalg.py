"""Operators of linear algebra, with the names, the order of arguments and the conventions of NumPy.

Whatever is said here about lists holds for tuples as well. `to_scalar`, `sum`, `mean`, `dot`, `norm`
and `copy` also work for mesh fields, on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import index
from string import ascii_letters
from typing import Any, NoReturn

import numpy

from ..core import stdlib
from ..core.error import UnpackError
from ..core.operator import ZeroGradient, operator
from ..core.registry import overloaded
from ..core.stdlib import abs, add, div, mod, mul, pow, sub
from ..core.stdlib.operators import Array, Kind, Shape, ShapeOf, kind, unbroadcast, widen
from ..core.stdlib.operators import bend, bent, cleared, divided, plus, scaled, settled_sum, times, turn
from ..core.stdlib.operators import conj as conjugate, has_nan, in_floats, slope
from ..core.symbol import BaseSymbol, List, Literal, Symbol, Value

from . import binary, unary
from .binary import arctan2, binary_ufunc, divide, fmax, fmin, hypot, logaddexp
from .binary import equal, greater, greater_equal, less, less_equal, logical_and, logical_or, not_equal
from .binary import maximum, minimum, multiply, power, subtract
from .unary import *  # noqa: F403


class linear:
    """A base for operators of one argument."""

    ain = "x"
    aout = "y"


def is_list(x: Value) -> bool:
    return isinstance(x, (list, tuple))


def whole(_y: Value, shape: Shape) -> Value:
    """A cotangent in its full shape."""
    return _y if numpy.shape(_y) == tuple(shape) else numpy.broadcast_to(_y, shape)


@operator
class broadcast_to(linear):
    """`x` repeated to a shape."""

    placements = "spread"

    def apl(node, x, shape):
        return numpy.broadcast_to(x, shape)

    def rcd(node, x, shape, y):
        return dict(kind=kind(x), yshape=y.shape, shape=shape)

    def vjp(node, _y, kind, yshape):
        return unbroadcast(whole(_y, yshape), kind)


@operator
class reshape(linear):
    """The elements of `x` in another shape, of which one length may be -1; `order` is that in which the
    elements are counted, "C" (the last index first) or "F" (the first index first)."""

    def apl(node, x, shape, order="C"):
        if order not in ("C", "F"):
            raise ValueError(f"the order is 'C' or 'F', got {order!r}")
        return numpy.reshape(x, shape, order=order)

    def rcd(node, x, shape, order, y):
        return dict(xshape=numpy.shape(x), yshape=y.shape, shape=shape, order=order)

    def vjp(node, _y, xshape, yshape, order):
        return numpy.reshape(whole(_y, yshape), xshape, order=order)


@operator
class transpose(linear):
    """`x` with its axes in another order; reversed if no `axes` are given."""

    def apl(node, x, axes=None):
        return numpy.transpose(x, axes)

    def rcd(node, x, axes, y):
        return dict(axes=axes, yshape=y.shape)

    def vjp(node, _y, axes, yshape):
        if axes is not None:
            axes = numpy.argsort([axis % len(axes) for axis in axes])
        return numpy.transpose(whole(_y, yshape), axes)


@overloaded
class copy(linear):
    """A copy."""

    def apl(node, x):
        return numpy.copy(x)

    def vjp(node, _y):
        return _y


@copy.register
@operator
class copy_of_field:
    ain = {"x": "Field"}
    aout = "y"
    placements = "field -> field"

    def apl(node, x):
        return x.copy()

    def vjp(node, _y):
        return _y


@operator
class take(linear):
    """The elements of `x` with the indices `i` along an axis; of the flattened array if the axis is None.

    An index that is out of bounds is an error, or counted around the end (mode "wrap"), or replaced by
    the nearest one (mode "clip"), as in `numpy.take`.
    """

    def apl(node, x, i, axis=None, mode="raise"):
        return numpy.take(x, whole_numbers(i), axis=axis, mode=mode)

    # Record where the elements came from
    def rcd(node, x, i, axis, mode, y):
        i = whole_numbers(i)
        if mode != "raise":
            n = numpy.size(x) if axis is None else numpy.shape(x)[axis]
            i = i % n if mode == "wrap" else numpy.clip(i, 0, n - 1)
        return dict(kind=kind(x), i=i, axis=axis, mode=mode, yshape=y.shape)

    # Put the elements back
    def vjp(node, _y, kind, i, axis, yshape):
        shape = kind[0] if axis is not None else (math.prod(kind[0]),)
        axis = 0 if axis is None else axis % len(shape)
        _x = numpy.zeros(shape, numpy.result_type(_y))
        # Bring the axes that index to the front
        _y = numpy.moveaxis(whole(_y, yshape), range(axis, axis + i.ndim), range(i.ndim))
        target = numpy.moveaxis(_x, axis, 0)
        if i.ndim == 0:
            target[i] = _y
        else:
            numpy.add.at(target, i, _y)
        return _x.reshape(kind[0])


def whole_numbers(i: Value) -> Array:
    """Indices as an array of integers."""
    i = numpy.asarray(i)
    if i.size and i.dtype.kind not in "iu":
        raise TypeError(f"indices are integers, got an array of {i.dtype}")
    return i.astype("intp")


@operator
class item_of(linear):
    """`x[key]`, for an array or a list."""

    def apl(node, x, key):
        key = tuple(key) if isinstance(key, list) else key
        return x[key]

    # Record a key, and what it opens
    def rcd(node, x, key, y):
        key = tuple(key) if isinstance(key, list) else key
        return dict(key=key, like=len(x) if is_list(x) else kind(x)[0])

    # Put an item back
    def vjp(node, _y, key, like):
        if isinstance(like, int):
            return dict(_x=put_into_list(_y, key, like))
        _x = numpy.zeros(like, numpy.result_type(_y))
        keys = key if isinstance(key, tuple) else (key,)
        arrays = [numpy.asarray(k) for k in keys if not isinstance(k, slice)]
        if any(k.ndim > 0 and k.dtype.kind != "b" for k in arrays):
            numpy.add.at(_x, key, _y)
        else:
            _x[key] = _y
        return like.make(_x) if isinstance(like, ShapeOf) else _x

    def jvp(node, x_, key):
        return x_[key]

    hvp = ZeroGradient


def put_into_list(_y: Value, key: Any, n: int) -> list[Value]:
    _x = [ZeroGradient] * n
    _x[key] = list(_y) if isinstance(key, slice) else _y
    return _x


def getitem(x: Value, key: Any) -> Symbol:
    """`x[key]` as a node: NumPy's indexing of an array, or an item or slice of a list. Symbols may be
    part of the key."""

    def as_key(k: Any) -> Any:
        return numpy.asarray(k, dtype=None if len(k) else "intp") if isinstance(k, list) else k

    if isinstance(key, tuple):
        key = tuple(map(as_key, key))
        if not any(isinstance(k, BaseSymbol) for k in key):
            key = Literal(key)
    return item_of(x, as_key(key))


def filled(items: Sequence[Value], kinds: Iterable[Kind]) -> list[Array]:
    """A list of tangents with arrays of zeros for ZeroGradient."""
    dtype = numpy.result_type(*(item for item in items if item is not ZeroGradient))
    zero = numpy.zeros((), dtype)
    return [
        numpy.broadcast_to(zero, k[0]) if item is ZeroGradient else whole(item, k[0])
        for item, k in zip(items, kinds)
    ]


class joining(linear):
    """A base for operators that make one array of a list."""

    hvp = ZeroGradient

    def rcd(node, x, axis, y):
        return dict(kinds=[kind(item) for item in x], is_list=is_list(x), axis=axis, yshape=y.shape)


@operator
class stack(joining):
    """Join a list of arrays of the same shape along a new axis."""

    def apl(node, x, axis=0):
        return numpy.stack(x, axis=axis)

    def vjp(node, _y, kinds, is_list, axis, yshape):
        pieces = numpy.moveaxis(whole(_y, yshape), axis, 0)
        pieces = [unbroadcast(piece, k) for piece, k in zip(pieces, kinds)]
        return dict(_x=pieces if is_list else numpy.stack(pieces))

    def jvp(node, x_, kinds, axis):
        return numpy.stack(filled(x_, kinds), axis=axis)


@operator
class concatenate(joining):
    """Join a list of arrays along an axis that they have; flattened ones if the axis is None."""

    def apl(node, x, axis=0):
        return numpy.concatenate(x, axis=axis)

    def vjp(node, _y, kinds, is_list, axis, yshape):
        sizes = [math.prod(k[0]) if axis is None else k[0][axis] for k in kinds]
        pieces = numpy.split(whole(_y, yshape), numpy.cumsum(sizes)[:-1], axis=axis or 0)
        pieces = [unbroadcast(piece.reshape(k[0]), k) for piece, k in zip(pieces, kinds)]
        return dict(_x=pieces if is_list else numpy.stack(pieces))

    def jvp(node, x_, kinds, axis):
        return numpy.concatenate(filled(x_, kinds), axis=axis)


@operator
class where:
    """`x1` where a condition is true, and `x2` where it is not. The condition has no derivative."""

    ain = "x1", "x2"
    aout = "y"

    def apl(node, condition, x1, x2):
        return numpy.where(condition, x1, x2)

    # Remember which side was chosen
    def rcd(node, condition, x1, x2, y):
        return dict(
            condition=condition, kind1=kind(x1, node, "x1"), kind2=kind(x2, node, "x2"), yshape=y.shape
        )

    # Send derivatives along the side that was chosen
    def vjp(node, _y, condition, kind1, kind2, yshape):
        zero = numpy.zeros((), numpy.result_type(_y))
        _y = whole(_y, yshape)
        return dict(
            _x1=unbroadcast(numpy.where(condition, _y, zero), kind1),
            _x2=unbroadcast(numpy.where(condition, zero, _y), kind2),
        )

    def jvp(node, x1_, x2_, condition, yshape):
        zero = numpy.zeros((), numpy.result_type(*(x for x in (x1_, x2_) if x is not ZeroGradient)))
        x1_, x2_ = (zero if x is ZeroGradient else x for x in (x1_, x2_))
        return whole(numpy.where(condition, x1_, x2_), yshape)

    hvp = ZeroGradient


def clip(x: Value, min: Value = None, max: Value = None) -> Symbol:
    """`x`, but at least `min` and at most `max`, which may be None. Where `x` is on a limit, each has
    the derivative 1/2."""
    if min is not None:
        x = maximum(x, min)
    return x if max is None else minimum(x, max)


def _no_iteration(self: BaseSymbol) -> NoReturn:
    raise UnpackError(f"{self!r} stands for one value and cannot be unpacked while the model is built")


def _equal(self: BaseSymbol, other: Any) -> Any:
    return NotImplemented if is_no_value(other) else equal(self, other)


def _not_equal(self: BaseSymbol, other: Any) -> Any:
    return NotImplemented if is_no_value(other) else not_equal(self, other)


def is_no_value(other: Any) -> bool:
    """Whether Python compares with a symbol by identity, since the other object is nothing to compute with."""
    return other is None or other is Ellipsis or isinstance(other, (str, bytes, type))


for _name, _method in dict(
    __getitem__=lambda self, key: getitem(self, key),
    __iter__=_no_iteration,
    __lt__=lambda self, other: less(self, other),
    __le__=lambda self, other: less_equal(self, other),
    __gt__=lambda self, other: greater(self, other),
    __ge__=lambda self, other: greater_equal(self, other),
    __eq__=_equal,
    __ne__=_not_equal,
).items():
    setattr(BaseSymbol, _name, _method)

__all__ = ["abs", "div", "mod", "mul", "pow", "sub"]
__all__ += unary.__all__
__all__ += binary.__all__
__all__ += ["broadcast_to", "clip", "concatenate", "copy", "getitem", "reshape", "stack", "take"]
__all__ += ["transpose", "where"]

Axis = int | Sequence[int] | None  # one axis, several, or all
Order = Any  # of a norm: a number, "fro", or None
DType = numpy.dtype[Any] | None


def axes_of(axis: Axis) -> Any:
    """An axis, or several in a tuple, as Python numbers; None for all."""
    return axis if axis is None else tuple(map(index, axis)) if numpy.iterable(axis) else index(axis)


def spread(_y: Value, shape: Shape, dtype: DType, axis: Axis, keepdims: bool) -> Array:
    """The transpose of a sum: repeat along the axes that were summed over, in the precision of what
    was summed."""
    if dtype is not None and dtype.kind in "fc" and numpy.result_type(_y).kind in "fc":
        _y = numpy.asarray(_y).astype(dtype, copy=False)
    if axis is not None and not keepdims and numpy.ndim(_y):
        _y = numpy.expand_dims(_y, axes_of(axis))
    return numpy.broadcast_to(_y, shape)


def wide_type(x: Array) -> str | None:
    """The double precision in which numbers of less are added up; None for all others."""
    narrow = x.dtype.itemsize < numpy.result_type("f8", x.dtype).itemsize
    return dict(f="f8", c="c16").get(x.dtype.kind) if narrow else None


def wide_sum(x: Array, axis: Axis, dtype: Any, keepdims: bool, where: Value) -> Any:
    """A sum of numbers in double precision at least, unless a dtype is given."""
    dtype = dtype or wide_type(x)
    return numpy.sum(x, axis=axes_of(axis), keepdims=keepdims, dtype=dtype, where=where)


def sum_array(
    x: Value, axis: Axis = None, dtype: Any = None, keepdims: bool = False, where: Value = True
) -> Value:
    x = numpy.asarray(x)
    y = wide_sum(x, axis, dtype, keepdims, where)
    return y.astype(x.dtype) if dtype is None and x.dtype.kind in "fc" else y


def masked(_x: Array, where: Value) -> Array:
    """A cotangent that is zero outside of a mask."""
    return _x if where is True else numpy.where(where, _x, numpy.zeros((), _x.dtype))


class reduction(linear):
    """A base for sums along axes, over the elements in a mask."""

    placements = "reduction"

    def rcd(node, x, axis, dtype, keepdims, where, y):
        xdtype = getattr(x, "dtype", None)
        return dict(shape=kind(x)[0], xdtype=xdtype, axis=axis, dtype=dtype, keepdims=keepdims, where=where)


@overloaded
class sum(reduction):
    """The sum over one axis, several, or all, of the elements in a mask; in the dtype of `x` unless a
    `dtype` is given."""

    def apl(node, x, axis=None, dtype=None, keepdims=False, where=True):
        return sum_array(x, axis, dtype, keepdims, where)

    def vjp(node, _y, shape, xdtype, axis, keepdims, where):
        return masked(spread(_y, shape, xdtype, axis, keepdims), where)


@overloaded
class mean(reduction):
    """The mean over one axis, several, or all, of the elements in a mask; in the dtype of `x` unless a
    `dtype` is given."""

    def apl(node, x, axis=None, dtype=None, keepdims=False, where=True):
        x = numpy.asarray(x)
        y = shared(wide_sum(x, axis, dtype, keepdims, where), x.shape, axis, keepdims, where)
        return y.astype(x.dtype) if dtype is None and x.dtype.kind in "fc" else y

    def vjp(node, _y, shape, xdtype, axis, keepdims, where):
        _y = shared(_y, shape, axis, keepdims, where)
        return masked(spread(_y, shape, xdtype, axis, keepdims), where)


def shared(y: Value, shape: Shape, axis: Axis, keepdims: bool, where: Value) -> Value:
    """A sum divided by the number of its terms, in the precision of the sum."""
    axes = axes_of(axis)
    if where is True:
        axes = range(len(shape)) if axes is None else axes if isinstance(axes, tuple) else [axes]
        return y / (math.prod(shape[i] for i in axes) or math.nan)
    n = numpy.sum(numpy.broadcast_to(where, shape), axis=axes, keepdims=keepdims)
    return (y / numpy.where(n == 0, math.nan, n)).astype(numpy.result_type(numpy.asarray(y).dtype, "f4"))


@operator
class cumsum(linear):
    """The partial sums along an axis; of the flattened array if the axis is None."""

    def apl(node, x, axis=None, dtype=None):
        return numpy.cumsum(x, axis=axis, dtype=dtype)

    def rcd(node, x, axis, dtype, y):
        xdtype = getattr(x, "dtype", None)
        return dict(shape=numpy.shape(x), xdtype=xdtype, axis=axis, dtype=dtype, yshape=y.shape)

    def vjp(node, _y, shape, xdtype, axis, yshape):
        axis = 0 if axis is None else axis
        _x = numpy.flip(numpy.cumsum(numpy.flip(whole(_y, yshape), axis), axis=axis), axis)
        return spread(_x.reshape(shape), shape, xdtype, None, False)


@operator
class sumat(linear):
    """The sums of the segments of `x` that begin at the ascending indices `at` along an axis, as
    `numpy.add.reduceat`."""

    def apl(node, x, at, axis=0):
        at = whole_numbers(at)
        if (numpy.diff(at) < 0).any():
            raise ValueError(f"the starts of the segments must be ascending, got {at}")
        x = numpy.asarray(x)
        y = numpy.add.reduceat(x, at, axis=axis, dtype=wide_type(x))
        return y.astype(x.dtype, copy=False) if wide_type(x) else y

    # Repeat along each segment
    def rcd(node, x, at, axis, y):
        return dict(kind=kind(x), at=whole_numbers(at), axis=axis, yshape=y.shape)

    def vjp(node, _y, kind, at, axis, yshape):
        _x = numpy.zeros(kind[0], numpy.result_type(_y))
        lengths = numpy.maximum(numpy.diff(at, append=kind[0][axis]), 1)
        repeated = numpy.repeat(numpy.moveaxis(whole(_y, yshape), axis, 0), lengths, axis=0)
        within = numpy.arange(len(repeated)) - numpy.repeat(numpy.cumsum(lengths) - lengths, lengths)
        numpy.add.at(numpy.moveaxis(_x, axis, 0), numpy.repeat(at, lengths) + within, repeated)
        return _x


@operator
class unpack_complex:
    """The real and the imaginary part."""

    ain = "x"
    aout = "real", "imag"

    def apl(node, x):
        return dict(real=numpy.real(x), imag=numpy.imag(x))

    def rcd(node, x, real, imag):
        return dict(kind=kind(x))

    def vjp(node, _real, _imag, kind):
        return unbroadcast(_real + _imag * 1j, kind)


@operator
class pack_complex:
    """`real + 1j * imag`"""

    ain = "real", "imag"
    aout = "y"

    def apl(node, real, imag):
        return real + imag * 1j

    def rcd(node, real, imag, y):
        return dict(kind1=kind(real), kind2=kind(imag))

    def vjp(node, _y, kind1, kind2):
        return dict(_real=unbroadcast(_y, kind1), _imag=unbroadcast(_y * -1j, kind2))

    def jvp(node, real_, imag_, kind1, kind2):
        return widen(real_ + imag_ * 1j, kind1, kind2)

    hvp = ZeroGradient


@operator
class conj(linear):
    """The complex conjugate."""

    def apl(node, x):
        return numpy.conj(x)

    def vjp(node, _y):
        return numpy.conj(_y)


@overloaded
class to_scalar(linear):
    """The squared norm, the sum of the squared moduli of all elements; a real number."""

    placements = "reduction"

    def apl(node, x):
        return in_precision_of(x, sum_array(squared_modulus(x)))

    def vjp(node, _y, x):
        return scaled(2 * _y, in_floats(x))

    def jvp(node, x_, x):
        return 2 * sum_array(numpy.real(scaled(x_, conjugate(in_floats(x)))))

    def hvp(node, _y, x_):
        return bent(2 * _y, x_)


def squared_modulus(x: Value) -> Array:
    x = numpy.asarray(in_floats(x))
    x = x.astype("f4") if x.dtype == "f2" else x
    return x.real * x.real + x.imag * x.imag if x.dtype.kind == "c" else x * x


def in_precision_of(x: Value, y: Value) -> Value:
    """A sum that was taken in single precision, in half precision if its terms were."""
    return y.astype("f2") if getattr(x, "dtype", None) == "f2" else y


@overloaded
class norm(linear):
    """The norm of an array, or of vectors along an axis, as `numpy.linalg.norm`.

    `ord` is None for the square root of the sum of squares (over one axis, several, or all), "fro" for
    the same of matrices, or, for vectors, a number from 1 to infinity, or -inf for the smallest modulus.
    The derivative at the origin is 0.
    """

    placements = "reduction"

    # The value of a norm
    def apl(node, x, ord=None, axis=None, keepdims=False):
        axes = axes_of(axis)
        # Refuse norms that have no derivatives here
        if ord == "fro":
            if numpy.ndim(x) != 2 if axes is None else isinstance(axes, int) or len(axes) != 2:
                raise ValueError(
                    f"the Frobenius norm is of matrices, got {numpy.ndim(x)} axes and axis={axis!r}"
                )
        elif ord is not None:
            of_vectors = isinstance(axes, int) or axes is None and numpy.ndim(x) == 1
            if not of_vectors or isinstance(ord, str) or not (ord >= 1 or ord == -math.inf):
                raise ValueError(
                    "only norms of vectors with 1 <= ord <= inf or ord=-inf, ord='fro' of matrices, and "
                    "ord=None have derivatives here, "
                    f"got ord={ord!r} for {numpy.ndim(x)} axes and axis={axis!r}"
                )
        if ord in (None, "fro") and not isinstance(axes, int):
            return in_precision_of(x, sum_array(squared_modulus(x), axes, None, keepdims) ** 0.5)
        return numpy.linalg.norm(x, ord, axes, keepdims)

    # The derivatives of a norm
    def rcd(node, x, ord, axis, keepdims, y):
        real = numpy.empty(0, x.dtype).real.dtype if hasattr(x, "dtype") else None
        return dict(x=x, y=y, ord=ord, shape=numpy.shape(x), real=real, axis=axis, keepdims=keepdims)

    def vjp(node, _y, x, y, ord, shape, real, axis, keepdims):
        y = spread(y, shape, real, axis, keepdims)
        return scaled(spread(_y, shape, real, axis, keepdims), slope(slope_of_norm, x, y, ord=ord, axis=axis))

    def jvp(node, x_, x, y, ord, shape, axis, keepdims):
        steepest = slope(slope_of_norm, x, spread(y, shape, None, axis, keepdims), ord=ord, axis=axis)
        return sum_array(numpy.real(scaled(x_, conjugate(steepest))), axis, None, keepdims)

    # The second derivative of a norm
    def hvp(node, _y, x_, x, y, ord, shape, real, axis, keepdims):
        y = spread(y, shape, real, axis, keepdims)
        slope_ = slope(curvature_of_norm, x, x_, y, ord=ord, axis=axis)
        return bent(spread(_y, shape, real, axis, keepdims), slope_)


def slope_of_norm(x: Value, y: Value, ord: Order, axis: Axis) -> Value:
    """The direction of steepest ascent of a norm `y`, repeated to the shape of `x`."""
    nonzero = y + (y == 0)
    if ord in (None, "fro", 2):
        return x / nonzero
    if ord in (math.inf, -math.inf):
        largest = numpy.equal(numpy.absolute(x), y)
        share = largest / numpy.sum(largest, axis=axis, keepdims=True)
        return numpy.sign(x) * share.astype(nonzero.dtype)
    return numpy.sign(x) * (numpy.absolute(x) / nonzero) ** (ord - 1)


def curvature_of_norm(x: Value, x_: Value, y: Value, ord: Order, axis: Axis) -> Value:
    """The tangent of `slope_of_norm`."""
    nonzero, steepest = y + (y == 0), slope_of_norm(x, y, ord, axis)
    y_ = numpy.sum(numpy.real(scaled(x_, conjugate(steepest))), axis=axes_of(axis), keepdims=True)
    if ord in (None, "fro", 2):
        return divided(x_ - scaled(y_, steepest), nonzero) * (y != 0)
    if ord in (math.inf, -math.inf):
        return scaled(turn(x_, x), numpy.absolute(steepest))
    u, r = numpy.sign(x), numpy.absolute(x) / nonzero
    r_ = divided(numpy.real(scaled(x_, conjugate(u))) - scaled(y_, r), nonzero)
    return scaled(turn(x_, x), r ** (ord - 1)) + scaled(r_, u * (ord - 1) * (r + (r == 0)) ** (ord - 2))


@to_scalar.register
@operator
class squared_norm_of_field:
    """The sum of the squared moduli of a field, over all ranks and all modes."""

    ain = {"x": "Field"}
    aout = "y"
    placements = "field -> replicated"

    def apl(node, x):
        return numpy.real(x.cdot(x))

    def vjp(node, _y, x):
        return scaled(2 * _y, x)

    def jvp(node, x_, x):
        return 2 * inner_product(x_, x)

    def hvp(node, _y, x_):
        return bent(2 * _y, x_)


def inner_product(g: Value, x: Value) -> Value:
    """The real inner product of a tangent with a field; what is infinite where the tangent is zero does not count."""
    y = numpy.real(x.cdot(g))
    return y if y == y else numpy.real(cleared(x, g).cdot(g))


@norm.register
@operator
class norm_of_field(squared_norm_of_field.prototype):
    """The square root of that; its derivative at the origin is 0."""

    def apl(node, x):
        return numpy.real(x.cdot(x)) ** 0.5

    def vjp(node, _y, x, y):
        return scaled(_y / y if y != 0 else 0.0, x)

    def jvp(node, x_, x, y):
        return divided(inner_product(x_, x), y) if y != 0 else ZeroGradient

    def hvp(node, _y, x_, x, y):
        if y == 0:
            return ZeroGradient
        return bent(_y / y, x_ - scaled(divided(inner_product(x_, x), y**2), x))


@sum.register
@operator
class sum_of_field:
    """The sum over all cells of a real field, on all ranks."""

    ain = {"x": "RealField"}
    aout = "y"
    placements = "field -> replicated"

    def apl(node, x):
        return x.csum()

    def rcd(node, x, y):
        return dict(shape=ShapeOf(x))

    def vjp(node, _y, shape):
        return shape.make(_y)


@mean.register
@operator
class mean_of_field(sum_of_field.prototype):
    """The mean over all cells of a real field, on all ranks."""

    def apl(node, x):
        return x.csum() / x.csize

    def rcd(node, x, y):
        return dict(shape=ShapeOf(x), n=x.csize)

    def vjp(node, _y, shape, n):
        return shape.make(_y / n)


__all__ += ["conj", "cumsum", "mean", "norm", "pack_complex", "sum", "sumat", "to_scalar"]
__all__ += ["unpack_complex"]


def read_subscripts(subscripts: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """The indices of each operand and of the result of an einsum, with letters for ellipses."""
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    unused = [c for c in ascii_letters if c not in subscripts]
    extra = [n - len(term.replace("...", "")) if "..." in term else 0 for term, n in zip(terms, ndims)]
    dots = "".join(unused[: max(extra)])
    if not arrow:
        letters = inputs.replace(",", "").replace("...", "")
        output = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    terms = [term.replace("...", dots[len(dots) - n :]) for term, n in zip(terms, extra)]
    return terms, output.replace("...", dots)


def evaluate(subscripts: str, operands: Sequence[Value]) -> Any:
    """An einsum; for large operands with an optimal order of the products, and by matrix multiplication."""
    large = len(operands) > 1 and max(map(numpy.size, operands)) > 1000
    return numpy.einsum(subscripts, *operands, optimize=large)


def contract(terms: Sequence[str], output: str, operands: Sequence[Value]) -> Any:
    """An einsum whose subscripts have been read."""
    return evaluate(",".join(terms) + "->" + output, operands)


def pull_through(
    terms: Sequence[str], output: str, operands: Sequence[Value], linear: Sequence[int]
) -> Value:
    """An einsum in which some operands, by number, are cotangents or tangents, whose zeros count also
    where the product of the others is infinite."""
    with numpy.errstate(invalid="ignore"):
        y = contract(terms, output, operands)
        others = [i for i in range(len(operands)) if i not in linear]
        if not has_nan(y) or len(operands) == 1:
            return y
        # Multiply derivatives and slopes out, and settle the sum
        (of_g, g), (of_slope, slope) = (outer_product(terms, operands, which) for which in (linear, others))
        _, moved = outer_product(terms, [1.0 * numpy.not_equal(x, 0) for x in operands], linear)
        g = numpy.where(moved > 0, g, numpy.zeros((), g.dtype))
        return settled_sum(lambda g, slope: contract([of_g, of_slope], output, [g, slope]), g, slope)


def outer_product(terms: Sequence[str], operands: Sequence[Value], which: Sequence[int]) -> tuple[str, Array]:
    """The indices and the value of the product of some operands of an einsum, before any sum; 1 of none."""
    indices = "".join(dict.fromkeys("".join(terms[i] for i in which)))
    factors = [*(operands[i] for i in which), numpy.ones((), "f4")]
    return indices, contract([*(terms[i] for i in which), ""], indices, factors)


@operator
class einsum(linear):
    """The sum of products of a list of arrays that the subscripts describe, as
    `numpy.einsum(subscripts, *x)`."""

    placements = "contraction"

    def apl(node, subscripts, x):
        return evaluate(subscripts, x if is_list(x) else [x])

    def rcd(node, subscripts, x, y):
        terms, output = read_subscripts(subscripts, [numpy.ndim(item) for item in (x if is_list(x) else [x])])
        return dict(x=x, terms=terms, output=output, yshape=numpy.shape(y))

    # Exchange indices for each factor
    def vjp(node, _y, x, terms, output, yshape):
        _y = whole(_y, yshape)
        if not is_list(x):
            return cotangent_of_factor(0, _y, [x], terms, output)
        return dict(
            _x=[
                cotangent_of_factor(i, _y, x, terms, output) if varies(node, i) else ZeroGradient
                for i in range(len(x))
            ]
        )

    # Replace one factor after the other by its tangent
    def jvp(node, x_, x, terms, output):
        if not is_list(x):
            return contract(terms, output, [x_])
        y_ = ZeroGradient
        for i, tangent in enumerate(x_):
            if tangent is not ZeroGradient:
                y_ = y_ + pull_through(terms, output, [*x[:i], tangent, *x[i + 1 :]], [i])
        return y_

    # Let each cotangent change with all other factors
    def hvp(node, _y, x_, x, terms, output, yshape):
        if not is_list(x):
            return ZeroGradient
        _y, _x_ = whole(_y, yshape), [ZeroGradient] * len(x)
        for i in range(len(x)):
            for j, tangent in enumerate(x_):
                if j != i and tangent is not ZeroGradient and varies(node, i):
                    factors = [*x[:j], tangent, *x[j + 1 :]]
                    _x_[i] = plus(_x_[i], cotangent_of_factor(i, _y, factors, terms, output, j))
        return dict(_x_=_x_)


def varies(node: Any, i: int) -> bool:
    """Whether the item `x[i]` of a list is not a constant."""
    given = node["x"]
    return not (isinstance(given, List) and isinstance(given[i], Literal))


def cotangent_of_factor(
    i: int, _y: Value, x: Sequence[Value], terms: Sequence[str], output: str, tangent: int | None = None
) -> Array:
    """The cotangent of the factor `x[i]` of an einsum, one of whose other factors may be a `tangent`."""
    others = [*terms[:i], *terms[i + 1 :], output]
    indices = "".join(dict.fromkeys(terms[i]))
    known = "".join(c for c in indices if any(c in term for term in others))
    linear = [len(x) - 1] if tangent is None else [tangent - (tangent > i), len(x) - 1]
    g = pull_through(others, known, [*(conjugate(item) for item in [*x[:i], *x[i + 1 :]]), _y], linear)
    shape, is_complex = kind(x[i])
    # Repeat along the indices that were only summed over
    g = numpy.reshape(g, [g.shape[known.index(c)] if c in known else 1 for c in indices])
    unique = tuple(shape[terms[i].index(c)] for c in indices)
    g = unbroadcast(g, (tuple(1 if n == 1 else m for n, m in zip(unique, g.shape)), is_complex))
    g = numpy.broadcast_to(g, unique)
    if len(indices) == len(terms[i]):
        return g
    # Put a diagonal into its place
    _x = numpy.zeros(shape, g.dtype)
    numpy.einsum(terms[i] + "->" + indices, _x)[...] = g
    return _x


def matmul(x: Value, A: Value) -> Symbol:
    """The products of the vectors `x[i]` with the matrices `A[i]`: rows y[i] = A[i] x[i]."""
    return einsum("ik,ijk->ij", [x, A])


class product:
    ain = "x1", "x2"
    aout = "y"


@operator
class matrix_product(product):
    """`x1 @ x2`"""

    def apl(node, x1, x2):
        return numpy.matmul(x1, x2)

    def rcd(node, x1, x2, y):
        return dict(x1=numpy.asarray(x1), x2=numpy.asarray(x2), yshape=numpy.shape(y))

    # The derivatives of a matrix product
    def vjp(node, _y, x1, x2, yshape):
        _y = numpy.asarray(whole(_y, yshape))
        return dict(
            _x1=cotangent_of_left(_y, x1, x2) if node.needs("x1") else ZeroGradient,
            _x2=cotangent_of_right(_y, x1, x2) if node.needs("x2") else ZeroGradient,
        )

    def jvp(node, x1_, x2_, x1, x2):
        return settled_sum(numpy.matmul, x1_, x2) + settled_sum(matmul_from_right, x2_, x1)

    def hvp(node, _y, x1_, x2_, x1, x2, yshape):
        _y = numpy.asarray(whole(_y, yshape))
        return dict(
            _x1_=cotangent_of_left(_y, x1, x2_, True) if node.needs("x1") else ZeroGradient,
            _x2_=cotangent_of_right(_y, x1_, x2, True) if node.needs("x2") else ZeroGradient,
        )


def matmul_from_right(g: Value, slope: Value) -> Value:
    return numpy.matmul(slope, g)


def cotangent_of_left(_y: Array, x1: Value, x2: Value, bent: bool = False) -> Value:
    """The cotangent of `x1` in `x1 @ x2`, or its tangent (`bent`), with the tangent of `x2`."""
    if x2 is ZeroGradient:
        return x2
    _y = _y[..., None] if x2.ndim == 1 else _y
    _y = _y[..., None, :] if x1.ndim == 1 else _y
    b = x2[:, None] if x2.ndim == 1 else x2
    _x1 = settled_sum(numpy.matmul, _y, conjugate(b).swapaxes(-1, -2), bent)
    return unbroadcast(_x1[..., 0, :] if x1.ndim == 1 else _x1, kind(x1))


def cotangent_of_right(_y: Array, x1: Value, x2: Value, bent: bool = False) -> Value:
    """The cotangent of `x2` in `x1 @ x2`, or its tangent (`bent`), with the tangent of `x1`."""
    if x1 is ZeroGradient:
        return x1
    _y = _y[..., None] if x2.ndim == 1 else _y
    _y = _y[..., None, :] if x1.ndim == 1 else _y
    a = x1[None, :] if x1.ndim == 1 else x1
    _x2 = settled_sum(matmul_from_right, _y, conjugate(a).swapaxes(-1, -2), bent)
    return unbroadcast(_x2[..., 0] if x2.ndim == 1 else _x2, kind(x2))


for _name, _method in dict(
    __matmul__=lambda self, other: matrix_product(self, other),
    __rmatmul__=lambda self, other: matrix_product(other, self),
).items():
    setattr(BaseSymbol, _name, _method)


@overloaded
class dot(product):
    """`numpy.dot`: the sum of products over the last axis of `x1` and the last but one of `x2`.
    Nothing is conjugated."""

    def apl(node, x1, x2):
        return numpy.dot(x1, x2)

    def vjp(node, _y, x1, x2):
        return dict(_x1=cotangent_of_first(_y, x1, x2), _x2=cotangent_of_second(_y, x1, x2))

    def jvp(node, x1_, x2_, x1, x2):
        return settled_sum(numpy.dot, x1_, x2) + settled_sum(lambda g, slope: numpy.dot(slope, g), x2_, x1)

    def hvp(node, _y, x1_, x2_, x1, x2):
        return dict(_x1_=cotangent_of_first(_y, x1, x2_, True), _x2_=cotangent_of_second(_y, x1_, x2, True))


def cotangent_of_first(_y: Value, x1: Value, x2: Value, bent: bool = False) -> Value:
    """The cotangent of `x1` in `dot(x1, x2)`, or its tangent (`bent`), with the tangent of `x2`."""
    if x2 is ZeroGradient or numpy.ndim(x1) == 0 or numpy.ndim(x2) == 0:
        return (bend if bent else times)(_y, x2, kind(x1))
    n1, n2 = numpy.ndim(x1) - 1, numpy.ndim(x2) - 1
    front = numpy.moveaxis(x2, -2, 0) if n2 else numpy.asarray(x2)
    _y = whole(_y, numpy.shape(x1)[:-1] + front.shape[1:])
    axes = range(n1, n1 + n2), range(1, n2 + 1)
    _x1 = settled_sum(lambda g, slope: numpy.tensordot(g, slope, axes), _y, conjugate(front), bent)
    return unbroadcast(_x1, kind(x1))


def cotangent_of_second(_y: Value, x1: Value, x2: Value, bent: bool = False) -> Value:
    """The cotangent of `x2` in `dot(x1, x2)`, or its tangent (`bent`), with the tangent of `x1`."""
    if x1 is ZeroGradient or numpy.ndim(x1) == 0 or numpy.ndim(x2) == 0:
        return (bend if bent else times)(_y, x1, kind(x2))
    n1, n2 = numpy.ndim(x1) - 1, numpy.ndim(x2) - 1
    shape = numpy.shape(x2)
    _y = whole(_y, numpy.shape(x1)[:-1] + (shape[:-2] + shape[-1:] if n2 else ()))
    axes = range(n1), range(n1)
    _x2 = settled_sum(lambda g, slope: numpy.tensordot(slope, g, axes), _y, conjugate(x1), bent)
    return unbroadcast(numpy.moveaxis(_x2, 0, -2) if n2 else _x2, kind(x2))


@dot.register
@operator
class inner_product_of_fields:
    """The real inner product of two fields of the same mesh and type, over all ranks and all modes."""

    ain = {"x1": "Field", "x2": "Field"}
    aout = "y"
    placements = "field -> replicated"

    def apl(node, x1, x2):
        return numpy.real(x1.cdot(x2))

    def vjp(node, _y, x1, x2):
        return dict(_x1=scaled(_y, x2), _x2=scaled(_y, x1))

    def jvp(node, x1_, x2_, x1, x2):
        first = 0.0 if x1_ is ZeroGradient else inner_product(x1_, x2)
        return first + (0.0 if x2_ is ZeroGradient else inner_product(x2_, x1))

    def hvp(node, _y, x1_, x2_):
        return dict(_x1_=bent(_y, x2_), _x2_=bent(_y, x1_))


@operator
class solve:
    """The solution y of A y = b, as `numpy.linalg.solve`: `b` is one vector, or a (stack of) matrices."""

    ain = "A", "b"
    aout = "y"

    def apl(node, A, b):
        return numpy.linalg.solve(A, b)

    def rcd(node, A, b, y):
        return dict(A=numpy.asarray(A), b=kind(b), y=numpy.asarray(y))

    # The derivatives of a solution
    def vjp(node, _y, A, b, y):
        vector = len(b[0]) == 1
        _b = solved(adjoint(A), columns(whole(_y, y.shape), vector))
        _A = ZeroGradient
        if node.needs("A"):
            _A = unbroadcast(-settled_sum(numpy.matmul, _b, adjoint(columns(y, vector))), kind(A))
        return dict(_A=_A, _b=unbroadcast(rows(_b, vector), b))

    def jvp(node, A_, b_, A, b, y):
        vector = len(b[0]) == 1
        return rows(tangent_of_solution(A, A_, b_, y, vector), vector)

    # The second derivatives of a solution
    def hvp(node, _y, A_, b_, A, b, y):
        vector = len(b[0]) == 1
        _b = solved(adjoint(A), columns(whole(_y, y.shape), vector))
        _b_ = _A_ = ZeroGradient
        if A_ is not ZeroGradient:
            _b_ = -solved(adjoint(A), settled_sum(numpy.matmul, adjoint(A_), _b, True))
        if node.needs("A"):
            y_ = tangent_of_solution(A, A_, b_, y, vector)
            first = settled_sum(numpy.matmul, _b_, adjoint(columns(y, vector)))
            _A_ = unbroadcast(-(first + settled_sum(numpy.matmul, _b, adjoint(y_), True)), kind(A))
        return dict(_A_=_A_, _b_=unbroadcast(rows(_b_, vector), b))


def tangent_of_solution(A: Value, A_: Value, b_: Value, y: Value, vector: bool) -> Value:
    right = b_ if b_ is ZeroGradient else columns(b_, vector)
    return solved(A, right - settled_sum(numpy.matmul, A_, columns(y, vector)))


def solved(A: Value, g: Value) -> Value:
    """The solutions for cotangents or tangents in columns; those of zeros are zero whatever is in A."""
    if not numpy.any(g):
        return 0 * g
    y = numpy.linalg.solve(A, g)
    return numpy.where(numpy.any(g != 0, axis=-2, keepdims=True), y, 0 * g) if has_nan(y) else y


def adjoint(A: Value) -> Value:
    return conjugate(A).swapaxes(-1, -2)


def columns(x: Value, vector: bool) -> Value:
    """A right-hand side or a solution as a (stack of) matrices."""
    return x[..., None] if vector else x


def rows(x: Value, vector: bool) -> Value:
    """The inverse of `columns`."""
    return x[..., 0] if vector else x


__all__ += ["dot", "einsum", "matmul", "matrix_product", "solve"]

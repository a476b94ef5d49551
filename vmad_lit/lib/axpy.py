"""Sums of arrays and multiples of arrays, in one pass and in memory that is used again."""

from __future__ import annotations

from typing import Any

import numpy

from vmad_lit import operator
from vmad_lit.core.graph import Node
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.symbol import Value
from vmad_lit.core.valuetypes import Arrays, register
from vmad_lit.lib import memory
from vmad_lit.lib.mesh import is_zero

try:
    from vmad_lit.lib import loops
except ImportError:  # no numba
    loops = None  # type: ignore[assignment]


def add_multiple(x: Array, v: Array, c: Any, out: Array | None = None) -> Array:
    """x + c * v in the precision of x, as a new array or in `out`."""
    if alike(x, v):
        return loops.axpy(memory.empty_like(x) if out is None else out, x, v, c)
    y = v * c
    return numpy.add(x, y, out=out if out is not None else y if x.dtype == y.dtype else None)


def alike(*arrays: Array) -> bool:
    """Whether our loops can go over these arrays together."""
    like = arrays[0]
    return (
        loops is not None
        and like.dtype in ("f4", "f8")
        and all(a.flags.c_contiguous and a.dtype == like.dtype and a.shape == like.shape for a in arrays)
    )


@operator
class axpy:
    """x + c * v, for arrays of the same shape and a number c.

    On several ranks a `c` that is differentiated is a partitioned value, such as `allbcast` gives.
    """

    ain = {"x": "ndarray", "v": "ndarray", "c": "*"}
    aout = {"y": "ndarray"}

    def apl(node, x, v, c):
        return dict(y=add_multiple(x, v, c))

    def rcd(node, x, v, c, y):
        return dict(c=c, v=None if node.is_literal("c") else v)

    def vjp(node, _y, v, c):
        return dict(
            _x=_y,
            _v=multiple(_y, c) if node.needs("v") else ZeroGradient,
            _c=sum_products(_y, v) if node.needs("c") else ZeroGradient,
        )

    def jvp(node, x_, v_, c_, v, c):
        return dict(y_=plus_multiple(plus_multiple(x_, v_, c), ZeroGradient if is_zero(c_) else v, c_))

    def hvp(node, _y, v_, c_):
        return dict(
            _x_=ZeroGradient,
            _v_=multiple(_y, c_),
            _c_=sum_products(_y, v_) if node.needs("c") else ZeroGradient,
        )


def multiple(x: Value, c: Value) -> Value:
    """c * x for a number c, without work if one of them is zero or c is one."""
    if is_zero(x) or is_zero(c):
        return ZeroGradient
    if isinstance(c, float) and c == 1.0:
        return x
    if isinstance(c, float) and isinstance(x, numpy.ndarray):
        return numpy.multiply(x, c, out=memory.empty_like(x))
    return x * c


def plus_multiple(x: Value, v: Value, c: Value) -> Value:
    """x + c * v, where any of them may be zero."""
    if is_zero(v) or is_zero(c):
        return x
    return multiple(v, c) if is_zero(x) else add_multiple(x, v, c)


def sum_products(a: Value, b: Value) -> float:
    """The inner product of two arrays on this rank, added up in double precision."""
    if is_zero(a) or is_zero(b):
        return 0.0
    return float(numpy.einsum("i,i->", numpy.ravel(a), numpy.ravel(b), dtype="f8"))


def copy_of(x: Array) -> Array:
    y = memory.empty_like(x)
    y[...] = x
    return y


def own_copy(node: Node, name: str, x_: Value, x: Array) -> Array:
    """A value, tangent or cotangent of x that may be overwritten: a copy, unless it may be anyway; for a zero, zeros."""
    y = room_for(node, name, x_, x)
    if y is not x_:
        y[...] = x_
    return y


def room_for(node: Node, name: str, value: Value, like: Array) -> Array:
    """The array of an argument, if it may be overwritten by one `like` another; or a new one."""
    same = getattr(value, "dtype", None) == like.dtype and value.shape == like.shape
    if same and node.owns(name) and value.flags.c_contiguous and value.flags.writeable:
        return value
    return memory.empty_like(like)


@register(numpy.ndarray)
class LargeArrays(Arrays):
    """Arrays whose sums are made in memory that is used again, if they are large."""

    def add(self, a: Array, b: Array) -> Array:
        return add_multiple(a, b, 1.0) if a.nbytes >= memory.LEAST and alike(a, b) else a + b

"""Arithmetic as operators, right for broadcasting and for complex numbers."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, Self

import numpy

from ..graph import Symbols
from ..operator import Operator, ZeroGradient, operator
from ..symbol import BaseSymbol, Literal, Value
from ..valuetypes import PLAIN, VALUE_TYPES, apart, by_parts, parts_of

Array = numpy.ndarray[Any, Any]
Shape = tuple[Any, ...]
Kind = tuple[Shape, bool]


def kind(x: Value, node: Any = None, name: str = "") -> Kind:
    """What a derivative has to know about a value, the argument of some name of a node: its shape, and whether it
    is complex."""
    cls = type(x)
    if cls is numpy.ndarray and x.shape:
        return x.shape, x.dtype.kind == "c"
    own = False
    # See whether each rank has a number of its own
    if node is not None and node.placed:
        own = node.placement(name) == "partitioned"
    if cls is float or cls is int:
        return OWN_NUMBER if own else NUMBER
    # Look into a value with parts
    if has_parts(x):
        shape = ShapeOf(x)
        return shape, shape.is_complex
    own_number = own and numpy.ndim(x) == 0
    return OWN if own_number else numpy.shape(x), numpy.iscomplexobj(x)


NUMBER: Kind = (), False  # the kind of most constants


def unbroadcast(g: Value, kind: Kind) -> Value:
    """Bring the cotangent of a broadcast value to the kind of the value: sum over repetitions, drop
    an imaginary part."""
    if g is ZeroGradient:
        return g
    shape, is_complex = kind
    if type(g) is numpy.ndarray:
        if g.shape == shape and (is_complex or g.dtype.kind != "c"):
            return g
    # Bring the parts of a value to that kind
    elif has_parts(g):
        return unbroadcast_parts(g, shape, is_complex)
    if not is_complex and numpy.iscomplexobj(g):
        g = numpy.real(g)
    return g if getattr(g, "shape", ()) == shape else sum_to(g, shape)


def sum_to(g: Value, shape: Shape) -> Value:
    """Sum an array over the axes along which a value of the given shape was repeated."""
    extra = numpy.ndim(g) - len(shape)
    if extra < 0:
        return g
    repeated = (extra + i for i, n in enumerate(shape) if n == 1 and g.shape[extra + i] != 1)
    return numpy.sum(g, axis=(*range(extra), *repeated), keepdims=True).reshape(shape)


def widen(g: Value, kind1: Kind, kind2: Kind) -> Value:
    """Repeat a tangent as broadcasting two values of these kinds would."""
    shape1, shape2 = kind1[0], kind2[0]
    if g is ZeroGradient:
        return g
    # Make a value with parts of a tangent
    if type(shape1) is ShapeOf or type(shape2) is ShapeOf:
        like: Any = shape1 if type(shape1) is ShapeOf else shape2
        return g if has_parts(g) else like.make(g)
    shape = shape1 if shape1 == shape2 else numpy.broadcast_shapes(shape1, shape2)
    fits = getattr(g, "shape", ()) == shape or numpy.ndim(g) > len(shape)
    return g if fits else numpy.broadcast_to(g, shape)


def as_array(x: Value) -> Value:
    """A list of numbers as an array, and anything else as it is."""
    return numpy.asarray(x) if isinstance(x, (list, tuple)) else x


def conj(x: Value) -> Value:
    """The complex conjugate; a real value as it is, without a copy."""
    return numpy.conj(x) if kind(x)[1] else x


def plus(a: Value, b: Value) -> Value:
    """The sum of two tangents. ZeroGradient can add itself to an array, but to look first is quicker."""
    if a is ZeroGradient:
        return b
    return a if b is ZeroGradient else a + b


def scaled(g: Value, slope: Value) -> Value:
    """The product of a cotangent or tangent with a slope, zero where the former is zero even if the
    latter is infinite or not a number."""
    if g is ZeroGradient or slope is ZeroGradient:
        return ZeroGradient
    # Keep zeros from meeting infinite slopes
    if not is_tame(slope):
        with numpy.errstate(invalid="ignore"):
            product = g * slope
        return settled(product, g)
    return g * slope


def divided(g: Value, x: Value) -> Value:
    """The quotient of a cotangent or tangent and a value, with the same rule."""
    if g is ZeroGradient:
        return g
    # Keep zeros from being divided by zero
    if not is_tame(x) or not has_no_zero(x):
        with numpy.errstate(invalid="ignore", divide="ignore"):
            quotient = g / x
        return settled(quotient, g)
    return g / x


def bent(_y: Value, slope_: Value) -> Value:
    """The product of a cotangent with the tangent of a slope, zero where either is."""
    product = scaled(_y, slope_)
    # Let the zeros of either count
    if product is not ZeroGradient:
        product = settled(product, slope_)
    return product


class unary:
    ain = "x"
    aout = "y"
    placements = "elementwise"


@operator
class pos(unary):
    """`+x`"""

    def apl(node, x):
        return +x

    def vjp(node, _y):
        return +_y


@operator
class neg(unary):
    """`-x`"""

    def apl(node, x):
        return -x

    def vjp(node, _y):
        return -_y


class binary:
    ain = "x1", "x2"
    aout = "y"
    placements = "elementwise"


@operator
class add(binary):
    """`x1 + x2`"""

    alias = True

    # The value of a sum
    def apl(node, x1, x2):
        cls = type(x1)
        if cls in PLAIN or cls is not type(x2) or cls in (list, tuple):
            return x1 + x2
        return VALUE_TYPES[cls].add(x1, x2)

    def rcd(node, x1, x2, y):
        return dict(kind1=kind(x1, node, "x1"), kind2=kind(x2, node, "x2"))

    def vjp(node, _y, kind1, kind2):
        if kind1 == kind2 and type(kind1[0]) is type(kind2[0]):
            _x = unbroadcast(_y, kind1)
            return dict(_x1=_x, _x2=_x)
        return dict(
            _x1=unbroadcast(_y, kind1) if node.needs("x1") else ZeroGradient,
            _x2=unbroadcast(_y, kind2) if node.needs("x2") else ZeroGradient,
        )

    def jvp(node, x1_, x2_, kind1, kind2):
        return widen(plus(x1_, x2_), kind1, kind2)

    hvp = ZeroGradient


@operator
class sub(binary):
    """`x1 - x2`"""

    alias = True

    def apl(node, x1, x2):
        return x1 - x2

    def rcd(node, x1, x2, y):
        return dict(kind1=kind(x1, node, "x1"), kind2=kind(x2, node, "x2"))

    def vjp(node, _y, kind1, kind2):
        return dict(
            _x1=unbroadcast(_y, kind1) if node.needs("x1") else ZeroGradient,
            _x2=unbroadcast(-_y, kind2) if node.needs("x2") else ZeroGradient,
        )

    def jvp(node, x1_, x2_, kind1, kind2):
        return widen(x1_ - x2_, kind1, kind2)

    hvp = ZeroGradient


@operator
class mul(binary):
    """`x1 * x2`"""

    def apl(node, x1, x2):
        return x1 * x2

    def rcd(node, x1, x2, y):
        kinds = kind(x1, node, "x1"), kind(x2, node, "x2")
        if node.is_literal("x1"):
            x2 = ZeroGradient
        if node.is_literal("x2"):
            x1 = ZeroGradient
        return dict(x1=x1, x2=x2, kinds=kinds)

    # The derivatives of a product of two
    def vjp(node, _y, x1, x2, kinds):
        _x1 = times(_y, x2, kinds[0])
        return dict(_x1=_x1, _x2=_x1 if x1 is x2 else times(_y, x1, kinds[1]))  # of a square, once

    def jvp(node, x1_, x2_, x1, x2, kinds):
        return widen(plus(scaled(x1_, x2), scaled(x2_, x1)), *kinds)

    def hvp(node, _y, x1_, x2_, kinds):
        return dict(_x1_=bend(_y, x2_, kinds[0]), _x2_=bend(_y, x1_, kinds[1]))


def times(_y: Value, slope: Value, kind: Kind) -> Value:
    """The cotangent of a value, from the derivative of the result with respect to it."""
    if slope is ZeroGradient:
        return slope
    if type(slope) is float is type(_y) and kind is NUMBER and slope - slope == 0.0:
        return _y * slope  # most cotangents of numbers, and the rule is kept
    return unbroadcast(scaled(_y, conj(slope)), kind)


def bend(_y: Value, slope_: Value, kind: Kind) -> Value:
    """The tangent of the cotangent of a value, from the tangent of that derivative."""
    return ZeroGradient if slope_ is ZeroGradient else unbroadcast(bent(_y, conj(slope_)), kind)


@operator
class div(binary):
    """`x1 / x2`"""

    def apl(node, x1, x2):
        return x1 / x2

    def rcd(node, x1, x2, y):
        return dict(
            x2=as_array(x2), y=ZeroGradient if node.is_literal("x2") else y, kind1=kind(x1, node, "x1")
        )

    def vjp(node, _y, x2, y, kind1):
        _x1 = divided(_y, conj(x2))
        return dict(_x1=unbroadcast(_x1, kind1), _x2=-times(_x1, y, kind(x2, node, "x2")))

    def jvp(node, x1_, x2_, x2, y, kind1):
        return widen(divided(x1_ - scaled(x2_, y), x2), kind1, kind(x2, node, "x2"))

    # The second derivatives of a quotient
    def hvp(node, _y, x1_, x2_, x2, y, kind1):
        _x1 = divided(_y, conj(x2))
        second = divided(x1_ - scaled(2 * x2_, y), x2) if node.needs("x2") else ZeroGradient
        return dict(_x1_=-bend(_x1, divided(x2_, x2), kind1), _x2_=-bend(_x1, second, kind(x2, node, "x2")))


def has_nan(x: Value) -> bool:
    """Whether any number in a value is not a number."""
    if is_tame(x):
        return False
    if type(x) is numpy.ndarray:
        if x.dtype.kind == "f":
            least = x.min(initial=0.0)  # the quickest way to ask
            return bool(least != least)
        return x.dtype.kind == "c" and bool(numpy.isnan(x).any())
    if type(x) is float:
        return x != x
    return any(map(has_nan, parts_of(x))) if has_parts(x) else bool(numpy.any(numpy.not_equal(x, x)))


def settled(product: Value, g: Value) -> Value:
    """A product with a cotangent or tangent `g`, and zeros where that is zero and the product is not a number."""
    if not has_nan(product):
        return product
    if has_parts(product):
        parts = parts_of(g) if has_parts(g) else [g] * len(parts_of(product))
        return apart(product)[0]([settled(*pair) for pair in zip(parts_of(product), parts)])
    zero = numpy.equal(g, 0) & numpy.not_equal(product, product)
    choice: Any = numpy.where(zero, numpy.zeros((), numpy.result_type(product)), product)
    return choice[()]


FEW = 64  # numbers, which are looked at faster one by one than by NumPy


def is_tame(x: Value) -> bool:
    """Whether a value is a number or a few, and all of them are finite."""
    if type(x) is numpy.ndarray:
        if x.size > FEW:
            return False
        x = sum(x.ravel().tolist())
    return isinstance(x, (float, int, complex)) and x - x == 0


def has_no_zero(x: Value) -> bool:
    """Whether none of a few numbers is zero."""
    return all(x.ravel().tolist()) if type(x) is numpy.ndarray else x != 0


def settled_sum(
    product: Callable[[Value, Value], Value], g: Value, slope: Value, bent: bool = False
) -> Value:
    """A sum of products of cotangents or tangents with slopes, such as that of matrices, by the same rule; for
    second derivatives with the tangents of slopes (`bent`), whose zeros count as well."""
    if g is ZeroGradient or slope is ZeroGradient:
        return ZeroGradient
    if is_tame(slope) and not (bent and has_nan(g)):
        return product(g, slope)
    with numpy.errstate(invalid="ignore"):
        y = product(g, slope)
        if not has_nan(y):
            return y
        # Take the sum without infinities, and see where they matter
        (g0, infinite_g), (slope0, infinite) = finite_part(g), finite_part(slope)
        finite = product(g0 if bent else g, slope0)
        met = product(1.0 * numpy.not_equal(g, 0), 1.0 * infinite)
        if bent:
            met = met + product(1.0 * infinite_g, 1.0 * numpy.not_equal(slope, 0))
    choice: Any = numpy.where(met > 0, y, finite)
    return choice[()]


def finite_part(x: Value) -> tuple[Array, Array]:
    """An array with zeros for what is not finite, and where that is."""
    infinite = ~numpy.isfinite(x)
    return numpy.where(infinite, numpy.zeros((), numpy.result_type(x)), x), infinite


def cleared(slope: Value, g: Value) -> Value:
    """The slopes of a sum of products with a cotangent or tangent, without those that are infinite and that a
    zero meets. Both are of one type and shape."""
    if has_parts(slope):
        return by_parts(cleared, slope, g)
    return numpy.where(
        numpy.equal(g, 0) & ~numpy.isfinite(slope), numpy.zeros((), numpy.result_type(slope)), slope
    )


def in_floats(x: Value) -> Value:
    """A value for the formula of a derivative: integers and truth values as floats, since sums and products
    of small integers wrap around; anything else as it is."""
    if type(x) is numpy.ndarray or isinstance(x, numpy.generic):
        return x.astype("f8") if x.dtype.kind in "iub" else x
    return in_floats(numpy.asarray(x)) if isinstance(x, (list, tuple)) else x


def slope(fprime: Callable[..., Value], *x: Value, **options: Any) -> Value:
    """A derivative at values whose integers are taken for floats, without the warnings about its poles."""
    with numpy.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if all(type(number) in (int, float) for number in x):
            return float(fprime(*map(numpy.float64, x), **options))  # which may be divided by zero
        return fprime(*map(in_floats, x), **options)


@operator
class abs(unary):
    """`abs(x)`; the derivative at 0 is 0."""

    def apl(node, x):
        return builtins.abs(x)

    def vjp(node, _y, x):
        return unbroadcast(scaled(_y, numpy.sign(in_floats(x))), kind(x))

    def jvp(node, x_, x):
        return unbroadcast(scaled(x_, conj(numpy.sign(in_floats(x)))), (kind(x)[0], False))

    def hvp(node, _y, x_, x):
        return bent(_y, turn(x_, x)) if kind(x)[1] else ZeroGradient


def turn(x_: Value, x: Value) -> Value:
    """The tangent of `sign(x)`, which is 0 for real x; also at 0."""
    u, modulus = numpy.sign(x), builtins.abs(x)
    across = x_ - scaled(numpy.real(scaled(x_, conj(u))), u)
    return divided(across, modulus + (modulus == 0)) * (modulus != 0)


@operator
class mod(binary):
    """`x1 % x2` of real numbers, differentiable between its jumps."""

    def apl(node, x1, x2):
        return x1 % x2

    def rcd(node, x1, x2, y):
        return dict(
            n=ZeroGradient if node.is_literal("x2") else x1 // x2,
            kind1=kind(x1, node, "x1"),
            kind2=kind(x2, node, "x2"),
        )

    def vjp(node, _y, n, kind1, kind2):
        return dict(_x1=unbroadcast(_y, kind1), _x2=-times(_y, n, kind2))

    def jvp(node, x1_, x2_, n, kind1, kind2):
        return widen(x1_ - scaled(x2_, n), kind1, kind2)

    hvp = ZeroGradient


@operator
class pow(binary):
    """`x1 ** x2`"""

    def apl(node, x1, x2):
        return as_array(x1) ** as_array(x2)

    # What a power records
    def rcd(node, x1, x2, y):
        x1, x2 = in_floats(x1), in_floats(x2)
        if node.is_literal("x2"):
            y = ZeroGradient
        elif isinstance(y, (numpy.ndarray, numpy.generic)) and y.dtype.kind in "iub":
            y = x1**x2  # it may have wrapped around
        return dict(x1=x1, x2=x2, y=y)

    # The derivatives of a power
    def vjp(node, _y, x1, x2, y):
        return dict(
            _x1=times(_y, slope_along_base(x1, x2), kind(x1, node, "x1"))
            if node.needs("x1")
            else ZeroGradient,
            _x2=times(_y, slope(slope_of_exponent, x1, y), kind(x2, node, "x2"))
            if node.needs("x2")
            else ZeroGradient,
        )

    def jvp(node, x1_, x2_, x1, x2, y):
        first = x1_ if x1_ is ZeroGradient else scaled(x1_, slope_along_base(x1, x2))
        second = x2_ if x2_ is ZeroGradient else scaled(x2_, slope(slope_of_exponent, x1, y))
        return widen(plus(first, second), kind(x1, node, "x1"), kind(x2, node, "x2"))

    # The second derivatives of a power
    def hvp(node, _y, x1_, x2_, x1, x2, y):
        # Differentiate the two slopes of a power
        slope1_ = slope2_ = ZeroGradient
        if node.needs("x1") and x1_ is not ZeroGradient:
            slope1_ = scaled(x1_, slope(curvature_of_base, x1, x2))
        if node.needs("x2"):
            mixed = x1_ if x1_ is ZeroGradient else scaled(x1_, slope(mixed_curvature, x1, x2))
            slope2_ = plus(mixed, scaled(x2_, slope(slope_of_exponent, x1, slope(slope_of_exponent, x1, y))))
        if node.needs("x1") and x2_ is not ZeroGradient:
            slope1_ = plus(slope1_, scaled(x2_, slope(mixed_curvature, x1, x2)))
        return dict(
            _x1_=bend(_y, slope1_, kind(x1, node, "x1")), _x2_=bend(_y, slope2_, kind(x2, node, "x2"))
        )


def slope_along_base(x1: Value, x2: Value) -> Value:
    """`slope_of_base` without warnings; powers from 1 on have no poles."""
    if type(x2) in (int, float) and x2 >= 1:
        return x1 * 2 if x2 == 2 else slope_of_base(x1, x2)
    return slope(slope_of_base, x1, x2)


def slope_of_base(x1: Value, x2: Value) -> Value:
    """d(x1**x2)/dx1, and 0 where x2 is 0."""
    if numpy.ndim(x2) == 0 and x2 == 2:
        return x1 * 2
    if numpy.ndim(x2) == 0:
        return x2 * (x1 * 1.0) ** (x2 - 1) if x2 != 0 else scaled(0.0, x1)
    return x2 * (x1 * 1.0) ** numpy.where(x2 == 0, 0, x2 - 1)


def slope_of_exponent(x1: Value, y: Value) -> Value:
    """d(x1**x2)/dx2, and 0 where x1 is 0."""
    if isinstance(x1, (int, float, complex)):
        return y * numpy.log(x1 or 1).item()
    return scaled(numpy.log(x1 + numpy.equal(x1, 0)), y)


def curvature_of_base(x1: Value, x2: Value) -> Value:
    """The second derivative of x1**x2 with respect to x1, and 0 where x2 is 0 or 1."""
    if numpy.ndim(x2) == 0:
        return scaled(0.0, x1) if x2 in (0, 1) else x2 * slope_of_base(x1, x2 - 1)
    return x2 * slope_of_base(x1, numpy.where(x2 == 0, 1, x2 - 1))


def mixed_curvature(x1: Value, x2: Value) -> Value:
    """The derivative of x1**x2 with respect to both, and 0 where x1 is 0 and it would be infinite."""
    zero = numpy.equal(x1, 0)
    base = (x1 + zero if numpy.any(zero) else x1) * 1.0
    curvature = base ** (x2 - 1) * (1 + slope_of_exponent(base, x2))
    return curvature * numpy.logical_not(zero * numpy.not_equal(x2, 1)) if numpy.any(zero) else curvature


class shift1:
    transparent = True

    def vjp(node, _y):
        return _y

    def jvp(node, x1_):
        return x1_


class shift2(shift1):
    def jvp(node, x2_):
        return x2_


class reverse2:
    def vjp(node, _y):
        return -_y

    def jvp(node, x2_):
        return -x2_


class scale1:
    def vjp(node, _y, x2):
        return _y * x2 if x2 - x2 == 0 else scaled(_y, x2)

    def jvp(node, x1_, x2):
        return x1_ * x2 if x2 - x2 == 0 else scaled(x1_, x2)


class scale2:
    def vjp(node, _y, x1):
        return _y * x1 if x1 - x1 == 0 else scaled(_y, x1)

    def jvp(node, x2_, x1):
        return x2_ * x1 if x1 - x1 == 0 else scaled(x2_, x1)


class divide1:
    def vjp(node, _y, x2):
        return _y / x2 if x2 and x2 == x2 else divided(_y, x2)

    def jvp(node, x1_, x2):
        return x1_ / x2 if x2 and x2 == x2 else divided(x1_, x2)


def next_to_a_number(whole: Any, **derivatives: type) -> None:
    """Replace a binary operator, where one operand is a real number, by an operator of the other one.

    Parameters
    ----------
    whole : Operator
    x1, x2 : class
        The derivatives with respect to the one operand that is left.
    """
    special = {}
    for name, declared in derivatives.items():
        # Declare the operator of one operand
        known = dict(
            ain=name,
            aout="y",
            placements="elementwise",
            apl=whole.prototype.apl,
            hvp=ZeroGradient,
            __doc__=whole.__doc__,
        )
        special[name] = operator(type(whole.__name__, (declared,), known))
        special[name].__qualname__ = f"{whole.__name__}.only_{name}"  # where others find it
        setattr(whole, f"only_{name}", special[name])
    only_x1, only_x2 = special.get("x1"), special.get("x2")

    def choose(varin: Symbols) -> Operator | None:
        if is_number(varin["x2"]):
            return only_x1
        return only_x2 if is_number(varin["x1"]) else None

    whole.special = choose


def is_number(symbol: BaseSymbol) -> bool:
    return type(symbol) is Literal and isinstance(symbol._value, (int, float))


next_to_a_number(add, x1=shift1, x2=shift2)
next_to_a_number(sub, x1=shift1, x2=reverse2)
next_to_a_number(mul, x1=scale1, x2=scale2)
next_to_a_number(div, x1=divide1)


def has_parts(x: Value) -> bool:
    """Whether a value is more than a number, an array, or a list that stands for an array."""
    return not isinstance(x, (list, tuple)) and VALUE_TYPES[type(x)].take_apart(x) is not None


class ShapeOf(tuple[Any, ...]):
    """The shape of a value with parts, which remembers how to make such a value, and whether one is complex."""

    rebuild: Any
    parts: list[Shape]
    is_complex: bool

    def __new__(cls, x: Value) -> Self:
        rebuild, parts = apart(x)
        kinds = [kind(part) for part in parts]
        shapes = [shape for shape, _ in kinds]
        self = super().__new__(cls, shapes[0] if len(shapes) == 1 else shapes)
        self.rebuild, self.parts, self.is_complex = rebuild, shapes, any(c for _, c in kinds)
        return self

    def make(self, value: Value) -> Value:
        """A value of this shape, with the given numbers in each of its parts."""
        return self.rebuild([fill(shape, value) for shape in self.parts])


def fill(shape: Shape, value: Value) -> Value:
    return shape.make(value) if isinstance(shape, ShapeOf) else numpy.broadcast_to(value, shape)


class OwnShape(tuple[Any, ...]):
    """The shape of a number that is each rank's own, so that its cotangent is not summed over the ranks."""


OWN = OwnShape()
OWN_NUMBER: Kind = OWN, False

#: Called with a communicator and a value before that is summed over the ranks.
before_sums: list[Callable[[Any, Value], None]] = []


def sum_over_ranks(comm: Any, x: Value) -> Value:
    """The sum over the ranks of a communicator, on all of them. Collective."""
    for tell in before_sums:
        tell(comm, x)
    return comm.allreduce(x)


def unbroadcast_parts(g: Value, shape: Shape, is_complex: bool) -> Value:
    """Make of a value with parts the cotangent of an operand: the value, an array, or a sum for a number."""
    if shape == () and type(shape) is not ShapeOf:
        total, comm = weighted_sum(g), VALUE_TYPES[type(g)].comm(g)
        if comm is not None and shape is not OWN:
            total = sum_over_ranks(comm, total)
        return total if is_complex else total.real
    like = ShapeOf(g)
    if shape != like:
        # Complain that a value and an array do not go together
        raise ValueError(
            "only values of the same type and shape and numbers go together, "
            f"not {type(g).__name__} {tuple(like)} and {'one' if type(shape) is ShapeOf else 'an array'} {tuple(shape)}"
        )
    if type(shape) is not ShapeOf:
        (g,) = VALUE_TYPES[type(g)].weighted_parts(g)
    return g if is_complex or not like.is_complex else real_part(g)


def weighted_sum(x: Value) -> Value:
    """The sum of this rank's elements of a value, with the weights of the inner product, in double precision."""
    if has_parts(x):
        return sum(map(weighted_sum, VALUE_TYPES[type(x)].weighted_parts(x)))
    return numpy.sum(x, dtype=numpy.result_type(x, "f8")).item()


def real_part(x: Value) -> Value:
    return by_parts(real_part, x) if has_parts(x) else numpy.real(x)

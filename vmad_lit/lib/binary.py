"""Element-wise functions of two arguments, which broadcast.

A new one is declared by its value and its two derivatives, as static methods `f`, `fprime1` and `fprime2`,
and for exact second derivatives by `fsecond11`, `fsecond12` and `fsecond22` as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from ..core import stdlib
from ..core.operator import ZeroGradient, operator
from ..core.stdlib.operators import Array, as_array, bent, conj, kind, scaled, slope, unbroadcast, widen
from ..core.stdlib.operators import slope_of_base, slope_of_exponent
from ..core.symbol import Value
from .unary import offer_curvature


class binary_ufunc:
    """A base for element-wise operators. Derived classes have the static methods `f`, `fprime1` and
    `fprime2` of (x1, x2), and for exact second derivatives `fsecond11`, `fsecond12` and `fsecond22`."""

    ain = "x1", "x2"
    aout = "y"
    placements = "elementwise"

    @staticmethod
    def f(x1: Value, x2: Value, /) -> Value:
        return x1

    @staticmethod
    def fprime1(x1: Value, x2: Value, /) -> Value:
        return 1

    @staticmethod
    def fprime2(x1: Value, x2: Value, /) -> Value:
        return 0

    def apl(node, x1, x2):
        return node.prototype.f(x1, x2)

    def rcd(node, x1, x2, y):
        return dict(x1=as_array(x1), x2=as_array(x2))

    # Share the cotangent out
    def vjp(node, _y, x1, x2):
        def pull(name: str, x: Value, fprime: Callable[..., Value]) -> Value:
            if node.is_literal(name):
                return ZeroGradient
            return unbroadcast(scaled(_y, conj(slope(fprime, x1, x2))), kind(x, node, name))

        return dict(_x1=pull("x1", x1, node.prototype.fprime1), _x2=pull("x2", x2, node.prototype.fprime2))

    # Add the effects of both tangents
    def jvp(node, x1_, x2_, x1, x2):
        def push(x_: Value, fprime: Callable[..., Value]) -> Value:
            return x_ if x_ is ZeroGradient else scaled(x_, slope(fprime, x1, x2))

        return widen(
            push(x1_, node.prototype.fprime1) + push(x2_, node.prototype.fprime2), kind(x1), kind(x2)
        )

    # Let the slopes change
    def __init_subclass__(cls) -> None:
        second = ["fsecond11", "fsecond12", "fsecond22"]
        offer_curvature(cls, cls._differentiate_vjp, ["fprime1", "fprime2"], second)

    def _differentiate_vjp(node, _y, x1_, x2_, x1, x2):
        # Pull the cotangent back with slopes that change
        def curvature(
            name: str, x: Value, along1: Callable[..., Value], along2: Callable[..., Value]
        ) -> Value:
            if not node.needs(name):
                return ZeroGradient
            slope_ = ZeroGradient
            for x_, fsecond in (x1_, along1), (x2_, along2):
                if x_ is not ZeroGradient:
                    slope_ = slope_ + scaled(x_, slope(fsecond, x1, x2))
            return unbroadcast(bent(_y, conj(slope_)), kind(x, node, name))

        second = node.prototype
        return dict(
            _x1_=curvature("x1", x1, second.fsecond11, second.fsecond12),
            _x2_=curvature("x2", x2, second.fsecond12, second.fsecond22),
        )


def share(x1: Value, x2: Value) -> Array:
    """1 where x1 > x2, 0 where x1 < x2, and 1/2 where they are equal; in the precision of the operands."""
    dtype: Any = numpy.result_type(*(getattr(x, "dtype", x) for x in (x1, x2)))
    dtype = numpy.finfo(dtype).dtype if dtype.kind in "fc" else "f8"
    return (numpy.greater(x1, x2).astype(dtype) + numpy.greater_equal(x1, x2).astype(dtype)) * 0.5


@operator
class maximum(binary_ufunc):
    """The larger of two; where they are equal, each has the derivative 1/2."""

    f = staticmethod(numpy.maximum)
    fprime1 = staticmethod(lambda x1, x2: share(x1, x2))
    fprime2 = staticmethod(lambda x1, x2: share(x2, x1))
    hvp = ZeroGradient


@operator
class minimum(binary_ufunc):
    """The smaller of two; where they are equal, each has the derivative 1/2."""

    f = staticmethod(numpy.minimum)
    fprime1 = staticmethod(lambda x1, x2: share(x2, x1))
    fprime2 = staticmethod(lambda x1, x2: share(x1, x2))
    hvp = ZeroGradient


@operator
class fmax(binary_ufunc):
    """The larger of two, or the one that is a number; where equal, each has the derivative 1/2."""

    f = staticmethod(numpy.fmax)
    fprime1 = staticmethod(lambda x1, x2: numpy.where(numpy.not_equal(x2, x2), 1.0, share(x1, x2)))
    fprime2 = staticmethod(lambda x1, x2: 1 - fmax.fprime1(x1, x2))
    hvp = ZeroGradient


@operator
class fmin(binary_ufunc):
    """The smaller of two, or the one that is a number; where equal, each has the derivative 1/2."""

    f = staticmethod(numpy.fmin)
    fprime1 = staticmethod(lambda x1, x2: numpy.where(numpy.not_equal(x2, x2), 1.0, share(x2, x1)))
    fprime2 = staticmethod(lambda x1, x2: 1 - fmin.fprime1(x1, x2))
    hvp = ZeroGradient


def radius(x1: Value, x2: Value) -> Value:
    """The distance from the origin, but 1 at the origin itself."""
    r = numpy.hypot(x1, x2)
    return r + (r == 0)


@operator
class hypot(binary_ufunc):
    """`sqrt(x1**2 + x2**2)` without overflow; its derivative at the origin is 0."""

    f = staticmethod(numpy.hypot)
    fprime1 = staticmethod(lambda x1, x2: x1 / radius(x1, x2))
    fprime2 = staticmethod(lambda x1, x2: x2 / radius(x1, x2))
    fsecond11 = staticmethod(lambda x1, x2: (x2 / radius(x1, x2)) ** 2 / radius(x1, x2))
    fsecond12 = staticmethod(lambda x1, x2: -x1 / radius(x1, x2) * x2 / radius(x1, x2) / radius(x1, x2))
    fsecond22 = staticmethod(lambda x1, x2: (x1 / radius(x1, x2)) ** 2 / radius(x1, x2))


@operator
class arctan2(binary_ufunc):
    """The angle of the point with the abscissa x2 and the ordinate x1."""

    f = staticmethod(numpy.arctan2)
    fprime1 = staticmethod(lambda x1, x2: x2 / radius(x1, x2) / radius(x1, x2))
    fprime2 = staticmethod(lambda x1, x2: -x1 / radius(x1, x2) / radius(x1, x2))
    fsecond11 = staticmethod(lambda x1, x2: 2 * arctan2.fprime1(x1, x2) * arctan2.fprime2(x1, x2))
    fsecond12 = staticmethod(lambda x1, x2: arctan2.fprime2(x1, x2) ** 2 - arctan2.fprime1(x1, x2) ** 2)
    fsecond22 = staticmethod(lambda x1, x2: -arctan2.fsecond11(x1, x2))


def weight(x1: Value, x2: Value) -> Value:
    """The share of exp(x1) in exp(x1) + exp(x2)."""
    share = 1 / (1 + numpy.exp(x2 - x1))
    if numpy.any(numpy.isinf(x1)):
        share = numpy.where(numpy.equal(x1, x2), 0.5, share)
    return share


@operator
class logaddexp(binary_ufunc):
    """`log(exp(x1) + exp(x2))` without overflow."""

    f = staticmethod(numpy.logaddexp)
    fprime1 = staticmethod(lambda x1, x2: weight(x1, x2))
    fprime2 = staticmethod(lambda x1, x2: weight(x2, x1))
    fsecond11 = staticmethod(lambda x1, x2: weight(x1, x2) * weight(x2, x1))
    fsecond12 = staticmethod(lambda x1, x2: -weight(x1, x2) * weight(x2, x1))
    fsecond22 = staticmethod(lambda x1, x2: weight(x1, x2) * weight(x2, x1))


@operator
class add(stdlib.add.prototype):
    """`x1 + x2`"""

    f = staticmethod(numpy.add)
    fprime1 = staticmethod(lambda x1, x2: 1)
    fprime2 = staticmethod(lambda x1, x2: 1)


@operator
class subtract(stdlib.sub.prototype):
    """`x1 - x2`"""

    f = staticmethod(numpy.subtract)
    fprime1 = staticmethod(lambda x1, x2: 1)
    fprime2 = staticmethod(lambda x1, x2: -1)


@operator
class multiply(stdlib.mul.prototype):
    """`x1 * x2`"""

    f = staticmethod(numpy.multiply)
    fprime1 = staticmethod(lambda x1, x2: x2)
    fprime2 = staticmethod(lambda x1, x2: x1)


@operator
class divide(stdlib.div.prototype):
    """`x1 / x2`"""

    f = staticmethod(numpy.divide)
    fprime1 = staticmethod(lambda x1, x2: 1 / x2)
    fprime2 = staticmethod(lambda x1, x2: -x1 / x2**2)


@operator
class power(stdlib.pow.prototype):
    """`x1 ** x2`"""

    f = staticmethod(numpy.power)
    fprime1 = staticmethod(slope_of_base)
    fprime2 = staticmethod(lambda x1, x2: slope_of_exponent(x1, x1**x2))


class comparison:
    """A base for operators that compare, whose results are masks for `where`, and have no derivative."""

    ain = "x1", "x2"
    aout = "y"
    placements = "elementwise"

    @staticmethod
    def f(x1: Value, x2: Value, /) -> Value:
        return x1 == x2

    def apl(node, x1, x2):
        return node.prototype.f(x1, x2)

    def vjp(node):
        return ZeroGradient

    def jvp(node):
        return ZeroGradient

    hvp = ZeroGradient


@operator
class equal(comparison):
    """`x1 == x2`"""

    f = staticmethod(numpy.equal)


@operator
class not_equal(comparison):
    """`x1 != x2`"""

    f = staticmethod(numpy.not_equal)


@operator
class less(comparison):
    """`x1 < x2`"""

    f = staticmethod(numpy.less)


@operator
class less_equal(comparison):
    """`x1 <= x2`"""

    f = staticmethod(numpy.less_equal)


@operator
class greater(comparison):
    """`x1 > x2`"""

    f = staticmethod(numpy.greater)


@operator
class greater_equal(comparison):
    """`x1 >= x2`"""

    f = staticmethod(numpy.greater_equal)


@operator
class logical_and(comparison):
    """Where both are true."""

    f = staticmethod(numpy.logical_and)


@operator
class logical_or(comparison):
    """Where one of two is true, or both are."""

    f = staticmethod(numpy.logical_or)


__all__ = ["binary_ufunc", "maximum", "minimum", "fmax", "fmin", "hypot", "arctan2", "logaddexp"]
__all__ += ["add", "subtract", "multiply", "divide", "power"]
__all__ += ["equal", "not_equal", "less", "less_equal", "greater", "greater_equal"]
__all__ += ["logical_and", "logical_or"]

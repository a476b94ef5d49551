"""Element-wise functions of one argument.

A new one is declared by its value and its derivative, and if it shall have exact second derivatives
by another one::

    @operator
    class softplus(unary_ufunc):
        f = staticmethod(lambda x: numpy.log1p(numpy.exp(x)))
        fprime = staticmethod(lambda x: 1 / (1 + numpy.exp(-x)))
        fsecond = staticmethod(lambda x: 1 / (2 + numpy.exp(x) + numpy.exp(-x)))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy

from ..core import stdlib
from ..core.operator import ZeroGradient, operator
from ..core.stdlib.operators import bent, conj, kind, scaled, slope, unbroadcast
from ..core.symbol import Value


class unary_ufunc:
    """A base for element-wise operators. Derived classes have the static methods `f(x)` and `fprime(x)`,
    and for exact second derivatives `fsecond(x)`."""

    ain = "x"
    aout = "y"
    placements = "elementwise"

    @staticmethod
    def f(x: Value, /) -> Value:
        return x

    @staticmethod
    def fprime(x: Value, /) -> Value:
        return 1

    def apl(node, x):
        return node.prototype.f(x)

    def vjp(node, _y, x):
        return unbroadcast(scaled(_y, conj(slope(node.prototype.fprime, x))), kind(x))

    def jvp(node, x_, x):
        return scaled(x_, slope(node.prototype.fprime, x))

    # Offer a curvature to those who declare one
    def __init_subclass__(cls) -> None:
        name_after_numpy(cls)
        offer_curvature(cls, cls._differentiate_vjp, ["fprime"], ["fsecond"])

    def _differentiate_vjp(node, _y, x_, x):
        return unbroadcast(bent(_y, conj(scaled(x_, slope(node.prototype.fsecond, x)))), kind(x))


def offer_curvature(cls: Any, hvp: Callable[..., Value], first: Iterable[str], second: Iterable[str]) -> None:
    """Give a class the function `hvp` if it declares the second derivatives; take it away if it
    declares only the first ones."""
    declared = vars(cls)
    if all(name in declared for name in second):
        cls.hvp = hvp
    elif "hvp" not in declared and any(name in declared for name in first):
        cls.hvp = None


def name_after_numpy(cls: Any) -> None:
    """Give a class that stands for a function of NumPy a docstring, if it has none: the first sentence of NumPy's."""
    function = getattr(vars(cls).get("f"), "__func__", None)
    if cls.__doc__ is None and isinstance(function, numpy.ufunc):
        sentence = " ".join(function.__doc__.split("\n\n")[1].split())
        cls.__doc__ = f"{sentence}\n\nThat is `numpy.{function.__name__}`; the result has the shape of `x`."


class result_ufunc(unary_ufunc):
    """A base for element-wise operators that have the derivative `slope(y)` in terms of the result as
    well, and for exact second derivatives also `curvature(y)`."""

    @staticmethod
    def slope(y: Value, /) -> Value:
        return 1

    def vjp(node, _y, y):
        return unbroadcast(scaled(_y, conj(slope(node.prototype.slope, y))), kind(y))

    def jvp(node, x_, y):
        return scaled(x_, slope(node.prototype.slope, y))

    def __init_subclass__(cls) -> None:
        name_after_numpy(cls)
        offer_curvature(cls, cls._differentiate_vjp, ["fprime", "slope"], ["curvature"])

    def _differentiate_vjp(node, _y, x_, y):
        return unbroadcast(bent(_y, conj(scaled(x_, slope(node.prototype.curvature, y)))), kind(y))


__all__ = ["unary_ufunc", "result_ufunc", "sin", "cos", "tan"]


@operator
class sin(unary_ufunc):
    f = staticmethod(numpy.sin)
    fprime = staticmethod(numpy.cos)
    fsecond = staticmethod(lambda x: -numpy.sin(x))


@operator
class cos(unary_ufunc):
    f = staticmethod(numpy.cos)
    fprime = staticmethod(lambda x: -numpy.sin(x))
    fsecond = staticmethod(lambda x: -numpy.cos(x))


@operator
class tan(result_ufunc):
    f = staticmethod(numpy.tan)
    fprime = staticmethod(lambda x: 1 + numpy.tan(x) ** 2)
    slope = staticmethod(lambda y: 1 + y * y)
    curvature = staticmethod(lambda y: 2 * y * (1 + y * y))


__all__ += ["arcsin", "arccos", "arctan"]


@operator
class arcsin(unary_ufunc):
    f = staticmethod(numpy.arcsin)
    fprime = staticmethod(lambda x: 1 / (numpy.sqrt(1 - x) * numpy.sqrt(1 + x)))
    fsecond = staticmethod(lambda x: x / (numpy.sqrt(1 - x) * numpy.sqrt(1 + x)) ** 3)


@operator
class arccos(unary_ufunc):
    f = staticmethod(numpy.arccos)
    fprime = staticmethod(lambda x: -1 / (numpy.sqrt(1 - x) * numpy.sqrt(1 + x)))
    fsecond = staticmethod(lambda x: -x / (numpy.sqrt(1 - x) * numpy.sqrt(1 + x)) ** 3)


@operator
class arctan(unary_ufunc):
    f = staticmethod(numpy.arctan)
    fprime = staticmethod(lambda x: 1 / (1 + x * x))
    fsecond = staticmethod(lambda x: -2 * x / (1 + x * x) ** 2)


__all__ += ["sinh", "cosh", "tanh", "arcsinh", "arccosh", "arctanh"]


@operator
class sinh(unary_ufunc):
    f = staticmethod(numpy.sinh)
    fprime = staticmethod(numpy.cosh)
    fsecond = staticmethod(numpy.sinh)


@operator
class cosh(unary_ufunc):
    f = staticmethod(numpy.cosh)
    fprime = staticmethod(numpy.sinh)
    fsecond = staticmethod(numpy.cosh)


@operator
class tanh(unary_ufunc):
    f = staticmethod(numpy.tanh)
    fprime = staticmethod(lambda x: (1 / numpy.cosh(x)) ** 2)
    fsecond = staticmethod(lambda x: -2 * numpy.tanh(x) * (1 / numpy.cosh(x)) ** 2)


@operator
class arcsinh(unary_ufunc):
    f = staticmethod(numpy.arcsinh)
    fprime = staticmethod(lambda x: 1 / numpy.sqrt(1 + x * x))
    fsecond = staticmethod(lambda x: -x / numpy.sqrt(1 + x * x) ** 3)


@operator
class arccosh(unary_ufunc):
    f = staticmethod(numpy.arccosh)
    fprime = staticmethod(lambda x: 1 / (numpy.sqrt(x - 1) * numpy.sqrt(x + 1)))
    fsecond = staticmethod(lambda x: -x / (numpy.sqrt(x - 1) * numpy.sqrt(x + 1)) ** 3)


@operator
class arctanh(unary_ufunc):
    f = staticmethod(numpy.arctanh)
    fprime = staticmethod(lambda x: 1 / ((1 - x) * (1 + x)))
    fsecond = staticmethod(lambda x: 2 * x / ((1 - x) * (1 + x)) ** 2)


__all__ += ["exp", "exp2", "expm1", "log", "log10", "log2", "log1p"]


@operator
class exp(result_ufunc):
    f = staticmethod(numpy.exp)
    fprime = staticmethod(numpy.exp)
    slope = staticmethod(lambda y: y)
    curvature = staticmethod(lambda y: y)


@operator
class exp2(result_ufunc):
    f = staticmethod(numpy.exp2)
    fprime = staticmethod(lambda x: numpy.exp2(x) * math.log(2))
    slope = staticmethod(lambda y: y * math.log(2))
    curvature = staticmethod(lambda y: y * math.log(2) ** 2)


@operator
class expm1(unary_ufunc):
    """`exp(x) - 1`, precise also where it is small."""

    f = staticmethod(numpy.expm1)
    fprime = staticmethod(numpy.exp)
    fsecond = staticmethod(numpy.exp)


@operator
class log(unary_ufunc):
    f = staticmethod(numpy.log)
    fprime = staticmethod(lambda x: 1.0 / x)
    fsecond = staticmethod(lambda x: -((1.0 / x) ** 2))


@operator
class log10(unary_ufunc):
    f = staticmethod(numpy.log10)
    fprime = staticmethod(lambda x: 1 / math.log(10) / x)
    fsecond = staticmethod(lambda x: -((1.0 / x) ** 2) / math.log(10))


@operator
class log2(unary_ufunc):
    f = staticmethod(numpy.log2)
    fprime = staticmethod(lambda x: 1 / math.log(2) / x)
    fsecond = staticmethod(lambda x: -((1.0 / x) ** 2) / math.log(2))


@operator
class log1p(unary_ufunc):
    """`log(1 + x)`, precise also where it is small."""

    f = staticmethod(numpy.log1p)
    fprime = staticmethod(lambda x: 1.0 / (1 + x))
    fsecond = staticmethod(lambda x: -((1.0 / (1 + x)) ** 2))


__all__ += ["sqrt", "cbrt", "square", "reciprocal", "deg2rad", "rad2deg"]


@operator
class sqrt(result_ufunc):
    f = staticmethod(numpy.sqrt)
    fprime = staticmethod(lambda x: 0.5 / numpy.sqrt(x))
    slope = staticmethod(lambda y: 0.5 / y)
    curvature = staticmethod(lambda y: -0.25 / (y * y * y))


@operator
class cbrt(result_ufunc):
    f = staticmethod(numpy.cbrt)
    fprime = staticmethod(lambda x: 1 / (3 * numpy.cbrt(x) ** 2))
    slope = staticmethod(lambda y: 1 / (3 * y * y))
    curvature = staticmethod(lambda y: -2 / (9 * y**5))


@operator
class square(unary_ufunc):
    f = staticmethod(numpy.square)
    fprime = staticmethod(lambda x: 2 * x)
    fsecond = staticmethod(lambda x: 2)


@operator
class reciprocal(result_ufunc):
    """`1 / x`; of integers, where NumPy has 0, it is refused."""

    fprime = staticmethod(lambda x: -((1.0 / x) ** 2))
    slope = staticmethod(lambda y: -y * y)
    curvature = staticmethod(lambda y: 2 * y * y * y)

    # Take the reciprocal of anything but integers
    @staticmethod
    def f(x: Value, /) -> Value:
        if isinstance(x, int) or getattr(getattr(x, "dtype", None), "kind", "f") in "iub":
            raise TypeError(
                "the reciprocals of integers are integers in NumPy, mostly 0; write 1 / x, or give floats"
            )
        return numpy.reciprocal(x)


@operator
class deg2rad(unary_ufunc):
    f = staticmethod(numpy.deg2rad)
    fprime = staticmethod(lambda x: math.pi / 180)
    hvp = ZeroGradient


@operator
class rad2deg(unary_ufunc):
    f = staticmethod(numpy.rad2deg)
    fprime = staticmethod(lambda x: 180 / math.pi)
    hvp = ZeroGradient


def sinc_slope(x: Value) -> Value:
    u = math.pi * x
    near = numpy.abs(u) < 0.5
    small, large = u * near, u + near
    # Sum the series near the origin
    series, square_of_u = 0.0, small * small
    for k in range(7, 0, -1):
        series = series * square_of_u + (-1) ** k * 2 * k / math.factorial(2 * k + 1)
    series = series * small
    direct = (large * numpy.cos(large) - numpy.sin(large)) / (large * large)
    return (series + direct * ~near) * math.pi


def sinc_curvature(x: Value) -> Value:
    u = math.pi * x
    near = numpy.abs(u) < 0.5
    small, large = u * near, u + near
    # Sum the derivative of the series near the origin
    series, square_of_u = 0.0, small * small
    for k in range(7, 0, -1):
        series = series * square_of_u + (-1) ** k * 2 * k * (2 * k - 1) / math.factorial(2 * k + 1)
    sin, cos = numpy.sin(large), numpy.cos(large)
    direct = -(sin + 2 * (large * cos - sin) / (large * large)) / large
    return (series * near + direct * ~near) * math.pi**2


@operator
class sinc(unary_ufunc):
    """`sin(pi x) / (pi x)`"""

    fprime = staticmethod(sinc_slope)
    fsecond = staticmethod(sinc_curvature)

    @staticmethod
    def f(x: Value, /) -> Value:
        if type(x) is not numpy.ndarray and hasattr(x, "__array_ufunc__"):
            u = math.pi * x + (x == 0) * 1e-20
            return numpy.sin(u) / u
        return numpy.sinc(x)


@operator
class absolute(stdlib.abs.prototype):
    """The modulus; its derivative at 0 is 0."""

    f = staticmethod(numpy.absolute)
    fprime = staticmethod(numpy.sign)

    def apl(node, x):
        return numpy.absolute(x)


fabs = absolute

__all__ += ["sinc", "absolute", "fabs"]

"""Operators that look at values while a model runs; they have zero gradients."""

import builtins
from typing import Any

from ..operator import ZeroGradient, operator


class looking:
    """A base for operators without derivatives."""

    ain = "x"
    aout: Any = ()

    def vjp(node):
        return ZeroGradient

    def jvp(node):
        return ZeroGradient

    hvp = ZeroGradient


@operator
class eval(looking):
    """Apply a function, or a string expression in the name `x`, to a value (or a list of values) at
    run time."""

    aout = "y"

    def apl(node, x, function):
        return dict(y=function(x) if callable(function) else builtins.eval(function, dict(x=x)))


@operator
class watchpoint(looking):
    """Call `monitor(x)` with a value, or a list of values, whenever the model runs."""

    def apl(node, x, monitor=print):
        monitor(x)


@operator
class assert_true(looking):
    """Raise AssertionError unless `func(x)` is true."""

    def apl(node, x, func):
        if not func(x):
            raise AssertionError(f"{getattr(func, '__name__', func)}(x) is not true for x = {x!r}")


@operator
class assert_isinstance(looking):
    """Raise TypeError unless a value is an instance of a class, or of one of several."""

    ain = "obj"

    def apl(node, obj, class_or_tuple):
        classes = tuple(class_or_tuple) if isinstance(class_or_tuple, list) else class_or_tuple
        if not isinstance(obj, classes):
            raise TypeError(f"expected an instance of {classes}, got {type(obj)}")


@operator
class terminal:
    """The identity."""

    ain = "x"
    aout = "y"

    def apl(node, x):
        return dict(y=x)

    def vjp(node, _y):
        return dict(_x=_y)

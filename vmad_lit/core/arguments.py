"""Arguments at the door: functions that return an argument as what it stands for, or refuse it by name.

A refusal is a TypeError if the argument is of a wrong kind, and a ValueError if it is of the right kind and has
no such value. Symbols are refused, too: whether one may stand here is up to the caller.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import numpy
from numpy.typing import NDArray

Array = NDArray[Any]


def plain_array(name: str, x: Any) -> Array:
    """`x` as an array of NumPy, or TypeError if a mask or a unit would be lost."""
    unit = getattr(x, "unit", getattr(x, "units", None))
    if unit is not None:
        raise TypeError(
            f"{name} has a unit ({unit}): convert it to the unit expected here, and give plain numbers"
        )
    if numpy.ma.is_masked(x):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost: fill it or leave out what is masked"
        )
    return numpy.asarray(x)


def show(x: Any) -> str:
    """A value in a message, shortened."""
    text = repr(x)
    return text if len(text) < 80 else f"{text[:70]} ..."


def whole_number(name: str, x: Any, least: int | None = None, most: int | None = None) -> int:
    """`x` as an int between `least` and `most`."""
    expected = f"{name} must be a whole number{_range(least, None, most, None)}, not {show(x)}"
    if isinstance(x, (bool, numpy.bool_)):
        raise TypeError(expected)
    try:
        number = operator.index(x)
    except TypeError:
        raise (ValueError if isinstance(x, (float, numpy.floating)) else TypeError)(expected) from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(expected)
    return number


def _range(least: Any, above: Any, most: Any, below: Any) -> str:
    """The words for a range of numbers."""
    if least is not None and most is not None:
        return f" between {least:g} and {most:g}"
    bounds = {"of at least": least, "above": above, "of at most": most, "below": below}
    words = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
    return " " + " and ".join(words) if words else ""


def real_array(
    name: str,
    x: Any,
    *,
    shape: tuple[int | None, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Array:
    """`x` as an array of finite floats, of a shape in which None is any length, in a range."""
    array = plain_array(name, x)
    what = "a finite number" if shape == () else "finite numbers"
    what += _range(least, above, most, below)
    if array.dtype.kind == "O":  # such as fractions
        try:
            array = array.astype("f8")
        except (TypeError, ValueError):
            pass
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be {what}, not {show(x)}")
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
        array = array.astype("f8")
    if shape is not None and not fits(array.shape, shape):
        raise ValueError(f"{name} must be {what}{_of_shape(shape)}, not of the shape {array.shape}")
    good = numpy.isfinite(array)
    for bound, compare in (
        (least, numpy.greater_equal),
        (above, numpy.greater),
        (most, numpy.less_equal),
        (below, numpy.less),
    ):
        if bound is not None:
            good &= compare(array, bound)
    if not good.all():
        culprit = array[~good].flat[0] if array.ndim else x
        raise ValueError(f"{name} must be {what}, not {show(culprit)}")
    return array


def fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether a shape is the one expected, in which None is any length."""
    return len(shape) == len(expected) and all(m in (n, None) for n, m in zip(shape, expected))


def _of_shape(shape: tuple[int | None, ...]) -> str:
    return f" of the shape ({', '.join('any' if n is None else str(n) for n in shape)})" if shape else ""


def real_number(name: str, x: Any, **bounds: float | None) -> float:
    """`x` as a finite float; bounds are `least`, `above`, `most`, `below`."""
    if isinstance(x, (bool, numpy.bool_)):
        raise TypeError(f"{name} must be a number, not {show(x)}")
    return float(real_array(name, x, shape=(), **bounds))


def positive(name: str, x: Any) -> float:
    """`x` as a finite float above 0."""
    return real_number(name, x, above=0)


def one_of(name: str, x: Any, known: Collection[Any]) -> Any:
    """`x`, which must be among the `known` values."""
    if not any(x is value or (isinstance(x, str) and x == value) for value in known):
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, not {show(x)}")
    return x

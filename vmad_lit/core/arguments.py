"""Arguments on entry: functions that return an argument as what it stands for, or refuse it by name.

A refusal is a TypeError if the argument is of a wrong kind, and a ValueError if it is of the right kind and has
no such value. Symbols are refused, too: whether one may stand here is up to the caller.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

import numpy
from numpy.typing import NDArray

from .doors import find_loss

Array = NDArray[Any]


def plain_array(name: str, x: Any) -> Array:
    """`x` as an array of NumPy, or TypeError if a mask, a unit or labels would be lost."""
    loss = find_loss(x)
    if loss is not None:
        raise TypeError(f"{name} is {loss}")
    return numpy.asarray(x)


def show(x: Any) -> str:
    """A value in a message, shortened."""
    text = repr(x.item() if isinstance(x, numpy.generic) else x)
    return text if len(text) < 80 else f"{text[:70]} ..."


def whole_number(name: str, x: Any, least: int | None = None, most: int | None = None) -> int:
    """`x` as an int between `least` and `most`."""
    words = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
    expected = f"{name} must be a whole number{words}, not {show(x)}"
    if isinstance(x, (bool, numpy.bool_)):
        raise TypeError(expected)
    try:
        number = operator.index(x)
    except TypeError:
        raise (ValueError if isinstance(x, (float, numpy.floating)) else TypeError)(expected) from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(expected)
    return number


def conditions(others: str, **bounds: Any) -> str:
    """The words for bounds of numbers: `least`, `above`, `most`, `below`, and for other conditions."""
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    words = []
    if given.keys() == {"least", "most"}:
        words = [f"between {given.pop('least'):g} and {given.pop('most'):g}"]
    elif given.get("above") == 0:
        given.pop("above")
        words = ["positive"]
    elif given.get("least") == 0:
        given.pop("least")
        words = ["not negative"]
    phrases = dict(least="at least", above="above", most="at most", below="below")
    words += [f"{phrases[name]} {bound:g}" for name, bound in given.items()]
    *words, last = [*words, others]
    return f"{', '.join(words)} and {last}" if words else last


def real_array(
    name: str,
    x: Any,
    shape: tuple[int | None, ...] | None = None,
    infinite: bool = False,
    **bounds: Any,
) -> Array:
    """`x` as an array of floats, of a shape in which None is any length.

    All must be finite or, if they may be `infinite`, no NaN, and within the bounds `least`, `above`, `most`, `below`.
    """
    array = plain_array(name, x)
    # Make it an array of floats
    if array.dtype.kind == "O":  # such as fractions
        try:
            array = array.astype("f8")
        except (TypeError, ValueError):
            pass
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be {'a number' if shape == () else 'real numbers'}, not {show(x)}")
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
        array = array.astype("f8")
    if shape is not None and not fits(array.shape, shape):
        # Refuse the shape
        wanted = (
            f"of the shape ({', '.join('any' if n is None else str(n) for n in shape)})"
            if shape
            else "one number"
        )
        raise ValueError(f"{name} must be {wanted}, not of the shape {array.shape}")
    # Refuse values out of bounds
    good = ~numpy.isnan(array) if infinite else numpy.isfinite(array)
    for bound, value in bounds.items():
        if value is not None:
            good &= COMPARISONS[bound](array, value)
    if not good.all():
        culprit = array[~good].flat[0] if array.ndim else x
        words = conditions("not NaN" if infinite else "finite", **bounds)
        raise ValueError(f"{name} must be {words}, not {show(culprit)}")
    return array


COMPARISONS = dict(least=operator.ge, above=operator.gt, most=operator.le, below=operator.lt)


def fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether a shape is the one expected, in which None is any length."""
    return len(shape) == len(expected) and all(m in (n, None) for n, m in zip(shape, expected))


def real_number(name: str, x: Any, **bounds: Any) -> float:
    """`x` as a finite float; bounds are `least`, `above`, `most`, `below`."""
    if isinstance(x, float) and math.isfinite(x):
        if all(bound is None or COMPARISONS[which](x, bound) for which, bound in bounds.items()):
            return float(x)
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

"""What may go into a model: values that would lose their meaning there are converted, or refused by name."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy

from .error import WrongKind
from .symbol import BaseSymbol

PLAIN_NUMBERS = frozenset((int, float, complex, bool, numpy.float64, numpy.float32, numpy.int64))


def admit(name: str, value: Any) -> Any:
    """A value for what it means, such as single precision for half; WrongKind, with the name, if it has no
    meaning here."""
    kind = type(value)
    if kind in PLAIN_NUMBERS or kind is numpy.ndarray and value.dtype.char in "dfDFlqibB?":
        return value
    if kind is list or kind is tuple:
        if all([type(item) in PLAIN_NUMBERS or isinstance(item, BaseSymbol) for item in value]):
            return value
        return kind([admit(f"{name}[{i}]", item) for i, item in enumerate(value)])
    if isinstance(value, BaseSymbol):
        return value
    # Refuse what would lose its meaning
    reason = find_loss(value)
    if reason is None and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "VOUSMm":
        reason = f"an array of {value.dtype}, and derivatives are of numbers; give an array of floats"
    if reason is not None:
        raise WrongKind(f"'{name}' is {reason}")
    # Convert what has one meaning
    if isinstance(value, Fraction):
        return float(value)
    if isinstance(value, numpy.ma.MaskedArray):
        return admit(name, value.data)  # nothing is masked
    if unit_of(value) == "":
        value = getattr(value, "magnitude", getattr(value, "value", value))
        return numpy.asarray(value)[()] if isinstance(value, numpy.ndarray) else value
    if isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype == numpy.float16:
        return value.astype(numpy.float32)
    return value


PLAIN = {bool, int, float, complex, numpy.ndarray, numpy.float32, numpy.float64}


def find_loss(value: Any) -> str | None:
    """What a value would lose on its way into a plain array, and what to do about it; None if that is nothing."""
    kind = type(value)
    if kind in PLAIN:
        return None
    # See whether anything is masked
    is_array = isinstance(value, (numpy.ndarray, numpy.generic))
    if isinstance(value, numpy.ma.MaskedArray):
        masked = numpy.ma.is_masked(value)
    else:
        masked = is_array and hasattr(value, "mask")
    if masked:
        return "a masked array, whose mask would be forgotten; give x.filled(0.), or x.compressed()"
    if isinstance(value, numpy.matrix):
        return "a numpy.matrix, whose * is another one; give numpy.asarray(x), and multiply by linalg.matmul"
    if hasattr(kind, "iloc"):
        return f"a {kind.__name__} of pandas, whose labels would be forgotten; give its numbers, x.to_numpy()"
    if hasattr(value, "dims") and hasattr(value, "coords"):
        return f"a {kind.__name__} with coordinates, which would be forgotten; give its numbers, x.values"
    if hasattr(kind, "tocsr"):
        return f"a sparse matrix ({kind.__name__}), whose * is another one; write an operator that applies it"
    unit = unit_of(value)
    if unit:
        return f"a quantity in {unit}, which would be forgotten; give its number in the unit that is meant"
    return None


def unit_of(value: Any) -> str | None:
    """The unit of a quantity, '' if it is a bare number after all; None of what is no quantity."""
    if not (hasattr(value, "value") or hasattr(value, "magnitude") or hasattr(value, "__array__")):
        return None
    for name in "unit", "units":
        unit = getattr(value, name, None)
        if unit is not None and not callable(unit):
            text = str(unit).strip()
            return "" if text in ("dimensionless", "1") else text
    return None

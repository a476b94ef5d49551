"""What a call returns belongs to the caller: whose memory a value has, and how it becomes somebody's own."""

from __future__ import annotations

from collections.abc import Callable
from sys import getrefcount
from typing import Any

import numpy

from .doors import PLAIN_NUMBERS
from .marks import LARGE
from .symbol import Value
from .valuetypes import IMMUTABLE, VALUE_TYPES, by_parts, value_type

#: Types of objects that own the memory of one array, and are held by nobody but it.
OWNERS: set[type] = set()


def hand_over(out: dict[str, Value], names: list[str], copy: bool = True) -> list[Value]:
    """The values of a dict by some names, each the caller's own; the dict is emptied.

    What shares its memory with anything else is copied; without `copy`, arrays are made read-only instead.
    """
    values = [out[name] for name in names]
    out.clear()
    for i, kind in enumerate(map(type, values)):
        if kind not in PLAIN_NUMBERS:
            make_own(values, i, copy)
    return values


def make_own(holder: Any, key: Any, copy: bool) -> None:
    """Make an item of a dict or list, which must hold the only reference to it if it is ours, our own."""
    kind = type(holder[key])
    if issubclass(kind, IMMUTABLE):
        return
    if kind in (list, tuple, dict):
        # Go through the items of a new container
        items: Any = dict(holder[key]) if kind is dict else list(holder[key])
        holder[key] = None
        for i in items if kind is dict else range(len(items)):
            make_own(items, i, copy)
        holder[key] = tuple(items) if kind is tuple else items
    elif not is_alone(holder, key):
        holder[key] = duplicate(holder[key]) if copy else read_only(holder[key])
    elif copy and isinstance(holder[key], numpy.ndarray) and not holder[key].flags.writeable:
        holder[key] = duplicate(holder[key])


def is_alone(holder: Any, key: Any) -> bool:
    """Whether nobody but the holder refers to an item, or to the memory that it is made of."""
    if isinstance(holder[key], numpy.ndarray):
        return getrefcount(holder[key]) == ALONE and is_sole_owner(holder[key])
    # See whether a value with parts is alone
    kind = type(holder[key])
    if VALUE_TYPES[kind].take_apart(holder[key]) is None:
        return True  # of a type that we know nothing about
    if kind not in PRISTINE:
        PRISTINE[kind] = references([value_type(holder[key]).copy(holder[key])], 0)
    return references(holder, key) == PRISTINE[kind]


def is_sole_owner(array: Any) -> bool:
    """Whether the memory of an array is held by this array only, through others that are views of it."""
    while getattr(array, "base", None) is not None:
        if getrefcount(array.base) != ALONE:
            return False
        array = array.base
    return type(array) in OWNERS or isinstance(array, numpy.ndarray) and array.flags.owndata


#: What Python counts for an object that one container holds.
ALONE: int = (lambda holder, key: getrefcount(holder[key]))([object()], 0)

PRISTINE: dict[type, list[int]] = {}  # the references of a copy that nobody else has, by its type


def references(holder: Any, key: Any) -> list[int]:
    """How often an item, its parts, and all that owns their memory are referred to."""
    if isinstance(holder[key], IMMUTABLE):
        return []
    counts = [getrefcount(holder[key])]
    if isinstance(holder[key], numpy.ndarray):
        array = holder[key]
        while getattr(array, "base", None) is not None:
            counts.append(getrefcount(array.base))
            array = array.base
    else:
        # Count the references to parts
        apart = value_type(holder[key]).take_apart(holder[key])
        parts = apart[1] if apart else []
        del apart
        counts += [n for i in range(len(parts)) for n in references(parts, i)]
    return counts


def duplicate(value: Value) -> Value:
    """A copy of a value with memory of its own; what has no memory that we know of, as it is."""
    if isinstance(value, IMMUTABLE):
        return value
    if isinstance(value, numpy.ndarray):
        return numpy.array(value, copy=True, order="K", subok=True)
    return by_items(duplicate, value, lambda values: values.copy(value))


def read_only(value: Value) -> Value:
    """The value as one whose arrays cannot be written to."""
    if isinstance(value, numpy.ndarray):
        value = value.view()
        value.flags.writeable = False
        return value
    return by_items(read_only, value, lambda values: by_parts(read_only, value))


def by_items(function: Callable[[Value], Value], value: Value, of_parts: Callable[[Any], Value]) -> Value:
    """A container like `value` of what a function makes of its items; of a value with parts what `of_parts` makes."""
    kind = type(value)
    if kind in (list, tuple):
        return kind([function(item) for item in value])
    if kind is dict:
        return {key: function(item) for key, item in value.items()}
    values = VALUE_TYPES[kind]
    return value if values.take_apart(value) is None else of_parts(values)


def snapshot(value: Any) -> Any:
    """A value with copies of the arrays in it, and in the containers in it; large arrays are as they are."""
    if isinstance(value, numpy.ndarray):
        return duplicate(value) if value.nbytes <= LARGE else value
    return by_items(snapshot, value, lambda values: value)

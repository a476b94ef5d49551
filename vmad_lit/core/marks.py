"""Marks of values, by which one can tell later that they were changed in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf
from typing import Any
from zlib import crc32

import numpy

from .graph import Node
from .symbol import Literal, Value, leaves
from .valuetypes import IMMUTABLE, SMALL, VALUE_TYPES

Mark = tuple[Any, ...]


#: Types of objects that nobody changes, whatever attributes they have.
STEADY: set[type] = set()

LARGE = 2**20  # bytes; of what a model was built from, larger arrays are not looked at as a whole


def digest(array: Any, most: float) -> int:
    """A number that changes with the elements of an array; objects are not looked at."""
    if array.dtype.hasobject or not array.size:
        return 0
    if array.nbytes > most:
        array = array.reshape(-1)[:: array.nbytes // SMALL]
    flat: Any = numpy.ascontiguousarray(array).reshape(-1)
    return crc32(flat.view("u1"))


def mark(value: Value, most: float = inf, deep: bool = True) -> Mark:
    """What tells a value from others, and from itself after it was changed in place: a number, or the identity
    of an object, and what is in it: digests of arrays, items, and, if it is to be `deep`, public attributes. Of
    arrays with more than `most` bytes only some elements are looked at."""
    kind = type(value)
    if isinstance(value, IMMUTABLE):
        return kind, value
    if kind in STEADY:
        return kind, id(value)
    if isinstance(value, numpy.ndarray):
        return kind, id(value), value.shape, value.dtype, digest(value, most)
    if kind is list or kind is tuple:
        return kind, id(value), *[mark(item, most, deep) for item in value]
    if kind is dict:
        return kind, id(value), *[(key, mark(item, most, deep)) for key, item in value.items()]
    apart = VALUE_TYPES[kind].take_apart(value)
    if apart is not None:
        return kind, id(value), *[mark(part, most, deep) for part in apart[1]]
    # Mark an object by its public attributes
    attributes = getattr(value, "__dict__", None) if deep else None
    if type(attributes) is not dict:
        return kind, id(value)
    public = [(name, mark(item, SMALL, False)) for name, item in attributes.items() if name[:1] != "_"]
    return kind, id(value), frozenset(public)


def matches(kept: Any, now: Any) -> bool:
    """Whether a mark is as it was; objects may have more attributes than before."""
    if type(kept) is frozenset and type(now) is frozenset:
        return kept <= now
    if type(kept) is tuple and type(now) is tuple:
        return kept == now or len(kept) == len(now) and all(map(matches, kept, now))
    return bool(kept == now)


def literals(nodes: Iterable[Node]) -> Iterator[tuple[Node, str, Value]]:
    """The constants of nodes, and of models inside, that somebody could change: node, argument, value."""
    for node in nodes:
        for name, symbol in node.varin.items():
            for leaf in leaves(symbol):
                if type(leaf) is Literal and is_changeable(leaf._value):
                    yield node, name, leaf._value
        inside = node.operator.model_of(node) if node.forward is None else None
        if inside is not None:
            yield from literals(inside)


def is_changeable(value: Value) -> bool:
    """Whether a value has numbers that could be changed in place."""
    kind = type(value)
    if kind is list or kind is dict:
        items = value if kind is list else value.values()
        return all(isinstance(item, IMMUTABLE) or is_changeable(item) for item in items)
    return isinstance(value, numpy.ndarray) or VALUE_TYPES[kind].take_apart(value) is not None

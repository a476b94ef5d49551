"""What the engine and the tests of derivatives ask of values, by their types."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from importlib import import_module
from typing import Any, TypeVar

import numpy

from .error import BadArgument
from .execution import describe
from .operator import ZeroGradient
from .symbol import Value

IMMUTABLE = int, float, complex, str, bytes, type(None), numpy.generic
Parts = list[Value]
Apart = tuple[Callable[[Parts], Value], Parts]


class ValueType:
    """What is asked of the values of a type. A subclass tells what is special about some types; see `register`."""

    def take_apart(self, x: Value) -> Apart | None:
        """A function that makes a value like x of a list of parts, and the parts of x; None if it has none.

        Parts are numbers, arrays, or values that have parts themselves. The function must not hold on to x.
        """
        return None

    def add(self, a: Value, b: Value) -> Value:
        """The sum of two values of the type."""
        return a + b

    def add_in_place(self, total: Value, part: Value) -> bool:
        """Add a value to another one of its type in place; returns whether that could be done. Only
        sums that `add` has made are changed in this way, and only if `add` always makes a new object."""
        return False

    # What values look like
    def shape(self, x: Value) -> tuple[Any, ...] | None:
        """The shape of a value on this rank, for several parts the tuple of their shapes; None if unknown."""
        apart = self.take_apart(x)
        if apart is None:
            return () if isinstance(x, (int, float, complex)) else getattr(x, "shape", None)
        shapes = tuple(value_type(part).shape(part) for part in apart[1])
        return shapes[0] if len(shapes) == 1 else shapes

    def whole(self, x: Value) -> tuple[int, ...] | None:
        """The shape of the whole, for a value that is partitioned over ranks and knows it."""
        return None

    def comm(self, x: Value) -> Any:
        """The communicator of the ranks that have a value together, each a part of it; None if it knows of none."""
        comm = getattr(x, "comm", None)
        return comm if hasattr(comm, "allgather") else None

    def full(self, form: Form, number: Value) -> Value | None:
        """A value of a form with one number in all places; None if no number stands for such values."""
        if form.make is None:
            return number if form.shape == () else None
        part = VALUE_TYPES[form.part.kind].full(form.part, number)
        return None if part is None else form.make([part])

    def accept(self, form: Form, derivative: Value) -> Value | None:
        """A derivative that has the shape of a form; an array as a value like others of the form, if it is its only part."""
        if form.make is None or type(derivative) is not numpy.ndarray or form.kind is numpy.ndarray:
            return derivative
        part = VALUE_TYPES[form.part.kind].accept(form.part, derivative)
        return None if part is None else form.make([part])

    # Copies of values
    def copy(self, x: Value) -> Value:
        """A copy of a value that does not change when the value is changed in place."""
        if self.take_apart(x) is None:
            return x.copy() if hasattr(x, "copy") else x
        return by_parts(lambda part: value_type(part).copy(part), x)

    # How values are kept on disk, and by whom
    def to_disk(self, x: Value) -> tuple[Callable[[Any], Value], Any] | None:
        """A function that stays in memory and what it makes x of, which is pickled; None for what is pickled itself."""
        return None if isinstance(x, (list, tuple)) else self.take_apart(x)

    # How many bytes values hold
    def nbytes(self, x: Value, seen: MutableMapping[int, Any]) -> int:
        """The bytes of the arrays of a value that are not among those `seen` before, see `nbytes_of`."""
        kind, apart = type(x), self.take_apart(x)
        if kind in (int, float, complex, str, bool, type(None)):
            return 0
        if apart is not None or kind is dict:
            return sum(nbytes_of(part, seen) for part in (apart[1] if apart else x.values()))
        # Weigh an array
        if is_array(x):
            owner = x
            while getattr(owner, "base", None) is not None:
                owner = owner.base
            if seen.get(id(owner)) is owner:
                return 0
            try:
                seen[id(owner)] = owner
            except TypeError:
                pass
            return int(getattr(owner, "nbytes", x.nbytes))
        if hasattr(kind, "held"):
            return nbytes_of(x.held(), seen)
        attributes = {} if isinstance(x, type) else getattr(x, "__dict__", {})
        return sum(nbytes_of(part, seen) for part in attributes.values() if is_array(part))

    # What tests of derivatives ask of values
    def inner(self, a: Value, b: Value) -> float:
        """The real inner product Re sum w conj(a) b of two values on this rank, in double precision."""
        if self.take_apart(a) is None:
            return float(numpy.sum(numpy.conj(a) * b, dtype="c16").real)
        pairs = zip(parts_of(a), self.weighted_parts(b), strict=True)
        return sum((value_type(p).inner(p, q) for p, q in pairs), 0.0)

    def weighted_parts(self, x: Value) -> Parts:
        """The parts of a value, times the weights w that the inner product gives to their elements."""
        return parts_of(x)

    def random_like(self, x: Value, rng: numpy.random.Generator) -> Value:
        """A random direction: normal deviates of the shape and precision of a value, complex if it is."""
        if self.take_apart(x) is not None:
            rng = rng_of_rank(rng, self.comm(x))
            return by_parts(lambda part: value_type(part).random_like(part, rng), x)
        if isinstance(x, complex):
            return complex(rng.normal(), rng.normal())
        if isinstance(x, (int, float)):
            return float(rng.normal())
        x = numpy.asarray(x)
        noise = rng.normal(size=x.shape)
        if x.dtype.kind == "c":
            noise = noise + 1j * rng.normal(size=x.shape)
        return numpy.asarray(noise).astype(x.dtype if x.dtype.kind in "fc" else "f8")

    def step(self, x: Value, h: float, v: Value) -> Value:
        """x + h v, where v is a value like x."""
        if self.take_apart(x) is None:
            return x + v * h
        return by_parts(lambda p, q: value_type(p).step(p, h, q), x, v)

    def zeros_like(self, x: Value) -> Value:
        """A zero of the shape and precision of a value."""
        if self.take_apart(x) is None:
            return numpy.zeros_like(x) if isinstance(x, numpy.ndarray) else type(x)(0)
        return by_parts(lambda part: value_type(part).zeros_like(part), x)

    def varies(self, x: Value) -> bool:
        """Whether a value can have a derivative."""
        apart = self.take_apart(x)
        if apart is not None:
            return len(apart[1]) > 0 and all(value_type(part).varies(part) for part in apart[1])
        if isinstance(x, (int, float, complex)):
            return not isinstance(x, bool)
        return isinstance(x, (numpy.ndarray, numpy.number)) and x.dtype.kind in "iufc"

    def gather(self, x: Value) -> list[Value]:
        """The arrays of a value; of a partitioned one those of the whole, on all ranks. Collective."""
        apart = self.take_apart(x)
        if apart is None:
            return [numpy.asarray(x)]
        return [array for part in apart[1] for array in value_type(part).gather(part)]


class ValueTypes(dict[type, ValueType]):
    """The ValueType of each type that was met: its own, or that of the first base that is registered.

    Attributes
    ----------
    registered : dict
        From types to their ValueType.
    elsewhere : dict
        From the names of modules to those of others, which register the types of the former and are
        imported when the first of these types is met.
    """

    def __init__(self) -> None:
        self.registered: dict[type, ValueType] = {object: ValueType()}
        self.elsewhere: dict[str, str] = {}

    def __missing__(self, cls: type) -> ValueType:
        for base in cls.__mro__:
            if base.__module__ in self.elsewhere:
                import_module(self.elsewhere[base.__module__])
        values = next(self.registered[base] for base in cls.__mro__ if base in self.registered)
        if type(values).add is ValueType.add:
            PLAIN.add(cls)
        self[cls] = values
        return values

    def register(self, cls: type, values: ValueType) -> None:
        self.registered[cls] = values
        self.clear()
        PLAIN.clear()


VALUE_TYPES = ValueTypes()
PLAIN: set[type] = set()  # the types of VALUE_TYPES whose sums are made by `+`


def value_type(x: Value) -> ValueType:
    """What is known of the type of a value."""
    return VALUE_TYPES[type(x)]


T = TypeVar("T", bound=type[ValueType])


def register(*types: type) -> Callable[[T], T]:
    """Decorate a subclass of ValueType: it is asked about the values of some types, and of types
    derived from them. The last class that is registered for a type holds."""

    def register_class(cls: T) -> T:
        values = cls()
        for known in types:
            VALUE_TYPES.register(known, values)
        return cls

    return register_class


@register(list, tuple)
class Lists(ValueType):
    """Lists and tuples of values."""

    def take_apart(self, x: Value) -> Apart:
        return list, list(x)

    def add(self, a: Value, b: Value) -> Value:
        return by_parts(lambda p, q: value_type(p).add(p, q) if type(p) is type(q) else p + q, a, b)


SMALL = 2**14  # bytes; arrays of this size are in the cache anyway


@register(numpy.ndarray, numpy.generic)
class Arrays(ValueType):
    """NumPy's arrays and numbers."""

    def add_in_place(self, total: Value, part: Value) -> bool:
        if total.nbytes < SMALL or part.shape != total.shape or part.dtype != total.dtype:
            return False
        total += part
        return True

    # Make an array of a number, or of what has its shape
    def accept(self, form: Form, derivative: Value) -> Value | None:
        kind = getattr(getattr(derivative, "dtype", None), "kind", None)
        if kind in ("S", "U", "V", "M", "m"):
            return None
        return derivative.astype("f8") if kind in ("b", "i", "u") else derivative

    def full(self, form: Form, number: Value) -> Value:
        exact = form.dtype.kind not in "fc"
        dtype = numpy.result_type(float if exact else form.dtype, number)
        return numpy.full(form.shape, number, dtype)


def by_parts(function: Callable[..., Value], x: Value, *others: Value) -> Value:
    """A value like x, of what a function makes of each part of x and the same parts of other values."""
    rebuild, parts = apart(x)
    return rebuild([function(*p) for p in zip(parts, *map(parts_of, others), strict=True)])


def parts_of(x: Value) -> Parts:
    """The parts of a value that has some."""
    return apart(x)[1]


def apart(x: Value) -> Apart:
    found = value_type(x).take_apart(x)
    if found is None:
        raise TypeError(f"{describe(x)} has no parts")
    return found


class Form:
    """The looks of a value: type, shape and dtype, and for a partitioned field the shape of the whole."""

    __slots__ = "kind", "shape", "dtype", "whole", "make", "part"

    def __init__(self, value: Value) -> None:
        values = value_type(value)
        self.kind = type(value)
        apart = None if self.kind is numpy.ndarray else values.take_apart(value)
        self.make: Any = None
        if apart and len(apart[1]) == 1:
            self.make, self.part = apart[0], Form(apart[1][0])
        self.shape, self.whole = values.shape(value), values.whole(value)
        self.dtype: Any = getattr(value, "dtype", None)

    def __str__(self) -> str:
        if not self.shape and self.dtype is None:
            return "a number" if self.shape == () else f"an object of type {self.kind.__name__}"
        whole = f" of {list(self.whole)}" if self.whole else ""
        dtype = "" if self.dtype is None else self.dtype
        return f"{self.kind.__name__} {dtype}{list(self.shape or ())}{whole}"


def form_of(value: Value) -> Any:
    """The Form of a value, or the list of those of its items."""
    if type(value) in (list, tuple):
        return [form_of(item) for item in value]
    return value if type(value) is Form else Form(value)


def conform(name: str, derivative: Value, form: Any) -> Value:
    """A tangent or cotangent for a value of some form, converted as NumPy would; raises BadArgument if it does not fit."""
    if derivative is ZeroGradient:
        return derivative
    if type(form) is list:
        items = spread(derivative, len(form))
        if items is None:
            raise BadArgument(f"'{name}' is {describe(derivative)}, and belongs to a list of {len(form)}")
        return [conform(f"{name}[{i}]", item, part) for i, (item, part) in enumerate(zip(items, form))]
    if form.shape is None:
        return derivative  # of a type that we know nothing about
    taken = convert(derivative, form)
    if taken is None:
        # Complain that a derivative does not fit
        given = form_of(derivative)
        looks = given if type(given) is Form and given.shape else describe(derivative)
        raise BadArgument(f"'{name}' is {looks}, and belongs to a value that is {form}")
    return taken


def spread(derivative: Value, n: int) -> list[Value] | None:
    """The `n` items of what stands for a list: of a list or the rows of an array, or as often the same number."""
    given = type(derivative)
    if given in (list, tuple) or given is numpy.ndarray and derivative.ndim and len(derivative) == n:
        return list(derivative) if len(derivative) == n else None
    number = number_in(derivative)
    return None if number is None else [number] * n


def convert(derivative: Value, form: Form) -> Value | None:
    """What stands for a derivative of a value of some form, or None if it does not fit."""
    values = VALUE_TYPES[form.kind]
    given = None if type(derivative) in (list, tuple) else Form(derivative)
    number = number_in(derivative)
    if number is not None and form.shape == () and form.kind is not numpy.ndarray:
        return values.full(form, number)
    if given and given.shape == form.shape and not wholes_differ(given, form):
        return values.accept(form, derivative)
    if number is not None:
        return values.full(form, number)
    if given is None and isinstance(derivative, (list, tuple)):
        array = as_numbers(derivative)
        return values.accept(form, array) if array is not None and array.shape == form.shape else None
    return None


def number_in(x: Value) -> Value | None:
    """The number that a value is or holds as its only element; None if there is none."""
    if isinstance(x, (int, float, complex)):
        return x
    array = as_numbers(x) if isinstance(x, (list, tuple, numpy.ndarray, numpy.generic)) else None
    if array is None or array.size != 1:
        return None
    return array.item() if array.dtype.kind in "biu" else array.reshape(())[()]


def as_numbers(x: Value) -> Any:
    """A list or array as an array of numbers, or None if it is not made of numbers."""
    try:
        array = numpy.asarray(x)
        if array.dtype.kind == "O":
            array = numpy.asarray(array.tolist())
    except ValueError:  # rows of different lengths
        return None
    return array if array.dtype.kind in "biufc" else None


def wholes_differ(a: Form, b: Form) -> bool:
    return a.whole != b.whole and None not in (a.whole, b.whole)


def rng_of_rank(rng: numpy.random.Generator, comm: Any) -> numpy.random.Generator:
    """A generator of random numbers that is this rank's own, if there is a communicator.

    It is another one at each call, as long as all ranks call with the same `rng`.
    """
    if comm is None:
        return rng
    return numpy.random.default_rng([*rng.integers(1 << 32, size=4), 1 + comm.rank])


def nbytes_of(value: Value, seen: MutableMapping[int, Any]) -> int:
    """The bytes of the arrays that a value holds on this rank, without those that were `seen` before.

    Looks into lists, dicts and other values with parts, into objects that tell what they have in a
    method `held`, and, for all other objects, at the arrays among their attributes. Adds what it finds to
    `seen`.
    """
    return VALUE_TYPES[type(value)].nbytes(value, seen)


def is_array(value: Value) -> bool:
    return isinstance(getattr(value, "nbytes", None), int) and hasattr(value, "shape")

"""Vector spaces: all that an optimiser may know about the vectors it moves.

A space knows how to form ``a + b * c ** p`` and the inner product of two vectors.
:class:`VectorSpace` does so for numbers and NumPy arrays, :class:`FieldSpace` for pmesh fields, and
:class:`ProductSpace` for tuples, lists and dictionaries of vectors of other spaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from vmad_lit.core.arguments import plain_array
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.together import raise_together
from vmad_lit.core.traffic import count_object
from vmad_lit.core.valuetypes import value_type
from vmad_lit.lib.noise import Purpose, fill_normal

Vector = Any  # what is moved: an array, a field, a tuple or dictionary of vectors, or the number 0

TINY, HUGE = 1e-280, 1e280  # squares of lengths between them are exact to rounding
CACHED = 2**13  # numbers in a part of an array that stays in the cache


def slabs(array: Array) -> list[slice]:
    """Slices along the first axis of parts of `array` that fit into the cache."""
    rows = max(1, CACHED * len(array) // max(1, array.size))
    return [slice(i, i + rows) for i in range(0, len(array), rows)]


def multiply_add(out: Array, a: Array, b: Array, c: float) -> Array:
    """``out[...] = a + b * c`` for arrays of one shape; `out` may be `a`. Returns `out`."""
    for i in slabs(out):
        np.add(a[i], b[i] * c, out=out[i])
    return out


def real_inner_product(a: ArrayLike, b: ArrayLike) -> float:
    """``Re sum conj(a) b`` of two arrays of equal shape, accumulated in double precision at least."""
    a, b = plain_array("a vector", a), plain_array("a vector", b)
    if a.shape != b.shape:
        raise ValueError(f"the inner product needs two arrays of one shape, got {a.shape} and {b.shape}")
    a, b, wide = np.atleast_1d(a), np.atleast_1d(b), np.result_type(a, b, np.float64)
    return float(
        sum(np.vdot(a[i].astype(wide, copy=False), b[i].astype(wide, copy=False)).real for i in slabs(a))
    )


def scalar(c: Any, p: float = 1) -> Any:
    """``c ** p``, as a plain Python number if it is a number."""
    c = c.item() if isinstance(c, np.generic) else c
    return c if p == 1 else c**p


def is_zero(a: Vector) -> bool:
    """Whether `a` is the plain number 0, which stands for the zero vector."""
    return isinstance(a, (int, float)) and a == 0


def alike(a: Vector, b: Vector, c: Any) -> bool:
    """Whether a and b are arrays of one shape and floating-point type, and c is a number that keeps it."""
    return (
        type(a) is type(b) is np.ndarray
        and a.shape == b.shape
        and a.dtype == b.dtype
        and a.ndim > 0
        and a.dtype.kind in "fc"
        and isinstance(c, (int, float))
    )


class VectorSpace:
    """Numbers and NumPy arrays with the inner product ``Re sum conj(a) b``.

    Parameters
    ----------
    addmul, dot :
        functions that replace the methods of the same names; a subclass may override them instead.
    comm :
        the MPI communicator over which the vectors are spread, or None for vectors that one process holds.
        The base class uses it only to let the ranks agree; summing `dot` over ranks is up to the subclass.
    """

    comm: Communicator | None = None

    def __init__(
        self,
        addmul: Callable[..., Vector] | None = None,
        dot: Callable[..., float] | None = None,
        comm: Communicator | None = None,
    ) -> None:
        if addmul is not None:
            self.addmul, self.accumulate = addmul, addmul  # type: ignore[method-assign]
        if dot is not None:
            self.dot = dot  # type: ignore[method-assign]
        if comm is not None:
            self.comm = comm

    def addmul(self, a: Vector, b: Vector, c: Any, p: float = 1) -> Vector:
        """``a + b * c ** p``, of the type of `b`; `a` may be 0."""
        c = scalar(c, p)
        if is_zero(a):
            return b * c
        if alike(a, b, c):
            return multiply_add(np.empty_like(b), a, b, c)
        if np.shape(a) != np.shape(b):
            raise ValueError(f"two vectors must have one shape, not {np.shape(a)} and {np.shape(b)}")
        return a + b * c

    def dot(self, a: Vector, b: Vector) -> float:
        """The inner product, a real number that is the same on all ranks."""
        return real_inner_product(a, b)

    # What follows from the two operations
    def accumulate(self, a: Vector, b: Vector, c: Any) -> Vector:
        """``a + b * c`` for an `a` that the caller gives up: its memory may be used for the result."""
        c = scalar(c)
        return multiply_add(a, a, b, c) if alike(a, b, c) else self.addmul(a, b, c)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "addmul" in vars(cls) and "accumulate" not in vars(cls):
            cls.accumulate = cls.addmul  # type: ignore[method-assign]

    def axpy(self, c: Any, x: Vector, y: Vector) -> Vector:
        """``c * x + y``."""
        return self.addmul(y, x, c)

    def scale(self, c: Any, x: Vector) -> Vector:
        """``c * x``."""
        return self.addmul(0, x, c)

    def copy(self, x: Vector) -> Vector:
        """A vector equal to `x` that shares no memory with it."""
        return self.addmul(0, x, 1)

    def zeros_like(self, x: Vector) -> Vector:
        """The zero vector of the kind of `x`, whatever values `x` has."""
        known = isinstance(x, np.ndarray) or value_type(x).take_apart(x) is not None
        return value_type(x).zeros_like(x) if known else self.addmul(0, x, 0)

    def inner(self, a: Vector, b: Vector) -> float:
        """The result of :meth:`dot` as a plain number, of whatever type it is."""
        product = self.dot(a, b)
        product = product.real if np.iscomplexobj(product) and not np.imag(product) else product
        return plain_number(product, "an inner product must be")

    def norm(self, a: Vector) -> float:
        """The length ``sqrt(dot(a, a))``, also where that square is no number because it is too large or small."""
        with np.errstate(over="ignore", invalid="ignore"):
            square, power = self.inner(a, a), 0
            while not TINY <= square <= HUGE and abs(power) < 1100 and not math.isnan(square):
                step = 100 if square < TINY else -100
                a, power = self.scale(2.0**step, a), power + step
                square = self.inner(a, a)
        if square < 0:
            raise ValueError(f"the inner product of a vector with itself is negative: {square:.3g}")
        return math.ldexp(math.sqrt(square), -power)

    def same(self, a: Vector, b: Vector) -> bool:
        """Whether `a` and `b` are the same vector, to the last bit; all ranks get the same answer."""
        if isinstance(a, np.ndarray):
            different = not isinstance(b, np.ndarray) or a.dtype != b.dtype or not np.array_equal(a, b)
            return not self.any(different)
        if isinstance(a, (int, float, complex, np.generic)):
            return not self.any(type(a) is not type(b) or a != b)
        if self.any(type(a) is not type(b)):
            return False
        return self.norm(self.addmul(a, b, -1)) == 0.0

    # What the ranks agree on
    def replicate(self, value: Any) -> float:
        """`value` as a real number that is the same on every rank.

        Raises TypeError if it is not one real number, ValueError if ranks disagree by more than rounding.
        """
        number, error = math.nan, None
        try:
            number = plain_number(value, "an objective must return")
        except TypeError as exception:
            error = exception
        self.agree_on(error)
        if self.comm is None or self.comm.size == 1:
            return number
        count_object(self.comm, number)
        numbers = self.comm.allgather(number)
        if not np.allclose(numbers, numbers[0], rtol=1e-6, atol=0, equal_nan=True):
            raise ValueError(
                f"the objective differs between ranks, {numbers}: sum the contributions of "
                "the ranks (allreduce) before returning it"
            )
        return numbers[0]

    def agree_on(self, error: Exception | None) -> None:
        """Raise an error of any rank on all of them, by the name of the rank; None is no error."""
        raise_together(self.comm, error)

    def any(self, flag: Any) -> bool:
        """Whether `flag` is true on any rank."""
        if self.comm is None or self.comm.size == 1:
            return bool(flag)
        count_object(self.comm, int(bool(flag)))
        return self.comm.allreduce(int(bool(flag))) > 0

    def normal(self, like: Vector, seed: int, purpose: Purpose = "normal") -> Vector:
        """A vector like `like` of independent standard normal numbers, in the sense of the inner product.

        ``dot(a, normal)`` has the mean 0 and the variance ``dot(a, a)``, for each a. The same on any number of ranks;
        vectors of different seeds, and of different purposes, are independent. Collective.
        """
        if "dot" in vars(self) or type(self).dot is not VectorSpace.dot:
            raise TypeError(
                f"{type(self).__name__} has an inner product of its own, so it needs its own normal()"
            )
        shape, dtype = np.shape(like), np.result_type(getattr(like, "dtype", float), np.float32)
        numbers = self._normal_numbers(shape, dtype, 0, seed, purpose)
        return numbers if isinstance(like, np.ndarray) else numbers[()].item()

    @staticmethod
    def _normal_numbers(shape: tuple[int, ...], dtype: Any, first: int, seed: int, purpose: Purpose) -> Array:
        """Normal numbers in an array of a shape and floating-point type, whose first element is number `first`."""
        parts, size = 2 if dtype.kind == "c" else 1, math.prod(shape)
        row = min(CACHED, max(1, parts * size))
        rows = np.empty((-(-parts * size // row), row))
        fill_normal(rows, parts * first + row * np.arange(len(rows)), seed, purpose)
        flat = rows.ravel()[: parts * size].view("c16" if parts == 2 else "f8")
        return flat.reshape(shape).astype(dtype, copy=False)

    # How vectors come in and go out
    def as_vector(self, x: Any, like: Vector = None) -> Vector:
        """`x` as a vector of this space, of the shape of `like` if that is given; an error if it is none.

        Numbers, lists and arrays of whole numbers become floating-point ones. What else a space of its own
        arithmetic knows is left as it is.
        """
        if (
            x is None
            or isinstance(x, (bool, str, bytes, set))
            or np.ma.isMaskedArray(x)
            or hasattr(x, "unit")
        ):
            kind = "a quantity with a unit" if hasattr(x, "unit") else type(x).__name__
            raise TypeError(f"expected numbers or an array of them, got {kind}")
        own = "addmul" in vars(self) or type(self).accumulate is type(self).addmul
        if not own and not hasattr(x, "__mul__"):
            raise TypeError(f"expected what can be multiplied, got {type(x).__name__}; see ProductSpace")
        if own or not isinstance(x, (int, float, complex, list, tuple, np.ndarray, np.generic)):
            return x
        x = floating(x)
        if like is not None and np.shape(x) != np.shape(like):
            if np.size(x) != 1 or np.size(like) != 1:
                raise ValueError(f"expected the shape {np.shape(like)}, got {np.shape(x)}")
            x = np.reshape(x, np.shape(like))
        if like is not None and np.iscomplexobj(x) and not np.iscomplexobj(like):
            raise TypeError("expected real numbers, got complex ones")
        return x

    def to_arrays(self, x: Vector) -> list[Array]:
        """The part of `x` that this rank holds, as a list of arrays."""
        return [np.asarray(x)]

    def starts(self, x: Vector) -> list[tuple[int, ...] | None]:
        """Where in the whole each array of :meth:`to_arrays` begins, or None where nobody can tell."""
        return [None for _ in self.to_arrays(x)]

    def from_arrays(self, arrays: Iterable[Array], like: Vector) -> Vector:
        """The inverse of :meth:`to_arrays`; `like` is a vector of the kind that is wanted."""
        (array,) = arrays
        if array.shape != np.shape(like):
            raise ValueError(f"expected an array of shape {np.shape(like)}, got {array.shape}")
        if isinstance(like, np.ndarray):
            return np.array(array, dtype=np.result_type(array, like))
        return array.item()


def plain_number(value: Any, what: str) -> float:
    """One real number of whatever type as a float; TypeError if it is none."""
    array = np.asarray(value)
    plain = array.size == 1 and array.dtype.kind in "fiub"
    if not plain or np.ma.isMaskedArray(value) or hasattr(value, "unit"):
        kind = f"{type(value).__name__} with shape {array.shape} and dtype {array.dtype}"
        raise TypeError(f"{what} one real number, got {kind}")
    return float(array.reshape(()))


class Communicator(Protocol):
    """What a space asks of a communicator of MPI."""

    @property
    def size(self) -> int: ...
    @property
    def rank(self) -> int: ...
    def allgather(self, value: Any, /) -> list[Any]: ...
    def allreduce(self, value: Any, /) -> Any: ...
    def Allreduce(self, send: Any, receive: Any, /) -> Any: ...
    def bcast(self, value: Any, /) -> Any: ...
    def Barrier(self) -> None: ...


def floating(x: Any) -> Any:
    """A number, or the array that a list makes, of a floating-point type of single precision at least."""
    try:
        array = np.asarray(x)
    except ValueError:
        raise TypeError("expected an array, got a list whose rows differ in length") from None
    if array.dtype.kind not in "iufc":
        raise TypeError(f"expected numbers, got {type(x).__name__} of dtype {array.dtype}")
    if array.dtype.kind in "iu" or array.dtype == np.float16:
        array = array.astype(float)
    elif not isinstance(x, (list, tuple)):
        return x
    return array if array.ndim or isinstance(x, np.ndarray) else array.item()


def is_field(x: Any) -> bool:
    """Whether x is a pmesh field: it knows its mesh."""
    return hasattr(x, "pm") and hasattr(x, "value")


def local_field_product(a: Vector, b: Vector) -> float:
    """This rank's share of the inner product of two pmesh fields of one kind."""
    if not np.iscomplexobj(a.value):
        return real_inner_product(a.value, b.value)
    stored = real_inner_product(a.value, b.value)
    if not a.compressed:
        return stored
    i, n = np.ravel(a.i[-1]), a.Nmesh[-1]
    own = (i == 0) | (2 * i == n)
    return 2 * stored - real_inner_product(a.value[..., own], b.value[..., own])


class FieldSpace(VectorSpace):
    """Fields of pmesh, real or half-stored complex, on any number of ranks.

    The inner product of real fields is the sum over all mesh points, that of complex fields the sum over
    all modes, also those that are not stored. Give the communicator of the mesh, ``FieldSpace(pm.comm)``,
    so that the ranks can agree on decisions too.
    """

    def __init__(self, comm: Communicator | None = None) -> None:
        super().__init__(comm=comm)

    def dot(self, a: Vector, b: Vector) -> float:
        """The inner product over the whole mesh."""
        if type(a) is not type(b) or not is_field(a):
            raise TypeError(
                f"expected two pmesh fields of one kind, got {type(a).__name__} and {type(b).__name__}"
            )
        product = local_field_product(a, b)
        count_object(a.pm.comm, product)
        return a.pm.comm.allreduce(product)

    def addmul(self, a: Vector, b: Vector, c: Any, p: float = 1) -> Vector:
        """``a + b * c ** p``, a field like `b`."""
        number = scalar(c, p)
        if not (is_field(b) and isinstance(number, (int, float))):
            return super().addmul(a, b, c, p)
        out = b.pm.create(type=type(b))
        if is_zero(a):
            np.multiply(b.value, number, out=out.value)
        elif type(a) is type(b) and alike(a.value, b.value, number):
            multiply_add(out.value, a.value, b.value, number)
        else:
            return a + b * number
        return out

    def accumulate(self, a: Vector, b: Vector, c: Any) -> Vector:
        """``a + b * c`` in the memory of the field `a`."""
        if not is_field(b) or type(a) is not type(b) or not alike(a.value, b.value, scalar(c)):
            return super().accumulate(a, b, c)
        multiply_add(a.value, a.value, b.value, scalar(c))
        return a

    def normal(self, like: Vector, seed: int, purpose: Purpose = "normal") -> Vector:
        """A field of independent standard normal numbers on the mesh of `like`, or white modes. Collective."""
        if not is_field(like):
            return super().normal(like, seed, purpose)
        if np.iscomplexobj(like.value):
            kind: Any = type(like)
            options = dict(mean=None, generator="philox", purpose=purpose)
            return like.pm.generate_whitenoise(seed, type=kind, **options)
        # Number the rows of this rank's part of the mesh
        begins = np.zeros((1,) * max(1, like.ndim - 1), dtype="u8")
        for axis, n in enumerate(like.Nmesh):
            begins = begins * np.uint64(n)
            if axis < like.ndim - 1:
                shape = [-1 if i == axis else 1 for i in range(like.ndim - 1)]
                begins = begins + np.arange(
                    like.start[axis], like.start[axis] + like.shape[axis], dtype="u8"
                ).reshape(shape)
        begins = begins + np.uint64(like.start[-1])
        rows = np.empty((begins.size, like.shape[-1]))
        fill_normal(rows, begins.ravel(), seed, purpose)
        return like.pm.create(type=type(like), value=rows.reshape(like.shape))

    def same(self, a: Vector, b: Vector) -> bool:
        """Whether the fields have the same values everywhere; all ranks get the same answer."""
        if not is_field(a):
            return super().same(a, b)
        equal = type(a) is type(b) and np.array_equal(a.value, b.value)
        count_object(a.pm.comm, int(not equal))
        return a.pm.comm.allreduce(int(not equal)) == 0

    def to_arrays(self, x: Vector) -> list[Array]:
        """The slab of mesh values that this rank holds."""
        return [np.array(x.value)] if is_field(x) else super().to_arrays(x)

    def starts(self, x: Vector) -> list[tuple[int, ...] | None]:
        """The first index of the slab of this rank."""
        return [tuple(int(n) for n in x.start)] if is_field(x) else super().starts(x)

    def from_arrays(self, arrays: Iterable[Array], like: Vector) -> Vector:
        """A field on the mesh of `like` with the values given."""
        if not is_field(like):
            return super().from_arrays(arrays, like)
        (array,) = arrays
        if array.shape != like.shape:
            raise ValueError(
                f"expected the values of a {type(like).__name__} of local shape {like.shape}, "
                f"got {array.shape}"
            )
        return like.pm.create(type=type(like), value=array)


class ProductSpace(VectorSpace):
    """Tuples, lists or dictionaries of vectors.

    Parameters
    ----------
    spaces :
        one space for all components, or a list, tuple or dictionary with the space of each.
    """

    def __init__(
        self, spaces: VectorSpace | Sequence[VectorSpace] | Mapping[Any, VectorSpace] | None = None
    ) -> None:
        self.spaces = VectorSpace() if spaces is None else spaces
        several = isinstance(self.spaces, (dict, list, tuple))
        known: list[Any] = [space for _, space in _items(self.spaces)] if several else [self.spaces]
        for space in known:
            if not isinstance(space, VectorSpace):
                raise TypeError(f"spaces must be one vector space, or several, not {space!r}")
        self.comm = next((space.comm for space in known if space.comm is not None), None)

    def _zip(self, a: Vector, b: Vector) -> list[tuple[VectorSpace, Vector, Vector]]:
        """Triples (space, component of a, component of b); the number 0 as `a` is 0 in each component."""
        keys = [key for key, _ in _items(b)]
        zero = is_zero(a)
        if not zero and [key for key, _ in _items(a)] != keys and set(dict(_items(a))) != set(keys):
            raise ValueError(
                f"two vectors of a product space differ in their components: "
                f"{[key for key, _ in _items(a)]} and {keys}"
            )
        return [(self._space(key), 0 if zero else a[key], b[key]) for key in keys]

    def _space(self, key: Any) -> VectorSpace:
        if isinstance(self.spaces, VectorSpace):
            return self.spaces
        try:
            return self.spaces[key]
        except LookupError:
            raise ValueError(
                f"no space is known for component {key!r}; "
                f"known are {[key for key, _ in _items(self.spaces)]}"
            ) from None

    def components(self, x: Vector) -> list[tuple[Any, VectorSpace, Vector]]:
        """Triples (key, space, component) of a vector."""
        return [(key, self._space(key), part) for key, part in _items(x)]

    def addmul(self, a: Vector, b: Vector, c: Any, p: float = 1) -> Vector:
        """``a + b * c ** p``, component by component."""
        return _like(b, [space.addmul(x, y, c, p) for space, x, y in self._zip(a, b)])

    def dot(self, a: Vector, b: Vector) -> float:
        """The sum of the inner products of the components."""
        return sum((space.inner(x, y) for space, x, y in self._zip(a, b)), 0.0)

    def accumulate(self, a: Vector, b: Vector, c: Any) -> Vector:
        """``a + b * c`` in the memory of `a` where that is possible."""
        return _like(b, [space.accumulate(x, y, c) for space, x, y in self._zip(a, b)])

    def as_vector(self, x: Any, like: Vector = None) -> Vector:
        """`x` with each component as a vector of its space."""
        pairs = self._zip(x if like is None else like, x)
        return _like(x, [space.as_vector(part, None if like is None else old) for space, old, part in pairs])

    def zeros_like(self, x: Vector) -> Vector:
        """The zero vector of the kind of `x`."""
        return _like(x, [space.zeros_like(y) for space, _, y in self._zip(0, x)])

    def same(self, a: Vector, b: Vector) -> bool:
        """Whether all components are the same."""
        if self.any(type(a) is not type(b) or [k for k, _ in _items(a)] != [k for k, _ in _items(b)]):
            return False
        return all([space.same(x, y) for space, x, y in self._zip(a, b)])

    def normal(self, like: Vector, seed: int, purpose: Purpose = "normal") -> Vector:
        """Independent standard normal numbers in all components. Collective."""
        words = (purpose,) if isinstance(purpose, str) else purpose
        parts = [(self._space(key), y, (*words, str(key))) for key, y in _items(like)]
        return _like(like, [space.normal(y, seed, named) for space, y, named in parts])

    def to_arrays(self, x: Vector) -> list[Array]:
        """The arrays of all components, one after the other."""
        return [array for space, _, y in self._zip(0, x) for array in space.to_arrays(y)]

    def starts(self, x: Vector) -> list[tuple[int, ...] | None]:
        """Where the arrays of all components begin, one after the other."""
        return [start for space, _, y in self._zip(0, x) for start in space.starts(y)]

    def from_arrays(self, arrays: Iterable[Array], like: Vector) -> Vector:
        """A vector with the components of `like` and the values given."""
        arrays, parts = list(arrays), []
        for space, _, part in self._zip(0, like):
            count = len(space.to_arrays(part))
            parts.append(space.from_arrays(arrays[:count], part))
            del arrays[:count]
        if arrays:
            raise ValueError(f"there are {len(arrays)} arrays more than the vector has")
        return _like(like, parts)


def _items(vector: Any) -> list[tuple[Any, Any]]:
    """The (key, component) pairs of a dictionary, list or tuple."""
    if isinstance(vector, dict):
        return list(vector.items())
    if isinstance(vector, (list, tuple)):
        return list(enumerate(vector))
    raise TypeError(
        f"a vector of a product space is a dictionary, list or tuple, not {type(vector).__name__}"
    )


def _like(vector: Vector, parts: list[Any]) -> Vector:
    """`parts` in a container of the kind of `vector`."""
    if isinstance(vector, dict):
        return type(vector)(zip(vector, parts, strict=True))
    return type(vector)._make(parts) if hasattr(vector, "_make") else type(vector)(parts)


class MPIVectorSpace(FieldSpace):
    """Arrays of which each rank of `comm` holds a part, and pmesh fields.

    Unknowns that every rank knows in full (replicated ones) are not of this space: their inner product must
    not be summed over the ranks. Their space is ``VectorSpace(comm=comm)``.
    """

    comm: Communicator

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm=comm)

    def dot(self, a: Vector, b: Vector) -> float:
        """The inner product, summed over all ranks."""
        if is_field(a) or is_field(b):
            return super().dot(a, b)
        product = real_inner_product(a, b)
        count_object(self.comm, product)
        return self.comm.allreduce(product)

    def normal(self, like: Vector, seed: int, purpose: Purpose = "normal") -> Vector:
        """Independent standard normal numbers: of the whole, this rank's part. Collective."""
        if is_field(like):
            return super().normal(like, seed, purpose)
        rows = len(like) if np.ndim(like) else 1
        count_object(self.comm, rows)
        before = sum(self.comm.allgather(rows)[: self.comm.rank])
        dtype = np.result_type(like, np.float32)
        first = before * math.prod(np.shape(like)[1:])
        numbers = self._normal_numbers(np.shape(like), dtype, first, seed, purpose)
        return numbers if isinstance(like, np.ndarray) else numbers[()].item()


class LocalSpace(FieldSpace):
    """Numbers, arrays and fields of a program that runs in one process."""

    def dot(self, a: Vector, b: Vector) -> float:
        """The inner product of fields, or of arrays."""
        return super().dot(a, b) if is_field(a) else real_inner_product(a, b)

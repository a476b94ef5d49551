"""Fields on a mesh that is spread over ranks: inner products, and Fourier transforms as operators.

Cotangents of half-stored complex fields refer to the inner product in which a mode counts twice if
its conjugate is not stored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial, wraps
from inspect import signature
from typing import Any, Self, TypeVar

import numpy
from numpy.typing import ArrayLike, DTypeLike

from vmad_lit import operator
from vmad_lit.core.error import needed_for
from vmad_lit.core.operator import REVISIONS, Operator, ZeroGradient
from vmad_lit.core.stdlib.operators import Array, Shape
from vmad_lit.core.store import Disk
from vmad_lit.core.symbol import Value
from vmad_lit.core.valuetypes import Apart, ValueType, register, rng_of_rank, value_type
from vmad_lit.lib import memory

with needed_for("fields on a mesh", extra="mesh"):
    from mpi4py import MPI
    from pmesh import pm as pmesh
    from pmesh.pm import BaseComplexField, Field, xslab
    from pfft import LocalBuffer

is_zero = type(ZeroGradient).is_zero

T = TypeVar("T")
Kind = str | type  # of a field: a name that pmesh knows, or a class
Metric = Callable[[Array], Array]  # weights of modes, a function of |k|

_kept: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def once_per_mesh(pm: ParticleMesh, key: Any, make: Callable[[], T]) -> T:
    """The value of `make()`, made once for the mesh `pm` and this key."""
    values = _kept.setdefault(pm, {})
    if key not in values:
        values[key] = make()
    return values[key]


def mode_weights(x: BaseComplexField) -> Array:
    """How many modes each stored number of a complex field speaks for: 1 or 2, as a broadcastable array."""

    def make() -> Array:
        i = numpy.asarray(x.i[-1])
        alone = (i == (-i) % x.Nmesh[-1]) if x.compressed else numpy.ones_like(i, dtype="?")
        return numpy.where(alone, 1, 2).astype(x.real.dtype)

    return once_per_mesh(x.pm, ("mode_weights", type(x)), make)


def total(x: Field, values: Array) -> Any:
    """The sum of an array of values of a field over all ranks, in double precision. Collective."""
    return x.pm.comm.allreduce(values.sum(dtype=numpy.result_type(values, "f8")).item())


def sum_modes(x: BaseComplexField, values: Array, metric: Metric | None = None) -> Any:
    """The sum of `values` over all modes of a field, also those not stored; `metric(k)` weighs them. Collective."""
    if metric is not None:
        values = values * metric(wavenumbers(x).normp(2) ** 0.5)
    return total(x, mode_weights(x) * values)


def check_kinds(x: Field, other: Value) -> None:
    """Raise TypeError unless the second factor of an inner product is a field like the first, or an array."""
    if hasattr(other, "pm") and type(x).__name__ != type(other).__name__:
        raise TypeError(
            f"the inner product is of two fields of one kind, not {type(x).__name__} and {type(other).__name__}"
        )


def centre(labels: list[Array], indices: Sequence[Array], pm: ParticleMesh) -> list[Array]:
    """Put the wavenumbers of a mesh right where it is odd, in place; returns them."""
    for k, i, n, length in zip(labels, indices, pm.Nmesh, pm.BoxSize):
        if n % 2:
            k[i == n // 2] = 2 * numpy.pi / length * (n // 2)
    return labels


def wavenumbers(x: BaseComplexField) -> xslab:
    """The wavenumbers of a complex field, a list of broadcastable arrays with pmesh's `normp`."""
    labels = xslab(centre([k.copy() for k in x.x], x.i, x.pm))
    labels.BoxSize, labels.Nmesh = x.BoxSize, x.Nmesh
    return labels


Disk.allocate = staticmethod(partial(memory.empty, dtype="u1"))


class Buffer(LocalBuffer):
    """The memory of a field's numbers."""

    if hasattr(LocalBuffer, "allocate"):
        allocate = staticmethod(partial(memory.empty, dtype="u1"))


class _Field(Field):
    """What our fields have beside pmesh's: memory that is used again."""

    def __init__(self, pm: ParticleMesh, base: LocalBuffer | None = None) -> None:
        super().__init__(pm, Buffer(pm._get_partition(type(self))) if base is None else base)


class RealField(_Field, pmesh.RealField):
    """A real field of pmesh; sums are in double precision."""

    def csum(self, dtype: DTypeLike | None = None) -> Any:
        """Sum over the whole mesh, by default in double precision. Collective."""
        return total(self, self.value.astype(self.dtype if dtype is None else dtype, copy=False))

    def cdot(self, other: Value) -> Any:
        """Inner product of two real fields over the whole mesh, summed in double precision. Collective."""
        check_kinds(self, other)
        return total(self, self.value * getattr(other, "value", other))

    def r2c(self, out: Any = None) -> BaseComplexField:
        """The modes of the field, with the factor 1/N; `out` may be a complex field, or Ellipsis for in place."""
        if out is None or out is Ellipsis:
            out = TransposedComplexField(self.pm, None if out is None else self._base)
        return super().r2c(out)


class _Modes(_Field):
    """What our complex fields have beside pmesh's."""

    def cdot(self, other: Value, metric: Metric | None = None) -> Any:
        """Inner product of two complex fields over all modes, also those not stored; `metric(k)` weighs modes."""
        check_kinds(self, other)
        values: Value = getattr(other, "value", other)
        return sum_modes(self, self.value * numpy.conj(values), metric)

    def cnorm(
        self, metric: Metric | None = None, norm: Callable[[Array], Array] = lambda x: x.real**2 + x.imag**2
    ) -> Any:
        """Sum of `norm` over all modes, also those not stored; `metric(k)` weighs modes."""
        return sum_modes(self, norm(self.value), metric)

    def c2r(self, out: Any = None) -> RealField:
        """The real field of these modes; `out` may be a real field, or Ellipsis for in place."""
        if out is None or out is Ellipsis or out is self:
            out = RealField(self.pm, None if out is None else self._base)
        return super().c2r(out)


class TransposedComplexField(_Modes, pmesh.TransposedComplexField):
    """A complex field of pmesh, transposed over the ranks; sums are right on all meshes, and in double precision."""


class UntransposedComplexField(_Modes, pmesh.UntransposedComplexField):
    """A complex field of pmesh, not transposed; sums are right on all meshes, and in double precision."""


ComplexField = TransposedComplexField

FIELDS = {kind.__name__: kind for kind in (RealField, TransposedComplexField, UntransposedComplexField)}


def ours(kind: Any) -> Any:
    """Our class of fields, for a class of pmesh or its name."""
    kind = pmesh._typestr_to_type(kind) if kind is not None else kind
    return FIELDS.get(getattr(kind, "__name__", None), kind)


class ParticleMesh(pmesh.ParticleMesh):
    """A mesh of pmesh, whose fields have sums and wavenumbers that are right on every mesh.

    See :class:`pmesh.pm.ParticleMesh` for all that it does.
    """

    def create(
        self, type: Kind | None = None, base: Any = None, value: Value = None, mode: Kind | None = None
    ) -> Any:
        """A field: 'real', 'complex' or 'untransposedcomplex', or a class; see pmesh."""
        return super().create(ours(type), base, value, ours(mode))

    def create_coords(self, field_type: Kind, return_indices: bool = False) -> list[Array]:
        """Positions or wavenumbers along each axis, or indices (`return_indices`); see pmesh."""
        labels = super().create_coords(field_type, return_indices)
        if return_indices or ours(field_type) is RealField:
            return labels
        return centre(labels, super().create_coords(field_type, True), self)

    def generate_whitenoise(
        self,
        seed: int,
        unitary: bool = False,
        mean: float = 0,
        type: Kind = ComplexField,
        mode: Kind | None = None,
        **others: Any,
    ) -> Any:
        """White noise of unit variance, the same on any number of ranks; see pmesh."""
        type = getattr(pmesh, ours(type if mode is None else mode).__name__)
        return super().generate_whitenoise(seed, unitary, mean, type, **others)

    def reshape(self, Nmesh: ArrayLike | None = None, BoxSize: ArrayLike | None = None) -> Self:
        """A mesh with another number of points, or another box."""
        return self._like(super().reshape(Nmesh, BoxSize))

    def respawn(self, comm: MPI.Comm, np: Sequence[int] | None = None) -> Self:
        """The mesh on another communicator."""
        return self._like(super().respawn(comm, np))

    def _like(self, pm: pmesh.ParticleMesh) -> Self:
        given = "BoxSize Nmesh dtype comm resampler np".split()
        return type(self)(**{name: getattr(pm, name) for name in given})


@register(pmesh.RealField, BaseComplexField)
class Fields(ValueType):
    """The fields of meshes, also those of pmesh."""

    def take_apart(self, x: Field) -> Apart:
        pm, kind = x.pm, type(x)
        return lambda parts: pm.create(type=kind, value=parts[0]), [x.value]

    def comm(self, x: Field) -> MPI.Comm:
        return x.pm.comm

    def whole(self, x: Field) -> tuple[int, ...]:
        return tuple(map(int, x.cshape))

    def weighted_parts(self, x: Field) -> list[Value]:
        return [x.value * mode_weights(x) if isinstance(x, BaseComplexField) else x.value]

    def add(self, a: Field, b: Field) -> Field:
        if a.pm is not b.pm:
            return a + b
        total = a.pm.create(type=type(a))
        numpy.add(a.value, b.value, out=total.value)
        return total

    def add_in_place(self, total: Field, part: Field) -> bool:
        return value_type(total.value).add_in_place(total.value, part.value)

    def random_like(self, x: Field, rng: numpy.random.Generator) -> Field:
        real = x.pm.create(type="real")
        noise = value_type(real.value).random_like(real.value, rng_of_rank(rng, x.pm.comm))
        real[...] = noise
        return real.cast(type=type(x))

    def gather(self, x: Field) -> list[Value]:
        return [x.preview()]


def weighed_by_hand(_x: Value, _y: Value) -> bool:
    """Whether `_x` is the cotangent `_y` of a complex field times the weights of its modes, without imaginary parts."""
    if not (isinstance(_y, BaseComplexField) and type(_x) is type(_y) and _x.shape == _y.shape):
        return False
    return numpy.array_equal(_x.value, numpy.where(mode_weights(_y) == 2, 2 * _y.real, _y.value))


def weighed_once(operator: Operator, vjp: Callable[..., Any]) -> Callable[..., Any]:
    """The vjp of an operator on complex fields that is not ours; weights put in by hand are taken out."""
    patterns, names = [*operator.ain.values(), *operator.aout.values()], list(signature(vjp).parameters)
    own = operator.__module__.partition(".")[0] == __name__.partition(".")[0]
    if own or len(patterns) != 2 or not all(str(p).endswith("ComplexField") for p in patterns):
        return vjp
    (x,), (y,) = ("_" + name for name in operator.ain), ("_" + name for name in operator.aout)

    @wraps(vjp)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = vjp(*args, **kwargs)
        _y = kwargs[y] if y in kwargs else args[names.index(y)]
        by_hand = weighed_by_hand(result.get(x) if isinstance(result, dict) else result, _y)
        return {**result, x: _y} if by_hand and isinstance(result, dict) else _y if by_hand else result

    return run if y in names else vjp


REVISIONS.append(weighed_once)


def _inner(*pairs: tuple[Field, Value]) -> float:
    """The real inner product of two fields of one kind, on all ranks; for several pairs the sum."""
    x, _ = pairs[0]
    return x.pm.comm.allreduce(sum(_local_inner(x, y) for x, y in pairs))


def _local_inner(x: Field, y: Value) -> float:
    """This rank's part of an inner product; the second factor may be a zero, or whatever makes a field."""
    if is_zero(y):
        return 0.0
    y = field_like(x, y)
    if isinstance(x, BaseComplexField):
        return float((mode_weights(x) * (x.real * y.real + x.imag * y.imag)).sum(dtype="f8"))
    return float(numpy.real(numpy.conj(x.value) * y.value).sum(dtype="f8"))


def field_like(x: Field, value: Value) -> Any:
    """A value (array, number or field) as a field like `x`, without a copy if it is one."""
    if type(value) is type(x) and value.pm is x.pm:
        return value
    return x.pm.create(type=type(x), value=getattr(value, "value", value))


@operator
class to_scalar:
    """Squared norm of a field, on all ranks: sum of squares, with the weights of half-stored modes."""

    ain = {"x": "*Field"}
    aout = {"y": "*"}
    collective = True
    placements = "field -> replicated"

    def apl(node, x):
        return dict(y=_inner((x, x)))

    def vjp(node, _y, x):
        return dict(_x=ZeroGradient if is_zero(_y) else x * (2 * _y))

    def jvp(node, x_, x):
        return dict(y_=2 * _inner((x, x_)))

    def hvp(node, _y, x_):
        return dict(_x_=ZeroGradient if is_zero(_y) or is_zero(x_) else x_ * (2 * _y))


@operator
class cdot:
    """Real inner product of two fields of one kind, on all ranks."""

    ain = {"x1": "*Field", "x2": "*Field"}
    aout = {"y": "*"}
    collective = True
    placements = "field -> replicated"

    def apl(node, x1, x2):
        check_kinds(x1, x2)
        return dict(y=_inner((x1, x2)))

    def vjp(node, _y, x1, x2):
        return dict(
            _x1=ZeroGradient if is_zero(_y) or node.is_literal("x1") else x2 * _y,
            _x2=ZeroGradient if is_zero(_y) or node.is_literal("x2") else x1 * _y,
        )

    def jvp(node, x1_, x2_, x1, x2):
        return dict(y_=_inner((x2, x1_), (x1, x2_)))

    def hvp(node, _y, x1_, x2_):
        return dict(
            _x1_=ZeroGradient if is_zero(_y) or is_zero(x2_) else x2_ * _y,
            _x2_=ZeroGradient if is_zero(_y) or is_zero(x1_) else x1_ * _y,
        )


@operator
class as_complex_field:
    """Numbers (..., 2), real and imaginary parts of this rank's stored modes, as a complex field on `pm`."""

    ain = {"x": "*"}
    aout = {"y": "*ComplexField"}
    placements = "partitioned -> field"

    def apl(node, x, pm):
        y = pm.create(type=ComplexField)
        x = numpy.asarray(x)
        if x.shape != y.shape + (2,):
            raise ValueError(f"this rank's modes must have the shape {y.shape + (2,)}, not {x.shape}")
        y.value.real = x[..., 0]
        y.value.imag = x[..., 1]
        return dict(y=y)

    def vjp(node, _y, pm):
        _y = _y if isinstance(_y, BaseComplexField) else pm.create(type=ComplexField, value=_y)
        weights = mode_weights(_y)
        return dict(_x=numpy.stack([_y.real * weights, _y.imag * weights], axis=-1))


def common_dtypes(comm: MPI.Comm, *derivatives: Value) -> list[numpy.dtype[Any] | None]:
    """The common dtype of each tangent or cotangent on all ranks; None for what is zero on all of them.

    All ranks must call it. It tells them what has to be computed, and where a zero has to be spelled out.
    """
    dtypes = [None if is_zero(x_) else numpy.result_type(getattr(x_, "dtype", x_)) for x_ in derivatives]
    if comm.size == 1:
        return dtypes
    # Ask all ranks
    letters = numpy.array([0 if dtype is None else ord(dtype.char) for dtype in dtypes], dtype="u1")
    everybody = numpy.empty((comm.size, len(dtypes)), dtype="u1")
    comm.Allgather(letters, everybody)
    return [
        numpy.result_type(*map(chr, column[column > 0])) if column.any() else None for column in everybody.T
    ]


def as_rows(x_: Value, shape: int | Shape, dtype: Any) -> Array:
    """A tangent or cotangent as an array that can be sent; a zero, or another number, is spelled out."""
    if numpy.ndim(x_) > 0:
        return numpy.asarray(x_, dtype)
    rows = memory.empty(shape, dtype)
    rows.fill(x_)
    return rows


@operator
class r2c:
    """Fourier transform of a real field, with the factor 1/N."""

    ain = {"x": "RealField"}
    aout = {"y": "*ComplexField"}
    collective = True
    placements = "field -> field"
    hvp = ZeroGradient

    def apl(node, x):
        return dict(y=x.r2c(), pm=x.pm)

    def vjp(node, _y, pm):
        (dtype,) = common_dtypes(pm.comm, _y)
        if dtype is None:
            return dict(_x=ZeroGradient)
        _y = _y if isinstance(_y, BaseComplexField) else pm.create(type=ComplexField, value=_y)
        return dict(_x=_y.r2c_vjp())

    def jvp(node, x_, pm):
        (dtype,) = common_dtypes(pm.comm, x_)
        return dict(y_=ZeroGradient if dtype is None else as_real_field(pm, x_).r2c())


@operator
class c2r:
    """Inverse Fourier transform of a complex field, without a factor."""

    ain = {"x": "*ComplexField"}
    aout = {"y": "RealField"}
    collective = True
    placements = "field -> field"
    hvp = ZeroGradient

    def apl(node, x):
        return dict(y=x.c2r(), pm=x.pm, kind=type(x))

    def vjp(node, _y, pm, kind):
        (dtype,) = common_dtypes(pm.comm, _y)
        if dtype is None:
            return dict(_x=ZeroGradient)
        return dict(_x=as_real_field(pm, _y).c2r_vjp(out=pm.create(type=kind)))

    def jvp(node, x_, pm, kind):
        (dtype,) = common_dtypes(pm.comm, x_)
        if dtype is None:
            return dict(y_=ZeroGradient)
        x_ = x_ if isinstance(x_, BaseComplexField) else pm.create(type=kind, value=x_)
        return dict(y_=x_.c2r())


def as_real_field(pm: ParticleMesh, value: Value) -> RealField:
    """A real field on `pm` with these values, without a copy if it is one."""
    return value if isinstance(value, pmesh.RealField) else pm.create(type=RealField, value=value)

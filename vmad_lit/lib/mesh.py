"""Fields on a mesh that is spread over ranks: inner products, and Fourier transforms as operators.

Cotangents of half-stored complex fields refer to the inner product in which a mode counts twice if
its conjugate is not stored.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial, wraps
from inspect import signature
from itertools import zip_longest
from typing import Any, Literal, NoReturn, Self, TypeVar

import numpy
from numpy.typing import ArrayLike, DTypeLike

from vmad_lit import operator
from vmad_lit.core.arguments import one_of, real_number, whole_number
from vmad_lit.core.error import needed_for
from vmad_lit.core.marks import STEADY
from vmad_lit.core.operator import REVISIONS, Operator, ZeroGradient
from vmad_lit.core.placement import find_comm, same_ranks
from vmad_lit.core.stdlib.operators import Array, Shape
from vmad_lit.core.store import Disk
from vmad_lit.core.symbol import Value
from vmad_lit.core.together import any_rank, raise_first
from vmad_lit.core.traffic import count_object, count_to_all, sources, tell
from vmad_lit.core.valuetypes import Apart, ValueType, register, rng_of_rank, value_type
from vmad_lit.lib import memory
from vmad_lit.lib.mpi import add_up, run_together
from vmad_lit.lib.noise import Purpose, fill_white

with needed_for("fields on a mesh", extra="mesh"):
    from mpi4py import MPI
    from pmesh import pm as pmesh
    from pmesh.domain import GridND
    from pmesh.pm import BaseComplexField, Field, xslab
    from pmesh.window import ResampleWindow
    import pfft
    from pfft import LocalBuffer

is_zero = type(ZeroGradient).is_zero

T = TypeVar("T")
Kind = str | type  # of a field: a name that pmesh knows, or a class
Generator = Literal["pmesh", "philox"]  # of white noise
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
    return add_up(x.pm.comm, values.sum(dtype=numpy.result_type(values, "f8")).item())


def sum_modes(x: BaseComplexField, values: Array, metric: Metric | None = None) -> Any:
    """The sum of `values` over all modes of a field, also those not stored; `metric(k)` weighs them. Collective."""
    if metric is not None:
        values = values * metric(wavenumbers(x).normp(2) ** 0.5)
    return total(x, mode_weights(x) * values)


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


def name_of_mesh(pm: pmesh.ParticleMesh) -> str:
    """What two meshes that are the same have in common: their points and their box."""

    def make() -> str:
        points = " x ".join(str(n) for n in pm.Nmesh)
        return f"a mesh of {points} points in a box of {' x '.join(f'{side:.17g}' for side in pm.BoxSize)}"

    return once_per_mesh(pm, "name", make)


def check_mesh(found: pmesh.ParticleMesh, pm: pmesh.ParticleMesh, what: str = "the field") -> None:
    """Raise ValueError unless what was found to be of a mesh is of one like `pm`: points, box, and ranks."""
    if found is pm:
        return
    if name_of_mesh(found) != name_of_mesh(pm):
        raise ValueError(f"{what} is of {name_of_mesh(found)}, but {name_of_mesh(pm)} is expected")
    if not same_ranks(find_comm(found), find_comm(pm)) or list(found.np) != list(pm.np):
        raise ValueError(f"{what} is shared among other ranks than the mesh: it is of another communicator")


_NAMES: dict[Any, tuple[str, str]] = {
    pmesh.RealField: ("a real field", "use c2r first"),
    BaseComplexField: ("a complex field", "use r2c first"),
    Field: ("a field", "see ParticleMesh.create"),
}


def check_field(x: Value, kind: Any = Field, pm: pmesh.ParticleMesh | None = None) -> Any:
    """`x`, if it is a field of a kind and, given `pm`, of a mesh like that; or an error that says what it is."""
    if not isinstance(x, kind):
        name, hint = next(words for known, words in _NAMES.items() if issubclass(kind, known))
        raise TypeError(f"expected {name}, not a value of type {type(x).__name__}; {hint}")
    if pm is not None:
        check_mesh(x.pm, pm)
    return x


def check_pair(x: Field, other: Value) -> Any:
    """`other`; an error if it is a field, but not of the kind and the mesh of `x`, point by point."""
    if isinstance(other, Field):
        check_kind(other, type(x))
        check_mesh(other.pm, x.pm, "the other field")
    return other


def check_kind(x: Field, kind: Any) -> None:
    """Raise TypeError unless a field is of a kind, ours or pmesh's."""
    if type(x).__name__ != kind.__name__:
        raise TypeError(
            f"a {kind.__name__} is expected, and not a {type(x).__name__}: two fields of one kind"
        )


def describe(x: Value) -> tuple[Any, int]:
    """What of an argument has to be the same on all ranks; and the letter of its dtype if they settle on one, or 0.

    The letter of an empty array is marked: it has no say, as NumPy gives it a type that nobody chose.
    """
    if isinstance(x, numpy.ndarray) and x.ndim:
        if x.dtype.kind in "biufc":
            return ("rows of shape", x.shape[1:]), ord(x.dtype.char) | (0 if len(x) else 128)
        return ("rows of shape", x.shape[1:], x.dtype.str), 0
    if isinstance(x, Field):
        return (type(x).__name__, name_of_mesh(x.pm)), 0
    if isinstance(x, pmesh.ParticleMesh):
        return name_of_mesh(x), 0
    if isinstance(x, ResampleWindow):
        return ("the window", x.kind), 0
    if isinstance(x, (str, bool, type(None))):
        return x, 0
    if isinstance(x, (list, tuple)):
        return ("a list of", *(describe(item)[0] for item in x)), 0
    return ("a number" if numpy.isscalar(x) or numpy.ndim(x) == 0 else type(x).__name__), 0


NOTE = 32  # bytes of what each rank has to say


def unanimous(comm: MPI.Comm, note: bytes) -> bool:
    """Whether all ranks have the same note, of the same length. Collective."""
    mine = numpy.frombuffer(note, "u1")
    mine = numpy.concatenate([mine, ~mine])
    largest = numpy.empty_like(mine)
    count_to_all(comm, mine.nbytes)
    comm.Allreduce(mine, largest, MPI.MAX)
    return numpy.array_equal(largest[: len(note)], ~largest[len(note) :])


def agree(comm: MPI.Comm, prepare: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What `prepare()` makes of this rank's arguments, once those of all ranks fit; or an error on all. Collective.

    `prepare` checks and converts without talking to other ranks. What it returns must be alike on all, arrays but
    for their length and their type: they come back in a dtype that holds what all ranks have.
    """
    if comm.size == 1:
        return prepare()
    error: Exception | None = None
    values: tuple[Any, ...] = ()
    kinds, letters = [], []
    try:
        values = prepare()
        kinds, letters = map(list, zip(*map(describe, values)))
    except Exception as e:
        error = e
    # Tell the other ranks
    digest = 0 if error else 1 + zlib.crc32(repr(kinds).encode())
    note = (digest.to_bytes(5, "little") + bytes(letters)).ljust(NOTE, b"\0")
    if unanimous(comm, note) and error is None:
        return values
    notes = bytearray(NOTE * comm.size)
    count_to_all(comm, NOTE)
    comm.Allgather([note, MPI.BYTE], [notes, MPI.BYTE])
    everybody = numpy.frombuffer(notes, "u1").reshape(comm.size, NOTE)
    if error or (everybody[:, :5] != everybody[comm.rank, :5]).any():
        _disagree(comm, error, kinds)
    return tuple(
        value.astype(_common(column), copy=False) if column.any() else value
        for value, column in zip(values, everybody[:, 5:].T)
    )


def _common(letters: Array) -> numpy.dtype[Any]:
    """The dtype that holds those of all ranks; those of empty arrays count only if there are no others."""
    full = letters[letters < 128]
    return numpy.result_type(*map(chr, full if len(full) else letters - 128))


def _disagree(comm: MPI.Comm, error: Exception | None, kinds: Sequence[Any]) -> NoReturn:
    """Raise an error on all ranks that tells which of them have one, or what they disagree about."""
    if any_rank(comm, error is not None):
        raise_first(comm, error)
    count_object(comm, kinds)
    everybody = comm.allgather(kinds)
    other = next(rank for rank, theirs in enumerate(everybody) if theirs != everybody[0])
    pairs = zip_longest(everybody[0], everybody[other])
    here, there = next((a, b) for a, b in pairs if a != b)
    raise ValueError(
        f"the arguments differ between ranks: rank 0 has {_tell(here)}, rank {other} {_tell(there)}"
    )


def _tell(kind: Any) -> str:
    return " ".join(map(str, kind)) if isinstance(kind, tuple) else str(kind)


def comm_of(x: Value) -> MPI.Comm:
    """The communicator of a field; of what is none, all ranks, who have to hear of it."""
    return x.pm.comm if isinstance(x, Field) else MPI.COMM_WORLD


Disk.allocate = staticmethod(partial(memory.empty, dtype="u1"))


class Buffer(LocalBuffer):
    """The memory of a field's numbers."""

    if hasattr(LocalBuffer, "allocate"):
        allocate = staticmethod(partial(memory.empty, dtype="u1"))


@contextmanager
def tell_of_transforms() -> Iterator[None]:
    """A context in which the exchanges of Fourier transforms are counted, if their library tells of them."""
    told = partial(tell, "each")
    listeners: list[Any] = getattr(pfft, "listeners", [])
    listeners.append(told)
    try:
        yield
    finally:
        listeners.remove(told)


sources.append(tell_of_transforms)

OWN = "pm", "_base", "value", "real", "imag", "plain", "flat", "x", "i"
PLAIN_NUMBERS = int, float, complex


class _Field(Field):
    """What our fields have beside pmesh's: memory that is used again, and a geometry that is found once for a mesh."""

    _view: str

    def __init__(self, pm: ParticleMesh, base: LocalBuffer | None = None) -> None:
        self.__dict__.update(once_per_mesh(pm, type(self), partial(type(self)._geometry, pm)), pm=pm)
        self._base = Buffer(self._partition, base)
        self.value = getattr(self._base, self._view)()
        self.flat = self.value.flat

    @classmethod
    def _geometry(cls, pm: ParticleMesh) -> dict[str, Any]:
        """What all fields of this class on a mesh have in common, as pmesh names it."""
        first = cls.__new__(cls)
        Field.__init__(first, pm, Buffer(pm._get_partition(cls)))
        return {name: value for name, value in vars(first).items() if name not in OWN}

    @cached_property
    def x(self) -> list[Array]:
        """The coordinates or wavenumbers along each axis."""
        return self.pm.create_coords(type(self))

    @cached_property
    def i(self) -> list[Array]:
        """The indices along each axis."""
        return self.pm.create_coords(type(self), return_indices=True)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **others: Any) -> Any:
        for other in inputs:
            if other is not self and isinstance(other, Field):
                check_pair(self, other)
        if method == "__call__" and not others and self._is_result(ufunc, inputs):
            out = self.pm.create(type(self))
            ufunc(*(x.value if isinstance(x, Field) else x for x in inputs), out=out.value)
            return out
        return super().__array_ufunc__(ufunc, method, *inputs, **others)

    def _is_result(self, ufunc: numpy.ufunc, inputs: Sequence[Any]) -> bool:
        """Whether a function of fields and plain numbers has one result, and that in the dtype of this field."""
        kinds = [x.dtype if isinstance(x, Field) else type(x) for x in inputs]
        known = all(isinstance(kind, numpy.dtype) or kind in PLAIN_NUMBERS for kind in kinds)
        return known and ufunc.nout == 1 and ufunc.resolve_dtypes((*kinds, None))[-1] == self.dtype


class RealField(_Field, pmesh.RealField):
    """A real field of pmesh; sums are in double precision."""

    _view = "view_input"

    def csum(self, dtype: DTypeLike | None = None) -> Any:
        """Sum over the whole mesh, by default in double precision. Collective."""
        return total(self, self.value.astype(self.dtype if dtype is None else dtype, copy=False))

    def cdot(self, other: Value) -> Any:
        """Inner product of two real fields over the whole mesh, summed in double precision. Collective."""
        check_pair(self, other)
        return total(self, self.value * getattr(other, "value", other))

    def r2c(self, out: Any = None) -> BaseComplexField:
        """The modes of the field, with the factor 1/N; `out` may be a complex field, or Ellipsis for in place."""
        if out is None or out is Ellipsis:
            out = TransposedComplexField(self.pm, None if out is None else self._base)
        return super().r2c(out)


class _Modes(_Field):
    """What our complex fields have beside pmesh's."""

    _view = "view_output"

    def __init__(self, pm: ParticleMesh, base: LocalBuffer | None = None) -> None:
        super().__init__(pm, base)
        self.real, self.imag = self.value.real, self.value.imag
        self.plain = self.value.view((self.real.dtype, 2))

    def cdot(self, other: Value, metric: Metric | None = None) -> Any:
        """Inner product of two complex fields over all modes, also those not stored; `metric(k)` weighs modes."""
        check_pair(self, other)
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


def check_geometry(Nmesh: ArrayLike, BoxSize: ArrayLike) -> tuple[Array, Array, str]:
    """The points and the sides of a mesh along each axis, and both in words; or an error that says what is wrong."""
    points, sides = numpy.asarray(Nmesh), numpy.asarray(BoxSize)
    if points.ndim != 1 or points.dtype.kind not in "iuf" or not len(points):
        raise ValueError(f"Nmesh must be a sequence of whole numbers, one for each axis, not {Nmesh!r}")
    if not (numpy.isfinite(points) & (points >= 1) & (points % 1 == 0)).all():
        raise ValueError(f"Nmesh must be whole numbers of points, 1 or more along each axis, not {Nmesh!r}")
    if sides.dtype.kind not in "iuf" or sides.shape not in ((), (1,), points.shape):
        raise ValueError(f"BoxSize must be a number, or one for each of {len(points)} axes, not {BoxSize!r}")
    if not (numpy.isfinite(sides) & (sides > 0)).all():
        raise ValueError(f"the sides of a box must be positive and finite, but BoxSize is {BoxSize!r}")
    points, sides = points.astype("i8"), numpy.broadcast_to(sides.astype("f8"), points.shape)
    return points, sides, f"Nmesh {points.tolist()} and BoxSize {sides.tolist()}"


THICK = 8  # planes of a slab


def divide(Nmesh: Sequence[int], ranks: int) -> list[int] | None:
    """The ranks along the first two axes of a mesh of three, if all can have thick slabs; else None."""
    slabs = len(Nmesh) == 3 and ranks > 1 and Nmesh[0] >= THICK * ranks
    return [ranks, 1] if slabs else None


def assign_domains(edges: Sequence[Array], parts: Sequence[tuple[list[int], list[int]]]) -> Array:
    """The rank of each domain between `edges`, from the first point and the shape of the part of each rank."""
    owners = numpy.full([len(edge) - 1 for edge in edges], -1, "i4")
    for rank, (start, shape) in enumerate(parts):
        fits = [
            numpy.flatnonzero((edge[:-1] == first) & (numpy.diff(edge) == count))
            for edge, first, count in zip(edges, start, shape)
        ]
        free = numpy.argwhere(owners[numpy.ix_(*fits)] < 0)[0]  # all that fit are alike
        owners[tuple(fit[i] for fit, i in zip(fits, free))] = rank
    return owners.ravel()


class ParticleMesh(pmesh.ParticleMesh):
    """A mesh of pmesh, whose fields have sums and wavenumbers that are right on every mesh.

    See :class:`pmesh.pm.ParticleMesh` for all that it does. Without `np`, the numbers of ranks along the first axes, it is
    divided into slabs if these are thick enough, see `divide`.
    """

    def __init__(
        self,
        Nmesh: ArrayLike,
        BoxSize: ArrayLike = 1.0,
        comm: MPI.Comm | None = None,
        *others: Any,
        **options: Any,
    ) -> None:
        comm = MPI.COMM_WORLD if comm is None else comm
        points, sides, _ = agree(comm, lambda: check_geometry(Nmesh, BoxSize))
        if not others and options.get("np") is None:
            options["np"] = divide(points.tolist(), comm.size)
        super().__init__(points.tolist(), sides, comm, *others, **options)
        # Give each part without planes a domain of its own
        partition = self.plans["partitionT"]
        if any((numpy.diff(edges) == 0).any() for edges in partition.i_edges):
            part = [int(i) for i in partition.local_i_start], [int(n) for n in partition.local_i_shape]
            owners = assign_domains(partition.i_edges, self.comm.allgather(part))
            self.domain = GridND(partition.i_edges, self.comm, DomainAssign=owners)

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

    def generate_uniform_particle_grid(
        self, shift: ArrayLike = 0.5, dtype: DTypeLike | None = None, return_id: bool = False
    ) -> Any:
        """A particle (N, ndim) for each point of this rank's part, `shift` cells from it, in `dtype` or float64; read-only.

        With `return_id` also the number (N,) of each among all.
        """
        made = super().generate_uniform_particle_grid(shift, None, return_id)
        grid = numpy.ascontiguousarray(made[0] if return_id else made, dtype or "f8")
        grid.flags.writeable = False
        return (grid, made[1]) if return_id else grid

    # White noise on a mesh
    def generate_whitenoise(
        self,
        seed: int,
        unitary: bool = False,
        mean: float | None = 0,
        type: Kind = ComplexField,
        mode: Kind | None = None,
        base: Any = None,
        invertphase: bool = False,
        generator: Generator | None = None,
        purpose: Purpose = "field",
    ) -> Any:
        """White noise, the same on any number of ranks: independent modes of unit variance. Collective.

        Parameters
        ----------
        seed : a whole number of at least 0
        unitary : give all modes the amplitude 1, and only random phases
        mean : of the field; None for a random one, like all other modes (not by pmesh)
        type : 'real', 'complex' or 'untransposedcomplex', or a class; `mode` is its old name
        base : memory for the field, see pmesh
        invertphase : the field with the opposite sign, but the same mean
        generator : 'pmesh', pmesh's own field, or 'philox', that of `vmad_lit.lib.noise`. By default pmesh's
            where it is sound, see `pmesh_is_sound`, and otherwise the other one
        purpose : of the numbers; one seed gives independent fields for different ones (not by pmesh)
        """
        # Agree on the noise that is wanted
        kind = ours(type if mode is None else mode)
        options = run_together(
            self.comm, lambda: self._noise_options(seed, unitary, mean, invertphase, generator, purpose)
        )
        count_object(self.comm, (kind, options))
        given = self.comm.allgather((kind, options))
        if any(each != given[0] for each in given):
            raise ValueError(f"all ranks must ask for the same white noise; ranks 0, 1, .. ask for {given}")
        # Leave it to pmesh if that is its own
        if options.pop("generator") == "pmesh":
            del options["purpose"]
            return super().generate_whitenoise(**options, type=getattr(pmesh, kind.__name__), base=base)
        # Fill the modes, with the opposite sign throughout if that is wanted
        flip = options.pop("invertphase")
        if flip and mean is not None:
            options["mean"] *= -1
        modes = self.create(type=ComplexField if kind is RealField else kind, base=base)
        fill_white(modes.value, modes.i, tuple(self.Nmesh), **options)
        if flip:
            modes.value[...] *= -1
        return modes.c2r(out=Ellipsis) if kind is RealField else modes

    def _noise_options(
        self,
        seed: int,
        unitary: bool,
        mean: float | None,
        invertphase: bool,
        generator: Generator | None,
        purpose: Purpose,
    ) -> dict[str, Any]:
        """The options of white noise, checked, with the choice of a generator."""
        # Choose a generator
        seed = whole_number("seed", seed, least=0)
        one_of("generator", generator, (None, "pmesh", "philox"))
        mean = mean if mean is None else real_number("mean", mean)
        plain = purpose == "field" and mean is not None
        if generator == "pmesh" and not plain:
            raise ValueError("pmesh's white noise has one purpose, 'field', and its mean is not random")
        if generator is None:
            generator = "pmesh" if plain and pmesh_is_sound(self.Nmesh, seed) else "philox"
        return dict(
            seed=seed,
            unitary=bool(unitary),
            mean=mean,
            invertphase=bool(invertphase),
            generator=generator,
            purpose=purpose,
        )

    def reshape(self, Nmesh: ArrayLike | None = None, BoxSize: ArrayLike | None = None) -> Self:
        """A mesh with another number of points, or another box."""
        return self._like(super().reshape(Nmesh, BoxSize))

    def respawn(self, comm: MPI.Comm, np: Sequence[int] | None = None) -> Self:
        """The mesh on another communicator."""
        return self._like(super().respawn(comm, np))

    def _like(self, pm: pmesh.ParticleMesh) -> Self:
        given = "BoxSize Nmesh dtype comm resampler np".split()
        return type(self)(**{name: getattr(pm, name) for name in given})


STEADY.update((ParticleMesh, pmesh.ParticleMesh))


def pmesh_is_sound(Nmesh: Sequence[int], seed: int) -> bool:
    """Whether pmesh makes white noise on a mesh such that no other seed has, and no modes share their numbers."""
    if len(Nmesh) == 2:
        return seed < 2**32
    sides = {int(n) for n in Nmesh}
    even = all(n % 2 == 0 and n >= 4 for n in sides)
    return len(Nmesh) == 3 and even and Nmesh[0] == Nmesh[1] and 0 < seed < 2**31


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

    # Wrap the vjp
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
    return float(add_up(x.pm.comm, float(sum(_local_inner(x, y) for x, y in pairs))))


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
    return as_field(x.pm, type(x), value)


def as_field(pm: ParticleMesh, kind: Any, value: Value) -> Any:
    """A value (array, number or field) as a field of a mesh and a kind, without a copy if it is one."""
    if isinstance(value, Field):
        check_kind(value, kind)
        check_mesh(value.pm, pm)
        if isinstance(value, kind):
            return value
    return pm.create(type=kind, value=getattr(value, "value", value))


@operator
class to_scalar:
    """Squared norm of a field, on all ranks: sum of squares, with the weights of half-stored modes."""

    ain = {"x": "*Field"}
    aout = {"y": "*"}
    collective = True
    placements = "field -> replicated"

    def apl(node, x):
        agree(comm_of(x), lambda: (check_field(x),))
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
        x1, x2 = agree(comm_of(x1), lambda: (check_field(x1), field_like(x1, x2)))
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

    hvp = ZeroGradient

    @staticmethod
    def make(x: Value, pm: ParticleMesh) -> Any:
        """The field of these numbers."""
        x, y = numpy.asarray(x), pm.create(type=ComplexField)
        if x.shape != y.shape + (2,):
            raise ValueError(f"this rank's modes must have the shape {y.shape + (2,)}, not {x.shape}")
        y.value.real, y.value.imag = x[..., 0], x[..., 1]
        return y

    def apl(node, x, pm):
        return dict(y=agree(pm.comm, lambda: (as_complex_field.make(x, pm),))[0])

    def jvp(node, x_, pm):
        return dict(y_=as_complex_field.make(x_, pm))

    def vjp(node, _y, pm):
        _y = as_field(pm, ComplexField, _y)
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
    if unanimous(comm, letters.tobytes()):
        return dtypes
    everybody = numpy.empty((comm.size, len(dtypes)), dtype="u1")
    count_to_all(comm, letters.nbytes)
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
        agree(comm_of(x), lambda: (check_field(x, pmesh.RealField),))
        return dict(y=x.r2c(), pm=x.pm)

    def vjp(node, _y, pm):
        (dtype,) = common_dtypes(pm.comm, _y)
        if dtype is None:
            return dict(_x=ZeroGradient)
        return dict(_x=as_field(pm, ComplexField, _y).r2c_vjp())

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
        agree(comm_of(x), lambda: (check_field(x, BaseComplexField),))
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
        return dict(y_=as_field(pm, kind, x_).c2r())


def as_real_field(pm: ParticleMesh, value: Value) -> RealField:
    """A real field on `pm` with these values, without a copy if it is one."""
    return as_field(pm, pmesh.RealField, value)


@operator
class on_mesh:
    """A field, and an error on all ranks if it is not of a kind, and of a mesh like `pm`."""

    ain = {"x": "*Field"}
    aout = {"y": "*Field"}
    placements = "field -> field"
    transparent = True
    hvp = ZeroGradient

    def apl(node, x, pm, kind=BaseComplexField):
        agree(pm.comm, lambda: (check_field(x, kind, pm),))
        return dict(y=x)

    def vjp(node, _y):
        return dict(_x=_y)

    def jvp(node, x_):
        return dict(y_=x_)

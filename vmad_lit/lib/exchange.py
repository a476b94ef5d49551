"""Which ranks need a particle, and how its rows get there and back.

Positions are arrays (N, ndim), in the units of the box.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import prod
import numbers
from typing import Any, TypeAlias

import numpy
from numpy.typing import ArrayLike

from vmad_lit import operator
from vmad_lit.core.error import needed_for
from vmad_lit.core.arguments import plain_array
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.placement import same_ranks
from vmad_lit.core.stdlib.operators import Array, Shape
from vmad_lit.core.symbol import BaseSymbol, Value
from vmad_lit.core.traffic import count_to_all, count_to_each
from vmad_lit.lib import memory
from vmad_lit.lib.halo import Halo, find_halo
from vmad_lit.lib.mesh import (
    ParticleMesh,
    agree,
    as_rows,
    check_mesh,
    common_dtypes,
    is_zero,
    once_per_mesh,
)
from vmad_lit.lib.mpi import Rows, deliver, starts, too_many

with needed_for("the exchange of particles", extra="mesh"):
    from mpi4py import MPI
    from pmesh.domain import Layout
    from pmesh.window import FindResampler
try:
    from vmad_lit.lib import loops
except ImportError:  # no numba
    loops = None  # type: ignore[assignment]

Axes = tuple[tuple[int, ...], tuple[float, ...], tuple[Array, ...], Array]  # see `loops.find_ranks`


def _touched_domains(x: Array, pm: ParticleMesh, support: int) -> Array:
    """The domains of the cells of each particle's window, with repetitions: (n, N)."""
    domains = numpy.zeros((1, len(x)), dtype="i4")
    shift, left = 0.5 * (support % 2), (support - 1) // 2
    for d, edges in enumerate(pm.domain.edges):
        domains = domains * pm.domain.shape[d]
        if pm.domain.shape[d] == 1:
            continue
        first = numpy.floor(x[:, d] * pm.affine.scale[d] + shift).astype("i8") - left
        first %= edges[-1]
        owner = numpy.repeat(numpy.arange(len(edges) - 1, dtype="i4"), numpy.diff(edges))
        # Pick the planes that tell all domains
        widths = numpy.diff(edges)
        wide = widths[widths > 0].min() >= support - 1
        planes = sorted({0, support - 1}) if wide else range(support)
        touched = [owner.take(first + plane, mode="wrap") for plane in planes]
        domains = numpy.concatenate([domains + column for column in touched])
    return domains


def make_layout(x: Positions, pm: ParticleMesh, support: int) -> GhostLayout:
    """A layout that sends each particle to exactly the ranks that hold cells of its window."""
    x = in_the_box(x)
    if loops is not None:
        there = loops.find_ranks(x, *_axes_of_domains(pm), support, pm.comm.size)
        return GhostLayout(pm.comm, len(x), *there, pm, support / 2)
    ranks = pm.domain.DomainAssign[_touched_domains(x, pm, support)]
    counts = numpy.zeros(pm.comm.size, dtype="i8")
    rows = [numpy.empty(0, dtype="i8")]
    for rank in numpy.flatnonzero(numpy.bincount(ranks.ravel(), minlength=pm.comm.size)):
        rows.append(numpy.flatnonzero((ranks == rank).any(axis=0)))
        counts[rank] = len(rows[-1])
    return GhostLayout(pm.comm, len(x), counts, numpy.concatenate(rows), pm, support / 2)


def _axes_of_domains(pm: ParticleMesh) -> Axes:
    """What `loops.find_ranks` wants to know of the domains of a mesh."""

    def make() -> Axes:
        shape, domain = pm.domain.shape, pm.domain
        axes = [d for d in range(pm.ndim) if shape[d] > 1] or [0]
        owners = []
        for d in axes:
            widths = numpy.diff(domain.edges[d])
            owners.append(numpy.repeat(numpy.arange(len(widths)), widths) * int(numpy.prod(shape[d + 1 :])))
        scales = tuple(float(pm.affine.scale[d]) for d in axes)
        return tuple(axes), scales, tuple(owners), numpy.asarray(domain.DomainAssign).ravel().astype("i8")

    return once_per_mesh(pm, "axes_of_domains", make)


class GhostLayout(Layout):
    """A layout of pmesh, given by the rows to send to each rank, that sends with a single collective call.

    `pm` is the mesh it was made for, None if that is not known; `reach` how many cells away it is right.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        sendlength: int,
        sendcounts: Array,
        indices: Array,
        pm: ParticleMesh | None = None,
        reach: float = numpy.inf,
    ) -> None:
        sendcounts = numpy.ascontiguousarray(sendcounts, "i8")
        recvcounts = numpy.empty_like(sendcounts)
        count_to_each(comm, numpy.ones_like(sendcounts), sendcounts.itemsize)
        comm.Alltoall(sendcounts, recvcounts)
        super().__init__(comm, sendlength, sendcounts, indices, recvcounts)
        self._in_pieces = too_many(comm, sendcounts, recvcounts)
        self.pm, self.reach = pm, reach

    def exchange(self, *args: Array, pack: bool = True) -> Any:
        """Rows for the particles needed on this rank, ghosts included; one result for each argument."""
        sent = tuple(self._send(data) for data in args)
        return sent[0] if len(sent) == 1 else sent or None

    def gather(self, data: Array, mode: Any = "sum", out: Array | None = None) -> Array:
        """Rows for our own particles, from those of all their copies: the sum, or what pmesh calls `mode`."""
        if not isinstance(mode, str) or mode != "sum":
            return super().gather(data, mode=mode, out=out)
        # Return the rows to where they came from, and add them up
        data = numpy.asarray(data)
        if len(data) != self.recvlength:
            raise ValueError(
                f"the layout has {self.recvlength} particles on this rank, ghosts included, "
                f"but the data is for {len(data)}"
            )
        stay, others, there, here, own = self._ways
        rows = memory.empty((len(others),) + data.shape[1:], data.dtype)
        deliver(self.comm, data, here, there, rows, self._in_pieces)
        total = memory.zeros((self.sendlength,) + rows.shape[1:], rows.dtype)
        _add_rows(total, stay, data[own])
        _add_rows(total, others, rows)
        if out is None:
            return total
        out[...] = total
        return out

    def _send(self, data: Array) -> Array:
        data = numpy.asarray(data)
        if len(data) != self.sendlength:
            raise ValueError(
                f"the layout was made for {self.sendlength} particles, but the data is for {len(data)}"
            )
        received = memory.empty((self.recvlength,) + data.shape[1:], data.dtype)
        stay, others, there, here, own = self._ways
        numpy.take(data, stay, axis=0, out=received[own], mode="clip")
        return deliver(self.comm, data.take(others, axis=0), there, here, received, self._in_pieces)

    @cached_property
    def _ways(self) -> tuple[Array, Array, Rows, Rows, slice]:
        """What stays and what travels.

        The numbers of the rows that stay on this rank, and of those that go to others; how many go to each
        and where they begin, one after the other; how many come from each, and where they belong among all
        that are here; and the slice of these that never left.
        """
        me, (sent, received) = self.comm.rank, map(numpy.array, (self.sendcounts, self.recvcounts))
        (first, start), stays = (int(starts(counts)[me]) for counts in (sent, received)), int(sent[me])
        others = numpy.concatenate([self.indices[:first], self.indices[first + stays :]])
        places = starts(received)
        sent[me] = received[me] = 0
        return (
            self.indices[first : first + stays],
            others,
            (sent, starts(sent)),
            (received, places),
            slice(start, start + stays),
        )


def _add_rows(total: Array, indices: Array, rows: Array) -> None:
    """Add rows to those of `total` with the numbers `indices`, each as often as it is there."""
    if loops is None or not loops.add_rows(total, indices, rows):
        numpy.add.at(total, indices, rows)


class IdentityLayout:
    """The layout of particles that all stay where they are, on a single rank; see `GhostLayout`."""

    def __init__(
        self, comm: MPI.Comm, length: int, pm: ParticleMesh | None = None, reach: float = numpy.inf
    ) -> None:
        self.comm, self.pm, self.reach = comm, pm, reach
        self.sendlength = self.recvlength = length

    def exchange(self, *args: Array, pack: bool = True) -> Any:
        """The arguments, unchanged."""
        for data in args:
            self._check(data)
        return args[0] if len(args) == 1 else args or None

    def gather(self, data: Array, mode: Any = "sum", out: Array | None = None) -> Array:
        """`data`, unchanged (or copied to `out`): there are no ghosts."""
        self._check(data)
        if out is None:
            return data
        out[...] = data
        return out

    def get_exchange_cost(self) -> Array:
        """Nothing travels."""
        return numpy.zeros(1, dtype="i8")

    def _check(self, data: Array) -> None:
        if len(data) != self.sendlength:
            raise ValueError(
                f"the layout was made for {self.sendlength} particles, but the data is for {len(data)}"
            )


class HaloLayout:
    """The layout of particles that stay on their ranks, because the mesh comes to them: see `Halo`.

    Painting and reading out use its `halo`. What else asks for it, such as `exchange`, gets the ghosts of a
    `GhostLayout`, which are found then, by all ranks together.
    """

    def __init__(self, x: Positions, pm: ParticleMesh, support: int, halo: Halo) -> None:
        self.comm, self.pm, self.halo, self.reach = pm.comm, pm, halo, support / 2
        self.sendlength = len(x)
        self._x, self._support = x, support

    @cached_property
    def ghosts(self) -> GhostLayout:
        """The layout that brings particles to the mesh. Collective when it is first asked for."""
        return make_layout(self._x, self.pm, self._support)

    def exchange(self, *args: Array, pack: bool = True) -> Any:
        """See `GhostLayout`."""
        return self.ghosts.exchange(*args, pack=pack)

    def gather(self, data: Array, mode: Any = "sum", out: Array | None = None) -> Array:
        """See `GhostLayout`."""
        return self.ghosts.gather(data, mode=mode, out=out)

    def get_exchange_cost(self) -> Array:
        """See `pmesh.domain.Layout`."""
        return self.ghosts.get_exchange_cost()

    @property
    def recvlength(self) -> int:
        """How many particles are needed on this rank, ghosts included."""
        return self.ghosts.recvlength

    @property
    def sendcounts(self) -> Array:
        """How many particles each rank needs of this one."""
        return self.ghosts.sendcounts

    @property
    def recvcounts(self) -> Array:
        """How many particles this rank needs of each."""
        return self.ghosts.recvcounts

    @property
    def indices(self) -> Array:
        """The numbers of the particles that each rank needs of this one, rank by rank."""
        return self.ghosts.indices


#: What a cell of a halo, a particle, and a ghost cost, in one unit.
COST_OF_CELL, COST_OF_ROW, COST_OF_GHOST = 10, 25, 150


def choose_halo(x: Positions, pm: ParticleMesh, support: int) -> Halo | None:
    """The halo in which the windows of all particles lie; None if it is less work to send particles. Collective."""
    divided = [axis for axis in range(pm.ndim) if pm.domain.shape[axis] > 1]
    widths = [numpy.diff(pm.domain.edges[axis]) for axis in range(pm.ndim)]
    if loops is None or not divided or min(int(width.min()) for width in widths) < support:
        return None
    # Measure how far the particles reach
    note = numpy.zeros((pm.ndim + 1, 2), "i8")
    note[-1, 1], (at, lattice) = len(x), take_apart(x)
    for axis in divided:
        start, period = -int(pm.affine.translate[axis]), int(pm.Nmesh[axis])
        own = int(widths[axis][numpy.searchsorted(pm.domain.edges[axis], start)])
        *note[axis], out = loops.find_span(
            at, axis, float(pm.affine.scale[axis]), start, own, period, support, lattice
        )
        note[-1, 0] += out
    # Agree on the widest, with a plane more for what is rounded otherwise in the loops
    count_to_all(pm.comm, note.nbytes)
    pm.comm.Allreduce(MPI.IN_PLACE, note, MPI.MAX)
    low, high = (-(-(note[:-1] + 1) // 2) * 2 * (numpy.array(pm.domain.shape) > 1)[:, None]).T.tolist()
    # Compare the work
    largest = [int(width.max()) for width in widths]
    wide = [min(n + low[d] + high[d], int(pm.Nmesh[d])) for d, n in enumerate(largest)]
    out, count = note[-1].tolist()
    cells = prod(wide) - prod(largest)
    if COST_OF_CELL * cells > COST_OF_ROW * count + COST_OF_GHOST * out:
        return None
    return find_halo(pm, low, high)


AnyLayout: TypeAlias = Layout | IdentityLayout | HaloLayout


def exchange_rows(layout: AnyLayout | None, data: Value) -> Any:
    if isinstance(data, Displaced):
        return Displaced(exchange_rows(layout, data.displacement), exchange_rows(layout, data.lattice))
    return data if layout is None or numpy.ndim(data) == 0 else layout.exchange(data)


def gather_rows(layout: AnyLayout | None, data: Value) -> Any:
    if layout is None or isinstance(layout, IdentityLayout):
        return data if layout is None else layout.gather(data)
    if numpy.iscomplexobj(data) and not isinstance(layout, (GhostLayout, HaloLayout)):
        pairs = numpy.ascontiguousarray(data).view(data.real.dtype).reshape(data.shape + (2,))
        pairs = numpy.ascontiguousarray(layout.gather(pairs))
        return pairs.view(data.dtype)[..., 0]
    return layout.gather(data)


class Displaced:
    """Positions (N, ndim) that are displacements from a lattice; loops that need a cell add the two in double precision."""

    def __init__(self, displacement: Array, lattice: Array) -> None:
        self.displacement, self.lattice = displacement, lattice
        self.shape, self.dtype = displacement.shape, displacement.dtype

    def __len__(self) -> int:
        return len(self.displacement)

    def __getitem__(self, rows: slice) -> Displaced:
        return Displaced(self.displacement[rows], self.lattice[rows])


Positions: TypeAlias = Array | Displaced


def displaced(x: Any, lattice: Any) -> Any:
    """Positions, which are displacements if there is a lattice."""
    return x if lattice is None else Displaced(x, lattice)


def take_apart(x: Positions) -> tuple[Array, Array | None]:
    """Positions, or displacements, and the lattice or None."""
    return (x.displacement, x.lattice) if isinstance(x, Displaced) else (x, None)


def in_the_box(x: Positions) -> Array:
    """Positions as one array; sums with a lattice are in double precision."""
    return numpy.add(x.displacement, x.lattice, dtype="f8") if isinstance(x, Displaced) else x


def agree_on_rows(layout: AnyLayout | None, data: Value, side: str) -> Value:
    """Rows with one for each particle on a `side` of a layout, in a dtype that all ranks agree on. Collective."""
    if layout is None:
        return data

    def prepare() -> tuple[Any, ...]:
        rows, count = numpy.asarray(data), getattr(layout, side)
        if rows.ndim and len(rows) != count:
            raise ValueError(
                f"the layout has {count} particles on this rank, but the data is for {len(rows)}"
            )
        return (rows if rows.ndim else data,)

    return agree(layout.comm, prepare)[0]


def window_support(resampler: Any) -> int:
    return resampler.support if resampler.support > 0 else resampler.nativesupport


def as_positions(x: ArrayLike, pm: ParticleMesh, new: bool = True) -> Array:
    """Positions as a floating point array (N, ndim), or an error that says so; it is not looked whether those are
    finite that are not `new`: that have a layout, or come out of a simulation."""
    x = plain_array("positions", x)
    if x.ndim != 2 or x.shape[1] != pm.ndim:
        raise ValueError(
            f"positions must have the shape (N, {pm.ndim}), a row for each particle, "
            f"but their shape is {x.shape}"
        )
    if x.dtype.kind not in "fiub":
        raise TypeError(f"positions must be real numbers, but their type is {x.dtype}")
    x = numpy.ascontiguousarray(x, x.dtype if x.dtype in ("f4", "f8") and x.dtype.isnative else "f8")
    flat = x.reshape(-1)
    if new and not numpy.isfinite(numpy.dot(flat, flat)) and not numpy.isfinite(x).all():
        bad = numpy.flatnonzero(~numpy.isfinite(x).all(axis=1))
        raise ValueError(f"positions must be finite, but {len(bad)} are not: row {bad[0]} is {x[bad[0]]}")
    return x


def check_positions(x: Any, lattice: Any, pm: ParticleMesh, new: bool = True) -> tuple[Array, Array | None]:
    """Positions and their lattice, or None, as arrays (N, ndim), for `agree`; see `as_positions`."""
    x = as_positions(x, pm, new)
    if lattice is None:
        return x, None
    if numpy.shape(lattice) != x.shape:
        raise ValueError(
            f"the lattice must have the shape of the displacements, {x.shape}, not {numpy.shape(lattice)}"
        )
    return x, as_positions(lattice, pm, new)


def check_layout(layout: Value, pm: ParticleMesh, resampler: Any) -> None:
    """Raise an error unless a layout, or None, brings particles to where a window of the mesh needs them."""
    if layout is None:
        return
    if not isinstance(layout, AnyLayout):
        raise TypeError(f"a layout is what decompose returns, or None, but not a {type(layout).__name__}")
    made_for = getattr(layout, "pm", None)
    if made_for is not None:
        check_mesh(made_for, pm, "the layout")
    elif not same_ranks(layout.comm, pm.comm):
        raise ValueError("the layout is of another communicator than the mesh")
    if window_support(resampler) / 2 > getattr(layout, "reach", numpy.inf):
        raise ValueError(
            f"the layout brings particles to the ranks within {layout.reach} cells, but the window "
            f"{resampler.kind} reaches {window_support(resampler) / 2}; give decompose its name as smoothing"
        )


def find_reach(pm: ParticleMesh, smoothing: Any) -> tuple[Any, float]:
    """The window that `smoothing` tells, or None; and how many cells it reaches, to either side."""
    if isinstance(smoothing, numbers.Real) and not isinstance(smoothing, bool):
        distance = float(smoothing)
        if not 0 <= distance < numpy.inf:
            raise ValueError(f"smoothing must be a window, or a distance of 0 cells or more, not {smoothing}")
        return None, distance
    resampler = FindResampler(pm.resampler if smoothing is None else smoothing)
    return resampler, window_support(resampler) / 2


def lay_out(
    make: Callable[[], ArrayLike],
    pm: ParticleMesh,
    smoothing: Any = None,
    new: bool = True,
    lattice: Any = None,
) -> tuple[Any, AnyLayout]:
    """The positions that `make()` returns, in a dtype that all ranks agree on, and their layout; see `as_positions`.
    With a lattice they are displacements from it. Collective."""

    # Agree on positions and window
    def prepare() -> tuple[Any, ...]:
        resampler, reach = find_reach(pm, smoothing)
        return *check_positions(make(), lattice, pm, new), pm, reach, resampler

    *parts, _, reach, resampler = agree(pm.comm, prepare)
    x = displaced(*parts)
    if pm.comm.size == 1:
        return x, IdentityLayout(pm.comm, len(x), pm, reach)
    if resampler is not None:
        support = window_support(resampler)
        halo = choose_halo(x, pm, support)
        return x, make_layout(x, pm, support) if halo is None else HaloLayout(x, pm, support, halo)
    layout = pm.decompose(in_the_box(x), smoothing=reach)
    return x, GhostLayout(pm.comm, len(x), layout.sendcounts, layout.indices, pm, reach)


@operator
class decompose:
    """The layout that brings particles to the ranks whose part of the mesh they touch.

    `smoothing` is the window that will be used, by default that of `pm`; or a distance in cells. With a `lattice`
    (N, ndim), a constant, `x` are displacements from it.
    """

    ain: dict[str, str] = {}
    aout = {"layout": "*Layout"}
    placements = "partitioned -> partitioned"

    def apl(node, x, pm, smoothing=None, lattice=None):
        return dict(layout=lay_out(lambda: x, pm, smoothing, lattice=lattice)[1])


def agree_on_lattice(q: Any, pm: ParticleMesh) -> Any:
    """The positions of a lattice, in a dtype that all ranks agree on; a symbol, as it is. Collective."""
    return q if isinstance(q, BaseSymbol) else agree(pm.comm, lambda: (as_positions(q, pm), pm))[0]


@operator
class exchange:
    """Send rows to the ranks where their particles are needed; ghosts are copies."""

    ain = {"x": "*", "layout": "*Layout"}
    aout = {"y": "*"}
    collective = True
    placements = "partitioned, any -> partitioned"
    hvp = ZeroGradient

    def apl(node, x, layout):
        y = exchange_rows(layout, agree_on_rows(layout, x, "sendlength"))
        return dict(y=y, shapes=(numpy.shape(x), numpy.shape(y)))

    def vjp(node, _y, layout, shapes):
        return dict(_x=_carry(gather_rows, layout, _y, shapes[1]), _layout=ZeroGradient)

    def jvp(node, x_, layout, shapes):
        return dict(y_=_carry(exchange_rows, layout, x_, shapes[0]))


@operator
class gather:
    """Bring rows back to the particles they belong to; what ghosts contribute is summed."""

    ain = {"x": "*", "layout": "*Layout"}
    aout = {"y": "*"}
    collective = True
    placements = "partitioned, any -> partitioned"
    hvp = ZeroGradient

    def apl(node, x, layout):
        y = gather_rows(layout, agree_on_rows(layout, x, "recvlength"))
        return dict(y=y, shapes=(numpy.shape(x), numpy.shape(y)))

    def vjp(node, _y, layout, shapes):
        return dict(_x=_carry(exchange_rows, layout, _y, shapes[1]), _layout=ZeroGradient)

    def jvp(node, x_, layout, shapes):
        return dict(y_=_carry(gather_rows, layout, x_, shapes[0]))


def _carry(
    function: Callable[[AnyLayout | None, Value], Value], layout: AnyLayout | None, x_: Value, shape: Shape
) -> Value:
    """A tangent or cotangent, of a value of this shape, through `exchange_rows` or `gather_rows`."""
    if layout is None or shape == ():
        return ZeroGradient if is_zero(x_) else x_
    (dtype,) = common_dtypes(layout.comm, x_)
    return ZeroGradient if dtype is None else function(layout, as_rows(x_, shape, dtype))

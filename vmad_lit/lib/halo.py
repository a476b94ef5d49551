"""A rank's part of a mesh with a halo: planes of its neighbours, which are fetched from them and folded back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy

from vmad_lit.core.error import needed_for
from vmad_lit.core.stdlib.operators import Array
from vmad_lit.core.traffic import count_to_one
from vmad_lit.lib import memory
from vmad_lit.lib.mesh import ParticleMesh, once_per_mesh
from vmad_lit.lib.mpi import pieces_of

with needed_for("halos of a mesh", extra="mesh"):
    from mpi4py import MPI
    from pmesh.pm import RealField

Part: TypeAlias = tuple[int, int, int]  # a rank, and where planes begin and end in this rank's array
Run: TypeAlias = tuple[int, int, int, int, int]  # see `Halo._borrowed`


class Halo:
    """This rank's part of a mesh, and planes of its neighbours around it.

    Parameters
    ----------
    pm : ParticleMesh
    low, high : how many planes there are before and behind the part, along each axis; the same on all ranks. Where
        that is as much as the whole axis, all its planes are there once, in their order

    Attributes
    ----------
    shape : of an array for the part and its halo
    inside : the slices of such an array that are this rank's own
    transform : from positions to the cells of such an array
    """

    def __init__(self, pm: ParticleMesh, low: Sequence[int], high: Sequence[int]) -> None:
        self.pm, self.given = pm, (tuple(low), tuple(high))
        domain = numpy.flatnonzero(numpy.ravel(pm.domain.DomainAssign) == pm.comm.rank)[0]
        place = [int(i) for i in numpy.unravel_index(domain, pm.domain.shape)]
        axes = [self._surround(axis, place[axis]) for axis in range(pm.ndim)]
        self.shape = tuple(map(sum, axes))
        self.inside = tuple(slice(before, before + own) for before, own, _ in axes)
        self.transform = pm.affine.shift(numpy.array([before for before, _, _ in axes], "f8"))
        self._lanes = [self._find_lane(axis, place) for axis in range(pm.ndim) if self._divided(axis)]

    def widened(self, planes: int) -> Halo:
        """A halo that is wider, by so many planes on either side of the axes that are divided."""
        low, high = ([n + planes if self._divided(d) else 0 for d, n in enumerate(x)] for x in self.given)
        return find_halo(self.pm, low, high)

    def _divided(self, axis: int) -> bool:
        return self.pm.domain.shape[axis] > 1

    def _surround(self, axis: int, domain: int) -> tuple[int, int, int]:
        """How many planes there are along an axis before those of a domain, its own, and behind them."""
        edges, low, high = self.pm.domain.edges[axis], *(planes[axis] for planes in self.given)
        n, start, end = int(edges[-1]), int(edges[domain]), int(edges[domain + 1])
        if not self._divided(axis) or start == end:
            return 0, end - start, 0
        if low + high + int(numpy.diff(edges).max()) >= n:
            return start, end - start, n - end
        return low, end - start, high

    def _borrowed(self, axis: int) -> Iterator[Run]:
        """Runs of planes along an axis: whose they are, who wants them, the first, the end, and where they go."""
        edges = [int(edge) for edge in self.pm.domain.edges[axis]]
        n, domains = edges[-1], range(len(edges) - 1)
        for asker in domains:
            low, own, high = self._surround(axis, asker)
            start, end = edges[asker], edges[asker] + own
            for begin, stop, at in (start - low, start, 0), (end, end + high, low + own):
                for owner in domains:
                    for turn in -n, 0, n:
                        first, last = max(begin, edges[owner] + turn), min(stop, edges[owner + 1] + turn)
                        if first < last:
                            yield owner, asker, first - turn, last - turn, at + first - begin

    def _find_lane(self, axis: int, place: Sequence[int]) -> tuple[int, list[Part], list[Part]]:
        """An axis, the planes along it that other ranks give to this one, and those that it gives to them."""
        edges, me, shape = self.pm.domain.edges[axis], place[axis], self.pm.domain.shape
        lane = [
            numpy.ravel_multi_index([*place[:axis], d, *place[axis + 1 :]], shape) for d in range(shape[axis])
        ]
        ranks = [int(rank) for rank in numpy.ravel(self.pm.domain.DomainAssign)[lane]]
        taken, given = [], []
        for owner, asker, first, last, at in self._borrowed(axis):
            if asker == me:
                taken.append((ranks[owner], at, at + last - first))
            elif owner == me:
                begin = self._surround(axis, me)[0] + first - int(edges[me])
                given.append((ranks[asker], begin, begin + last - first))
        return axis, taken, given

    def _planes(self, array: Array, axis: int, part: Part) -> Array:
        """Planes along an axis: with the halo along the axes before it, and without it along those behind."""
        _, begin, end = part
        return array[(slice(None),) * axis + (slice(begin, end),) + self.inside[axis + 1 :]]

    def fetch(self, field: Any) -> Array:
        """The values of a real field, or an array of them, on this rank's part and on its halo. Collective."""
        value = getattr(field, "value", field)
        array = memory.empty(self.shape, value.dtype)
        array[self.inside] = value
        for axis, taken, given in self._lanes:
            places = [self._planes(array, axis, part) for part in taken]
            rooms = [x if x.flags.c_contiguous else memory.empty(x.shape, x.dtype) for x in places]
            sent = [numpy.ascontiguousarray(self._planes(array, axis, part)) for part in given]
            swap(self.pm.comm, _address(given, sent), _address(taken, rooms))
            for place, room in zip(places, rooms):
                if room is not place:
                    place[...] = room
        return array

    def fold(self, array: Array) -> RealField:
        """The real field to which all ranks add what they have on their parts and halos: the transpose of `fetch`.

        `array` is overwritten. Collective.
        """
        for axis, taken, given in reversed(self._lanes):
            sent = [numpy.ascontiguousarray(self._planes(array, axis, part)) for part in taken]
            places = [self._planes(array, axis, part) for part in given]
            rooms = [memory.empty(place.shape, place.dtype) for place in places]
            swap(self.pm.comm, _address(taken, sent), _address(given, rooms))
            for place, room in zip(places, rooms):
                place += room
        field = self.pm.create(type=RealField)
        field.value[...] = array[self.inside]
        return field


def find_halo(pm: ParticleMesh, low: Sequence[int], high: Sequence[int]) -> Halo:
    """The halo of these widths, made once for a mesh."""
    return once_per_mesh(pm, ("halo", tuple(low), tuple(high)), lambda: Halo(pm, low, high))


def find_rim(pm: ParticleMesh, low: int, high: int, *axes: int) -> Halo | None:
    """The halo of so many planes along those of these axes, or all, that are divided; None if none of them is."""
    divided = [n > 1 and d in (axes or range(pm.ndim)) for d, n in enumerate(pm.domain.shape)]
    return find_halo(pm, *([n * here for here in divided] for n in (low, high))) if any(divided) else None


def _address(parts: Sequence[Part], arrays: Sequence[Array]) -> list[tuple[int, Array]]:
    return [(rank, array) for (rank, _, _), array in zip(parts, arrays)]


def swap(comm: MPI.Comm, sent: Sequence[tuple[int, Array]], received: Sequence[tuple[int, Array]]) -> None:
    """Send C-ordered arrays to ranks, and receive others from ranks into memory, all at once."""
    requests = [comm.Irecv(piece, rank, TAG) for rank, array in received for piece in _pieces(array)]
    for rank, array in sent:
        count_to_one(comm, rank, array.nbytes)
        requests += [comm.Isend(piece, rank, TAG) for piece in _pieces(array)]
    MPI.Request.Waitall(requests)


def _pieces(array: Array) -> list[list[Any]]:
    """The memory of an array in messages whose length the MPI library can count."""
    flat = array.reshape(-1).view("u1")
    return [[flat[piece], MPI.BYTE] for piece in pieces_of(len(flat))]


TAG = 27182  # of messages between neighbours

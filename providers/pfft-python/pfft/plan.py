"""Transforms as chains of local Fourier transforms and exchanges between ranks."""

import math
import os

import mpi4py
import numpy
from ducc0 import fft
from mpi4py import MPI

from .partition import Direction, Flags, LocalBuffer, Type, end_layouts, level_layout, working_mesh


def default_threads():
    """Threads of a rank: OMP_NUM_THREADS if set, else all cores for one rank, one for each of several."""
    setting = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if setting.isdigit() and int(setting) > 0:
        return int(setting)
    if MPI.COMM_WORLD.size > 1:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_threads = default_threads()


def get_num_threads():
    """Number of threads a rank uses for its local transforms."""
    return _threads


def set_num_threads(number):
    """Set the number of threads a rank uses for its local transforms (at least 1)."""
    global _threads
    if int(number) < 1:
        raise ValueError(f"the number of threads must be at least 1, not {number}")
    _threads = int(number)


class LocalTransform:
    """Fourier transforms along axes that are whole, from one layout to another of the same box.

    Parameters
    ----------
    kind : str, ``'c2c'``, ``'r2c'`` or ``'c2r'`` (the real one along the last of the axes)
    axes : sequence of int
    forward : bool, the sign of the exponent
    source, target : Layout
    """

    def __init__(self, kind, axes, forward, source, target):
        self.kind, self.axes, self.source, self.target = kind, tuple(axes), source, target
        self.nbytes, self.function = target.nbytes, getattr(fft, kind)
        self.options = dict(axes=self.axes, forward=forward)
        if kind == "c2r":
            self.options["lastsize"] = target.shape[axes[-1]]
        self.in_place = kind == "c2c" and (source.strides == target.strides).all()

    def __call__(self, source, target):
        """Transform the array in the bytes `source` into the bytes `target`."""
        a, b = self.source.view(source), self.target.view(target)
        if a.size:
            self.function(a, out=b, nthreads=_threads, **self.options)

    def __repr__(self):
        return f"{self.kind}{list(self.axes)}"


class Pieces:
    """The parts of a rank's box in one layout that lie in the boxes of other ranks in another layout.

    Parameters
    ----------
    layout : Layout
    others : list of arrays of two rows
        The boxes, one for each rank of a line; the own box is cut by all of them.

    Attributes
    ----------
    cuts : list of tuples of slices into :meth:`array`
    shapes : list of tuples, the shapes of the pieces
    edges : integer array; in a row of all pieces, piece `r` is ``row[edges[r]:edges[r + 1]]``
    """

    def __init__(self, layout, others):
        self.layout, self.cuts, self.shapes = layout, [], []
        for low, high in others:
            low = numpy.maximum(low - layout.start, 0)
            high = numpy.maximum(numpy.minimum(high - layout.start, layout.local), low)
            self.cuts.append(tuple(slice(int(low[axis]), int(high[axis])) for axis in layout.order))
            self.shapes.append(tuple(int(high[axis] - low[axis]) for axis in layout.order))
        self.edges = numpy.cumsum([0] + [numpy.prod(shape, dtype="intp") for shape in self.shapes])
        self.nbytes = int(self.edges[-1]) * layout.dtype.itemsize

    def array(self, memory):
        """The local part of the array with its axes in the order of the memory."""
        return self.layout.view(memory).transpose(self.layout.order)

    def row(self, memory):
        """For each piece an array of its shape, one behind the other in memory."""
        row = memory[: self.nbytes].view(self.layout.dtype)
        return [row[a:b].reshape(shape) for a, b, shape in zip(self.edges, self.edges[1:], self.shapes)]

    def in_a_row(self):
        """Tell whether the pieces lie one behind the other where they are."""
        memory = numpy.empty(max(self.nbytes, self.layout.nbytes), dtype="u1")
        array = self.array(memory)
        pairs = [(array[cut], piece) for cut, piece in zip(self.cuts, self.row(memory)) if piece.size]
        return all(
            there.flags.c_contiguous and there.ctypes.data == piece.ctypes.data for there, piece in pairs
        )


class Pack:
    """Copy the pieces of an array into a row."""

    in_place = False

    def __init__(self, pieces):
        self.pieces, self.nbytes = pieces, pieces.nbytes

    def __call__(self, source, target):
        """Copy from the array in the bytes `source` to a row in the bytes `target`."""
        array = self.pieces.array(source)
        for cut, piece in zip(self.pieces.cuts, self.pieces.row(target)):
            piece[...] = array[cut]

    def __repr__(self):
        return "pack"


class Unpack:
    """Copy the pieces of an array out of a row."""

    in_place = False

    def __init__(self, pieces):
        self.pieces, self.nbytes = pieces, pieces.layout.nbytes

    def __call__(self, source, target):
        """Copy from a row in the bytes `source` to the array in the bytes `target`."""
        array = self.pieces.array(target)
        for cut, piece in zip(self.pieces.cuts, self.pieces.row(source)):
            array[cut] = piece

    def __repr__(self):
        return "unpack"


#: The largest count that a call of MPI takes.
LARGEST = 2**62 if MPI.Get_version() >= (4, 0) and int(mpi4py.__version__.split(".")[0]) >= 4 else 2**31 - 1

#: Functions to be called, before each exchange, with the messages and the bytes that this rank sends to others.
listeners = []

MPI_TYPES = {"f4": MPI.FLOAT, "f8": MPI.DOUBLE, "c8": MPI.C_FLOAT_COMPLEX, "c16": MPI.C_DOUBLE_COMPLEX}


class Alltoall:
    """Send each rank of a communicator its piece of a row, and get a row of what they send."""

    in_place = False

    def __init__(self, comm, send, receive, largest):
        self.comm, self.nbytes, self.dtype = comm, receive.nbytes, send.layout.dtype
        self.type, self.largest = MPI_TYPES[f"{self.dtype.kind}{self.dtype.itemsize}"], largest
        self.sides = [
            [numpy.diff(pieces.edges).tolist(), pieces.edges[:-1].tolist(), self.type]
            for pieces in (send, receive)
        ]
        others = [count for rank, count in enumerate(self.sides[0][0]) if count and rank != comm.rank]
        self.sent = len(others), sum(others) * self.dtype.itemsize

    def __call__(self, source, target):
        """Send the row in the bytes `source`, receive the row in the bytes `target`."""
        for listener in tuple(listeners):
            listener(*self.sent)
        if self.largest <= LARGEST:
            self.comm.Alltoallv([source, *self.sides[0]], [target, *self.sides[1]])
        else:
            self.send_pieces(source, target)

    def send_pieces(self, source, target):
        """The same by messages between two ranks, each of at most `LARGEST` numbers."""
        requests, size = [], self.dtype.itemsize
        for (counts, places, _), memory, start in zip(
            self.sides[::-1], (target, source), (self.comm.Irecv, self.comm.Isend)
        ):
            for rank, (count, place) in enumerate(zip(counts, places)):
                for begin in range(place, place + count, LARGEST) if rank != self.comm.rank else ():
                    n = min(LARGEST, place + count - begin)
                    requests.append(start([memory[begin * size : (begin + n) * size], n, self.type], rank))
        # Copy the piece that stays here
        there, here = (
            slice(places[self.comm.rank] * size, (places[self.comm.rank] + counts[self.comm.rank]) * size)
            for counts, places, _ in self.sides
        )
        target[here] = source[there]
        MPI.Request.Waitall(requests)

    def __repr__(self):
        return f"alltoall({self.comm.size})"


def exchange(comm, source, target, ranks):
    """The steps that move an array from one layout to another of the same order in memory.

    `ranks` are, for each rank of `comm`, its number in the communicator of the layouts' process meshes.
    """
    before, after = ([side.box(side.mesh.coords(rank)) for rank in ranks] for side in (source, target))
    send, receive = Pieces(source, after), Pieces(target, before)
    largest = max(math.prod((high - low).tolist()) for low, high in before + after)
    return (
        ([] if send.in_a_row() else [Pack(send)])
        + [Alltoall(comm, send, receive, largest)]
        + ([] if receive.in_a_row() else [Unpack(receive)])
    )


def itinerary(kind, ndim, np, start, stop):
    """List the steps of a transform.

    Parameters
    ----------
    kind : str, ``'c2c'``, ``'r2c'`` or ``'c2r'``
    ndim : int, the number of axes
    np : sequence of int, shape of the process mesh, with fewer than `ndim` directions
    start, stop : int, the levels at the two ends, ``len(np)`` for the plain and 0 for the transposed layout

    Returns
    -------
    list of ``('transform', axes)`` and ``('exchange', direction, level)``; an exchange along a direction of
    the process mesh makes the axis `level` whole
    """
    # Order the visits of the levels
    m = len(np)
    visits = [(m, range(m, ndim))] + [(level, [level]) for level in reversed(range(m))]
    if kind == "c2r" or (kind == "c2c" and start == 0):
        visits.reverse()
    # Walk from visit to visit
    steps, level = [], start
    for goal, axes in visits + [(stop, ())]:
        while level != goal:
            following = level + (1 if goal > level else -1)
            if np[min(level, following)] > 1:
                steps.append(("exchange", min(level, following), following))
            level = following
        if steps and steps[-1][0] == "transform":
            steps[-1] = ("transform", sorted([*steps[-1][1], *axes]))
        elif axes:
            steps.append(("transform", list(axes)))
    return steps


def compile_steps(kind, direction, n, procmesh, flags, inplace):
    """The steps of a transform as a list of callables.

    The first reads the layout of the input, the last writes that of the output. Arguments as for
    :class:`Plan`; `n` is a tuple.
    """
    mesh, ndim = working_mesh(procmesh, len(n)), len(n)
    real_axis = ndim - 1 if kind.kind != "c2c" else None
    # List the steps
    start, stop = [0 if flags & end else mesh.ndim for end in (Flags.TRANSPOSED_IN, Flags.TRANSPOSED_OUT)]
    folded = mesh is not procmesh and mesh.comm.size > 1
    if folded:
        start, stop = (0, mesh.ndim) if kind.kind == "c2r" else (mesh.ndim, 0)
    steps = itinerary(kind.kind, ndim, mesh.np, start, stop)
    if folded:
        steps = [("exchange", None, start), *steps, ("exchange", None, stop)]
    # Set the real transform apart
    if inplace or kind.kind == "c2r":
        for index, (what, axes, *_) in enumerate(steps):
            if what == "transform" and real_axis in axes and len(axes) > 1:
                apart = [("transform", [real_axis]), ("transform", axes[:-1])]
                steps[index : index + 1] = apart if kind.kind == "r2c" else reversed(apart)
    # Choose the layouts between the steps
    source, target = end_layouts(kind, n, procmesh, flags)
    local = [index for index, step in enumerate(steps) if step[0] == "transform"]
    (shape, after_shape), (dtype, after_dtype) = kind.shapes(n), kind.dtypes()
    layouts, level = [source], start
    for index, step in enumerate(steps[:-1]):
        if step[0] == "exchange":
            level = step[2]
        elif real_axis in step[1]:
            shape, dtype = after_shape, after_dtype
        order = source.order if index < local[0] else target.order if index >= local[-1] else None
        layouts.append(level_layout(mesh, shape, dtype, level, order))
    layouts.append(target)
    # Make the objects
    chain = []
    for (what, where, *_), before, after in zip(steps, layouts, layouts[1:]):
        if what == "transform":
            this = kind.kind if real_axis in where else "c2c"
            chain.append(LocalTransform(this, where, direction == Direction.FORWARD, before, after))
        elif where is None:
            chain += exchange(mesh.comm, before, after, range(mesh.comm.size))
        else:
            chain += exchange(mesh.line(where), before, after, mesh.ranks(where))
    return chain


def turn_round(flags):
    """The flags of the way back: what was the layout of the output is that of the input."""
    turned = flags & ~(Flags.TRANSPOSED_IN | Flags.TRANSPOSED_OUT)
    turned |= Flags.TRANSPOSED_OUT if flags & Flags.TRANSPOSED_IN else 0
    return turned | (Flags.TRANSPOSED_IN if flags & Flags.TRANSPOSED_OUT else 0)


class Plan:
    """A transform that is ready to run.

    Parameters
    ----------
    partition : Partition
        Gives the shape of the mesh and the process mesh.
    direction : Direction
    i, o : LocalBuffer
        The input and the output; without `o`, or with `o` in the memory of `i`, the plan is in place.
        They are not touched.
    type : Type, optional
        Defaults to the partition's type forward and to its inverse backward.
    flags : Flags, optional
        Default to the partition's; backward with TRANSPOSED_IN and TRANSPOSED_OUT exchanged.

    Attributes
    ----------
    partition, direction, type, flags : as given
    inplace : bool
    """

    def __init__(self, partition, direction, i, o=None, type=None, flags=None):
        self.partition, self.direction = partition, Direction(direction)
        # Settle the type and the flags
        backward = self.direction == Direction.BACKWARD
        if type is None:
            type = partition.type.inverse if backward else partition.type
        self.type = Type(type)
        if self.type.numbers != partition.type.numbers:
            raise TypeError(
                f"a plan of type {self.type.name} does not fit a partition of type "
                f"{partition.type.name}: the precisions differ"
            )
        self.flags = Flags(partition.flags if flags is None else flags)
        if flags is None and backward and self.type.is_inverse_of(partition.type):
            self.flags = turn_round(self.flags)
        o = i if o is None else o
        self._check(i, o)
        self.inplace = i.address == o.address
        # Compile the steps
        n = tuple(partition.n.tolist())
        self._steps = compile_steps(
            self.type, self.direction, n, partition.procmesh, self.flags, self.inplace
        )
        self._scratch = max([step.nbytes for step in self._steps[:-1]], default=0)

    def _check(self, *buffers):
        """Refuse what is not a buffer for this plan's mesh."""
        for buffer in buffers:
            if not isinstance(buffer, LocalBuffer):
                raise TypeError(f"expected a LocalBuffer, not {type(buffer).__name__}")
            if buffer.partition._key != self.partition._key:
                raise ValueError(f"the buffer is for {buffer.partition!r}, the plan for {self.partition!r}")

    def execute(self, i, o=None):
        """Transform the buffer `i` into the buffer `o`, or `i` in place; collective.

        The result is not normalised. The input is left as it is unless the plan is in place. Raises
        ValueError if the plan was made in place and the buffers are not one memory, or the other way round.
        """
        o = i if o is None else o
        self._check(i, o)
        if (i.address == o.address) != self.inplace:
            made = "in" if self.inplace else "out of"
            raise ValueError(f"the plan was made for a transform {made} place, the buffers are not")
        # Run the steps between two memories
        source, last = i._memory, len(self._steps) - 1
        scratch = LocalBuffer.allocate(self._scratch)
        for index, step in enumerate(self._steps):
            target = scratch if (last - index) % 2 else o._memory
            if index == 0 and target is source and not step.in_place:
                target = LocalBuffer.allocate(step.nbytes)
            step(source, target)
            source = target
        if source is not o._memory:  # a single step, in place
            step.target.view(o._memory)[...] = step.target.view(source)

    def __repr__(self):
        return (
            f"Plan(type={self.type.name}, direction={self.direction.name}, flags={self.flags!r}, "
            f"inplace={self.inplace}, steps={self._steps!r})"
        )

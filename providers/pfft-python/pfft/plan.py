"""Transforms as chains of local Fourier transforms and exchanges between ranks."""
import os

import numpy
from ducc0 import fft
from mpi4py import MPI

from .partition import Direction, Flags, LocalBuffer, Type, end_layouts, level_layout, working_mesh


def _default_threads():
    """OMP_NUM_THREADS if set; else all cores for a program of one rank and one thread otherwise."""
    setting = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if setting.isdigit() and int(setting) > 0:
        return int(setting)
    if MPI.COMM_WORLD.size > 1:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_threads = _default_threads()


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
    """Fourier transforms along axes that are whole on every rank."""

    def __init__(self, kind, axes, forward, source, target):
        self.kind, self.axes, self.forward = kind, tuple(axes), forward
        self.source, self.target = source, target
        self.length = target.shape[axes[-1]]
        self.in_place = kind == "c2c" and (source.strides == target.strides).all()

    def __call__(self, source, target):
        """Transform the array in the bytes `source` into the bytes `target`."""
        a, b = self.source.view(source), self.target.view(target)
        if a.size == 0:
            return
        options = dict(axes=self.axes, forward=self.forward, out=b, nthreads=_threads)
        if self.kind == "r2c":
            fft.r2c(a, **options)
        elif self.kind == "c2r":
            fft.c2r(a, lastsize=self.length, **options)
        else:
            fft.c2c(a, **options)

    def __repr__(self):
        return f"{self.kind}{self.axes}"


_MPI_TYPES = {"f4": MPI.FLOAT, "f8": MPI.DOUBLE, "c8": MPI.C_FLOAT_COMPLEX, "c16": MPI.C_DOUBLE_COMPLEX}


class Exchange:
    """Move an array from one layout to another, in one Alltoallw.

    Parameters
    ----------
    comm : MPI.Comm
        The ranks that exchange pieces.
    source, target : Layout
    ranks : sequence of int
        For each rank of `comm` its number in the communicator of the layouts' process meshes.
    """

    in_place = False

    def __init__(self, comm, source, target, ranks):
        self.comm, self.source, self.target = comm, source, target
        sources = [source.box(source.mesh.coords(rank)) for rank in ranks]
        targets = [target.box(target.mesh.coords(rank)) for rank in ranks]
        self.send = self._pieces(source, sources[comm.rank], targets)
        self.receive = self._pieces(target, targets[comm.rank], sources)

    @staticmethod
    def _pieces(layout, mine, others):
        """Counts, displacements and MPI types of what of my box lies in the boxes of the others."""
        base = _MPI_TYPES[layout.dtype.str[1:]]
        order = list(layout.order)
        counts, types = [], []
        for low, high in others:
            start, stop = numpy.maximum(low, mine[0]), numpy.minimum(high, mine[1])
            counts.append(int((stop > start).all()))
            types.append(base)
            if counts[-1]:
                types[-1] = base.Create_subarray(layout.stored[order].tolist(), (stop - start)[order].tolist(),
                                                 (start - mine[0])[order].tolist()).Commit()
        return (counts, [0] * len(counts)), types

    def __call__(self, source, target):
        """Move from the bytes `source` to the bytes `target`."""
        self.comm.Alltoallw([source, *self.send], [target, *self.receive])

    def __del__(self):
        if not MPI.Is_finalized():
            for _, types in (getattr(self, "send", ((), ())), getattr(self, "receive", ((), ()))):
                for datatype in types:
                    if not datatype.is_predefined:
                        datatype.Free()

    def __repr__(self):
        return f"exchange{self.source.owners}->{self.target.owners}"


def itinerary(kind, ndim, np, start, stop):
    """List the steps of a transform.

    Parameters
    ----------
    kind : str, ``'c2c'``, ``'r2c'`` or ``'c2r'``
    ndim : int, the number of axes
    np : sequence of int, shape of the process mesh, with fewer than `ndim` directions
    start, stop : int, the levels at the two ends: ``len(np)`` for the plain and 0 for the transposed layout

    Returns
    -------
    list of ``('transform', axes)`` and ``('exchange', dim, level)``: an exchange along the direction `dim` of the mesh
    makes axis `level` whole. Directions of one rank need none.
    """
    m = len(np)
    visits = [(m, range(m, ndim))] + [(level, [level]) for level in reversed(range(m))]
    if kind == "c2r" or (kind == "c2c" and start == 0):
        visits.reverse()
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


def compile_steps(kind, n, procmesh, flags, inplace, forward):
    """Turn a transform into a list of callables, each from one layout to the next.

    Returns a list of `LocalTransform` and `Exchange`; the first reads the input's layout and the last writes the
    output's.
    """
    forms = dict(real=(n, kind.dtypes()[0]), complex=(n[:-1] + (n[-1] // 2 + 1,), kind.dtypes()[1]))
    if kind.kind == "c2c":
        forms["complex"] = n, kind.dtypes()[1]
    # List the steps with the form and the level that each leaves
    mesh, ndim = working_mesh(procmesh, len(n)), len(n)
    ends = [0 if flags & flag else mesh.ndim for flag in (Flags.TRANSPOSED_IN, Flags.TRANSPOSED_OUT)]
    folded = mesh is not procmesh and mesh.comm.size > 1
    if folded:
        ends = {"r2c": (mesh.ndim, 0), "c2r": (0, mesh.ndim)}.get(kind.kind, (mesh.ndim, 0))
    steps = itinerary(kind.kind, ndim, mesh.np, *ends)
    if folded:
        steps = [("exchange", None, ends[0]), *steps, ("exchange", None, ends[1])]

    real_axis = ndim - 1 if kind.kind != "c2c" else None
    for index, step in enumerate(steps):
        if step[0] == "transform" and real_axis in step[1] and len(step[1]) > 1 and (inplace or kind.kind == "c2r"):
            apart = [("transform", [real_axis]), ("transform", step[1][:-1])]
            steps[index:index + 1] = apart if kind.kind == "r2c" else apart[::-1]
            break
    # Choose the layouts between the steps
    source, target = end_layouts(kind, n, procmesh, flags)
    where = [index for index, step in enumerate(steps) if step[0] == "transform"]
    layouts, level, form = [source], ends[0], "real" if kind.kind == "r2c" else "complex"
    for index, step in enumerate(steps[:-1]):
        if step[0] == "exchange":
            level = step[2]
        elif real_axis in step[1]:
            form = "complex" if kind.kind == "r2c" else "real"
        order = source.order if index < where[0] else target.order if index >= where[-1] else None
        layouts.append(level_layout(mesh, *forms[form], level, order))
    layouts.append(target)
    # Make the callables
    chain = []
    for step, before, after in zip(steps, layouts, layouts[1:]):
        if step[0] == "exchange":
            line = mesh.comm if step[1] is None else mesh.line(step[1])
            ranks = range(mesh.comm.size) if step[1] is None else mesh.ranks(step[1])
            chain.append(Exchange(line, before, after, ranks))
        else:
            this = kind.kind if real_axis in step[1] else "c2c"
            chain.append(LocalTransform(this, step[1], forward, before, after))
    return chain


class Plan:
    """A transform that is ready to run.

    Parameters
    ----------
    partition : Partition
        Gives the shape of the mesh and the process mesh.
    direction : Direction
    i, o : LocalBuffer
        The input and the output; without `o`, or with `o` in the memory of `i`, the plan is in place.
    type : Type, optional
        Defaults to the partition's type forward and to its inverse backward.
    flags : Flags, optional
        Default to the partition's, with TRANSPOSED_IN and TRANSPOSED_OUT exchanged backward.

    Attributes
    ----------
    direction, type, flags, inplace : as given
    """

    def __init__(self, partition, direction, i, o=None, type=None, flags=None):
        self.partition, self.direction = partition, Direction(direction)
        backward = self.direction == Direction.BACKWARD
        if type is None:
            type = partition.type.inverse if backward else partition.type
        self.type = Type(type)
        if self.type.dtypes() != partition.type.dtypes():
            raise TypeError(f"a plan of type {self.type.name} does not fit a partition of type {partition.type.name}")
        if flags is None:
            flags = partition.flags
            if backward and self.type.is_inverse_of(partition.type):
                flags = _swap_ends(flags)
        self.flags = Flags(flags)
        o = i if o is None else o
        self._check(i, o)
        self.inplace = i.address == o.address
        self._steps = compile_steps(self.type, tuple(partition.n.tolist()), partition.procmesh, self.flags,
                                    self.inplace, self.direction == Direction.FORWARD)
        self._scratch = max([step.target.nbytes for step in self._steps[:-1]], default=0)

    def _check(self, *buffers):
        """Refuse what is not a buffer of this plan's partition."""
        for buffer in buffers:
            if not isinstance(buffer, LocalBuffer):
                raise TypeError(f"expected a LocalBuffer, not {type(buffer).__name__}")
            if buffer.partition._key != self.partition._key:
                raise ValueError(f"the buffer belongs to {buffer.partition!r}, the plan to {self.partition!r}")

    def execute(self, i, o=None):
        """Transform the buffer `i` into `o` (or in place). Collective; the result is not normalised.

        The input is left as it is unless the plan is in place. Raises ValueError if the plan was made in place
        and the buffers are not in the same memory, or the other way round.
        """
        o = i if o is None else o
        self._check(i, o)
        if (i.address == o.address) != self.inplace:
            raise ValueError(f"the plan was made {'in' if self.inplace else 'out of'} place, the buffers are not")
        # Run the steps between two memories
        source, last = i._memory, len(self._steps) - 1
        scratch = numpy.empty(self._scratch, dtype="u1")
        for index, step in enumerate(self._steps):
            target = scratch if (last - index) % 2 else o._memory
            if target is source and not step.in_place:
                target = numpy.empty(step.target.nbytes, dtype="u1")
            step(source, target)
            source = target
        if source is not o._memory:
            step.target.view(o._memory)[...] = step.target.view(source)

    def __repr__(self):
        return (f"Plan(type={self.type.name}, direction={self.direction.name}, flags={self.flags!r}, "
                f"inplace={self.inplace}, steps={self._steps!r})")


def _swap_ends(flags):
    """The flags of the way back: what was the output is the input."""
    swapped = flags & ~(Flags.TRANSPOSED_IN | Flags.TRANSPOSED_OUT)
    if flags & Flags.TRANSPOSED_IN:
        swapped |= Flags.TRANSPOSED_OUT
    if flags & Flags.TRANSPOSED_OUT:
        swapped |= Flags.TRANSPOSED_IN
    return swapped

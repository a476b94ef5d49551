"""Who holds what: process meshes, layouts, partitions and local buffers.

Names and layouts are those of PFFT (Pippig 2013) as its Python binding presents them.
"""

import enum

import numpy
from mpi4py import MPI


class Flags(enum.IntFlag):
    """Options of a transform; join them with ``|``.

    ``TRANSPOSED_*`` choose the layouts and ``PADDED_*`` the storage of real arrays. The flags on effort
    (``ESTIMATE``, ``MEASURE`` ...) and input (``PRESERVE_INPUT``, ``DESTROY_INPUT``) are accepted and
    change nothing: there is one way to compute, and an out-of-place transform always preserves its input.
    """

    # Name the options
    PFFT_TRANSPOSED_NONE = TRANSPOSED_NONE = 0
    PFFT_SHIFTED_NONE = SHIFTED_NONE = 0
    PFFT_MEASURE = MEASURE = 0
    PFFT_NO_TUNE = NO_TUNE = 0
    PFFT_TRANSPOSED_IN = TRANSPOSED_IN = 1 << 0
    PFFT_TRANSPOSED_OUT = TRANSPOSED_OUT = 1 << 1
    PFFT_SHIFTED_IN = SHIFTED_IN = 1 << 2
    PFFT_SHIFTED_OUT = SHIFTED_OUT = 1 << 3
    PFFT_ESTIMATE = ESTIMATE = 1 << 4
    PFFT_PATIENT = PATIENT = 1 << 5
    PFFT_EXHAUSTIVE = EXHAUSTIVE = 1 << 6
    PFFT_TUNE = TUNE = 1 << 7
    PFFT_PRESERVE_INPUT = PRESERVE_INPUT = 1 << 8
    PFFT_DESTROY_INPUT = DESTROY_INPUT = 1 << 9
    PFFT_BUFFERED_INPLACE = BUFFERED_INPLACE = 1 << 10
    PFFT_PADDED_R2C = PADDED_R2C = 1 << 11
    PFFT_PADDED_C2R = PADDED_C2R = 1 << 12


ALL_FLAGS = Flags(sum(Flags))


class Direction(enum.IntEnum):
    """Sign of the exponent: ``FORWARD`` is ``exp(-i k x)``, ``BACKWARD`` is ``exp(+i k x)``."""

    PFFT_FORWARD = FORWARD = -1
    PFFT_BACKWARD = BACKWARD = 1


class Type(enum.IntEnum):
    """Kinds of transform: ``PFFT_`` in double precision, ``PFFTF_`` in single precision."""

    PFFT_C2C = C2C = 0
    PFFT_R2C = R2C = 1
    PFFT_C2R = C2R = 2
    PFFT_R2R = R2R = 3
    PFFTF_C2C = C2CF = 4
    PFFTF_R2C = R2CF = 5
    PFFTF_C2R = C2RF = 6
    PFFTF_R2R = R2RF = 7

    @property
    def kind(self):
        """``'c2c'``, ``'r2c'``, ``'c2r'`` or ``'r2r'``, whatever the precision."""
        return ("c2c", "r2c", "c2r", "r2r")[self % 4]

    @property
    def inverse(self):
        """The type of the transform that undoes this one."""
        return Type((0, 2, 1, 3)[self % 4] + self // 4 * 4)

    def is_inverse_of(self, other):
        """Tell whether this type undoes the type `other`."""
        return self == Type(other).inverse

    @property
    def numbers(self):
        """The dtypes of a real and of a complex number in this type's precision."""
        return tuple(map(numpy.dtype, ("f4", "c8") if self >= 4 else ("f8", "c16")))

    def shapes(self, n):
        """Shapes of the whole input and output of a transform on a mesh of shape `n` (a tuple)."""
        half = n[:-1] + (n[-1] // 2 + 1,)
        return {"c2c": (n, n), "r2c": (n, half), "c2r": (half, n), "r2r": (n, n)}[self.kind]

    def dtypes(self):
        """Dtypes of the input and of the output."""
        real, complex_ = self.numbers
        return {
            "c2c": (complex_, complex_),
            "r2c": (real, complex_),
            "c2r": (complex_, real),
            "r2r": (real, real),
        }[self.kind]


def split_size_2d(size):
    """Split a number of ranks into the two factors ``(a, b)`` of a process mesh that is nearly square.

    `a` is the largest divisor of `size` that is at most ``int(sqrt(size)) + 1``, as in the PFFT binding.
    """
    size = int(size)
    if size < 1:
        raise ValueError(f"the number of ranks must be at least 1, not {size}")
    first = next(a for a in range(int(size**0.5) + 1, 0, -1) if size % a == 0)
    return first, size // first


class ProcMesh:
    """The ranks of a communicator, arranged as a mesh in C order.

    Parameters
    ----------
    np : sequence of int
        Number of ranks along each direction of the mesh; the product is the size of `comm`.
        May be empty on one rank.
    comm : MPI.Comm, optional
        Defaults to ``MPI.COMM_WORLD``. Collective: every rank of it makes the mesh.

    Attributes
    ----------
    comm, rank : the communicator and the number of this rank in it
    np, this : integer arrays, the shape of the mesh and the place of this rank in it
    ndim : int, the number of directions
    """

    def __init__(self, np, comm=None):
        self.comm = MPI.COMM_WORLD if comm is None else comm
        self.rank = self.comm.rank
        self.np = numpy.array(np, dtype="int32").reshape(-1)
        self.ndim = len(self.np)
        if (self.np < 1).any() or self.np.prod() != self.comm.size:
            raise ValueError(
                f"a process mesh of shape {self.np.tolist()} needs {self.np.prod()} ranks, "
                f"the communicator has {self.comm.size}"
            )
        self.this = self.coords(self.rank)
        self._lines = lines_of(self)

    def coords(self, rank):
        """Place in the mesh of a rank of the communicator, an integer array."""
        return numpy.array(numpy.unravel_index(rank, self.np) if self.ndim else [], dtype="int32")

    def line(self, direction):
        """Communicator of the ranks that differ from this in one direction only (None if it is alone)."""
        return self._lines[direction]

    def ranks(self, direction):
        """Numbers in `comm` of the ranks of :meth:`line`."""
        step = int(self.np[direction + 1 :].prod())
        first = self.rank - step * int(self.this[direction])
        return [first + step * p for p in range(self.np[direction])]

    @classmethod
    def split(cls, ndim, comm=None):
        """Shape of a mesh of `ndim` (1 or 2) directions for the ranks of `comm`, as square as can be."""
        size = (MPI.COMM_WORLD if comm is None else comm).size
        if ndim not in (1, 2):
            raise ValueError(f"only meshes of 1 or 2 directions can be split automatically, not {ndim}")
        return [size] if ndim == 1 else split_size_2d(size)

    def __repr__(self):
        return f"ProcMesh(np={self.np.tolist()}, this={self.this.tolist()})"


def free_lines(comm, keyval, kept):
    """Free the communicators kept on `comm`; MPI calls this when `comm` is freed."""
    for line in (line for lines in kept.values() for line in lines):
        if line is not None and line != comm:
            line.Free()


KEPT_LINES = MPI.Comm.Create_keyval(delete_fn=free_lines)


def lines_of(mesh):
    """Communicators along each direction of a process mesh, made once for a communicator and a shape."""
    kept = mesh.comm.Get_attr(KEPT_LINES)
    if kept is None:
        kept = {}
        mesh.comm.Set_attr(KEPT_LINES, kept)
    key = tuple(mesh.np.tolist())
    if key not in kept:
        kept[key] = [
            None
            if mesh.np[d] == 1
            else mesh.comm
            if mesh.np[d] == mesh.comm.size
            else mesh.comm.Split(mesh.ranks(d)[0], mesh.rank)
            for d in range(mesh.ndim)
        ]
    return kept[key]


def block_edges(n, parts):
    """Edges of `parts` consecutive blocks of `n` indices: ``ceil(n / parts)`` in each until none are left.

    Returns an integer array of length ``parts + 1``; block `p` holds ``edges[p] <= index < edges[p + 1]``.
    """
    block = -(-n // parts)
    return numpy.minimum(numpy.arange(parts + 1, dtype="intp") * block, n)


class Layout:
    """One way to spread an array over a process mesh.

    Parameters
    ----------
    mesh : ProcMesh
    shape : sequence of int
        Shape of the whole array.
    dtype : numpy.dtype
    owners : sequence
        For each axis the direction of the mesh that cuts it, or None for an axis that stays whole.
    order : sequence of int
        The axes from the slowest to the fastest in memory.
    padded : int
        Number of items stored along the last axis, if more than its length.

    Attributes
    ----------
    edges : list of integer arrays, the edges of the blocks along each axis
    start, local : integer arrays, first index and shape of the local part
    stored, strides : integer arrays, shape with padding, and bytes from item to item
    nbytes : int, size of the local part in memory
    """

    def __init__(self, mesh, shape, dtype, owners, order, padded=0):
        self.mesh, self.shape, self.dtype = mesh, tuple(shape), dtype
        self.owners, self.order = tuple(owners), tuple(order)
        self.edges = [
            block_edges(n, 1 if owner is None else int(mesh.np[owner]))
            for n, owner in zip(self.shape, self.owners)
        ]
        self.start, stop = self.box(mesh.this)
        self.local = stop - self.start
        self.stored = self.local.copy()
        if padded:
            self.stored[-1] = padded
        self.strides = numpy.empty_like(self.stored)
        self.nbytes = dtype.itemsize
        for axis in reversed(self.order):
            self.strides[axis] = self.nbytes
            self.nbytes *= int(self.stored[axis])

    def box(self, coords):
        """First indices, and those behind the last, of the part of the rank at `coords`: two rows."""
        place = [0 if owner is None else coords[owner] for owner in self.owners]
        parts = [(edges[p], edges[p + 1]) for edges, p in zip(self.edges, place)]
        return numpy.array(parts, dtype="intp").T

    def view(self, memory):
        """The local part of the array, on an array of bytes that is at least ``nbytes`` long."""
        return numpy.ndarray(self.local, self.dtype, buffer=memory, strides=self.strides)


def level_layout(mesh, shape, dtype, level, order=None):
    """The layout in which axis `level` is whole.

    With a mesh of m directions, axes ``0 .. level - 1`` lie on directions ``0 .. level - 1`` and axes
    ``level + 1 .. m`` on directions ``level .. m - 1``; level m is plain, level 0 transposed.
    """
    axes = range(len(shape))
    owners = [axis if axis < level else axis - 1 if level < axis <= mesh.ndim else None for axis in axes]
    return Layout(mesh, shape, dtype, owners, axes if order is None else order)


def end_layout(mesh, shape, dtype, transposed, padded=0):
    """The layout at one end of a transform, plain or transposed, as the user sees it."""
    axes = list(range(len(shape)))
    turned = min(mesh.ndim + 1, len(shape))
    owners = [(axis - 1) % turned if transposed and axis < turned else axis for axis in axes]
    owners = [owner if owner < mesh.ndim else None for owner in owners]
    order = axes[1:turned] + axes[:1] + axes[turned:] if transposed else axes
    return Layout(mesh, shape, dtype, owners, order, padded)


def end_layouts(kind, n, mesh, flags):
    """The layouts of the input and output of a transform of type `kind` on a mesh of shape `n`, a tuple."""
    # Refuse what cannot be laid out
    if kind.kind == "r2r":
        raise NotImplementedError("real-to-real transforms (R2R) are not provided; use C2C, R2C or C2R")
    if flags & (Flags.SHIFTED_IN | Flags.SHIFTED_OUT):
        raise NotImplementedError("shifted index ranges (SHIFTED_IN, SHIFTED_OUT) are not provided")
    if int(flags) & ~int(ALL_FLAGS):
        raise ValueError(f"unknown flags {int(flags) & ~int(ALL_FLAGS):#x}; the known ones are {ALL_FLAGS!r}")
    if len(n) == 0 or min(n) < 1:
        raise ValueError(f"a mesh needs at least one axis and one point along each, not the shape {n}")
    if mesh.ndim > len(n):
        raise ValueError(f"a process mesh of {mesh.ndim} directions cannot cut a mesh of {len(n)} axes")
    if len(n) == 1 and mesh.comm.size > 1:
        raise NotImplementedError("a one-dimensional transform runs on one rank only")
    ends = [("r2c", Flags.TRANSPOSED_IN, Flags.PADDED_R2C), ("c2r", Flags.TRANSPOSED_OUT, Flags.PADDED_C2R)]
    layouts = []
    for shape, dtype, (real, transposed, pad) in zip(kind.shapes(n), kind.dtypes(), ends):
        padded = 2 * (n[-1] // 2 + 1) if kind.kind == real and flags & pad else 0
        if padded and (flags & transposed or mesh.ndim == len(n)):
            raise NotImplementedError(
                "real arrays are padded in the plain layout and on a process mesh "
                f"of fewer directions than axes; leave {pad.name} out of {flags!r}"
            )
        layouts.append(end_layout(mesh, shape, dtype, flags & transposed, padded))
    return layouts


class Partition:
    """How the two ends of a transform are spread over the ranks.

    Parameters
    ----------
    type : Type
    n : sequence of int
        Shape of the mesh in configuration space.
    procmesh : ProcMesh
    flags : Flags, optional

    Attributes
    ----------
    ndim, n, type, flags, procmesh : as given
    ni, no : shapes of the whole input and output
    local_i_start, local_o_start : index of the first local point
    local_i_shape, local_o_shape : shape of the local part
    local_ni, local_no : the same, counting the padding
    local_i_strides, local_o_strides : strides in bytes
    local_i_slice, local_o_slice : tuples of slices that cut the local part out of the whole
    i_edges, o_edges : for each axis the edges of its blocks, the same on all ranks
    i_dtype, o_dtype : types of number
    alloc_local : number of complex numbers a local buffer must hold
    """

    def __init__(self, type, n, procmesh, flags=Flags(0)):
        self.type, self.flags, self.procmesh = Type(type), Flags(flags), procmesh
        self.n = numpy.array(n, dtype="intp").reshape(-1)
        self.ndim = len(self.n)
        shape = tuple(self.n.tolist())
        # Spread out the layouts of both sides
        for side, layout in zip("io", end_layouts(self.type, shape, procmesh, self.flags)):
            low, high = layout.start.tolist(), (layout.start + layout.local).tolist()
            setattr(self, f"n{side}", numpy.array(layout.shape, dtype="intp"))
            setattr(self, f"local_{side}_start", layout.start)
            setattr(self, f"local_{side}_shape", layout.local)
            setattr(self, f"local_n{side}", layout.stored)
            setattr(self, f"local_{side}_strides", layout.strides)
            setattr(self, f"local_{side}_slice", tuple(map(slice, low, high)))
            setattr(self, f"{side}_edges", layout.edges)
            setattr(self, f"{side}_dtype", layout.dtype)
        self.alloc_local = room(self.type, shape, procmesh)
        self._key = shape, tuple(procmesh.np.tolist()), self.type.numbers

    def __repr__(self):
        return (
            f"Partition(n={self.n.tolist()}, type={self.type.name}, flags={self.flags!r}, "
            f"local_ni={self.local_ni.tolist()}, local_no={self.local_no.tolist()}, "
            f"local_i_start={self.local_i_start.tolist()}, "
            f"local_o_start={self.local_o_start.tolist()})"
        )


def working_mesh(procmesh, ndim):
    """The process mesh on which a transform of `ndim` axes runs: it leaves at least one axis whole."""
    if procmesh.ndim < ndim:
        return procmesh
    np = procmesh.np.tolist()
    return ProcMesh(np[:-2] + [np[-2] * np[-1]] if ndim > 1 else [], procmesh.comm)


def room(kind, n, procmesh):
    """Complex numbers that hold the local part at any stage of a transform, whatever its flags."""
    mesh, layouts = working_mesh(procmesh, len(n)), []
    for shape, dtype in zip(kind.shapes(n), kind.dtypes()):
        layouts += [end_layout(procmesh, shape, dtype, transposed) for transposed in (False, True)]
        layouts += [level_layout(mesh, shape, dtype, level) for level in range(mesh.ndim + 1)]
        if procmesh.ndim < len(n) and dtype.kind == "f":
            layouts.append(end_layout(procmesh, shape, dtype, False, padded=2 * (n[-1] // 2 + 1)))
    return max(1, -(-max(layout.nbytes for layout in layouts) // kind.numbers[1].itemsize))


class LocalBuffer:
    """Memory for the local part of an array, to be seen as the input or as the output of a transform.

    Parameters
    ----------
    partition : Partition
    base : LocalBuffer, optional
        Share the memory of this buffer; it must be large enough.

    Attributes
    ----------
    partition, base : as given
    address : int, where the memory begins
    """

    def __init__(self, partition, base=None):
        self.partition, self.base = partition, base
        nbytes = partition.alloc_local * partition.type.numbers[1].itemsize
        if base is None:
            memory = self.allocate(nbytes + 64)
            skip = -memory.ctypes.data % 64  # whole cache lines
            self._memory = memory[skip : skip + nbytes]
        elif not isinstance(base, LocalBuffer):
            raise TypeError(f"base must be a LocalBuffer, not {type(base).__name__}")
        elif base._memory.size < nbytes:
            raise ValueError(f"the base buffer has {base._memory.size} bytes, {partition!r} needs {nbytes}")
        else:
            self._memory = base._memory
        self.address = self._memory.ctypes.data

    @staticmethod
    def allocate(nbytes):
        """An array of bytes for a new buffer; a program may put a function of its own in its place."""
        return numpy.empty(nbytes, dtype="u1")

    def __contains__(self, other):
        """Tell whether another buffer lies in the same memory."""
        return self.address == other.address

    def view_input(self, type=numpy.ndarray):
        """The local part of the input, an array of class `type`."""
        p = self.partition
        return self._view(p.i_dtype, p.local_i_shape, p.local_i_strides, type)

    def view_output(self, type=numpy.ndarray):
        """The local part of the output, an array of class `type`."""
        p = self.partition
        return self._view(p.o_dtype, p.local_o_shape, p.local_o_strides, type)

    def view_raw(self, type=numpy.ndarray):
        """All of the memory, as a one-dimensional array of real numbers."""
        real = self.partition.type.numbers[0]
        return self._view(real, [2 * self.partition.alloc_local], [real.itemsize], type)

    def _view(self, dtype, shape, strides, type):
        """An array on this memory whose ``base`` is this buffer."""
        self.__array_interface__ = dict(
            version=3,
            data=(self.address, False),
            typestr=dtype.str,
            shape=tuple(map(int, shape)),
            strides=tuple(map(int, strides)),
        )
        try:
            return numpy.asarray(self).view(type) if type is not numpy.ndarray else numpy.asarray(self)
        finally:
            del self.__array_interface__

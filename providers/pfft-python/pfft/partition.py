"""Who holds what: process meshes, layouts, partitions and local buffers.

The names and the layouts are those of PFFT (Pippig 2013) as its Python binding presents them.
"""
import enum

import numpy
from mpi4py import MPI


def split_size_2d(size):
    """Split a number of ranks into the two factors, as equal as can be, of a process mesh.

    Returns a tuple ``(a, b)`` of integers with ``a * b == size``. If `size` is not a square, the factors are
    those the PFFT binding picks: `a` is the largest divisor not above ``int(sqrt(size)) + 1``.
    """
    size = int(size)
    if size < 1:
        raise ValueError(f"the number of ranks must be at least 1, not {size}")
    first = next(a for a in range(int(size ** 0.5) + 1, 0, -1) if size % a == 0)
    return first, size // first


def block_edges(n, parts):
    """Edges of `parts` consecutive blocks of `n` indices; blocks have ``ceil(n / parts)`` of them, then the rest.

    Returns an integer array of length ``parts + 1``: block `p` holds ``edges[p] <= index < edges[p + 1]``.
    """
    block = -(-n // parts)
    return numpy.minimum(numpy.arange(parts + 1, dtype="intp") * block, n)


class Flags(enum.IntFlag):
    """Options of a transform; join them with ``|``.

    ``TRANSPOSED_*`` choose the layouts and ``PADDED_*`` the storage of real arrays. The flags on effort
    (``ESTIMATE``, ``MEASURE`` ...) and on the input (``PRESERVE_INPUT``, ``DESTROY_INPUT``) are accepted and change
    nothing: there is one way to compute, and an out-of-place transform always preserves its input.
    """

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


class Direction(enum.IntEnum):
    """Sign of the exponent: ``FORWARD`` is ``exp(-i k x)``, ``BACKWARD`` is ``exp(+i k x)``."""

    PFFT_FORWARD = FORWARD = -1
    PFFT_BACKWARD = BACKWARD = 1


class Type(enum.IntEnum):
    """Kinds of transform; ``PFFT_`` in double precision, ``PFFTF_`` in single precision."""

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
        return Type({1: 2, 2: 1}.get(self % 4, self % 4) + self // 4 * 4)

    def is_inverse_of(self, other):
        """Tell whether this type undoes the type `other`."""
        return self == Type(other).inverse

    def dtypes(self):
        """Pair of dtypes: of a real and of a complex number in this type's precision."""
        names = ("f4", "c8") if self >= 4 else ("f8", "c16")
        return numpy.dtype(names[0]), numpy.dtype(names[1])


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
            raise ValueError(f"a process mesh of shape {self.np.tolist()} needs {self.np.prod()} ranks, "
                             f"the communicator has {self.comm.size}")
        self.this = self.coords(self.rank)
        self._lines = _lines(self)

    def coords(self, rank):
        """Place in the mesh of a rank of the communicator, an integer array."""
        return numpy.array(numpy.unravel_index(rank, self.np) if self.ndim else [], dtype="int32")

    def line(self, dim):
        """The communicator of the ranks that differ from this one in direction `dim` only, in mesh order."""
        return self._lines[dim]

    def ranks(self, dim):
        """Numbers in `comm` of the ranks of :meth:`line`, in mesh order."""
        place = [int(p) for p in self.this]
        return [int(numpy.ravel_multi_index(place[:dim] + [p] + place[dim + 1:], self.np))
                for p in range(self.np[dim])]

    @classmethod
    def split(cls, ndim, comm=None):
        """Shape of a mesh of `ndim` (1 or 2) directions for the ranks of `comm`, as equal as can be."""
        size = (MPI.COMM_WORLD if comm is None else comm).size
        if ndim not in (1, 2):
            raise ValueError(f"only meshes of 1 or 2 directions can be split automatically, not {ndim}")
        return [size] if ndim == 1 else split_size_2d(size)

    def __repr__(self):
        return f"ProcMesh(np={self.np.tolist()}, this={self.this.tolist()})"


def _free_lines(comm, keyval, lines):
    """Free the communicators of the meshes on `comm`; MPI calls this when `comm` itself is freed."""
    for line in (line for mesh in lines.values() for line in mesh):
        if line is not None and line != comm:
            line.Free()


_LINES = MPI.Comm.Create_keyval(delete_fn=_free_lines)


def _lines(mesh):
    """Communicators along each direction of a mesh, made once per communicator and shape."""
    cache = mesh.comm.Get_attr(_LINES)
    if cache is None:
        cache = {}
        mesh.comm.Set_attr(_LINES, cache)
    key = tuple(mesh.np.tolist())
    if key not in cache:
        cache[key] = [_line(mesh, dim) for dim in range(mesh.ndim)]
    return cache[key]


def _line(mesh, dim):
    """One of them: none for a direction of one rank, the communicator itself if the direction has all ranks."""
    if mesh.np[dim] == 1:
        return None
    if mesh.np[dim] == mesh.comm.size:
        return mesh.comm
    rest = mesh.this.copy()
    rest[dim] = 0
    return mesh.comm.Split(int(numpy.ravel_multi_index(rest, mesh.np)), int(mesh.this[dim]))


class Layout:
    """One way to spread an array over a process mesh.

    Parameters
    ----------
    mesh : ProcMesh
    shape : sequence of int
        Shape of the whole array.
    dtype : numpy.dtype
    owners : sequence
        For each axis the direction of the mesh that divides it, or None for an axis that stays whole.
    order : sequence of int
        The axes from the slowest to the fastest in memory.
    padded : int
        Number of items stored along the last axis, if more than its length.
    """

    def __init__(self, mesh, shape, dtype, owners, order, padded=0):
        self.mesh, self.shape, self.dtype = mesh, tuple(shape), dtype
        self.owners, self.order = tuple(owners), tuple(order)
        self.edges = [block_edges(n, 1 if owner is None else mesh.np[owner])
                      for n, owner in zip(self.shape, self.owners)]
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
        """First and last-plus-one indices, two integer arrays, of what the rank at `coords` holds."""
        place = [0 if owner is None else coords[owner] for owner in self.owners]
        return (numpy.array([edges[p] for edges, p in zip(self.edges, place)], dtype="intp"),
                numpy.array([edges[p + 1] for edges, p in zip(self.edges, place)], dtype="intp"))

    def view(self, memory):
        """The local part of the array, in an array of bytes that is at least ``nbytes`` long."""
        return numpy.ndarray(self.local, self.dtype, buffer=memory, strides=self.strides)


def level_layout(mesh, shape, dtype, level, order=None, padded=0):
    """The layout in which axis `level` is whole and its neighbours are spread over the mesh.

    With a mesh of m directions, axes ``0 .. level-1`` lie on directions ``0 .. level-1``, axes ``level+1 .. m`` on
    directions ``level .. m-1``. Level m is the plain layout and level 0 the transposed one.
    """
    owners = [axis if axis < level else axis - 1 if level < axis <= mesh.ndim else None
              for axis in range(len(shape))]
    return Layout(mesh, shape, dtype, owners, range(len(shape)) if order is None else order, padded)


def end_layout(mesh, shape, dtype, transposed, padded=0):
    """The layout at one end of a transform, as the user sees it: plain or transposed."""
    ndim = len(shape)
    axes = list(range(ndim))
    if not transposed:
        return Layout(mesh, shape, dtype, [a if a < mesh.ndim else None for a in axes], axes, padded)
    turned = min(mesh.ndim + 1, ndim)
    owners = [(a - 1) % turned if a < turned else None for a in axes]
    owners = [owner if owner is not None and owner < mesh.ndim else None for owner in owners]
    return Layout(mesh, shape, dtype, owners, axes[1:turned] + axes[:1] + axes[turned:])


def end_layouts(kind, n, mesh, flags):
    """The two layouts, of the input and of the output, of a transform of type `kind` on a mesh of shape `n`."""
    # Refuse what cannot be laid out
    if kind.kind == "r2r":
        raise NotImplementedError("real-to-real transforms (R2R) are not provided; use C2C, R2C or C2R")
    if flags & (Flags.SHIFTED_IN | Flags.SHIFTED_OUT):
        raise NotImplementedError("shifted index ranges (SHIFTED_IN, SHIFTED_OUT) are not provided")
    if int(flags) & ~int(_ALL_FLAGS):
        raise ValueError(f"unknown flags in {int(flags):#x}; known ones are {_ALL_FLAGS!r}")
    if len(n) == 0 or min(n) < 1:
        raise ValueError(f"the mesh needs at least one axis and one point along each, not the shape {tuple(n)}")
    if mesh.ndim > len(n):
        raise ValueError(f"a process mesh of {mesh.ndim} directions cannot divide a mesh of {len(n)} axes")
    if len(n) == 1 and mesh.comm.size > 1:
        raise NotImplementedError("a 1-dimensional transform runs on one rank only")
    real, complex_ = kind.dtypes()
    half = tuple(n[:-1]) + (n[-1] // 2 + 1,)
    shapes = {"c2c": (n, n), "r2c": (n, half), "c2r": (half, n)}[kind.kind]
    dtypes = {"c2c": (complex_, complex_), "r2c": (real, complex_), "c2r": (complex_, real)}[kind.kind]
    sides = [("r2c", Flags.TRANSPOSED_IN, Flags.PADDED_R2C), ("c2r", Flags.TRANSPOSED_OUT, Flags.PADDED_C2R)]
    layouts = []
    for shape, dtype, (real_kind, transposed, pad) in zip(shapes, dtypes, sides):
        padded = kind.kind == real_kind and flags & pad
        if padded and (flags & transposed or mesh.ndim == len(n) > 1):
            raise NotImplementedError("real arrays can be padded in the plain layout only, on a process mesh "
                                      f"with fewer directions than the data; flags are {flags!r}")
        layouts.append(end_layout(mesh, shape, dtype, flags & transposed, 2 * half[-1] if padded else 0))
    return layouts


_ALL_FLAGS = Flags(sum(flag for flag in Flags))


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
        self.type, self.procmesh = Type(type), procmesh
        self.flags = Flags(flags)
        self.n = numpy.array(n, dtype="intp").reshape(-1)
        self.ndim = len(self.n)
        shape = tuple(self.n.tolist())
        self._layouts = end_layouts(self.type, shape, procmesh, self.flags)
        for side, layout in zip("io", self._layouts):
            setattr(self, f"local_{side}_start", layout.start)
            setattr(self, f"local_{side}_shape", layout.local)
            setattr(self, f"local_n{side}", layout.stored)
            setattr(self, f"local_{side}_strides", layout.strides)
            setattr(self, f"local_{side}_slice",
                    tuple(slice(s, s + m) for s, m in zip(layout.start.tolist(), layout.local.tolist())))
            setattr(self, f"{side}_edges", layout.edges)
            setattr(self, f"n{side}", numpy.array(layout.shape, dtype="intp"))
            setattr(self, f"{side}_dtype", layout.dtype)
        self.alloc_local = _alloc_local(self.type, shape, procmesh)
        self._key = shape, tuple(procmesh.np.tolist()), self.type.dtypes()

    def __repr__(self):
        return (f"Partition(n={self.n.tolist()}, type={self.type.name}, flags={self.flags!r}, "
                f"local_ni={self.local_ni.tolist()}, local_no={self.local_no.tolist()}, "
                f"local_i_start={self.local_i_start.tolist()}, local_o_start={self.local_o_start.tolist()})")


def working_mesh(procmesh, ndim):
    """The process mesh the transform itself runs on: one that leaves at least one of `ndim` axes whole."""
    if procmesh.ndim < ndim:
        return procmesh
    np = procmesh.np.tolist()
    return ProcMesh(np[:ndim - 2] + [np[-2] * np[-1]] if ndim > 1 else [], procmesh.comm)


def _alloc_local(kind, n, procmesh):
    """Complex numbers that hold the local part at any stage of a transform, whatever its flags."""
    real, complex_ = kind.dtypes()
    half = n if kind.kind == "c2c" else n[:-1] + (n[-1] // 2 + 1,)
    mesh = working_mesh(procmesh, len(n))
    layouts = []
    for shape, dtype in [(half, complex_)] + [(n, real)] * (kind.kind != "c2c"):
        layouts += [end_layout(procmesh, shape, dtype, transposed) for transposed in (False, True)]
        layouts += [level_layout(mesh, shape, dtype, level) for level in range(mesh.ndim + 1)]
    if kind.kind != "c2c" and procmesh.ndim < len(n):
        layouts.append(end_layout(procmesh, n, real, False, padded=2 * half[-1]))
    return max(1, -(-max(layout.nbytes for layout in layouts) // complex_.itemsize))


class LocalBuffer:
    """Memory for the local part of an array, to be seen as the input or as the output of a transform.

    Parameters
    ----------
    partition : Partition
    base : LocalBuffer, optional
        Share the memory of this buffer; it must be large enough.
    """

    def __init__(self, partition, base=None):
        self.partition, self.base = partition, base
        nbytes = partition.alloc_local * partition.type.dtypes()[1].itemsize
        if base is None:
            memory = numpy.empty(nbytes + 64, dtype="u1")
            skip = -memory.ctypes.data % 64
            self._memory = memory[skip:skip + nbytes]
        elif not isinstance(base, LocalBuffer):
            raise TypeError(f"base must be a LocalBuffer, not {type(base).__name__}")
        elif base._memory.size < nbytes:
            raise ValueError(f"the base buffer has {base._memory.size} bytes, the partition needs {nbytes}")
        else:
            self._memory = base._memory
        self.address = self._memory.ctypes.data

    def __contains__(self, other):
        """Tell whether another buffer lies in the same memory."""
        return self.address == other.address

    def _view(self, dtype, shape, strides, cls):
        """An array on this memory whose ``base`` is this buffer."""
        self.__array_interface__ = dict(version=3, data=(self.address, False), typestr=dtype.str,
                                        shape=tuple(int(n) for n in shape),
                                        strides=tuple(int(s) for s in strides))
        try:
            array = numpy.asarray(self)
        finally:
            del self.__array_interface__
        return array if cls is numpy.ndarray else array.view(cls)

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
        real = self.partition.type.dtypes()[0]
        return self._view(real, (2 * self.partition.alloc_local,), (real.itemsize,), type)

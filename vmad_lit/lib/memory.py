"""Large arrays in memory that is used again, without page faults, and arrays as compiled loops see them.

The memory of an array that was made here returns when the last view of it is gone, and serves the next
arrays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
import mmap
import os
import platform
import sys
from threading import Lock
from typing import Any

import numpy
from numpy.typing import DTypeLike

from vmad_lit.core.handover import OWNERS
from vmad_lit.core.stdlib.operators import Array, Shape

#: Bytes from which on it pays to keep memory, and whose multiples pieces are.
LEAST, LINE = 1 << 18, 64

Piece = tuple["Region", int, int]  # a region, and where in it a piece of memory begins and ends

_returned: deque[Piece] = deque()


class _Piece:
    """What an array holds on to: a piece of memory that returns when the array and all its views are gone."""

    __slots__ = "memory", "__array_interface__", "__weakref__"

    def __init__(self, memory: Piece, shape: Shape, dtype: numpy.dtype[Any]) -> None:
        self.memory = memory
        region, begin, end = memory
        self.__array_interface__ = dict(
            version=3, shape=shape, typestr=dtype.str, data=(region.address + begin, False)
        )

    def __del__(self, put_back: Callable[[Piece], None] = _returned.append) -> None:
        put_back(self.memory)

    @property
    def nbytes(self) -> int:
        """The size of the piece, for those who weigh arrays by what owns their memory."""
        return _size(self.memory)


class _Store:
    """Pieces of memory that wait to be used again: each a region, and where in it the piece begins and ends."""

    def __init__(self) -> None:
        self.idle: list[Piece] = []
        self.lock = Lock()

    def take(self, nbytes: int) -> Piece:
        """A piece of so many bytes, or a few more."""
        nbytes = -(-nbytes // LINE) * LINE
        with self.lock:
            self.collect()
            fitting = [piece for piece in self.idle if _size(piece) >= nbytes]
            # Make room for it
            if not fitting:
                self.give_back()
                region = reserve(nbytes)
                fitting = [(region, 0, len(region))]
                self.idle += fitting
            region, begin, end = piece = min(fitting, key=lambda piece: piece[0].address + piece[1])
            self.idle.remove(piece)
            if end - begin > nbytes:
                self.idle.append((region, begin + nbytes, end))
            region.high = max(region.high, begin + nbytes)
        return region, begin, begin + nbytes

    def collect(self) -> None:
        while _returned:
            region, begin, end = _returned.popleft()
            # Join it with its neighbours
            for piece in [p for p in self.idle if p[0] is region and (p[2] == begin or p[1] == end)]:
                self.idle.remove(piece)
                begin, end = min(begin, piece[1]), max(end, piece[2])
            self.idle.append((region, begin, end))

    def give_back(self) -> None:
        """Let go of the regions that are idle as a whole."""
        self.idle = [piece for piece in self.idle if _size(piece) < len(piece[0])]


def _size(piece: Piece) -> int:
    return piece[2] - piece[1]


_store = _Store()
OWNERS.add(_Piece)


class Region:
    """A range of addresses from the operating system, to which it returns when nobody uses it."""

    def __init__(self, nbytes: int) -> None:
        try:
            self.map = mmap.mmap(-1, nbytes, **_private)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"the system has no {nbytes} bytes of memory for an array") from error
        self.bytes = numpy.frombuffer(self.map, "u1")
        self.address = self.bytes.ctypes.data
        self.high = 0  # where the part ends that has been in use since the last `release`

    def __len__(self) -> int:
        return len(self.bytes)

    def discard(self, begin: int, end: int) -> None:
        """Give back the pages of a part that is idle; they are found anew when they are needed."""
        begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


#: Do not count addresses as memory. Python has a name for it from 3.13 on; on these machines it is this number.
NORESERVE = getattr(
    mmap,
    "MAP_NORESERVE",
    0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0,
)

_private: dict[str, int] = {}
if hasattr(mmap, "MAP_PRIVATE"):
    _private["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE


def reserve(nbytes: int) -> Region:
    """A region of at least so many bytes."""
    try:
        return Region(max(nbytes, _affordable()))
    except MemoryError:
        return Region(nbytes)


def _affordable() -> int:
    """How many addresses we may ask for without harm: as many as there are bytes of memory, or none."""
    try:
        import resource

        limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
        if limited or not NORESERVE or _accounts_for_addresses():
            return 0
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ImportError, AttributeError, ValueError, OSError):
        return 0


def _accounts_for_addresses(setting: str = "/proc/sys/vm/overcommit_memory") -> bool:
    """Whether the kernel hands out no more addresses than it has memory for."""
    try:
        with open(setting) as file:
            return file.read().strip() == "2"
    except OSError:
        return False


def empty(shape: Any, dtype: DTypeLike = "f8") -> Array:
    """An array with undefined contents, as `numpy.empty`."""
    dtype = numpy.dtype(dtype)
    shape = (shape,) if numpy.ndim(shape) == 0 else tuple(shape)
    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= int(n)
    if nbytes < LEAST:
        return numpy.empty(shape, dtype)
    return numpy.asarray(_Piece(_store.take(int(nbytes)), shape, dtype))


def empty_like(array: Array) -> Array:
    """An array of the shape and type of another, in C order, with undefined contents."""
    return empty(array.shape, array.dtype)


def zeros(shape: Any, dtype: DTypeLike = "f8") -> Array:
    """An array of zeros, as `numpy.zeros`."""
    array = empty(shape, dtype)
    array.fill(0)
    return array


def release() -> int:
    """Give all idle memory back; returns how many bytes of it had been in use."""
    count = 0
    with _store.lock:
        _store.collect()
        for region, begin, end in _store.idle:
            used = max(begin, min(end, region.high))
            region.discard(begin, used)
            count += used - begin
            if begin < region.high <= end:
                region.high = begin
        _store.give_back()
    return count


def idle() -> int:
    """The bytes of idle memory that have been in use; the next arrays find them there."""
    with _store.lock:
        _store.collect()
        return sum(max(min(end, region.high) - begin, 0) for region, begin, end in _store.idle)


class _Writeable:
    """Hands memory to NumPy as so many elements in a row, without the read-only flag."""

    def __init__(self, array: Array, length: int) -> None:
        interface = array.__array_interface__
        interface.update(data=(interface["data"][0], False), shape=(length,), strides=None)
        self.__array_interface__, self.base = interface, array


def flatten(array: Array) -> Array:
    """The elements of a contiguous array as a flat one, writeable as such, for loops that do not write to it."""
    return array.reshape(-1) if array.flags.writeable else numpy.asarray(_Writeable(array, array.size))


def check_array(
    what: str,
    array: Any,
    like: Array | None = None,
    shape: Shape | None = None,
    writes: bool = False,
    ordered: bool = True,
) -> None:
    """Raise an error unless a compiled loop may go over an array, in ignorance of its shape, type and flags.

    It is an array of f4 or f8, with the shape and type of `like`, or the `shape`; one may write to it (`writes`),
    and its elements lie one after another (`ordered`), or else have strides that a loop can follow.
    """
    shape = like.shape if like is not None and shape is None else shape
    if not isinstance(array, numpy.ndarray) or isinstance(array, numpy.ma.MaskedArray):
        raise TypeError(f"{what} must be an array of floating point numbers, not a {type(array).__name__}")
    # Complain if it has the wrong type
    if (
        array.dtype.char not in "fd"
        or not array.dtype.isnative
        or like is not None
        and array.dtype != like.dtype
    ):
        expected = "float32 or float64" if like is None else str(like.dtype)
        raise TypeError(
            f"{what} must be an array of {expected}, in the byte order of this machine, not {array.dtype}"
        )
    if shape is not None and array.shape != shape:
        raise ValueError(f"{what} must have the shape {shape}, not {array.shape}")
    if writes and not array.flags.writeable:
        raise ValueError(f"{what} is read-only, and would be written to")
    if not (array.flags.c_contiguous and array.flags.aligned if ordered else has_plain_strides(array)):
        order = "C-ordered" if ordered else "aligned, with positive strides"
        raise ValueError(f"{what} must be {order} in memory, but its strides are {array.strides}")


def overlap(array: Array, *others: Array) -> bool:
    """Whether an array has bytes in common with others."""
    for other in others:
        if numpy.may_share_memory(array, other):
            try:
                if numpy.shares_memory(array, other, max_work=1000):  # type: ignore[arg-type]
                    return True
            except numpy.exceptions.TooHardError:
                return True
    return False


def collide(array: Array, *others: Array) -> bool:
    """Whether an array shares memory with others, but is not in the same place as they are, element by element."""
    return any(
        overlap(array, other)
        for other in others
        if array.ctypes.data != other.ctypes.data or array.strides != other.strides
    )


def has_plain_strides(array: Array) -> bool:
    """Whether an array is aligned, and its strides are whole numbers of elements and not negative."""
    size = array.itemsize
    if not array.flags.aligned:
        return False
    for stride in array.strides:
        if stride < 0 or stride % size:
            return False
    return True


def as_flat(array: Array) -> Any:
    """Memory of an array of real numbers as a flat array, and its strides in elements; None if there is no such view."""
    size = array.itemsize
    if array.dtype.char not in "fd" or not array.dtype.isnative or not has_plain_strides(array):
        return None
    strides = tuple([s // size for s in array.strides])
    if array.flags.c_contiguous:
        return flatten(array), strides
    extent = 1 + sum((n - 1) * s for n, s in zip(array.shape, strides)) if array.size else 0
    return numpy.asarray(_Writeable(array, extent)), strides

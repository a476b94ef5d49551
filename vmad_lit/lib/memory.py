"""Large arrays in memory that is used again, without page faults.

The memory of an array that was made here returns when the last view of it is gone, and serves the next
arrays: whole, or in parts if more would be held than was once in use at a time.
"""
from collections import deque
from mmap import mmap
from threading import Lock

import numpy

#: Bytes from which on it pays to keep memory, and whose multiples pieces are.
LEAST, LINE = 1 << 18, 64

_returned = deque()


class _Piece:
    """What an array holds on to: a piece of memory that returns when the array and all its views are gone."""

    __slots__ = 'memory', '__array_interface__', '__weakref__'

    def __init__(self, memory, shape, dtype):
        self.memory = memory
        region, begin, end = memory
        self.__array_interface__ = dict(version=3, shape=shape, typestr=dtype.str,
                                        data=(region.address + begin, False))

    def __del__(self, put_back=_returned.append):
        put_back(self.memory)

    @property
    def nbytes(self):
        """The size of the piece, for those who weigh arrays by what owns their memory."""
        return _size(self.memory)


class _Store:
    """Pieces of memory that wait to be used again: each a region, and where in it the piece begins and ends."""

    def __init__(self):
        self.idle, self.lock = [], Lock()
        self.held = self.peak = 0

    def take(self, nbytes):
        """A piece of so many bytes, or a few more."""
        nbytes = -(-nbytes // LINE) * LINE
        with self.lock:
            self.collect()
            piece = self.find(nbytes, 1.05 * nbytes) or self.make(nbytes) or self.find(nbytes) or self.make(nbytes, True)
            self.peak = max(self.peak, self.used())
        return piece

    def find(self, nbytes, most=float('inf')):
        """An idle piece that is large enough, and not larger than `most`: the smallest, and of these the latest."""
        fitting = [i for i, (_, begin, end) in enumerate(self.idle) if nbytes <= end - begin <= most]
        if not fitting:
            return None
        region, begin, end = self.idle.pop(min(reversed(fitting), key=lambda i: _size(self.idle[i])))
        if end - begin > nbytes:
            self.idle.append((region, begin + nbytes, end))
        return region, begin, begin + nbytes

    def make(self, nbytes, give_back=False):
        """New memory; unless so many bytes more were too much, and we do not give back what is idle."""
        most = max(self.peak, self.used() + nbytes)
        whole = [piece for piece in self.idle if _size(piece) == len(piece[0])]
        while give_back and whole and self.held + nbytes > most:
            self.idle.remove(whole[0])
            self.held -= _size(whole.pop(0))
        if not give_back and self.held + nbytes > most:
            return None
        self.held += nbytes
        return Region(nbytes), 0, nbytes

    def collect(self):
        while _returned:
            region, begin, end = _returned.popleft()
            # Join it with its neighbours
            for piece in [p for p in self.idle if p[0] is region and (p[2] == begin or p[1] == end)]:
                self.idle.remove(piece)
                begin, end = min(begin, piece[1]), max(end, piece[2])
            self.idle.append((region, begin, end))

    def used(self):
        return self.held - sum(map(_size, self.idle))


class Region:
    """Memory from the operating system, to which it returns when the region is gone."""

    def __init__(self, nbytes):
        self.bytes = numpy.frombuffer(mmap(-1, nbytes), 'u1')
        self.address = self.bytes.ctypes.data

    def __len__(self):
        return len(self.bytes)


def _size(piece):
    return piece[2] - piece[1]


_store = _Store()


def empty(shape, dtype='f8'):
    """An array with undefined contents, as `numpy.empty`."""
    dtype = numpy.dtype(dtype)
    shape = (shape,) if numpy.ndim(shape) == 0 else tuple(shape)
    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= n
    if nbytes < LEAST:
        return numpy.empty(shape, dtype)
    return numpy.asarray(_Piece(_store.take(int(nbytes)), shape, dtype))


def empty_like(array):
    """An array of the shape and type of another, in C order, with undefined contents."""
    return empty(array.shape, array.dtype)


def zeros(shape, dtype='f8'):
    """An array of zeros, as `numpy.zeros`."""
    array = empty(shape, dtype)
    array.fill(0)
    return array


def release():
    """Give all idle memory back, and return how many bytes that were."""
    with _store.lock:
        _store.collect()
        whole = [piece for piece in _store.idle if _size(piece) == len(piece[0])]
        count = sum(map(_size, whole))
        _store.idle = [piece for piece in _store.idle if piece not in whole]
        _store.held -= count
        _store.peak = _store.held
    return count

"""Large arrays in memory that is used again, without page faults.

The memory of an array that was made here returns when the last view of it is gone, and serves the next
array of as many bytes. Together with what is in use it is never more than was once in use at a time.
"""
from collections import deque
from threading import Lock

import numpy

#: Bytes from which on it pays to keep memory.
LEAST = 1 << 18

_returned = deque()


class _Piece:
    """What an array holds on to: a piece of memory that returns when the array and all its views are gone."""

    __slots__ = 'memory', '__array_interface__', '__weakref__'

    def __init__(self, memory, shape, dtype):
        self.memory = memory
        self.__array_interface__ = dict(version=3, shape=shape, typestr=dtype.str,
                                        data=(memory.ctypes.data, False))

    def __del__(self, put_back=_returned.append):
        put_back(self.memory)

    @property
    def nbytes(self):
        """The size of the piece, for those who weigh arrays by what owns their memory."""
        return self.memory.nbytes


class _Store:
    """Pieces of memory that wait to be used again."""

    def __init__(self):
        self.idle, self.lock = [], Lock()
        self.held = self.peak = 0

    def take(self, nbytes):
        """A piece of so many bytes."""
        with self.lock:
            self.collect()
            piece = self.find(nbytes)
            if piece is None:
                self.make_room(nbytes)
                piece = allocate(nbytes)
                self.held += nbytes
            self.peak = max(self.peak, self.used())
        return piece

    def find(self, nbytes):
        for i in reversed(range(len(self.idle))):
            if self.idle[i].nbytes == nbytes:
                return self.idle.pop(i)

    def collect(self):
        while _returned:
            self.idle.append(_returned.popleft())

    def used(self):
        return self.held - sum(piece.nbytes for piece in self.idle)

    def make_room(self, nbytes):
        """Give back what has been idle for longest, if with so many bytes more we held too much."""
        most = max(self.peak, self.used() + nbytes)
        while self.idle and self.held + nbytes > most:
            self.held -= self.idle.pop(0).nbytes


_store = _Store()


def allocate(nbytes):
    """New memory that begins with a whole cache line."""
    memory = numpy.empty(nbytes + 64, 'u1')
    skip = -memory.ctypes.data % 64
    return memory[skip:skip + nbytes]


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
        count = sum(piece.nbytes for piece in _store.idle)
        _store.idle.clear()
        _store.held -= count
        _store.peak = _store.held
    return count

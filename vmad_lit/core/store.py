"""States of a chain, in memory and on disk."""

from __future__ import annotations

import io
import pickle
import tempfile
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

from .execution import describe
from .together import together
from .valuetypes import VALUE_TYPES


class InMemory:
    """A state that is kept in memory."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def get(self) -> Any:
        return self._state


class Disk:
    """An anonymous temporary file for states. All ranks of `comm` keep a state, or none does."""

    #: Makes memory of so many bytes; a program may put a function of its own in its place.
    allocate: Callable[[int], Any] = bytearray

    def __init__(self, folder: str | None, comm: Any) -> None:
        self.folder, self.comm = folder, comm
        self._file: Any = None
        self._free: list[tuple[int, int]] = []
        self._end = 0

    def keep(self, state: Any) -> OnDisk:
        return together(self.comm, lambda: OnDisk(self, state))

    def write(self, chunks: list[memoryview]) -> tuple[int, int]:
        """Write chunks of bytes in a row; returns the room that they have, an offset and a size."""
        size, before, room = sum(chunk.nbytes for chunk in chunks), self._end, None
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)
            room = self._find_room(size)
            self._file.seek(room[0])
            for chunk in chunks:
                self._transfer(self._file.write, chunk)
        except OSError as error:
            # Tell what could not be written, and what to do about it
            if room is not None:
                self.drop(room)
            where = self.folder or tempfile.tempdir or "the folder for temporary files"
            raise OSError(
                error.errno,
                f"a state of {size / 1e6:.3g} MB could not be kept in {where}, where there are up to "
                f"{before / 1e6:.3g} MB of the same chain already: {error.strerror}; "
                "choose another folder (folder=...), or fewer states on disk",
            ) from error
        return room

    def _transfer(self, function: Callable[[memoryview], int], chunk: memoryview) -> None:
        while chunk.nbytes:
            done = function(chunk)  # the system may do less than it was asked to
            if not done:
                raise EOFError("the file with the states of a chain is shorter than it was")
            chunk = chunk[done:]

    def read(self, room: tuple[int, int], sizes: list[int]) -> list[Any]:
        """Read chunks of the given sizes from a room."""
        self._file.seek(room[0])
        chunks = [self.allocate(size) for size in sizes]
        for chunk in chunks:
            self._transfer(self._file.readinto, memoryview(chunk))
        return chunks

    def _find_room(self, size: int) -> tuple[int, int]:
        fitting = [room for room in self._free if room[1] >= size]
        if fitting:
            room = min(fitting, key=lambda room: room[1])
            self._free.remove(room)
            return room
        self._end += size
        return self._end - size, size

    def drop(self, room: tuple[int, int]) -> None:
        self._free.append(room)


class OnDisk:
    """A state that is kept in the file of a `Disk`."""

    def __init__(self, disk: Disk, state: Any) -> None:
        header = io.BytesIO()
        buffers: list[pickle.PickleBuffer] = []
        writer = Writer(header, buffers)
        try:
            writer.dump(state)
        except Exception as error:
            # Tell which value cannot be kept on disk
            raise TypeError(
                f"a state of a chain cannot be kept on disk, since there is {describe(find_culprit(state))} "
                f"in it, which cannot be pickled ({error}); keep the states in memory, or tell how it is "
                "taken apart (ValueType.take_apart or keep_on_disk_by)"
            ) from error
        chunks = [header.getbuffer(), *(buffer.raw() for buffer in buffers)]
        self._sizes = [chunk.nbytes for chunk in chunks]
        self._in_memory = writer.in_memory
        self._disk, self._room = disk, disk.write(chunks)

    def get(self) -> Any:
        return together(self._disk.comm, self._read)

    def _read(self) -> Any:
        header, *buffers = self._disk.read(self._room, self._sizes)
        return Reader(header, buffers, self._in_memory).load()

    def __del__(self) -> None:
        if hasattr(self, "_room"):
            self._disk.drop(self._room)


class Writer(pickle.Pickler):
    """Pickles a state; large buffers are set aside, and so is what stays in memory."""

    def __init__(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer]) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self.in_memory: list[Any] = []

    def reducer_override(self, value: Any) -> Any:
        apart = VALUE_TYPES[type(value)].to_disk(value)
        if apart is None:
            return NotImplemented
        rebuild, data = apart
        return call, (InMemory(rebuild), data)

    def persistent_id(self, value: Any) -> int | None:
        if type(value) is not InMemory:
            return None
        self.in_memory.append(value.get())
        return len(self.in_memory) - 1


class Reader(pickle.Unpickler):
    """Makes a state again from what a `Writer` wrote."""

    def __init__(self, header: Any, buffers: list[Any], in_memory: list[Any]) -> None:
        super().__init__(io.BytesIO(header), buffers=buffers)
        self._in_memory = in_memory

    def persistent_load(self, pid: int) -> Any:
        return self._in_memory[pid]


def call(rebuild: Callable[[Any], Any], data: Any) -> Any:
    return rebuild(data)


def keep_on_disk_by(*types: type) -> Callable[[Any], Any]:
    """Decorate a function that takes a value of one of the types apart, so that it can be kept on disk.

    The function returns `(rebuild, data)`: `rebuild` stays in memory, `data` is pickled, and
    `rebuild(data)` is the value again. Nothing else changes for the types, see `ValueType.take_apart` for that.
    """

    def register_function(to_disk: Any) -> Any:
        for cls in types:
            values: Any = copy(VALUE_TYPES[cls])
            values.to_disk = to_disk
            VALUE_TYPES.register(cls, values)
        return to_disk

    return register_function


def find_culprit(state: Any) -> Any:
    """The first value in a state, or in the lists of it, that cannot be pickled; or the state."""
    for value in state if isinstance(state, (tuple, list)) else ():
        try:
            Writer(io.BytesIO(), []).dump(value)
        except Exception:
            return find_culprit(value)
    return state


def find_comm(arguments: Iterable[Any]) -> Any:
    """The communicator of the first of some arguments that has one; or None."""
    found = (VALUE_TYPES[type(value)].comm(value) for value in arguments)
    return next((comm for comm in found if comm is not None), None)

"""Arrays that are spread over ranks, and a header, in files that are complete or not there.

A *part* is what one rank holds: arrays by name. Each may have a `start`, the index in the whole where it begins;
without one it is taken for some rows of the whole, or for the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
import json
import os
import stat
from typing import Any, TypeVar

import numpy

from ..core.stdlib.operators import Array, Shape
from ..core.together import together
from .files import Path, draft, replacing, settle

T = TypeVar("T")
Start = Shape | None
Place = tuple[Shape, Start]  # the shape of an array, and where in the whole it begins

FORMAT = 2


class StateError(ValueError):
    """A saved state cannot be used: it is damaged, or of another problem."""


def shard_name(path: str, rank: int, generation: str) -> str:
    """The name of the file beside `path` with the part of a rank above 0."""
    return f"{path}.rank{rank}.{generation}.npz"


def on_first(comm: Any, action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, or its error, on all ranks. Collective."""
    if comm is None or comm.size == 1:
        return action()
    from .mpi import on_root

    return on_root(comm, action)


def save_parts(
    path: Path, comm: Any, header: Mapping[str, Any], arrays: Mapping[str, Array], starts: Mapping[str, Start]
) -> None:
    """Save the arrays of all ranks, and the header of rank 0, to the file `path` and others beside it. Collective.

    Raises an error on all ranks if one of them cannot write; what was saved before is then as it was.
    """
    path = os.fspath(path)
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    layouts = _find_layouts(comm, {name: (array.shape, starts[name]) for name, array in arrays.items()})
    old = on_first(comm, lambda: _generation_of(path))
    generation = "b" if old[0] == "a" else "a"
    save = on_first(comm, lambda: os.urandom(16).hex())
    own: dict[str, Any] = dict(format=FORMAT, save=save, generation=generation, ranks=size, layouts=layouts)
    own["dtypes"] = {name: array.dtype.str for name, array in arrays.items()}
    # Write this rank's part, and have the first one moved when all are there
    if rank:
        label = json.dumps(dict(save=save, rank=rank))
        together(comm, lambda: _write_npz(shard_name(path, rank, generation), part=label, **arrays))
        together(comm, lambda: None)
    else:
        # Write the first part, and move it to its place when all are there
        beside: list[str] = []

        def write() -> None:
            name, descriptor = draft(path)
            beside.append(name)
            with open(descriptor, "wb") as file:
                _fill(file, state=json.dumps({**header, **own}, default=_as_json), **arrays)

        try:
            together(comm, write)
            together(comm, lambda: settle(beside[0], path))
        except BaseException:
            for name in beside:
                _remove(name)
            raise
    for other in range(rank or size, old[1], size):
        _remove(shard_name(path, other, old[0]))


def _write_npz(path: str, **members: Any) -> None:
    with replacing(path) as file:
        _fill(file, **members)


def _fill(file: Any, **members: Any) -> None:
    arrays: dict[str, Any] = {name: numpy.asarray(value) for name, value in members.items()}
    numpy.savez(file, **arrays)
    file.flush()
    os.fsync(file.fileno())


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _as_json(value: Any) -> Any:
    """A number or array of NumPy, or of a library with the same methods, for a file of text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(
        f"a state can keep numbers and lists of numbers besides vectors, not {type(value).__name__}"
    )


def _generation_of(path: str) -> tuple[str, int]:
    """The generation and the number of ranks of a file that is there; if it is none of ours, no ranks."""
    try:
        header = _read_header(path)
        return header["generation"], header["ranks"]
    except (StateError, OSError):
        return "b", 0


def _find_layouts(comm: Any, places: Mapping[str, Place]) -> dict[str, Any]:
    """The places of all arrays on all ranks: a list of those that differ, and which one each array has. Collective."""
    known: list[Place] = []
    for place in places.values():
        if place not in known:
            known.append(place)
    mine = [_plain(place) for place in known], {name: known.index(place) for name, place in places.items()}
    # Put the places of all ranks together
    if comm is None or comm.size == 1:
        return dict(places=[[place] for place in mine[0]], of=mine[1])
    everybody = comm.allgather((mine, list(places)))
    if any(names != everybody[0][1] for _, names in everybody):
        raise ValueError(f"all ranks must save the same arrays, not {[names for _, names in everybody]}")
    by_name = {
        name: tuple(json.dumps(theirs[theirs_of[name]]) for (theirs, theirs_of), _ in everybody)
        for name in places
    }
    kinds = list(dict.fromkeys(by_name.values()))
    of = {name: kinds.index(kind) for name, kind in by_name.items()}
    return dict(places=[[json.loads(place) for place in kind] for kind in kinds], of=of)


def _plain(place: Place) -> list[Any]:
    shape, start = place
    return [[int(n) for n in shape], None if start is None else [int(n) for n in start]]


def _open(path: str) -> Any:
    """The arrays of an npz file, to be read one by one."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise StateError(f"{path} is no file, but a folder or a device")
        return numpy.load(path, allow_pickle=False)
    except StateError:
        raise
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise StateError(f"{path} holds no state: it is no .npz file, or damaged ({error})") from error


def _member(path: str, file: Any, name: str) -> Array:
    """One array of an open file."""
    try:
        array: Array = file[name]
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        raise StateError(f"{path} is damaged: {name!r} in it cannot be read ({words})") from error
    return array


def _text(path: str, name: str) -> Any:
    """The JSON string of this name in a file, decoded."""
    file = _open(path)
    if not isinstance(file, numpy.lib.npyio.NpzFile):
        raise StateError(f"{path} holds no state of a minimisation, but one array")
    with file:
        if name not in file.files:
            found = ", ".join(file.files) or "nothing"
            raise StateError(f"{path} holds no state of a minimisation, but {found}")
        text = _member(path, file, name)
    try:
        return json.loads(str(text.item()))
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path} is damaged: {name!r} in it is no header ({error})") from error


def _read_header(path: str) -> dict[str, Any]:
    """The header in the file of rank 0, of which the entries that are ours are as they should be."""
    header = _text(path, "state")
    if type(header) is not dict:
        raise StateError(f"{path} is damaged: its header is no dictionary")
    if header.get("format") != FORMAT:
        raise StateError(
            f"{path} was written by another version: its format is {header.get('format')!r}, expected {FORMAT}"
        )
    # See that the header makes sense
    try:
        ranks, layouts = header["ranks"], header["layouts"]
        sound = (
            type(ranks) is int
            and ranks > 0
            and header["generation"] in ("a", "b")
            and type(header["save"]) is str
            and all(len(kind) == ranks and all(map(_is_place, kind)) for kind in layouts["places"])
            and all(type(i) is int and 0 <= i < len(layouts["places"]) for i in layouts["of"].values())
            and all(numpy.dtype(header["dtypes"][name]).kind in "fc" for name in layouts["of"])
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StateError(f"{path} is damaged: its header makes no sense ({error!r})") from error
    if not sound:
        raise StateError(f"{path} is damaged: its header makes no sense")
    return header


def _is_place(place: Any) -> bool:
    shape, start = place
    numbers = [*shape, *(start or [])]
    return all(type(n) is int and n >= 0 for n in numbers) and start in (None, []) or len(start) == len(shape)


class Parts:
    """What :func:`save_parts` has written, on any number of ranks. Collective, as all of its methods.

    Attributes: `header`, the dictionary of rank 0.
    """

    def __init__(self, path: Path, comm: Any) -> None:
        self.path, self.comm = os.fspath(path), comm
        self.header = on_first(comm, lambda: _read_header(self.path))

    def read(self, wanted: Mapping[str, Place], kinds: Mapping[str, str]) -> dict[str, Array]:
        """The arrays of these names, each as much of it as belongs to the given place.

        `kinds` has the kind of numbers of each, as in ``dtype.kind``. All are finite.
        """
        for name in wanted:
            if name not in self.header["dtypes"]:
                raise StateError(f"{self.path} is damaged: it has no array {name!r}")
            if numpy.dtype(self.header["dtypes"][name]).kind != kinds[name]:
                words = "complex" if kinds[name] == "c" else "real"
                raise StateError(
                    f"{self.path} has other numbers: {name!r} must be {words}, not {self.header['dtypes'][name]}"
                )
        places = {name: self._in_place(name, place) for name, place in wanted.items()}
        return together(self.comm, lambda: self._assemble(places))

    def _layout(self, name: str) -> list[Place]:
        """Where the array lies on the ranks that have saved it."""
        layouts = self.header["layouts"]
        return [
            (tuple(shape), None if start is None else tuple(start))
            for shape, start in layouts["places"][layouts["of"][name]]
        ]

    def _in_place(self, name: str, place: Place) -> tuple[Place, list[tuple[int, Place]]]:
        """A place with a start, and those of the saved parts, by rank, that have something of it."""
        saved, (shape, start) = self._layout(name), (tuple(place[0]), place[1])
        if start is not None or any(theirs is not None for _, theirs in saved):
            parts = list(enumerate(saved))
            return (shape, start), parts
        # Tell rows from copies
        alone = self.comm is None or self.comm.size == 1
        everybody = [shape] if alone else self.comm.allgather(shape)
        rank = 0 if self.comm is None else self.comm.rank
        if everybody == [theirs for theirs, _ in saved]:
            return (shape, (0,) * len(shape)), [(rank, (shape, (0,) * len(shape)))]
        if all(theirs == everybody[0] for theirs in (*everybody, *(shape for shape, _ in saved))):
            return (shape, (0,) * len(shape)), [(0, (shape, (0,) * len(shape)))]
        # Number the rows
        rows = (
            [theirs[0] if theirs else 1 for theirs in everybody],
            [theirs[0] if theirs else 1 for theirs, _ in saved],
        )
        if sum(rows[0]) != sum(rows[1]) or {t[1:] for t in everybody} != {t[1:] for t, _ in saved}:
            raise StateError(
                f"{self.path} was saved for other arrays: {name!r} has the shapes {[t for t, _ in saved]} on its ranks, "
                f"expected {everybody}"
            )
        begin = (sum(rows[0][:rank]),) + (0,) * (len(shape) - 1)
        starts = [(sum(rows[1][:r]),) + (0,) * (len(shape) - 1) for r in range(len(saved))]
        return (shape, begin), [(r, (theirs, starts[r])) for r, (theirs, _) in enumerate(saved)]

    def _assemble(self, places: Mapping[str, tuple[Place, list[tuple[int, Place]]]]) -> dict[str, Array]:
        """Read the pieces of all arrays, file by file."""
        dtypes = self.header["dtypes"]
        found = {name: numpy.empty(shape, dtypes[name]) for name, ((shape, _), _) in places.items()}
        filled = dict.fromkeys(places, 0)
        for rank in range(self.header["ranks"]):
            # Find what of this part is ours
            pieces: dict[str, Any] = {}
            for name, ((shape, start), saved) in places.items():
                for theirs, (their_shape, their_start) in saved:
                    if theirs == rank:
                        piece = _overlap(shape, start, their_shape, their_start)
                        if piece:
                            pieces[name] = (*piece, their_shape)
            if not pieces:
                continue
            path, file = self._part(rank)
            with file:
                for name, (there, here, shape) in pieces.items():
                    array = _member(path, file, name)
                    _check(path, name, array, shape, dtypes[name])
                    found[name][here] = array[there]
                    filled[name] += found[name][here].size
        # See that nothing is missing
        for name, ((shape, _), saved) in places.items():
            if filled[name] != found[name].size:
                shapes = [theirs for _, (theirs, _) in saved]
                raise StateError(
                    f"{self.path} was saved for other arrays: {name!r} has the shapes {shapes} on its ranks, expected {shape}"
                )
        return found

    def _part(self, rank: int) -> tuple[str, Any]:
        """The file of a rank, whose label is as it should be."""
        path = shard_name(self.path, rank, self.header["generation"]) if rank else self.path
        label = _text(path, "part" if rank else "state")
        if (
            label["save"] != self.header["save"]
            or rank
            and label != dict(save=self.header["save"], rank=rank)
        ):
            raise StateError(
                f"{path} does not belong to {self.path}: it was saved at another time, or by another rank"
            )
        return path, _open(path)


def _overlap(shape: Shape, start: Start, theirs: Shape, their_start: Start) -> Any:
    """Where the common part of two pieces lies in theirs, and in ours; None if there is none."""
    if start is None or their_start is None or len(shape) != len(theirs):
        return None
    low = [max(a, b) for a, b in zip(start, their_start)]
    high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, their_start, theirs)]
    if any(a >= b for a, b in zip(low, high)):
        return None
    there = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, their_start))
    return there, tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start))


def _check(path: str, name: str, array: Array, shape: Shape, dtype: str) -> None:
    """Raise StateError unless an array of a file is what the header says, and finite."""
    if array.shape != shape or array.dtype.str != dtype:
        told = f"{array.dtype.str}{list(array.shape)}, expected {dtype}{list(shape)}"
        raise StateError(f"{path} is damaged: {name!r} is of the type and shape {told}")
    if not numpy.isfinite(array).all():
        raise StateError(f"{path} is damaged: {name!r} has numbers that are not finite")

"""Data files of many formats, of which each rank reads its part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy

from vmad_lit.contrib.configuration import file_format
from vmad_lit.core.error import did_you_mean, needed_for
from vmad_lit.core.stdlib.operators import Array, Shape
from vmad_lit.core.traffic import count_object
from vmad_lit.lib.catalogue import hdf5
from vmad_lit.lib.mesh import ParticleMesh, RealField
from vmad_lit.lib.mpi import MPI, on_root, run_together

Index = tuple[slice, ...]


class BadData(ValueError):
    """A file is not what it should be; `key` is the key of the configuration that is to blame."""

    def __init__(self, sentence: str, key: str = "data.file") -> None:
        super().__init__(sentence, key)

    @property
    def sentence(self) -> str:
        """What is wrong."""
        return str(self.args[0])

    @property
    def key(self) -> str:
        """Section and key."""
        return str(self.args[1])

    def __str__(self) -> str:
        return self.sentence


class ArrayInFile(NamedTuple):
    """What is known of an array before it is read."""

    shape: Shape
    dtype: numpy.dtype[Any]


class DataFile:
    """An open file with named arrays; the base of the formats.

    Attributes
    ----------
    path : str
    arrays : dict of ArrayInFile
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.arrays: dict[str, ArrayInFile] = {}
        self.open()

    def open(self) -> None:
        """Open the file, and fill `arrays`."""
        raise NotImplementedError

    def read(self, name: str, index: Index) -> Any:
        """A part of an array."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""

    def find(self, key: str, name: str | None) -> str:
        """The name of an array that is there; without one, that of the only array."""
        if name is None and len(self.arrays) == 1:
            return next(iter(self.arrays))
        if name is None:
            raise BadData(f"{self.path} has several arrays, say which: {', '.join(self.arrays)}", key)
        if name not in self.arrays:
            raise BadData(f"{self.path} has no {name!r}{did_you_mean(name, self.arrays)}", key)
        return name


class NpyFile(DataFile):
    """One array in NumPy's format, mapped into memory; if it is structured, its fields are arrays."""

    def open(self) -> None:
        self.map = numpy.load(self.path, mmap_mode="r", allow_pickle=False)
        if not isinstance(self.map, numpy.ndarray):
            raise ValueError("it has several arrays, as an .npz has")
        for name in self.map.dtype.names or ("",):
            array = self.map[name] if name else self.map
            self.arrays[name] = ArrayInFile(array.shape, array.dtype)

    def find(self, key: str, name: str | None) -> str:
        return "" if self.map.dtype.names is None else super().find(key, name)

    def read(self, name: str, index: Index) -> Any:
        return (self.map[name] if name else self.map)[index]


class NpzFile(DataFile):
    """Several arrays in NumPy's format; of a compressed archive each rank reads a whole array to have its part."""

    def open(self) -> None:
        self.file = numpy.load(self.path, allow_pickle=False)
        if isinstance(self.file, numpy.ndarray):
            raise ValueError("it has one array, as an .npy has")
        for name in self.file.files:
            with self.file.zip.open(name + ".npy") as member:
                version = numpy.lib.format.read_magic(member)
                readers = {1: numpy.lib.format.read_array_header_1_0}
                reader = readers.get(version[0], numpy.lib.format.read_array_header_2_0)
                shape, _, dtype = reader(member)
            self.arrays[name] = ArrayInFile(shape, dtype)

    def read(self, name: str, index: Index) -> Any:
        return self.file[name][index]

    def close(self) -> None:
        self.file.close()


class Hdf5File(DataFile):
    """Data sets in HDF5, by their paths, such as `particles/Position`."""

    def open(self) -> None:
        h5py = hdf5()
        self.file = h5py.File(self.path, "r")

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                self.arrays[name] = ArrayInFile(item.shape or (), item.dtype)

        self.file.visititems(visit)

    def read(self, name: str, index: Index) -> Any:
        return self.file[name][index]

    def close(self) -> None:
        self.file.close()


class BigFile(DataFile):
    """Blocks of a BigFile, which is a folder. A mesh is a block of its cells in a row, with its shape beside it."""

    def open(self) -> None:
        with needed_for("BigFiles", extra="data"):
            import bigfile
        self.file = bigfile.File(self.path)
        for name in self.file.blocks:
            block = self.file[name]
            base = block.dtype
            shape = (block.size, *base.shape)
            if "ndarray.shape" in block.attrs:
                shape = tuple(map(int, block.attrs["ndarray.shape"]))
            self.arrays[name] = ArrayInFile(shape, base.base)

    def read(self, name: str, index: Index) -> Any:
        block, shape = self.file[name], self.arrays[name].shape
        begin, end, _ = index[0].indices(shape[0])
        if shape[0] == block.size:
            return block[begin:end][(slice(None), *index[1:])]
        plane = int(numpy.prod(shape[1:]))
        return block[begin * plane : end * plane].reshape(-1, *shape[1:])[(slice(None), *index[1:])]

    def close(self) -> None:
        self.file.close()


class FitsFile(DataFile):
    """Images by the names or numbers of their extensions, and columns of tables, as `column` or `EXTENSION/column`."""

    def open(self) -> None:
        with needed_for("FITS files", extra="data"):
            from astropy.io import fits
        self.file = fits.open(self.path, memmap=True)
        self.places: dict[str, tuple[int, str | None]] = {}

        said = [unit.name for unit in self.file]
        for number, unit in enumerate(self.file):
            alone = said.count(unit.name) == 1 and unit.name not in ("", "PRIMARY")
            name = unit.name if alone else str(number)
            if isinstance(unit, (fits.BinTableHDU, fits.TableHDU)) and not isinstance(
                unit, fits.CompImageHDU
            ):
                for column in unit.columns:
                    array = unit.data[:0][column.name]
                    found = ArrayInFile((len(unit.data), *array.shape[1:]), array.dtype)
                    self.places[f"{name}/{column.name}"] = number, column.name
                    self.arrays[f"{name}/{column.name}"] = found
            elif unit.shape:
                self.places[name] = number, None
                self.arrays[name] = ArrayInFile(tuple(unit.shape), unit.section[:1].dtype)

    def find(self, key: str, name: str | None) -> str:
        ends = [full for full, (_, column) in self.places.items() if column is not None and column == name]
        if name in self.arrays or not ends:
            return super().find(key, name)
        if len(ends) > 1:
            told = f"{self.path} has {name!r} in {len(ends)} tables, say in which: {', '.join(ends)}"
            raise BadData(told, key)
        return ends[0]

    def read(self, name: str, index: Index) -> Any:
        number, column = self.places[name]
        if column is None:
            return self.file[number].section[index]
        return self.file[number].data[index[0]][column][(slice(None), *index[1:])]

    def close(self) -> None:
        self.file.close()


READERS: dict[str, type[DataFile]] = {
    "npy": NpyFile,
    "npz": NpzFile,
    "hdf5": Hdf5File,
    "bigfile": BigFile,
    "fits": FitsFile,
}


@contextmanager
def open_data(path: str, kind: str = "auto", key: str = "data.file") -> Iterator[DataFile]:
    """An open file of any of the formats.

    Raises
    ------
    BadData
        If it cannot be read as what it is said to be.
    """
    kind = file_format(path, kind) or "npy"
    try:
        file = READERS[kind](path)
    except ImportError:
        raise
    except Exception as error:  # readers of files from anywhere raise anything
        raise BadData(f"{path} cannot be read as {kind}: {error}", key) from None
    try:
        yield file
    finally:
        with suppress(Exception):  # what maps memory may be in use still
            file.close()


def look_at(file: DataFile, key: str, name: str | None, shape: Sequence[int | None]) -> str:
    """The name of an array of real numbers of a shape, in which None stands for any length.

    Raises
    ------
    BadData
    """
    name = file.find(key, name)
    array = file.arrays[name]
    told = f"{file.path}{f', {name!r}' if name else ''}"
    if array.dtype.kind not in "fiu":
        raise BadData(f"{told}: expected real numbers, got the type {array.dtype}", key)
    if len(array.shape) != len(shape) or any(m not in (None, n) for n, m in zip(array.shape, shape)):
        wanted = ", ".join("n" if n is None else str(n) for n in shape)
        raise BadData(f"{told}: expected the shape ({wanted}), got {tuple(array.shape)}", key)
    return name


def check_numbers(comm: MPI.Comm, values: Array, good: Array, offset: Sequence[int], what: str) -> str | None:
    """What is wrong with those of the `values`, this rank's part from `offset` on, that are not `good`, in a sentence;
    None if all are good on all ranks. Collective."""
    bad = numpy.argwhere(~good)
    first = tuple(int(i + o) for i, o in zip(bad[0], offset)) if len(bad) else None
    mine = (len(bad), first, values[tuple(bad[0])].tolist() if len(bad) else None)
    count_object(comm, mine)
    found = [told for told in comm.allgather(mine) if told[0]]
    if not found:
        return None
    _, where, value = min(found, key=lambda told: told[1])
    index = where[0] if len(where) == 1 else where
    return f"{sum(told[0] for told in found)} {what}, the first at index {index}: {value}"


def look_at_mesh(path: str, kind: str, section: str, name: str | None, shape: Sequence[int]) -> str:
    """The name of an array of the shape of a mesh, in a file that a section of a configuration names. For one rank."""
    with open_data(path, kind, f"{section}.file") as file:
        return look_at(file, f"{section}.array", name, shape)


def read_mesh(path: str, section: str, space: Any, pm: ParticleMesh, where: Array | None = None) -> RealField:
    """The real field in a file; each rank reads its part. Collective.

    Parameters
    ----------
    path : str
    section : str, that of the configuration, for messages
    space : with `format` and `array`
    pm : ParticleMesh
    where : array of truth values, optional
        The cells of this rank that matter; in others any value will do.

    Raises
    ------
    BadData, on all ranks
    """
    key = f"{section}.array"
    shape = tuple(int(n) for n in pm.Nmesh)

    def read() -> RealField:
        field = pm.create(type="real")
        with open_data(path, space.format, f"{section}.file") as file:
            name = look_at(file, key, space.array, shape)
            field[...] = file.read(name, field.slices)
        return field

    on_root(pm.comm, lambda: look_at_mesh(path, space.format, section, space.array, shape))
    field = run_together(pm.comm, read)
    offset = [part.start for part in field.slices]
    good = numpy.isfinite(field.value) if where is None else numpy.isfinite(field.value) | ~where
    if told := check_numbers(pm.comm, field.value, good, offset, "values are not finite"):
        hint = (
            "where the mask is above 0" if where is not None else "if nothing was observed there, give a mask"
        )
        raise BadData(f"{path}: {told}{'; ' * (where is None) or ' '}{hint}", key)
    return field


def names_of(position: str | Sequence[str] | None) -> list[str | None]:
    """The columns of positions, one or three; None stands for the only array in a file."""
    return [position] if position is None or isinstance(position, str) else [*position]


def look_at_columns(path: str, kind: str, names: Sequence[str | None], weight: str | None) -> int:
    """The number of rows of a catalogue that has these columns. For one rank."""
    width: list[int | None] = [None, 3] if len(names) == 1 else [None]
    with open_data(path, kind) as file:
        found = [look_at(file, "data.position", name, width) for name in names]
        found += [look_at(file, "data.weight", weight, [None])] if weight else []
        lengths = {name: file.arrays[name].shape[0] for name in found}
    if len(set(lengths.values())) > 1:
        raise BadData(f"{path}: the columns have different lengths, {lengths}", "data.position")
    if not lengths[found[0]]:
        raise BadData(f"{path}: the catalogue is empty", "data.file")
    return lengths[found[0]]


def read_columns(
    path: str, kind: str, position: str | Sequence[str] | None, weight: str | None, comm: MPI.Comm
) -> tuple[Array, Array | None, int]:
    """This rank's rows of a catalogue: positions (n, 3) and weights (n,), as they are in the file, and the number of
    the first of them. Collective.

    Raises
    ------
    BadData, on all ranks
    """
    names = names_of(position)

    def read() -> tuple[Array, Array | None]:
        with open_data(path, kind) as file:
            parts = [file.read(file.find("data.position", name), rows) for name in names]
            x = numpy.array(parts[0] if len(names) == 1 else numpy.stack(parts, axis=-1), dtype="f8")
            w = numpy.array(file.read(file.find("data.weight", weight), rows), dtype="f8") if weight else None
        return x, w

    n = on_root(comm, lambda: look_at_columns(path, kind, names, weight))
    begin = comm.rank * n // comm.size
    rows = (slice(begin, (comm.rank + 1) * n // comm.size),)
    return *run_together(comm, read), begin

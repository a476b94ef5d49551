"""Particles and fields in HDF5 files, written by all ranks, with plain h5py.

A file has columns of a catalogue in its group `particles`, meshes in its group `fields`, and attributes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, TypeAlias, TypeVar

import numpy
from numpy.typing import ArrayLike, DTypeLike

from vmad_lit.core.arguments import one_of, plain_array, positive, real_array, real_number, whole_number
from vmad_lit.core.error import needed_for
from vmad_lit.core.placement import same_ranks
from vmad_lit.core.stdlib.operators import Array, Shape
from vmad_lit.core.traffic import count_object
from vmad_lit.lib.files import draft, settle
from vmad_lit.lib.mesh import ParticleMesh
from vmad_lit.lib.mpi import add_up, fail_together, on_root, run_together
from vmad_lit.lib.nbody import FastPMSimulation
from vmad_lit.lib.noise import uniform_numbers
from vmad_lit.lib.tracers import velocity

with needed_for("catalogues of particles", extra="mesh"):
    from mpi4py import MPI
    from pmesh.pm import RealField

T = TypeVar("T")
Lattice = Sequence[int] | Array  # the number of points along each axis
Fields: TypeAlias = Mapping[str, RealField]

CHUNK = 1 << 22  # bytes that a rank converts and writes at a time


def hdf5() -> Any:
    """The module h5py."""
    with needed_for("HDF5 files", extra="output"):
        import h5py
    return h5py


def lattice_ids(q: ArrayLike, Nmesh: Lattice, BoxSize: ArrayLike) -> Array:
    """The number of each particle's point on a lattice of Nmesh points, from its position (N, ndim)."""
    shape = tuple(whole_number("Nmesh", n, least=1) for n in numpy.atleast_1d(plain_array("Nmesh", Nmesh)))
    q = real_array("q", q, shape=(None, len(shape)))
    box = real_array("BoxSize", BoxSize, above=0)
    if box.shape not in ((), (1,), (len(shape),)):
        raise ValueError(f"BoxSize must be one number or {len(shape)}, not of the shape {box.shape}")
    cells = numpy.floor(q / (box / shape) + 1e-5).astype("i8")
    return numpy.ravel_multi_index(tuple(cells.T), shape, mode="wrap").astype("i8")


def chosen(ids: ArrayLike, fraction: float, seed: int = 0) -> Array:
    """Whether each particle belongs to a random subset of the given fraction, decided by its ID alone."""
    fraction = real_number("fraction", fraction, least=0, most=1)
    return uniform_numbers(ids, seed, "subset of particles") < fraction


def save_snapshot(
    path: str,
    sim: FastPMSimulation,
    dx: Array,
    p: Array,
    a: float | None = None,
    lattice: Lattice | None = None,
    fraction: float = 1.0,
    dtype: DTypeLike = "f4",
    fields: Fields | None = None,
    **attributes: Any,
) -> None:
    """Write the particles of a FastPM simulation to an HDF5 file. Collective.

    Columns are Position (Mpc/h, in the box), Velocity (peculiar, km/s) and ID.

    Parameters
    ----------
    sim : FastPMSimulation
    dx, p : (N, ndim) displacements and momenta
    a : scale factor, by default that of the last stage
    lattice : number of points of the lattice of `sim.q` along each axis, by default that of `sim.pm`
    fraction : how many of the particles to keep
    dtype : 'f4' or 'f8', the precision in the file
    fields : dict of RealFields to be written along
    attributes : more attributes of the file
    """

    pm, comm = sim.pm, sim.pm.comm

    def check() -> tuple[float, Array, Array, list[Array]]:
        moment = positive("a", sim.stages[-1] if a is None else a)
        rows = [real_array(name, v, shape=sim.q.shape) for name, v in dict(dx=dx, p=p).items()]
        one_of("dtype", numpy.dtype(dtype).str[1:], ("f4", "f8"))
        ids = lattice_ids(sim.q, pm.Nmesh if lattice is None else lattice, pm.BoxSize)
        return moment, ids, chosen(ids, fraction), rows

    a, ids, keep, (dx, p) = run_together(comm, check)
    # Make the columns of a snapshot
    x = ((sim.q[keep] + dx[keep]) % pm.BoxSize).astype(dtype)
    x[x >= pm.BoxSize.astype(dtype)] = 0  # the last number below the box may be rounded to it
    columns = dict(Position=x, Velocity=velocity(p[keep], a), ID=ids[keep])
    # Describe the snapshot
    attributes = dict(
        BoxSize=pm.BoxSize,
        Nmesh=pm.Nmesh,
        ScaleFactor=a,
        Om0=float(sim.pt.Om0),
        Fraction=fraction,
        Particles=add_up(comm, len(ids)),
        UnitLength="Mpc/h",
        UnitVelocity="km/s",
        **attributes,
    )
    save(path, comm, columns, fields, attributes, dtype)


class Block:
    """This rank's part of a distributed array: the whole shape, where the part begins, and its values."""

    def __init__(self, shape: Shape, start: Shape, values: Array, dtype: numpy.dtype[Any]) -> None:
        self.shape, self.start, self.values, self.dtype = shape, start, values, dtype

    @classmethod
    def of_rows(cls, comm: MPI.Comm, values: Array, dtype: numpy.dtype[Any]) -> Block:
        count_object(comm, len(values))
        lengths = comm.allgather(len(values))
        start = (sum(lengths[: comm.rank]),) + (0,) * (values.ndim - 1)
        return cls((sum(lengths), *values.shape[1:]), start, values, dtype)

    @classmethod
    def of_field(cls, field: RealField, dtype: numpy.dtype[Any]) -> Block:
        start = tuple(part.start for part in field.slices)
        return cls(tuple(int(n) for n in field.Nmesh), start, field.value, dtype)

    # Write the bytes of a block
    def write(self, file: IO[bytes], offset: int) -> None:
        """Write the block into an open file, in which the whole array begins at byte `offset`."""
        if self.values.size == 0:
            return
        partial = [d for d, n in enumerate(self.shape) if self.values.shape[d] != n]
        axis = max(partial, default=0)
        strides = numpy.cumprod([1, *self.shape[:0:-1]])[::-1]
        for index in numpy.ndindex(*self.values.shape[:axis]):
            first = [s + i for s, i in zip(self.start, index)] + list(self.start[axis:])
            file.seek(offset + int(numpy.dot(first, strides)) * self.dtype.itemsize)
            run = self.values[index]
            rows = max(1, CHUNK // max(1, run[:1].size * self.dtype.itemsize))
            for begin in range(0, len(run), rows):
                file.write(numpy.ascontiguousarray(run[begin : begin + rows], dtype=self.dtype).tobytes())


def write_together(
    path: str, comm: MPI.Comm, lay_out: Callable[[str], T], write: Callable[[IO[bytes], T], None]
) -> None:
    """Write a file of which each rank writes a part. Collective.

    `lay_out`, called on rank 0 with the name of an empty file, writes what comes first and returns what all ranks must
    know; `write`, on all ranks, gets that and the open file. Raises OSError on all ranks if one of them cannot write.
    """

    # Begin a file on rank 0
    def begin() -> tuple[str, T]:
        beside, descriptor = draft(path)
        os.close(descriptor)
        try:
            return beside, lay_out(beside)
        except BaseException:
            os.unlink(beside)
            raise

    beside, plan = on_root(comm, begin)

    # Fill in this rank's bytes
    def fill() -> None:
        with open(os.open(beside, os.O_RDWR | getattr(os, "O_BINARY", 0)), "r+b") as file:
            write(file, plan)
            file.flush()
            os.fsync(file.fileno())

    # Move the file to its place when all have written
    try:
        run_together(comm, fill)
        on_root(comm, lambda: settle(beside, path))
    except BaseException:
        if comm.rank == 0:
            with suppress(OSError):
                os.unlink(beside)
        raise


def save(
    path: str,
    comm: MPI.Comm,
    columns: Mapping[str, Any] | None = None,
    fields: Fields | None = None,
    attributes: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Write columns of a catalogue and fields to an HDF5 file. Collective.

    Parameters
    ----------
    path : str, the same on all ranks
    comm : MPI communicator
    columns : dict of arrays (N, ...)
        This rank's rows, as many in each column; names, types and further axes are the same on all ranks.
    fields : dict of RealFields
    attributes : dict of numbers, arrays and strings, the same on all ranks
        Under the name of a data set, such as `fields/density`, there may be a dictionary of its own attributes.
    dtype : 'f4' or 'f8', optional
        Write floating point data in this precision; by default as they are.

    Raises
    ------
    ImportError, ValueError, TypeError, OSError
        On all ranks, even if only one of them has a reason.
    """

    run_together(comm, hdf5)
    blocks = _blocks(comm, columns or {}, fields or {}, dtype)

    def write(file: IO[bytes], offsets: dict[str, int | None]) -> None:
        for name, block in blocks.items():
            if (begin := offsets[name]) is not None:
                block.write(file, begin)

    write_together(path, comm, lambda beside: _lay_out(beside, blocks, attributes or {}), write)


def _lay_out(path: str, blocks: Mapping[str, Block], attributes: Mapping[str, Any]) -> dict[str, int | None]:
    """Make a file with data sets for the blocks; tells where their bytes begin, None if there are none."""
    h5py = hdf5()
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w") as file:
        offsets = {
            name: file.create_dataset(name, b.shape, b.dtype, dcpl=creation.copy()).id.get_offset()
            for name, b in blocks.items()
        }
        for name, value in attributes.items():
            if isinstance(value, Mapping):
                file[name].attrs.update(value)
            else:
                file.attrs[name] = value
    return offsets


def _blocks(
    comm: MPI.Comm, columns: Mapping[str, Any], fields: Fields, dtype: DTypeLike | None
) -> dict[str, Block]:
    """The blocks of all columns and fields by their names in the file, checked to fit on all ranks."""
    columns = run_together(comm, lambda: _check_names(columns, fields, dtype))
    # Find what is wrong on this rank
    complaint = None
    if len({len(values) if values.ndim else -1 for values in columns.values()}) > 1:
        complaint = f"columns must have the same number of rows, not {_shapes(columns)}"
    for name, values in columns.items():
        if values.ndim == 0 or values.dtype.kind not in "biuf":
            complaint = (
                f"column {name!r} must be an array of numbers with a row for each particle, not {values!r}"
            )
    for name, field in fields.items():
        if not isinstance(field, RealField):
            complaint = f"field {name!r} must be a RealField, not a {type(field).__name__}"
        elif not same_ranks(field.pm.comm, comm):
            complaint = (
                f"field {name!r} is shared among other ranks than those that write: another communicator"
            )
    fail_together(comm, complaint)
    # Compare what the ranks have
    mine = [(name, v.dtype.str, v.shape[1:]) for name, v in columns.items()], list(fields)
    count_object(comm, mine)
    kinds = comm.allgather(mine)
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"all ranks must write the same columns and fields; ranks 0, 1, .. have {kinds}")
    blocks = {f"particles/{name}": Block.of_rows(comm, v, _in_file(v, dtype)) for name, v in columns.items()}
    blocks.update((f"fields/{name}", Block.of_field(f, _in_file(f, dtype))) for name, f in fields.items())
    return blocks


def _check_names(columns: Mapping[str, Any], fields: Fields, dtype: DTypeLike | None) -> dict[str, Array]:
    """The columns as arrays, after a look at their names, those of the fields, and the precision."""
    for name in (*columns, *fields):
        if not isinstance(name, str) or name in ("", ".") or "/" in name:
            raise ValueError(f"names of columns and fields must be words without '/', not {name!r}")
    if dtype is not None:
        one_of("dtype", numpy.dtype(dtype).str[1:], ("f4", "f8"))
    return {name: plain_array(f"column {name!r}", values) for name, values in columns.items()}


def _shapes(columns: Mapping[str, Array]) -> dict[str, Shape]:
    return {name: values.shape for name, values in columns.items()}


def _in_file(values: Any, dtype: DTypeLike | None) -> numpy.dtype[Any]:
    return numpy.dtype(dtype if dtype is not None and values.dtype.kind == "f" else values.dtype)


def load(
    path: str, comm: MPI.Comm, names: Sequence[str] | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read what `save` wrote, on any number of ranks: this rank's rows of the columns, and the attributes.

    `names` are the columns to read, by default all; numbers of half precision are widened. Collective.
    """
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of names of columns, such as [{names!r}], not one name")
    run_together(comm, hdf5)

    def read() -> tuple[dict[str, Array], dict[str, Any]]:
        with hdf5().File(path, "r") as file:
            group = file.get("particles", {})
            columns = {}
            for name in group if names is None else names:
                if name not in group:
                    raise KeyError(f"{path} has no column {name!r}, only {list(group)}")
                n = len(group[name])
                mine = group[name][comm.rank * n // comm.size : (comm.rank + 1) * n // comm.size]
                columns[name] = mine.astype("f4") if mine.dtype == "f2" else mine
            return columns, dict(file.attrs)

    return run_together(comm, read)


def load_field(path: str, name: str, pm: ParticleMesh) -> RealField:
    """Read a field that `save` wrote; each rank reads its own part. Collective."""
    run_together(pm.comm, hdf5)

    def read() -> RealField:
        with hdf5().File(path, "r") as file:
            group = file.get("fields", {})
            # See that the field is on this mesh
            if name not in group:
                raise KeyError(f"{path} has no field {name!r}, only {list(group)}")
            if group[name].shape != tuple(pm.Nmesh):
                raise ValueError(
                    f"{path}: the field {name!r} has the shape {group[name].shape}, "
                    f"expected the mesh {tuple(int(n) for n in pm.Nmesh)}"
                )
            if group[name].dtype.kind not in "biuf":
                raise TypeError(
                    f"{path}: the field {name!r} must be of real numbers, not {group[name].dtype}"
                )
            field = pm.create(type=RealField, value=0)
            if field.value.size:
                field[...] = group[name][field.slices]
            return field

    return run_together(pm.comm, read)

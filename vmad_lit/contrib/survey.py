"""What was observed, in files of many formats: densities, maps and catalogues, of which each rank reads its part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy

from vmad_lit.contrib.configuration import BIAS_KEYS, COSMOLOGY, UNITS, UNITS_WITHOUT_H
from vmad_lit.contrib.configuration import Configuration, file_format
from vmad_lit.contrib.cosmo4d import white_noise
from vmad_lit.contrib.forward import Density
from vmad_lit.contrib.likelihoods import Gaussian, Smoothed
from vmad_lit.contrib.posterior import Posterior
from vmad_lit.contrib.priors import LinearField, LogNormal, Normal, Numbers, TruncatedNormal, Uniform
from vmad_lit.core.error import did_you_mean, needed_for
from vmad_lit.core.stdlib.operators import Array, Shape
from vmad_lit.core.traffic import count_object
from vmad_lit.lib.catalogue import hdf5
from vmad_lit.lib.cosmology import Cosmology
from vmad_lit.lib.mesh import ParticleMesh, RealField
from vmad_lit.lib.mpi import MPI, add_up, on_root, run_together

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
                self.arrays[name] = ArrayInFile(item.shape, item.dtype)

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
        for number, unit in enumerate(self.file):
            name = unit.name if unit.name and unit.name != "PRIMARY" else str(number)
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
        ends = [full for full in self.arrays if name is not None and full.rpartition("/")[2] == name]
        return ends[0] if ends and name not in self.arrays else super().find(key, name)

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
    first = tuple(int(i) + o for i, o in zip(bad[0], offset)) if len(bad) else None
    mine = (len(bad), first, values[tuple(bad[0])].tolist() if len(bad) else None)
    count_object(comm, mine)
    found = [told for told in comm.allgather(mine) if told[0]]
    if not found:
        return None
    _, where, value = min(found, key=lambda told: told[1])
    index = where[0] if len(where) == 1 else where
    return f"{sum(told[0] for told in found)} {what}, the first at index {index}: {value}"


def read_mesh(path: str, section: str, space: Any, pm: ParticleMesh) -> RealField:
    """The real field in a file; each rank reads its part. Collective.

    Parameters
    ----------
    path : str
    section : str, that of the configuration, for messages
    space : with `format` and `array`
    pm : ParticleMesh

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

    on_root(pm.comm, lambda: _look(path, space.format, section, key, space.array, shape))
    field = run_together(pm.comm, read)
    offset = [part.start for part in field.slices]
    told = check_numbers(pm.comm, field.value, numpy.isfinite(field.value), offset, "values are not finite")
    if told:
        raise BadData(f"{path}: {told}", key)
    return field


def _look(path: str, kind: str, section: str, key: str, name: str | None, shape: Sequence[int | None]) -> str:
    with open_data(path, kind, f"{section}.file") as file:
        return look_at(file, key, name, shape)


def read_columns(
    path: str, kind: str, position: str | Sequence[str] | None, weight: str | None, comm: MPI.Comm
) -> tuple[Array, Array | None, int]:
    """This rank's rows of a catalogue: positions (n, 3) and weights (n,), as they are in the file, and the number of
    the first of them. Collective.

    Raises
    ------
    BadData, on all ranks
    """
    names: list[str | None] = [position] if position is None or isinstance(position, str) else [*position]
    width: list[int | None] = [None, 3] if len(names) == 1 else [None]

    def look() -> int:
        with open_data(path, kind) as file:
            found = [look_at(file, "data.position", name, width) for name in names]
            found += [look_at(file, "data.weight", weight, [None])] if weight else []
            lengths = {name: file.arrays[name].shape[0] for name in found}
        if len(set(lengths.values())) > 1:
            raise BadData(f"{path}: the columns have different lengths, {lengths}", "data.position")
        if not lengths[found[0]]:
            raise BadData(f"{path}: the catalogue is empty", "data.file")
        return lengths[found[0]]

    def read() -> tuple[Array, Array | None]:
        with open_data(path, kind) as file:
            parts = [file.read(file.find("data.position", name), rows) for name in names]
            x = numpy.array(parts[0] if len(names) == 1 else numpy.stack(parts, axis=-1), dtype="f8")
            w = numpy.array(file.read(file.find("data.weight", weight), rows), dtype="f8") if weight else None
        return x, w

    n = on_root(comm, look)
    begin = comm.rank * n // comm.size
    rows = (slice(begin, (comm.rank + 1) * n // comm.size),)
    return *run_together(comm, read), begin


def read_catalogue(c: Configuration, pm: ParticleMesh) -> tuple[RealField, float]:
    """The catalogue that a configuration names, painted with the window of `pm`, and the number of its rows, or of rows of
    equal weight that would scatter as much. Collective.

    Raises
    ------
    BadData, on all ranks
    """
    path, comm = c.path(c.data.file), pm.comm
    x, w, begin = read_columns(path, c.data.format, c.data.position, c.data.weight, comm)
    unit = UNITS[c.data.units] if c.data.units in UNITS else UNITS_WITHOUT_H[c.data.units] * c.cosmology.h
    x = (x - c.data.origin) * unit
    told = check_numbers(comm, x, numpy.isfinite(x), (begin, 0), "values are not finite")
    if told:
        raise BadData(f"{path}: {told}", "data.position")
    inside = ((x >= 0) & (x <= pm.BoxSize)).all(axis=1)
    told = check_numbers(comm, x, inside, (begin,), f"positions are outside the box {box_of(pm)}")
    if told:
        raise BadData(f"{path}: {told} Mpc/h; are origin and units right?", "data.position")
    if w is not None and (told := check_numbers(comm, w, w >= 0, (begin,), "weights are not 0 or more")):
        raise BadData(f"{path}: {told}", "data.weight")
    w = numpy.ones(len(x)) if w is None else w
    weight, squares = (float(add_up(comm, total)) for total in (w.sum(), (w**2).sum()))
    if not weight > 0:
        raise BadData(f"{path}: all weights are 0", "data.weight")
    return pm.paint(x, mass=w, layout=pm.decompose(x)), weight**2 / squares


def box_of(pm: ParticleMesh) -> str:
    """A box in words."""
    sides = [float(side) for side in pm.BoxSize]
    return f"[0, {sides[0]:g}]" if len(set(sides)) == 1 else f"of the sides {sides}"


KINDS: dict[str, type[Numbers]] = {
    "normal": Normal,
    "lognormal": LogNormal,
    "uniform": Uniform,
    "truncated": TruncatedNormal,
}


def prior_of(said: Mapping[str, Any]) -> Numbers:
    """The prior that a table of a configuration describes."""
    return KINDS[said["prior"]](**{name: value for name, value in said.items() if name != "prior"})


def free_parameters(c: Configuration) -> dict[str, Numbers]:
    """The parameters of the cosmology and of the bias that have priors in the place of numbers."""
    said = {**vars(c.cosmology), **{name: getattr(c.bias, name) for name in BIAS_KEYS[c.bias.kind]}}
    return {name: prior_of(value) for name, value in said.items() if isinstance(value, dict)}


def cosmology_of(c: Configuration, numbers: Mapping[str, Any]) -> Cosmology:
    """The cosmology of a configuration, with these numbers for parameters that are free."""
    return Cosmology(**{name: numbers.get(name, value) for name, value in vars(c.cosmology).items()})


def stages_of(c: Configuration) -> Array:
    """The scale factors of the evolution; none for linear theory."""
    end = [c.model.scale_factor]
    if c.model.evolution == "nbody":
        return numpy.linspace(c.model.start, end[0], c.model.steps + 1)
    return numpy.array(end if c.model.evolution == "lpt" else [])


def forward_model(c: Configuration, pm: ParticleMesh) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The priors of the linear modes and the free parameters, by name, and the function from them to the density."""
    free = free_parameters(c)
    cosmology = cosmology_of(c, {name: float(prior.value(0.0)) for name, prior in free.items()})
    depends = [name for name in COSMOLOGY if name in free]
    modes = LinearField(pm, cosmology, depends, c.model.transfer)
    # Leave out terms of the bias that vanish
    terms = [n for n in BIAS_KEYS[c.bias.kind] if n == "b1" or n in free or getattr(c.bias, n) != 0]
    density = Density(
        pm,
        stages_of(c),
        cosmology,
        depends=[name for name in depends if name == "Om0"],
        bias=c.bias.kind,
        terms=terms,
        los=c.model.line_of_sight if c.model.redshift_space else None,
        modes="modes",
    )
    fixed: dict[str, Any] = {name: float(getattr(c.bias, name)) for name in terms if name not in free}
    return {"modes": modes, **free}, functools.partial(density, **fixed)


class Survey:
    """What was observed, or made up, and the posterior of what it was made from.

    Attributes
    ----------
    priors : dict
        Of the modes and of the free parameters.
    d : RealField
        The density in units of its mean, 0 in cells that were not observed.
    sigma : float or RealField
        The standard deviation of its noise; if that is free, for an amplitude of 1.
    mask : RealField or None
        The part of each cell that was observed.
    truth : dict or None
        The latents from which the data were made up.
    clean : RealField or None
        The density without noise, if known.
    """

    def __init__(self, c: Configuration, pm: ParticleMesh) -> None:
        self.pm, self.c = pm, c
        self.truth: dict[str, Any] | None = None
        self.clean: RealField | None = None
        self.mask: RealField | None = None if c.mask.file is None else self._read_mask()
        self.priors, self.forward = forward_model(c, pm)
        noise: Any = c.noise.sigma
        if isinstance(noise, dict):
            self.priors["sigma"], noise = prior_of(noise), 1.0
        if c.noise.file is not None:
            noise = self._read_noise_map()
        if c.data.kind == "mock":
            self.sigma = self._spread_noise(noise)
            self._make_up(c.data.seed)
        else:
            self._read(noise)

    def posterior(self, smoothing: float | None = None, d: RealField | None = None) -> Posterior:
        """The posterior, in which densities are compared that are smoothed at a scale (Mpc/h), by default as the
        configuration says; for other data, if they are given."""
        scale = self.c.data.smoothing if smoothing is None else smoothing
        given: dict[str, Any] = dict(
            sigma=self.sigma,
            mask=None if self.mask is None else self._like(self.mask.value > 0),
            amplitude="sigma" if "sigma" in self.priors else None,
        )
        d = self.d if d is None else d
        likelihood = Smoothed(d, scale=scale, **given) if scale else Gaussian(d, **given)
        return Posterior(self.priors, self.forward, dict(density=likelihood), self.pm.comm)

    def _like(self, values: Array) -> RealField:
        return self.pm.create(type="real", value=values)

    def _read_mask(self) -> RealField:
        path = self.c.path(self.c.mask.file)
        mask = read_mesh(path, "mask", self.c.mask, self.pm)
        offset = [part.start for part in mask.slices]
        good = (mask.value >= 0) & (mask.value <= 1)
        if told := check_numbers(self.pm.comm, mask.value, good, offset, "values are not between 0 and 1"):
            raise BadData(f"{path}: {told}", "mask.array")
        if not mask.csum() > 0:
            raise BadData(f"{path}: nothing was observed, all values are 0", "mask.array")
        return mask

    def _read_noise_map(self) -> RealField:
        path = self.c.path(self.c.noise.file)
        sigma = read_mesh(path, "noise", self.c.noise, self.pm)
        offset = [part.start for part in sigma.slices]
        if told := check_numbers(
            self.pm.comm, sigma.value, sigma.value > 0, offset, "values are not above 0"
        ):
            raise BadData(f"{path}: {told}", "noise.array")
        return sigma

    def _spread_noise(self, sigma: Any) -> Any:
        """The standard deviation in each cell, of which only a part may have been observed."""
        if self.mask is None:
            return sigma
        part = numpy.where(self.mask.value > 0, self.mask.value, 1.0)
        return self._like(getattr(sigma, "value", sigma) / part**0.5)

    def _read(self, noise: Any) -> None:
        """Read a density or a catalogue, and bring it to a mean of 1."""
        c = self.c
        if c.data.kind == "density":
            d = read_mesh(c.path(c.data.file), "data", c.data, self.pm)
            d = d + 1.0 if c.data.contrast else d
        else:
            d, number = read_catalogue(c, self.pm)
            observed = float(self.pm.Nmesh.prod()) if self.mask is None else float(self.mask.csum())
            noise = (observed / number) ** 0.5 if noise is None else noise
        self.sigma = self._spread_noise(noise)
        self.d = self._normalise(d)

    def _normalise(self, d: RealField) -> RealField:
        """A density in units of its mean in the cells that were observed, which may be counts that miss some."""
        c, cells = self.c, float(self.pm.Nmesh.prod())
        if self.mask is not None:
            seen = self.mask.value > 0
            part = numpy.where(seen & (c.data.kind == "catalogue"), self.mask.value, 1.0)
            weight = self._like(numpy.where(seen, self.mask.value, 0.0))
            d = self._like(numpy.where(seen, d.value / part, 0.0))
            cells = float(weight.csum())
        else:
            weight = self._like(numpy.ones(d.value.shape))
        mean = d.cdot(weight) / cells
        spread = (max((d * d).cdot(weight) / cells - mean**2, 0.0)) ** 0.5
        if not mean > 1e-3 * spread:
            told = f"expected a density with a positive mean, got the mean {mean:.3g}"
            raise BadData(
                f"{c.path(c.data.file)}: {told}; if this is delta, say contrast = true", "data.array"
            )
        return d * (1.0 / mean)

    def _make_up(self, seed: int) -> None:
        """A density from white noise and the most probable parameters, with noise."""
        latents = {name: prior.zeros() for name, prior in self.priors.items()}
        self.truth = {**latents, "modes": white_noise(self.pm, seed)}
        blank = self.posterior(d=self._like(numpy.zeros(self.truth["modes"].value.shape)))
        found = blank.forecast(self.truth, ["density", *self.priors])
        self.clean = found["density"]
        amplitude = float(found.get("sigma", 1.0))
        noise = white_noise(self.pm, seed, purpose="noise of data")
        d = self.clean.value + noise.value * getattr(self.sigma, "value", self.sigma) * amplitude
        self.d = self._like(d if self.mask is None else numpy.where(self.mask.value > 0, d, 0.0))
